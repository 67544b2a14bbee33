"""Saving and loading a fitted posterior."""

from __future__ import annotations

from typing import Any

from laplace import ParametricLaplace

from laplace_debiased.curvature.streams import CURVATURES
from laplace_debiased.posterior.sampling_error import SamplingError
from laplace_debiased.rows.model_state import unchanged_on_failure

# what laplace-torch reads from a saved posterior
_STATE = {
    "H",
    "cls_name",
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
_OWN_STATE = {
    "magnitudes",
    "num_points",
    "num_updates",
    "parameters",
    "sampling_error",
    "weight",
}


class Checkpoint:
    """Saves and loads a posterior with what its stream and diagnostics need."""

    def state_dict(self) -> dict[str, Any]:
        """Return the fitted posterior.

        Returns:
            A dictionary of plain values and tensors, which ``torch.load`` reads with
            ``weights_only=True``.

        Raises:
            AttributeError: If there is no fit yet.
        """
        state_dict = ParametricLaplace.state_dict(self)
        state_dict["H"] = self.H_facs.state_dict()
        state_dict["weight"] = self._weight
        state_dict["num_points"] = self._num_points
        state_dict["num_updates"] = self._num_updates
        error = self.sampling_error
        state_dict["sampling_error"] = error and error.state_dict()
        state_dict["magnitudes"] = self.debiasing.magnitudes
        state_dict["parameters"] = self._fitted_names
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a fitted posterior.

        Args:
            state_dict: From :meth:`state_dict`.

        Raises:
            ValueError: If it is of another class, kind of magnitudes, likelihood or
                network, or lacks an entry. Then the last posterior stays.
        """
        with unchanged_on_failure(self):
            self._load(state_dict)

    def _load(self, state_dict: dict[str, Any]) -> None:
        _check_has(state_dict, _STATE)
        own = self.debiasing.magnitudes
        if state_dict.get("magnitudes", own) != own:
            raise ValueError(
                f"`state_dict` has {state_dict['magnitudes']!r} magnitudes, this "
                f"object {own!r}."
            )
        if state_dict["cls_name"] == type(self).__name__:
            _check_has(state_dict, _OWN_STATE)
            self._load_parameters(state_dict["parameters"])
        ParametricLaplace.load_state_dict(self, state_dict)
        self.H_facs = CURVATURES[own](**state_dict["H"])
        self._weight = state_dict["weight"]
        self._num_points = state_dict["num_points"]
        self._num_updates = state_dict["num_updates"]
        error = state_dict["sampling_error"]
        self.sampling_error = error and SamplingError.from_state_dict(error)
        self.H = self.H_facs.decompose(self.damping)

    def _load_parameters(self, names: list[str]) -> None:
        """Leave out what the saved posterior left out, too."""
        unknown = set(names) - set(self._fitted_names)
        if unknown:
            raise ValueError(
                f"`state_dict` is of other parameters than the model's: it has "
                f"{sorted(unknown)}, which are not fitted here."
            )
        named = dict(self.model.named_parameters())
        self._fit_only([named[name] for name in names])


def _check_has(state_dict: dict[str, Any], keys: set[str]) -> None:
    missing = keys - state_dict.keys()
    if missing:
        raise ValueError(f"`state_dict` lacks {sorted(missing)}.")
