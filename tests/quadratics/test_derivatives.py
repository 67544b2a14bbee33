import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from laplace_debiased.quadratics import derivatives
from laplace_debiased.quadratics.derivatives import directional_derivatives
from tests.cases import LOSSES, batch, network
from tests.cases import split as split_batch

SIZE = 12
NUM_DIRECTIONS = 5
CASES = [("ggn", "forward"), ("ggn", "reverse"), ("hessian", "forward")]
NAMES = ["mlp", "cnn-stride-padding", "resnet", "transformer", "recurrent"]


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def problem(name, loss_name="cross-entropy"):
    model = network(name).eval()
    params = list(model.parameters())
    generator = torch.Generator().manual_seed(1)
    size = sum(param.numel() for param in params)
    directions = torch.randn(size, NUM_DIRECTIONS, generator=generator).double()
    return model, params, batch(name, SIZE, loss_name), directions


def dense_gradient_and_curvature(model, params, loss, X, y, kind):
    """Gradient and curvature of each example, by autograd alone."""
    with sdpa_kernel(SDPBackend.MATH):  # fused attention is not twice differentiable
        f = model(X)
    value = loss(f, y)
    gradient = flat(torch.autograd.grad(value, params, create_graph=True))
    if kind == "hessian":
        rows = [
            flat(torch.autograd.grad(g, params, retain_graph=True, allow_unused=True))
            if g.requires_grad
            else torch.zeros_like(gradient)
            for g in gradient
        ]
        return gradient.detach(), torch.stack(rows)
    J = torch.stack(
        [flat(torch.autograd.grad(c, params, retain_graph=True)) for c in f.flatten()]
    )
    hessian = torch.func.hessian(lambda out: loss(out, y))(f.detach())
    return gradient.detach(), J.T @ hessian.reshape(f.numel(), -1) @ J


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(("kind", "mode"), CASES)
@pytest.mark.parametrize("loss_name", LOSSES)
def test_derivatives_equal_dense_reference(loss_name, kind, mode, reduction):
    model, params, (X, y), D = problem("mlp", loss_name)
    loss = LOSSES[loss_name](reduction=reduction)
    gradient, H = dense_gradient_and_curvature(model, params, loss, X, y, kind)
    measured = directional_derivatives(
        model,
        loss,
        params,
        split_batch(X, y, 5, 7),
        D,
        curvature=kind,
        mode=mode,
        damping=0.3,
    )
    curvature = (D * (H @ D)).sum(0) + 0.3 * D.square().sum(0)
    assert torch.allclose(measured.slope, D.T @ gradient, rtol=1e-9, atol=1e-11)
    assert torch.allclose(measured.curvature, curvature, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("kind", "mode"), CASES)
@pytest.mark.parametrize("name", NAMES)
def test_each_example_contributes_its_own(name, kind, mode):
    model, params, (X, y), D = problem(name)
    loss = nn.CrossEntropyLoss(reduction="sum")
    measured = directional_derivatives(
        model, loss, params, [(X, y)], D, curvature=kind, mode=mode
    )
    for n in range(3):
        gradient, H = dense_gradient_and_curvature(
            model, params, loss, X[n : n + 1], y[n : n + 1], kind
        )
        assert torch.allclose(measured.slopes[n], D.T @ gradient, rtol=1e-8, atol=1e-10)
        curvature = (D * (H @ D)).sum(0)
        assert torch.allclose(measured.curvatures[n], curvature, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_memory_limit_changes_nothing(kind, mode):
    model, params, data, D = problem("cnn-stride-padding")
    loss = nn.CrossEntropyLoss()
    few, all_at_once = (
        directional_derivatives(
            model,
            loss,
            params,
            [data],
            D,
            curvature=kind,
            mode=mode,
            memory_limit=limit,
        )
        for limit in (1, 2**30)
    )
    assert torch.allclose(few.slopes, all_at_once.slopes)
    assert torch.allclose(few.curvatures, all_at_once.curvatures)


@pytest.mark.parametrize(("num_directions", "mode"), [(3, "forward"), (4, "reverse")])
def test_mode_is_the_one_with_fewer_passes(num_directions, mode, monkeypatch):
    model, params, data, D = problem("mlp")
    used = []
    for name in ("forward", "reverse"):
        build = getattr(derivatives, f"_{name}_ggn")

        def note(*arguments, name=name, build=build):
            used.append(name)
            return build(*arguments)

        monkeypatch.setattr(derivatives, f"_{name}_ggn", note)
    loss = nn.CrossEntropyLoss()
    directional_derivatives(model, loss, params, [data], D[:, :num_directions])
    assert used == [mode]


def test_parameters_of_unsupported_layers_take_forward_mode():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(8, 2)).double()
    X, y = torch.randint(7, (SIZE, 2)), torch.randint(2, (SIZE,))
    params = list(model.parameters())
    D = torch.randn(sum(p.numel() for p in params), 4).double()
    loss = nn.CrossEntropyLoss()
    measured = directional_derivatives(model, loss, params, [(X, y)], D)
    gradient, H = dense_gradient_and_curvature(model, params, loss, X, y, "ggn")
    assert torch.allclose(measured.curvature, (D * (H @ D)).sum(0))
    assert torch.allclose(measured.slope, D.T @ gradient)
    with pytest.raises(ValueError, match="Embedding"):
        directional_derivatives(model, loss, params, [(X, y)], D, mode="reverse")


def test_some_of_the_parameters():
    model, params, (X, y), _ = problem("mlp")
    params = params[2:]
    D = torch.randn(sum(p.numel() for p in params), 5).double()
    loss = nn.CrossEntropyLoss()
    gradient, H = dense_gradient_and_curvature(model, params, loss, X, y, "ggn")
    for mode in ("forward", "reverse"):
        measured = directional_derivatives(model, loss, params, [(X, y)], D, mode=mode)
        assert torch.allclose(measured.curvature, (D * (H @ D)).sum(0))
        assert torch.allclose(measured.slope, D.T @ gradient)


@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_the_model_stays_as_it_was(kind, mode):
    model, params, data, D = problem("resnet")
    model[0].train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    directional_derivatives(
        model, nn.CrossEntropyLoss(), params, [data], D, curvature=kind, mode=mode
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(param.grad is None for param in params)
    assert not any(module._forward_hooks for module in model.modules())
    assert [m for m in model.modules() if m.training] == [model[0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"curvature": "fisher"}, "`curvature` must be one of"),
        ({"mode": "backward"}, "`mode` must be one of"),
        ({"mode": "reverse", "curvature": "hessian"}, "needs `curvature='ggn'`"),
        ({"directions": torch.zeros(4, 2)}, r"shape \[43, K\].* got \(4, 2\)"),
        ({"data": []}, "data source is empty"),
        ({"loss_func": nn.L1Loss()}, "`loss_func` must be MSELoss"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    model, params, data, D = problem("mlp")
    arguments = {
        "loss_func": nn.CrossEntropyLoss(),
        "data": [data],
        "directions": D,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        directional_derivatives(model, params=params, **arguments)


def test_inputs_that_are_not_finite_are_refused():
    model, params, (X, y), D = problem("mlp")
    X[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        directional_derivatives(model, nn.CrossEntropyLoss(), params, [(X, y)], D)


def test_memory_limit_splits_batches_in_reverse_mode(monkeypatch):
    model, params, (X, y), D = problem("cnn-stride-padding")
    sizes = []

    def counting(model, params, layers, X, size, **options):
        sizes.append(size)
        return linearize(model, params, layers, X, size, **options)

    linearize = derivatives.linearize
    monkeypatch.setattr(derivatives, "linearize", counting)
    directional_derivatives(
        model,
        nn.CrossEntropyLoss(),
        params,
        [(X, y)],
        D,
        mode="reverse",
        memory_limit=1,
    )
    assert max(sizes) == 2 and sum(sizes) == SIZE
