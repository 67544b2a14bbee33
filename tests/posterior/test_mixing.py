"""Networks in which an example's output depends on others are refused."""

import pytest
import torch
from laplace.curvature.asdl import AsdlGGN
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.cases import NUM_OUTPUTS, batch, network
from tests.fits import SIZE, SUBSETS, debiased, loader, posterior


class Mixing(nn.Module):
    """An example's output depends on others, below or above the layers."""

    def __init__(self, **modules):
        super().__init__()
        self.mlp = network("mlp")
        self.before = modules.get("before", nn.Identity())
        self.after = modules.get("after", nn.Identity())

    def forward(self, x):
        x = x["input_ids"] if isinstance(x, dict) else x
        return self.after(self.mlp(self.before(x)))


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


def _batch_norm(features):
    return nn.BatchNorm1d(features, affine=False, track_running_stats=False)


MIXING = {
    "input": (lambda: Mixing(before=Centred()), "In the input, an example's"),
    "output": (lambda: Mixing(after=Centred()), "depends on rows of others"),
    "statistics": (lambda: Mixing(before=_batch_norm(4)), "before'.*statistics"),
    "last statistics": (lambda: Mixing(after=_batch_norm(3)), "after'.*statistics"),
}


@pytest.mark.parametrize("batch_size", [1, 7])
@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("name", MIXING)
def test_networks_that_mix_examples_are_refused(name, subset, batch_size):
    build, message = MIXING[name]
    options = {"last_layer_name": "mlp.2"} if subset == "last_layer" else {}
    la = debiased(build().double(), subset=subset, **options)
    with pytest.raises(ValueError, match=message):
        la.fit(loader(batch_size=batch_size))


def test_mixing_is_found_in_mappings_and_by_every_backend():
    X, y = batch("mlp", SIZE)
    points = [{"input_ids": x, "labels": label} for x, label in zip(X, y, strict=True)]
    la = debiased(Mixing(before=Centred()))
    with pytest.raises(ValueError, match="In the input, an example's"):
        la.fit(DataLoader(points, 7))
    la = debiased(Mixing(before=Centred()), backend=AsdlGGN)
    with pytest.raises(ValueError, match="In the input, an example's"):
        la.fit(loader())


class SequenceFirst(nn.Module):
    """The layers see [positions, batch, features]."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, NUM_OUTPUTS)

    def forward(self, x):
        return self.head(self.body(x.transpose(0, 1)).tanh().mean(0))


class BatchFirst(nn.Module):
    """The same network with another layout."""

    def __init__(self, other):
        super().__init__()
        self.body, self.head = other.body, other.head

    def forward(self, x):
        return self.head(self.body(x).tanh().mean(1))


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_layers_may_have_the_examples_on_any_axis(magnitudes):
    torch.manual_seed(0)
    model = SequenceFirst().double()
    X, y = torch.randn(SIZE, 6, 3).double(), torch.randint(NUM_OUTPUTS, (SIZE,))
    la = debiased(model, magnitudes=magnitudes)
    la.fit(DataLoader(TensorDataset(X, y), 7))
    expected = debiased(BatchFirst(model), magnitudes=magnitudes)
    expected.fit(DataLoader(TensorDataset(X, y), 7))
    difference = posterior(la) - posterior(expected)
    assert difference.norm() < 1e-10 * posterior(la).norm()
    assert torch.allclose(la(X), expected(X))
