"""Outputs with positions: tokens of a sentence, pixels of an image.

A network may return a row of outputs for each position of an example: ``[batch, ...,
classes]``, or with the classes on another axis, as torch's cross-entropy takes them
(``[batch, classes, height, width]``). All that runs it gets a matrix of ``[batch,
positions * classes]``: these are the outputs of an example. Only the loss, and
probabilities, know of positions.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from typing import ParamSpec, TypeVar

from torch import Tensor, nn

from laplace_debiased.rows.sharing import thread_restored

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
# where a network keeps which axis of its output has the classes
_ATTRIBUTE = "_laplace_class_axis"
# whether networks are run for what is no posterior's
_is_ignored = ContextVar("_is_ignored", default=False)


def set_class_axis(model: nn.Module, axis: int | None) -> None:
    """Say which axis of a network's output has the classes.

    Args:
        model: The network.
        axis: The axis; None if its output is a matrix.
    """
    if axis is not None:
        setattr(model, _ATTRIBUTE, axis)
    elif hasattr(model, _ATTRIBUTE):
        delattr(model, _ATTRIBUTE)


def class_axis_of(model: nn.Module) -> int | None:
    """Return what :func:`set_class_axis` set, unless it is to be ignored."""
    return None if _is_ignored.get() else getattr(model, _ATTRIBUTE, None)


def standalone(
    function: Callable[Parameters, Result],
) -> Callable[Parameters, Result]:
    """Let a function run networks as if no posterior of theirs had a class axis.

    Args:
        function: The function, which runs them before it returns.

    Returns:
        The function, which also leaves its thread as it was.
    """

    @thread_restored
    @wraps(function)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        token = _is_ignored.set(True)
        try:
            return function(*args, **kwargs)
        finally:
            _is_ignored.reset(token)

    return run


def flat_output(model: nn.Module, output: Tensor) -> Tensor:
    """Arrange a network's output as a matrix, and one number of each as a column.

    Args:
        model: The network.
        output: Its output.

    Returns:
        The output ``[batch, positions * classes]`` if its class axis is set; else, and
        if it is a matrix, as it is.
    """
    if output.ndim < 2:  # of one example, a network that squeezes makes a scalar
        return output.reshape(-1, 1)
    axis = class_axis_of(model)
    if axis is None or output.ndim < 3:
        return output
    return output.movedim(axis, -1).flatten(1)


def flat_targets(model: nn.Module, y: Tensor) -> Tensor:
    """Arrange targets by position, as :func:`flat_output` does outputs.

    Args:
        model: The network.
        y: Class indices ``[batch, ...]``, or values of its output's shape.

    Returns:
        Class indices ``[batch, positions]``, or values ``[batch, positions, classes]``;
        those of a matrix as they are.

    Raises:
        ValueError: If they have positions, and the network has no class axis.
    """
    axis = class_axis_of(model)
    if axis is None:
        if num_positions(y) > 1:
            raise ValueError(
                "Targets must be class indices [batch], or values [batch, outputs] of "
                f"floating-point dtype, got {y.dtype} of shape {tuple(y.shape)}. If "
                "the model has outputs for each position of an input, such as a token "
                "or pixel, say by `class_axis` which axis has the classes."
            )
        return y
    if not y.is_floating_point():
        y = y.flatten(1) if y.ndim > 1 else y
    elif y.ndim > 2:
        y = y.movedim(axis, -1).flatten(1, -2)
    else:
        return y
    return y.squeeze(1) if y.shape[1:2] == (1,) else y


def check_positions(y: Tensor, shape: tuple[int, ...], axis: int) -> None:
    """Refuse targets that are not those of a network's positions.

    Args:
        y: Targets.
        shape: Shape of the network's output.
        axis: Its axis of classes.

    Raises:
        ValueError: If they have another shape, or there is no such axis.
    """
    if axis == 0 or not -len(shape) < axis < len(shape):
        raise ValueError(
            f"`class_axis` must be an axis of the model's output {shape} after the "
            f"first, got {axis}."
        )
    expected = list(shape)
    if not y.is_floating_point():
        del expected[axis if len(shape) > 2 else 1]
    if list(y.shape) != expected:
        raise ValueError(
            f"Targets must have shape {expected} for outputs of shape {list(shape)}, "
            f"whose classes are on axis {axis}, got {list(y.shape)}."
        )


def num_positions(target: Tensor) -> int:
    """Return the number of positions that arranged targets have, one of a matrix."""
    has_positions = target.ndim == (3 if target.is_floating_point() else 2)
    return target.shape[1] if has_positions else 1


def points(outputs: Tensor, num_classes: int) -> Tensor:
    """Turn each position into an example.

    Args:
        outputs: Outputs ``[batch, positions * classes]``.
        num_classes: Number of classes.

    Returns:
        The outputs ``[batch * positions, classes]``.
    """
    return outputs.reshape(-1, num_classes)


def restored(values: Tensor, shape: tuple[int, ...], axis: int | None) -> Tensor:
    """Give values the shape of a network's output.

    Args:
        values: Values ``[batch * positions]``, or with a last axis of classes.
        shape: Shape of the output.
        axis: Its axis of classes.

    Returns:
        The values in the output's order of axes; those of positions without the axis of
        classes.
    """
    if axis is None or len(shape) < 3:
        return values
    sizes = list(shape)
    del sizes[axis]
    if values.ndim == 1:
        return values.view(sizes)
    return values.view(*sizes, -1).movedim(-1, axis)
