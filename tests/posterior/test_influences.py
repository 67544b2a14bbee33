"""Influences are derivatives of the trace by the weights of the points."""

import pytest
import torch

from laplace_debiased.curvature.factors import KroneckerFactors
from laplace_debiased.posterior.influences import InputScale, of_factors, of_pools
from laplace_debiased.rows.layers import Layer
from laplace_debiased.rows.sweep import SweepSummary

LAYERS = [
    Layer("matrix and vector", 0, 1, 3, 4),
    Layer("matrix", 2, None, 3, 4),
    Layer("vector", None, 3, 3, is_normalization=True),
]


def points(count, seed):
    """Contributions to G, squared inputs, their number, and weights of some points."""
    torch.manual_seed(seed)
    contributions, squares = torch.rand(2, count, 3, dtype=torch.float64)
    num_rows = torch.tensor([5.0, 1.0, 0.0]).double().repeat(count, 1)
    squares[:, 2] = 0
    return contributions, squares, num_rows, torch.rand(count).double()


def summary(squares, num_rows, scores=None):
    loss = torch.zeros(())
    return SweepSummary(
        len(squares),
        1,
        loss,
        3,
        traces=scores,
        squared_inputs=squares,
        num_rows=num_rows,
    )


VECTOR = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)


def trace_of(G, A):
    return G * (A + VECTOR)


@pytest.mark.parametrize("shares", [[1.0], [0.3, 0.7]])
def test_influences_of_points_that_give_both_factors(shares):
    folds = [points(6 + k, k) for k in range(len(shares))]

    def trace(*weights):
        G = A = 0
        for share, own, w in zip(shares, folds, weights, strict=True):
            contributions, squares, num_rows, _ = own
            w = w[:, None]
            G = G + share * (w * contributions).sum(0)
            counts = (w * num_rows).sum(0).clamp(min=1e-300)
            A = A + share * (w * squares).sum(0) / counts
        return trace_of(G, A)

    weights = tuple(fold[3] for fold in folds)
    derivatives = torch.autograd.functional.jacobian(trace, weights)
    expected = torch.cat(
        [w[:, None] * d.T for w, d in zip(weights, derivatives, strict=True)]
    )
    scales = [InputScale.of_pass(summary(*own[1:3]), own[3]) for own in folds]
    given = [
        share * own[3][:, None] * own[0]
        for share, own in zip(shares, folds, strict=True)
    ]
    actual = of_factors(LAYERS, given, scales, shares)
    assert torch.allclose(actual, expected)
    assert torch.allclose(actual.sum(0), trace(*weights))


@pytest.mark.parametrize("is_exact", [False, True])
def test_influences_of_a_pool_whose_scores_tell_the_curvature(is_exact):
    """Where a point's curvature is its score, or that times its squared input."""
    shares, sizes = [0.4, 0.6], (5, 7)
    pools = [points(size, k) for k, size in enumerate(sizes)]
    scores = [torch.rand(size).double() + 0.1 for size in sizes]

    def trace(*weights):
        total, A = 0, None
        for share, own, s, w in zip(shares, pools, scores, weights, strict=True):
            _, squares, num_rows, _ = own
            w = w[:, None]
            values = s[:, None].expand(-1, 3)
            if is_exact:
                lengths = squares + VECTOR * num_rows
                values = values * torch.where(num_rows > 0, lengths, 1.0)
            total = total + share * (w * values).sum(0) / len(s)
            counts = (w * num_rows).sum(0).clamp(min=1e-300)
            A = (w * squares).sum(0) / counts  # of the last pool
        return total if is_exact else trace_of(total, A)

    ones = tuple(torch.ones(size).double() for size in sizes)
    derivatives = torch.autograd.functional.jacobian(trace, ones)
    given = [summary(*own[1:3], s) for own, s in zip(pools, scores, strict=True)]
    inputs = None if is_exact else InputScale.of_pass(given[-1], ones[-1])
    actual, _ = of_pools(LAYERS, trace(*ones), given, shares, inputs)
    # each pool tells its own mean: a constant is not seen
    for part, derivative in zip(actual.split(sizes), derivatives, strict=True):
        expected = derivative.T - derivative.T.mean(0)
        # relative to the pool's own mean, not to that of all
        ratio = part.norm(dim=0) / expected.norm(dim=0)
        cosine = (part * expected).sum(0) / part.norm(dim=0) / expected.norm(dim=0)
        assert (ratio.log().abs() < 0.7).all(), ratio
        assert (cosine > 0.8).all(), cosine


def test_points_without_weight_have_no_influence():
    """As those have whose target a loss ignores."""
    params = [torch.zeros(3, 4), torch.zeros(3)]
    layer = Layer("matrix and vector", 0, 1, 3, 4)
    factors = KroneckerFactors([layer], params)
    rows, weights = torch.rand(5, 2, 1, 4), torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0])
    factors.start_batch(weights)
    factors.add_inputs(layer, rows)
    own = summary(factors.squared_inputs.matrix(), factors.num_rows.matrix())
    scale = InputScale.of_pass(own, torch.ones(5))
    assert scale.influences[weights == 0].eq(0).all()
    assert own.num_rows.flatten().tolist() == [2, 0, 2, 0, 2]
    expected = InputScale.of_pass(own, weights).traces
    (covariances,) = factors.inputs()
    assert torch.allclose(expected, covariances.inputs.trace().double())
