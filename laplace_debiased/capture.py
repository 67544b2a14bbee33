"""Capture of layer inputs in a forward pass and of output gradients afterwards.

Each layer's output is shifted by a *probe* of zeros. The gradient in a probe is the
gradient in the layer's output, also where an activation then overwrites that output in
place, and asking autograd for the probes alone spares the weight gradients that a
backward pass to the parameters computes and throws away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from laplace_debiased.layers import Layer


class Tape:
    """The probes of one forward pass.

    Args:
        batch_size: Number of examples in the pass.
    """

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._probes: dict[str, tuple[Layer, Tensor]] = {}

    def __contains__(self, layer: Layer) -> bool:
        return layer.name in self._probes

    def insert_probe(self, layer: Layer, output: Tensor) -> Tensor:
        """Shift a layer's output by a probe.

        Args:
            layer: The layer.
            output: The layer's output.

        Returns:
            A tensor equal to the output.
        """
        probe = output.new_zeros(()).expand(output.shape).requires_grad_()
        self._probes[layer.name] = (layer, probe)
        return output + probe

    def gradient_rows(
        self,
        output: Tensor,
        column: Tensor,
        retain_graph: bool,
        create_graph: bool = False,
    ) -> list[tuple[Layer, Tensor]]:
        """Backpropagate a column to the outputs of all layers.

        Args:
            output: The network's output ``[batch, outputs]``.
            column: What to backpropagate, of the output's shape.
            retain_graph: Whether another column follows.
            create_graph: Whether the rows are to be differentiated.

        Returns:
            Each layer with its gradient rows ``[batch, S, groups, features]``. Layers
            that do not influence the output are left out: their gradient is zero.
        """
        layers, probes = zip(*self._probes.values(), strict=True)
        gradients = torch.autograd.grad(
            output,
            probes,
            grad_outputs=column,
            retain_graph=retain_graph,
            create_graph=create_graph,
            allow_unused=True,
        )
        return [
            (layer, layer.gradient_rows(gradient, self._batch_size))
            for layer, gradient in zip(layers, gradients, strict=True)
            if gradient is not None
        ]


@contextmanager
def capture_rows(
    layers: list[Layer],
    batch_size: int,
    on_input: Callable[[Layer, Tensor], None],
    differentiable: bool = False,
) -> Iterator[Tape]:
    """Record the layers during one forward pass.

    Args:
        layers: The layers to record.
        batch_size: Number of examples in the pass.
        on_input: Called with each layer and its input rows as soon as they are known,
            since a network may overwrite an activation later.
        differentiable: Whether the rows are to be differentiated.

    Yields:
        The tape to ask for gradient rows once the forward pass is done.

    Raises:
        ValueError: If a layer runs more than once, never, or on an input whose leading
            axis holds no whole number of entries for each example.
    """
    tape = Tape(batch_size)

    def receive(layer: Layer, inputs: Tensor) -> None:
        inputs = inputs if differentiable else inputs.detach()
        on_input(layer, layer.input_rows(inputs, batch_size))

    hook = partial(_record, tape=tape, receive=receive)
    handles = [
        layer.module.register_forward_hook(partial(hook, layer), with_kwargs=True)
        for layer in layers
    ]
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()

    silent = [layer.name for layer in layers if layer not in tape]
    if silent:
        raise ValueError(
            f"Layers never ran as modules in the forward pass: {', '.join(silent)}. "
            "They are unused, or their parameters are used functionally (as "
            "`nn.MultiheadAttention` does). Exclude them by `requires_grad_(False)`."
        )


def _record(
    layer: Layer,
    module: nn.Module,
    args: tuple,
    kwargs: dict,
    output: Tensor,
    tape: Tape,
    receive: Callable[[Layer, Tensor], None],
) -> Tensor:
    """Forward hook: report the input, put a probe on the output."""
    inputs = args[0] if args else kwargs["input"]
    batch_size = tape._batch_size
    if layer in tape:
        raise ValueError(
            f"Layer {layer.name!r} runs more than once in a forward pass, which is not "
            "supported. Exclude it by `requires_grad_(False)`."
        )
    if inputs.shape[0] % batch_size:
        raise ValueError(
            f"Layer {layer.name!r} got an input of shape {tuple(inputs.shape)} for a "
            f"batch of {batch_size}: its leading axis must be the batch."
        )
    receive(layer, inputs)
    return tape.insert_probe(layer, output)
