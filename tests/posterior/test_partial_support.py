"""Parameters in unsupported layers stay at their trained values."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.cases import NUM_OUTPUTS, network
from tests.fits import debiased, loader, posterior

SIZE = 20


class Partial(nn.Module):
    """Has parameters with unsupported uses, and unused ones."""

    def __init__(self):
        super().__init__()
        self.first, self.recurrent = nn.Linear(3, 4), nn.GRU(4, 4, batch_first=True)
        self.norm, self.unused = nn.LayerNorm(4), nn.Linear(2, 2)
        self.head = nn.Linear(4, NUM_OUTPUTS)

    def forward(self, x):
        x, _ = self.recurrent(self.first(x))
        return self.head(self.norm(x).mean(1))


SUPPORTED = [
    "first.weight",
    "first.bias",
    "norm.weight",
    "norm.bias",
    "head.weight",
    "head.bias",
]
NUM_SUPPORTED = 4 * 4 + 8 + 5 * NUM_OUTPUTS


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Partial().double()


@pytest.fixture
def points():
    torch.manual_seed(1)
    X, y = torch.randn(SIZE, 5, 3).double(), torch.randint(NUM_OUTPUTS, (SIZE,))
    return DataLoader(TensorDataset(X, y), 6)


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_others_are_fitted_as_if_those_were_frozen(model, points, magnitudes):
    la = debiased(model, magnitudes=magnitudes)
    with pytest.warns(UserWarning, match="stay at their trained values"):
        la.fit(points)
    assert all(param.requires_grad for param in model.parameters())
    frozen = Partial().double()
    frozen.load_state_dict(model.state_dict())
    for name, param in frozen.named_parameters():
        param.requires_grad_(name in SUPPORTED)
    expected = debiased(frozen, magnitudes=magnitudes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected.fit(points)
    assert la.n_params == expected.n_params == NUM_SUPPORTED
    assert la.n_layers == len(SUPPORTED)
    assert torch.equal(posterior(la), posterior(expected))
    X = points.dataset.tensors[0]
    assert torch.equal(la(X), expected(X))
    generator = torch.Generator()
    samples = [
        each.predictive_samples(X, "nn", 3, generator=generator.manual_seed(0))
        for each in (la, expected)
    ]
    assert torch.allclose(*samples)  # the fused attention of torch rounds otherwise
    la.optimize_prior_precision(prior_structure="layerwise")
    assert la.prior_precision.shape == (len(SUPPORTED),)


def test_one_warning_lists_and_counts_them(model, points):
    la = debiased(model)
    with pytest.warns(UserWarning, match="stay at") as caught:
        la.fit(points)
    (message,) = [str(w.message) for w in caught if "stay at" in str(w.message)]
    total = sum(param.numel() for param in model.parameters())
    for part in (
        f"of the parameters ({total - la.n_params} of {total}) stay at",
        "recurrent (GRU: weight_ih_l0, weight_hh_l0, bias_ih_l0, bias_hh_l0) is used "
        "by `gru`",
        "unused (Linear: weight, bias) is not used",
        "strict=True",
    ):
        assert part in message


def test_strict_refuses_unsupported_parameters(model, points):
    la = debiased(model, strict=True)
    with pytest.raises(ValueError, match=r"recurrent \(GRU: .*\) is used by"):
        la.fit(points)
    assert all(param.requires_grad for param in model.parameters())
    with pytest.raises(AttributeError, match="not fitted"):
        _ = la.posterior_precision


@pytest.mark.filterwarnings("ignore:Some parameters:UserWarning")
def test_a_prior_for_all_parameters_is_taken_for_those_that_are_fitted(model, points):
    named = dict(model.named_parameters())
    means = {name: torch.randn_like(param) for name, param in named.items()}
    precisions = {name: 1.0 + k for k, name in enumerate(named)}
    la = debiased(
        model,
        prior_mean=torch.cat([own.flatten() for own in means.values()]),
        prior_precision=torch.tensor(list(precisions.values())),
    )
    for _ in range(2):
        la.fit(points)
        fitted = torch.cat([means[name].flatten() for name in SUPPORTED])
        assert torch.equal(la.prior_mean, fitted)
        assert la.prior_precision.tolist() == [precisions[name] for name in SUPPORTED]


def test_strict_refuses_unused_parameters(model, points):
    for part in (model.first, model.recurrent):
        part.requires_grad_(False)
    la = debiased(model, strict=True)
    with pytest.raises(
        ValueError, match=r"unused \(Linear: weight, bias\) is not used"
    ):
        la.fit(points)
    model.unused.requires_grad_(False)
    la = debiased(model, strict=True)
    la.fit(points)
    assert la.n_params == 8 + 5 * NUM_OUTPUTS


def test_last_layer_does_not_mind_the_others(model, points):
    la = debiased(model, subset="last_layer", strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        la.fit(points)
    assert la.n_params == 5 * NUM_OUTPUTS


class PartlyHidden(nn.Module):
    """Detaches a layer's weight in one of its uses, and cuts another layer off."""

    def __init__(self):
        super().__init__()
        self.reused, self.cut = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.head = nn.Linear(4, NUM_OUTPUTS)

    def forward(self, x):
        hidden = self.reused(x).tanh() + self.cut(x).detach()
        return self.head((hidden @ self.reused.weight.detach()).tanh())


def test_what_rows_do_not_tell_stays_at_its_trained_value():
    torch.manual_seed(0)
    model, train = PartlyHidden().double(), loader(likelihood="regression")
    la = debiased(model, "regression")
    with pytest.warns(UserWarning, match=r"cut .* does not .*, reused .* `detach`"):
        la.fit(train)
    assert la.n_params == 5 * NUM_OUTPUTS
    for part in (model.reused, model.cut):
        part.requires_grad_(False)
    expected = debiased(model, "regression")
    expected.fit(train)
    assert torch.equal(posterior(la), posterior(expected))
    for part in (model.reused, model.cut):
        part.requires_grad_(True)
    with pytest.raises(ValueError, match=r"reused .* is also used by"):
        debiased(model, "regression", strict=True).fit(train)


def test_checkpoints_know_what_was_left_out(model, points, tmp_path):
    la = debiased(model)
    la.fit(points)
    torch.save(la.state_dict(), tmp_path / "la.pt")
    restored = debiased(model)
    restored.load_state_dict(torch.load(tmp_path / "la.pt", weights_only=True))
    X = points.dataset.tensors[0]
    assert torch.equal(restored(X), la(X))

    model.head.requires_grad_(False)
    with pytest.raises(ValueError, match=r"has other candidates"):
        debiased(model).load_state_dict(la.state_dict())


def test_priors_are_checked_against_what_is_fitted(model, points):
    la = debiased(model)
    la.fit(points)
    count = len(list(model.parameters()))
    with pytest.raises(ValueError, match="align with architecture"):
        la.prior_precision = torch.ones(count).double()
    with pytest.raises(ValueError, match="prior mean"):
        la.prior_mean = torch.zeros(sum(p.numel() for p in model.parameters()))
    la = debiased(network("mlp"), prior_precision=torch.ones(4).double())
    la.fit(loader())


def test_nothing_supported_is_an_error():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.GRU(4, NUM_OUTPUTS)

        def forward(self, x):
            return self.body(x[None])[0][0]

    with pytest.raises(ValueError, match="nothing to fit"):
        debiased(Weighted().double()).fit(loader())


def test_a_refused_refit_keeps_what_the_posterior_is_over():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.maybe = nn.Linear(4, 4), nn.Linear(4, 4)
            self.head, self.use = nn.Linear(4, NUM_OUTPUTS), True

        def forward(self, x):
            x = self.first(x).tanh()
            return self.head(self.maybe(x) if self.use else x)

    torch.manual_seed(0)
    model, train = Optional().double(), loader()
    la = debiased(model)
    la.fit(train)
    X = train.dataset.tensors[0]
    before = la(X)
    y = train.dataset.tensors[1]
    y = torch.where(torch.arange(len(y)) < 7, y, NUM_OUTPUTS)  # wrong from the second
    model.use = False
    with pytest.raises(ValueError, match="must lie in"):
        la.fit(DataLoader(TensorDataset(X, y), 7))
    assert la.n_layers == 6
    model.use = True
    assert torch.equal(la(X), before)
    model.use = False
    with pytest.warns(UserWarning, match="maybe"):
        la.fit(train)
    assert la.n_layers == 4
    model.use = True
    la.fit(train)
    assert torch.equal(la(X), before)


def test_a_bool_is_meant_by_the_second_argument(model, points):
    la = debiased(network("mlp"))
    with pytest.raises(TypeError, match="pass `magnitude_loader` by its name"):
        la.fit(loader(), loader())
    la.fit(loader())
    la.fit(loader(seed=5), False)  # as in laplace-torch, further data
    assert la.n_data == 2 * len(loader().dataset)
