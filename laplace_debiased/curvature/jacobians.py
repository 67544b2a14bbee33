"""Jacobians in a layer's weight, in an eigenbasis, from rows."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from laplace_debiased.curvature.bases import columns_rotated, rotated
from laplace_debiased.rows.linearization import contract_positions


def rotated_jacobians(gradients: Tensor, inputs: Tensor, basis: Tensor) -> Tensor:
    """Rotate the Jacobian in a layer's weight into its eigenbasis.

    Args:
        gradients: Gradient rows ``[batch, C, S, groups, d_out / groups]``.
        inputs: Rotated input rows ``[batch, S, groups, d_in]``.
        basis: Eigenvectors for the gradients ``[d_out, d_out]``.

    Returns:
        The Jacobian ``[batch, C, d_out, d_in]``.
    """
    if _is_small(inputs):
        return columns_rotated(contract_positions(gradients, inputs), basis)
    return contract_positions(_turned(gradients, basis), inputs)


def _is_small(inputs: Tensor) -> bool:
    """Whether a Jacobian has fewer entries than gradient rows, or has groups."""
    _, positions, num_groups, d_in = inputs.shape
    return num_groups > 1 or positions > d_in


def _turned(gradients: Tensor, basis: Tensor) -> Tensor:
    """Rotate gradient rows ``[batch, C, S, 1, d_out]``, in their own layout."""
    if gradients.stride(4) == 1:
        return rotated(gradients, basis)
    # [batch, C, d_out, S], the order in which convolutions have their gradients
    return columns_rotated(gradients.squeeze(3).mT, basis).mT.unsqueeze(3)


def jacobians_by_rows(
    gradients: Tensor, inputs: Tensor, basis: Tensor, jacobian_bytes: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield some rows of the rotated Jacobians after the others.

    Args:
        gradients: As in :func:`rotated_jacobians`.
        inputs: As in :func:`rotated_jacobians`.
        basis: As in :func:`rotated_jacobians`.
        jacobian_bytes: What they may take, but for a single row.

    Yields:
        Which rows, r of them, and ``[batch, C, r, d_in]``.
    """
    if _is_small(inputs):
        yield slice(None), rotated_jacobians(gradients, inputs, basis)
        return
    turned = _turned(gradients, basis)
    row_bytes = gradients.shape[:2].numel() * inputs.shape[3] * inputs.element_size()
    size = max(1, jacobian_bytes // row_bytes)
    for start in range(0, turned.shape[4], size):
        rows = slice(start, start + size)
        yield rows, contract_positions(turned[..., rows], inputs)
