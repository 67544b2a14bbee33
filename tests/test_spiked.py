"""Measured bias against random matrix theory, one mechanism at a time."""

import pytest
import torch

from laplace_debiased.cg import debiased_cg
from laplace_debiased.spiked import (
    SpikedQuadratic,
    held_out_curvature,
    squared_overlap,
    top_eigenvalue,
)

POINTS = 400


def draws(population, num_points, repetitions=40):
    generator = torch.Generator().manual_seed(0)
    for _ in range(repetitions):
        yield (
            population.sample(num_points, generator),
            population.sample(num_points, generator),
        )


def top(matrix):
    return torch.linalg.eigh(matrix).eigenvectors[:, -1]


def mean(values):
    return torch.stack(values).mean().item()


@pytest.mark.parametrize("gamma", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("spike", [4.0, 10.0])
def test_curvature_of_the_top_eigenvector_is_overestimated_as_predicted(spike, gamma):
    population = SpikedQuadratic(int(gamma * POINTS), (spike,))
    own, other, everywhere, overlaps = [], [], [], []
    for (H, _), (H_other, _) in draws(population, POINTS):
        u = top(H)
        own.append(u @ H @ u)
        other.append(u @ H_other @ u)
        everywhere.append(population.spectrum @ u.square())
        overlaps.append(u[0] ** 2)
    assert mean(own) == pytest.approx(top_eigenvalue(spike, gamma), rel=0.04)
    assert mean(overlaps) == pytest.approx(squared_overlap(spike, gamma), rel=0.04)
    # directions from one batch, magnitudes from another: no bias
    expected = held_out_curvature(spike, gamma)
    assert mean(everywhere) == pytest.approx(expected, rel=0.04)
    assert mean(other) == pytest.approx(expected, rel=0.04)
    assert top_eigenvalue(spike, gamma) > 1.05 * expected


def test_spectra_of_two_batches_are_alike():
    population = SpikedQuadratic(200, (10.0, 5.0))
    differences, levels = [], []
    for (H, _), (H_other, _) in draws(population, POINTS, 10):
        first, second = torch.linalg.eigvalsh(H), torch.linalg.eigvalsh(H_other)
        differences.append((first - second).abs().mean())
        levels.append(first.mean())
    assert mean(differences) < 0.05 * mean(levels)


@pytest.mark.parametrize("strength", [0.0, 1.0, 3.0])
def test_slope_regresses_to_the_mean(strength):
    dimension, num_points, noise = 300, 100, 2.0
    mu = torch.zeros(dimension).double()
    mu[0] = strength
    population = SpikedQuadratic(dimension, (), mu, noise)
    own, other = [], []
    for (_, g), (_, g_other) in draws(population, num_points, 200):
        direction = g / g.norm()
        own.append(direction @ g)
        other.append(direction @ g_other)
    length = (strength**2 + noise**2 * dimension / num_points) ** 0.5
    assert mean(own) == pytest.approx(length, rel=0.02)
    error = torch.stack(other).std().item() / len(other) ** 0.5
    assert abs(mean(other) - strength**2 / length) < 4 * error


def test_debiased_cg_makes_no_progress_that_other_points_do_not_see():
    """Without a true gradient, all that cg gains on its batch is imaginary."""
    population = SpikedQuadratic(200, (20.0, 10.0), noise=3.0)
    single, debiased = [], []
    for (A, g), (B, h) in draws(population, POINTS, 20):

        def excess(x):
            return 0.5 * population.spectrum @ x.square()

        result = debiased_cg(A, -g, B, -h, max_iterations=10)
        biased = debiased_cg(A, -g, A, -g, max_iterations=10)
        single.append(excess(biased.solution))
        debiased.append(excess(result.solution))
    assert mean(debiased) < 0.2 * mean(single)


def test_spikes_that_a_sample_cannot_tell_from_noise_are_refused():
    with pytest.raises(ValueError, match=r"`spike` must be above 1 \+ sqrt"):
        top_eigenvalue(1.5, 0.5)
