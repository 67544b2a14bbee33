r"""What a function call does with its parameters: one class for each kind of use.

A network uses a parameter where it passes it to a function: ``F.linear``, ``F.conv2d``,
``F.layer_norm``. What the function got and what it returned give the rows. To add a
kind of use, write a class, and enter its functions into
:data:`~laplace_debiased.rows.functions.USES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from laplace_debiased.rows.one_hot import OneHotRows
from laplace_debiased.rows.products import rows_times


@dataclass(frozen=True)
class Layout:
    """Where a tensor holds the examples of a batch.

    Args:
        axis: The axis, of a size ``k * batch``.
        neighbours: Whether the ``k`` entries of an example are neighbours on it
            (windows of an image), or those of the same number (tokens of a
            sequence-first network, whose first two axes were joined). None if each
            example had a single entry, which does not tell.
    """

    axis: int = 0
    neighbours: bool | None = True

    def split(self, tensor: Tensor, batch_size: int) -> Tensor:
        """Bring the examples to the front.

        Args:
            tensor: The tensor.
            batch_size: Number of examples.

        Returns:
            The tensor as ``[batch, k, ...]``, with its other axes in their order.

        Raises:
            ValueError: If the axis holds no whole number of entries for each example,
                or several where it is not known whose they are.
        """
        front = tensor.movedim(self.axis, 0)
        if len(front) % batch_size:
            raise ValueError(
                f"A layer got a tensor of shape {tuple(tensor.shape)} for a batch of "
                f"{batch_size}: its axis {self.axis} must hold the examples."
            )
        if self.neighbours is None and len(front) > batch_size > 1:
            raise ValueError(
                f"A layer got a tensor of shape {tuple(tensor.shape)} for a batch of "
                f"{batch_size}, but one entry on axis {self.axis} for each example "
                "when it was found, which does not tell whose entries these are: fit "
                "with examples of several positions first in the data."
            )
        if self.neighbours or self.neighbours is None:
            return front.unflatten(0, (batch_size, -1))
        return front.unflatten(0, (-1, batch_size)).transpose(0, 1)


# from numbers of examples and of their positions to numbers of positions ``[batch,
# count]``
Choice = Callable[[int, int], Tensor]


@dataclass(frozen=True, eq=False)
class Use:
    """A function call with parameters.

    Args:
        input: The function's input.
        weight: What it takes as weight.
        bias: What it takes as bias.
    """

    input: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def axes(self) -> range:
        """Axes of input and output that may hold the examples."""
        raise NotImplementedError

    @property
    def mixes_examples(self) -> bool:
        """Whether the function computes statistics over the batch."""
        return False

    def is_vector(self, key: str) -> bool:
        """Whether a parameter is a layer of its own, without input rows.

        The gradient rows of a call are the per-example gradients then.

        Args:
            key: The parameter, ``"weight"`` or ``"bias"``.

        Returns:
            Whether it is.
        """
        return False

    def before_changes(self, differentiable: bool) -> Use:
        """Keep what the rows need, before the network may overwrite the input.

        Args:
            differentiable: Whether rows are to be differentiated.

        Returns:
            The use.
        """
        return self if differentiable else replace(self, input=self.input.detach())

    def gradient_rows(
        self, gradient: Tensor, key: str, layout: Layout, batch_size: int
    ) -> Tensor:
        """Rearrange the gradient in the output.

        Args:
            gradient: The gradient, of the output's shape.
            key: The parameter whose rows are asked for, ``"weight"`` or ``"bias"``.
            layout: Where the output holds the examples.
            batch_size: Number of examples.

        Returns:
            Rows ``[batch, S, groups, d_out / groups]``.
        """
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class MatrixUse(Use):
    """The weight is a matrix that is multiplied by rows of inputs."""

    @property
    def is_transposed(self) -> bool:
        """Whether the weight is stored as ``[d_in, d_out]``."""
        return False

    def input_rows(
        self, layout: Layout, batch_size: int, choice: Choice | None = None
    ) -> Tensor | OneHotRows:
        """Rearrange the input.

        Args:
            layout: Where the input holds the examples.
            batch_size: Number of examples.
            choice: Chooses the positions that are asked for; None for all.

        Returns:
            Rows ``[batch, S, groups, d_in / groups]``.
        """
        raise NotImplementedError

    def rotated_rows(
        self, layout: Layout, batch_size: int, basis: Tensor
    ) -> Tensor | OneHotRows:
        """Compute the coordinates of the input rows in a basis.

        Args:
            layout: As in :meth:`input_rows`.
            batch_size: As in :meth:`input_rows`.
            basis: Orthonormal columns ``[d_in / groups, d_in / groups]``, or a vector
                for the unit vectors.

        Returns:
            Rows in the basis's dtype; one-hot rows stay what they are.
        """
        rows = self.input_rows(layout, batch_size).to(basis.dtype)
        if isinstance(rows, OneHotRows) or basis.ndim == 1:
            return rows
        return rows_times(rows, basis)
