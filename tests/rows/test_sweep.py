import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import KronDebiasedLaplace, Laplace
from laplace_debiased.curvature.factors import KroneckerFactors
from laplace_debiased.rows.output_curvature import OutputCurvature
from laplace_debiased.rows.selection import find_layers
from laplace_debiased.rows.sweep import Nothing, sweep
from tests.cases import LOSSES, NUM_OUTPUTS, batch, network, split


def run(model, data, loss=None, **kwargs):
    params = list(model.parameters())
    curvature = OutputCurvature(nn.CrossEntropyLoss() if loss is None else loss)
    size = len(params[0][0])
    X = torch.randn(2, size, dtype=params[0].dtype)  # valid, whatever the data are
    layers = find_layers(model, params, X, 2)
    factors = KroneckerFactors(layers, params)
    return sweep(model, params, layers, data, curvature, factors, **kwargs)


@pytest.mark.parametrize("loss_name", LOSSES)
def test_summary_tells_what_was_seen(loss_name):
    model = network("mlp")
    X, y = batch("mlp", 10, loss_name)
    loss = LOSSES[loss_name](reduction="sum")
    weights = torch.rand(10, dtype=torch.float64)
    summary = run(model, split(X, y, 3, 7), loss, weights=weights)
    assert (summary.num_data, summary.num_outputs) == (10, NUM_OUTPUTS)
    assert summary.total_weight == pytest.approx(weights.sum().item())
    losses = [
        w * loss(model(x), t)
        for w, x, t in zip(weights, X.split(1), y.split(1), strict=True)
    ]
    assert torch.allclose(summary.loss, sum(losses))


@pytest.mark.parametrize("loss_name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_confident_model_in_half_precision_has_losses_and_traces(dtype, loss_name):
    model = nn.Linear(NUM_OUTPUTS, NUM_OUTPUTS, bias=False)
    nn.init.eye_(model.weight)
    X = torch.tensor([[9.0, 0, 0], [0, 7.0, 1.0]])
    y = torch.tensor([0, 1])
    y = y if loss_name == "cross-entropy" else nn.functional.one_hot(y, 3).double()
    summaries = []
    for own in (torch.float64, dtype):
        target = y.to(own) if y.is_floating_point() else y
        data = [(X.to(own), target)]
        loss = LOSSES[loss_name](reduction="sum")
        summaries.append(run(model.to(own), data, loss, backward=False))
    exact, half = summaries
    for actual, expected in ((half.losses, exact.losses), (half.traces, exact.traces)):
        assert actual.dtype == torch.float32 and (expected > 0).all()
        assert torch.allclose(actual.double(), expected, rtol=1e-3)


def test_without_layers_only_the_loss_is_computed():
    model = network("mlp")
    X, y = batch("mlp", 10)
    loss = nn.CrossEntropyLoss(reduction="sum")
    curvature = OutputCurvature(loss)
    summary = sweep(model, [], [], [(X, y)], curvature, Nothing())
    assert torch.allclose(summary.loss, loss(model(X), y))


@pytest.mark.parametrize("progress_bar", [True, False])
def test_progress_is_shown_if_asked_for(progress_bar, capsys):
    run(network("mlp"), [batch("mlp", 4)], progress_bar=progress_bar)
    assert bool(capsys.readouterr().err) == progress_bar
    data = TensorDataset(*batch("mlp", 4))
    la = KronDebiasedLaplace(network("mlp"), "classification")
    la.fit(DataLoader(data), progress_bar=progress_bar)
    assert bool(capsys.readouterr().err) == progress_bar


def test_model_is_left_alone():
    model = network("mlp")
    model.train()
    model[0].weight.requires_grad_(False)
    model[2].bias.grad = torch.ones(NUM_OUTPUTS, dtype=torch.float64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run(model, [batch("mlp", 4)])
    assert model.training and not model[0].weight.requires_grad
    assert model[0].bias.grad is None
    assert torch.equal(model[2].bias.grad, torch.ones(NUM_OUTPUTS).double())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


X, CLASSES = batch("mlp", 4)
_, VALUES = batch("mlp", 4, "mse")
NAN, INF = float("nan"), float("inf")

BAD_DATA = {
    "empty": ([], "cross-entropy", "data source is empty"),
    "nan-inputs": ([(X * NAN, CLASSES)], "cross-entropy", "Inputs contain NaN"),
    "inf-inputs": ([(X + INF, CLASSES)], "cross-entropy", "Inputs contain NaN"),
    "nan-in-mapping": ([({"x": X * NAN}, CLASSES)], "mse", "Inputs contain NaN"),
    "nan-targets": ([(X, VALUES * NAN)], "mse", "Targets contain NaN"),
    "flat-targets": ([(X, VALUES[:, 0])], "mse", "a vector counts as a column"),
    "integer-targets": ([(X, VALUES.long())], "mse", "of floating-point dtype"),
    "float-classes": ([(X, CLASSES.float())], "cross-entropy", "class indices"),
    "column-classes": ([(X, CLASSES[:, None])], "cross-entropy", r"shape \[batch\]"),
    "boolean-classes": ([(X, CLASSES > 0)], "cross-entropy", "integer dtype"),
    "class-too-large": ([(X, CLASSES + 2)], "cross-entropy", r"must lie in 0\.\.2"),
    "class-negative": ([(X, CLASSES - 100)], "cross-entropy", r"must lie in 0\.\.2"),
    "too-few-targets": (
        [(X, CLASSES[:3])],
        "cross-entropy",
        "must hold the examples",
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_are_refused(case):
    data, loss_name, message = BAD_DATA[case]
    with pytest.raises(ValueError, match=message):
        run(network("mlp"), data, LOSSES[loss_name]())


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize(
    "case", ["nan-inputs", "class-too-large", "float-classes", "flat-targets"]
)
def test_bad_data_are_refused_by_fit(case, subset):
    ((inputs, targets),), loss_name, message = BAD_DATA[case]
    likelihood = "regression" if loss_name == "mse" else "classification"
    la = Laplace(network("mlp"), likelihood, subset, "kron_debiased")
    with pytest.raises(ValueError, match=message):
        la.fit(DataLoader(TensorDataset(inputs, targets)))


def test_outputs_must_be_a_matrix_and_finite():
    X, y = batch("sequence", 4)
    with pytest.raises(ValueError, match=r"must have shape \[4, outputs\]"):
        run(nn.Linear(3, 3).double(), [(X, y)])
    model = network("mlp")
    model[2].bias.data[0] = NAN
    with pytest.raises(ValueError, match="output contains NaN"):
        run(model, [batch("mlp", 4)])


class MixesLater(nn.Module):
    """Its examples are separate until they mix."""

    def __init__(self):
        super().__init__()
        self.linear, self.mixes = nn.Linear(4, NUM_OUTPUTS), False

    def forward(self, x):
        x = self.linear(x)
        return x - x.mean(0) if self.mixes else x


def test_networks_that_mix_examples_are_refused():
    model = MixesLater().double()
    params, (X, _) = list(model.parameters()), batch("mlp", 4)
    layers = find_layers(model, params, X, 4)
    arguments = [(X, CLASSES)], OutputCurvature(nn.CrossEntropyLoss())
    factors = KroneckerFactors(layers, params)
    sweep(model, params, layers, *arguments, factors)
    model.mixes = True
    with pytest.raises(ValueError, match="'linear', an example's output"):
        sweep(model, params, layers, *arguments, factors)
    with pytest.raises(ValueError, match="'linear', an example's output"):
        find_layers(model, params, X, 4)


def test_class_probabilities_are_targets_too():
    model = network("mlp")
    X, _ = batch("mlp", 4)
    y = torch.rand(4, NUM_OUTPUTS, dtype=torch.float64).softmax(1)
    loss = nn.CrossEntropyLoss(reduction="sum")
    assert torch.allclose(run(model, [(X, y)], loss).loss, loss(model(X), y))


def test_losses_of_many_batches_add_up_in_half_precision():
    model = nn.Linear(2, 3).bfloat16()
    X, y = torch.randn(4000, 2).bfloat16(), torch.randint(3, (4000,))
    summary = sweep(
        model,
        [],
        [],
        split(X, y, *[4] * 1000),
        OutputCurvature(nn.CrossEntropyLoss(reduction="sum")),
        Nothing(),
    )
    expected = nn.functional.cross_entropy(model(X).float(), y, reduction="sum")
    assert summary.loss.item() == pytest.approx(expected.item(), rel=1e-2)
