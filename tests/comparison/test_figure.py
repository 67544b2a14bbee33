import pytest
from matplotlib.figure import Figure

from laplace_debiased.comparison.experiment import ESTIMATORS, PRIOR_PRECISIONS
from laplace_debiased.comparison.figure import write_figure
from laplace_debiased.comparison.posteriors import FULL_DATA
from tests.comparison.runs import FLAT, LABELS, NLLS, runs


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Write a figure and return its axes."""
    figures = []
    save = Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    def draw(num_seeds):
        monkeypatch.setattr(Figure, "savefig", keep)
        path = tmp_path / "figure.png"
        write_figure(path, runs(num_seeds), LABELS, "digits")
        assert path.read_bytes().startswith(b"\x89PNG")
        return figures[-1].axes

    return draw


def curves(axis):
    """The labelled lines of an axis."""
    return {
        line.get_label(): line.get_ydata().tolist()
        for line in axis.lines
        if not line.get_label().startswith("_")
    }


def test_left_axis_has_mean_nll(draw):
    nll_axis, _, _ = draw(2)
    lines = curves(nll_axis)
    assert list(lines) == list(ESTIMATORS)
    for estimator, nlls in NLLS.items():
        expected = [sum(nlls) / 2] * len(PRIOR_PRECISIONS)
        assert lines[estimator] == pytest.approx(expected)
    for estimator, nll in FLAT.items():
        assert lines[estimator] == pytest.approx([nll] * len(PRIOR_PRECISIONS))


def test_middle_axis_has_differences_of_the_same_seed(draw):
    _, excess_axis, _ = draw(2)
    lines = curves(excess_axis)
    assert lines[FULL_DATA] == [0] * len(PRIOR_PRECISIONS)
    assert lines["single batch"] == pytest.approx([0.15] * len(PRIOR_PRECISIONS))


def test_right_axis_has_a_diagram_for_each_estimator(draw):
    _, _, reliability_axis = draw(2)
    diagonal, *diagrams = reliability_axis.lines
    assert diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]
    assert len(diagrams) == len(ESTIMATORS)


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_bands_need_more_than_one_seed(draw, num_seeds):
    nll_axis, _, _ = draw(num_seeds)
    bands = len(nll_axis.collections)
    assert bands == (0 if num_seeds == 1 else len(ESTIMATORS))
