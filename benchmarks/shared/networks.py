"""The networks of the benchmarks, for images of any number of channels and classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from laplace_debiased.comparison.networks import mlp

__all__ = [
    "VisionTransformer",
    "all_cnn_c",
    "all_convolutional",
    "conv_net_for_timing",
    "mlp",
    "pair_classifier",
    "resnet",
    "resnet18",
    "wide_resnet",
]


def _convolutions(plan: Sequence[tuple[int, int, int]]) -> list[nn.Module]:
    """Build 3×3 convolutions of ``(channels, filters, stride)``, each with a ReLU."""
    return [
        layer
        for channels, filters, stride in plan
        for layer in (nn.Conv2d(channels, filters, 3, stride, 1), nn.ReLU())
    ]


def _pooled() -> list[nn.Module]:
    """Build the average over positions."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten()]


def all_convolutional(
    width: int = 16, depth: int = 1, channels: int = 1, classes: int = 10
) -> nn.Module:
    """Build a network of convolutions, after ALL-CNN-C with fewer filters and layers.

    Args:
        width: Filters of the first layer.
        depth: Convolutions without stride in each of the two first stages.
        channels: Number of the images' channels.
        classes: Number of classes.

    Returns:
        The network, with 16 filters and depth 1 of seven convolutions.
    """
    w = width
    plan = [
        (channels, w, 1),
        *[(w, w, 1)] * (depth - 1),
        (w, w, 2),
        (w, 2 * w, 1),
        *[(2 * w, 2 * w, 1)] * (depth - 1),
        (2 * w, 2 * w, 2),
        (2 * w, 3 * w, 1),
        (3 * w, 4 * w, 1),
    ]
    head = [nn.Conv2d(4 * w, classes, 1), *_pooled()]
    return nn.Sequential(*_convolutions(plan), *head)


def all_cnn_c(width: int = 96, channels: int = 3, classes: int = 10) -> nn.Module:
    """Build ALL-CNN-C (Springenberg et al., 2015, arXiv 1412.6806).

    Without dropout, and without a ReLU on the logits, under which classes die out.

    Args:
        width: Filters of the first layer, 96 in the original.
        channels: Number of the images' channels.
        classes: Number of classes.

    Returns:
        The network of nine convolutions.
    """
    w, v = width, 2 * width
    plan = [(channels, w, 1), (w, w, 1), (w, w, 2), (w, v, 1), (v, v, 1), (v, v, 2)]
    top = [nn.Conv2d(v, v, 1), nn.ReLU(), nn.Conv2d(v, classes, 1)]
    return nn.Sequential(*_convolutions([*plan, (v, v, 1)]), *top, *_pooled())


class ResidualBlock(nn.Module):
    """Two convolutions with BatchNorm, and a shortcut (He et al., 2016)."""

    def __init__(self, channels: int, filters: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, filters, 3, stride, 1, bias=False),
            nn.BatchNorm2d(filters),
            nn.ReLU(),
            nn.Conv2d(filters, filters, 3, 1, 1, bias=False),
            nn.BatchNorm2d(filters),
        )
        self.shortcut = nn.Identity()
        if channels != filters or stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, filters, 1, stride, bias=False),
                nn.BatchNorm2d(filters),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, channels, height, width]`` to filters."""
        return torch.relu(self.body(x) + self.shortcut(x))


def _residual(
    plan: Sequence[tuple[int, int, int]], channels: int, classes: int
) -> nn.Module:
    """Build a ResNet for small images of ``(channels, filters, stride)`` blocks."""
    width = plan[0][0]
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        *(ResidualBlock(*block) for block in plan),
        *_pooled(),
        nn.Linear(plan[-1][1], classes),
    )


def resnet(channels: int = 1, classes: int = 10) -> nn.Module:
    """Build a ResNet of three blocks with BatchNorm."""
    return _residual([(16, 16, 2), (16, 32, 2), (32, 64, 1)], channels, classes)


def resnet18(width: int = 64, channels: int = 3, classes: int = 10) -> nn.Module:
    """Build ResNet-18 with the first layer that is usual for small images.

    Args:
        width: Filters of the first layer, 64 in the original (He et al., 2016).
        channels: Number of the images' channels.
        classes: Number of classes.

    Returns:
        The network.
    """
    stages = [(width * 2**k, 1 + (k > 0)) for k in range(4)]
    plan, before = [], width
    for filters, stride in stages:
        plan += [(before, filters, stride), (filters, filters, 1)]
        before = filters
    return _residual(plan, channels, classes)


class WideBlock(nn.Module):
    """Two convolutions with BatchNorm before them, and a shortcut."""

    def __init__(self, channels: int, filters: int, stride: int):
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(channels, filters, 3, stride, 1, bias=False),
            nn.BatchNorm2d(filters),
            nn.ReLU(),
            nn.Conv2d(filters, filters, 3, 1, 1, bias=False),
        )
        self.shortcut = None
        if channels != filters or stride != 1:
            self.shortcut = nn.Conv2d(channels, filters, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, channels, height, width]`` to filters."""
        normalized = self.first(x)
        shortcut = x if self.shortcut is None else self.shortcut(normalized)
        return self.body(normalized) + shortcut


def wide_resnet(
    depth: int = 40, widening: int = 4, channels: int = 3, classes: int = 10
) -> nn.Module:
    """Build a WideResNet (Zagoruyko and Komodakis, 2016, arXiv 1605.07146).

    Args:
        depth: Number of convolutions, 6 n + 4.
        widening: Factor on the filters 16, 32 and 64 of the three stages.
        channels: Number of the images' channels.
        classes: Number of classes.

    Returns:
        The network.

    Raises:
        ValueError: If there is no network of this depth.
    """
    if depth < 10 or depth % 6 != 4:
        raise ValueError(f"`depth` must be 10, 16, 22, ..., got {depth}.")
    blocks, before = [], 16
    for stage, filters in enumerate((16 * widening, 32 * widening, 64 * widening)):
        for index in range((depth - 4) // 6):
            blocks.append(WideBlock(before, filters, 1 + (stage > 0 and index == 0)))
            before = filters
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, 1, 1, bias=False),
        *blocks,
        nn.BatchNorm2d(before),
        nn.ReLU(),
        *_pooled(),
        nn.Linear(before, classes),
    )


class Attention(nn.Module):
    """Self-attention by linear layers, which hooks see (``[batch, tokens, width]``)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Let each token attend to all."""
        parts = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        return self.out(scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))


class EncoderBlock(nn.Module):
    """Attention and an MLP, each with LayerNorm before it and a shortcut."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``[batch, tokens, width]`` to tokens."""
        x = x + self.attention(x)
        return x + self.mlp(x)


class VisionTransformer(nn.Module):
    """A ViT that averages its tokens (Dosovitskiy et al., 2021; Beyer et al., 2022).

    Args:
        width: Number of features of a token.
        depth: Number of encoder blocks.
        heads: Number of attention heads.
        channels: Number of the images' channels.
        classes: Number of classes.
        patch: Height and width of a patch.
    """

    def __init__(
        self,
        width: int = 192,
        depth: int = 9,
        heads: int = 12,
        channels: int = 3,
        classes: int = 10,
        patch: int = 4,
    ):
        super().__init__()
        self.embed = nn.Conv2d(channels, width, patch, patch)
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[batch, channels, height, width]`` to logits."""
        patches = self.embed(x)
        tokens = patches.flatten(2).mT + _sine_positions(patches)
        return self.head(self.blocks(tokens).mean(1))


def _sine_positions(patches: Tensor) -> Tensor:
    """Encode positions in two dimensions by sines: ``[tokens, width]``."""
    _, width, *shape = patches.shape
    rates = 100.0 ** -torch.linspace(0, 1, width // 4, device=patches.device)
    grid = torch.meshgrid(
        *(torch.arange(n, device=patches.device) for n in shape), indexing="ij"
    )
    angles = [axis.flatten()[:, None] * rates for axis in grid]
    parts = [wave for angle in angles for wave in (angle.sin(), angle.cos())]
    return torch.cat(parts, 1).to(patches.dtype)


def pair_classifier() -> nn.Module:
    """Build a network of convolutions for pairs of digits, with 100 classes."""
    plan = [(1, 16, 1), (16, 16, 2), (16, 32, 1), (32, 32, 2), (32, 48, 1), (48, 64, 1)]
    head = [nn.AdaptiveAvgPool2d((2, 4)), nn.Flatten(), nn.Linear(512, 100)]
    return nn.Sequential(*_convolutions(plan), *head)


def conv_net_for_timing() -> nn.Module:
    """Build an all-convolutional network with about 240,000 parameters."""
    plan = [(1, 32, 1), (32, 32, 2), (32, 64, 1), (64, 64, 2), (64, 100, 1)]
    head = [nn.Conv2d(128, 10, 1), *_pooled()]
    return nn.Sequential(*_convolutions([*plan, (100, 128, 1)]), *head)
