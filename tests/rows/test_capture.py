import pytest
import torch
from torch import nn

from laplace_debiased.rows.capture import capture_rows
from laplace_debiased.rows.selection import find_layers

SIZE = 4


def capture(model, X, params=None, batch_size=None):
    """Input rows and gradient rows of each layer, by name."""
    layers = find_layers(model, model.parameters() if params is None else params)
    calls = {}
    batch_size = len(X) if batch_size is None else batch_size
    with capture_rows(
        layers,
        batch_size,
        lambda layer, rows: calls.setdefault(layer.name, []).append(rows),
    ) as tape:
        output = model(X)
    gradients = tape.gradient_rows(output, torch.ones_like(output), False)
    inputs = {name: torch.cat(rows, 1) for name, rows in calls.items()}
    return inputs, {layer.name: rows for layer, rows in gradients}


def test_inplace_activations_do_not_change_what_is_captured():
    safe = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    inplace = nn.Sequential(safe[0], nn.ReLU(inplace=True), safe[2])
    X = torch.randn(SIZE, 3)
    for expected, actual in zip(capture(safe, X), capture(inplace, X), strict=True):
        assert expected.keys() == actual.keys()
        for name in expected:
            assert torch.equal(expected[name], actual[name])


def test_inputs_are_taken_before_the_network_overwrites_them():
    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            x = x.clone()
            y = self.linear(x)
            x += 1
            return y + x

    X = torch.randn(SIZE, 3)
    kept = []
    model = Overwriting()
    layers = find_layers(model, model.parameters())
    with capture_rows(layers, SIZE, lambda _, rows: kept.append(rows.clone())):
        model(X)
    assert torch.equal(kept[0].flatten(1), X)


def test_frozen_parameters_are_captured_like_others():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    X = torch.randn(SIZE, 3)
    _, expected = capture(model, X)
    model.requires_grad_(False)
    _, actual = capture(model, X)
    for name in expected:
        assert torch.equal(expected[name], actual[name])


def test_layers_without_influence_have_no_gradient_rows():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.second(self.first(x).detach())

    inputs, gradients = capture(Detached(), torch.randn(SIZE, 3))
    assert inputs.keys() == {"first", "second"}
    assert gradients.keys() == {"second"}


def test_calls_of_a_layer_are_positions_also_without_influence():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = nn.Linear(3, 3)

        def forward(self, x):
            self.shared(x + 1)
            return self.shared(x)

    X = torch.randn(SIZE, 3)
    inputs, gradients = capture(Twice(), X)
    assert torch.equal(inputs["shared"], torch.stack([X + 1, X], 1).unsqueeze(2))
    expected = torch.stack([torch.zeros(SIZE, 3), torch.ones(SIZE, 3)], 1)
    assert torch.equal(gradients["shared"], expected.unsqueeze(2))


def test_a_layer_that_never_runs_is_refused_by_name():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(ValueError, match=r"never ran .*: idle"):
        capture(Unused(), torch.randn(SIZE, 3))


def test_functional_projections_of_attention_are_detected():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x)[0].mean(1)

    model = Attention()
    params = model.attention.out_proj.parameters()
    with pytest.raises(ValueError, match=r"attention\.out_proj"):
        capture(model, torch.randn(SIZE, 5, 4), params)


def test_inputs_that_are_not_batch_first_are_refused():
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="leading axis must be the batch"):
        capture(model, torch.randn(5, 3), batch_size=4)


def test_hooks_are_gone_after_an_error():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(2, 2))
    with pytest.raises(RuntimeError):
        capture(model, torch.randn(SIZE, 3))
    assert not any(module._forward_hooks for module in model.modules())
