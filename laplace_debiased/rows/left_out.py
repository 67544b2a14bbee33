"""What is said of parameters that stay at their trained values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_SUPPORTED = (
    "weights and biases of `F.linear`, `torch.matmul`, `torch.addmm`, convolutions and "
    "transposed convolutions, and of batch, layer, group, RMS and instance "
    "normalization; embeddings, too, in posteriors"
)
# a large network may have hundreds of modules, of few kinds
_MOST_GROUPS, _MOST_KEYS = 6, 6


@dataclass(frozen=True)
class LeftOut:
    """A parameter that no curvature can be computed for.

    Args:
        name: Its name in the network.
        kind: The type of the module that it belongs to.
        position: Its position in the list of parameters.
        size: Its number of entries.
        reason: Why it is left out.
    """

    name: str
    kind: str
    position: int
    size: int
    reason: str


def refusal(left_out: Sequence[LeftOut]) -> str:
    """Say why parameters are refused, and what to do about it."""
    return (
        f"Parameters found that are not supported: {_listed(left_out)}. Supported are "
        f"{_SUPPORTED}. Exclude the others by `requires_grad_(False)`, which keeps "
        "them at their trained values."
    )


def refusal_of_diagonals(names: Sequence[str]) -> str:
    """Say why parameters are refused of which a diagonal would be kept."""
    return (
        f"Of the curvature of {', '.join(names)}, no more than the diagonal would be "
        f"kept, because their uses are not supported. Supported are {_SUPPORTED}. "
        "Exclude them by `requires_grad_(False)`, or pass `strict=False`."
    )


def warning(left_out: Sequence[LeftOut], num_fitted: int) -> str:
    """Say which share of the parameters stays at its trained values, and why."""
    count = sum(entry.size for entry in left_out)
    total = count + num_fitted
    return (
        f"{_percent(count / total)} of the parameters ({count:,} of {total:,}) stay at "
        f"their trained values, because their uses are not supported: "
        f"{_listed(left_out)}. Pass `strict=True` to refuse them, or silence this by "
        "`requires_grad_(False)` on them."
    )


def _percent(share: float) -> str:
    percent = 100 * share
    if 0.1 <= percent <= 99.9:
        return f"{percent:.0f} %" if 10 <= percent <= 99 else f"{percent:.1f} %"
    return "Less than 0.1 %" if percent < 1 else "More than 99.9 %"


def _listed(left_out: Sequence[LeftOut]) -> str:
    """List parameters by the type of their modules and the reason, the most first."""
    groups: dict[tuple[str, str], list[LeftOut]] = {}
    for entry in left_out:
        groups.setdefault((entry.kind, entry.reason), []).append(entry)
    ordered = sorted(groups.values(), key=_size, reverse=True)
    shown, rest = ordered[:_MOST_GROUPS], ordered[_MOST_GROUPS:]
    parts = [_described(group) for group in shown]
    if rest:
        modules = {_module(entry) for group in rest for entry in group}
        parts.append(f"and {sum(map(_size, rest)):,} in {len(modules)} further modules")
    return ", ".join(parts)


def _described(group: list[LeftOut]) -> str:
    """Name a module, or how many there are of a type, and the parameters in it."""
    first, *_ = group
    name = _module(first) or "(model)"
    others = {_module(entry) for entry in group}
    keys = list(dict.fromkeys(entry.name.rpartition(".")[2] for entry in group))
    if len(keys) > _MOST_KEYS:
        keys = [*keys[: _MOST_KEYS - 1], f"{len(keys) - _MOST_KEYS + 1} more"]
    if len(others) == 1:
        return f"{name} ({first.kind}: {', '.join(keys)}) {first.reason}"
    return (
        f"{len(others)} × {first.kind} ({', '.join(keys)}), such as {name}, "
        f"{first.reason}"
    )


def _size(group: list[LeftOut]) -> int:
    return sum(entry.size for entry in group)


def _module(entry: LeftOut) -> str:
    return entry.name.rpartition(".")[0]
