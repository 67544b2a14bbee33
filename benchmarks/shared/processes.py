"""Cases in processes of their own, and how much memory a process takes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any


def reset_peak() -> None:
    """Forget this process's peak memory so far (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_megabytes() -> float:
    """Return the peak memory of this process since the last reset (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def in_own_process(
    script: Path | str, arguments: Sequence[str], seconds: float
) -> dict[str, Any]:
    """Run a script that prints a result as JSON in its last line.

    Args:
        script: The script.
        arguments: Its arguments.
        seconds: How long it may take.

    Returns:
        The result, or the last line of what went wrong as ``"error"``.
    """
    command = [sys.executable, "-W", "ignore", str(script), *arguments]
    try:
        output = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {"error": f"takes more than {seconds / 60:g} minutes"}
    if output.returncode:
        last = [f"ended with code {output.returncode}", *output.stderr.splitlines()][-1]
        return {"error": shorten(last, 100)}
    return json.loads(output.stdout.splitlines()[-1])
