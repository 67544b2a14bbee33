"""Predictions of a debiased Laplace approximation."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from math import pi
from typing import Any

import torch
from laplace.utils import batch_size
from laplace.utils.enums import Likelihood, LinkApprox
from torch import Tensor
from torch.func import functional_call

from laplace_debiased.predictive.moments import LinearizedPredictive
from laplace_debiased.rows.model_state import evaluating, unchanged_on_failure
from laplace_debiased.rows.sweep import at_least_single


class Prediction:
    """Predicts as laplace-torch's ``KronLaplace`` does, which is to follow as a base.

    Without Jacobians, without writing into the model, which runs in eval mode whatever
    its own, and with ``generator`` honoured. What is returned has the model's dtype;
    moments of models in half precision are single on the way.
    """

    def __call__(
        self, *args: Any, generator: torch.Generator | None = None, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict as laplace-torch does, where sampling ignores ``generator``.

        Args:
            *args: Arguments of ``KronLaplace.__call__``.
            generator: Random numbers for sampling.
            **kwargs: Further keywords of ``KronLaplace.__call__``.

        Returns:
            As ``KronLaplace.__call__``.
        """
        self._generator = generator
        try:
            prediction = super().__call__(*args, generator=generator, **kwargs)
        finally:
            self._generator = None
        if isinstance(prediction, Tensor):
            return prediction.to(self.mean.dtype)
        f_mu, f_var = prediction
        return f_mu.to(self.mean.dtype), f_var.to(self.mean.dtype)

    def sample(
        self, n_samples: int = 100, generator: torch.Generator | None = None
    ) -> Tensor:
        """Sample from the posterior.

        Args:
            n_samples: Number of samples.
            generator: Random numbers.

        Returns:
            Samples ``[n_samples, params]``.
        """
        samples = super().sample(n_samples, generator or self._generator)
        return samples.to(self.mean.dtype)

    def _glm_functional_samples(
        self,
        f_mu: Tensor,
        f_var: Tensor,
        n_samples: int,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        samples = super()._glm_functional_samples(
            f_mu, f_var, n_samples, diagonal_output, generator or self._generator
        )
        return samples.to(self.mean.dtype)

    def _glm_predictive_distribution(
        self,
        X: Tensor | MutableMapping[str, Any],
        joint: bool = False,
        diagonal_output: bool = False,
    ) -> tuple[Tensor, Tensor]:
        X = X.to(self._device) if isinstance(X, Tensor) else X
        kind = "joint" if joint else "diagonal" if diagonal_output else "full"
        with evaluating(self.model):
            f_mu, f_var = self._output_moments(X, kind)
        f_mu = at_least_single(f_mu)
        return (f_mu.flatten() if joint else f_mu), f_var

    def _output_moments(
        self, X: Tensor | MutableMapping[str, Any], kind: str
    ) -> tuple[Tensor, Tensor]:
        """Compute mean and covariance of the linearized network's output."""
        predictive = LinearizedPredictive(
            self.model,
            self._fitted_params,
            self.posterior_precision,
            self.memory_limit,
            self.enable_backprop,
        )
        return predictive.moments(X, batch_size(X, self.dict_key_x), kind)

    def _glm_forward_call(
        self,
        x: Tensor | MutableMapping[str, Any],
        likelihood: Likelihood | str,
        joint: bool = False,
        link_approx: LinkApprox | str = LinkApprox.PROBIT,
        n_samples: int = 100,
        diagonal_output: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        # laplace-torch computes the covariance of all outputs here, too
        if likelihood == Likelihood.REGRESSION:
            if diagonal_output and not joint:
                return self._glm_predictive_distribution(x, diagonal_output=True)
        elif link_approx == LinkApprox.PROBIT:
            f_mu, f_var = self._glm_predictive_distribution(x, diagonal_output=True)
            return torch.softmax(f_mu / torch.sqrt(1 + pi / 8 * f_var), dim=-1)
        return super()._glm_forward_call(
            x, likelihood, joint, link_approx, n_samples, diagonal_output
        )

    def _sampled_outputs(
        self,
        X: Tensor | MutableMapping[str, Any],
        n_samples: int,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> Iterator[Tensor]:
        """Yield the network's output for each posterior sample.

        laplace-torch writes the samples into the model; here it is called functionally.
        """
        X = X.to(self._device) if isinstance(X, Tensor) else X
        fitted = dict(zip(self._fitted_names, self._fitted_params, strict=True))
        for sample in self.sample(n_samples, generator):
            parts = sample.split([param.numel() for param in fitted.values()])
            params = {
                name: part.view(param.shape).to(param.dtype)
                for (name, param), part in zip(fitted.items(), parts, strict=True)
            }
            output = functional_call(self.model, params, (X,), model_kwargs)
            yield output if self.enable_backprop else output.detach()

    def _nn_functional_samples(self, *args: Any, **kwargs: Any) -> Tensor:
        with evaluating(self.model):
            return torch.stack(list(self._sampled_outputs(*args, **kwargs)))

    def _nn_predictive_samples(self, *args: Any, **kwargs: Any) -> Tensor:
        samples = self._nn_functional_samples(*args, **kwargs)
        if self.likelihood == Likelihood.CLASSIFICATION:
            return samples.softmax(-1)
        return samples

    def _nn_predictive_classification(
        self, X: Tensor | MutableMapping[str, Any], n_samples: int, **kwargs: Any
    ) -> Tensor:
        with evaluating(self.model):
            outputs = self._sampled_outputs(X, n_samples, **kwargs)
            return sum(output.softmax(-1) for output in outputs) / n_samples

    def optimize_prior_precision(self, *args: Any, **kwargs: Any) -> None:
        """Tune the prior precision as laplace-torch does, and keep the model's mode.

        If anything fails, the prior precision stays as it was.

        Args:
            *args: Arguments of ``KronLaplace.optimize_prior_precision``.
            **kwargs: Its keywords.
        """
        with evaluating(self.model), unchanged_on_failure(self):
            super().optimize_prior_precision(*args, **kwargs)
