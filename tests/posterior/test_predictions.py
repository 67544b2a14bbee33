import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.utils.data import DataLoader, TensorDataset

from tests import dense
from tests.cases import NUM_OUTPUTS, batch, network
from tests.fits import SIZE, SUBSETS, debiased, loader, posterior


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_predictives_equal_dense_algebra(subset, magnitudes):
    model, train = network("mlp"), loader(likelihood="regression")
    la = debiased(model, "regression", subset, magnitudes=magnitudes)
    la.fit(train)
    X = train.dataset.tensors[0][:5]
    fitted = {
        name: p.detach()
        for name, p in model.named_parameters()
        if subset == "all" or name.startswith("2.")
    }
    jacobians = jacrev(lambda params: functional_call(model, params, (X,)))(fitted)
    J = torch.cat([j.flatten(2) for j in jacobians.values()], dim=2)
    covariance = posterior(la).inverse()

    f_mu, f_var = la(X)
    assert torch.allclose(f_mu, model(X))
    assert torch.allclose(f_var, J @ covariance @ J.mT)
    assert torch.allclose(la.functional_variance(J), J @ covariance @ J.mT)
    _, diagonal = la(X, diagonal_output=True)
    assert torch.allclose(diagonal, f_var.diagonal(dim1=1, dim2=2))
    flat = J.flatten(0, 1)
    joint_mu, joint = la(X, joint=True)
    assert torch.allclose(joint_mu, f_mu.flatten())
    assert torch.allclose(joint, flat @ covariance @ flat.T)
    assert torch.allclose(la.functional_covariance(J), joint)

    value = torch.randn(la.n_params, dtype=torch.float64)
    delta = value - la.mean
    assert torch.allclose(la.square_norm(value), delta @ posterior(la) @ delta)
    density = torch.distributions.MultivariateNormal(la.mean, covariance)
    assert torch.allclose(la.log_prob(value), density.log_prob(value))

    samples = la.sample(20_000, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(samples.mean(0), la.mean, atol=0.05)
    assert dense.relative_error(samples.T.cov(), covariance) < 0.1


REDUCTIONS = {
    "pick_first": lambda outputs: outputs[:, 0],
    "pick_last": lambda outputs: outputs[:, -1],
    "average": lambda outputs: outputs.mean(1),
}


class OutputOfTokens(nn.Module):
    """A last layer that runs on each token; some of its outputs are the network's."""

    def __init__(self, reduce):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, NUM_OUTPUTS)
        self.reduce = reduce

    def forward(self, x):
        return self.reduce(self.head(self.body(x).tanh()))


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_last_layer_on_tokens_with_and_without_reduced_features(
    reduction, given, magnitudes
):
    torch.manual_seed(0)
    model = OutputOfTokens(REDUCTIONS[reduction]).double()
    X = torch.randn(SIZE, 5, 3, dtype=torch.float64)
    train = DataLoader(TensorDataset(X, torch.randint(NUM_OUTPUTS, (SIZE,))), 7)
    options = {"feature_reduction": reduction} if given else {}
    la = debiased(
        model, "classification", "last_layer", magnitudes=magnitudes, **options
    )
    la.fit(train)

    X = X[:4]
    last = {name: p.detach() for name, p in model.head.named_parameters("head")}
    jacobians = jacrev(lambda params: functional_call(model, params, (X,)))(last)
    J = torch.cat([j.flatten(2) for j in jacobians.values()], dim=2)
    covariance = posterior(la).inverse()
    _, f_var = la._glm_predictive_distribution(X)
    expected = J @ covariance @ J.mT
    assert dense.relative_error(f_var, expected) < 1e-10
    _, diagonal = la._glm_predictive_distribution(X, diagonal_output=True)
    assert torch.allclose(diagonal, expected.diagonal(dim1=1, dim2=2))
    _, joint = la._glm_predictive_distribution(X, joint=True)
    flat = J.flatten(0, 1)
    assert torch.allclose(joint, flat @ covariance @ flat.T)


class OnLastLayer(nn.Module):
    """Works on the last layer's output: a temperature, or a mean over tokens."""

    def __init__(self, work):
        super().__init__()
        self.body, self.head, self.work = nn.Linear(3, 4), nn.Linear(4, 3), work

    def forward(self, x):
        return self.work(self.head(self.body(x).tanh()))


class Tied(nn.Module):
    """The last layer has the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embedding, self.body = nn.Embedding(NUM_OUTPUTS, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, NUM_OUTPUTS)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.body(self.embedding(tokens)).tanh().mean(1))


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_features_are_fixed_also_where_they_share_the_last_layers_weight(magnitudes):
    torch.manual_seed(0)
    tied = Tied().double()
    untied = copy.deepcopy(tied)
    untied.head.weight = nn.Parameter(tied.head.weight.detach().clone())
    tokens = torch.randint(NUM_OUTPUTS, (SIZE, 5))
    train = DataLoader(TensorDataset(tokens, torch.randint(NUM_OUTPUTS, (SIZE,))), 7)
    fits = [
        debiased(m, subset="last_layer", magnitudes=magnitudes) for m in (tied, untied)
    ]
    for la in fits:
        la.fit(train)
    la, expected = fits
    assert torch.equal(posterior(la), posterior(expected))
    assert torch.equal(la(tokens), expected(tokens))
    generator = torch.Generator()
    samples = [
        each.predictive_samples(tokens, "nn", 3, generator=generator.manual_seed(0))
        for each in fits
    ]
    assert torch.equal(*samples)
    assert tied.head.weight is tied.embedding.weight
    loaded = debiased(tied, subset="last_layer", magnitudes=magnitudes)
    loaded.load_state_dict(la.state_dict())
    assert torch.equal(loaded(tokens), la(tokens))


def test_copies_of_last_layer_posteriors_have_features_of_their_own():
    la, X = debiased(network("mlp"), subset="last_layer"), batch("mlp", 5)[0]
    la.fit(loader())
    clone = copy.deepcopy(la)
    assert torch.equal(clone(X), la(X))
    samples = clone.functional_samples(X, pred_type="nn", n_samples=2)
    assert samples.shape == (2, 5, NUM_OUTPUTS)


@pytest.mark.parametrize("options", [{}, {"pred_type": "nn", "link_approx": "mc"}])
def test_last_layers_predict_for_no_examples(options):
    la = debiased(network("mlp"), subset="last_layer")
    la.fit(loader())
    assert la(batch("mlp", 5)[0][:0], **options).shape == (0, NUM_OUTPUTS)


@pytest.mark.parametrize("tokens", [False, True])
def test_networks_that_work_on_the_last_layers_output(tokens):
    torch.manual_seed(0)
    model = OnLastLayer((lambda f: f.mean(1)) if tokens else lambda f: f / 10).double()
    X = torch.randn(SIZE, *((5, 3) if tokens else (3,)), dtype=torch.float64)
    train = DataLoader(TensorDataset(X, torch.randint(3, (SIZE,))), 7)
    la = debiased(model, subset="last_layer")
    la.fit(train)
    X = X[:4]
    last = {name: p.detach() for name, p in model.head.named_parameters("head")}
    jacobians = jacrev(lambda params: functional_call(model, params, (X,)))(last)
    J = torch.cat([j.flatten(2) for j in jacobians.values()], dim=2)
    f_mu, f_var = la._glm_predictive_distribution(X)
    covariance = posterior(la).inverse()
    assert dense.relative_error(f_var, J @ covariance @ J.mT) < 1e-10
    # the network is linear in its last layer
    samples = la.functional_samples(X, pred_type="nn", n_samples=2000)
    deviation = (samples.mean(0) - f_mu) / (
        f_var.diagonal(dim1=1, dim2=2) / 2000
    ) ** 0.5
    assert deviation.abs().max() < 5


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
@pytest.mark.parametrize("link", ["probit", "mc", "bridge", "bridge_norm", "nn"])
def test_classification_predictives_are_distributions(link, magnitudes, subset):
    train = loader()
    la = debiased(network("mlp"), subset=subset, magnitudes=magnitudes)
    la.fit(train)
    X = train.dataset.tensors[0]
    kind = (
        {"pred_type": "nn", "link_approx": "mc"}
        if link == "nn"
        else {"link_approx": link}
    )
    probabilities = la(X, **kind)
    assert probabilities.shape == (SIZE, NUM_OUTPUTS)
    assert torch.allclose(probabilities.sum(1), torch.ones(SIZE, dtype=torch.float64))
    for pred_type in ("glm", "nn"):
        for draw in (la.predictive_samples, la.functional_samples):
            samples = draw(X, pred_type=pred_type, n_samples=4)
            assert samples.shape == (4, SIZE, NUM_OUTPUTS)


@pytest.mark.parametrize("subset", SUBSETS)
def test_nn_samples_are_the_network_at_posterior_samples(subset):
    model, train = network("mlp"), loader()
    la = debiased(model, subset=subset)
    la.fit(train)
    X = train.dataset.tensors[0][:4]
    generator = torch.Generator()
    outputs = la.functional_samples(X, "nn", 3, generator=generator.manual_seed(1))
    weights = la.sample(3, generator=generator.manual_seed(1))
    start = 0 if subset == "all" else -la.n_params
    copy = network("mlp")
    for output, sample in zip(outputs, weights, strict=True):
        vector = nn.utils.parameters_to_vector(copy.parameters()).detach().clone()
        vector[start:] = sample
        nn.utils.vector_to_parameters(vector, copy.parameters())
        assert torch.allclose(output, copy(X))


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("pred_type", ["glm", "nn"])
def test_predictive_is_differentiable_in_the_input(subset, pred_type):
    train = loader(likelihood="regression")
    la = debiased(network("mlp"), "regression", subset, enable_backprop=True)
    la.fit(train)
    X = train.dataset.tensors[0][:3].clone().requires_grad_()
    for output in la(X, pred_type=pred_type, link_approx="mc"):
        (gradient,) = torch.autograd.grad(output.sum(), X, retain_graph=True)
        assert gradient.abs().sum() > 0


SAMPLING = [
    ("classification", "glm", "mc"),
    ("classification", "nn", "mc"),
    ("regression", "nn", "mc"),
]


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize(("likelihood", "pred_type", "link"), SAMPLING)
def test_predictions_honour_the_generator(likelihood, pred_type, link, subset):
    train = loader(likelihood=likelihood)
    la = debiased(network("mlp"), likelihood, subset)
    la.fit(train)
    X = train.dataset.tensors[0]
    generator = torch.Generator()

    def predict(seed):
        generator.manual_seed(seed)
        kind = {"pred_type": pred_type, "link_approx": link, "n_samples": 3}
        prediction = la(X, **kind, generator=generator)
        return prediction if likelihood == "classification" else torch.cat(prediction)

    assert torch.equal(predict(0), predict(0))
    assert not torch.allclose(predict(0), predict(1))
    state = torch.get_rng_state()
    predict(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_invalid_generators_are_refused():
    la = debiased(network("mlp"))
    la.fit(loader())
    X = loader().dataset.tensors[0]
    with pytest.raises(ValueError, match="Invalid random generator"):
        la(X, link_approx="mc", generator=0)
    assert not torch.equal(la(X, link_approx="mc"), la(X, link_approx="mc"))


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_predictions_of_a_model_in_train_mode_leave_it_alone(likelihood, subset):
    model = nn.Sequential(network("batch-norm-1d"), nn.Dropout(), nn.Linear(3, 3))
    model = model.double().eval()
    train = loader("batch-norm-1d", likelihood)
    la = debiased(model, likelihood, subset)
    la.fit(train)
    X = train.dataset.tensors[0][:5]

    def predictions():
        torch.manual_seed(0)
        nn_options = {"pred_type": "nn", "link_approx": "mc", "n_samples": 3}
        yield la(X)
        yield la(X, **nn_options)
        for method in (la.functional_samples, la.predictive_samples):
            for kind in ("glm", "nn"):
                yield method(X, pred_type=kind, n_samples=3)
        yield la.log_marginal_likelihood()
        la.optimize_prior_precision(method="gridsearch", val_loader=train, grid_size=3)
        yield la.prior_precision

    expected = list(predictions())
    model.train()
    model[0][0].eval()
    la.prior_precision = 1.0
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    for actual, wanted in zip(predictions(), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)
    assert [module.training for module in model.modules()] == modes
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
