import pytest
import torch

from laplace_debiased.holdout import best_share, holdout_error


def inverse_wishart_errors(shares, num_points, dimension, repetitions=100):
    """Measured squared errors per eigenvalue, for eigenvalues of variance one."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    # with d / m = p / (1 + p) = 1 / 2 the inverse has eigenvalues of variance p = 1
    ratio, errors = 0.5, torch.zeros(len(shares), dtype=torch.float64)
    for _ in range(repetitions):
        m = int(dimension / ratio)
        W = normal(m, dimension)
        population = (1 - ratio) * torch.linalg.inv(W.T @ W / m)
        X = normal(num_points, dimension) @ torch.linalg.cholesky(population).T
        for k, share in enumerate(shares.tolist()):
            m = round(share * num_points)
            directions = torch.linalg.eigh(X[:m].T @ X[:m]).eigenvectors
            rotated = X[m:] @ directions
            values = rotated.square().mean(0)
            estimate = directions @ torch.diag(values) @ directions.T
            errors[k] += (estimate - population).square().sum() / dimension
    return errors / repetitions


def test_error_is_that_of_an_inverse_wishart_population():
    shares = torch.tensor([0.2, 0.4, 0.6, 0.8, 0.9], dtype=torch.float64)
    measured = inverse_wishart_errors(shares, 160, 80)
    expected = holdout_error(shares, 160, 80)
    assert ((measured / expected - 1).abs() < 0.1).all()
    assert measured.argmin() == expected.argmin()


@pytest.mark.parametrize("dimension", [2, 10, 100, 1000])
def test_best_share_minimizes_the_error(dimension):
    share = best_share(128, [dimension])
    others = torch.linspace(0.05, 0.95, 91, dtype=torch.float64)
    smallest = holdout_error(others, 128, dimension).min()
    own = holdout_error(torch.tensor(share, dtype=torch.float64), 128, dimension)
    assert own <= smallest + 1e-4


def test_ratio_of_shares_grows_with_the_root_of_the_dimension():
    # points in proportion to the dimension, as in the theory
    odds = [
        share / (1 - share) for share in (best_share(4 * d, [d]) for d in (16, 64, 256))
    ]
    assert odds[1] / odds[0] == pytest.approx(2, rel=0.15)
    assert odds[2] / odds[1] == pytest.approx(2, rel=0.15)
