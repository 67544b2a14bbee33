"""Run a network on few examples, and keep what it does with its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from laplace_debiased.rows.inputs import Inputs, check_output
from laplace_debiased.rows.recorder import Recorder, probed
from laplace_debiased.rows.separation import some_examples
from laplace_debiased.rows.sharing import NO_CUDNN, everywhere
from laplace_debiased.rows.substitution import run, stand_ins
from laplace_debiased.rows.uses import Use


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
        output: The network's output ``[examples, outputs]``.
    """

    uses: list[list[TracedUse]]
    others: dict[int, str] = field(default_factory=dict)
    gradients: list[Sequence[Tensor | None]] = field(default_factory=list)
    hidden: set[int] = field(default_factory=set)
    recomputed: set[int] = field(default_factory=set)
    inputs: Sequence[Tensor | None] = ()
    example_size: int = 1
    output: Tensor = field(default_factory=lambda: torch.zeros(0, 0))


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
        count: Number of examples to use.
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
        if not backward:  # sizes are enough, and activations are large
            use = replace(use, input=use.input.to("meta"))
        elif not use.mixes_examples:
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
    seen.output = output.detach()
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
        # further examples tell of the order of an axis alone
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

    def shifted(rows: Tensor) -> Tensor:
        nonlocal size
        size += rows[0].numel()
        if not rows.is_floating_point():
            return rows
        probes.append(torch.zeros_like(rows, requires_grad=True))
        return rows + probes[-1]

    return some_examples(X, batch_size, count, shifted), probes, max(1, size)


def column_of(output: Tensor, example: int) -> Tensor:
    """Return what to backpropagate for the gradients of an example's output.

    Args:
        output: The network's output ``[examples, outputs]``.
        example: The example's number.

    Returns:
        Distinct numbers for its outputs, zeros for others.
    """
    column = torch.zeros_like(output)
    # distinct, so that outputs of a constant sum have a gradient, too
    count = output.shape[1]
    column[example] = torch.arange(1, count + 1, device=output.device) / count
    return column


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
    column = column_of(output, example)
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
