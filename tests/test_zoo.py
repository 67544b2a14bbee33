"""Each architecture of the zoo is exact, left out by name, or refused by name."""

import warnings
from itertools import product

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from laplace_debiased import (
    DebiasedCG,
    DebiasedKFACLinearOperator,
    bias_report,
    curvature_scores,
    directional_derivatives,
)
from laplace_debiased.curvature.bases import as_matrix
from laplace_debiased.curvature.directional import DirectionalCurvatures
from laplace_debiased.curvature.factors import KroneckerFactors
from laplace_debiased.curvature.kronecker import Kronecker
from laplace_debiased.rows.output_curvature import OutputCurvature
from laplace_debiased.rows.sweep import sweep
from tests import dense, zoo
from tests.fits import debiased, posterior
from tests.rows.recording import supported
from tests.zoo import EXACT, FITTED, REFUSED, ZOO, plain

SIZE, PREDICTED = 10, 3
LOSS = nn.CrossEntropyLoss(reduction="sum")
# functions for which torch has no forward mode, and networks in which laplace-torch
# finds no last layer, or that cannot be copied
WITHOUT_FORWARD_MODE = ["weight norm", "weight norm, by a hook"]
WITHOUT_LAST_LAYER = {
    "u-net": "linear last layer",
    "attention, batch first": "all modules have children",
    "attention, sequence first": "all modules have children",
    "weight norm, by a hook": "deepcopy",
    "pruned": "deepcopy",
}


class Points(Dataset):
    """Examples as pairs, or as mappings if inputs are."""

    def __init__(self, X, y):
        self.X, self.y = X, y

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        if isinstance(self.X, dict):
            inputs = {key: value[index] for key, value in self.X.items()}
            return inputs | {"labels": self.y[index]}
        return self.X[index], self.y[index]


def loader(X, y, batch_size=4):
    return DataLoader(Points(X, y), batch_size)


def batches(X, y):
    """Inputs and targets, the last batch of which has another size."""

    def rows(value, part):
        if isinstance(value, dict):
            return {key: own[part] for key, own in value.items()}
        return value[part]

    return [(rows(X, part), y[part]) for part in torch.arange(len(y)).split(4)]


def free(model):
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def identities(model):
    """All places where there is a parameter, and which one."""
    return {
        (f"{name}.{key}", id(param), type(param), param.requires_grad)
        for name, module in model.named_modules(remove_duplicate=False)
        for key, param in module._parameters.items()
        if param is not None
    }


def fit(model, X, y, **options):
    la = debiased(model, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        la.fit(loader(X, y))
    messages = [str(w.message) for w in caught]
    return la, next((m for m in messages if "stay at their trained" in m), "")


@pytest.mark.parametrize("name", FITTED)
def test_what_is_left_out_is_named(name):
    model, (X, y) = zoo.build(name), zoo.data(name, SIZE)
    for dense_rows in (True, False):
        reasons = {key: ZOO[name].reason(key, dense_rows) for key, _ in free(model)}
        expected = {key: reason for key, reason in reasons.items() if reason}
        own = [param for _, param in free(model)]
        _, _, left_out = supported(model, X, own, len(y), dense_rows)
        assert {entry.name for entry in left_out} == set(expected)
        for entry in left_out:
            assert expected[entry.name] in entry.reason
    _, message = fit(model, X, y)
    for entry in left_out:
        assert all(part in message for part in (entry.kind, entry.reason))
    if expected:
        with pytest.raises(ValueError, match="not supported"):
            fit(model, X, y, strict=True)
    else:
        assert not message


def orthogonal(size, generator):
    return torch.linalg.qr(
        torch.randn(size, size, dtype=torch.float64, generator=generator)
    )[0]


@pytest.mark.parametrize("name", FITTED)
def test_factors_and_directional_curvature_are_exact(name):
    model, (X, y) = zoo.build(name), zoo.data(name, SIZE)
    own = [param for _, param in free(model)]
    params, layers, _ = supported(model, X, own, len(y))
    generator = torch.Generator().manual_seed(2)
    weights = torch.rand(SIZE, generator=generator, dtype=torch.float64)

    def measured(accumulator):
        curvature = OutputCurvature(LOSS)
        data = batches(X, y)
        sweep(model, params, layers, data, curvature, accumulator, weights=weights)
        return accumulator

    factors = measured(KroneckerFactors(layers, params)).factors()
    blocks = dense.ggn_blocks(plain(model), X, y, LOSS, weights=weights, params=params)
    own = [p for layer in layers if has_rows(layer) for p in layer.parameters]
    options = {"weights": weights, "params": [params[k] for k in own]}
    expected = dense.kronecker_factors(plain(model), X, y, LOSS, **options)
    actual = {
        id(params[layer.parameters[0]]): own.tensors()
        for layer, own in zip(layers, factors, strict=True)
        if has_rows(layer)
    }
    assert len(actual) == len(expected)
    for owner, reference in expected.items():
        key = id(owner.weight if isinstance(owner, dense.Owner) else owner)
        for computed, exact in zip(actual[key], reference, strict=True):
            assert (computed - exact).norm() <= 1e-8 * exact.norm() + 1e-12
    for layer, own in zip(layers, factors, strict=True):
        if layer.calls:
            exact = blocks[layer.vector]
            exact = exact.diagonal() if layer.is_diagonal else exact
            assert (own.gradients - exact).norm() <= 1e-8 * exact.norm() + 1e-12

    directions = [own.map(lambda f: basis_of(f, generator)) for own in factors]
    spectra = measured(DirectionalCurvatures(layers, directions)).spectra()
    for layer, basis, spectrum in zip(layers, directions, spectra, strict=True):
        for position, values, vectors in along(layer, basis, spectrum):
            exact = (vectors.T @ blocks[position] @ vectors).diagonal()
            error = (values.reshape(-1) - exact).norm()
            assert error <= 1e-8 * exact.norm() + 1e-12


def has_rows(layer):
    """Whether the layer has dense rows."""
    return not (layer.calls or layer.is_embedding)


def basis_of(factor, generator):
    """Some basis: of a diagonal factor, the unit vectors."""
    if factor.ndim == 1:
        return torch.ones_like(factor)
    return orthogonal(len(factor), generator)


def along(layer, basis: Kronecker, spectrum):
    """Each parameter of a layer, with its curvatures and directions."""
    outer = as_matrix(basis.gradients)
    if layer.matrix is not None:
        inner = as_matrix(basis.inputs)
        yield (
            layer.matrix,
            layer.as_stored(spectrum.matrix),
            dense.kronecker(layer, outer.contiguous(), inner.contiguous()),
        )
    if layer.vector is not None:
        yield layer.vector, spectrum.vector, outer


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize("name", FITTED)
def test_predictions_are_exact_and_the_network_stays(name, magnitudes):
    model, (X, y) = zoo.build(name), zoo.data(name, SIZE)
    before = identities(model)
    la, _ = fit(model, X, y, magnitudes=magnitudes)
    Z, _ = zoo.data(name, PREDICTED, seed=5)
    f_mu, f_var = la._glm_predictive_distribution(Z)
    J = dense.jacobians(plain(model), Z, PREDICTED, la.fitted_params)
    assert torch.allclose(f_mu, plain(model)(Z))
    expected = J @ torch.linalg.solve(posterior(la), J.mT)
    assert dense.relative_error(f_var, expected) < 1e-8

    generator = torch.Generator().manual_seed(0)
    outputs = la.functional_samples(Z, "nn", 2, generator=generator)
    samples = la.sample(2, generator=generator.manual_seed(0))
    assert identities(model) == before
    nn.utils.vector_to_parameters(samples[1], la.fitted_params)
    assert torch.allclose(plain(model)(Z), outputs[1])


# functions into which no mode reaches
HIDDEN = ["scripted function", "a layer of its own"]
COMPLEX = "neural operator"
WITHOUT_DERIVATIVES = [*WITHOUT_FORWARD_MODE, *HIDDEN, COMPLEX]
FORWARD = [name for name in FITTED if name not in WITHOUT_DERIVATIVES]


@pytest.mark.parametrize(
    ("name", "mode"),
    [(n, "forward") for n in FORWARD] + [(n, "reverse") for n in EXACT],
)
def test_derivatives_are_exact(name, mode):
    model, (X, y) = zoo.build(name), zoo.data(name, SIZE)
    before, params = identities(model), [param for _, param in free(model)]
    size = sum(param.numel() for param in params)
    D = torch.randn(size, 3, dtype=torch.float64)
    data = batches(X, y)
    actual = directional_derivatives(model, LOSS, params, data, D, mode=mode)
    assert identities(model) == before
    f = plain(model)(X)
    Jd = dense.jacobians(plain(model), X, SIZE, params) @ D
    residuals = f.softmax(1) - nn.functional.one_hot(y, f.shape[1])
    p = f.softmax(1)
    slopes = torch.einsum("nc,nck->nk", residuals, Jd)
    curvatures = torch.einsum("nc,nck->nk", p, Jd**2)
    curvatures -= torch.einsum("nc,nck->nk", p, Jd) ** 2
    assert dense.relative_error(actual.slopes, slopes) < 1e-8
    assert dense.relative_error(actual.curvatures, curvatures) < 1e-8


@pytest.mark.parametrize("name", FITTED)
def test_last_layers_are_exact(name):
    model, (X, y) = zoo.build(name), zoo.data(name, SIZE)
    before = identities(model)
    if name in WITHOUT_LAST_LAYER:
        with pytest.raises((ValueError, RuntimeError), match=WITHOUT_LAST_LAYER[name]):
            debiased(model, subset="last_layer").fit(loader(X, y))
        return
    la = debiased(model, subset="last_layer", magnitudes="ggn")
    la.fit(loader(X, y))
    Z, _ = zoo.data(name, PREDICTED, seed=5)
    f_mu, f_var = la._glm_predictive_distribution(Z)
    copy = plain(la.model.model)
    J = dense.jacobians(copy, Z, PREDICTED, la.fitted_params)
    assert torch.allclose(f_mu, plain(model)(Z))
    expected = J @ torch.linalg.solve(posterior(la), J.mT)
    assert dense.relative_error(f_var, expected) < 1e-8
    generator = torch.Generator().manual_seed(0)
    outputs = la.functional_samples(Z, "nn", 2, generator=generator)
    samples = la.sample(2, generator=generator.manual_seed(0))
    nn.utils.vector_to_parameters(samples[1], la.fitted_params)
    assert torch.allclose(copy(Z), outputs[1])
    assert identities(model) == before


@pytest.mark.parametrize("name", EXACT)
def test_the_operator_is_exact(name):
    model, (X, y) = zoo.build(name), zoo.data(name, SIZE)
    before, params = identities(model), [param for _, param in free(model)]
    data = batches(X, y)
    arguments = (model, LOSS, params, data, data)
    operator = DebiasedKFACLinearOperator(*arguments, magnitudes="ggn")
    blocks = dense.ggn_blocks(plain(model), X, y, LOSS, params=params)
    trace = sum(block.trace() for block in blocks)
    assert abs(operator.trace - trace) < 1e-8 * trace
    gradients, loss = operator.gradient_and_loss()
    expected = LOSS(plain(model)(X), y)
    assert torch.allclose(loss, expected)
    exact = torch.autograd.grad(expected, params)
    for actual, own in zip(gradients, exact, strict=True):
        assert torch.allclose(actual, own)
    assert curvature_scores(model, LOSS, data).shape == (SIZE,)
    assert identities(model) == before


@pytest.mark.parametrize("directions", ["cg", "eigenvectors"])
@pytest.mark.parametrize("name", ["aliased modules", "tied weights", "model output"])
def test_bias_reports_leave_the_network_as_it_is(name, directions):
    """Other libraries' functional calls lose parameters of aliased modules."""
    model, (X, y) = zoo.build(name), zoo.data(name, 12)
    before = identities(model)
    report = bias_report(
        model,
        LOSS,
        list(model.parameters()),
        loader(X, y),
        directions=directions,
        num_directions=3,
        batch_size=4,
        num_batches=1,
        curvature="hessian",
    )
    assert report.curvature.own.isfinite().all()
    assert identities(model) == before


@pytest.mark.parametrize("directions", ["cg", "eigenvectors"])
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("name", HIDDEN)
def test_parameters_that_cannot_be_replaced_are_refused(name, curvature, directions):
    model, (X, y) = zoo.build(name), zoo.data(name, 12)
    params = list(model.parameters())
    options = {"num_directions": 3, "batch_size": 4, "num_batches": 1}
    with pytest.raises(ValueError, match=r"their own: body\.weight"):
        bias_report(
            model,
            LOSS,
            params,
            loader(X, y),
            curvature=curvature,
            directions=directions,
            **options,
        )
    with pytest.raises(ValueError, match=r"their own: body\.weight"):
        derivatives(model, X, y, "forward")


def test_complex_parameters_are_refused_where_directions_are_real():
    model, (X, y) = zoo.build(COMPLEX), zoo.data(COMPLEX, SIZE)
    params = list(model.parameters())
    match = "1 of `params` are complex"
    with pytest.raises(ValueError, match=match):
        DebiasedCG(params)
    with pytest.raises(ValueError, match=match):
        bias_report(model, LOSS, params, loader(X, y))
    for mode in ("forward", "reverse"):
        with pytest.raises(ValueError, match=match):
            derivatives(model, X, y, mode)


ENTRIES = {
    "fit": lambda model, X, y: fit(model, X, y),
    "operator": lambda model, X, y: DebiasedKFACLinearOperator(
        model, LOSS, list(model.parameters()), batches(X, y), batches(X, y)
    ).compute(),
    "derivatives": lambda model, X, y: derivatives(model, X, y, "reverse"),
}
# these need no rows
OTHER_ENTRIES = {
    "derivatives, forward": lambda model, X, y: derivatives(model, X, y, "forward"),
    "scores": lambda model, X, y: curvature_scores(model, LOSS, batches(X, y)),
}
REFUSED_WITHOUT_ROWS = [
    name for name in REFUSED if name not in ("scripted", "reentrant checkpointing")
]


def derivatives(model, X, y, mode):
    params = list(model.parameters())
    D = torch.ones(sum(p.numel() for p in params), 1, dtype=torch.float64)
    data = batches(X, y)
    return directional_derivatives(model, LOSS, params, data, D, mode=mode)


@pytest.mark.parametrize(
    ("name", "entry"),
    [*product(REFUSED, ENTRIES), *product(REFUSED_WITHOUT_ROWS, OTHER_ENTRIES)],
)
def test_what_is_refused_says_why(name, entry):
    model, (X, y) = zoo.build(name), zoo.data(name, SIZE)
    before = identities(model)
    with pytest.raises(ValueError, match=ZOO[name].refused):
        (ENTRIES | OTHER_ENTRIES)[entry](model, X, y)
    assert identities(model) == before
