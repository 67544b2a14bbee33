"""Spectra of mini-batches side by side, and how far their eigenspaces are apart.

The spectra of two mini-batches are alike, but their eigenvectors are not: that is why a
batch's curvature along its own eigenvectors is biased (Tatzel et al., 2024, arXiv
2410.14325, Section 3.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from laplace_debiased.predictive.figures import save
from laplace_debiased.quadratics.eigenspace import Eigenspace, overlap, principal_angles
from laplace_debiased.quadratics.ranks import rank_figure, rank_ranges

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class EigenspaceComparison:
    """Top eigenspaces of several curvature matrices.

    Args:
        names: What the matrices are called.
        eigenvalues: Their largest eigenvalues ``[matrices, k]``.
        overlaps: Overlap of each two eigenspaces ``[matrices, matrices]``
            (:func:`~laplace_debiased.quadratics.eigenspace.overlap`).
        angles: Principal angles between each two ``[matrices, matrices, k]`` in
            radians, the smallest first.
        random_overlap: Expected overlap of random subspaces, k / D.
    """

    names: tuple[str, ...]
    eigenvalues: Tensor
    overlaps: Tensor
    angles: Tensor
    random_overlap: float

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Positions of each two matrices."""
        return list(combinations(range(len(self.names)), 2))

    def __str__(self) -> str:
        """Return eigenvalues and overlaps, as two Markdown tables."""
        lines = [
            f"| mean eigenvalue | {' | '.join(self.names)} |",
            "|---" * (1 + len(self.names)) + "|",
        ]
        for first, last in rank_ranges(self.eigenvalues.shape[1]):
            means = self.eigenvalues[:, first - 1 : last].mean(1).tolist()
            cells = " | ".join(f"{mean:.3g}" for mean in means)
            lines.append(f"| {first} to {last} | {cells} |")
        lines += [
            "",
            f"| eigenspaces | overlap (random: {self.random_overlap:.2g}) "
            "| smallest angle | median angle | largest angle |",
            "|---|---|---|---|---|",
        ]
        for i, j in self.pairs:
            angles = self.angles[i, j].rad2deg()
            shown = (angles[0], angles.quantile(0.5), angles[-1])
            lines.append(
                f"| {self.names[i]}, {self.names[j]} | {self.overlaps[i, j]:.3f} | "
                + " | ".join(f"{angle:.1f}°" for angle in shown)
                + " |"
            )
        return "\n".join(lines)

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw the spectra, and the principal angles.

        Args:
            path: Where to save the figure; None for nowhere.

        Returns:
            The figure.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        figure, (spectra, angles) = rank_figure(2)
        ranks = range(1, self.eigenvalues.shape[1] + 1)
        for name, values in zip(self.names, self.eigenvalues.cpu(), strict=True):
            spectra.plot(ranks, values, label=name)
        positive = bool((self.eigenvalues > 0).all())
        spectra.set(
            xlabel="rank of the eigenvalue",
            ylabel="eigenvalue",
            yscale="log" if positive else "linear",
        )
        for i, j in self.pairs:
            label = f"{self.names[i]}, {self.names[j]}: {self.overlaps[i, j]:.2f}"
            angles.plot(ranks, self.angles[i, j].rad2deg().cpu(), label=label)
        angles.set(xlabel="rank of the principal angle", ylabel="degrees", ylim=(0, 90))
        spectra.legend()
        angles.legend(title="overlap")
        return save(figure, path)


def compare_eigenspaces(spaces: Mapping[str, Eigenspace]) -> EigenspaceComparison:
    """Compare the top eigenspaces of several mini-batches.

    Args:
        spaces: At least two eigenspaces with as many eigenvectors, by name.

    Returns:
        The comparison.

    Raises:
        ValueError: If there are fewer than two, or their shapes differ.

    Example:
        >>> import torch
        >>> from laplace_debiased import Eigenspace, compare_eigenspaces
        >>> axes = torch.eye(4)
        >>> first = Eigenspace(torch.tensor([3.0, 1.0]), axes[:, :2])
        >>> second = Eigenspace(torch.tensor([2.0, 1.0]), axes[:, 1:3])
        >>> comparison = compare_eigenspaces({"a batch": first, "all data": second})
        >>> comparison.overlaps
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]])
        >>> print(comparison)  # doctest: +ELLIPSIS
        | mean eigenvalue | a batch | all data |
        |---|---|---|
        | 1 to 1 | 3 | 2 |
        | 2 to 2 | 1 | 1 |
        ...
    """
    bases = [space.eigenvectors for space in spaces.values()]
    shapes = {tuple(basis.shape) for basis in bases}
    if len(bases) < 2 or len(shapes) > 1:
        raise ValueError(
            "`spaces` must be at least two eigenspaces of one shape, got "
            f"{len(bases)} of shape {sorted(shapes)}."
        )
    size, k = bases[0].shape
    overlaps = [[overlap(U, V) for V in bases] for U in bases]
    angles = [[principal_angles(U, V) for V in bases] for U in bases]
    return EigenspaceComparison(
        tuple(spaces),
        torch.stack([space.eigenvalues for space in spaces.values()]),
        bases[0].new_tensor(overlaps),
        torch.stack([torch.stack(row) for row in angles]),
        k / size,
    )
