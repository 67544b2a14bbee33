"""Gradient and value of a loss on all data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from laplace_debiased.rows.inputs import Batch, check_targets, on_device
from laplace_debiased.rows.output_curvature import Loss, example_losses, num_terms
from laplace_debiased.rows.substitution import Substitution, run, stand_ins


def gradient_and_loss(
    model: nn.Module, loss_func: Loss, params: Sequence[Tensor], data: Iterable[Batch]
) -> tuple[list[Tensor], Tensor]:
    """Compute gradient and value of a loss on all data.

    Args:
        model: The network, whose parameters and gradients stay as they are.
        loss_func: The loss, whose mean is that over all data.
        params: The parameters to differentiate in.
        data: Batches ``(X, y)``.

    Returns:
        The gradient in each parameter, and the loss.

    Raises:
        ValueError: If targets are not valid.
    """
    device = params[0].device
    values = stand_ins(model, params)
    own = [values[id(param)] for param in params]
    total = torch.zeros((), dtype=params[0].dtype, device=device)
    gradients, count = [torch.zeros_like(value) for value in own], 0
    for X, y in data:
        X, y = on_device(X, device), y.to(device)
        with torch.enable_grad(), Substitution(values):
            output = run(model, X)
            y = check_targets(output, y, loss_func)
            loss = example_losses(loss_func, output, y).sum()
            parts = torch.autograd.grad(
                loss, own, allow_unused=True, materialize_grads=True
            )
        gradients = [a + b for a, b in zip(gradients, parts, strict=True)]
        total = total + loss.detach()
        count += num_terms(loss_func, output, y)
    scale = 1 / count if loss_func.reduction == "mean" else 1.0
    return [scale * gradient for gradient in gradients], scale * total
