r"""The top eigenspace of a mini-batch's GGN from its Gram matrix.

With square roots :math:`\Lambda_n = \sum_c s_{nc} s_{nc}^\top` of the loss curvature in
the output, the GGN is :math:`R^\top R` with the rows :math:`s_{nc}^\top J_n` of R, and
shares its eigenvalues with the Gram matrix :math:`R R^\top` (Dangel, Tatzel and Hennig,
2022, arXiv 2106.02624). Where weights are shared between positions, as in
convolutions, R takes few passes, and Lanczos iterations on the GGN very many.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from laplace_debiased.quadratics.eigenspace import Eigenspace, lanczos
from laplace_debiased.rows.batches import select_rows, with_examples
from laplace_debiased.rows.inputs import Batch, at_least_single, moved, on_device
from laplace_debiased.rows.layers import Layer
from laplace_debiased.rows.linearization import (
    Linearization,
    contract_positions,
    linearize,
)
from laplace_debiased.rows.output_curvature import (
    Loss,
    OutputCurvature,
    is_counted,
    loss_scale,
)
from laplace_debiased.rows.positions import standalone
from laplace_debiased.rows.selection import Selection, find_layers
from laplace_debiased.rows.targets import label_targets

_MEMORY_LIMIT = 2**32
# Lanczos iterations take about this many products for each eigenvector, and a product
# that many times the multiplications of a forward pass
_PRODUCTS, _PRODUCT_COST = 4, 6
_CHUNK = 32  # examples whose gradient rows are kept at a time
_GRAM_CHUNK = 512


def gram_is_cheaper(
    selection: Selection,
    loss_func: Loss,
    params: Sequence[Tensor],
    num_data: int,
    k: int,
) -> bool:
    """Tell if the Gram matrix takes less than Lanczos iterations on the GGN.

    Args:
        selection: The network's layers.
        loss_func: The loss.
        params: The parameters.
        num_data: Number of points.
        k: Number of eigenvectors.

    Returns:
        Whether all parameters are supported, rows and Gram matrix fit into memory, and
        they take fewer multiplications.
    """
    if selection.left_out:
        return False
    columns = OutputCurvature(loss_func).num_columns(selection.num_outputs)
    num_rows = num_data * columns
    size = sum(param.numel() for param in params)
    memory = num_rows * (size + num_rows) * params[0].element_size()
    if memory > _MEMORY_LIMIT or not 1 <= k < min(num_rows, size):
        return False
    forward = sum(
        layer.num_positions * layer.d_out * layer.d_in for layer in selection.layers
    )
    products = _PRODUCTS * k * _PRODUCT_COST * num_data * forward
    return num_rows**2 * size / 2 < products


def gram_eigenspace(
    model_func: nn.Module,
    loss_func: Loss,
    params: Sequence[Tensor],
    data: Sequence[Batch],
    k: int,
    *,
    tol: float = 1e-4,
    seed: int = 0,
    progress_bar: bool = False,
) -> Eigenspace:
    """Compute the top eigenspace of the GGN of few points.

    Args:
        model_func: The neural network, in which examples do not mix.
        loss_func: The loss.
        params: The parameters, all of supported layers.
        data: Batches ``(X, y)``.
        k: Number of eigenvectors, less than D and than rows (:func:`ggn_rows`).
        tol: Relative tolerance for the eigenvalues.
        seed: Seed of the start vector.
        progress_bar: Whether to show a progress bar over products with the Gram matrix.

    Returns:
        The eigenspace.

    Raises:
        ValueError: If a layer is not supported.
    """
    rows = ggn_rows(model_func, loss_func, params, data)
    gram = _gram(rows).cpu().numpy()
    space = lanczos(
        gram.__matmul__, len(gram), gram.dtype, k, tol, seed, progress_bar=progress_bar
    )
    # Rayleigh-Ritz: orthonormal also where eigenvalues are next to zero
    basis, _ = torch.linalg.qr(rows.T @ space.eigenvectors.to(rows))
    _, roots, turned = torch.linalg.svd(rows @ basis, full_matrices=False)
    return Eigenspace(roots.square(), basis @ turned.T)


@standalone
@torch.no_grad()
def ggn_rows(
    model_func: nn.Module,
    loss_func: Loss,
    params: Sequence[Tensor],
    data: Sequence[Batch],
) -> Tensor:
    """Compute rows R for which the GGN is :math:`R^T R`.

    Args:
        model_func: The neural network, in which examples do not mix.
        loss_func: The loss.
        params: The parameters, all of supported layers.
        data: Batches ``(X, y)``.

    Returns:
        Rows ``[points * columns, D]``, as many for each point as a root of the output
        curvature has columns.

    Raises:
        ValueError: If a layer is not supported.
    """
    curvature, generator = OutputCurvature(loss_func), torch.Generator()
    num_data, num_counted = sum(len(y) for _, y in data), 0
    device, start = params[0].device, 0
    layers: list[Layer] = []
    rows = torch.empty(0)
    for X, y in with_examples(data):
        X, y = on_device(X, device), label_targets(moved(y, device), loss_func)
        num_counted += int(is_counted(loss_func, y).sum())
        if not layers:
            layers = find_layers(model_func, params, X, len(y))
        for part in torch.arange(len(y)).split(_CHUNK):
            inputs = select_rows(X, part, len(y))
            linear = linearize(
                model_func, params, layers, inputs, len(part), check=True
            )
            columns = curvature.columns(linear.output, y[part], generator)
            new = _rows(linear, layers, columns, params)
            if start == 0:  # which may take most of the memory: there is no copy
                num_rows = num_data * len(columns)
                rows = new.new_empty(num_rows, new.shape[1])
            rows[start : start + len(new)] = new
            start += len(new)
    scale = loss_scale(loss_func, num_counted)
    return rows if scale == 1 else rows.mul_(scale**0.5)


def _rows(
    linear: Linearization,
    layers: Sequence[Layer],
    columns: Tensor,
    params: Sequence[Tensor],
) -> Tensor:
    """Multiply Jacobians by columns ``[k, batch, C]``: ``[batch * k, D]``."""
    parts = {}
    for layer in layers:
        for position in layer.parameters:
            if layer.name in linear.gradients:
                parts[position] = _parameter_rows(linear, layer, position, columns)
            else:
                shape = columns.shape[1], len(columns), params[position].numel()
                parts[position] = columns.new_zeros(shape)
    joined = torch.cat([parts[k] for k in sorted(parts)], 2)
    return at_least_single(joined.flatten(0, 1))


def _parameter_rows(
    linear: Linearization, layer: Layer, position: int, columns: Tensor
) -> Tensor:
    """Multiply a parameter's Jacobian by columns: ``[batch, k, d]``."""
    # [k, batch, C], [batch, C, S, groups, d_out] -> [batch, k, S, groups, d_out]
    gradients = torch.einsum("knc,nc...->nk...", columns, linear.gradients[layer.name])
    if position != layer.matrix:
        return gradients.flatten(3).sum(2)
    jacobians = contract_positions(gradients, linear.dense_inputs(layer))
    return layer.as_stored(jacobians)


def _gram(rows: Tensor) -> Tensor:
    """Multiply rows by each other; half of the products are enough."""
    gram = rows.new_zeros(len(rows), len(rows))
    for part in torch.arange(len(rows)).split(_GRAM_CHUNK):
        first = part[0]
        gram[first:, part] = rows[first:] @ rows[part].T
    return gram.tril() + gram.tril(-1).T
