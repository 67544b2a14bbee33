"""Parameters that are used in any way: each example has a copy of its own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from laplace_debiased.rows.calls import NUMBER, leaves, with_leaves
from laplace_debiased.rows.fallback import LARGEST_EXACT
from laplace_debiased.rows.layers import Layer
from laplace_debiased.rows.output_curvature import OutputCurvature
from laplace_debiased.rows.selection import select
from laplace_debiased.rows.substitution import run
from laplace_debiased.rows.sweep import Nothing, sweep
from laplace_debiased.rows.tape import record_rows
from tests.zoo import Model

SIZE = 4


def gradients(model, X, layers=None):
    """Rows of each parameter that is copied ``[examples, size]``, by its name."""
    params = list(model.parameters())
    layers = layers or select(model, params, X, len(X)).layers
    with torch.enable_grad(), record_rows(model, params, layers, len(X), None) as tape:
        output = run(model, X)
    rows = tape.gradient_rows(output, torch.ones_like(output), False)
    copied = {layer.name for layer in layers if layer.calls}
    return {own.name: g.flatten(1) for own, g in rows if own.name in copied}


def exact(model, X, name):
    """The same by autograd, one example at a time."""
    param = dict(model.named_parameters())[name]
    return torch.stack(
        [torch.autograd.grad(model(x[None]).sum(), param)[0].flatten() for x in X]
    )


def layer_scale():
    return Model(
        lambda self, x: self.head(x + self.scale * self.body(x)),
        scale=nn.Parameter(torch.rand(4)),
        body=nn.Linear(4, 4),
        head=nn.Linear(4, 3),
    )


def windows():
    """A bias that windows of an image share, of which examples have several."""

    def forward(self, x):
        parts = x.unflatten(1, (2, 2)).flatten(0, 1) + self.table[[1, 0]]
        return self.head(parts.unflatten(0, (-1, 2)).flatten(1).tanh())

    return Model(forward, table=nn.Parameter(torch.rand(2)), head=nn.Linear(4, 3))


def computed():
    """Weights that are computed from two parameters, in several steps."""

    def forward(self, x):
        weight = self.first.softmax(0) @ self.second.T
        return F.linear(x, weight[:3], self.head.bias) + self.head(x)

    return Model(
        forward,
        first=nn.Parameter(torch.rand(5, 2)),
        second=nn.Parameter(torch.rand(4, 2)),
        head=nn.Linear(4, 3),
    )


def prompt():
    """Tokens that are learned, in front of those of an example."""

    def forward(self, x):
        tokens = torch.cat([self.tokens.expand(len(x), -1, -1), x[:, None]], 1)
        return self.head(self.body(tokens).tanh().mean(1))

    return Model(
        forward,
        tokens=nn.Parameter(torch.rand(2, 4)),
        body=nn.Linear(4, 4),
        head=nn.Linear(4, 3),
    )


def repeated():
    """A number of examples among the arguments, and one that is no such number."""

    def forward(self, x):
        state = self.state.repeat(x.shape[0], 1)
        return self.head((x + state).tanh())

    return Model(forward, state=nn.Parameter(torch.rand(1, 4)), head=nn.Linear(4, 3))


def overwritten():
    return Model(
        lambda self, x: self.head((self.body(x) * self.scale).relu_()),
        scale=nn.Parameter(torch.rand(4)),
        body=nn.Linear(4, 4),
        head=nn.Linear(4, 3),
    )


def vector_product():
    """A weight that is a vector, which has no matrix of rows."""
    return Model(
        lambda self, x: self.head(x) + F.linear(x, self.direction)[:, None],
        direction=nn.Parameter(torch.rand(4)),
        head=nn.Linear(4, 3),
    )


def scaled_tokens():
    """A scale on tokens, which come first on the axis of examples."""

    def forward(self, x):
        tokens = x.transpose(0, 1)
        scaled = (tokens.flatten(0, 1) * self.scale).tanh()
        return self.head(scaled.unflatten(0, tokens.shape[:2]).sum(0))

    return Model(forward, scale=nn.Parameter(torch.rand(4)), head=nn.Linear(4, 3))


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (layer_scale, ["scale"]),
        (windows, ["table"]),
        (computed, ["first", "second"]),
        (prompt, ["tokens"]),
        (repeated, ["state"]),
        (overwritten, ["scale"]),
        (vector_product, ["direction"]),
    ],
)
def test_gradients_in_copies_are_those_of_each_example(build, names):
    torch.manual_seed(0)
    model, X = build().double(), torch.randn(SIZE, 4).double()
    for size in (SIZE, 3, 1):  # the axes are known for any number of examples
        layers = select(model, list(model.parameters()), X, SIZE).layers
        rows = gradients(model, X[:size], layers)
        assert set(names) == rows.keys()
        for name, own in rows.items():
            assert torch.allclose(own, exact(model, X[:size], name), atol=1e-12)


def test_the_model_and_its_output_stay_what_they_are():
    model, X = computed().double(), torch.randn(SIZE, 4).double()
    before = {name: id(param) for name, param in model.named_parameters()}
    params = list(model.parameters())
    layers = select(model, params, X, SIZE).layers
    with record_rows(model, params, layers, SIZE, None):
        output = run(model, X)
    assert torch.allclose(output, model(X), atol=1e-12)
    assert {name: id(param) for name, param in model.named_parameters()} == before
    assert all(param.grad is None for param in params)


def test_other_calls_than_when_a_layer_was_found_are_refused():
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.head = nn.Parameter(torch.rand(4)), nn.Linear(4, 3)
            self.divides = False

        def forward(self, x):
            return self.head(x / self.scale if self.divides else x * self.scale)

    model, X = Changing().double(), torch.rand(SIZE, 4).double()
    layers = select(model, list(model.parameters()), X, SIZE).layers
    model.divides = True
    with pytest.raises(ValueError, match=r"'scale' is used by `\w*div"):
        gradients(model, X, layers)


def test_single_entries_do_not_tell_whose_further_ones_are():
    torch.manual_seed(0)
    model, X = scaled_tokens().double(), torch.randn(SIZE, 5, 4).double()
    layers = select(model, list(model.parameters()), X[:, :1], SIZE).layers
    layers = [Layer.from_state_dict(layer.state_dict()) for layer in layers]
    for own in (X[:, :1], X[:1]):
        rows = gradients(model, own, layers)["scale"]
        assert torch.allclose(rows, exact(model, own, "scale"), atol=1e-12)
    message = (
        r"`mul` got a tensor of shape \(20, 4\) for a batch of 4, but one entry on "
        "axis 0 for each example when its parameter was found"
    )
    with pytest.raises(ValueError, match=message):
        gradients(model, X, layers)


def test_functions_that_cannot_be_mapped_leave_a_parameter_out():
    model = Model(
        lambda self, x: self.head(self.body(x[:, None])[0][:, 0]),
        body=nn.GRU(4, 4, batch_first=True),
        head=nn.Linear(4, 3),
    )
    found = select(model, list(model.parameters()), torch.rand(SIZE, 4), SIZE)
    assert [layer.name for layer in found.layers] == ["head"]
    assert {entry.reason for entry in found.left_out} == {"is used by `gru`"}


def test_a_parameter_that_mixes_examples_is_refused():
    model = Model(
        lambda self, x: self.head(x + self.scale * x.mean(0)),
        scale=nn.Parameter(torch.rand(4)),
        head=nn.Linear(4, 3),
    )
    with pytest.raises(ValueError, match="others"):
        select(model, list(model.parameters()), torch.rand(SIZE, 4), SIZE)


def test_scales_of_activations_are_like_those_of_normalizations():
    """Their prior has their trained values as its mean; masked weights' has not."""

    def forward(self, x):
        masked = F.linear(x, self.weight * self.mask)
        return self.head(masked * self.scale)

    model = Model(
        forward,
        weight=nn.Parameter(torch.rand(4, 4)),
        scale=nn.Parameter(torch.rand(4)),
        head=nn.Linear(4, 3),
    )
    model.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0, 1.0]))
    found = select(model, list(model.parameters()), torch.rand(SIZE, 4), SIZE)
    kinds = {layer.name: layer.is_normalization for layer in found.layers}
    assert kinds == {"weight": False, "scale": True, "head": False}


def test_large_parameters_keep_a_diagonal():
    side = LARGEST_EXACT // 4

    def forward(self, x):
        small = (x[:, None] + self.small).repeat(1, 2, 1)
        return self.head(small * self.large).mean(1)

    model = Model(
        forward,
        small=nn.Parameter(torch.rand(side, 4)),
        large=nn.Parameter(torch.rand(2 * side, 4)),
        head=nn.Linear(4, 3),
    )
    found = select(model, list(model.parameters()), torch.rand(SIZE, 4), SIZE)
    kinds = {layer.name: layer.is_diagonal for layer in found.layers}
    assert kinds == {"small": False, "large": True, "head": False}
    assert set(found.kinds().values()) == {"exact", "diagonal", "kronecker"}


def test_batches_are_split_where_copies_would_take_too_much_memory(monkeypatch):
    model, X = prompt().double(), torch.randn(7, 4).double()
    params, y = list(model.parameters()), torch.randint(3, (7,))
    layers = select(model, params, X, 7).layers
    sizes, forward = [], model.forward
    monkeypatch.setattr(
        model, "forward", lambda x: (sizes.append(len(x)), forward(x))[1]
    )
    curvature = OutputCurvature(nn.CrossEntropyLoss())
    arguments = (model, params, layers, [(X, y)], curvature, Nothing())
    whole = sweep(*arguments)
    assert sizes == [7]
    monkeypatch.setattr("laplace_debiased.rows.sweep._COPIED_ENTRIES", 3 * 8)
    split = sweep(*arguments)
    assert sizes == [7, 3, 3, 1]
    assert torch.allclose(whole.loss, split.loss)
    assert torch.allclose(whole.losses, split.losses)


def test_containers_are_rebuilt_with_other_leaves():
    item = [(1, {"a": [2, torch.Size([3])]}), NUMBER]
    assert list(leaves(item)) == [1, 2, 3, NUMBER]
    rebuilt = with_leaves(item, iter("wxyz"))
    assert rebuilt == [("w", {"a": ["x", ("y",)]}), "z"]
