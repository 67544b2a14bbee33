"""Large factors by their leading directions, against full decompositions."""

from functools import partial

import pytest
import torch

from laplace_debiased.curvature import decomposition
from laplace_debiased.curvature.debias import kfac_cross_fit, project, two_batch
from laplace_debiased.curvature.decomposition import decompose, symmetric_eigh
from laplace_debiased.curvature.kronecker import Kronecker
from laplace_debiased.curvature.leading import completed, leading_eigh
from tests import dense

SIZE = 600
DTYPES = [torch.float64, torch.float32]


def orthonormal(size, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(size, count, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(start)[0]


def covariance(eigenvalues, dtype=torch.float64, seed=0, size=SIZE):
    vectors = orthonormal(size, len(eigenvalues), seed)
    matrix = (vectors * eigenvalues) @ vectors.T
    return ((matrix + matrix.T) / 2).to(dtype)


def falling(power=2.0, size=SIZE):
    return 5 * torch.arange(1, size + 1, dtype=torch.float64) ** -power


def rebuilt(values, vectors):
    return (vectors.double() * values.double()) @ vectors.double().T


@pytest.fixture
def small_is_large(monkeypatch):
    monkeypatch.setattr(decomposition, "MIN_ROWS", 300)


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 3e-3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_within_the_tolerance(dtype, tolerance):
    matrix = covariance(falling(), dtype)
    values, vectors = leading_eigh(matrix, tolerance)
    assert values.dtype == vectors.dtype == dtype
    error = dense.relative_error(rebuilt(values, vectors), matrix.double())
    kept = int((values > values[0]).sum())
    assert error <= tolerance and 0 < kept < SIZE // 2
    # the best that so many directions can do
    eigenvalues = falling()
    rest = eigenvalues[kept:]
    best = (rest - rest.mean()).norm() / eigenvalues.norm()
    assert best * 0.999 <= error


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_is_a_decomposition_with_the_same_trace(dtype):
    matrix = covariance(falling(), dtype)
    values, vectors = leading_eigh(matrix, 1e-2)
    rounding = 100 * torch.finfo(dtype).eps
    identity = vectors.double().T @ vectors.double()
    assert vectors.shape == matrix.shape
    assert (identity - torch.eye(SIZE)).abs().max() < rounding
    assert (values.diff() >= 0).all() and (values >= 0).all()
    trace = matrix.diagonal().double().sum()
    assert abs(values.double().sum() / trace - 1) < rounding
    exact = torch.linalg.eigvalsh(matrix.double())[-5:]
    assert torch.allclose(values[-5:].double(), exact, rtol=1e-3)


@pytest.mark.parametrize("rank", [1, 5, 64, 70, 150])
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_ranks_are_exact(dtype, rank):
    matrix, epsilon = covariance(falling(0.1, rank), dtype), torch.finfo(dtype).eps
    values, vectors = leading_eigh(matrix, epsilon**0.5)
    rounding = 100 * epsilon
    error = dense.relative_error(rebuilt(values, vectors), matrix.double())
    assert error < epsilon**0.5
    assert (values[: SIZE - 192] < rounding).all()
    identity = vectors.double().T @ vectors.double()
    assert (identity - torch.eye(SIZE)).abs().max() < rounding


def test_results_are_the_same_each_time():
    matrix, state = covariance(falling()), torch.random.get_rng_state()
    first, second = (leading_eigh(matrix, 1e-2) for _ in range(2))
    assert torch.equal(first[1], second[1])
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("count", [1, 3, 6])
def test_unit_vectors_are_completed_as_others_are(count):
    for columns in (torch.eye(6)[:, :count], orthonormal(6, count).float()):
        basis = completed(columns)
        assert torch.equal(basis[:, 6 - count :], columns)
        assert torch.allclose(basis.T @ basis, torch.eye(6), atol=1e-6)


def test_eigenvalues_that_hardly_fall_are_all_decomposed(small_is_large):
    matrix = covariance(falling(0.1))
    assert leading_eigh(matrix, 1e-2) is None
    values, vectors = symmetric_eigh(matrix, 1e-2)
    assert torch.equal(values, torch.linalg.eigh(matrix)[0])
    assert torch.allclose(rebuilt(values, vectors), matrix)


def test_large_factors_alone_are_decomposed_in_part(monkeypatch, small_is_large):
    sizes, eigh = [], torch.linalg.eigh

    def counted(matrix):
        sizes.append(len(matrix))
        return eigh(matrix)

    small, large = covariance(falling(size=200), size=200), covariance(falling())
    monkeypatch.setattr(torch.linalg, "eigh", counted)
    decompose([Kronecker(small, large)])
    assert sizes == [200, SIZE]
    sizes.clear()
    decompose([Kronecker(small, large)], 1e-2)
    assert sizes[0] == 200 and max(sizes[1:]) < SIZE // 2


def test_rows_of_zeros_are_taken_out_before(small_is_large):
    matrix = torch.zeros(SIZE + 50, SIZE + 50, dtype=torch.float64)
    matrix[50:, 50:] = covariance(falling())
    values, vectors = symmetric_eigh(matrix, 1e-2)
    assert (values[:50] == 0).all() and (vectors[50:, :50] == 0).all()
    assert dense.relative_error(rebuilt(values, vectors), matrix) < 1e-2
    identity = torch.eye(SIZE + 50, dtype=torch.float64)
    assert torch.allclose(vectors.T @ vectors, identity)


def test_what_does_not_converge_is_decomposed_in_full(monkeypatch, small_is_large):
    def fail(matrix, tolerance):
        raise torch.linalg.LinAlgError("failed to converge")

    monkeypatch.setattr(decomposition, "leading_eigh", fail)
    matrix = covariance(falling(), torch.float32)
    values, vectors = symmetric_eigh(matrix, 1e-2)
    assert dense.relative_error(rebuilt(values, vectors), matrix.double()) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_curvature_along_the_rest_is_what_is_left_of_the_trace(dtype, small_is_large):
    factors = [Kronecker(None, covariance(falling(), dtype))]
    others = [Kronecker(None, covariance(falling(1.5), dtype, seed=1))]
    directions, own = decompose(factors, 1e-2)
    (whole,) = project(others, directions)
    (actual,) = project(others, directions, own)
    rest = own[0].inputs == own[0].inputs[0]
    assert rest.sum() > SIZE // 2
    expected = torch.where(rest, whole.inputs[rest].mean(), whole.inputs)
    assert torch.allclose(actual.inputs, expected, rtol=1e-3)
    assert actual.inputs.sum().item() == pytest.approx(
        others[0].inputs.trace().item(), rel=1e-5
    )


@pytest.mark.parametrize("pooled", [False, True])
def test_effective_numbers_of_parameters_are_within_the_bound(pooled, small_is_large):
    """Also the log determinant, for the same points in both roles."""
    G, A = covariance(falling(1.0, 20), size=20), 3 * covariance(falling(1.5))
    factors, tolerance = [Kronecker(G, A)], 1e-2
    full, part = (
        two_batch(
            factors,
            lambda U, own: project(factors, U, own),
            decomposition=partial(decompose, tolerance=t),
        ).magnitudes[0]
        for t in (0.0, tolerance)
    )
    squared_norm = (G.norm() * A.norm()) ** 2
    for delta in (0.1, 1.0, 10.0):
        x, y = (torch.outer(own.gradients, own.inputs) / delta for own in (full, part))
        bound = tolerance**2 * squared_norm / delta**2
        change = (y / (y + 1)).sum() - (x / (x + 1)).sum()
        assert 0 < change <= bound
        assert 0 < y.log1p().sum() - x.log1p().sum() <= bound / 2
    # in a cross-fit, all decompositions are in part
    partly = partial(decompose, tolerance=tolerance)
    crossed = kfac_cross_fit([factors] * 2, [0.5, 0.5], pooled, partly)
    assert torch.allclose(crossed.magnitudes[0].inputs, part.inputs)
