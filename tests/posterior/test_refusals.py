"""What cannot be fitted is refused with what to do about it."""

import pytest
import torch
from laplace.curvature.asdl import AsdlGGN
from laplace.curvature.backpack import BackPackGGN
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from laplace_debiased import DebiasedKFACLinearOperator, curvature_scores
from tests import zoo
from tests.cases import batch, network
from tests.fits import SIZE, SUBSETS, debiased, loader

ONE_OUTPUT = "one output, whose softmax is always one.*'binary_classification'"


def one_output():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()


BINARY = {
    "column": lambda y: (y > 0).double()[:, None],
    "classes": lambda y: (y > 0).long(),
    "one class": lambda y: 0 * y,
}


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("kind", BINARY)
def test_one_output_is_no_classifier(kind, subset):
    X, y = batch("mlp", SIZE)
    y = BINARY[kind](y)
    la = debiased(one_output(), subset=subset)
    with pytest.raises(ValueError, match=ONE_OUTPUT):
        la.fit(DataLoader(TensorDataset(X, y), 7))
    if subset == "all":
        with pytest.raises(ValueError, match=ONE_OUTPUT):
            la.partial_fit((X, y))


def test_cross_entropy_of_one_output_is_refused_without_a_posterior():
    X, y = batch("mlp", SIZE)
    data, model, loss = [(X, 0 * y)], one_output(), nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match=ONE_OUTPUT):
        curvature_scores(model, loss, data)
    operator = DebiasedKFACLinearOperator(
        model, loss, list(model.parameters()), data, data
    )
    with pytest.raises(ValueError, match=ONE_OUTPUT):
        operator.compute()


@pytest.mark.parametrize("change", ["several labels", "no label", "negative"])
@pytest.mark.parametrize("class_axis", [None, -1])
def test_targets_that_are_no_distributions_are_refused(change, class_axis):
    """Cross-entropy takes any numbers, also labels that do not exclude each other."""
    torch.manual_seed(0)
    shape = (6,) if class_axis is None else (6, 2)
    X, y = torch.randn(*shape, 4), torch.eye(3)[torch.randint(3, shape)]
    model = nn.Linear(4, 3)
    debiased(model, class_axis=class_axis).fit(DataLoader(TensorDataset(X, y), 3))
    row = {"several labels": [1, 1, 0], "no label": [0, 0, 0], "negative": [-1, 1, 1]}
    y.view(-1, 3)[-1] = torch.tensor(row[change]).float()
    la = debiased(model, class_axis=class_axis)
    with pytest.raises(
        ValueError, match=r"posterior is `Laplace.*'binary_classification'"
    ):
        la.fit(DataLoader(TensorDataset(X, y), 3))


def test_one_output_and_zero_are_two_classes():
    X, y = batch("mlp", SIZE)
    model = zoo.Model(
        lambda self, x: torch.cat([torch.zeros(len(x), 1), self.net(x)], 1),
        net=one_output(),
    )
    la = debiased(model, magnitudes="ggn")
    la.fit(DataLoader(TensorDataset(X, (y > 0).long()), 7))
    probabilities = la(X)
    assert probabilities.shape == (SIZE, 2) and la.H.to_matrix().trace() > 0
    # the covariance of zero and the logit is that of the logit
    _, f_var = la._glm_predictive_distribution(X)
    assert not f_var[:, 0].any() and (f_var[:, 1, 1] > 0).all()


def test_regression_has_one_output_and_more():
    X, y = batch("mlp", SIZE, "mse")
    la = debiased(one_output(), "regression")
    la.fit(DataLoader(TensorDataset(X, y[:, :1]), 7))
    assert la(X)[0].shape == (SIZE, 1)


class Mappings(Dataset):
    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        X, y = batch("mlp", SIZE)
        return {"input_ids": X[index], "labels": y[index]}


class Numbers(Mappings):
    """Targets are numbers of Python."""

    def __getitem__(self, index):
        return batch("mlp", SIZE)[0][index], 0


@pytest.mark.parametrize(
    "data", [TensorDataset(*batch("mlp", SIZE)), Mappings(), Numbers()]
)
def test_loaders_of_single_examples_are_refused(data):
    model = zoo.Model(
        lambda self, x: self.net(x["input_ids"] if isinstance(x, dict) else x),
        net=network("mlp"),
    )
    with pytest.raises(ValueError, match="single examples"):
        debiased(model).fit(DataLoader(data, batch_size=None))


@pytest.mark.parametrize("backend", [AsdlGGN, BackPackGGN])
@pytest.mark.parametrize("name", ["model output", "dictionary"])
def test_other_backends_need_tensors(name, backend):
    la = debiased(zoo.build(name), backend=backend)
    with pytest.raises(ValueError, match=r"returns a tensor, .*default backend"):
        la.fit(loader())
