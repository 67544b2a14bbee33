"""Networks whose outputs have positions, with their data."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, scaled_dot_product_attention

from laplace_debiased.comparison.data import raw_images

WORDS, LENGTH, WIDTH = 1000, 32, 64
CELL, GARMENT = 32, 28
HELD_OUT = 64
_VISIBLE = 0.1


class Task(NamedTuple):
    """A network whose outputs have positions, and its data.

    Args:
        network: The network, not trained.
        class_axis: Axis of its output that has the classes.
        train: Inputs, and the class of each position.
        validation: Those that calibration takes.
        test: Those that predictions are scored by.
    """

    network: nn.Module
    class_axis: int
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def train(task: Task, steps: int, batch_size: int = 16, rate: float = 3e-3) -> None:
    """Train a task's network by Adam with a falling rate.

    Args:
        task: The task, whose network is changed.
        steps: Number of steps.
        batch_size: Examples in a step.
        rate: First learning rate.
    """
    network, (X, y) = task.network, task.train
    optimizer = torch.optim.Adam(network.parameters(), rate, weight_decay=1e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(X), (batch_size,))
        optimizer.zero_grad()
        cross_entropy(network(X[rows]).movedim(task.class_axis, 1), y[rows]).backward()
        optimizer.step()
        schedule.step()
    network.eval()


class UNet(nn.Module):
    """A U-Net of three levels; its last layer is linear in each pixel's channels.

    Args:
        width: Channels of the first level.
        classes: Number of classes.
    """

    def __init__(self, width: int = 12, classes: int = 11):
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.second = nn.Conv2d(width, 2 * width, 3, padding=1, stride=2)
        self.third = nn.Conv2d(2 * width, 4 * width, 3, padding=1, stride=2)
        self.deep = nn.Conv2d(4 * width, 4 * width, 3, padding=2, dilation=2)
        self.back = nn.Conv2d(6 * width, 2 * width, 3, padding=1)
        self.out = nn.Conv2d(3 * width, 2 * width, 3, padding=1)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[batch, classes, height, width]``."""
        first = self.first(x).relu()
        second = self.second(first).relu()
        third = self.deep(self.third(second).relu()).relu()
        up = self.back(torch.cat([interpolate(third, scale_factor=2), second], 1))
        up = self.out(torch.cat([interpolate(up.relu(), scale_factor=2), first], 1))
        return self.head(up.relu().movedim(1, -1)).movedim(-1, 1)


def mosaics(images: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Put up to four garments into each image, at random places of its quarters.

    Args:
        images: Garments ``[N, 28, 28]`` in [0, 1].
        labels: Their classes.
        count: Number of mosaics.

    Returns:
        Noisy images ``[count, 1, 64, 64]``, and the class of each pixel, zero for the
        background.
    """
    X = torch.zeros(count, 2 * CELL, 2 * CELL)
    y = torch.zeros(count, 2 * CELL, 2 * CELL, dtype=torch.long)
    for n in range(count):
        for cell in range(4):
            if torch.rand(()) < 0.25:
                continue
            k = int(torch.randint(len(images), ()))
            offsets = torch.randint(CELL - GARMENT + 1, (2,)).tolist()
            top, left = (
                CELL * q + o for q, o in zip(divmod(cell, 2), offsets, strict=True)
            )
            place = (n, slice(top, top + GARMENT), slice(left, left + GARMENT))
            X[place] = images[k]
            y[place] = (images[k] > _VISIBLE) * (labels[k] + 1)
    return (X + 0.1 * torch.randn_like(X))[:, None], y


def segmentation(data_root: Path, count: int = 2000) -> Task:
    """Make mosaics, and a U-Net.

    Args:
        data_root: Folder of torchvision's datasets.
        count: Number of training examples.

    Returns:
        The task, of 11 classes.
    """
    parts = []
    for is_train, number in ((True, count), (False, 2 * HELD_OUT)):
        images, labels = raw_images("fashion-mnist", data_root, is_train)
        parts.append(mosaics(images.squeeze(1), labels, number))
    held_out = zip(*(part.split(HELD_OUT) for part in parts[1]), strict=True)
    return Task(UNet(), 1, parts[0], *held_out)


class Block(nn.Module):
    """A causal transformer block."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv, self.mix = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = (
            nn.Linear(WIDTH, 2 * WIDTH),
            nn.Linear(2 * WIDTH, WIDTH),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, tokens, width]``."""
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (3, 4, -1))
        own = qkv.permute(2, 0, 3, 1, 4)
        seen = scaled_dot_product_attention(*own, is_causal=True)
        x = x + self.mix(seen.transpose(1, 2).flatten(2))
        return x + self.narrow(nn.functional.gelu(self.wide(self.norms[1](x))))


class LanguageModel(nn.Module):
    """Predicts the next word at each token."""

    def __init__(self):
        super().__init__()
        self.words, self.places = (
            nn.Embedding(WORDS, WIDTH),
            nn.Embedding(LENGTH, WIDTH),
        )
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits ``[batch, tokens, words]``."""
        places = self.places(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.blocks(self.words(tokens) + places)))


def language(data_root: Path, count: int | None = None) -> Task:
    """Split Python's language reference into sequences, and make a language model.

    Args:
        data_root: Not needed: Python has the text.
        count: Number of training examples; None for all.

    Returns:
        The task, of 1,000 words, the last of which stands for all rare ones.
    """
    text = re.findall(r"\w+|[^\w\s]", "\n".join(topics[key] for key in sorted(topics)))
    known = {w: k for k, (w, _) in enumerate(Counter(text).most_common(WORDS - 1))}
    tokens = torch.tensor([known.get(word, WORDS - 1) for word in text])
    rows = tokens[: len(tokens) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    rows = rows[torch.randperm(len(rows))]
    sizes = [HELD_OUT, HELD_OUT, len(rows) - 2 * HELD_OUT]
    test, validation, train = [(own[:, :-1], own[:, 1:]) for own in rows.split(sizes)]
    train = train[0][:count], train[1][:count]
    return Task(LanguageModel(), -1, train, validation, test)


TASKS: dict[str, Callable[..., Task]] = {
    "segmentation": segmentation,
    "language": language,
}
