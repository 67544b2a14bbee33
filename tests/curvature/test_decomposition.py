import torch

from laplace_debiased.curvature.decomposition import decompose, symmetric_eigh
from laplace_debiased.curvature.kronecker import Kronecker
from tests.curvature.test_eigenbasis import positive_definite


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
