import math
import re
import sys

import pytest
import torch
from curvlinops import GGNLinearOperator, HessianLinearOperator
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased.quadratics.bias import BiasReport, Comparison, bias_report
from laplace_debiased.quadratics.derivatives import directional_derivatives
from laplace_debiased.sampling.folds import draw_uniformly
from tests import dense
from tests.cases import batch, network
from tests.fits import TWO_BATCH, debiased
from tests.fits import loader as training

SIZE, BATCH = 120, 20
OPTIONS = {"num_directions": 5, "batch_size": BATCH, "num_batches": 3}
OPERATORS = {"ggn": GGNLinearOperator, "hessian": HessianLinearOperator}


@pytest.fixture(scope="module")
def problem():
    model = network("mlp")
    X, y = batch("mlp", SIZE)
    return model, list(model.parameters()), X, y


def report(problem, **options):
    model, params, X, y = problem
    train = DataLoader(TensorDataset(X, y), 16, shuffle=True)
    loss = nn.CrossEntropyLoss()
    return bias_report(model, loss, params, train, **OPTIONS | options)


def quadratic(problem, points, kind):
    model, params, X, y = problem
    X, y, loss = X[points], y[points], nn.CrossEntropyLoss()
    H = OPERATORS[kind](model, loss, params, [(X, y)])
    gradient = parameters_to_vector(torch.autograd.grad(loss(model(X), y), params))
    return H @ torch.eye(len(gradient)).double(), gradient


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_report_equals_dense_quadratics(problem, kind):
    _, _, X, y = problem
    own = report(problem, curvature=kind, damping=0.2, seed=4, tol=1e-14)
    order = draw_uniformly(DataLoader(TensorDataset(X, y)), None, 4).indices
    H, g = quadratic(problem, order[:BATCH], kind)
    values, vectors = torch.linalg.eigh(H)
    U = vectors.flip(1)[:, :5]
    U = U * (U.T @ g).sign()
    assert torch.allclose(own.curvature.own, values.flip(0)[:5] + 0.2, rtol=1e-9)
    assert torch.allclose(own.slope.own, U.T @ g, rtol=1e-8, atol=1e-10)
    parts = [(own.curvature.overall, own.slope.overall, order)]
    for k in range(3):
        points = order[(k + 1) * BATCH : (k + 2) * BATCH]
        parts.append((own.curvature.others[k], own.slope.others[k], points))
    for curvature, slope, points in parts:
        H, g = quadratic(problem, points, kind)
        expected = (U * (H @ U)).sum(0) + 0.2
        assert torch.allclose(curvature, expected, rtol=1e-8, atol=1e-10)
        assert torch.allclose(slope, U.T @ g, rtol=1e-8, atol=1e-10)
    assert own.num_points == BATCH


def test_a_part_of_the_data_stands_for_all_with_the_batch_at_its_own_share(problem):
    _, _, X, y = problem
    own = report(problem, num_points=80)
    order = draw_uniformly(DataLoader(TensorDataset(X, y)), 80, 0).indices
    H, _ = quadratic(problem, order[:BATCH], "ggn")
    rest, _ = quadratic(problem, order[BATCH:], "ggn")
    U = torch.linalg.eigh(H).eigenvectors.flip(1)[:, :5]
    overall = (BATCH * H + (SIZE - BATCH) * rest) / SIZE
    expected = (U * (overall @ U)).sum(0)
    assert torch.allclose(own.curvature.overall, expected, rtol=1e-3, atol=1e-6)
    low, high = own.curvature.interval
    assert ((low < own.curvature.ratio) & (own.curvature.ratio < high)).all()


def test_conjugate_directions(problem):
    _, _, X, y = problem
    own = report(problem, directions="cg", damping=0.1)
    order = draw_uniformly(DataLoader(TensorDataset(X, y)), None, 0).indices
    H, g = quadratic(problem, order[:BATCH], "ggn")
    unit = g / g.norm()
    assert own.slope.own[0] == pytest.approx(g.norm().item(), rel=1e-6)
    expected = (unit @ H @ unit + 0.1).item()
    assert own.curvature.own[0] == pytest.approx(expected, rel=1e-6)
    assert own.curvature.own.shape == (5,)


def test_a_group_of_ranks_has_an_interval_of_its_own(problem):
    curvature = report(problem).curvature
    assert curvature.resampled.shape == (1000, 5)
    ranks = slice(1, 5)
    ratios = curvature.own[1:].mean() / curvature.resampled[:, 1:].mean(1)
    expected = ratios.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    low, high = curvature.group_interval(ranks)
    assert (low, high) == pytest.approx(tuple(expected.tolist()), rel=1e-12)
    ratio = curvature.group_ratio(ranks)
    assert low < ratio < high
    # errors of single ranks partly cancel
    single_low, single_high = curvature.interval[:, ranks].mean(1).tolist()
    assert high - low < single_high - single_low
    row = f"| {ratio:.2f} ({low:.2f} to {high:.2f}) |"
    assert row in report(problem).table()


def test_bootstrap_samples_are_weighted_means_over_points(problem):
    """Their spread is that of a mean: the deviation of points over their root."""
    model, params, X, y = problem
    own = report(problem, seed=2, num_directions=3, tol=1e-12).curvature
    order = draw_uniformly(DataLoader(TensorDataset(X, y)), None, 2).indices
    H, _ = quadratic(problem, order[:BATCH], "ggn")
    U = torch.linalg.eigh(H).eigenvectors.flip(1)[:, :3]
    data = [(X, y)]
    loss = nn.CrossEntropyLoss()
    contributions = directional_derivatives(model, loss, params, data, U).curvatures
    expected = contributions.std(0) / SIZE**0.5
    assert torch.allclose(own.resampled.std(0), expected, rtol=0.1)
    assert torch.allclose(own.resampled.mean(0), own.overall, rtol=0.03)


def test_intervals_cover_the_population_ratio():
    """On a linear model with known inputs, the curvature of all data is known."""
    torch.manual_seed(0)
    model = nn.Linear(6, 1, bias=False).double()
    covered = []
    for _ in range(40):
        X, y = torch.randn(300, 6).double(), torch.randn(300, 1).double()
        own = bias_report(
            model,
            nn.MSELoss(),
            list(model.parameters()),
            DataLoader(TensorDataset(X, y), 300),
            num_directions=3,
            batch_size=30,
            num_batches=2,
        ).curvature
        low, high = own.interval
        truth = own.own / 2  # the loss is a square: its curvature is twice that of x
        covered.append((low <= truth) & (truth <= high))
    share = torch.stack(covered).double().mean()
    assert 0.85 < share <= 1


def comparison(own, overall):
    own, overall = torch.tensor(own), torch.tensor(overall)
    return Comparison(own, overall.expand(2, -1), overall)


def test_summary_tells_how_many_points_would_do():
    biased = BiasReport("eigenvectors", 100, comparison([6.0, 3.0], [2.0, 1.0]))
    assert biased.summary() == (
        "Along their top 2 eigenvectors, 100 points have 3.0 times the curvature of "
        "all data: a budget of about 2000 points would have 1.1 times."
    )
    fine = BiasReport("eigenvectors", 100, comparison([2.1, 1.0], [2.0, 1.0]))
    assert fine.summary().endswith("1.0 times the curvature of all data.")


def test_a_sufficient_budget_counts_the_points_that_give_no_directions():
    la = debiased(network("mlp"), **TWO_BATCH, direction_fraction=0.25)
    la.fit(training())
    report = la.bias_report(num_directions=5)
    assert report.num_points == 15 and report.direction_share == 0.25
    excess = report.curvature.group_ratio(slice(5)) - 1
    assert report.sufficient_points(5) == max(1, math.ceil(60 * excess / 0.1))
    assert "of held-out points" in report.summary(5)


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("directions", ["eigenvectors", "cg"])
@pytest.mark.parametrize("name", ["cnn-stride-padding", "transformer"])
def test_reports_of_other_networks(name, directions, curvature):
    model = network(name)
    params = list(model.parameters())
    train = DataLoader(TensorDataset(*batch(name, SIZE)), 16)
    options = OPTIONS | {"directions": directions, "curvature": curvature}
    own = bias_report(model, nn.CrossEntropyLoss(), params, train, **options)
    assert own.curvature.own.isfinite().all()


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, nn.MSELoss])
@pytest.mark.parametrize("directions", ["eigenvectors", "cg"])
def test_losses_summed_over_examples_are_reported_as_means(problem, directions, loss):
    model, params, X, y = problem
    y = y if loss is nn.CrossEntropyLoss else torch.randn(SIZE, 3).double()
    train = DataLoader(TensorDataset(X, y), 16)
    mean, total = (
        bias_report(
            model,
            loss(reduction=reduction),
            params,
            train,
            directions=directions,
            damping=damping,
            **OPTIONS,
        )
        # MSELoss averages over the outputs, too
        for reduction, damping in (("mean", 0.1), ("sum", 0.1 * scale_of(loss)))
    )
    expected = scale_of(loss) * mean.curvature.own
    assert torch.allclose(total.curvature.own, expected, rtol=1e-4)


def scale_of(loss):
    return 3 if loss is nn.MSELoss else 1


def test_without_gradient_there_are_no_conjugate_directions():
    model = nn.Linear(3, 2, bias=False).double()
    nn.init.zeros_(model.weight)
    X = torch.randn(SIZE, 3).double()
    train = DataLoader(TensorDataset(X, torch.zeros(SIZE, 2).double()), 16)
    with pytest.raises(ValueError, match="gradient is zero"):
        bias_report(
            model, nn.MSELoss(), [model.weight], train, directions="cg", **OPTIONS
        )


def test_table_has_means_over_ranks(problem):
    own = report(problem, num_directions=7)
    rows = re.findall(r"^\| (\w+) \| (\d+) to (\d+) \|", own.table(), re.MULTILINE)
    ranges = [("1", "1"), ("2", "5"), ("6", "7")]
    assert rows == [(q, *r) for q in ("slope", "curvature") for r in ranges]
    mean = own.curvature.own[1:5].mean().item()
    assert f"| curvature | 2 to 5 | {mean:.3g} |" in own.table()


def test_figure_shows_both_quantities(problem, tmp_path):
    own = report(problem)
    figure = own.plot(tmp_path / "bias.png")
    assert (tmp_path / "bias.png").read_bytes().startswith(b"\x89PNG")
    slopes, curvatures = figure.axes
    assert curvatures.lines[0].get_ydata() == pytest.approx(own.curvature.own.tolist())
    assert slopes.lines[2].get_ydata() == pytest.approx(own.slope.overall.tolist())


def test_table_and_figure_name_what_points_are_compared_with(problem):
    la = debiased(network("mlp"))
    la.fit(training())
    reports = {"held-out points": la.bias_report(), "all data": report(problem)}
    for name, own in reports.items():
        header, *_ = own.table().splitlines()
        assert f"| {name} |" in header
        for axis in own.plot().axes:
            assert axis.lines[2].get_label() == name


def test_figure_needs_matplotlib(problem, monkeypatch):
    own = report(problem)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="Figures need matplotlib"):
        own.plot()


def kfac_values(model, source, bases):
    blocks = dense.kfac_blocks(
        dense.kronecker_factors(
            model,
            *(torch.cat(p) for p in zip(*source, strict=True)),
            nn.CrossEntropyLoss(reduction="sum"),
        )
    )
    return torch.cat(
        [(U.T @ H @ U).diagonal() for U, H in zip(bases, blocks, strict=True)]
    )


def test_report_in_the_kfac_eigenbasis_equals_dense_reference():
    model, train = network("mlp"), training(size=60)
    la = debiased(model, **TWO_BATCH)
    la.fit(train)
    own = la.bias_report(num_directions=8)
    halves = [f.loader for f in draw_uniformly(train, None, 0).split([0.5, 0.5]).folds]
    X, y = (torch.cat(p) for p in zip(*halves[0], strict=True))
    bases = dense.eigenbases(
        dense.kronecker_factors(model, X, y, nn.CrossEntropyLoss(reduction="sum"))
    )
    mine, theirs = (2 * kfac_values(model, half, bases) for half in halves)
    order = mine.argsort(descending=True)[:8]
    assert own.num_points == 30
    assert torch.allclose(own.curvature.own, mine[order])
    assert torch.allclose(own.curvature.overall, theirs[order])
    assert "K-FAC eigenvectors, 30 points have" in own.summary()


def test_report_after_a_cross_fit_averages_the_folds():
    la = debiased(network("mlp"), num_folds=3)
    la.fit(training(size=60))
    own = la.bias_report(num_directions=6)
    assert own.num_points == 40 and own.curvature.others.shape == (3, 6)
    assert torch.allclose(own.curvature.others.mean(0), own.curvature.overall)


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_report_with_exact_magnitudes_computes_the_factors_again(subset):
    options = {"subset": subset, "budget": 30, "pool_size": 50}
    model, train = network("mlp"), training(size=60)
    la = debiased(model, magnitudes="ggn", **options)
    la.fit(train)
    with pytest.raises(ValueError, match="`train_loader` is needed"):
        la.bias_report()
    before = la.H.to_matrix()
    own = la.bias_report(train)
    reference = debiased(model, **options)
    reference.fit(train)
    assert torch.allclose(own.curvature.own, reference.bias_report().curvature.own)
    assert torch.equal(la.H.to_matrix(), before)


def test_a_fit_is_needed():
    with pytest.raises(AttributeError):
        debiased(network("mlp")).bias_report()


@pytest.mark.parametrize("directions", ["eigenvectors", "cg"])
def test_the_model_stays_as_it_was(directions):
    model = network("resnet")
    model[0].train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    train = DataLoader(TensorDataset(*batch("resnet", SIZE)), 16)
    arguments = nn.CrossEntropyLoss(), list(model.parameters()), train
    bias_report(model, *arguments, directions=directions, **OPTIONS)
    assert [m for m in model.modules() if m.training] == [model[0]]
    model.train()
    with pytest.raises(ValueError, match=r"'1' \(BatchNorm2d\) .* `model.eval\(\)`"):
        bias_report(model, *arguments, directions=directions, **OPTIONS)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": "random"}, "`directions` must be one of"),
        ({"curvature": "fisher"}, "`curvature` must be one of"),
        ({"batch_size": 60}, "need 240 points, but there are 120"),
        ({"num_batches": 0}, "`num_batches` must be at least 1"),
        ({"num_directions": 0}, r"`num_directions` must lie in 1..42, got 0"),
        ({"num_directions": 43}, r"`num_directions` must lie in 1..42, got 43"),
    ],
)
def test_bad_arguments_are_refused(problem, options, message):
    with pytest.raises(ValueError, match=message):
        report(problem, **options)


def test_loaders_of_mappings_are_refused(problem):
    model, params, X, y = problem
    data = [{"x": x, "labels": label} for x, label in zip(X, y, strict=True)]
    train = DataLoader(data, 16)
    with pytest.raises(TypeError, match=r"yield pairs .* but yields dict"):
        bias_report(model, nn.CrossEntropyLoss(), params, train, **OPTIONS)


@pytest.mark.parametrize("directions", ["eigenvectors", "cg"])
def test_parameters_may_have_any_memory_layout(directions):
    name, reports = "cnn-stride-padding", []
    train = DataLoader(TensorDataset(*batch(name, SIZE)), 16)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = network(name).to(memory_format=memory_format)
        arguments = nn.CrossEntropyLoss(), list(model.parameters()), train
        own = bias_report(model, *arguments, directions=directions, **OPTIONS)
        reports.append(own.curvature.overall)
    assert torch.allclose(*reports)
