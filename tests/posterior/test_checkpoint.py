"""Files are whole, and what is damaged is refused by its name."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

from tests.cases import batch, network
from tests.faults import same
from tests.fits import SUBSETS, debiased, loader

X, _ = batch("mlp", 5)
KILLED = """
import os, signal, sys, torch
from torch import nn
path, when = sys.argv[1], sys.argv[2]
from laplace_debiased.posterior import checkpoint
def kill(*_): os.kill(os.getpid(), signal.SIGKILL)
save = torch.save
def half(saved, file):
    save(saved, file)
    file.truncate(file.tell() // 2)
    file.flush()
    kill()
if when == "writing":
    torch.save = half
else:
    setattr(os, when, kill)
checkpoint.write({"new": torch.ones(10_000)}, path)
"""


@pytest.mark.parametrize("when", ["writing", "fsync", "replace"])
def test_killed_writers_leave_the_former_file(tmp_path, when):
    path = tmp_path / "la.pt"
    la = debiased(network("mlp"))
    la.fit(loader())
    la.save(path)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path), when])
    assert killed.returncode == -signal.SIGKILL
    restored = debiased(network("mlp"))
    restored.load(path)
    assert torch.equal(restored(X), la(X))


@pytest.mark.parametrize("subset", SUBSETS)
def test_files_restore_the_posterior(tmp_path, subset):
    la = debiased(network("mlp"), subset=subset)
    la.fit(loader())
    la.save(tmp_path / "la.pt")
    la.prior_precision = 3.0
    la.save(tmp_path / "la.pt")
    assert os.listdir(tmp_path) == ["la.pt"]
    restored = debiased(network("mlp"), subset=subset)
    restored.load(tmp_path / "la.pt")
    assert torch.equal(restored(X), la(X))
    content = (tmp_path / "la.pt").read_bytes()
    (tmp_path / "la.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="is no readable checkpoint"):
        restored.load(tmp_path / "la.pt")
    assert torch.equal(restored(X), la(X))


def tampered(value):
    """Yield what a value could be damaged to, of other types, shapes and numbers."""
    if isinstance(value, torch.Tensor):
        yield from (value.tolist(), value[None], value.half(), value * torch.nan)
        yield torch.cat([value.flatten(), value.flatten()])
    elif isinstance(value, list | tuple):
        yield from (None, "x", value[:-1], [*value, "x"], [None] * len(value))
        yield {"x": 1}
    elif isinstance(value, float):
        yield from (str(value), float("nan"), None, [value])
    else:
        yield from (1.5, "x" if value != "x" else "y", [value], torch.ones(7))


def refusal(la, state):
    """Why a posterior refuses a state; None if it takes it over."""
    try:
        la.load_state_dict(state)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize("subset", SUBSETS)
def test_damaged_entries_are_refused_by_name(subset, magnitudes):
    la = debiased(network("mlp"), subset=subset, magnitudes=magnitudes)
    la.fit(loader())
    saved, expected = la.state_dict(), la(X)
    evidence, attributes = la.log_marginal_likelihood(), dict(vars(la))
    num_refused = 0
    for key, value in saved.items():
        dropped = {k: v for k, v in saved.items() if k != key}
        for state in (dropped, *(saved | {key: own} for own in tampered(value))):
            other = debiased(network("mlp"), subset=subset, magnitudes=magnitudes)
            message = refusal(other, state)
            if message is None:
                assert torch.equal(other(X), expected), key
                assert torch.equal(other.log_marginal_likelihood(), evidence), key
            else:
                assert key.partition(".")[0] in message, key
                assert refusal(la, state) is not None
                num_refused += 1
    assert num_refused > 100
    assert vars(la).keys() == attributes.keys()
    assert same(
        {k: id(v) for k, v in attributes.items()},
        {k: id(v) for k, v in vars(la).items()},
    )


class Reordered(nn.Module):
    """Two layers of the same shape, registered in either order."""

    def __init__(self, names):
        super().__init__()
        torch.manual_seed(0)
        layers = {name: nn.Linear(4, 4) for name in ("a", "b")}
        for name in names:
            setattr(self, name, layers[name])
        self.c = nn.Linear(4, 3)
        self.double()

    def forward(self, x):
        return self.c(self.b(self.a(x).tanh()).tanh())


def test_another_order_of_parameters_is_refused():
    la = debiased(Reordered("ab"))
    la.fit(loader())
    with pytest.raises(ValueError, match="has candidates"):
        debiased(Reordered("ba")).load_state_dict(la.state_dict())


def test_a_model_at_other_parameters_is_told():
    la = debiased(network("mlp"))
    la.fit(loader())
    with pytest.warns(UserWarning, match="not those that the saved posterior"):
        debiased(network("mlp", seed=1)).load_state_dict(la.state_dict())
