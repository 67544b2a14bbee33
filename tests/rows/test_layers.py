import pytest
import torch
from torch import nn

from laplace_debiased.rows.capture import capture_rows
from laplace_debiased.rows.layers import curvature_blocks
from laplace_debiased.rows.selection import find_layers
from tests.cases import NETWORKS, batch, network

SIZE = 3


@pytest.mark.parametrize("name", NETWORKS)
def test_rows_contract_to_per_example_gradients(name):
    model = network(name)
    params = list(model.parameters())
    X, _ = batch(name, SIZE)
    layers = find_layers(model, params)
    calls = {layer.name: [] for layer in layers}
    with capture_rows(
        layers, SIZE, lambda layer, rows: calls[layer.name].append(rows)
    ) as tape:
        output = model(X)
    rows = tape.gradient_rows(output, torch.ones_like(output), retain_graph=True)
    gradients = {layer.name: g for layer, g in rows}
    for layer in layers:
        g = gradients[layer.name]
        for key, position in layer.positions.items():
            actual = g.flatten(2).sum(1)
            if layer.has_inputs and key == "weight":
                x = torch.cat(calls[layer.name], 1)
                actual = torch.einsum("nsgo,nsgi->ngoi", g, x).flatten(1)
            for n in range(SIZE):
                (expected,) = torch.autograd.grad(
                    output[n].sum(), params[position], retain_graph=True
                )
                assert torch.allclose(actual[n], expected.flatten())


def test_layers_are_ordered_by_their_first_parameter():
    model = network("mlp")
    _, bias, *others = model.parameters()
    layers = find_layers(model, [*others, bias])
    assert [layer.name for layer in layers] == ["2", "0"]
    assert layers[1].positions == {"bias": 2}


def test_blocks_are_parameters_or_layers():
    model = network("mlp")
    layers = find_layers(model, model.parameters())
    separate = curvature_blocks(layers, separate_weight_and_bias=True)
    joint = curvature_blocks(layers, separate_weight_and_bias=False)
    assert [block.shape for block in separate] == [(5, 4), (5,), (3, 5), (3,)]
    assert [block.shape for block in joint] == [(5, 5), (3, 6)]
    assert [block.positions for block in joint] == [(0, 1), (2, 3)]


def test_vectors_are_blocks_of_their_own():
    model = nn.Sequential(nn.LayerNorm([2, 3]), nn.Flatten(), nn.Linear(6, 2))
    layers = find_layers(model, model.parameters())
    assert [layer.name for layer in layers] == ["0.weight", "0.bias", "2"]
    joint = curvature_blocks(layers, separate_weight_and_bias=False)
    assert [block.shape for block in joint] == [(6,), (6,), (2, 7)]


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False).eval()]
)
def test_batch_statistics_are_refused_by_name(norm):
    model = nn.Sequential(norm, nn.Linear(3, 2))
    layers = find_layers(model, norm.parameters())
    X = torch.randn(4, 3)
    with (
        pytest.raises(ValueError, match=r"'0\.weight' \(BatchNorm1d\) uses batch"),
        capture_rows(layers, len(X), lambda *_: None),
    ):
        model(X)


def test_norms_with_another_parametrization_are_refused_by_name():
    class OnePlus(nn.RMSNorm):
        def forward(self, x):
            return nn.functional.rms_norm(x, self.normalized_shape, 1 + self.weight)

    model = nn.Sequential(OnePlus(3), nn.Linear(3, 2))
    layers = find_layers(model, model[0].parameters())
    with (
        pytest.raises(ValueError, match=r"'0\.weight' \(OnePlus\) is not linear"),
        capture_rows(layers, 4, lambda *_: None),
    ):
        model(torch.randn(4, 3))


def test_norms_of_another_layout_are_supported():
    class ChannelsFirst(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.movedim(1, -1)).movedim(-1, 1)

    model = nn.Sequential(ChannelsFirst(3), nn.Flatten(), nn.Linear(6, 2)).double()
    X = torch.randn(4, 3, 2, dtype=torch.float64)
    layers = find_layers(model, model[0].parameters())
    with capture_rows(layers, len(X), lambda *_: None) as tape:
        output = model(X)
    rows = tape.gradient_rows(output, torch.ones_like(output), True)
    for (_, g), param in zip(rows, model[0].parameters(), strict=True):
        (expected,) = torch.autograd.grad(output.sum(), param, retain_graph=True)
        assert torch.allclose(g.sum(0).flatten(), expected)
