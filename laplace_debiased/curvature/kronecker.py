"""What is known of a layer: tensors for its output features, and for its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TypeVar

from torch import Tensor

Self = TypeVar("Self", bound="_Tensors")


class _Tensors:
    """A dataclass of tensors, some of which may be missing."""

    def map(self: Self, function: Callable[..., Tensor], *others: _Tensors) -> Self:
        """Apply a function to each tensor, and to those of others in its place.

        Args:
            function: The function.
            *others: Objects with the same tensors.

        Returns:
            The results. What is missing stays so.
        """
        parts = {
            field.name: [getattr(item, field.name) for item in (self, *others)]
            for field in fields(self)  # type: ignore[arg-type]
        }
        return type(self)(
            **{
                name: None if own[0] is None else function(*own)
                for name, own in parts.items()
            }
        )

    def state_dict(self) -> dict[str, Tensor | None]:
        """Return the tensors by their names."""
        return dict(vars(self))

    def tensors(self) -> list[Tensor]:
        """Return the tensors that are not missing."""
        values = [getattr(self, field.name) for field in fields(self)]  # type: ignore[arg-type]
        return [value for value in values if value is not None]


@dataclass(frozen=True, eq=False)
class Kronecker(_Tensors):
    r"""A tensor for each factor of a layer's Kronecker product.

    These are K-FAC's factors :math:`G \otimes A`, their eigenvectors
    :math:`U_G \otimes U_A`, or their eigenvalues, whose products are the layer's. A
    bias is a vector that goes with the first factor alone.

    Args:
        gradients: The tensor of the output features: G or :math:`U_G` ``[d_out,
            d_out]``, or eigenvalues ``[d_out]``.
        inputs: That of the inputs: A or :math:`U_A` ``[d_in, d_in]``, or eigenvalues
            ``[d_in]``; None for a layer without a matrix.
    """

    gradients: Tensor | None
    inputs: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Spectrum(_Tensors):
    """An eigenvalue for each direction of a layer, which need not be products.

    Args:
        matrix: Those of the layer's matrix ``[d_out, d_in]``, or with its bias as a
            further column ``[d_out, d_in + 1]``; None if it has none.
        vector: Those of its vector ``[d_out]``; None if it has none.
    """

    matrix: Tensor | None
    vector: Tensor | None = None


Magnitudes = TypeVar("Magnitudes", Kronecker, Spectrum)
