"""Trained networks: recipes, and the checkpoints of what they give."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer
from torch.utils.data import TensorDataset

from laplace_debiased.comparison.training import Recipe, train
from shared.data import DIGITS, IMAGES, PAIRS, Images, problem_data
from shared.networks import (
    VisionTransformer,
    all_cnn_c,
    all_convolutional,
    mlp,
    pair_classifier,
    resnet,
    resnet18,
    wide_resnet,
)

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"


def adamw(
    params: Iterator[Parameter], learning_rate: float, num_points: int
) -> Optimizer:
    """Build AdamW with a weight decay that does not depend on the number of points."""
    return AdamW(params, learning_rate, weight_decay=1e-3)


_recipe = partial(Recipe, optimizer=adamw)


def recipes(images: Images) -> dict[str, Recipe]:
    """Return the recipes by name: networks that 2 cores train within 40 minutes."""
    channels, size, classes = images
    shape = {"channels": channels, "classes": classes}
    return {
        "MLP": _recipe(partial(mlp, (128, 64), channels * size**2, classes), 20, 2e-3),
        "all-convolutional": _recipe(partial(all_convolutional, **shape), 20, 4e-3),
        "ResNet": _recipe(partial(resnet, **shape), 12, 1e-2),
        "ALL-CNN-C": _recipe(partial(all_cnn_c, 24, **shape), 10, 4e-3),
        "ResNet-18": _recipe(partial(resnet18, 8, **shape), 10, 1e-2),
        "WideResNet": _recipe(partial(wide_resnet, 10, 2, **shape), 6, 1e-2),
        "ViT-Little": _recipe(partial(VisionTransformer, 64, 4, 4, **shape), 15, 2e-3),
    }


def full_size_recipes(images: Images) -> dict[str, Recipe]:
    """Return the recipes of the original networks, which take a GPU to train."""
    shape = {"channels": images.channels, "classes": images.classes}
    return {
        "ALL-CNN-C-96": _recipe(partial(all_cnn_c, **shape), 100, 1e-3),
        "ResNet-18-64": _recipe(partial(resnet18, **shape), 60, 1e-2),
        "WideResNet-40-4": _recipe(partial(wide_resnet, **shape), 100, 1e-2),
        "ViT-Little-192": _recipe(partial(VisionTransformer, **shape), 100, 1e-3),
    }


PAIR_RECIPES = {"pair-classifier": _recipe(pair_classifier, 3, 4e-3)}
RECIPES = recipes(IMAGES["fashion-mnist"])


def recipe_for(name: str, dataset: str) -> Recipe:
    """Return the recipe of a network for a dataset."""
    if dataset == PAIRS:
        return PAIR_RECIPES[name]
    images = IMAGES[dataset]
    return (recipes(images) | full_size_recipes(images))[name]


@torch.no_grad()
def accuracy(model: nn.Module, X: Tensor, y: Tensor) -> float:
    """Compute the share of images that a network classifies correctly."""
    hits = [
        (model(images).argmax(1) == labels).sum()
        for images, labels in zip(X.split(500), y.split(500), strict=True)
    ]
    return (sum(hits) / len(y)).item()


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
    split = problem_data(dataset, data_root)
    start = time.perf_counter()
    mirror = dataset not in DIGITS  # which mean nothing in a mirror
    model, losses = train(recipe, split.train, seed, mirror, progress_bar=True)
    record = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": recipe.epochs,
        "learning_rate": recipe.learning_rate,
        "seconds": time.perf_counter() - start,
        "training_loss": losses,
        "test_accuracy": accuracy(model, split.test_inputs, split.test_labels),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path)
    path.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    return model


def kept(
    name: str, recipe: Recipe, points: TensorDataset, mirror: bool = True
) -> nn.Module:
    """Load a study's network from the cache; train and keep it if it is not there.

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
        model, _ = train(recipe, points, 0, mirror, progress_bar=True)
        torch.save(model.state_dict(), path)
    model = recipe.build().eval()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model
