"""How close posteriors from few backward passes come to the full-data posterior.

Three networks were trained on FashionMNIST. The full-data references are
laplace-torch's ``KronLaplace`` (K-FAC) and EKFAC; every other row gets backward passes
for ``budget`` points only, and is drawn again for each seed. The studies are:

- ``estimators``: each ingredient alone, and together;
- ``settings``: pools, floors and folds of the best estimator, on validation images and
  with other draws than the others;
- ``fractions``: the share of the points that give directions, with two batches.

An interrupted study resumes where it stopped.

    python benchmarks/sampling_quality.py estimators --data-root DATA
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import combinations
from pathlib import Path

import torch
from common import Progress, figure_style, parse, study_parser, write_report
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from networks import accuracy, validation_data
from posteriors import (
    PRIORS,
    Problem,
    Result,
    fit,
    references,
    undo_debiasing,
    with_kfac,
)
from torch import Tensor
from torch.nn.functional import cross_entropy

from laplace_debiased import EigenbasisMatrix
from laplace_debiased.curvature.eigenbasis import Factors, decompose, project
from laplace_debiased.curvature.streams import average

DATASET = "fashion-mnist"
NETWORKS = ("MLP", "all-convolutional", "ResNet")
# fits of the MLP take a tenth of a second
DRAWS = {"MLP": 20, "all-convolutional": 5, "ResNet": 5}
# settings are compared on validation images and other draws than the rest
TUNING = "settings"
FIRST_SEED = 100


def ours(problem: Problem, factors: list[Factors], **options) -> Result:
    """Fit our posterior."""
    return Result.of(problem, *fit(problem, **options))


def single_batch(problem: Problem, factors: list[Factors], **options) -> Result:
    """Use the same points for both roles, which does not debias."""
    la, _ = fit(problem, **CROSS_FIT, **options)
    undo_debiasing(la)
    return Result.of(problem, la)


def oracle(problem: Problem, factors: list[Factors], **options) -> Result:
    """Take directions from a draw, and magnitudes from all data."""
    la, _ = fit(problem, **BEST, **options)
    la.H = EigenbasisMatrix(la.H.eigenvectors, project(factors, la.H.eigenvectors))
    return Result.of(problem, la)


def other_floor(
    problem: Problem, factors: list[Factors], floor: float, **options
) -> Result:
    """Change the share of the uniform distribution in a draw's probabilities."""
    return ours(problem, factors, sampling_floor=floor, **options)


def repeated_splits(problem: Problem, factors: list[Factors], **options) -> Result:
    """Average magnitudes over all splits of eight folds in two halves (NERCOME)."""
    la, _ = fit(problem, **BEST, num_folds=8, **options)
    folds, shares = la.H_facs.folds, la.H_facs.shares
    magnitudes = []
    for half in combinations(range(len(folds)), len(folds) // 2):
        rest = [k for k in range(len(folds)) if k not in half]
        directions, judges = (
            average([folds[k] for k in chosen], [shares[k] for k in chosen])
            for chosen in (half, rest)
        )
        magnitudes.append(project(judges, decompose(directions)))
    values = average(magnitudes, [1.0] * len(magnitudes))
    la.H = EigenbasisMatrix(la.H.eigenvectors, values)
    return Result.of(problem, la)


UNIFORM = {"sampling": "uniform"}
CURVATURE = {"sampling": "curvature"}
TWO_BATCH = {"estimator": "two_batch"}
CROSS_FIT = {"estimator": "cross_fit"}
GGN = {"magnitudes": "ggn"}
BEST = CROSS_FIT | CURVATURE
MAGNITUDES = ("kfac", "ggn")
SHARES = tuple(f"{k / 10:g}" for k in range(1, 10))
Row = Callable[..., Result]
STUDIES: dict[str, dict[str, Row]] = {
    "estimators": {
        "kfac: single batch, uniform": partial(single_batch, **UNIFORM),
        "kfac: two batches, uniform": partial(ours, **TWO_BATCH, **UNIFORM),
        "kfac: cross-fit, uniform": partial(ours, **CROSS_FIT, **UNIFORM),
        "kfac: two batches, uniform, inputs of pool": partial(
            other_floor, floor=1.0, **TWO_BATCH, **CURVATURE
        ),
        "kfac: cross-fit, uniform, inputs of pool": partial(
            other_floor, floor=1.0, **BEST
        ),
        "kfac: single batch, curvature": partial(single_batch, **CURVATURE),
        "kfac: two batches, curvature": partial(ours, **TWO_BATCH, **CURVATURE),
        "kfac: cross-fit, curvature": partial(ours, **BEST),
        "kfac: oracle": oracle,
        "ggn: two batches, uniform": partial(ours, **TWO_BATCH, **UNIFORM, **GGN),
        "ggn: cross-fit, uniform": partial(ours, **CROSS_FIT, **UNIFORM, **GGN),
        "ggn: two batches, curvature": partial(ours, **TWO_BATCH, **CURVATURE, **GGN),
        "ggn: cross-fit, curvature": partial(ours, **BEST, **GGN),
    },
    "settings": {
        "kfac: default (pool of 4096, floor 0.1, 2 folds)": partial(ours, **BEST),
        **{
            f"kfac: pool of {size}": partial(ours, **BEST, pool_size=size)
            for size in (512, 1024, 2048, 8192)
        },
        **{
            f"kfac: floor {floor:g}": partial(other_floor, **BEST, floor=floor)
            for floor in (0.01, 0.03, 0.3)
        },
        **{
            f"kfac: {folds} folds": partial(ours, **BEST, num_folds=folds)
            for folds in (4, 8)
        },
        "kfac: 8 folds, repeated splits": repeated_splits,
    },
    "fractions": {
        f"{magnitudes}: {share}": partial(
            ours,
            **TWO_BATCH,
            **CURVATURE,
            magnitudes=magnitudes,
            direction_fraction=share if share == "auto" else float(share),
        )
        for magnitudes in MAGNITUDES
        for share in (*SHARES, "auto")
    },
}


def chosen_rows(settings: argparse.Namespace) -> dict[str, Row]:
    """Return a study's rows with the magnitudes, and shares, asked for."""
    rows = {
        label: row
        for label, row in STUDIES[settings.study].items()
        if label.split(": ")[0] in settings.magnitudes
    }
    if settings.study != "fractions":
        return rows
    shares = settings.shares
    return {k: row for k, row in rows.items() if k.split(": ")[1] in shares}


def load_problem(name: str, settings: argparse.Namespace) -> Problem:
    """Load a network, and the images that a study is to test it on."""
    problem = Problem.load(name, DATASET, settings.data_root, settings.quick)
    if settings.study != TUNING:
        return problem
    count = len(problem.inputs)
    X, y = validation_data(DATASET, settings.data_root)
    return replace(problem, inputs=X[:count], labels=y[:count])


def full_data_results(
    problem: Problem, settings: argparse.Namespace
) -> tuple[dict[str, Result], list[Factors]]:
    """Return the full-data references, and K-FAC's factors."""
    results, factors = references(problem, keep=not settings.quick)
    if settings.study == TUNING:  # those kept are of test images
        results = {"kfac": Result.of(problem, with_kfac(problem, factors))}
    return results, factors


def run_network(
    name: str, rows: dict[str, Row], settings: argparse.Namespace, progress: Progress
) -> dict:
    """Measure all rows on all seeds."""
    problem = load_problem(name, settings)
    with torch.no_grad():
        output = problem.model(problem.inputs)
    full, factors = full_data_results(problem, settings)
    print(f"{name}: {full}", flush=True)
    first = 0 if settings.study == TUNING else FIRST_SEED
    seeds = range(first, first + (settings.seeds or DRAWS[name]))

    def measure(row: Row) -> list[dict]:
        options = {"budget": settings.budget}
        return [asdict(row(problem, factors, seed=seed, **options)) for seed in seeds]

    results = {}
    for label, row in rows.items():
        results[label] = progress.run(f"{name}: {label}", partial(measure, row))
        runs = [Result(**result) for result in results[label]]
        line = summary(full[label.split(":")[0]], runs)
        print(f"{name}, {label} {line}", flush=True)
    return {
        "accuracy": accuracy(problem.model, problem.inputs, problem.labels),
        "num_params": sum(p.numel() for p in problem.params()),
        "map_nll": cross_entropy(output, problem.labels).item(),
        "references": {key: asdict(value) for key, value in full.items()},
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


SUMMARIZED = {
    "kfac: single batch, uniform": "single batch",
    "kfac: two batches, uniform": "two batches (the paper's)",
    "kfac: cross-fit, curvature": "**default**",
    "kfac: oracle": "oracle",
    "ggn: two batches, uniform": "two batches, `ggn`",
    "ggn: cross-fit, curvature": "**default, `ggn`**",
}


def short_table(networks: dict) -> str:
    """Format the most important rows of all networks as one table."""
    priors = " | ".join(f"{prior:g}" for prior in PRIORS)
    lines = [
        f"| network | estimator | {priors} | chosen prior |",
        "|---" * (len(PRIORS) + 3) + "|",
    ]
    for name, result in networks.items():
        rows = absolute_rows(result, MAGNITUDES)
        for label, shown in SUMMARIZED.items():
            if label not in result["rows"]:
                continue
            full = Result(**result["references"][label.split(":")[0]])
            runs = [Result(**run) for run in result["rows"][label]]
            rows[shown] = summary(full, runs)
        lines += [
            f"| {name} | {label} | {' | '.join(cells)} |"
            for label, cells in rows.items()
        ]
    return "\n".join(lines)


def write_figure(path: Path, networks: dict, draw_panel: Callable) -> None:
    """Draw a panel for each network, with a common legend.

    Args:
        path: Where to write the figure.
        networks: Results of each network.
        draw_panel: Draws a network's results into axes.
    """
    with rc_context(figure_style(ncols=3, height_to_width_ratio=1.3)):
        figure = Figure()
        panels = figure.subplots(1, len(networks), squeeze=False)[0]
        for axis, (name, result) in zip(panels, networks.items(), strict=True):
            draw_panel(axis, result)
            axis.set_title(name)
        panels[0].set_ylabel("test NLL above\nfull data (%)")
        figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3
        )
        figure.savefig(path, dpi=200)


def percent_above(result: dict, label: str) -> Tensor:
    """Difference of a row's NLLs to full data in percent, ``[seeds, priors]``."""
    reference = torch.tensor(result["references"][label.split(":")[0]]["nll"])
    nll = torch.tensor([run["nll"] for run in result["rows"][label]])
    return 100 * (nll / reference - 1)


def panel_of_priors(axis: Axes, result: dict) -> None:
    """Draw the NLL of each ``kfac`` row against the prior precision."""
    for label in result["rows"]:
        if not label.startswith("kfac"):
            continue
        percent = percent_above(result, label)
        mean, std = percent.mean(0), percent.std(0)
        axis.plot(PRIORS, mean, label=label.removeprefix("kfac: "))
        axis.fill_between(PRIORS, mean - std, mean + std, alpha=0.15, lw=0)
    axis.set(xscale="log", xlabel="prior precision")


def panel_of_fractions(axis: Axes, result: dict) -> None:
    """Draw the NLL at some prior precisions against the share of directions."""
    for magnitudes, line in zip(MAGNITUDES, ("-", "--"), strict=True):
        shares = [s for s in SHARES if f"{magnitudes}: {s}" in result["rows"]]
        if not shares:
            continue
        rows = [percent_above(result, f"{magnitudes}: {s}") for s in shares]
        percent = torch.stack(rows)  # [shares, seeds, priors]
        positions = [float(s) for s in shares]
        for prior in (1.0, 10.0, 31.6):
            column = percent[..., PRIORS.index(prior)]
            mean, error = column.mean(1), column.std(1) / column.shape[1] ** 0.5
            axis.plot(positions, mean, line, label=f"{magnitudes}, prior {prior:g}")
            axis.fill_between(positions, mean - error, mean + error, alpha=0.15, lw=0)
    axis.set(xlabel="share of points for directions")


PANELS = {"estimators": panel_of_priors, "fractions": panel_of_fractions}


def main() -> None:
    """Run a study on all networks, and write table, numbers and figure."""
    parser = study_parser(__doc__)
    parser.set_defaults(seeds=None)  # as many draws as DRAWS says
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument(
        "--networks", nargs="+", choices=NETWORKS, help="all, or the MLP if --quick"
    )
    parser.add_argument(
        "--magnitudes", nargs="+", choices=MAGNITUDES, default=MAGNITUDES
    )
    parser.add_argument(
        "--shares",
        nargs="+",
        choices=(*SHARES, "auto"),
        default=(*SHARES, "auto"),
        help="shares of the points that give directions, in the study of fractions",
    )
    settings = parse(parser)
    networks = settings.networks or (NETWORKS[:1] if settings.quick else NETWORKS)
    warnings.simplefilter("ignore")
    name = f"sampling_{settings.study}"
    progress = Progress(settings, name)
    rows = chosen_rows(settings)
    results = {
        network: run_network(network, rows, settings, progress) for network in networks
    }
    recorded = {
        "budget": settings.budget,
        "priors": PRIORS,
        "dataset": DATASET,
    }
    write_report(settings.out, name, recorded, results, table(results))
    if settings.study == "estimators":
        (settings.out / f"{name}_short.md").write_text(short_table(results) + "\n")
    if settings.study in PANELS:
        figure = settings.out / f"{name}.png"
        write_figure(figure, results, PANELS[settings.study])
    progress.clear()


if __name__ == "__main__":
    main()
