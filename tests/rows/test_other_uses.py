"""Networks that use parameters in other ways for some examples alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.fits import debiased

SIZE, CLASSES = 96, 3


class Experts(nn.Module):
    """Each example goes to one of several experts, some of which are rare."""

    def __init__(self, expert):
        super().__init__()
        self.shared, self.expert = nn.Linear(4, CLASSES), expert

    def forward(self, x):
        out = self.shared(x)
        is_rare = x[:, 0] > 1.5
        rare = out.new_zeros(out.shape)
        rare[is_rare] = self.expert(x[is_rare])
        return out + rare


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(CLASSES))

    def forward(self, x):
        return x[:, :CLASSES] * self.scale


class Masked(nn.Module):
    """Masks its weight for inputs of more than two tokens."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, CLASSES)

    def forward(self, x):
        weight, bias = self.layer.weight, self.layer.bias
        weight = 2 * weight if x.shape[1] > 2 else weight
        return F.linear(x, weight, bias).sum(1)


class Part(nn.Module):
    """Uses as many columns of its weight as an input has entries."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CLASSES, 4))

    def forward(self, x):
        width = x.shape[1]
        return F.linear(x, self.weight if width == 4 else self.weight[:, :width])


def loader(X):
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(CLASSES, (len(X),), generator=generator)
    return DataLoader(TensorDataset(X, y), 32)


def inputs(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).double()


@pytest.mark.parametrize(
    "expert", [nn.Linear(4, CLASSES), Scaled()], ids=["row", "own"]
)
def test_what_no_example_uses_at_first_is_left_out(expert):
    """Nothing tells whose rows there would be: zero curvature would be wrong."""
    X = inputs(SIZE, 4)
    X[:, 0] = torch.linspace(-2, 2, SIZE)  # the rare ones come last
    la = debiased(Experts(expert).double())
    with pytest.warns(UserWarning, match="stay at their trained values"):
        la.fit(loader(X))
    kinds = la.parameter_kinds
    assert {kinds[name] for name in kinds if "expert" in name} == {"left out"}
    assert kinds["shared.weight"] == "kronecker"


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_other_functions_are_refused_by_name(magnitudes):
    cases = [(Masked(), inputs(SIZE, 2, 4), inputs(5, 3, 4), "mul")]
    cases += [(Part(), inputs(SIZE, 4), inputs(5, 2), "linear")]
    for model, X, other, name in cases:
        la = debiased(model.double(), magnitudes=magnitudes)
        la.fit(loader(X))
        assert la(X[:5]).shape == (5, CLASSES)
        with pytest.raises(ValueError, match=f"is used by `{name}`, which it was not"):
            la.uncertainty(other)


def test_a_bias_that_outputs_share_is_exact():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(CLASSES, 4))
            self.bias = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return F.linear(x, self.weight, self.bias)

    la, X = debiased(Shared().double(), magnitudes="ggn"), inputs(SIZE, 4)
    la.fit(loader(X))
    assert la.parameter_kinds == {"weight": "exact", "bias": "exact"}
    p = la.model(X).softmax(1).detach()
    # a change of all logits alike
    assert la.H.to_matrix()[-1, -1].abs() < 1e-12
    curvature = p[:, :, None] * X[:, None].square() * (1 - p)[:, :, None]
    trace = la.H.to_matrix().trace()
    assert trace.item() == pytest.approx(curvature.sum().item())


def test_tables_of_integers_look_up_what_embeddings_take():
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            numbers = torch.randperm(6)[:, None]
            self.mapped = nn.Embedding.from_pretrained(numbers, freeze=True)
            self.table, self.head = nn.Embedding(6, 4), nn.Linear(4, CLASSES)

        def forward(self, x):
            return self.head(self.table(self.mapped(x).squeeze(-1)).mean(1).tanh())

    la, X = debiased(Mapped().double()), torch.randint(6, (SIZE, 3))
    la.fit(loader(X))
    assert la.parameter_kinds["table.weight"] == "kronecker"
    assert la(X[:5]).isfinite().all()


def test_scalars_of_a_mapping_are_shared():
    class Tempered(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, CLASSES)

        def forward(self, x, scale):
            return scale * self.head(x)

    X, scale = inputs(20, 4), torch.tensor(0.7).double()
    batch = {"x": X, "scale": scale, "labels": torch.randint(CLASSES, (20,))}
    model = Tempered().double()
    la = debiased(model, dict_key_x="x")
    la.fit([batch])
    assert la({"x": X[:5], "scale": scale}).shape == (5, CLASSES)


def test_the_kind_of_a_weight_is_no_use_of_it():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, CLASSES)

        def forward(self, x):
            weight = self.head.weight
            return self.head(x) + weight.new_zeros(1) + torch.zeros_like(weight).sum()

    la = debiased(Padded().double())
    la.fit(loader(inputs(SIZE, 4)))
    assert set(la.parameter_kinds.values()) == {"kronecker"}


class Unpadded(nn.Module):
    """Applies a layer to the tokens that are no padding, one after the other."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        is_token = x[..., 0] != 0
        hidden = x.new_zeros(*x.shape[:2], 5)
        hidden[is_token] = self.layer(x[is_token]).tanh()
        return self.head(hidden.sum(1))


def of_lengths(*lengths):
    X = inputs(len(lengths), max(lengths), 4)
    for own, length in zip(X, lengths, strict=True):
        own[length:] = 0
    return X


def test_rows_that_are_chosen_by_value_are_checked_in_each_pass():
    """They may be as many as before, and those of others."""
    la = debiased(Unpadded().double(), prior_precision=2.0)
    X = torch.cat([of_lengths(*[2] * 16), of_lengths(*[2] * 16)])
    la.fit(loader(X))
    _, variance = la._glm_predictive_distribution(X[:4])
    jacobian = torch.func.jacrev(
        lambda p: torch.func.functional_call(la.model, p, (X[:4],))
    )(dict(la.model.named_parameters()))
    J = torch.cat([own.flatten(2) for own in jacobian.values()], 2)
    P = la.posterior_precision.to_matrix()
    torch.testing.assert_close(variance, J @ torch.linalg.solve(P, J.mT))
    uneven = of_lengths(3, 1, 2, 2)
    with pytest.raises(ValueError, match="output depends on rows of others"):
        la.uncertainty(uneven)
    with pytest.raises(ValueError, match="output depends on rows of others"):
        la.fit([(X, torch.zeros(32).long()), (uneven, torch.zeros(4).long())])
