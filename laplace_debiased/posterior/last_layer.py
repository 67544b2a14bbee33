"""Laplace approximation with debiased curvature over the last layer alone."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from laplace import KronLLLaplace
from laplace.curvature import CurvatureInterface
from laplace.utils.enums import Likelihood
from laplace.utils.feature_extractor import FeatureExtractor, FeatureReduction
from torch import Tensor, nn
from torch.utils.data import DataLoader

from laplace_debiased.curvature.eigenbasis import EigenbasisMatrix
from laplace_debiased.posterior import predicting, state
from laplace_debiased.posterior.checkpoint import is_same
from laplace_debiased.posterior.laplace import KronDebiasedLaplace
from laplace_debiased.posterior.likelihoods import kind_of
from laplace_debiased.posterior.network_copy import following
from laplace_debiased.posterior.settings import DECOMPOSITION_TOLERANCE, Settings
from laplace_debiased.posterior.upstream import PicklableExtractor
from laplace_debiased.predictive.forward_mode import (
    MANY_OUTPUTS,
    NUM_SAMPLES,
    sampled_change,
)
from laplace_debiased.predictive.last_layer import (
    features_of,
    last_layer_covariance,
    last_layer_outputs,
    last_layer_variances,
)
from laplace_debiased.rows.batches import select_rows
from laplace_debiased.rows.inputs import Inputs
from laplace_debiased.rows.sharing import thread_restored
from laplace_debiased.sampling.processes import own_module


class KronDebiasedLLLaplace(KronDebiasedLaplace, KronLLLaplace):
    """Laplace approximation with debiased K-FAC over the last layer.

    Has the interface of laplace-torch's ``KronLLLaplace``, its keywords, and those of
    :class:`~laplace_debiased.posterior.laplace.KronDebiasedLaplace`, which says what
    differs. As in laplace-torch, ``override=False`` is refused.

    Args:
        model: The trained network, which is copied; the copy gets its present values
            with each fit.
        likelihood: ``"classification"``, ``"binary_classification"``, ``"regression"``
            or ``"reward_modeling"``.
        sigma_noise: As in ``KronLLLaplace``, like all that follow until ``magnitudes``.
        prior_precision: A scalar, or one for each parameter tensor.
        prior_mean: Mean of the prior.
        temperature: Temperature of the likelihood.
        enable_backprop: Whether gradients flow through predictions to the inputs.
        feature_reduction: Not needed: predictions follow the network itself.
        dict_key_x: Key of the inputs in mappings.
        dict_key_y: Key of the targets in mappings.
        backend: A curvature backend of laplace-torch; None for ``CurvlinopsGGN``.
        last_layer_name: Name of the last layer; None to find it.
        damping: Whether to spread the prior precision over the Kronecker factors.
        backend_kwargs: Keywords of the backend.
        asdl_fisher_kwargs: Refused, as in ``KronLLLaplace``.
        magnitudes: As in ``KronDebiasedLaplace``, like all that follow.
        budget: Number of training points that get backward passes.
        estimator: ``"cross_fit"`` or ``"two_batch"``.
        num_folds: Number of folds of ``"cross_fit"``.
        direction_fraction: Share of the points that give directions.
        sampling: ``"curvature"`` or ``"uniform"``.
        pool_size: Number of points in the pool.
        sampling_floor: Share of the uniform distribution in curvature sampling.
        fisher_rank: Number of columns of the output curvature that are kept.
        seed: Makes draw and assignment reproducible.
        memory_limit: Bytes that a GLM prediction may take for a chunk of examples,
            where the last layer is not linear at its output: the closed form takes all
            at once. None for 1 GiB, or a quarter of a GPU's memory.
        fit_memory_limit: As in
            :class:`~laplace_debiased.posterior.laplace.KronDebiasedLaplace`.
        strict: Whether to refuse parameters whose uses are not supported.
        decomposition_tolerance: How far large factors may be from what is decomposed.
        forward_samples: Number of samples that estimate moments of outputs, where the
            last layer is not linear at its output; ``"auto"`` or None.
        class_axis: Axis of the classes, if outputs have positions.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If an argument is out of range or does not fit the others.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from laplace_debiased import KronDebiasedLLLaplace
        >>> _ = torch.manual_seed(0)
        >>> X = torch.randn(200, 2)
        >>> train = DataLoader(TensorDataset(X, (X[:, 0] > 0).long()), batch_size=50)
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
        ... )
        >>> la = KronDebiasedLLLaplace(model, "classification")
        >>> la.fit(train)
        >>> la.optimize_prior_precision()
        >>> la(X[:3]).shape  # probabilities
        torch.Size([3, 2])
        >>> la.sample(5).shape  # of the parameters of the last layer
        torch.Size([5, 18])
    """

    _key = ("last_layer", "kron_debiased")
    _samples_variances = False  # a closed form

    mean: Tensor
    model: FeatureExtractor
    _original: weakref.ref[nn.Module] | None

    @thread_restored  # in inference mode, the copy would have parameters for it alone
    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | str,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        feature_reduction: FeatureReduction | str | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type[CurvatureInterface] | None = None,
        last_layer_name: str | None = None,
        damping: bool = False,
        backend_kwargs: dict[str, Any] | None = None,
        asdl_fisher_kwargs: dict[str, Any] | None = None,
        *,
        magnitudes: str = "kfac",
        budget: int | None = None,
        estimator: str = "cross_fit",
        num_folds: int = 2,
        direction_fraction: float | str = 0.5,
        sampling: str | None = None,
        pool_size: int | None = None,
        sampling_floor: float = 0.1,
        fisher_rank: int | None = None,
        seed: int = 0,
        memory_limit: int | None = None,
        fit_memory_limit: int | None = None,
        strict: bool = False,
        decomposition_tolerance: float = DECOMPOSITION_TOLERANCE,
        forward_samples: int | str | None = predicting.AUTO,
        class_axis: int | None = None,
    ):
        ours = (memory_limit, fit_memory_limit), strict, forward_samples, class_axis
        self._configure(
            Settings(
                magnitudes=magnitudes,
                budget=budget,
                estimator=estimator,
                num_folds=num_folds,
                direction_fraction=direction_fraction,
                sampling=sampling,
                pool_size=pool_size,
                sampling_floor=sampling_floor,
                fisher_rank=fisher_rank,
                seed=seed,
                decomposition_tolerance=decomposition_tolerance,
            ),
            *ours,
        )
        network = own_module(model), kind_of(likelihood).known
        prior = sigma_noise, prior_precision, prior_mean, temperature, enable_backprop
        data = feature_reduction, dict_key_x, dict_key_y, backend, last_layer_name
        given = (*network, *prior, *data, damping, backend_kwargs, asdl_fisher_kwargs)
        KronLLLaplace.__init__(self, *given)
        self.model = PicklableExtractor(self.model, dict_key_y)
        self._original = weakref.ref(network[0])
        self._check_settings(likelihood, damping)

    @property
    def fitted_params(self) -> list[Tensor]:
        """The parameters of the last layer."""
        if self._selection is not None:
            return self.params
        return list(self._last_layer.parameters())

    @property
    def _network(self) -> nn.Module:
        """A copy of the user's network."""
        return self.model.model

    @property
    def _last_layer(self) -> nn.Module:
        """The last layer, in laplace-torch's copy of the network."""
        layer = self.model.last_layer
        if layer is None:
            raise AttributeError("The last layer is not known before the first fit.")
        return layer

    @thread_restored
    def fit(
        self,
        train_loader: DataLoader,
        override: bool = True,
        progress_bar: bool = False,
        *,
        magnitude_loader: DataLoader | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> None:
        """See :meth:`KronDebiasedLaplace.fit`; ``override=False`` is refused."""
        if override is False:
            raise ValueError(
                "Last-layer Laplace approximations do not support `override=False`."
            )
        with self._following_original():
            super().fit(
                train_loader,
                override,
                progress_bar,
                magnitude_loader=magnitude_loader,
                checkpoint=checkpoint,
            )

    def _following_original(self) -> AbstractContextManager[None]:
        """Let the copy have the values that the user's network has by now."""
        original = None if self._original is None else self._original()
        return following(self._network, original)

    def partial_fit(
        self,
        batch: Any,
        magnitude_batch: Any = None,
        decay: float = 1.0,
        num_data: int | None = None,
    ) -> None:
        """Refused, since laplace-torch's last-layer posteriors do not accumulate.

        Args:
            batch: Not used.
            magnitude_batch: Not used.
            decay: Not used.
            num_data: Not used.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "Last-layer Laplace approximations do not support `partial_fit`."
        )

    def _find_candidates(self, X: Inputs, batch_size: int) -> list[Tensor]:
        if self.model.last_layer is None:
            with torch.no_grad():
                self.model.find_last_layer(select_rows(X, torch.arange(1), batch_size))
        self._free_last_layer()
        return self._candidates

    def _free_last_layer(self) -> None:
        """Give the last layer, in laplace-torch's copy, parameters of its own.

        The features are fixed, also where they share the last layer's weight.
        """
        layer = self._last_layer
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
        self._candidates = list(layer.parameters())

    def _output_moments(self, X: Inputs, kind: str) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(self._keeps_graphs):
            f_mu, features = features_of(self.model, self.fitted_params, X)
            if features is None:
                return super()._output_moments(X, kind)
            return f_mu, last_layer_covariance(features, self.posterior_precision, kind)

    def _output_variances(
        self, X: Inputs, curvature: EigenbasisMatrix, prior_precisions: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(self._keeps_graphs):
            f_mu, features = features_of(self.model, self.fitted_params, X)
            if features is None:
                return super()._output_variances(X, curvature, prior_precisions)
            return f_mu, last_layer_variances(features, curvature, prior_precisions)

    def _output_changes(self, X: Inputs) -> Iterator[tuple[Tensor, Tensor]] | None:
        if self.n_outputs <= MANY_OUTPUTS:
            return None
        params = self.fitted_params
        f_mu, features = features_of(self.model, params, X)
        if features is None:
            return super()._output_changes(X)
        samples = (
            sampled_change(
                self.posterior_precision, params, k, NUM_SAMPLES, self.settings.seed
            )
            for k in range(NUM_SAMPLES)
        )
        flat = (torch.cat([own.flatten() for own in change]) for change in samples)
        return (
            (f_mu, last_layer_outputs(features, params, own[None])[0]) for own in flat
        )

    def _sampled_outputs(
        self,
        X: Inputs,
        n_samples: int,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> Iterator[Tensor]:
        params = self.fitted_params
        X = self._inputs(X)
        with torch.set_grad_enabled(self._keeps_graphs):
            _, features = features_of(self.model, params, X, **model_kwargs)
        if features is None:
            yield from super()._sampled_outputs(X, n_samples, generator, **model_kwargs)
            return
        samples = self._calibrated_sample(n_samples, generator)
        yield from last_layer_outputs(features, params, samples)

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`KronDebiasedLaplace.state_dict`."""
        return super().state_dict() | {
            "last_layer_name": self._last_layer_name,
            "found_last_layer": self.model._last_layer_name,
        }

    @thread_restored
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See :meth:`KronDebiasedLaplace.load_state_dict`."""
        with self._following_original():
            super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """See :meth:`KronDebiasedLaplace`; copies follow no network."""
        return super().__getstate__() | {"_original": None}

    def _load(self, state_dict: dict[str, Any]) -> None:
        state.check_origin(self, state_dict)
        name = state_dict.get("last_layer_name")
        if not is_same(name, self._last_layer_name):
            raise ValueError(
                f"`state_dict` has last_layer_name {name!r}, this object "
                f"{self._last_layer_name!r}."
            )
        found = str(state_dict.get("found_last_layer"))
        if self.model.last_layer is None:
            # laplace-torch saves a training batch instead, and searches again
            if found not in dict(self.model.model.named_modules()):
                raise ValueError(
                    f"`state_dict` has found_last_layer {found!r}, which the model has "
                    "not."
                )
            self.model.set_last_layer(found)
        elif found != self.model._last_layer_name:
            raise ValueError(
                f"`state_dict` has found_last_layer {found!r}, this object "
                f"{self.model._last_layer_name!r}."
            )
        self._free_last_layer()
        state.load(self, state_dict)
