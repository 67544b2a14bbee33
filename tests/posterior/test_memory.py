"""Fits under a limit, and what they take."""

from itertools import pairwise
from unittest import mock

import pytest
import torch
from laplace.curvature import AsdlGGN
from torch import nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import TensorDataset

from laplace_debiased.posterior import fitting, memory, sources
from laplace_debiased.posterior.memory import Entries, in_units
from laplace_debiased.rows.kept import KeptRows
from tests.cases import batch, network
from tests.fits import SUBSETS, TWO_BATCH, debiased
from tests.posterior.test_processes import FITS, data, loader, model_of, same, summary

CASES = {name: own for name, own in FITS.items() if name != "layer by layer"} | {
    "ggn, two batches": ("mlp", {"magnitudes": "ggn", "estimator": "two_batch"}),
    "paper's": ("cnn-stride-padding", TWO_BATCH),
    "ggn of convolutions": ("cnn-padding", {"magnitudes": "ggn", "budget": 16}),
    "regression": ("mlp", {"likelihood": "regression", "budget": 16}),
}


def dataset(name, likelihood="classification"):
    if likelihood == "regression":
        return TensorDataset(*batch(name, 37, "mse"))
    return data(name)


def posterior(name):
    case, settings = CASES[name]
    torch.manual_seed(0)
    return debiased(model_of(case).double(), **settings)


def train(name):
    case, settings = CASES[name]
    return dataset(case, settings.get("likelihood", "classification"))


def one_each(*known, following=memory._next):
    """Let each layer have passes of its own, whatever it takes."""
    return following(*known[:-1], limit=0)


@pytest.mark.parametrize("name", CASES)
def test_layers_one_by_one_give_the_same_posterior(name):
    points, found = train(name), posterior(name)
    with mock.patch.object(memory, "_next", one_each):
        assert set(found.fit_memory(loader(points)).at_a_time) == {1}
        found.fit(loader(points))
    expected = posterior(name)
    expected.fit(loader(points))
    (X, *_) = points.tensors
    assert same(summary(found, X), summary(expected, X))


def peak_of(run):
    """Bytes of tensors that a function has at a time, beside those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    tree = profiled.profiler.kineto_results.experimental_event_tree()
    present = peak = 0
    for size in (own[1] for own in sorted(allocations(tree))):
        present += size
        peak = max(peak, present)
    return peak


def allocations(events):
    """When bytes were taken, or given back."""
    for event in events:
        if event.tag == _EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.alloc_size
        yield from allocations(event.children)


def deep(**settings):
    """A network of several layers, none of which is most of it."""
    torch.manual_seed(0)
    widths = [96] * 4 + [128] * 3 + [96] * 4 + [3]
    pairs = pairwise(widths)
    layers = [own for pair in pairs for own in (nn.Linear(*pair), nn.Tanh())]
    train = TensorDataset(torch.randn(24, 96), torch.randint(3, (24,)))
    return debiased(nn.Sequential(*layers), **settings), loader(train, batch_size=12)


def least(la, train, below):
    """The least limit that holds."""
    above = 1
    while below - above > 1:
        la.fit_memory_limit = middle = (above + below) // 2
        try:
            la.fit_memory(train)
            below = middle
        except ValueError:
            above = middle
    return below


SETTINGS = {
    "kfac": {},
    "pool": {"budget": 16},
    "three folds": {"num_folds": 3},
    "two batches": TWO_BATCH,
    "ggn": {"magnitudes": "ggn"},
    "ggn of a pool": {"magnitudes": "ggn", "budget": 16},
    "ggn by two batches": {"magnitudes": "ggn"} | TWO_BATCH,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_stated_holds(name):
    """Bytes of all tensors that are alive at a time, as the allocator counts them."""
    la, train = deep(**SETTINGS[name])
    free = la.fit_memory(train)
    assert free.at_a_time == (11,)
    measured = peak_of(lambda: la.fit(train))
    assert 0.75 * measured < free.peak < 1.25 * measured
    again = la.fit_memory(train)
    assert again.peak >= free.peak + 0.9 * free.held
    la, _ = deep(**SETTINGS[name])
    la.fit_memory_limit = limit = least(la, train, free.peak)
    assert la.fit_memory(train).held == free.held
    if la.settings.magnitudes == "ggn":  # the others hold all factors in the end
        assert limit < 0.6 * free.peak
    assert peak_of(lambda: la.fit(train)) < 1.1 * limit


def test_what_is_stated_holds_if_all_are_decomposed_at_a_time(tmp_path):
    la, train = deep(budget=16)
    stated = []

    def stating(*args):
        stated.append(memory.of_fit(*args))
        return stated[0]

    with mock.patch.object(fitting, "of_fit", stating):
        measured = peak_of(lambda: la.fit(train, checkpoint=tmp_path))
    assert stated[0].decomposed_at_a_time == (11,)
    assert 0.75 * measured < stated[0].peak < 1.25 * measured


def test_rows_of_positions_are_those_that_are_kept(monkeypatch):
    """A column is of all positions together."""
    kept = []
    keep = KeptRows.__init__

    def keeps(self, *known):
        keep(self, *known)
        kept.append(self)

    monkeypatch.setattr(KeptRows, "__init__", keeps)
    torch.manual_seed(0)
    sentences = TensorDataset(torch.randn(24, 20, 4), torch.randint(3, (24, 20)))
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    la = debiased(model, magnitudes="ggn", class_axis=-1)
    stated = la.fit_memory(loader(sentences))
    la.fit(loader(sentences))
    rows = sum(own.num_bytes for own in kept)
    assert rows <= stated.rows < 1.25 * rows
    assert la.fit_memory(loader(sentences)).rows == stated.rows


def test_posteriors_have_the_stated_bytes():
    for settings in SETTINGS.values():
        la, train = deep(**settings)
        stated = la.fit_memory(train).held
        la.fit(train)
        assert stated == pytest.approx(memory._present_bytes(la), rel=0.05)


@pytest.mark.parametrize("name", ["mlp", "cnn-stride-padding", "transformer"])
def test_entries_are_those_of_the_factors(name):
    la = debiased(model_of(name), **TWO_BATCH)
    la.fit(loader(data(name)))
    counted = Entries.of(la.curvature.layers)
    fold = la.curvature.folds[0]
    assert counted.outer == sum(own.gradients.numel() for own in fold)
    inputs = [own.inputs for own in fold if own.inputs is not None]
    assert counted.inner == sum(own.numel() for own in inputs)
    assert counted.spectra == la.n_params


def test_a_limit_that_does_not_hold_is_refused_before_a_pass():
    la, train = deep(fit_memory_limit=2**17)
    with mock.patch.object(sources, "sweep") as sweep:
        for method in (la.fit, la.fit_memory):
            with pytest.raises(ValueError, match="128 KiB does not hold") as error:
                method(train)
    assert not sweep.called
    assert "largest layers are '8' (" in str(error.value)
    la.fit_memory_limit = 2**22
    la.fit(train)


def test_as_text():
    la, train = deep()
    text = str(la.fit_memory(train))
    assert "beside network, data" in text and "in one turn" in text
    la.fit_memory_limit = least(la, train, la.fit_memory(train).peak)
    assert "turns, with passes for each" in str(la.fit_memory(train))
    assert [in_units(k) for k in (2048, 3 * 2**20, 2**31)] == [
        "2 KiB",
        "3 MiB",
        "2 GiB",
    ]


def test_asking_changes_nothing():
    la, train = deep()
    la.fit(train)
    before = {key: value for key, value in vars(la).items() if key != "_backend"}
    la.fit_memory(train)
    assert all(vars(la)[key] is value for key, value in before.items())


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"fit_memory_limit": 0}, ValueError),
        ({"fit_memory_limit": 1.5}, TypeError),
        ({"fit_memory_limit": 2**30, "backend": AsdlGGN}, ValueError),
    ],
)
@pytest.mark.parametrize("subset", SUBSETS)
def test_what_is_no_limit_is_refused(settings, error, subset):
    with pytest.raises(error, match="fit_memory_limit"):
        debiased(network("mlp").float(), subset=subset, **settings)


def test_checkpoints_are_of_the_same_parts(tmp_path):
    points = train("kfac")
    la = posterior("kfac")
    la.fit(loader(points), checkpoint=tmp_path)
    with mock.patch.object(memory, "_next", one_each):
        other = posterior("kfac")
        with pytest.raises(ValueError, match="other settings"):
            other.fit(loader(points), checkpoint=tmp_path)
        for _ in range(2):
            resumed = posterior("kfac")
            resumed.fit(loader(points), checkpoint=tmp_path / "parts")
            assert same(resumed.state_dict(), la.state_dict())
    assert len(list((tmp_path / "parts").glob("*/*-factors.pt"))) == 4
