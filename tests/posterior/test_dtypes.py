"""Posteriors of models in any precision and memory layout."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from laplace.curvature.asdl import AsdlGGN
from torch import nn

from tests.cases import batch, network
from tests.fits import SUBSETS, debiased, loader


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_models_dtype_is_followed(dtype, magnitudes, subset):
    exact = debiased(network("mlp"), subset=subset, magnitudes=magnitudes)
    exact.fit(loader())
    la = debiased(network("mlp", dtype=dtype), subset=subset, magnitudes=magnitudes)
    la.fit(loader(dtype=dtype))
    X, _ = batch("mlp", 5, dtype=dtype)
    tensors = [la(X), la(X, pred_type="nn", link_approx="mc"), la.sample(1), la.mean]
    tensors += [la(X, link_approx=link) for link in ("mc", "bridge")]
    tensors += [la.functional_samples(X, pred_type=kind) for kind in ("glm", "nn")]
    assert {tensor.dtype for tensor in tensors} == {dtype}
    # sums over all data, which half precision cannot hold
    sums = [la.loss, la.H.eigenvectors[0][0], la.H.eigenvalues[0][0]]
    sums += [la.log_marginal_likelihood(), la.log_prob(la.mean)]
    precise = torch.promote_types(dtype, torch.float32)
    assert {tensor.dtype for tensor in sums} == {precise}
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    error = (la.H.diag().sum() / exact.H.diag().sum() - 1).abs()
    assert error < tolerance


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_curvature_of_many_data_does_not_overflow_in_half_precision(
    likelihood, magnitudes, subset
):
    values = []
    for dtype in (torch.float64, torch.float16):
        model = network("mlp", dtype=dtype)
        train = loader(likelihood=likelihood, dtype=dtype)
        la = debiased(model, likelihood, subset, magnitudes=magnitudes)
        with mock.patch(
            "laplace_debiased.sampling.folds.counted", return_value=(train, 10**6)
        ):
            la.fit(train)
        assert max(values.max() for (values, *_) in la.H.eigenvalues) > 65504
        X = train.dataset.tensors[0][:5]
        prediction = la(X)
        if likelihood == "regression":
            _, prediction = prediction
        values.append((prediction.double(), la.log_marginal_likelihood().double()))
    for exact, half in zip(*values, strict=True):
        assert torch.allclose(half, exact, rtol=0.02, atol=1e-7)


def test_curvature_that_is_not_finite_is_refused():
    model = network("mlp", dtype=torch.float16)
    model[0].weight.data.zero_()
    model[2].weight.data.fill_(6e4)
    la = debiased(model, "regression", backend=AsdlGGN)
    train = loader(likelihood="regression", dtype=torch.float16)
    with pytest.raises(ValueError, match=r"layer '0' .torch.float16. is not finite"):
        la.fit(train)


def test_a_body_in_half_precision_may_have_a_head_in_single():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            parts = network("mlp", dtype=torch.float32)
            self.body, self.head = parts[0].bfloat16(), parts[2]

        def forward(self, x):
            return self.head(self.body(x.bfloat16()).tanh().float())

    train = loader(dtype=torch.float32)
    X = train.dataset.tensors[0][:5]
    exact, la = debiased(network("mlp", dtype=torch.float32)), debiased(Mixed())
    exact.fit(train)
    la.fit(train)
    assert torch.allclose(la(X), exact(X), atol=0.01)
    options = {"pred_type": "nn", "link_approx": "mc", "n_samples": 3}
    assert la(X, **options).dtype == torch.float32


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_the_first_parameter_may_be_complex(magnitudes, subset):
    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.Parameter(torch.eye(3, dtype=torch.complex64))
            self.net = network("mlp", dtype=torch.float32)

        def forward(self, x):
            return self.net(torch.fft.irfft(torch.fft.rfft(x) @ self.weights, 4))

    options = {"subset": subset, "magnitudes": magnitudes, "prior_precision": 2.0}
    plain, la, loaded = (
        debiased(model, **options)
        for model in (network("mlp", dtype=torch.float32), Spectral(), Spectral())
    )
    train = loader(dtype=torch.float32)
    plain.fit(train)
    warned = pytest.warns(UserWarning, match=r"Spectral: weights\) is complex")
    with warned if subset == "all" else nullcontext():
        la.fit(train)
    loaded.load_state_dict(la.state_dict())
    X = train.dataset.tensors[0][:5]
    assert torch.allclose(la(X), plain(X), atol=1e-5)
    assert torch.equal(loaded(X), la(X))
    tensors = [la(X), la.sample(1), la.mean, la.loss, la.log_marginal_likelihood()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


def test_parameters_may_have_any_memory_layout():
    name, train = "cnn-stride-padding", loader("cnn-stride-padding")
    X, predictions = train.dataset.tensors[0][:5], []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        la = debiased(network(name).to(memory_format=memory_format))
        la.fit(train)
        options = {"pred_type": "nn", "link_approx": "mc", "n_samples": 3}
        torch.manual_seed(0)
        predictions.append([la(X), la(X, **options)])
    for prediction, expected in zip(*predictions, strict=True):
        assert torch.allclose(prediction, expected)


def test_a_posterior_of_other_dtypes_than_the_first_parameters_loads():
    """Adapters in single precision of a network in half precision, as peft's."""
    first, last = nn.Linear(4, 8, dtype=torch.bfloat16), nn.Linear(8, 3)

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = first.requires_grad_(False), last

        def forward(self, x):
            return self.last(self.first(x.bfloat16()).float())

    model, (X, _) = Adapted(), batch("mlp", 5, dtype=torch.float32)
    la, restored = debiased(model), debiased(model)
    la.fit(loader(dtype=torch.float32))
    restored.load_state_dict(la.state_dict())
    assert torch.equal(restored(X), la(X))


@pytest.mark.parametrize("dtypes", [("float32", "float64"), ("float64", "float32")])
@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_layers_may_be_in_single_and_double_precision(magnitudes, dtypes):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.dtypes = [getattr(torch, name) for name in dtypes]
            parts, (one, other) = network("mlp"), self.dtypes
            self.body, self.head = parts[0].to(one), parts[2].to(other)

        def forward(self, x):
            one, other = self.dtypes
            return self.head(self.body(x.to(one)).tanh().to(other)).double()

    (X, _), train = batch("mlp", 5), loader()
    exact, la = (
        debiased(model, magnitudes=magnitudes, budget=20)
        for model in (network("mlp"), Mixed())
    )
    exact.fit(train)
    la.fit(train)
    assert torch.allclose(la(X).double(), exact(X), atol=1e-4)
    actual, expected = la.sampling_error.covariance, exact.sampling_error.covariance
    assert torch.allclose(actual.double(), expected, rtol=1e-3)


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_model_may_be_moved_to_another_dtype_before_a_fit(dtype, subset, tmp_path):
    other = {torch.float64: torch.float32, torch.float32: torch.float64}[dtype]
    la, restored = (
        debiased(network("mlp", dtype=own), "regression", subset, **options)
        for own, options in (
            (other, {"sigma_noise": 0.5, "prior_precision": 2.0}),
            (dtype, {}),
        )
    )
    la.model.to(dtype)
    train = loader(likelihood="regression", dtype=dtype)
    la.fit(train)
    la.save(tmp_path / "la.pt")
    restored.load(tmp_path / "la.pt")
    X = train.dataset.tensors[0]
    for actual, expected in zip(restored(X), la(X), strict=True):
        assert torch.equal(actual, expected)
    numbers = restored.sigma_noise, restored.prior_precision, restored.prior_mean
    assert {number.dtype for number in numbers} == {dtype}
