"""A pass never stops to look at what the device computes: only its end does."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased.rows import inputs
from laplace_debiased.rows.inputs import Requirements, moved, require
from tests.cases import batch, network
from tests.fits import debiased

# operators whose results, or shapes of results, are values that the host waits for
LOOKS = {
    "_local_scalar_dense",
    "_unique2",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_dim",
}
NAMES = ["mlp", "cnn-groups", "conv-transpose-2d", "resnet", "transformer", "recurrent"]
FEW, MANY, BATCH = 48, 128, 16


class Looks(TorchDispatchMode):
    """Counts the operators that a GPU's queue would be emptied for."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        is_masked = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], list | tuple) else ())
        )
        if name in LOOKS or is_masked:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def like_a_gpu(monkeypatch):
    """No device's results are there at once."""
    monkeypatch.setattr(inputs, "_AT_ONCE", ())


def looks_of_fit(name, size, **options):
    """Fit, and return what it looks at, and the posterior."""
    X, y = batch(name, size, dtype=torch.float32)
    la = debiased(network(name, dtype=torch.float32), **options)
    with Looks() as looks:
        la.fit(DataLoader(TensorDataset(X, y), BATCH))
    return looks.counts, la


def test_looks_are_counted():
    x = torch.arange(4.0)
    with Looks() as looks:
        x[x > 1], x[torch.tensor([1])], bool(x.any()), x.sum().item(), x.nonzero()
    # a mask is turned into indices by a further operator
    assert looks.counts["_local_scalar_dense"] == 2
    assert looks.counts["nonzero"] >= 1
    assert looks.counts["index"] == 1


@pytest.mark.filterwarnings("ignore:.*standard error")
@pytest.mark.parametrize(
    "options",
    [{}, {"budget": 32, "magnitudes": "ggn"}],
    ids=str,
)
@pytest.mark.parametrize("name", NAMES)
def test_fits_look_as_often_for_many_batches(like_a_gpu, name, options):
    few, _ = looks_of_fit(name, FEW, **options)
    many, _ = looks_of_fit(name, MANY, **options)
    # eigenvalues of nought are sought in matrices, the number of which is the same
    few.pop("nonzero", None), many.pop("nonzero", None)
    assert 0 < many.total() <= few.total() + 5


@pytest.mark.parametrize("kind", ["probit", "mc"])
@pytest.mark.parametrize("name", NAMES)
def test_predictions_look_as_often_for_many_inputs(name, kind):
    _, la = looks_of_fit(name, FEW)
    counts = []
    for size in (2, 30):
        X, _ = batch(name, size, dtype=torch.float32)
        with Looks() as looks:
            la(X, link_approx=kind)
        counts.append(looks.counts)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("position", [3, 40])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda X, y, k: X[k].fill_(torch.nan), "Inputs contain NaN"),
        (lambda X, y, k: X[k].fill_(1e38), "output contains NaN"),
        (lambda X, y, k: y[k].fill_(7), r"lie in 0..2.*got 0..7"),
    ],
    ids=["inputs", "output", "targets"],
)
def test_what_is_not_valid_is_still_refused(like_a_gpu, position, change, message):
    X, y = batch("mlp", FEW, dtype=torch.float32)
    change(X, y, position)
    la = debiased(network("mlp", dtype=torch.float32))
    with torch.no_grad():
        la.model[0].weight.mul_(1e3)
    with pytest.raises(ValueError, match=message):
        la.fit(DataLoader(TensorDataset(X, y), BATCH))


@pytest.mark.parametrize("at_once", [("cpu",), ()])
def test_the_first_requirement_counts(monkeypatch, at_once):
    monkeypatch.setattr(inputs, "_AT_ONCE", at_once)
    requirements = Requirements()
    with pytest.raises(ValueError, match=r"^second$"):
        for holds, message in ((True, "first"), (False, "second"), (False, "third")):
            requirements.add(torch.tensor(holds), lambda message=message: message)
        requirements.check()
    require(torch.tensor(True), lambda: "never")


def test_posteriors_are_the_same_wherever_requirements_are_looked_at(monkeypatch):
    _, at_once = looks_of_fit("mlp", FEW)
    monkeypatch.setattr(inputs, "_AT_ONCE", ())
    _, later = looks_of_fit("mlp", FEW)
    assert torch.equal(at_once.H.to_matrix(), later.H.to_matrix())
    assert at_once.loss == later.loss


def test_copies_to_a_gpu_are_not_waited_for_but_those_to_the_host_are():
    kinds = []

    class Recorder:
        def to(self, device, non_blocking):
            kinds.append((device.type, non_blocking))
            return torch.zeros(1)

    for name in ("cuda", "cpu", "mps"):
        moved(Recorder(), torch.device(name))
    assert kinds == [("cuda", True), ("cpu", False), ("mps", False)]
