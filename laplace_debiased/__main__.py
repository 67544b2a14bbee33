"""Compare debiased with biased mini-batch Laplace: ``python -m laplace_debiased``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from laplace_debiased.comparison.environment import default_data_root
from laplace_debiased.comparison.networks import RECIPES
from laplace_debiased.posterior.settings import MIN_BUDGET

_EXTRA_MODULES = ("matplotlib", "netcal", "sklearn", "tueplots")


def main(argv: Sequence[str] | None = None) -> None:
    """Train, compare, print the table, and write the figure and the numbers.

    Args:
        argv: Command-line arguments; None for those of the process.

    Raises:
        SystemExit: If an argument is not valid, the dataset is not available, or a
            package of the extra ``benchmarks`` is missing.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    dataset, budget, out = arguments.dataset, arguments.budget, arguments.out
    try:
        from laplace_debiased.comparison.data import load_split
        from laplace_debiased.comparison.experiment import compare, held_out
        from laplace_debiased.comparison.results import write_results
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith(_EXTRA_MODULES):
            raise
        parser.exit(
            1, f'{error.name} is missing: pip install "laplace-debiased[benchmarks]"\n'
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        split = load_split(dataset, arguments.data_root)
    except OSError as error:
        parser.error(str(error))
    num_train = len(held_out(split.train)[0])
    if budget > num_train:
        parser.error(
            f"argument --budget: must be at most {num_train}, the training "
            f"points of {dataset}, got {budget}"
        )
    runs = compare(split, RECIPES[dataset], budget, arguments.seeds)
    print(write_results(out, runs, split, dataset, budget))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m laplace_debiased",
        description="Compare Laplace approximations at an equal budget of training "
        "points with backward passes: MAP, temperature scaling, K-FAC of all data, "
        "K-FAC of a single mini-batch, debiased K-FAC of two mini-batches, the "
        "defaults with magnitudes of K-FAC and of the GGN, with two backward passes "
        "for each of more points, and the default calibrated by validation points.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--dataset", choices=list(RECIPES), default="digits", help="what to learn"
    )
    parser.add_argument(
        "--data-root",
        type=Path,
        default=default_data_root(),
        help="folder of torchvision's datasets, which are downloaded if missing; "
        "LAPLACE_DEBIASED_DATA sets the default",
    )
    parser.add_argument(
        "--budget",
        type=_at_least(MIN_BUDGET),
        default=128,
        help="training points of each posterior that does not use all",
    )
    parser.add_argument(
        "--seeds",
        type=_at_least(1),
        default=5,
        help="networks to train, each with a draw of points of its own",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results"),
        help="folder for the figure and the numbers",
    )
    return parser


def _at_least(minimum: int) -> Callable[[str], int]:
    """Return a parser of integers from a minimum on."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(
                f"must be an integer of at least {minimum}, got {text!r}"
            )
        return value

    return parse


if __name__ == "__main__":
    main()
