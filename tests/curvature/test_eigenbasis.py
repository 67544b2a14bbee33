import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laplace.utils.matrix import KronDecomposed

from laplace_debiased import EigenbasisMatrix
from laplace_debiased.curvature.decomposition import symmetric_eigh
from laplace_debiased.curvature.eigenbasis import by_parameter
from laplace_debiased.curvature.kronecker import Kronecker, Spectrum
from laplace_debiased.rows.layers import Layer
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
    with pytest.raises(ValueError, match=r"Can only add|Invalid shape"):
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


def test_layers_are_split_into_their_parameters():
    G, A = (symmetric_eigh(positive_definite(side))[1] for side in (3, 2))
    layers = [Layer("a", matrix=2, vector=0, d_out=3, d_in=2), Layer("b", None, 1, 3)]
    directions = [Kronecker(G, A), Kronecker(G)]
    v, m = torch.rand(3).double(), torch.rand(2).double()
    factored = by_parameter(layers, directions, [Kronecker(v, m), Kronecker(v)])
    spectra = [Spectrum(torch.outer(v, m), v), Spectrum(None, v)]
    full = by_parameter(layers, directions, spectra)
    blocks = [v, v, torch.kron(v, m)]
    bases = [G, G, torch.kron(G, A)]
    expected = torch.block_diag(
        *[U @ torch.diag(d) @ U.T for U, d in zip(bases, blocks, strict=True)]
    )
    for matrix in (factored, full):
        assert torch.allclose(matrix.to_matrix(), expected)
