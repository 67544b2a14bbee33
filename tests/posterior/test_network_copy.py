"""A last-layer posterior has a copy of the network, which follows it."""

import gc
import pickle

import pytest
import torch
from torch import nn

from tests.cases import batch, network
from tests.fits import debiased, loader, posterior


def last_layer(model):
    return debiased(model, subset="last_layer")


def trained_on(model):
    """Change all values, also those of the buffers."""
    with torch.no_grad():
        for own in (*model.parameters(), *model.buffers()):
            own.copy_(own * 1.25 + 1e-3)


@pytest.mark.parametrize("name", ["mlp", "resnet"])
@pytest.mark.parametrize("fits_before", [0, 1])
def test_a_network_that_was_trained_meanwhile_is_what_is_fitted(name, fits_before):
    model = network(name)
    la = last_layer(model)
    for _ in range(fits_before):
        la.fit(loader(name))
    trained_on(model)
    la.fit(loader(name))
    expected = last_layer(model)
    expected.fit(loader(name))
    assert torch.equal(posterior(la), posterior(expected))
    X = batch(name, 4)[0]
    assert torch.equal(la(X), expected(X))


def test_a_state_is_compared_with_the_present_network(tmp_path, recwarn):
    trained, model = network("mlp"), network("mlp")
    trained_on(trained)
    saved = last_layer(trained)
    saved.fit(loader())
    la = last_layer(model)
    model.load_state_dict(trained.state_dict())
    la.load_state_dict(saved.state_dict())
    assert not [own for own in recwarn if "not those" in str(own.message)]
    saved.prior_precision = la.prior_precision = 2.0
    X = batch("mlp", 4)[0]
    assert torch.equal(la(X), saved(X))


def test_a_fit_that_fails_leaves_the_copy_as_it_was():
    model = network("mlp")
    la = last_layer(model)
    la.fit(loader())
    la.prior_precision = 2.0
    X, y = batch("mlp", 4)
    before = la(X)
    trained_on(model)
    with pytest.raises(ValueError, match="NaN"):
        la.fit([(X * torch.nan, y)])
    assert torch.equal(la(X), before)


def test_a_network_that_was_rebuilt_is_refused():
    model = network("mlp")
    la = last_layer(model)
    model.append(nn.Linear(3, 3).double())
    with pytest.raises(ValueError, match=r"other parameters .* build a new posterior"):
        la.fit(loader())


def test_the_network_is_not_kept_alive():
    la = last_layer(network("mlp"))
    gc.collect()
    la.fit(loader())
    again = pickle.loads(pickle.dumps(la))
    again.fit(loader())
    assert torch.equal(posterior(la), posterior(again))
