"""Networks and data of a published comparison of Laplace approximations.

That of *Variational Linearized Laplace Approximation for Bayesian Deep Learning*
(Ortega, Rodríguez-Santana and Hernández-Lobato, 2023, arXiv 2302.12565): an MLP for
each of FashionMNIST and MNIST.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam

from laplace_debiased.comparison.data import raw_images
from shared.data import FOREIGN
from shared.training import CHECKPOINTS

NUM_VALIDATION = 5000
BATCH_SIZE = 100
STEPS = 20_000
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 1e-3
NETWORKS = CHECKPOINTS / "cache" / "published"
# means over the five seeds of the paper's public results, where it has them: NLL, that
# of samples, accuracy, ECE, Brier score, OOD-AUC, that of samples, NLL at 30 degrees,
# seconds
_FASHION_MNIST = """
MAP              .3733 .3733 .8659 .0085 .1931 .8737 .8737 2.526 0
all, diag        .3973 .3976 .8624 .0430 .2006 .9139 .9078 2.164 315
all, kron        .3767 .3733 .8645 .0139 .1941 .9320 .9335 2.211 251
last layer, kron .3728 .3745 .8657 .0077 .1929 .8805 .8780 2.387 49
ELLA             .3732 .3732 .8658 .0076 .1931 .8736 .8738 2.523 2108
VaLLA, M = 100   .3547 .3787 .8738 .0111 .1825 .9230 .9149 2.291 2244
VaLLA, M = 200   .3519 .3825 .8758 .0126 .1809 .9333 .9258 2.247 3627
VaLLA, M = 500   .3485 .3901 .8772 .0125 .1786 .9489 .9426 2.171 9130
"""
_MNIST = """
MAP              .0759 .0759 .9759 .0078 .0365 .9047 .9047 .856 0
all, diag        .1430 .1593 .9736 .0716 .0533 .9221 .9362 .826 327
all, kron        .0945 .0978 .9750 .0286 .0406 .9488 .9593 .797 985
last layer, kron .0811 .0791 .9758 .0147 .0372 .9087 .9040 .815 52
VaLLA, M = 100   .0757 .0783 .9766 .0103 .0357 .9160 .9137 .812 3171
VaLLA, M = 500   .0748 .0819 .9773 .0119 .0348 .9291 .9249 .783 10805
"""


def _parsed(text: str) -> dict[str, list[float]]:
    rows = [line.rsplit(maxsplit=9) for line in text.strip().splitlines()]
    return {name: [float(value) for value in values] for name, *values in rows}


PUBLISHED = {"fashion-mnist": _parsed(_FASHION_MNIST), "mnist": _parsed(_MNIST)}


class ProtocolData(NamedTuple):
    """Images from 0 to 1, flattened, in double precision, and classes.

    Args:
        train: All training images but the last 5,000.
        validation: Those.
        test: All test images.
        foreign: All test images of the other dataset, without classes.
    """

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    foreign: Tensor


def protocol_data(dataset: str, data_root: Path) -> ProtocolData:
    """Load what the published networks were trained, tuned and tested on.

    Args:
        dataset: ``"fashion-mnist"`` or ``"mnist"``.
        data_root: Folder of torchvision's datasets.

    Returns:
        The data.
    """
    X, y = raw_images(dataset, data_root, train=True)
    X_test, y_test = raw_images(dataset, data_root, train=False)
    X_foreign, _ = raw_images(FOREIGN[dataset], data_root, train=False)
    X, X_test, X_foreign = (
        images.flatten(1).double() for images in (X, X_test, X_foreign)
    )
    return ProtocolData(
        (X[:-NUM_VALIDATION], y[:-NUM_VALIDATION]),
        (X[-NUM_VALIDATION:], y[-NUM_VALIDATION:]),
        (X_test, y_test),
        X_foreign,
    )


def protocol_mlp(widths: Sequence[int] = (200, 200)) -> nn.Module:
    """Build the network: 784 pixels, tanh, dropout of a tenth, double precision.

    Args:
        widths: Number of units of each hidden layer.

    Returns:
        The untrained network.
    """
    hidden = [
        layer
        for d_in, d_out in pairwise([784, *widths])
        for layer in (nn.Linear(d_in, d_out), nn.Tanh(), nn.Dropout(0.1))
    ]
    return nn.Sequential(*hidden, nn.Linear(widths[-1], 10)).double()


def train_protocol(
    points: tuple[Tensor, Tensor], seed: int, weight_decay: float, steps: int
) -> nn.Module:
    """Train a network as the published ones were.

    Args:
        points: Training images and classes.
        seed: Seed of initial weights, order of the images, and dropout.
        weight_decay: Of Adam.
        steps: Number of steps.

    Returns:
        The network, in evaluation mode.
    """
    torch.manual_seed(seed)
    model = protocol_mlp()
    optimizer = Adam(model.parameters(), LEARNING_RATE, weight_decay=weight_decay)
    X, y = points
    batches: list[Tensor] = []
    for _ in range(steps):
        batches = batches or list(torch.randperm(len(X)).split(BATCH_SIZE))
        batch = batches.pop()
        optimizer.zero_grad()
        cross_entropy(model(X[batch]), y[batch]).backward()
        optimizer.step()
    return model.eval()


def protocol_network(
    dataset: str,
    points: tuple[Tensor, Tensor],
    seed: int,
    folder: Path = NETWORKS,
    weight_decay: float = WEIGHT_DECAY,
    steps: int = STEPS,
) -> nn.Module:
    """Load a network; train and keep it if it is not there.

    Args:
        dataset: The dataset, for the name.
        points: Training images and classes.
        seed: As in :func:`train_protocol`, as are the other arguments.
        folder: Where networks are kept.
        weight_decay: Of Adam.
        steps: Number of steps.

    Returns:
        The network, in evaluation mode.
    """
    path = folder / f"{dataset}-{steps}-{weight_decay:g}-{seed}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        model = train_protocol(points, seed, weight_decay, steps)
        save_file(model.state_dict(), path)
    model = protocol_mlp().eval()
    model.load_state_dict(load_file(path))
    return model
