"""Outputs with positions: tokens, pixels."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from laplace_debiased import (
    DebiasedKFACLinearOperator,
    curvature_scores,
    directional_derivatives,
)
from laplace_debiased.predictive.links import probit_probabilities
from laplace_debiased.rows.output_curvature import (
    OutputCurvature,
    example_losses,
    is_counted,
)
from laplace_debiased.rows.positions import restored
from tests.fits import debiased, posterior

CLASSES, SIZE = 3, 12
IGNORED = -100


class Tagger(nn.Module):
    """Tags each token, by itself and those before it."""

    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Embedding(6, 4), nn.Linear(4, CLASSES)
        self.mix = nn.Linear(4, 4)

    def forward(self, x):
        hidden = self.tokens(x)
        return self.head((hidden + self.mix(hidden.cumsum(1))).tanh())


def segmenter():
    """Classifies pixels; the classes are on the second axis."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, CLASSES, 1)
    )


def tokens(size=SIZE, length=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randint(6, (size, length), generator=generator)
    return X, torch.randint(CLASSES, (size, length), generator=generator)


def pixels(size=SIZE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(size, 1, 2, 2, generator=generator).double()
    return X, torch.randint(CLASSES, (size, 2, 2), generator=generator)


KINDS = {"tokens": (Tagger, tokens, -1), "pixels": (segmenter, pixels, 1)}


def fitted(kind, **options):
    build, data, axis = KINDS[kind]
    torch.manual_seed(0)
    model, (X, y) = build().double(), data()
    la = debiased(model, class_axis=axis, prior_precision=0.5, **options)
    la.fit(DataLoader(TensorDataset(X, y), 5))
    return la, X, y


def jacobians(la, X):
    """``[batch, positions * classes, params]``, classes last."""
    axis, params = la.class_axis, la.fitted_params
    rows = []
    for x in X:
        output = la.model(x[None]).movedim(axis, -1).flatten()
        rows.append(
            torch.stack(
                [
                    torch.cat(
                        [
                            g.flatten()
                            for g in torch.autograd.grad(f, params, retain_graph=True)
                        ]
                    )
                    for f in output
                ]
            )
        )
    return torch.stack(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_variances_of_positions_are_exact(kind):
    la, X, _ = fitted(kind)
    J = jacobians(la, X)
    exact = (J @ torch.linalg.solve(posterior(la), J.mT)).diagonal(dim1=1, dim2=2)
    f_mu, f_var = la._glm_predictive_distribution(X, diagonal_output=True)
    assert torch.allclose(f_var, exact)
    output = la.model(X)
    last = output.movedim(la.class_axis, -1)
    assert torch.allclose(f_mu, last.flatten(1))
    p = probit_probabilities(last.reshape(-1, CLASSES), exact.reshape(-1, CLASSES))
    expected = p.view(last.shape).movedim(-1, la.class_axis)
    assert torch.allclose(la(X), expected)
    assert la(X).shape == output.shape


def signed(targets, output, sign):
    """Columns of a square root by given signs of the positions."""
    curvature = OutputCurvature(nn.CrossEntropyLoss())
    generator = torch.Generator()
    points = output.view(-1, CLASSES)
    columns = curvature.columns(points, targets.flatten(), generator)
    own = columns.unflatten(1, targets.shape)
    return (own * sign[:, None]).flatten(2)


def test_columns_are_those_of_positions_by_signs():
    """Averaged over all signs, they give the exact curvature, which is no mixture."""
    torch.manual_seed(0)
    targets = torch.randint(CLASSES, (2, 3))
    output = torch.randn(2, 3 * CLASSES).double()
    total = torch.zeros(2, 9, 9).double()
    signs = [torch.tensor(own) for own in product([1, -1], repeat=3)]
    for sign in signs:
        own = signed(targets, output, sign)
        total += torch.einsum("kni,knj->nij", own, own) / len(signs)
    p = output.view(2, 3, CLASSES).softmax(-1)
    blocks = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
    exact = torch.stack([torch.block_diag(*own) for own in blocks])
    assert torch.allclose(total, exact)

    curvature, generator = OutputCurvature(nn.CrossEntropyLoss()), torch.Generator()
    seen = {
        tuple(curvature.columns(output, targets, generator)[0, 0].sign().tolist())
        for _ in range(100)
    }
    assert len(seen) == 8
    mean = torch.zeros_like(exact)
    for _ in range(2000):
        own = curvature.columns(output, targets, generator)
        mean += torch.einsum("kni,knj->nij", own, own) / 2000
    assert (mean - exact).norm() < 0.05 * exact.norm()
    traces = exact.diagonal(dim1=1, dim2=2).sum(1)
    assert torch.allclose(curvature.traces(output, targets), traces)


def test_no_more_backward_passes_than_for_one_position():
    curvature, generator = OutputCurvature(nn.CrossEntropyLoss()), torch.Generator()
    output, targets = torch.randn(2, 5 * CLASSES), torch.randint(CLASSES, (2, 5))
    assert len(curvature.columns(output, targets, generator)) == CLASSES - 1
    ranked = OutputCurvature(nn.MSELoss(), fisher_rank=1)
    assert len(ranked.columns(output, output.view(2, 5, -1), generator)) == 2


def test_ignored_positions_have_no_loss_and_no_curvature():
    loss, generator = nn.CrossEntropyLoss(), torch.Generator()
    output = torch.randn(2, 2 * CLASSES).double()
    targets = torch.tensor([[1, IGNORED], [IGNORED, IGNORED]])
    columns = OutputCurvature(loss).columns(output, targets, generator)
    assert columns[:, 0, :CLASSES].any()
    assert not columns[:, 0, CLASSES:].any() and not columns[:, 1].any()
    expected = nn.functional.cross_entropy(output[:1, :CLASSES], targets[0, :1])
    losses = example_losses(loss, output, targets)
    assert torch.allclose(losses, torch.stack([expected, torch.zeros_like(expected)]))
    assert is_counted(loss, targets).tolist() == [True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_sum_over_positions(kind):
    la, X, y = fitted(kind)
    output = la.model(X).movedim(la.class_axis, 1)
    expected = nn.functional.cross_entropy(output, y, reduction="sum")
    assert torch.allclose(la.loss, expected) and la.n_outputs == CLASSES
    assert la.n_data == SIZE


def test_curvature_is_unbiased():
    """Its trace is that of the exact one, over several signs."""
    traces = []
    for seed in range(25):
        la, X, _ = fitted("tokens", magnitudes="ggn", seed=seed, estimator="two_batch")
        traces.append(la.H.to_matrix().trace())
    traces = torch.stack(traces)
    J = jacobians(la, X)
    p = la.model(X).softmax(-1)
    blocks = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
    exact = sum(
        torch.einsum("ij,ip,jp->", torch.block_diag(*own), j, j)
        for own, j in zip(blocks, J, strict=True)
    )
    error = (traces.mean() - exact).abs()
    assert error < 4 * traces.std() / len(traces) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_tell_uncertainty_of_each_position(kind):
    la, X, y = fitted(kind)
    train = DataLoader(TensorDataset(X, y), 5)
    la.calibrate(train)
    found = la.uncertainty(X)
    assert found.probabilities.shape == found.functional_variance.shape
    assert torch.allclose(found.probabilities, la(X))
    assert found.epistemic.shape == y.shape == found.total.shape
    assert (found.epistemic > 0).all()
    report = la.report(train, foreign_loader=[X])
    assert report.num_points == y.numel()
    samples = la(X, pred_type="nn", link_approx="mc", n_samples=4)
    assert samples.shape == la(X).shape
    assert torch.allclose(samples.sum(la.class_axis), torch.ones(y.shape).double())
    la.optimize_prior_precision(method="gridsearch", val_loader=train, grid_size=3)
    with pytest.raises(ValueError, match="link_approx='probit'"):
        la(X, link_approx="mc")


def test_lengths_may_differ_between_batches():
    la, *_ = fitted("tokens")
    batches = [tokens(4, length, length) for length in (2, 4)]
    la.fit(DataLoader(TensorDataset(*batches[1]), 4), override=False)
    for X, y in batches:
        assert la(X).shape == (*y.shape, CLASSES)


def test_many_positions_are_sampled():
    torch.manual_seed(0)
    model = segmenter().double()
    X = torch.randn(6, 1, 12, 12).double()
    y = torch.randint(CLASSES, (6, 12, 12))
    la = debiased(model, class_axis=1, prior_precision=2.0)
    la.fit(DataLoader(TensorDataset(X, y), 3))
    with pytest.warns(UserWarning, match="432 outputs are estimated by 64 samples"):
        p = la(X)
    la.forward_samples = None
    assert (p - la(X)).abs().max() < 0.1


def test_checkpoints_hold_them(tmp_path):
    la, X, _ = fitted("pixels")
    la.save(tmp_path / "la.pt")
    restored_la = debiased(la.model, class_axis=1, prior_precision=0.5)
    restored_la.load(tmp_path / "la.pt")
    assert torch.equal(restored_la(X), la(X))


def test_outputs_with_positions_need_a_class_axis():
    torch.manual_seed(0)
    X, y = pixels()
    train = DataLoader(TensorDataset(X, y), 5)
    with pytest.raises(ValueError, match="`class_axis` says which axis"):
        debiased(segmenter().double()).fit(train)
    for axis in (0, 4, -4):
        with pytest.raises(ValueError, match="after the first"):
            debiased(segmenter().double(), class_axis=axis).fit(train)
    wrong = DataLoader(TensorDataset(X, y[:, :1]), 5)
    with pytest.raises(ValueError, match=r"Targets must have shape \[5, 2, 2\]"):
        debiased(segmenter().double(), class_axis=1).fit(wrong)


def test_values_are_restored_to_the_order_of_axes():
    output = torch.randn(2, 3, 4, 5)
    last = output.movedim(1, -1)
    assert torch.equal(restored(last.reshape(-1, 3), output.shape, 1), output)
    values = output[:, 0]
    assert torch.equal(restored(values.flatten(), output.shape, 1), values)


def test_regressions_have_a_variance_for_each_position():
    torch.manual_seed(0)
    model = segmenter().double()
    X = torch.randn(8, 1, 2, 2).double()
    y = torch.randn(8, CLASSES, 2, 2).double()
    la = debiased(model, "regression", class_axis=1)
    la.fit(DataLoader(TensorDataset(X, y), 3))
    f_mu, f_var = la(X)
    assert torch.allclose(f_mu, model(X)) and f_var.shape == y.shape
    loss = 0.5 * nn.functional.mse_loss(model(X), y, reduction="sum")
    assert torch.allclose(la.loss, loss)


def noisy_pixels(size=40):
    torch.manual_seed(0)
    model = nn.Conv2d(1, 2, 3, padding=1).double()
    X = torch.randn(size, 1, 4, 4).double()
    y = model(X).detach() + 0.3 * torch.randn(size, 2, 4, 4).double()
    la = debiased(model, "regression", class_axis=1)
    la.fit(DataLoader(TensorDataset(X, y), 16))
    return la, X, y


def test_densities_of_regressions_are_those_of_all_positions():
    la, X, y = noisy_pixels()
    la.sigma_noise = 0.7
    normal = torch.distributions.Normal(la.model(X), 0.7)
    assert torch.allclose(la.log_likelihood, normal.log_prob(y).sum())
    la.optimize_prior_precision(tune_sigma_noise=True)
    assert la.sigma_noise.item() == pytest.approx(0.3, rel=0.1)
    report = la.report(DataLoader(TensorDataset(X, y), 16))
    assert report.posterior.coverage_90 == pytest.approx(0.9, abs=0.03)


def test_regressions_have_equally_many_positions():
    la, *_ = noisy_pixels()
    X, y = torch.randn(3, 1, 5, 5).double(), torch.randn(3, 2, 5, 5).double()
    batches = [(X, y), (X[..., 1:], y[..., 1:])]
    with pytest.raises(ValueError, match="equally many positions"):
        la.fit(batches)


@pytest.mark.filterwarnings("ignore")
def test_ignored_positions_have_no_part_in_what_is_chosen():
    """Metrics may not know the class that is ignored."""
    la, X, y = fitted("pixels")
    y = y.clone()
    y[:, 1], y[3] = IGNORED, IGNORED
    counted = y != IGNORED
    val = DataLoader(TensorDataset(X, y), 5)
    assert la.calibrate(val, optimize_prior=False).num_points == counted.sum()
    report = la.report(val)
    assert report.num_points == counted.sum()
    p = la.uncertainty(X).probabilities.movedim(1, -1)[counted]
    assert report.posterior.nll == pytest.approx(cross_entropy_of(p, y[counted]))
    accuracy = MulticlassAccuracy(CLASSES, average="micro")
    options = {"method": "gridsearch", "val_loader": val, "grid_size": 3}
    la.optimize_prior_precision(**options, loss=accuracy)
    with pytest.raises(ValueError, match="Of outputs with positions, a grid search"):
        la.optimize_prior_precision(**options, pred_type="nn", link_approx="mc")


def cross_entropy_of(p, y):
    return nn.functional.nll_loss(p.log(), y).item()


def test_what_needs_all_covariances_or_exchangeable_points_is_refused():
    la, X, y = fitted("pixels")
    for samples in (la.functional_samples, la.predictive_samples):
        with pytest.raises(ValueError, match="there are variances alone"):
            samples(X)
        assert samples(X, pred_type="nn", n_samples=2).shape == (2, *la(X).shape)
    with pytest.raises(ValueError, match="are not exchangeable"):
        la.conformal_sets(DataLoader(TensorDataset(X, y), 5))
    regression, *data = noisy_pixels()
    with pytest.raises(ValueError, match="are not exchangeable"):
        regression.conformal_intervals(DataLoader(TensorDataset(*data), 5))


def test_posteriors_of_a_network_may_have_other_axes():
    la, X, _ = fitted("pixels")
    before = la(X)
    debiased(la.model)  # would have an output without positions
    assert torch.equal(la(X), before)
    la.fit(DataLoader(TensorDataset(*pixels()), 5), override=False)


@pytest.mark.parametrize(
    ("likelihood", "targets"),
    [
        ("classification", torch.randint(3, (SIZE, 2))),
        ("classification", torch.rand(SIZE, 2, 3).softmax(-1)),
        ("regression", torch.randn(SIZE, 2, 3)),
    ],
)
def test_targets_with_positions_need_a_class_axis(likelihood, targets):
    """Six outputs are not two positions of three, unless that is said."""
    la = debiased(nn.Linear(4, 6), likelihood)
    train = DataLoader(TensorDataset(torch.randn(SIZE, 4), targets), 5)
    with pytest.raises(ValueError, match="say by `class_axis`"):
        la.fit(train)


@pytest.mark.parametrize("limit", [None, 2**14])
def test_sampled_uncertainty_is_that_of_dependent_outputs(limit):
    """Samples of the outputs of each position by itself; in chunks, the same."""
    la, X, _ = fitted("tokens")
    la.forward_samples, la.memory_limit = 256, limit
    found = la.uncertainty(X)
    changes = [change for _, change in la._output_changes(X)]
    root = torch.stack([own.view(-1, CLASSES) for own in changes]) / 256**0.5
    covariance = torch.einsum("snc,snd->ncd", root, root)
    mean = found.mean.view(-1, CLASSES)
    noise = torch.randn(20_000, *mean.shape).double()
    L = torch.linalg.cholesky(covariance + 1e-9 * torch.eye(CLASSES))
    p = (mean + torch.einsum("ncd,snd->snc", L, noise)).softmax(-1)
    total = torch.special.entr(p.mean(0)).sum(-1)
    aleatoric = torch.special.entr(p).sum(-1).mean(0)
    for own, other in ((found.total, total), (found.aleatoric, aleatoric)):
        assert torch.allclose(own.flatten(), other, rtol=0.03, atol=0.02)
    la.forward_samples = None  # independent, as exact covariances are too many
    assert (la.uncertainty(X).epistemic > found.epistemic).double().mean() > 0.8


def test_what_is_no_posteriors_ignores_its_class_axis():
    model, data = Tagger(), [tokens()]
    loss, params = nn.CrossEntropyLoss(), list(model.parameters())
    functions = {
        "operator": lambda: DebiasedKFACLinearOperator(
            model, loss, params, data, data
        ).compute(),
        "gradient": lambda: DebiasedKFACLinearOperator(
            model, loss, params, data, data
        ).gradient_and_loss(),
        "scores": lambda: curvature_scores(model, loss, data),
        "derivatives": lambda: directional_derivatives(
            model, loss, params, data, torch.eye(sum(p.numel() for p in params))[:, :1]
        ),
    }

    def messages():
        found = {}
        for name, function in functions.items():
            with pytest.raises((ValueError, RuntimeError)) as caught:
                function()
            found[name] = str(caught.value)
        return found

    before = messages()
    la = debiased(model, class_axis=-1)
    la.fit(DataLoader(TensorDataset(*data[0]), 6))
    assert messages() == before
    assert la(data[0][0]).shape == (SIZE, 2, CLASSES)
