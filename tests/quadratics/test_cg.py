import numpy as np
import pytest
import torch
from curvlinops import GGNLinearOperator
from scipy.sparse.linalg import cg as scipy_cg
from torch import nn

from laplace_debiased.quadratics.cg import (
    CONVERGED,
    EXHAUSTED,
    NON_POSITIVE,
    cg,
    debiased_cg,
    rescale,
)
from tests import dense
from tests.cases import batch, network
from tests.quadratics.spiked import SpikedQuadratic

DIMENSION = 12


def quadratic(seed=0, dimension=DIMENSION, num_points=40):
    generator = torch.Generator().manual_seed(seed)
    A, b = SpikedQuadratic(dimension, (30.0, 8.0)).sample(num_points, generator)
    return A, 5 * b


def scipy_iterates(A, b, x0=None, **options):
    iterates = []
    solution, _ = scipy_cg(
        A.numpy(),
        b.numpy(),
        None if x0 is None else x0.numpy(),
        callback=lambda x: iterates.append(x.copy()),
        **options,
    )
    return torch.from_numpy(np.array(iterates)).T, torch.from_numpy(solution)


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(
    "tolerance", [{"rtol": 1e-6}, {"rtol": 1e-3}, {"rtol": 0.0, "atol": 0.05}]
)
def test_iterates_are_those_of_scipy(tolerance, warm, preconditioned):
    A, b = quadratic()
    x0 = torch.linspace(-1, 1, DIMENSION, dtype=torch.float64) if warm else None
    M = torch.diag(1 / A.diagonal()) if preconditioned else None
    result = cg(A, b, x0, preconditioner=M, **tolerance)
    options = {"M": M.numpy()} if preconditioned else {}
    iterates, solution = scipy_iterates(A, b, x0, **tolerance, **options)
    assert result.termination == CONVERGED
    assert result.iterates.shape == (DIMENSION, result.num_iterations + 1)
    # later ones differ, since scipy's directions do not stay conjugate
    assert torch.allclose(result.iterates[:, 1:6], iterates[:, :5], atol=1e-9)
    limit = max(tolerance["rtol"] * b.norm(), tolerance.get("atol", 0.0))
    assert (b - A @ result.solution).norm() <= limit * (1 + 1e-9)
    assert (result.solution - solution).norm() < 2 * limit
    assert abs(result.num_iterations - iterates.shape[1]) <= 1


def test_directions_stay_conjugate_in_single_precision():
    A, b = (tensor.float() for tensor in quadratic(0, 100, 400))
    D = cg(A, b, rtol=0, max_iterations=30).directions
    products = D.T @ A @ D
    scale = products.diagonal().sqrt()
    conjugacy = products / torch.outer(scale, scale) - torch.eye(30)
    assert conjugacy.abs().max() < 1e-3


def test_directions_are_conjugate_and_slopes_and_curvatures_are_theirs():
    A, b = quadratic()
    result = cg(A, b, rtol=1e-12)
    D = result.directions
    products = D.T @ A @ D
    assert torch.allclose(products.diagonal(), result.curvatures)
    off = products - torch.diag(products.diagonal())
    assert off.abs().max() < 1e-8 * products.abs().max()
    # conjugacy makes the slope at the start that at the iterate
    assert torch.allclose(result.slopes, -D.T @ b, rtol=1e-6)
    assert (result.slopes < 0).all()
    at_iterates = A @ result.iterates[:, :-1] - b[:, None]
    assert torch.allclose(result.slopes, (D * at_iterates).sum(0), rtol=1e-9)
    steps = -result.slopes / result.curvatures
    assert torch.allclose(D @ steps, result.solution)


def test_debiased_slopes_are_those_of_the_other_quadratic_at_the_start():
    (A, b), (B, c) = quadratic(0), quadratic(1)
    x0 = torch.linspace(-1, 1, DIMENSION, dtype=torch.float64)
    result = debiased_cg(A, b, B, c, x0, max_iterations=5)
    D = result.directions
    assert torch.allclose(result.slopes, D.T @ (B @ x0 - c), rtol=1e-10)
    assert torch.allclose(result.curvatures, (D * (B @ D)).sum(0), rtol=1e-10)


@pytest.mark.parametrize("subspace", [False, True])
@pytest.mark.parametrize("warm", [False, True])
def test_the_same_quadratic_in_both_roles_is_plain_cg(warm, subspace):
    A, b = quadratic()
    x0 = torch.linspace(-1, 1, DIMENSION, dtype=torch.float64) if warm else None
    expected = cg(A, b, x0, rtol=1e-8)
    result = debiased_cg(A, b, A, b, x0, rtol=1e-8, subspace=subspace)
    assert torch.allclose(result.iterates, expected.iterates, atol=1e-7)
    _, solution = scipy_iterates(A, b, x0, rtol=1e-8)
    assert torch.allclose(result.solution, solution, atol=1e-7)


def test_each_direction_is_minimized_along_on_the_other_quadratic():
    (A, b), (B, c) = quadratic(0), quadratic(1)
    result = debiased_cg(A, b, B, c, max_iterations=5)
    expected = torch.zeros(DIMENSION).double()
    for k, d in enumerate(cg(A, b, max_iterations=5).directions.T):
        expected = expected + (d @ c) / (d @ B @ d) * d
        assert torch.allclose(result.iterates[:, k + 1], expected)


def test_subspace_variant_minimizes_the_other_quadratic_in_each_span():
    (A, b), (B, c) = quadratic(0), quadratic(1)
    x0 = torch.linspace(-1, 1, DIMENSION, dtype=torch.float64)
    result = debiased_cg(A, b, B, c, x0, max_iterations=5, subspace=True)
    for k in range(1, 6):
        D = result.directions[:, :k]
        residual = c - B @ result.iterates[:, k]
        assert (D.T @ residual).abs().max() < 1e-9
        step = result.iterates[:, k] - x0
        assert dense.relative_error(D @ torch.linalg.pinv(D) @ step, step) < 1e-9


def test_curvlinops_operators_are_quadratics():
    model, (X, y) = network("mlp"), batch("mlp", 20)
    params, loss = list(model.parameters()), nn.CrossEntropyLoss()
    parts = [(X[:10], y[:10]), (X[10:], y[10:])]
    A, B = (GGNLinearOperator(model, loss, params, [part]) for part in parts)
    b, c = (
        -torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss(model(X), y), params)]
        )
        for X, y in parts
    )
    result = debiased_cg(A, b, B, c, max_iterations=4)
    eye = torch.eye(len(b)).double()
    expected = debiased_cg(A @ eye, b, B @ eye, c, max_iterations=4)
    assert torch.allclose(result.iterates, expected.iterates)


def test_non_positive_curvature_ends_the_iteration_and_is_told():
    A = torch.diag(torch.tensor([3.0, 2.0, -1.0]).double())
    b = torch.tensor([1.0, 1.0, 0.1]).double()
    result = cg(A, b)
    assert result.termination == NON_POSITIVE
    assert 0 < result.num_iterations < 3
    assert result.solution.isfinite().all()
    empty = cg(-A.abs(), b)
    assert (empty.num_iterations, empty.termination) == (0, NON_POSITIVE)
    assert torch.equal(empty.solution, torch.zeros(3).double())
    debiased = debiased_cg(-A.abs(), b, A, b)
    assert torch.equal(debiased.solution, torch.zeros(3).double())


@pytest.mark.parametrize("subspace", [False, True])
def test_no_step_along_directions_of_non_positive_curvature(subspace):
    A, b = quadratic()
    expected = cg(A, b, max_iterations=4)
    D = expected.directions
    curvatures = D.T @ A @ D
    curvatures[2, 2] *= -1
    result = rescale(expected, -D.T @ b, curvatures, subspace)
    assert result.termination == NON_POSITIVE
    assert torch.allclose(result.iterates[:, 2], expected.iterates[:, 2])
    assert torch.allclose(result.iterates[:, 3], expected.iterates[:, 2])
    assert result.iterates.isfinite().all()


def test_limits_of_the_iteration():
    A, b = quadratic()
    assert cg(A, b, max_iterations=3).termination == EXHAUSTED
    assert cg(A, b, max_iterations=3).num_iterations == 3
    zero = cg(A, torch.zeros_like(b))
    assert (zero.num_iterations, zero.termination) == (0, CONVERGED)
    warm = cg(A, torch.zeros_like(b), torch.ones_like(b))
    assert (warm.num_iterations, warm.termination) == (0, CONVERGED)
    assert not warm.solution.any()  # as in SciPy
    exact = cg(A, b, torch.linalg.solve(A, b))
    assert (exact.num_iterations, exact.termination) == (0, CONVERGED)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ([torch.eye(2), torch.ones(2, 1)], {}, "must be vectors of one shape"),
        ([torch.eye(2), torch.ones(2), torch.ones(3)], {}, r"got \[\(2,\), \(3,\)\]"),
        ([torch.eye(1), torch.tensor([float("nan")])], {}, "`b` must be finite"),
        ([torch.eye(2), torch.ones(2)], {"rtol": -1.0}, "must not be negative"),
        ([torch.eye(2), torch.ones(2)], {"max_iterations": 0}, "must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        cg(*arguments, **options)


def test_curvature_that_is_not_finite_is_refused():
    A = torch.diag(torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match="The curvature along a direction is nan"):
        cg(A, torch.ones(2))


def test_rounding_errors_give_no_directions():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(30, 5, generator=generator).double()
    A = root @ root.T
    result = cg(A, A @ torch.ones(30).double(), rtol=0.0, max_iterations=30)
    assert 5 <= result.num_iterations <= 6  # the rank, and one of rounding
