"""Batches of a data source, whose networks need examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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
