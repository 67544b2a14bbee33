"""How close posteriors from few backward passes come to the full-data posterior.

Three networks were trained on FashionMNIST. The full-data references are
laplace-torch's ``KronLaplace`` (K-FAC) and EKFAC; every other row gets backward passes
for ``budget`` points only, and is drawn again for each seed. The studies are:

- ``estimators``: each ingredient alone, and together;
- ``settings``: pools, floors and folds of the best estimator;
- ``directions``: what exact magnitudes on many points could add;
- ``fractions``: the share of the points that give directions, with two batches.

An interrupted study resumes where it stopped.

    python benchmarks/sampling_quality.py estimators --data-root DATA
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from math import exp
from pathlib import Path
from statistics import median
from unittest import mock

import torch
from common import Progress, figure_style, write_report
from laplace import KronLaplace
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from networks import CHECKPOINTS, RECIPES, accuracy, problem_data, trained
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset

from laplace_debiased import (
    DebiasedKFACLinearOperator,
    EigenbasisMatrix,
    KronDebiasedLaplace,
    Laplace,
)
from laplace_debiased.backends import CurvatureSource
from laplace_debiased.capture import capture_rows
from laplace_debiased.curvature import average, scale_gradients
from laplace_debiased.eigenbasis import decompose, project
from laplace_debiased.layers import Layer, curvature_blocks
from laplace_debiased.predictive import _rotated_jacobians
from laplace_debiased.sampling import Fold, draw
from laplace_debiased.selection import find_layers

PRIORS = (1.0, 10.0, 31.6, 100.0, 1000.0)
DATASET = "fashion-mnist"
NUM_JUDGES = 10_000


@dataclass
class Problem:
    """A trained network with its data.

    Args:
        model: The network.
        train: The training points.
        inputs: Test images.
        labels: Their classes.
        budget: Number of points with backward passes.
    """

    model: nn.Module
    train: TensorDataset
    inputs: Tensor
    labels: Tensor
    budget: int

    def loader(self) -> DataLoader:
        """Return a loader over the training points."""
        return DataLoader(self.train, batch_size=256)

    def params(self) -> list[Tensor]:
        """Return the network's parameters."""
        return list(self.model.parameters())


@torch.no_grad()
def nlls(problem: Problem, curvature: EigenbasisMatrix) -> list[float]:
    """Compute the test NLL at each of ``PRIORS``, by the GLM predictive with probit.

    The posteriors share an eigenbasis, and so the rotated Jacobians of each layer.

    Args:
        problem: Network and test points.
        curvature: The curvature without prior.

    Returns:
        The NLLs.
    """
    losses = [
        _losses(problem, curvature, X, y)
        for X, y in zip(problem.inputs.split(50), problem.labels.split(50), strict=True)
    ]
    return torch.cat(losses, 1).mean(1).tolist()


def _losses(
    problem: Problem, curvature: EigenbasisMatrix, X: Tensor, y: Tensor
) -> Tensor:
    """Compute the losses ``[priors, batch]`` of a batch."""
    layers = find_layers(problem.model, problem.params())
    inputs: dict[str, Tensor] = {}

    def keep(layer: Layer, rows: Tensor) -> None:
        inputs[layer.name] = rows

    with torch.enable_grad(), capture_rows(layers, len(X), keep) as tape:
        output = problem.model(X)
    gradients: dict[str, list[Tensor]] = {}
    for column in torch.eye(output.shape[1]):
        for layer, g in tape.gradient_rows(output, column.expand_as(output), True):
            gradients.setdefault(layer.name, []).append(g)

    variances = torch.zeros(len(PRIORS), *output.shape)
    for block, vectors, values in zip(
        curvature_blocks(layers, separate_weight_and_bias=True),
        curvature.eigenvectors,
        curvature.spectra(),
        strict=True,
    ):
        g = torch.stack(gradients[block.layer.name], 1)
        if block.has_inputs:
            x = inputs[block.layer.name] @ vectors[1]
            squares = _rotated_jacobians(g, x, vectors[0]).flatten(2) ** 2
        else:
            squares = (g.flatten(3).sum(2) @ vectors[0]) ** 2
        inverses = torch.stack([1 / (values.flatten() + prior) for prior in PRIORS])
        variances += (squares @ inverses.T).movedim(2, 0)
    logits = output / (1 + torch.pi / 8 * variances).sqrt()
    return torch.stack([cross_entropy(f, y, reduction="none") for f in logits])


@dataclass
class Result:
    """One posterior.

    Args:
        nll: Test NLL at each of ``PRIORS``.
        prior_precision: What the marginal likelihood chose; None if it was not asked.
        fit_seconds: Time to fit; None if that is not its own.
    """

    nll: list[float]
    prior_precision: float | None = None
    fit_seconds: float | None = None


def chosen_prior(la: KronLaplace) -> float:
    """Choose the prior precision by the marginal likelihood, to full precision."""

    @torch.no_grad()
    def objective(log_prior: float) -> float:
        prior = torch.tensor([log_prior]).exp()
        return -la.log_marginal_likelihood(prior_precision=prior).item()

    return exp(minimize_scalar(objective, bounds=(-5, 10), method="bounded").x)


def full_kfac(problem: Problem) -> tuple[Result, list]:
    """Fit K-FAC to all data; also return its factors.

    By laplace-torch's ``KronLaplace``, or by ours where it refuses a layer.
    """
    la = KronLaplace(problem.model, "classification")
    start = time.perf_counter()
    try:
        la.fit(problem.loader())
        kfacs = la.H_facs.kfacs
    except NotImplementedError:
        la = KronDebiasedLaplace(problem.model, "classification", **TWO_BATCH)
        start = time.perf_counter()
        la.fit(problem.loader())
        kfacs = average(la.H_facs.folds, la.H_facs.shares)
    seconds = time.perf_counter() - start
    # laplace-torch decomposes in single precision
    vectors = decompose(kfacs)
    la.H = EigenbasisMatrix(vectors, project(kfacs, vectors))
    return Result(nlls(problem, la.H), chosen_prior(la), seconds), kfacs


def full_ekfac(problem: Problem) -> Result:
    """Compute EKFAC of all data."""
    data = list(problem.loader())
    operator = DebiasedKFACLinearOperator(
        problem.model,
        nn.CrossEntropyLoss(reduction="sum"),
        problem.params(),
        data,
        data,
        magnitudes="ggn",
    )
    start = time.perf_counter()
    operator.compute()
    seconds = time.perf_counter() - start
    matrix = EigenbasisMatrix(operator.eigenvectors, [[s] for s in operator.spectra])
    la = Laplace(problem.model, "classification", "all", "kron_debiased", budget=64)
    la.fit(problem.loader())
    la.H = matrix
    return Result(nlls(problem, matrix), chosen_prior(la), seconds)


def fitted(problem: Problem, seed: int, **options) -> tuple[Result, object]:
    """Fit our posterior, with the prior precision of the marginal likelihood."""
    la = Laplace(
        problem.model,
        "classification",
        "all",
        "kron_debiased",
        budget=problem.budget,
        seed=seed,
        **options,
    )
    start = time.perf_counter()
    la.fit(problem.loader())
    seconds = time.perf_counter() - start
    prior = chosen_prior(la)
    return Result(nlls(problem, la.H), prior, seconds), la


def ours(problem: Problem, seed: int, factors: list, **options) -> Result:
    """Fit our posterior."""
    return fitted(problem, seed, **options)[0]


def single_batch(problem: Problem, seed: int, factors: list, **sampling) -> Result:
    """Use the same points for both roles, which does not debias."""
    _, la = fitted(problem, seed, **CROSS_FIT, **sampling)
    kfacs = average(la.H_facs.folds, la.H_facs.shares)
    vectors = decompose(kfacs)
    la.H = EigenbasisMatrix(vectors, project(kfacs, vectors))
    return Result(nlls(problem, la.H), chosen_prior(la))


def oracle(problem: Problem, seed: int, factors: list) -> Result:
    """Take directions from a draw, and magnitudes from all data."""
    _, la = fitted(problem, seed, **BEST)
    la.H = EigenbasisMatrix(la.H.eigenvectors, project(factors, la.H.eigenvectors))
    return Result(nlls(problem, la.H), chosen_prior(la))


def other_floor(
    problem: Problem, seed: int, factors: list, floor: float, **options
) -> Result:
    """Change the share of the uniform distribution in a draw's probabilities."""
    with mock.patch("laplace_debiased.estimation.draw", partial(draw, floor=floor)):
        return ours(problem, seed, factors, **options)


def repeated_splits(problem: Problem, seed: int, factors: list) -> Result:
    """Average magnitudes over all splits of eight folds in two halves (NERCOME)."""
    _, la = fitted(problem, seed, **BEST, num_folds=8)
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
    return Result(nlls(problem, la.H), chosen_prior(la))


def exact_magnitudes(
    problem: Problem, seed: int, factors: list, own_directions: bool
) -> Result:
    """Measure exact curvatures on many points, along a draw's directions or their own.

    Both bound what ``ggn`` magnitudes can reach: with the draw's directions, and with
    those of as many points.
    """
    generator = torch.Generator().manual_seed(seed)
    judges = torch.randperm(len(problem.train), generator=generator)[:NUM_JUDGES]
    fold = Fold(DataLoader(Subset(problem.train, judges.tolist()), 256), NUM_JUDGES)
    _, la = fitted(problem, seed, **BEST)
    source = CurvatureSource(la.backend, la.params, {}, seed)
    vectors = la.H.eigenvectors
    if own_directions:
        vectors = decompose(source.kfacs(fold)[0])
    values, _ = source.directional_curvatures(fold, vectors)
    values = scale_gradients(values, len(problem.train) / NUM_JUDGES)
    la.H = EigenbasisMatrix(vectors, values)
    return Result(nlls(problem, la.H), chosen_prior(la))


UNIFORM = {"sampling": "uniform"}
CURVATURE = {"sampling": "curvature"}
TWO_BATCH = {"estimator": "two_batch"}
CROSS_FIT = {"estimator": "cross_fit"}
GGN = {"magnitudes": "ggn"}
BEST = CROSS_FIT | CURVATURE
FRACTIONS = [k / 10 for k in range(1, 10)]
Row = Callable[[Problem, int, list], Result]
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
        **{
            f"kfac: pool of {size}": partial(ours, **BEST, pool_size=size)
            for size in (512, 1024, 2048, 4096, 8192)
        },
        **{
            f"kfac: floor {floor:g}": partial(other_floor, **BEST, floor=floor)
            for floor in (0.01, 0.03, 0.1, 0.3)
        },
        **{
            f"kfac: {folds} folds": partial(ours, **BEST, num_folds=folds)
            for folds in (2, 4, 8)
        },
        "kfac: 8 folds, repeated splits": repeated_splits,
    },
    "directions": {
        "ggn: cross-fit, curvature": partial(ours, **BEST, **GGN),
        "ggn: its directions, magnitudes of 10,000 points": partial(
            exact_magnitudes, own_directions=False
        ),
        "ggn: directions and magnitudes of 10,000 points": partial(
            exact_magnitudes, own_directions=True
        ),
    },
    "fractions": {
        f"{magnitudes}: {fraction:g}": partial(
            ours,
            **TWO_BATCH,
            **CURVATURE,
            magnitudes=magnitudes,
            direction_fraction=fraction,
        )
        for magnitudes in ("kfac", "ggn")
        for fraction in FRACTIONS
    }
    | {
        f"{magnitudes}: auto": partial(
            ours,
            **TWO_BATCH,
            **CURVATURE,
            magnitudes=magnitudes,
            direction_fraction="auto",
        )
        for magnitudes in ("kfac", "ggn")
    },
}


def full_data(name: str, problem: Problem) -> tuple[dict[str, Result], list]:
    """Return the full-data references, and K-FAC's factors.

    They are measured once, and kept for all studies.
    """
    path = CHECKPOINTS / "cache" / f"references-{name}.pt"
    if not path.exists():
        kfac, factors = full_kfac(problem)
        references = {"kfac": asdict(kfac), "ggn": asdict(full_ekfac(problem))}
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save((references, factors), path)
    references, factors = torch.load(path, weights_only=True)
    return {key: Result(**value) for key, value in references.items()}, factors


def run_network(
    name: str, rows: dict[str, Row], settings: argparse.Namespace, progress: Progress
) -> dict:
    """Measure all rows on all seeds."""
    data = problem_data(DATASET, settings.data_root)
    problem = Problem(
        trained(name, DATASET, settings.data_root),
        data.train,
        data.test_inputs,
        data.test_labels,
        settings.budget,
    )
    with torch.no_grad():
        output = problem.model(problem.inputs)
    references, factors = full_data(name, problem)
    print(f"{name}: {references}", flush=True)

    def measure(row: Row) -> list[dict]:
        seeds = range(settings.seeds)
        return [asdict(row(problem, seed, factors)) for seed in seeds]

    results = {}
    for label, row in rows.items():
        results[label] = progress.run(f"{name}: {label}", partial(measure, row))
        runs = [Result(**result) for result in results[label]]
        line = summary(references[label.split(":")[0]], runs)
        print(f"{name}, {label} {line}", flush=True)
    return {
        "accuracy": accuracy(problem.model, problem.inputs, problem.labels),
        "num_params": sum(p.numel() for p in problem.params()),
        "map_nll": cross_entropy(output, problem.labels).item(),
        "references": {key: asdict(value) for key, value in references.items()},
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


def table(networks: dict) -> str:
    """Format the results as Markdown tables, one for each network."""
    parts = []
    for name, result in networks.items():
        references = {k: Result(**r) for k, r in result["references"].items()}
        full = references["kfac"]
        parts.append(
            f"**{name}**: {result['num_params']:,} parameters, accuracy "
            f"{100 * result['accuracy']:.1f} %, full-data K-FAC in "
            f"{full.fit_seconds:.0f} s\n"
        )
        priors = " | ".join(f"{prior:g}" for prior in PRIORS)
        parts.append(f"| estimator | {priors} | chosen prior | fit s | speed-up |")
        parts.append("|---" * (len(PRIORS) + 4) + "|")
        for label, runs in result["rows"].items():
            results = [Result(**run) for run in runs]
            cells = summary(references[label.split(":")[0]], results)
            seconds = [r.fit_seconds for r in results if r.fit_seconds is not None]
            timing = " | "
            if seconds:
                typical = median(seconds)
                timing = f"{typical:.2f} | {full.fit_seconds / typical:.0f} ×"
            parts.append(f"| {label} | {' | '.join(cells)} | {timing} |")
        parts.append("")
    return "\n".join(parts).rstrip()


SUMMARIZED = {
    "single batch, uniform": "single batch",
    "two batches, uniform": "two batches (the paper's)",
    "cross-fit, curvature": "**default**",
    "oracle": "oracle",
}


def short_table(networks: dict) -> str:
    """Format the most important ``kfac`` rows of all networks as one table."""
    priors = " | ".join(f"{prior:g}" for prior in PRIORS)
    lines = [
        f"| network | estimator | {priors} | chosen prior | times faster |",
        "|---" * (len(PRIORS) + 4) + "|",
    ]
    for name, result in networks.items():
        full = Result(**result["references"]["kfac"])
        for label, shown in SUMMARIZED.items():
            runs = [Result(**run) for run in result["rows"][f"kfac: {label}"]]
            seconds = sorted(r.fit_seconds for r in runs if r.fit_seconds is not None)
            ratio = f"{full.fit_seconds / median(seconds):.0f}" if seconds else ""
            cells = " | ".join(summary(full, runs))
            lines.append(f"| {name} | {shown} | {cells} | {ratio} |")
    return "\n".join(lines)


def write_figure(path: Path, networks: dict, draw_panel: Callable) -> None:
    """Draw a panel for each network, with a common legend.

    Args:
        path: Where to write the figure.
        networks: Results of each network.
        draw_panel: Draws a network's results into axes.
    """
    with rc_context(figure_style(ncols=3)):
        figure = Figure()
        panels = figure.subplots(1, len(networks), squeeze=False)[0]
        for axis, (name, result) in zip(panels, networks.items(), strict=True):
            draw_panel(axis, result)
            axis.set_title(name)
        panels[0].set_ylabel("test NLL above full data (%)")
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
        axis.fill_between(PRIORS, mean - std, mean + std, alpha=0.15)
    axis.set(xscale="log", xlabel="prior precision")


def panel_of_fractions(axis: Axes, result: dict) -> None:
    """Draw the NLL at two prior precisions against the share of directions."""
    for magnitudes, line in (("kfac", "-"), ("ggn", "--")):
        rows = [percent_above(result, f"{magnitudes}: {f:g}") for f in FRACTIONS]
        percent = torch.stack(rows)  # [fractions, seeds, priors]
        for prior in (1.0, 10.0, 31.6):
            column = percent[..., PRIORS.index(prior)]
            mean, error = column.mean(1), column.std(1) / column.shape[1] ** 0.5
            axis.plot(FRACTIONS, mean, line, label=f"{magnitudes}, prior {prior:g}")
            axis.fill_between(FRACTIONS, mean - error, mean + error, alpha=0.15)
    axis.set(xlabel="share of points for directions")


PANELS = {"estimators": panel_of_priors, "fractions": panel_of_fractions}


def main() -> None:
    """Run a study on all networks, and write table, numbers and figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--networks", nargs="*", default=list(RECIPES))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    settings = parser.parse_args()
    warnings.simplefilter("ignore")
    name = f"sampling_{settings.study}"
    progress = Progress(settings.out / f"{name}.partial.json")
    networks = {
        network: run_network(network, STUDIES[settings.study], settings, progress)
        for network in settings.networks
    }
    recorded = {
        "budget": settings.budget,
        "seeds": settings.seeds,
        "priors": PRIORS,
        "dataset": DATASET,
    }
    write_report(settings.out, name, recorded, networks, table(networks))
    if settings.study == "estimators":
        (settings.out / f"{name}_short.md").write_text(short_table(networks) + "\n")
    if settings.study in PANELS:
        figure = settings.out / f"{name}.png"
        write_figure(figure, networks, PANELS[settings.study])
    progress.clear()


if __name__ == "__main__":
    main()
