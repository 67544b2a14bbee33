"""A fitted posterior as plain values and tensors, and back.

A checkpoint has a format, which is independent of the names of classes and fields. It
is checked as a whole before the posterior takes over any of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from laplace import ParametricLaplace
from torch import Tensor

from laplace_debiased.curvature.decomposition import decompose
from laplace_debiased.curvature.factors import EXPAND
from laplace_debiased.curvature.streams import CURVATURE_TYPES
from laplace_debiased.posterior.checkpoint import flat, is_same, nested, on_device
from laplace_debiased.posterior.fitting import Seen, set_params
from laplace_debiased.posterior.identity import check_not_replaced
from laplace_debiased.posterior.measuring import Estimate
from laplace_debiased.posterior.sampling_error import SamplingError
from laplace_debiased.posterior.state_checks import UPSTREAM, check
from laplace_debiased.predictive.calibration import Calibration
from laplace_debiased.rows.checks import plain_text
from laplace_debiased.rows.layers import Layer
from laplace_debiased.rows.selection import Selection

if TYPE_CHECKING:
    from laplace_debiased.posterior.laplace import KronDebiasedLaplace

# what version 0.1 saved before it had a format cannot be read: it does not tell layers;
# format 2 does not tell the shapes of parameters, nor which there were, format 3 not
# the calibration, format 4 not which backend's curvature it is, and format 5 not which
# axis has the classes
FORMAT = 6
OTHER_PARAMETERS = (
    "The model's parameters are not those that the saved posterior was fitted at: load "
    "the model's own checkpoint before you predict."
)


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
    saved = {name: _plain(upstream[name]) for name in UPSTREAM} | {
        "format": FORMAT,
        "cls_name": upstream["cls_name"],  # by which laplace-torch refuses what is ours
        **_configuration(la),
        "temperature": float(la.temperature),
        "parameters": _names(la, la.fitted_params),
        "shapes": [list(param.shape) for param in la.fitted_params],
        "layers": [layer.state_dict() for layer in selection.layers],
        "example_size": selection.example_size,
        "outputs_size": selection.num_outputs,
        **of_estimate(estimate),
        "seen": dict(vars(la._seen)),
        "calibration": la.calibration and asdict(la.calibration),
    }
    return dict(flat(saved))


def of_estimate(estimate: Estimate) -> dict[str, Any]:
    """Return the entries of what a fit measured, but for the loss."""
    return {
        "curvature": estimate.curvature.state_dict(),
        "sampling_error": estimate.error and estimate.error.state_dict(),
    }


def estimate_of(saved: dict[str, Any], layers: list[Layer]) -> Estimate:
    """Return what a fit measured from a checkpoint's entries.

    Args:
        saved: The entries, nested.
        layers: The layers.

    Returns:
        The estimate.
    """
    kind, error = CURVATURE_TYPES[saved["magnitudes"]], saved["sampling_error"]
    return Estimate(
        kind.from_state_dict(layers, saved["curvature"]),
        saved["loss"],
        saved["n_outputs"],
        error and SamplingError.from_state_dict(error),
    )


def _plain(value: Any) -> Any:
    """Return a tensor without its graph, and a number or a name of a basic type."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, str):
        return plain_text(value)
    return float(value) if isinstance(value, float) else value


def _configuration(la: KronDebiasedLaplace) -> dict[str, Any]:
    """Return what a checkpoint has in common with the posteriors that it is for."""
    return {
        "subset_of_weights": la._key[0],
        "magnitudes": la.settings.magnitudes,
        "damping": la.damping,
        "backend": la._backend_cls.__name__,
        "approximation": plain_text(la._asdl_fisher_kwargs.get("kfac_approx", EXPAND)),
        "likelihood": _plain(la.likelihood),
        "candidates": _names(la, la._candidates),
        "class_axis": la.class_axis,
    }


def _names(la: KronDebiasedLaplace, params: Sequence[Tensor]) -> list[str]:
    check_not_replaced(la.model, params)
    of_parameter = {id(p): name for name, p in la.model.named_parameters()}
    return [of_parameter[id(param)] for param in params]


def load(la: KronDebiasedLaplace, saved: dict[str, Any]) -> None:
    """Take over a saved posterior.

    Args:
        la: The posterior, which the caller restores if this raises.
        saved: From :func:`state_dict`.

    Raises:
        ValueError: If it does not fit, or an entry is missing or unknown.
    """
    check_origin(la, saved)
    names = saved.keys()
    saved = nested(on_device(saved, la._device))
    check(la, _configuration(la), saved)
    named = dict(la.model.named_parameters())
    set_params(la, [named[name] for name in saved["parameters"]])
    layers = [Layer.from_state_dict(own) for own in saved["layers"]]
    cls_name = type(la).__name__
    la._calibration = None
    ParametricLaplace.load_state_dict(la, saved | {"cls_name": cls_name, "H": None})
    la._selection = Selection(layers, [], saved["example_size"], saved["outputs_size"])
    la._estimate = estimate_of(saved, layers)
    la._seen = Seen(**saved["seen"])
    decomposition = partial(decompose, tolerance=la.settings.decomposition_tolerance)
    one_by_one = [1] * len(layers)
    la.H = la._estimate.curvature.decompose(la.damping, decomposition, one_by_one)
    calibration = saved["calibration"]
    la._calibration = calibration and Calibration(**calibration)
    known = la.state_dict().keys()
    if known != names:
        raise ValueError(
            f"`state_dict` lacks {sorted(known - names)}, and has unknown entries "
            f"{sorted(names - known)}."
        )


def check_origin(la: KronDebiasedLaplace, saved: dict[str, Any]) -> None:
    """Refuse what is no checkpoint of a posterior of this kind.

    Args:
        la: The posterior.
        saved: From :func:`state_dict`.

    Raises:
        ValueError: If format or subset of the weights differ.
    """
    check_format(saved)
    subset_of_weights, _ = la._key
    if not is_same(saved.get("subset_of_weights"), subset_of_weights):
        raise ValueError(
            f"`state_dict` has subset_of_weights {saved.get('subset_of_weights')!r}, "
            f"this object {subset_of_weights!r}."
        )


def check_format(saved: dict[str, Any]) -> None:
    """Refuse what is no checkpoint of this format.

    Args:
        saved: From :func:`state_dict`, it should be.

    Raises:
        ValueError: If the format differs.
    """
    if not is_same(saved.get("format"), FORMAT):
        raise ValueError(
            f"`state_dict` has format {saved.get('format')}, not {FORMAT}: it is from "
            f"{saved.get('cls_name', 'something else')}, or an earlier version of this "
            "library. Fit the posterior again."
        )


def is_at_parameters(la: KronDebiasedLaplace) -> bool:
    """Whether the model has the parameters that a posterior was fitted at."""
    present = torch.cat([param.detach().reshape(-1) for param in la.fitted_params])
    return torch.equal(present, la.mean.detach().to(present))
