"""The networks of the benchmarks, how they are trained, and their checkpoints.

    python benchmarks/networks.py --data-root DATA

trains what has no checkpoint yet. With the checkpoints in place, the other benchmarks
run without training.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset
from tqdm import tqdm

from laplace_debiased.comparison.data import Data, load
from laplace_debiased.comparison.environment import default_data_root

CHECKPOINTS = Path(__file__).parent / "checkpoints"
NUM_TRAIN = 50_000
NUM_VALIDATION = 10_000
BATCH_SIZE = 128


class ResidualBlock(nn.Module):
    """Two convolutions with BatchNorm, and a shortcut."""

    def __init__(self, channels: int, filters: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, filters, 3, stride, 1, bias=False),
            nn.BatchNorm2d(filters),
            nn.ReLU(),
            nn.Conv2d(filters, filters, 3, 1, 1, bias=False),
            nn.BatchNorm2d(filters),
        )
        self.shortcut = nn.Sequential(
            nn.Conv2d(channels, filters, 1, stride, bias=False),
            nn.BatchNorm2d(filters),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, channels, height, width]`` to filters."""
        return torch.relu(self.body(x) + self.shortcut(x))


def mlp(
    widths: Sequence[int] = (128, 64), num_inputs: int = 784, num_classes: int = 10
) -> nn.Module:
    """Build a network of linear layers.

    Args:
        widths: Number of units of each hidden layer.
        num_inputs: Number of an image's pixels.
        num_classes: Number of classes.

    Returns:
        The network.
    """
    widths = [num_inputs, *widths]
    hidden = [
        layer
        for d_in, d_out in pairwise(widths)
        for layer in (nn.Linear(d_in, d_out), nn.ReLU())
    ]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(widths[-1], num_classes))


def all_convolutional(width: int = 16, depth: int = 1) -> nn.Module:
    """Build a network of convolutions, after ALL-CNN-C.

    Args:
        width: Filters of the first layer.
        depth: Convolutions without stride in each of the two first stages.

    Returns:
        The network, with 16 filters and depth 1 of seven convolutions.
    """
    w = width
    plan = [
        (1, w, 1),
        *[(w, w, 1)] * (depth - 1),
        (w, w, 2),
        (w, 2 * w, 1),
        *[(2 * w, 2 * w, 1)] * (depth - 1),
        (2 * w, 2 * w, 2),
        (2 * w, 3 * w, 1),
        (3 * w, 4 * w, 1),
    ]
    hidden = [
        layer
        for channels, filters, stride in plan
        for layer in (nn.Conv2d(channels, filters, 3, stride, 1), nn.ReLU())
    ]
    head = [nn.Conv2d(4 * w, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*hidden, *head)


def resnet() -> nn.Module:
    """Build a ResNet of three blocks with BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        ResidualBlock(16, 16, 2),
        ResidualBlock(16, 32, 2),
        ResidualBlock(32, 64, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def pair_classifier() -> nn.Module:
    """Build a network of convolutions for pairs of digits, with 100 classes."""
    plan = [(1, 16, 1), (16, 16, 2), (16, 32, 1), (32, 32, 2), (32, 48, 1), (48, 64, 1)]
    hidden = [
        layer
        for channels, filters, stride in plan
        for layer in (nn.Conv2d(channels, filters, 3, stride, 1), nn.ReLU())
    ]
    head = [nn.AdaptiveAvgPool2d((2, 4)), nn.Flatten(), nn.Linear(512, 100)]
    return nn.Sequential(*hidden, *head)


@dataclass(frozen=True)
class Recipe:
    """A network, and how it is trained by AdamW with a one-cycle schedule.

    Args:
        build: Builds the network.
        epochs: Number of passes over the training points.
        learning_rate: The highest learning rate.
    """

    build: Callable[[], nn.Module]
    epochs: int
    learning_rate: float


RECIPES = {
    "MLP": Recipe(mlp, 20, 2e-3),
    "all-convolutional": Recipe(all_convolutional, 20, 4e-3),
    "ResNet": Recipe(resnet, 12, 1e-2),
}
PAIRS = "mnist-pairs"
PAIR_RECIPES = {"pair-classifier": Recipe(pair_classifier, 3, 4e-3)}


def train(
    recipe: Recipe, X: Tensor, y: Tensor, seed: int, mirror: bool
) -> tuple[nn.Module, list[float]]:
    """Train a network.

    Args:
        recipe: Network and training.
        X: Training images ``[points, channels, height, width]``.
        y: Their classes ``[points]``.
        seed: Seed of initialization and batches.
        mirror: Whether to mirror half of the images.

    Returns:
        The network, and its mean training loss in each epoch.
    """
    torch.manual_seed(seed)
    model, rate = recipe.build(), recipe.learning_rate
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=1e-3)
    num_batches = -(-len(X) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=max(1, recipe.epochs * num_batches)
    )
    curve = []
    for epoch in range(recipe.epochs):
        total = 0.0
        batches = torch.randperm(len(X)).split(BATCH_SIZE)
        for batch in tqdm(batches, f"epoch {epoch + 1}", leave=False):
            images = X[batch]
            if mirror:
                mirrored = torch.rand(len(batch), 1, 1, 1) < 0.5
                images = torch.where(mirrored, images.flip(3), images)
            optimizer.zero_grad()
            loss = cross_entropy(model(images), y[batch])
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        curve.append(total / len(X))
    return model.eval(), curve


@torch.no_grad()
def accuracy(model: nn.Module, X: Tensor, y: Tensor) -> float:
    """Compute the share of images that a network classifies correctly."""
    hits = [
        (model(images).argmax(1) == labels).sum()
        for images, labels in zip(X.split(500), y.split(500), strict=True)
    ]
    return (sum(hits) / len(y)).item()


def problem_data(dataset: str, data_root: Path) -> Data:
    """Load what networks are trained and tested on.

    Args:
        dataset: ``"fashion-mnist"``, ``"mnist"``, or ``PAIRS`` for random pairs of
            MNIST's digits side by side, with 100 classes.
        data_root: Folder of torchvision's datasets.

    Returns:
        All training points but the last ``NUM_VALIDATION``, or ``NUM_TRAIN`` pairs,
        and the test points.
    """
    if dataset == PAIRS:
        train, *test = load("mnist", data_root)
        X, y = _pairs(*train.tensors, NUM_TRAIN)
        return Data(TensorDataset(X, y), *_pairs(*test, len(test[0])))
    data = load(dataset, data_root)
    X, y = data.train.tensors
    return data._replace(train=TensorDataset(X[:-NUM_VALIDATION], y[:-NUM_VALIDATION]))


def validation_data(dataset: str, data_root: Path) -> tuple[Tensor, Tensor]:
    """Load images that networks are not trained on, to tune by.

    Args:
        dataset: ``"fashion-mnist"`` or ``"mnist"``.
        data_root: Folder of torchvision's datasets.

    Returns:
        Images and classes of the last ``NUM_VALIDATION`` training points.
    """
    X, y = load(dataset, data_root).train.tensors
    return X[-NUM_VALIDATION:], y[-NUM_VALIDATION:]


def _pairs(X: Tensor, y: Tensor, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randint(len(X), (2, count), generator=generator)
    return torch.cat([X[left], X[right]], 3), 10 * y[left] + y[right]


def trained(name: str, dataset: str, data_root: Path, seed: int = 0) -> nn.Module:
    """Load a network's checkpoint; train the network and save it if there is none.

    Args:
        name: Name in ``RECIPES`` or ``PAIR_RECIPES``.
        dataset: See :func:`problem_data`.
        data_root: Folder of torchvision's datasets.
        seed: Seed of initialization and batches.

    Returns:
        The network, in evaluation mode.
    """
    folder = CHECKPOINTS / dataset
    path = folder / f"{name}-{seed}.safetensors"
    recipe = (RECIPES | PAIR_RECIPES)[name]
    if path.exists():
        model = recipe.build().eval()
        model.load_state_dict(load_file(path))
        return model
    data = problem_data(dataset, data_root)
    start = time.perf_counter()
    mirror = dataset == "fashion-mnist"
    model, curve = train(recipe, *data.train.tensors, seed, mirror)
    record = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": recipe.epochs,
        "learning_rate": recipe.learning_rate,
        "seconds": time.perf_counter() - start,
        "training_loss": curve,
        "test_accuracy": accuracy(model, data.test_inputs, data.test_labels),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path)
    path.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    return model


def kept(
    name: str, recipe: Recipe, points: TensorDataset, mirror: bool = True
) -> nn.Module:
    """Load a study's network from the cache; train it and keep it if it is not there.

    Args:
        name: Name in the cache.
        recipe: Network and training.
        points: Training points.
        mirror: Whether to mirror half of the images.

    Returns:
        The network, in evaluation mode.
    """
    path = CHECKPOINTS / "cache" / f"{name}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        model, _ = train(recipe, *points.tensors, 0, mirror)
        torch.save(model.state_dict(), path)
    model = recipe.build().eval()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def main() -> None:
    """Train what has no checkpoint yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, default=default_data_root())
    parser.add_argument("--dataset", default="fashion-mnist")
    parser.add_argument("--networks", nargs="*", default=list(RECIPES))
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    for name in arguments.networks:
        for seed in range(arguments.seeds):
            trained(name, arguments.dataset, arguments.data_root, seed)


if __name__ == "__main__":
    main()
