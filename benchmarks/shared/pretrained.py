"""What studies of pretrained networks share: tasks, predictions, scores and tables."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from shared.internals import classification_scores
from shared.reports import Progress, write_report
from shared.tables import mean_and_std

BUDGET = 128
SCORES = {
    "accuracy": ("accuracy", 3),
    "nll": ("NLL", 3),
    "ece": ("ECE", 3),
    "brier": ("Brier", 3),
    "aurc": ("risk-coverage area", 3),
    "mistakes": ("AUROC, mistakes", 3),
}
COSTS = {
    "fit": ("fit and tuning s", 1),
    "predict": ("100 predictions s", 1),
    "memory": ("peak GB", 1),
}

Inputs = Tensor | dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """A fine-tuned network, and what it is judged by.

    Args:
        model: The network.
        head: Its last layer, which is linear.
        features: From inputs to the head's inputs ``[batch, features]``.
        pretrained: The parameters before fine-tuning, by name; zero for the head.
        train: Yields what it was trained on.
        validation: Yields what to calibrate by.
        test: Yields test data.
        others: Yields data of another kind.
    """

    model: nn.Module
    head: nn.Linear
    features: Callable[[Inputs], Tensor]
    pretrained: dict[str, Tensor]
    train: DataLoader
    validation: DataLoader
    test: DataLoader
    others: DataLoader


class Predicted(NamedTuple):
    """Predictions of some points.

    Args:
        probabilities: Their probabilities ``[points, classes]``.
        uncertainty: How uncertain it is of which kind they are ``[points]``: mutual
            information, or entropy without posterior.
    """

    probabilities: Tensor
    uncertainty: Tensor


Predict = Callable[[Inputs], Predicted]


def package_file(package: str, *parts: str) -> Path:
    """Return a file of an installed package.

    Args:
        package: The package.
        parts: Folders and name in it.

    Returns:
        The path.

    Raises:
        SystemExit: If the package is not installed.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is missing: pip install .[studies]")
    return Path(spec.origin).parent.joinpath(*parts)


def parameters_before(model: nn.Module, head: nn.Linear) -> dict[str, Tensor]:
    """Copy the parameters before fine-tuning, by name; those of a new head are zero."""
    of_head = {id(param) for param in head.parameters()}
    return {
        name: (torch.zeros_like if id(param) in of_head else torch.clone)(
            param.detach()
        )
        for name, param in model.named_parameters()
    }


def inputs_of(batch: Sequence[Tensor] | Mapping[str, Tensor]) -> tuple[Inputs, Tensor]:
    """Split a batch, a tuple or a mapping, into inputs and labels."""
    if isinstance(batch, Mapping):
        own = dict(batch)
        y = own.pop("labels")
        return own, y
    X, y = batch
    return X, y


def scores_of(test: Predicted, others: Predicted, y: Tensor) -> dict[str, float]:
    """Score predictions of test data, and how others are told from them.

    Args:
        test: Predictions of test data.
        others: Predictions of data of another kind.
        y: Labels of the test data.

    Returns:
        The scores, by name.
    """
    uncertain = test.uncertainty.double(), others.uncertainty.double()
    found = asdict(classification_scores(test.probabilities, y, uncertain, None))
    names = [*SCORES, "foreign"]
    return {name: found[name] for name in names if found[name] is not None}


def run_seeds(
    settings: argparse.Namespace,
    study: str,
    run_seed: Callable[[argparse.Namespace, int], dict[str, dict]],
    columns: dict[str, tuple[str, int]],
    constants: dict[str, int],
) -> None:
    """Run a study, and write table and numbers.

    Args:
        settings: The study's.
        study: Its name.
        run_seed: From settings and seed to rows, by method.
        columns: Title and digits, by key.
        constants: What else the results depend on, by name.
    """
    warnings.simplefilter("ignore")
    progress = Progress(settings, study)
    seeds = []
    for seed in range(settings.seeds):
        seeds.append(progress.run(str(seed), partial(run_seed, settings, seed)))
        print(seed, seeds[-1], flush=True)
    names = "train", "validation", "test", "seeds"
    recorded = {name: getattr(settings, name) for name in names}
    recorded |= {"budget": BUDGET} | constants
    write_report(settings.out, study, recorded, seeds, table(seeds, columns))
    progress.clear()


def table(seeds: list[dict[str, dict]], columns: dict[str, tuple[str, int]]) -> str:
    """Format means ± standard deviations.

    Args:
        seeds: Rows of all seeds, by method.
        columns: Title and digits, by key.

    Returns:
        A Markdown table.
    """
    titles = [title for title, _ in columns.values()]
    lines = [f"| method | {' | '.join(titles)} |", "|---" * (1 + len(titles)) + "|"]
    for label in seeds[0]:
        refused = seeds[0][label].get("refused")
        cells = ["-"] * len(columns) if refused is None else [f"refused: {refused}"]
        cells += [""] * (len(columns) - len(cells))
        for k, (key, (_, digits)) in enumerate(columns.items()):
            values = [own[label][key] for own in seeds if key in own[label]]
            if values:
                cells[k] = mean_and_std(np.array(values), digits)
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)
