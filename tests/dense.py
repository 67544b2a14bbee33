"""Dense references, straight from the formulas, one example at a time by autograd."""

from itertools import product

import torch
from torch import nn
from torch.nn.functional import pad


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def block_diagonal(blocks):
    return torch.block_diag(*blocks)


def _examples(X, y):
    return [(X[n : n + 1], y[n : n + 1]) for n in range(len(X))]


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


def ggn_blocks(model, X, y, loss, fisher_type="type-2", weights=None):
    """The exact GGN's diagonal block of each parameter; ``loss`` has reduction sum."""
    params = list(model.parameters())
    weights = torch.ones(len(X), dtype=X.dtype) if weights is None else weights
    blocks = [torch.zeros(p.numel(), p.numel(), dtype=p.dtype) for p in params]
    for (x, target), weight in zip(_examples(X, y), weights, strict=True):
        f = model(x)
        for column in output_columns(f, target, loss, fisher_type):
            gradients = torch.autograd.grad(f, params, column, retain_graph=True)
            for block, g in zip(blocks, gradients, strict=True):
                block += weight * torch.outer(g.flatten(), g.flatten())
    return blocks


def _input_rows(module, x):
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = pad(x, module._reversed_padding_repeated_twice, mode=mode)[0]
    x = x.reshape(module.groups, -1, *x.shape[1:]).mean(0)
    windows = []
    for axis, size in enumerate(x.shape[1:]):
        dilation = module.dilation[axis]
        span = dilation * (module.kernel_size[axis] - 1) + 1
        starts = range(0, size - span + 1, module.stride[axis])
        windows.append([slice(start, start + span, dilation) for start in starts])
    patches = [x[(slice(None), *window)].flatten() for window in product(*windows)]
    return torch.stack(patches)


def _is_row_layer(module):
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)


def kronecker_factors(
    model, X, y, loss, fisher_type="type-2", weights=None, reduce=False
):
    """K-FAC's (G, A) of each layer, (G,) of each parameter of a normalization layer.

    ``loss`` has reduction sum. Rows of all calls of a layer are its positions.
    """
    weights = torch.ones(len(X), dtype=X.dtype) if weights is None else weights
    layers = [m for m in model.modules() if _is_row_layer(m)]
    vectors = [
        p for m in model.modules() if not _is_row_layer(m) for p in m.parameters(False)
    ]
    factors = {
        **{m: [0.0, 0.0] for m in layers},
        **{p: [torch.zeros(p.numel(), p.numel(), dtype=p.dtype)] for p in vectors},
    }
    for (x, target), weight in zip(_examples(X, y), weights, strict=True):
        calls = {m: [] for m in layers}

        def record(module, args, output, calls=calls):
            calls[module].append((args[0], output))

        handles = [m.register_forward_hook(record) for m in layers]
        f = model(x)
        for handle in handles:
            handle.remove()
        for module in layers:
            rows = [_input_rows(module, x.detach()) for x, _ in calls[module]]
            rows = torch.cat(rows)
            rows = rows.mean(0, keepdim=True) if reduce else rows
            factors[module][1] += weight / weights.sum() * rows.T @ rows / len(rows)
        for column in output_columns(f, target, loss, fisher_type):
            for module in layers:
                outputs = [output for _, output in calls[module]]
                rows = []
                for g in torch.autograd.grad(f, outputs, column, retain_graph=True):
                    g = g if isinstance(module, nn.Linear) else g.movedim(1, -1)
                    rows.append(g.reshape(-1, g.shape[-1]))
                rows = torch.cat(rows)
                rows = rows.sum(0, keepdim=True) if reduce else rows
                factors[module][0] += weight * rows.T @ rows
            for p in vectors:
                (g,) = torch.autograd.grad(f, p, column, retain_graph=True)
                factors[p][0] += weight * torch.outer(g.flatten(), g.flatten())
    order = {id(p): index for index, p in enumerate(model.parameters())}

    def first_parameter(item):
        return order[id(item[0].weight if _is_row_layer(item[0]) else item[0])]

    return dict(sorted(factors.items(), key=first_parameter))


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
