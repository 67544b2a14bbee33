"""Causal language models as they come: their targets are the next tokens."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.fits import SUBSETS, debiased

VOCABULARY, LENGTH = 9, 5
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(is_gradient_checkpointing|stay at their|default `prior_precision`)"
)
GPT2 = GPT2Config(
    vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=8, n_layer=1, n_head=2
)
LLAMA = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
)


class OwnName(LlamaForCausalLM):
    """A class of the user's own."""


def adapted():
    options = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    return get_peft_model(GPT2LMHeadModel(GPT2), options)


NETWORKS = {
    "gpt-2": lambda: GPT2LMHeadModel(GPT2),
    "llama": lambda: LlamaForCausalLM(LLAMA),
    "own name": lambda: OwnName(LLAMA),
    "adapted": adapted,
}


class Own(nn.Module):
    """A wrapper of the user's own, of which nothing is known."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, input_ids=None, labels=None):
        return self.network(input_ids=input_ids).logits


def network(name):
    torch.manual_seed(0)
    return NETWORKS[name]().double().eval()


def batch(shifted):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (12, LENGTH), generator=generator)
    labels = tokens.clone()
    labels[:, :2] = -100  # of a prompt
    if shifted:
        labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    return {"input_ids": tokens, "labels": labels}


def fit(model, data, **options):
    la = debiased(model, class_axis=-1, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        la.fit([data])
    return la, [str(w.message) for w in caught if "targets are" in str(w.message)]


@pytest.mark.parametrize("name", NETWORKS)
def test_targets_that_are_not_shifted_are_warned_of(name):
    model = network(name)
    _, (message,) = fit(model, batch(shifted=False))
    assert type(model).__name__ in message and "pad(labels[:, 1:]" in message


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("name", ["gpt-2", "llama"])
def test_shifted_targets_are_those_of_its_own_loss(name, subset):
    model = network(name)
    la, messages = fit(model, batch(shifted=True), subset=subset)
    assert not messages
    count = 12 * (LENGTH - 2)
    with torch.no_grad():
        own = model(**batch(shifted=False)).loss
    assert torch.allclose(la.loss / count, own.double())  # theirs is in single


def test_other_networks_may_return_tokens():
    options = GPT2Config(**GPT2.to_dict() | {"num_labels": VOCABULARY})
    for model in (GPT2ForTokenClassification(options), Own(network("llama"))):
        assert not fit(model.double().eval(), batch(shifted=False))[1]
