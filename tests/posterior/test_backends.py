import sys

import pytest
import torch
from laplace import KronLaplace, KronLLLaplace, Laplace
from laplace.curvature import AsdlEF, AsdlGGN, BackPackEF, BackPackGGN
from laplace.curvature.curvlinops import CurvlinopsEF, CurvlinopsGGN
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests import dense
from tests.cases import batch, network

SIZE = 40
FOREIGN = [AsdlGGN, AsdlEF, BackPackGGN]


def loader(likelihood="classification"):
    loss = "mse" if likelihood == "regression" else "cross-entropy"
    return DataLoader(TensorDataset(*batch("mlp", SIZE, loss)), 9)


@pytest.mark.parametrize("backend", FOREIGN)
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_same_data_in_both_roles_equals_laplace_torch(subset, likelihood, backend):
    reference_class = KronLaplace if subset == "all" else KronLLLaplace
    reference = reference_class(network("mlp"), likelihood, backend=backend)
    reference.fit(loader(likelihood))
    X = loader().dataset.tensors[0]
    predictions = reference(X)  # BackPACK's predictions remove hooks of all models
    model = network("mlp")
    la = Laplace(model, likelihood, subset, "kron_debiased", backend=backend)
    la.fit(loader(likelihood), magnitude_loader=loader(likelihood))
    actual = la.posterior_precision.to_matrix()
    expected = reference.posterior_precision.to_matrix()
    assert dense.relative_error(actual, expected) < 1e-8
    assert torch.allclose(la.loss, reference.loss)
    for prediction, expected in zip(la(X), predictions, strict=True):
        assert torch.allclose(prediction, expected)
    la.fit(loader(likelihood), magnitude_loader=loader(likelihood))
    assert torch.allclose(la.posterior_precision.to_matrix(), actual)


@pytest.mark.parametrize("backend", [AsdlGGN, BackPackGGN])
def test_exact_backends_agree(backend):
    posteriors = []
    for cls in (CurvlinopsGGN, backend):
        la = Laplace(
            network("mlp"), "classification", "all", "kron_debiased", backend=cls
        )
        la.fit(loader())
        posteriors.append(la.posterior_precision.to_matrix())
    assert dense.relative_error(*posteriors) < 1e-8


@pytest.mark.parametrize("backend", [AsdlGGN, AsdlEF, CurvlinopsGGN, CurvlinopsEF])
@pytest.mark.parametrize("trained", [["0.weight"], ["0.bias", "2.weight"]])
def test_frozen_parameters_take_no_part(trained, backend):
    def fitted(names):
        model = network("mlp")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        la = Laplace(model, "classification", "all", "kron_debiased", backend=backend)
        la.fit(loader(), magnitude_loader=loader())
        return model, la.H

    model, H = fitted(["0.weight", "0.bias", "2.weight", "2.bias"])
    names = [name for name, _ in model.named_parameters()]
    expected = [torch.kron(*v) if len(v) == 2 else v[0] for v in H.eigenvectors]
    expected = [
        basis @ torch.diag(values.flatten()) @ basis.T
        for basis, values in zip(expected, H.spectra(), strict=True)
    ]
    expected = [expected[names.index(name)] for name in trained]
    _, H = fitted(trained)
    error = dense.relative_error(H.to_matrix(), torch.block_diag(*expected))
    assert error < 1e-8


def test_unknown_options_of_a_backend_are_refused():
    options = {"asdl_fisher_kwargs": {"kfac_aprox": "reduce"}}
    la = Laplace(network("mlp"), "classification", "all", "kron_debiased", **options)
    with pytest.raises(ValueError, match=r"has \['kfac_aprox'\], but the curvlinops"):
        la.fit(loader())


@pytest.mark.parametrize("backend", FOREIGN)
def test_ggn_magnitudes_need_curvlinops(backend):
    with pytest.raises(ValueError, match="needs a curvlinops backend"):
        Laplace(
            network("mlp"),
            "classification",
            "all",
            "kron_debiased",
            magnitudes="ggn",
            backend=backend,
        )


def test_backends_without_kronecker_factors_say_so():
    la = Laplace(
        network("mlp"), "classification", "all", "kron_debiased", backend=BackPackEF
    )
    with pytest.raises(NotImplementedError, match="Unavailable"):
        la.fit(loader())


def test_layers_that_a_backend_skips_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double()
    la = Laplace(model, "classification", "all", "kron_debiased", backend=AsdlGGN)
    with pytest.raises(ValueError, match="AsdlGGN has no Kronecker factors"):
        la.fit(loader())


@pytest.mark.parametrize("backend", FOREIGN)
def test_bad_data_are_refused(backend):
    X, y = loader().dataset.tensors
    for inputs, targets, message in [
        (X * float("nan"), y, "Inputs contain NaN"),
        (X, y + 5, "must lie in"),
        (X, y.double(), "class indices"),
    ]:
        la = Laplace(
            network("mlp"), "classification", "all", "kron_debiased", backend=backend
        )
        with pytest.raises(ValueError, match=message):
            la.fit(DataLoader(TensorDataset(inputs, targets)))


def test_a_missing_backend_says_what_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "asdl", None)
    with pytest.raises(ModuleNotFoundError, match=r'"laplace-debiased\[asdl\]"'):
        Laplace(
            network("mlp"), "classification", "all", "kron_debiased", backend=AsdlGGN
        )
