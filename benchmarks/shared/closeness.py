"""How much higher the test NLL of fits to few points is than that of all data.

A row is a way to fit; it is run again for each seed, and compared to the full-data fit
with the same magnitudes, at several prior precisions and at the one chosen by the
marginal likelihood. The label of a row begins with its magnitudes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor
from torch.nn.functional import cross_entropy

from shared.command_line import parse, study_parser
from shared.figures import legend_below, written_figure
from shared.fits import Result, fit, references
from shared.internals import Factors
from shared.predictions import PRIORS
from shared.problems import Problem
from shared.reports import Progress, write_report
from shared.training import accuracy

DATASET = "fashion-mnist"
NETWORKS = ("MLP", "all-convolutional", "ResNet")
# fits of the MLP take a tenth of a second
DRAWS = {"MLP": 20, "all-convolutional": 5, "ResNet": 5}
FIRST_SEED = 100
MAGNITUDES = ("kfac", "ggn")

TWO_BATCH = {"estimator": "two_batch"}
CROSS_FIT = {"estimator": "cross_fit"}
UNIFORM = {"sampling": "uniform"}
CURVATURE = {"sampling": "curvature"}
GGN = {"magnitudes": "ggn"}

# from a network, K-FAC's factors of all data, and the fit's keywords
Row = Callable[..., Result]


def ours(problem: Problem, factors: Factors, **options: Any) -> Result:
    """Fit our posterior."""
    return Result.of(problem, *fit(problem, **options))


def rows_parser(description: str, study: str) -> argparse.ArgumentParser:
    """Return a parser of the options of these studies.

    Args:
        description: The study's docstring.
        study: The study's name.

    Returns:
        The parser.
    """
    parser = study_parser(description, study)
    parser.set_defaults(seeds=None)  # as many draws as DRAWS says
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument(
        "--networks", nargs="+", choices=NETWORKS, help="all, or the MLP if --quick"
    )
    parser.add_argument(
        "--magnitudes", nargs="+", choices=MAGNITUDES, default=MAGNITUDES
    )
    return parser


def parse_rows(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, and say which networks it asks for."""
    settings = parse(parser)
    if not settings.networks:
        settings.networks = NETWORKS[:1] if settings.quick else NETWORKS
    return settings


def with_magnitudes(rows: dict[str, Row], magnitudes: Sequence[str]) -> dict[str, Row]:
    """Keep the rows with some magnitudes."""
    return {k: row for k, row in rows.items() if k.split(": ")[0] in magnitudes}


def full_data_results(
    problem: Problem, settings: argparse.Namespace
) -> tuple[dict[str, Result], Factors]:
    """Return the full-data references on test images, and K-FAC's factors."""
    return references(problem, keep=not settings.quick)


def run_study(
    study: str,
    rows: dict[str, Row],
    settings: argparse.Namespace,
    load: Callable[[str, argparse.Namespace], Problem] | None = None,
    full: Callable[..., tuple[dict[str, Result], Factors]] = full_data_results,
    first_seed: int = FIRST_SEED,
) -> dict[str, Any]:
    """Run the rows on all networks, and write table and numbers.

    Args:
        study: The study's name.
        rows: The rows.
        settings: The command line.
        load: Loads a network with its data; None for that of the test images.
        full: From problem and settings to the full-data references.
        first_seed: Seed of the first draw.

    Returns:
        The results of each network.
    """
    progress = Progress(settings, study)
    results = {}
    for name in settings.networks:
        problem = (load or load_problem)(name, settings)
        seeds = range(first_seed, first_seed + (settings.seeds or DRAWS[name]))
        results[name] = run_network(
            problem, rows, full(problem, settings), settings.budget, seeds, progress
        )
    recorded = {"budget": settings.budget, "priors": PRIORS, "dataset": DATASET}
    write_report(settings.out, study, recorded, results, table(results))
    progress.clear()
    return results


def load_problem(name: str, settings: argparse.Namespace) -> Problem:
    """Load a network, and the test images."""
    return Problem.load(name, DATASET, settings.data_root, settings.quick)


def run_network(
    problem: Problem,
    rows: dict[str, Row],
    full: tuple[dict[str, Result], Factors],
    budget: int,
    seeds: range,
    progress: Progress,
) -> dict[str, Any]:
    """Measure all rows on all seeds.

    Args:
        problem: The network with its data.
        rows: The rows.
        full: The full-data references, and K-FAC's factors.
        budget: Number of points of each fit.
        seeds: Seeds of the draws.
        progress: Results so far.

    Returns:
        Results of each row and seed, and what they are compared to.
    """
    results, (expected, factors) = {}, full
    with torch.no_grad():
        output = problem.model(problem.inputs)
    print(f"{problem.name}: {expected}", flush=True)

    def measure(row: Row) -> list[dict]:
        return [
            asdict(row(problem, factors, seed=seed, budget=budget)) for seed in seeds
        ]

    for label, row in rows.items():
        key = f"{problem.name}: {label}"
        results[label] = progress.run(key, partial(measure, row))
        runs = [Result(**result) for result in results[label]]
        line = summary(expected[label.split(":")[0]], runs)
        print(f"{problem.name}, {label} {line}", flush=True)
    return {
        "accuracy": accuracy(problem.model, problem.inputs, problem.labels),
        "num_params": sum(p.numel() for p in problem.params()),
        "map_nll": cross_entropy(output, problem.labels).item(),
        "references": {key: asdict(value) for key, value in expected.items()},
        "seeds": list(seeds),
        "rows": results,
    }


def summary(reference: Result, results: list[Result]) -> list[str]:
    """Format differences to the reference in percent, mean ± standard deviation."""
    nll = torch.tensor([result.nll for result in results])
    prior = torch.tensor([[result.prior_precision] for result in results])
    expected = torch.tensor([*reference.nll, reference.prior_precision])
    percent = 100 * (torch.cat([nll, prior], 1) / expected - 1)
    return [
        f"{mean:+.1f} ± {std:.1f}"
        for mean, std in zip(percent.mean(0), percent.std(0), strict=True)
    ]


def absolute_rows(result: dict, magnitudes: Sequence[str]) -> dict[str, list[str]]:
    """Format NLLs, of the network alone and of all data, to which others are compared.

    Args:
        result: A network's results.
        magnitudes: Which full-data fits.

    Returns:
        Cells by label.
    """
    rows = {"MAP: NLL": [f"{result['map_nll']:.3f}"] * len(PRIORS) + ["-"]}
    for kind in magnitudes:
        full = Result(**result["references"][kind])
        cells = [f"{nll:.3f}" for nll in full.nll]
        rows[f"full data, {kind}: NLL"] = [*cells, f"{full.prior_precision:.1f}"]
    return rows


def table(networks: dict) -> str:
    """Format the results as Markdown tables, one for each network."""
    parts = []
    for name, result in networks.items():
        references = {k: Result(**r) for k, r in result["references"].items()}
        kinds = dict.fromkeys(label.split(":")[0] for label in result["rows"])
        parts.append(
            f"**{name}**: {result['num_params']:,} parameters, accuracy "
            f"{100 * result['accuracy']:.1f} %\n"
        )
        priors = " | ".join(f"{prior:g}" for prior in PRIORS)
        parts.append(f"| estimator | {priors} | chosen prior |")
        parts.append("|---" * (len(PRIORS) + 2) + "|")
        rows = absolute_rows(result, list(kinds))
        for label, runs in result["rows"].items():
            results = [Result(**run) for run in runs]
            rows[label] = summary(references[label.split(":")[0]], results)
        parts += [f"| {label} | {' | '.join(cells)} |" for label, cells in rows.items()]
        parts.append("")
    return "\n".join(parts).rstrip()


def percent_above(result: dict, label: str) -> Tensor:
    """Difference of a row's NLLs to full data in percent, ``[seeds, priors]``."""
    reference = torch.tensor(result["references"][label.split(":")[0]]["nll"])
    nll = torch.tensor([run["nll"] for run in result["rows"][label]])
    return 100 * (nll / reference - 1)


def write_figure(
    path: Path,
    networks: dict[str, Any],
    draw_panel: Callable[[Axes, dict], None],
    ylabel: str = "test NLL above\nfull data (%)",
) -> None:
    """Draw a panel for each network, with a common legend.

    Args:
        path: Where to write the figure.
        networks: Results of each network.
        draw_panel: Draws a network's results into axes.
        ylabel: What is drawn.
    """
    with written_figure(path, 3, 1.3) as figure:
        panels = figure.subplots(1, len(networks), squeeze=False)[0]
        for axis, (name, result) in zip(panels, networks.items(), strict=True):
            draw_panel(axis, result)
            axis.set_title(name)
        panels[0].set_ylabel(ylabel)
        legend_below(figure, panels[0], 3)
