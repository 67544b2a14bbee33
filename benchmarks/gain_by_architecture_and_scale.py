"""How bias and the gain from debiasing depend on architecture and scale.

Architectures are those with a checkpoint; their posteriors are of 10,000 of the points
that they were trained on, and tested on 500 images. Of networks of linear layers,
depth, width, number of classes and of points are varied one at a time. All these are
trained for about as many steps. Up to ten classes are FashionMNIST's, merged; a hundred
are pairs of MNIST's digits.

    python benchmarks/gain_by_architecture_and_scale.py --data-root DATA

An interrupted study resumes where it stopped.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter
from shared.command_line import parse, study_parser
from shared.data import PAIRS, problem_data
from shared.figures import legend_below, written_figure
from shared.fits import fit, fit_few_points, with_curvature
from shared.internals import factored_curvature, full_data_factors
from shared.networks import mlp
from shared.predictions import chosen_prior, nlls
from shared.problems import Problem
from shared.reports import Progress, write_report
from shared.tables import deviation, mean_and_std
from shared.training import RECIPES, accuracy, adamw, kept
from torch.utils.data import TensorDataset

from laplace_debiased.comparison.data import TrainTestSplit
from laplace_debiased.comparison.training import Recipe

STUDY = Path(__file__).stem
BUDGET = 128
FIXED_PRIOR = 10.0
NUM_DIRECTIONS = 10
NUM_IMAGES = 500
BIAS_TICKS = (1, 1.2, 1.5, 2, 3, 5)
# without the largest
ARCHITECTURES = [name for name in RECIPES if name != "WideResNet"]
LEARNING_RATE = 2e-3
ARCHITECTURE = "architecture"
ROWS = ("single batch", "two batches", "default")
AT_FIXED, AT_CHOSEN = f"at {FIXED_PRIOR:g}", "at chosen prior"


@dataclass(frozen=True)
class Case:
    """A network of linear layers with its data.

    Args:
        depth: Number of hidden layers.
        width: Units of each.
        classes: Number of classes.
        points: Number of training points.
        visits: Number of times that training visits a point, over all points.
    """

    depth: int = 2
    width: int = 64
    classes: int = 10
    points: int = 10_000
    visits: int = 250_000

    @property
    def dataset(self) -> str:
        """What it is trained on."""
        return "fashion-mnist" if self.classes <= 10 else PAIRS

    @property
    def recipe(self) -> Recipe:
        """The network, and how it is trained."""
        inputs = 784 if self.dataset == "fashion-mnist" else 2 * 784
        build = partial(mlp, [self.width] * self.depth, inputs, self.classes)
        epochs = self.visits // self.points
        return Recipe(build, epochs, LEARNING_RATE, optimizer=adamw)

    def problem(self, data_root: Path) -> Problem:
        """Load the data, and the network; train it if it is not in the cache."""
        train, inputs, labels = self._data(data_root)
        name = "scale-" + "-".join(map(str, asdict(self).values()))
        # pairs cannot be mirrored: that would exchange their digits
        model = kept(name, self.recipe, train, mirror=self.dataset != PAIRS)
        return Problem(model, train, inputs, labels, name, self.dataset)

    def _data(self, data_root: Path) -> TrainTestSplit:
        train, inputs, labels = problem_data(self.dataset, data_root)
        X, y = train[: self.points]
        classes = self.classes
        train = TensorDataset(X, y % classes)
        return TrainTestSplit(train, inputs, labels % classes)


@dataclass(frozen=True)
class Architecture:
    """A network with a checkpoint.

    Args:
        name: Its name.
        points: Number of training points that the posterior is of.
    """

    name: str
    points: int = Case.points

    def problem(self, data_root: Path) -> Problem:
        """Load the network and some of FashionMNIST."""
        problem = Problem.load(self.name, "fashion-mnist", data_root)
        return replace(
            problem,
            train=TensorDataset(*problem.train[: self.points]),
            inputs=problem.inputs[:NUM_IMAGES],
            labels=problem.labels[:NUM_IMAGES],
        )


VARIATIONS = {
    "depth": (1, 2, 3, 4),
    "width": (16, 32, 64, 128, 256),
    "classes": (2, 5, 10, 100),
    "points": (1000, 3000, 10_000, 50_000),
}


@dataclass(frozen=True)
class Study:
    """Measures one network.

    Args:
        problem: The network with its data.
        num_seeds: Number of draws.
    """

    problem: Problem
    num_seeds: int

    @cached_property
    def full(self) -> dict[str, Any]:
        """The full-data fit."""
        factors = full_data_factors(self.problem.model, self.problem.loader())
        la = with_curvature(self.problem, factored_curvature(factors))
        priors = (FIXED_PRIOR, chosen_prior(la))
        (nll,) = nlls(self.problem, [la.H], priors)
        return {"priors": priors, "nll": nll}

    def run(self) -> dict[str, Any]:
        """Measure all estimators and the bias, with all draws."""
        problem = self.problem
        return {
            "accuracy": accuracy(problem.model, problem.inputs, problem.labels),
            "num_params": sum(p.numel() for p in problem.params()),
            "full": self.full,
            "gap": {label: self._gaps(label) for label in ROWS},
            "bias": [self._bias(seed) for seed in range(self.num_seeds)],
        }

    def _gaps(self, label: str) -> list[list[float]]:
        """NLL above full data in percent, at the fixed prior and the chosen one."""
        curvatures = [
            fit_few_points(label, self.problem, BUDGET, seed).H
            for seed in range(self.num_seeds)
        ]
        values = nlls(self.problem, curvatures, self.full["priors"])
        return (100 * (np.divide(values, self.full["nll"]) - 1)).tolist()

    def _bias(self, seed: int) -> float:
        """Curvature of the points that gave the top directions, over held-out ones."""
        la, _ = fit(self.problem, budget=BUDGET, seed=seed, sampling="uniform")
        report = la.bias_report(num_directions=NUM_DIRECTIONS)
        return report.curvature.group_ratio(slice(NUM_DIRECTIONS))


def run(settings: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Measure all variations."""
    base, variations = Case(), VARIATIONS
    networks = [Architecture(name) for name in settings.architectures]
    if settings.quick:
        networks = [Architecture("MLP", points=500)]
        base = Case(depth=1, width=8, points=1000, visits=1000)
        variations = {"width": (8, 16), "points": (500, 1000)}

    cases: list[tuple[str, int | str, Case | Architecture]] = [
        (name, value, replace(base, **{name: value}))
        for name, values in variations.items()
        for value in values
    ]
    cases += [(ARCHITECTURE, network.name, network) for network in networks]

    def measure(case: Case | Architecture) -> dict[str, Any]:
        return Study(case.problem(settings.data_root), settings.seeds).run()

    results: dict[str, Any] = {}
    for name, value, case in cases:
        result = progress.run(str(case), partial(measure, case))
        results.setdefault(name, {})[str(value)] = result
        own = {name: {str(value): result}}
        print(table(own).splitlines()[-1], flush=True)
    return results


def table(results: dict[str, Any]) -> str:
    """Format gaps and bias as a Markdown table."""
    gaps = [f"{row}, {prior}" for prior in (AT_FIXED, AT_CHOSEN) for row in ROWS]
    lines = [
        "| varied | value | parameters | accuracy % | curvature, own / held-out "
        f"| chosen prior | {' | '.join(gaps)} |",
        "|---" * (6 + len(gaps)) + "|",
    ]
    for name, values in results.items():
        for value, result in values.items():
            cells = [
                f"{result['num_params']:,}",
                f"{100 * result['accuracy']:.1f}",
                mean_and_std(np.array(result["bias"]), 2),
                f"{result['full']['priors'][1]:.1f}",
                *(
                    mean_and_std(gap(result, row, prior), 1)
                    for prior in (0, 1)
                    for row in ROWS
                ),
            ]
            lines.append(f"| {name} | {shown(value)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(value: str) -> str:
    """Return a number with separators, or a name as it is."""
    return f"{int(value):,}" if value.isdigit() else value


def gap(result: dict[str, Any], row: str, prior: int) -> np.ndarray:
    """Return an estimator's gaps at a prior precision: ``[seeds]``."""
    return np.array(result["gap"][row])[:, prior]


def write_figure(path: Path, results: dict[str, Any]) -> None:
    """Draw gaps at the fixed prior precision above the bias, a column for each factor.

    Args:
        path: Where to write the figure.
        results: Results of each value of each factor.
    """
    with written_figure(path, len(results), 3) as figure:
        panels = figure.subplots(2, len(results), sharex="col", sharey="row")
        for (upper, lower), (name, values) in zip(
            panels.T, results.items(), strict=True
        ):
            for row in ROWS:
                _draw(upper, values, [gap(r, row, 0) for r in values.values()], row)
            bias = [np.array(result["bias"]) for result in values.values()]
            _draw(lower, values, bias, "bias", color="black")
            lower.set(xlabel=name, yscale="log")
        panels[0, 0].set_ylabel(f"NLL above full\ndata, {AT_FIXED} (%)")
        panels[1, 0].set_ylabel("curvature,\nown / held-out")
        panels[1, 0].set_yticks(BIAS_TICKS, [f"{tick:g}" for tick in BIAS_TICKS])
        panels[1, 0].yaxis.set_minor_formatter(NullFormatter())
        legend_below(figure, panels[0, 0], len(ROWS))


def _draw(
    axis: Axes, values: dict[str, Any], runs: list[np.ndarray], label: str, **style: str
) -> None:
    means, stds = np.mean(runs, 1), deviation(runs, 1)
    if not all(value.isdigit() for value in values):
        positions = range(len(values))
        axis.errorbar(positions, means, stds, fmt=".", label=label, **style)
        axis.set_xticks(positions, list(values), rotation=90, fontsize=6)
        return
    numbers = [int(value) for value in values]
    axis.errorbar(numbers, means, stds, fmt=".-", label=label, **style)
    axis.set_xscale("log")
    axis.set_xticks(numbers, [shown(value) for value in values])
    axis.xaxis.set_minor_formatter(NullFormatter())


def main() -> None:
    """Run the study, and write table, numbers and figure."""
    parser = study_parser(__doc__, STUDY)
    parser.add_argument("--architectures", nargs="*", default=ARCHITECTURES)
    settings = parse(parser)
    warnings.simplefilter("ignore")
    progress = Progress(settings, STUDY)
    results = run(settings, progress)
    recorded = {
        "base": asdict(Case()),
        "seeds": settings.seeds,
        "budget": BUDGET,
        "directions": NUM_DIRECTIONS,
    }
    write_report(settings.out, STUDY, recorded, results, table(results))
    write_figure(settings.out / f"{STUDY}.png", results)
    progress.clear()


if __name__ == "__main__":
    main()
