"""Dense references, straight from the formulas, one example at a time by autograd."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
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
    is_transposed: bool = False


class Call(NamedTuple):
    """A call of a function with a matrix: input rows, output, and what it took.

    ``to_rows`` turns a gradient in the output into rows; the matrix of a transposed
    weight is ``[d_in, d_out]``.
    """

    rows: Tensor
    output: Tensor
    weight: Tensor
    bias: Tensor | None
    to_rows: Callable[[Tensor], Tensor]
    is_transposed: bool = False

    def as_stored(self):
        """The call by the matrix whose transpose it took; rows may be overwritten."""
        call, base = self._replace(rows=self.rows.clone()), self.weight._base
        if base is not None and base.shape == self.weight.shape[::-1]:
            is_transposed = not self.is_transposed
            return call._replace(weight=base, is_transposed=is_transposed)
        return call

    @classmethod
    def of_linear(cls, output, x, weight, bias=None):
        return cls(x.flatten(0, -2), output, weight, bias, lambda g: g.flatten(0, -2))

    @classmethod
    def of_product(cls, output, x, weight):
        call = cls.of_linear(output, x, weight)
        return call._replace(is_transposed=True)

    @classmethod
    def of_shifted_product(cls, output, bias, x, weight, **_):
        return cls.of_product(output, x, weight)._replace(bias=bias)

    @classmethod
    def of_convolution(cls, output, x, weight, bias=None, *args, **kwargs):
        rows = _patches(x, weight, *args, **kwargs)
        return cls(rows, output, weight, bias, lambda g: g[0].flatten(1).T)

    @classmethod
    def of_transposed(cls, output, x, weight, bias=None, *args, **kwargs):
        """Rows of the pixels of each group; the bias is used by itself."""
        sizes = _transposed_sizes(len(weight.shape) - 2, *args, **kwargs)
        *_, groups = sizes
        size = len(weight) // groups
        masks = torch.eye(groups, dtype=x.dtype).repeat_interleave(size, 1)
        rows = x[0].flatten(1).T[:, None] * masks
        to_rows = partial(_transposed_patches, x.shape[2:], weight.shape[2:], *sizes)
        return cls(rows.flatten(0, 1), output, weight, None, to_rows, True)


def _transposed_sizes(dims, stride=1, padding=0, _=0, groups=1, dilation=1):
    def each(value):
        return (value,) * dims if isinstance(value, int) else value

    return each(stride), each(padding), each(dilation), groups


def _transposed_patches(pixels, kernel, stride, padding, dilation, groups, gradient):
    """Where a pixel's products are added, entry by entry; outside there is nothing."""
    (gradient,) = gradient
    rows = []
    for pixel in product(*map(range, pixels)):
        columns = []
        for entry in product(*map(range, kernel)):
            place = [
                p * s - before + k * d
                for p, s, before, k, d in zip(
                    pixel, stride, padding, entry, dilation, strict=True
                )
            ]
            sizes = gradient.shape[1:]
            inside = all(0 <= p < size for p, size in zip(place, sizes, strict=True))
            zeros = gradient.new_zeros(len(gradient))
            columns.append(gradient[(slice(None), *place)] if inside else zeros)
        # [groups, channels of a group * kernel]
        rows.append(torch.stack(columns, 1).reshape(groups, -1))
    return torch.cat(rows)


def _patches(x, weight, stride=1, padding=0, dilation=1, groups=1):
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


_MATRIX_FUNCTIONS = (
    (F, "linear", Call.of_linear),
    *((F, f"conv{n}d", Call.of_convolution) for n in (1, 2, 3)),
    *((F, f"conv_transpose{n}d", Call.of_transposed) for n in (1, 2, 3)),
    (torch, "addmm", Call.of_shifted_product),
    (torch, "matmul", Call.of_product),
    (Tensor, "__matmul__", Call.of_product),
)


def _recorded_calls(model, x):
    """The output of one example, and all calls that multiply by a matrix."""
    calls = []

    def recording(function, describe):
        def call(x, *args, **kwargs):
            output = function(x, *args, **kwargs)
            if not torch._C._functorch.is_functorch_wrapped_tensor(x):
                with torch.no_grad():
                    own = describe(output, x, *args, **kwargs).as_stored()
                calls.append(own)
            return output.clone()  # which may be overwritten

        return call

    with ExitStack() as stack:
        for module, name, describe in _MATRIX_FUNCTIONS:
            own = recording(getattr(module, name), describe)
            stack.enter_context(mock.patch.object(module, name, own))
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
        bias = None if bias is None else params[bias]
        owners[k] = Owner(params[k], bias, calls[own[0]].is_transposed), own
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
            size = _size(owner)
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
                            calls[k].to_rows(g)
                            for k, g in zip(own, gradients, strict=True)
                        ]
                    )
                    rows = rows.sum(0, keepdim=True) if reduce else rows
                else:
                    (gradient,) = _gradients(f, [owner], column)
                    rows = gradient.reshape(1, -1)
                factors[owner][0] += weight * rows.T @ rows
    return factors


def _size(owner):
    """Number of features of a gradient row."""
    if not isinstance(owner, Owner):
        return owner.numel()
    return owner.weight[0].numel() if owner.is_transposed else len(owner.weight)


def eigenbases(factors):
    """The eigenvectors of each parameter's block, as the columns of a matrix."""
    bases = []
    for owner, (G, *A) in factors.items():
        gradient_vectors = torch.linalg.eigh(G).eigenvectors
        if A:
            input_vectors = torch.linalg.eigh(A[0]).eigenvectors
            bases.append(kronecker(owner, gradient_vectors, input_vectors))
        if not A or owner.bias is not None:
            bases.append(gradient_vectors)
    return bases


def kronecker(owner, of_gradients, of_inputs):
    """The product in the order that a weight, or a layer's, is stored in."""
    if owner.is_transposed:
        return torch.kron(of_inputs, of_gradients)
    return torch.kron(of_gradients, of_inputs)


def kfac_blocks(factors):
    """K-FAC's diagonal block of each parameter."""
    blocks = []
    for owner, (G, *A) in factors.items():
        if A:
            blocks.append(kronecker(owner, G, A[0]))
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
