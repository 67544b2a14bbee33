"""Uncertainty, calibration and reports of labels that are 0 or 1."""

import pickle

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, roc_auc_score
from torch import nn
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MultilabelAUROC

from laplace_debiased import merge
from laplace_debiased.predictive.label_scores import LabelScores
from tests.cases import batch, network
from tests.fits import SUBSETS, debiased, loader, posterior
from tests.posterior.test_labels import BINARY, Y, data, fitted, fitted_pair
from tests.posterior.test_labels import X as TRAIN

X, LABELS = batch("mlp", 80, "bce", seed=5)


def judged(y=LABELS):
    return DataLoader(TensorDataset(X, y), 30)


def by_quadrature(mean, variance):
    """Entropy of the mean probability, and mean entropy, by the trapezoidal rule."""
    z = torch.linspace(-10, 10, 2001).double()
    density = (-z.square() / 2).exp()
    p = (mean[..., None] + variance.sqrt()[..., None] * z).sigmoid()

    def mean_of(values):
        return (values * density).sum(-1) / density.sum()

    def entropy(p):
        return torch.special.entr(p) + torch.special.entr(1 - p)

    return entropy(mean_of(p)), mean_of(entropy(p))


@pytest.mark.parametrize("subset", SUBSETS)
def test_each_label_has_its_uncertainty(subset):
    la = fitted(subset)
    found = la.uncertainty(X)
    assert torch.allclose(found.probabilities, la(X))
    assert torch.equal(found.total, found.aleatoric + found.epistemic)
    total, aleatoric = by_quadrature(found.mean, found.functional_variance)
    assert found.total.shape == LABELS.shape == found.epistemic.shape
    assert (found.total / total - 1).abs().max() < 0.02
    assert (found.aleatoric / aleatoric - 1).abs().max() < 0.02
    ratio = found.epistemic / (total - aleatoric)
    assert (ratio - 1).abs().max() < 0.03


def test_the_uncertainty_of_one_logit_is_that_of_two_classes():
    la, other = (own.uncertainty(X) for own in fitted_pair())
    for name in ("total", "aleatoric", "epistemic"):
        of_label, of_class = getattr(la, name)[:, 0], getattr(other, name)
        assert torch.allclose(of_label, of_class, rtol=0.05)


def test_confident_labels_have_entropies_above_zero():
    la = fitted()
    with torch.no_grad():
        la.model[-1].bias += 40
    found = la.uncertainty(X)
    assert (found.aleatoric >= 0).all() and (found.epistemic >= 0).all()


def test_calibrations_of_one_logit_are_those_of_two_classes():
    la, other = fitted_pair()
    y = LABELS[:, 0]
    chosen = la.calibrate(judged(y), tolerance=0.05)
    expected = other.calibrate(judged(y.long()), tolerance=0.05)
    assert chosen.temperature == pytest.approx(expected.temperature)
    assert chosen.scale == pytest.approx(expected.scale) and chosen.scale > 0
    assert chosen.temperature_error == pytest.approx(expected.temperature_error)
    assert chosen.nll == pytest.approx(expected.nll)
    assert torch.allclose(la(X)[:, 0], other(X)[:, 1])


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("is_soft", [False, True])
def test_calibrated_labels_agree_with_validation_data(subset, is_soft):
    model = network("mlp")
    with torch.no_grad():
        model[-1].weight *= 8  # too confident
    la = fitted(subset, model=model)
    y = 0.1 + 0.8 * LABELS if is_soft else LABELS
    before = binary_cross_entropy_with_logits(model(X), y).item()
    chosen = la.calibrate(judged(y))
    p = la(X)
    after = binary_cross_entropy(p, y)
    assert chosen.temperature > 1.5 and after.item() < before - 0.1
    # all labels of a point together
    assert chosen.nll == pytest.approx(3 * after.item()) and chosen.num_points == 80
    found = la.uncertainty(X)
    assert torch.allclose(found.probabilities, p)
    mean = found.mean / chosen.temperature
    variance = found.functional_variance / chosen.temperature**2
    total, _ = by_quadrature(mean, variance)
    assert (found.total / total - 1).abs().max() < 0.02
    generator = torch.Generator().manual_seed(0)
    for pred_type in ("glm", "nn"):
        options = {"link_approx": "mc", "n_samples": 500, "pred_type": pred_type}
        samples = la(X, generator=generator, **options)
        assert (samples - p).abs().mean() < 0.03


def test_shares_of_the_posterior_scale_samples():
    la = fitted()
    la.calibrate(judged(), tolerance=0.0)
    if la.calibration.scale == 0:
        la.calibrate(judged(), tolerance=10.0)
    spread = la.functional_samples(X, n_samples=4000).var(0)
    found = la.uncertainty(X)
    chosen = la.calibration
    expected = found.functional_variance * chosen.scale / chosen.temperature**2
    assert (spread / expected - 1).abs().mean() < 0.05


def ece(p, y, bins=15):
    total = 0
    for k in range(bins):
        inside = (p > k / bins) & (p <= (k + 1) / bins)
        if inside.any():
            total += inside.mean() * abs(p[inside].mean() - y[inside].mean())
    return total


@pytest.mark.parametrize("subset", SUBSETS)
def test_reports_are_those_by_hand(subset, tmp_path):
    la = fitted(subset)
    foreign = 20 + X
    found = la.report(judged(LABELS.int()), [foreign])
    p, y = la(X).detach().numpy(), LABELS.numpy()
    scores = found.posterior
    assert isinstance(scores, LabelScores) and found.num_points == 80
    right = (p > 0.5) == y
    assert scores.accuracy == pytest.approx(right.mean())
    assert scores.exact_match == pytest.approx(accuracy_score(y, p > 0.5))
    assert scores.nll == pytest.approx(binary_cross_entropy(la(X), LABELS).item())
    assert scores.brier == pytest.approx(((p - y) ** 2).mean())
    assert scores.ece == pytest.approx(ece(p.ravel(), y.ravel()), abs=1e-6)
    each = [ece(p[:, k], y[:, k]) for k in range(3)]
    assert scores.labelwise_ece == pytest.approx(np.mean(each), abs=1e-6)
    assert scores.auroc == pytest.approx(roc_auc_score(y, p))
    confidence = np.maximum(p, 1 - p).ravel()
    wrong = ~right.ravel()[np.argsort(-confidence)]
    risks = np.cumsum(wrong) / np.arange(1, 241)
    assert scores.aurc == pytest.approx(risks.mean())
    assert scores.mistakes == pytest.approx(roc_auc_score(~right.ravel(), -confidence))
    is_foreign = np.repeat([0, 1], 80)
    inside, outside = la.uncertainty(X), la.uncertainty(foreign)
    for name, kind in (("foreign", "total"), ("foreign_epistemic", "epistemic")):
        both = torch.cat([getattr(own, kind).sum(1) for own in (inside, outside)])
        expected = roc_auc_score(is_foreign, both.detach())
        assert getattr(scores, name) == pytest.approx(expected)
    own = binary_cross_entropy_with_logits(la.model(X), LABELS).item()
    assert found.network.nll == pytest.approx(own)
    assert found.network.foreign_epistemic is None
    assert "| exact match |" in found.table()
    axes = found.plot(tmp_path / "report.png").axes
    assert axes[0].get_xlabel() == "probability" and len(axes) == 3


def test_reports_need_labels_and_tell_what_they_can():
    la = fitted()
    with pytest.raises(ValueError, match="Labels must be 0 or 1 to be predicted"):
        la.report(judged(0.5 * LABELS))
    y = torch.ones_like(LABELS)
    y[:, 0] = LABELS[:, 0]
    found = la.report(judged(y)).posterior
    p = la(X).detach()
    assert found.auroc == pytest.approx(roc_auc_score(y[:, 0], p[:, 0]))
    told = (p > 0.5).double()
    found = la.report(judged(told)).posterior
    assert (found.accuracy, found.exact_match, found.mistakes) == (1, 1, None)
    assert la.report(judged(torch.ones_like(LABELS))).posterior.auroc is None


def test_what_has_no_meaning_for_labels_is_refused():
    la = fitted()
    for make in (la.conformal_sets, la.conformal_intervals):
        with pytest.raises(ValueError, match=f"not '{BINARY}'"):
            make(judged())
    with pytest.raises(ValueError, match="`tune_sigma_noise` is for regression"):
        la.optimize_prior_precision(tune_sigma_noise=True)
    with pytest.raises(ValueError, match="Can only change sigma_noise for regress"):
        la.log_marginal_likelihood(sigma_noise=torch.tensor(2.0))


@pytest.mark.parametrize("subset", SUBSETS)
def test_files_and_copies_keep_the_posterior(subset, tmp_path):
    la = fitted(subset)
    la.calibrate(judged())
    la.save(tmp_path / "la.pt")
    again = debiased(network("mlp"), BINARY, subset)
    again.load(tmp_path / "la.pt")
    copied = pickle.loads(pickle.dumps(la))
    for own in (again, copied):
        assert torch.equal(own(X), la(X))
        own.fit(data())
        assert torch.allclose(posterior(own) - posterior(la), torch.zeros(()).double())
    with pytest.raises(ValueError, match="likelihood 'binary_classification', this"):
        debiased(network("mlp"), subset=subset).load(tmp_path / "la.pt")
    other = debiased(network("mlp"), subset=subset)
    other.fit(loader())
    other.save(tmp_path / "other.pt")
    with pytest.raises(ValueError, match="likelihood 'classification', this object"):
        again.load(tmp_path / "other.pt")


def test_batches_and_parts_make_one_posterior():
    model = network("mlp")
    la = debiased(model, BINARY)
    for own in (slice(30), slice(30, 60)):
        la.partial_fit((TRAIN[own], Y[own].int()))
    assert torch.allclose(la.loss, -fitted().log_likelihood)
    parts, merged = [], debiased(model, BINARY)
    for own in (slice(30), slice(30, 60)):
        parts.append(debiased(model, BINARY))
        parts[-1].fit(DataLoader(TensorDataset(TRAIN[own], Y[own]), 7))
    merged.load_state_dict(merge(parts))
    assert torch.allclose(merged.loss, la.loss) and la(X).shape == merged(X).shape


def test_bias_reports_and_memory_need_no_more():
    la = fitted()
    assert la.bias_report(num_directions=3).curvature.own.numel() == 3
    assert la.fit_memory(data()).peak > 0
    assert list(la.curvature_standard_errors) == ["0", "2"]


def test_metrics_take_labels_as_they_are():
    """Some take integers alone."""
    la, metric = fitted(), MultilabelAUROC(3)
    la.optimize_prior_precision(
        method="gridsearch", val_loader=judged(LABELS.long()), loss=metric, grid_size=3
    )
    assert la.prior_precision > 0


class Tokens(nn.Module):
    """Labels of each token, on the last axis."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))

    def forward(self, x):
        return self.net(x)


def tokens(integers=False):
    torch.manual_seed(0)
    x = torch.randn(20, 3, 4).double()
    y = (x[..., :2] + torch.randn(20, 3, 2).double() > 0).double()
    return x, y.long() if integers else y


@pytest.mark.parametrize("integers", [False, True])
def test_labels_may_be_of_positions(integers):
    x, y = tokens(integers)
    model = Tokens().double()
    train = DataLoader(TensorDataset(x, y), 7)
    la = debiased(model, BINARY, class_axis=-1, seed=1)
    la.fit(train)
    expected = binary_cross_entropy_with_logits(model(x), y.double(), reduction="sum")
    assert torch.allclose(la.loss, expected) and la.n_outputs == 2
    chosen = la.calibrate(train)
    assert chosen.num_points == 60
    found = la.uncertainty(x)
    assert found.epistemic.shape == y.shape == la(x).shape
    assert torch.allclose(found.probabilities, la(x))
    report = la.report(train, foreign_loader=[10 * x])
    nll = binary_cross_entropy(la(x), y.double()).item()
    assert report.num_points == 60 and report.posterior.nll == pytest.approx(nll)
    samples = la(x, pred_type="nn", link_approx="mc", n_samples=3)
    assert samples.shape == y.shape
    assert la.predictive_samples(x, pred_type="nn", n_samples=2).shape == (2, *y.shape)
    la.optimize_prior_precision(method="gridsearch", val_loader=train, grid_size=3)
    with pytest.raises(ValueError, match=r"Targets must have shape \[7, 3, 2\]"):
        la.fit(DataLoader(TensorDataset(x, y[..., 0]), 7))


def test_positions_are_labels_without_an_axis():
    """Their likelihood is the same: the curvature is that of a column each."""
    x, y = tokens()
    own = nn.Sequential(Tokens(), nn.Flatten()).double()
    la = debiased(own, BINARY, magnitudes="ggn")
    la.fit(DataLoader(TensorDataset(x, y.flatten(1)), 7))
    traces = []
    for seed in range(20):
        other = debiased(own[0], BINARY, magnitudes="ggn", class_axis=-1, seed=seed)
        other.fit(DataLoader(TensorDataset(x, y), 7))
        traces.append(other.H.to_matrix().trace())
    traces = torch.stack(traces)
    error = (traces.mean() - la.H.to_matrix().trace()).abs()
    assert torch.allclose(other.loss, la.loss)
    assert error < 4 * traces.std() / len(traces) ** 0.5
