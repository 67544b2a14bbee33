"""Images on the scale of a dataset's training images."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from laplace_debiased.comparison.data import raw_images

# what networks that were trained on a dataset should be unsure of
OUTSIDE = {
    "fashion-mnist": "mnist",
    "mnist": "fashion-mnist",
    "cifar10": "cifar100",
    "cifar100": "cifar10",
}


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


def outside_images(dataset: str, data_root: Path, count: int) -> Tensor:
    """Load test images of another dataset.

    Args:
        dataset: What a network was trained on, with whose scale.
        data_root: Folder of torchvision's datasets.
        count: Number of images.

    Returns:
        The images ``[count, channels, height, width]``.
    """
    mean, std = scale_of(dataset, data_root)
    X, _ = raw_images(OUTSIDE[dataset], data_root, train=False)
    return (X[:count] - mean) / std
