"""Targets in the form that a loss takes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import BCEWithLogitsLoss, CrossEntropyLoss

from laplace_debiased.rows.positions import class_axis_of, flat_targets


def label_targets(y: Tensor, loss_func: nn.Module) -> Tensor:
    """Turn labels, and numbers, into what a loss of each output takes.

    Args:
        y: Targets; labels may be integers or booleans, and those of one label, or of
            one output of a regression, ``[batch]``.
        loss_func: The loss.

    Returns:
        The targets; labels as floating-point numbers, and those of one output as a
        column.
    """
    if isinstance(loss_func, CrossEntropyLoss):
        return y
    if isinstance(loss_func, BCEWithLogitsLoss) and not y.is_floating_point():
        y = y.to(torch.get_default_dtype())
    return y[:, None] if y.ndim == 1 else y


def arranged_targets(model: nn.Module, y: Tensor, loss_func: nn.Module) -> Tensor:
    """Arrange targets as a network's outputs are.

    Args:
        model: The network, which may have positions.
        y: Targets.
        loss_func: The loss.

    Returns:
        As :func:`~laplace_debiased.rows.positions.flat_targets`, of
        :func:`label_targets`.
    """
    return flat_targets(model, label_targets(y, loss_func))


def classes_of(targets: Sequence[Tensor], loss_func: nn.Module) -> Tensor | None:
    """Return the class of each example, if it has one.

    Args:
        targets: Arranged targets of batches.
        loss_func: The loss.

    Returns:
        The classes ``[examples]``, one label's among them; None if examples have no
        class, or several.
    """
    if not targets[-1].is_floating_point():
        is_single = all(y.ndim == 1 for y in targets)
        return torch.cat(list(targets)) if is_single else None
    is_single = all(y.shape[1:] == (1,) for y in targets)
    if not isinstance(loss_func, BCEWithLogitsLoss) or not is_single:
        return None
    label = torch.cat(list(targets))[:, 0]
    return label.long() if ((label == 0) | (label == 1)).all() else None


def targets_of_points(
    model: nn.Module, y: Tensor, loss_func: nn.Module, output: Tensor
) -> Tensor:
    """Arrange targets with each position as an example.

    Args:
        model: The network, which may have positions.
        y: Targets.
        loss_func: The loss.
        output: The network's output ``[batch * positions, outputs]``.

    Returns:
        Classes ``[batch * positions]``, or values of the output's shape.
    """
    y = arranged_targets(model, y, loss_func)
    if class_axis_of(model) is None:
        return y
    return y.reshape(output.shape if y.is_floating_point() else output.shape[:1])
