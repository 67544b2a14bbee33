"""Find out what a network does with its parameters, by running it on few examples.

Sizes that grow with the number of examples tell which axes hold them, and the gradients
of one example's output which entries of such an axis are its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from laplace.utils import select_rows
from torch import Tensor, nn

from laplace_debiased.rows.inputs import Inputs, check_output
from laplace_debiased.rows.recorder import Recorder, probed
from laplace_debiased.rows.sharing import NO_CUDNN, everywhere
from laplace_debiased.rows.substitution import run, stand_ins
from laplace_debiased.rows.uses import Layout, MatrixUse, Use

PAIR, TRIPLE = 2, 3
_SHARED = "is applied to values that examples share"
_SEVERAL = "is applied along several axes of examples"
_IRREGULAR = "runs a different number of times for other examples"


@dataclass(eq=False)
class TracedUse:
    """A use of a parameter, as a trace has seen it.

    Args:
        use: The use.
        key: What the parameter is to the function, ``"weight"`` or ``"bias"``.
        probe: The zeros that its output was shifted by.
        number: Number of the use in the trace.
        gradients: Gradient of each example's output in the probe.
    """

    use: Use
    key: str
    probe: Tensor
    number: int
    gradients: list[Tensor | None] = field(default_factory=list)


@dataclass(eq=False)
class Trace:
    """A forward pass on some examples, and a backward pass from the output of each.

    Args:
        uses: The uses of each parameter, in their order.
        others: Name of a function that takes a parameter otherwise, by its position.
        gradients: Gradients of each example's output in the parameters.
        hidden: Positions of parameters that have a gradient by functions that no
            recorder sees.
        recomputed: Positions of parameters whose functions a backward pass calls again.
        inputs: Gradients of the first example's output in the inputs.
        example_size: Number of entries in an example's input.
        num_outputs: Number of network outputs.
    """

    uses: list[list[TracedUse]]
    others: dict[int, str] = field(default_factory=dict)
    gradients: list[Sequence[Tensor | None]] = field(default_factory=list)
    hidden: set[int] = field(default_factory=set)
    recomputed: set[int] = field(default_factory=set)
    inputs: Sequence[Tensor | None] = ()
    example_size: int = 1
    num_outputs: int = 1


def trace(
    model: nn.Module,
    params: Sequence[Tensor],
    X: Inputs,
    batch_size: int,
    count: int,
    backward: bool,
) -> Trace:
    """Run a network on some examples.

    Args:
        model: The network.
        params: Its parameters.
        X: Inputs of some examples.
        batch_size: Their number.
        count: Number of examples to use; they are repeated if there are fewer.
        backward: Whether to make backward passes.

    Returns:
        What was seen.

    Raises:
        ValueError: If a module is scripted, the network's output is no finite matrix,
            or no gradient can be asked for.
    """
    check_not_scripted(model)
    values = stand_ins(model, params)
    position = {id(values[id(param)]): k for k, param in enumerate(params)}
    seen = Trace([[] for _ in params])
    num_uses = 0

    def on_use(use: Use, output: Tensor) -> Tensor:
        nonlocal num_uses
        if backward and not use.mixes_examples:
            use = use.before_changes(differentiable=False)
        probe, shifted = probed(output)
        for key, parameter in (("weight", use.weight), ("bias", use.bias)):
            if id(parameter) in position:
                own = seen.uses[position[id(parameter)]]
                own.append(TracedUse(use, key, probe, num_uses))
        num_uses += 1
        return shifted

    def on_other(taken: list[Tensor], name: str) -> None:
        for parameter in taken:
            if id(parameter) in position:
                seen.others.setdefault(position[id(parameter)], name)

    some, probes, seen.example_size = _some_of(X, batch_size, count)
    with (
        everywhere(NO_CUDNN),
        torch.set_grad_enabled(backward),
        Recorder(values, on_use, on_other),
    ):
        output = run(model, some)
    check_output(output, count)
    seen.num_outputs = output.shape[1]
    if backward:
        _see_gradients(seen, output, values, params, probes)
    return seen


def check_not_scripted(model: nn.Module) -> None:
    """Refuse scripted modules, into which no mode can look.

    Args:
        model: The network.

    Raises:
        ValueError: If a part of it is scripted.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"Module {name or '(model)'!r} is scripted, so that the uses of its "
                "parameters cannot be recorded: pass the original module."
            )


def _see_gradients(
    seen: Trace,
    output: Tensor,
    values: Mapping[int, Tensor],
    params: Sequence[Tensor],
    probes: list[Tensor],
) -> None:
    """Backpropagate the output of each example."""
    own = [values[id(param)] for param in params]
    position = {id(value): k for k, value in enumerate(own)}

    def on_replayed_use(use: Use, output: Tensor) -> Tensor:
        taken = (id(use.weight), id(use.bias))
        seen.recomputed |= {position[key] for key in taken if key in position}
        return probed(output)[1]

    # checkpointing calls functions again: with probes, as in the forward pass
    replay = Recorder(values, on_replayed_use)
    for example in range(len(output)):
        # the second example tells of the order of an axis alone
        inputs = probes if example == 0 else []
        _backpropagate(seen, output, example, replay, own, params, inputs)


def _some_of(
    X: Inputs, batch_size: int, count: int
) -> tuple[Inputs, list[Tensor], int]:
    """Return the first examples, zeros that were added to them, and an example's size.

    The gradients in the zeros are those in the inputs.
    """
    probes: list[Tensor] = []
    size = 0
    indices = torch.arange(count) % batch_size

    def chosen(value: Any) -> Any:
        nonlocal size
        rows = select_rows(value, indices, batch_size)
        if not isinstance(value, Tensor) or value.shape[:1] != (batch_size,):
            return rows
        size += rows[0].numel()
        if not value.is_floating_point():
            return rows
        probes.append(torch.zeros_like(rows, requires_grad=True))
        return rows + probes[-1]

    if isinstance(X, MutableMapping):
        return {key: chosen(X[key]) for key in X}, probes, max(1, size)
    return chosen(X), probes, max(1, size)


def _backpropagate(
    seen: Trace,
    output: Tensor,
    example: int,
    replay: Recorder,
    own: Sequence[Tensor],
    params: Sequence[Tensor],
    inputs: Sequence[Tensor],
) -> None:
    """Add the gradients of an example's output to a trace."""
    column = torch.zeros_like(output)
    # distinct, so that outputs of a constant sum have a gradient, too
    count = output.shape[1]
    column[example] = torch.arange(1, count + 1, device=output.device) / count
    uses = [use for uses in seen.uses for use in uses]
    free = {k: param for k, param in enumerate(params) if param.requires_grad}
    recorded = [use for use in uses if use.probe.requires_grad]
    parts = [[use.probe for use in recorded], own, [*free.values()], inputs]
    tensors = [tensor for part in parts for tensor in part]
    gradients = _gradients(output, tensors, column, replay)
    probes, seen_own, seen_free, seen_inputs = (
        [next(gradients) for _ in part] for part in parts
    )
    of_use = dict(zip(map(id, recorded), probes, strict=True))
    for use in uses:
        use.gradients.append(of_use.get(id(use)))
    seen.gradients.append(seen_own)
    seen.inputs = seen_inputs or seen.inputs
    pairs = zip(free, seen_free, strict=True)
    seen.hidden |= {k for k, gradient in pairs if gradient is not None}


def _gradients(
    output: Tensor, tensors: list[Tensor], column: Tensor, replay: Recorder
) -> Iterator[Tensor | None]:
    """Yield gradients, None where there is none; tell what to do if torch refuses."""
    if not output.requires_grad:
        yield from [None] * len(tensors)
        return
    try:
        with replay:
            gradients = torch.autograd.grad(
                output, tensors, column, retain_graph=True, allow_unused=True
            )
    except RuntimeError as error:
        if "heckpoint" not in str(error):
            raise
        raise ValueError(
            "The model uses reentrant checkpointing, through which gradients in the "
            "outputs of layers cannot be asked for: pass `use_reentrant=False` to "
            "`torch.utils.checkpoint.checkpoint`."
        ) from error
    yield from gradients


def find_layouts(pair: list[TracedUse], triple: list[TracedUse]) -> list[Layout] | str:
    """Find out where the examples are in each call.

    Args:
        pair: The uses of a parameter with two examples.
        triple: Those with three.

    Returns:
        A layout for each call, one if they agree; or why there is none.
    """
    layouts = []
    for two, three in zip(pair, triple, strict=False):
        sizes, more = two.use.input.shape, three.use.input.shape
        axes = [
            axis
            for axis in two.use.axes
            if len(sizes) == len(more) and sizes[axis] * TRIPLE == more[axis] * PAIR
        ]
        if len(axes) != 1:
            return _SEVERAL if axes else _SHARED
        layouts.append(_order(two, axes[0]))
    if len(set(layouts)) == 1:
        return layouts[:1]
    return layouts if len(pair) == len(triple) else _IRREGULAR


def _order(use: TracedUse, axis: int) -> Layout:
    """Find out, by gradients, which entries of an axis are an example's own."""
    if use.use.input.shape[axis] == PAIR:
        return Layout(axis)
    for layout in (Layout(axis), Layout(axis, neighbours=False)):
        # of the gradient of an example's output, the other one has no part
        others = [
            layout.split(gradient, PAIR)[1 - example]
            for example, gradient in enumerate(use.gradients)
            if gradient is not None
        ]
        if not any(rows.nan_to_num().any() for rows in others):
            return layout
    return Layout(axis)


def rows_tell_gradient(seen: Trace, position: int, layouts: Sequence[Layout]) -> bool:
    """Compare a parameter's gradients by its rows with those by autograd.

    Args:
        seen: A trace of two examples.
        position: The parameter's position.
        layouts: Where the examples are in each of its calls.

    Returns:
        Whether they agree; gradients that are not finite tell nothing.
    """
    for example, gradients in enumerate(seen.gradients):
        expected = gradients[position]
        if expected is None or not expected.isfinite().all():
            continue
        actual = _gradient_of_rows(seen.uses[position], example, layouts)
        precision = max(torch.finfo(t.dtype).eps for t in (expected, actual))
        expected = expected.to(torch.promote_types(expected.dtype, torch.float32))
        difference = actual.reshape(expected.shape) - expected
        if not difference.norm() <= precision**0.25 * expected.norm():
            return False
    return True


def _gradient_of_rows(
    uses: list[TracedUse], example: int, layouts: Sequence[Layout]
) -> Tensor:
    """Contract the rows of all calls to the gradient in a parameter."""
    total = torch.zeros(())
    for call, traced in enumerate(uses):
        gradient, use = traced.gradients[example], traced.use
        if gradient is None:
            continue
        layout = layouts[call % len(layouts)]
        g = use.gradient_rows(gradient, traced.key, layout, PAIR)
        if isinstance(use, MatrixUse) and traced.key == "weight":
            x = use.input_rows(layout, PAIR).to(g.dtype)
            # [batch, S, groups, d_out], [batch, S, groups, d_in] -> [d_out, d_in]
            part = torch.einsum("nsgo,nsgi->goi", g, x).flatten(0, 1)
        else:
            part = g.flatten(2).sum((0, 1))
        total = total.to(part.device) + part
    return total
