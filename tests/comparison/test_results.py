import json

import torch
from torch.utils.data import TensorDataset

from laplace_debiased.comparison.data import TrainTestSplit
from laplace_debiased.comparison.report import table
from laplace_debiased.comparison.results import write_results
from tests.comparison.runs import LABELS, runs


def test_results_are_written_and_described(tmp_path):
    train = TensorDataset(torch.zeros(50, 2), torch.zeros(50))
    data = TrainTestSplit(train, torch.zeros(3, 2), LABELS)
    text = write_results(tmp_path, runs(2), data, "digits", budget=40)
    assert text.startswith(
        "digits: 40 training points, 10 validation points, 3 test points\n"
    )
    assert table(runs(2)) in text
    assert (tmp_path / "digits.md").read_text() == table(runs(2)) + "\n"
    assert str(tmp_path / "digits.png") in text
    assert (tmp_path / "digits.png").stat().st_size > 0
    numbers = json.loads((tmp_path / "digits.json").read_text())
    settings = {
        "training_points": 40,
        "validation_points": 10,
        "test_points": 3,
        "budget": 40,
        "seeds": 2,
    }
    assert settings.items() <= numbers.items()
