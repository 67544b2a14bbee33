import pytest
import torch
from laplace import KronLaplace
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased.comparison.posteriors import (
    FULL_DATA,
    POSTERIORS,
    fit_kfac,
    same_data_curvature,
    scale_to,
)
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


def copies(points):
    return TensorDataset(
        *(part.repeat(COPIES, *[1] * (part.ndim - 1)) for part in points.tensors)
    )


def fit(model, points):
    laplace = KronLaplace(model, "classification")
    laplace.fit(DataLoader(points, batch_size=10))
    return laplace


def test_scaled_fit_equals_fit_to_copies(model, points):
    scaled, copied = fit(model, points), fit(model, copies(points))
    scale_to(scaled, COPIES * SIZE)
    precisions = [la.posterior_precision.to_matrix() for la in (scaled, copied)]
    torch.testing.assert_close(*precisions)
    evidences = [la.log_marginal_likelihood() for la in (scaled, copied)]
    torch.testing.assert_close(*evidences)
    assert scaled.n_data == copied.n_data


@pytest.mark.parametrize("name", POSTERIORS)
def test_curvature_is_that_of_all_points(model, points, name):
    few, _ = POSTERIORS[name](model, copies(points), SIZE, 0)
    assert few.n_data == COPIES * SIZE
    full = fit(model, copies(points))
    ratio = few.H.diag().sum() / full.H.diag().sum()
    assert 0.5 < ratio < 2


@pytest.mark.parametrize("name", POSTERIORS)
def test_number_of_points_is_reported(model, points, name):
    budget = 9
    last_class = int(points.tensors[1].max())
    more = max(budget, budget * last_class // 2)
    expected = {FULL_DATA: SIZE, "two columns": more}
    fitted = POSTERIORS[name](model, points, budget, 0)
    assert fitted.num_points == expected.get(name, budget)


@pytest.mark.parametrize("name", ["single batch", "two batches"])
def test_estimators_with_budget_see_the_same_points(model, points, name):
    budget, seed = 9, 4
    drawn = [r.dataset for r in two_roles(DataLoader(points), 0.5, budget, seed)]
    drawn = torch.cat([X for dataset in drawn for X, _ in DataLoader(dataset)])

    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    POSTERIORS[name](model, points, budget, seed)
    # tracing the network takes examples that are no training points, too
    rows, chosen, every = (
        set(map(tuple, X.tolist())) for X in (torch.cat(seen), drawn, points.tensors[0])
    )
    assert rows & every == chosen


@pytest.mark.parametrize("name", ["single batch", "default, ggn"])
def test_seed_determines_draw(model, points, name):
    first, again, other = (
        POSTERIORS[name](model, points, 8, seed).laplace.H.to_matrix()
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_kfac_is_that_of_laplace_torch_where_it_takes_the_network(model, points):
    expected = fit(model, points)
    assert isinstance(fit_kfac(model, points), KronLaplace)
    for curvature in (fit_kfac(model, points).H, same_data_curvature(model, points)):
        torch.testing.assert_close(curvature.to_matrix(), expected.H.to_matrix())


@pytest.mark.filterwarnings("ignore")
def test_kfac_of_a_network_that_laplace_torch_refuses(points):
    torch.manual_seed(0)
    X, y = points.tensors
    features, classes = X.shape[1], int(y.max()) + 1
    model = nn.Sequential(nn.Linear(features, 4), nn.LayerNorm(4), nn.ReLU())
    model.append(nn.Linear(4, classes)).double()
    with pytest.raises(NotImplementedError):
        fit(model, points)
    laplace = fit_kfac(model, points)
    expected = same_data_curvature(model, points).to_matrix()
    torch.testing.assert_close(laplace.H.to_matrix(), expected)
    single = POSTERIORS["single batch"](model, points, SIZE, 0).laplace
    torch.testing.assert_close(single.H.to_matrix(), expected)
    assert single.n_data == SIZE
