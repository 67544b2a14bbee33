"""What raises halfway must leave everything as it was."""

import copy
from itertools import product
from unittest import mock

import pytest
import torch
from laplace.curvature import AsdlGGN, BackPackGGN
from laplace.curvature.curvlinops import CurvlinopsEF, CurvlinopsGGN
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import Laplace
from tests.cases import batch

SIZE = 24


class Interrupted(Exception):
    """Raised by the model."""


class Countdown:
    """A forward hook that raises after a number of calls."""

    def __init__(self):
        self.calls_left = None

    def __call__(self, module, args):
        if self.calls_left is not None:
            self.calls_left -= 1
            if self.calls_left < 0:
                raise Interrupted

    def __deepcopy__(self, memo):
        return self


HOOKS = [
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
]


def snapshot(model):
    """All that a user could notice about a model."""
    return {
        "state": copy.deepcopy(model.state_dict()),
        "parameters": [id(p) for p in model.parameters()],
        "gradients": [
            (id(p.grad), None if p.grad is None else p.grad.clone())
            for p in model.parameters()
        ],
        "flags": [p.requires_grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "hooks": [list(getattr(m, h)) for m in model.modules() for h in HOOKS],
    }


def assert_same(model, before):
    after = snapshot(model)
    for name in ("parameters", "flags", "modes", "hooks"):
        assert after[name] == before[name], name
    for key, value in before["state"].items():
        assert torch.equal(after["state"][key], value), key
    for (a, gradient), (b, expected) in zip(
        after["gradients"], before["gradients"], strict=True
    ):
        assert a == b
        assert expected is None or torch.equal(gradient, expected)


@pytest.fixture
def countdown():
    return Countdown()


@pytest.fixture
def model(countdown):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(), nn.Linear(5, 3))
    model = model.double()
    model[0].weight.grad = torch.randn(5, 4).double()
    model[2].eval()
    # in the midst of a forward pass
    model[1].register_forward_pre_hook(countdown)
    return model


@pytest.fixture
def loader():
    return DataLoader(TensorDataset(*batch("mlp", SIZE)), 4)


def summary(la):
    posterior = la.posterior_precision.to_matrix()
    return posterior, la.mean.clone(), la.loss.clone(), la.n_data


BACKENDS = [CurvlinopsGGN, CurvlinopsEF, AsdlGGN, BackPackGGN]


@pytest.mark.parametrize("calls", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize(
    ("magnitudes", "backend"),
    [*product(["kfac"], BACKENDS), *product(["ggn"], [CurvlinopsGGN, CurvlinopsEF])],
)
def test_interrupted_fit_keeps_posterior_and_model(
    model, countdown, loader, magnitudes, backend, subset, calls
):
    la = Laplace(
        model,
        "classification",
        subset,
        "kron_debiased",
        magnitudes=magnitudes,
        backend=backend,
    )
    la.fit(loader)
    expected = summary(la)
    la.model.train()
    next(m for m in la.model.modules() if isinstance(m, nn.Dropout)).eval()
    before = snapshot(la.model)

    other = DataLoader(TensorDataset(*batch("mlp", SIZE, seed=9)), 4)
    for override in (True, False) if subset == "all" else (True,):
        countdown.calls_left = calls
        with pytest.raises(Interrupted):
            la.fit(other, override=override)
        countdown.calls_left = None
        assert_same(la.model, before)
        for actual, value in zip(summary(la), expected, strict=True):
            assert torch.equal(torch.as_tensor(actual), torch.as_tensor(value))

    la.fit(loader)
    for actual, value in zip(summary(la), expected, strict=True):
        assert torch.allclose(torch.as_tensor(actual), torch.as_tensor(value))


@pytest.mark.parametrize("calls", [0, 1, 3])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_interrupted_first_fit_can_be_repeated(
    model, countdown, loader, backend, subset, calls
):
    la = Laplace(model, "classification", subset, "kron_debiased", backend=backend)
    before, user = snapshot(model), model
    countdown.calls_left = calls
    with pytest.raises(Interrupted):
        la.fit(loader)
    assert_same(user, before)
    with pytest.raises(AttributeError, match="not fitted"):
        _ = la.posterior_precision
    countdown.calls_left = None
    la.fit(loader)
    reference = Laplace(
        model, "classification", subset, "kron_debiased", backend=backend
    )
    reference.fit(loader)
    for actual, value in zip(summary(la), summary(reference), strict=True):
        assert torch.allclose(torch.as_tensor(actual), torch.as_tensor(value))


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pred_type", ["glm", "nn"])
@pytest.mark.parametrize("finishes", [True, False])
def test_predicting_never_changes_the_model(
    model, countdown, loader, finishes, pred_type, backend, subset
):
    la = Laplace(model, "classification", subset, "kron_debiased", backend=backend)
    la.fit(loader)
    X, _ = batch("mlp", 5)
    for parameter in la.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, expected = snapshot(la.model), summary(la)
    last_layer_nn = subset == "last_layer" and pred_type == "nn"
    countdown.calls_left = (
        None if finishes else (pred_type == "nn" and not last_layer_nn)
    )
    kwargs = {"pred_type": pred_type, "link_approx": "mc", "n_samples": 3}
    calls = [
        lambda: la(X, **kwargs),
        lambda: la.predictive_samples(X, pred_type, 3),
        lambda: la.functional_samples(X, pred_type, 3),
    ]
    for call in calls:
        if finishes:
            call()
        else:
            with pytest.raises(Interrupted):
                call()
            countdown.calls_left = int(pred_type == "nn" and not last_layer_nn)
        assert_same(la.model, before)
        for actual, value in zip(summary(la), expected, strict=True):
            assert torch.equal(torch.as_tensor(actual), torch.as_tensor(value))


def test_successful_fit_keeps_gradients_hooks_and_parameters(model, loader):
    before = snapshot(model)
    for backend in BACKENDS[:3]:
        la = Laplace(model, "classification", "all", "kron_debiased", backend=backend)
        la.fit(loader)
        before["modes"] = [False for _ in before["modes"]]  # as laplace-torch leaves it
        assert_same(model, before)


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_refused_or_interrupted_tuning_keeps_the_prior(
    model, countdown, loader, subset
):
    la = Laplace(model, "classification", subset, "kron_debiased", prior_precision=7.0)
    la.fit(loader)
    X, _ = batch("mlp", 5)
    expected = la(X)

    def check():
        assert la.prior_precision.tolist() == [7.0]
        assert torch.equal(la(X), expected)

    with pytest.raises(ValueError, match="either scalar or per-layer"):
        la.optimize_prior_precision(prior_structure="diag")
    check()
    with pytest.raises(ValueError, match="either scalar or per-layer"):
        la.prior_precision = torch.ones(la.n_params)
    check()
    countdown.calls_left = 2
    with pytest.raises(Interrupted):
        la.optimize_prior_precision(method="gridsearch", val_loader=loader)
    countdown.calls_left = None
    check()
    name = "laplace_debiased.posterior.tuning.best_prior_precision"
    with mock.patch(name, side_effect=Interrupted), pytest.raises(Interrupted):
        la.optimize_prior_precision(method="marglik")
    check()
