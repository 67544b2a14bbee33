"""Dense references, straight from the formulas, one example at a time by autograd."""

import torch
from torch import nn
from torch.nn.functional import pad, unfold


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
    if isinstance(module, nn.Conv1d):
        kernel, stride = (1, *module.kernel_size), (1, *module.stride)
        dilation, x = (1, *module.dilation), x.unsqueeze(2)
        padding = (*module._reversed_padding_repeated_twice, 0, 0)
    else:
        kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
        padding = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = pad(x, padding, mode=mode)
    x = x.reshape(1, module.groups, -1, *x.shape[2:]).mean(1)
    return unfold(x, kernel, dilation=dilation, stride=stride)[0].T


def kronecker_factors(
    model, X, y, loss, fisher_type="type-2", weights=None, reduce=False
):
    """K-FAC's (G, A) of each layer; ``loss`` has reduction sum."""
    weights = torch.ones(len(X), dtype=X.dtype) if weights is None else weights
    layers = [m for m in model.modules() if hasattr(m, "weight")]
    factors = {m: [0.0, 0.0] for m in layers}
    for (x, target), weight in zip(_examples(X, y), weights, strict=True):
        inputs, outputs = {}, {}

        def record(module, args, output, inputs=inputs, outputs=outputs):
            inputs[module], outputs[module] = args[0], output

        handles = [m.register_forward_hook(record) for m in layers]
        f = model(x)
        for handle in handles:
            handle.remove()
        for module in layers:
            rows = _input_rows(module, inputs[module].detach())
            rows = rows.mean(0, keepdim=True) if reduce else rows
            factors[module][1] += weight / weights.sum() * rows.T @ rows / len(rows)
        for column in output_columns(f, target, loss, fisher_type):
            for module in layers:
                (g,) = torch.autograd.grad(
                    f, outputs[module], column, retain_graph=True
                )
                g = g if isinstance(module, nn.Linear) else g.movedim(1, -1)
                rows = g.reshape(-1, g.shape[-1])
                rows = rows.sum(0, keepdim=True) if reduce else rows
                factors[module][0] += weight * rows.T @ rows
    return factors


def eigenbases(factors):
    """The eigenvectors of each parameter's block, as the columns of a matrix."""
    bases = []
    for module, (G, A) in factors.items():
        gradient_vectors = torch.linalg.eigh(G).eigenvectors
        bases.append(torch.kron(gradient_vectors, torch.linalg.eigh(A).eigenvectors))
        if module.bias is not None:
            bases.append(gradient_vectors)
    return bases


def kfac_blocks(factors):
    """K-FAC's diagonal block of each parameter."""
    blocks = []
    for module, (G, A) in factors.items():
        blocks.append(torch.kron(G, A))
        if module.bias is not None:
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
