"""Hugging Face's activation checkpointing, which is on in train mode alone."""

import pytest
import torch
from torch import nn

from laplace_debiased import DebiasedKFACLinearOperator, directional_derivatives
from tests import dense
from tests.networks import batch, network

SIZE = 4
LOSS = nn.CrossEntropyLoss(reduction="sum")


@pytest.fixture
def data():
    points = batch("bert", SIZE)
    return [(points, points["labels"])]


def checkpointed(**options):
    """A network in train mode, whose dropout is off."""
    model = network("bert")
    model.classifier.gradient_checkpointing_enable(**options)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def supported(model):
    return [
        param
        for key, param in model.named_parameters()
        if "embeddings.LayerNorm" in key or "embeddings" not in key
    ]


@pytest.mark.parametrize(
    "options", [{}, {"gradient_checkpointing_kwargs": {"use_reentrant": False}}]
)
def test_curvature_is_exact(options, data):
    model = checkpointed(**options)
    params = supported(model)
    calls = []
    inner = model.classifier.bert.encoder.layer[0].intermediate.dense
    inner.register_forward_hook(lambda *_: calls.append(1))
    operator = DebiasedKFACLinearOperator(
        model, LOSS, params, data, data, magnitudes="ggn"
    )
    trace, num_calls = operator.trace, len(calls)
    D = torch.randn(sum(p.numel() for p in params), 4, dtype=torch.float64)
    derivatives = directional_derivatives(model, LOSS, params, data, D, mode="reverse")
    model.classifier.gradient_checkpointing_disable()
    ((X, y),) = data
    blocks = dense.ggn_blocks(model, X, y, LOSS, params=params)
    assert abs(trace - sum(block.trace() for block in blocks)) < 1e-8 * trace
    expected = directional_derivatives(model, LOSS, params, data, D, mode="reverse")
    assert dense.relative_error(derivatives.curvatures, expected.curvatures) < 1e-8
    calls.clear()
    DebiasedKFACLinearOperator(
        model, LOSS, params, data, data, magnitudes="ggn"
    ).compute()
    assert len(calls) < num_calls  # checkpointing did call it again


def test_reentrant_checkpointing_is_refused_with_a_remedy(data):
    model = checkpointed(gradient_checkpointing_kwargs={"use_reentrant": True})
    operator = DebiasedKFACLinearOperator(model, LOSS, supported(model), data, data)
    with pytest.raises(ValueError, match="pass `use_reentrant=False`"):
        operator.compute()


def test_where_there_is_no_forward_mode_the_remedy_is_named(data):
    model = checkpointed()
    params = supported(model)
    D = torch.ones(sum(p.numel() for p in params), 1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="functorch") as error:
        directional_derivatives(model, LOSS, params, data, D, mode="forward")
    assert "`mode='reverse'` needs no forward mode" in str(error.value)
