"""Top eigenspaces of curvature, and how those of two batches overlap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import subspace_angles
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor
from tqdm import tqdm

from laplace_debiased.curvature.curvlinops_adapter import (
    LinearOperator as CurvatureOperator,
)
from laplace_debiased.rows.inputs import at_least_single


@dataclass(frozen=True)
class Eigenspace:
    """The largest eigenvalues with their eigenvectors.

    Args:
        eigenvalues: Eigenvalues ``[k]``, the largest first.
        eigenvectors: Eigenvectors as columns ``[D, k]``.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor


def top_eigenspace(
    operator: CurvatureOperator,
    k: int = 100,
    *,
    tol: float = 1e-4,
    seed: int = 0,
    progress_bar: bool = False,
) -> Eigenspace:
    """Compute the top eigenspace by Lanczos iterations.

    Args:
        operator: A symmetric curvlinops operator ``[D, D]``. If its network has batch
            statistics or dropout, they must have been in eval mode when it was built.
        k: Number of eigenvectors, less than D.
        tol: Relative tolerance for the eigenvalues.
        seed: Seed of the start vector.
        progress_bar: Whether to show a progress bar over the matrix-vector products.

    Returns:
        The eigenspace, in the operator's dtype and on its device.

    Raises:
        ValueError: If ``k`` is out of range.

    Example:
        >>> import torch
        >>> from curvlinops import GGNLinearOperator
        >>> from laplace_debiased import top_eigenspace
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> loss = torch.nn.MSELoss(reduction="sum")
        >>> data = [(torch.diag(torch.tensor([1.0, 2.0, 3.0])), torch.zeros(3, 1))]
        >>> ggn = GGNLinearOperator(model, loss, list(model.parameters()), data)
        >>> top_eigenspace(ggn, k=2).eigenvalues.round(decimals=2)
        tensor([18.,  8.])
    """
    size = operator.shape[1]
    if not 1 <= k < size:
        raise ValueError(f"`k` must lie in 1..{size - 1}, got {k}.")
    products = operator.to_scipy()

    def multiply(vector: np.ndarray) -> np.ndarray:
        return products @ vector.astype(products.dtype)

    space = lanczos(multiply, size, products.dtype, k, tol, seed, progress_bar)
    like = {"dtype": operator.dtype, "device": operator.device}
    return Eigenspace(space.eigenvalues.to(**like), space.eigenvectors.to(**like))


def lanczos(
    multiply: Callable[[np.ndarray], np.ndarray],
    size: int,
    dtype: np.dtype,
    k: int,
    tol: float,
    seed: int,
    progress_bar: bool = False,
) -> Eigenspace:
    """Compute the top eigenspace of a symmetric matrix by Lanczos iterations.

    Args:
        multiply: Multiplies the matrix by a vector ``[size]``.
        size: Its size.
        dtype: Its dtype.
        k: Number of eigenvectors, less than the size.
        tol: Relative tolerance for the eigenvalues.
        seed: Seed of the start vector.
        progress_bar: Whether to show a progress bar over the products.

    Returns:
        The eigenspace.
    """
    bar = tqdm(desc="[Eigenvectors]", unit="product", disable=not progress_bar)

    def counted(vector: np.ndarray) -> np.ndarray:
        bar.update()
        return multiply(vector)

    start = np.random.default_rng(seed).normal(size=size)
    with bar:
        values, vectors = eigsh(
            LinearOperator((size, size), counted, dtype=dtype),
            k,
            which="LA",
            v0=start.astype(dtype),
            tol=tol,
        )
    return Eigenspace(
        torch.as_tensor(values[::-1].copy()), torch.as_tensor(vectors[:, ::-1].copy())
    )


def overlap(first: Tensor, second: Tensor) -> float:
    r"""Compute the overlap of two subspaces, :math:`\|U^\top V\|_F^2 / k`.

    Args:
        first: Orthonormal columns ``[D, k]``.
        second: Orthonormal columns ``[D, k]``.

    Returns:
        One if the subspaces are the same, k / D in expectation for random ones
        (Gur-Ari, Roberts and Dyer, 2018, arXiv 1812.04754).

    Example:
        >>> import torch
        >>> from laplace_debiased import overlap
        >>> axes = torch.eye(4)
        >>> overlap(axes[:, :2], axes[:, 1:3])  # one of two dimensions
        0.5
    """
    return (first.T @ second).square().sum().item() / first.shape[1]


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Compute the principal angles between two subspaces.

    Args:
        first: Orthonormal columns ``[D, k]``.
        second: Orthonormal columns ``[D, l]``.

    Returns:
        Angles ``[min(k, l)]`` in radians, the smallest first.

    Example:
        >>> import torch
        >>> from laplace_debiased import principal_angles
        >>> axes = torch.eye(4)
        >>> principal_angles(axes[:, :2], axes[:, 1:3]).rad2deg()
        tensor([ 0., 90.])
    """
    bases = (at_least_single(basis).detach().cpu().numpy() for basis in (first, second))
    angles = subspace_angles(*bases)[::-1].copy()
    return torch.as_tensor(angles, dtype=first.dtype, device=first.device)
