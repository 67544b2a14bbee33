"""Warnings at the line of a user's code that led to them, however deep they are."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from warnings import warn

import curvlinops
import laplace
import scipy
import torch

_PACKAGES = [
    str(Path(str(own.__file__)).parent) for own in (curvlinops, laplace, scipy, torch)
]
# what lies between a user's code and a warning
_INSIDE = (
    contextlib.__file__,
    *(own + os.sep for own in (str(Path(__file__).parents[1]), *_PACKAGES)),
)


def warn_user(message: str) -> None:
    """Warn of what a user can change.

    Args:
        message: What to say.
    """
    # from Python 3.12 on, `skip_file_prefixes` does so
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warn(message, stacklevel=level)
