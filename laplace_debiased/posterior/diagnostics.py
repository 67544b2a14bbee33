"""What a fitted posterior tells about its own errors."""

from __future__ import annotations

from math import inf
from warnings import warn

from torch import Tensor
from torch.utils.data import DataLoader

from laplace_debiased.curvature.streams import KFACCurvature
from laplace_debiased.posterior.sampling_error import SamplingError
from laplace_debiased.quadratics.bias import BiasReport, kfac_bias
from laplace_debiased.rows.model_state import measuring


class Diagnostics:
    """Standard errors and bias of a posterior's curvature."""

    def _warn_of_small_budget(self, explicit: bool) -> None:
        if explicit or self.debiasing.budget is None or self.sampling_error is None:
            return
        message = self.sampling_error.warning(round(self._num_points))
        if message:
            warn(message, stacklevel=3)

    @property
    def curvature_standard_errors(self) -> dict[str, float]:
        """Relative standard error of the curvature's scale in each layer.

        Of the trace of each layer's curvature, over draws of the points; NaN for a
        layer without curvature.

        Raises:
            AttributeError: If there is no fit yet.
            ValueError: If the backend does not tell what each point contributes.
        """
        return self._known_sampling_error().relative_errors()

    def log_marginal_likelihood_standard_error(self) -> Tensor:
        r"""Estimate the standard error of the log marginal likelihood.

        A relative error e of a layer's scale changes it by :math:`\gamma e / 2`, with
        the layer's effective number of parameters :math:`\gamma = \sum \lambda /
        (\lambda + \delta)` (MacKay, 1992). The loss is taken as independent.

        Returns:
            A scalar, at the present prior precision.

        Raises:
            AttributeError: If there is no fit yet.
            ValueError: If the backend does not tell what each point contributes.
        """
        error = self._known_sampling_error()
        precisions = self.posterior_precision
        gamma = error.traces.new_zeros(len(error.layers))
        for block, values, delta in zip(
            self._blocks(), precisions.spectra(), precisions.deltas, strict=True
        ):
            gamma[error.layers.index(block.layer.name)] += (1 - delta / values).sum()
        # without curvature, a layer has no part in the variance
        relative = error.relative_covariance().nan_to_num(0.0, posinf=inf)
        # scaled to fewer points than were seen, the covariance may be indefinite
        variance = (gamma @ relative @ gamma / 4).clamp(min=0)
        return (variance + self._H_factor**2 * error.loss_variance).sqrt()

    def bias_report(
        self,
        train_loader: DataLoader | None = None,
        magnitude_loader: DataLoader | None = None,
        num_directions: int = 100,
    ) -> BiasReport:
        """Tell how biased the curvature would be without debiasing.

        The K-FAC of some folds is measured along its own eigenvectors, and so is that
        of the held-out fold. There are no intervals
        (:func:`~laplace_debiased.quadratics.bias.kfac_bias`).

        Args:
            train_loader: What the posterior was fitted to: with ``ggn`` magnitudes, the
                folds' K-FAC is computed again. Not needed with ``kfac``.
            magnitude_loader: As in :meth:`fit`.
            num_directions: Number of directions with the largest curvature.

        Returns:
            The report.

        Raises:
            AttributeError: If there is no fit yet.
            ValueError: If ``train_loader`` is needed, but not given.
        """
        self._check_H_init()
        curvature, num_points = self.H_facs, self._num_points
        if train_loader is not None:
            seed = self.debiasing.seed
            folds = self._folds(train_loader, magnitude_loader, seed)
            with measuring(self.model):
                estimator = self._estimator(folds, seed)
                curvature = estimator.kfac().curvature
            num_points = self._num_used(folds)
        elif not isinstance(curvature, KFACCurvature):
            raise ValueError(
                "`train_loader` is needed with `magnitudes='ggn'`: the eigenbasis "
                "alone does not tell its bias."
            )
        return kfac_bias(curvature, num_points, num_directions)

    def _known_sampling_error(self) -> SamplingError:
        self._check_H_init()
        if self.sampling_error is None:
            raise ValueError(
                f"{self._backend_cls.__name__} does not tell what each point "
                "contributes: use `CurvlinopsGGN`."
            )
        return self.sampling_error
