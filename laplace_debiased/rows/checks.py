"""Checks of arguments: choices, integers, ranges."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


def plain_text(value: Any) -> str:
    """Return a text, also that of a member of an enumeration of texts.

    laplace-torch and curvlinops take either. Both are equal, but ``str`` of a member is
    its name.

    Args:
        value: The text, or the member.

    Returns:
        The text.
    """
    return str(getattr(value, "value", value))


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Refuse what is none of several texts.

    Args:
        name: The argument's name.
        value: Its value.
        choices: The texts.

    Raises:
        ValueError: If it is none of them.
    """
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {choices}, got {value!r}.")


def check_integer(name: str, value: Any, smallest: int | None = None) -> None:
    """Refuse what is no integer, or too small a one.

    Args:
        name: The argument's name.
        value: Its value. NumPy's integers are integers, too; booleans are not meant.
        smallest: The smallest value allowed.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it is too small.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be an int, got {value!r}.")
    if smallest is not None and value < smallest:
        raise ValueError(f"`{name}` must be at least {smallest}, got {value}.")


def check_between(name: str, value: Any, interval: str) -> None:
    """Refuse what is no number of an interval.

    Args:
        name: The argument's name.
        value: Its value.
        interval: The interval as in mathematics, such as ``"(0, 1]"``.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is not in the interval.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
    low, high = map(float, interval[1:-1].split(","))
    number = float(value)
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    if not (above and below):
        raise ValueError(f"`{name}` must lie in {interval}, got {value}.")


def check_positive(name: str, value: float | Tensor) -> None:
    """Refuse numbers that are not finite and above zero.

    Args:
        name: The argument's name.
        value: Its value.

    Raises:
        TypeError: If it is no number, nor several.
        ValueError: If one is not finite and above zero.
    """
    try:
        values = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"`{name}` must be a number, got {value!r}.") from error
    if not (values.isfinite() & (values > 0)).all():
        raise ValueError(f"`{name}` must be finite and above zero, got {value}.")
