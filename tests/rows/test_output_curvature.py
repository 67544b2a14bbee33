import pytest
import torch
from torch import nn

from laplace_debiased.rows.output_curvature import OutputCurvature, example_losses
from tests.cases import LOSSES, NUM_OUTPUTS

SIZE = 6


def outputs_and_targets(loss_name):
    f = torch.randn(SIZE, NUM_OUTPUTS, dtype=torch.float64)
    if loss_name == "cross-entropy":
        return f, torch.randint(NUM_OUTPUTS, (SIZE,))
    y = torch.rand(SIZE, NUM_OUTPUTS, dtype=torch.float64)
    return f, y.round() if loss_name == "bce" else y


def outer_products(columns):
    return torch.einsum("knc,knd->ncd", columns, columns)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("loss_name", LOSSES)
def test_type_2_columns_are_a_square_root_of_each_examples_hessian(
    loss_name, reduction
):
    f, y = outputs_and_targets(loss_name)
    loss = LOSSES[loss_name](reduction=reduction)
    columns = OutputCurvature(loss, "type-2").columns(f, y, torch.Generator())
    for n in range(SIZE):
        target = y[n : n + 1]
        hessian = torch.func.hessian(lambda g, t=target: loss(g[None], t))(f[n])
        assert torch.allclose(outer_products(columns)[n], hessian, atol=1e-12)


@pytest.mark.parametrize("loss_name", LOSSES)
def test_empirical_columns_are_each_examples_gradient(loss_name):
    f, y = outputs_and_targets(loss_name)
    loss = LOSSES[loss_name](reduction="sum")
    columns = OutputCurvature(loss, "empirical").columns(f, y, torch.Generator())
    expected = torch.func.grad(loss)(f, y)
    assert torch.allclose(columns[0], expected)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("loss_name", LOSSES)
def test_mc_columns_are_unbiased(loss_name, reduction):
    f, y = outputs_and_targets(loss_name)
    loss = LOSSES[loss_name](reduction=reduction)
    generator = torch.Generator().manual_seed(0)
    exact = outer_products(OutputCurvature(loss).columns(f, y, generator))
    sampler = OutputCurvature(loss, "mc", mc_samples=6_000)
    sampled = outer_products(sampler.columns(f, y, generator))
    assert torch.allclose(sampled, exact, atol=0.06 * exact.abs().max().item())


@pytest.mark.parametrize("loss_name", LOSSES)
def test_losses_are_each_examples_loss(loss_name):
    f, y = outputs_and_targets(loss_name)
    loss = LOSSES[loss_name](reduction="sum")
    expected = [loss(f[n : n + 1], y[n : n + 1]) for n in range(SIZE)]
    actual = example_losses(loss, f, y)
    assert torch.allclose(actual, torch.stack(expected))


def test_label_smoothing_enters_loss_and_gradient():
    f, y = outputs_and_targets("cross-entropy")
    loss = nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.2)
    curvature = OutputCurvature(loss, "empirical")
    assert torch.allclose(example_losses(loss, f, y).sum(), loss(f, y))
    expected = torch.func.grad(loss)(f, y)
    assert torch.allclose(curvature.columns(f, y, torch.Generator())[0], expected)


@pytest.mark.parametrize("fisher_type", ["type-2", "mc", "empirical"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("loss_name", LOSSES)
def test_traces_are_those_of_the_columns(loss_name, reduction, fisher_type):
    f, y = outputs_and_targets(loss_name)
    curvature = OutputCurvature(LOSSES[loss_name](reduction=reduction), fisher_type)
    traces = curvature.traces(f, y)
    if fisher_type == "mc":  # in expectation
        curvature = OutputCurvature(curvature.loss_func)
    columns = curvature.columns(f, y, torch.Generator())
    assert torch.allclose(traces, columns.square().sum((0, 2)))


MANY = 8


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("loss_name", LOSSES)
def test_fewer_columns_are_unbiased(loss_name, rank):
    f = torch.randn(1, MANY, dtype=torch.float64).expand(20_000, MANY)
    loss = LOSSES[loss_name](reduction="sum")
    generator = torch.Generator().manual_seed(0)
    columns = OutputCurvature(loss, fisher_rank=rank).columns(f, f, generator)
    assert columns.shape == (rank + 1, *f.shape)
    exact = outer_products(OutputCurvature(loss).columns(f[:1], f[:1], generator))
    mean = outer_products(columns).mean(0)
    # entries have a standard error of up to 0.02 of the largest
    assert torch.allclose(mean, exact, atol=0.08 * exact.abs().max().item())
    if loss_name != "cross-entropy":  # columns of a diagonal do not overlap
        traces = columns.square().sum((0, 2))
        assert torch.allclose(traces, exact.diagonal(dim1=1, dim2=2).sum())


@pytest.mark.parametrize("loss_name", ["cross-entropy", "bce"])
def test_the_largest_columns_are_kept_exactly(loss_name):
    f = torch.tensor([[4.0, 0.0, 3.0, -1.0, 1.0]])
    loss = LOSSES[loss_name](reduction="sum")
    generator = torch.Generator().manual_seed(0)
    exact = OutputCurvature(loss).columns(f, f, generator)
    fewer = OutputCurvature(loss, fisher_rank=2).columns(f, f, generator)
    norms = exact.square().sum((1, 2))
    largest = norms.topk(2).indices
    assert torch.allclose(outer_products(fewer[:2]), outer_products(exact[largest]))


@pytest.mark.parametrize("rank", [MANY - 1, MANY, 100])
@pytest.mark.parametrize("loss_name", LOSSES)
def test_enough_columns_are_exact(loss_name, rank):
    f = torch.randn(3, MANY)
    loss = LOSSES[loss_name](reduction="sum")
    expected = OutputCurvature(loss).columns(f, f, torch.Generator())
    actual = OutputCurvature(loss, fisher_rank=rank).columns(f, f, torch.Generator())
    assert torch.equal(actual, expected)


def test_certain_predictions_have_no_curvature():
    f = torch.full((2, MANY), -200.0).index_fill(1, torch.tensor(3), 200.0)
    curvature = OutputCurvature(nn.CrossEntropyLoss(reduction="sum"), fisher_rank=2)
    columns = curvature.columns(f, f, torch.Generator())
    assert columns.isfinite().all() and columns.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("fisher_type", "rank"), [("type-2", 0), ("mc", 2), ("empirical", 2)]
)
def test_unsupported_ranks_are_refused(fisher_type, rank):
    with pytest.raises(ValueError, match="`fisher_rank` must be at least 1"):
        OutputCurvature(nn.CrossEntropyLoss(), fisher_type, fisher_rank=rank)


IGNORED = {"default": -100, "a class": 1}


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical", "mc"])
@pytest.mark.parametrize("index", IGNORED)
def test_ignored_examples_have_no_loss_and_no_curvature(index, fisher_type):
    f = torch.randn(SIZE, NUM_OUTPUTS, dtype=torch.float64)
    ignored = IGNORED[index]
    y = torch.tensor([0, 2, ignored, 2, ignored, 0])
    counted = y != ignored
    loss = nn.CrossEntropyLoss(reduction="sum", ignore_index=ignored)
    curvature = OutputCurvature(loss, fisher_type, 6_000 if fisher_type == "mc" else 1)
    generator = torch.Generator().manual_seed(0)
    actual = outer_products(curvature.columns(f, y, generator))
    plain = OutputCurvature(
        nn.CrossEntropyLoss(reduction="sum"),
        "empirical" if fisher_type == "empirical" else "type-2",
    )
    classes = y.clamp(min=0)
    expected = outer_products(plain.columns(f, classes, generator))
    tolerance = 0.02 if fisher_type == "mc" else 1e-12
    assert torch.allclose(actual[counted], expected[counted], atol=tolerance)
    assert not actual[~counted].any()
    assert torch.equal(curvature.traces(f, y), plain.traces(f, classes) * counted)
    losses = example_losses(loss, f, y)
    assert torch.allclose(losses.sum(), loss(f, y)) and not losses[~counted].any()


def test_sampled_labels_are_not_smoothed():
    f, y = outputs_and_targets("cross-entropy")
    loss = nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.4)
    generator = torch.Generator().manual_seed(0)
    exact = outer_products(OutputCurvature(loss).columns(f, y, generator))
    hessian = torch.func.hessian(lambda g: loss(g[None], y[:1]))(f[0])
    assert torch.allclose(exact[0], hessian)
    sampler = OutputCurvature(loss, "mc", mc_samples=6_000)
    sampled = outer_products(sampler.columns(f, y, generator))
    assert torch.allclose(sampled, exact, atol=0.02)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.CrossEntropyLoss(weight=torch.ones(3)), "must not have `weight`"),
        (nn.BCEWithLogitsLoss(weight=torch.ones(3)), "must not have `weight`"),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)), "not have `pos_weight`"),
        (nn.CrossEntropyLoss(reduction="none"), "reduction 'sum' or 'mean'"),
        (nn.MSELoss(reduction="none"), "reduction 'sum' or 'mean'"),
        (nn.L1Loss(), "must be MSELoss"),
    ],
)
def test_other_losses_are_refused_by_name(loss, message):
    with pytest.raises(ValueError, match=message):
        OutputCurvature(loss)
