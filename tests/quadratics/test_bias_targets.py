"""Directions are those of one mini-batch, in whatever form its targets are."""

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import bias_report, directional_derivatives
from laplace_debiased.quadratics import bias
from laplace_debiased.sampling.folds import draw_uniformly
from tests.quadratics.test_derivatives import CASES, dense_gradient_and_curvature

SIZE, BATCH, NUM_DIRECTIONS, DAMPING = 40, 15, 3, 4.0
# directions, curvature, and whether eigenvectors are those of the Gram matrix
ROUTES = [
    ("cg", "ggn", None),
    ("cg", "hessian", None),
    ("eigenvectors", "ggn", True),
    ("eigenvectors", "ggn", False),
    ("eigenvectors", "hessian", None),
]

X = torch.randn(SIZE, 4, generator=torch.Generator().manual_seed(1)).double()
NUMBERS = X[:, :1].sin() + X[:, 1:2]
LABELS = (X[:, :3] > 0).double()
CLASSES = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
# a loss, targets as torch's own loss takes them, and in another form
FORMS = {
    "numbers": (nn.MSELoss(), NUMBERS, NUMBERS[:, 0]),
    "numbers, summed": (nn.MSELoss(reduction="sum"), NUMBERS, NUMBERS[:, 0]),
    "one label": (nn.BCEWithLogitsLoss(), LABELS[:, :1], LABELS[:, 0]),
    "one integer": (nn.BCEWithLogitsLoss(), LABELS[:, :1], LABELS[:, 0].long()),
    "integers": (nn.BCEWithLogitsLoss(), LABELS, LABELS.long()),
    "truth values": (nn.BCEWithLogitsLoss(), LABELS, LABELS.bool()),
    "labels, summed": (nn.BCEWithLogitsLoss(reduction="sum"), LABELS, LABELS.float()),
    "int32": (nn.CrossEntropyLoss(), CLASSES, CLASSES.int()),
    "uint8": (nn.CrossEntropyLoss(reduction="sum"), CLASSES, CLASSES.byte()),
    "probabilities": (nn.CrossEntropyLoss(), CLASSES, one_hot(CLASSES, 3).float()),
}


def network(num_outputs=3):
    torch.manual_seed(0)
    layers = nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, num_outputs)
    return nn.Sequential(*layers).double()


def network_for(y):
    return network(y.shape[1] if y.is_floating_point() else 3)


class Keyword(nn.Module):
    """Takes its inputs from a mapping."""

    def __init__(self):
        super().__init__()
        self.body = network()

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize(("directions", "curvature", "is_gram"), ROUTES)
def test_inputs_may_be_mappings(directions, curvature, is_gram, monkeypatch):
    if is_gram is not None:
        monkeypatch.setattr(bias, "gram_is_cheaper", lambda *_: is_gram)
    options = {"num_directions": 3, "batch_size": 15, "num_batches": 1}
    options |= {"directions": directions, "curvature": curvature, "damping": DAMPING}
    model, found = Keyword(), []
    points = list(zip(X, CLASSES, strict=True))
    for data in (points, [({"x": x}, y) for x, y in points]):
        known = model, nn.CrossEntropyLoss(), list(model.parameters())
        report = bias_report(*known, DataLoader(data, 7), **options)
        found.append(report.curvature)
    plain, mapped = found
    torch.testing.assert_close(mapped.own, plain.own)
    torch.testing.assert_close(mapped.others, plain.others)


def report(model, loss, y, directions, curvature):
    return bias_report(
        model,
        loss,
        list(model.parameters()),
        DataLoader(TensorDataset(X, y), 7),
        directions=directions,
        curvature=curvature,
        num_directions=NUM_DIRECTIONS,
        batch_size=BATCH,
        num_batches=1,
        damping=DAMPING,
        tol=1e-14,
    )


def numbers(own):
    parts = own.curvature.own, own.curvature.overall, own.slope.own, own.slope.overall
    return torch.stack(parts)


def dense_quadratic(model, loss, points, y, curvature):
    """Gradient and damped curvature of a mean over points."""
    g, H = dense_gradient_and_curvature(
        model, list(model.parameters()), loss, X[points], y[points], curvature
    )
    scale = 1 if loss.reduction == "mean" else 1 / len(points)
    return scale * g, scale * H + DAMPING * torch.eye(len(g)).double()


def conjugate(g, H):
    """Unit directions of conjugate gradients, as they are in textbooks."""
    residual, columns = -g, []
    for _ in range(NUM_DIRECTIONS):
        d = residual
        for other in columns:
            d = d - (d @ H @ other) / (other @ H @ other) * other
        residual = residual - (d @ residual) / (d @ H @ d) * H @ d
        columns.append(d)
    return torch.stack([d / d.norm() for d in columns], 1)


@pytest.mark.parametrize(("directions", "curvature", "is_gram"), ROUTES)
@pytest.mark.parametrize("form", FORMS)
def test_targets_in_any_form_give_the_directions_of_autograd(
    form, directions, curvature, is_gram, monkeypatch
):
    monkeypatch.setattr(bias, "gram_is_cheaper", lambda *_: is_gram)
    loss, y, given = FORMS[form]
    model = network_for(y)
    order = draw_uniformly(DataLoader(TensorDataset(X, y)), None, 0).indices
    g, H = dense_quadratic(model, loss, order[:BATCH], y, curvature)
    if directions == "cg":
        D = conjugate(g, H)
    else:
        D = torch.linalg.eigh(H).eigenvectors.flip(1)[:, :NUM_DIRECTIONS]
    D = D * (D.T @ g).sign()
    all_g, all_H = dense_quadratic(model, loss, order, y, curvature)
    expected = (D * (H @ D)).sum(0), (D * (all_H @ D)).sum(0), D.T @ g, D.T @ all_g
    actual = numbers(report(model, loss, given, directions, curvature))
    # probabilities and labels in single precision are exact
    assert torch.allclose(actual, torch.stack(expected), rtol=1e-7, atol=1e-9)


def frozen(model):
    return model.requires_grad_(False)


def partly_frozen(model):
    return model[0].requires_grad_(False)


@pytest.mark.parametrize(("directions", "curvature", "is_gram"), ROUTES)
@pytest.mark.parametrize("change", [frozen, partly_frozen])
def test_frozen_parameters_are_parameters(
    change, directions, curvature, is_gram, monkeypatch
):
    monkeypatch.setattr(bias, "gram_is_cheaper", lambda *_: is_gram)
    model, loss = network(), nn.CrossEntropyLoss()
    expected = numbers(report(model, loss, CLASSES, directions, curvature))
    change(model)
    flags = [param.requires_grad for param in model.parameters()]
    actual = numbers(report(model, loss, CLASSES, directions, curvature))
    assert torch.allclose(actual, expected, rtol=1e-9)
    assert [param.requires_grad for param in model.parameters()] == flags
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize(("directions", "curvature", "is_gram"), ROUTES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_reports_need_no_gradients_of_their_caller(
    mode, directions, curvature, is_gram, monkeypatch
):
    monkeypatch.setattr(bias, "gram_is_cheaper", lambda *_: is_gram)
    model, loss = network(), nn.CrossEntropyLoss()
    expected = numbers(report(model, loss, CLASSES, directions, curvature))
    with mode():
        actual = numbers(report(model, loss, CLASSES, directions, curvature))
        assert not torch.is_grad_enabled()
    assert torch.allclose(actual, expected, rtol=1e-9)


@pytest.mark.parametrize(("curvature", "mode"), CASES)
@pytest.mark.parametrize("form", FORMS)
def test_directional_derivatives_take_the_same_targets_and_parameters(
    form, curvature, mode
):
    loss, y, given = FORMS[form]
    model = network_for(y)
    params = list(model.parameters())
    g, H = dense_gradient_and_curvature(model, params, loss, X, y, curvature)
    D = torch.randn(len(g), 4, generator=torch.Generator().manual_seed(0)).double()
    frozen(model)
    with torch.no_grad():
        measured = directional_derivatives(
            model, loss, params, [(X, given)], D, curvature=curvature, mode=mode
        )
    assert torch.allclose(measured.slope, D.T @ g, rtol=1e-7)
    assert torch.allclose(measured.curvature, (D * (H @ D)).sum(0), rtol=1e-7)


@pytest.mark.parametrize(("directions", "curvature", "is_gram"), ROUTES)
@pytest.mark.parametrize(
    ("loss", "y", "message"),
    [
        (nn.MSELoss(), NUMBERS[:, 0], r"Targets must be .* shape \(7, 3\)"),
        (nn.BCEWithLogitsLoss(), 2 * LABELS, "Labels must be 0 or 1"),
        (nn.CrossEntropyLoss(), CLASSES + 1, r"Class indices must lie in 0\.\.2"),
        (nn.L1Loss(), LABELS, "must be MSELoss"),
    ],
)
def test_what_a_loss_cannot_compare_is_refused_before_directions_are_computed(
    loss, y, message, directions, curvature, is_gram, monkeypatch
):
    monkeypatch.setattr(bias, "gram_is_cheaper", lambda *_: is_gram)
    with pytest.raises(ValueError, match=message):
        report(network(), loss, y, directions, curvature)
