r"""The top eigenspace of a mini-batch's GGN from its Gram matrix.

With square roots :math:`\Lambda_n = \sum_c s_{nc} s_{nc}^\top` of the loss curvature in
the output, the GGN is :math:`R^\top R` with the rows :math:`s_{nc}^\top J_n` of R, and
shares its eigenvalues with the Gram matrix :math:`R R^\top` (Dangel, Tatzel and Hennig,
2022, arXiv 2106.02624). Where weights are shared between positions, as in
convolutions, R takes few passes, and Lanczos iterations on the GGN very many.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from laplace.utils import select_rows
from torch import Tensor, nn

from laplace_debiased.quadratics.eigenspace import Eigenspace, lanczos
from laplace_debiased.rows.layers import Block, curvature_blocks
from laplace_debiased.rows.linearization import (
    Linearization,
    contract_positions,
    linearize,
)
from laplace_debiased.rows.output_curvature import Loss, OutputCurvature
from laplace_debiased.rows.selection import find_layers, select
from laplace_debiased.rows.sweep import Inputs, at_least_single

Batches = Sequence[tuple[Inputs, Tensor]]

_MEMORY_LIMIT = 2**32
# Lanczos iterations take about this many products for each eigenvector, and a product
# that many times the multiplications of a forward pass
_PRODUCTS, _PRODUCT_COST = 4, 6
_CHUNK = 32  # examples whose gradient rows are kept at a time
_GRAM_CHUNK = 512


def gram_is_cheaper(
    model_func: nn.Module, params: list[Tensor], data: Batches, k: int
) -> bool:
    """Tell if the Gram matrix takes less than Lanczos iterations on the GGN.

    Args:
        model_func: The neural network.
        params: The parameters.
        data: Batches ``(X, y)``.
        k: Number of eigenvectors.

    Returns:
        Whether all layers are supported, rows and Gram matrix fit into memory, and they
        take fewer multiplications.
    """
    layers, left_out = select(model_func, params)
    if left_out:
        return False
    X, y = data[0]
    example = select_rows(X, torch.arange(1), len(y))
    example = example.to(params[0].device) if isinstance(X, Tensor) else example
    linear = linearize(model_func, layers, example, 1)
    num_data = sum(len(y) for _, y in data)
    num_rows = num_data * linear.output.shape[1]
    size = sum(param.numel() for param in params)
    memory = num_rows * (size + num_rows) * linear.output.element_size()
    if memory > _MEMORY_LIMIT or not 1 <= k < min(num_rows, size):
        return False
    forward = sum(
        linear.inputs[block.layer.name].shape[1] * params[block.positions[0]].numel()
        for block in curvature_blocks(layers, separate_weight_and_bias=True)
        if block.has_inputs
    )
    products = _PRODUCTS * k * _PRODUCT_COST * num_data * forward
    return num_rows**2 * size / 2 < products


def gram_eigenspace(
    model_func: nn.Module,
    loss_func: Loss,
    params: list[Tensor],
    data: Batches,
    k: int,
    *,
    tol: float = 1e-4,
    seed: int = 0,
    progressbar: bool = False,
) -> Eigenspace:
    """Compute the top eigenspace of the GGN of few points.

    Args:
        model_func: The neural network, in which examples do not mix.
        loss_func: The loss.
        params: The parameters, all of supported layers.
        data: Batches ``(X, y)``.
        k: Number of eigenvectors, less than D and than points times outputs.
        tol: Relative tolerance for the eigenvalues.
        seed: Seed of the start vector.
        progressbar: Whether to show a progress bar over products with the Gram matrix.

    Returns:
        The eigenspace.

    Raises:
        ValueError: If a layer is not supported.
    """
    rows = ggn_rows(model_func, loss_func, params, data)
    gram = _gram(rows).cpu().numpy()
    space = lanczos(
        gram.__matmul__, len(gram), gram.dtype, k, tol, seed, progressbar=progressbar
    )
    # Rayleigh-Ritz: orthonormal also where eigenvalues are next to zero
    basis, _ = torch.linalg.qr(rows.T @ space.eigenvectors.to(rows))
    _, roots, turned = torch.linalg.svd(rows @ basis, full_matrices=False)
    return Eigenspace(roots.square(), basis @ turned.T)


@torch.no_grad()
def ggn_rows(
    model_func: nn.Module, loss_func: Loss, params: list[Tensor], data: Batches
) -> Tensor:
    """Compute rows R for which the GGN is :math:`R^T R`.

    Args:
        model_func: The neural network, in which examples do not mix.
        loss_func: The loss.
        params: The parameters, all of supported layers.
        data: Batches ``(X, y)``.

    Returns:
        Rows ``[points * outputs, D]``.

    Raises:
        ValueError: If a layer is not supported.
    """
    layers = find_layers(model_func, params)
    blocks = curvature_blocks(layers, separate_weight_and_bias=True)
    curvature, generator = OutputCurvature(loss_func), torch.Generator()
    num_data = sum(len(y) for _, y in data)
    device, rows, start = params[0].device, None, 0
    for X, y in data:
        X, y = (X.to(device) if isinstance(X, Tensor) else X), y.to(device)
        for part in torch.arange(len(y)).split(_CHUNK):
            inputs = select_rows(X, part, len(y))
            linear = linearize(model_func, layers, inputs, len(part), check=True)
            columns = curvature.columns(linear.output, y[part], generator)
            by_param = {b.positions[0]: _block_rows(linear, b, columns) for b in blocks}
            joined = torch.cat([by_param[k] for k in range(len(params))], 2)
            new = at_least_single(joined.flatten(0, 1))
            if rows is None:  # which may take most of the memory: there is no copy
                rows = new.new_empty(num_data * joined.shape[1], new.shape[1])
            rows[start : start + len(new)] = new
            start += len(new)
    return rows if loss_func.reduction == "sum" else rows.div_(num_data**0.5)


def _block_rows(linear: Linearization, block: Block, columns: Tensor) -> Tensor:
    """Multiply a parameter's Jacobian by columns ``[k, batch, C]``: [batch, k, d]."""
    name = block.layer.name
    if name not in linear.gradients:
        return columns.new_zeros(columns.shape[1], len(columns), prod(block.shape))
    gradients = torch.einsum("knc,nc...->nk...", columns, linear.gradients[name])
    if not block.has_inputs:
        return gradients.flatten(3).sum(2)
    return contract_positions(gradients, linear.inputs[name]).flatten(2)


def _gram(rows: Tensor) -> Tensor:
    """Multiply rows by each other; half of the products are enough."""
    gram = rows.new_zeros(len(rows), len(rows))
    for part in torch.arange(len(rows)).split(_GRAM_CHUNK):
        first = part[0]
        gram[first:, part] = rows[first:] @ rows[part].T
    return gram.tril() + gram.tril(-1).T
