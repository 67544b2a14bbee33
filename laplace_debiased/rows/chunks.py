"""How much is computed at a time."""

from __future__ import annotations

import torch

# by which a GPU's work outweighs the start of a kernel
_ON_GPU = 64


def at_once(size: int, device: torch.device) -> int:
    """Tell how much to compute at a time on a device.

    Args:
        size: What fits into a processor's cache, in any unit.
        device: The device.

    Returns:
        As much on a CPU; on others, on which many small computations take longer than
        few large ones, a multiple.
    """
    return size if device.type == "cpu" else _ON_GPU * size
