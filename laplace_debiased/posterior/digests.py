"""Short texts that tell data, models and settings apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from laplace_debiased.rows.model_state import is_plain
from laplace_debiased.sampling.folds import Fold, Folds
from laplace_debiased.sampling.loaders import subset_of

if TYPE_CHECKING:
    from laplace_debiased.posterior.fitting import Seen
    from laplace_debiased.posterior.laplace import KronDebiasedLaplace

# examples of a fold whose contents are compared
_SAMPLES = 32


def digest(value: Any) -> str:
    """Compute a digest of a value.

    Args:
        value: Tensors, numbers, texts, types, or mappings and sequences of such. Others
            are told apart by their text.

    Returns:
        Equal texts for equal values, in other processes, too.
    """
    hashed = sha256()
    for part in _parts(value):
        hashed.update(part)
    return hashed.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    """Yield bytes that differ if values do."""
    if isinstance(value, Tensor):
        yield f"tensor {value.dtype} {tuple(value.shape)} ".encode()
        if is_plain(value):
            flat = value.detach().cpu().contiguous().reshape(-1)
            yield flat.view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)} ".encode()
        for key, item in value.items():
            yield from _parts(key)
            yield from _parts(item)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        yield f"sequence {len(value)} ".encode()
        for item in value:
            yield from _parts(item)
    elif isinstance(value, Set):
        yield from _parts(sorted(map(repr, value)))
    else:
        own = value.__qualname__ if isinstance(value, type) else repr(value)
        yield f"{type(value).__name__} {own} ".encode()


def identity(
    la: KronDebiasedLaplace,
    folds: Folds,
    seen: Seen,
    decay: float,
    num_data: float | None,
) -> dict[str, str]:
    """Tell fits apart: those that agree in all of this give the same posterior.

    Args:
        la: The posterior, whose parameters are known.
        folds: The points.
        seen: What was seen before.
        decay: Factor on the weight of earlier points.
        num_data: Number of points that curvature and loss are scaled to.

    Returns:
        Digests, by what they are of.
    """
    model, settings = la.model, vars(la.settings)
    backend = (la._backend_cls.__name__, la._backend_kwargs, la._asdl_fisher_kwargs)
    options = (settings, backend, str(la.likelihood), decay, num_data)
    earlier = la.state_dict() if seen.weight else None
    named = (dict(model.named_parameters()), dict(model.named_buffers()))
    fitted = [name for name, own in named[0].items() if own.requires_grad]
    return {
        "data": digest([folds.num_data, folds.explicit, *map(_of_fold, folds.folds)]),
        "model": digest([str(model), *named, fitted]),
        "settings": digest(options),
        "earlier posterior": digest(earlier),
    }


def _of_fold(fold: Fold) -> str:
    """Tell which points there are, with which weights, and what some of them are."""
    count = min(_SAMPLES, fold.num_points)
    positions = torch.linspace(0, fold.num_points - 1, count, dtype=torch.float64)
    some = subset_of(fold.loader, positions.round().long().unique())
    indices = getattr(fold.loader.dataset, "indices", [])
    return digest([torch.as_tensor(indices), fold.weights, list(some)])
