"""Random small architectures: the posterior precision equals dense algebra."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import Laplace
from tests.cases import MeanOverSequence
from tests.dense import relative_error

NUM_OUTPUTS = 2
ACTIVATIONS = [nn.Tanh, nn.ReLU, nn.GELU]


@st.composite
def mlps(draw):
    """A perceptron, and the shape of its inputs."""
    widths = draw(st.lists(st.integers(1, 5), min_size=2, max_size=4))
    layers = []
    for d_in, d_out in zip(widths, [*widths[1:], NUM_OUTPUTS], strict=True):
        layers.append(nn.Linear(d_in, d_out, bias=draw(st.booleans())))
        layers.append(draw(st.sampled_from(ACTIVATIONS))())
    return nn.Sequential(*layers[:-1]), (widths[0],)


@st.composite
def convnets(draw):
    """A convolutional network, and the shape of its inputs."""
    groups = draw(st.integers(1, 2))
    channels, out_channels = groups * draw(st.integers(1, 2)), 2 * groups
    kind = draw(st.sampled_from([nn.Conv1d, nn.Conv2d]))
    convolution = kind(
        channels,
        out_channels,
        draw(st.integers(1, 3)),
        stride=draw(st.integers(1, 2)),
        padding=draw(st.integers(0, 2)),
        dilation=draw(st.integers(1, 2)),
        groups=groups,
        bias=draw(st.booleans()),
    )
    side = draw(st.integers(5, 6))
    shape = (channels, side) if kind is nn.Conv1d else (channels, side, side)
    head = [nn.Flatten(2), MeanOverPositions(), nn.Linear(out_channels, NUM_OUTPUTS)]
    activation = draw(st.sampled_from(ACTIVATIONS))()
    return nn.Sequential(convolution, activation, *head), shape


@st.composite
def sequence_networks(draw):
    """A network on sequences, and the shape of its inputs."""
    width, length = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return (
        nn.Sequential(
            nn.Linear(width, 3),
            nn.Tanh(),
            MeanOverSequence(),
            nn.Linear(3, NUM_OUTPUTS),
        ),
        (length, width),
    )


class MeanOverPositions(nn.Module):
    def forward(self, x):
        return x.mean(2)


@given(
    network=st.one_of(mlps(), convnets(), sequence_networks()),
    size=st.integers(2, 12),
    batch_size=st.integers(1, 12),
    magnitudes=st.sampled_from(["kfac", "ggn"]),
    likelihood=st.sampled_from(["classification", "regression"]),
    subset=st.sampled_from(["all", "last_layer"]),
    fraction=st.floats(0.05, 0.95),
    damping=st.booleans(),
    prior=st.floats(1e-4, 1e4),
    seed=st.integers(0, 10),
)
@settings(max_examples=120, deadline=None)
def test_posterior_precision_is_positive_definite_and_equals_dense_algebra(
    network,
    size,
    batch_size,
    magnitudes,
    likelihood,
    subset,
    fraction,
    damping,
    prior,
    seed,
):
    model, shape = network
    model = model.double()
    X = torch.randn(size, *shape, dtype=torch.float64)
    y = (
        torch.randint(NUM_OUTPUTS, (size,))
        if likelihood == "classification"
        else torch.randn(size, NUM_OUTPUTS, dtype=torch.float64)
    )
    la = Laplace(
        model,
        likelihood,
        subset,
        "kron_debiased",
        magnitudes=magnitudes,
        direction_fraction=fraction,
        damping=damping and magnitudes == "kfac",
        prior_precision=prior,
        seed=seed,
        **({"last_layer_name": _last(model)} if subset == "last_layer" else {}),
    )
    la.fit(DataLoader(TensorDataset(X, y), batch_size))

    P = la.posterior_precision
    dense = P.to_matrix()
    assert dense.isfinite().all()
    assert torch.allclose(dense, dense.T)
    assert torch.linalg.eigvalsh(dense).min() > 0
    assert torch.allclose(P.logdet(), dense.logdet(), rtol=1e-6)
    J = torch.randn(3, NUM_OUTPUTS, len(dense), dtype=torch.float64)
    expected = J @ torch.linalg.solve(dense, J.mT)
    assert relative_error(P.inv_square_form(J), expected) < 1e-6
    f_mu, f_var = la._glm_predictive_distribution(X[:1])
    assert f_mu.isfinite().all() and (f_var.diagonal(dim1=1, dim2=2) >= 0).all()


def _last(model):
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
