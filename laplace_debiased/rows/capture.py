"""Capture of layer inputs in a forward pass and of output gradients afterwards.

Each call of a layer shifts its output by a *probe* of zeros. The gradient in a probe is
the gradient in the layer's output, also where an activation then overwrites that output
in place, and asking autograd for the probes alone spares the weight gradients that a
backward pass to the parameters computes and throws away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from laplace_debiased.rows.layers import Layer


class Tape:
    """The probes of one forward pass.

    Args:
        batch_size: Number of examples in the pass.
    """

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._probes: dict[str, tuple[Layer, list[Tensor]]] = {}

    def probes(self, layer: Layer) -> list[Tensor]:
        """Return a layer's probes, one for each of its calls."""
        _, probes = self._probes.get(layer.name, (layer, []))
        return probes

    @property
    def num_entries(self) -> int:
        """Number of entries in the gradient rows of a column."""
        return sum(
            probe.numel() for _, probes in self._probes.values() for probe in probes
        )

    def insert_probe(self, layer: Layer, inputs: Tensor, output: Tensor) -> Tensor:
        """Shift a layer's output by a probe.

        Args:
            layer: The layer.
            inputs: The module's input.
            output: The module's output.

        Returns:
            A tensor equal to the output.
        """
        probe, shifted = layer.probe(inputs, output, self._batch_size)
        self._probes.setdefault(layer.name, (layer, []))[1].append(probe)
        return shifted

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
            Each layer with its gradient rows ``[batch, S, groups, features]``, the
            positions of all calls in their order. Layers that do not influence the
            output are left out: their gradient is zero.
        """
        gradients = iter(
            torch.autograd.grad(
                output,
                [probe for _, probes in self._probes.values() for probe in probes],
                grad_outputs=column,
                retain_graph=retain_graph,
                create_graph=create_graph,
                allow_unused=True,
            )
        )
        rows = []
        for layer, probes in self._probes.values():
            calls = [next(gradients) for _ in probes]
            if any(gradient is not None for gradient in calls):
                rows.append((layer, self._joined(layer, probes, calls)))
        return rows

    def _joined(
        self, layer: Layer, probes: list[Tensor], gradients: list[Tensor | None]
    ) -> Tensor:
        """Join the rows of all calls, zeros for those without influence."""
        rows = [
            layer.gradient_rows(
                torch.zeros_like(probe) if gradient is None else gradient,
                self._batch_size,
            )
            for probe, gradient in zip(probes, gradients, strict=True)
        ]
        return layer.join_calls(rows)


@contextmanager
def capture_rows(
    layers: list[Layer],
    batch_size: int,
    on_input: Callable[[Layer, Tensor], None],
    differentiable: bool = False,
    all_run: bool = True,
) -> Iterator[Tape]:
    """Record the layers during one forward pass.

    Args:
        layers: The layers to record.
        batch_size: Number of examples in the pass.
        on_input: Called with each layer that has inputs and its input rows, at each of
            its calls, as soon as they are known: a network may overwrite an activation
            later.
        differentiable: Whether the rows are to be differentiated.
        all_run: Whether to refuse layers that never run.

    Yields:
        The tape to ask for gradient rows once the forward pass is done.

    Raises:
        ValueError: If a layer never runs, cannot be recorded, or runs on an input whose
            leading axis holds no whole number of entries for each example.
    """
    tape = Tape(batch_size)

    def record(
        layer: Layer, module: nn.Module, args: tuple, kwargs: dict, output: Tensor
    ) -> Tensor:
        inputs, *_ = args or kwargs.values()  # the module's only argument
        inputs = inputs if differentiable else inputs.detach()
        if inputs.shape[0] % batch_size:
            raise ValueError(
                f"Layer {layer.name!r} got an input of shape {tuple(inputs.shape)} for "
                f"a batch of {batch_size}: its leading axis must be the batch."
            )
        if layer.has_inputs:
            on_input(layer, layer.input_rows(inputs, batch_size))
        return tape.insert_probe(layer, inputs, output)

    handles = [
        layer.module.register_forward_hook(partial(record, layer), with_kwargs=True)
        for layer in layers
    ]
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()

    silent = [layer.name for layer in layers if not tape.probes(layer)]
    if all_run and silent:
        raise ValueError(
            f"Layers never ran as modules in the forward pass: {', '.join(silent)}. "
            "They are unused, or their parameters are used functionally (as "
            "`nn.MultiheadAttention` does). Exclude them by `requires_grad_(False)`."
        )
