import pytest
import torch
from laplace.curvature import CurvatureInterface
from torch import nn

from laplace_debiased import EigenbasisMatrix
from laplace_debiased.predictive.moments import (
    KINDS,
    LinearizedPredictive,
    last_layer_covariance,
)
from laplace_debiased.rows.layers import curvature_blocks
from laplace_debiased.rows.linearization import example_entries, linearize
from laplace_debiased.rows.selection import find_layers
from tests.cases import NETWORKS, NUM_OUTPUTS, MeanOverSequence, batch, network
from tests.curvature.test_eigenbasis import random_matrix
from tests.dense import relative_error

SIZE = 7


def posterior_of(model, params=None, dtype=torch.float64, kind="matrix"):
    """A random posterior precision for some of a model's parameters."""
    params = list(model.parameters()) if params is None else params
    blocks = curvature_blocks(find_layers(model, params), True)
    matrix = random_matrix([block.shape for block in blocks], kind)

    def cast(tensors):
        return [[tensor.to(dtype) for tensor in block] for block in tensors]

    eigenvectors, eigenvalues = cast(matrix.eigenvectors), cast(matrix.eigenvalues)
    return EigenbasisMatrix(eigenvectors, eigenvalues) + torch.tensor(0.3, dtype=dtype)


def by_jacobians(model, posterior, X, kind):
    """laplace-torch's way: full Jacobians."""
    J, f = CurvatureInterface(model, "classification").jacobians(X)
    if kind == "joint":
        J = J.flatten(0, 1)[None]
        return f, posterior.inv_square_form(J)[0]
    covariance = posterior.inv_square_form(J)
    return f, covariance.diagonal(dim1=1, dim2=2) if kind == "diagonal" else covariance


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)]
)
@pytest.mark.parametrize("name", NETWORKS)
def test_moments_equal_those_by_jacobians(name, dtype, tolerance, kind):
    model = network(name, dtype=dtype)
    posterior = posterior_of(model, dtype=dtype)
    X, _ = batch(name, SIZE, dtype=dtype)
    predictive = LinearizedPredictive(model, list(model.parameters()), posterior)
    mean, covariance = predictive.moments(X, SIZE, kind)
    expected_mean, expected = by_jacobians(model, posterior, X, kind)
    assert torch.allclose(mean, expected_mean)
    assert covariance.shape == expected.shape
    assert relative_error(covariance, expected) < tolerance
    assert not covariance.requires_grad


@pytest.mark.parametrize("kind", ["full", "diagonal"])
@pytest.mark.parametrize("limit", [1, 3000, 20_000])
@pytest.mark.parametrize("name", ["mlp", "cnn-stride-padding"])
def test_chunks_do_not_matter(name, limit, kind):
    model = network(name)
    X, _ = batch(name, SIZE)
    params, posterior = list(model.parameters()), posterior_of(model)
    at_once = LinearizedPredictive(model, params, posterior)
    chunked = LinearizedPredictive(model, params, posterior, memory_limit=limit)
    sizes = []
    chunked._chunk, chunk = (
        lambda X, size, kind: (sizes.append(size), chunk(X, size, kind))[1],
        chunked._chunk,
    )
    for a, b in zip(
        chunked.moments(X, SIZE, kind), at_once.moments(X, SIZE, kind), strict=True
    ):
        assert torch.allclose(a, b)
    assert sum(sizes) == SIZE
    if limit == 1:
        assert sizes == [1] * SIZE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp", "cnn-stride-padding", "cnn-groups"])
def test_jacobians_of_few_examples_at_a_time_do_not_matter(monkeypatch, name, kind):
    model = network(name)
    X, _ = batch(name, SIZE)
    args = model, list(model.parameters()), posterior_of(model)
    expected = LinearizedPredictive(*args).moments(X, SIZE, kind)
    monkeypatch.setattr("laplace_debiased.predictive.moments.JACOBIAN_BYTES", 1)
    predictive = LinearizedPredictive(*args)
    for a, b in zip(predictive.moments(X, SIZE, kind), expected, strict=True):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("name", ["mlp", "cnn-groups", "resnet", "recurrent"])
def test_a_forward_pass_tells_what_a_linearization_takes(name):
    model = network(name)
    X, _ = batch(name, 1)
    layers = find_layers(model, list(model.parameters()))
    linear = linearize(model, layers, X, 1)
    entries = example_entries(model, layers, X)
    assert entries.inputs == sum(rows.numel() for rows in linear.inputs.values())
    rows = sum(rows.numel() for rows in linear.gradients.values())
    assert entries.gradients * linear.output.shape[1] == rows
    assert entries.positions == {
        name: rows.shape[1] * rows.shape[2] for name, rows in linear.inputs.items()
    }
    assert torch.equal(entries.output, linear.output)


def test_wide_layers_without_weight_sharing_take_no_jacobians():
    model = nn.Sequential(nn.Linear(4, 500), nn.ReLU(), nn.Linear(500, 3)).double()
    posterior = posterior_of(model)
    X = torch.randn(SIZE, 4, dtype=torch.float64)
    limit = 500 * 4 * 8  # less than one Jacobian of an output
    predictive = LinearizedPredictive(
        model, list(model.parameters()), posterior, memory_limit=SIZE * 12 * limit
    )
    assert predictive._chunk_size(X, SIZE) >= SIZE


def test_mappings_are_chunked_like_tensors():
    class OnDict(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network("mlp")

        def forward(self, data):
            return self.net(data["x"])

    model = OnDict()
    X, _ = batch("mlp", SIZE)
    posterior = posterior_of(model)
    args = (model, list(model.parameters()), posterior)
    expected = LinearizedPredictive(*args).moments({"x": X}, SIZE)
    actual = LinearizedPredictive(*args, memory_limit=1).moments({"x": X}, SIZE)
    for a, b in zip(actual, expected, strict=True):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp", "cnn-stride-padding", "sequence"])
def test_gradients_in_the_input_equal_those_by_jacobians(name, kind):
    model = network(name)
    posterior = posterior_of(model)
    X = batch(name, SIZE)[0].requires_grad_()
    predictive = LinearizedPredictive(
        model, list(model.parameters()), posterior, differentiable=True
    )
    _, covariance = predictive.moments(X, SIZE, kind)
    weights = torch.randn(covariance.shape, dtype=covariance.dtype)
    (actual,) = torch.autograd.grad((weights * covariance).sum(), X)

    interface = CurvatureInterface(model, "classification")
    J, _ = interface.jacobians(X, enable_backprop=True)
    J = J.flatten(0, 1)[None] if kind == "joint" else J
    expected = posterior.inv_square_form(J)
    expected = expected[0] if kind == "joint" else expected
    if kind == "diagonal":
        expected = expected.diagonal(dim1=1, dim2=2)
    (expected,) = torch.autograd.grad((weights * expected).sum(), X)
    assert relative_error(actual, expected) < 1e-10


@pytest.mark.parametrize("names", [["0.bias"], ["2.weight"], ["0.weight", "2.bias"]])
def test_some_of_the_parameters(names):
    model = network("mlp")
    named = dict(model.named_parameters())
    params = [named[name] for name in names]
    posterior = posterior_of(model, params)
    X, _ = batch("mlp", SIZE)
    for name, param in named.items():
        param.requires_grad_(name in names)
    _, expected = by_jacobians(model, posterior, X, "full")
    _, actual = LinearizedPredictive(model, params, posterior).moments(X, SIZE)
    assert relative_error(actual, expected) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_last_layer_in_closed_form_equals_dense_algebra(bias, kind):
    layer = nn.Linear(4, NUM_OUTPUTS, bias=bias).double()
    posterior = posterior_of(layer)
    features = torch.randn(SIZE, 4, dtype=torch.float64)
    _, expected = by_jacobians(layer, posterior, features, kind)
    actual = last_layer_covariance(features, posterior, kind)
    assert relative_error(actual, expected) < 1e-10


def test_outputs_without_influence_of_a_layer_have_no_variance_from_it():
    class OneOutputEach(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 1), nn.Linear(2, 1)

        def forward(self, x):
            return torch.cat([self.a(x), self.b(x)], 1)

    model = OneOutputEach().double()
    posterior = posterior_of(model)
    X = torch.randn(SIZE, 2, dtype=torch.float64)
    _, expected = by_jacobians(model, posterior, X, "full")
    args = (model, list(model.parameters()), posterior)
    _, actual = LinearizedPredictive(*args).moments(X, SIZE)
    assert relative_error(actual, expected) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_no_examples_have_empty_moments(name, kind):
    model = network(name)
    X, _ = batch(name, SIZE)
    args = (model, list(model.parameters()), posterior_of(model))
    mean, covariance = LinearizedPredictive(*args).moments(X[:0], 0, kind)
    _, other = LinearizedPredictive(*args).moments(X[:1], 1, kind)
    assert mean.shape == (0, NUM_OUTPUTS) and covariance.numel() == 0
    assert (covariance.ndim, covariance.dtype) == (other.ndim, other.dtype)


def test_outputs_must_be_a_matrix():
    model = nn.Sequential(nn.Linear(3, 2)).double()
    args = (model, list(model.parameters()), posterior_of(model))
    with pytest.raises(ValueError, match=r"must have shape \[batch, outputs\]"):
        LinearizedPredictive(*args).moments(torch.randn(2, 5, 3).double(), 2)


def test_networks_on_sequences_share_weights_over_positions():
    model = nn.Sequential(nn.Linear(3, 2), MeanOverSequence()).double()
    posterior = posterior_of(model)
    X = torch.randn(SIZE, 5, 3, dtype=torch.float64)
    _, expected = by_jacobians(model, posterior, X, "full")
    args = (model, list(model.parameters()), posterior)
    _, actual = LinearizedPredictive(*args).moments(X, SIZE)
    assert relative_error(actual, expected) < 1e-10
