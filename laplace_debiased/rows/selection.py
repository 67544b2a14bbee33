"""Which parameters of a network take part, and which stay at their trained values.

What the rows of a parameter say is compared with the gradient that autograd computes
for it: where they differ, it is used in a way that the rows do not tell, and it is left
out by name.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from laplace_debiased.rows.embedding_uses import EmbeddingUse
from laplace_debiased.rows.fallback import Network, fallback_layers
from laplace_debiased.rows.inputs import Inputs
from laplace_debiased.rows.layers import Layer, join_positions
from laplace_debiased.rows.layouts import (
    find_layouts,
    rows_of_others,
    rows_tell_gradient,
)
from laplace_debiased.rows.left_out import LeftOut, refusal
from laplace_debiased.rows.normalization_uses import NormalizationUse
from laplace_debiased.rows.one_hot import OneHotRows
from laplace_debiased.rows.separation import (
    FEW,
    check_batch_does_not_matter,
    check_outputs_repeat,
    check_rows_are_separate,
    num_traced,
)
from laplace_debiased.rows.tape import batch_statistics
from laplace_debiased.rows.tracing import Trace, TracedUse, trace
from laplace_debiased.rows.uses import Layout, MatrixUse


@dataclass(frozen=True)
class Selection:
    """What takes part.

    Args:
        layers: The layers, ordered by their first parameter.
        left_out: The parameters that are in no layer.
        example_size: Number of entries in the input of an example that the layers were
            found with.
        num_outputs: Number of network outputs.
    """

    layers: list[Layer]
    left_out: list[LeftOut]
    example_size: int
    num_outputs: int

    def kinds(self) -> dict[int, str]:
        """Say what kind of curvature each parameter has, by its position.

        Returns:
            ``"kronecker"`` for matrices and their biases, ``"exact"`` for vectors by
            themselves, ``"diagonal"`` for large ones.
        """
        found: dict[int, str] = {}
        for layer in self.layers:
            kind = "exact" if layer.matrix is None else "kronecker"
            kind = "diagonal" if layer.is_diagonal else kind
            found |= dict.fromkeys(layer.parameters, kind)
        return found

    def of_fitted(self, values: Tensor, sizes: Sequence[int]) -> Tensor:
        """Take from a vector what belongs to the parameters that take part.

        Args:
            values: The vector, or one that has not the entries of all parameters.
            sizes: Number of entries of each parameter, of those left out too.

        Returns:
            Their entries; the other vector as it is.
        """
        gone = {entry.position for entry in self.left_out}
        if not gone or values.numel() != sum(sizes):
            return values
        parts = values.split(list(sizes))
        return torch.cat([part for k, part in enumerate(parts) if k not in gone])

    def without_left_out(self, count: int) -> Selection:
        """Renumber the parameters to those that take part.

        Args:
            count: Number of all parameters.

        Returns:
            The selection of the parameters that take part, in their order.
        """
        gone = {entry.position for entry in self.left_out}
        kept = [k for k in range(count) if k not in gone]
        new: dict[int | None, int | None] = {old: k for k, old in enumerate(kept)}
        layers = [
            replace(
                layer,
                matrix=new.get(layer.matrix),
                vector=new.get(layer.vector),
            )
            for layer in self.layers
        ]
        return replace(self, layers=layers)


def check_real(params: Sequence[Tensor]) -> None:
    """Refuse complex parameters, along which no direction of real numbers goes.

    Args:
        params: The parameters.

    Raises:
        ValueError: If one is complex.
    """
    count = sum(param.is_complex() for param in params)
    if count:
        raise ValueError(f"{count} of `params` are complex, which is not supported.")


def find_layers(
    model: nn.Module, params: Sequence[Tensor], X: Inputs, batch_size: int
) -> list[Layer]:
    """Find the layers that parameters belong to, all of which must be supported.

    Args:
        model: The network.
        params: Its parameters.
        X: Inputs of some examples.
        batch_size: Their number.

    Returns:
        The layers, ordered by their first parameter.

    Raises:
        ValueError: As :func:`select`, and if a parameter is not supported.
    """
    selection = select(model, params, X, batch_size, dense=True)
    if selection.left_out:
        raise ValueError(refusal(selection.left_out))
    return selection.layers


def select(
    model: nn.Module,
    params: Sequence[Tensor],
    X: Inputs,
    batch_size: int,
    dense: bool = False,
) -> Selection:
    """Find the layers that parameters belong to, and what is in none.

    Args:
        model: The network.
        params: Its parameters.
        X: Inputs of some examples.
        batch_size: Their number.
        dense: Whether to leave out what has no dense rows, as embeddings have none.

    Returns:
        The layers, and what is left out.

    Raises:
        ValueError: If a parameter is given twice or is not the network's, its output is
            no finite matrix or is random, an example's output depends on others, or
            batch statistics are used.
    """
    names = _names(model, params)
    few = trace(model, params, X, batch_size, FEW, backward=True)
    for name, uses in zip(names, few.uses, strict=True):
        if any(traced.use.mixes_examples for traced in uses):
            raise ValueError(batch_statistics(name))
    check_outputs_repeat(model, X, batch_size)
    count = num_traced(batch_size)
    many = trace(model, params, X, batch_size, count, backward=False)
    reasons: dict[int, str] = {}
    layouts: dict[int, list[Layout]] = {}
    for k, param in enumerate(params):
        found: str | list[Layout] | None = _reason(k, param, few, many)
        if dense and any(isinstance(own.use, EmbeddingUse) for own in few.uses[k]):
            found = found or "is a table of embeddings"
        found = found or find_layouts(few.uses[k], many.uses[k], count)
        if isinstance(found, str):
            reasons[k] = found
        elif not rows_tell_gradient(few, k, found):
            reasons[k] = "is also used in ways that its calls do not tell"
        else:
            layouts[k] = found
    own = [_layer(group, few, names, layouts) for group in _groups(few, layouts)]
    _check_examples_are_separate(few, _named(own))
    if not dense:
        network = Network(model, params, names, X, batch_size)
        others = fallback_layers(network, _candidates(params, reasons, few), few)
        own += others.values()
        reasons = {k: reason for k, reason in reasons.items() if k not in others}
    layers = _named(own)
    check_batch_does_not_matter(few.output, many.output)
    left_out = [
        LeftOut(names[k], _kind(model, names[k]), k, params[k].numel(), reason)
        for k, reason in sorted(reasons.items())
    ]
    num_outputs = few.output.shape[1]
    return Selection(layers, left_out, few.example_size, num_outputs)


def _candidates(
    params: Sequence[Tensor], reasons: Mapping[int, str], few: Trace
) -> list[int]:
    """Return the parameters whose uses no row type tells, but that can be copied."""
    return [
        k
        for k in reasons
        if params[k].numel() > 0
        and not params[k].is_complex()
        and k not in few.hidden
        and k not in few.recomputed
        and any(gradients[k] is not None for gradients in few.gradients)
    ]


def _names(model: nn.Module, params: Sequence[Tensor]) -> list[str]:
    """Return the parameters' names in the network."""
    if len({id(param) for param in params}) != len(params):
        raise ValueError("`params` must be distinct, but a parameter is given twice.")
    of_parameter = {id(p): name for name, p in model.named_parameters()}
    unknown = sum(id(param) not in of_parameter for param in params)
    if unknown:
        raise ValueError(f"{unknown} of `params` are in no module of the model.")
    return [of_parameter[id(param)] for param in params]


def _kind(model: nn.Module, name: str) -> str:
    """Return the type of the module that a parameter belongs to."""
    return type(model.get_submodule(name.rpartition(".")[0])).__name__


def _reason(k: int, param: Tensor, few: Trace, many: Trace) -> str | None:
    """Tell why a parameter is left out, from what traces have seen of it."""
    uses, others = few.uses[k], many.others | few.others
    if param.numel() == 0:
        return "has no entries"
    if param.is_complex():
        return "is complex"
    if k in others:
        return f"is {'also ' if uses else ''}used by `{others[k]}`"
    if k in few.hidden:
        return "is used where no gradients are recorded"
    if not uses:
        return None if many.uses[k] else "is not used"
    if len({_kind_of_use(use) for use in uses}) > 1:
        return "is used in different ways"
    if all(gradient is None for use in uses for gradient in use.gradients):
        return "does not influence the output"
    return None


def _kind_of_use(traced: TracedUse) -> tuple[type, str, bool, int]:
    """Return what all uses of a parameter must agree in."""
    use = traced.use
    is_transposed = isinstance(use, MatrixUse) and use.is_transposed
    return type(use), traced.key, is_transposed, getattr(use, "groups", 1)


def _check_examples_are_separate(few: Trace, layers: list[Layer]) -> None:
    """Refuse networks in which an example's output depends on another one."""
    for layer in layers:
        for call, use in enumerate(few.uses[layer.parameters[0]]):
            for rows in rows_of_others(use, layer.layout(call)):
                check_rows_are_separate(f"layer {layer.name!r}", rows)
    for gradient in few.inputs:
        if gradient is not None:  # that of the first example's output
            check_rows_are_separate("the input", gradient[1:])


def _groups(few: Trace, positions: dict[int, list[Layout]]) -> list[list[int]]:
    """Put together the parameters that are used together, weights first."""
    groups: dict[Hashable, list[int]] = {}
    for k in positions:
        uses = few.uses[k]
        is_vector = uses[0].use.is_vector(uses[0].key)
        numbers = tuple(use.number for use in uses)
        groups.setdefault(k if is_vector else numbers, []).append(k)
    return [
        sorted(group, key=lambda k: few.uses[k][0].key, reverse=True)
        for group in groups.values()
    ]


def _layer(
    group: list[int], few: Trace, names: list[str], layouts: dict[int, list[Layout]]
) -> Layer:
    """Describe the layer of parameters that are used together."""
    first, *_ = group
    uses, own = few.uses[first], tuple(layouts[first])
    parameter = getattr(uses[0].use, uses[0].key)
    layer = Layer(
        names[first],
        None,
        first,
        parameter.numel(),
        layouts=own,
        is_recomputed=any(k in few.recomputed for k in group),
    )
    sizes = [use.use.input.shape[layer.layout(k).axis] for k, use in enumerate(uses)]
    layer = replace(layer, num_entries=sum(sizes) // FEW)
    if uses[0].use.is_vector(uses[0].key):
        is_normalization = isinstance(uses[0].use, NormalizationUse)
        return replace(layer, is_normalization=is_normalization)
    keys = {few.uses[k][0].key: k for k in group}
    # [batch, S, groups, d_in] of all calls
    rows = join_positions(
        [
            traced.use.input_rows(layer.layout(call), FEW)
            for call, traced in enumerate(uses)
            if isinstance(traced.use, MatrixUse)
        ]
    )
    _, num_positions, num_groups, d_in = rows.shape
    d_in = d_in if "weight" in keys else 0
    return replace(
        layer,
        matrix=keys.get("weight"),
        vector=keys.get("bias"),
        d_out=parameter.numel() // max(1, d_in),
        d_in=d_in,
        is_embedding=isinstance(rows, OneHotRows),
        is_transposed=_kind_of_use(uses[0])[2],
        groups=num_groups,
        num_positions=num_positions,
    )


def _named(layers: list[Layer]) -> list[Layer]:
    """Name layers like their modules where that is unique, and order them."""

    def short(layer: Layer) -> str:
        module, _, leaf = layer.name.rpartition(".")
        is_whole = not (layer.is_normalization or layer.calls)
        is_module = leaf in ("weight", "bias") and is_whole
        return module if is_module else layer.name

    names = [short(layer) for layer in layers]
    named = [
        replace(layer, name=name if names.count(name) == 1 else layer.name)
        for layer, name in zip(layers, names, strict=True)
    ]
    return sorted(named, key=lambda layer: min(layer.parameters))
