"""Rows belong to the examples that they are counted for, in each pass."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import DebiasedKFACLinearOperator
from laplace_debiased.curvature.directional import DirectionalCurvatures
from laplace_debiased.curvature.factors import KroneckerFactors
from laplace_debiased.rows.layers import Layer
from laplace_debiased.rows.linearization import linearize
from laplace_debiased.rows.output_curvature import OutputCurvature
from laplace_debiased.rows.separation import num_traced
from laplace_debiased.rows.sweep import sweep
from tests import dense, zoo
from tests.cases import NUM_OUTPUTS, split
from tests.fits import debiased
from tests.rows.recording import supported

LOSS = nn.CrossEntropyLoss(reduction="sum")
TOKENS, WIDTH = 3, 4


class Routed(nn.Module):
    """Sends each token through the expert of its sign."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, NUM_OUTPUTS)

    def forward(self, x):
        output, first = torch.zeros_like(x), x[..., 0] > 0
        for rows, expert in zip((first, ~first), self.experts, strict=True):
            if rows.any():
                output[rows] = expert(x[rows]).tanh()
        return self.head(output.mean(1))


def tokens(*signs):
    """Examples whose tokens have the given signs."""
    generator = torch.Generator().manual_seed(len(signs))
    x = torch.rand(len(signs), TOKENS, WIDTH, dtype=torch.float64, generator=generator)
    x[..., 0] *= torch.tensor(signs)
    return x


POSITIVE, NEGATIVE = (1, 1, 1), (-1, -1, -1)
ONE, OTHER, NONE = (1, -1, -1), (-1, 1, 1), (-1, -1, -1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Routed().double()


@pytest.fixture
def layers(model):
    """Those of all parameters that the first of the experts sees alone."""
    X = tokens(*[POSITIVE] * 4)
    params, layers, left_out = supported(model, X)
    assert {entry.name for entry in left_out} == {
        "experts.1.weight",
        "experts.1.bias",
    }
    return layers, params


def test_rows_that_depend_on_the_example_are_seen_in_all_of_the_examples(model):
    X = tokens(*[POSITIVE] * 15, NEGATIVE)
    _, _, left_out = supported(model, X)
    reasons = {entry.reason for entry in left_out}
    assert len(left_out) == 4
    assert reasons == {"is applied to rows whose number depends on the examples"}


def test_few_examples_are_repeated_and_many_are_not_all_used():
    assert [num_traced(size) for size in (1, 3, 5, 1000)] == [4, 4, 5, 16]


def swept(model, layers, params, X, accumulator):
    data = [(X, torch.zeros(len(X), dtype=torch.long))]
    sweep(model, params, layers, data, OutputCurvature(LOSS), accumulator)
    return accumulator


def test_rows_that_are_counted_for_others_are_refused_by_name(model, layers):
    layers, params = layers
    # as many rows as examples, but the first has two of them, and the last none
    X = tokens((1, 1, -1), NONE)
    factors = KroneckerFactors(layers, params)
    with pytest.raises(ValueError, match=r"layer 'experts\.0'.*requires_grad_"):
        swept(model, layers, params, X, factors)
    with pytest.raises(ValueError, match=r"layer 'experts\.0'.*requires_grad_"):
        linearize(model, params, layers, X, len(X))


def test_rows_of_another_number_that_are_each_examples_own_are_exact(model, layers):
    layers, params = layers
    X = tokens(ONE, ONE, ONE)
    linear = linearize(model, params, layers, X, len(X))
    J = dense.jacobians(model, X, len(X), params)
    x, g = linear.inputs["experts.0"], linear.gradients["experts.0"]
    actual = torch.einsum("ncsgo,nsgi->ncoi", g, x).flatten(2)
    assert torch.allclose(actual, J[..., : WIDTH**2])


def test_layers_that_a_pass_does_not_use_contribute_nothing(model, layers):
    layers, params = layers
    X = tokens(NEGATIVE, NEGATIVE)
    linear = linearize(model, params, layers, X, len(X))
    assert linear.gradients.keys() == {"head"}
    factors = swept(model, layers, params, X, KroneckerFactors(layers, params))
    own, head = factors.factors()
    assert not own.gradients.any() and not own.inputs.any() and head.inputs.any()
    along = DirectionalCurvatures(layers, factors.factors())
    own, _ = swept(model, layers, params, X, along).spectra()
    assert not own.matrix.any() and not own.vector.any()


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_predictions_without_a_layer_are_exact(model, magnitudes):
    X = tokens(*[POSITIVE] * 6)
    y = torch.arange(6) % NUM_OUTPUTS
    la = debiased(model, magnitudes=magnitudes)
    la.fit(DataLoader(TensorDataset(X, y), 3))
    for Z in (tokens(NEGATIVE, NEGATIVE), tokens(POSITIVE), tokens(ONE, ONE)):
        _, f_var = la._glm_predictive_distribution(Z)
        J = dense.jacobians(model, Z, len(Z), la.fitted_params)
        assert dense.relative_error(f_var, la.functional_variance(J)) < 1e-10
    model.head.requires_grad_(False)
    la = debiased(model, magnitudes=magnitudes)
    la.fit(DataLoader(TensorDataset(X, y), 3))
    for kind in ({}, {"diagonal_output": True}, {"joint": True}):
        _, f_var = la._glm_predictive_distribution(tokens(NEGATIVE, NEGATIVE), **kind)
        assert f_var.dtype == torch.float64 and not f_var.any()
        _, other = la._glm_predictive_distribution(tokens(POSITIVE, POSITIVE), **kind)
        assert other.shape == f_var.shape and other.any()


class MixesMany(nn.Module):
    """Mixes examples from the third on."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, NUM_OUTPUTS)

    def forward(self, x):
        x = self.linear(x)
        return x if len(x) < 3 else x - 0.1 * x.mean(0)


@pytest.mark.parametrize("first", [1, 2])
def test_mixing_is_found_whatever_the_size_of_the_first_batch(first):
    model, X = MixesMany().double(), torch.randn(5, WIDTH, dtype=torch.float64)
    y, sizes = torch.arange(5) % NUM_OUTPUTS, [first, 5 - first]
    params = list(model.parameters())
    layers = [Layer("linear", 0, 1, NUM_OUTPUTS, WIDTH, num_entries=1)]
    arguments = OutputCurvature(LOSS), KroneckerFactors(layers, params)
    with pytest.raises(ValueError, match="'linear', an example's output depends"):
        sweep(model, params, layers, split(X, y, *sizes), *arguments)


def test_the_operator_finds_it_when_its_first_batch_has_one_example():
    class Mixes(MixesMany):
        """Equal examples do not show it."""

        def forward(self, x):
            return self.linear(x) * (1 + (x - x.mean(0)).square().sum())

    model, X = Mixes().double(), torch.randn(5, WIDTH, dtype=torch.float64)
    data = split(X, torch.arange(5) % NUM_OUTPUTS, 1, 4)
    operator = DebiasedKFACLinearOperator(
        model, LOSS, list(model.parameters()), data, data
    )
    with pytest.raises(ValueError, match="depends on rows of others"):
        operator.compute()


@pytest.mark.parametrize("name", ["top-1 mixture", "top-1 mixture of tokens"])
def test_mixtures_fit_whatever_the_batch_size(name):
    """Experts are left out, and the other parameters' curvature does not depend."""
    model, (X, y) = zoo.build(name), zoo.data(name, 24)
    traces = []
    for size in (8, 12, 24):
        la = debiased(model, magnitudes="ggn", estimator="two_batch")
        la.fit(DataLoader(TensorDataset(X, y), size))
        traces.append(la.H.to_matrix().trace())
    assert torch.allclose(torch.stack(traces), traces[0])


def test_rounding_among_rows_that_cancel_leaves_nothing_out():
    """The bias of an attention's keys has no influence but by rounding."""
    for seed in range(20):
        torch.manual_seed(seed)
        model = zoo.ZOO["latent queries"].build()
        X = torch.randn(4, 3, zoo.WIDTH)
        _, _, left_out = supported(model, X, dense=True)
        names = {entry.name for entry in left_out}
        assert names == {"latents", "query.weight", "query.bias"}
