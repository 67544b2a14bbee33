"""The passes that fits and predictions cannot do without, and clocks for them."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from shared.problems import Problem

BATCH_SIZE = 256
# a softmax's curvature has one column less than there are classes
ALL, OF_FIT = slice(None), slice(1, None)


def seconds(
    function: Callable[[], object], clock: Callable[[], float] = time.process_time
) -> float:
    """Return the time that a call takes, the process's own unless told otherwise."""
    start = clock()
    function()
    return clock() - start


def fastest(
    repeats: int,
    clock: Callable[[], float] = time.process_time,
    **functions: Callable[[], object],
) -> dict[str, float]:
    """Time functions in turns, after a first call of each.

    Args:
        repeats: Number of calls of each.
        clock: Returns the present time.
        **functions: The functions.

    Returns:
        The shortest time of each.
    """
    for function in functions.values():
        function()
    times = [
        {name: seconds(function, clock) for name, function in functions.items()}
        for _ in range(repeats)
    ]
    return {name: min(own[name] for own in times) for name in functions}


@torch.no_grad()
def forward(problem: Problem, images: Tensor) -> None:
    """Make forward passes."""
    for part in images.split(BATCH_SIZE):
        problem.model(part)


def backward(problem: Problem, images: Tensor, classes: slice = ALL) -> None:
    """Make a forward pass, and a backward pass for each class, or some of them."""
    output = problem.model(images)
    for column in output.sum(0)[classes]:
        torch.autograd.grad(column, problem.params(), retain_graph=True)
