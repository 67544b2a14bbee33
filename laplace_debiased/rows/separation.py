"""Refuse networks whose output for an example is not a function of it alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laplace_debiased.rows.batches import of_class, select_rows
from laplace_debiased.rows.inputs import Inputs, at_least_single
from laplace_debiased.rows.substitution import Substitution, run, stand_ins
from laplace_debiased.rows.tape import Tape

FEW, MANY = 3, 16
_SHRINKING = 0.9


def check_outputs(model: nn.Module, X: Inputs, batch_size: int) -> None:
    """Refuse networks whose output for an example is not a function of it alone.

    Args:
        model: The network.
        X: Inputs of some examples.
        batch_size: Their number.

    Raises:
        ValueError: If outputs are drawn anew or depend on other examples.
    """
    check_outputs_repeat(model, X, batch_size)
    few, many = (
        _first_outputs(model, X, batch_size, count)
        for count in (FEW, num_traced(batch_size))
    )
    check_batch_does_not_matter(few, many)


def check_outputs_repeat(model: nn.Module, X: Inputs, batch_size: int) -> None:
    """Refuse networks that draw anew in each pass, also outside modules with a mode.

    Args:
        model: The network.
        X: Inputs of some examples.
        batch_size: Their number.

    Raises:
        ValueError: If outputs differ between two passes on the same examples.
    """
    first, again = (_first_outputs(model, X, batch_size, FEW) for _ in range(2))
    if not _agree(first, again, 0.4):
        raise ValueError(
            "The model's outputs differ between two passes on the same examples: it "
            "is random in this mode. Dropout must depend on the mode, as in "
            "`F.dropout(x, training=self.training)`."
        )


def check_batch_does_not_matter(few: Tensor, many: Tensor) -> None:
    """Refuse networks in which examples matter for others, also without gradients.

    An example is one that takes the place of others, since there is room for a number
    of all examples' tokens.

    Args:
        few: Outputs of some examples.
        many: Outputs of these and further ones in a batch.

    Raises:
        ValueError: If the former differ.
    """
    # other batches are rounded otherwise, also within a network in half precision
    if not _agree(few, many[: len(few)], 0.125):
        raise ValueError(
            "The model's output for an example depends on the others in its batch. "
            "Examples must be separate: layers with batch statistics must be in eval "
            "mode."
        )


@torch.no_grad()
def _first_outputs(model: nn.Module, X: Inputs, batch_size: int, count: int) -> Tensor:
    """Return the outputs of the first few of some examples."""
    return run(model, some_examples(X, batch_size, count))[:FEW]


def some_examples(
    X: Inputs,
    batch_size: int,
    count: int,
    then: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> Inputs:
    """Return some examples, which are repeated if there are fewer.

    An example that is repeated is shrunk, where it is of real numbers: networks that
    mix examples may not show it with equal ones.

    Args:
        X: Inputs of some examples.
        batch_size: Their number.
        count: Number of examples to return.
        then: What is done with each tensor that has a row for each example.

    Returns:
        Their inputs.
    """
    indices = torch.arange(count)
    sizes = _SHRINKING ** (indices // batch_size)

    def chosen(value: Any) -> Any:
        rows = select_rows(value, indices % batch_size, batch_size)
        if not isinstance(value, Tensor) or value.shape[:1] != (batch_size,):
            return rows
        if value.is_floating_point() and count > batch_size:
            rows = rows * sizes.to(rows).view(-1, *[1] * (rows.ndim - 1))
        return then(rows)

    if isinstance(X, MutableMapping):
        return of_class(X, {key: chosen(X[key]) for key in X})
    return chosen(X)


def check_no_hidden_uses(
    model: nn.Module, params: Sequence[Tensor], X: Inputs, batch_size: int
) -> None:
    """Refuse networks that cannot be run on other values of their parameters.

    No mode reaches into scripted functions, nor the arguments of functions with a
    gradient of their own.

    Args:
        model: The network.
        params: Some of its parameters; those that require no gradients do not matter.
        X: Inputs of some examples.
        batch_size: Their number.

    Raises:
        ValueError: If a parameter has a gradient though it is replaced.
    """
    with torch.enable_grad(), Substitution(stand_ins(model)):
        output = run(model, some_examples(X, batch_size, FEW))
    free = [param for param in params if param.requires_grad]
    if not free or not output.requires_grad:
        return
    gradients = torch.autograd.grad(output.sum(), free, allow_unused=True)
    hidden = {id(p) for p, g in zip(free, gradients, strict=True) if g is not None}
    names = [name for name, p in model.named_parameters() if id(p) in hidden]
    if names:
        raise ValueError(
            "Parameters are used in functions that are scripted or have a gradient of "
            f"their own: {', '.join(names)}. They cannot be replaced there: write them "
            "in plain torch, or leave the parameters out."
        )


def num_traced(batch_size: int) -> int:
    """Return how many examples tell what grows with their number: more than few."""
    return max(FEW + 1, min(batch_size, MANY))


def _agree(output: Tensor, other: Tensor, digits: float) -> bool:
    """Whether outputs agree in a share of the digits; those not finite tell nothing."""
    if output.shape != other.shape or not output.is_floating_point():
        return True  # refused elsewhere
    if not (output.isfinite().all() and other.isfinite().all()):
        return True
    tolerance = torch.finfo(output.dtype).eps ** digits
    output, other = at_least_single(output), at_least_single(other)
    return bool((output - other).norm() <= tolerance * output.norm())


def check_rows_are_separate(place: str, others: Tensor) -> None:
    """Refuse rows that tell of a network which mixes examples.

    Args:
        place: Where the rows are.
        others: Gradient of some examples' outputs in rows of other examples.

    Raises:
        ValueError: If it is not zero.
    """
    if others.nan_to_num().any():  # zero times infinity is no dependence
        raise ValueError(
            f"In {place}, an example's output depends on rows of others. Examples must "
            "be separate: layers with batch statistics must be in eval mode. If rows "
            "are sorted by what they are, exclude the layer by `requires_grad_(False)`."
        )


def check_examples_are_separate(tape: Tape, output: Tensor) -> None:
    """Refuse networks in which an example's output depends on others.

    Then a layer's rows do not belong to the examples that they are counted for. One
    backward pass, from the outputs of every second example, shows it.

    Args:
        tape: The tape of a forward pass.
        output: The network's output ``[batch, outputs]``.

    Raises:
        ValueError: If the outputs have a gradient in another example's rows.
    """
    if len(output) == 1:
        return
    count = output.shape[1]
    column = torch.zeros_like(output)
    # distinct, so that outputs of a constant sum have a gradient, too
    column[::2] = torch.arange(1, count + 1, device=output.device) / count
    for layer, rows in tape.gradient_rows(output, column, retain_graph=True):
        check_rows_are_separate(f"layer {layer.name!r}", rows[1::2])


class SeparationCheck:
    """Checks a pass if its layers may not run as they did in one that was checked."""

    def __init__(self) -> None:
        self._seen: set[Hashable] = set()

    def __call__(self, tape: Tape, output: Tensor) -> None:
        """Check a pass.

        Args:
            tape: Its tape.
            output: The network's output ``[batch, outputs]``.

        Raises:
            ValueError: If an example's output depends on others.
        """
        kind = len(output), frozenset(tape.num_entries.items())
        if tape.routes or kind not in self._seen:
            check_examples_are_separate(tape, output)
            self._seen.add(kind)
