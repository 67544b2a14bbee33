"""Well-known networks work as they come: fit all weights, predict, tune the prior."""

import warnings

import pytest
import torch
from torch.func import functional_call, jacrev
from torch.utils.data import DataLoader, Dataset

from laplace_debiased import Laplace
from tests.dense import relative_error
from tests.networks import NETWORKS, NUM_CLASSES, batch, network

SIZE = 12
PREDICTED = 2


class Points(Dataset):
    """The points of a pair or mapping of tensors."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        if isinstance(self.data, dict):
            return {key: value[index] for key, value in self.data.items()}
        return tuple(value[index] for value in self.data)


def first(X, count):
    if isinstance(X, dict):
        return {key: value[:count] for key, value in X.items()}
    return X[:count]


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize("name", NETWORKS)
def test_network_works_as_it_comes(name, magnitudes):
    model, data = network(name), batch(name, SIZE)
    train = DataLoader(Points(data), batch_size=5)
    la = Laplace(
        model,
        "classification",
        "all",
        "kron_debiased",
        magnitudes=magnitudes,
        budget=8,
        dict_key_x="pixel_values" if "hugging" in name else "input_ids",
    )
    la.fit(train)
    la.optimize_prior_precision()
    la.optimize_prior_precision(method="gridsearch", val_loader=train, grid_size=2)

    X = first(data if isinstance(data, dict) else data[0], PREDICTED)
    probabilities = la(X)
    assert probabilities.shape == (PREDICTED, NUM_CLASSES)
    assert torch.allclose(probabilities.sum(1), torch.ones(PREDICTED).double())
    assert la(X, pred_type="nn", link_approx="mc", n_samples=2).isfinite().all()

    fitted = {id(param) for param in la.params}
    params = {n: p.detach() for n, p in model.named_parameters() if id(p) in fitted}
    jacobians = jacrev(lambda params: functional_call(model, params, (X,)))(params)
    J = torch.cat([jacobian.flatten(2) for jacobian in jacobians.values()], 2)
    _, f_var = la._glm_predictive_distribution(X)
    assert relative_error(f_var, la.functional_variance(J)) < 1e-10


@pytest.mark.parametrize("name", NETWORKS)
def test_no_parameter_is_left_out(name):
    model, data = network(name), batch(name, SIZE)
    la = Laplace(model, "classification", "all", "kron_debiased")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*stay at their trained values")
        la.fit(DataLoader(Points(data), batch_size=SIZE))
    free = {key for key, param in model.named_parameters() if param.requires_grad}
    assert la.parameter_kinds.keys() == free
    assert "left out" not in la.parameter_kinds.values()
