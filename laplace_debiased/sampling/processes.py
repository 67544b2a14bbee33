"""Several processes that make one fit: the collective operations that it takes.

Where ``torch.distributed`` is initialized, each process calls the same methods, and all
get the same results. Alone, a process has nothing to exchange, and nothing happens.

A process that fails takes part in the others' next exchange, so that they fail, too,
and do not wait for it. One that was killed lets them fail as soon as the process group
notices, within its timeout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from heapq import heapify, heapreplace
from io import BytesIO
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from laplace_debiased.curvature.decomposition import symmetric_eigh, symmetric_eighs
from laplace_debiased.rows.user_warnings import warn_user

Value = TypeVar("Value")


class ProcessError(RuntimeError):
    """Another process failed, or is gone."""


class Alone:
    """The only process of a fit.

    Attributes:
        rank: The number of this process.
        size: The number of processes.
    """

    rank, size = 0, 1

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let a block of code succeed in all processes, or fail in all."""
        yield

    def gathered(
        self,
        value: Value,
        device: torch.device | str = "cpu",  # noqa: ARG002
    ) -> list[Value]:
        """Return the values of all processes.

        Args:
            value: That of this one, which can be pickled.
            device: Where tensors are needed.

        Returns:
            The values, by rank.
        """
        return [value]

    def of_first(
        self,
        compute: Callable[[], Value],
        device: torch.device,  # noqa: ARG002
    ) -> Value:
        """Return what the first process computes.

        Args:
            compute: Computes it; called there alone.
            device: Where tensors are needed.

        Returns:
            The value.
        """
        return compute()

    def totals(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Add the tensors of all processes.

        Args:
            tensors: Those of this one, as many as in all others, and of their shapes.
                They may be overwritten.

        Returns:
            The sums, the same bits in all processes.
        """
        return list(tensors)

    def eighs(
        self, matrices: Sequence[Tensor], tolerance: float = 0.0
    ) -> list[tuple[Tensor, Tensor]]:
        """Decompose matrices that all processes have, each some of them.

        Args:
            matrices: Symmetric matrices.
            tolerance: How far large ones may be from what is decomposed.

        Returns:
            As :func:`~laplace_debiased.curvature.decomposition.symmetric_eighs`, the
            same bits in all processes.
        """
        return symmetric_eighs(matrices, tolerance)


class Group(Alone):
    """One of the processes of ``torch.distributed``'s default group."""

    def __init__(self) -> None:
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        is_cuda = distributed.get_backend() == "nccl"
        self._device = torch.device("cuda" if is_cuda else "cpu")

    @contextmanager
    def together(self) -> Iterator[None]:
        """See :meth:`Alone.together`."""
        try:
            yield
            self._agree()
        except ProcessError:
            raise
        except BaseException as error:
            self._report(error)
            raise

    def gathered(self, value: Value, device: torch.device | str = "cpu") -> list[Value]:
        """See :meth:`Alone.gathered`."""
        self._agree()
        return [_loaded(own, device) for own in self._of_all(_saved(value))]

    def of_first(self, compute: Callable[[], Value], device: torch.device) -> Value:
        """See :meth:`Alone.of_first`."""
        own = [_saved(compute()) if self.rank == 0 else None]
        self._agree()
        with _or_gone():
            distributed.broadcast_object_list(own, 0, device=self._device)
        return _loaded(own[0], device)

    def totals(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See :meth:`Alone.totals`."""
        self._agree()
        found = []
        for tensor in tensors:
            total = tensor.detach().to(self._device).contiguous()
            with _or_gone():
                distributed.all_reduce(total)
            found.append(total.to(tensor.device))
        return found

    def eighs(
        self, matrices: Sequence[Tensor], tolerance: float = 0.0
    ) -> list[tuple[Tensor, Tensor]]:
        """See :meth:`Alone.eighs`."""
        # diagonals take no time
        costs = [len(own) ** 3 if own.ndim > 1 else 0 for own in matrices]
        owners = divided(costs, self.size)
        mine = [k for k, owner in enumerate(owners) if owner == self.rank and costs[k]]
        of_mine = (matrices[k] for k in mine)
        done = dict(zip(mine, symmetric_eighs(of_mine, tolerance), strict=True))
        self._agree()
        found = []
        for k, (matrix, owner) in enumerate(zip(matrices, owners, strict=True)):
            if not costs[k]:
                found.append(symmetric_eigh(matrix))
                continue
            # eigenvectors are columns: their transpose is what lies in memory
            pair = matrix.new_empty(len(matrix) + 1, len(matrix))
            if k in done:
                values, vectors = done.pop(k)
                torch.cat([vectors.mT, values[None]], out=pair)
            pair = self._from(owner, pair)
            found.append((pair[-1].clone(), pair[:-1].mT))
        return found

    def _from(self, owner: int, tensor: Tensor) -> Tensor:
        """Return a tensor of one of the processes."""
        sent = tensor.to(self._device).contiguous()
        with _or_gone():
            distributed.broadcast(sent, owner)
        return sent.to(tensor.device)

    def _of_all(self, value: Any) -> list[Any]:
        values = [None] * self.size
        with _or_gone():
            distributed.all_gather_object(values, value)
        return values

    def _agree(self, failure: str | None = None) -> None:
        """Exchange whether a process has failed.

        Raises:
            ProcessError: If another one has.
        """
        failed = torch.tensor(int(failure is not None), device=self._device)
        with _or_gone():
            distributed.all_reduce(failed)
        if not failed:
            return
        failures = enumerate(self._of_all(failure))
        others = [
            f"rank {rank} failed: {message}"
            for rank, message in failures
            if message is not None and rank != self.rank
        ]
        if failure is None:
            raise ProcessError(f"The fit ended in all processes, since {others[0]}")

    def _report(self, error: BaseException) -> None:
        """Tell the others of a failure here, if they are still there."""
        try:
            self._agree(f"{type(error).__name__}: {error}")
        except ProcessError as gone:
            warn_user(f"No other process was told: {gone}")


ALONE = Alone()


def present_group() -> Alone:
    """Return the processes that make a fit together.

    Returns:
        Those of ``torch.distributed``, if it is initialized.
    """
    if distributed.is_available() and distributed.is_initialized():
        return Group() if distributed.get_world_size() > 1 else ALONE
    return ALONE


def divided(costs: Sequence[float], count: int) -> list[int]:
    """Divide work: the largest pieces first, each to who has the least.

    Args:
        costs: The cost of each piece.
        count: How many there are to do it.

    Returns:
        Who does each piece.
    """
    owners = [0] * len(costs)
    loads = [(0.0, owner) for owner in range(count)]
    heapify(loads)
    for k in sorted(range(len(costs)), key=lambda k: -costs[k]):
        load, owner = loads[0]
        owners[k] = owner
        heapreplace(loads, (load + costs[k], owner))
    return owners


_WRAPPERS = nn.parallel.DistributedDataParallel, nn.DataParallel


def own_module(model: nn.Module) -> nn.Module:
    """Return the network in wrappers for training, whose names of parameters differ.

    Args:
        model: The network, or ``DistributedDataParallel`` or ``DataParallel`` of it, or
            what ``torch.compile`` returns.

    Returns:
        The network.

    Raises:
        ValueError: If its parameters are divided among processes.
    """
    while True:
        compiled = getattr(model, "_orig_mod", None)
        if isinstance(compiled, nn.Module):
            model = compiled
        elif isinstance(model, _WRAPPERS):
            model = model.module
        else:
            break
    if not distributed.is_available():
        return model
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    names = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    is_sharded = any(isinstance(m, FullyShardedDataParallel) for m in model.modules())
    if names or is_sharded:
        which = f", such as {names[0]!r}" if names else ""
        raise ValueError(
            f"The model's parameters are divided among processes (FSDP, DTensor){which}"
            ": give the posterior a model with whole parameters, into which you load "
            "the full state (`torch.distributed.checkpoint.state_dict`)."
        )
    return model


@contextmanager
def _or_gone() -> Iterator[None]:
    """Tell that an exchange failed, since another process is gone."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise ProcessError(
            "The fit ended, since the processes could not exchange results: another "
            f"one is gone, or did something else ({error})."
        ) from error


def _saved(value: Any) -> bytes:
    file = BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _loaded(content: Any, device: torch.device | str) -> Any:
    # it comes from processes that run the same program
    return torch.load(BytesIO(content), map_location=device, weights_only=False)
