"""Short texts that tell data, models and settings apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.rows.checks import plain_text
from laplace_debiased.rows.model_state import is_plain


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
    elif isinstance(value, str):
        yield f"str {plain_text(value)!r} ".encode()
    else:
        own = value.__qualname__ if isinstance(value, type) else repr(value)
        yield f"{type(value).__name__} {own} ".encode()
