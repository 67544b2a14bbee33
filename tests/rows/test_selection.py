import pytest
import torch
from torch import nn

from laplace_debiased.rows.selection import find_layers, select, unrecorded
from tests.cases import network


def test_unsupported_layers_are_named_with_a_remedy():
    model = nn.Sequential(nn.Linear(2, 2), nn.Bilinear(2, 2, 2), nn.Embedding(3, 2))
    with pytest.raises(ValueError) as error:
        find_layers(model, model.parameters())
    for part in (
        "1 (Bilinear: weight, bias)",
        "2 (Embedding: weight)",
        "Linear",
        "requires_grad_(False)",
    ):
        assert part in str(error.value)
    assert len(find_layers(model, model[0].parameters())) == 1


def test_own_parameters_of_a_container_are_unsupported():
    class WithScale(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.scale = nn.Parameter(torch.ones(2))

    model = WithScale()
    with pytest.raises(
        ValueError, match=r"\(model\) \(WithScale: weight, bias, scale\)"
    ):
        find_layers(model, model.parameters())


def test_layers_with_a_forward_pass_of_their_own_are_unsupported():
    class Standardized(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight / self.weight.std(), self.bias)

    model = nn.Sequential(Standardized(1, 2, 2))
    with pytest.raises(ValueError, match=r"0 \(Standardized: weight, bias\)"):
        find_layers(model, model.parameters())


def test_parametrized_weights_are_left_out_and_their_biases_are_not():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)))
    layers, left_out = select(model, model.parameters())
    assert [layer.positions for layer in layers] == [{"bias": 0}]
    assert sum(p.numel() for entry in left_out for p in entry.params) == 9


def test_shared_parameters_are_left_out_by_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    layers, left_out = select(model, model.parameters())
    assert [str(entry) for entry in left_out] == [
        f"{name} (Linear: weight) shared with other modules" for name in "01"
    ]
    assert [layer.positions for layer in layers] == [{"bias": 1}, {"bias": 2}]
    with pytest.raises(ValueError, match="shared with other modules"):
        find_layers(model, model.parameters())


def test_foreign_and_repeated_parameters_are_refused():
    model = network("mlp")
    with pytest.raises(ValueError, match="1 of `params` are in no module"):
        find_layers(model, [model[0].weight, nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="given twice"):
        find_layers(model, [model[0].weight, model[0].weight])


def test_modules_that_never_run_are_found():
    class Partial(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.norm, self.spare = nn.LayerNorm(4), nn.LayerNorm(4)

        def forward(self, x):
            return self.norm(self.attention(x, x, x)[0]).mean(1)

    model = Partial().eval()
    layers, _ = select(model, model.parameters())
    idle = unrecorded(model, layers, torch.randn(1, 3, 4))
    assert {str(entry) for entry in idle} == {
        "attention.out_proj (NonDynamicallyQuantizableLinear: weight, bias) "
        "never runs as a module",
        "spare (LayerNorm: weight, bias) never runs as a module",
    }
    assert not any(module._forward_hooks for module in model.modules())


def test_fused_encoder_layers_run_as_modules():
    # in eval mode torch may bypass the modules of an encoder layer
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2)).eval()
    layers, _ = select(model, model.parameters())
    idle = unrecorded(model, layers, torch.randn(1, 3, 4))
    assert [entry.name.rsplit(".", 1)[-1] for entry in idle] == ["out_proj"] * 2


class TiedAutoencoder(nn.Module):
    """Uses the encoder's weight functionally in the decoder."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x):
        code = self.encoder(x).tanh()
        return self.head(nn.functional.linear(code, self.encoder.weight.T).tanh())


def test_weights_that_are_also_used_outside_of_their_module_are_found():
    model = TiedAutoencoder()
    layers, _ = select(model, model.parameters())
    (entry,) = unrecorded(model, layers, torch.randn(1, 4))
    assert str(entry) == "encoder (Linear: weight) is also used outside of the module"


@pytest.mark.parametrize("cut", ["detach", "no_grad"])
def test_layers_that_are_cut_off_from_the_output_are_found(cut):
    class CutOff(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.dead = nn.Linear(4, 3), nn.Linear(3, 3)
            self.head = nn.Linear(3, 2)
            nn.init.constant_(self.dead.bias, -100)

        def forward(self, x):
            with torch.set_grad_enabled(cut == "detach"):
                x = self.body(x)
            x = x.detach() if cut == "detach" else x
            return self.head(self.dead(x).relu())  # zero gradients do influence

    model = CutOff()
    layers, _ = select(model, model.parameters())
    (entry,) = unrecorded(model, layers, torch.randn(1, 4))
    assert str(entry) == "body (Linear: weight, bias) does not influence the output"


def test_a_network_without_gradients_influences_nothing():
    model = nn.Sequential(nn.Linear(4, 2))
    model.register_forward_hook(lambda module, args, output: output.detach())
    layers, _ = select(model, model.parameters())
    (entry,) = unrecorded(model, layers, torch.randn(1, 4))
    assert entry.reason == "does not influence the output"
