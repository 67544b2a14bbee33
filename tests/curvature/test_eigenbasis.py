import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laplace.utils import Kron
from laplace.utils.matrix import KronDecomposed

from laplace_debiased import EigenbasisMatrix
from laplace_debiased.curvature.eigenbasis import decompose, project, symmetric_eigh
from tests.dense import relative_error

SIZES = [(4, 3), (4,), (2, 4), (2,)]
KINDS = ["factored", "matrix"]


def positive_definite(size):
    X = torch.randn(size, 2 * size, dtype=torch.float64)
    return X @ X.T / size


def random_matrix(sizes=SIZES, kind="factored", **kwargs):
    vectors = [
        [symmetric_eigh(positive_definite(side))[1] for side in block]
        for block in sizes
    ]
    if kind == "factored":
        values = [
            [torch.rand(side, dtype=torch.float64) for side in block] for block in sizes
        ]
    else:
        values = [[torch.rand(*block, dtype=torch.float64)] for block in sizes]
    return EigenbasisMatrix(vectors, values, **kwargs)


def dense(matrix):
    """The matrix from its eigendecomposition, by Kronecker products."""
    blocks = []
    for vectors, values, delta in zip(
        matrix.eigenvectors, matrix.eigenvalues, matrix.deltas, strict=True
    ):
        basis, *others = vectors
        for other in others:
            basis = torch.kron(basis, other)
        shift = delta.sqrt() if matrix.damping else 0.0
        spectrum, *rest = values
        if matrix.damping and rest:
            spectrum = torch.kron(spectrum + shift, rest[0] + shift)
        else:
            for other in rest:
                spectrum = torch.kron(spectrum, other)
            spectrum = spectrum.flatten() + delta
        blocks.append(basis @ torch.diag(spectrum) @ basis.T)
    return torch.block_diag(*blocks)


def power(H, exponent):
    values, vectors = torch.linalg.eigh(H)
    return vectors @ torch.diag(values**exponent) @ vectors.T


@given(
    sizes=st.lists(
        st.one_of(
            st.tuples(st.integers(1, 4)),
            st.tuples(st.integers(1, 4), st.integers(1, 5)),
        ),
        min_size=1,
        max_size=4,
    ),
    kind=st.sampled_from(KINDS),
    damping=st.booleans(),
    layerwise=st.booleans(),
    prior=st.floats(1e-3, 1e3),
    scale=st.floats(1e-2, 1e2),
)
@settings(max_examples=60, deadline=None)
def test_everything_equals_dense_algebra(sizes, kind, damping, layerwise, prior, scale):
    damping = damping and kind == "factored"
    matrix = random_matrix(sizes, kind, damping=damping) * scale
    length = len(sizes) if layerwise else 1
    matrix = matrix + prior * (1 + torch.rand(length, dtype=torch.float64))
    H = dense(matrix)
    W = torch.randn(3, 2, len(H), dtype=torch.float64)

    assert (torch.linalg.eigvalsh(H) > 0).all()
    assert torch.allclose(matrix.to_matrix(), H)
    assert torch.allclose(matrix.to_matrix(), matrix.to_matrix().T)
    assert torch.allclose(matrix.logdet(), H.logdet())
    expected = W @ H.inverse() @ W.mT
    assert torch.allclose(matrix.inv_square_form(W), expected, rtol=1e-8)
    for exponent in (1, -1, -0.5):
        root = power(H, exponent)
        assert relative_error(matrix.bmm(W, exponent), W @ root) < 1e-8
        assert relative_error(matrix.to_matrix(exponent), root) < 1e-8
        assert relative_error(matrix.diag(exponent), root.diag()) < 1e-8


@pytest.mark.parametrize("damping", [True, False])
def test_factored_eigenvalues_equal_laplace_torch(damping):
    matrix = random_matrix()
    deltas = torch.rand(len(SIZES), dtype=torch.float64)
    ours = EigenbasisMatrix(
        matrix.eigenvectors, matrix.eigenvalues, deltas, damping=damping
    )
    theirs = KronDecomposed(
        matrix.eigenvectors, matrix.eigenvalues, deltas, damping=damping
    )
    W = torch.randn(3, 2, len(ours.to_matrix()), dtype=torch.float64)
    assert torch.allclose(ours.to_matrix(), theirs.to_matrix())
    assert torch.allclose(ours.logdet(), theirs.logdet())
    assert torch.allclose(ours.diag(-1), theirs.diag(-1))
    assert torch.allclose(ours.inv_square_form(W), theirs.inv_square_form(W))
    for shape in (W, W[:, 0], W[0, 0]):
        assert torch.allclose(ours.bmm(shape, -0.5), theirs.bmm(shape, -0.5))


@pytest.mark.parametrize("kind", KINDS)
def test_prior_is_added_and_not_scaled(kind):
    matrix = random_matrix(kind=kind)
    H, identity = dense(matrix), torch.eye(len(dense(matrix)), dtype=torch.float64)
    shifted = 2 * (matrix + torch.tensor(0.5)) + torch.tensor([0.1])
    assert torch.allclose(shifted.to_matrix(), 2 * H + 0.6 * identity)


def test_damping_survives_addition_and_multiplication():
    matrix = random_matrix(damping=True)
    assert (matrix + torch.tensor(1.0)).damping
    assert (matrix * 2.0).damping
    assert matrix.clone().damping
    assert matrix.detach().damping


def test_damping_of_unfactored_eigenvalues_is_refused():
    with pytest.raises(ValueError, match="`damping` needs factored eigenvalues"):
        random_matrix(kind="matrix", damping=True)


def test_eigenvalues_of_a_wrong_shape_are_refused():
    matrix = random_matrix()
    values = [[torch.ones(7)], *matrix.eigenvalues[1:]]
    with pytest.raises(ValueError, match="do not match eigenvectors"):
        EigenbasisMatrix(matrix.eigenvectors, values)


@pytest.mark.parametrize("deltas", [1.0, torch.ones(3), torch.ones(4, 1)])
def test_priors_of_a_wrong_shape_are_refused(deltas):
    with pytest.raises(ValueError):
        random_matrix() + deltas


def test_clone_shares_nothing_and_allclose_compares():
    matrix = random_matrix()
    copy = matrix.clone()
    assert torch.allclose(matrix, copy)
    copy.eigenvalues[0][0] += 1
    assert not torch.allclose(matrix, copy)
    with pytest.raises(TypeError):
        torch.add(matrix, copy)


def test_gradients_flow_to_the_prior():
    matrix = random_matrix(kind="matrix")
    prior = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    (matrix + prior).logdet().backward()
    assert torch.allclose(prior.grad, (matrix + prior.detach()).diag(-1).sum())
    assert not (matrix + prior).detach().logdet().requires_grad


def test_projection_on_own_eigenvectors_reconstructs():
    kfacs = [[positive_definite(side) for side in block] for block in SIZES]
    vectors = decompose(kfacs)
    matrix = EigenbasisMatrix(vectors, project(kfacs, vectors))
    assert relative_error(matrix.to_matrix(), Kron(kfacs).to_matrix()) < 1e-12


def test_projection_of_singular_factors_is_not_negative():
    vector = torch.randn(6)
    singular = torch.outer(vector, vector)
    (eigenvalues,) = project([[singular]], decompose([[singular]]))
    assert (eigenvalues[0] >= 0).all()


def test_shared_factors_are_decomposed_once():
    G, A = positive_definite(3), positive_definite(2)
    (weight, _), (bias,) = decompose([[G, A], [G]])
    assert weight is bias


def test_single_precision_that_does_not_converge_is_replaced(monkeypatch):
    matrix, eigh = positive_definite(5).float(), torch.linalg.eigh

    def only_in_double(matrix):
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("failed to converge")
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", only_in_double)
    values, vectors = symmetric_eigh(matrix, fast=True)
    assert values.dtype == vectors.dtype == torch.float32
    assert torch.allclose((vectors * values) @ vectors.T, matrix, atol=1e-5)
