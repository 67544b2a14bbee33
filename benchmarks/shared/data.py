"""What networks are trained, tuned and tested on, and what is foreign to them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from laplace_debiased.comparison.data import (
    NUM_TEST_IMAGES,
    TrainTestSplit,
    load_split,
    raw_images,
)

NUM_VALIDATION = 10_000
NUM_CIFAR_TEST = 10_000
NUM_PAIRS = 50_000


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
PAIRS = "mnist-pairs"
DIGITS = ("mnist", PAIRS)
# what networks that were trained on a dataset should be unsure of
FOREIGN = {
    "fashion-mnist": "mnist",
    "mnist": "fashion-mnist",
    "cifar10": "cifar100",
    "cifar100": "cifar10",
}


def problem_data(dataset: str, data_root: Path) -> TrainTestSplit:
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
        train, *test = load_split("mnist", data_root)
        X, y = _pairs(*train.tensors, NUM_PAIRS)
        return TrainTestSplit(TensorDataset(X, y), *_pairs(*test, len(test[0])))
    num_test = NUM_CIFAR_TEST if dataset.startswith("cifar") else NUM_TEST_IMAGES
    split = load_split(dataset, data_root, num_test)
    X, y = split.train.tensors
    train = TensorDataset(X[:-NUM_VALIDATION], y[:-NUM_VALIDATION])
    return split._replace(train=train)


def validation_data(dataset: str, data_root: Path) -> tuple[Tensor, Tensor]:
    """Load images that networks are not trained on, to tune by.

    Args:
        dataset: Name in ``IMAGES``.
        data_root: Folder of torchvision's datasets.

    Returns:
        Images and classes of the last ``NUM_VALIDATION`` training points.
    """
    X, y = load_split(dataset, data_root).train.tensors
    return X[-NUM_VALIDATION:], y[-NUM_VALIDATION:]


def _pairs(X: Tensor, y: Tensor, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randint(len(X), (2, count), generator=generator)
    return torch.cat([X[left], X[right]], 3), 10 * y[left] + y[right]


def scale_of(dataset: str, data_root: Path) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of a dataset's training images.

    Args:
        dataset: Name of the dataset.
        data_root: Folder of torchvision's datasets.

    Returns:
        Both, of images from 0 to 1.
    """
    X, _ = raw_images(dataset, data_root, train=True)
    return X.mean(), X.std()


def foreign_images(dataset: str, data_root: Path, count: int) -> Tensor:
    """Load test images of another dataset.

    Args:
        dataset: What a network was trained on, with whose scale.
        data_root: Folder of torchvision's datasets.
        count: Number of images.

    Returns:
        The images ``[count, channels, height, width]``.
    """
    mean, std = scale_of(dataset, data_root)
    X, _ = raw_images(FOREIGN[dataset], data_root, train=False)
    return (X[:count] - mean) / std
