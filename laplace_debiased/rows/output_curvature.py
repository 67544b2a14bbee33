r"""Square roots of the loss curvature in the network's output.

The GGN is :math:`\sum_n J_n^\top \Lambda_n J_n`. With
:math:`\Lambda_n = \sum_k s_{nk} s_{nk}^\top`, it is a sum of outer products of
:math:`J_n^\top s_{nk}`, one backward pass for each *column* :math:`s_{\cdot k}`.
All square roots are computed for the whole batch at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import BCEWithLogitsLoss, CrossEntropyLoss, MSELoss

from laplace_debiased.rows.hessian_roots import (
    diagonal_root,
    num_columns,
    softmax_root,
)
from laplace_debiased.rows.positions import num_positions

Loss = MSELoss | CrossEntropyLoss | BCEWithLogitsLoss

# curvlinops' names
TYPE_2, MC, EMPIRICAL = FISHER_TYPES = ("type-2", "mc", "empirical")


@dataclass(frozen=True)
class OutputCurvature:
    """Curvature of a loss in the output, by one of the Fisher types.

    Args:
        loss_func: The loss. Averaging over the examples (``reduction="mean"``) is left
            to whoever knows their number; averaging over outputs is done here. Targets
            that are its ``ignore_index`` have no curvature.
        fisher_type: ``"type-2"`` (exact Hessian), ``"mc"`` (labels sampled from the
            model) or ``"empirical"`` (gradients at the targets).
        mc_samples: Number of labels sampled for each example with ``"mc"``.
        fisher_rank: With ``"type-2"``, number of columns that are kept, the largest of
            each example; one more, the sum of the others by random signs, stands for
            them without bias. None for all.

    Raises:
        ValueError: If an argument is not supported.
    """

    loss_func: Loss
    fisher_type: str = TYPE_2
    mc_samples: int = 1
    fisher_rank: int | None = None

    def __post_init__(self):
        if not isinstance(self.loss_func, Loss):
            raise ValueError(
                "`loss_func` must be MSELoss, CrossEntropyLoss or BCEWithLogitsLoss, "
                f"got {self.loss_func!r}."
            )
        if type(self.loss_func).forward is not self._loss_type.forward:
            raise ValueError(
                f"`loss_func` must not have a `forward` of its own, as "
                f"{type(self.loss_func).__name__} has."
            )
        if self.loss_func.reduction not in {"sum", "mean"}:
            raise ValueError(
                "`loss_func` must have reduction 'sum' or 'mean', "
                f"got {self.loss_func.reduction!r}."
            )
        for option in ("weight", "pos_weight"):
            if getattr(self.loss_func, option, None) is not None:
                raise ValueError(
                    f"`loss_func` must not have `{option}`: pass weights of the points "
                    "instead."
                )
        if self.fisher_type not in FISHER_TYPES:
            raise ValueError(
                "`fisher_type` must be 'type-2', 'mc' or 'empirical', "
                f"got {self.fisher_type!r}."
            )
        if self.mc_samples < 1 or (self.mc_samples != 1 and self.fisher_type != MC):
            raise ValueError(
                "`mc_samples` must be at least 1, and is 1 unless `fisher_type='mc'`, "
                f"got {self.mc_samples} with {self.fisher_type!r}."
            )

        if self.fisher_rank is not None and (
            self.fisher_rank < 1 or self.fisher_type != TYPE_2
        ):
            raise ValueError(
                "`fisher_rank` must be at least 1, and needs `fisher_type='type-2'`, "
                f"got {self.fisher_rank} with {self.fisher_type!r}."
            )

    @property
    def is_random(self) -> bool:
        """Whether columns are drawn."""
        return self.fisher_type == MC or self.fisher_rank is not None

    def draws(self, num_outputs: int) -> bool:
        """Tell whether columns are drawn of as many outputs.

        Args:
            num_outputs: Number of network outputs.

        Returns:
            Whether they are; not if the rank leaves out none.
        """
        exact = replace(self, fisher_rank=None).num_columns(num_outputs)
        return self.fisher_type == MC or self.num_columns(num_outputs) < exact

    def num_columns(self, num_outputs: int) -> int:
        """Number of columns to backpropagate, at most.

        Args:
            num_outputs: Number of network outputs.

        Returns:
            The number.
        """
        if self.fisher_type != TYPE_2:
            return self.mc_samples
        is_softmax = self._loss_type is CrossEntropyLoss
        return num_columns(num_outputs - is_softmax, self.fisher_rank)

    def columns(self, output: Tensor, target: Tensor, generator: Generator) -> Tensor:
        """Compute the columns to backpropagate.

        With several positions, a column is the sum of those of all positions, by random
        signs: the outer products of different positions cancel in expectation.

        Args:
            output: Network output ``[batch, outputs]``.
            target: Targets: classes ``[batch]`` or probabilities ``[batch, outputs]``
                for cross-entropy, ``[batch, outputs]`` otherwise; with positions,
                ``[batch, positions]`` and ``[batch, positions, outputs]``.
            generator: Random numbers for sampled labels, and for signs.

        Returns:
            Columns ``[columns, batch, outputs]``; the sum of their outer products is
            each example's curvature (for sampled labels, and with positions: in
            expectation), which is zero where the loss ignores the target.
        """
        output = output.detach()
        count = num_positions(target)
        if count > 1:
            points = output.reshape(len(target) * count, -1)
            columns = self.columns(points, target.flatten(0, 1), generator)
            columns = columns.unflatten(1, (-1, count))
            signs = torch.randint(
                2, columns.shape[:3], device=output.device, generator=generator
            )
            return (columns * (2 * signs - 1)[..., None]).flatten(2)
        if self.fisher_type == TYPE_2:
            columns = self._hessian_sqrt(output, generator)
        elif self.fisher_type == MC:
            # of what is sampled, nothing is smoothed or ignored
            plain = self._loss_type(reduction="sum")
            residuals = [
                _residual(plain, output, self._sample(output, generator))
                for _ in range(self.mc_samples)
            ]
            columns = torch.stack(residuals) / self.mc_samples**0.5
        else:
            columns = _residual(self.loss_func, output, target).unsqueeze(0)
        counted = is_counted(self.loss_func, target)[:, None]
        return columns * counted * self._output_scale(output) ** 0.5

    def traces(self, output: Tensor, target: Tensor) -> Tensor:
        """Compute the trace of each example's curvature, without its columns.

        Args:
            output: Network output ``[batch, outputs]``.
            target: Targets as in :meth:`columns`.

        Returns:
            The traces ``[batch]``; with ``"mc"`` their expectation.
        """
        count = num_positions(target)
        if count > 1:
            points = output.reshape(len(target) * count, -1)
            return self.traces(points, target.flatten(0, 1)).view(-1, count).sum(1)
        if self.fisher_type == EMPIRICAL:
            traces = _residual(self.loss_func, output, target).square().sum(1)
        elif self._loss_type is CrossEntropyLoss:
            traces = 1 - output.softmax(1).square().sum(1)
        elif self._loss_type is MSELoss:
            traces = output.new_full(output.shape[:1], 2.0 * output.shape[1])
        else:
            p = output.sigmoid()
            traces = (p * (1 - p)).sum(1)
        counted = is_counted(self.loss_func, target)
        return traces * counted * self._output_scale(output)

    @property
    def _loss_type(self) -> type[Loss]:
        return _type_of(self.loss_func)

    def _output_scale(self, output: Tensor) -> float:
        """MSELoss and BCEWithLogitsLoss average over the outputs, too."""
        averages = self.loss_func.reduction == "mean"
        if averages and self._loss_type is not CrossEntropyLoss:
            return 1 / output.shape[1]
        return 1.0

    def _hessian_sqrt(self, output: Tensor, generator: Generator) -> Tensor:
        """Square root of the loss Hessian, ``[columns, batch, outputs]``."""
        if self._loss_type is CrossEntropyLoss:
            return softmax_root(output, self.fisher_rank, generator)
        if self._loss_type is MSELoss:
            sizes = torch.full_like(output, 2**0.5)
        else:
            p = output.sigmoid()
            sizes = (p * (1 - p)).sqrt()
        return diagonal_root(sizes, self.fisher_rank, generator)

    def _sample(self, output: Tensor, generator: Generator) -> Tensor:
        """Draw labels from the likelihood that the loss implies."""
        if self._loss_type is CrossEntropyLoss:
            return output.softmax(1).multinomial(1, generator=generator).squeeze(1)
        if self._loss_type is BCEWithLogitsLoss:
            return output.sigmoid().bernoulli(generator=generator)
        noise = torch.randn(
            output.shape, dtype=output.dtype, device=output.device, generator=generator
        )
        # exp(-MSE) is a Gaussian of variance one half
        return output + 0.5**0.5 * noise


def _residual(loss_func: Loss, output: Tensor, target: Tensor) -> Tensor:
    """Gradient of each example's loss in its output, ``[batch, outputs]``."""
    output = output.detach().requires_grad_()
    with torch.enable_grad():
        loss = example_losses(loss_func, output, target).sum()
    return torch.autograd.grad(loss, output)[0]


_ENDS_IN_SOFTMAX = (
    "All outputs of the network are at least zero and sum to one, as if it ended in a "
    "softmax: cross-entropy takes logits, and normalizes them once more. Take the "
    "softmax off, unless the network was trained like that."
)
_ENDS_IN_SIGMOID = (
    "All outputs of the network are between zero and one, as if it ended in a sigmoid: "
    "binary cross-entropy with logits takes the sigmoid once more. Take the last one "
    "off, unless the network was trained like that."
)


def ends_in_link(loss_func: Loss) -> str:
    """Say that a network's outputs are probabilities, where logits are expected."""
    is_binary = isinstance(loss_func, BCEWithLogitsLoss)
    return _ENDS_IN_SIGMOID if is_binary else _ENDS_IN_SOFTMAX


def are_probabilities(loss_func: Loss, output: Tensor) -> Tensor:
    """Tell if what should be cross-entropy's logits are probabilities.

    Args:
        loss_func: The loss.
        output: Network output ``[batch, outputs]``.

    Returns:
        Whether all rows are at least zero and sum to one, up to rounding, or with
        binary cross-entropy all outputs between zero and one, as a tensor with one
        truth value on the output's device.
    """
    if isinstance(loss_func, BCEWithLogitsLoss):
        return ((output >= 0) & (output <= 1)).all()
    if not isinstance(loss_func, CrossEntropyLoss):
        return output.new_zeros((), dtype=torch.bool)
    error = 4 * output.shape[1] * torch.finfo(output.dtype).eps
    sums = output.detach().double().sum(1)
    return (output >= 0).all() & ((sums - 1).abs() <= error).all()


def example_losses(loss_func: Loss, output: Tensor, target: Tensor) -> Tensor:
    """Compute each example's loss.

    Args:
        loss_func: The loss, whose reduction does not matter.
        output: Network output ``[batch, outputs]``.
        target: Targets as in :meth:`OutputCurvature.columns`.

    Returns:
        The loss of each example ``[batch]``, summed over its outputs and positions;
        zero where its target is ignored.
    """
    count = num_positions(target)
    if count > 1:
        points = output.reshape(len(target) * count, -1)
        losses = example_losses(loss_func, points, target.flatten(0, 1))
        return losses.view(-1, count).sum(1)
    loss_type = _type_of(loss_func)
    functionals: dict[type[Loss], Callable[..., Tensor]] = {
        MSELoss: torch.nn.functional.mse_loss,
        CrossEntropyLoss: torch.nn.functional.cross_entropy,
        BCEWithLogitsLoss: torch.nn.functional.binary_cross_entropy_with_logits,
    }
    options: dict[str, Any] = {}
    if isinstance(loss_func, CrossEntropyLoss):
        options["label_smoothing"] = loss_func.label_smoothing
        if not target.is_floating_point():
            options["ignore_index"] = loss_func.ignore_index
    loss = functionals[loss_type](output, target, reduction="none", **options)
    return loss.reshape(output.shape[0], -1).sum(1)


def is_counted(loss_func: Loss, target: Tensor) -> Tensor:
    """Tell which examples a loss counts: all but those of its ``ignore_index``.

    Args:
        loss_func: The loss.
        target: Targets as in :meth:`OutputCurvature.columns`.

    Returns:
        Whether each counts ``[batch]``, at a position at least.
    """
    if num_positions(target) > 1:
        counted = is_counted(loss_func, target.flatten(0, 1))
        return counted.view(len(target), -1).any(1)
    is_class = target.ndim == 1 and not target.is_floating_point()
    if is_class and isinstance(loss_func, CrossEntropyLoss):
        return target != loss_func.ignore_index
    return target.new_ones(len(target), dtype=torch.bool)


def loss_scale(loss_func: Loss, weight: float, num_outputs: int = 1) -> float:
    """Return the factor from the sum of all examples' losses to the loss.

    Args:
        loss_func: The loss.
        weight: Weight of the examples that it counts: their number, if all weigh one.
        num_outputs: Number of network outputs that are still to be averaged.

    Returns:
        The factor.

    Raises:
        ValueError: If the loss averages, but counts no example.
    """
    if loss_func.reduction == "sum":
        return 1.0
    if weight == 0:
        raise ValueError(
            "No target counts: the loss averages over targets, but ignores all of them."
        )
    is_cross_entropy = isinstance(loss_func, CrossEntropyLoss)
    return 1 / (weight * (1 if is_cross_entropy else num_outputs))


def _type_of(loss_func: Loss) -> type[Loss]:
    return next(t for t in Loss.__args__ if isinstance(loss_func, t))
