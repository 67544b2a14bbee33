import threading

import pytest
import torch
import torch._dynamo
from torch import nn

from laplace_debiased.rows.substitution import Substitution, run
from tests import zoo
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


def test_a_layer_that_does_not_run_in_a_pass_has_no_rows_in_it():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
            self.count = 2

        def forward(self, x):
            for layer in self.layers[: self.count]:
                x = layer(x)
            return x

    model, X = Optional(), torch.randn(SIZE, 3)
    layers, params = found(model, X)
    model.count = 1
    inputs, gradients = record(model, X, params, layers)
    assert inputs.keys() == gradients.keys() == {"layers.0"}
    model.count = 0
    assert record(model, X, params, layers) == ({}, {})


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


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("name", zoo.EXACT)
def test_whatever_touches_a_weight_the_rows_are_exact(name, size):
    model, (X, _) = zoo.build(name), zoo.data(name, size)
    params = [param for param in model.parameters() if param.requires_grad]
    layers, params = found(model, X, params)
    assert_rows_are_exact(model, X, params, layers)


def test_a_layer_for_each_set_of_parameters_that_are_used_together():
    model, (X, _) = zoo.build("tied weights"), zoo.data("tied weights", SIZE)
    layers, _ = found(model, X)
    assert [(layer.name, layer.matrix, layer.vector) for layer in layers] == [
        ("0.weight", 0, None),
        ("0.bias", None, 1),
        ("2", None, 2),
        ("4", 3, 4),
    ]


def test_projections_of_cross_attention_are_left_out_by_name():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x.flip(1), x.flip(1))[0].mean(1)

    _, layers, left_out = supported(Cross().eval(), torch.randn(SIZE, 5, 4), dense=True)
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
        own = expected[name.removeprefix("inner.")]
        assert rows.dtype == own.dtype == torch.float32
        assert torch.allclose(rows, own, atol=0.02)


def test_a_network_runs_with_other_values_in_place_of_its_parameters():
    model, (X, _) = zoo.build("aliased modules"), zoo.data("aliased modules", SIZE)
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


def stance():
    return torch._dynamo.eval_frame._stance.stance


def test_compiled_parts_are_compiled_again_after_the_last_run():
    model, X = network("mlp"), torch.randn(SIZE, 4, dtype=torch.float64)
    assert stance() == "default"
    seen, inside, go_on = [], threading.Event(), threading.Event()

    def wait(*_):
        seen.append(stance())
        inside.set()
        assert go_on.wait(10)

    slow = nn.Sequential(network("mlp"))
    slow.register_forward_hook(wait)
    thread = threading.Thread(target=run, args=(slow, X))
    thread.start()
    assert inside.wait(10)
    run(model, X)
    assert stance() == "force_eager"  # the other thread's run goes on
    go_on.set()
    thread.join()
    assert seen == ["force_eager"] and stance() == "default"
    with pytest.raises(RuntimeError):
        run(model, X[:, 1:])
    assert stance() == "default"
