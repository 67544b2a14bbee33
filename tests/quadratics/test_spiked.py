"""Measured bias against random matrix theory, one mechanism at a time."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import bias_report
from laplace_debiased.quadratics.cg import debiased_cg
from tests.quadratics.spiked import (
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


def reports_of_linear_models(spectrum, signal, directions, num_points=200, seeds=12):
    """Reports whose curvature is 2 E[x x'], with the gradient -2 E[y x] at zero.

    A sign y times an input y (signal + noise) is Gaussian, and so is each gradient.
    """
    dimension = len(spectrum)
    model = nn.Linear(dimension, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(3 * num_points, dimension, generator=generator).double()
        y = torch.randint(2, (len(noise), 1), generator=generator) * 2.0 - 1
        X = y * (signal + noise * spectrum.sqrt())
        yield bias_report(
            model,
            nn.MSELoss(),
            [model.weight],
            DataLoader(TensorDataset(X, y.double()), 300),
            directions=directions,
            num_directions=1,
            batch_size=num_points,
            num_batches=2,
            tol=1e-8,
            seed=seed,
        )


@pytest.mark.parametrize(("spike", "gamma"), [(4.0, 0.25), (6.0, 0.5)])
def test_a_report_has_the_curvatures_that_theory_predicts(spike, gamma):
    spectrum = SpikedQuadratic(int(200 * gamma), (spike,)).spectrum
    own, others = [], []
    for report in reports_of_linear_models(spectrum, 0.0, "eigenvectors"):
        own.append(report.curvature.own[0] / 2)
        others.append(report.curvature.others.mean() / 2)
    predicted = top_eigenvalue(spike, gamma), held_out_curvature(spike, gamma)
    for values, expected in zip((own, others), predicted, strict=True):
        error = torch.stack(values).std().item() / len(values) ** 0.5
        assert error < 0.04 * expected
        # theory is that of many dimensions: its error is one over their number
        assert abs(mean(values) - expected) < 3 * error + 0.01 * expected
    assert mean(own) > 1.1 * mean(others)


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_a_report_has_the_slopes_that_theory_predicts(strength):
    signal = torch.zeros(100).double()
    signal[0] = strength
    spectrum = torch.ones(100).double()
    own, others = [], []
    for report in reports_of_linear_models(spectrum, signal, "cg"):
        own.append(report.slope.own[0] / 2)
        others.append(report.slope.others.mean() / 2)
    length = (strength**2 + len(spectrum) / 200) ** 0.5
    assert mean(own) == pytest.approx(length, rel=0.03)
    error = torch.stack(others).std().item() / len(others) ** 0.5
    assert error < 0.05
    assert abs(mean(others) - strength**2 / length) < 4 * error


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
