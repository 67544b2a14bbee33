"""A copy of a network, with the values that the network has by now.

laplace-torch's last-layer posteriors are of a copy that is made when they are built. If
the network is trained afterwards, its copy has to follow before the next fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from laplace_debiased.rows.interrupts import on_failure
from laplace_debiased.rows.model_state import is_plain


@contextmanager
def following(copied: nn.Module, network: nn.Module | None) -> Iterator[None]:
    """Give a copy the values of its network, for good if a block of code succeeds.

    Args:
        copied: The copy.
        network: The network, None if there is none any more.

    Yields:
        Nothing.

    Raises:
        ValueError: If the network has other parameters or buffers than when it was
            copied.
    """
    changed = [] if network is None else list(_changed(copied, network))
    saved = [(own, own.detach().clone()) for own, _ in changed]
    with on_failure(lambda: _assign(saved)):
        _assign(changed)
        yield


def _changed(copied: nn.Module, network: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield tensors of the copy whose values differ, and the network's."""
    present, copies = _tensors(network), _tensors(copied)
    differing = [
        name
        for name in sorted(present.keys() | copies.keys())
        if _shape(present, name) != _shape(copies, name)
    ]
    if differing:
        raise ValueError(
            f"The network has other parameters or buffers ({differing[0]!r}) than when "
            "the posterior was built, which has a copy of it: build a new posterior."
        )
    for name, own in copies.items():
        there = present[name]
        comparable = is_plain(there) and is_plain(own)
        if comparable and not torch.equal(own, there.detach().to(own)):
            yield own, there.detach()


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers, shared ones by each of their names."""
    return {
        **dict(network.named_parameters(remove_duplicate=False)),
        **dict(network.named_buffers(remove_duplicate=False)),
    }


def _shape(tensors: dict[str, Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None


@torch.no_grad()
def _assign(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for own, value in pairs:
        own.copy_(value)
