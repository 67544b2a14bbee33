import pytest
import torch
from torch import nn

from laplace_debiased.rows.layers import Layer
from laplace_debiased.rows.linearization import linearize, rows_per_example
from tests.cases import NETWORKS, batch, network
from tests.rows.recording import assert_rows_are_exact, found, supported

SIZE = 3


@pytest.mark.parametrize("name", NETWORKS)
def test_rows_contract_to_per_example_gradients(name):
    model = network(name)
    X, _ = batch(name, SIZE)
    layers, params = found(model, X)
    assert_rows_are_exact(model, X, params, layers)


def test_layers_are_ordered_by_their_first_parameter():
    model = network("mlp")
    X, _ = batch("mlp", SIZE)
    _, bias, *others = model.parameters()
    layers, _ = found(model, X, [*others, bias])
    assert [layer.name for layer in layers] == ["2", "0"]
    assert (layers[1].matrix, layers[1].vector) == (None, 2)


def test_layers_know_their_shapes():
    model = network("mlp")
    X, _ = batch("mlp", SIZE)
    layers, _ = found(model, X)
    assert [(layer.d_out, layer.d_in) for layer in layers] == [(5, 4), (3, 5)]
    assert [layer.parameters for layer in layers] == [(0, 1), (2, 3)]


def test_vectors_of_normalizations_are_layers_of_their_own():
    model = nn.Sequential(nn.LayerNorm([2, 3]), nn.Flatten(), nn.Linear(6, 2))
    layers, _ = found(model, torch.randn(SIZE, 2, 3))
    assert [layer.name for layer in layers] == ["0.weight", "0.bias", "2"]
    assert [(layer.d_out, layer.d_in) for layer in layers] == [(6, 0), (6, 0), (2, 6)]


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False).eval()]
)
def test_batch_statistics_are_refused_by_name(norm):
    model = nn.Sequential(norm, nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"'0\.weight' uses batch statistics"):
        supported(model, torch.randn(4, 3))


def test_norms_with_another_parametrization_are_left_out_by_name():
    class OnePlus(nn.RMSNorm):
        def forward(self, x):
            return nn.functional.rms_norm(x, self.normalized_shape, 1 + self.weight)

    model = nn.Sequential(OnePlus(3), nn.Linear(3, 2))
    _, layers, (entry,) = supported(model, torch.randn(4, 3), dense=True)
    assert (entry.name, entry.kind, entry.reason) == (
        "0.weight",
        "OnePlus",
        "is used by `add`",
    )
    assert [layer.name for layer in layers] == ["1"]


def test_norms_of_another_layout_are_supported():
    class ChannelsFirst(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.movedim(1, -1)).movedim(-1, 1)

    model = nn.Sequential(ChannelsFirst(3), nn.Flatten(), nn.Linear(6, 2)).double()
    X = torch.randn(4, 3, 2, dtype=torch.float64)
    layers, params = found(model, X)
    assert_rows_are_exact(model, X, params, layers)


@pytest.mark.parametrize("name", ["mlp", "cnn-groups", "resnet", "recurrent"])
def test_layers_tell_what_a_linearization_takes(name):
    model = network(name)
    X, _ = batch(name, 1)
    layers, params = found(model, X)
    linear = linearize(model, params, layers, X, 1)
    count = linear.output.shape[1]
    expected = sum(rows.numel() for rows in linear.inputs.values())
    expected += 2 * sum(rows.numel() for rows in linear.gradients.values())
    assert rows_per_example(layers, count) == expected
    for layer in layers:
        if layer.has_inputs:
            _, positions, groups, d_in = linear.inputs[layer.name].shape
            assert (layer.num_positions, layer.groups) == (positions, groups)
            assert layer.d_in == d_in


@pytest.mark.parametrize("name", ["mlp", "recurrent", "transformer"])
def test_layers_are_saved_as_plain_values(name, tmp_path):
    model = network(name)
    layers, _ = found(model, batch(name, SIZE)[0])
    torch.save([layer.state_dict() for layer in layers], tmp_path / "layers.pt")
    saved = torch.load(tmp_path / "layers.pt", weights_only=True)
    assert [Layer.from_state_dict(own) for own in saved] == layers


def test_calls_beyond_those_that_were_found_are_refused():
    class Deep(nn.Module):
        """Runs a layer on examples and on tokens first."""

        def __init__(self):
            super().__init__()
            self.shared, self.depth = nn.Linear(3, 3), 1

        def forward(self, x):
            x = self.shared(x)
            x = self.shared(x.transpose(0, 1)).transpose(0, 1)
            for _ in range(1, self.depth):
                x = self.shared(x)
            return x.mean(1)

    model, X = Deep(), torch.randn(4, 5, 3)
    layers, params = found(model, X)
    assert len(layers[0].layouts) == 2
    assert_rows_are_exact(model.double(), X.double(), params, layers)
    model.depth = 2
    with pytest.raises(ValueError, match="'shared' runs more than 2 times"):
        assert_rows_are_exact(model, X.double(), params, layers)
