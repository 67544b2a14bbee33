"""Networks that run in mixed precision by themselves: the rest stays precise."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import DebiasedKFACLinearOperator, directional_derivatives
from tests.cases import batch, network, split
from tests.dense import relative_error
from tests.fits import SUBSETS, debiased

SIZE = 40
LOSS = nn.CrossEntropyLoss(reduction="sum")
# relative errors that rounding may cause
TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
NAMES = ["mlp", "cnn-stride-padding", "transformer", "recurrent", "group-norm"]


class Autocast(nn.Module):
    def __init__(self, net, dtype):
        super().__init__()
        self.net, self.dtype = net, dtype

    def forward(self, x):
        with torch.autocast("cpu", self.dtype):
            return self.net(x)


@pytest.fixture(params=NAMES)
def single(request):
    """A network in single precision, and points."""
    return (
        network(request.param, dtype=torch.float32),
        *batch(request.param, SIZE, dtype=torch.float32),
    )


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_posteriors_are_those_of_the_network_but_for_rounding(
    single, dtype, magnitudes, subset
):
    model, X, y = single
    fitted = []
    for own in (Autocast(model, dtype), model):
        la = debiased(own, magnitudes=magnitudes, subset=subset)
        la.fit(DataLoader(TensorDataset(X, y), 9))
        assert la.H.to_matrix().dtype == la(X).dtype == torch.float32
        mean, covariance = la._glm_predictive_distribution(X)
        fitted.append((la.H.to_matrix().trace(), la.loss, mean, covariance))
    for actual, expected in zip(*fitted, strict=True):
        assert 0 < relative_error(actual, expected) < TOLERANCES[dtype]


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_mixed_precision_around_a_fit_is_warned_of_and_factors_are_single(
    single, magnitudes
):
    model, X, y = single
    fitted = []
    for enabled in (True, False):
        la = debiased(model, magnitudes=magnitudes)
        warned = pytest.warns(UserWarning, match="autocast` is on around the fit")
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=enabled),
            warned if enabled else nullcontext(),
        ):
            la.fit(DataLoader(TensorDataset(X, y), 9))
            predictions = la(X)
        tensors = [t for own in la.H.eigenvectors + la.H.spectra() for t in own]
        assert {t.dtype for t in tensors} == {predictions.dtype} == {torch.float32}
        fitted.append((la.H.to_matrix().trace(), la.loss, predictions))
    for actual, expected in zip(*fitted, strict=True):
        assert 0 < relative_error(actual, expected) < TOLERANCES[torch.bfloat16]
    # rotations are not rounded as the network is
    for vectors in (v for own in la.H.eigenvectors for v in own if v.ndim == 2):
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(len(vectors)))


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_curvature_is_that_of_the_network_but_for_rounding(single, dtype):
    model, X, y = single
    params, data = list(model.parameters()), split(X, y, 9, SIZE - 9)
    D = torch.randn(sum(p.numel() for p in params), 3)
    measured = []
    for own in (Autocast(model, dtype), model):
        common = (own, LOSS, params, data)
        operator = DebiasedKFACLinearOperator(*common, data, magnitudes="ggn")
        measured.append(
            [
                operator.trace,
                directional_derivatives(*common, D, mode="forward").curvature,
                directional_derivatives(*common, D, mode="reverse").curvature,
                directional_derivatives(*common, D, curvature="hessian").curvature,
            ]
        )
    for actual, expected in zip(*measured, strict=True):
        assert 0 < relative_error(actual, expected) < TOLERANCES[dtype]
