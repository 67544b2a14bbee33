"""Run the studies whose results are of older code, the most important first.

A study is stale if the library, the studies' shared parts or its own script have
changed since the commit that its JSON names. The order is that of this folder's README.

    python benchmarks/run.py
    python benchmarks/run.py --all --hours 3
    python benchmarks/run.py limit prediction_cost

The first lists what is stale, without running it. Studies that are interrupted when the
hours are over resume at the next run, if they keep their progress.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

from shared.command_line import RESULTS

FOLDER = Path(__file__).parent
EXAMPLE = "default_comparison"


def studies() -> list[str]:
    """Return the studies in the README's order."""
    text = (FOLDER / "README.md").read_text()
    return re.findall(r"^\d+\. \[.*\]\(results/(\w+)/README\.md\)", text, re.MULTILINE)


def commands(study: str) -> list[list[str]]:
    """Return what runs a study."""
    if study != EXAMPLE:
        return [[sys.executable, str(FOLDER / f"{study}.py")]]
    library = [sys.executable, "-m", "laplace_debiased", "--out", str(RESULTS / study)]
    return [library, [*library, "--dataset", "fashion-mnist", "--seeds", "3"]]


def is_stale(study: str) -> bool:
    """Whether a study has results of other code."""
    reports = [json.loads(p.read_text()) for p in (RESULTS / study).glob("*.json")]
    return any(_has_changed(study, own["environment"]["commit"]) for own in reports)


def _has_changed(study: str, commit: str) -> bool:
    own = [] if study == EXAMPLE else [f"{study}.py", "shared"]
    compared = ["git", "diff", "--quiet", commit, "--", "../laplace_debiased", *own]
    # one: there are differences; anything else: the commit is not known
    finished = subprocess.run(compared, cwd=FOLDER, stderr=subprocess.DEVNULL)
    return finished.returncode != 0


def run(study: str, deadline: float) -> bool:
    """Run a study until it ends or the time is up.

    Args:
        study: The study.
        deadline: When to stop, in seconds of the monotonic clock.

    Returns:
        Whether it has ended well.
    """
    start = time.monotonic()
    try:
        for command in commands(study):
            subprocess.run(command, check=True, timeout=deadline - time.monotonic())
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        print(f"{study}: {error}", flush=True)
        return False
    print(f"{study}: {(time.monotonic() - start) / 60:.0f} minutes", flush=True)
    return True


def main() -> None:
    """List what is stale, or run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="*", help="which ones, stale or not")
    parser.add_argument("--all", action="store_true", help="run all that are stale")
    parser.add_argument("--hours", type=float, default=float("inf"))
    settings = parser.parse_args()
    unknown = set(settings.studies) - set(studies())
    if unknown:
        parser.error(f"not among the studies: {', '.join(sorted(unknown))}")
    chosen = settings.studies or [own for own in studies() if is_stale(own)]
    if not (settings.studies or settings.all):
        print("\n".join(chosen) or "All results are of the present code.")
        return
    deadline = time.monotonic() + 3600 * settings.hours
    failed = []
    for number, study in enumerate(chosen):
        if time.monotonic() >= deadline:
            print(f"No time for: {', '.join(chosen[number:])}")
            break
        if not run(study, deadline):
            failed.append(study)
    if failed:
        raise SystemExit(f"Not finished: {', '.join(failed)}")


if __name__ == "__main__":
    main()
