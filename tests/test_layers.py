import pytest
import torch
from torch import nn

from laplace_debiased.layers import curvature_blocks, find_layers
from tests.cases import NETWORKS, batch, network

SIZE = 3


@pytest.mark.parametrize("name", NETWORKS)
def test_rows_contract_to_per_example_gradients(name):
    model = network(name)
    X, _ = batch(name, SIZE)
    inputs, outputs = {}, {}

    def record(module, args, output):
        inputs[module], outputs[module] = args[0], output

    layers = find_layers(model, model.parameters())
    for layer in layers:
        layer.module.register_forward_hook(record)
    f = model(X)
    for layer in layers:
        module = layer.module
        (g,) = torch.autograd.grad(f.sum(), outputs[module], retain_graph=True)
        x = layer.input_rows(inputs[module].detach(), SIZE)
        g = layer.gradient_rows(g, SIZE)
        actual = torch.einsum("nsgo,nsgi->ngoi", g, x).flatten(1, 2)
        for n in range(SIZE):
            (expected,) = torch.autograd.grad(
                f[n].sum(), module.weight, retain_graph=True
            )
            assert torch.allclose(actual[n], expected.flatten(1))


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


def test_unsupported_layers_are_named_with_a_remedy():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Embedding(3, 2))
    with pytest.raises(ValueError) as error:
        find_layers(model, model.parameters())
    for part in ("1 (BatchNorm1d)", "2 (Embedding)", "Linear", "requires_grad_(False)"):
        assert part in str(error.value)
    assert len(find_layers(model, model[0].parameters())) == 1


def test_own_parameters_of_a_container_are_unsupported():
    class WithScale(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.scale = nn.Parameter(torch.ones(2))

    model = WithScale()
    with pytest.raises(ValueError, match=r"\(model\) \(WithScale\)"):
        find_layers(model, model.parameters())


def test_shared_parameters_are_refused_by_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="'0' and '1' share a parameter"):
        find_layers(model, model.parameters())


def test_foreign_and_repeated_parameters_are_refused():
    model = network("mlp")
    with pytest.raises(ValueError, match="1 of `params` are in no module"):
        find_layers(model, [model[0].weight, nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="given twice"):
        find_layers(model, [model[0].weight, model[0].weight])
