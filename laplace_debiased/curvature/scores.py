"""Scores by which points are drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from laplace_debiased.rows.batches import with_examples
from laplace_debiased.rows.inputs import Batch, on_device
from laplace_debiased.rows.model_state import check_repeatable
from laplace_debiased.rows.output_curvature import (
    Loss,
    OutputCurvature,
    ends_in_link,
)
from laplace_debiased.rows.positions import standalone
from laplace_debiased.rows.separation import check_outputs
from laplace_debiased.rows.sweep import Nothing, sweep
from laplace_debiased.rows.user_warnings import warn_user


@standalone
def curvature_scores(
    model_func: nn.Module, loss_func: Loss, data: Iterable[Batch]
) -> Tensor:
    r"""Compute the trace of each point's loss curvature in the output.

    A point's curvature is :math:`J_n^\top \Lambda_n J_n`, and the trace of
    :math:`\Lambda_n` tells its scale by a forward pass alone. After training, few
    points have most of it. With
    :func:`~laplace_debiased.sampling.draw.draw_points`, they give points and
    weights for
    :class:`~laplace_debiased.curvature.operator.DebiasedKFACLinearOperator`.

    Args:
        model_func: The neural network, with output ``[batch, outputs]``; layers with
            batch statistics or dropout must be in eval mode.
        loss_func: ``MSELoss``, ``CrossEntropyLoss`` or ``BCEWithLogitsLoss``.
        data: Batches ``(X, y)``, iterated over once.

    Returns:
        Scores ``[points]``.

    Raises:
        ValueError: If the loss is not supported, data are empty or not valid, or the
            network mixes examples or is random.

    Example:
        A point that the network is sure of has little curvature:

        >>> import torch
        >>> from laplace_debiased import curvature_scores
        >>> model = torch.nn.Linear(1, 2, bias=False)
        >>> model.weight.data = torch.tensor([[1.0], [-1.0]])
        >>> data = [(torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([0, 0, 0]))]
        >>> curvature_scores(model, torch.nn.CrossEntropyLoss(), data)
        tensor([0.5000, 0.2100, 0.0049])
    """
    check_repeatable(model_func)
    output_curvature = OutputCurvature(loss_func)
    summary = sweep(
        model_func,
        [],
        [],
        _checked(model_func, data),
        output_curvature,
        Nothing(),
        backward=False,
    )
    if summary.are_probabilities:
        warn_user(ends_in_link(loss_func))
    assert summary.traces is not None
    return summary.traces


def _checked(model: nn.Module, data: Iterable[Batch]) -> Iterator[Batch]:
    """Check the network on the first batch."""
    for number, (X, y) in enumerate(with_examples(data)):
        if number == 0:
            some = on_device(X, next(model.parameters()).device)
            check_outputs(model, some, len(y))
        yield X, y
