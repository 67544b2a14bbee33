"""What benchmarks measure on, and which of their measurements are kept."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from tests.test_benchmarks import FOLDER


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)


def test_corrupted_images_have_the_scale_of_the_others(monkeypatch):
    import calibrated_predictions as study

    images, labels = torch.rand(30, 1, 4, 4), torch.arange(30) % 10
    scale = images.mean(), images.std()
    monkeypatch.setattr(study, "raw_images", lambda *_, **__: (images, labels))
    monkeypatch.setattr(study, "scale_of", lambda *_: scale)
    monkeypatch.setattr(study, "CORRUPTIONS", dict.fromkeys("ab", lambda X, _: X))
    monkeypatch.setattr(study, "FIRST_IMAGE", 5)
    loaded = study.Images.load("mnist", Path("unused"), 20, 6)
    own, y = (part[:6] for part in loaded.own)
    assert loaded.corrupted.keys() == set(study.SEVERITIES)
    for corrupted in loaded.corrupted.values():
        assert torch.equal(corrupted, torch.cat([own, own]))
    assert torch.equal(loaded.shifted_labels, torch.cat([y, y]))
    assert torch.equal(loaded.foreign, (images[5:25] - scale[0]) / scale[1])


@pytest.fixture
def problem():
    from shared.networks import mlp
    from shared.problems import Problem

    X, y = torch.randn(60, 6), torch.randint(3, (60,))
    model = mlp((5,), inputs=6, classes=3)
    return Problem(model, TensorDataset(X, y), X[:20], y[:20], "net", "toy")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["inputs", "labels"])
def test_references_are_kept_for_the_images_they_are_of(
    problem, name, monkeypatch, tmp_path
):
    from shared import fits

    monkeypatch.setattr(fits, "CACHE", tmp_path)
    other = replace(problem, **{name: getattr(problem, name).flip(0)})
    (own, _), (found, _) = (fits.references(part) for part in (problem, other))
    assert len(list(tmp_path.glob("references-*"))) == 2
    assert len(list(tmp_path.glob("factors-*"))) == 1  # of the training points
    expected, _ = fits.references(other, keep=False)
    for kind, result in expected.items():
        assert found[kind].nll == pytest.approx(result.nll) != own[kind].nll
    # read again, times included
    assert fits.references(problem)[0] == own and fits.references(other)[0] == found
