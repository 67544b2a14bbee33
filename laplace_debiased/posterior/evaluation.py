"""Predictions of test data, and what they are worth."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from laplace.utils.enums import Likelihood
from torch import Tensor
from tqdm import tqdm

from laplace_debiased.posterior.likelihoods import BINARY
from laplace_debiased.posterior.uncertainties import uncertainty_of_points
from laplace_debiased.posterior.upstream import (
    counted_targets,
    inputs_and_targets,
    loss_of,
)
from laplace_debiased.predictive.label_scores import (
    confidence,
    label_scores,
    told_right,
)
from laplace_debiased.predictive.links import SIGMOID
from laplace_debiased.predictive.report import (
    LEVELS,
    PredictionReport,
    classification_scores,
    coverage,
    regression_scores,
)
from laplace_debiased.predictive.scores import risk_coverage
from laplace_debiased.predictive.uncertainty import Uncertainty, entropy
from laplace_debiased.rows.inputs import num_examples

if TYPE_CHECKING:
    from laplace_debiased.posterior.laplace import KronDebiasedLaplace


class Predictions(NamedTuple):
    """Predictions of a loader's points, on the CPU.

    Args:
        uncertainty: Uncertainty of all points, in double precision.
        y: Their targets; None if they are not needed.
    """

    uncertainty: Uncertainty
    y: Tensor | None


@torch.no_grad()
def predictions(
    la: KronDebiasedLaplace,
    loader: Iterable,
    progress_bar: bool = False,
    with_targets: bool = True,
) -> Predictions:
    """Predict the points of a loader, but those that the loss ignores.

    Args:
        la: The posterior.
        loader: Yields batches, or inputs alone if there need not be targets.
        progress_bar: Whether to show a progress bar.
        with_targets: Whether targets are needed.

    Returns:
        The predictions.

    Raises:
        TypeError: If it is inputs, rather than a loader.
        ValueError: If there are no points, or targets are not valid.
    """
    if isinstance(loader, Tensor | MutableMapping):
        raise TypeError(
            f"A loader must yield batches, got a {type(loader).__name__}: `[X]` yields "
            "one."
        )
    parts, targets = [], []
    for batch in tqdm(loader, disable=not progress_bar, desc="[Predictions]"):
        if not with_targets:
            X = batch[0] if isinstance(batch, list | tuple) and batch else batch
            if num_examples(X, la.dict_key_x):
                parts.append(_on_cpu(uncertainty_of_points(la, X)))
            continue
        X, y = inputs_and_targets(batch, la.backend)
        if not len(y):
            continue
        found = uncertainty_of_points(la, X)
        y, counted = counted_targets(la.model, loss_of(la.backend), y, found.mean)
        if la.likelihood == BINARY and not ((y == 0) | (y == 1)).all():
            raise ValueError("Labels must be 0 or 1 to be predicted.")
        parts.append(_on_cpu(found, counted))
        targets.append(y[counted].cpu())
    if not sum(len(part.mean) for part in parts):
        raise ValueError("The loader yields no points.")
    return Predictions(_joined(parts), torch.cat(targets) if targets else None)


def _on_cpu(found: Uncertainty, rows: Tensor | None = None) -> Uncertainty:
    """Take some rows to the CPU."""
    values: dict[str, Any] = dict(vars(found))
    for name, value in values.items():
        if value is not None:
            values[name] = (value if rows is None else value[rows]).double().cpu()
    return Uncertainty(**values)


def _joined(parts: list[Uncertainty]) -> Uncertainty:
    """Join what several batches have."""
    columns = {name: [vars(part)[name] for part in parts] for name in vars(parts[0])}
    values: dict[str, Any] = {
        k: None if own[0] is None else torch.cat(own) for k, own in columns.items()
    }
    return Uncertainty(**values)


def report(
    la: KronDebiasedLaplace,
    test_loader: Iterable,
    foreign_loader: Iterable | None,
    progress_bar: bool,
) -> PredictionReport:
    """Tell what predictions of test data are worth.

    Args:
        la: The posterior.
        test_loader: Yields test data.
        foreign_loader: Yields foreign data, or their inputs alone.
        progress_bar: Whether to show progress bars.

    Returns:
        The report.

    Raises:
        ValueError: If there are no points, or targets are not valid.
    """
    found, y = predictions(la, test_loader, progress_bar)
    foreign = None
    if foreign_loader is not None:
        foreign, _ = predictions(la, foreign_loader, progress_bar, with_targets=False)
    assert y is not None
    error = la.sampling_error
    common = {
        "num_points": len(y),
        "calibration": la.calibration and str(la.calibration),
        "curvature_error": error
        and max((e for e in error.relative_errors().values() if e == e), default=None),
    }
    return _REPORTS[la.likelihood](found, y, foreign, common)


def _classification(
    found: Uncertainty, y: Tensor, foreign: Uncertainty | None, common: dict
) -> PredictionReport:
    assert found.probabilities is not None
    p, of_network = found.probabilities, found.mean.softmax(-1)
    others = None if foreign is None else foreign.mean.softmax(-1)
    total_of_foreign = None if foreign is None else foreign.total
    epistemic_of_foreign = None if foreign is None else foreign.epistemic
    confidence, predicted = p.max(1)
    return PredictionReport(
        posterior=classification_scores(
            p,
            y,
            (found.total, total_of_foreign),
            (found.epistemic, epistemic_of_foreign),
        ),
        network=classification_scores(
            of_network,
            y,
            (entropy(of_network), None if others is None else entropy(others)),
            None,
        ),
        expected=confidence,
        observed=predicted == y,
        risks=risk_coverage(confidence, predicted != y),
        epistemic=found.epistemic,
        epistemic_of_foreign=epistemic_of_foreign,
        **common,
    )


def _regression(
    found: Uncertainty, y: Tensor, foreign: Uncertainty | None, common: dict
) -> PredictionReport:
    epistemic = found.epistemic.mean(1)
    of_foreign = None if foreign is None else foreign.epistemic.mean(1)
    return PredictionReport(
        posterior=regression_scores(
            found.mean, found.total, y, (epistemic, of_foreign)
        ),
        network=regression_scores(found.mean, found.aleatoric, y, None),
        expected=torch.tensor(LEVELS),
        observed=coverage(found.mean, found.total, y),
        risks=None,
        epistemic=epistemic,
        epistemic_of_foreign=of_foreign,
        **common,
    )


def _labels(
    found: Uncertainty, y: Tensor, foreign: Uncertainty | None, common: dict
) -> PredictionReport:
    assert found.probabilities is not None
    p, of_network = found.probabilities, found.mean.sigmoid()
    epistemic, total = found.epistemic.sum(1), found.total.sum(1)
    of_foreign, total_of_foreign, entropy_of_foreign = None, None, None
    if foreign is not None:
        of_foreign, total_of_foreign = foreign.epistemic.sum(1), foreign.total.sum(1)
        entropy_of_foreign = SIGMOID.entropy(foreign.mean.sigmoid()).sum(1)
    by_entropy = SIGMOID.entropy(of_network).sum(1), entropy_of_foreign
    mistaken = ~told_right(p, y)
    return PredictionReport(
        posterior=label_scores(
            p, y, (total, total_of_foreign), (epistemic, of_foreign)
        ),
        network=label_scores(of_network, y, by_entropy, None),
        expected=p.flatten(),
        observed=y.flatten(),
        risks=risk_coverage(confidence(p).flatten(), mistaken.flatten()),
        epistemic=epistemic,
        epistemic_of_foreign=of_foreign,
        **common,
    )


_REPORTS = {
    Likelihood.CLASSIFICATION: _classification,
    Likelihood.REGRESSION: _regression,
    BINARY: _labels,
}
