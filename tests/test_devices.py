"""A GPU computes what the CPU computes, and is not waited for."""

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import (
    DebiasedKFACLinearOperator,
    Laplace,
    bias_report,
    curvature_scores,
    directional_derivatives,
)
from laplace_debiased.curvature.decomposition import symmetric_eigh
from tests import zoo
from tests.cases import batch, network
from tests.dense import relative_error
from tests.fits import debiased
from tests.networks import NETWORKS
from tests.networks import batch as images_or_texts
from tests.networks import network as well_known
from tests.test_zoo import Points, loader
from tests.zoo import FITTED

DEVICE = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SIZE, BATCH = 48, 16
LOSS = nn.CrossEntropyLoss(reduction="sum")
SMALL = ["mlp", "cnn-groups", "conv-transpose-2d", "resnet", "transformer", "recurrent"]
# what would copy a network of the CPU to the GPU
OF_GPUS = ["data parallel"]


def on(device, value):
    if isinstance(value, dict):
        return {key: own.to(device) for key, own in value.items()}
    return value.to(device)


def fitted(model, data, device, **options):
    """Fit a network on a device; the data stay where they are."""
    options = {"likelihood": "classification", "subset_of_weights": "all"} | options
    la = Laplace(model.to(device), hessian_structure="kron_debiased", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        la.fit(data)
        la.optimize_prior_precision()
    return la


def assert_same(on_gpu, on_cpu, tolerance=1e-6):
    assert on_gpu.device.type == DEVICE.type
    assert relative_error(on_gpu.cpu(), on_cpu) < tolerance


def assert_same_posteriors(on_gpu, on_cpu, Z):
    evidence = [la.log_marginal_likelihood() for la in (on_gpu, on_cpu)]
    assert_same(*evidence)
    assert_same(on_gpu.prior_precision, on_cpu.prior_precision, 1e-4)
    on_gpu.prior_precision = on_cpu.prior_precision
    moments = [
        la._glm_predictive_distribution(on(device, Z))
        for la, device in ((on_gpu, DEVICE), (on_cpu, "cpu"))
    ]
    for own, other in zip(*moments, strict=True):
        assert_same(own, other)
    assert_same(on_gpu(on(DEVICE, Z)), on_cpu(Z))


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize("name", [name for name in FITTED if name not in OF_GPUS])
def test_architectures_have_the_posterior_of_the_cpu(name, magnitudes):
    X, y = zoo.data(name, 10)
    try:
        zoo.plain(zoo.build(name).to(DEVICE))(on(DEVICE, X))
    except RuntimeError as error:
        pytest.skip(f"the network itself does not run there: {str(error)[:60]}")
    posteriors = [
        fitted(zoo.build(name), loader(X, y), device, magnitudes=magnitudes)
        for device in (DEVICE, "cpu")
    ]
    Z, _ = zoo.data(name, 3, seed=5)
    assert_same_posteriors(*posteriors, Z)


@pytest.mark.parametrize("name", NETWORKS)
def test_well_known_networks_have_the_posterior_of_the_cpu(name):
    model, data = well_known(name), images_or_texts(name, 12)
    points = Points(data, data["labels"]) if isinstance(data, dict) else None
    train = DataLoader(points or TensorDataset(*data), 5)
    key = "pixel_values" if "hugging" in name else "input_ids"
    posteriors = [
        fitted(copy.deepcopy(model), train, device, budget=8, dict_key_x=key)
        for device in (DEVICE, "cpu")
    ]
    Z = data if isinstance(data, dict) else data[0]
    assert_same_posteriors(*posteriors, Z)


@pytest.mark.parametrize(
    "options",
    [
        {"budget": 24, "estimator": "two_batch", "sampling": "uniform"},
        {"budget": 24, "magnitudes": "ggn", "fit_memory_limit": 10**8},
        {"subset_of_weights": "last_layer"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["mlp", "resnet", "transformer"])
def test_estimators_have_the_posterior_of_the_cpu(name, options):
    X, y = batch(name, SIZE)
    train = DataLoader(TensorDataset(X, y), BATCH)
    posteriors = [
        fitted(network(name), train, device, **options) for device in (DEVICE, "cpu")
    ]
    assert_same_posteriors(*posteriors, X[:5])


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("workers", [0, 1])
def test_all_that_follows_a_fit_gives_what_the_cpu_gives(subset, workers, tmp_path):
    X, y = batch("resnet", SIZE)
    options = {"pin_memory": True, "num_workers": workers}
    train = DataLoader(TensorDataset(X, y), BATCH, **options)
    found = []
    for device in (DEVICE, torch.device("cpu")):
        options = {"subset_of_weights": subset, "budget": 24}
        la = fitted(network("resnet"), train, device, **options)
        Z = X[:6].to(device)
        la.prior_precision = 2.0
        chosen = la.calibrate(train)
        uncertainty = la.uncertainty(Z)
        assert la.functional_samples(Z, "glm", 3).isfinite().all()
        assert la.predictive_samples(Z, "nn", 3).device.type == device.type
        assert la.sample(2).device.type == device.type
        report = la.report(train)
        sets = la.conformal_sets(train)(Z)
        la.save(tmp_path / device.type)
        other = debiased(network("resnet"), subset=subset)
        other.load(tmp_path / device.type)
        on_cpu = torch.load(tmp_path / device.type, "cpu", weights_only=True)
        moved = debiased(network("resnet").to(device), subset=subset)
        moved.load_state_dict(on_cpu)
        found.append(
            {
                "temperature": torch.tensor(chosen.temperature, device=device),
                "epistemic": uncertainty.epistemic,
                "mc": la(Z, link_approx="mc", n_samples=4096),
                "bridge": la(Z, link_approx="bridge"),
                "variance": uncertainty.functional_variance,
                "nll": torch.tensor(report.posterior.nll, device=device),
                "sets": torch.as_tensor(sets, device=device).double(),
                "loaded": other(Z.cpu()).to(device),
                "moved": moved(Z),
                "standard errors": torch.tensor(
                    list(la.curvature_standard_errors.values()), device=device
                ),
            }
        )
    for key, own in found[0].items():
        tolerance = 0.1 if key == "mc" else 1e-4
        assert_same(own, found[1][key], tolerance)


def test_streams_continue_on_the_gpu():
    X, y = batch("mlp", SIZE)
    found = []
    for device in (DEVICE, torch.device("cpu")):
        la = debiased(network("mlp").to(device))
        for part in range(2):
            rows = slice(24 * part, 24 * (part + 1))
            la.partial_fit((X[rows], y[rows]))
        found.append(la)
    assert_same_posteriors(*found, X[:5])


def test_quadratics_are_those_of_the_cpu():
    X, y = batch("mlp", SIZE)
    found = []
    for device in (DEVICE, torch.device("cpu")):
        model = network("mlp").to(device)
        params = list(model.parameters())
        data = [
            (own.to(device), labels.to(device))
            for own, labels in zip(X.split(BATCH), y.split(BATCH), strict=True)
        ]
        generator = torch.Generator().manual_seed(0)
        size = sum(param.numel() for param in params)
        D = torch.randn(size, 3, dtype=X.dtype, generator=generator).to(device)
        lines = directional_derivatives(model, LOSS, params, data, D)
        operator = DebiasedKFACLinearOperator(model, LOSS, params, data, data)
        report = bias_report(
            model,
            LOSS,
            params,
            DataLoader(TensorDataset(X, y), BATCH),
            num_directions=3,
            batch_size=16,
            num_batches=2,
        )
        found.append(
            [
                lines.slopes,
                lines.curvatures,
                operator.trace,
                curvature_scores(model, LOSS, data),
                operator @ D,
                report.curvature.own.to(device),
            ]
        )
    for own, other in zip(*found, strict=True):
        assert_same(torch.as_tensor(own, device=DEVICE), torch.as_tensor(other))


def waits(function):
    """How often a call waits for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(own.message) for own in caught)


@pytest.mark.parametrize("name", SMALL)
def test_the_gpu_is_waited_for_as_often_for_many_batches(name):
    model = network(name, dtype=torch.float32).to(DEVICE)

    def fit(size):
        X, y = batch(name, size, dtype=torch.float32)
        la = debiased(model)
        train = DataLoader(TensorDataset(X, y), BATCH, pin_memory=True)
        return la, waits(lambda: la.fit(train))

    la, few = fit(SIZE)
    _, many = fit(4 * SIZE)
    assert many <= few + 5
    la.optimize_prior_precision()
    X = [batch(name, size, dtype=torch.float32)[0].to(DEVICE) for size in (2, 30)]
    counts = [waits(partial(la, own)) for own in X]
    assert abs(counts[1] - counts[0]) <= 2


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_labels_have_the_posterior_of_the_cpu(subset):
    X, y = batch("mlp", SIZE, "bce")
    found = []
    for device in (DEVICE, "cpu"):
        options = {"likelihood": "binary_classification", "subset_of_weights": subset}
        train = DataLoader(TensorDataset(X, y.int()), BATCH)
        found.append(fitted(network("mlp"), train, device, budget=24, **options))
    assert_same_posteriors(*found, X[:5])
    for la in found:
        la.calibrate(train)
    epistemic = [
        la.uncertainty(on(device, X)).epistemic
        for la, device in zip(found, (DEVICE, "cpu"), strict=True)
    ]
    assert_same(*epistemic, 1e-4)
    nll = [la.report(train).posterior.nll for la in found]
    assert nll[0] == pytest.approx(nll[1], rel=1e-4)


@pytest.mark.parametrize("size", [31, 64, 512, 600])
def test_decompositions_in_single_precision_are_as_exact_as_on_the_cpu(size):
    rows = torch.randn(size // 2, size, dtype=torch.float64)
    matrix = rows.T @ rows / size
    values, vectors = symmetric_eigh(matrix.float().to(DEVICE))
    assert values.dtype == vectors.dtype == torch.float32
    values, vectors = values.double(), vectors.double()
    assert_same((vectors * values) @ vectors.T, matrix, 5e-6)
    assert_same(vectors.T @ vectors, torch.eye(size).double(), 5e-6)
