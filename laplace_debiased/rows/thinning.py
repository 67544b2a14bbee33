"""Some positions of an example in the place of all: neighbours tell much the same."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import torch
from torch import Tensor

from laplace_debiased.rows.layers import Layer
from laplace_debiased.rows.uses import Choice

# its multiples are spread evenly over the unit interval
_GOLDEN = (5**0.5 - 1) / 2
_FEWEST = 4
# a product of matrices is faster than a convolution with as many operations
_SPEED = 2


class Thinning:
    """Draws positions of a layer in one pass, other ones for each example.

    They are at equal distances along their numbers, from a random start, and each is
    taken with the same probability. If there are several calls, their positions are
    numbered one after the other.

    Args:
        num_taken: How many of an example's positions are taken.
        num_positions: Number of positions, in all calls together.
        seed: A random number of 32 bits.
    """

    def __init__(self, num_taken: int, num_positions: int, seed: int):
        self._num_taken, self._num_positions = num_taken, num_positions
        quotient, self._passed = divmod(seed, num_positions)
        self._start = quotient * _GOLDEN % 1

    def __call__(self, batch_size: int, num_positions: int) -> Tensor:
        """Choose positions of the next call.

        Args:
            batch_size: Number of examples.
            num_positions: Number of their positions in this call.

        Returns:
            The positions' numbers ``[batch, count]``; a call of few positions may have
            none.
        """
        before = self._passed // self._num_positions
        self._passed += self._num_taken * num_positions
        count = self._passed // self._num_positions - before
        starts = self._start + _GOLDEN * torch.arange(batch_size, dtype=torch.float64)
        steps = starts.frac()[:, None] + torch.arange(count)
        return (
            (steps * num_positions / max(1, count)).long().clamp(max=num_positions - 1)
        )


def thinnings(most: int, seed: int) -> Callable[[Layer], Choice | None]:
    """Return what draws positions of each layer in a pass.

    Args:
        most: How many positions of an example are taken at most; of layers with many
            inputs, they are as many as cost no more than the forward pass.
        seed: Seed of the pass. What a layer draws does not depend on others.

    Returns:
        The draw of a layer; None for one of which all positions are taken.
    """
    own: dict[str, Thinning] = {}

    def of_layer(layer: Layer) -> Thinning | None:
        count = num_taken(layer, most)
        if count == layer.num_positions:
            return None
        if layer.name not in own:
            bits = Random(f"{seed} {layer.name}").getrandbits(32)
            own[layer.name] = Thinning(count, layer.num_positions, bits)
        return own[layer.name]

    return of_layer


def num_taken(layer: Layer, most: int) -> int:
    """Tell how many positions of an example are taken."""
    affordable = _SPEED * layer.num_positions * layer.d_out // layer.d_in
    return min(layer.num_positions, most, max(_FEWEST, affordable))
