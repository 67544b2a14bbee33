from unittest import mock

import pytest
import torch
from curvlinops import EKFACLinearOperator, KFACLinearOperator
from torch import nn

from laplace_debiased import DebiasedKFACLinearOperator
from laplace_debiased.rows.sweep import sweep
from tests import dense
from tests.cases import LOSSES, NETWORKS, batch, network, split

SIZE = 40


def sources(name, loss="cross-entropy"):
    """Direction and magnitude data, in several batches."""
    X, y = batch(name, 2 * SIZE, loss)
    return (X[:SIZE], y[:SIZE]), (X[SIZE:], y[SIZE:])


def operator(model, direction_data, magnitude_data, loss_func=None, **kwargs):
    return DebiasedKFACLinearOperator(
        model,
        nn.CrossEntropyLoss(reduction="sum") if loss_func is None else loss_func,
        list(model.parameters()),
        split(*direction_data, 7, SIZE - 7),
        split(*magnitude_data, SIZE - 1, 1),
        **kwargs,
    )


def matrix(linear_operator):
    size, dtype = linear_operator.shape[0], linear_operator.dtype
    return linear_operator @ torch.eye(size, dtype=dtype)


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize("name", NETWORKS)
def test_operator_equals_dense_reference(name, magnitudes, fisher_type):
    model = network(name)
    directions, others = sources(name)
    loss = nn.CrossEntropyLoss(reduction="sum")
    bases = dense.eigenbases(
        dense.kronecker_factors(model, *directions, loss, fisher_type)
    )
    if magnitudes == "kfac":
        factors = dense.kronecker_factors(model, *others, loss, fisher_type)
        blocks = dense.kfac_blocks(factors)
    else:
        blocks = dense.ggn_blocks(model, *others, loss, fisher_type)
    expected = dense.debiased(bases, blocks)

    actual = operator(
        model, directions, others, magnitudes=magnitudes, fisher_type=fisher_type
    )
    assert dense.relative_error(matrix(actual), expected) < 1e-8


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize("loss_name", LOSSES)
@pytest.mark.parametrize("name", ["mlp", "sequence"])
def test_operator_equals_dense_reference_for_each_loss(name, loss_name, magnitudes):
    model = network(name)
    directions, others = sources(name, loss_name)
    loss = LOSSES[loss_name](reduction="sum")
    bases = dense.eigenbases(dense.kronecker_factors(model, *directions, loss))
    if magnitudes == "kfac":
        blocks = dense.kfac_blocks(dense.kronecker_factors(model, *others, loss))
    else:
        blocks = dense.ggn_blocks(model, *others, loss)
    actual = operator(model, directions, others, loss, magnitudes=magnitudes)
    expected = dense.debiased(bases, blocks)
    assert dense.relative_error(matrix(actual), expected) < 1e-8


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize("name", ["cnn-padding", "sequence"])
def test_reduce_takes_directions_from_reduced_factors(name, magnitudes):
    model = network(name)
    directions, others = sources(name)
    loss = nn.CrossEntropyLoss(reduction="sum")
    bases = dense.eigenbases(
        dense.kronecker_factors(model, *directions, loss, reduce=True)
    )
    if magnitudes == "kfac":
        factors = dense.kronecker_factors(model, *others, loss, reduce=True)
        blocks = dense.kfac_blocks(factors)
    else:
        blocks = dense.ggn_blocks(model, *others, loss)
    actual = operator(
        model, directions, others, magnitudes=magnitudes, kfac_approx="reduce"
    )
    expected = dense.debiased(bases, blocks)
    assert dense.relative_error(matrix(actual), expected) < 1e-8


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("loss_name", LOSSES)
@pytest.mark.parametrize("name", ["mlp", "cnn-stride-padding", "sequence"])
@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
def test_same_data_in_both_roles_equals_curvlinops(
    name, loss_name, separate, reduction, fisher_type
):
    model = network(name)
    X, y = batch(name, SIZE, loss_name)
    data = split(X, y, 15, 25)
    loss = LOSSES[loss_name](reduction=reduction)
    params = list(model.parameters())
    options = {"fisher_type": fisher_type, "separate_weight_and_bias": separate}
    kfac = KFACLinearOperator(model, loss, params, data, **options)
    ekfac = EKFACLinearOperator(model, loss, params, data, **options)
    for magnitudes, expected in [("kfac", kfac), ("ggn", ekfac)]:
        actual = DebiasedKFACLinearOperator(
            model, loss, params, data, data, magnitudes=magnitudes, **options
        )
        assert dense.relative_error(matrix(actual), matrix(expected)) < 1e-8


@pytest.mark.parametrize("name", ["conv1d", "cnn-groups", "cnn-circular"])
def test_ggn_magnitudes_are_exact_where_curvlinops_is_not(name):
    # curvlinops averages channel groups, ignores padding modes, and has no Conv1d
    model = network(name)
    X, y = batch(name, SIZE)
    loss = nn.CrossEntropyLoss(reduction="sum")
    actual = operator(model, (X, y), (X, y), magnitudes="ggn")
    exact_trace = sum(b.trace() for b in dense.ggn_blocks(model, X, y, loss))
    assert torch.allclose(actual.trace, exact_trace, rtol=1e-10)


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize("loss_name", LOSSES)
def test_mc_fisher_converges_to_type_2(loss_name, magnitudes):
    model = network("mlp")
    directions, others = sources("mlp", loss_name)
    loss = LOSSES[loss_name](reduction="sum")
    exact = operator(model, directions, others, loss, magnitudes=magnitudes)
    sampled = operator(
        model,
        directions,
        others,
        loss,
        magnitudes=magnitudes,
        fisher_type="mc",
        mc_samples=500,
    )
    assert torch.allclose(sampled.trace, exact.trace, rtol=0.1)
    fewer = operator(
        model, directions, others, loss, magnitudes=magnitudes, fisher_type="mc"
    )
    assert not torch.allclose(fewer.trace, exact.trace, rtol=1e-4)


@pytest.mark.parametrize("fisher_type", ["type-2", "mc"])
def test_same_seed_gives_the_same_operator(fisher_type):
    model = network("mlp")
    first, second, third = (
        operator(model, *sources("mlp"), fisher_type=fisher_type, seed=seed)
        for seed in (1, 1, 2)
    )
    assert torch.equal(matrix(first), matrix(second))
    assert torch.equal(matrix(first), matrix(third)) == (fisher_type == "type-2")


def test_the_roles_do_not_share_the_noise_of_sampled_labels():
    model, seeds = network("mlp"), []
    for seed in range(3):
        with mock.patch(
            "laplace_debiased.curvature.operator.sweep", wraps=sweep
        ) as sweeping:
            operator(model, *sources("mlp"), fisher_type="mc", seed=seed).compute()
        seeds += [call.kwargs["seed"] for call in sweeping.call_args_list]
    assert len(set(seeds)) == len(seeds) == 6


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize("name", ["mlp", "cnn-stride-padding"])
def test_integer_weights_equal_repeated_examples(name, magnitudes, reduction):
    model = network(name)
    params = list(model.parameters())
    loss = nn.CrossEntropyLoss(reduction=reduction)
    (X, y), (Z, w) = sources(name)
    counts = torch.randint(1, 4, (SIZE,), generator=torch.Generator().manual_seed(0))
    weighted = operator(
        model,
        (X, y),
        (Z, w),
        loss,
        magnitudes=magnitudes,
        direction_weights=counts.double(),
        magnitude_weights=counts.double(),
    )
    repeated = DebiasedKFACLinearOperator(
        model,
        loss,
        params,
        [(X.repeat_interleave(counts, 0), y.repeat_interleave(counts))],
        [(Z.repeat_interleave(counts, 0), w.repeat_interleave(counts))],
        magnitudes=magnitudes,
    )
    assert dense.relative_error(matrix(weighted), matrix(repeated)) < 1e-8


def test_fractional_weights_equal_dense_reference():
    model = network("mlp")
    directions, others = sources("mlp")
    loss = nn.CrossEntropyLoss(reduction="sum")
    weights = torch.rand(SIZE, dtype=torch.float64)
    actual = operator(
        model,
        directions,
        others,
        magnitudes="ggn",
        direction_weights=weights,
        magnitude_weights=weights,
    )
    bases = dense.eigenbases(
        dense.kronecker_factors(model, *directions, loss, weights=weights)
    )
    blocks = dense.ggn_blocks(model, *others, loss, weights=weights)
    expected = dense.debiased(bases, blocks)
    assert dense.relative_error(matrix(actual), expected) < 1e-8


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("name", ["mlp", "cnn-stride-padding"])
def test_properties_equal_dense_algebra(name, separate, magnitudes):
    model = network(name)
    linear_operator = operator(
        model,
        *sources(name),
        magnitudes=magnitudes,
        separate_weight_and_bias=separate,
    )
    H = matrix(linear_operator)
    assert torch.allclose(H, H.T)
    assert torch.allclose(linear_operator.trace, H.trace())
    assert torch.allclose(linear_operator.frobenius_norm, H.norm())
    damped = H + 0.3 * torch.eye(len(H), dtype=H.dtype)
    inverse = matrix(linear_operator.inverse(damping=0.3))
    assert dense.relative_error(inverse, damped.inverse()) < 1e-8


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_determinant_equals_dense_algebra(magnitudes):
    model = network("mlp")
    directions, others = sources("mlp", "mse")
    loss = nn.MSELoss(reduction="sum")
    linear_operator = operator(model, directions, others, loss, magnitudes=magnitudes)
    H = matrix(linear_operator)
    assert torch.allclose(linear_operator.logdet, H.logdet())
    assert torch.allclose(linear_operator.det.log(), H.logdet())


def test_multiplies_vectors_lists_and_scipy_arrays():
    model = network("cnn-stride-padding")
    linear_operator = operator(model, *sources("cnn-stride-padding"))
    H = matrix(linear_operator)
    vector = torch.randn(H.shape[1], dtype=H.dtype)
    assert torch.allclose(linear_operator @ vector, H @ vector)
    params = list(model.parameters())
    pieces = vector.split([p.numel() for p in params])
    vectors = [v.view_as(p) for v, p in zip(pieces, params, strict=True)]
    product = torch.cat([p.flatten() for p in linear_operator @ vectors])
    assert torch.allclose(product, H @ vector)
    exported = linear_operator.to_scipy()
    assert torch.allclose(torch.as_tensor(exported @ vector.numpy()), H @ vector)
    assert torch.allclose(linear_operator.adjoint() @ vector, H @ vector)


def test_each_source_is_iterated_over_once():
    model = network("mlp")
    directions, others = sources("mlp")
    params = list(model.parameters())
    loss = nn.CrossEntropyLoss(reduction="sum")
    once = DebiasedKFACLinearOperator(
        model, loss, params, iter(split(*directions, 20, 20)), iter([others])
    )
    several = operator(model, directions, others)
    assert dense.relative_error(matrix(once), matrix(several)) < 1e-12


def test_dict_inputs_equal_tensor_inputs():
    class OnDict(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, data):
            return self.inner(data["x"])

    model = network("mlp")
    (X, y), (Z, w) = sources("mlp")
    expected = matrix(operator(model, (X, y), (Z, w)))
    actual = DebiasedKFACLinearOperator(
        OnDict(model),
        nn.CrossEntropyLoss(reduction="sum"),
        list(model.parameters()),
        [({"x": X, "ids": ["a"] * SIZE}, y)],
        [({"x": Z, "ids": ["b"] * SIZE}, w)],
    )
    assert dense.relative_error(matrix(actual), expected) < 1e-12


def test_acts_on_a_subset_of_parameters_whatever_their_flags():
    model = network("mlp")
    directions, others = sources("mlp")
    full = matrix(operator(model, directions, others))
    bias = model[0].bias.requires_grad_(False)
    only_bias = DebiasedKFACLinearOperator(
        model, nn.CrossEntropyLoss(reduction="sum"), [bias], [directions], [others]
    )
    start = model[0].weight.numel()
    block = full[start : start + bias.numel(), start : start + bias.numel()]
    assert dense.relative_error(matrix(only_bias), block) < 1e-8


def test_an_operator_needs_parameters():
    model, data = network("mlp"), [batch("mlp", SIZE)]
    with pytest.raises(ValueError, match="`params` is empty"):
        DebiasedKFACLinearOperator(model, nn.CrossEntropyLoss(), [], data, data)


def test_unsupported_parameters_are_refused_when_it_is_computed():
    model = nn.Sequential(nn.Bilinear(4, 4, 3)).double()
    model.forward = lambda x: model[0](x, x)
    linear_operator = operator(model, *sources("mlp"))
    with pytest.raises(ValueError, match="is used by `bilinear`"):
        linear_operator.compute()


def test_gradient_and_loss_are_those_of_the_magnitude_data():
    model = network("mlp")
    directions, (X, y) = sources("mlp")
    for reduction in ("sum", "mean"):
        loss = nn.CrossEntropyLoss(reduction=reduction)
        expected = loss(model(X), y)
        gradients = torch.autograd.grad(expected, list(model.parameters()))
        linear_operator = operator(model, directions, (X, y), loss)
        actual_gradients, actual = linear_operator.gradient_and_loss()
        assert torch.allclose(actual, expected)
        for a, b in zip(actual_gradients, gradients, strict=True):
            assert torch.allclose(a, b)


def test_bfloat16_is_summed_in_single_precision():
    directions, others = sources("mlp")
    exact = matrix(operator(network("mlp"), directions, others))
    half = [(X.bfloat16(), y) for X, y in (directions, others)]
    for magnitudes in ("kfac", "ggn"):
        rounded = operator(network("mlp").bfloat16(), *half, magnitudes=magnitudes)
        assert rounded.dtype == torch.bfloat16
        assert matrix(rounded).dtype == torch.bfloat16
        assert rounded.trace.isfinite()
    rounded = matrix(operator(network("mlp").bfloat16(), *half))
    assert dense.relative_error(rounded.double(), exact) < 0.1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"magnitudes": "full"}, "`magnitudes` must be one of"),
        ({"fisher_type": "forward-only"}, "`fisher_type` must be"),
        ({"kfac_approx": "sum"}, "`kfac_approx` must be"),
        ({"mc_samples": 2}, "`mc_samples` must be"),
        ({"fisher_type": "mc", "mc_samples": 0}, "`mc_samples` must be"),
        ({"loss_func": nn.L1Loss()}, "`loss_func` must be"),
        ({"loss_func": nn.MSELoss(reduction="none")}, "must have reduction"),
        (
            {"loss_func": nn.CrossEntropyLoss(weight=torch.ones(3))},
            "must not have `weight`",
        ),
    ],
)
def test_unsupported_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        operator(network("mlp"), *sources("mlp"), **kwargs)


@pytest.mark.parametrize("count", [SIZE - 1, SIZE + 1])
def test_weights_must_match_the_examples(count):
    linear_operator = operator(
        network("mlp"), *sources("mlp"), magnitude_weights=torch.ones(count)
    )
    with pytest.raises(ValueError, match="one each is needed"):
        linear_operator.compute()


@pytest.mark.parametrize("role", ["direction_weights", "magnitude_weights"])
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (-torch.ones(SIZE), r"at least zero, .* got -1.0..-1.0"),
        (torch.zeros(SIZE), "some of them positive"),
        (torch.full((SIZE,), float("nan")), "Weights must be finite"),
        (torch.ones(SIZE, 1), r"must have shape \[examples\], got \(40, 1\)"),
    ],
)
def test_bad_weights_are_refused(weights, message, role):
    linear_operator = operator(network("mlp"), *sources("mlp"), **{role: weights})
    with pytest.raises(ValueError, match=message):
        linear_operator.compute()


@pytest.mark.parametrize("module", [nn.BatchNorm1d(3), nn.Dropout()])
def test_models_that_vary_are_refused_and_stay(module):
    model = nn.Sequential(network("mlp"), module.double().train())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"Module '1' \({type(module).__name__}\)"):
        operator(model, *sources("mlp")).compute()
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)


def test_singular_operator_needs_damping():
    linear_operator = operator(network("mlp"), *sources("mlp"))
    with pytest.raises(ValueError, match="`damping` must make"):
        linear_operator.inverse(damping=-1.0)


def test_null_vector_of_the_output_curvature_survives_many_batches_in_float32():
    torch.manual_seed(0)
    model = nn.Linear(4, 10)
    nn.init.normal_(model.weight, std=4)
    X, y = torch.randn(10_000, 4), torch.randint(10, (10_000,))
    data = split(X, y, *[20] * 500)
    operator = DebiasedKFACLinearOperator(
        model,
        nn.CrossEntropyLoss(reduction="sum"),
        list(model.parameters()),
        data,
        data,
        magnitudes="ggn",
    )
    # equal changes of all logits change no probability
    null = torch.ones(10) / 10**0.5
    vectors, spectrum = operator.eigenvectors[0][0], operator.spectra[0]
    index = (vectors.T @ null).abs().argmax()
    assert spectrum[index].max() < 1e-12 * spectrum.max()
