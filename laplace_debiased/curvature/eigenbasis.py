r"""Curvature in a Kronecker-factored eigenbasis.

A layer's curvature is :math:`(U_G \otimes U_A) \mathrm{diag}(\lambda)
(U_G \otimes U_A)^\top`. Its eigenvalues are either *factored*,
:math:`\lambda_{ij} = l_i m_j`, as in K-FAC, or a full matrix
:math:`\lambda_{ij}`, as in EKFAC (George et al., 2018, arXiv 1806.03884). A bias has
one factor. laplace-torch's matrices are over parameters, one block for each, while
weight and bias of a layer share :math:`U_G`: here, and here alone, layers are split.
A block's eigenvectors are lists ``[U_G, U_A]`` or ``[U_G]``, each a basis as in
:mod:`~laplace_debiased.curvature.bases`; its eigenvalues ``[l, m]`` (factored),
``[matrix]`` or ``[vector]``. Where a weight is stored as ``[d_in, d_out]``, so are its
block's: ``[U_A, U_G]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from laplace.utils import block_diag, kron
from laplace.utils.matrix import Kron, KronDecomposed
from torch import Tensor

from laplace_debiased.curvature.bases import (
    as_matrix,
    columns_rotated,
    composed,
    inverse,
    rotated,
)
from laplace_debiased.curvature.kronecker import Kronecker, Spectrum
from laplace_debiased.rows.inputs import all_finite
from laplace_debiased.rows.layers import Layer


def spectrum(
    eigenvalues: Sequence[Tensor], delta: Tensor | float = 0.0, damping: bool = False
) -> Tensor:
    r"""Compute a block's eigenvalues, shifted by a prior precision.

    Args:
        eigenvalues: The block's eigenvalues, factored or not.
        delta: Prior precision.
        damping: Whether to spread the prior precision over the two factors,
            :math:`(l_i + \sqrt\delta)(m_j + \sqrt\delta)`.

    Returns:
        Eigenvalues ``[d_out, d_in]`` or ``[d_out]``.
    """
    if len(eigenvalues) == 1:
        return eigenvalues[0] + delta
    outer, inner = eigenvalues
    if damping:
        shift = torch.as_tensor(delta).sqrt()
        return torch.outer(outer + shift, inner + shift)
    return torch.outer(outer, inner) + delta


def to_eigenbasis(block: Tensor, eigenvectors: Sequence[Tensor]) -> Tensor:
    """Rotate parameters into the eigenbasis.

    Args:
        block: A block's parameters ``[..., d_out, d_in]`` or ``[..., d_out]``.
        eigenvectors: The block's eigenvectors.

    Returns:
        Coordinates in the eigenbasis, of the same shape.
    """
    if len(eigenvectors) == 1:
        return rotated(block, eigenvectors[0])
    gradient_vectors, input_vectors = eigenvectors
    return rotated(columns_rotated(block, gradient_vectors), input_vectors)


def from_eigenbasis(coordinates: Tensor, eigenvectors: Sequence[Tensor]) -> Tensor:
    """Invert :func:`to_eigenbasis`."""
    return to_eigenbasis(coordinates, [inverse(vectors) for vectors in eigenvectors])


class EigenbasisMatrix(KronDecomposed):
    """A block-diagonal curvature in Kronecker-factored eigenbases.

    It has the interface of laplace-torch's ``KronDecomposed`` and differs in that a
    block's eigenvalues need not factor, that ``damping`` survives ``+`` and ``*``
    (laplace-torch drops it), and that quadratic forms need one rotation, not two.

    Args:
        eigenvectors: Eigenvectors ``[U_G, U_A]`` or ``[U_G]`` of each block.
        eigenvalues: Eigenvalues of each block: one for each factor, or one matrix
            ``[d_out, d_in]``.
        deltas: Prior precision of each block, or of all.
        damping: Whether the prior precision is spread over the factors.

    Raises:
        ValueError: If ``damping`` is asked for eigenvalues that do not factor, or
            shapes do not match.

    Example:
        One block whose eigenvalues factor, with a prior precision:

        >>> import torch
        >>> from laplace_debiased import EigenbasisMatrix
        >>> eigenvalues = [torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0, 3.0])]
        >>> curvature = EigenbasisMatrix([[torch.eye(2), torch.eye(3)]], [eigenvalues])
        >>> precision = curvature + torch.tensor(0.5)
        >>> precision.spectra()
        [tensor([[1.5000, 0.5000, 3.5000],
                [2.5000, 0.5000, 6.5000]])]
        >>> precision.diag(-1)  # variances
        tensor([0.6667, 2.0000, 0.2857, 0.4000, 2.0000, 0.1538])
    """

    # laplace-torch declares tuples of one tensor, but makes lists of one or two
    eigenvectors: list[list[Tensor]]  # type: ignore[assignment]
    eigenvalues: list[list[Tensor]]  # type: ignore[assignment]

    def __init__(
        self,
        eigenvectors: list[list[Tensor]],
        eigenvalues: list[list[Tensor]],
        deltas: Tensor | None = None,
        damping: bool = False,
    ):
        for vectors, values in zip(eigenvectors, eigenvalues, strict=True):
            sides = torch.Size([len(v) for v in vectors])
            factored = [v.shape for v in values] == [(side,) for side in sides]
            if not factored and [v.shape for v in values] != [sides]:
                raise ValueError(
                    f"`eigenvalues` of shapes {[tuple(v.shape) for v in values]} do "
                    f"not match eigenvectors of sizes {tuple(sides)}."
                )
            if damping and not factored:
                raise ValueError("`damping` needs factored eigenvalues.")
        super().__init__(
            cast("list[tuple[Tensor]]", eigenvectors),
            cast("list[tuple[Tensor]]", eigenvalues),
            deltas,
            damping,
        )

    def _replace(
        self,
        eigenvalues: list[list[Tensor]] | None = None,
        deltas: Tensor | None = None,
    ) -> EigenbasisMatrix:
        return EigenbasisMatrix(
            self.eigenvectors,
            self.eigenvalues if eigenvalues is None else eigenvalues,
            self.deltas if deltas is None else deltas,
            self.damping,
        )

    def __add__(self, deltas: Tensor) -> EigenbasisMatrix:
        """Add a prior precision.

        Args:
            deltas: A scalar, or one for each block.

        Returns:
            The shifted matrix.
        """
        self._check_deltas(deltas)
        return self._replace(deltas=self.deltas + deltas)

    def __mul__(self, scalar: Tensor | float) -> EigenbasisMatrix:
        """Scale the curvature, but not the prior precision.

        laplace-torch's has no gradient in the scalar.

        Args:
            scalar: A non-negative scalar.

        Returns:
            The scaled matrix.
        """
        if isinstance(scalar, Tensor):
            scalar = scalar.reshape(()).to(self.deltas.device)
        # both factors alike, for `damping`
        roots = [scalar ** (1 / len(block)) for block in self.eigenvalues]
        pairs = zip(roots, self.eigenvalues, strict=True)
        return self._replace([[root * own for own in block] for root, block in pairs])

    __radd__ = __add__
    __rmul__ = __mul__

    def clone(self) -> EigenbasisMatrix:
        """Copy the matrix with all of its tensors."""

        def copy(blocks: list[list[Tensor]]) -> list[list[Tensor]]:
            return [[tensor.clone() for tensor in block] for block in blocks]

        return EigenbasisMatrix(
            copy(self.eigenvectors),
            copy(self.eigenvalues),
            self.deltas.clone(),
            self.damping,
        )

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Let ``torch.allclose`` compare matrices, densely; nothing else is defined."""
        if func is not torch.allclose:
            return NotImplemented
        dense = [a.to_matrix() if isinstance(a, cls) else a for a in args]
        return func(*dense, **(kwargs or {}))

    def spectra(self) -> list[Tensor]:
        """Return each block's eigenvalues with the prior precision.

        Returns:
            Tensors ``[d_out, d_in]`` or ``[d_out]``.
        """
        return [
            spectrum(values, delta, self.damping)
            for values, delta in zip(self.eigenvalues, self.deltas, strict=True)
        ]

    def factors(self) -> Kron | None:
        """Compute the Kronecker factors, without the prior precision.

        Returns:
            The factors of each block, as laplace-torch's ``Kron``; None if the
            eigenvalues of a block do not factor.
        """
        blocks = list(zip(self.eigenvectors, self.eigenvalues, strict=True))
        if any(len(vectors) != len(values) for vectors, values in blocks):
            return None
        kfacs = [
            [composed(values, U) for U, values in zip(*block, strict=True)]
            for block in blocks
        ]
        return Kron(cast("list[tuple[Tensor] | Tensor]", kfacs))

    def logdet(self) -> Tensor:
        """Compute the log determinant."""
        parts = [values.log().sum() for values in self.spectra()]
        return sum(parts[1:], parts[0])

    def _split(self, W: Tensor) -> list[Tensor]:
        """Split ``[..., params]`` into blocks ``[..., d_out(, d_in)]`` in own dtype."""
        shapes = [
            torch.Size([len(v) for v in vectors]) for vectors in self.eigenvectors
        ]
        W = W.to(self.eigenvectors[0][0].dtype)
        parts = W.split([shape.numel() for shape in shapes], dim=-1)
        return [
            part.reshape(*W.shape[:-1], *shape)
            for part, shape in zip(parts, shapes, strict=True)
        ]

    def _bmm(self, W: Tensor, exponent: float = -1) -> Tensor:
        """Multiply ``self ** exponent`` onto rows of ``[batch, outputs, params]``."""
        products = [
            from_eigenbasis(to_eigenbasis(part, vectors) * values**exponent, vectors)
            for part, vectors, values in zip(
                self._split(W), self.eigenvectors, self.spectra(), strict=True
            )
        ]
        flat = [product.reshape(*W.shape[:-1], -1) for product in products]
        return torch.cat(flat, -1).to(W.dtype)

    def inv_square_form(self, W: Tensor) -> Tensor:
        """Compute ``W @ inverse(self) @ W.T`` of each example.

        Args:
            W: ``[batch, outputs, params]``.

        Returns:
            ``[batch, outputs, outputs]``.
        """
        result = self.eigenvectors[0][0].new_zeros(())
        for part, vectors, values in zip(
            self._split(W), self.eigenvectors, self.spectra(), strict=True
        ):
            scaled = to_eigenbasis(part, vectors) * values.rsqrt()
            scaled = scaled.flatten(2)
            result = result + scaled @ scaled.mT
        return result.to(W.dtype)

    def diag(self, exponent: float = 1) -> Tensor:
        """Compute the diagonal of ``self ** exponent``.

        Args:
            exponent: The power.

        Returns:
            The diagonal ``[params]``.
        """
        squares = [[inverse(v) ** 2 for v in own] for own in self.eigenvectors]
        return torch.cat(
            [
                to_eigenbasis(values**exponent, vectors).flatten()
                for vectors, values in zip(squares, self.spectra(), strict=True)
            ]
        )

    def to_matrix(self, exponent: float = 1) -> Tensor:
        """Compute ``self ** exponent`` densely: for small networks only.

        Args:
            exponent: The power.

        Returns:
            The matrix ``[params, params]``.
        """
        blocks = []
        for vectors, values in zip(self.eigenvectors, self.spectra(), strict=True):
            matrices = [as_matrix(own) for own in vectors]
            basis = matrices[0] if len(matrices) == 1 else kron(*matrices)
            blocks.append((basis * values.flatten() ** exponent) @ basis.T)
        return block_diag(blocks)


def by_parameter(
    layers: Sequence[Layer],
    directions: Sequence[Kronecker],
    magnitudes: Sequence[Kronecker | Spectrum],
    damping: bool = False,
) -> EigenbasisMatrix:
    """Split layers into their parameters.

    Args:
        layers: The layers.
        directions: The eigenvectors of each.
        magnitudes: The eigenvalues of each.
        damping: Whether a prior precision is spread over the factors.

    Returns:
        A matrix with a block for each parameter, in the order of their positions.

    Raises:
        ValueError: If directions or magnitudes are not finite.
    """
    check_finite(layers, directions)
    check_finite(layers, magnitudes)
    blocks: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
    for layer, vectors, values in zip(layers, directions, magnitudes, strict=True):
        if layer.matrix is not None:
            own = [values.matrix] if isinstance(values, Spectrum) else values.tensors()
            block = vectors.tensors(), _present(own)
            blocks[layer.matrix] = transposed(*block) if layer.is_transposed else block
        if layer.vector is not None:
            first = values.vector if isinstance(values, Spectrum) else values.gradients
            blocks[layer.vector] = _present([vectors.gradients]), _present([first])
    ordered = [blocks[position] for position in sorted(blocks)]
    return EigenbasisMatrix(
        [vectors for vectors, _ in ordered],
        [values for _, values in ordered],
        damping=damping,
    )


def transposed(
    eigenvectors: Sequence[Tensor], eigenvalues: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Transpose the matrices that a block is over.

    Args:
        eigenvectors: The block's eigenvectors, two.
        eigenvalues: The block's eigenvalues, factored or not.

    Returns:
        Eigenvectors and eigenvalues of the transposed matrices.
    """
    return list(eigenvectors[::-1]), [v.movedim(0, -1) for v in eigenvalues[::-1]]


def _present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def check_finite(
    layers: Sequence[Layer], of_layers: Sequence[Kronecker | Spectrum]
) -> None:
    """Refuse curvature that overflowed, or could not be decomposed.

    Args:
        layers: The layers.
        of_layers: Factors, directions or magnitudes of each.

    Raises:
        ValueError: If there is an entry that is not finite; it names the layers.
    """
    bad = [
        f"{layer.name!r} ({tensor.dtype})"
        for layer, own in zip(layers, of_layers, strict=True)
        for tensor in own.tensors()
        if not all_finite(tensor)
    ]
    if bad:
        raise ValueError(
            f"The curvature of layer {', '.join(dict.fromkeys(bad))} is not finite: "
            "use a model in float32 or float64, or check its inputs and outputs for "
            "entries of extreme size."
        )
