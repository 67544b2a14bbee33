"""partial_fit: mini-batches one by one."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests import dense
from tests.cases import batch, network
from tests.fits import debiased, posterior

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


def test_magnitudes_of_the_exact_ggn_add_up_in_the_eigenbasis_of_the_first():
    model, (a, b, c, d) = network("mlp"), batches(4)
    la, expected = (debiased(model, magnitudes="ggn") for _ in range(2))
    la.partial_fit(a, magnitude_batch=b)
    la.partial_fit(c, magnitude_batch=d)
    expected.fit(loader_over(a), magnitude_loader=loader_over(b, d))
    assert dense.relative_error(curvature(la), 4 * curvature(expected)) < 1e-10


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
    loss, folds = la.loss, la.H_facs
    la.partial_fit(b, decay=decay)
    assert la.n_data == (1 + decay) * SIZE
    second = debiased(model, magnitudes=magnitudes, estimator=estimator, seed=1)
    second.partial_fit(b)
    assert torch.allclose(la.loss, decay * loss + second.loss)
    if magnitudes == "kfac":
        expected = folds.scaled(decay).merge(second.H_facs, decay / (1 + decay))
        expected = expected.to_matrix()
        assert dense.relative_error(curvature(la), expected) < 1e-10


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
    la = debiased(model, budget=SIZE)
    la.fit(loader_over(a, b))
    before = la.loss
    la.partial_fit(c, num_data=2 * SIZE)
    new = debiased(model)
    new.partial_fit(c)
    # 16 points stood for 32, and 16 more came
    assert torch.allclose(la.loss, (before + 2 * new.loss) / 2)


def test_mappings_are_batches():
    class OnDict(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network("mlp")

        def forward(self, data):
            return self.net(data["input_ids"])

    ((X, y),) = batches(1)
    la, expected = debiased(OnDict()), debiased(network("mlp"))
    la.partial_fit({"input_ids": X, "labels": y})
    expected.partial_fit((X, y))
    assert torch.equal(posterior(la), posterior(expected))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"decay": 0.0}, ValueError, r"`decay` must lie in \(0, 1\]"),
        ({"decay": 1.5}, ValueError, r"`decay` must lie in \(0, 1\]"),
        ({"num_data": 0}, ValueError, "`num_data` must be at least 1"),
        ({"num_data": 2.5}, TypeError, "`num_data` must be an int"),
        ({"batch": "all"}, TypeError, "`batch` must be a pair"),
        ({"batch": (torch.zeros(1, 4), torch.zeros(1))}, ValueError, "yields 1 point"),
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
