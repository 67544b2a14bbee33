"""The standard error of the log marginal likelihood."""

import pytest
import torch

from laplace_debiased.curvature.eigenbasis import EigenbasisMatrix
from tests.cases import network
from tests.fits import debiased, loader

STEP = 1e-5


def fitted(**options):
    la = debiased(network("mlp"), prior_precision=3.0, budget=20, **options)
    la.fit(loader())
    return la


def slope(la, layer, factor):
    """Differentiate half of the log determinant by the log of a layer's scale.

    It is that of the first or the second factor of the layer's matrix.
    """
    values = []
    for step in (-STEP, STEP):
        scaled = [list(own) for own in la.H.eigenvalues]
        for position in layer.parameters:
            # a bias has the first factor alone
            k = factor if len(scaled[position]) == 2 else 0
            scaled[position][k] = scaled[position][k] * (1 + step)
        H = EigenbasisMatrix(la.H.eigenvectors, scaled, damping=la.damping)
        matrix = (H * la._H_factor + la.prior_precision).to_matrix()
        values.append(torch.linalg.slogdet(matrix).logabsdet / 2)
    return (values[1] - values[0]) / (2 * STEP)


@pytest.mark.parametrize("prior_precision", [0.1, 3.0, 100.0])
@pytest.mark.parametrize("factor", [0, 1])
def test_the_error_is_the_determinants_slope_times_that_of_the_scales(
    prior_precision, factor
):
    la = fitted()
    la.prior_precision = prior_precision
    slopes = torch.stack([slope(la, own, factor) for own in la._selection.layers])
    relative = la.sampling_error.relative_covariance()
    variance = slopes @ relative @ slopes + la.sampling_error.loss_variance
    told = la.log_marginal_likelihood_standard_error()
    assert told.item() == pytest.approx(variance.sqrt().item(), rel=1e-6)


def test_with_damping_there_is_no_such_slope():
    la = fitted(damping=True)
    layer = la._selection.layers[0]
    own, other = (slope(la, layer, k) for k in (0, 1))
    assert abs(own / other - 1) > 0.1  # the same error of the scale, in either factor
    with pytest.raises(ValueError, match="With `damping`, there is no standard error"):
        la.log_marginal_likelihood_standard_error()
