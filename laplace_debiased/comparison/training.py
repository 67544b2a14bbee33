"""How a network is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import Parameter
from torch.nn.functional import cross_entropy
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import TensorDataset
from tqdm import tqdm


def adam_with_unit_prior(
    params: Iterator[Parameter], learning_rate: float, num_points: int
) -> Optimizer:
    """Build Adam with the weight decay of a Gaussian prior with precision 1.

    That is laplace-torch's default prior: training ends near a mode of the posterior.

    Args:
        params: The network's parameters.
        learning_rate: The learning rate.
        num_points: Number of training points.

    Returns:
        The optimizer.
    """
    return Adam(params, learning_rate, weight_decay=1 / num_points)


@dataclass(frozen=True)
class Recipe:
    """How a network is built and trained, with a one-cycle schedule.

    Args:
        build: Builds the untrained network.
        epochs: Number of passes over the training points.
        learning_rate: Largest learning rate of the schedule.
        batch_size: Points per step.
        optimizer: Builds the optimizer from parameters, learning rate and number of
            training points.
    """

    build: Callable[[], nn.Module]
    epochs: int
    learning_rate: float
    batch_size: int = 128
    optimizer: Callable[[Iterator[Parameter], float, int], Optimizer] = (
        adam_with_unit_prior
    )


class Trained(NamedTuple):
    """A trained network.

    Args:
        model: The network, in eval mode.
        losses: Mean training loss in each epoch.
    """

    model: nn.Module
    losses: list[float]


def train(
    recipe: Recipe,
    points: TensorDataset,
    seed: int,
    mirror: bool = False,
    progress_bar: bool = False,
) -> Trained:
    """Train a new network.

    Args:
        recipe: How to build and train it.
        points: Training inputs and class indices.
        seed: Seed of initial weights and of the order of the points.
        mirror: Whether to mirror half of the images ``[..., height, width]``.
        progress_bar: Whether to show the batches of an epoch.

    Returns:
        The trained network.
    """
    torch.manual_seed(seed)
    model = recipe.build()
    X, y = points.tensors
    optimizer = recipe.optimizer(model.parameters(), recipe.learning_rate, len(X))
    num_batches = -(-len(X) // recipe.batch_size)
    schedule = OneCycleLR(
        optimizer,
        recipe.learning_rate,
        total_steps=max(1, recipe.epochs * num_batches),
    )
    losses = []
    for epoch in range(recipe.epochs):
        total = 0.0
        batches = torch.randperm(len(X)).split(recipe.batch_size)
        for batch in tqdm(
            batches, f"epoch {epoch + 1}", leave=False, disable=not progress_bar
        ):
            images = X[batch]
            if mirror:
                chosen = torch.rand(len(batch), 1, 1, 1) < 0.5
                images = torch.where(chosen, images.flip(3), images)
            optimizer.zero_grad()
            loss = cross_entropy(model(images), y[batch])
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        losses.append(total / len(X))
    return Trained(model.eval(), losses)
