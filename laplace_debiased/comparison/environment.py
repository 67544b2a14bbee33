"""Where data are, and where numbers come from."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "laplace-torch", "curvlinops-for-pytorch")
_FOLDER = Path(__file__).parent


def default_data_root() -> Path:
    """Return the folder of torchvision's datasets.

    Returns:
        What the variable ``LAPLACE_DEBIASED_DATA`` says, or a cache folder.
    """
    cache = Path.home() / ".cache" / "laplace-debiased"
    return Path(os.environ.get("LAPLACE_DEBIASED_DATA", cache))


def environment() -> dict[str, Any]:
    """Describe the environment.

    Returns:
        Versions, number of threads, and the commit of the code, marked as dirty
        if Python files differ from it; None if it does not run from a clone.
    """
    return {
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        **{package: version(package) for package in _PACKAGES},
    }


def _commit() -> str | None:
    """Ask git, unless this file is not one of its: an installed package has none."""
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        commit = _git("rev-parse", "--short", "HEAD").strip()
        changed = _git("status", "--porcelain", "--", ":(top)*.py").strip()
        return f"{commit}-dirty" if changed else commit
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], capture_output=True, text=True, cwd=_FOLDER, check=True
    ).stdout
