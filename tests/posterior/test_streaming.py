"""partial_fit: mini-batches one by one."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased.rows.seeds import mixed_seed
from laplace_debiased.sampling.folds import draw_uniformly
from laplace_debiased.sampling.loaders import loader_of_batch
from tests import dense
from tests.cases import batch, network
from tests.fits import debiased, posterior
from tests.posterior.test_measuring import (
    LOSS,
    eigenvectors,
    fold_factors,
    kron,
    mean_factors,
    points,
)

SIZE = 16


def batches(count):
    X, y = batch("mlp", count * SIZE)
    return list(zip(X.split(SIZE), y.split(SIZE), strict=True))


def loader_over(*parts):
    data = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
    return DataLoader(TensorDataset(*data), 8)


def curvature(la):
    return la.H.to_matrix()


def test_batches_one_by_one_equal_a_fit_to_all():
    model, (a, b, c, d) = network("mlp"), batches(4)
    la, expected = debiased(model), debiased(model)
    la.partial_fit(a, magnitude_batch=b)
    la.partial_fit(c, magnitude_batch=d)
    expected.fit(loader_over(a, c), magnitude_loader=loader_over(b, d))
    # an explicit fit is scaled to the direction loader's dataset
    assert la.n_data == 4 * SIZE and expected.n_data == 2 * SIZE
    assert dense.relative_error(curvature(la), 2 * curvature(expected)) < 1e-10
    assert torch.allclose(la.loss, 2 * expected.loss)


def test_the_same_pair_again_changes_the_scale_only():
    model, (a, b) = network("mlp"), batches(2)
    la, once = (debiased(model, magnitudes="ggn") for _ in range(2))
    once.partial_fit(a, magnitude_batch=b)
    for _ in range(3):
        la.partial_fit(a, magnitude_batch=b, decay=0.5)
    expected = (1 + 0.5 + 0.25) * curvature(once)
    assert dense.relative_error(curvature(la), expected) < 1e-10


@pytest.mark.parametrize("explicit", [False, True])
def test_streamed_ggn_approaches_the_fit_to_all(explicit):
    model, parts = network("mlp"), batches(8)
    la, expected = (debiased(model, magnitudes="ggn") for _ in range(2))
    errors = []
    if explicit:
        steps = list(zip(parts[::2], parts[1::2], strict=True))
        directions, magnitudes = (loader_over(*own) for own in zip(*steps, strict=True))
        expected.fit(directions, magnitude_loader=magnitudes)
    else:
        steps = [(part,) for part in parts]
        expected.fit(loader_over(*parts))
    exact = curvature(expected) / expected.n_data
    for step in steps:
        la.partial_fit(*step)
        errors.append(dense.relative_error(curvature(la) / la.n_data, exact))
    assert errors[-1] < errors[0] / 3
    trace = curvature(la).trace() / la.n_data
    assert torch.allclose(trace, exact.trace(), rtol=1e-10)


@pytest.mark.parametrize("estimator", ["two_batch", "cross_fit"])
@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_one_batch_equals_a_fit(magnitudes, estimator):
    model, (a,) = network("mlp"), batches(1)
    options = {"magnitudes": magnitudes, "estimator": estimator}
    la, expected = debiased(model, **options), debiased(model, **options)
    la.partial_fit(a)
    expected.fit(loader_over(a))
    assert dense.relative_error(posterior(la), posterior(expected)) < 1e-10
    assert torch.allclose(la.loss, expected.loss) and la.n_data == SIZE


@pytest.mark.parametrize("estimator", ["two_batch", "cross_fit"])
@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_earlier_points_decay(magnitudes, estimator):
    model, (a, b) = network("mlp"), batches(2)
    decay = 0.25
    la = debiased(model, magnitudes=magnitudes, estimator=estimator)
    la.partial_fit(a)
    loss, folds = la.loss, la.curvature
    la.partial_fit(b, decay=decay)
    assert la.n_data == (1 + decay) * SIZE
    second = debiased(
        model, magnitudes=magnitudes, estimator=estimator, seed=mixed_seed(0, 1)
    )
    second.partial_fit(b)
    assert torch.allclose(la.loss, decay * loss + second.loss)
    if magnitudes == "kfac":
        expected = folds.scaled(decay).merge(second.curvature, decay / (1 + decay))
        expected = expected.to_matrix()
    else:
        expected = decayed_ggn(model, a, b, decay, estimator == "cross_fit")
    assert dense.relative_error(curvature(la), expected) < 1e-8


def folds_of(part, seed):
    shares = [0.5, 0.5]
    return draw_uniformly(loader_of_batch(part), None, seed).split(shares).folds


def decayed_ggn(model, a, b, decay, cross_fit):
    """The stream's curvature after two batches, from the formulas."""
    first, second = (
        [fold_factors(model, fold.loader, SIZE) for fold in folds_of(part, seed)]
        for seed, part in ((0, a), (mixed_seed(0, 1), b))
    )
    blocks = [
        [
            [2 * H for H in dense.ggn_blocks(model, *points(fold.loader), LOSS)]
            for fold in folds_of(part, seed)
        ]
        for seed, part in ((0, a), (mixed_seed(0, 1), b))
    ]

    def bases(factors):
        return [kron(vectors) for vectors in eigenvectors(factors)]

    def joint(earlier, new):
        """G adds up, A averages."""
        return {
            owner: [decay * G + H]
            + [(decay * A + B) / (1 + decay) for A, B in zip(As, Bs, strict=True)]
            for (owner, (G, *As)), (H, *Bs) in zip(
                earlier.items(), new.values(), strict=True
            )
        }

    def along(each, H):
        return [(U.T @ h @ U).diagonal() for U, h in zip(each, H, strict=True)]

    if cross_fit:
        earlier, new = mean_factors(first), mean_factors(second)
        old = [along(bases(first[1 - k]), blocks[0][k]) for k in range(2)]
        added = [
            along(bases(joint(earlier, second[1 - k])), blocks[1][k]) for k in range(2)
        ]
        old, added = (
            [(u + v) / 2 for u, v in zip(*own, strict=True)] for own in (old, added)
        )
    else:
        earlier, new = first[0], second[0]
        old = along(bases(earlier), blocks[0][1])
        added = along(bases(joint(earlier, new)), blocks[1][1])
    result = []
    for U, V, own, further in zip(
        bases(earlier), bases(joint(earlier, new)), old, added, strict=True
    ):
        M = U @ torch.diag(own) @ U.T
        values = decay * (V.T @ M @ V).diagonal() + further
        result.append(V @ torch.diag(values) @ V.T)
    return torch.block_diag(*result)


def test_curvature_is_scaled_to_the_data_asked_for():
    model, (a, b) = network("mlp"), batches(2)
    la, scaled = debiased(model), debiased(model)
    for part in (a, b):
        la.partial_fit(part)
        scaled.partial_fit(part, num_data=1000)
    assert scaled.n_data == 1000
    ratio = 1000 / (2 * SIZE)
    assert dense.relative_error(curvature(scaled), ratio * curvature(la)) < 1e-10
    assert torch.allclose(scaled.loss, ratio * la.loss)


def test_the_posterior_follows_the_model():
    model, (a, b) = network("mlp"), batches(2)
    la = debiased(model)
    la.partial_fit(a)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    la.partial_fit(b, decay=0.5)
    assert torch.equal(la.mean, torch.nn.utils.parameters_to_vector(model.parameters()))


def test_batches_after_a_fit_with_a_budget_count_by_their_points():
    model, (a, b, c) = network("mlp"), batches(3)
    la, new = debiased(model, budget=SIZE), debiased(model, seed=mixed_seed(0, 1))
    la.fit(loader_over(a, b))
    before, folds = la.loss, la.curvature
    la.partial_fit(c, decay=0.5)
    new.partial_fit(c)
    # a fit stands for all of its 32 points, whatever its budget; 16 more came
    assert la.n_data == 2 * SIZE and la._seen.num_points == 0.5 * SIZE + SIZE
    assert torch.allclose(la.loss, 0.5 * before + new.loss)
    expected = folds.scaled(0.5).merge(new.curvature, 0.5).to_matrix()
    assert dense.relative_error(curvature(la), expected) < 1e-10


def test_the_scale_asked_for_is_no_weight():
    model, (a, b, c) = network("mlp"), batches(3)
    la, expected = debiased(model), debiased(model)
    la.partial_fit(a, num_data=1000)
    la.partial_fit(b, decay=0.5, num_data=10)
    la.partial_fit(c, decay=0.5)
    for part, decay in ((a, 1.0), (b, 0.5), (c, 0.5)):
        expected.partial_fit(part, decay=decay)
    assert la.n_data == expected.n_data == 1.75 * SIZE
    assert dense.relative_error(curvature(la), curvature(expected)) < 1e-10


@pytest.mark.parametrize("sampling", ["curvature", "uniform"])
def test_a_batch_above_the_budget_is_drawn_from(sampling):
    model, parts = network("mlp"), batches(4)
    options = {"budget": 12, "sampling": sampling, "pool_size": 40}
    la, expected = debiased(model, **options), debiased(model, **options)
    batch_of_all = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
    la.partial_fit(batch_of_all)
    expected.fit(loader_over(*parts))
    assert dense.relative_error(posterior(la), posterior(expected)) < 1e-10
    assert la._seen.num_points == 12 and la.n_data == 4 * SIZE
    la.partial_fit(batch_of_all)
    assert la._seen.num_points == 24 and la.n_data == 8 * SIZE


def test_the_model_keeps_its_mode():
    model, (a, b) = network("mlp").train(), batches(2)
    model[1].eval()
    la = debiased(model)
    for part in (a, b):
        la.partial_fit(part)
        assert [m.training for m in model.modules()] == [True, True, False, True]


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_a_saved_stream_goes_on(magnitudes, tmp_path):
    model, parts = network("mlp"), batches(3)
    options = {"magnitudes": magnitudes}
    la, other = debiased(model, **options), debiased(model, **options)
    for part in parts[:2]:
        la.partial_fit(part, num_data=100)
    torch.save(la.state_dict(), tmp_path / "la.pt")
    other.load_state_dict(torch.load(tmp_path / "la.pt", weights_only=True))
    for own in (la, other):
        own.partial_fit(parts[2], decay=0.5)
    assert torch.equal(posterior(la), posterior(other))
    assert (
        la.n_data == other.n_data
        and la._seen.num_updates == other._seen.num_updates == 3
    )
    assert la.curvature_standard_errors == other.curvature_standard_errors


def test_a_fit_forgets_the_stream():
    model, (a, b) = network("mlp"), batches(2)
    la, expected = debiased(model), debiased(model)
    la.partial_fit(a)
    for own in (la, expected):
        own.fit(loader_over(a))
        own.partial_fit(b)
    assert torch.equal(posterior(la), posterior(expected))


def test_further_data_have_random_numbers_of_their_own():
    model, (a, b) = network("mlp"), batches(2)
    seeds = []
    for seed in (0, 1):
        la = debiased(model, seed=seed)
        for update in (
            lambda la=la: la.fit(loader_over(a)),
            lambda la=la: la.fit(loader_over(b), override=False),
            lambda la=la: la.partial_fit(a),
        ):
            seeds.append(la._seen.seed(la.settings.seed))
            update()
    assert len(set(seeds)) == len(seeds)


class OnDict(torch.nn.Module):
    """Takes mappings, whose texts must be those of the inputs."""

    def __init__(self):
        super().__init__()
        self.net = network("mlp")

    def forward(self, data):
        X = data["input_ids"]
        assert len(data.get("text", X)) == len(X)
        return self.net(X)


@pytest.mark.parametrize("extra", [{}, {"text": ["a"] * SIZE}])
def test_mappings_are_batches(extra):
    ((X, y),) = batches(1)
    la, pair, expected = debiased(OnDict()), debiased(OnDict()), debiased(OnDict().net)
    la.partial_fit({**extra, "input_ids": X, "labels": y})
    pair.partial_fit(({**extra, "input_ids": X}, y))
    expected.partial_fit((X, y))
    assert torch.equal(posterior(la), posterior(expected))
    assert torch.equal(posterior(pair), posterior(expected))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"decay": 0.0}, ValueError, r"`decay` must lie in \(0, 1\]"),
        ({"decay": 1.5}, ValueError, r"`decay` must lie in \(0, 1\]"),
        ({"num_data": 0}, ValueError, "`num_data` must be at least 1"),
        ({"num_data": 2.5}, TypeError, "`num_data` must be an int"),
        ({"batch": "all"}, TypeError, "`batch` must be a pair"),
        (
            {"batch": (torch.zeros(1, 4), torch.zeros(1))},
            ValueError,
            "`batch` has too few points, 1",
        ),
        (
            {"batch": (torch.zeros(0, 4), torch.zeros(0))},
            ValueError,
            "`batch` is empty",
        ),
        ({"magnitude_batch": 1}, TypeError, "`magnitude_batch` must be a pair"),
    ],
)
def test_bad_arguments_leave_the_posterior(options, error, message):
    la = debiased(network("mlp"))
    (a,) = batches(1)
    la.partial_fit(a)
    before = posterior(la)
    with pytest.raises(error, match=message):
        la.partial_fit(**{"batch": a} | options)
    assert torch.equal(posterior(la), before)


def test_the_last_layer_is_refused():
    with pytest.raises(ValueError, match="do not support `partial_fit`"):
        debiased(network("mlp"), subset="last_layer").partial_fit(batches(1)[0])
