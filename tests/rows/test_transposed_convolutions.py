"""Rows of transposed convolutions, whatever their options."""

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.rows.recording import assert_rows_are_exact, found, record

KINDS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@st.composite
def networks(draw):
    """A transposed convolution of any options, and the shape of its inputs."""
    dims = draw(st.integers(1, 3))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    stride, dilation, kernel = each(1, 3), each(1, 2), each(1, 3)
    # torch's own condition
    ends = tuple(
        draw(st.integers(0, max(pair) - 1))
        for pair in zip(stride, dilation, strict=True)
    )
    groups = draw(st.integers(1, 2))
    channels = draw(st.integers(1, 2)) * groups, draw(st.integers(1, 2)) * groups
    padding, pixels = each(0, 1), each(2, 3)
    layer = KINDS[dims](
        *channels,
        kernel,
        stride,
        padding,
        ends,
        groups,
        bias=draw(st.booleans()),
        dilation=dilation,
    )
    return layer, (channels[0], *pixels)


@given(networks(), st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
def test_rows_contract_to_per_example_gradients(drawn, seed):
    torch.manual_seed(seed)
    layer, shape = drawn
    assume(_has_output(layer, shape))
    size = layer(torch.zeros(1, *shape)).numel()
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(size, 2)).double()
    nn.init.normal_(layer.weight)
    X = torch.randn(3, *shape, dtype=torch.float64)
    layers, params = found(model, X)
    assert_rows_are_exact(model, X, params, layers)


def _has_output(layer, shape):
    options = zip(
        shape[1:],
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.kernel_size,
        layer.output_padding,
        strict=True,
    )
    return all(
        (count - 1) * stride - 2 * before + distance * (size - 1) + after + 1 > 0
        for count, stride, before, distance, size, after in options
    )


def test_pixels_of_groups_are_positions():
    """The other groups' channels are zero there, so that groups do not mix."""
    model = nn.Sequential(
        nn.ConvTranspose1d(4, 6, 2, groups=2), nn.Flatten(), nn.Linear(24, 2)
    )
    X = torch.randn(3, 4, 3)
    layers, params = found(model, X)
    weight, bias, _ = layers
    assert (weight.d_out, weight.d_in, weight.num_positions) == (6, 4, 6)
    assert weight.is_transposed and not bias.is_normalization
    inputs, gradients = record(model, X, params, layers)
    rows = inputs["0.weight"].squeeze(2)
    assert torch.equal(rows[:, ::2, :2], X[:, :2].mT)
    assert torch.equal(rows[:, 1::2, 2:], X[:, 2:].mT)
    assert not rows[:, ::2, 2:].any() and not rows[:, 1::2, :2].any()
    assert gradients["0.bias"].shape == (3, 1, 1, 6)
