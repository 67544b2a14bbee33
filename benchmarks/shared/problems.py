"""Trained networks with their data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from shared.data import problem_data
from shared.training import trained

FIT_BATCH_SIZE = 256
QUICK_POINTS = 500


@dataclass
class Problem:
    """A trained network with its data.

    Args:
        model: The network.
        train: The training points.
        inputs: Test images.
        labels: Their classes.
        name: Name of the network.
        dataset: Name of the data.
    """

    model: nn.Module
    train: TensorDataset
    inputs: Tensor
    labels: Tensor
    name: str
    dataset: str

    def __str__(self) -> str:
        return f"{self.dataset}, {self.name}"

    @classmethod
    def load(
        cls, name: str, dataset: str, data_root: Path, quick: bool = False
    ) -> Problem:
        """Load a network's checkpoint, and its data; few of them for a quick run."""
        model = trained(name, dataset, data_root)
        train, inputs, labels = problem_data(dataset, data_root)
        if quick:
            train = TensorDataset(*train[:QUICK_POINTS])
            inputs, labels = inputs[:QUICK_POINTS], labels[:QUICK_POINTS]
        return cls(model, train, inputs, labels, name, dataset)

    def loader(self) -> DataLoader:
        """Return a loader over the training points."""
        return DataLoader(self.train, batch_size=FIT_BATCH_SIZE)

    def params(self) -> list[Tensor]:
        """Return the network's parameters."""
        return list(self.model.parameters())
