"""Training and test points as tensors in memory."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import TensorDataset
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, FashionMNIST, VisionDataset

NUM_TEST_IMAGES = 1000

_TORCHVISION = {
    "mnist": MNIST,
    "fashion-mnist": FashionMNIST,
    "cifar10": CIFAR10,
    "cifar100": CIFAR100,
}


class TrainTestSplit(NamedTuple):
    """Labelled points to train a classifier on, and others to test it on.

    Args:
        train: Training points, standardized inputs and class indices.
        test_inputs: Test inputs ``[points, ...]``, on the same scale.
        test_labels: Their class indices ``[points]``.
    """

    train: TensorDataset
    test_inputs: Tensor
    test_labels: Tensor


def load_split(
    dataset: str, root: Path, num_test: int = NUM_TEST_IMAGES
) -> TrainTestSplit:
    """Load a dataset.

    Args:
        dataset: ``"digits"``, which comes with scikit-learn, ``"mnist"``,
            ``"fashion-mnist"``, ``"cifar10"`` or ``"cifar100"``.
        root: Folder of torchvision's datasets. What is missing there is downloaded.
        num_test: Number of test images, of other images than digits: predictions with
            Jacobians are slow.

    Returns:
        All training points, and the test points, always the same ones.

    Raises:
        FileNotFoundError: If the dataset is neither in ``root`` nor can be downloaded.
    """
    if dataset == "digits":
        return _digits()
    X, y = raw_images(dataset, root, train=True)
    X_test, y_test = raw_images(dataset, root, train=False)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(y_test), generator=generator)[:num_test]
    return _standardized(X, y, X_test[chosen], y_test[chosen])


def _digits() -> TrainTestSplit:
    """Split the 8x8 digits, ``[points, 64]``, always in the same way."""
    X, X_test, y, y_test = (
        torch.as_tensor(part)
        for part in train_test_split(
            *load_digits(return_X_y=True), random_state=0, stratify=load_digits().target
        )
    )
    return _standardized(X.float(), y, X_test.float(), y_test)


def _standardized(
    X: Tensor, y: Tensor, X_test: Tensor, y_test: Tensor
) -> TrainTestSplit:
    """Scale inputs by mean and standard deviation of all training entries."""
    mean, std = X.mean(), X.std()
    return TrainTestSplit(
        TensorDataset((X - mean) / std, y), (X_test - mean) / std, y_test
    )


def shuffled_rows(images: Tensor) -> Tensor:
    """Bring the rows of images into another order, the same for all.

    What comes out has the pixels of the images, but is none of what they show.

    Args:
        images: Images ``[points, ..., height, width]``, or square ones in one row
            ``[points, pixels]``.

    Returns:
        Images of the same shape.
    """
    side = round(images[0].numel() ** 0.5)
    pixels = images.unflatten(1, (side, side)) if images.ndim == 2 else images
    order = torch.randperm(pixels.shape[-2], generator=torch.Generator().manual_seed(0))
    return pixels[..., order, :].reshape(images.shape)


def raw_images(dataset: str, root: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Return all images of a torchvision dataset.

    Args:
        dataset: As in :func:`load_split`.
        root: Folder of torchvision's datasets.
        train: Whether to return training points.

    Returns:
        Images ``[points, channels, height, width]`` from 0 to 1, and class indices.
    """
    stored = _open(dataset, root, train)
    images = torch.as_tensor(stored.data)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return images / 255, torch.as_tensor(stored.targets)


def _open(dataset: str, root: Path, train: bool) -> VisionDataset:
    """Open a torchvision dataset, and download it only if it is missing."""
    dataset_class = _TORCHVISION[dataset]
    try:
        return dataset_class(root, train=train)
    except RuntimeError:
        pass
    try:
        return dataset_class(root, train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"{dataset_class.__name__} is not in {root} and could not be downloaded: "
            f"{error}"
        ) from error
