"""Rows of a network's layers, by name."""

import torch

from laplace_debiased.rows.inputs import num_examples
from laplace_debiased.rows.selection import find_layers, select
from laplace_debiased.rows.substitution import run
from laplace_debiased.rows.tape import record_rows
from tests.dense import example
from tests.zoo import plain


def _count(X):
    """The number of examples, which may be a mapping of the zoo's."""
    return num_examples(X, "values")


def found(model, X, params=None):
    """The layers of some parameters."""
    params = list(model.parameters()) if params is None else list(params)
    return find_layers(model, params, X, _count(X)), params


def supported(model, X, params=None, size=None, dense=False):
    """The supported ones of some parameters, their layers, and what is left out."""
    params = list(model.parameters()) if params is None else list(params)
    selection = select(model, params, X, _count(X) if size is None else size, dense)
    gone = {entry.position for entry in selection.left_out}
    kept = [param for k, param in enumerate(params) if k not in gone]
    return kept, selection.without_left_out(len(params)).layers, selection.left_out


def record(model, X, params=None, layers=None, batch_size=None):
    """Input rows and gradient rows of each layer."""
    if layers is None:
        layers, params = found(model, X, params)
    calls = {}
    if batch_size is None:
        batch_size = _count(X)
    with record_rows(
        model,
        params,
        layers,
        batch_size,
        lambda layer, rows: calls.setdefault(layer.name, []).append(rows),
    ) as tape:
        output = run(model, X)
    gradients = tape.gradient_rows(output, torch.ones_like(output), False)
    inputs = {name: torch.cat(rows, 1) for name, rows in calls.items()}
    return inputs, {layer.name: rows for layer, rows in gradients}


def example_gradients(model, X, params, layers):
    """Gradients of each example's summed output by rows ``[examples, size]``."""
    inputs, gradients = record(model, X, params, layers)
    contracted = {}
    for layer in layers:
        g = gradients[layer.name]
        for position in layer.parameters:
            if position == layer.matrix:
                x = inputs[layer.name]
                own = torch.einsum("nsgo,nsgi->ngoi", g, x).flatten(1, 2)
                own = layer.as_stored(own)
            else:
                own = g.flatten(2).sum(1)
            contracted[position] = own
    return [contracted[k] for k in range(len(params))]


def assert_rows_are_exact(model, X, params, layers):
    """Compare with autograd, one example at a time."""
    actual = example_gradients(model, X, params, layers)
    for n in range(_count(X)):
        output = plain(model)(example(X, n)).sum()
        expected = torch.autograd.grad(output, params)
        for own, gradient in zip(actual, expected, strict=True):
            assert torch.allclose(own[n], gradient.flatten(), atol=1e-12)
