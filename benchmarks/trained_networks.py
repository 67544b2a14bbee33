"""Which networks the studies are of, and how well they classify.

    python benchmarks/trained_networks.py --data-root DATA

trains what has no checkpoint yet. With the checkpoints in place, the other studies run
without training.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from shared.command_line import add_out
from shared.data import IMAGES
from shared.training import CHECKPOINTS, RECIPES, full_size_recipes, trained

from laplace_debiased.comparison.environment import default_data_root

STUDY = Path(__file__).stem


def table() -> str:
    """Format what is known of the first checkpoint of each network as Markdown."""
    lines = [
        "| dataset | network | parameters | epochs | test accuracy % |",
        "|---|---|---|---|---|",
    ]
    for path in sorted(CHECKPOINTS.glob("*/*-0.json")):
        record = json.loads(path.read_text())
        lines.append(
            f"| {path.parent.name} | {path.stem.removesuffix('-0')} "
            f"| {record['parameters']:,} | {record['epochs']} "
            f"| {100 * record['test_accuracy']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Train what has no checkpoint yet, and write the table of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, default=default_data_root())
    parser.add_argument("--dataset", default="fashion-mnist", choices=IMAGES)
    parser.add_argument(
        "--networks",
        nargs="*",
        default=list(RECIPES),
        help="default: all small ones; full-size ones: "
        + ", ".join(full_size_recipes(IMAGES["cifar10"])),
    )
    parser.add_argument("--seeds", type=int, default=1)
    add_out(parser, STUDY)
    arguments = parser.parse_args()
    for name in arguments.networks:
        for seed in range(arguments.seeds):
            trained(name, arguments.dataset, arguments.data_root, seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{STUDY}.md").write_text(table() + "\n")


if __name__ == "__main__":
    main()
