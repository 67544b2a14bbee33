"""Saving and loading a fitted posterior.

A checkpoint has a format, which is independent of the names of classes and fields. Like
that of a torch module, it is a flat dictionary whose keys are paths, such as
``seen.weight`` or ``layers.0.name``: its values are tensors, numbers, texts, and lists
or tuples of them, as in laplace-torch's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from laplace import ParametricLaplace
from torch import Tensor

from laplace_debiased.curvature.streams import CURVATURE_TYPES
from laplace_debiased.posterior.fitting import Seen, set_params
from laplace_debiased.posterior.measuring import Estimate
from laplace_debiased.posterior.sampling_error import SamplingError
from laplace_debiased.rows.layers import Layer
from laplace_debiased.rows.selection import Selection

if TYPE_CHECKING:
    from laplace_debiased.posterior.laplace import KronDebiasedLaplace

# what version 0.1 saved before it had a format cannot be read: it does not tell layers
FORMAT = 3
# what laplace-torch reads from a saved posterior
_UPSTREAM = {
    "enable_backprop",
    "likelihood",
    "loss",
    "mean",
    "n_data",
    "n_outputs",
    "prior_mean",
    "prior_precision",
    "sigma_noise",
    "temperature",
}
# what ours has beyond that
_OWN = {
    "curvature",
    "example_size",
    "layers",
    "magnitudes",
    "parameters",
    "sampling_error",
    "seen",
    "subset_of_weights",
}


def state_dict(la: KronDebiasedLaplace) -> dict[str, Any]:
    """Return a fitted posterior as plain values and tensors.

    Args:
        la: The posterior.

    Returns:
        The dictionary, which holds no dictionaries.

    Raises:
        AttributeError: If there is no fit yet.
    """
    upstream = ParametricLaplace.state_dict(la)
    estimate, selection = la._estimate, la._selection
    assert estimate is not None and selection is not None
    of_parameter = {id(p): name for name, p in la.model.named_parameters()}
    subset_of_weights, _ = la._key
    saved = {name: upstream[name] for name in _UPSTREAM} | {
        "format": FORMAT,
        "cls_name": upstream["cls_name"],  # by which laplace-torch refuses what is ours
        "subset_of_weights": subset_of_weights,
        "magnitudes": la.settings.magnitudes,
        "parameters": [of_parameter[id(param)] for param in la.fitted_params],
        "layers": [layer.state_dict() for layer in selection.layers],
        "example_size": selection.example_size,
        "curvature": estimate.curvature.state_dict(),
        "sampling_error": estimate.error and estimate.error.state_dict(),
        "seen": dict(vars(la._seen)),
    }
    return dict(_flat(saved))


def load(la: KronDebiasedLaplace, saved: dict[str, Any]) -> None:
    """Take over a saved posterior.

    Args:
        la: The posterior, which the caller restores if this raises.
        saved: From :func:`state_dict`.

    Raises:
        ValueError: If it does not fit, or an entry is missing or unknown.
    """
    check(la, saved)
    try:
        _take_over(la, _nested(saved))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"`state_dict` lacks an entry, or has another: {error}") from (
            error
        )
    differing = la.state_dict().keys() ^ saved.keys()
    if differing:
        raise ValueError(
            f"`state_dict` lacks {sorted(differing)}, or they are unknown."
        )


def _take_over(la: KronDebiasedLaplace, saved: dict[str, Any]) -> None:
    """Build what was saved, from nested entries."""
    named = dict(la.model.named_parameters())
    fitted: list[Tensor] = [named[name] for name in saved["parameters"]]
    set_params(la, fitted)
    layers = [Layer.from_state_dict(own) for own in saved["layers"]]
    cls_name = type(la).__name__
    ParametricLaplace.load_state_dict(la, saved | {"cls_name": cls_name, "H": None})
    kind = CURVATURE_TYPES[la.settings.magnitudes]
    error = saved["sampling_error"]
    la._selection = Selection(layers, [], saved["example_size"], saved["n_outputs"])
    la._estimate = Estimate(
        kind.from_state_dict(layers, saved["curvature"]),
        saved["loss"],
        saved["n_outputs"],
        error and SamplingError.from_state_dict(error),
    )
    la._seen = Seen(**saved["seen"])
    la.H = la._estimate.curvature.decompose(la.damping)


def check(la: KronDebiasedLaplace, saved: dict[str, Any]) -> None:
    """Refuse what is no checkpoint of a posterior like this one.

    Args:
        la: The posterior.
        saved: From :func:`state_dict`.

    Raises:
        ValueError: If format, class, magnitudes or parameters differ, or an entry is
            missing.
    """
    if saved.get("format") != FORMAT:
        raise ValueError(
            f"`state_dict` has format {saved.get('format')}, not {FORMAT}: it is from "
            f"{saved.get('cls_name', 'something else')}, or an earlier version of this "
            "library. Fit the posterior again."
        )
    missing = (_UPSTREAM | _OWN) - {key.partition(".")[0] for key in saved}
    if missing:
        raise ValueError(f"`state_dict` lacks {sorted(missing)}.")
    subset_of_weights, _ = la._key
    for key, own in (
        ("subset_of_weights", subset_of_weights),
        ("magnitudes", la.settings.magnitudes),
    ):
        if saved[key] != own:
            raise ValueError(
                f"`state_dict` has {key} {saved[key]!r}, this object {own!r}."
            )
    named = dict(la.model.named_parameters())
    candidates = {id(param) for param in la._candidates}
    unknown = [
        name
        for name in saved["parameters"]
        if name not in named or id(named[name]) not in candidates
    ]
    if unknown:
        raise ValueError(
            "`state_dict` is of other parameters than the model's: it has "
            f"{sorted(unknown)}, which are not fitted here."
        )


def _flat(value: dict | list, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield what nested dictionaries hold, and lists of them, with the paths to it."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        own = (*path, str(key))
        if _has_dictionaries(item):
            yield from _flat(item, own)
        else:
            yield ".".join(own), item


def _has_dictionaries(value: Any) -> bool:
    return isinstance(value, dict) or (
        isinstance(value, list) and any(_has_dictionaries(item) for item in value)
    )


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Undo :func:`_flat`: what has numbers for keys was a list."""
    entries: dict[str, Any] = {}
    for path, value in flat.items():
        *outer, last = path.split(".")
        inner = entries
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return {key: _with_lists(value) for key, value in entries.items()}


def _with_lists(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    items = {key: _with_lists(item) for key, item in value.items()}
    if all(key.isdecimal() for key in items):
        return [items[key] for key in sorted(items, key=int)]
    return items
