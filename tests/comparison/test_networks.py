import pytest
import torch

from laplace_debiased.comparison.data import load_split
from laplace_debiased.comparison.networks import RECIPES, mlp
from laplace_debiased.comparison.training import train

SHAPES = {
    "digits": (64,),
    "mnist": (1, 28, 28),
    "fashion-mnist": (1, 28, 28),
    "cifar10": (3, 32, 32),
}


@pytest.mark.parametrize("dataset", RECIPES)
def test_network_maps_inputs_to_logits(dataset):
    model = RECIPES[dataset].build()
    assert model(torch.zeros(2, *SHAPES[dataset])).shape == (2, 10)


def test_linear_layers_take_images():
    model = mlp((7, 5), inputs=18, classes=3)
    assert model(torch.zeros(2, 2, 3, 3)).shape == (2, 3)
    sizes = [(p.shape[1], p.shape[0]) for p in model.parameters() if p.ndim == 2]
    assert sizes == [(18, 7), (7, 5), (5, 3)]


def test_digits_network_reaches_normal_accuracy(tmp_path):
    points = load_split("digits", tmp_path)
    model, _ = train(RECIPES["digits"], points.train, seed=0)
    assert not model.training
    correct = model(points.test_inputs).argmax(-1) == points.test_labels
    assert correct.float().mean() > 0.96
