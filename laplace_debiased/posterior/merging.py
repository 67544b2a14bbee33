"""One posterior from several, each fitted to a part of the data.

What a fit measures adds up: no process needs to see all data, nor to wait for another.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from laplace_debiased.posterior import checkpoint, state
from laplace_debiased.posterior.fitting import Seen
from laplace_debiased.posterior.measuring import Estimate
from laplace_debiased.posterior.state_checks import check_entries
from laplace_debiased.rows.layers import Layer

if TYPE_CHECKING:
    from laplace_debiased.posterior.laplace import KronDebiasedLaplace

# what differs from part to part; all else must not
_OF_PART = {"calibration", "example_size", "outputs_size", "loss", "n_data"}
_GROUPS_OF_PART = ("calibration", "curvature", "sampling_error", "seen")
# of the example that a layer was found with, which may be a longer one in some parts
_OF_EXAMPLE = ("num_positions", "num_entries")


def merge(
    parts: Sequence[KronDebiasedLaplace | str | os.PathLike[str]],
) -> dict[str, Any]:
    """Merge posteriors that were fitted to different parts of the data.

    Each counts as the points that it stands for (``n_data`` after a fit), so that a
    part must be a dataset of its own, such as a ``Subset``: a sampler over a part of a
    dataset stands for all of it. With ``kfac`` magnitudes, the merged posterior is that
    of one fit, to the folds of all parts together, in which each point has the weight
    that it had in its part. With ``ggn``, directions are those of all points, along
    which the curvature of each part is known by its eigenvalues in its own directions,
    as in :meth:`~laplace_debiased.posterior.laplace.KronDebiasedLaplace.partial_fit`.
    Parts may be merged in any order, and merged posteriors merged again.

    Args:
        parts: Fitted posteriors, or files from ``la.save``. They must have the same
            network, parameters, prior, likelihood, backend and magnitudes, and with
            ``kfac`` the same estimator and number of folds. None of them is changed.

    Returns:
        A state for ``load_state_dict``, without calibration; ``torch.save`` makes it a
        file for ``la.load``. Tensors are on the device of the first part, or on the CPU
        if that is a file.

    Raises:
        AttributeError: If a posterior is not fitted yet.
        ValueError: If there are no parts, a file is damaged, or parts differ in what
            they must have in common, which is named.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, Subset, TensorDataset
        >>> from laplace_debiased import KronDebiasedLaplace, merge
        >>> _ = torch.manual_seed(0)
        >>> data = TensorDataset(torch.randn(80, 2), torch.randint(2, (80,)))
        >>> model, parts = torch.nn.Linear(2, 2), []
        >>> for start in (0, 40):
        ...     part = Subset(data, range(start, start + 40))
        ...     parts.append(KronDebiasedLaplace(model, "classification"))
        ...     parts[-1].fit(DataLoader(part, batch_size=20))
        >>> la = KronDebiasedLaplace(model, "classification")
        >>> la.load_state_dict(merge(parts))
        >>> la.n_data
        80.0
    """
    if not parts:
        raise ValueError("There are no posteriors to merge.")
    states = [_state_of(part) for part in parts]
    device = next(v.device for v in states[0].values() if isinstance(v, Tensor))
    states = [checkpoint.on_device(own, device) for own in states]
    names = [_name_of(part, k) for k, part in enumerate(parts)]
    for own, name in zip(states, names, strict=True):
        _check_same(states[0], own, f"{names[0]} and {name}")
    entries = [checkpoint.nested(saved) for saved in states]
    for saved in entries:
        check_entries(saved)
    longest = max(entries, key=lambda saved: saved["example_size"])
    layers = [Layer.from_state_dict(layer) for layer in longest["layers"]]
    estimate, seen = reduce(_added, (_scaled(saved, layers) for saved in entries))
    merged = entries[0] | {
        **state.of_estimate(estimate),
        "loss": estimate.loss,
        "layers": longest["layers"],
        "example_size": longest["example_size"],
        "outputs_size": max(saved["outputs_size"] for saved in entries),
        "n_data": float(seen.weight),
        "seen": dict(vars(seen)),
        "calibration": None,
    }
    return dict(checkpoint.flat(merged))


def _state_of(part: Any) -> dict[str, Any]:
    """Return a part's state."""
    if isinstance(part, str | os.PathLike):
        saved = checkpoint.read(part, torch.device("cpu"))
    else:
        saved = part.state_dict()
    state.check_format(saved)
    return saved


def _name_of(part: Any, index: int) -> str:
    is_file = isinstance(part, str | os.PathLike)
    return os.fspath(part) if is_file else f"posterior {index}"


def _check_same(first: Mapping[str, Any], other: Mapping[str, Any], names: str) -> None:
    """Refuse parts that differ in what is not measured."""
    for key in sorted(first.keys() | other.keys()):
        group, last = key.partition(".")[0], key.rpartition(".")[2]
        if key in _OF_PART or group in _GROUPS_OF_PART:
            continue
        if group == "layers" and last in _OF_EXAMPLE:
            continue
        if not _is_same(first.get(key), other.get(key)):
            values = ""
            if not isinstance(first.get(key), Tensor):
                values = f": {first.get(key)!r} and {other.get(key)!r}"
            reason = " (the model's parameters)" if key == "mean" else ""
            raise ValueError(f"{names} differ in {key!r}{reason}{values}.")


def _is_same(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return value.dtype == other.dtype and torch.equal(value, other)
    return checkpoint.is_same(value, other)


def _scaled(saved: dict[str, Any], layers: list[Layer]) -> tuple[Estimate, Seen]:
    """Return what a part measured, scaled to the points that it stands for."""
    seen = Seen(**saved["seen"])
    estimate = state.estimate_of(saved, layers)
    return estimate.scaled(seen.weight / saved["n_data"]), seen


def _added(
    first: tuple[Estimate, Seen], other: tuple[Estimate, Seen]
) -> tuple[Estimate, Seen]:
    """Add what two parts measured."""
    (estimate, seen), (further, also_seen) = first, other
    total = seen.merge(also_seen)
    return estimate.combined(further, seen.weight / total.weight), total
