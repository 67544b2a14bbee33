"""Layers of parameters that no row type tells of: exact blocks, or diagonals.

Class tokens, position embeddings, layer scales, tables of relative positions, weights
that are computed from others: each is a vector of its own, whose gradient rows are the
per-example gradients (:mod:`~laplace_debiased.rows.copies`). What was found is compared
with the gradients that autograd computes for few examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from laplace_debiased.rows.calls import Call, Event, Tracer, find_calls
from laplace_debiased.rows.inputs import Inputs
from laplace_debiased.rows.layers import Layer
from laplace_debiased.rows.recorder import Recorder
from laplace_debiased.rows.separation import FEW, num_traced, some_examples
from laplace_debiased.rows.substitution import run, stand_ins
from laplace_debiased.rows.tape import record_rows
from laplace_debiased.rows.tracing import Trace, column_of

# of larger parameters, no more than the diagonal is kept
LARGEST_EXACT = 1024
_SCALES = {"mul", "__mul__", "__rmul__", "mul_", "__imul__", "multiply"}


@dataclass(frozen=True, eq=False)
class Network:
    """A network with some of its parameters, and examples to try it on.

    Args:
        model: The network.
        params: The parameters.
        names: Their names.
        X: Inputs of some examples.
        batch_size: Their number.
    """

    model: nn.Module
    params: Sequence[Tensor]
    names: Sequence[str]
    X: Inputs
    batch_size: int


def fallback_layers(
    network: Network, candidates: Sequence[int], seen: Trace
) -> dict[int, Layer]:
    """Find layers for parameters that no row type tells of.

    Args:
        network: The network.
        candidates: Positions of these parameters.
        seen: A trace of few examples.

    Returns:
        A layer for each position that can have one.
    """
    if not candidates:
        return {}
    count = num_traced(network.batch_size)
    few, more = (_events(network, candidates, size) for size in (FEW, count))
    found = {
        k: _layer(network.names[k], k, network.params[k], calls)
        for k, calls in find_calls(few, more, (FEW, count)).items()
    }
    wrong = _wrong(network, found, seen)
    if wrong is None:  # some cannot be run: find out which
        wrong = [k for k in found if _wrong(network, {k: found[k]}, seen) != []]
        found = {k: layer for k, layer in found.items() if k not in wrong}
        wrong = _wrong(network, found, seen)
    return {k: own for k, own in found.items() if wrong is not None and k not in wrong}


@torch.no_grad()
def _events(network: Network, candidates: Sequence[int], count: int) -> list[Event]:
    """Run the network on some examples, and return the calls of some parameters."""
    some = some_examples(network.X, network.batch_size, count)
    values = stand_ins(network.model)
    data = list(some.values()) if isinstance(some, Mapping) else [some]
    own = {k: values[id(network.params[k])] for k in candidates}
    tracer = Tracer(own, [item for item in data if isinstance(item, Tensor)])
    with Recorder(values, lambda _, output: output, call=tracer):
        run(network.model, some)
    return tracer.events


def _layer(name: str, position: int, param: Tensor, calls: tuple[Call, ...]) -> Layer:
    # a scale of activations, not one of another parameter
    scales = any(
        call.function in _SCALES and not call.is_of_parameters for call in calls
    )
    return Layer(
        name,
        None,
        position,
        param.numel(),
        is_normalization=scales,
        calls=calls,
        is_diagonal=param.numel() > LARGEST_EXACT,
    )


def _wrong(
    network: Network, found: Mapping[int, Layer], seen: Trace
) -> list[int] | None:
    """Compare gradients of copies with those by autograd.

    Returns:
        The positions of parameters where they differ; None if the network cannot be run
        on copies.
    """
    some = some_examples(network.X, network.batch_size, FEW)
    layers = list(found.values())
    try:
        with (
            torch.enable_grad(),
            record_rows(network.model, network.params, layers, FEW, None) as tape,
        ):
            output = run(network.model, some)
        rows = [
            {
                layer.name: own.flatten(1)
                for layer, own in tape.gradient_rows(output, column, retain_graph=True)
            }
            for column in (column_of(output, example) for example in range(FEW))
        ]
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        return None  # as torch raises where a function has no batching rule
    return [k for k, layer in found.items() if not _agree(rows, layer, k, seen)]


def _agree(
    rows: Sequence[Mapping[str, Tensor]], layer: Layer, position: int, seen: Trace
) -> bool:
    """Whether rows are the gradients of each example, and of no other."""
    for example, expected in enumerate(seen.gradients):
        gradient, own = expected[position], rows[example].get(layer.name)
        if gradient is None or not gradient.isfinite().all():
            continue
        if own is None:
            return not gradient.any()
        if own[torch.arange(FEW) != example].nan_to_num().any():
            return False
        precise = torch.promote_types(gradient.dtype, torch.float32)
        precision = torch.finfo(gradient.dtype).eps
        difference = own[example].to(precise) - gradient.to(precise).flatten()
        if not difference.norm() <= precision**0.25 * gradient.norm() + precision**0.5:
            return False
    return True
