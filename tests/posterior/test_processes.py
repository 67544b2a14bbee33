"""Fits by several processes of torch.distributed."""

import os
import signal
import time
from collections import Counter
from importlib import import_module
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from laplace_debiased.posterior import fitting, laplace, sources
from laplace_debiased.sampling.processes import Group, divided
from tests import dense, zoo
from tests.cases import batch, network
from tests.fits import debiased
from tests.posterior.test_positions import Tagger, tokens
from tests.ranks import once, run

SIZE = 37  # batches of 5 and 2
FITS = {
    "kfac": ("mlp", {}),
    "budget": ("cnn-stride-padding", {"budget": 16, "pool_size": 30}),
    "thinned": ("cnn-padding", {"budget": 16, "pool_size": 30}),
    "reduce": ("cnn-padding", {"asdl_fisher_kwargs": {"kfac_approx": "reduce"}}),
    "ggn": ("mlp", {"magnitudes": "ggn", "budget": 16}),
    "ggn of kept rows": ("mlp", {"magnitudes": "ggn"}),
    "no rows kept": ("mlp", {"magnitudes": "ggn", "memory_limit": 1}),
    "layer by layer": ("mlp", {"magnitudes": "ggn", "fit_memory_limit": 3500}),
    "two batches": ("mlp", {"estimator": "two_batch", "direction_fraction": "auto"}),
    "sampled": ("mlp", {"backend_kwargs": {"stochastic": True}}),
    "fewer columns": ("mlp", {"fisher_rank": 1, "budget": 16}),
    "last layer": ("mlp", {"subset": "last_layer"}),
    "three folds": ("transformer", {"num_folds": 3}),
    "embeddings": ("decoder, causal", {"budget": 16}),
    "embeddings, ggn": ("decoder, causal", {"magnitudes": "ggn"}),
    "positions": ("tokens", {"class_axis": -1, "budget": 16}),
}


def data(name, size=SIZE):
    if name == "tokens":
        return TensorDataset(*tokens(size))
    of = zoo.data if name in zoo.ZOO else batch
    return TensorDataset(*of(name, size))


def model_of(name):
    if name == "tokens":
        return Tagger()
    return zoo.build(name) if name in zoo.ZOO else network(name)


def loader(dataset, **options):
    return DataLoader(dataset, **{"batch_size": 5} | options)


def summary(la, X):
    """What must be the same on all ranks, and near that of a single process."""
    la.prior_precision = 2.0
    _, variances = la._glm_predictive_distribution(X, diagonal_output=True)
    error = la.sampling_error
    return {
        "factors": [own.map(torch.clone) for own in factors(la)],
        "matrix": la.H.to_matrix(),
        "variances": variances,
        "loss": la.loss,
        "error": error.covariance,
        "state": la.state_dict(),
    }


def factors(la):
    curvature = la.curvature
    if la.settings.magnitudes == "ggn":
        return curvature.factors()
    return [own for fold in curvature.folds for own in fold]


def fitted(name, wrap=nn.Module.eval, sampler=None, double=True):
    case, settings = FITS[name]
    model = model_of(case)
    model = model.double() if double else model.float()
    la = debiased(wrap(model), **settings)
    dataset = data(case)
    if not double:
        X, y = dataset.tensors
        X = X.float() if X.is_floating_point() else X
        dataset = TensorDataset(X, y)
    la.fit(loader(dataset, sampler=sampler and sampler(dataset)))
    return summary(la, dataset.tensors[0])


def fits(_rank, _folder):
    return {name: single(name) for name in FITS}


def some_fits(_rank, _folder):
    return {name: single(name) for name in list(FITS)[::2]}


def single(name, **options):
    torch.manual_seed(0)
    return fitted(name, **options)


def same(found, other):
    """Whether nested results have the same bits."""
    if isinstance(found, torch.Tensor):
        return torch.equal(found, other)
    if isinstance(found, dict):
        return found.keys() == other.keys() and all(
            same(found[key], other[key]) for key in found
        )
    if isinstance(found, list | tuple):
        return len(found) == len(other) and all(map(same, found, other))
    if hasattr(found, "tensors"):
        return same(found.tensors(), other.tensors())
    return found == other


def check_near(found, expected, factor=1e-12, variance=1e-8):
    for own, exact in zip(found["factors"], expected["factors"], strict=True):
        for a, b in zip(own.tensors(), exact.tensors(), strict=True):
            assert dense.relative_error(a, b) <= factor
    assert dense.relative_error(found["variances"], expected["variances"]) <= variance
    assert dense.relative_error(found["matrix"], expected["matrix"]) <= variance
    assert torch.allclose(found["loss"], expected["loss"], rtol=10 * factor)
    assert torch.allclose(found["error"], expected["error"], rtol=variance)


def parts_of_the_data(_rank, _folder):
    """Loaders that each yield a part of the points, twice some of them."""
    return {
        "sampled": single("kfac", sampler=DistributedSampler),
        "single": single("kfac", double=False),
        "listed": listed(DistributedSampler),
    }


def listed(sampler=None):
    """A fit to what a batch sampler of the user's own yields."""
    dataset = data("mlp")
    indices = list(sampler(dataset) if sampler else range(SIZE))
    batches = [indices[k : k + 5] for k in range(0, len(indices), 5)]
    torch.manual_seed(0)
    la = debiased(network("mlp"))
    la.fit(DataLoader(dataset, batch_sampler=batches))
    return la.H.to_matrix()


def few_points(_rank, _folder):
    """A fold has fewer points than there are processes, and batches even fewer."""
    torch.manual_seed(0)
    model, found = network("mlp"), {}
    for name, settings in FEW_POINTS.items():
        la = debiased(model, **settings)
        la.fit(loader(data("mlp", 5)))
        found[name] = la.H.to_matrix()
    return found


FEW_POINTS = {
    "by points": {},
    "by batches": {"backend_kwargs": {"stochastic": True}},
    "ggn": {"magnitudes": "ggn"},
}


def wrapped(_rank, _folder):
    """A model as training leaves it."""
    found = single("kfac", wrap=nn.parallel.DistributedDataParallel)
    return found["matrix"], list(found["state"])


def stream(rank, _folder):
    """Each rank has a batch of its own, and then all have the same one."""
    batches = [batch("mlp", 9 + k, seed=k) for k in range(5)]
    return streamed(batches[rank], batches[4])


def streamed(first, last):
    torch.manual_seed(0)
    la = debiased(network("mlp"))
    la.partial_fit(first)
    la.partial_fit(last, decay=0.5)
    return la.H.to_matrix(), la.n_data


def calibrated(rank, _folder):
    """Each rank has a share of the validation data, and predicts alone; or has all."""
    X, y = batch("mlp", 60, seed=3)
    la = calibration_by(TensorDataset(X[rank::4], y[rank::4]))
    of_shares, alone = la.calibration, la(X[:5]) if rank == 2 else None
    return of_shares, alone, la.calibrate(loader(TensorDataset(X, y)))


def calibration_by(dataset):
    torch.manual_seed(0)
    la = debiased(network("mlp"))
    la.fit(loader(data("mlp")))
    la.calibrate(loader(dataset))
    return la


class Poisoned(TensorDataset):
    """One point of it cannot be read."""

    def __getitem__(self, index):
        if index == 3:
            raise OSError("point 3 is damaged")
        return super().__getitem__(index)


def failing(rank, _folder):
    """What the ranks raise, and whether posterior and model are as before."""
    torch.manual_seed(0)
    model, train = network("mlp"), data("mlp")
    la = debiased(model)
    la.fit(loader(train))
    before, found = la.state_dict(), {}

    def attempt(name, method, *args, **kwargs):
        try:
            method(*args, **kwargs)
        except Exception as error:
            unchanged = same(la.state_dict(), before) and model.training is False
            found[name] = (type(error).__name__, str(error), unchanged)

    poisoned = Poisoned(*train.tensors) if rank == 1 else train
    attempt("in a pass", la.fit, loader(poisoned))
    attempt("before", la.fit, loader(train), override="no" if rank == 2 else True)
    attempt("early", la.fit, None if rank == 0 else loader(train))
    other = TensorDataset(train.tensors[0], train.tensors[1].roll(rank))
    attempt("other data", la.fit, loader(other))
    attempt("an iterable", la.fit, list(loader(train)))
    X, y = train.tensors
    attempt("stream", la.partial_fit, (X, y), decay=1.0 if rank else 2.0)
    attempt("calibration", la.calibrate, loader(poisoned), optimize_prior=False)
    weight = next(model.parameters())
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.add_(rank == 3)
    attempt("other model", la.fit, loader(train))
    with torch.no_grad():
        weight.copy_(kept)
    la.fit(loader(train))
    found["at last"] = same(la.state_dict(), before)
    return found


def resumed(rank, folder):
    """The first process alone reads and writes a checkpoint."""
    torch.manual_seed(0)
    model, path = network("mlp"), folder / f"stages-{rank}"
    first, again = (debiased(model, budget=16) for _ in range(2))
    for la in (first, again):
        la.fit(loader(data("mlp")), checkpoint=path)
    return first.H.to_matrix(), again.H.to_matrix(), path.exists()


def killed(rank, _folder):
    """One rank is gone in the midst of a fit."""
    torch.manual_seed(0)
    la = debiased(network("mlp"))
    la.fit(loader(data("mlp")))
    before = la.state_dict()
    factors_of = sources.RowSource.factors

    def dying(self, fold, seed):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return factors_of(self, fold, seed)

    sources.RowSource.factors = dying
    start = time.monotonic()
    try:
        la.fit(loader(data("mlp")))
    except Exception as error:
        unchanged = same(la.state_dict(), before)
        return type(error).__name__, str(error), unchanged, time.monotonic() - start
    return None


class Counting(Group):
    """Counts the bytes of what is exchanged."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def totals(self, tensors):
        self.bytes["sums"] += sum(own.nbytes for own in tensors)
        return super().totals(tensors)

    def _from(self, owner, tensor):
        self.bytes["eigenvectors"] += tensor.nbytes
        return super()._from(owner, tensor)

    def gathered(self, value, device="cpu"):
        found = super().gathered(value, device)
        entries = [value for own in found for value in vars(own).values()]
        tensors = [own for own in entries if isinstance(own, torch.Tensor)]
        self.bytes["points"] += sum(own.nbytes for own in tensors if own.ndim)
        return found


def counted(_rank, _folder):
    """What is exchanged in a fit, and what the network is like."""
    torch.manual_seed(0)
    layers = [nn.Linear(d_in, d_out) for d_out, d_in in SHAPES]
    X, y = torch.randn(60, SHAPES[0][1]), torch.randint(SHAPES[-1][0], (60,))
    la = debiased(nn.Sequential(*layers), budget=16, pool_size=60, num_folds=3)
    group = Counting()
    with (
        mock.patch.object(laplace, "present_group", return_value=group),
        mock.patch.object(fitting, "check_same_fit"),
    ):
        la.fit(loader(TensorDataset(X, y)))
    return dict(group.bytes)


SHAPES = [(40, 24), (32, 40), (5, 32)]


def other_backend(_rank, _folder):
    """Each process does all of the work of a backend that has no rows."""
    from laplace.curvature import AsdlGGN

    torch.manual_seed(0)
    la = debiased(network("mlp").float(), backend=AsdlGGN)
    X, y = data("mlp").tensors
    la.fit(loader(TensorDataset(X.float(), y), sampler=None))
    return la.H.to_matrix()


def sharded(_rank, _folder):
    """A model whose parameters are divided among the processes."""
    model = network("mlp")
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(ValueError, match="FSDP") as error:
        debiased(model)
    return str(error.value)


TWO = [fits, wrapped, resumed, other_backend, sharded, counted, killed]
FOUR = [parts_of_the_data, few_points, stream, calibrated, failing]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    return once(tmp_path_factory, "two", lambda folder: run(TWO, 2, folder))


@pytest.fixture(scope="module")
def fits_of_four(tmp_path_factory):
    return once(tmp_path_factory, "fits", lambda folder: run([some_fits], 4, folder))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return once(tmp_path_factory, "four", lambda folder: run(FOUR, 4, folder))


@pytest.mark.parametrize(
    ("ranks", "kind"), [("of_two", "fits"), ("fits_of_four", "some_fits")]
)
def test_all_ranks_have_the_posterior_of_a_single_process(ranks, kind, request):
    found = request.getfixturevalue(ranks)[kind]
    assert all(own.keys() == found[0].keys() for own in found)
    for name, first in found[0].items():
        for other in found[1:]:
            assert same(first, other[name]), name
        check_near(first, single(name))


def test_loaders_of_parts_are_loaders_of_all(found):
    ranks = found["parts_of_the_data"]
    assert all(same(ranks[0], other) for other in ranks[1:])
    check_near(ranks[0]["sampled"], single("kfac"))
    assert dense.relative_error(ranks[0]["listed"], listed()) < 1e-8


def test_single_precision(found):
    expected = single("kfac", double=False)
    check_near(found["parts_of_the_data"][0]["single"], expected, 1e-5, 1e-4)


def test_processes_may_have_nothing_to_do(found):
    ranks = found["few_points"]
    assert all(same(ranks[0], other) for other in ranks[1:])
    for name, matrix in few_points(0, None).items():
        assert dense.relative_error(ranks[0][name], matrix) < 1e-8, name


def test_wrapped_models_are_unwrapped(of_two):
    expected = single("kfac")
    for matrix, names in of_two["wrapped"]:
        assert dense.relative_error(matrix, expected["matrix"]) < 1e-8
        assert names == list(expected["state"])


def test_streams_of_all_ranks_count_together(found):
    parts = [batch("mlp", 9 + k, seed=k) for k in range(5)]
    whole = [torch.cat(own) for own in zip(*parts[:4], strict=True)]
    matrix, num_data = streamed(whole, parts[4])
    for own, count in found["stream"]:
        assert count == num_data == (9 + 10 + 11 + 12) / 2 + 13
        assert dense.relative_error(own, matrix) < 1e-8


def test_calibration_is_that_of_all_validation_data(found):
    expected = calibration_by(TensorDataset(*batch("mlp", 60, seed=3)))
    shares, (_, _, alone, _), all_data = zip(*found["calibrated"], strict=True)
    for own in (*shares, *all_data):
        assert own.num_points == 60
        assert own.temperature == pytest.approx(
            expected.calibration.temperature, rel=1e-6
        )
    X, _ = batch("mlp", 60, seed=3)
    assert torch.allclose(alone, expected(X[:5]), rtol=1e-6)


FAILURES = {  # what happens to the rank that fails, and what the others are told
    "in a pass": (1, "OSError", "point 3 is damaged"),
    "before": (2, "TypeError", "`override` must be a bool"),
    "early": (0, "ValueError|TypeError|AttributeError", ""),
    "stream": (0, "ValueError", "`decay` must lie in"),
    "calibration": (1, "OSError", "point 3 is damaged"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_on_one_rank_ends_the_fit_on_all(name, found):
    failed, kinds, message = FAILURES[name]
    for rank, ends in enumerate(found["failing"]):
        kind, text, unchanged = ends[name]
        assert unchanged
        assert message in text
        if rank == failed:
            assert kind in kinds
        else:
            assert kind == "ProcessError"
            assert f"rank {failed} failed" in text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other data", "The processes have different data"),
        ("other model", "The processes have different model"),
        ("an iterable", "cannot be divided among processes"),
    ],
)
def test_what_cannot_be_shared_is_refused_on_all_ranks(name, message, found):
    for ends in found["failing"]:
        kind, text, unchanged = ends[name]
        assert (kind, unchanged) == ("ValueError", True)
        assert message in text


def test_after_failures_all_ranks_fit(found):
    assert all(ends["at last"] for ends in found["failing"])


def test_checkpoints_of_several_processes(of_two):
    for rank, (first, again, exists) in enumerate(of_two["resumed"]):
        assert torch.equal(first, again)
        assert exists == (rank == 0)


def test_a_killed_rank_ends_the_fit_on_all(of_two):
    (kind, text, unchanged, seconds), nothing = of_two["killed"]
    assert nothing is None
    assert kind == "ProcessError" and "another one is gone" in text
    assert unchanged and seconds < 10


def test_other_backends_do_all_in_each_process(of_two):
    first, second = of_two["other_backend"]
    assert torch.equal(first, second)
    assert torch.equal(first, other_backend(0, None))


def test_models_in_parts_are_refused(of_two):
    for text in of_two["sharded"]:
        assert "divided among processes" in text and "'0.weight'" in text


def test_as_much_is_exchanged_as_the_cost_model_says(of_two, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    study = import_module("scaling_over_processes")
    expected = study.exchanged(SHAPES, budget=16, pool=60, folds=3)
    assert of_two["counted"] == [expected, expected]


def test_work_is_divided_by_cost():
    assert divided([1, 8, 3, 4], 2) == [1, 0, 1, 1]
    assert divided([5], 3) == [0]
    assert divided([], 2) == []
    costs = [k**3 for k in range(1, 60)]
    loads = [0] * 4
    for cost, owner in zip(costs, divided(costs, 4), strict=True):
        loads[owner] += cost
    assert max(loads) < 1.01 * sum(costs) / 4


def test_results_do_not_depend_on_the_processes_by_chance():
    """Other points, or other random numbers, are told apart by the tests above."""
    for name in ("sampled", "thinned"):
        expected, other = single(name), FITS[name]
        FITS[name] = (other[0], other[1] | {"seed": 1})
        try:
            with pytest.raises(AssertionError):
                check_near(single(name), expected)
        finally:
            FITS[name] = other
