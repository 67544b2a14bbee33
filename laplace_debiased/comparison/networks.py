"""Small networks, and how each dataset's is trained."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from torch import nn

from laplace_debiased.comparison.training import Recipe

NUM_CLASSES = 10


def mlp(
    widths: Sequence[int] = (128, 64), inputs: int = 784, classes: int = NUM_CLASSES
) -> nn.Module:
    """Build a network of linear layers.

    Args:
        widths: Number of units of each hidden layer.
        inputs: Number of an input's entries, in all channels.
        classes: Number of classes.

    Returns:
        The network, from ``[batch, ...]`` to logits ``[batch, classes]``.
    """
    sizes = [inputs, *widths]
    hidden = [
        layer
        for d_in, d_out in pairwise(sizes)
        for layer in (nn.Linear(d_in, d_out), nn.ReLU())
    ]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], classes))


def strided_conv_net(channels: int, filters: tuple[int, int, int]) -> nn.Module:
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


_grey_conv_net = partial(strided_conv_net, 1, (8, 16, 32))
RECIPES = {
    "digits": Recipe(partial(mlp, (64,), 64), 40, 1e-2, batch_size=64),
    "mnist": Recipe(_grey_conv_net, 4, 5e-3),
    "fashion-mnist": Recipe(_grey_conv_net, 8, 5e-3),
    "cifar10": Recipe(partial(strided_conv_net, 3, (16, 32, 32)), 20, 5e-3),
}
