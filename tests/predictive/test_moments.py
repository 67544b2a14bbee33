import pytest
import torch
from laplace.curvature import CurvatureInterface
from torch import nn

from laplace_debiased import EigenbasisMatrix
from laplace_debiased.predictive.last_layer import last_layer_covariance
from laplace_debiased.predictive.moments import LinearizedPredictive
from laplace_debiased.rows.linearization import Linearization
from laplace_debiased.rows.selection import select
from tests.cases import NETWORKS, NUM_OUTPUTS, MeanOverSequence, batch, network
from tests.curvature.test_eigenbasis import random_matrix
from tests.dense import relative_error

KINDS = ("full", "diagonal", "joint")
SIZE = 7


def posterior_of(params, dtype=torch.float64, kind="matrix", vectors=()):
    """A random posterior precision for parameters, some of which are vectors."""
    shapes = [
        tuple(param.flatten(1).shape)
        if param.ndim > 1 and id(param) not in vectors
        else (param.numel(),)
        for param in params
    ]
    matrix = random_matrix(shapes, kind)

    def cast(tensors):
        return [[tensor.to(dtype) for tensor in block] for block in tensors]

    eigenvectors, eigenvalues = cast(matrix.eigenvectors), cast(matrix.eigenvalues)
    return EigenbasisMatrix(eigenvectors, eigenvalues) + torch.tensor(0.3, dtype=dtype)


def predictive_of(model, X, posterior=None, params=None, **options):
    """A predictive with a posterior, by default a random one."""
    params = list(model.parameters()) if params is None else params
    posterior = posterior_of(params) if posterior is None else posterior
    size = len(X["x"]) if isinstance(X, dict) else len(X)
    found = select(model, params, X, size)
    sizes = found.num_outputs, found.example_size
    return LinearizedPredictive(
        model, params, found.layers, posterior, *sizes, **options
    )


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
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    vectors = {id(param) for norm in norms for param in norm.parameters()}
    posterior = posterior_of(list(model.parameters()), dtype, vectors=vectors)
    X, _ = batch(name, SIZE, dtype=dtype)
    predictive = predictive_of(model, X, posterior)
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
    posterior = posterior_of(list(model.parameters()))
    at_once = predictive_of(model, X, posterior)
    chunked = predictive_of(model, X, posterior, memory_limit=limit)
    sizes = []
    chunked._chunk, chunk = (
        lambda X, size, *args: (sizes.append(size), chunk(X, size, *args))[1],
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
    args = model, X, posterior_of(list(model.parameters()))
    expected = predictive_of(*args).moments(X, SIZE, kind)
    monkeypatch.setattr("laplace_debiased.predictive.moments.JACOBIAN_BYTES", 1)
    predictive = predictive_of(*args)
    for a, b in zip(predictive.moments(X, SIZE, kind), expected, strict=True):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("name", ["mlp", "cnn-stride-padding", "cnn-groups"])
def test_outputs_one_after_the_other_do_not_matter(monkeypatch, name):
    model = network(name)
    X, _ = batch(name, SIZE)
    predictive = predictive_of(model, X)
    expected = predictive.moments(X, SIZE, "diagonal")[1]
    of_priors = predictive.variances(X, SIZE, [0.0, 1.0])[1]
    counts, backward = [], Linearization.backward

    def counting(linear, count):
        counts.append(count)
        return backward(linear, count)

    monkeypatch.setattr("laplace_debiased.predictive.moments.ROW_BYTES", 1)
    monkeypatch.setattr(Linearization, "backward", counting)
    assert torch.allclose(predictive.moments(X, SIZE, "diagonal")[1], expected)
    assert torch.allclose(predictive.variances(X, SIZE, [0.0, 1.0])[1], of_priors)
    assert counts == [1, 1]
    variances = predictive.moments(X, SIZE, "full")[1].diagonal(dim1=1, dim2=2)
    assert torch.allclose(variances, expected)
    assert counts[2:] == [expected.shape[1]]


def test_larger_examples_come_in_smaller_chunks():
    model = nn.Sequential(nn.Linear(3, 2), MeanOverSequence()).double()
    X = torch.randn(SIZE, 5, 3, dtype=torch.float64)
    predictive = predictive_of(model, X, memory_limit=2**26)
    size = predictive._chunk_size(X, SIZE)
    larger = torch.randn(SIZE, 50, 3, dtype=torch.float64)
    assert 0.09 < predictive._chunk_size(larger, SIZE) / size < 0.11


def test_wide_layers_without_weight_sharing_take_no_jacobians():
    model = nn.Sequential(nn.Linear(4, 500), nn.ReLU(), nn.Linear(500, 3)).double()
    X = torch.randn(SIZE, 4, dtype=torch.float64)
    limit = 500 * 4 * 8  # less than one Jacobian of an output
    predictive = predictive_of(model, X, memory_limit=SIZE * 12 * limit)
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
    args = model, {"x": X}, posterior_of(list(model.parameters()))
    expected = predictive_of(*args).moments({"x": X}, SIZE)
    actual = predictive_of(*args, memory_limit=1).moments({"x": X}, SIZE)
    for a, b in zip(actual, expected, strict=True):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp", "cnn-stride-padding", "sequence"])
def test_gradients_in_the_input_equal_those_by_jacobians(name, kind):
    model = network(name)
    posterior = posterior_of(list(model.parameters()))
    X = batch(name, SIZE)[0].requires_grad_()
    predictive = predictive_of(model, X.detach(), posterior, differentiable=True)
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
    posterior = posterior_of(params)
    X, _ = batch("mlp", SIZE)
    for name, param in named.items():
        param.requires_grad_(name in names)
    _, expected = by_jacobians(model, posterior, X, "full")
    _, actual = predictive_of(model, X, posterior, params).moments(X, SIZE)
    assert relative_error(actual, expected) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_last_layer_in_closed_form_equals_dense_algebra(bias, kind):
    layer = nn.Linear(4, NUM_OUTPUTS, bias=bias).double()
    posterior = posterior_of(list(layer.parameters()))
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
    posterior = posterior_of(list(model.parameters()))
    X = torch.randn(SIZE, 2, dtype=torch.float64)
    _, expected = by_jacobians(model, posterior, X, "full")
    _, actual = predictive_of(model, X, posterior).moments(X, SIZE)
    assert relative_error(actual, expected) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_no_examples_have_empty_moments(name, kind):
    model = network(name)
    X, _ = batch(name, SIZE)
    predictive = predictive_of(model, X)
    mean, covariance = predictive.moments(X[:0], 0, kind)
    _, other = predictive.moments(X[:1], 1, kind)
    assert mean.shape == (0, NUM_OUTPUTS) and covariance.numel() == 0
    assert (covariance.ndim, covariance.dtype) == (other.ndim, other.dtype)


def test_outputs_must_be_a_matrix():
    model = nn.Sequential(nn.Linear(3, 2)).double()
    predictive = predictive_of(model, torch.randn(2, 3).double())
    with pytest.raises(ValueError, match=r"must have shape \[batch, outputs\]"):
        predictive.moments(torch.randn(2, 5, 3).double(), 2)


def test_networks_on_sequences_share_weights_over_positions():
    model = nn.Sequential(nn.Linear(3, 2), MeanOverSequence()).double()
    posterior = posterior_of(list(model.parameters()))
    X = torch.randn(SIZE, 5, 3, dtype=torch.float64)
    _, expected = by_jacobians(model, posterior, X, "full")
    _, actual = predictive_of(model, X, posterior).moments(X, SIZE)
    assert relative_error(actual, expected) < 1e-10
