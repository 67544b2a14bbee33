"""Which entries of an axis are an example's own, and which are another one's."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased.rows.layers import Layer
from tests import dense
from tests.cases import NUM_OUTPUTS
from tests.fits import debiased
from tests.rows.recording import assert_rows_are_exact, found, supported
from tests.zoo import Model

SIZE, TOKENS, WIDTH = 8, 5, 4


def attention(token):
    """Its tokens come first inside, though examples come first outside."""

    def forward(self, x):
        attended = self.attention(x, x, x)[0]
        return self.head(attended[:, token(x.shape[1])])

    return Model(
        forward,
        attention=nn.MultiheadAttention(WIDTH, 2, batch_first=True),
        head=nn.Linear(WIDTH, NUM_OUTPUTS),
    )


def joined_tokens():
    """Tokens come first on the axis of examples."""

    def forward(self, x):
        joined = self.body(x.transpose(0, 1).flatten(0, 1)).tanh()
        return self.head(joined.unflatten(0, (-1, len(x))).sum(0))

    body, head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, NUM_OUTPUTS)
    return Model(forward, body=body, head=head)


NETWORKS = {
    "attention, first token": lambda: attention(lambda length: 0),
    "attention, token in the middle": lambda: attention(lambda length: length // 2),
    "attention, last token": lambda: attention(lambda length: length - 1),
    "joined tokens": joined_tokens,
}


def build(name, length=TOKENS):
    torch.manual_seed(0)
    model = NETWORKS[name]().double().eval()
    return model, torch.randn(SIZE, length, WIDTH).double()


def fitted(model, X, batch_size):
    la = debiased(model)
    la.fit(DataLoader(TensorDataset(X, torch.arange(len(X)) % 3), batch_size))
    return la


def assert_variances_are_exact(la, X):
    J = dense.jacobians(la.model, X, len(X), la.fitted_params)
    _, f_var = la._glm_predictive_distribution(X)
    assert dense.relative_error(f_var, la.functional_variance(J)) < 1e-10


@pytest.mark.parametrize("found_with", range(1, SIZE + 1))
def test_rows_are_exact_whatever_the_batch_size(found_with):
    """With two examples, a token in the middle would lie in both halves."""
    model, X = build("attention, token in the middle")
    layers, params = found(model, X[:found_with])
    for size in range(1, SIZE + 1):
        assert_rows_are_exact(model, X[:size], params, layers)


@pytest.mark.parametrize("batch_size", range(1, SIZE + 1))
def test_variances_are_exact_whatever_the_batch_size(batch_size):
    model, X = build("attention, token in the middle")
    la = fitted(model, X, batch_size)
    for size in range(1, SIZE + 1):
        assert_variances_are_exact(la, X[:size])


@pytest.mark.parametrize("name", NETWORKS)
def test_single_entries_do_not_tell_whose_further_ones_are(name):
    model, X = build(name)
    la = fitted(model, X[:, :1], 4)
    assert_variances_are_exact(la, X[:, :1])
    assert_variances_are_exact(la, X[:1])
    message = (
        rf"a tensor of shape \({SIZE * TOKENS}, {WIDTH}\) for a batch of {SIZE}, but "
        "one entry on axis 0 for each example when it was found, .*: fit with examples "
        "of several positions first in the data"
    )
    with pytest.raises(ValueError, match=message):
        la(X)


def test_saved_layers_know_that_they_had_single_entries():
    model, X = build("joined tokens", length=1)
    params, layers, _ = supported(model, X)
    layers = [Layer.from_state_dict(layer.state_dict()) for layer in layers]
    _, X = build("joined tokens")
    assert_rows_are_exact(model, X[:1], params, layers)
    with pytest.raises(ValueError, match="one entry on axis 0 for each example"):
        assert_rows_are_exact(model, X, params, layers)
