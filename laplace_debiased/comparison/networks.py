"""Small networks, trained to the mode of the posterior that Laplace approximates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import TensorDataset

NUM_CLASSES = 10


def mlp(num_features: int, width: int) -> nn.Module:
    """Build a network with one hidden layer.

    Args:
        num_features: Size of an input.
        width: Number of hidden units.

    Returns:
        The network, from ``[batch, num_features]`` to logits.
    """
    return nn.Sequential(
        nn.Linear(num_features, width), nn.ReLU(), nn.Linear(width, NUM_CLASSES)
    )


def conv_net(channels: int, filters: tuple[int, int, int]) -> nn.Module:
    """Build a network of three convolutions with stride 2 and a linear layer.

    Args:
        channels: Number of the images' channels.
        filters: Number of filters of each convolution.

    Returns:
        The network, from ``[batch, channels, height, width]``, 25 to 32 pixels a side,
        to logits.
    """
    first, second, third = filters
    return nn.Sequential(
        nn.Conv2d(channels, first, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(second, third, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(third * 4 * 4, NUM_CLASSES),
    )


@dataclass(frozen=True)
class Recipe:
    """How a network is built and trained.

    Args:
        build: Builds the untrained network.
        epochs: Number of passes over the training points.
        batch_size: Points per step.
        learning_rate: Largest learning rate of the schedule.
    """

    build: Callable[[], nn.Module]
    epochs: int
    batch_size: int
    learning_rate: float


RECIPES = {
    "digits": Recipe(partial(mlp, 64, 64), 40, 64, 1e-2),
    "mnist": Recipe(partial(conv_net, 1, (8, 16, 32)), 4, 128, 5e-3),
    "fashion-mnist": Recipe(partial(conv_net, 1, (8, 16, 32)), 8, 128, 5e-3),
    "cifar10": Recipe(partial(conv_net, 3, (16, 32, 32)), 20, 128, 5e-3),
}


def train(recipe: Recipe, points: TensorDataset, seed: int) -> nn.Module:
    """Train a new network.

    The weight decay is that of a Gaussian prior with precision 1, laplace-torch's
    default, so that training ends near a mode of the posterior.

    Args:
        recipe: How to build and train it.
        points: Training inputs and class indices.
        seed: Seed of initial weights and of the order of the points.

    Returns:
        The trained network in eval mode.
    """
    torch.manual_seed(seed)
    model = recipe.build()
    X, y = points.tensors
    optimizer = Adam(
        model.parameters(), recipe.learning_rate, weight_decay=1 / len(points)
    )
    num_batches = -(-len(points) // recipe.batch_size)
    schedule = OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.epochs * num_batches
    )
    for _ in range(recipe.epochs):
        for batch in torch.randperm(len(points)).split(recipe.batch_size):
            optimizer.zero_grad()
            cross_entropy(model(X[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()
