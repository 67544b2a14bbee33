"""Bias reports of trained networks, as plain values."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import bias_report
from shared.command_line import parse, study_parser
from shared.data import IMAGES
from shared.reports import Progress, write_report


def measured_bias(
    model: nn.Module, points: TensorDataset, settings: argparse.Namespace, **options
) -> dict[str, Any]:
    """Compute a bias report, as plain values."""
    report = bias_report(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        DataLoader(points, batch_size=256),
        num_points=settings.points,
        **options,
    )

    def plain(values: Any) -> dict[str, Any]:
        return {
            name: getattr(values, name).tolist()
            for name in ("own", "others", "overall")
        }

    return {"curvature": plain(report.curvature), "slope": plain(report.slope)}


def bias_parser(description: str, study: str) -> argparse.ArgumentParser:
    """Return a parser of the options of the studies of bias.

    Args:
        description: The study's docstring.
        study: The study's name.

    Returns:
        The parser.
    """
    parser = study_parser(description, study)
    parser.add_argument(
        "--points",
        type=int,
        default=6000,
        help="how many stand for all data, the mini-batches among them",
    )
    parser.add_argument("--dataset", choices=IMAGES, default="fashion-mnist")
    parser.add_argument(
        "--redraw", action="store_true", help="write table and figure alone"
    )
    return parser


def parse_bias(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line; a quick run measures few points."""
    settings = parse(parser)
    if settings.quick:
        settings.points = 700
    return settings


def run_study(
    study: str,
    settings: argparse.Namespace,
    run: Callable[[argparse.Namespace, Progress], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
    write_figure: Callable[[Path, dict[str, Any]], None],
    recorded: dict[str, Any],
) -> None:
    """Run a study, or read its recorded numbers; write table and figure.

    Args:
        study: The study's name; that of a dataset is added if it is not FashionMNIST.
        settings: The command line.
        run: From settings and progress to the numbers.
        table: Formats the numbers.
        write_figure: Draws them.
        recorded: Settings to record beside those of all studies of bias.
    """
    name = study
    if settings.dataset != "fashion-mnist":
        name += f"_{settings.dataset}"
    if settings.redraw:
        results = json.loads((settings.out / f"{name}.json").read_text())["results"]
        (settings.out / f"{name}.md").write_text(table(results) + "\n")
        write_figure(settings.out / f"{name}.png", results)
        return
    progress = Progress(settings, name)
    results = run(settings, progress)
    common = {
        "dataset": settings.dataset,
        "seeds": settings.seeds,
        "points": settings.points,
    }
    write_report(settings.out, name, common | recorded, results, table(results))
    write_figure(settings.out / f"{name}.png", results)
    progress.clear()
