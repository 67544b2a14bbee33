"""Whether a saved posterior is one for this network, and whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from math import inf
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from laplace_debiased.curvature.streams import CURVATURE_TYPES
from laplace_debiased.posterior.checkpoint import check_tensor, check_type
from laplace_debiased.posterior.fitting import Seen
from laplace_debiased.posterior.sampling_error import SamplingError
from laplace_debiased.predictive.calibration import Calibration
from laplace_debiased.rows.layers import Layer

if TYPE_CHECKING:
    from laplace_debiased.posterior.laplace import KronDebiasedLaplace

# what laplace-torch reads from a saved posterior, and of which types it is
UPSTREAM = {
    "enable_backprop": bool,
    "likelihood": str,
    "loss": Tensor,
    "mean": Tensor,
    "n_data": float,
    "n_outputs": int,
    "prior_mean": Tensor,
    "prior_precision": Tensor,
    "sigma_noise": Tensor,
    "temperature": float,
}
# what ours has beyond that
_OWN = {
    "approximation": str,
    "backend": str,
    "candidates": list[str],
    "class_axis": int | None,
    "damping": bool,
    "example_size": int,
    "outputs_size": int,
    "layers": list[Layer],
    "magnitudes": str,
    "parameters": list[str],
    "shapes": list[list[int]],
    "subset_of_weights": str,
}
# what is built from several entries; there may be no sampling error or calibration
_PARTS = ("calibration", "curvature", "sampling_error", "seen")
_POSITIVE = (
    "example_size",
    "outputs_size",
    "n_data",
    "n_outputs",
    "sigma_noise",
    "temperature",
)


def check(
    la: KronDebiasedLaplace, configuration: Mapping[str, Any], saved: dict[str, Any]
) -> None:
    """Refuse what is no checkpoint of a posterior like this one.

    Args:
        la: The posterior.
        configuration: What the checkpoint must have in common with it.
        saved: The checkpoint, of the right format, nested.

    Raises:
        ValueError: If an entry is missing, or of a wrong type, shape or value.
    """
    _check_there(saved)
    _check_candidates(saved["candidates"], configuration["candidates"])
    for name, own in configuration.items():
        if saved[name] != own:
            raise ValueError(
                f"`state_dict` has {name} {saved[name]!r}, this object {own!r}."
            )
    _check_parts(saved)
    _check_parameters(la, saved)
    _check_numbers(la, saved)
    _check_curvature(saved, la._dtype)
    _check_sampling_error(saved)
    _check_calibration(saved["calibration"])


def check_entries(saved: dict[str, Any]) -> None:
    """Refuse what is no whole checkpoint, whatever it is of.

    Args:
        saved: The checkpoint, of the right format, nested.

    Raises:
        ValueError: If an entry is missing, or of a wrong type or shape.
    """
    _check_there(saved)
    if saved["magnitudes"] not in CURVATURE_TYPES:
        raise ValueError(f"`state_dict` has magnitudes {saved['magnitudes']!r}.")
    _check_parts(saved)
    _check_curvature(saved, saved["loss"].dtype)
    _check_sampling_error(saved)
    numbers = {"n_data": saved["n_data"], "seen.weight": saved["seen"]["weight"]}
    for name, value in numbers.items():
        if not value > 0:
            raise ValueError(f"`state_dict` must have a positive {name}, got {value}.")


def _check_candidates(saved: Sequence[str], own: Sequence[str]) -> None:
    """Refuse parameters that require gradients in one of the networks alone."""
    for there, wanted, others in (("here", saved, own), ("there", own, saved)):
        missing = [name for name in wanted if name not in others]
        if missing:
            raise ValueError(
                f"`state_dict` has other candidates: {len(missing)} parameters, such "
                f"as {missing[0]!r}, are not in the model or need no gradients "
                f"{there}. Set `requires_grad` as it was there (with `peft`, "
                "`is_trainable=True`)."
            )


def _check_there(saved: dict[str, Any]) -> None:
    """Refuse a checkpoint that lacks entries, or has some of other types."""
    missing = {*UPSTREAM, *_OWN, *_PARTS} - saved.keys()
    if missing:
        raise ValueError(f"`state_dict` lacks {sorted(missing)}.")
    for name, kind in (UPSTREAM | _OWN).items():
        check_type(kind, saved[name], name)


def _check_parts(saved: dict[str, Any]) -> None:
    """Check the types of what is built from several entries."""
    check_type(Seen, saved["seen"], "seen")
    check_type(dict, saved["curvature"], "curvature")
    curvature = saved["curvature"] | {"layers": saved["layers"]}
    check_type(CURVATURE_TYPES[saved["magnitudes"]], curvature, "curvature")


def _check_parameters(la: KronDebiasedLaplace, saved: dict[str, Any]) -> None:
    """Check that parameters are the model's, in its order, and layers theirs."""
    names, named = saved["parameters"], dict(la.model.named_parameters())
    if not names or [name for name in saved["candidates"] if name in names] != names:
        raise ValueError(
            f"`state_dict` has parameters {names}, which are not among the candidates "
            f"{saved['candidates']}, in their order."
        )
    shapes = [list(named[name].shape) for name in names]
    if saved["shapes"] != shapes:
        raise ValueError(
            f"`state_dict` has shapes {saved['shapes']} of the parameters {names}, the "
            f"model {shapes}."
        )
    sizes: dict[int, int] = {}
    for layer in saved["layers"]:
        if not layer["layouts"]:
            raise ValueError(f"`state_dict` has layers without layouts: {layer}.")
        if layer["matrix"] is not None:
            sizes[layer["matrix"]] = layer["d_out"] * layer["d_in"]
        if layer["vector"] is not None:
            sizes[layer["vector"]] = layer["d_out"]
    if sizes != {k: named[name].numel() for k, name in enumerate(names)}:
        raise ValueError("`state_dict` has layers that are not of its parameters.")


def _check_numbers(la: KronDebiasedLaplace, saved: dict[str, Any]) -> None:
    """Check shapes and signs of what is not the curvature."""
    num_params = len(saved["parameters"])
    size = sum(torch.Size(shape).numel() for shape in saved["shapes"])
    named = dict(la.model.named_parameters())
    dtypes = [named[name].dtype for name in saved["parameters"]]
    check_tensor(saved["mean"], "mean", [size], reduce(torch.promote_types, dtypes))
    for name in ("loss", "sigma_noise"):
        check_tensor(saved[name], name, [], la._dtype)
    for name, length in (("prior_precision", num_params), ("prior_mean", size)):
        is_scalar = saved[name].numel() == 1 and saved[name].ndim < 2
        shape = saved[name].shape if is_scalar else [length]
        check_tensor(saved[name], name, shape, la._dtype)
    seen = {f"seen.{name}": value for name, value in saved["seen"].items()}
    for name, value in ({name: saved[name] for name in _POSITIVE} | seen).items():
        if not (torch.as_tensor(value) > 0).all():
            raise ValueError(f"`state_dict` must have a positive {name}, got {value}.")


def _check_curvature(saved: dict[str, Any], dtype: torch.dtype) -> None:
    """Check that each layer has its tensors, of their shapes."""
    curvature, layers = saved["curvature"], saved["layers"]
    if "folds" not in curvature:
        for name in ("directions", "spectra", "factor_eigenvalues"):
            _check_layers(curvature[name], layers, f"curvature.{name}", dtype)
        return
    folds, shares = curvature["folds"], curvature["shares"]
    if len(folds) < 2 or len(shares) != len(folds) or min(shares) <= 0:
        raise ValueError(
            f"`state_dict` has curvature of {len(folds)} folds with shares {shares}."
        )
    for k, fold in enumerate(folds):
        _check_layers(fold, layers, f"curvature.folds[{k}]", dtype)


def _check_layers(
    own: Sequence[dict[str, Any]],
    layers: Sequence[dict[str, Any]],
    name: str,
    dtype: torch.dtype,
) -> None:
    """Check the tensors of all layers: factors, eigenvalues of factors, or spectra."""
    if len(own) != len(layers):
        raise ValueError(
            f"`state_dict` has {name} of {len(own)} layers, not {len(layers)}."
        )
    for layer, tensors in zip(layers, own, strict=True):
        for key, shape in _shapes(Layer.from_state_dict(layer), name).items():
            place, tensor = f"{name} of layer {layer['name']!r} ({key})", tensors[key]
            if (tensor is None) != (shape is None):
                raise ValueError(f"`state_dict` must not have {tensor} as {place}.")
            if tensor is not None and shape is not None:
                check_tensor(tensor, place, shape, dtype)


def _shapes(layer: Layer, name: str) -> dict[str, list[int] | None]:
    """Return the shapes of what there is of a layer; None for what there is not."""
    has_matrix, has_vector = layer.matrix is not None, layer.vector is not None
    if name == "curvature.spectra":
        return {
            "matrix": [layer.d_out, layer.d_in] if has_matrix else None,
            "vector": [layer.d_out] if has_vector else None,
        }
    sides = 1 if name == "curvature.factor_eigenvalues" else 2
    return {
        "gradients": layer.gradient_shape[:sides],
        "inputs": layer.input_shape()[:sides] if has_matrix else None,
    }


def _check_sampling_error(saved: dict[str, Any]) -> None:
    """Check that the error is that of these layers."""
    error = saved["sampling_error"]
    if error is None:
        return
    # with a single point, it is infinite
    check_type(SamplingError, error, "sampling_error", bounded=False)
    names = [layer["name"] for layer in saved["layers"]]
    if error["layers"] != names:
        raise ValueError(
            f"`state_dict` has a sampling_error of layers {error['layers']}, not "
            f"{names}."
        )
    count = len(names)
    traces = error["traces"]
    check_tensor(traces, "sampling_error.traces", [count], traces.dtype)
    for part, size in (("draw", count), ("pool", count), ("loss", 1)):
        for key in ("covariance", "seen"):
            name = f"sampling_error.{part}.{key}"
            check_tensor(error[part][key], name, [size, size], torch.float64)
        fourth_powers = error[part]["fourth_powers"]
        name = f"sampling_error.{part}.fourth_powers"
        check_tensor(fourth_powers, name, [size], torch.float64)


def _check_calibration(calibration: dict[str, Any] | None) -> None:
    """Check that temperature and scale are some that can have been chosen."""
    if calibration is None:
        return
    # where the points do not tell, the temperature's error is infinite
    check_type(Calibration, calibration, "calibration", bounded=False)
    temperature, scale = calibration["temperature"], calibration["scale"]
    if not (0 < temperature < inf and 0 <= scale <= 1):
        raise ValueError(
            f"`state_dict` has a calibration of temperature {temperature} and scale "
            f"{scale}."
        )
