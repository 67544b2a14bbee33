"""A matrix that is stored transposed has the same posterior, in its own order."""

import pytest
import torch
from laplace.curvature.backpack import BackPackGGN
from torch import nn
from transformers.pytorch_utils import Conv1D

from laplace_debiased import DebiasedKFACLinearOperator
from tests.cases import NUM_OUTPUTS, batch, network, split
from tests.fits import debiased, loader


def pair():
    """Linear layers, and layers that store the transposes of their weights."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh())
    plain.append(nn.Linear(5, NUM_OUTPUTS)).double()
    other = nn.Sequential(Conv1D(5, 4), nn.Tanh(), Conv1D(5, 5), nn.Tanh(), plain[4])
    for k in (0, 2):
        other[k].weight = nn.Parameter(plain[k].weight.detach().T.clone())
        other[k].bias = nn.Parameter(plain[k].bias.detach().clone())
    return plain, other


def reordered(vectors, like):
    """Parameters in the order of the plain network, as the other one stores them."""
    sizes = [param.numel() for param in like.parameters()]
    parts = [
        part.unflatten(-1, param.shape).mT.flatten(-2)
        if name in ("0.weight", "2.weight")
        else part
        for (name, param), part in zip(
            like.named_parameters(), vectors.split(sizes, -1), strict=True
        )
    ]
    return torch.cat(parts, -1)


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_posteriors_are_the_same(magnitudes):
    plain, other = pair()
    first, second = (debiased(net, magnitudes=magnitudes) for net in (plain, other))
    for la in (first, second):
        la.fit(loader())
        la.optimize_prior_precision()
    X, _ = batch("mlp", 5, seed=3)
    evidence = [la.log_marginal_likelihood() for la in (first, second)]
    assert torch.allclose(*evidence)
    assert torch.allclose(first(X), second(X))
    eye = torch.eye(first.n_params, dtype=torch.float64)
    precision = first.posterior_precision.to_matrix()
    order = reordered(eye, plain)  # rows of the plain order, columns of the other
    expected = order.T @ precision @ order
    assert torch.allclose(second.posterior_precision.to_matrix(), expected)
    variances = [la.posterior_precision.diag(-1) for la in (first, second)]
    assert torch.allclose(reordered(variances[0], plain), variances[1])


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize("separate", [True, False])
def test_operators_are_the_same(separate, magnitudes):
    data = split(*batch("mlp", 12), 6, 6)
    plain, other = pair()
    dense = []
    for net in (plain, other):
        params = list(net.parameters())
        operator = DebiasedKFACLinearOperator(
            net,
            nn.CrossEntropyLoss(),
            params,
            data,
            data,
            magnitudes=magnitudes,
            separate_weight_and_bias=separate,
        )
        size = sum(param.numel() for param in params)
        dense.append(operator @ torch.eye(size, dtype=torch.float64))
    order = reordered(torch.eye(len(dense[0]), dtype=torch.float64), plain)
    assert torch.allclose(dense[1], order.T @ dense[0] @ order)


@pytest.mark.parametrize("name", ["conv-transpose-2d", "products"])
def test_checkpoints_keep_the_order(name, tmp_path):
    model, (X, _) = network(name), batch(name, 5, seed=3)
    la = debiased(model, magnitudes="ggn")
    la.fit(loader(name))
    la.save(tmp_path / "la.pt")
    restored = debiased(model, magnitudes="ggn")
    restored.load(tmp_path / "la.pt")
    assert torch.equal(restored(X), la(X))


def test_other_backends_are_refused():
    """They have factors of transposed convolutions, but in another order."""
    model = network("conv-transpose-1d")
    la = debiased(model, backend=BackPackGGN)
    with pytest.raises(ValueError, match="no Kronecker factors for some"):
        la.fit(loader("conv-transpose-1d"))


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize("name", ["conv-transpose-2d", "conv-transpose-3d", "products"])
def test_points_contribute_to_the_traces(name, magnitudes):
    la = debiased(network(name), magnitudes=magnitudes, budget=30)
    la.fit(loader(name))
    error = la.sampling_error
    spectra = (la.H * la._H_factor).spectra()
    traces = [
        sum(spectra[position].sum() for position in layer.parameters)
        for layer in la._selection.layers
    ]
    assert torch.allclose(error.traces, torch.stack(traces), rtol=1e-6)
    assert all(value > 0 for value in la.curvature_standard_errors.values())
    assert la.log_marginal_likelihood_standard_error() > 0
