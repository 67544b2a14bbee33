from dataclasses import replace

import pytest
import torch
from torch.nn.utils import parameters_to_vector
from torch.optim import SGD
from torch.utils.data import TensorDataset

from laplace_debiased.comparison.networks import mlp
from laplace_debiased.comparison.training import Recipe, train

RECIPE = Recipe(lambda: mlp((3,), 4), epochs=2, learning_rate=1e-2, batch_size=8)


@pytest.fixture
def images():
    return TensorDataset(torch.randn(30, 1, 2, 2), torch.randint(10, (30,)))


def weights(recipe, points, seed, **options):
    return parameters_to_vector(
        train(recipe, points, seed, **options).model.parameters()
    )


def test_seed_determines_network(images):
    first, again, other = (weights(RECIPE, images, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_losses_are_those_of_each_epoch(images):
    recipe = replace(RECIPE, epochs=30, learning_rate=0.1)
    model, losses = train(recipe, images, 0)
    assert not model.training
    assert len(losses) == 30
    assert losses[-1] < losses[0]


def test_no_epoch_leaves_the_initial_network(images):
    recipe = replace(RECIPE, epochs=0)
    torch.manual_seed(5)
    initial = parameters_to_vector(recipe.build().parameters())
    assert torch.equal(weights(recipe, images, 5), initial)
    assert train(recipe, images, 5).losses == []


def test_images_that_equal_their_mirror_images_train_alike(images):
    X, y = images.tensors
    symmetric = TensorDataset(X + X.flip(3), y)
    # one step in each epoch: mirroring takes random numbers of the next one's order
    recipe = replace(RECIPE, batch_size=30)
    plain, mirrored = (
        weights(recipe, symmetric, 0, mirror=mirror) for mirror in (False, True)
    )
    torch.testing.assert_close(plain, mirrored)
    assert not torch.allclose(
        weights(recipe, images, 0), weights(recipe, images, 0, mirror=True)
    )


def test_optimizer_is_told_how_many_points_there_are(images):
    told = []

    def build(params, learning_rate, num_points):
        told.append((learning_rate, num_points))
        return SGD(params, learning_rate, momentum=0.9)

    train(replace(RECIPE, optimizer=build), images, 0)
    assert told == [(1e-2, 30)]
