"""Batches that differ: in length, and in which layers they use."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import merge
from laplace_debiased.posterior import fitting
from laplace_debiased.sampling.shares import effective_rank
from tests.fits import debiased

CLASSES = 3
KEYS = {"dict_key_x": "x", "dict_key_y": "labels"}


class Adapted(nn.Module):
    """Has a layer that one kind of batch uses."""

    def __init__(self):
        super().__init__()
        self.body, self.adapter = nn.Linear(4, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, batch):
        hidden = self.body(batch["x"]).tanh()
        if batch["is_adapted"]:
            hidden = hidden + self.adapter(hidden).tanh()
        return self.head(hidden)


class MeanOfTokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(self.body(x).tanh().mean(1))


def network(kind):
    torch.manual_seed(0)
    return kind().double()


def adapted(is_adapted, size=20):
    y = torch.randint(CLASSES, (size,))
    return {"x": torch.randn(size, 4).double(), "is_adapted": is_adapted, "labels": y}


def sequences(length, size=20, seed=0, of_tokens=False):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(size, length, 4, generator=generator).double()
    shape = (size, length) if of_tokens else (size,)
    return X, torch.randint(CLASSES, shape, generator=generator)


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize("later", [1, 3])
def test_batches_that_do_not_use_a_layer_leave_its_curvature(magnitudes, later):
    model, kinds = network(Adapted), [True] + [False] * later
    pairs = [(adapted(kind), adapted(kind)) for kind in kinds]
    stream = debiased(model, magnitudes=magnitudes, **KEYS)
    for directions, measured in pairs:
        stream.partial_fit(directions, magnitude_batch=measured)
    whole = debiased(model, magnitudes=magnitudes, **KEYS)
    whole.fit([own for own, _ in pairs], magnitude_loader=[own for _, own in pairs])
    actual, expected = (
        torch.stack([own.sum() for own in la.H.spectra()]) / la.n_data
        for la in (stream, whole)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=0)
    # of a stream, those of each batch are added: products of factors are not additive
    told = stream.sampling_error.traces / stream.n_data
    torch.testing.assert_close(told, actual.view(3, 2).sum(1), rtol=0.05, atol=0)


def test_posteriors_of_sequences_of_any_length_merge():
    model, parts = network(MeanOfTokens), []
    for length in (2, 12):
        parts.append(debiased(model))
        parts[-1].fit([sequences(length)])
    for order in (parts, parts[::-1]):
        la = debiased(model)
        la.load_state_dict(merge(order))
        assert la.n_data == 40
        assert la._selection.layers[0].num_positions == 12
        # G adds up, and A is averaged: traces are not additive
        trace = sum(own.H.to_matrix().trace() for own in parts)
        assert la.H.to_matrix().trace() == pytest.approx(trace.item(), rel=0.3)


@pytest.mark.parametrize("lengths", [(3, 1), (1, 3), (1, 1)])
@pytest.mark.parametrize("budget", [None, 20])
def test_a_batch_may_have_one_position(lengths, budget):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()
    batches = [sequences(own, seed=own, of_tokens=True) for own in lengths]
    la = debiased(model, class_axis=-1, budget=budget)
    la.fit(batches)
    assert la.n_data == 40


@pytest.mark.parametrize("lengths", [(1,), (10,), (3, 5)])
def test_the_best_share_is_of_classes_not_of_positions(lengths, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()
    found = []

    def keep(total):
        found.append(total)
        return effective_rank(total)

    monkeypatch.setattr(fitting, "effective_rank", keep)
    batches = [sequences(own, seed=own, of_tokens=True) for own in lengths]
    options = {"estimator": "two_batch", "direction_fraction": "auto"}
    debiased(model, class_axis=-1, **options).fit(batches)
    p = torch.cat([model(X).flatten(0, 1) for X, _ in batches]).softmax(1).detach()
    expected = torch.diag(p.sum(0)) - p.T @ p
    (total,) = found
    torch.testing.assert_close(total, expected)


def test_two_batches_measure_embeddings_token_by_token():
    """Those of the points that gave directions have no say in how frequent they are."""
    torch.manual_seed(0)
    table, head = nn.Embedding(10, 4), nn.Linear(4, CLASSES)
    model = nn.Sequential(table, nn.Flatten(), nn.Tanh(), head).double()
    y = torch.randint(CLASSES, (50,))
    first, other = (torch.randint(*ends, (50, 1)) for ends in ((0, 6), (4, 10)))
    la = debiased(model, magnitudes="ggn")
    own, measured = (DataLoader(TensorDataset(X, y), 10) for X in (first, other))
    la.fit(own, magnitude_loader=measured)
    actual = la.H.spectra()[0].view(10, 4).sum(1)
    J = head.weight.detach() * (1 - table(other[:, 0]).detach().tanh() ** 2)[:, None]
    p = model(other).softmax(1).detach()  # J: [points, classes, features]
    curvatures = (p[:, :, None] * J.square()).sum((1, 2))
    curvatures -= torch.einsum("nc,ncf->nf", p, J).square().sum(1)
    expected = torch.zeros(10).double().index_add(0, other[:, 0], curvatures)
    torch.testing.assert_close(actual, expected)
