"""Gradient and loss of a data source, which curvlinops' operators compute, too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from laplace_debiased.rows.batches import with_examples
from laplace_debiased.rows.inputs import Batch, check_targets, moved, on_device
from laplace_debiased.rows.output_curvature import (
    Loss,
    example_losses,
    is_counted,
    loss_scale,
)
from laplace_debiased.rows.substitution import Substitution, run, stand_ins
from laplace_debiased.rows.sweep import weights_of_batch


def gradient_and_loss(
    model: nn.Module,
    loss_func: Loss,
    params: Sequence[Tensor],
    data: Iterable[Batch],
    weights: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Compute gradient and loss.

    Args:
        model: The network.
        loss_func: The loss; an average is over all data.
        params: The parameters.
        data: Batches ``(X, y)``.
        weights: A weight for each example ``[examples]``, in the order of ``data``;
            None for ones.

    Returns:
        The gradient in each parameter, and the loss.

    Raises:
        ValueError: If outputs or targets are not valid, none of them counts in an
            average, there are not as many weights as examples, or weights are negative
            or all zero.
    """
    values, device = stand_ins(model, params), params[0].device
    own = [values[id(param)] for param in params]
    total = torch.zeros((), dtype=params[0].dtype, device=device)
    gradients, num_outputs = [torch.zeros_like(value) for value in own], 1
    num_data, total_weight = 0, 0.0
    for X, y in with_examples(data):
        X, y = on_device(X, device), moved(y, device)
        share = moved(weights_of_batch(weights, num_data, len(y)), device)
        with torch.enable_grad(), Substitution(values):
            output = run(model, X)
            y = check_targets(output, y, loss_func)
            losses = example_losses(loss_func, output, y)
            loss = (share.to(losses.dtype) * losses).sum()
            parts = torch.autograd.grad(
                loss, own, allow_unused=True, materialize_grads=True
            )
        gradients = [a + b for a, b in zip(gradients, parts, strict=True)]
        total, num_outputs = total + loss.detach(), output.shape[1]
        total_weight += (share.double() * is_counted(loss_func, y)).sum().item()
        num_data += len(y)
    if weights is not None and len(weights) != num_data:
        raise ValueError(
            f"Got {len(weights)} weights for {num_data} examples: one each is needed."
        )
    scale = loss_scale(loss_func, total_weight, num_outputs)
    return [scale * gradient for gradient in gradients], scale * total
