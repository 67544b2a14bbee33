"""How a network is called with a batch: by one argument, or by keywords.

laplace-torch hands a mapping on as one argument, to a ``forward(self, batch)`` that was
written for it. Networks of other libraries take its values by keywords. The names of
the arguments of ``forward`` tell which it is.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from inspect import Parameter, signature
from typing import Any, NamedTuple

from torch import Tensor, nn

from laplace_debiased.rows.inputs import Inputs

_NAMED = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


class _Accepted(NamedTuple):
    """What a network can be called with.

    Args:
        names: Names of its arguments.
        any_name: Whether it takes other keywords, too.
        one_argument: Whether it can be called with a batch alone.
    """

    names: frozenset[str]
    any_name: bool
    one_argument: bool


def arguments(model: nn.Module, X: Inputs) -> tuple[list[Any], dict[str, Any]]:
    """Return what to call a network with.

    Args:
        model: The network.
        X: Inputs, a tensor or a mapping.

    Returns:
        Positional arguments, and keywords, whose tensors are on the network's device:
        values of a mapping where ``forward`` takes one of its keys by name, or nothing
        but keywords. Keys that it does not take are left out.
    """
    accepted = _accepted_keywords(model, X)
    if accepted is None:
        return [X], {}
    assert isinstance(X, MutableMapping)
    parameter = next(model.parameters(), None)
    keywords = {
        key: value.to(parameter.device)
        if isinstance(value, Tensor) and parameter is not None
        else value
        for key, value in X.items()
        if accepted.any_name or key in accepted.names
    }
    return [], keywords


def without_targets(model: nn.Module, X: Inputs, key: str) -> Inputs:
    """Take the targets out of what a network is called with by keywords.

    It would compute a loss of its own with them. Those that take a mapping as one
    argument get it as it is.

    Args:
        model: The network.
        X: Inputs, a tensor or a mapping.
        key: Key of the targets.

    Returns:
        The inputs.
    """
    if not isinstance(X, MutableMapping) or key not in X:
        return X
    others = {name: value for name, value in X.items() if name != key}
    return X if _accepted_keywords(model, others) is None else others


def ignored_keys(model: nn.Module, X: Inputs) -> list[str]:
    """Return the keys of a mapping that a network is called without.

    Args:
        model: The network.
        X: Inputs, a tensor or a mapping.

    Returns:
        The keys.
    """
    accepted = _accepted_keywords(model, X)
    if accepted is None or accepted.any_name:
        return []
    assert isinstance(X, MutableMapping)
    return [key for key in X if key not in accepted.names]


def by_keywords(
    target_key: str, model: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    """Turn a mapping as one argument into keywords: a hook before a forward pass.

    Args:
        target_key: Key of the targets, which are left out.
        model: The network.
        args: Its positional arguments.
        kwargs: Its keywords.

    Returns:
        What to call it with instead; None to leave it as it is.
    """
    if len(args) != 1 or not isinstance(args[0], MutableMapping):
        return None
    positional, keywords = arguments(model, without_targets(model, args[0], target_key))
    return tuple(positional), keywords | kwargs


def _accepted_keywords(model: nn.Module, X: Inputs) -> _Accepted | None:
    """Tell which keywords a network takes; None if it is called with one argument."""
    if not isinstance(X, MutableMapping):
        return None
    accepted = _accepted(model)
    only_keywords = accepted.any_name and not accepted.one_argument
    return accepted if only_keywords or accepted.names & X.keys() else None


def _accepted(model: nn.Module) -> _Accepted:
    """Read what a network takes from its signature, and from that of what it wraps."""
    try:
        own = signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # of functions that are not written in Python
        return _Accepted(frozenset(), False, True)
    kinds = {parameter.kind for parameter in own}
    names = frozenset(p.name for p in own if p.kind in _NAMED)
    any_name = Parameter.VAR_KEYWORD in kinds
    wrapped = _wrapped(model, any_name and Parameter.VAR_POSITIONAL in kinds)
    if any_name and wrapped is not None:
        inner = _accepted(wrapped)
        return inner._replace(names=inner.names | names)
    one_argument = kinds - {Parameter.KEYWORD_ONLY, Parameter.VAR_KEYWORD}
    return _Accepted(names, any_name, bool(one_argument))


def _wrapped(model: nn.Module, takes_anything: bool) -> nn.Module | None:
    """Return the network that another one hands all keywords on to, if there is one."""
    base: Callable[[], nn.Module] | None = getattr(model, "get_base_model", None)
    if base is not None:  # that of an adapter
        return base()
    children = list(model.children())
    return children[0] if takes_anything and len(children) == 1 else None
