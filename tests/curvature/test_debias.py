"""The method against dense algebra, block by block."""

from functools import partial

import pytest
import torch

from laplace_debiased.curvature.debias import (
    average,
    cross_fit,
    kfac_cross_fit,
    project,
    scale_gradients,
    two_batch,
)
from laplace_debiased.curvature.decomposition import eigenvectors
from laplace_debiased.curvature.eigenbasis import by_parameter
from laplace_debiased.curvature.kronecker import Kronecker
from tests import dense
from tests.curvature.factors import (
    LAYERS,
    bases,
    dense_factors,
    kronecker_factors,
    spectra,
)


def matrix(debiased):
    return by_parameter(LAYERS, debiased.directions, debiased.magnitudes).to_matrix()


def eigenbases(blocks):
    return [torch.linalg.eigh(block)[1] for block in blocks]


def test_two_batches_equal_dense_algebra():
    directions, magnitudes = kronecker_factors(), kronecker_factors()
    actual = two_batch(directions, partial(project, magnitudes))
    U = bases(eigenvectors(directions))
    expected = dense.debiased(U, dense_factors(magnitudes))
    assert dense.relative_error(matrix(actual), expected) < 1e-10


def test_the_same_points_in_both_roles_give_their_own_curvature():
    factors = kronecker_factors()
    actual = two_batch(factors, partial(project, factors))
    expected = torch.block_diag(*dense_factors(factors))
    assert dense.relative_error(matrix(actual), expected) < 1e-12
    for own, values in zip(actual.own, actual.magnitudes, strict=True):
        assert torch.allclose(own.gradients, values.gradients)


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.2, 0.5, 0.3]])
def test_cross_fit_equals_dense_algebra(shares):
    folds = [kronecker_factors() for _ in shares]
    found = kfac_cross_fit(folds, shares)
    directions, magnitudes = found.directions, found.magnitudes
    mean = average(folds, shares)
    for layer in range(len(LAYERS)):
        for side in ("gradients", "inputs"):
            parts = [getattr(fold[layer], side) for fold in folds]
            if parts[0] is None:
                continue
            expected = torch.zeros(len(parts[0])).double()
            for k, (part, share) in enumerate(zip(parts, shares, strict=True)):
                others = sum(
                    s * p
                    for j, (s, p) in enumerate(zip(shares, parts, strict=True))
                    if j != k
                )
                U = torch.linalg.eigh(others)[1]
                expected += share * (U.T @ part @ U).diagonal()
            assert torch.allclose(getattr(magnitudes[layer], side), expected)
            U = getattr(directions[layer], side)
            diagonal = U.T @ getattr(mean[layer], side) @ U
            assert torch.allclose(diagonal, diagonal.diagonal().diag(), atol=1e-10)


def test_cross_fit_with_measured_magnitudes_averages_them_by_rank():
    folds, shares = [kronecker_factors() for _ in range(2)], [0.25, 0.75]
    measured, asked = [spectra(), spectra()], []

    def measure(k, directions, _):
        asked.append(directions)
        return measured[k]

    actual = cross_fit(folds, [partial(measure, k) for k in range(2)], shares)
    for k, directions in enumerate(asked):
        others = eigenvectors(folds[1 - k])
        for own, expected in zip(directions, others, strict=True):
            assert torch.allclose(own.gradients.abs(), expected.gradients.abs())
    for layer, own in enumerate(actual.magnitudes):
        for side in ("matrix", "vector"):
            parts = [getattr(spectrum[layer], side) for spectrum in measured]
            if parts[0] is not None:
                expected = 0.25 * parts[0] + 0.75 * parts[1]
                assert torch.allclose(getattr(own, side), expected)


def test_pooled_inputs_are_those_of_two_batches():
    folds, shares = [kronecker_factors() for _ in range(3)], [0.2, 0.3, 0.5]
    actual = kfac_cross_fit(folds, shares, pooled_inputs=True)
    plain = kfac_cross_fit(folds, shares)
    first = average(folds[:2], shares[:2])
    inputs = two_batch(first, partial(project, folds[2]))
    for k, layer in enumerate(LAYERS):
        for mine, gradients, own in (
            (actual.directions, plain.directions, inputs.directions),
            (actual.magnitudes, plain.magnitudes, inputs.magnitudes),
        ):
            assert torch.equal(mine[k].gradients, gradients[k].gradients)
            if layer.has_inputs:
                assert torch.equal(mine[k].inputs, own[k].inputs)


def test_pooled_inputs_have_the_directions_of_all():
    folds, asked = [kronecker_factors() for _ in range(2)], []

    def measure(directions, _):
        asked.append(directions)
        return spectra()

    actual = cross_fit(folds, [measure] * 2, [0.5, 0.5], pooled_inputs=True)
    for directions in asked:
        for own, of_all in zip(directions, actual.directions, strict=True):
            assert own.inputs is of_all.inputs


@pytest.mark.parametrize("own", [0, 1])
def test_points_that_do_not_use_a_layer_have_no_part_in_its_mean_input(own):
    used = kronecker_factors()
    unused = [layer.map(torch.zeros_like) for layer in used]
    folds = [unused, used] if own else [used, unused]
    for layer, mean in zip(used, average(folds, [0.3, 0.7]), strict=True):
        share = 0.7 if own else 0.3
        torch.testing.assert_close(mean.gradients, share * layer.gradients)
        if layer.inputs is not None:
            torch.testing.assert_close(mean.inputs, layer.inputs)
    for mean in average([unused, unused], [0.3, 0.7]):
        assert not any(tensor.any() for tensor in mean.tensors())


def test_projection_of_singular_factors_is_not_negative():
    vector = torch.randn(6)
    singular = [Kronecker(torch.outer(vector, vector))]
    (eigenvalues,) = project(singular, eigenvectors(singular))
    assert (eigenvalues.gradients >= 0).all()


def test_curvature_is_scaled_by_its_first_factor():
    factors = kronecker_factors()
    scaled = torch.block_diag(*dense_factors(scale_gradients(factors, 3.0)))
    assert torch.allclose(scaled, 3 * torch.block_diag(*dense_factors(factors)))
