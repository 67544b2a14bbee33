"""How close posteriors from few backward passes come to the full-data posterior.

Three networks are trained on FashionMNIST. The full-data references are laplace-torch's
``KronLaplace`` (K-FAC) and EKFAC; every other row gets backward passes for ``budget``
points only, and is drawn again for each seed.

    python benchmarks/sampling_quality.py --data-root DATA --out benchmarks/results
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from math import exp
from pathlib import Path
from unittest import mock

import torch
from common import write_report
from laplace import KronLaplace
from matplotlib import rc_context
from matplotlib.figure import Figure
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from tueplots import axes, figsizes, fontsizes

from laplace_debiased import DebiasedKFACLinearOperator, EigenbasisMatrix, Laplace
from laplace_debiased.capture import capture_rows
from laplace_debiased.comparison.data import load
from laplace_debiased.comparison.estimators import single_batch
from laplace_debiased.curvature import average
from laplace_debiased.eigenbasis import decompose, project
from laplace_debiased.layers import Layer, curvature_blocks
from laplace_debiased.predictive import _rotated_jacobians
from laplace_debiased.sampling import draw
from laplace_debiased.selection import find_layers

PRIORS = (1.0, 10.0, 31.6, 100.0, 1000.0)
NUM_TRAIN = 50_000
POOL_SIZE = 4096


class ResidualBlock(nn.Module):
    """Two convolutions with BatchNorm, and a shortcut."""

    def __init__(self, channels: int, filters: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, filters, 3, stride, 1, bias=False),
            nn.BatchNorm2d(filters),
            nn.ReLU(),
            nn.Conv2d(filters, filters, 3, 1, 1, bias=False),
            nn.BatchNorm2d(filters),
        )
        self.shortcut = nn.Sequential(
            nn.Conv2d(channels, filters, 1, stride, bias=False),
            nn.BatchNorm2d(filters),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, channels, height, width]`` to filters."""
        return torch.relu(self.body(x) + self.shortcut(x))


def mlp() -> nn.Module:
    """Build a network of three linear layers."""
    widths = [784, 128, 64]
    hidden = [
        layer
        for d_in, d_out in pairwise(widths)
        for layer in (nn.Linear(d_in, d_out), nn.ReLU())
    ]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(widths[-1], 10))


def all_convolutional() -> nn.Module:
    """Build a network of seven convolutions."""
    plan = [(1, 16, 1), (16, 16, 2), (16, 32, 1), (32, 32, 2), (32, 50, 1), (50, 64, 1)]
    hidden = [
        layer
        for channels, filters, stride in plan
        for layer in (nn.Conv2d(channels, filters, 3, stride, 1), nn.ReLU())
    ]
    head = [nn.Conv2d(64, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*hidden, *head)


def resnet() -> nn.Module:
    """Build a ResNet of three blocks with BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        ResidualBlock(16, 16, 2),
        ResidualBlock(16, 32, 2),
        ResidualBlock(32, 64, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


# name: (network, epochs, learning rate)
NETWORKS = {
    "MLP": (mlp, 8, 2e-3),
    "all-convolutional": (all_convolutional, 8, 4e-3),
    "ResNet": (resnet, 6, 1e-2),
}


def train(name: str, X: Tensor, y: Tensor) -> nn.Module:
    """Train a network with mirrored images."""
    torch.manual_seed(0)
    build, epochs, learning_rate = NETWORKS[name]
    model, batch_size = build(), 128
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=epochs * -(-len(X) // batch_size)
    )
    for _ in range(epochs):
        for batch in torch.randperm(len(X)).split(batch_size):
            mirrored = torch.rand(len(batch), 1, 1, 1) < 0.5
            images = torch.where(mirrored, X[batch].flip(3), X[batch])
            optimizer.zero_grad()
            cross_entropy(model(images), y[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@dataclass
class Problem:
    """A trained network with its data.

    Args:
        model: The network.
        train: The training points.
        inputs: Test images.
        labels: Their classes.
        budget: Number of points with backward passes.
    """

    model: nn.Module
    train: TensorDataset
    inputs: Tensor
    labels: Tensor
    budget: int

    def loader(self) -> DataLoader:
        """Return a loader over the training points."""
        return DataLoader(self.train, batch_size=256)

    def params(self) -> list[Tensor]:
        """Return the network's parameters."""
        return list(self.model.parameters())


@torch.no_grad()
def nlls(problem: Problem, curvature: EigenbasisMatrix) -> list[float]:
    """Compute the test NLL at each of ``PRIORS``, by the GLM predictive with probit.

    The posteriors share an eigenbasis, and so the rotated Jacobians of each layer.

    Args:
        problem: Network and test points.
        curvature: The curvature without prior.

    Returns:
        The NLLs.
    """
    losses = [
        _losses(problem, curvature, X, y)
        for X, y in zip(problem.inputs.split(50), problem.labels.split(50), strict=True)
    ]
    return torch.cat(losses, 1).mean(1).tolist()


def _losses(
    problem: Problem, curvature: EigenbasisMatrix, X: Tensor, y: Tensor
) -> Tensor:
    """Compute the losses ``[priors, batch]`` of a batch."""
    layers = find_layers(problem.model, problem.params())
    inputs: dict[str, Tensor] = {}

    def keep(layer: Layer, rows: Tensor) -> None:
        inputs[layer.name] = rows

    with torch.enable_grad(), capture_rows(layers, len(X), keep) as tape:
        output = problem.model(X)
    gradients: dict[str, list[Tensor]] = {}
    for column in torch.eye(output.shape[1]):
        for layer, g in tape.gradient_rows(output, column.expand_as(output), True):
            gradients.setdefault(layer.name, []).append(g)

    variances = torch.zeros(len(PRIORS), *output.shape)
    for block, vectors, values in zip(
        curvature_blocks(layers, separate_weight_and_bias=True),
        curvature.eigenvectors,
        curvature.spectra(),
        strict=True,
    ):
        g = torch.stack(gradients[block.layer.name], 1)
        if block.has_inputs:
            x = inputs[block.layer.name] @ vectors[1]
            squares = _rotated_jacobians(g, x, vectors[0]).flatten(2) ** 2
        else:
            squares = (g.flatten(3).sum(2) @ vectors[0]) ** 2
        inverses = torch.stack([1 / (values.flatten() + prior) for prior in PRIORS])
        variances += (squares @ inverses.T).movedim(2, 0)
    logits = output / (1 + torch.pi / 8 * variances).sqrt()
    return torch.stack([cross_entropy(f, y, reduction="none") for f in logits])


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


def chosen_prior(la: KronLaplace) -> float:
    """Choose the prior precision by the marginal likelihood, to full precision."""

    @torch.no_grad()
    def objective(log_prior: float) -> float:
        prior = torch.tensor([log_prior]).exp()
        return -la.log_marginal_likelihood(prior_precision=prior).item()

    return exp(minimize_scalar(objective, bounds=(-5, 10), method="bounded").x)


def full_kfac(problem: Problem) -> tuple[Result, list]:
    """Fit laplace-torch's ``KronLaplace`` to all data; also return its factors."""
    la = KronLaplace(problem.model, "classification")
    start = time.perf_counter()
    la.fit(problem.loader())
    seconds = time.perf_counter() - start
    kfacs = la.H_facs.kfacs
    # laplace-torch decomposes in single precision
    vectors = decompose(kfacs)
    matrix = EigenbasisMatrix(vectors, project(kfacs, vectors))
    return Result(nlls(problem, matrix), chosen_prior(la), seconds), kfacs


def full_ekfac(problem: Problem) -> Result:
    """Compute EKFAC of all data."""
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
    matrix = EigenbasisMatrix(operator.eigenvectors, [[s] for s in operator.spectra])
    la = Laplace(problem.model, "classification", "all", "kron_debiased", budget=64)
    la.fit(problem.loader())
    la.H = matrix
    return Result(nlls(problem, matrix), chosen_prior(la), seconds)


def fitted(problem: Problem, seed: int, **options) -> tuple[Result, object]:
    """Fit our posterior, with the prior precision of the marginal likelihood."""
    la = Laplace(
        problem.model,
        "classification",
        "all",
        "kron_debiased",
        budget=problem.budget,
        seed=seed,
        **options,
    )
    start = time.perf_counter()
    la.fit(problem.loader())
    seconds = time.perf_counter() - start
    prior = chosen_prior(la)
    return Result(nlls(problem, la.H), prior, seconds), la


def ours(problem: Problem, seed: int, factors: list, **options) -> Result:
    """Fit our posterior."""
    return fitted(problem, seed, **options)[0]


def uniform_single(problem: Problem, seed: int, factors: list) -> Result:
    """Fit ``KronLaplace`` to a uniform mini-batch."""
    start = time.perf_counter()
    la, _ = single_batch(problem.model, problem.train, problem.budget, seed)
    seconds = time.perf_counter() - start
    prior = chosen_prior(la)
    return Result(nlls(problem, as_matrix(la.H)), prior, seconds)


def as_matrix(H) -> EigenbasisMatrix:
    """Convert laplace-torch's eigendecomposition."""
    return EigenbasisMatrix(H.eigenvectors, H.eigenvalues)


@contextmanager
def equal_probabilities() -> Iterator[None]:
    """Let draws ignore the scores."""
    with mock.patch("laplace_debiased.estimation.draw", partial(draw, floor=1.0)):
        yield


def uniform_with_pool(problem: Problem, seed: int, factors: list, **options) -> Result:
    """Draw uniformly, with input covariances and loss from the pool."""
    with equal_probabilities():
        return ours(problem, seed, factors, sampling="curvature", **options)


def drawn_single(problem: Problem, seed: int, factors: list) -> Result:
    """Use a draw's points for both roles, which does not debias."""
    _, la = fitted(problem, seed, **CROSS_FIT, sampling="curvature")
    kfacs = average(la.H_facs.folds, la.H_facs.shares)
    vectors = decompose(kfacs)
    la.H = EigenbasisMatrix(vectors, project(kfacs, vectors))
    return Result(nlls(problem, la.H), chosen_prior(la))


def oracle(problem: Problem, seed: int, factors: list) -> Result:
    """Take directions from a draw, and magnitudes from all data."""
    _, la = fitted(problem, seed, **CROSS_FIT, sampling="curvature")
    la.H = EigenbasisMatrix(la.H.eigenvectors, project(factors, la.H.eigenvectors))
    return Result(nlls(problem, la.H), chosen_prior(la))


CROSS_FIT = {"estimator": "cross_fit"}
Row = Callable[[Problem, int, list], Result]
ROWS: dict[str, dict[str, Row]] = {
    "kfac": {
        "single batch, uniform": uniform_single,
        "two batches, uniform": partial(ours, sampling="uniform"),
        "cross-fit, uniform": partial(ours, sampling="uniform", **CROSS_FIT),
        "two batches, uniform, inputs of pool": uniform_with_pool,
        "cross-fit, uniform, inputs of pool": partial(uniform_with_pool, **CROSS_FIT),
        "single batch, curvature": drawn_single,
        "two batches, curvature": partial(ours, sampling="curvature"),
        "cross-fit, curvature": partial(ours, sampling="curvature", **CROSS_FIT),
        "oracle": oracle,
    },
    "ggn": {
        "two batches, uniform": partial(ours, sampling="uniform", magnitudes="ggn"),
        "cross-fit, uniform": partial(
            ours, sampling="uniform", magnitudes="ggn", **CROSS_FIT
        ),
        "two batches, curvature": partial(ours, sampling="curvature", magnitudes="ggn"),
        "cross-fit, curvature": partial(
            ours, sampling="curvature", magnitudes="ggn", **CROSS_FIT
        ),
    },
}


def run_network(name: str, data, budget: int, num_seeds: int) -> dict:
    """Train a network, and measure all rows on all seeds."""
    X, y = (tensor[:NUM_TRAIN] for tensor in data.train.tensors)
    model = train(name, X, y)
    problem = Problem(
        model, TensorDataset(X, y), data.test_inputs, data.test_labels, budget
    )
    with torch.no_grad():
        output = model(problem.inputs)
    accuracy = (output.argmax(1) == problem.labels).float().mean().item()
    kfac, factors = full_kfac(problem)
    print(f"{name}: accuracy {accuracy:.3f}, K-FAC {kfac}", flush=True)
    references = {"kfac": kfac, "ggn": full_ekfac(problem)}
    print(f"{name}: EKFAC {references['ggn']}", flush=True)
    rows = {}
    for magnitudes, estimators in ROWS.items():
        for label, estimator in estimators.items():
            results = [estimator(problem, seed, factors) for seed in range(num_seeds)]
            rows[f"{magnitudes}: {label}"] = [asdict(result) for result in results]
            line = summary(references[magnitudes], results)
            print(f"{name}, {magnitudes}: {label} {line}", flush=True)
    return {
        "accuracy": accuracy,
        "num_params": sum(p.numel() for p in problem.params()),
        "map_nll": cross_entropy(output, problem.labels).item(),
        "references": {key: asdict(value) for key, value in references.items()},
        "rows": rows,
    }


def summary(reference: Result, results: list[Result]) -> list[str]:
    """Format differences to the reference in percent, mean ± standard deviation."""
    nll = torch.tensor([result.nll for result in results])
    prior = torch.tensor([[result.prior_precision] for result in results])
    expected = torch.tensor([*reference.nll, reference.prior_precision])
    percent = 100 * (torch.cat([nll, prior], 1) / expected - 1)
    return [
        f"{mean:+.1f} ± {std:.1f}"
        for mean, std in zip(percent.mean(0), percent.std(0), strict=True)
    ]


def table(networks: dict) -> str:
    """Format the results as Markdown tables, one for each network."""
    parts = []
    for name, result in networks.items():
        references = {k: Result(**r) for k, r in result["references"].items()}
        full = references["kfac"]
        parts.append(
            f"**{name}**: {result['num_params']:,} parameters, accuracy "
            f"{100 * result['accuracy']:.1f} %, full-data K-FAC in "
            f"{full.fit_seconds:.0f} s\n"
        )
        priors = " | ".join(f"{prior:g}" for prior in PRIORS)
        parts.append(f"| estimator | {priors} | chosen prior | fit s | speed-up |")
        parts.append("|---" * (len(PRIORS) + 4) + "|")
        for label, runs in result["rows"].items():
            results = [Result(**run) for run in runs]
            cells = summary(references[label.split(":")[0]], results)
            seconds = [r.fit_seconds for r in results if r.fit_seconds is not None]
            timing = " | "
            if seconds:
                median = sorted(seconds)[len(seconds) // 2]
                timing = f"{median:.2f} | {full.fit_seconds / median:.0f} ×"
            parts.append(f"| {label} | {' | '.join(cells)} | {timing} |")
        parts.append("")
    return "\n".join(parts).rstrip()


def write_figure(path: Path, networks: dict) -> None:
    """Draw the NLL's difference to full data, with its standard deviation."""
    style = {
        **figsizes.neurips2023(ncols=3, rel_width=1.4, height_to_width_ratio=0.9),
        **fontsizes.neurips2023(),
        **axes.lines(),
        **axes.grid(),
        "axes.grid": True,
    }
    with rc_context(style):
        figure = Figure()
        panels = figure.subplots(1, len(networks), squeeze=False)[0]
        for axis, (name, result) in zip(panels, networks.items(), strict=True):
            reference = torch.tensor(result["references"]["kfac"]["nll"])
            for label, runs in result["rows"].items():
                if not label.startswith("kfac"):
                    continue
                percent = torch.tensor([run["nll"] for run in runs]) / reference
                percent = 100 * (percent - 1)
                mean, std = percent.mean(0), percent.std(0)
                axis.plot(PRIORS, mean, label=label.removeprefix("kfac: "))
                axis.fill_between(PRIORS, mean - std, mean + std, alpha=0.15)
            axis.set(xscale="log", title=name, xlabel="prior precision")
        panels[0].set_ylabel("test NLL above full data (%)")
        figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3
        )
        figure.savefig(path, dpi=200)


def main() -> None:
    """Run all networks, and write table, numbers and figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    data = load("fashion-mnist", arguments.data_root)
    networks = {
        name: run_network(name, data, arguments.budget, arguments.seeds)
        for name in arguments.networks
    }
    settings = {
        "budget": arguments.budget,
        "pool_size": POOL_SIZE,
        "seeds": arguments.seeds,
        "num_train": NUM_TRAIN,
        "priors": PRIORS,
    }
    report = table(networks)
    write_report(arguments.out, "sampling_quality", settings, networks, report)
    write_figure(arguments.out / "sampling_quality.png", networks)


if __name__ == "__main__":
    main()
