"""Results on disk: numbers and table of a finished study, progress of another."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from laplace_debiased.comparison.environment import environment

# of the code that runs, even if there are further commits before a study ends
ENVIRONMENT = environment()
# settings that change no result
_PLACES = ("data_root", "out")


def write_report(
    out: Path, name: str, settings: dict[str, Any], results: Any, table: str
) -> None:
    """Write the numbers as JSON and the table as Markdown, and print the table.

    Args:
        out: The folder, made if it is missing.
        name: Name of both files.
        settings: What was run, as values that JSON knows.
        results: The numbers behind the table.
        table: The table.
    """
    out.mkdir(parents=True, exist_ok=True)
    report = {"environment": ENVIRONMENT, "settings": settings, "results": results}
    (out / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    (out / f"{name}.md").write_text(table + "\n")
    print(table)


class Progress:
    """Results so far, so that an interrupted study resumes where it stopped.

    Args:
        settings: The study's settings.
        name: The study's name.

    Raises:
        SystemExit: If results so far are of other code or settings.
    """

    def __init__(self, settings: argparse.Namespace, name: str):
        self._path = settings.out / f"{name}.partial.json"
        own = {k: v for k, v in vars(settings).items() if k not in _PLACES}
        origin = {"commit": ENVIRONMENT["commit"], "settings": own}
        self._kept = {"origin": json.loads(json.dumps(origin)), "results": {}}
        if not self._path.exists():
            return
        kept = json.loads(self._path.read_text())
        if kept["origin"] != self._kept["origin"]:
            raise SystemExit(
                f"{self._path} has results of {kept['origin']}, this run is "
                f"{self._kept['origin']}: delete it to start anew."
            )
        self._kept = kept

    def run(self, key: str, measure: Callable[[], Any]) -> Any:
        """Return a result; measure and keep it if there is none.

        Args:
            key: Names the result.
            measure: Returns it, as plain values.

        Returns:
            The result.
        """
        results = self._kept["results"]
        if key not in results:
            results[key] = measure()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(self._kept))
        return results[key]

    def clear(self) -> None:
        """Forget all, once they are reported."""
        self._path.unlink(missing_ok=True)
