"""What the benchmarks share: a network, the environment, and their reports."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

_PACKAGES = ("torch", "laplace-torch", "curvlinops-for-pytorch")


def conv_net() -> nn.Module:
    """Build an all-convolutional network with about 240,000 parameters."""

    def block(channels: int, filters: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(channels, filters, 3, stride, padding=1), nn.ReLU()]

    return nn.Sequential(
        *block(1, 32),
        *block(32, 32, stride=2),
        *block(32, 64),
        *block(64, 64, stride=2),
        *block(64, 100),
        *block(100, 128),
        nn.Conv2d(128, 10, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def environment() -> dict[str, Any]:
    """Describe where a benchmark runs, with the commit of the code."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    return {
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "commit": commit.stdout.strip() or None,
        **{package: version(package) for package in _PACKAGES},
    }


def write_report(
    out: Path, name: str, settings: dict[str, Any], results: Any, table: str
) -> None:
    """Write the numbers as JSON and the table as Markdown, and print the table."""
    out.mkdir(parents=True, exist_ok=True)
    report = {"environment": environment(), "settings": settings, "results": results}
    (out / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    (out / f"{name}.md").write_text(table + "\n")
    print(table)
