"""What a comparison leaves behind: a figure, its numbers, and a text to print."""

from __future__ import annotations

from pathlib import Path

from laplace_debiased.comparison.data import TrainTestSplit
from laplace_debiased.comparison.environment import environment
from laplace_debiased.comparison.experiment import Run, held_out
from laplace_debiased.comparison.figure import write_figure
from laplace_debiased.comparison.report import table, write_numbers


def write_results(
    out: Path, runs: list[Run], split: TrainTestSplit, dataset: str, budget: int
) -> str:
    """Write figure, table and numbers, named after the dataset.

    Args:
        out: An existing folder.
        runs: The runs.
        split: What they were trained and tested on.
        dataset: Its name.
        budget: Number of training points of the posteriors that do not use all.

    Returns:
        The table, what it shows, and where the files are.
    """
    num_seeds = len({run.seed for run in runs})
    num_train, num_validation = map(len, held_out(split.train))
    settings = {
        "environment": environment(),
        "dataset": dataset,
        "budget": budget,
        "seeds": num_seeds,
        "training_points": num_train,
        "validation_points": num_validation,
        "test_points": len(split.test_labels),
    }
    title = f"{dataset}: {num_train:,} training points"
    figure, numbers = out / f"{dataset}.png", out / f"{dataset}.json"
    (out / f"{dataset}.md").write_text(table(runs) + "\n")
    write_numbers(numbers, runs, split.test_labels, settings)
    write_figure(figure, runs, split.test_labels, title)
    return (
        f"{title}, {num_validation} validation points, {len(split.test_labels)} test "
        f"points\nMean ± standard error, number of seeds: {num_seeds}\n"
        "AUROC: of test images with shuffled rows, by epistemic uncertainty (MAP and "
        "temperature scaling: entropy)\n\n"
        f"{table(runs)}\n\nFigure: {figure}\nNumbers: {numbers}"
    )
