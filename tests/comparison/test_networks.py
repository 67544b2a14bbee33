import pytest
import torch
from torch.nn.utils import parameters_to_vector
from torch.utils.data import TensorDataset

from laplace_debiased.comparison.data import load
from laplace_debiased.comparison.networks import RECIPES, Recipe, mlp, train

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


def test_seed_determines_network():
    points = TensorDataset(torch.randn(30, 4), torch.randint(10, (30,)))
    recipe = Recipe(lambda: mlp(4, 3), epochs=2, batch_size=8, learning_rate=1e-2)
    first, again, other = (
        parameters_to_vector(train(recipe, points, seed).parameters())
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_digits_network_reaches_normal_accuracy(tmp_path):
    points = load("digits", tmp_path)
    model = train(RECIPES["digits"], points.train, seed=0)
    assert not model.training
    correct = model(points.test_inputs).argmax(-1) == points.test_labels
    assert correct.float().mean() > 0.96
