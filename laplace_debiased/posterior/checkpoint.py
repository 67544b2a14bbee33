"""Checkpoints: files that are never halves, flat states, values of declared types.

Like that of a torch module, a state is a flat dictionary whose keys are paths, such as
``seen.weight`` or ``layers.0.name``: its values are tensors, numbers, texts, and lists
or tuples of them, as in laplace-torch's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from pickle import UnpicklingError
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor


def write(saved: Any, path: str | os.PathLike[str]) -> None:
    """Write a file beside, and put it in the place of the former one once it is safe.

    Whoever reads the file, also after a crash, finds the former or the new one. What
    is killed while it writes leaves a hidden file ``.NAME.*.part``.

    Args:
        saved: What ``torch.save`` takes.
        path: The file.
    """
    target = Path(os.path.realpath(path))
    part = target.with_name(f".{target.name}.{uuid4().hex}.part")
    try:
        with part.open("xb") as file:
            torch.save(saved, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Let the folder's entries survive a loss of power, where it can be asked for."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: str | os.PathLike[str], device: torch.device) -> dict[str, Any]:
    """Read a file of plain values and tensors.

    Args:
        path: The file.
        device: Where its tensors are needed.

    Returns:
        The dictionary that it holds.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or holds something else.
    """
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
    except (FileNotFoundError, PermissionError):
        raise
    except (RuntimeError, OSError, EOFError, KeyError, UnpicklingError) as error:
        raise ValueError(
            f"{os.fspath(path)} is no readable checkpoint: it is damaged, or holds "
            "more than plain values and tensors."
        ) from error
    if not isinstance(saved, dict):
        raise ValueError(
            f"{os.fspath(path)} holds a {type(saved).__name__}, not a state."
        )
    return saved


def on_device(state: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Move a flat state's tensors.

    Args:
        state: The state.
        device: Where they are needed.

    Returns:
        The state, with its tensors there.
    """
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in state.items()}


def flat(value: dict | list, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield what nested dictionaries hold, and lists of them, with the paths to it.

    Args:
        value: The dictionaries, with strings for keys.
        path: The keys that lead to them.

    Yields:
        Paths and values, NumPy's numbers as Python's.
    """
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        own = (*path, str(key))
        if _has_dictionaries(item):
            yield from flat(item, own)
        else:
            yield ".".join(own), _plain(item)


def _plain(value: Any) -> Any:
    """Return numbers that may be NumPy's, which files must not hold, as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (list, tuple):
        return type(value)(_plain(item) for item in value)
    return value


def _has_dictionaries(value: Any) -> bool:
    return isinstance(value, dict) or (
        isinstance(value, list) and any(_has_dictionaries(item) for item in value)
    )


def nested(state: Mapping[str, Any]) -> dict[str, Any]:
    """Undo :func:`flat`: what has numbers for keys was a list.

    Args:
        state: Values by their paths.

    Returns:
        Nested dictionaries, and lists of them.

    Raises:
        ValueError: If a path leads through a value.
    """
    entries: dict[str, Any] = {}
    for path, value in state.items():
        *outer, last = str(path).split(".")
        inner = entries
        for key in outer:
            inner = inner.setdefault(key, {})
            if not isinstance(inner, dict):
                raise ValueError(f"`state_dict` has both {key!r} and {path!r}.")
        inner[last] = value
    return {key: _with_lists(value) for key, value in entries.items()}


def _with_lists(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    items = {key: _with_lists(item) for key, item in value.items()}
    if all(key.isdecimal() for key in items):
        return [items[key] for key in sorted(items, key=int)]
    return items


def check_type(kind: Any, value: Any, name: str, bounded: bool = True) -> None:
    """Refuse a value that is not of a declared type, or holds what is no number.

    Args:
        kind: The type: a basic one, ``Tensor``, one or None, a sequence of a type, or
            a dataclass, whose fields the value has.
        value: The value.
        name: Its name in messages.
        bounded: Whether infinity is refused, too.

    Raises:
        ValueError: If the value is of another type, or not finite.
    """
    if get_origin(kind) in (Union, UnionType):
        if value is None and NoneType in get_args(kind):
            return
        (kind,) = (option for option in get_args(kind) if option is not NoneType)
    if is_dataclass(kind):
        _check_fields(kind, value, name, bounded)
    elif get_origin(kind) is not None:
        if not isinstance(value, list | tuple):
            raise ValueError(_refused(name, "a list", value))
        for index, part in enumerate(value):
            check_type(get_args(kind)[0], part, f"{name}[{index}]", bounded)
    elif type(value) is not kind and (kind, type(value)) != (float, int):
        raise ValueError(_refused(name, f"a {kind.__name__}", value))
    elif isinstance(value, Tensor | float):
        number = torch.as_tensor(value)
        if not (number.isfinite() if bounded else ~number.isnan()).all():
            kinds = "NaN or infinite" if bounded else "NaN"
            raise ValueError(f"`state_dict` has {kinds} entries as {name}.")


def _check_fields(kind: Any, value: Any, name: str, bounded: bool) -> None:
    """Check the fields of a dataclass, given by name or, in a tuple, by order."""
    names = [field.name for field in fields(kind)]
    if isinstance(value, tuple) and len(value) == len(names):
        value = dict(zip(names, value, strict=True))
    if not isinstance(value, Mapping):
        raise ValueError(_refused(name, f"a {kind.__name__}", value))
    if set(value) != set(names):
        raise ValueError(
            f"`state_dict` has {sorted(map(str, value))} as {name}, not "
            f"{sorted(names)}."
        )
    hints = get_type_hints(kind)
    for key in names:
        check_type(hints[key], value[key], f"{name}.{key}", bounded)


def is_same(value: Any, own: Any) -> bool:
    """Whether a value from a checkpoint, be it damaged, is a plain one."""
    return type(value) is type(own) and value == own


def check_tensor(
    value: Tensor, name: str, shape: Sequence[int], dtype: torch.dtype
) -> None:
    """Refuse a tensor of another shape or dtype.

    Args:
        value: The tensor.
        name: Its name in messages.
        shape: The shape.
        dtype: The dtype.

    Raises:
        ValueError: If either differs.
    """
    if tuple(value.shape) != tuple(shape) or value.dtype != dtype:
        raise ValueError(
            f"`state_dict` has a tensor of shape {tuple(value.shape)} in {value.dtype} "
            f"as {name}, not {tuple(shape)} in {dtype}."
        )


def _refused(name: str, expected: str, value: Any) -> str:
    return f"`state_dict` has a {type(value).__name__} as {name}, not {expected}."
