r"""Layers: parameters that are used together.

A layer that is applied at ``S`` positions of an example (tokens, pixels, calls) maps
input rows :math:`x_{ns}` to output rows :math:`W x_{ns} + b`. With the output gradient
rows :math:`g_{ns}`, the per-example gradient is :math:`\sum_s g_{ns} x_{ns}^\top`.
Kronecker factors, directional curvatures and functional variances are contractions of
these two tensors. The view follows Eschenhagen et al., 2023 (arXiv 2311.00636).

Rows have shape ``[batch, S, groups, features]``, where ``groups`` is one but for
grouped convolutions. The scale and the shift of a normalization are vectors, as is the
bias of a transposed convolution: each is a layer of its own that has gradient rows, the
per-example gradients, and no inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from laplace_debiased.rows.calls import Call
from laplace_debiased.rows.one_hot import OneHotRows
from laplace_debiased.rows.uses import Layout

Rows = TypeVar("Rows", bound=Tensor | OneHotRows)


@dataclass(frozen=True)
class Layer:
    """Parameters that are used together, by their positions in a list of parameters.

    Args:
        name: A name that no other layer has.
        matrix: Position of the weight that multiplies input rows; None if it does not
            take part.
        vector: Position of the bias, or of a normalization's scale or shift; None if
            there is none.
        d_out: Number of features of a gradient row, of all groups together.
        d_in: Number of features of an input row of a group; zero without a matrix.
        is_normalization: Whether the vector is a scale or a shift, whose gradient rows
            are the per-example gradients.
        is_transposed: Whether the weight is stored as ``[d_in, d_out]``.
        layouts: Where the examples are in each call of a pass; one entry if it is the
            same in all of them.
        groups: Number of groups.
        num_positions: Number of positions, S, of the example that the layer was found
            with.
        is_embedding: Whether the matrix is a table of embeddings, whose inputs are
            one-hot.
        calls: Calls of a parameter that is used in any way, whose gradient rows are the
            per-example gradients (:mod:`~laplace_debiased.rows.copies`); none for those
            that a row type tells of.
        is_diagonal: Whether the vector is so large that no more than the diagonal of
            its curvature is kept.
        is_recomputed: Whether a backward pass calls its function again, as
            checkpointing does.
        num_entries: Number of entries of that example on the axes of examples, of all
            calls.
    """

    name: str
    matrix: int | None
    vector: int | None
    d_out: int
    d_in: int = 0
    is_normalization: bool = False
    is_transposed: bool = False
    layouts: tuple[Layout, ...] = (Layout(),)
    groups: int = 1
    num_positions: int = 1
    is_embedding: bool = False
    calls: tuple[Call, ...] = ()
    is_diagonal: bool = False
    is_recomputed: bool = False
    num_entries: int = 0

    @property
    def has_inputs(self) -> bool:
        """Whether the layer has input rows."""
        return self.matrix is not None

    @property
    def gradient_shape(self) -> list[int]:
        """Shape of the gradient covariance, or of its diagonal."""
        return (1 if self.is_diagonal else 2) * [self.d_out]

    def input_shape(self, joint: bool = False) -> list[int]:
        """Shape of the input covariance, or of its diagonal, that of one-hot rows.

        Args:
            joint: Whether the bias is a further column of the matrix.

        Returns:
            The shape.
        """
        return (1 if self.is_embedding else 2) * [self.d_in + joint]

    @property
    def parameters(self) -> tuple[int, ...]:
        """Positions of the layer's parameters, the matrix first."""
        return tuple(p for p in (self.matrix, self.vector) if p is not None)

    def layout(self, call: int) -> Layout:
        """Where the examples are in a call of a pass.

        Args:
            call: Number of the call, from zero on.

        Returns:
            The layout.

        Raises:
            ValueError: If there are more calls than when the layer was found, and they
                differ.
        """
        if len(self.layouts) == 1:
            return self.layouts[0]
        if call >= len(self.layouts):
            raise ValueError(
                f"Layer {self.name!r} runs more than {len(self.layouts)} times for "
                "these examples, so that it is not known where it holds them."
            )
        return self.layouts[call]

    def state_dict(self) -> dict[str, Any]:
        """Return the layer as a dictionary of plain values."""
        layouts = [(layout.axis, layout.neighbours) for layout in self.layouts]
        calls = [tuple(vars(own).values()) for own in self.calls]
        return vars(self) | {"layouts": layouts, "calls": calls}

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Any]) -> Layer:
        """Build a layer from :meth:`state_dict`."""
        layouts = tuple(Layout(*own) for own in state_dict["layouts"])
        calls = tuple(
            Call(function, *map(tuple, of_tensors))
            for function, *of_tensors in state_dict["calls"]
        )
        return cls(**state_dict | {"layouts": layouts, "calls": calls})

    def as_matrix(self, weights: Tensor) -> Tensor:
        """Bring values of the weight into the order of rows.

        Args:
            weights: Values as they are stored ``[values, ...]``.

        Returns:
            Matrices ``[values, d_out, d_in]``.
        """
        if self.is_transposed:
            return weights.reshape(len(weights), self.d_in, self.d_out).mT
        return weights.reshape(len(weights), self.d_out, self.d_in)

    def as_stored(self, matrices: Tensor) -> Tensor:
        """Invert :meth:`as_matrix`.

        Args:
            matrices: Matrices ``[..., d_out, d_in]``.

        Returns:
            Values of the weight in the order that it is stored in ``[..., entries]``.
        """
        return (matrices.mT if self.is_transposed else matrices).flatten(-2)

    def join_calls(self, rows: list[Tensor]) -> Tensor:
        """Join the gradient rows of several calls.

        Args:
            rows: Rows ``[batch, S, groups, features]`` of each call.

        Returns:
            Rows with the positions of all calls; those of a normalization add up.
        """
        return sum(rows[1:], rows[0]) if self.is_normalization else join_positions(rows)


def join_positions(rows: list[Rows]) -> Rows:
    """Concatenate rows ``[batch, S, ...]`` along the positions."""
    first, *others = rows
    if not others:
        return first
    if isinstance(first, OneHotRows):
        return cast("Rows", first.joined(cast("list[OneHotRows]", others)))
    return cast("Rows", torch.cat(cast("list[Tensor]", rows), 1))
