"""Inputs, outputs and targets: where they are, and what is refused."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import CrossEntropyLoss

from laplace_debiased.rows.positions import num_positions

Inputs = Tensor | MutableMapping[str, Any]
# what a data source yields: inputs and targets, with a row for each example
Batch = tuple[Inputs, Tensor]
# of probabilities, which half precision rounds
_SUM_TOLERANCE = 1e-2


def on_device(X: Inputs, device: torch.device) -> Inputs:
    """Move inputs to a device, unless they are a mapping: the model itself moves those.

    Args:
        X: A batch of inputs.
        device: The device.

    Returns:
        The inputs.
    """
    return X.to(device) if isinstance(X, Tensor) else X


def num_examples(X: Inputs, key: str) -> int:
    """Count examples.

    Args:
        X: Inputs, a tensor or a mapping.
        key: Key of the inputs in mappings; if there is none such, all tensors must have
            a row for each example.

    Returns:
        Their number.

    Raises:
        ValueError: If a mapping does not tell.
    """
    if isinstance(X, Tensor):
        return len(X)
    if key in X:
        return len(X[key])
    tensors = [v for v in X.values() if isinstance(v, Tensor) and v.ndim > 0]
    sizes = {len(tensor) for tensor in tensors}
    if len(sizes) != 1:
        raise ValueError(
            f"The inputs have keys {list(X)}, of which none is `dict_key_x` {key!r}: "
            "pass the key whose rows are the examples."
        )
    return sizes.pop()


def at_least_single(tensor: Tensor) -> Tensor:
    """Turn half precision, in which a confident model's curvature is lost, into single.

    Args:
        tensor: The tensor.

    Returns:
        The tensor in single precision if it was in half, otherwise itself.
    """
    is_half = tensor.is_floating_point() and tensor.dtype.itemsize < 4
    return tensor.float() if is_half else tensor


def check_is_batch(y: Any) -> None:
    """Refuse what are the targets of one example, rather than of a batch.

    Args:
        y: Targets.

    Raises:
        ValueError: If they have no rows.
    """
    has_rows = y.ndim > 0 if isinstance(y, Tensor) else hasattr(y, "__len__")
    if not has_rows:
        raise ValueError(
            "The loader yields single examples, as with `batch_size=None`: give it a "
            "`batch_size`, so that inputs and targets have a row for each example."
        )


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
            f"of {batch_size}, got {tuple(output.shape)}. If there are outputs of "
            "several positions, `class_axis` says which axis has the classes."
        )
    if not output.isfinite().all():
        raise ValueError("The model's output contains NaN or infinite entries.")


def check_finite_predictions(*predictions: Tensor) -> None:
    """Refuse predictions with NaN or infinite entries.

    Args:
        *predictions: Means, covariances, probabilities or samples.

    Raises:
        ValueError: If an entry is not finite.
    """
    if not all(prediction.isfinite().all() for prediction in predictions):
        raise ValueError(
            "Predictions contain NaN or infinite entries: check the inputs, and the "
            "model's own output for them."
        )


def check_targets(output: Tensor, y: Tensor, loss_func: nn.Module) -> Tensor:
    """Refuse outputs and targets that a loss cannot compare.

    Args:
        output: Network output.
        y: Targets, by position if the output has some.
        loss_func: The loss.

    Returns:
        The targets.

    Raises:
        ValueError: If the output is not ``[batch, outputs]`` and finite, or the
            targets have a wrong shape, dtype or range.
    """
    check_output(output, len(y))
    count = num_positions(y)
    if count > 1 and output.shape[1] % count == 0:
        points = output.reshape(len(output) * count, -1)
        return check_targets(points, y.flatten(0, 1), loss_func).unflatten(
            0, (-1, count)
        )
    is_cross_entropy = isinstance(loss_func, CrossEntropyLoss)
    if is_cross_entropy and output.shape[1] == 1:
        raise ValueError(
            "The model has one output, whose softmax is always one. For two classes, "
            "give it two, such as `torch.cat([torch.zeros_like(logit), logit], 1)` of "
            "the logit of the second, and targets of shape [batch] that are 0 or 1."
        )
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
    if is_cross_entropy:
        _check_probabilities(y)
    return y


def _check_probabilities(y: Tensor) -> None:
    """Refuse what cross-entropy takes, but is no distribution over classes."""
    sums = y.double().sum(1)
    if ((y < 0).any(1) | ((sums - 1).abs() > _SUM_TOLERANCE)).any():
        raise ValueError(
            "Targets that are probabilities must be at least zero and sum to one, got "
            f"{y.min().item():g} at least, and sums of {sums.min().item():g} to "
            f"{sums.max().item():g}. Labels that do not exclude each other, which "
            "`BCEWithLogitsLoss` is for, have no posterior: "
            "`DebiasedKFACLinearOperator` knows the curvature of that loss."
        )


def _checked_classes(y: Tensor, num_outputs: int, ignore_index: int) -> Tensor:
    """Refuse what are no class indices, and return them as ``long``."""
    if y.ndim != 1 or y.dtype == torch.bool:
        raise ValueError(
            "Targets for classification must be class indices of shape [batch] and "
            f"integer dtype, got shape {tuple(y.shape)} and {y.dtype}."
        )
    is_class = (y >= 0) & (y < num_outputs)
    if not (is_class | (y == ignore_index)).all():
        raise ValueError(
            f"Class indices must lie in 0..{num_outputs - 1}, the model's outputs, or "
            f"be the loss's `ignore_index` {ignore_index}, got "
            f"{y.min().item()}..{y.max().item()}."
        )
    return y.long()
