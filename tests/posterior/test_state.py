import numpy as np
import pytest
import torch
from curvlinops.kfac import KFACType
from laplace import KronLaplace
from laplace.utils.enums import Likelihood
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import merge
from tests.cases import network
from tests.faults import same
from tests.fits import SIZE, SUBSETS, debiased, loader, posterior


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize("structure", ["scalar", "layerwise"])
def test_checkpoints_restore_the_posterior(subset, magnitudes, structure, tmp_path):
    model, train = network("mlp"), loader()
    la = debiased(model, subset=subset, magnitudes=magnitudes)
    la.fit(train)
    la.optimize_prior_precision(prior_structure=structure)
    torch.save(la.state_dict(), tmp_path / "la.pt")
    state_dict = torch.load(tmp_path / "la.pt", weights_only=True)
    restored = debiased(model, subset=subset, magnitudes=magnitudes)
    restored.load_state_dict(state_dict)
    X = train.dataset.tensors[0]
    assert torch.equal(restored(X), la(X))
    assert torch.equal(restored.log_marginal_likelihood(), la.log_marginal_likelihood())
    if subset == "all":
        la.fit(train, override=False)
        restored.fit(train, override=False)
        assert torch.equal(posterior(restored), posterior(la))


def are_plain(values):
    """Whether values are tensors, numbers, texts, or lists and tuples of them."""
    return all(
        are_plain(value)
        if isinstance(value, list | tuple)
        else value is None or isinstance(value, torch.Tensor | int | float | str)
        for value in values
    )


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize("budget", [None, 20])
def test_checkpoints_hold_no_dictionaries(subset, magnitudes, budget):
    la = debiased(network("mlp"), subset=subset, magnitudes=magnitudes, budget=budget)
    la.fit(loader())
    state_dict = la.state_dict()
    assert are_plain(state_dict.values())
    assert state_dict["seen.weight"] == SIZE and state_dict["layers.0.name"]


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"likelihood": "regression"}, "has likelihood 'regression', this object"),
        ({"seen": None}, "lacks"),
        ({"parameters": ["0.weight", "0.bias"]}, "the model|as mean, not"),
    ],
)
def test_refused_checkpoints_leave_the_posterior(subset, change, message):
    model, train = network("mlp"), loader()
    la = debiased(model, subset=subset)
    la.fit(train)
    X = train.dataset.tensors[0]
    before = la(X)
    state_dict = la.state_dict() | change
    if "seen" in change:
        state_dict = {k: v for k, v in state_dict.items() if not k.startswith("seen")}
    if subset == "last_layer" and "parameters" in change:
        state_dict["mean"] = state_dict["mean"][:-1]
        state_dict["parameters"] = la.state_dict()["parameters"]
    with pytest.raises(ValueError, match=message):
        la.load_state_dict(state_dict)
    assert torch.equal(la(X), before)


def test_checkpoints_of_other_kinds_are_refused():
    model, train = network("mlp"), loader()
    la = debiased(model)
    la.fit(train)
    with pytest.raises(ValueError, match="has magnitudes 'kfac', this object 'ggn'"):
        debiased(model, magnitudes="ggn").load_state_dict(la.state_dict())
    with pytest.raises(ValueError, match="has subset_of_weights 'all'"):
        debiased(model, subset="last_layer").load_state_dict(
            la.state_dict() | {"last_layer_name": None}
        )
    reference = KronLaplace(model, "classification")
    reference.fit(train)
    with pytest.raises(ValueError, match="format None, not 6: it is from KronLaplace"):
        la.load_state_dict(reference.state_dict())
    with pytest.raises(ValueError, match="wrong Laplace type"):
        reference.load_state_dict(la.state_dict())
    with pytest.raises(AttributeError, match="not fitted"):
        debiased(model).state_dict()


@pytest.mark.parametrize("subset", SUBSETS)
def test_incomplete_checkpoints_are_refused(subset):
    la = debiased(network("mlp"), subset=subset)
    la.fit(loader())
    state_dict = la.state_dict()
    del state_dict["prior_precision"]
    with pytest.raises(ValueError, match=r"lacks .*'prior_precision'"):
        la.load_state_dict(state_dict)
    for other in ({}, la.model.state_dict()):
        with pytest.raises(ValueError, match=r"has format None, not 6"):
            la.load_state_dict(other)


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_no_entry_may_be_missing_or_unknown(subset, magnitudes):
    la, other = (
        debiased(network("mlp"), subset=subset, magnitudes=magnitudes) for _ in range(2)
    )
    train = loader()
    la.fit(train)
    other.fit(loader(seed=5))
    X = train.dataset.tensors[0]
    state_dict, before = la.state_dict(), other(X)
    changed = [
        {k: v for k, v in state_dict.items() if k != key} for key in state_dict
    ] + [
        state_dict | {key: 1} for key in ("more", "seen.more", "seen", "layers.9.name")
    ]
    for incomplete in changed:
        with pytest.raises(ValueError, match=r"`(state_dict|eigenvalues)`"):
            other.load_state_dict(incomplete)
        assert torch.equal(other(X), before)
    other.load_state_dict(state_dict)
    assert torch.equal(other(X), la(X))


@pytest.mark.parametrize("way", ["load", "resume", "merge"])
def test_another_class_axis_is_refused(way, tmp_path):
    """Where there are as many positions as classes, no shape tells it."""
    data = TensorDataset(torch.randn(20, 3, 4), torch.randint(3, (20, 3)))
    model, train = nn.Linear(4, 3), DataLoader(data, 7)
    la, again, other = (debiased(model, class_axis=axis) for axis in (-1, -1, 1))
    ways = {
        "load": lambda own: own.load_state_dict(la.state_dict()),
        "resume": lambda own: own.fit(train, checkpoint=tmp_path),
        "merge": lambda own: merge([la, own]),
    }
    la.fit(train, checkpoint=tmp_path)
    for own in (again, other):
        own.fit(train)
    before = posterior(other)
    ways[way](again)
    with pytest.raises(ValueError, match=r"class_axis|a fit with other settings"):
        ways[way](other)
    assert torch.equal(posterior(other), before)


@pytest.mark.parametrize("value", [0.0, torch.tensor([0.0, 1.0, 0.0, 2.0])])
def test_a_prior_precision_may_be_zero_but_not_negative(value):
    la, restored = (debiased(network("mlp"), "regression") for _ in range(2))
    train = loader(likelihood="regression")
    la.fit(train)
    la.prior_precision = value
    restored.load_state_dict(la.state_dict())
    X = train.dataset.tensors[0]
    before = la(X)
    assert torch.equal(restored.prior_precision, la.prior_precision)
    assert same(restored(X), before)
    damaged = la.state_dict() | {"prior_precision": la.prior_precision - 1}
    with pytest.raises(ValueError, match="must be finite and at least zero"):
        restored.load_state_dict(damaged)
    assert same(restored(X), before)


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("number", [torch.tensor, np.float32])
def test_a_temperature_of_any_type_is_saved_as_a_number(number, subset, tmp_path):
    la, restored = (
        debiased(network("mlp"), subset=subset, temperature=value)
        for value in (number(2), 1.0)
    )
    train = loader()
    la.fit(train)
    la.save(tmp_path / "la.pt")
    restored.load(tmp_path / "la.pt")
    assert restored.temperature == 2
    X = train.dataset.tensors[0]
    assert torch.equal(restored(X), la(X))


NUMBERS = [
    {"budget": np.int64(20)},
    {"budget": 20, "fisher_rank": np.int64(1), "pool_size": np.int64(40)},
    {"num_folds": np.int64(3), "seed": np.int32(4)},
    {"estimator": "two_batch", "direction_fraction": np.float64(0.3)},
    {"estimator": "two_batch", "direction_fraction": np.float32(0.3)},
    {"class_axis": np.int64(-1)},
]


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_posteriors_of_wrapped_networks_are_those_of_the_network(subset, wrap):
    model, train = network("mlp"), loader()
    la, other = (debiased(own, subset=subset) for own in (wrap(model), model))
    la.fit(train)
    other.load_state_dict(la.state_dict())
    assert torch.equal(posterior(other), posterior(la))
    la.load_state_dict(merge([other, la]))
    assert la.n_data == 2 * SIZE


def test_members_of_enumerations_are_saved_as_their_texts(tmp_path):
    train = loader()
    la = debiased(
        network("mlp"),
        Likelihood.CLASSIFICATION,
        asdl_fisher_kwargs={"kfac_approx": KFACType.EXPAND},
    )
    la.fit(train, checkpoint=tmp_path)
    by_texts = {"asdl_fisher_kwargs": {"kfac_approx": "expand"}}
    other = debiased(network("mlp"), "classification", **by_texts)
    other.load_state_dict(la.state_dict())
    assert torch.equal(posterior(other), posterior(la))
    resumed = debiased(network("mlp"), "classification", **by_texts)
    resumed.fit(train, checkpoint=tmp_path)  # refused if its settings were others
    assert torch.equal(posterior(resumed), posterior(la))


@pytest.mark.parametrize("settings", NUMBERS, ids=lambda own: ", ".join(own))
def test_numbers_of_numpy_are_saved_as_numbers(settings, tmp_path):
    la, restored = (debiased(network("mlp"), **settings) for _ in range(2))
    la.fit(loader())
    if settings.keys() != {"class_axis"}:
        batch = next(iter(loader()))
        la.partial_fit(batch, num_data=np.int64(100), decay=np.float64(0.9))
    la.save(tmp_path / "la.pt")
    restored.load(tmp_path / "la.pt")
    assert torch.equal(restored.H.to_matrix(), la.H.to_matrix())
    assert not any(isinstance(own, np.generic) for own in la.state_dict().values())
