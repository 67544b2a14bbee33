"""Each option of a loss is honoured, or refused by its name."""

import pytest
import torch
from laplace.curvature import AsdlGGN
from torch import nn

from laplace_debiased import (
    DebiasedKFACLinearOperator,
    bias_report,
    curvature_scores,
    directional_derivatives,
)
from laplace_debiased.quadratics.gram import ggn_rows
from laplace_debiased.rows.output_curvature import OutputCurvature
from tests import dense
from tests.cases import NUM_OUTPUTS, batch, network, split
from tests.fits import debiased, posterior
from tests.quadratics.test_derivatives import CASES, dense_gradient_and_curvature

SIZE = 20
OPTIONS = [
    {"ignore_index": 1},
    {"ignore_index": -100},
    {"label_smoothing": 0.2},
    {"ignore_index": 2, "label_smoothing": 0.2},
]


def problem(ignore_index=-100):
    """Some targets are ignored, all of the first batch of five among them."""
    model = network("mlp")
    X, y = batch("mlp", SIZE)
    y[:7] = ignore_index
    return model, list(model.parameters()), X, y


def data_of(options):
    return problem(options.get("ignore_index", -100))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_directional_derivatives(options, kind, mode, reduction):
    model, params, X, y = data_of(options)
    loss = nn.CrossEntropyLoss(reduction=reduction, **options)
    D = torch.randn(sum(p.numel() for p in params), 4, dtype=torch.float64)
    gradient, H = dense_gradient_and_curvature(model, params, loss, X, y, kind)
    measured = directional_derivatives(
        model, loss, params, split(X, y, 5, 15), D, curvature=kind, mode=mode
    )
    assert torch.allclose(measured.slope, D.T @ gradient, rtol=1e-9, atol=1e-11)
    assert torch.allclose(measured.curvature, (D * (H @ D)).sum(0), rtol=1e-9)
    assert not measured.curvatures[:7].any()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_operators_trace_is_that_of_autograd(options, reduction):
    model, params, X, y = data_of(options)
    loss = nn.CrossEntropyLoss(reduction=reduction, **options)
    gradient, H = dense_gradient_and_curvature(model, params, loss, X, y, "ggn")
    operator = DebiasedKFACLinearOperator(
        model,
        loss,
        params,
        split(X, y, 5, 15),
        split(X, y, 5, 15),
        magnitudes="ggn",
    )
    assert torch.allclose(operator.trace, H.trace(), rtol=1e-9)
    gradients, value = operator.gradient_and_loss()
    flat = torch.cat([part.flatten() for part in gradients])
    assert torch.allclose(flat, gradient, rtol=1e-9, atol=1e-12)
    assert torch.allclose(value, loss(model(X), y))
    rows = ggn_rows(model, loss, params, split(X, y, 5, 15))
    assert dense.relative_error(rows.T @ rows, H) < 1e-9


@pytest.mark.parametrize("fisher_type", ["type-2", "mc", "empirical"])
@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_ignored_examples_are_as_if_they_were_not_there(
    magnitudes, reduction, fisher_type
):
    model, params, X, y = problem()
    model.double()
    loss = nn.CrossEntropyLoss(reduction=reduction)

    def matrix(*data):
        operator = DebiasedKFACLinearOperator(
            model,
            loss,
            params,
            [data],
            [data],
            magnitudes=magnitudes,
            fisher_type=fisher_type,
        )
        if fisher_type == "mc":
            operator._output_curvature = Certain(loss)
        return operator @ torch.eye(operator.shape[0], dtype=torch.float64)

    assert dense.relative_error(matrix(X, y), matrix(X[7:], y[7:])) < 1e-9


class Certain(OutputCurvature):
    """Samples the same label for each example."""

    def __init__(self, loss):
        super().__init__(loss, "mc")

    def _sample(self, output, generator):
        return torch.ones(len(output), dtype=torch.long)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_sampled_labels_are_not_smoothed(smoothing):
    f = torch.randn(4, NUM_OUTPUTS, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, -100])
    loss = nn.CrossEntropyLoss(reduction="sum", label_smoothing=smoothing)
    generator = torch.Generator().manual_seed(0)
    columns = OutputCurvature(loss, "mc", mc_samples=8_000).columns(f, y, generator)
    sampled = torch.einsum("knc,knd->ncd", columns, columns)
    hessian = torch.func.hessian(lambda f: loss(f, y))(f)
    for n in range(4):
        assert torch.allclose(sampled[n], hessian[n, :, n], atol=0.03)


def test_scores_of_ignored_examples_are_zero():
    model, _, X, y = problem(1)
    loss, counted = nn.CrossEntropyLoss(ignore_index=1), y != 1
    scores = curvature_scores(model, loss, split(X, y, 5, 15))
    assert not scores[~counted].any()
    others = curvature_scores(model, loss, [(X[counted], y[counted])])
    assert torch.allclose(scores[counted], others)


def test_a_number_beyond_the_classes_may_be_ignored():
    model, _, X, y = problem(NUM_OUTPUTS)
    loss = nn.CrossEntropyLoss(ignore_index=NUM_OUTPUTS)
    assert not curvature_scores(model, loss, [(X, y)])[:7].any()
    y[0] = NUM_OUTPUTS + 1
    with pytest.raises(ValueError, match="must lie in"):
        curvature_scores(model, loss, [(X, y)])


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_fits_leave_ignored_examples_out(magnitudes):
    model, _, X, y = problem()
    la = debiased(model, magnitudes=magnitudes)
    la.fit([(X, y)])
    loss = nn.CrossEntropyLoss(reduction="sum")
    assert torch.allclose(la.loss, loss(model(X), y))
    if magnitudes == "ggn":
        *_, H = dense_gradient_and_curvature(model, la.params, loss, X, y, "ggn")
        assert torch.allclose(la.H.diag().sum(), H.trace())
    assert posterior(la).isfinite().all()
    with pytest.raises(ValueError, match="AsdlGGN does not honour `ignore_index`"):
        debiased(model.float(), backend=AsdlGGN).fit([(X.float(), y)])


def test_bias_reports_refuse_ignored_examples():
    model, params, X, y = problem()
    with pytest.raises(ValueError, match="some targets are the loss's"):
        bias_report(
            model,
            nn.CrossEntropyLoss(),
            params,
            [(X, y)],
            num_directions=2,
            batch_size=4,
        )


def test_targets_that_are_all_ignored_are_refused():
    model, params, X, y = problem()
    data, loss = [(X[:7], y[:7])], nn.CrossEntropyLoss()
    D = torch.ones(sum(p.numel() for p in params), 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="No target counts"):
        directional_derivatives(model, loss, params, data, D)
    operator = DebiasedKFACLinearOperator(model, loss, params, data, data)
    with pytest.raises(ValueError, match="No target counts"):
        operator.compute()
    with pytest.raises(ValueError, match=r"lie in 0\.\.2.* `ignore_index` -100, got"):
        directional_derivatives(model, loss, params, [(X, y.clamp(min=-1))], D)


class Focal(nn.CrossEntropyLoss):
    def forward(self, output, y):
        return super().forward(output, y) ** 2


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.CrossEntropyLoss(weight=torch.ones(NUM_OUTPUTS)), "not have `weight`"),
        (nn.BCEWithLogitsLoss(weight=torch.ones(NUM_OUTPUTS)), "not have `weight`"),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)), "not have `pos_weight`"),
        (nn.CrossEntropyLoss(reduction="none"), "reduction 'sum' or 'mean'"),
        (nn.MSELoss(reduction="none"), "reduction 'sum' or 'mean'"),
        (nn.NLLLoss(), "must be MSELoss"),
        (Focal(), "`forward` of its own, as Focal has"),
    ],
)
def test_what_is_refused_by_name(loss, message):
    model, params, X, y = problem()
    D = torch.ones(sum(p.numel() for p in params), 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        DebiasedKFACLinearOperator(model, loss, params, [(X, y)], [(X, y)])
    with pytest.raises(ValueError, match=message):
        directional_derivatives(model, loss, params, [(X, y)], D)
    with pytest.raises(ValueError, match=message):
        curvature_scores(model, loss, [(X, y)])


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("num_labels", [1, NUM_OUTPUTS])
def test_labels_may_be_integers_and_those_of_one_logit_vectors(num_labels, reduction):
    model = nn.Sequential(*network("mlp")[:-1], nn.Linear(5, num_labels)).double()
    own = list(model.parameters())
    X, y = batch("mlp", SIZE, "bce")
    y = y[:, :num_labels]
    loss = nn.BCEWithLogitsLoss(reduction=reduction)
    D = torch.randn(sum(p.numel() for p in own), 4, dtype=torch.float64)
    gradient, H = dense_gradient_and_curvature(model, own, loss, X, y, "ggn")
    forms = [y.long(), y.bool(), y.float()]
    for form in [*forms, *(form[:, 0] for form in forms if num_labels == 1)]:
        data = split(X, form, 5, 15)
        measured = directional_derivatives(model, loss, own, data, D)
        assert torch.allclose(measured.slope, D.T @ gradient, rtol=1e-9, atol=1e-11)
        assert torch.allclose(measured.curvature, (D * (H @ D)).sum(0), rtol=1e-9)
        rows = ggn_rows(model, loss, own, data)
        assert dense.relative_error(rows.T @ rows, H) < 1e-8
        operator = DebiasedKFACLinearOperator(
            model, loss, own, data, data, magnitudes="ggn"
        )
        operator.compute()
        assert torch.allclose(operator.trace, H.trace())
        p = model(X).sigmoid()
        traces = (p * (1 - p)).sum(1) / (num_labels if reduction == "mean" else 1)
        assert torch.allclose(curvature_scores(model, loss, data), traces)
