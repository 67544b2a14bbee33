"""fit(checkpoint=...): a fit that was killed goes on where it stopped."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased.posterior import checkpoint as files
from laplace_debiased.posterior import sources
from tests.cases import network
from tests.fits import SIZE, SUBSETS, debiased, loader, posterior
from tests.ranks import once

SETTINGS = {
    "kfac": {"budget": 20, "pool_size": 40},
    "all points": {},
    "ggn": {"magnitudes": "ggn", "budget": 20, "pool_size": 40},
    "two batches": {"estimator": "two_batch", "sampling": "uniform"},
}
STAGES = {
    "kfac": ["inputs"] * 2 + ["gradients"] * 2 + ["decompose"] * 4,
    "all points": ["factors"] * 2 + ["decompose"] * 3,
    "ggn": ["inputs"] * 2
    + ["gradients"] * 2
    + ["decompose"] * 2
    + ["curvatures", "decompose", "curvatures"],
    "two batches": ["factors"] * 2 + ["decompose"],
}
PROGRAM = """
import os, signal, sys
from tests.posterior.test_resuming import SETTINGS, STAGES, fit_and_die

folder = sys.argv[1]
for name in SETTINGS:
    for number in range(len(STAGES[name])):
        child = os.fork()
        if child == 0:
            fit_and_die(name, f"{folder}/{name}-{number}", number)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
"""


def fitted(name, checkpoint=None, **settings):
    la = debiased(network("mlp"), **SETTINGS[name] | settings)
    la.fit(loader(), checkpoint=checkpoint)
    return la


def fit_and_die(name, folder, number):
    """Fit, and be killed while the result of a stage is put in its place."""
    replace, calls = os.replace, []

    def dying(*args):
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(args)
        replace(*args)

    os.replace = dying
    fitted(name, folder)


def same(la, other):
    X = loader().dataset.tensors[0]
    saved, expected = la.state_dict(), other.state_dict()
    assert saved.keys() == expected.keys()
    for key, value in saved.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, expected[key]), key
        else:
            assert value == expected[key], key
    assert torch.equal(posterior(la), posterior(other))
    assert torch.equal(la(X), other(X))


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folders of fits that were killed at each of their stages."""
    return once(tmp_path_factory, "killed", kill_all)


def kill_all(folder):
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, folder],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
    )
    return folder


@pytest.mark.parametrize("name", SETTINGS)
def test_killed_fits_go_on_where_they_stopped(name, killed, monkeypatch):
    expected = fitted(name)
    done = []
    for kind in ("inputs", "gradients", "factors", "curvatures", "decompose"):
        own = getattr(sources.RowSource, kind)

        def counted(self, *args, own=own, kind=kind):
            done.append(kind)
            return own(self, *args)

        monkeypatch.setattr(sources.RowSource, kind, counted)
    for number in range(len(STAGES[name])):
        folder = killed / f"{name}-{number}"
        assert len(list(folder.glob("*.pt"))) == number
        done.clear()
        la = fitted(name, folder)
        assert done == STAGES[name][number:]
        same(la, expected)
        done.clear()
        same(fitted(name, folder), expected)
        assert not done


@pytest.mark.parametrize("subset", SUBSETS)
def test_checkpoints_do_not_change_a_fit(subset, tmp_path):
    for name in SETTINGS:
        same(fitted(name, tmp_path / name, subset=subset), fitted(name, subset=subset))


def test_stages_can_be_read_without_trust(tmp_path):
    fitted("kfac", tmp_path)
    stages = sorted(tmp_path.iterdir())
    assert [path.stem.split("-")[1] for path in stages] == STAGES["kfac"]
    for path in stages:
        assert torch.load(path, weights_only=True)["identity"].keys() == {
            "data",
            "model",
            "settings",
            "parameters",
            "earlier posterior",
        }


def other_data():
    X, y = loader().dataset.tensors
    return DataLoader(TensorDataset(X + 1e-6, y), batch_size=7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data", "with other data"),
        ("number", "with other data"),
        ("model", "with other model"),
        ("settings", "with other (data and )?settings"),
        ("backend", "with other (data and )?settings"),
        ("earlier", "with other earlier posterior"),
    ],
)
def test_other_fits_are_refused(change, message, tmp_path):
    from laplace.curvature.curvlinops import CurvlinopsEF

    model, train = network("mlp"), loader()
    debiased(model).fit(train, checkpoint=tmp_path)
    settings = {"settings": {"seed": 1}, "backend": {"backend": CurvlinopsEF}}
    la = debiased(model, **settings.get(change, {}))
    la.fit(train)
    if change == "data":
        train = other_data()
    if change == "number":
        train = loader(size=SIZE + 1)
    if change == "model":
        with torch.no_grad():
            next(model.parameters()).mul_(1 + 1e-6)
    before = posterior(la)
    with pytest.raises(ValueError, match=f"is that of a fit {message}"):
        la.fit(train, override=change != "earlier", checkpoint=tmp_path)
    assert torch.equal(posterior(la), before)


def test_further_data_are_resumed(tmp_path):
    model = network("mlp")
    la, other = debiased(model), debiased(model)
    for own, folder in ((la, tmp_path), (other, None)):
        own.fit(loader())
        own.fit(loader(seed=5), override=False, checkpoint=folder)
    same(la, other)


def test_damaged_stages_are_refused(tmp_path):
    fitted("all points", tmp_path)
    last = max(tmp_path.iterdir())
    content = last.read_bytes()
    last.write_bytes(content[:-40])
    with pytest.raises(ValueError, match="no readable checkpoint"):
        fitted("all points", tmp_path)
    files.write({"other": 1}, last)
    with pytest.raises(ValueError, match="is no stage of a fit"):
        fitted("all points", tmp_path)


def test_a_checkpoint_is_of_its_parameters(tmp_path):
    """Two layers of equal shapes may each be the last one."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(4, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)]
    model = torch.nn.Sequential(*layers)
    data = DataLoader(TensorDataset(torch.randn(30, 4), torch.randint(8, (30,))), 10)
    debiased(model, subset="last_layer", last_layer_name="1").fit(
        data, checkpoint=tmp_path
    )
    other = debiased(model, subset="last_layer", last_layer_name="2")
    with pytest.raises(ValueError, match="a fit with other parameters"):
        other.fit(data, checkpoint=tmp_path)
