import pytest
import torch
from laplace import KronLaplace
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from laplace_debiased.comparison.estimators import ESTIMATORS, FULL_DATA, scale_to
from tests.cases import batch, network
from tests.fits import two_roles

SIZE = 24
COPIES = 3


@pytest.fixture
def model():
    return network("mlp")


@pytest.fixture
def points():
    return TensorDataset(*batch("mlp", SIZE))


def fit(model, points):
    laplace = KronLaplace(model, "classification")
    laplace.fit(DataLoader(points, batch_size=10))
    return laplace


def test_scaled_fit_equals_fit_to_copies(model, points):
    scaled, copied = fit(model, points), fit(model, ConcatDataset([points] * COPIES))
    scale_to(scaled, COPIES * SIZE)
    precisions = [la.posterior_precision.to_matrix() for la in (scaled, copied)]
    torch.testing.assert_close(*precisions)
    evidences = [la.log_marginal_likelihood() for la in (scaled, copied)]
    torch.testing.assert_close(*evidences)
    assert scaled.n_data == copied.n_data


@pytest.mark.parametrize("name", ESTIMATORS)
def test_curvature_is_that_of_all_points(model, points, name):
    few, _ = ESTIMATORS[name](model, ConcatDataset([points] * COPIES), SIZE, 0)
    assert few.n_data == COPIES * SIZE
    full = fit(model, ConcatDataset([points] * COPIES))
    ratio = few.H.diag().sum() / full.H.diag().sum()
    assert 0.5 < ratio < 2


@pytest.mark.parametrize("name", ESTIMATORS)
def test_number_of_points_is_reported(model, points, name):
    budget = 9
    expected = SIZE if name == FULL_DATA else budget
    assert ESTIMATORS[name](model, points, budget, 0).num_points == expected


@pytest.mark.parametrize("name", ["single batch", "two batches"])
def test_estimators_with_budget_see_the_same_points(model, points, name):
    budget, seed = 9, 4
    drawn = [r.dataset for r in two_roles(DataLoader(points), 0.5, budget, seed)]
    drawn = torch.cat([X for dataset in drawn for X, _ in DataLoader(dataset)])

    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ESTIMATORS[name](model, points, budget, seed)
    assert set(map(tuple, torch.cat(seen).tolist())) == set(map(tuple, drawn.tolist()))


@pytest.mark.parametrize("name", ["single batch", "default, ggn"])
def test_seed_determines_draw(model, points, name):
    first, again, other = (
        ESTIMATORS[name](model, points, 8, seed).laplace.H.to_matrix()
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
