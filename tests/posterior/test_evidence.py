import warnings
from math import inf

import pytest
import torch
from laplace import KronLaplace
from laplace.utils.enums import PriorStructure

from laplace_debiased.curvature.eigenbasis import EigenbasisMatrix
from laplace_debiased.posterior.evidence import best_prior_precision, log_det_ratio
from tests.cases import network
from tests.fits import SUBSETS, debiased, loader


def evidence(blocks, squared_norm, delta):
    spectra = [torch.outer(*own) if len(own) == 2 else own[0] for own in blocks]
    values = torch.cat([own.flatten() for own in spectra])
    delta = torch.tensor(delta).double()
    terms = (values / delta).log1p()
    return -(terms.sum() + delta * squared_norm) / 2


BLOCKS = {
    "factored": [[torch.rand(7).double() * 100, torch.rand(5).double()]],
    "matrix": [[torch.rand(6, 4).double() * 30]],
    "vector and spread": [
        [torch.logspace(-12, 6, 40, dtype=torch.float64)],
        [torch.zeros(3).double(), torch.ones(2).double()],
    ],
}


@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("squared_norm", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("start", [1e-4, 1.0, 1e5])
def test_maximum_is_found_from_anywhere_in_few_steps(blocks, squared_norm, start):
    found = best_prior_precision(blocks, squared_norm, start, max_steps=20)
    best = evidence(blocks, squared_norm, found)
    for factor in (0.99, 1.01):
        assert evidence(blocks, squared_norm, factor * found) < best


def test_chunks_change_nothing(monkeypatch):
    blocks = BLOCKS["factored"]
    expected = best_prior_precision(blocks, 1.0, 1.0)
    monkeypatch.setattr("laplace_debiased.posterior.evidence._CHUNK_ENTRIES", 7)
    assert best_prior_precision(blocks, 1.0, 1.0) == pytest.approx(expected)


def test_log_determinants_of_many_parameters_do_not_cancel():
    """In single precision, each of the two has errors of whole units."""
    values = torch.rand(2000, 1500).double() ** 40
    vectors = [torch.empty(len(values), 0), torch.empty(values.shape[1], 0)]
    curvature = EigenbasisMatrix([vectors], [[values.float()]])
    for delta in (0.3, 100.0):
        found = log_det_ratio(curvature + torch.tensor(delta))
        expected = (values.float().double() / torch.tensor(delta)).log1p().sum()
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("damping", [False, True])
def test_the_log_determinants_ratio_is_their_difference(damping):
    la = debiased(network("mlp"), damping=damping, prior_precision=3.0)
    la.fit(loader())
    difference = la.log_det_posterior_precision - la.log_det_prior_precision
    torch.testing.assert_close(la.log_det_ratio, difference, rtol=1e-4, atol=0)


def test_there_need_not_be_a_maximum():
    assert best_prior_precision(BLOCKS["matrix"], 0.0, 1.0) == inf
    assert best_prior_precision([[torch.zeros(3)]], 1.0, 1.0) == 0


def by_gradient_ascent(la, structure, steps=700):
    """laplace-torch's own way, for long enough."""
    KronLaplace.optimize_prior_precision(
        la, method="marglik", prior_structure=structure, n_steps=steps, lr=0.05
    )
    return la.prior_precision


@pytest.mark.filterwarnings("ignore:By default")
@pytest.mark.parametrize("structure", [PriorStructure.SCALAR, PriorStructure.LAYERWISE])
@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_optimum_equals_that_of_gradient_ascent(
    magnitudes, likelihood, subset, structure
):
    la = debiased(
        network("mlp"),
        likelihood,
        subset,
        magnitudes=magnitudes,
        prior_mean=0.1,
        temperature=0.5,
    )
    if likelihood == "regression":
        la.sigma_noise = 0.3
    la.fit(loader(likelihood=likelihood))
    expected = by_gradient_ascent(la, structure)
    evidence_there = la.log_marginal_likelihood()
    la.prior_precision = 1.0
    la.optimize_prior_precision(prior_structure=structure, n_steps=10)
    assert torch.allclose(la.prior_precision, expected, rtol=1e-3)
    assert la.log_marginal_likelihood() >= evidence_there - 1e-9


def test_with_damping_gradient_ascent_is_left(capsys):
    la = debiased(network("mlp"), "regression", damping=True)
    la.fit(loader(likelihood="regression"))
    la.optimize_prior_precision(n_steps=3, lr=0.1)
    assert la.prior_precision.log().abs() < 0.31  # three steps
    free = debiased(network("mlp"), "regression")
    free.fit(loader(likelihood="regression"))
    free.optimize_prior_precision(verbose=True)
    assert "Optimized prior precision" in capsys.readouterr().out


def test_layers_without_a_maximum_are_named():
    model = network("mlp")
    model[2].weight.data.zero_()  # no gradient reaches the first layer
    la = debiased(model)
    la.fit(loader())
    with pytest.warns(UserWarning, match=r"precisions of 0.weight, 0.bias, 2.weight"):
        la.optimize_prior_precision(prior_structure="layerwise", init_prior_prec=3.0)
    assert la.prior_precision[:3].tolist() == [3.0] * 3
    assert la.prior_precision[3] != 3
    for parameter in model.parameters():
        parameter.data.zero_()
    la.fit(loader())
    with pytest.raises(ValueError, match="has no maximum"):
        la.optimize_prior_precision()
    assert la.prior_precision.isfinite().all()


NORMS = ("1.weight", "1.bias", "3.body.1.weight", "3.body.1.bias")


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_the_prior_of_normalizations_has_trained_values_as_its_mean(magnitudes):
    model = network("resnet")
    others = [p for name, p in model.named_parameters() if name not in NORMS]
    squared_norm = sum(p.detach().square().sum() for p in others)
    la = debiased(model, magnitudes=magnitudes, prior_precision=2.0)
    la.fit(loader("resnet"))
    assert torch.allclose(la.scatter, 2 * squared_norm)
    la.optimize_prior_precision()
    best = la.log_marginal_likelihood()
    for factor in (0.95, 1.05):
        other = la.log_marginal_likelihood(factor * la.prior_precision)
        assert other < best
        la.prior_precision = la.prior_precision / factor


def test_a_prior_mean_for_each_parameter_is_that_of_normalizations_too():
    model = network("resnet")
    size = sum(p.numel() for p in model.parameters())
    la = debiased(model, prior_mean=torch.zeros(size).double())
    la.fit(loader("resnet"))
    assert torch.allclose(la.scatter, la.mean.square().sum())


def test_layerwise_precisions_of_normalizations_are_those_of_all():
    la = debiased(network("resnet"))
    la.fit(loader("resnet"))
    la.optimize_prior_precision()
    scalar = la.prior_precision.item()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        la.optimize_prior_precision(prior_structure="layerwise")
    for k, precision in enumerate(la.prior_precision.tolist()):
        assert (precision == pytest.approx(scalar)) == (k in la._centred)


@pytest.mark.parametrize("options", [{}, {"magnitudes": "ggn"}, {"damping": True}])
@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("name", ["prior_precision", "sigma_noise", "temperature"])
def test_its_gradients_in_all_hyperparameters_are_exact(name, subset, options):
    if subset == "last_layer" and options.get("damping"):
        pytest.skip("a last layer has no damping")
    la = debiased(network("mlp"), "regression", subset, **options)
    la.fit(loader(likelihood="regression"))

    def evidence_at(value):
        setattr(la, name, value)
        return la.log_marginal_likelihood()

    value = torch.tensor(0.7, dtype=torch.float64)
    assert torch.autograd.gradcheck(evidence_at, value.requires_grad_())


@pytest.mark.parametrize("subset", SUBSETS)
def test_predictions_after_its_gradients_carry_no_graph(subset):
    la = debiased(network("mlp"), "regression", subset)
    train = loader(likelihood="regression")
    la.fit(train)
    precision, noise = torch.tensor([2.0, 0.5], requires_grad=True).double()
    la.log_marginal_likelihood(precision, noise)
    X, found = train.dataset.tensors[0], []
    for options in ({}, {"diagonal_output": True}, {"joint": True}):
        found += la(X, **options)
    found += [part for part in vars(la.uncertainty(X)).values() if part is not None]
    assert not any(tensor.requires_grad for tensor in found)
