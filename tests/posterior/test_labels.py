"""Labels that are 0 or 1: one logit, or one for each of several labels."""

import pytest
import torch
from laplace.curvature.asdl import AsdlGGN
from laplace.curvature.backpack import BackPackGGN
from laplace.curvature.curvlinops import CurvlinopsEF, CurvlinopsGGN
from torch import nn
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import Laplace
from tests import dense, zoo
from tests.cases import batch, network
from tests.fits import SIZE, SUBSETS, TWO_BATCH, debiased, loader, posterior, two_roles

BINARY = "binary_classification"
LOSS = nn.BCEWithLogitsLoss(reduction="sum")
X, Y = batch("mlp", SIZE, "bce")


def one_logit():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def two_classes(model):
    """The network of classes 0 and 1 that is the same."""
    return zoo.Model(
        lambda self, x: torch.cat([torch.zeros(len(x), 1), self.net(x)], 1), net=model
    )


def overconfident():
    model = network("mlp")
    with torch.no_grad():
        model[-1].weight *= 10
    return model


def data(y=Y, size=7):
    return DataLoader(TensorDataset(X, y), size)


def fitted(subset="all", y=Y, model=None, **options):
    model = network("mlp") if model is None else model
    la = debiased(model, BINARY, subset, prior_precision=0.5, **options)
    la.fit(data(y))
    return la


def fitted_pair(**options):
    """Posteriors of one logit, and of two classes, with the same parameters."""
    model = one_logit()
    la = fitted(y=Y[:, 0], model=model, **options)
    other = debiased(two_classes(model), prior_precision=0.5, **options)
    other.fit(data(Y[:, 0].long()))
    return la, other


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize("name", ["mlp", "cnn-stride-padding", "sequence"])
def test_posterior_equals_dense_reference(name, magnitudes):
    model, train = network(name), loader(name, BINARY)
    la = debiased(model, BINARY, magnitudes=magnitudes, seed=3, **TWO_BATCH)
    la.fit(train)
    (A, a), (B, b) = (
        [torch.cat(parts) for parts in zip(*source, strict=True)]
        for source in two_roles(train, seed=3)
    )
    bases = dense.eigenbases(dense.kronecker_factors(model, A, a, LOSS))
    if magnitudes == "kfac":
        blocks = dense.kfac_blocks(dense.kronecker_factors(model, B, b, LOSS))
    else:
        blocks = dense.ggn_blocks(model, B, b, LOSS)
    expected = SIZE / len(B) * dense.debiased(bases, blocks)
    expected += torch.eye(len(expected))
    assert dense.relative_error(posterior(la), expected) < 1e-8


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("backend", [CurvlinopsGGN, CurvlinopsEF])
def test_same_data_in_both_roles_give_the_kfac_of_the_loss(subset, backend):
    model = network("mlp")
    la = debiased(model, BINARY, subset, backend=backend)
    la.fit(data(), magnitude_loader=data(size=11))
    fisher_type = "empirical" if backend is CurvlinopsEF else "type-2"
    params = None if subset == "all" else list(model[-1].parameters())
    factors = dense.kronecker_factors(model, X, Y, LOSS, fisher_type, params=params)
    expected = dense.block_diagonal(dense.kfac_blocks(factors))
    expected += torch.eye(len(expected))
    assert dense.relative_error(posterior(la), expected) < 1e-8
    assert torch.allclose(la.loss, LOSS(model(X), Y))


@pytest.mark.parametrize("options", [{}, {"magnitudes": "ggn"}, {"budget": 20}])
def test_one_logit_is_two_classes(options):
    la, other = fitted_pair(**options)
    assert dense.relative_error(posterior(la), posterior(other)) < 1e-10
    _, f_var = la._glm_predictive_distribution(X)
    _, of_both = other._glm_predictive_distribution(X)
    assert torch.allclose(f_var[:, 0, 0], of_both[:, 1, 1])
    assert torch.allclose(la(X)[:, 0], other(X)[:, 1])
    evidence = [own.log_marginal_likelihood() for own in (la, other)]
    assert torch.allclose(*evidence)
    for own in (la, other):
        own.optimize_prior_precision()
    assert torch.allclose(la.prior_precision, other.prior_precision)


@pytest.mark.parametrize("subset", SUBSETS)
def test_predictions_are_probabilities_of_each_label(subset):
    la = fitted(subset)
    f_mu, f_var = la._glm_predictive_distribution(X)
    params = la.fitted_params
    J = dense.jacobians(la.model, X, SIZE, params)
    assert torch.allclose(f_var, J @ torch.linalg.solve(posterior(la), J.mT))
    variances = f_var.diagonal(dim1=1, dim2=2)
    exact = expected_probabilities(f_mu, variances)
    assert (la(X) - exact).abs().max() < 0.02  # MacKay's approximation
    generator = torch.Generator().manual_seed(0)
    options = {"link_approx": "mc", "n_samples": 4000, "generator": generator}
    assert (la(X, **options) - exact).abs().max() < 0.03
    nn_options = options | {"pred_type": "nn", "n_samples": 400}
    p = la(X, **nn_options)
    assert p.shape == Y.shape and ((p > 0) & (p < 1)).all()
    assert not torch.allclose(p.sum(1), torch.ones(SIZE).double(), atol=0.1)


def expected_probabilities(mean, variance):
    """By the trapezoidal rule, which is exact for such functions."""
    z = torch.linspace(-10, 10, 2001).double()
    density = (-z.square() / 2).exp()
    values = (mean[..., None] + variance.sqrt()[..., None] * z).sigmoid()
    return (values * density).sum(-1) / density.sum()


@pytest.mark.parametrize("pred_type", ["glm", "nn"])
def test_samples_of_predictions_are_probabilities(pred_type):
    la = fitted()
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    options = {"pred_type": pred_type, "n_samples": 3}
    p = la.predictive_samples(X, generator=generators[0], **options)
    f = la.functional_samples(X, generator=generators[1], **options)
    assert torch.allclose(p, f.sigmoid()) and p.shape == (3, *Y.shape)


@pytest.mark.parametrize("link_approx", ["bridge", "bridge_norm"])
def test_bridges_are_refused_by_name(link_approx):
    with pytest.raises(ValueError, match=f"`link_approx='{link_approx}'` is the Dir"):
        fitted()(X, link_approx=link_approx)


FORMS = {
    "column": lambda y: y,
    "vector": lambda y: y[:, 0],
    "integers": lambda y: y.long(),
    "integer vector": lambda y: y[:, 0].int(),
    "booleans": lambda y: y.bool(),
    "single": lambda y: y.float(),
}


@pytest.mark.parametrize(
    ("form", "squeezed", "subset"),
    [(form, False, "all") for form in FORMS]
    + [("vector", True, subset) for subset in SUBSETS],
)
def test_forms_of_targets_and_outputs(form, squeezed, subset):
    """All of them are the same labels."""
    model = one_logit()
    if squeezed:
        model = zoo.Model(lambda self, x: self.net(x).squeeze(1), net=model)
    la = fitted(subset, FORMS[form](Y[:, :1]), model)
    expected = fitted(subset, Y[:, :1], one_logit())
    assert torch.allclose(posterior(la), posterior(expected))
    assert torch.allclose(la.loss, expected.loss, rtol=1e-12)
    assert la(X).shape == (SIZE, 1) and torch.allclose(la(X), expected(X))
    for own in (la, expected):
        own.optimize_prior_precision(
            method="gridsearch", val_loader=data(FORMS[form](Y[:, :1])), grid_size=4
        )
    assert torch.equal(la.prior_precision, expected.prior_precision)


def test_labels_may_be_probabilities():
    soft = 0.1 + 0.8 * torch.rand_like(Y)
    la = fitted(y=soft)
    assert torch.allclose(la.loss, LOSS(la.model(X), soft))
    assert torch.allclose(posterior(la), posterior(fitted()))  # the GGN does not tell


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: 2 * y, r"must be 0 or 1, or probabilities between them, got 0\.\.2"),
        (lambda y: -y.long(), r"or probabilities between them, got -1\.\.0"),
        (lambda y: y / 0, "NaN or infinite"),
        (lambda y: y[:, :2], "floating-point of the output's shape"),
        (lambda y: y[:, 0], "floating-point of the output's shape"),
        (lambda y: y.long().argmax(1), "floating-point of the output's shape"),
    ],
)
def test_other_targets_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        fitted(y=change(Y))


@pytest.mark.parametrize("backend", [AsdlGGN, BackPackGGN])
@pytest.mark.parametrize("subset", SUBSETS)
def test_other_backends_are_refused(backend, subset):
    with pytest.raises(ValueError, match=f"{backend.__name__} does not know the likel"):
        debiased(network("mlp"), BINARY, subset, backend=backend)


def test_other_structures_and_likelihoods_are_refused():
    with pytest.raises(ValueError, match="Invalid likelihood type binary_class"):
        Laplace(network("mlp"), BINARY, "all", "kron")
    with pytest.raises(ValueError, match="Invalid likelihood type multilabel"):
        debiased(network("mlp"), "multilabel")
    with pytest.raises(ValueError, match="Sigma noise"):
        debiased(network("mlp"), BINARY, sigma_noise=2.0)


def test_a_sigmoid_at_the_networks_end_is_warned_of():
    model = nn.Sequential(one_logit(), nn.Sigmoid())
    with pytest.warns(UserWarning, match="as if it ended in a sigmoid"):
        fitted(y=Y[:, 0], model=model)


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("link_approx", ["probit", "mc"])
def test_a_grid_search_minimizes_the_loss_of_a_label(subset, link_approx):
    la = fitted(subset, model=overconfident())
    options = {"method": "gridsearch", "val_loader": data(), "link_approx": link_approx}
    torch.manual_seed(0)
    la.optimize_prior_precision(grid_size=5, n_samples=2000, **options)
    chosen, losses = la.prior_precision.item(), {}
    for prior_precision in torch.logspace(-4, 4, 5):
        la.prior_precision = prior_precision
        losses[prior_precision.item()] = binary_cross_entropy(la(X), Y).item()
    assert max(losses.values()) > min(losses.values()) + 0.1
    assert losses[chosen] < min(losses.values()) + 1e-2


@pytest.mark.parametrize("budget", [None, 20])
def test_marginal_likelihoods_are_those_of_all_labels(budget):
    la = fitted(budget=budget)
    loss = binary_cross_entropy_with_logits(la.model(X), Y, reduction="sum")
    assert torch.allclose(la.log_likelihood, -loss)  # a pool of all points
    la.optimize_prior_precision()
    best = la.log_marginal_likelihood().item()
    for factor in (0.9, 1.1):
        other = la.prior_precision * factor
        assert la.log_marginal_likelihood(other).item() < best
        la.prior_precision = other / factor


def test_few_columns_are_unbiased():
    model, traces = network("mlp"), []
    for seed in range(25):
        la = debiased(model, BINARY, magnitudes="ggn", fisher_rank=1, seed=seed)
        la.fit(data(), magnitude_loader=data())
        traces.append(la.H.to_matrix().trace())
    traces = torch.stack(traces)
    exact = sum(own.trace() for own in dense.ggn_blocks(model, X, Y, LOSS))
    assert traces.std() > 0
    assert (traces.mean() - exact).abs() < 4 * traces.std() / len(traces) ** 0.5
