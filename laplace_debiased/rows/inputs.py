"""Inputs, outputs and targets: where they are, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import BCEWithLogitsLoss, CrossEntropyLoss

from laplace_debiased.rows.positions import num_positions
from laplace_debiased.rows.targets import label_targets
from laplace_debiased.rows.user_warnings import warn_user

Inputs = Tensor | MutableMapping[str, Any]
# what a data source yields: inputs and targets, with a row for each example
Batch = tuple[Inputs, Tensor]
# refuses data with a message, if a tensor with one truth value does not hold
Require = Callable[[Tensor, Callable[[], str]], None]
# devices whose results are there at once, so that a look at them costs nothing
_AT_ONCE = ("cpu",)
NEED_EXAMPLES = "Inputs have a row for each example: `x[None]` is a batch of one."
# of probabilities, which half precision rounds
_SUM_TOLERANCE = 1e-2


def all_finite(tensor: Tensor) -> Tensor:
    """Tell whether a tensor has no NaN or infinite entries.

    Args:
        tensor: The tensor.

    Returns:
        A truth value on its device. The smallest and the largest entry tell, without a
        mask of all.
    """
    if tensor.numel() == 0 or tensor.is_complex():
        return tensor.isfinite().all()
    return torch.stack(torch.aminmax(tensor.detach())).isfinite().all()


def check_inputs(X: Any) -> None:
    """Refuse what cannot be the inputs of a network.

    Args:
        X: A batch of inputs.

    Raises:
        TypeError: If it is no tensor and no mapping.
    """
    if not isinstance(X, Tensor | MutableMapping):
        raise TypeError(
            "Inputs must be a tensor, or a mapping for networks with several, got "
            f"{type(X).__name__}."
        )


def on_device(X: Inputs, device: torch.device) -> Inputs:
    """Move inputs to a device.

    Args:
        X: A batch of inputs, a tensor or a mapping.
        device: The device.

    Returns:
        The inputs. A mapping whose tensors change is copied: its owner's stays.

    Raises:
        TypeError: If they are something else.
    """
    check_inputs(X)
    if isinstance(X, Tensor):
        return moved(X, device)
    tensors = {key: own for key, own in X.items() if isinstance(own, Tensor)}
    changed = {key: moved(own, device) for key, own in tensors.items()}
    if all(changed[key] is own for key, own in tensors.items()):
        return X
    X = copy(X)
    X.update(changed)
    return X


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to a device, without waiting until it is there if that is safe.

    A copy to the host is not: it could be read before it is complete.

    Args:
        tensor: The tensor.
        device: The device.

    Returns:
        The tensor, which is copied in the background if it is to a GPU; that of pinned
        memory goes on while the host works. One that was made in
        ``torch.inference_mode()``, which no gradient is computed through, is copied.
    """
    there = tensor.to(device, non_blocking=device.type == "cuda")
    return there.clone() if there.is_inference() else there


def warn_of_autocast(device: torch.device) -> None:
    """Warn of mixed precision that is not the network's alone.

    Args:
        device: The network's device.
    """
    if torch.is_autocast_enabled(device.type):
        warn_user(
            "`torch.autocast` is on around the fit: sums of squared rows are rounded, "
            "too, and small eigenvalues are lost. Let it begin in the network's own "
            "`forward`; factors are then in single precision."
        )


def require(holds: Tensor | bool, message: Callable[[], str]) -> None:
    """Refuse data that do not satisfy a condition.

    Args:
        holds: Whether they do, a truth value or a tensor with one.
        message: What is said if not.

    Raises:
        ValueError: If they do not.
    """
    if not holds:
        raise ValueError(message())


class Requirements:
    """Conditions on the batches of a pass.

    On the host they are looked at when they are made. A look at what a device computes
    would stop the host until it is done, so that the device would wait for the next
    batch: those are looked at together, after the last batch.
    """

    def __init__(self) -> None:
        self._open: list[tuple[Tensor, Callable[[], str]]] = []

    def add(self, holds: Tensor, message: Callable[[], str]) -> None:
        """Require a condition, as :func:`require` does."""
        if holds.device.type in _AT_ONCE:
            require(holds, message)
        else:
            self._open.append((holds, message))

    def check(self) -> None:
        """Look at all conditions that are still open.

        Raises:
            ValueError: If one does not hold; of several, the first one counts.
        """
        if not self._open:
            return
        device = self._open[0][0].device
        all_hold = torch.stack([moved(holds, device) for holds, _ in self._open])
        for holds, (_, message) in zip(all_hold.tolist(), self._open, strict=True):
            require(holds, message)
        self._open.clear()


def num_examples(X: Inputs, key: str) -> int:
    """Count examples.

    Args:
        X: Inputs, a tensor or a mapping.
        key: Key of the inputs in mappings; if there is none such, all tensors must have
            a row for each example.

    Returns:
        Their number.

    Raises:
        TypeError: If they are neither.
        ValueError: If a mapping does not tell.
    """
    check_inputs(X)
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


def check_finite_inputs(X: Inputs, require: Require = require) -> None:
    """Refuse inputs with NaN or infinite entries.

    Args:
        X: A batch of inputs.
        require: Refuses them, at once or later.

    Raises:
        ValueError: If an entry is not finite.
    """
    tensors = X.values() if isinstance(X, MutableMapping) else [X]
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            require(
                all_finite(tensor),
                lambda: "Inputs contain NaN or infinite entries.",
            )


def check_output(output: Tensor, batch_size: int, require: Require = require) -> None:
    """Refuse outputs that are no finite matrix with a row for each example.

    Args:
        output: Network output.
        batch_size: Number of examples.
        require: Refuses entries that are not finite, at once or later.

    Raises:
        ValueError: If the output is not ``[batch, outputs]``, real and finite.
    """
    if output.ndim != 2 or output.shape[0] != batch_size:
        raise ValueError(
            f"The model's output must have shape [{batch_size}, outputs] for a batch "
            f"of {batch_size}, got {tuple(output.shape)}. If there are outputs of "
            "several positions, `class_axis` says which axis has the classes."
        )
    if output.is_complex():
        raise ValueError(
            "The model's output is complex: let it return real numbers, such as by "
            "`torch.view_as_real`."
        )
    require(
        all_finite(output),
        lambda: "The model's output contains NaN or infinite entries.",
    )


def check_finite_predictions(*predictions: Tensor) -> None:
    """Refuse predictions with NaN or infinite entries.

    Args:
        *predictions: Means, covariances, probabilities or samples.

    Raises:
        ValueError: If an entry is not finite.
    """
    are_finite = torch.stack([all_finite(own) for own in predictions]).all()
    require(
        are_finite,
        lambda: (
            "Predictions contain NaN or infinite entries: check the inputs, the "
            "model's own output for them, and that the prior precision is not zero."
        ),
    )


def check_targets(
    output: Tensor, y: Tensor, loss_func: nn.Module, require: Require = require
) -> Tensor:
    """Refuse outputs and targets that a loss cannot compare.

    Args:
        output: Network output.
        y: Targets, by position if the output has some.
        loss_func: The loss.
        require: Refuses values, at once or later. Shapes and dtypes are at once.

    Returns:
        The targets, those that are no class replaced by the first one until they are
        refused.

    Raises:
        ValueError: If the output is not ``[batch, outputs]`` and finite, or the
            targets have a wrong shape, dtype or range.
    """
    check_output(output, len(y), require)
    y = label_targets(y, loss_func)
    count = num_positions(y)
    if count > 1 and output.shape[1] % count == 0:
        points = output.reshape(len(output) * count, -1)
        y = check_targets(points, y.flatten(0, 1), loss_func, require)
        return y.unflatten(0, (-1, count))
    is_cross_entropy = isinstance(loss_func, CrossEntropyLoss)
    if is_cross_entropy and output.shape[1] == 1:
        raise ValueError(
            "The model has one output, whose softmax is always one. If it is the logit "
            "of a label that is 0 or 1, its loss is `BCEWithLogitsLoss`, and its "
            "posterior `Laplace(model, 'binary_classification', ...)`."
        )
    if isinstance(loss_func, CrossEntropyLoss) and not y.is_floating_point():
        ignored = loss_func.ignore_index
        return _checked_classes(y, output.shape[1], ignored, require)
    if y.shape != output.shape or not y.is_floating_point():
        kind = (
            "class indices [batch] of integer dtype, or probabilities"
            if is_cross_entropy
            else "floating-point"
        )
        raise ValueError(
            f"Targets must be {kind} of the output's shape {tuple(output.shape)}: the "
            f"output has {output.ndim} dims, the target {y.ndim}, of shape "
            f"{tuple(y.shape)} and {y.dtype}"
            + ("." if is_cross_entropy else "; a vector counts as a column.")
        )
    require(all_finite(y), lambda: "Targets contain NaN or infinite entries.")
    if is_cross_entropy:
        _check_probabilities(y, require)
    if isinstance(loss_func, BCEWithLogitsLoss):
        _check_labels(y, require)
        # the loss computes in the dtype of the targets
        return y.to(torch.promote_types(y.dtype, output.dtype))
    return y


def _check_probabilities(y: Tensor, require: Require) -> None:
    """Refuse what cross-entropy takes, but is no distribution over classes."""
    sums = y.double().sum(1)
    require(
        ~((y < 0).any(1) | ((sums - 1).abs() > _SUM_TOLERANCE)).any(),
        lambda: (
            "Targets that are probabilities must be at least zero and sum to one, "
            f"got {y.min().item():g} at least, and sums of {sums.min().item():g} to "
            f"{sums.max().item():g}. Labels that do not exclude each other are for "
            "`BCEWithLogitsLoss`, and their posterior is "
            "`Laplace(model, 'binary_classification', ...)`."
        ),
    )


def _check_labels(y: Tensor, require: Require) -> None:
    """Refuse what binary cross-entropy takes, but is no probability."""
    require(
        ((y >= 0) & (y <= 1)).all(),
        lambda: (
            "Labels must be 0 or 1, or probabilities between them, got "
            f"{y.min().item():g}..{y.max().item():g}. Labels that are missing cannot "
            "be left out."
        ),
    )


def _checked_classes(
    y: Tensor, num_outputs: int, ignore_index: int, require: Require
) -> Tensor:
    """Refuse what are no class indices, and return them as ``long``."""
    if y.ndim != 1 or y.dtype == torch.bool:
        raise ValueError(
            "Targets for classification must be class indices of shape [batch] and "
            f"integer dtype, got shape {tuple(y.shape)} and {y.dtype}."
        )
    is_valid = ((y >= 0) & (y < num_outputs)) | (y == ignore_index)
    require(
        is_valid.all(),
        lambda: (
            f"Class indices must lie in 0..{num_outputs - 1}, the model's outputs, "
            f"or be the loss's `ignore_index` {ignore_index}, got "
            f"{y.min().item()}..{y.max().item()}."
        ),
    )
    return y.long().masked_fill(~is_valid, 0)
