import subprocess
import sys

import numpy as np
import pytest
import torch
from laplace import KronLaplace, KronLLLaplace, Laplace
from laplace.curvature.asdl import AsdlGGN
from laplace.curvature.curvlinops import CurvlinopsEF, CurvlinopsGGN
from torch import nn
from torch.utils.data import DataLoader, Subset, SubsetRandomSampler, TensorDataset

from laplace_debiased import KronDebiasedLaplace, KronDebiasedLLLaplace
from tests import dense
from tests.cases import batch, network
from tests.fits import SIZE, SUBSETS, TWO_BATCH, debiased, loader, posterior, two_roles


def test_importing_registers_the_structures():
    model = network("mlp")
    assert type(Laplace(model, "classification", "all", "kron_debiased")) is (
        KronDebiasedLaplace
    )
    assert type(
        Laplace(model, "classification", hessian_structure="kron_debiased")
    ) is (KronDebiasedLLLaplace)
    # laplace-torch's own stay what they were
    assert type(Laplace(model, "classification")) is KronLLLaplace
    assert type(Laplace(model, "classification", "all", "kron")) is KronLaplace


def test_import_loads_nothing_that_laplace_torch_does_not():
    program = (
        "import sys, laplace; before = set(sys.modules); import laplace_debiased;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "print(*new - sys.stdlib_module_names)"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == ["laplace_debiased"]


def test_defaults_are_cross_fit_and_a_draw_by_curvature_from_a_pool():
    model, train = network("mlp"), loader(size=400)
    la = debiased(model, budget=8)
    la.fit(train)
    expected = debiased(
        model, budget=8, estimator="cross_fit", sampling="curvature", pool_size=256
    )
    expected.fit(train)
    assert torch.equal(posterior(la), posterior(expected))


def test_backends_without_weights_draw_uniformly():
    model = network("mlp", dtype=torch.float32)
    train = loader(dtype=torch.float32)
    la = debiased(model, budget=12, backend=AsdlGGN)
    la.fit(train)
    expected = debiased(model, budget=12, backend=AsdlGGN, sampling="uniform")
    expected.fit(train)
    assert torch.equal(posterior(la), posterior(expected))
    with pytest.raises(ValueError, match="`sampling='curvature'` needs a curvlinops"):
        debiased(model, budget=12, backend=AsdlGGN, sampling="curvature")


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize("name", ["mlp", "cnn-stride-padding", "sequence"])
def test_posterior_equals_dense_reference(name, magnitudes, likelihood):
    model, train = network(name), loader(name, likelihood)
    options = {"sigma_noise": 0.5} if likelihood == "regression" else {}
    options |= TWO_BATCH
    la = debiased(
        model, likelihood, magnitudes=magnitudes, prior_precision=0.3, seed=3, **options
    )
    la.fit(train)

    (X, y), (Z, w) = (
        [torch.cat(parts) for parts in zip(*source, strict=True)]
        for source in two_roles(train, seed=3)
    )
    if likelihood == "regression":
        # the negative log likelihood is half the squared error over sigma squared
        def loss(f, y):
            return 0.5 * (f - y).square().sum() / 0.5**2
    else:
        loss = nn.CrossEntropyLoss(reduction="sum")
    bases = dense.eigenbases(dense.kronecker_factors(model, X, y, loss))
    if magnitudes == "kfac":
        blocks = dense.kfac_blocks(dense.kronecker_factors(model, Z, w, loss))
    else:
        blocks = dense.ggn_blocks(model, Z, w, loss)
    expected = SIZE / len(Z) * dense.debiased(bases, blocks)
    expected += 0.3 * torch.eye(len(expected))
    assert dense.relative_error(posterior(la), expected) < 1e-8


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("name", ["mlp", "cnn-stride-padding", "sequence"])
def test_same_data_in_both_roles_equals_laplace_torch(name, subset):
    model = network(name, dtype=torch.float32)
    (X, y) = batch(name, SIZE, dtype=torch.float32)
    train = DataLoader(TensorDataset(X, y), 7)
    reference = Laplace(model, "classification", subset, "kron", prior_precision=0.1)
    reference.fit(train)
    la = debiased(model, subset=subset, prior_precision=0.1)
    again = DataLoader(TensorDataset(X.clone(), y.clone()), 11)
    la.fit(train, magnitude_loader=again)

    # laplace-torch decomposes in single precision: compare with its exact factors
    exact = reference.H_facs.to_matrix() + 0.1 * torch.eye(la.n_params)
    assert dense.relative_error(posterior(la), exact) < 1e-6
    assert torch.allclose(la(X), reference(X), atol=1e-6)
    assert torch.allclose(
        la.log_marginal_likelihood(), reference.log_marginal_likelihood(), rtol=1e-6
    )
    for la_ in (la, reference):
        la_.optimize_prior_precision()
    # laplace-torch stops after a hundred steps, near the maximum
    assert torch.allclose(la.prior_precision, reference.prior_precision, rtol=1e-2)
    best = la.log_marginal_likelihood()
    assert best >= reference.log_marginal_likelihood() * (1 + 1e-6)  # is negative


@pytest.mark.parametrize("backend", [CurvlinopsGGN, CurvlinopsEF])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_same_data_in_both_roles_equals_laplace_torch_for_backends(likelihood, backend):
    model, train = (
        network("cnn-stride-padding"),
        loader("cnn-stride-padding", likelihood),
    )
    reference = KronLaplace(model, likelihood, backend=backend)
    reference.fit(train)
    la = debiased(model, likelihood, backend=backend)
    la.fit(train, magnitude_loader=loader("cnn-stride-padding", likelihood))
    assert dense.relative_error(posterior(la), posterior(reference)) < 1e-8
    assert torch.allclose(la.loss, reference.loss)


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_sampled_labels_and_reduced_factors_reach_the_posterior(magnitudes):
    model, train = network("sequence"), loader("sequence")

    def fitted(**kwargs):
        la = debiased(model, magnitudes=magnitudes, **kwargs)
        la.fit(train)
        return posterior(la)

    exact = fitted()
    stochastic = {"backend_kwargs": {"stochastic": True}}
    many = fitted(**stochastic, asdl_fisher_kwargs={"mc_samples": 1000})
    assert torch.equal(fitted(**stochastic), fitted(**stochastic))
    assert not torch.allclose(fitted(**stochastic), exact, rtol=1e-2)
    assert dense.relative_error(many, exact) < 0.1
    reduced = fitted(asdl_fisher_kwargs={"kfac_approx": "reduce"})
    assert not torch.allclose(reduced, exact, rtol=1e-2)


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize("subset", SUBSETS)
def test_batch_size_and_order_do_not_matter(subset, magnitudes):
    model = network("mlp")
    data = TensorDataset(*batch("mlp", SIZE))
    fits = []
    for options in ({"batch_size": 1}, {"batch_size": SIZE}, {"shuffle": True}):
        la = debiased(model, subset=subset, magnitudes=magnitudes)
        la.fit(DataLoader(data, **options))
        fits.append(la)
    for la in fits[1:]:
        assert dense.relative_error(posterior(la), posterior(fits[0])) < 1e-8
        assert torch.allclose(la.loss, fits[0].loss)


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_curvature_is_scaled_from_the_points_used_to_all(magnitudes):
    model, train = network("mlp"), loader()
    part = DataLoader(train.dataset, 7, sampler=SubsetRandomSampler(range(20)))
    small = DataLoader(Subset(train.dataset, range(20)), 7)
    of_all, of_part = (
        debiased(model, magnitudes=magnitudes),
        debiased(model, magnitudes=magnitudes),
    )
    of_all.fit(part)
    of_part.fit(small)
    H, smaller = of_all.H.to_matrix(), of_part.H.to_matrix()
    assert dense.relative_error(H, SIZE / 20 * smaller) < 1e-10
    assert torch.allclose(of_all.loss, SIZE / 20 * of_part.loss)
    assert (of_all.n_data, of_part.n_data) == (SIZE, 20)


@pytest.mark.parametrize("options", [{}, TWO_BATCH, {"pool_size": 30}])
def test_budget_estimates_are_unbiased(options):
    model, train = network("mlp"), loader()
    X, y = train.dataset.tensors
    loss = nn.CrossEntropyLoss(reduction="sum")
    losses, traces = [], []
    for seed in range(300):
        la = debiased(model, magnitudes="ggn", budget=10, seed=seed, **options)
        la.fit(train)
        losses.append(la.loss)
        traces.append(la.H.diag().sum())
    # a trace does not depend on the directions
    exact_trace = sum(block.trace() for block in dense.ggn_blocks(model, X, y, loss))
    for estimates, exact in [(losses, loss(model(X), y)), (traces, exact_trace)]:
        estimates = torch.stack(estimates)
        error = (estimates.mean() - exact).abs()
        assert error <= 3 * estimates.std() / 300**0.5 + 1e-10


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_further_data_accumulate(magnitudes):
    model = network("mlp")
    first, second = loader(), loader(size=30, seed=5)
    la = debiased(model, magnitudes=magnitudes, **TWO_BATCH)
    la.fit(first)
    loss, H = la.loss, la.H.to_matrix()
    la.fit(first, override=False)
    assert dense.relative_error(la.H.to_matrix(), 2 * H) < 1e-8
    assert torch.allclose(la.loss, 2 * loss) and la.n_data == 2 * SIZE
    la.fit(first)
    assert dense.relative_error(la.H.to_matrix(), H) < 1e-8

    la.fit(second, override=False)
    assert la.n_data == SIZE + 30
    other = debiased(model, magnitudes=magnitudes, **TWO_BATCH)
    other.fit(second)
    if magnitudes == "kfac":
        # as if K-FAC had seen both: G adds up, A averages
        merged = la.curvature.folds
        for own, (a, b) in zip(
            merged,
            zip(refit(model, first), refit(model, second), strict=True),
            strict=True,
        ):
            for c, x, z in zip(own, a, b, strict=True):
                assert torch.allclose(c.gradients, x.gradients + z.gradients)
                mean = (SIZE * x.inputs + 30 * z.inputs) / (SIZE + 30)
                assert torch.allclose(c.inputs, mean)
    else:
        # the earlier curvature by its diagonal along directions of all
        bases = [torch.kron(*v) if len(v) == 2 else v[0] for v in la.H.eigenvectors]
        _, magnitude_loader = two_roles(second)
        Z, w = [torch.cat(p) for p in zip(*magnitude_loader, strict=True)]
        blocks = dense.ggn_blocks(model, Z, w, nn.CrossEntropyLoss(reduction="sum"))
        added = 30 / len(Z) * dense.debiased(bases, blocks)
        V = torch.block_diag(*bases)
        kept = V @ torch.diag((V.T @ H @ V).diagonal()) @ V.T
        assert dense.relative_error(la.H.to_matrix(), kept + added) < 1e-8


def refit(model, train):
    la = debiased(model, **TWO_BATCH)
    la.fit(train)
    return la.curvature.folds


def test_override_false_is_refused_for_the_last_layer_and_starts_the_first_fit():
    la = debiased(network("mlp"), subset="last_layer")
    with pytest.raises(ValueError, match="do not support `override=False`"):
        la.fit(loader(), override=False)
    la, reference = debiased(network("mlp")), debiased(network("mlp"))
    la.fit(loader(), override=False)
    reference.fit(loader())
    assert torch.equal(posterior(la), posterior(reference))


@pytest.mark.parametrize("subset", SUBSETS)
def test_damping_spreads_the_prior_over_the_factors(subset):
    la = debiased(network("mlp"), subset=subset, damping=True, prior_precision=0.5)
    la.fit(loader())
    assert la.posterior_precision.damping
    (outer, inner), *_ = la.H.eigenvalues
    expected = torch.outer(outer + 0.5**0.5, inner + 0.5**0.5)
    actual = la.posterior_precision.spectra()[0]
    assert torch.allclose(actual, expected)


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_temperature_and_noise_scale_the_curvature(subset, magnitudes):
    model, train = network("mlp"), loader(likelihood="regression")
    plain, scaled = (
        debiased(model, "regression", subset, magnitudes=magnitudes, **options)
        for options in ({}, {"sigma_noise": 0.5, "temperature": 2.0})
    )
    plain.fit(train)
    scaled.fit(train)
    identity = torch.eye(plain.n_params)
    expected = (posterior(plain) - identity) / 0.5**2 / 2 + identity
    assert dense.relative_error(posterior(scaled), expected) < 1e-10


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize("structure", ["scalar", "layerwise"])
@pytest.mark.parametrize("method", ["marglik", "gridsearch"])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_prior_precision_can_be_tuned(
    likelihood, method, structure, magnitudes, subset
):
    model, train = network("mlp"), loader(likelihood=likelihood)
    la = debiased(model, likelihood, subset, magnitudes=magnitudes)
    la.fit(train)
    before = la.log_marginal_likelihood().item()
    la.optimize_prior_precision(
        method=method,
        prior_structure=structure,
        val_loader=train if method == "gridsearch" else None,
        grid_size=5,
    )
    assert la.prior_precision.isfinite().all()
    if method == "marglik":
        expected = la.n_layers if structure == "layerwise" else 1
        assert len(la.prior_precision) == expected
        assert la.log_marginal_likelihood().item() > before


@pytest.mark.parametrize("subset", SUBSETS)
def test_diagonal_priors_are_refused(subset):
    options = {"last_layer_name": "2"} if subset == "last_layer" else {}
    la = debiased(network("mlp"), subset=subset, **options)
    with pytest.raises(ValueError, match="either scalar or per-layer"):
        la.prior_precision = torch.ones(la.n_params)


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("prior", [torch.tensor([0.4]), torch.tensor([0.2, 0.5])])
def test_log_marginal_likelihood_equals_dense_formula(subset, prior):
    model, train = network("mlp"), loader()
    if subset == "all" and len(prior) == 2:
        prior = prior.repeat(2)
    la = debiased(model, subset=subset, prior_mean=0.1)
    la.fit(train)
    la.prior_precision = prior
    X, y = train.dataset.tensors
    P0 = torch.diag(la.prior_precision_diag)
    delta = la.mean - 0.1
    log_likelihood = -nn.functional.cross_entropy(model(X), y, reduction="sum")
    expected = log_likelihood - 0.5 * (
        posterior(la).logdet() - P0.logdet() + delta @ P0 @ delta
    )
    assert torch.allclose(la.log_marginal_likelihood(), expected)


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_a_subset_of_the_parameters_can_be_fitted(magnitudes):
    model, train = network("mlp"), loader()
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    la = debiased(model, magnitudes=magnitudes)
    la.fit(train)
    assert posterior(la).shape == (15, 15)
    assert la(train.dataset.tensors[0], pred_type="nn", link_approx="mc").shape
    la.optimize_prior_precision()
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, False]


class RewardModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x):
        if x.ndim == 3:
            return self.net(x.flatten(0, 1)).view(len(x), 2)
        return self.net(x)


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_reward_modelling_treats_a_pair_as_one_example(magnitudes):
    model = RewardModel().double()
    X = torch.randn(SIZE, 2, 4, dtype=torch.float64)
    y = torch.randint(2, (SIZE,))
    la = debiased(model, "reward_modeling", magnitudes=magnitudes, **TWO_BATCH)
    la.fit(DataLoader(TensorDataset(X, y), 8))
    f_mu, f_var = la(X[:, 0])
    assert torch.allclose(f_mu, model(X[:, 0]))
    assert f_var.shape == (SIZE, 1, 1)
    if magnitudes == "ggn":
        _, magnitude_loader = two_roles(DataLoader(TensorDataset(X, y)))
        Z, w = [torch.cat(p) for p in zip(*magnitude_loader, strict=True)]
        loss = nn.CrossEntropyLoss(reduction="sum")
        blocks = dense.ggn_blocks(model, Z, w, loss)
        trace = SIZE / len(Z) * sum(b.trace() for b in blocks)
        assert torch.allclose(la.H.diag().sum(), trace)


class OnDict(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, data):
        return self.net(data["x"] if isinstance(data, dict) else data)


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_dict_inputs_equal_tensor_inputs(magnitudes, subset, tmp_path):
    train = loader()
    data = [{"x": x, "label": y} for x, y in train.dataset]
    expected = debiased(network("mlp"), subset=subset, magnitudes=magnitudes)
    expected.fit(train)
    keys = {"dict_key_x": "x", "dict_key_y": "label"}
    model = OnDict(network("mlp"))
    la = debiased(model, subset=subset, magnitudes=magnitudes, **keys)
    la.fit(DataLoader(data, 7))
    assert dense.relative_error(posterior(la), posterior(expected)) < 1e-10
    torch.save(la.state_dict(), tmp_path / "la.pt")
    torch.load(tmp_path / "la.pt", weights_only=True)


def test_what_a_batch_shares_is_not_divided():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network("mlp")

        def forward(self, data):
            return self.net(data["scale"] * data["x"] @ data["turn"])

    class Stream:
        dataset = loader().dataset

        def __iter__(self):
            for X, y in loader():
                yield {"x": X / 2} | shared | {"label": y}

    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    shared = {"turn": turn, "scale": torch.tensor(2.0).double()}
    X, y = loader().dataset.tensors
    la = debiased(Turned(), dict_key_x="x", dict_key_y="label")
    la.fit(Stream())
    expected = debiased(network("mlp"))
    expected.fit(DataLoader(TensorDataset(X @ turn, y), 7))
    assert dense.relative_error(posterior(la), posterior(expected)) < 1e-10


@pytest.mark.parametrize("budget", [None, 16])
def test_sequences_batched_by_length_are_those_one_by_one(budget):
    pairs = enumerate(loader("sequence").dataset)
    data = [(x[: 3 + k % 3], y) for k, (x, y) in pairs]
    buckets = [list(range(start, SIZE, 3)) for start in (1, 0, 2)]
    la, expected = (debiased(network("sequence"), budget=budget) for _ in range(2))
    la.fit(DataLoader(data, batch_sampler=buckets))
    expected.fit(DataLoader(data))
    assert dense.relative_error(posterior(la), posterior(expected)) < 1e-10


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"magnitudes": "hessian"}, ValueError, "`magnitudes` must be one of"),
        ({"direction_fraction": 0.0}, ValueError, "`direction_fraction` must lie"),
        ({"direction_fraction": 1}, ValueError, "`direction_fraction` must lie"),
        ({"direction_fraction": "half"}, TypeError, "`direction_fraction` must be"),
        ({"budget": 1}, ValueError, "`budget` must be at least 8"),
        ({"budget": 0.5}, TypeError, "`budget` must be an int"),
        ({"sampling_floor": 0}, ValueError, r"`sampling_floor` must lie in \(0, 1\]"),
        ({"sampling_floor": "0.1"}, TypeError, "`sampling_floor` must be a number"),
        ({"decomposition_tolerance": 1}, ValueError, r"must lie in \[0, 1\), got 1"),
        ({"temperature": "warm"}, TypeError, "`temperature` must be a number"),
        ({"budget": True}, TypeError, "`budget` must be an int"),
        ({"seed": 0.5}, TypeError, "`seed` must be an int"),
        ({"memory_limit": 0.5}, TypeError, "`memory_limit` must be an int"),
        ({"memory_limit": 0}, ValueError, "`memory_limit` must be at least 1"),
        ({"magnitudes": "ggn", "damping": True}, ValueError, "needs factored"),
    ],
)
@pytest.mark.parametrize("subset", SUBSETS)
def test_bad_arguments_are_refused(subset, kwargs, error, message):
    with pytest.raises(error, match=message):
        debiased(network("mlp"), subset=subset, **kwargs)


def test_numpy_integers_are_integers():
    options = {"budget": np.int64(10), "seed": np.int32(3)}
    la, reference = (
        debiased(network("mlp"), **options),
        debiased(network("mlp"), budget=10, seed=3),
    )
    la.fit(loader())
    reference.fit(loader())
    assert torch.equal(posterior(la), posterior(reference))


def test_what_requires_gradients_is_asked_with_each_fit():
    model = network("mlp")
    la = debiased(model)
    la.fit(loader())
    model[0].requires_grad_(False)
    la.fit(loader())
    expected = debiased(model)
    expected.fit(loader())
    assert torch.equal(posterior(la), posterior(expected))
    model[0].requires_grad_(True)
    la.fit(loader())
    assert la.n_params == sum(param.numel() for param in model.parameters())


def test_a_model_without_trainable_parameters_is_refused():
    model = network("mlp").requires_grad_(False)
    with pytest.raises(ValueError, match="no parameters with `requires_grad=True`"):
        debiased(model).fit(loader())
    la = debiased(model, subset="last_layer")
    la.fit(loader())
    assert posterior(la).shape == (18, 18)
