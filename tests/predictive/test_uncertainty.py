import pytest
import torch

from laplace_debiased.predictive.uncertainty import entropies, entropy, normal_points


def test_entropy_is_that_of_torch():
    p = torch.rand(5, 4).softmax(1)
    expected = torch.distributions.Categorical(probs=p).entropy()
    assert torch.allclose(entropy(p), expected)
    assert entropy(torch.eye(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("classes", [2, 10, 40])
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_entropies_equal_those_of_many_samples(classes, scale):
    torch.manual_seed(0)
    mean = 2 * torch.randn(20, classes, dtype=torch.float64)
    variance = scale * torch.rand(20, classes, dtype=torch.float64)
    p = torch.zeros_like(mean)
    expected = torch.zeros(20, dtype=torch.float64)
    for _ in range(20):
        noise = torch.randn(2000, 20, classes, dtype=torch.float64)
        samples = (mean + variance.sqrt() * noise).softmax(-1)
        p += samples.mean(0) / 20
        expected += entropy(samples).mean(0) / 20
    total, aleatoric = entropies(mean, variance)
    information = entropy(p) - expected
    assert torch.allclose(total, entropy(p), rtol=0.02, atol=1e-3)
    assert torch.allclose(aleatoric, expected, rtol=0.02, atol=1e-3)
    error = (total - aleatoric - information).abs().mean()
    assert error < 0.03 * information.mean()


def test_results_are_reproducible_and_do_not_depend_on_the_batch(monkeypatch):
    torch.manual_seed(0)
    mean, variance = torch.randn(7, 3), torch.rand(7, 3)
    whole = entropies(mean, variance)
    name = "laplace_debiased.predictive.uncertainty._CHUNK_ENTRIES"
    monkeypatch.setattr(name, 1)
    for a, b in zip(whole, entropies(mean, variance), strict=True):
        assert torch.allclose(a, b)
    single = entropies(mean[3:4], variance[3:4])
    assert torch.allclose(single[0], whole[0][3])


def test_without_variance_nothing_is_epistemic():
    mean = torch.randn(6, 4)
    total, aleatoric = entropies(mean, torch.zeros(6, 4))
    assert torch.allclose(total, entropy(mean.softmax(1)), atol=1e-6)
    assert (total - aleatoric).abs().max() < 1e-6
    assert (total >= aleatoric).all()


def test_points_are_normal():
    points = normal_points(10)
    assert points.mean(0).abs().max() < 0.01
    assert (points.T.cov() - torch.eye(10)).abs().max() < 0.1


def test_there_are_points_for_the_words_of_a_language_model():
    """Sobol's sequences have 21,201 dimensions at most; GPT-2 has 50,257 words."""
    points = normal_points(30_000)
    assert abs(points.mean()) < 1e-3 and abs(points.std() - 1) < 1e-3
    mean = 5 * torch.randn(2, 30_000)
    total, aleatoric = entropies(mean, torch.ones_like(mean))
    assert (total > aleatoric).all() and (aleatoric > 0).all()


def test_gradients_flow_to_means_and_variances():
    mean, variance = torch.randn(5, 3), torch.rand(5, 3)
    for own in (mean, variance):
        own.requires_grad_()
    total, aleatoric = entropies(mean, variance)
    epistemic = (total - aleatoric).sum()
    assert all(g.any() for g in torch.autograd.grad(epistemic, [mean, variance]))


COVARIANCES = {
    "full": lambda root: root @ root.mT,
    "of low rank": lambda root: root[..., :1] @ root[..., :1].mT,
    "none": torch.zeros_like,
}


@pytest.mark.parametrize("kind", COVARIANCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_entropies_of_dependent_outputs_equal_those_of_many_samples(kind, dtype):
    torch.manual_seed(0)
    mean, root = 3 * torch.randn(20, 5), torch.randn(20, 5, 5)
    covariance = COVARIANCES[kind](root).to(dtype)
    total, aleatoric = entropies(mean.to(dtype), covariance)
    chosen = {"full": root, "of low rank": root[..., :1], "none": 0 * root}[kind]
    noise = torch.randn(20_000, 20, chosen.shape[2])
    p = (mean + torch.einsum("bcd,sbd->sbc", chosen, noise)).double().softmax(-1)
    expected = torch.special.entr(p).sum(-1).mean(0)
    predictive = torch.special.entr(p.mean(0)).sum(-1)
    assert torch.allclose(total.double(), predictive, rtol=0.03, atol=0.02)
    assert torch.allclose(aleatoric.double(), expected, rtol=0.03, atol=0.02)
    information = (predictive - expected).sum()
    assert (total - aleatoric).sum().item() == pytest.approx(
        information.item(), rel=0.03, abs=1e-3
    )


def test_covariances_that_rounding_made_indefinite_are_valid():
    root = torch.randn(7, 4, 2)
    covariance = root @ root.mT - 1e-3 * torch.eye(4)
    mean = torch.randn(7, 4)
    expected = entropies(mean, root @ root.mT)
    for own, other in zip(entropies(mean, covariance), expected, strict=True):
        assert torch.allclose(own, other, rtol=0.05)
