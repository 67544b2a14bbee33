import struct
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision.datasets import FashionMNIST

from laplace_debiased.comparison import data


def write_idx(path, array):
    """Write bytes in the format that torchvision reads MNIST from."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())


@pytest.fixture
def fashion_mnist(tmp_path):
    """A root folder with 20 training and 12 test images."""
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, size in [("train", 20), ("t10k", 12)]:
        images = rng.integers(256, size=(size, 28, 28), dtype=np.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte", images)
        labels = rng.integers(10, size=size, dtype=np.uint8)
        write_idx(folder / f"{part}-labels-idx1-ubyte", labels)
    return tmp_path


def test_digits_are_split_once_and_for_all(tmp_path):
    first, second = (data.load_split("digits", tmp_path) for _ in range(2))
    assert len(first.train) == 1347
    assert first.test_inputs.shape == (450, 64)
    assert torch.equal(first.test_inputs, second.test_inputs)
    assert torch.equal(first.train.tensors[1], second.train.tensors[1])


def test_training_inputs_are_standardized(tmp_path):
    X, _ = data.load_split("digits", tmp_path).train.tensors
    assert X.mean().abs() < 1e-5
    assert abs(X.std() - 1) < 1e-5


def test_data_in_place_are_not_downloaded(fashion_mnist, monkeypatch):
    monkeypatch.setattr(FashionMNIST, "mirrors", [])
    points = data.load_split("fashion-mnist", fashion_mnist)
    X, y = points.train.tensors
    assert X.shape == (20, 1, 28, 28)
    assert X.dtype == torch.float32
    assert y.shape == (20,)


def test_test_images_are_a_fixed_subset(fashion_mnist):
    first, second = (
        data.load_split("fashion-mnist", fashion_mnist, num_test=5) for _ in range(2)
    )
    assert first.test_inputs.shape == (5, 1, 28, 28)
    assert torch.equal(first.test_inputs, second.test_inputs)
    assert torch.equal(first.test_labels, second.test_labels)


def test_color_images_have_channels_first(tmp_path, monkeypatch):
    class Stored:
        data = np.arange(2 * 32 * 32 * 3, dtype=np.uint8).reshape(2, 32, 32, 3)
        targets = (3, 7)

        def __init__(self, root, train):
            pass

    monkeypatch.setitem(data._TORCHVISION, "cifar10", Stored)
    points = data.load_split("cifar10", tmp_path)
    X, y = points.train.tensors
    assert X.shape == (2, 3, 32, 32)
    assert y.tolist() == [3, 7]
    pixels = torch.tensor(Stored.data) / 255
    expected = (pixels[1, 4, 5] - pixels.mean()) / pixels.std()
    torch.testing.assert_close(X[1, :, 4, 5], expected)


@pytest.mark.parametrize("error", [URLError("no network"), RuntimeError("corrupted")])
def test_missing_data_are_named_with_their_folder(tmp_path, monkeypatch, error):
    def fail(self):
        raise error

    monkeypatch.setattr(FashionMNIST, "download", fail)
    with pytest.raises(FileNotFoundError, match="FashionMNIST is not in") as caught:
        data.load_split("fashion-mnist", tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("shape", [(64,), (1, 28, 28), (3, 32, 32)])
def test_rows_come_in_another_order_which_is_the_same_for_all(shape):
    images = torch.randn(5, *shape)
    shuffled = data.shuffled_rows(images)
    assert shuffled.shape == images.shape
    side = 8 if len(shape) == 1 else shape[-1]
    before, after = (part.reshape(5, -1, side, side) for part in (images, shuffled))
    # the place of each row, in each image and channel
    same = (before[:, :, :, None] == after[:, :, None]).all(-1)
    order = same.long().argmax(2)
    assert same.sum(2).eq(1).all()
    assert (order == order[0, 0]).all()
    assert not torch.equal(order[0, 0], torch.arange(side))
