"""Batches of a data source, and some of their examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from copy import copy
from typing import Any

from laplace.utils import select_rows as rows_of
from torch import Tensor

from laplace_debiased.rows.inputs import Batch


def with_examples(data: Iterable[Batch]) -> Iterator[Batch]:
    """Skip batches without examples, of which networks may make no sense.

    Args:
        data: Batches ``(X, y)``.

    Yields:
        The others.
    """
    for X, y in data:
        if len(y):
            yield X, y


def select_rows(X: Any, indices: Tensor, batch_size: int) -> Any:
    """Select some examples, as laplace-torch does, which makes dictionaries of them.

    Args:
        X: Inputs, or an entry of them.
        indices: Which examples.
        batch_size: Number of examples: what has as many rows has one for each.

    Returns:
        Their inputs, in a mapping of the same class.
    """
    rows = rows_of(X, indices, batch_size)
    return of_class(X, rows) if isinstance(X, MutableMapping) else rows


def of_class(X: MutableMapping, entries: dict[str, Any]) -> MutableMapping:
    """Return a mapping of the class of another, which has the same keys."""
    if type(X) is dict:
        return entries
    own = copy(X)
    own.update(entries)
    return own
