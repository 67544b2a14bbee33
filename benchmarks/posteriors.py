"""Posteriors of a trained network, and how well they predict.

Predictions are those of the linearized network with the probit approximation, at many
prior precisions at once: the posteriors share an eigenbasis, and so a network's rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from math import exp, pi
from pathlib import Path

import torch
from laplace import KronLaplace
from networks import CHECKPOINTS, problem_data, trained
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.nn.functional import nll_loss
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import (
    DebiasedKFACLinearOperator,
    EigenbasisMatrix,
    KronDebiasedLaplace,
)
from laplace_debiased.curvature.eigenbasis import Factors, decompose, project
from laplace_debiased.curvature.streams import average
from laplace_debiased.predictive.moments import rotated_jacobians
from laplace_debiased.rows.layers import Block, curvature_blocks
from laplace_debiased.rows.linearization import Linearization, linearize
from laplace_debiased.rows.selection import find_layers

PRIORS = (1.0, 10.0, 31.6, 100.0, 1000.0)
FIT_BATCH_SIZE = 256
FULL = "full data"
QUICK_POINTS = 500
# small enough for the memory allocator to use the same pages again
_TEST_BATCH_SIZE = 20


@dataclass
class Problem:
    """A trained network with its data.

    Args:
        model: The network.
        train: The training points.
        inputs: Test images.
        labels: Their classes.
        name: Name of the network.
        dataset: Name of the data.
    """

    model: nn.Module
    train: TensorDataset
    inputs: Tensor
    labels: Tensor
    name: str
    dataset: str

    def __str__(self) -> str:
        return f"{self.dataset}, {self.name}"

    @classmethod
    def load(
        cls, name: str, dataset: str, data_root: Path, quick: bool = False
    ) -> Problem:
        """Load a network's checkpoint, and its data; few of them for a quick run."""
        model = trained(name, dataset, data_root)
        train, inputs, labels = problem_data(dataset, data_root)
        if quick:
            train = TensorDataset(*train[:QUICK_POINTS])
            inputs, labels = inputs[:QUICK_POINTS], labels[:QUICK_POINTS]
        return cls(model, train, inputs, labels, name, dataset)

    def loader(self) -> DataLoader:
        """Return a loader over the training points."""
        return DataLoader(self.train, batch_size=FIT_BATCH_SIZE)

    def params(self) -> list[Tensor]:
        """Return the network's parameters."""
        return list(self.model.parameters())


@torch.no_grad()
def glm_probabilities(
    posteriors: Sequence[tuple[EigenbasisMatrix, Sequence[float]]],
    model: nn.Module,
    inputs: Tensor,
) -> list[Tensor]:
    """Predict by several posteriors of a network, which is linearized only once.

    Args:
        posteriors: Curvature without prior, and prior precisions of each.
        model: The network, all parameters of which are in the posteriors.
        inputs: Test images.

    Returns:
        Probabilities ``[priors, points, classes]`` of each posterior.
    """
    layers = find_layers(model, list(model.parameters()))
    blocks = curvature_blocks(layers, separate_weight_and_bias=True)
    chunks = []
    for X in inputs.split(_TEST_BATCH_SIZE):
        linear = linearize(model, layers, X, len(X))
        variances = [
            sum(
                _variances(linear, block, vectors, values, priors)
                for block, vectors, values in zip(
                    blocks, curvature.eigenvectors, curvature.spectra(), strict=True
                )
            )
            for curvature, priors in posteriors
        ]
        logits = linear.output.detach()
        chunks.append(
            [(logits / (1 + pi / 8 * v).sqrt()).softmax(-1) for v in variances]
        )
    return [torch.cat(parts, 1) for parts in zip(*chunks, strict=True)]


def _variances(
    linear: Linearization,
    block: Block,
    vectors: Factors,
    values: Tensor,
    priors: Sequence[float],
) -> Tensor:
    """Compute a block's share of the output variances.

    Args:
        linear: The linearized network.
        block: The block.
        vectors: Its eigenvectors.
        values: Its eigenvalues ``[d_out, d_in]`` or ``[d_out]``.
        priors: Prior precisions.

    Returns:
        Variances ``[priors, batch, C]``.
    """
    inverses = torch.stack([1 / (values + prior) for prior in priors])
    gradients = linear.gradients[block.layer.name]
    if not block.has_inputs:
        squares = (gradients.flatten(3).sum(2) @ vectors[0]) ** 2
        return torch.einsum("nco,po->pnc", squares, inverses)
    inputs = linear.inputs[block.layer.name] @ vectors[1]
    if gradients.shape[2:4] == (1, 1):  # of rank one
        squares = (gradients.flatten(2) @ vectors[0]) ** 2
        weights = inputs.flatten(1) ** 2 @ inverses.mT
        return torch.einsum("nco,pno->pnc", squares, weights)
    squares = rotated_jacobians(gradients, inputs, vectors[0]).flatten(2) ** 2
    return (squares @ inverses.flatten(1).T).movedim(2, 0)


def nlls(
    problem: Problem,
    curvatures: Sequence[EigenbasisMatrix],
    priors: Sequence[float] = PRIORS,
) -> list[list[float]]:
    """Compute the test NLL of each posterior at each prior precision.

    Args:
        problem: Network and test points.
        curvatures: The curvatures without prior.
        priors: Prior precisions.

    Returns:
        The NLLs of each posterior.
    """
    posteriors = [(curvature, priors) for curvature in curvatures]
    predictions = glm_probabilities(posteriors, problem.model, problem.inputs)
    return [
        [nll_loss(p.log(), problem.labels).item() for p in of_one]
        for of_one in predictions
    ]


def chosen_prior(la: KronLaplace) -> float:
    """Choose the prior precision by the marginal likelihood, to full precision."""

    @torch.no_grad()
    def objective(log_prior: float) -> float:
        prior = torch.tensor([log_prior]).exp()
        return -la.log_marginal_likelihood(prior_precision=prior).item()

    return exp(minimize_scalar(objective, bounds=(-5, 10), method="bounded").x)


@dataclass
class Result:
    """One posterior.

    Args:
        nll: Test NLL at each of ``PRIORS``.
        prior_precision: What the marginal likelihood chose; None if it was not asked.
        fit_seconds: Time to fit; None if that is not its own.
    """

    nll: list[float]
    prior_precision: float | None = None
    fit_seconds: float | None = None

    @classmethod
    def of(
        cls, problem: Problem, la: KronLaplace, fit_seconds: float | None = None
    ) -> Result:
        """Test a fitted posterior."""
        return cls(*nlls(problem, [la.H]), chosen_prior(la), fit_seconds)


def fit(problem: Problem, **options) -> tuple[KronDebiasedLaplace, float]:
    """Fit our posterior; also return the time it takes."""
    la = KronDebiasedLaplace(problem.model, "classification", **options)
    start = time.perf_counter()
    la.fit(problem.loader())
    return la, time.perf_counter() - start


def undo_debiasing(la: KronDebiasedLaplace) -> list[Factors]:
    """Let all points of a fit with ``kfac`` magnitudes judge their own directions.

    Args:
        la: The fit, whose curvature becomes K-FAC's.

    Returns:
        K-FAC's factors.
    """
    kfacs = average(la.H_facs.folds, la.H_facs.shares)
    vectors = decompose(kfacs)
    la.H = EigenbasisMatrix(vectors, project(kfacs, vectors))
    return kfacs


def full_kfac(problem: Problem) -> tuple[KronLaplace, list[Factors], float]:
    """Fit K-FAC to all data.

    By laplace-torch's ``KronLaplace``, or by ours where it refuses a layer.

    Args:
        problem: Network and data.

    Returns:
        The fit, K-FAC's factors, and the seconds it took.
    """
    la = KronLaplace(problem.model, "classification")
    start = time.perf_counter()
    try:
        la.fit(problem.loader())
    except NotImplementedError:
        la, seconds = fit(problem, estimator="two_batch")
        return la, undo_debiasing(la), seconds
    seconds = time.perf_counter() - start
    kfacs = la.H_facs.kfacs
    # laplace-torch decomposes in single precision
    vectors = decompose(kfacs)
    la.H = EigenbasisMatrix(vectors, project(kfacs, vectors))
    return la, kfacs, seconds


def full_ekfac(problem: Problem, like: KronLaplace) -> tuple[KronLaplace, float]:
    """Compute EKFAC of all data.

    Args:
        problem: Network and data.
        like: A fit to all data, which gets the curvature.

    Returns:
        The fit, and the seconds it took.
    """
    data = list(problem.loader())
    operator = DebiasedKFACLinearOperator(
        problem.model,
        nn.CrossEntropyLoss(reduction="sum"),
        problem.params(),
        data,
        data,
        magnitudes="ggn",
    )
    start = time.perf_counter()
    operator.compute()
    seconds = time.perf_counter() - start
    like.H = EigenbasisMatrix(operator.eigenvectors, [[s] for s in operator.spectra])
    return like, seconds


def digest(model: nn.Module) -> str:
    """Return a name of a network's parameters and buffers, which changes with them."""
    parts = (tensor.numpy().tobytes() for tensor in model.state_dict().values())
    return sha256(b"".join(parts)).hexdigest()[:12]


def references(
    problem: Problem, keep: bool = True
) -> tuple[dict[str, Result], list[Factors]]:
    """Return the full-data references, and K-FAC's factors.

    Args:
        problem: Network and data.
        keep: Whether to measure them only once, and keep them for all studies.

    Returns:
        Results of ``"kfac"`` and ``"ggn"`` magnitudes, and the factors.
    """
    key = f"{problem.dataset}-{problem.name}-{digest(problem.model)}"
    path = CHECKPOINTS / "cache" / f"references-{key}.pt"
    if keep and path.exists():
        results, factors = torch.load(path, weights_only=True)
        return {key: Result(**value) for key, value in results.items()}, factors
    la, factors, seconds = full_kfac(problem)
    results = {"kfac": Result.of(problem, la, seconds)}
    results["ggn"] = Result.of(problem, *full_ekfac(problem, la))
    if keep:
        path.parent.mkdir(parents=True, exist_ok=True)
        plain = {key: asdict(value) for key, value in results.items()}
        torch.save((plain, factors), path)
    return results, factors


def full_data(problem: Problem, keep: bool = True) -> KronDebiasedLaplace:
    """Return full-data K-FAC as one of our posteriors.

    Args:
        problem: Network and data.
        keep: As in :func:`references`.

    Returns:
        The posterior.
    """
    _, kfacs = references(problem, keep)
    return with_kfac(problem, kfacs)


def with_kfac(problem: Problem, kfacs: list[Factors]) -> KronDebiasedLaplace:
    """Return one of our posteriors with K-FAC of given factors."""
    la, _ = fit(problem, budget=8)
    vectors = decompose(kfacs)
    la.H = EigenbasisMatrix(vectors, project(kfacs, vectors))
    return la


# from a problem, a budget and a seed to a fit
Estimator = Callable[[Problem, int, int], KronDebiasedLaplace]


def single_batch(problem: Problem, budget: int, seed: int) -> KronDebiasedLaplace:
    """Use a uniform mini-batch for directions and magnitudes."""
    la, _ = fit(problem, budget=budget, seed=seed, sampling="uniform")
    undo_debiasing(la)
    return la


def debiased(
    problem: Problem, budget: int, seed: int, **options: str
) -> KronDebiasedLaplace:
    """Fit our posterior."""
    return fit(problem, budget=budget, seed=seed, **options)[0]


ESTIMATORS: dict[str, Estimator] = {
    "single batch": single_batch,
    "two batches": partial(debiased, estimator="two_batch", sampling="uniform"),
    "default": debiased,
    "default, ggn": partial(debiased, magnitudes="ggn"),
}
