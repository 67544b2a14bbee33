"""Seeds of independent random numbers."""

from __future__ import annotations

from numpy.random import SeedSequence


def mixed_seed(seed: int, index: int) -> int:
    """Return a seed that neighbouring seeds and indices do not share.

    Args:
        seed: The seed.
        index: What it is for.

    Returns:
        The mixed seed.
    """
    return int(SeedSequence([int(seed) % 2**63, index]).generate_state(1)[0])
