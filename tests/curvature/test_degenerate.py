import pytest
import torch

from laplace_debiased.curvature.debias import cross_fit, kfac_cross_fit, two_batch
from laplace_debiased.curvature.degenerate import (
    eigenspaces,
    mean_over,
    with_common_magnitudes,
)
from laplace_debiased.curvature.kronecker import Kronecker, Spectrum


def rotation(size, seed):
    torch.manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]


def test_eigenvalues_that_only_rounding_tells_apart_are_one_subspace():
    values = torch.tensor([-1e-16, 0, 1e-16, 0.5, 0.5 + 1e-15, 0.6, 1.0])
    assert eigenspaces(values.double()).tolist() == [0, 0, 0, 1, 1, 2, 3]
    assert eigenspaces(torch.zeros(3)).tolist() == [0, 0, 0]
    # in single precision, rounding is larger
    close = torch.tensor([0.5, 0.5 + 2e-7, 1.0])
    assert eigenspaces(close).tolist() == [0, 0, 1]
    assert eigenspaces(close.double()).tolist() == [0, 1, 2]


@pytest.mark.parametrize("axis", [0, 1])
def test_means_over_subspaces(axis):
    torch.manual_seed(0)
    values = torch.randn(4, 4)
    means = mean_over(values, torch.tensor([0, 1, 1, 2]), axis)
    expected = values.clone()
    middle = expected.narrow(axis, 1, 2)
    middle.copy_(middle.mean(axis, keepdim=True).expand_as(middle))
    assert torch.allclose(means, expected)


def test_each_part_of_a_layer_is_averaged_along_its_own_axes():
    torch.manual_seed(0)
    eigenvalues = Kronecker(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.0, 1.0]))
    bases = Kronecker(torch.eye(3), torch.eye(2))
    matrix, vector = torch.rand(3, 2), torch.rand(3)
    (own,) = with_common_magnitudes([Spectrum(matrix, vector)], [eigenvalues], [bases])
    assert torch.allclose(own.matrix[0], matrix[:2].mean(0))
    assert torch.equal(own.matrix[0], own.matrix[1])
    assert torch.equal(own.matrix[2], matrix[2])
    assert torch.allclose(own.vector[:2], vector[:2].mean().expand(2))
    (factored,) = with_common_magnitudes([Kronecker(vector)], [eigenvalues], [bases])
    assert torch.allclose(factored.gradients[:2], vector[:2].mean().expand(2))


def low_rank(size, rank, seed):
    torch.manual_seed(seed)
    rows = torch.randn(rank, size, dtype=torch.float64)
    return rows.T @ rows


def curvature(debiased):
    """Dense curvature of the only layer."""
    U, own = debiased.directions[0], debiased.magnitudes[0]
    basis = torch.kron(U.gradients, U.inputs)
    values = (
        own.matrix
        if isinstance(own, Spectrum)
        else torch.outer(own.gradients, own.inputs)
    )
    return (basis * values.flatten()) @ basis.T


@pytest.mark.parametrize("pooled", [False, True])
def test_curvature_does_not_depend_on_bases_of_null_spaces(monkeypatch, pooled):
    """Any other basis of a null space, as another summation order may give."""
    folds = [
        [Kronecker(low_rank(6, 2, seed), low_rank(5, 2, seed + 10))]
        for seed in range(2)
    ]
    shares = [0.5, 0.5]
    exact = low_rank(30, 20, 99)

    def measure(directions, _):
        (U,) = directions
        basis = torch.kron(U.gradients, U.inputs)
        return [Spectrum(((exact @ basis) * basis).sum(0).view(6, 5))]

    def results():
        yield kfac_cross_fit(folds, shares, pooled)
        yield cross_fit(folds, [measure, measure], shares, pooled)
        yield two_batch(folds[0], measure)

    expected, eigh = [curvature(own) for own in results()], torch.linalg.eigh
    turns = iter(range(1000))

    def turned(matrix):
        values, vectors = eigh(matrix)
        null = values < 1e-9
        turn = rotation(int(null.sum()), next(turns))
        vectors[:, null] = vectors[:, null] @ turn
        return values, vectors

    monkeypatch.setattr(torch.linalg, "eigh", turned)
    for own, reference in zip(results(), expected, strict=True):
        assert torch.allclose(curvature(own), reference, atol=1e-12)
    assert next(turns) > 5
