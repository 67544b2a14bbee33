"""Fits that go on where they stopped."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from laplace_debiased.curvature.debias import Directions, Factors
from laplace_debiased.curvature.kronecker import Kronecker, Spectrum
from laplace_debiased.posterior import checkpoint
from laplace_debiased.posterior.sources import Source
from laplace_debiased.rows.layers import Layer
from laplace_debiased.rows.sweep import SweepSummary
from laplace_debiased.sampling.folds import Fold
from laplace_debiased.sampling.processes import ALONE, Alone

_FORMAT = 1
Result = TypeVar("Result", bound=tuple[Any, Any])
_KINDS = {kind.__name__: kind for kind in (Kronecker, Spectrum, SweepSummary)}


@dataclass(eq=False)
class ResumedSource:
    """Lets another source do what was not done yet, and keeps it in a folder.

    A stage is a call. All that is between them, such as the draw of points by their
    scores, follows from their results and is done again. A file of a stage is written
    once it is done, whole or not at all, and is read instead from then on.

    Args:
        source: The source.
        folder: The folder, which is made if need be.
        identity: What the results depend on, as digests by what they are of.
        group: The processes that share the work, of which the first one alone reads and
            writes.

    Raises:
        ValueError: If the folder has stages of another fit, or damaged ones.
    """

    source: Source
    folder: Path
    identity: Mapping[str, str]
    group: Alone = ALONE
    _number: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.group.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def layers(self) -> Sequence[Layer]:
        """See :class:`~laplace_debiased.posterior.sources.Source`."""
        return self.source.layers

    @property
    def params(self) -> Sequence[Tensor]:
        """See :class:`~laplace_debiased.posterior.sources.Source`."""
        return self.source.params

    @property
    def takes_weights(self) -> bool:
        """See :class:`~laplace_debiased.posterior.sources.Source`."""
        return self.source.takes_weights

    def part(self, layers: Sequence[Layer], index: int) -> ResumedSource:
        """See :meth:`~laplace_debiased.posterior.sources.Source.part`."""
        source, folder = self.source.part(layers, index), self.folder / f"{index:03d}"
        return ResumedSource(source, folder, self.identity, self.group)

    def factors(self, fold: Fold, seed: int) -> tuple[Factors, SweepSummary]:
        """See :meth:`~laplace_debiased.posterior.sources.Source.factors`."""
        return self._stage("factors", lambda: self.source.factors(fold, seed))

    def gradients(self, fold: Fold, seed: int) -> tuple[Factors, SweepSummary]:
        """See :meth:`~laplace_debiased.posterior.sources.Source.gradients`."""
        return self._stage("gradients", lambda: self.source.gradients(fold, seed))

    def inputs(self, fold: Fold, seed: int) -> tuple[Factors, SweepSummary]:
        """See :meth:`~laplace_debiased.posterior.sources.Source.inputs`."""
        return self._stage("inputs", lambda: self.source.inputs(fold, seed))

    def curvatures(
        self, fold: Fold, directions: Directions, seed: int
    ) -> tuple[list[Spectrum], SweepSummary]:
        """See :meth:`~laplace_debiased.posterior.sources.Source.curvatures`."""
        return self._stage(
            "curvatures", lambda: self.source.curvatures(fold, directions, seed)
        )

    def decompose(
        self, factors: Sequence[Kronecker]
    ) -> tuple[list[Kronecker], list[Kronecker]]:
        """See :meth:`~laplace_debiased.posterior.sources.Source.decompose`."""
        return self._stage("decompose", lambda: self.source.decompose(factors))

    def _stage(self, name: str, compute: Callable[[], Result]) -> Result:
        """Read what a stage gave, or let it be done and write it."""
        path = self.folder / f"{self._number:03d}-{name}.pt"
        self._number += 1
        device = self.params[0].device
        if self.group.of_first(path.exists, device):
            return _restored(self.group.of_first(lambda: self._read(path), device))
        result = compute()
        if self.group.rank == 0:
            entries = {"format": _FORMAT, "identity": dict(self.identity)}
            checkpoint.write(entries | {"result": _plain(result)}, path)
        return result

    def _read(self, path: Path) -> Any:
        """Read a stage's result, if it is of this fit, as plain values."""
        saved = checkpoint.read(path, self.params[0].device)
        if saved.get("format") != _FORMAT or "result" not in saved:
            raise ValueError(f"{os.fspath(path)} is no stage of a fit.")
        found = saved["identity"]
        others = [key for key, own in self.identity.items() if found.get(key) != own]
        if others:
            raise ValueError(
                f"`checkpoint` {os.fspath(self.folder)} is that of a fit with other "
                f"{' and '.join(others)}, or of data that are drawn anew: give another "
                "folder, or delete it."
            )
        return saved["result"]


def _plain(value: Any) -> Any:
    """Turn results into plain values and tensors."""
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    kind = type(value).__name__
    if kind in _KINDS:
        own = {entry.name: getattr(value, entry.name) for entry in fields(value)}
        return {"kind": kind} | own
    return value


def _restored(value: Any) -> Any:
    """Undo :func:`_plain`."""
    if isinstance(value, list):
        return [_restored(item) for item in value]
    if isinstance(value, dict):
        own = dict(value)
        return _KINDS[own.pop("kind")](**own)
    return value
