"""What differs if the posterior is over the last layer alone."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from laplace.utils import select_rows
from torch import Tensor, nn
from torch.nn.functional import linear

from laplace_debiased.predictive.moments import last_layer_covariance
from laplace_debiased.rows.model_state import measuring
from laplace_debiased.rows.selection import LeftOut
from laplace_debiased.rows.sweep import Inputs


class LastLayer:
    """Fits and predicts with the last layer, whose inputs are features."""

    _accumulates = False

    def _find_left_out(self, model: nn.Module) -> list[LeftOut]:
        return []

    @property
    def _fitted_params(self) -> list[Tensor]:
        return list(self.model.last_layer.parameters())

    def _find_parameters(self, X: Inputs, batch_size: int) -> None:
        if self.model.last_layer is None:
            with measuring(self.model), torch.no_grad():
                self.model.find_last_layer(select_rows(X, torch.arange(1), batch_size))
        self._free_last_layer()

    def _free_last_layer(self) -> None:
        """Give the last layer, in laplace-torch's copy, parameters of its own.

        The features are fixed, also where they share the last layer's weight.
        """
        layer = self.model.last_layer
        others = {
            id(param)
            for module in self.model.modules()
            if module is not layer
            for param in module.parameters(recurse=False)
        }
        for key, param in list(layer.named_parameters()):
            if id(param) in others:
                own = nn.Parameter(param.detach().clone(), param.requires_grad)
                setattr(layer, key, own)
        if self.n_params is None:
            self._count_params()

    def _forward_with_features(
        self, X: Inputs, **model_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Run the network, and return its last layer's inputs, too.

        In a copied network, the hook of laplace-torch fills the original's features.
        """
        extractor = self.model
        hook = extractor._get_hook(extractor._last_layer_name)
        handle = extractor.last_layer.register_forward_hook(hook)
        try:
            return extractor.forward_with_features(X, **model_kwargs)
        finally:
            handle.remove()

    def _output_moments(
        self, X: Tensor | MutableMapping[str, Any], kind: str
    ) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(self.enable_backprop):
            f_mu, features = self._forward_with_features(X)
        if not self._is_output(f_mu, features):
            return super()._output_moments(X, kind)
        return f_mu, last_layer_covariance(features, self.posterior_precision, kind)

    def _sampled_outputs(
        self,
        X: Tensor | MutableMapping[str, Any],
        n_samples: int,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> Iterator[Tensor]:
        X = X.to(self._device) if isinstance(X, Tensor) else X
        f_mu, features = self._forward_with_features(X, **model_kwargs)
        if not self._is_output(f_mu, features):
            yield from super()._sampled_outputs(X, n_samples, generator, **model_kwargs)
            return
        layer = self.model.last_layer
        samples = self.sample(n_samples, generator)
        weights = samples[:, : layer.weight.numel()].unflatten(1, layer.weight.shape)
        outputs = features @ weights.mT  # one matrix product for all samples
        if layer.bias is not None:
            outputs = outputs + samples[:, layer.weight.numel() :].unsqueeze(1)
        yield from outputs if self.enable_backprop else outputs.detach()

    @torch.no_grad()
    def _is_output(self, f_mu: Tensor, features: Tensor) -> bool:
        """Tell if the network's output is that of the last layer, and no more."""
        layer = self.model.last_layer
        if features.ndim != 2 or f_mu.shape != (len(features), layer.out_features):
            return False
        if not len(features):
            return True
        tolerance = torch.finfo(f_mu.dtype).eps ** 0.5
        difference = f_mu - linear(features, layer.weight, layer.bias)
        return bool(difference.abs().max() <= tolerance * f_mu.abs().max())

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`KronDebiasedLaplace.state_dict`."""
        state_dict = super().state_dict()
        state_dict["_last_layer_name"] = self._last_layer_name
        state_dict["found_last_layer"] = self.model._last_layer_name
        return state_dict

    def _load(self, state_dict: dict[str, Any]) -> None:
        name = state_dict.get("_last_layer_name")
        if self._last_layer_name != name:
            raise ValueError(
                f"`state_dict` has last_layer_name {name!r}, this object "
                f"{self._last_layer_name!r}."
            )
        if self.model.last_layer is None and "found_last_layer" in state_dict:
            # laplace-torch saves a training batch instead, and searches again
            self.model.set_last_layer(state_dict["found_last_layer"])
        if self.model.last_layer is not None:
            self._free_last_layer()
        super()._load(state_dict)
