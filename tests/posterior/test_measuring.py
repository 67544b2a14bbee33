"""Curvature sampling and cross-fit, through the Laplace class."""

from unittest import mock

import pytest
import torch
from laplace.curvature import BackPackGGN
from laplace.curvature.asdl import AsdlGGN
from laplace.curvature.curvlinops import CurvlinopsEF
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased.posterior import fitting
from laplace_debiased.posterior.sources import total_output_curvature
from laplace_debiased.posterior.upstream import output_curvature
from laplace_debiased.rows.seeds import mixed_seed
from laplace_debiased.sampling.draw import draw_points
from laplace_debiased.sampling.folds import Points, draw_uniformly
from laplace_debiased.sampling.shares import best_share, effective_rank
from tests import dense
from tests.cases import batch, network
from tests.fits import SIZE, SUBSETS, TWO_BATCH, debiased, loader, posterior

LOSS = nn.CrossEntropyLoss(reduction="sum")


@pytest.fixture(autouse=True)
def all_positions(monkeypatch):
    """References know of no draw of positions."""
    monkeypatch.setattr("laplace_debiased.posterior.sources.POOL_POSITIONS", None)


def points(fold_loader):
    return [torch.cat(parts) for parts in zip(*fold_loader, strict=True)]


def fold_factors(model, fold_loader, num_data, weights=None):
    """K-FAC's factors of a fold, scaled to all data."""
    X, y = points(fold_loader)
    weights = torch.ones(len(X)) if weights is None else weights
    weights = weights.double() * num_data / weights.sum()
    return dense.kronecker_factors(model, X, y, LOSS, weights=weights)


def mean_factors(factors):
    """The average over folds, of equal size."""
    return {
        owner: [sum(parts) / len(factors) for parts in zip(*each, strict=True)]
        for owner, each in ((o, [f[o] for f in factors]) for o in factors[0])
    }


def eigenvectors(factors):
    """Eigenvectors [U_G, U_A] or [U_G] of each parameter."""
    vectors = []
    for owner, own in factors.items():
        each = [torch.linalg.eigh(factor).eigenvectors for factor in own]
        vectors.append(each)
        if len(own) == 2 and owner.bias is not None:
            vectors.append(each[:1])
    return vectors


def kfac_magnitudes(factors, vectors):
    """(u' G u) and (u' A u) of each parameter."""
    blocks = []
    for owner, own in factors.items():
        blocks.append(own)
        if len(own) == 2 and owner.bias is not None:
            blocks.append(own[:1])
    return [
        [(U.T @ F @ U).diagonal() for F, U in zip(own, us, strict=True)]
        for own, us in zip(blocks, vectors, strict=True)
    ]


def kron(vectors):
    return vectors[0] if len(vectors) == 1 else torch.kron(*vectors)


@pytest.mark.parametrize("num_folds", [2, 3])
@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize("name", ["mlp", "cnn-stride-padding", "resnet"])
def test_cross_fit_equals_dense_reference(name, magnitudes, num_folds):
    model, train = network(name), loader(name)
    la = debiased(
        model, magnitudes=magnitudes, estimator="cross_fit", num_folds=num_folds
    )
    la.fit(train)
    folds = draw_uniformly(train, None, 0).split([1 / num_folds] * num_folds).folds
    factors = [fold_factors(model, fold.loader, SIZE) for fold in folds]
    values = []
    for k, fold in enumerate(folds):
        others = eigenvectors(mean_factors(factors[:k] + factors[k + 1 :]))
        if magnitudes == "kfac":
            values.append(kfac_magnitudes(factors[k], others))
        else:
            X, y = points(fold.loader)
            blocks = dense.ggn_blocks(model, X, y, LOSS)
            values.append(
                [
                    [SIZE / len(X) * (kron(u).T @ H @ kron(u)).diagonal()]
                    for u, H in zip(others, blocks, strict=True)
                ]
            )
    blocks = []
    for u, *each in zip(eigenvectors(mean_factors(factors)), *values, strict=True):
        mean = [sum(parts) / num_folds for parts in zip(*each, strict=True)]
        blocks.append(kron(u) @ torch.diag(kron(mean)) @ kron(u).T)
    expected = torch.block_diag(*blocks)
    expected += torch.eye(len(expected))
    assert dense.relative_error(posterior(la), expected) < 1e-8
    loss = sum(
        SIZE / n * LOSS(model(X), y) / num_folds for X, y, n in map(_sized, folds)
    )
    assert torch.allclose(la.loss, loss)


def _sized(fold):
    X, y = points(fold.loader)
    return X, y, len(X)


def drawn_folds(model, train, pool_size, budget):
    """Each fold's pool, the positions of its drawn points, and their weights."""
    pools = draw_uniformly(train, pool_size, 0).split([0.5, 0.5]).folds
    for k, pool in enumerate(pools):
        X, y = points(pool.loader)
        traces = 1 - model(X).softmax(1).square().sum(1)
        drawn, weights = draw_points(
            traces.detach(), budget // 2, seed=mixed_seed(0, k), strata=y
        )
        yield X, y, drawn, weights * SIZE / len(X)


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_drawn_points_are_weighted_and_the_pool_gives_inputs(name):
    model, train, budget, pool_size = network(name), loader(name), 16, 40
    la = debiased(
        model,
        budget=budget,
        pool_size=pool_size,
        **TWO_BATCH | {"sampling": "curvature"},
    )
    la.fit(train)
    factors, loss = [], 0.0
    for X, y, drawn, weights in drawn_folds(model, train, pool_size, budget):
        own = dense.kronecker_factors(model, X[drawn], y[drawn], LOSS, weights=weights)
        inputs = dense.kronecker_factors(model, X, y, LOSS)
        factors.append({o: [f[0], *inputs[o][1:]] for o, f in own.items()})
        loss += SIZE / len(X) * LOSS(model(X), y) / 2
    directions, magnitudes = factors
    expected = dense.debiased(
        dense.eigenbases(directions), dense.kfac_blocks(magnitudes)
    )
    expected += torch.eye(len(expected))
    assert dense.relative_error(posterior(la), expected) < 1e-8
    assert torch.allclose(la.loss, loss)


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize("name", ["mlp", "cnn-stride-padding", "resnet"])
def test_cross_fit_to_drawn_points_equals_dense_reference(name, magnitudes):
    model, train, budget, pool_size = network(name), loader(name), 16, 40
    la = debiased(
        model,
        budget=budget,
        pool_size=pool_size,
        magnitudes=magnitudes,
        estimator="cross_fit",
        sampling="curvature",
    )
    la.fit(train)
    factors, pool_factors, blocks = [], [], []
    for X, y, drawn, weights in drawn_folds(model, train, pool_size, budget):
        X_drawn, y_drawn = X[drawn], y[drawn]
        own = dense.kronecker_factors(model, X_drawn, y_drawn, LOSS, weights=weights)
        inputs = dense.kronecker_factors(model, X, y, LOSS)
        pool_factors.append(inputs)
        factors.append({o: [f[0], *inputs[o][1:]] for o, f in own.items()})
        blocks.append(dense.ggn_blocks(model, X_drawn, y_drawn, LOSS, weights=weights))

    def directions(folds, pools):
        """Gradient directions of folds, input directions of pools."""
        pairs = zip(
            eigenvectors(mean_factors(folds)),
            eigenvectors(mean_factors(pools)),
            strict=True,
        )
        return [[g[0], *a[1:]] for g, a in pairs]

    first, second = factors
    # with `kfac`, input magnitudes come from the other pool
    pools = pool_factors if magnitudes == "ggn" else pool_factors[:1]
    own = directions(factors, pools)
    of_first, of_second = (directions([fold], pools) for fold in factors)
    if magnitudes == "kfac":
        a = kfac_magnitudes(first, of_second)
        b = kfac_magnitudes(second, of_first)
        values = [
            torch.outer((G + H) / 2, B[0]) if B else (G + H) / 2
            for (G, *_), (H, *B) in zip(a, b, strict=True)
        ]
    else:
        values = [
            ((kron(v).T @ H @ kron(v)) + (kron(u).T @ J @ kron(u))).diagonal() / 2
            for u, v, H, J in zip(of_first, of_second, *blocks, strict=True)
        ]
    expected = torch.block_diag(
        *(
            kron(u) @ torch.diag(value.flatten()) @ kron(u).T
            for u, value in zip(own, values, strict=True)
        )
    )
    expected += torch.eye(len(expected))
    assert dense.relative_error(posterior(la), expected) < 1e-8


def test_gradient_covariances_are_unbiased():
    model, train = network("mlp"), loader()
    for parameter in model.parameters():
        parameter.data *= 4  # curvature that differs from point to point
    exact = fold_factors(model, train, SIZE)
    exact = torch.cat([factors[0].flatten() for factors in exact.values()])
    estimates = []
    for seed in range(80):
        la = debiased(model, budget=12, sampling="curvature", pool_size=30, seed=seed)
        la.fit(train)
        estimates += [
            torch.cat([own.gradients.flatten() for own in fold])
            for fold in la.curvature.folds
        ]
    estimates = torch.stack(estimates)
    error = (estimates.mean(0) - exact).abs()
    # a fold's estimates are independent of each other but for the pool
    assert (error < 5 * estimates.std(0) / len(estimates) ** 0.5 + 1e-12).all()


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize("estimator", ["two_batch", "cross_fit"])
@pytest.mark.parametrize("sampling", ["curvature", "uniform"])
@pytest.mark.parametrize("budget", [8, 9, 25])
def test_small_budgets_give_finite_posteriors(
    budget, sampling, estimator, magnitudes, subset
):
    la = debiased(
        network("mlp"),
        subset=subset,
        magnitudes=magnitudes,
        budget=budget,
        sampling=sampling,
        estimator=estimator,
        pool_size=20,
    )
    la.fit(loader())
    la.optimize_prior_precision()
    X, _ = batch("mlp", 3)
    assert la(X).isfinite().all() and la.log_marginal_likelihood().isfinite()


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize(
    "options",
    [TWO_BATCH | {"direction_fraction": f} for f in (0.05, 0.9)]
    + [{"estimator": "cross_fit", "num_folds": 8}],
    ids=str,
)
def test_smallest_budget_in_unequal_shares(options, magnitudes):
    la = debiased(network("mlp"), budget=8, magnitudes=magnitudes, **options)
    la.fit(loader())
    X, _ = batch("mlp", 3)
    assert la(X).isfinite().all() and la.log_marginal_likelihood().isfinite()


def test_a_pool_of_all_points_needs_no_draw():
    options = {"budget": 100, "pool_size": 200, "estimator": "cross_fit"}
    la = debiased(network("mlp"), sampling="curvature", **options)
    la.fit(loader())
    expected = debiased(network("mlp"), sampling="uniform", **options)
    expected.fit(loader())
    assert torch.equal(posterior(la), posterior(expected))


def test_regression_draws_uniformly():
    model, train = network("mlp"), loader(likelihood="regression")
    la = debiased(model, "regression", sampling="curvature", budget=12, pool_size=40)
    la.fit(train)

    def loss(f, y):
        return 0.5 * (f - y).square().sum()

    pools = draw_uniformly(train, 40, 0).split([0.5, 0.5]).folds
    for k, (pool, own) in enumerate(zip(pools, la.curvature.folds, strict=True)):
        X, y = points(pool.loader)
        drawn, _ = draw_points(torch.ones(len(X)), 6, seed=mixed_seed(0, k))
        weights = torch.full((6,), SIZE / 6).double()
        data = X[drawn], y[drawn]
        factors = dense.kronecker_factors(model, *data, loss, weights=weights)
        for actual, (expected, _) in zip(own, factors.values(), strict=True):
            assert torch.allclose(actual.gradients, expected)


def test_neighbouring_seeds_do_not_share_a_draw():
    model, train = network("mlp"), loader(size=400)
    drawn = []
    for seed in range(3):
        la = debiased(model, budget=20, seed=seed)
        with mock.patch(
            "laplace_debiased.posterior.measuring.draw_points", wraps=draw_points
        ) as drawing:
            la.fit(train)
        drawn += [call.kwargs["seed"] for call in drawing.call_args_list]
    assert len(set(drawn)) == len(drawn) == 6


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_further_data_of_cross_fit_accumulate(magnitudes):
    la = debiased(network("mlp"), estimator="cross_fit", magnitudes=magnitudes)
    first = loader()
    la.fit(first)
    trace, loss = la.H.diag().sum(), la.loss
    la.fit(first, override=False)
    assert torch.allclose(la.H.diag().sum(), 2 * trace)
    assert torch.allclose(la.loss, 2 * loss) and la.n_data == 2 * SIZE


def test_further_data_of_another_estimator_are_refused():
    la = debiased(network("mlp"), estimator="cross_fit")
    X, y = batch("mlp", 40)
    first, second = (
        DataLoader(TensorDataset(X[part], y[part]), 5)
        for part in (slice(20), slice(20, 40))
    )
    la.fit(first, magnitude_loader=second)  # two batches, whatever the estimator
    before = posterior(la)
    with pytest.raises(ValueError, match="must be used as the first data were"):
        la.fit(loader(), override=False)
    assert torch.equal(posterior(la), before)


@pytest.mark.parametrize("estimator", ["two_batch", "cross_fit"])
def test_folds_do_not_share_the_noise_of_sampled_labels(estimator):
    la = debiased(
        network("mlp"),
        "regression",
        estimator=estimator,
        backend_kwargs={"stochastic": True},
    )
    la.fit(loader(likelihood="regression"))
    # in regression the last layer's gradients are the labels' noise alone
    first, second = (fold[1].gradients for fold in la.curvature.folds)
    assert dense.relative_error(first, second) > 0.01


def test_fewer_backward_passes_for_many_outputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 8)).double()
    X, y = torch.randn(200, 4).double(), torch.randint(8, (200,))
    train = DataLoader(TensorDataset(X, y), 50)
    calls = []
    model[2].register_full_backward_hook(lambda *_: calls.append(1))
    factors, num_calls = [], []
    for rank in (None, 1, 5, 6):
        calls.clear()
        la = debiased(model, fisher_rank=rank, seed=0)
        la.fit(train)
        factors.append([fold[1].gradients for fold in la.curvature.folds])
        num_calls.append(len(calls))
    exact, few, more, enough = factors
    assert num_calls[1] < num_calls[2] < num_calls[0] == num_calls[3]
    assert all(map(torch.equal, enough, exact))
    errors = [
        max(dense.relative_error(a, b) for a, b in zip(own, exact, strict=True))
        for own in (few, more)
    ]
    assert 0 < errors[1] < errors[0] < 0.3


@pytest.mark.parametrize(
    "options",
    [
        {"backend": AsdlGGN},
        {"backend": CurvlinopsEF},
        {"backend_kwargs": {"stochastic": True}},
    ],
    ids=str,
)
@pytest.mark.parametrize("subset", SUBSETS)
def test_fewer_backward_passes_need_exact_output_curvature(subset, options):
    with pytest.raises(ValueError, match="`fisher_rank` needs"):
        debiased(network("mlp"), subset=subset, fisher_rank=1, **options)


@pytest.mark.parametrize("subset", SUBSETS)
def test_share_of_directions_by_theory(subset):
    model, train = network("mlp"), loader()
    options = TWO_BATCH | {"subset": subset, "budget": 40}
    la = debiased(model, direction_fraction="auto", **options)
    la.fit(train)
    X, _ = points(draw_uniformly(train, 40, 0).some(40))
    p = model(X).softmax(1).detach()
    mean = torch.diag(p.mean(0)) - p.T @ p / len(X)
    layers = la._selection.layers
    sizes = [layer.d_out for layer in layers for _ in layer.parameters]
    assert sizes == [5, 5, 3, 3] if subset == "all" else [3, 3]
    share = best_share(40, sizes, effective_rank(mean))
    expected = debiased(model, direction_fraction=share, **options)
    expected.fit(train)
    assert 0.1 < share < 0.7 and share != 0.5
    assert torch.equal(posterior(la), posterior(expected))


def test_total_output_curvature_equals_dense_reference():
    model, train = network("mlp"), loader()
    la = debiased(model)
    la.fit(train)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for x, y in zip(*train.dataset.tensors, strict=True):
        f = model(x[None]).detach()
        for column in dense.output_columns(f, y[None], LOSS):
            expected += torch.outer(column[0], column[0])
    actual = total_output_curvature(
        model, train, la.backend, output_curvature(la.backend), 0
    )
    assert torch.allclose(actual, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"backend": AsdlGGN},
        {"backend": BackPackGGN},
        {"backend": CurvlinopsEF},
        {"backend_kwargs": {"stochastic": True}},
        {"fisher_rank": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_a_share_is_found_with_all_backends(likelihood, options):
    model = network("mlp", dtype=torch.float32)
    train = loader(likelihood=likelihood, dtype=torch.float32)
    auto = {"estimator": "two_batch", "direction_fraction": "auto", "budget": 40}
    la = debiased(model, likelihood, **auto, **options)
    la.fit(train)
    folds = fitting.assign(la, train, None, fitting.Seen())
    assert 0.1 < folds.shares[0] < 0.7
    assert posterior(la).isfinite().all()


def test_each_batch_of_a_stream_has_its_own_share():
    model, (X, y) = network("mlp").train(), batch("mlp", 40)
    for parameter in model.parameters():
        parameter.data *= 4  # outputs that differ more for larger inputs
    X = X * torch.tensor([0.1, 10]).double().repeat_interleave(20)[:, None]
    la = debiased(model, estimator="two_batch", direction_fraction="auto")
    with mock.patch.object(
        Points, "split", autospec=True, side_effect=Points.split
    ) as splitting:
        for rows in (slice(20), slice(20, 40)):
            la.partial_fit((X[rows], y[rows]))
    assert la.n_data == 40 and all(m.training for m in model.modules())
    expected = []
    for p in model(X).softmax(1).detach().split(20):
        mean = torch.diag(p.mean(0)) - p.T @ p / len(p)
        expected.append(best_share(20, [5, 5, 3, 3], effective_rank(mean)))
    used = [call.args[1] for call in splitting.call_args_list]
    assert used == [[share, 1 - share] for share in expected]
    assert expected[0] != expected[1]


@pytest.mark.parametrize("estimator", ["two_batch", "cross_fit"])
@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_posterior_does_not_depend_on_the_batch_size(estimator, magnitudes):
    """Though factors of few points have null spaces, in which any basis will do."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 3)).double()
    X, y = torch.randn(24, 40).double(), torch.randint(3, (24,))
    variances = []
    for size in (24, 5):
        la = debiased(model, estimator=estimator, magnitudes=magnitudes)
        la.fit(DataLoader(TensorDataset(X, y), batch_size=size))
        la.prior_precision = 0.01
        variances.append(la._glm_predictive_distribution(X)[1])
    assert torch.allclose(*variances, rtol=1e-9, atol=0)
