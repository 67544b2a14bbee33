"""The networks of the benchmarks, how they are trained, and their checkpoints.

    python benchmarks/networks.py --data-root DATA

trains what has no checkpoint yet. With the checkpoints in place, the other benchmarks
run without training.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from architectures import (
    VisionTransformer,
    all_cnn_c,
    all_convolutional,
    mlp,
    pair_classifier,
    resnet,
    resnet18,
    wide_resnet,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset
from tqdm import tqdm

from laplace_debiased.comparison.data import NUM_TEST_IMAGES, Data, load
from laplace_debiased.comparison.environment import default_data_root

CHECKPOINTS = Path(__file__).parent / "checkpoints"
RESULTS = Path(__file__).parent / "results"
NUM_VALIDATION = 10_000
NUM_CIFAR_TEST = 10_000
NUM_PAIRS = 50_000
BATCH_SIZE = 128


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


class Images(NamedTuple):
    """What a network classifies.

    Args:
        channels: Number of channels.
        size: Height and width.
        classes: Number of classes.
    """

    channels: int
    size: int
    classes: int


IMAGES = {
    "fashion-mnist": Images(1, 28, 10),
    "mnist": Images(1, 28, 10),
    "cifar10": Images(3, 32, 10),
    "cifar100": Images(3, 32, 100),
}


def recipes(images: Images) -> dict[str, Recipe]:
    """Return the recipes by name: networks that 2 cores train within 40 minutes."""
    channels, size, classes = images
    shape = {"channels": channels, "classes": classes}
    return {
        "MLP": Recipe(partial(mlp, (128, 64), channels * size**2, classes), 20, 2e-3),
        "all-convolutional": Recipe(partial(all_convolutional, **shape), 20, 4e-3),
        "ResNet": Recipe(partial(resnet, **shape), 12, 1e-2),
        "ALL-CNN-C": Recipe(partial(all_cnn_c, 24, **shape), 10, 4e-3),
        "ResNet-18": Recipe(partial(resnet18, 8, **shape), 10, 1e-2),
        "WideResNet": Recipe(partial(wide_resnet, 10, 2, **shape), 6, 1e-2),
        "ViT-Little": Recipe(partial(VisionTransformer, 64, 4, 4, **shape), 15, 2e-3),
    }


def full_size_recipes(images: Images) -> dict[str, Recipe]:
    """Return the recipes of the original networks, which take a GPU to train."""
    shape = {"channels": images.channels, "classes": images.classes}
    return {
        "ALL-CNN-C-96": Recipe(partial(all_cnn_c, **shape), 100, 1e-3),
        "ResNet-18-64": Recipe(partial(resnet18, **shape), 60, 1e-2),
        "WideResNet-40-4": Recipe(partial(wide_resnet, **shape), 100, 1e-2),
        "ViT-Little-192": Recipe(partial(VisionTransformer, **shape), 100, 1e-3),
    }


PAIRS = "mnist-pairs"
DIGITS = ("mnist", PAIRS)
PAIR_RECIPES = {"pair-classifier": Recipe(pair_classifier, 3, 4e-3)}
RECIPES = recipes(IMAGES["fashion-mnist"])


def recipe_for(name: str, dataset: str) -> Recipe:
    """Return the recipe of a network for a dataset."""
    if dataset == PAIRS:
        return PAIR_RECIPES[name]
    images = IMAGES[dataset]
    return (recipes(images) | full_size_recipes(images))[name]


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
        dataset: Name in ``IMAGES``, or ``PAIRS`` for random pairs of MNIST's digits
            side by side, with 100 classes.
        data_root: Folder of torchvision's datasets.

    Returns:
        All training points but those of :func:`validation_data`, and test points: all
        of CIFAR's, some of the others'.
    """
    if dataset == PAIRS:
        train, *test = load("mnist", data_root)
        X, y = _pairs(*train.tensors, NUM_PAIRS)
        return Data(TensorDataset(X, y), *_pairs(*test, len(test[0])))
    num_test = NUM_CIFAR_TEST if dataset.startswith("cifar") else NUM_TEST_IMAGES
    data = load(dataset, data_root, num_test)
    X, y = data.train.tensors
    train = TensorDataset(X[:-NUM_VALIDATION], y[:-NUM_VALIDATION])
    return data._replace(train=train)


def validation_data(dataset: str, data_root: Path) -> tuple[Tensor, Tensor]:
    """Load images that networks are not trained on, to tune by.

    Args:
        dataset: Name in ``IMAGES``.
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
        name: Name of a recipe.
        dataset: See :func:`problem_data`.
        data_root: Folder of torchvision's datasets.
        seed: Seed of initialization and batches.

    Returns:
        The network, in evaluation mode.
    """
    folder = CHECKPOINTS / dataset
    path = folder / f"{name}-{seed}.safetensors"
    recipe = recipe_for(name, dataset)
    if path.exists():
        model = recipe.build().eval()
        model.load_state_dict(load_file(path))
        return model
    data = problem_data(dataset, data_root)
    start = time.perf_counter()
    mirror = dataset not in DIGITS  # which mean nothing in a mirror
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


def table() -> str:
    """Format what is known of the first checkpoint of each network as Markdown."""
    lines = [
        "| dataset | network | parameters | epochs | test accuracy % |",
        "|---|---|---|---|---|",
    ]
    for path in sorted(CHECKPOINTS.glob("*/*-0.json")):
        record = json.loads(path.read_text())
        lines.append(
            f"| {path.parent.name} | {path.stem.removesuffix('-0')} "
            f"| {record['parameters']:,} | {record['epochs']} "
            f"| {100 * record['test_accuracy']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Train what has no checkpoint yet, and write the table of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, default=default_data_root())
    parser.add_argument("--dataset", default="fashion-mnist", choices=IMAGES)
    parser.add_argument(
        "--networks",
        nargs="*",
        default=list(RECIPES),
        help="default: all small ones; full-size ones: "
        + ", ".join(full_size_recipes(IMAGES["cifar10"])),
    )
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    for name in arguments.networks:
        for seed in range(arguments.seeds):
            trained(name, arguments.dataset, arguments.data_root, seed)
    (RESULTS / "networks.md").write_text(table() + "\n")


if __name__ == "__main__":
    main()
