"""What is said of a batch before a fit: entries not passed on, targets not shifted."""

from __future__ import annotations

import re
from collections.abc import MutableMapping
from typing import Any

from torch import Tensor, nn

from laplace_debiased.rows.arguments import ignored_keys, without_targets
from laplace_debiased.rows.inputs import Inputs
from laplace_debiased.rows.user_warnings import warn_user

# transformers' classes whose loss compares an output with the next token: XLM's and
# XLNet's do not
_CAUSAL = re.compile(r"ForCausalLM|(?<!With)(?<!XLNet)LMHeadModel")
_NO_TARGET = nn.CrossEntropyLoss().ignore_index


def warn_of_ignored_keys(network: nn.Module, X: Inputs, target_key: str) -> None:
    """Say which entries of mappings a network does not get.

    Args:
        network: The network.
        X: Inputs, a tensor or a mapping.
        target_key: Key of the targets, which it need not get.
    """
    ignored = ignored_keys(network, without_targets(network, X, target_key))
    if ignored:
        warn_user(
            f"The model is called without the entries {ignored} of batches, since "
            f"{type(network).__name__}.forward has no arguments of these names."
        )


def warn_of_own_tokens(network: nn.Module, X: Inputs, y: Any, key: str) -> None:
    """Say that a causal language model's targets are its inputs, not the next tokens.

    Args:
        network: The network.
        X: Inputs, a tensor or a mapping.
        y: Targets.
        key: Key of the tokens in mappings.
    """
    tokens = X.get(key) if isinstance(X, MutableMapping) else X
    if not (_is_causal(network) and isinstance(tokens, Tensor)):
        return
    if not isinstance(y, Tensor) or y.shape != tokens.shape:
        return
    if ((y == tokens.to(y.device)) | (y == _NO_TARGET)).all():
        warn_user(
            "The targets are the tokens of the inputs themselves. The loss of "
            f"{type(network).__name__} would shift them, but that of a posterior does "
            "not: let the loader yield the next token of each, and "
            f"{_NO_TARGET} at the end, by `torch.nn.functional.pad(labels[:, 1:], "
            f"(0, 1), value={_NO_TARGET})`."
        )


def _is_causal(network: nn.Module) -> bool:
    """Tell whether a network, or what an adapter is of, is a causal language model."""
    base = getattr(network, "get_base_model", None)
    own = network if base is None else base()
    return any(_CAUSAL.search(kind.__name__) for kind in type(own).__mro__)
