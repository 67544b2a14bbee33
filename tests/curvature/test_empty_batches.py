"""Batches without examples, wherever they are, change nothing."""

import pytest
import torch
from torch import nn

from laplace_debiased import DebiasedKFACLinearOperator, curvature_scores
from tests.cases import batch, network, split

SIZE = 12
LOSS = nn.CrossEntropyLoss()


def with_empty(batches, place):
    X, y = batches[0]
    return [*batches[:place], (X[:0], y[:0]), *batches[place:]]


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_operators_skip_them(magnitudes, place):
    model, batches = network("mlp"), split(*batch("mlp", SIZE), 5, 7)
    params = list(model.parameters())
    actual, expected = (
        DebiasedKFACLinearOperator(model, LOSS, params, own, own, magnitudes=magnitudes)
        for own in (with_empty(batches, place), batches)
    )
    vector = torch.ones(actual.shape[1], dtype=torch.float64)
    assert torch.allclose(actual @ vector, expected @ vector)


@pytest.mark.parametrize("place", [1, 2])
def test_scores_skip_them(place):
    model, batches = network("mlp"), split(*batch("mlp", SIZE), 5, 7)
    actual = curvature_scores(model, LOSS, with_empty(batches, place))
    assert torch.allclose(actual, curvature_scores(model, LOSS, batches))
