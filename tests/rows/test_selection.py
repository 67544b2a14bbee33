import pytest
import torch
from torch import nn

from laplace_debiased.rows.left_out import refusal
from laplace_debiased.rows.selection import find_layers
from laplace_debiased.rows.tracing import trace
from tests.cases import network
from tests.rows.recording import assert_rows_are_exact, supported

SIZE = 3


def names_and_reasons(model, X):
    _, _, left_out = supported(model, X, dense=True)
    return {(entry.name, entry.reason) for entry in left_out}


class Unsupported(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.pairs = nn.Linear(2, 2), nn.Bilinear(2, 2, 2)
        self.tokens = nn.Embedding(3, 2)

    def forward(self, x):
        return self.head(self.pairs(x, self.tokens(x[:, 0].long())))


def test_unsupported_uses_are_named_with_a_remedy():
    model, X = Unsupported(), torch.rand(SIZE, 2)
    with pytest.raises(ValueError, match="not supported") as error:
        find_layers(model, list(model.parameters()), X, SIZE)
    for part in (
        "pairs (Bilinear: weight, bias) is used by `bilinear`",
        "tokens (Embedding: weight) is a table of embeddings",
        "F.linear",
        "requires_grad_(False)",
    ):
        assert part in str(error.value)
    assert len(find_layers(model, list(model.head.parameters()), X, SIZE)) == 1


def test_parameters_of_other_functions_are_left_out_and_the_others_are_not():
    class WithScale(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.scale = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return super().forward(x) * self.scale

    model, X = WithScale(), torch.rand(SIZE, 2)
    _, layers, left_out = supported(model, X, dense=True)
    assert "(model) (WithScale: scale) is used by `mul`" in refusal(left_out)
    assert [(layer.matrix, layer.vector) for layer in layers] == [(0, 1)]


def test_weights_that_are_computed_from_parameters_are_left_out():
    class Standardized(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight / self.weight.std(), self.bias)

    model = nn.Sequential(Standardized(1, 2, 2), nn.Flatten())
    X = torch.rand(SIZE, 1, 3, 3)
    assert names_and_reasons(model, X) == {("0.weight", "is used by `std`")}


def test_parametrized_weights_are_left_out_and_their_biases_are_not():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)))
    _, layers, left_out = supported(model, torch.rand(SIZE, 2), dense=True)
    assert [(layer.matrix, layer.vector) for layer in layers] == [(None, 0)]
    assert sum(entry.size for entry in left_out) == 9


def test_foreign_and_repeated_parameters_are_refused():
    model, X = network("mlp"), torch.rand(SIZE, 4).double()
    with pytest.raises(ValueError, match="1 of `params` are in no module"):
        find_layers(model, [model[0].weight, nn.Parameter(torch.ones(2))], X, SIZE)
    with pytest.raises(ValueError, match="given twice"):
        find_layers(model, [model[0].weight, model[0].weight], X, SIZE)


def test_unused_parameters_are_found():
    class Partial(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.spare = nn.LayerNorm(4), nn.LayerNorm(4)

        def forward(self, x):
            return self.norm(x).mean(1)

    assert names_and_reasons(Partial(), torch.randn(SIZE, 3, 4)) == {
        ("spare.weight", "is not used"),
        ("spare.bias", "is not used"),
    }


class TiedAutoencoder(nn.Module):
    """Uses the encoder's weight transposed in the decoder."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x):
        code = self.encoder(x).tanh()
        return self.head(nn.functional.linear(code, self.encoder.weight.T).tanh())


def test_weights_that_are_also_used_otherwise_are_left_out():
    model, X = TiedAutoencoder().double(), torch.randn(SIZE, 4).double()
    assert names_and_reasons(model, X) == {
        ("encoder.weight", "is used in different ways")
    }
    params, layers, _ = supported(model, X, dense=True)
    assert_rows_are_exact(model, X, params, layers)


def test_kernels_with_two_numbers_of_groups_are_left_out():
    class Regrouped(nn.Module):
        """Splits a channel, and filters each of its parts with the same kernel."""

        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv1d(1, 4, 3, bias=False), nn.Linear(4, 2)

        def forward(self, x):
            parts = nn.functional.conv1d(self.conv(x), self.conv.weight, groups=4)
            return self.head(parts.mean(2))

    model, X = Regrouped().double(), torch.randn(SIZE, 1, 9).double()
    assert names_and_reasons(model, X) == {("conv.weight", "is used in different ways")}
    params, layers, _ = supported(model, X, dense=True)
    assert_rows_are_exact(model, X, params, layers)


def test_weights_that_are_vectors_are_left_out():
    class Direction(nn.Linear):
        def __init__(self):
            super().__init__(4, 2)
            self.direction = nn.Parameter(torch.rand(4))

        def forward(self, x):
            along = nn.functional.linear(x, self.direction)
            return super().forward(x) + along[:, None]

    model, X = Direction().double(), torch.randn(SIZE, 4).double()
    assert names_and_reasons(model, X) == {("direction", "is used by `linear`")}


def test_parameters_that_are_written_into_tensors_are_left_out():
    class WithToken(nn.Module):
        def __init__(self):
            super().__init__()
            self.cls, self.head = nn.Parameter(torch.randn(4)), nn.Linear(4, 2)

        def forward(self, x):
            z = x.new_zeros(len(x), 1 + x.shape[1], 4)
            z[:, 1:] = x
            z[:, 0] = self.cls
            return self.head(z.tanh().mean(1))

    model, X = WithToken().double(), torch.randn(SIZE, 3, 4).double()
    params, layers, (entry,) = supported(model, X)
    assert (entry.name, entry.reason) == ("cls", "is used by `__setitem__`")
    assert_rows_are_exact(model, X, params, layers)


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

    assert names_and_reasons(CutOff(), torch.randn(SIZE, 4)) == {
        ("body.weight", "does not influence the output"),
        ("body.bias", "does not influence the output"),
    }


def test_a_network_without_gradients_influences_nothing():
    model = nn.Sequential(nn.Linear(4, 2))
    model.register_forward_hook(lambda module, args, output: output.detach())
    reasons = {reason for _, reason in names_and_reasons(model, torch.randn(SIZE, 4))}
    assert reasons == {"does not influence the output"}


class Double(torch.autograd.Function):
    """A linear layer as a function of its own."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.T @ x


class InsideAFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.own, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(Double.apply(x, self.own.weight))


def test_uses_inside_of_a_function_without_gradients_are_left_out_by_name():
    assert names_and_reasons(InsideAFunction(), torch.randn(SIZE, 4)) == {
        ("own.weight", "is used where no gradients are recorded")
    }


def test_uses_inside_of_vmap_are_left_out_by_name():
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(torch.func.vmap(self.inner)(x))

    assert names_and_reasons(Mapped(), torch.randn(SIZE, 4)) == {
        ("inner.weight", "is used by `linear`"),
        ("inner.bias", "is used by `linear`"),
    }


def test_recurrent_weights_are_left_out_by_name():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.lstm(x)[0][:, -1])

    reasons = names_and_reasons(Recurrent(), torch.randn(SIZE, 5, 4))
    assert len(reasons) == 4
    assert {reason for _, reason in reasons} == {"is used by `lstm`"}


def test_values_that_examples_share_are_left_out():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.randn(5, 4))
            self.positions, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(x + self.positions(self.table)).mean(1)

    assert names_and_reasons(Shared(), torch.randn(SIZE, 5, 4)) == {
        ("positions.weight", "is applied to values that examples share"),
        ("positions.bias", "is applied to values that examples share"),
    }


def test_reentrant_checkpointing_is_refused_with_a_remedy():
    class Reentrant(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            checkpoint = torch.utils.checkpoint.checkpoint
            return self.head(checkpoint(self.body, x, use_reentrant=True))

    with pytest.raises(ValueError, match="use_reentrant=False"):
        supported(Reentrant(), torch.randn(SIZE, 4))


def test_gradients_that_rows_do_not_tell_leave_a_parameter_out(monkeypatch):
    from laplace_debiased.rows import matrix_uses

    def wrong(self, gradient, key, layout, batch_size):
        rows = matrix_uses.positions_of_vectors(gradient, layout, batch_size)
        return rows * (2 if key == "weight" else 1)

    monkeypatch.setattr(matrix_uses.LinearUse, "gradient_rows", wrong)
    reasons = names_and_reasons(network("mlp"), torch.randn(SIZE, 4).double())
    assert reasons == {
        ("0.weight", "is also used in ways that its calls do not tell"),
        ("2.weight", "is also used in ways that its calls do not tell"),
    }


def test_networks_that_squeeze_a_single_example_are_supported():
    class Squeezing(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Conv1d(1, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.body(x).mean(2, keepdim=True).squeeze())

    model, X = Squeezing().double(), torch.randn(SIZE, 1, 5).double()
    _, layers, left_out = supported(model, X)
    assert [layer.name for layer in layers] == ["body", "head"] and not left_out


def test_traces_of_many_examples_keep_no_activations():
    model, X = network("mlp"), torch.randn(SIZE, 4).double()
    params = list(model.parameters())
    pair = trace(model, params, X, SIZE, 2, backward=True)
    many = trace(model, params, X, SIZE, 3, backward=False)
    for few, more in zip(pair.uses, many.uses, strict=True):
        assert not few[0].use.input.is_meta and more[0].use.input.is_meta
        assert more[0].use.input.shape == (3, *few[0].use.input.shape[1:])
