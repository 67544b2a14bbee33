"""Inputs, outputs and targets: where they are, and what is refused."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import CrossEntropyLoss

Inputs = Tensor | MutableMapping[str, Any]
# what a data source yields: inputs and targets, with a row for each example
Batch = tuple[Inputs, Tensor]


def on_device(X: Inputs, device: torch.device) -> Inputs:
    """Move inputs to a device, unless they are a mapping: the model itself moves those.

    Args:
        X: A batch of inputs.
        device: The device.

    Returns:
        The inputs.
    """
    return X.to(device) if isinstance(X, Tensor) else X


def at_least_single(tensor: Tensor) -> Tensor:
    """Turn half precision, in which a confident model's curvature is lost, into single.

    Args:
        tensor: The tensor.

    Returns:
        The tensor in single precision if it was in half, otherwise itself.
    """
    is_half = tensor.is_floating_point() and tensor.dtype.itemsize < 4
    return tensor.float() if is_half else tensor


def check_finite_inputs(X: Inputs) -> None:
    """Refuse inputs with NaN or infinite entries.

    Args:
        X: A batch of inputs.

    Raises:
        ValueError: If an entry is not finite.
    """
    tensors = X.values() if isinstance(X, MutableMapping) else [X]
    for tensor in tensors:
        if isinstance(tensor, Tensor) and not tensor.isfinite().all():
            raise ValueError("Inputs contain NaN or infinite entries.")


def check_output(output: Tensor, batch_size: int) -> None:
    """Refuse outputs that are no finite matrix with a row for each example.

    Args:
        output: Network output.
        batch_size: Number of examples.

    Raises:
        ValueError: If the output is not ``[batch, outputs]`` and finite.
    """
    if output.ndim != 2 or output.shape[0] != batch_size:
        raise ValueError(
            f"The model's output must have shape [{batch_size}, outputs] for a batch "
            f"of {batch_size}, got {tuple(output.shape)}."
        )
    if not output.isfinite().all():
        raise ValueError("The model's output contains NaN or infinite entries.")


def check_targets(output: Tensor, y: Tensor, loss_func: nn.Module) -> Tensor:
    """Refuse outputs and targets that a loss cannot compare.

    Args:
        output: Network output.
        y: Targets.
        loss_func: The loss.

    Returns:
        The targets.

    Raises:
        ValueError: If the output is not ``[batch, outputs]`` and finite, or the
            targets have a wrong shape, dtype or range.
    """
    check_output(output, len(y))
    is_cross_entropy = isinstance(loss_func, CrossEntropyLoss)
    if isinstance(loss_func, CrossEntropyLoss) and not y.is_floating_point():
        return _checked_classes(y, output.shape[1], loss_func.ignore_index)
    if y.shape != output.shape or not y.is_floating_point():
        kind = (
            "class indices [batch] of integer dtype, or probabilities"
            if is_cross_entropy
            else "floating-point"
        )
        raise ValueError(
            f"Targets must be {kind} of the output's shape {tuple(output.shape)}: the "
            f"output has {output.ndim} dims, the target {y.ndim}, of shape "
            f"{tuple(y.shape)} and {y.dtype}."
        )
    if not y.isfinite().all():
        raise ValueError("Targets contain NaN or infinite entries.")
    return y


def _checked_classes(y: Tensor, num_outputs: int, ignore_index: int) -> Tensor:
    """Refuse what are no class indices, and return them as ``long``."""
    if y.ndim != 1 or y.dtype == torch.bool:
        raise ValueError(
            "Targets for classification must be class indices of shape [batch] and "
            f"integer dtype, got shape {tuple(y.shape)} and {y.dtype}."
        )
    y = y.long()
    classes = y[y != ignore_index]
    if len(classes) and (classes.min() < 0 or classes.max() >= num_outputs):
        raise ValueError(
            f"Class indices must lie in 0..{num_outputs - 1}, the model's outputs, or "
            f"be the loss's `ignore_index` {ignore_index}, got "
            f"{classes.min().item()}..{classes.max().item()}."
        )
    return y
