import copy

import pytest
import torch
from curvlinops import GGNLinearOperator
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.utils import parameters_to_vector

from laplace_debiased.quadratics.cg import cg, debiased_cg
from laplace_debiased.quadratics.optimizer import BatchQuadratic, DebiasedCG
from tests import dense
from tests.cases import batch, network
from tests.faults import same

SIZE = 20
HALF = SIZE // 2


def closure_over(model, X, y, reduction="none"):
    def closure():
        output = model(X)
        return cross_entropy(output, y, reduction=reduction), output

    return closure


def halves(X, y):
    return (X[:HALF], y[:HALF]), (X[HALF:], y[HALF:])


def quadratic(model, X, y, damping):
    """Curvature and negative gradient, dense."""
    params = list(model.parameters())
    loss = nn.CrossEntropyLoss()
    blocks = GGNLinearOperator(model, loss, params, [(X, y)], check_deterministic=False)
    gradient = parameters_to_vector(torch.autograd.grad(loss(model(X), y), params))
    eye = torch.eye(len(gradient)).double()
    with sdpa_kernel(SDPBackend.MATH):  # curvlinops differentiates twice, too
        return blocks @ eye + damping * eye, -gradient


def weights(model):
    return parameters_to_vector(model.parameters()).detach().clone()


@pytest.mark.parametrize("name", ["mlp", "cnn-stride-padding", "resnet", "transformer"])
def test_quadratic_of_a_batch_equals_curvlinops(name):
    model, (X, y) = network(name).eval(), batch(name, SIZE)
    params = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        own = BatchQuadratic(*closure_over(model, X, y)(), params, 0.3)
    H, b = quadratic(model, X, y, 0.3)
    V = torch.randn(len(b), 4).double()
    assert torch.allclose(own.gradient, -b)
    products = torch.stack([own @ v for v in V.T], 1)
    assert dense.relative_error(products, H @ V) < 1e-10
    slopes, curvatures = own.along(V[:, :3], V[:, 3])
    assert torch.allclose(slopes, V[:, :3].T @ (H @ V[:, 3] - b))
    assert torch.allclose(curvatures, V[:, :3].T @ H @ V[:, :3])
    expected = -b @ V[:, 0] + V[:, 0] @ H @ V[:, 0] / 2
    assert torch.allclose(own.change(V[:, 0]), expected)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("subspace", [False, True])
def test_step_is_that_of_debiased_cg(subspace, reduction):
    model, (X, y) = network("mlp"), batch("mlp", SIZE)
    first, second = halves(X, y)
    result = debiased_cg(
        *quadratic(model, *first, 0.1),
        *quadratic(model, *second, 0.1),
        max_iterations=4,
        subspace=subspace,
    )
    before, loss = weights(model), cross_entropy(model(second[0]), second[1])
    optimizer = DebiasedCG(
        model.parameters(), lr=0.5, damping=0.1, max_iterations=4, subspace=subspace
    )
    returned = optimizer.step(
        closure_over(model, *first, reduction), closure_over(model, *second, reduction)
    )
    assert torch.allclose(weights(model), before + 0.5 * result.solution)
    assert torch.allclose(returned, loss)
    assert all(param.grad is None for param in model.parameters())


def test_one_batch_is_split_in_two():
    models = [network("mlp") for _ in range(2)]
    X, y = batch("mlp", SIZE)
    for model in models:
        optimizer = DebiasedCG(model.parameters(), adapt_damping=True)
        for _ in range(3):
            closures = [closure_over(model, *half) for half in halves(X, y)]
            if model is models[0]:
                closures = [closure_over(model, X, y)]
            optimizer.step(*closures)
    assert torch.allclose(weights(models[0]), weights(models[1]))


def test_without_debiasing_a_step_is_plain_cg():
    model, (X, y) = network("mlp"), batch("mlp", SIZE)
    expected = cg(*quadratic(model, X, y, 0.1), rtol=1e-3, max_iterations=10).solution
    before = weights(model)
    optimizer = DebiasedCG(model.parameters(), damping=0.1, debias=False)
    optimizer.step(closure_over(model, X, y))
    assert torch.allclose(weights(model), before + expected)
    with pytest.raises(ValueError, match="`magnitude_closure` needs `debias=True`"):
        optimizer.step(closure_over(model, X, y), closure_over(model, X, y))


def test_warm_start_begins_at_the_last_step():
    model, (X, y) = network("mlp"), batch("mlp", SIZE)
    first, second = halves(X, y)
    closures = [closure_over(model, *half) for half in (first, second)]
    options = {"damping": 0.1, "max_iterations": 3}
    optimizer = DebiasedCG(model.parameters(), warm_start=0.5, **options)
    before = weights(model)
    optimizer.step(*closures)
    last = weights(model) - before
    expected = debiased_cg(
        *quadratic(model, *first, 0.1),
        *quadratic(model, *second, 0.1),
        0.5 * last,
        max_iterations=3,
        rtol=1e-3,
    ).solution
    before = weights(model)
    optimizer.step(*closures)
    assert torch.allclose(weights(model), before + expected)


@pytest.mark.parametrize(
    ("lr", "factor"), [(1.0, 2 / 3), (-1.0, 3 / 2)], ids=["good", "bad"]
)
def test_damping_adapts_to_how_well_the_quadratic_predicts(lr, factor):
    """On a linear model with squared loss the quadratic is exact."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    X, y = torch.randn(SIZE, 3).double(), torch.randn(SIZE, 1).double()

    def closure():
        output = model(X)
        return mse_loss(output, y, reduction="none").mean(1), output

    optimizer = DebiasedCG(model.parameters(), damping=0.01, adapt_damping=True)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step(closure, closure)
    assert optimizer.param_groups[0]["damping"] == pytest.approx(0.01 * factor)


def test_damping_stays_where_there_is_no_step():
    model, (X, y) = network("mlp"), batch("mlp", SIZE)
    optimizer = DebiasedCG(model.parameters(), damping=1.0, lr=0.0, adapt_damping=True)
    for _ in range(3):
        optimizer.step(closure_over(model, X, y))
    assert optimizer.param_groups[0]["damping"] == 1.0


def test_damping_adapts_to_the_quadratic_before_the_step(monkeypatch):
    """The Jacobian of convolutions depends on the parameters, which a step changes."""
    model, data = network("cnn-stride-padding"), batch("cnn-stride-padding", SIZE)
    closure = closure_over(model, *data)
    before, ratios = weights(model), []
    optimizer = DebiasedCG(model.parameters(), adapt_damping=True, debias=False)
    monkeypatch.setattr(
        optimizer, "_adapt_damping", lambda *values: ratios.append(values)
    )
    optimizer.step(closure)
    step = weights(model) - before
    H, descent = quadratic(network("cnn-stride-padding"), *data, 1.0)
    expected = (step @ H @ step / 2 - descent @ step).item()
    (_, predicted), *_ = ratios
    assert predicted == pytest.approx(expected, rel=1e-8)


def test_damping_adapts_on_the_points_that_gave_magnitudes():
    model, (X, y) = network("mlp"), batch("mlp", SIZE)
    first, second = halves(X, y)
    calls = []

    def counted(name, closure):
        def call():
            calls.append((name, torch.is_grad_enabled()))
            return closure()

        return call

    optimizer = DebiasedCG(model.parameters(), adapt_damping=True)
    optimizer.step(
        counted("first", closure_over(model, *first)),
        counted("second", closure_over(model, *second)),
    )
    assert calls == [("first", True), ("second", True), ("second", False)]


@pytest.mark.parametrize(
    "options", [{}, {"subspace": True}, {"debias": False}], ids=str
)
def test_training_reaches_a_low_loss(options):
    model = network("mlp")
    X, _ = batch("mlp", 200)
    y = (X @ torch.randn(X.shape[1], 3).to(X)).argmax(1)
    optimizer = DebiasedCG(model.parameters(), adapt_damping=True, **options)
    before = cross_entropy(model(X), y).item()
    for _ in range(40):
        optimizer.step(closure_over(model, X, y))
    assert cross_entropy(model(X), y).item() < 0.5 * before


@pytest.mark.parametrize("debias", [True, False])
def test_networks_with_attention_can_be_trained(debias):
    model = network("transformer")
    before = weights(model)
    optimizer = DebiasedCG(model.parameters(), debias=debias)
    optimizer.step(closure_over(model, *batch("transformer", SIZE)))
    assert not torch.equal(weights(model), before)


@pytest.mark.parametrize(("adapt", "num_calls"), [(False, 2), (True, 3)])
def test_each_call_of_a_closure_updates_running_statistics(adapt, num_calls):
    model, (X, y) = network("resnet").train(), batch("resnet", SIZE)
    closures = [closure_over(model, *half) for half in halves(X, y)]
    DebiasedCG(model.parameters(), adapt_damping=adapt).step(*closures)
    assert model[1].num_batches_tracked == num_calls
    assert all(module.training for module in model.modules())


def test_in_train_mode_the_quadratic_is_that_of_batch_statistics():
    model, (X, y) = network("resnet").train(), batch("resnet", SIZE)
    params = list(model.parameters())
    own = BatchQuadratic(*closure_over(model, X, y)(), params)
    gradient = torch.autograd.grad(cross_entropy(model(X), y), params)
    assert torch.allclose(own.gradient, parameters_to_vector(gradient))
    V = torch.randn(len(own.gradient), 2).double()
    J = torch.stack(
        [
            parameters_to_vector(torch.autograd.grad(f, params, retain_graph=True))
            for f in model(X).flatten()
        ]
    )
    f = model(X).detach()
    curvature = torch.func.hessian(lambda f: cross_entropy(f, y))(f)
    expected = J.T @ curvature.reshape(len(J), -1) @ J @ V
    products = torch.stack([own @ v for v in V.T], 1)
    assert dense.relative_error(products, expected) < 1e-10


def test_state_goes_on_where_it_was_saved(tmp_path):
    models = [network("mlp") for _ in range(2)]
    X, y = batch("mlp", SIZE)
    options = {"warm_start": 0.9, "adapt_damping": True}
    optimizers = [DebiasedCG(m.parameters(), **options) for m in models]
    for _ in range(3):
        optimizers[0].step(closure_over(models[0], X, y))
    torch.save(optimizers[0].state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(state)
    for model, optimizer in zip(models, optimizers, strict=True):
        optimizer.step(closure_over(model, X, y))
    assert torch.equal(weights(models[0]), weights(models[1]))


def test_a_schedule_works_as_with_other_optimizers():
    model = network("mlp")
    optimizer = DebiasedCG(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step(closure_over(model, *batch("mlp", SIZE)))
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_parameters_without_gradient_stay():
    model, (X, y) = network("mlp"), batch("mlp", SIZE)
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    bias = model[0].bias.clone()
    DebiasedCG(model.parameters()).step(closure_over(model, X, y))
    assert torch.equal(model[0].weight, before)
    assert not torch.equal(model[0].bias, bias)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "`lr` must lie in"),
        ({"damping": -0.1}, "`damping` must lie in"),
        ({"rtol": 2.0}, "`rtol` must lie in"),
        ({"warm_start": 1.5}, "`warm_start` must lie in"),
        ({"max_iterations": 0}, "`max_iterations` must be at least 1"),
        ({"damping": 0.0, "adapt_damping": True}, "needs a positive `damping`"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DebiasedCG(network("mlp").parameters(), **options)


def test_parameters_may_have_any_memory_layout():
    name = "cnn-stride-padding"
    data, steps = batch(name, SIZE), []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = network(name).to(memory_format=memory_format)
        DebiasedCG(model.parameters()).step(closure_over(model, *data))
        steps.append([p.detach() for p in model.parameters()])
        assert model[0].weight.is_contiguous(memory_format=memory_format)
    assert all(torch.allclose(a, b) for a, b in zip(*steps, strict=True))


def test_bad_batches_are_refused_and_change_nothing():
    model, (X, y) = network("mlp"), batch("mlp", SIZE)
    optimizer = DebiasedCG(model.parameters())
    before = weights(model)
    with pytest.raises(ValueError, match="To split a mini-batch"):
        optimizer.step(closure_over(model, X, y, "mean"))
    X[0] = float("nan")
    with pytest.raises(ValueError, match="The loss is nan"):
        optimizer.step(closure_over(model, X, y))
    assert torch.equal(weights(model), before)
    groups = [{"params": [p]} for p in model.parameters()]
    with pytest.raises(ValueError, match="one parameter group"):
        DebiasedCG(groups)
    optimizer = DebiasedCG([next(model.parameters())])
    with pytest.raises(ValueError, match="one parameter group"):
        optimizer.add_param_group({"params": list(model[2].parameters())})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("count", [1, 2])
def test_closures_must_return_losses_and_output(count):
    model, (X, y) = network("mlp"), batch("mlp", SIZE)
    closure = closure_over(model, X, y)
    closures = [closure, lambda: closure()[0]][-count:]
    with pytest.raises(TypeError, match=r"must return a pair .* got Tensor"):
        DebiasedCG(model.parameters()).step(*closures)


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_step_is_made_as_a_whole_or_not_at_all(fails_at):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    X, y = torch.randn(20, 3), torch.randn(20, 1)
    optimizer = DebiasedCG(model.parameters(), adapt_damping=True, warm_start=0.5)
    calls = []

    def closure():
        calls.append(1)
        if len(calls) == fails_at + 3:
            raise KeyboardInterrupt
        output = model(X)
        return (output - y).square().sum(1), output

    optimizer.step(closure, closure)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure, closure)
    assert same((dict(model.state_dict()), optimizer.state_dict()), before)


def ridge(model, X, Y, penalty):
    def closure(rows=slice(None)):
        output = model(X[rows])
        squares = sum(p.square().sum() for p in model.parameters())
        return (output - Y[rows]).square().sum(1) + penalty * squares, output

    return closure


def regression():
    torch.manual_seed(0)
    X, Y = torch.randn(40, 4).double(), torch.randn(40, 1).double()
    return torch.nn.Linear(4, 1, bias=False).double(), X, Y


@pytest.mark.parametrize("debias", [False, True])
def test_penalties_count_in_the_gradient(debias):
    """With their curvature as damping, the minimum is that of the penalized loss."""
    model, X, Y = regression()
    closure = ridge(model, X, Y, 3.0)
    options = {"max_iterations": 20, "rtol": 1e-10, "debias": debias}
    optimizer = DebiasedCG(model.parameters(), damping=6.0, **options)
    closures = [closure, closure] if debias else [closure]  # one batch in both roles
    loss = optimizer.step(*closures)
    exact = torch.linalg.solve(X.T @ X / 40 + 3 * torch.eye(4).double(), X.T @ Y / 40)
    assert torch.allclose(model.weight.T, exact)
    assert closure()[0].mean() < loss


def test_gradients_of_both_batches_are_those_of_their_losses():
    model, X, Y = regression()
    optimizer = DebiasedCG(model.parameters())
    parts = [slice(0, 20), slice(20, 40)]
    closure = ridge(model, X, Y, 3.0)
    expected = [
        torch.autograd.grad(closure(part)[0].mean(), model.weight)[0] for part in parts
    ]
    for closures in [(closure, None), [lambda p=part: closure(p) for part in parts]]:
        for own, exact in zip(optimizer._quadratics(*closures), expected, strict=True):
            assert torch.allclose(own.gradient, exact.flatten())


def test_losses_may_be_linear_in_the_output():
    model, X, Y = regression()
    before, output = weights(model), model(X)
    DebiasedCG([model.weight], damping=2.0).step(*2 * [lambda: (output * Y, output)])
    assert torch.allclose(weights(model), before - (X.T @ Y)[:, 0] / 80)
