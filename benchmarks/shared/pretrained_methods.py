"""The methods that studies of pretrained networks compare."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from textwrap import shorten
from typing import Any

import torch
from laplace import Laplace
from laplace.curvature import CurvlinopsGGN
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import KronDebiasedLaplace
from shared.internals import (
    entropies,
    entropy,
    output_moments,
    probit_probabilities,
)
from shared.predictions import scaled_temperature
from shared.pretrained import (
    BUDGET,
    Inputs,
    Predict,
    Predicted,
    Task,
    inputs_of,
)
from shared.processes import peak_megabytes, reset_peak

MAP, SCALED = "MAP", "temperature scaling"
THEIRS, THEIRS_ALL = "laplace-torch, last layer", "laplace-torch, all weights"
LAST, ALL, CALIBRATED = "last layer", "all weights", "calibrated"
CENTRED = "all weights, prior around the pretrained ones"


def run_methods(task: Task, score: Callable[..., dict], seed: int) -> dict[str, Any]:
    """Score all methods on one network.

    Args:
        task: The network and its data.
        score: From a method's predictions, and functions of the others', to scores.
        seed: Seed of the draws.

    Returns:
        Scores and costs, by method.
    """
    rows = dict(_without_posterior(task, score))
    rows[THEIRS] = _their_last_layer(task, score)
    rows[THEIRS_ALL] = _their_weights(task)
    for subset in ("last_layer", "all"):
        rows |= _ours(subset, task, score, seed)
    return rows


def kinds_of(la: KronDebiasedLaplace) -> dict[str, float]:
    """Tell which share of the parameters is known in which way."""
    sizes = {name: param.numel() for name, param in la.model.named_parameters()}
    kinds = la.parameter_kinds
    total = sum(sizes[name] for name in kinds)
    return {
        kind: sum(sizes[name] for name, own in kinds.items() if own == kind) / total
        for kind in sorted(set(kinds.values()))
    }


def _predicted(predict: Predict, loader: DataLoader) -> Predicted:
    parts = [predict(inputs_of(batch)[0]) for batch in loader]
    return Predicted(*(torch.cat(own) for own in zip(*parts, strict=True)))


def _scored(
    predict: Predict, task: Task, score: Callable[..., dict]
) -> dict[str, float]:
    """Score predictions, and time those of test data."""
    start = time.perf_counter()
    test = _predicted(predict, task.test)
    seconds = time.perf_counter() - start
    found = score(test, _predicted(predict, task.others))
    return found | {"predict": 100 * seconds / len(test.uncertainty)}


def _without_posterior(
    task: Task, score: Callable[..., dict]
) -> Iterator[tuple[str, dict]]:
    """Score the network alone, and with temperature scaling."""
    with torch.no_grad():
        parts = [inputs_of(batch) for batch in task.validation]
        start = time.perf_counter()
        outputs = torch.cat([_outputs(task, X) for X, _ in parts])
        y = torch.cat([labels for _, labels in parts])
        scaled = scaled_temperature(outputs, y)
        seconds = time.perf_counter() - start
        for label, temperature in ((MAP, 1.0), (SCALED, scaled)):

            def predict(X: Inputs, temperature: float = temperature) -> Predicted:
                p = (_outputs(task, X) / temperature).softmax(1)
                return Predicted(p, entropy(p))

            own = {} if label == MAP else {"fit": seconds, "temperature": scaled}
            yield label, _scored(predict, task, score) | own


def _outputs(task: Task, X: Inputs) -> Tensor:
    return task.head(task.features(X))


def _their_last_layer(task: Task, score: Callable[..., dict]) -> dict[str, float]:
    """Score laplace-torch's ``kron`` of the last layer, fitted to its inputs."""
    reset_peak()
    start = time.perf_counter()
    with torch.no_grad():
        parts = [inputs_of(batch) for batch in task.train]
        inputs = torch.cat([task.features(X) for X, _ in parts])
    points = TensorDataset(inputs, torch.cat([y for _, y in parts]))
    head = nn.Sequential(nn.Identity(), task.head)
    la = Laplace(head, "classification", "last_layer", "kron")
    la.fit(DataLoader(points, task.train.batch_size))
    la.optimize_prior_precision()
    seconds = time.perf_counter() - start

    def predict(X: Inputs) -> Predicted:
        with torch.no_grad():
            inputs = task.features(X)
        mean, covariance = la._glm_predictive_distribution(inputs)
        total, aleatoric = entropies(mean, covariance)
        variance = covariance.diagonal(dim1=1, dim2=2)
        return Predicted(probit_probabilities(mean, variance), total - aleatoric)

    found = _scored(predict, task, score)
    return found | {"fit": seconds, "memory": peak_megabytes() / 1024}


def _their_weights(task: Task) -> dict[str, str]:
    """Say why laplace-torch's ``kron`` of all weights does not take the network."""
    # the class would first allocate a square factor of the vocabulary's size
    backend = CurvlinopsGGN(_OfBatches(task.model), "classification")
    X, y = inputs_of(next(iter(task.train)))
    try:
        backend.kron(X, y, len(y))
    except (NotImplementedError, ValueError, RuntimeError, TypeError) as error:
        return {"refused": shorten(f"{type(error).__name__}: {error}", 80)}
    raise AssertionError("It fits by now: the study should score it.")


class _OfBatches(nn.Module):
    """A network as laplace-torch calls it: mappings are its only argument."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: Tensor | dict[str, Tensor]) -> Tensor:
        """Compute logits ``[batch, classes]``."""
        if isinstance(batch, Tensor):
            return self.model(batch)
        return self.model(**batch)


def _ours(
    subset: str, task: Task, score: Callable[..., dict], seed: int
) -> dict[str, dict]:
    """Score one of our posteriors, for each prior mean."""
    reset_peak()
    start = time.perf_counter()
    options = {"budget": BUDGET, "seed": seed}
    la = Laplace(task.model, "classification", subset, "kron_debiased", **options)
    la.fit(task.train)
    fit = time.perf_counter() - start
    if subset == "last_layer":
        return _tuned(LAST, la, task, score, fit)
    rows = _tuned(ALL, la, task, score, fit)
    la.prior_mean = _of_fitted(la, task.pretrained)
    rows |= _tuned(CENTRED, la, task, score, fit)
    return {label: row | {"kinds": kinds_of(la)} for label, row in rows.items()}


def _of_fitted(la: KronDebiasedLaplace, values: dict[str, Tensor]) -> Tensor:
    """Return what belongs to the fitted parameters, as a vector."""
    names = {id(param): name for name, param in la.model.named_parameters()}
    return torch.cat([values[names[id(own)]].flatten() for own in la.fitted_params])


def _tuned(
    label: str,
    la: KronDebiasedLaplace,
    task: Task,
    score: Callable[..., dict],
    fit: float,
) -> dict[str, dict]:
    """Score a posterior with the marginal likelihood's prior, and calibrated."""
    start = time.perf_counter()
    la.optimize_prior_precision()
    tuned = time.perf_counter()
    chosen = la.calibrate(task.validation)
    calibrated = time.perf_counter()
    found = [_uncertainties(la, task.test)]
    seconds = time.perf_counter() - calibrated
    found.append(_uncertainties(la, task.others))
    before, after = zip(*found, strict=True)
    costs = {
        "predict": 100 * seconds / len(before[0].uncertainty),
        "memory": peak_megabytes() / 1024,
        "prior": la.prior_precision.item(),
    }
    by_data = {"temperature": chosen.temperature, "scale": chosen.scale}
    return {
        label: score(*before) | costs | {"fit": fit + tuned - start},
        f"{label}, {CALIBRATED}": score(*after)
        | costs
        | by_data
        | {"fit": fit + calibrated - start},
    }


def _uncertainties(
    la: KronDebiasedLaplace, loader: DataLoader
) -> tuple[Predicted, Predicted]:
    """Predict by the posterior before calibration, and after it, in one pass."""
    parts = [output_moments(la, inputs_of(batch)[0], "full") for batch in loader]
    outputs = tuple(map(torch.cat, zip(*parts, strict=True)))
    calibration = la.calibration
    assert calibration is not None
    wide = calibration.with_whole_posterior()
    return (
        _of_outputs(outputs, outputs),
        _of_outputs(calibration.outputs(*outputs), wide.outputs(*outputs)),
    )


def _of_outputs(
    outputs: tuple[Tensor, Tensor], of_whole_posterior: tuple[Tensor, Tensor]
) -> Predicted:
    """Predict as ``la.uncertainty`` does, by means and covariances of outputs."""
    mean, covariance = outputs
    variance = covariance.diagonal(dim1=1, dim2=2)
    total, aleatoric = entropies(*of_whole_posterior)
    return Predicted(probit_probabilities(mean, variance), total - aleatoric)
