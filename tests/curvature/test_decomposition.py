import os
from pathlib import Path

import pytest
import torch

from laplace_debiased.curvature.decomposition import decompose, symmetric_eigh
from laplace_debiased.curvature.kronecker import Kronecker
from tests import dense
from tests.curvature.test_eigenbasis import positive_definite

HARD = Path(
    os.environ.get("LAPLACE_DEBIASED_DATA", "data"),
    "hard",
    "gradient_covariance_1152.safetensors",
)


def test_single_precision_that_does_not_converge_is_replaced(monkeypatch):
    matrix, eigh = positive_definite(5).float(), torch.linalg.eigh

    def only_in_double(matrix):
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("failed to converge")
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", only_in_double)
    values, vectors = symmetric_eigh(matrix)
    assert values.dtype == vectors.dtype == torch.float32
    assert torch.allclose((vectors * values) @ vectors.T, matrix, atol=1e-5)


def test_half_precision_is_decomposed_in_double():
    matrix = positive_definite(5).bfloat16()
    values, vectors = symmetric_eigh(matrix)
    assert values.dtype == vectors.dtype == torch.bfloat16
    rebuilt = (vectors.double() * values.double()) @ vectors.double().T
    assert torch.allclose(rebuilt, matrix.double(), atol=0.1)


def test_what_is_missing_stays_so():
    G, A = positive_definite(3), positive_definite(2)
    vectors, values = decompose([Kronecker(G, A), Kronecker(G), Kronecker(None, A)])
    assert vectors[1].inputs is None and values[2].gradients is None
    for matrix, own, eigenvalues in (
        (G, vectors[0].gradients, values[0].gradients),
        (A, vectors[2].inputs, values[2].inputs),
    ):
        assert torch.allclose((own * eigenvalues) @ own.T, matrix)


def test_nan_in_single_precision_is_replaced(monkeypatch):
    matrix, eigh = positive_definite(5).float(), torch.linalg.eigh

    def silent(matrix):
        values, vectors = eigh(matrix)
        return (values, vectors * torch.nan if matrix.dtype.itemsize == 4 else vectors)

    monkeypatch.setattr(torch.linalg, "eigh", silent)
    values, vectors = symmetric_eigh(matrix)
    assert torch.allclose((vectors * values) @ vectors.T, matrix, atol=1e-5)


def test_rows_of_zeros_are_taken_out_before(monkeypatch):
    used = torch.tensor([True, False, True, True, False, True])
    matrix = torch.zeros(6, 6, dtype=torch.float64)
    own = positive_definite(4) - 2 * torch.eye(4)  # some eigenvalues are negative
    matrix[used.outer(used)] = own.flatten()
    sizes, eigh = [], torch.linalg.eigh

    def counted(matrix):
        sizes.append(len(matrix))
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    values, vectors = symmetric_eigh(matrix)
    assert sizes == [4]
    assert (values.diff() >= 0).all()
    expected = torch.cat([torch.linalg.eigvalsh(own), torch.zeros(2).double()])
    assert torch.allclose(values, expected.sort()[0])
    assert torch.allclose((vectors * values) @ vectors.T, matrix)
    assert torch.allclose(vectors.T @ vectors, torch.eye(6).double())


def test_a_matrix_of_zeros_has_unit_vectors():
    values, vectors = symmetric_eigh(torch.zeros(3, 3))
    assert not values.any()
    assert torch.equal(vectors, torch.eye(3))


@pytest.mark.skipif(not HARD.is_file(), reason=f"needs {HARD}")
def test_covariance_of_dead_channels_is_decomposed_in_single_precision():
    safetensors = pytest.importorskip("safetensors.torch")
    (matrix,) = safetensors.load_file(HARD).values()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        values, vectors = symmetric_eigh(matrix)
    finally:
        torch.set_num_threads(threads)
    rebuilt = (vectors.double() * values.double()) @ vectors.double().T
    assert dense.relative_error(rebuilt, matrix.double()) < 1e-5
