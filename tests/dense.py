"""Dense references, straight from the formulas, one example at a time by autograd."""

from contextlib import ExitStack
from itertools import product
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def block_diagonal(blocks):
    return torch.block_diag(*blocks)


def example(X, n):
    """A batch of one example; inputs may be a mapping."""
    if isinstance(X, dict):
        return {key: value[n : n + 1] for key, value in X.items()}
    return X[n : n + 1]


def _examples(X, y):
    return [(example(X, n), y[n : n + 1]) for n in range(len(y))]


def _gradients(outputs, inputs, column):
    return torch.autograd.grad(
        outputs,
        inputs,
        column,
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )


def jacobians(model, X, size, params=None):
    """Jacobians of the outputs ``[size, outputs, params]``."""
    params = list(model.parameters()) if params is None else params
    each = []
    for n in range(size):
        f = model(example(X, n))
        columns = torch.eye(f.shape[1], dtype=f.dtype)[:, None]
        rows = [_gradients(f, params, column) for column in columns]
        each.append([torch.cat([g.flatten() for g in own]) for own in rows])
    return torch.stack([torch.stack(rows) for rows in each])


def output_columns(f, y, loss, fisher_type="type-2"):
    """Columns of a square root of the loss curvature in the output [1, C]."""
    f = f.detach()
    if fisher_type == "empirical":
        return [torch.func.grad(loss)(f, y)]
    hessian = torch.func.hessian(lambda out: loss(out, y))(f).reshape(f.numel(), -1)
    values, vectors = torch.linalg.eigh(hessian)
    return [
        (value.clamp(min=0).sqrt() * vector).reshape(f.shape)
        for value, vector in zip(values, vectors.T, strict=True)
    ]


def ggn_blocks(model, X, y, loss, fisher_type="type-2", weights=None, params=None):
    """The exact GGN's diagonal block of each parameter; ``loss`` has reduction sum."""
    params = list(model.parameters()) if params is None else params
    weights = torch.ones(len(y), dtype=params[0].dtype) if weights is None else weights
    blocks = [torch.zeros(p.numel(), p.numel(), dtype=p.dtype) for p in params]
    for (x, target), weight in zip(_examples(X, y), weights, strict=True):
        f = model(x)
        for column in output_columns(f, target, loss, fisher_type):
            gradients = _gradients(f, params, column)
            for block, g in zip(blocks, gradients, strict=True):
                block += weight * torch.outer(g.flatten(), g.flatten())
    return blocks


class Owner(NamedTuple):
    """A weight, and the bias of the same calls if there is one."""

    weight: Tensor
    bias: Tensor | None


class Call(NamedTuple):
    """A call of a function with a matrix: input rows, output, and what it took."""

    rows: Tensor
    output: Tensor
    weight: Tensor
    bias: Tensor | None

    def gradient_rows(self, gradient):
        if gradient.ndim == self.weight.ndim and gradient.ndim > 2:
            gradient = gradient.movedim(1, -1)
        return gradient.reshape(-1, len(self.weight))


def _input_rows(x, weight, stride=1, padding=0, dilation=1, groups=1):
    if weight.ndim == 2:
        return x.flatten(0, -2)
    (x,), kernel = x, weight.shape[2:]
    stride, dilation = (
        (v,) * len(kernel) if isinstance(v, int) else v for v in (stride, dilation)
    )
    spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if padding == "same":
        ends = [(span // 2, span - span // 2) for span in spans]
    else:
        padding = 0 if padding == "valid" else padding
        sizes = (padding,) * len(kernel) if isinstance(padding, int) else padding
        ends = [(size, size) for size in sizes]
    x = F.pad(x, [size for pair in reversed(ends) for size in pair])
    x = x.reshape(groups, -1, *x.shape[1:]).mean(0)
    windows = [
        [slice(start, start + span + 1, d) for start in range(0, size - span, s)]
        for size, span, s, d in zip(x.shape[1:], spans, stride, dilation, strict=True)
    ]
    patches = [x[(slice(None), *window)].flatten() for window in product(*windows)]
    return torch.stack(patches)


_MATRIX_FUNCTIONS = ("linear", "conv1d", "conv2d", "conv3d")


def _recorded_calls(model, x):
    """The output of one example, and all calls that multiply by a matrix."""
    calls = []

    def recording(function):
        def call(x, weight, bias=None, *args, **kwargs):
            output = function(x, weight, bias, *args, **kwargs)
            if not torch._C._functorch.is_functorch_wrapped_tensor(x):
                with torch.no_grad():
                    rows = _input_rows(x.detach(), weight, *args, **kwargs)
                calls.append(Call(rows, output, weight, bias))
            return output.clone()  # which may be overwritten

        return call

    with ExitStack() as stack:
        for name in _MATRIX_FUNCTIONS:
            own = recording(getattr(F, name))
            stack.enter_context(mock.patch.object(F, name, own))
        f = model(x)
    return f, list(calls)  # checkpointing calls again later


def _owners(params, calls):
    """Owners of weights, or vectors by themselves, each with its calls."""

    def numbers(param):
        return [k for k, call in enumerate(calls) if param is call.weight]

    def bias_numbers(param):
        return [k for k, call in enumerate(calls) if param is call.bias]

    weights = {k: numbers(p) for k, p in enumerate(params) if numbers(p)}
    vectors = {k: bias_numbers(p) for k, p in enumerate(params) if k not in weights}
    owners, paired = {}, set()
    for k, own in weights.items():
        bias = next((b for b, others in vectors.items() if others == own), None)
        paired.add(bias)
        owners[k] = Owner(params[k], None if bias is None else params[bias]), own
    for k, own in vectors.items():
        if k not in paired:
            owners[k] = params[k], own
    return [owners[k] for k in sorted(owners)]


def kronecker_factors(
    model,
    X,
    y,
    loss,
    fisher_type="type-2",
    weights=None,
    reduce=False,
    params=None,
):
    """K-FAC's (G, A) of each weight and its bias, (G,) of each other vector.

    ``loss`` has reduction sum. Rows of all calls of a weight are its positions.
    """
    params = list(model.parameters()) if params is None else params
    weights = torch.ones(len(y), dtype=params[0].dtype) if weights is None else weights
    factors = {}
    for (x, target), weight in zip(_examples(X, y), weights, strict=True):
        f, calls = _recorded_calls(model, x)
        owners = _owners(params, calls)
        for owner, own in owners:
            size = len(owner.weight) if isinstance(owner, Owner) else owner.numel()
            zeros = torch.zeros(size, size, dtype=f.dtype)
            count = 2 if isinstance(owner, Owner) else 1
            factors.setdefault(owner, [zeros, 0.0][:count])
            if isinstance(owner, Owner):
                rows = torch.cat([calls[k].rows for k in own])
                rows = rows.mean(0, keepdim=True) if reduce else rows
                factors[owner][1] += weight / weights.sum() * rows.T @ rows / len(rows)
        for column in output_columns(f, target, loss, fisher_type):
            for owner, own in owners:
                if own:
                    gradients = _gradients(f, [calls[k].output for k in own], column)
                    rows = torch.cat(
                        [
                            calls[k].gradient_rows(g)
                            for k, g in zip(own, gradients, strict=True)
                        ]
                    )
                    rows = rows.sum(0, keepdim=True) if reduce else rows
                else:
                    (gradient,) = _gradients(f, [owner], column)
                    rows = gradient.reshape(1, -1)
                factors[owner][0] += weight * rows.T @ rows
    return factors


def eigenbases(factors):
    """The eigenvectors of each parameter's block, as the columns of a matrix."""
    bases = []
    for owner, (G, *A) in factors.items():
        gradient_vectors = torch.linalg.eigh(G).eigenvectors
        if A:
            input_vectors = torch.linalg.eigh(A[0]).eigenvectors
            bases.append(torch.kron(gradient_vectors, input_vectors))
        if not A or owner.bias is not None:
            bases.append(gradient_vectors)
    return bases


def kfac_blocks(factors):
    """K-FAC's diagonal block of each parameter."""
    blocks = []
    for owner, (G, *A) in factors.items():
        if A:
            blocks.append(torch.kron(G, A[0]))
        if not A or owner.bias is not None:
            blocks.append(G)
    return blocks


def debiased(bases, blocks):
    """Directions from one source, directional curvatures from another."""
    return block_diagonal(
        [
            U @ torch.diag((U.T @ H @ U).diagonal()) @ U.T
            for U, H in zip(bases, blocks, strict=True)
        ]
    )
