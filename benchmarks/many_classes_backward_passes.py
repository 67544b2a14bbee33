"""How many backward passes many classes need, against the exact type-2 Fisher.

A network with 100 classes (pairs of MNIST's digits). With ``fisher_rank=r`` a point
takes r + 1 backward passes; sampled labels (MC) with as many passes are the
alternative that laplace-torch and curvlinops offer.

    python benchmarks/many_classes_backward_passes.py --data-root DATA
"""

from __future__ import annotations

import time
import warnings
from functools import partial
from pathlib import Path

import torch
from shared.command_line import parse, study_parser
from shared.data import PAIRS, problem_data
from shared.figures import draw_band, written_figure
from shared.internals import gradient_covariances
from shared.predictions import chosen_prior
from shared.reports import write_report
from shared.training import accuracy, trained
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from laplace_debiased import KronDebiasedLaplace

STUDY = Path(__file__).stem


def fit(
    model: nn.Module, points: Dataset, **options
) -> tuple[KronDebiasedLaplace, float]:
    """Fit the posterior to all points; also return the time it takes."""
    la = KronDebiasedLaplace(model, "classification", **options)
    start = time.perf_counter()
    la.fit(DataLoader(points, 64))
    return la, time.perf_counter() - start


def compare(la: KronDebiasedLaplace, exact: KronDebiasedLaplace) -> dict[str, float]:
    """Compare with a fit to the same points by the exact type-2 Fisher."""
    errors = [
        ((G - H).norm() / H.norm()).item()
        for G, H in zip(
            gradient_covariances(la), gradient_covariances(exact), strict=True
        )
    ]
    trace, exact_trace = la.H.diag().sum(), exact.H.diag().sum()
    return {
        "error": sum(errors) / len(errors),
        "last_layer_error": errors[-1],
        "trace": (trace / exact_trace - 1).item(),
        "prior_precision": chosen_prior(la) / chosen_prior(exact) - 1,
    }


def options_of(method: str, passes: int) -> dict:
    """Return the keywords that give a method so many backward passes a point."""
    if method == "fisher_rank":
        return {"fisher_rank": passes - 1}
    return {
        "backend_kwargs": {"stochastic": True},
        "asdl_fisher_kwargs": {"mc_samples": passes},
    }


def table(rows: list[dict], exact_seconds: float) -> str:
    """Format the rows as a Markdown table."""
    lines = [
        "| method | backward passes a point | error of G % | of the last layer's G % "
        "| trace % | chosen prior % | fit s |",
        "|---|---|---|---|---|---|---|",
        f"| exact type-2 | 99 | 0 | 0 | 0 | 0 | {exact_seconds:.1f} |",
    ]
    for row in rows:
        columns = [
            100 * torch.tensor([run[key] for run in row["runs"]])
            for key in ("error", "last_layer_error", "trace", "prior_precision")
        ]
        cells = [f"{column.mean():.1f} ± {column.std():.1f}" for column in columns]
        seconds = sorted(run["seconds"] for run in row["runs"])
        lines.append(
            f"| {row['method']} | {row['passes']} | {' | '.join(cells)} "
            f"| {seconds[len(seconds) // 2]:.1f} |"
        )
    return "\n".join(lines)


def write_figure(path: Path, rows: list[dict]) -> None:
    """Draw the error of the gradient covariances against the backward passes."""
    with written_figure(path, 2, 0.8) as figure:
        axis = figure.subplots()
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["method"] == method]
            errors = torch.tensor([[r["error"] for r in row["runs"]] for row in own])
            passes = [row["passes"] for row in own]
            draw_band(axis, passes, 100 * errors.T.numpy(), method, marker=".")
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="backward passes a point (exact: 99)",
            ylabel="error of G (%)",
        )
        axis.legend()


def main() -> None:
    """Run all methods on all seeds, and write table, numbers and figure."""
    parser = study_parser(__doc__, STUDY)
    parser.add_argument("--passes", type=int, nargs="+", default=[2, 3, 5, 10, 20, 50])
    parser.add_argument("--points", type=int, default=256)
    arguments = parse(parser)
    if arguments.quick:
        arguments.passes, arguments.points = [2], 16
    warnings.simplefilter("ignore")
    data = problem_data(PAIRS, arguments.data_root)
    model = trained("pair-classifier", PAIRS, arguments.data_root)
    points = Subset(data.train, range(arguments.points))
    measure = partial(fit, model, points)
    seeds = range(arguments.seeds)
    exact, exact_seconds = zip(*(measure(seed=seed) for seed in seeds), strict=True)
    exact_seconds = sorted(exact_seconds)[len(exact_seconds) // 2]
    rows = []
    for method in ("fisher_rank", "sampled labels (MC)"):
        for passes in arguments.passes:
            runs = []
            for seed in seeds:
                la, seconds = measure(**options_of(method, passes), seed=seed)
                runs.append(compare(la, exact[seed]) | {"seconds": seconds})
            rows.append({"method": method, "passes": passes, "runs": runs})
            print(table(rows[-1:], exact_seconds).splitlines()[-1], flush=True)
    settings = {
        "points": arguments.points,
        "seeds": arguments.seeds,
        "accuracy": accuracy(model, data.test_inputs, data.test_labels),
        "exact_seconds": exact_seconds,
    }
    write_report(arguments.out, STUDY, settings, rows, table(rows, exact_seconds))
    write_figure(arguments.out / f"{STUDY}.png", rows)


if __name__ == "__main__":
    main()
