"""Saving and loading what an operator computed."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from laplace_debiased.curvature.debias import Debiased
from laplace_debiased.curvature.kronecker import Kronecker, Spectrum
from laplace_debiased.rows.checks import plain_text
from laplace_debiased.rows.layers import Layer

if TYPE_CHECKING:
    from laplace_debiased.curvature.operator import DebiasedKFACLinearOperator

# of saved operators; those of version 0.1 before had none, and 2 not the shapes
FORMAT = 3
_OF_LAYERS = ("directions", "magnitudes", "own")


def state_dict(operator: DebiasedKFACLinearOperator) -> dict[str, Any]:
    """Return what an operator computed, and by which settings.

    Args:
        operator: The operator.

    Returns:
        A dictionary of plain values and tensors, without the model.
    """
    computed = operator._computed()
    return {
        "format": FORMAT,
        "settings": _settings(operator),
        "shapes": _shapes(operator),
        "layers": [layer.state_dict() for layer in operator._layers],
        "directions": [own.state_dict() for own in computed.directions],
        "magnitudes": [own.state_dict() for own in computed.magnitudes],
        "own": [own.state_dict() for own in computed.own],
    }


def load(operator: DebiasedKFACLinearOperator, saved: dict[str, Any]) -> None:
    """Let an operator take over what another one computed.

    Args:
        operator: The operator.
        saved: From :func:`state_dict`.

    Raises:
        ValueError: If format, settings or shapes differ, or entries are missing.
    """
    if saved.get("format") != FORMAT:
        raise ValueError(
            f"`state_dict` has format {saved.get('format')}, this version "
            f"reads format {FORMAT}: compute the operator again."
        )
    missing = {"settings", "shapes", "layers", *_OF_LAYERS} - saved.keys()
    if missing:
        raise ValueError(f"`state_dict` lacks {sorted(missing)}.")
    settings = _settings(operator)
    if saved["settings"] != settings:
        raise ValueError(
            f"`state_dict` was computed with {saved['settings']}, this "
            f"operator has {settings}."
        )
    if saved["shapes"] != _shapes(operator):
        raise ValueError(
            f"`state_dict` is of parameters of shapes {saved['shapes']}, this operator "
            f"has {_shapes(operator)}."
        )
    layers = [Layer.from_state_dict(own) for own in saved["layers"]]
    counts = {name: len(saved[name]) for name in _OF_LAYERS}
    if set(counts.values()) != {len(layers)}:
        raise ValueError(f"`state_dict` has {counts}, but {len(layers)} layers.")
    kind = Kronecker if operator._magnitudes == "kfac" else Spectrum
    there = partial(Tensor.to, device=operator.device)
    operator._debiased = Debiased(
        [Kronecker(**own).map(there) for own in saved["directions"]],
        [kind(**own).map(there) for own in saved["magnitudes"]],
        [Kronecker(**own).map(there) for own in saved["own"]],
    )
    operator._layers, operator._product = layers, None


def _shapes(operator: DebiasedKFACLinearOperator) -> list[list[int]]:
    return [list(param.shape) for param in operator._params]


def _settings(operator: DebiasedKFACLinearOperator) -> dict[str, Any]:
    curvature = operator._output_curvature
    return {
        "loss": type(operator._loss_func).__name__,
        "reduction": operator._loss_func.reduction,
        "label_smoothing": getattr(operator._loss_func, "label_smoothing", 0.0),
        "ignore_index": getattr(operator._loss_func, "ignore_index", None),
        "magnitudes": operator._magnitudes,
        "fisher_type": plain_text(curvature.fisher_type),
        "mc_samples": curvature.mc_samples,
        "fisher_rank": curvature.fisher_rank,
        "kfac_approx": plain_text(operator._kfac_approx),
        "separate_weight_and_bias": not operator._joint,
        "seed": operator._seed,
    }
