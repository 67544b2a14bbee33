"""In ``torch.inference_mode()``, as in trainers' tests, all is as outside of it."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from laplace_debiased import (
    DebiasedCG,
    DebiasedKFACLinearOperator,
    curvature_scores,
    directional_derivatives,
)
from tests.cases import batch, network
from tests.faults import same
from tests.fits import SUBSETS, debiased, loader, posterior
from tests.networks import RAW
from tests.networks import network as network_of_users
from tests.posterior.test_hugging_face import inputs
from tests.posterior.test_hugging_face import loader as loader_of_mappings

SIZE = 40


def made_there(tensors):
    """Copies that are made in inference mode: no gradient is computed through them."""
    with torch.inference_mode():
        copies = {key: own.clone() for key, own in dict(tensors).items()}
    assert all(own.is_inference() for own in copies.values())
    return copies


def pair_made_there(X, y):
    return tuple(made_there({"X": X, "y": y}).values())


def seeded():
    return torch.Generator().manual_seed(0)


USES = {
    "probit": lambda la, X, data: la(X),
    "bridge": lambda la, X, data: la(X, link_approx="bridge"),
    "mc": lambda la, X, data: la(X, link_approx="mc", generator=seeded()),
    "nn": lambda la, X, data: la(X, "nn", link_approx="mc", generator=seeded()),
    "samples": lambda la, X, data: la.predictive_samples(X, generator=seeded()),
    "uncertainty": lambda la, X, data: la.uncertainty(X).epistemic,
    "calibrate": lambda la, X, data: torch.tensor(la.calibrate(data).nll),
    "report": lambda la, X, data: torch.tensor(la.report(data, [X]).posterior.nll),
    "sets": lambda la, X, data: la.conformal_sets(data)(X),
    "gridsearch": lambda la, X, data: la.optimize_prior_precision(
        method="gridsearch", val_loader=data, grid_size=3
    ),
    "bias": lambda la, X, data: la.bias_report(data).curvature.own,
}


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("use", USES)
def test_all_that_is_done_with_a_posterior(use, subset):
    outside, found = batch("mlp", SIZE), []
    for X, y in (outside, pair_made_there(*outside)):
        la = debiased(network("mlp"), subset=subset, prior_precision=2.0)
        la.fit(loader(size=SIZE))
        with torch.inference_mode(X.is_inference()):
            found.append((USES[use](la, X, [(X, y)]), la.prior_precision))
        assert torch.is_grad_enabled()
    assert same(*found)


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize(
    "options", [{}, {"magnitudes": "ggn"}, {"damping": True}], ids=str
)
def test_fits_from_the_constructor_on(subset, options):
    (X, y), found = batch("mlp", SIZE), []
    for inside in (False, True):
        model = network("mlp")
        with torch.inference_mode(inside):
            la = debiased(model, subset=subset, **options)
            la.fit([pair_made_there(X, y) if inside else (X, y)])
            la.optimize_prior_precision()
        la.optimize_prior_precision()  # outside, with what was made in it
        found.append((posterior(la), la(X)))
    assert same(*found)


@pytest.mark.parametrize(
    "name", ["resnet", "transformer", "recurrent", "conv-transpose-2d", "products"]
)
def test_networks_of_other_layers(name):
    X, y = batch(name, SIZE)
    la = debiased(network(name))
    la.fit([(X, y)])
    expected = la._glm_predictive_distribution(X[:5])
    own = pair_made_there(X[:5], y[:5])[0]
    with torch.inference_mode():
        actual = la._glm_predictive_distribution(own)
        la.fit([pair_made_there(X, y)])
    for first, second in zip(actual, expected, strict=True):
        assert torch.equal(first, second) and not first.is_inference()
    assert torch.allclose(la._glm_predictive_distribution(X[:5])[1], expected[1])


@pytest.mark.filterwarnings("ignore:.*stay at their trained values")
@pytest.mark.parametrize("name", RAW)
def test_mappings(name):
    la, X = debiased(network_of_users(name, networks=RAW)), inputs(name)
    la.fit(loader_of_mappings(name))
    expected, own = la(X), made_there(X)
    with torch.inference_mode():
        assert torch.equal(la(own), expected)
    assert all(tensor.is_inference() for tensor in own.values())  # the owner's stay


@pytest.mark.parametrize("forward_samples", [None, 8])
def test_gradients_still_flow_to_inputs_that_want_them(forward_samples):
    X, y = batch("mlp", SIZE)
    la = debiased(network("mlp"), enable_backprop=True, forward_samples=forward_samples)
    with torch.inference_mode():
        la.fit([pair_made_there(X, y)])
        assert la(pair_made_there(X, y)[0]).shape == (SIZE, 3)
    x = X[:3].clone().requires_grad_()
    la(x)[:, 0].sum().backward()
    assert x.grad.norm() > 0


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("subset", SUBSETS)
def test_graphs_are_kept_only_where_gradients_are_enabled(subset, likelihood):
    la = debiased(network("mlp"), likelihood, subset, enable_backprop=True)
    la.fit(loader("mlp", likelihood))
    x = batch("mlp", 3)[0].requires_grad_()
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            found = la(x)
        parts = found if isinstance(found, tuple) else (found,)
        assert all(part.requires_grad == enabled for part in parts)


def test_operators_scores_derivatives_and_steps():
    (X, y), loss, found = batch("mlp", SIZE), nn.CrossEntropyLoss(), []
    for inside in (False, True):
        model = network("mlp")
        params = list(model.parameters())

        def closure(model=model):
            output = model(X)
            return nn.functional.cross_entropy(output, y, reduction="none"), output

        with torch.inference_mode(inside):
            data = [pair_made_there(X, y) if inside else (X, y)]
            columns = torch.eye(sum(map(torch.numel, params)), 2, dtype=X.dtype)
            operator = DebiasedKFACLinearOperator(model, loss, params, data, data)
            other = directional_derivatives(model, loss, params, data, columns)
            found.append(
                [
                    operator.trace,
                    *operator.gradient_and_loss()[0],
                    curvature_scores(model, loss, data),
                    other.curvatures,
                    DebiasedCG(params).step(closure),
                ]
            )
    assert same(*found)


class Predicting(pl.LightningModule):
    """Predicts with a posterior where Lightning lets modules predict."""

    def __init__(self, la):
        super().__init__()
        self.la, self.found = la, []

    def predict_step(self, batch, index):
        assert torch.is_inference_mode_enabled()
        return self.la(batch[0])

    def test_step(self, batch, index):
        self.found.append(self.la.uncertainty(batch[0]).epistemic)


@pytest.mark.filterwarnings("ignore")
def test_lightning_predicts_in_it():
    la = debiased(network("mlp", dtype=torch.float32))
    X, y = batch("mlp", SIZE, dtype=torch.float32)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, y), 10)
    la.fit(data)
    module = Predicting(la)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    assert torch.allclose(torch.cat(trainer.predict(module, data)), la(X))
    trainer.test(module, data, verbose=False)
    assert torch.allclose(torch.cat(module.found), la.uncertainty(X).epistemic)
