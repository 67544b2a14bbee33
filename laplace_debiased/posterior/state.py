"""Saving and loading a fitted posterior.

A checkpoint has a format, which is independent of the names of classes and fields, and
holds plain containers and tensors only.
"""

from __future__ import annotations

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
FORMAT = 2
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
        The dictionary.

    Raises:
        AttributeError: If there is no fit yet.
    """
    upstream = ParametricLaplace.state_dict(la)
    estimate, selection = la._estimate, la._selection
    assert estimate is not None and selection is not None
    of_parameter = {id(p): name for name, p in la.model.named_parameters()}
    subset_of_weights, _ = la._key
    return {name: upstream[name] for name in _UPSTREAM} | {
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


def load(la: KronDebiasedLaplace, saved: dict[str, Any]) -> None:
    """Take over a saved posterior.

    Args:
        la: The posterior, which the caller restores if this raises.
        saved: From :func:`state_dict`.

    Raises:
        ValueError: If it does not fit.
    """
    check(la, saved)
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
    missing = (_UPSTREAM | _OWN) - saved.keys()
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
