import pytest
import torch

from laplace_debiased.sampling.shares import best_share, effective_rank, holdout_error


def inverse_wishart_errors(shares, num_points, dimension, variance, repetitions=100):
    """Measured squared errors per eigenvalue, for eigenvalues of a given variance."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    # with d / m = p / (1 + p) the inverse has eigenvalues of variance p
    ratio = variance / (1 + variance)
    errors = torch.zeros(len(shares), dtype=torch.float64)
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


@pytest.mark.parametrize("variance", [1, 2])
def test_error_is_that_of_an_inverse_wishart_population(variance):
    shares = torch.tensor([0.2, 0.4, 0.6, 0.8, 0.9], dtype=torch.float64)
    measured = inverse_wishart_errors(shares, 160, 80, variance)
    expected = holdout_error(shares, 160, 80, variance)
    assert ((measured / expected - 1).abs() < 0.1).all()
    assert measured.argmin() == expected.argmin()


@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("dimension", [10, 100, 1000])
def test_best_share_minimizes_the_error(dimension, rank):
    share = best_share(128, [dimension], rank)
    others = torch.linspace(0.05, 0.95, 91, dtype=torch.float64)
    p = dimension / rank - 1
    smallest = holdout_error(others, 128, dimension, p).min()
    own = holdout_error(torch.tensor(share, dtype=torch.float64), 128, dimension, p)
    assert own <= smallest * (1 + 1e-3)


@pytest.mark.parametrize("rank", [2, 5, 18])
def test_ratio_of_shares_is_the_root_of_half_the_rank(rank):
    share = best_share(10**6, [1000], rank)  # the variance is far above d / m
    assert share / (1 - share) == pytest.approx((rank / 2) ** 0.5, rel=0.05)


def test_half_if_there_are_no_directions_to_find():
    assert best_share(100, [3, 3], 3.0) == 0.5
    assert best_share(100, [3, 40], 3.0) == best_share(100, [40], 3.0)


def test_effective_rank_of_equal_eigenvalues_is_their_number():
    vectors = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64)).Q
    covariance = 3 * vectors[:, :4] @ vectors[:, :4].T
    assert effective_rank(covariance) == pytest.approx(4)
    assert effective_rank(torch.zeros(3, 3)) == 1


def test_ratio_of_shares_grows_with_the_root_of_the_dimension():
    # points in proportion to the dimension, as in the theory
    odds = [
        share / (1 - share)
        for share in (best_share(4 * d, [d], d / 2) for d in (16, 64, 256))
    ]
    assert odds[1] / odds[0] == pytest.approx(2, rel=0.15)
    assert odds[2] / odds[1] == pytest.approx(2, rel=0.15)
