r"""Bytes that a fit takes, known before it begins, and how layers share a limit.

What grows with the square of the layers' features is counted: Kronecker factors of each
fold, which are summed in double precision, their averages over folds, eigenvectors, and
what it takes to decompose a factor. With ``kfac`` magnitudes, a posterior keeps the
factors of all folds and the eigenvectors; with ``ggn``, the eigenvectors and the
curvatures along them. All else is needed for the layers that are measured at a time,
so that fewer of them take less, and more passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from laplace_debiased.curvature.eigenbasis import EigenbasisMatrix
from laplace_debiased.posterior.checkpoint import flat
from laplace_debiased.posterior.predicting import memory_limit
from laplace_debiased.posterior.upstream import is_curvlinops, output_curvature
from laplace_debiased.rows.checks import check_integer
from laplace_debiased.rows.layers import Layer
from laplace_debiased.sampling.folds import Folds
from laplace_debiased.sampling.processes import ALONE, Alone

if TYPE_CHECKING:
    from laplace_debiased.posterior.laplace import KronDebiasedLaplace

# what a decomposition needs beside a factor and its eigenvectors, in copies of it
WORKSPACE = 4
_DOUBLE = 8
_NAMED = 3


class Entries(NamedTuple):
    """Numbers of entries of some layers' tensors.

    Args:
        outer: Of their gradient covariances G.
        inner: Of their input covariances A.
        spectra: Of the curvatures along their directions.
        largest: Of the largest factor.
    """

    outer: int
    inner: int
    spectra: int
    largest: int

    @classmethod
    def of(cls, layers: Sequence[Layer]) -> Entries:
        """Count the entries of some layers."""
        outer = [prod(own.gradient_shape) for own in layers]
        inner = [prod(own.input_shape()) for own in layers]
        spectra = sum(
            own.d_out * (own.d_in + (own.vector is not None)) for own in layers
        )
        return cls(sum(outer), sum(inner), spectra, max([0, *outer, *inner]))

    @property
    def factors(self) -> int:
        """Number of entries of both covariances."""
        return self.outer + self.inner


@dataclass(frozen=True)
class Scheme:
    """What the memory of a fit depends on, beside its layers.

    Args:
        itemsize: Bytes of an entry of factors and eigenvectors.
        num_folds: Number of folds.
        is_ggn: Whether magnitudes are ``ggn``.
        is_cross_fit: Whether each fold gives directions and magnitudes.
        is_pooled: Whether a pool gives input covariances.
        decomposes_singly: Whether ``kfac`` factors are decomposed layer by layer; else
            those that are measured at a time are.
        fixed: Bytes of what there is before: the present posterior.
        mean: Bytes of the parameters' copy that is the posterior's mean.
    """

    itemsize: int
    num_folds: int
    is_ggn: bool = False
    is_cross_fit: bool = True
    is_pooled: bool = False
    decomposes_singly: bool = False
    fixed: int = 0
    mean: int = 0

    def held(self, own: Entries) -> int:
        """Bytes of a posterior once it is fitted, but for the mean."""
        if self.is_ggn:
            return self.itemsize * (own.factors + own.spectra)
        return self.itemsize * (self.num_folds + 1) * own.factors

    def peak(self, before: Entries, part: Entries, whole: Entries) -> int:
        """Bytes that a part of the layers takes, after others.

        Args:
            before: Entries of the layers that were measured before.
            part: Of those that are measured at a time.
            whole: Of all layers.

        Returns:
            The bytes, what is held of others included.
        """
        size, folds = self.itemsize, self.num_folds
        if self.is_ggn:
            after = self._decomposing(part) + self._of_folds(part)
            own = max(self._measuring(part), after) + self.held(before)
        else:
            own = self._measuring(part) + size * folds * before.factors
            if not self.decomposes_singly:
                after = size * (folds * whole.factors + before.factors)
                own = max(own, after + self._decomposing(part))
        return self.fixed + self.mean + own

    def peak_of_single(self, largest: Entries, whole: Entries) -> int:
        """Bytes while the largest layer is decomposed by itself, after all others."""
        if self.is_ggn or not self.decomposes_singly:
            return 0
        return self.fixed + self.mean + self.held(whole) + self._decomposing(largest)

    @property
    def _giving(self) -> int:
        """Number of folds that factors are computed of."""
        return 1 if self.is_ggn and not self.is_cross_fit else self.num_folds

    def _measuring(self, own: Entries) -> int:
        """Sums in double precision of a fold, and factors of all so far."""
        size, giving, mean = self.itemsize, self._giving, _DOUBLE * own.largest
        if not self.is_pooled:
            return (size * giving + _DOUBLE) * own.factors + mean
        inner = size * self.num_folds * own.inner
        sums = (size * giving + _DOUBLE) * own.outer
        return inner + max(_DOUBLE * own.inner, sums) + mean

    def _of_folds(self, own: Entries) -> int:
        """Factors of the folds, which ``ggn`` magnitudes need until they are done."""
        pools = self.num_folds if self.is_pooled else self._giving
        return self.itemsize * (self._giving * own.outer + pools * own.inner)

    def _decomposing(self, own: Entries) -> int:
        """Averages and eigenvectors, beside the factors of folds."""
        count, largest = self.num_folds, WORKSPACE * own.largest
        if not self.is_cross_fit:
            entries = own.factors + largest
        elif not self.is_pooled:  # eigenvectors of all, average and those of others
            entries = 3 * own.factors + largest
        elif self.is_ggn:  # eigenvectors of inputs are those of all
            entries = 2 * own.factors + own.outer + largest
        else:  # one after the other
            entries = max(3 * own.outer, own.outer + 2 * own.inner) + largest
        if self.is_ggn:  # the last fold is measured once its directions are there
            bases = 2 if self.is_cross_fit else 1
            earlier = (count - 1) * own.spectra if self.is_cross_fit else 0
            measuring = bases * own.factors + 2 * own.spectra
            entries = max(entries, measuring) + earlier
        return self.itemsize * entries


@dataclass(frozen=True)
class FitMemory:
    """Bytes that a fit takes beside network, data, and a pass over a batch.

    As text, it says so in a line or two.

    Args:
        peak: Bytes at most, those of the present posterior included, which stays until
            the fit is done.
        held: Bytes of the new posterior.
        rows: Bytes of rows that are kept for ``ggn`` magnitudes, a part of the peak.
        room: Bytes that these may take.
        at_a_time: How many of the layers are measured at a time, one number after the
            other: for each, there are passes over the points.
        decomposed_at_a_time: How many ``kfac`` factors' layers are decomposed at a
            time.
        of_layers: Bytes that remain of each layer, by its name.
    """

    peak: int
    held: int
    rows: int
    room: int
    at_a_time: tuple[int, ...]
    decomposed_at_a_time: tuple[int, ...]
    of_layers: dict[str, int]

    def __str__(self) -> str:
        count = len(self.at_a_time)
        passes = (
            "in one turn" if count == 1 else f"in {count} turns, with passes for each"
        )
        return (
            f"A fit takes up to {in_units(self.peak)} beside network, data and a pass "
            f"over a batch, of which {in_units(self.held)} remain. Its "
            f"{len(self.of_layers)} layers are measured {passes}; the largest are "
            f"{self.largest}."
        )

    @property
    def largest(self) -> str:
        """The layers of which most remains, as text."""
        of = self.of_layers
        names = sorted(of, key=of.__getitem__, reverse=True)[:_NAMED]
        return ", ".join(f"{name!r} ({in_units(of[name])})" for name in names)


def fit_memory(
    layers: Sequence[Layer],
    scheme: Scheme,
    limit: int | None = None,
    rows: int = 0,
    room: int = 0,
) -> FitMemory:
    """Count what a fit takes, and divide its layers so that a limit holds.

    Args:
        layers: The layers.
        scheme: What it depends on.
        limit: Bytes that it may take; None for any number.
        rows: Bytes of rows that need not be computed again if they are kept.
        room: Bytes that these may take, as far as the limit allows.

    Returns:
        The bytes. Without a limit, all layers are measured at a time.

    Raises:
        ValueError: If the limit does not hold, even with each layer by itself; it names
            the largest ones.
    """
    whole = Entries.of(layers)
    of_layers = {own.name: scheme.held(Entries.of([own])) for own in layers}
    at_a_time: list[int] = []
    peaks = [scheme.peak_of_single(Entries.of([own]), whole) for own in layers]
    done = 0
    while done < len(layers):
        before = Entries.of(layers[:done])
        size, peak = _next(layers[done:], before, whole, scheme, limit)
        at_a_time.append(size)
        peaks.append(peak)
        done += size
    peak = max(peaks)
    if limit is not None:
        room = max(0, min(room, limit - peak))
    rows = min(rows, room)  # those of the first folds, if not all
    found = FitMemory(
        peak + rows,
        scheme.held(whole) + scheme.mean,
        rows,
        room,
        tuple(at_a_time),
        tuple([1] * len(layers) if scheme.decomposes_singly else at_a_time),
        of_layers,
    )
    if limit is not None and peak > limit:
        raise ValueError(
            f"`fit_memory_limit` of {in_units(limit)} does not hold: with each layer "
            f"by itself, a fit takes {in_units(peak)}, of which "
            f"{in_units(found.held)} remain. The largest layers are {found.largest}: "
            "leave some of them out by `requires_grad_(False)`, or allow more."
        )
    return found


def _next(
    layers: Sequence[Layer],
    before: Entries,
    whole: Entries,
    scheme: Scheme,
    limit: int | None,
) -> tuple[int, int]:
    """Return how many of the next layers a limit has room for, and what they take."""
    if limit is None:
        return len(layers), scheme.peak(before, Entries.of(layers), whole)
    size, peak = 1, scheme.peak(before, Entries.of(layers[:1]), whole)
    for more in range(2, len(layers) + 1):
        larger = scheme.peak(before, Entries.of(layers[:more]), whole)
        if larger > limit:
            break
        size, peak = more, larger
    return size, peak


def of_fit(
    la: KronDebiasedLaplace,
    folds: Folds,
    again: bool = False,
    checkpoint: bool = False,
    group: Alone = ALONE,
) -> FitMemory:
    """Count what a fit takes by the present settings.

    Args:
        la: The posterior, whose layers are known.
        folds: The points.
        again: Whether they are further data.
        checkpoint: Whether what is done is written down.
        group: The processes that share the work.

    Returns:
        The bytes of each process.

    Raises:
        ValueError: If the posterior's limit does not hold, or there is one with another
            backend than curvlinops'.
    """
    assert la._selection is not None
    check_limit(la)
    settings, layers = la.settings, la._selection.layers
    scheme = Scheme(
        la._dtype.itemsize,
        len(folds.folds),
        settings.magnitudes == "ggn",
        settings.cross_fit and not folds.explicit,
        settings.num_used(folds) < folds.num_points,
        # fewer at a time would be more stages, or cannot be divided
        decomposes_singly=group.size == 1 and not checkpoint,
        mean=la.n_params * la.fitted_params[0].element_size(),
    )
    present = _present_bytes(la)
    if again and present:  # what is scaled and added
        whole = Entries.of(layers)
        added = (whole.outer + whole.factors) * scheme.num_folds
        if scheme.is_ggn:
            added = whole.factors + 2 * whole.spectra
        present += scheme.itemsize * added
    rows = scheme.itemsize * _row_entries(la, folds)
    # rows are not in a checkpoint: they are computed again
    keeps = settings.measures_again(folds) and not checkpoint
    kept = (rows, memory_limit(la)) if keeps else (0, 0)
    scheme = replace(scheme, fixed=present)
    return fit_memory(layers, scheme, la.fit_memory_limit, *kept)


def check_limit(la: KronDebiasedLaplace) -> None:
    """Refuse a limit that is none, or that the backend cannot hold.

    Args:
        la: The posterior.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it is not positive, or the backend computes all factors at once.
    """
    if la.fit_memory_limit is None:
        return
    check_integer("fit_memory_limit", la.fit_memory_limit, 1)
    if not is_curvlinops(la._backend_cls):
        raise ValueError(
            "`fit_memory_limit` needs a curvlinops backend, got "
            f"{la._backend_cls.__name__}, which computes all factors at once."
        )


def _present_bytes(la: KronDebiasedLaplace) -> int:
    """Bytes of the present posterior's matrices, each counted once."""
    if la._estimate is None or not isinstance(la.H, EigenbasisMatrix):
        return 0
    values = flat(la._estimate.curvature.state_dict())
    tensors = [own for _, own in values if isinstance(own, Tensor)]
    tensors += [own for block in la.H.eigenvectors for own in block]
    storages = [own.untyped_storage() for own in [*tensors, la.mean]]
    return sum({own.data_ptr(): own.nbytes() for own in storages}.values())


def _row_entries(la: KronDebiasedLaplace, folds: Folds) -> int:
    """Number of entries of all rows of the points with backward passes."""
    assert la._selection is not None
    mc_samples = la._asdl_fisher_kwargs.get("mc_samples", 1)
    rank = la.settings.fisher_rank
    curvature = output_curvature(la.backend, mc_samples, rank)
    # columns are of all positions together
    is_flat = la.class_axis is None
    num_outputs = la._selection.num_outputs if is_flat else la.n_outputs
    columns = curvature.num_columns(num_outputs)
    entries = sum(
        own.num_positions * (own.groups * own.d_in + columns * own.d_out)
        for own in la._selection.layers
    )
    return la.settings.num_used(folds) * entries


def in_units(count: int) -> str:
    """Write a number of bytes in units of a power of two.

    Args:
        count: The number.

    Returns:
        It in KiB, MiB or GiB.
    """
    unit = next((k for k in (3, 2) if count >= 1024**k), 1)
    return f"{count / 1024**unit:.3g} {'KMG'[unit - 1]}iB"
