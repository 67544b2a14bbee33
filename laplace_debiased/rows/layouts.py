"""Where a network holds the examples, and whether rows tell all of a parameter.

Sizes that grow with the number of examples tell which axes hold them, and the gradients
of one example's output which entries of such an axis are its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from laplace_debiased.rows.one_hot import OneHotRows
from laplace_debiased.rows.separation import FEW
from laplace_debiased.rows.tracing import Trace, TracedUse
from laplace_debiased.rows.uses import Layout, MatrixUse

_SHARED = "is applied to values that examples share"
_SEVERAL = "is applied along several axes of examples"
_ROUTED = "is applied to rows whose number depends on the examples"
_UNORDERED = "is applied to rows in an order that does not tell the examples"
_IRREGULAR = "runs a different number of times for other examples"


def find_layouts(
    few: list[TracedUse], many: list[TracedUse], count: int
) -> list[Layout] | str:
    """Find out where the examples are in each call.

    Args:
        few: The uses of a parameter with few examples.
        many: Those with more.
        count: How many these are.

    Returns:
        A layout for each call, one if they agree; or why there is none.
    """
    if not few or not many:
        return _ROUTED
    layouts: list[Layout] = []
    for own, more in zip(few, many, strict=False):
        found = _layout(own, more.use.input.shape, count)
        if isinstance(found, str):
            return found
        layouts.append(found)
    # calls on single entries take the order that the others tell
    known = {own for own in layouts if own.neighbours is not None}
    if len(known) == 1 and len({own.axis for own in layouts}) == 1:
        layouts = [*known] * len(layouts)
    if len(set(layouts)) == 1:
        return layouts[:1]
    return layouts if len(few) == len(many) else _IRREGULAR


def _layout(use: TracedUse, more: torch.Size, count: int) -> Layout | str:
    """Find out where the examples are in a call, by its size with more of them."""
    sizes = use.use.input.shape
    if any(sizes[axis] == 0 for axis in use.use.axes):
        # further entries may be those of any example
        return _ROUTED
    if sizes == more:
        return _SHARED
    axes = [
        axis
        for axis in use.use.axes
        if len(sizes) == len(more)
        and sizes[axis] % FEW == 0
        and sizes[axis] * count == more[axis] * FEW
    ]
    if len(axes) != 1:
        return _SEVERAL if axes else _ROUTED
    return _order(use, axes[0])


def _order(use: TracedUse, axis: int) -> Layout | str:
    """Find out, by gradients, which entries of an axis are an example's own."""
    if use.use.input.shape[axis] == FEW:
        return Layout(axis, neighbours=None)
    # three examples tell both apart: with two, the rows of a token in the middle may
    # lie in the first half and the second
    layouts = (Layout(axis), Layout(axis, neighbours=False))
    for layout in layouts:
        if not any(rows.any() for rows in rows_of_others(use, layout)):
            return layout
    entries = [
        gradient.nan_to_num().movedim(axis, 0).flatten(1).any(1)
        for gradient in use.gradients
        if gradient is not None
    ]
    # where an entry is that of several, examples are mixed, which is refused
    is_mixed = (torch.stack(entries).sum(0) > 1).any()
    return Layout(axis) if is_mixed else _UNORDERED


def rows_of_others(use: TracedUse, layout: Layout) -> list[Tensor]:
    """Return the gradient of each example's output in the rows of others.

    Args:
        use: A use in a trace of few examples.
        layout: Where it holds them.

    Returns:
        The gradients that there are, with zeros for those that are not finite.
    """
    return [
        layout.split(gradient, FEW)[torch.arange(FEW) != example].nan_to_num()
        for example, gradient in enumerate(use.gradients)
        if gradient is not None
    ]


def rows_tell_gradient(seen: Trace, position: int, layouts: Sequence[Layout]) -> bool:
    """Compare a parameter's gradients by its rows with those by autograd.

    Args:
        seen: A trace of few examples.
        position: The parameter's position.
        layouts: Where the examples are in each of its calls.

    Returns:
        Whether they agree; gradients that are not finite tell nothing.
    """
    for example, gradients in enumerate(seen.gradients):
        expected = gradients[position]
        if expected is None or not expected.isfinite().all():
            continue
        actual, size = _gradient_of_rows(seen.uses[position], example, layouts)
        precision = max(torch.finfo(t.dtype).eps for t in (expected, actual))
        expected = expected.to(torch.promote_types(expected.dtype, torch.float32))
        difference = actual.reshape(expected.shape) - expected
        # rows may cancel, as those of the bias of an attention's keys: what is left is
        # by rounding
        tolerance = precision**0.25 * expected.norm() + precision**0.5 * size
        if not difference.norm() <= tolerance:
            return False
    return True


def _gradient_of_rows(
    uses: list[TracedUse], example: int, layouts: Sequence[Layout]
) -> tuple[Tensor, Tensor]:
    """Contract the rows of all calls to a gradient; return the sum of norms, too."""
    total = size = torch.zeros(())
    for call, traced in enumerate(uses):
        gradient, use = traced.gradients[example], traced.use
        if gradient is None:
            continue
        layout = layouts[call % len(layouts)]
        g = use.gradient_rows(gradient, traced.key, layout, FEW)
        norms = g.norm(dim=-1)  # [batch, S, groups]
        if isinstance(use, MatrixUse) and traced.key == "weight":
            part, lengths = _contracted(g, use.input_rows(layout, FEW).to(g.dtype))
            part = part.mT if use.is_transposed else part
            norms = norms * lengths
        else:
            part = g.flatten(2).sum((0, 1))
        total, size = total.to(part.device) + part, size.to(part.device) + norms.sum()
    return total, size


def _contracted(g: Tensor, x: Tensor | OneHotRows) -> tuple[Tensor, Tensor]:
    """Sum the rows' outer products ``[d_out, d_in]``; return the lengths of x, too."""
    if isinstance(x, OneHotRows):
        rows = (g.squeeze(2) * x.values[:, :, None]).flatten(0, 1)
        part = g.new_zeros(x.size, g.shape[-1])
        part = part.index_add_(0, x.numbers.flatten(), rows)
        return part.mT, x.values[:, :, None]
    # [batch, S, groups, d_out], [batch, S, groups, d_in] -> [d_out, d_in]
    return torch.einsum("nsgo,nsgi->goi", g, x).flatten(0, 1), x.norm(dim=-1)
