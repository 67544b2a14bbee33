"""Reports of predictions, by scores that are computed by hand."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader, TensorDataset

from tests.cases import batch, network
from tests.fits import SUBSETS, debiased, loader

X, Y = batch("mlp", 80, seed=5)
FOREIGN = 20 + X


EPISTEMIC = r"$\log_{10}$ of epistemic uncertainty"


def fitted(subset="all", likelihood="classification", **kwargs):
    la = debiased(network("mlp"), likelihood, subset, prior_precision=3.0, **kwargs)
    la.fit(loader(likelihood=likelihood))
    return la


def judged(y=Y):
    """Loader of the points to be judged by."""
    return DataLoader(TensorDataset(X, y), 30)


def ece(confidence, right, bins=15):
    """As it is defined: bin by bin."""
    total = 0
    for k in range(bins):
        inside = (confidence > k / bins) & (confidence <= (k + 1) / bins)
        if inside.any():
            gap = abs(confidence[inside].mean() - right[inside].mean())
            total += inside.mean() * gap
    return total


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("foreign", ["pairs", "inputs alone"])
def test_scores_are_those_by_hand(subset, foreign):
    la = fitted(subset)
    others = [(FOREIGN, Y)] if foreign == "pairs" else FOREIGN.split(20)
    found = la.report(judged(), others)
    p, y = la(X).detach().numpy(), Y.numpy()
    u, f = la.uncertainty(X), la.uncertainty(FOREIGN)
    right = p.argmax(1) == y
    scores, one_hot = found.posterior, np.eye(3)[y]
    assert found.num_points == 80
    assert scores.accuracy == pytest.approx(right.mean())
    assert scores.nll == pytest.approx(-np.log(p[range(80), y]).mean())
    assert scores.brier == pytest.approx(((p - one_hot) ** 2).sum(1).mean())
    assert scores.ece == pytest.approx(ece(p.max(1), right), abs=1e-6)
    classwise = [ece(p[:, k], one_hot[:, k]) for k in range(3)]
    assert scores.classwise_ece == pytest.approx(np.mean(classwise), abs=1e-6)
    order = np.argsort(-p.max(1))
    risks = np.cumsum(~right[order]) / np.arange(1, 81)
    assert scores.aurc == pytest.approx(risks.mean())
    assert scores.mistakes == pytest.approx(roc_auc_score(~right, -p.max(1)))
    is_foreign = np.repeat([0, 1], 80)
    for name, kind in (("foreign", "total"), ("foreign_epistemic", "epistemic")):
        both = torch.cat([getattr(u, kind), getattr(f, kind)]).detach()
        expected = roc_auc_score(is_foreign, both)
        assert getattr(scores, name) == pytest.approx(expected)
    own = la.model(X).softmax(1).detach().numpy()
    assert found.network.nll == pytest.approx(-np.log(own[range(80), y]).mean())
    assert found.network.foreign_epistemic is None
    assert found.curvature_error == max(la.curvature_standard_errors.values())


def test_reports_say_what_they_are_of(tmp_path):
    la = fitted()
    assert "not calibrated" in str(la.report(judged()))
    la.calibrate(loader())
    found = la.report(judged(), [FOREIGN])
    assert str(la.calibration) in str(found)
    assert "| nll |" in found.table()
    figure = found.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 0
    labels = [axis.get_xlabel() for axis in figure.axes]
    assert labels == ["confidence", "coverage", EPISTEMIC]
    without = la.report(judged())
    assert without.posterior.foreign is None
    assert len(without.plot().axes) == 3


def test_foreign_inputs_may_be_given_in_any_form():
    la = fitted()
    own = DataLoader(TensorDataset(FOREIGN), 30)
    pairs = [(FOREIGN[:0], None), (FOREIGN, ["a name"] * len(FOREIGN))]
    expected = la.report(judged(), foreign_loader=[FOREIGN]).posterior.foreign
    for foreign in (own, pairs):
        assert la.report(judged(), foreign_loader=foreign).posterior.foreign == expected


def test_what_cannot_be_told_is_none():
    la = fitted()
    right = la(X).argmax(1)
    found = la.report(judged(right)).posterior
    assert (found.accuracy, found.aurc, found.mistakes) == (1, 0, None)
    single = la.report([(X[:1], right[:1])])
    assert single.num_points == 1
    ignored = la.report([(X, torch.where(torch.arange(80) < 30, right, -100))])
    assert (ignored.num_points, ignored.posterior.accuracy) == (30, 1)
    with pytest.raises(ValueError, match="no points"):
        la.report([(X, torch.full_like(Y, -100))])
    with pytest.raises(ValueError, match="no points"):
        la.report([])
    with pytest.raises(ValueError, match="class indices"):
        la.report([(X, torch.rand(80, 3).double().softmax(1))])
    with pytest.raises(AttributeError, match="not fitted"):
        debiased(network("mlp")).report(judged())


def test_scores_of_a_regression_are_those_by_hand(tmp_path):
    la = fitted(likelihood="regression", sigma_noise=0.7)
    X, y = batch("mlp", 80, "mse", seed=6)
    found = la.report([(X, y)], [FOREIGN])
    assert "Probabilities" not in str(found)
    mean, variance = (part.detach() for part in la(X, diagonal_output=True))
    total = variance + 0.49
    z = ((y - mean) / total.sqrt()).abs()
    scores = found.posterior
    assert scores.rmse == pytest.approx((y - mean).square().mean().sqrt().item())
    nll = torch.nn.functional.gaussian_nll_loss(mean, y, total, full=True)
    assert scores.nll == pytest.approx(nll.item())
    assert scores.coverage_95 == pytest.approx((z < 1.959964).double().mean().item())
    assert scores.coverage_50 == pytest.approx((z < 0.674490).double().mean().item())
    assert scores.width_95 == pytest.approx(2 * 1.959964 * total.sqrt().mean().item())
    assert scores.foreign_epistemic > 0.9
    assert found.network.width_95 == pytest.approx(2 * 1.959964 * 0.7)
    axes = found.plot(tmp_path / "report.png").axes
    assert [axis.get_xlabel() for axis in axes] == ["level", EPISTEMIC]
