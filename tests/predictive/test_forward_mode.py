"""Moments by samples of the parameters, against Jacobians."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from laplace_debiased.curvature.eigenbasis import EigenbasisMatrix, to_eigenbasis
from laplace_debiased.predictive import forward_mode
from laplace_debiased.predictive.forward_mode import (
    ForwardModeError,
    SampledPredictive,
    check_forward_mode,
    output_change,
    relative_error,
    sampled_change,
)
from laplace_debiased.predictive.uncertainty import entropies
from tests import zoo
from tests.dense import jacobians
from tests.fits import debiased, searched
from tests.test_zoo import loader

NAMES = ["mlp, in place", "u-net", "vision transformer", "encoder, padded", "bilinear"]


def fitted(name, size=8):
    model, (X, y) = zoo.build(name), zoo.data(name, size)
    la = debiased(model, prior_precision=0.3)
    la.fit(loader(X, y))
    return la, X


def first(X, count):
    if isinstance(X, dict):
        return {key: value[:count] for key, value in X.items()}
    return X[:count]


@pytest.mark.parametrize("name", NAMES)
def test_changes_are_jacobian_vector_products(name):
    la, X = fitted(name)
    X = first(X, 3)
    changes = sampled_change(la.posterior_precision, la.fitted_params, 2, 4, seed=5)
    before = [param.clone() for param in la.model.parameters()]
    output, change = output_change(la.model, la.fitted_params, changes, X)
    J = jacobians(zoo.plain(la.model), X, 3, la.fitted_params)
    flat = torch.cat([own.flatten() for own in changes])
    assert torch.allclose(change, J @ flat, atol=1e-10)
    assert torch.allclose(output, zoo.plain(la.model)(X))
    for param, old in zip(la.model.parameters(), before, strict=True):
        assert torch.equal(param, old) and type(param) is nn.Parameter


def white(la, number, count, seed):
    """Coordinates of a sample in the eigenbasis, scaled by the posterior's spectrum."""
    posterior = la.posterior_precision
    changes = sampled_change(posterior, la.fitted_params, number, count, seed)
    blocks = zip(changes, posterior.eigenvectors, posterior.spectra(), strict=True)
    parts = [
        to_eigenbasis(own.reshape([len(v) for v in vectors]), vectors) * values.sqrt()
        for own, vectors, values in blocks
    ]
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("name", [*NAMES, "gpt-2's matrices"])
@pytest.mark.parametrize("count", [1, 5, 40])
def test_each_coordinate_is_in_one_bucket(name, count):
    la, _ = fitted(name)
    z = torch.stack([white(la, number, count, 2) for number in range(count)])
    in_bucket = z.abs() > 1e-6
    assert (in_bucket.sum(0) == 1).all()
    assert torch.allclose(z.abs().sum(0), z.new_tensor(count**0.5))
    # buckets are about as large as one another, and signs as frequent
    assert in_bucket.sum(1).max() < 2 * la.n_params / count + 3
    assert abs(z[in_bucket].sign().sum()) < 4 * la.n_params**0.5
    other = torch.stack([white(la, number, count, 3) for number in range(count)])
    if count > 1:
        assert not torch.equal(other.abs() > 1e-6, in_bucket)


def test_pairs_of_coordinates_share_a_bucket_less_often_than_by_chance():
    la, _ = fitted("mlp, in place")
    count, shared = 7, 0.0
    for seed in range(60):
        z = torch.stack([white(la, number, count, seed) for number in range(count)])
        same = (z.T.abs() @ z.abs() > 1e-6).double()
        shared += (same.sum() - la.n_params) / la.n_params / (la.n_params - 1) / 60
    assert 0.7 / count < shared < 1 / count


def test_samples_are_exact_if_no_two_coordinates_share_a_bucket():
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False).double()
    X = torch.randn(20, 4).double()
    la = debiased(model, prior_precision=0.5)
    la.fit(loader(X, torch.randint(3, (20,)), 10))
    exact = la(X[:5])
    la.forward_samples = 12
    assert torch.allclose(la(X[:5]), exact)


@pytest.mark.parametrize("kind", ["diagonal", "full", "joint"])
def test_moments_are_exact_over_a_complete_basis(kind, monkeypatch):
    """All axes of the eigenbasis in place of samples give the exact moments."""
    la, X = fitted("vision transformer")
    X, posterior = X[:2], la.posterior_precision
    size = la.n_params

    def axis(own, params, number, count, seed):
        unit = torch.zeros(size, dtype=torch.float64)
        unit[number] = size**0.5
        root = own.bmm(unit[None, None], -0.5).flatten()
        return [
            part.view_as(param)
            for part, param in zip(
                root.split([p.numel() for p in params]), params, strict=True
            )
        ]

    monkeypatch.setattr(forward_mode, "sampled_change", axis)
    monkeypatch.setattr(forward_mode, "check_forward_mode", lambda *_: None)
    predictive = SampledPredictive(la.model, la.fitted_params, posterior, size)
    mean, covariance = predictive.moments(X, 2, kind)
    joint, diagonal = kind == "joint", kind == "diagonal"
    f_mu, f_var = la._glm_predictive_distribution(X, joint, diagonal)
    assert torch.allclose(mean.flatten(), f_mu.flatten())
    if kind != "diagonal":
        exact = torch.diag_embed(f_var.diagonal(dim1=-2, dim2=-1))
        f_var = torch.lerp(f_var, exact, 1 / size)
    assert torch.allclose(covariance, f_var, atol=1e-10)


def test_errors_of_variances_are_what_is_said():
    la, X = fitted("mlp, in place")
    _, exact = la._glm_predictive_distribution(X, diagonal_output=True)
    count, errors = 50, []
    for seed in range(30):
        predictive = SampledPredictive(
            la.model, la.fitted_params, la.posterior_precision, count, seed
        )
        _, variances = predictive.moments(X, len(X), "diagonal")
        errors.append(variances / exact - 1)
    errors = torch.stack(errors)
    assert abs(errors.mean()) < 0.05
    assert 0.5 < errors.square().mean().sqrt() / relative_error(count) < 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["diagonal", "full", "joint"])
def test_examples_are_run_in_chunks_that_fit_into_memory(name, kind, monkeypatch):
    la, X = fitted(name)
    size, ran = 8, []

    def moments(limit):
        predictive = SampledPredictive(
            la.model, la.fitted_params, la.posterior_precision, 3, memory_limit=limit
        )
        return predictive.moments(X, size, kind)

    whole = moments(2**30)
    change = forward_mode.output_change

    def counting(*args):
        result = change(*args)
        ran.append(len(result[0]))
        return result

    monkeypatch.setattr(forward_mode, "output_change", counting)
    entry = forward_mode.largest_activation(la.model, first(X, 2)) / 2
    parts = moments(int(3.5 * 8 * entry))
    # two for the check, and then all examples of each of the samples
    assert ran == [2, *3 * [3, 3, 2]]
    for own, expected in zip(parts, whole, strict=True):
        assert torch.allclose(own, expected, atol=1e-12)


def test_covariances_have_cholesky_factors():
    la, X = fitted("mlp, in place")
    predictive = SampledPredictive(
        la.model, la.fitted_params, la.posterior_precision, num_samples=2
    )
    _, covariance = predictive.moments(X, len(X), "full")
    torch.linalg.cholesky(covariance)


def test_variances_for_several_priors_are_those_of_each():
    la, X = fitted("mlp, in place")
    curvature = EigenbasisMatrix(la.H.eigenvectors, la.H.eigenvalues)
    arguments = la.model, la.fitted_params
    predictive = SampledPredictive(*arguments, curvature, 7)
    _, variances = predictive.variances(X, len(X), [0.5, 2.0])
    for k, delta in enumerate([0.5, 2.0]):
        own = SampledPredictive(*arguments, curvature + torch.tensor(delta), 7)
        assert torch.allclose(variances[..., k], own.moments(X, 1, "diagonal")[1])


@pytest.mark.filterwarnings("ignore")
def test_a_grid_search_by_samples_has_fewer_nodes_and_the_same_losses(monkeypatch):
    la, X = fitted("mlp, in place", 20)
    val = loader(X, torch.randint(3, (20,)), 10)
    grid = {"log_prior_prec_min": -1, "log_prior_prec_max": 1, "grid_size": 9}
    found = []
    for la.forward_samples in (None, 100):
        found.append(searched(la, val, monkeypatch, **grid))
    (exact, many), (sampled, few) = found
    assert few[-1] < 0.7 * many[0]
    assert torch.allclose(sampled, exact, rtol=0.02)


class Custom(torch.autograd.Function):
    """A function without a forward mode."""

    @staticmethod
    def forward(ctx, x):
        return x.tanh()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def many_outputs(count, custom=False):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, count)]
    if custom:
        layers[1] = zoo.Model(lambda _, x: Custom.apply(x))
    model = nn.Sequential(*layers).double()
    X, y = torch.randn(40, 4).double(), torch.randint(count, (40,))
    return model, X, loader(X, y, 20)


@pytest.mark.parametrize(("count", "sampled"), [(256, False), (300, True)])
def test_many_outputs_are_sampled(count, sampled):
    model, X, train = many_outputs(count)
    la = debiased(model, fisher_rank=5)
    la.fit(train)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        p = la(X)
        la(X)
    messages = [w for w in caught if "estimated by 64 samples" in str(w.message)]
    assert len(messages) == sampled
    la.forward_samples = None
    exact = la(X)
    assert torch.equal(p, exact) != sampled
    assert (p - exact).abs().max() < 0.2 * exact.max()
    la.forward_samples = 2000
    assert (la(X) - exact).abs().max() < 0.04 * exact.max()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("link_approx", ["probit", "mc", "bridge"])
def test_all_predictions_can_be_sampled(link_approx):
    la, X = fitted("mlp, in place", 20)
    exact = la(X, link_approx=link_approx, generator=torch.Generator())
    la.forward_samples = 1000
    sampled = la(X, link_approx=link_approx, generator=torch.Generator())
    assert torch.allclose(sampled, exact, atol=0.04)
    assert torch.equal(la(X), la(X))
    found = la.uncertainty(X)
    la.forward_samples = None
    assert torch.allclose(found.epistemic, la.uncertainty(X).epistemic, atol=0.03)


def test_functions_without_a_forward_mode_take_backward_passes():
    model, X, train = many_outputs(300, custom=True)
    la = debiased(model, fisher_rank=5)
    la.fit(train)
    with pytest.warns(UserWarning, match="fails in forward mode"):
        sampled = la(X)
    la.forward_samples = None
    assert torch.equal(sampled, la(X))
    la.forward_samples = 10
    with pytest.raises(ForwardModeError, match="forward_samples = None"):
        la(X)


@pytest.mark.parametrize("value", [1, 0, "many", 2.5])
def test_bad_numbers_are_refused(value):
    with pytest.raises((ValueError, TypeError), match="forward_samples"):
        debiased(nn.Linear(2, 2), forward_samples=value)


def test_gradients_flow_to_the_inputs():
    la, X = fitted("mlp, in place")
    la.enable_backprop, la.forward_samples = True, 20
    X = X.clone().requires_grad_()
    _, f_var = la._glm_predictive_distribution(X)
    assert torch.autograd.grad(f_var.sum(), X)[0].any()


class PartlyWithoutGradients(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.body, self.head, self.mode = nn.Linear(4, 6), nn.Linear(6, 300), mode

    def forward(self, x):
        with self.mode():
            hidden = self.body(x).tanh()
        return self.head(hidden.clone())


@pytest.mark.filterwarnings("ignore")
def test_what_backward_passes_do_not_see_is_not_sampled():
    """Forward mode sees what is run without gradients; exact moments do not."""
    torch.manual_seed(0)
    model = PartlyWithoutGradients(torch.no_grad).double()
    X, y = torch.randn(40, 4).double(), torch.randint(300, (40,))
    la = debiased(model, fisher_rank=5)
    la.fit(loader(X, y, 20))
    assert la.parameter_kinds["body.weight"] == "left out"
    with pytest.raises(ForwardModeError, match="no_grad"):
        check_forward_mode(model, list(model.parameters()), X[:2])


def test_posteriors_leave_inference_mode_where_there_are_no_derivatives():
    la, X = fitted("mlp, in place")
    la.forward_samples = 5
    with torch.inference_mode():
        assert torch.equal(la(X), la(X.clone()))
        with pytest.raises(ForwardModeError, match="inference"):
            output_change(la.model, la.fitted_params, la.fitted_params, X)


@pytest.mark.filterwarnings("ignore")
def test_threads_may_sample_side_by_side():
    la, X = fitted("vision transformer")
    la.forward_samples = 20
    alone = [la(X + shift) for shift in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda shift: la(X + shift), list(range(4)) * 5))
    for k, own in enumerate(together):
        assert torch.equal(own, alone[k % 4])


def test_a_batch_may_be_empty():
    la, X = fitted("mlp, in place")
    la.forward_samples = 3
    f_mu, f_var = la._glm_predictive_distribution(X[:0])
    assert f_mu.shape == (0, 3) and f_var.shape == (0, 3, 3)


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_uncertainty_of_many_classes_is_that_of_dependent_outputs(subset):
    """By samples, it is nearer to that of their covariance than by variances alone."""
    model, X, train = many_outputs(300)
    la = debiased(model, subset=subset, fisher_rank=5, prior_precision=0.1)
    la.fit(train)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, p = la.uncertainty(X), la(X)
    assert torch.allclose(found.probabilities, p)
    la.forward_samples = None
    mean, covariance = la._glm_predictive_distribution(X)
    if subset == "last_layer":  # in closed form
        exact = covariance.diagonal(dim1=1, dim2=2)
        assert torch.allclose(found.functional_variance, exact)
    total, aleatoric = entropies(mean, covariance)
    assert torch.allclose(found.epistemic, total - aleatoric, rtol=0.3)
    assert abs(found.epistemic.mean() / (total - aleatoric).mean() - 1) < 0.1
