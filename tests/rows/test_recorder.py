import threading

import pytest
import torch
from torch import nn

from laplace_debiased.rows.substitution import Substitution, run
from tests.cases import network
from tests.rows.recording import (
    assert_rows_are_exact,
    found,
    record,
    supported,
)

SIZE = 4


def test_inplace_activations_do_not_change_what_is_captured():
    safe = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    inplace = nn.Sequential(safe[0], nn.ReLU(inplace=True), safe[2])
    X = torch.randn(SIZE, 3)
    for expected, actual in zip(record(safe, X), record(inplace, X), strict=True):
        assert expected.keys() == actual.keys()
        for name in expected:
            assert torch.equal(expected[name], actual[name])


def test_frozen_parameters_are_captured_like_others():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    X = torch.randn(SIZE, 3)
    _, expected = record(model, X)
    model.requires_grad_(False)
    _, actual = record(model, X)
    for name in expected:
        assert torch.equal(expected[name], actual[name])


def test_layers_without_influence_have_no_gradient_rows():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)
            self.cut = False

        def forward(self, x):
            x = self.first(x)
            return self.second(x.detach() if self.cut else x)

    model, X = Cut(), torch.randn(SIZE, 3)
    layers, params = found(model, X)
    model.cut = True
    inputs, gradients = record(model, X, params, layers)
    assert inputs.keys() == {"first", "second"}
    assert gradients.keys() == {"second"}


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(3, 3)

    def forward(self, x):
        self.shared(x + 1)
        return self.shared(x)


@pytest.mark.parametrize("gradients_of_the_first", [True, False])
def test_calls_of_a_layer_are_positions_also_without_influence(gradients_of_the_first):
    class Model(Twice):
        def forward(self, x):
            with torch.set_grad_enabled(gradients_of_the_first):
                self.shared(x + 1)
            return self.shared(x)

    X = torch.randn(SIZE, 3)
    inputs, gradients = record(Model(), X)
    assert torch.equal(inputs["shared"], torch.stack([X + 1, X], 1).unsqueeze(2))
    expected = torch.stack([torch.zeros(SIZE, 3), torch.ones(SIZE, 3)], 1)
    assert torch.equal(gradients["shared"], expected.unsqueeze(2))


def test_a_layer_that_never_runs_is_refused_by_name():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle, self.use = nn.Linear(3, 2), nn.Linear(2, 2), True

        def forward(self, x):
            x = self.used(x)
            return self.idle(x) if self.use else x

    model, X = Optional(), torch.randn(SIZE, 3)
    layers, params = found(model, X)
    model.use = False
    with pytest.raises(ValueError, match=r"never ran .*: idle"):
        record(model, X, params, layers)


def test_inputs_whose_axis_is_no_multiple_of_the_batch_are_refused():
    model = nn.Linear(3, 2)
    layers, params = found(model, torch.randn(5, 3))
    with pytest.raises(ValueError, match="must hold the examples"):
        record(model, torch.randn(5, 3), params, layers, batch_size=4)


def test_batch_statistics_in_a_pass_are_refused_by_name():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
    X = torch.randn(SIZE, 3)
    layers, params = found(model, X)
    with pytest.raises(ValueError, match=r"'0\.weight' uses batch statistics"):
        record(model.train(), X, params, layers)


def test_an_error_leaves_nothing_behind():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    X = torch.randn(SIZE, 3)
    layers, params = found(model, X)
    with pytest.raises(RuntimeError):
        record(model, torch.randn(SIZE, 2), params, layers)
    own = list(model.parameters())
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in own)
    assert torch.overrides._get_current_function_mode() is None


class Convolution(nn.Conv2d):
    """Pads by itself, as TensorFlow does."""

    def forward(self, x):
        x = nn.functional.pad(x, (0, 1, 0, 1))
        return nn.functional.conv2d(x, self.weight, self.bias, self.stride)


class Aliased(nn.Module):
    """A module under two names, and one that runs twice."""

    def __init__(self):
        super().__init__()
        block = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([block, block])
        self.head = nn.Linear(4, 3)
        self.net = nn.Sequential(*self.blocks, self.head)

    def forward(self, x):
        return self.net(x.tanh())


class Tied(nn.Module):
    """Two layers with one weight, and biases of their own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).tanh())


class Attention(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.batch_first = batch_first

    def forward(self, x):
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.attention(x, x, x, need_weights=False)[0]
        return x[:, 0] if self.batch_first else x[0]


class SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.norm(self.body(x.transpose(0, 1)).tanh())
        joined = x.flatten(0, 1)  # tokens first, then examples
        return self.head(joined).unflatten(0, x.shape[:2]).tanh().mean(0)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        checkpoint = torch.utils.checkpoint.checkpoint
        return self.head(checkpoint(self.body, x, use_reentrant=False).tanh())


def _tripled():
    model = network("mlp")
    model[0].register_forward_hook(lambda module, args, output: 3 * output)
    return model


def _encoder():
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    return nn.Sequential(
        nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(12, 3)
    )


# name: (network, shape of an example)
EXACT = {
    "padding by itself": (
        lambda: nn.Sequential(Convolution(1, 2, 2), nn.Flatten(), nn.Linear(32, 3)),
        (1, 4, 4),
    ),
    "aliased modules": (Aliased, (4,)),
    "tied weights": (Tied, (4,)),
    "a hook that triples": (_tripled, (4,)),
    "attention, batch first": (lambda: Attention(True), (5, 4)),
    "attention, sequence first": (lambda: Attention(False), (5, 4)),
    "transformer encoder": (_encoder, (3, 4)),
    "sequence first": (SequenceFirst, (5, 4)),
    "checkpointing": (Checkpointed, (4,)),
}


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("name", EXACT)
def test_whatever_touches_a_weight_the_rows_are_exact(name, size):
    build, shape = EXACT[name]
    torch.manual_seed(0)
    model = build().double().eval()
    X = torch.randn(size, *shape, dtype=torch.float64)
    own = list(model.parameters())
    layers, params = found(model, X)
    assert_rows_are_exact(model, X, params, layers)
    after = list(model.parameters())
    assert all(a is b for a, b in zip(own, after, strict=True))
    assert not any(m._forward_hooks for m in model.modules()) or "hook" in name


def test_a_layer_for_each_set_of_parameters_that_are_used_together():
    model, X = Tied(), torch.randn(SIZE, 4)
    layers, _ = found(model, X)
    assert [(layer.name, layer.matrix, layer.vector) for layer in layers] == [
        ("first.weight", 0, None),
        ("first.bias", None, 1),
        ("second", None, 2),
    ]


def test_projections_of_cross_attention_are_left_out_by_name():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x.flip(1), x.flip(1))[0].mean(1)

    _, layers, left_out = supported(Cross().eval(), torch.randn(SIZE, 5, 4))
    assert {(e.name, e.reason) for e in left_out} == {
        ("attention.in_proj_weight", "is used by `linear`"),
        ("attention.in_proj_bias", "is used by `linear`"),
    }
    assert [layer.name for layer in layers] == ["attention.out_proj"]


def test_compiled_networks_are_recorded_eagerly():
    model = network("mlp")
    X = torch.randn(SIZE, 4, dtype=torch.float64)
    compiled = torch.compile(model)
    layers, params = found(compiled, X)
    assert_rows_are_exact(model, X, params, layers)
    expected = record(model, X, params, layers)
    actual = record(compiled, X, params, layers)
    for a, b in zip(actual, expected, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("in_place", [True, False])
def test_compiled_parts_are_recorded_eagerly(in_place):
    model = network("mlp")
    if in_place:
        model.compile()
    else:
        model[0] = torch.compile(model[0])
    X = torch.randn(SIZE, 4, dtype=torch.float64)
    layers, params = found(model, X)
    assert len(layers) == 2
    with torch.compiler.set_stance("force_eager"):
        assert_rows_are_exact(model, X, params, layers)


@pytest.mark.filterwarnings("ignore")
def test_scripted_modules_are_refused_by_name():
    model = nn.Sequential(torch.jit.script(nn.Linear(3, 3)), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="Module '0' is scripted"):
        found(model, torch.randn(SIZE, 3))


def test_autocast_rows_are_those_of_the_network():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    class Autocast(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.inner(x)

    X = torch.randn(SIZE, 3)
    _, gradients = record(Autocast(), X)
    _, expected = record(model, X)
    for name, rows in gradients.items():
        assert rows.dtype == torch.bfloat16
        own = expected[name.removeprefix("inner.")]
        assert torch.allclose(rows.float(), own, atol=0.02)


def test_a_network_runs_with_other_values_in_place_of_its_parameters():
    model = Aliased().double()
    X = torch.randn(SIZE, 4, dtype=torch.float64)
    before = model(X)
    values = {id(p): torch.randn_like(p) for p in model.parameters()}
    with Substitution(values):
        actual = run(model, X)
    assert torch.equal(model(X), before)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(values[id(param)])
    assert torch.allclose(model(X), actual)


def test_threads_do_not_see_each_other():
    model = network("mlp")
    X = torch.randn(SIZE, 4, dtype=torch.float64)
    layers, params = found(model, X)
    expected = record(model, X, params, layers)
    results, stop = [], threading.Event()

    def disturb():
        while not stop.is_set():
            values = {id(p): torch.zeros_like(p) for p in params}
            with Substitution(values):
                run(model, X)

    thread = threading.Thread(target=disturb)
    thread.start()
    results = [record(model, X, params, layers) for _ in range(20)]
    stop.set()
    thread.join()
    for inputs, gradients in results:
        for actual, own in ((inputs, expected[0]), (gradients, expected[1])):
            assert all(torch.equal(actual[name], own[name]) for name in own)
