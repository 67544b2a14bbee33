r"""Laplace approximations with debiased Kronecker-factored curvature.

The posterior precision is :math:`U \mathrm{diag}(\lambda) U^\top + \delta I`, with
eigenvectors from some of the training points and eigenvalues measured on others
(arXiv 2410.14325). Importing this module registers the structures with laplace-torch:
``Laplace(model, likelihood, hessian_structure="kron_debiased")``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar, copy_context
from copy import copy
from math import pi
from pathlib import Path
from typing import Any, cast

import torch
from laplace import KronLaplace
from laplace.curvature import CurvatureInterface
from laplace.utils import Kron
from laplace.utils.enums import (
    Likelihood,
    LinkApprox,
    PredType,
    PriorStructure,
    TuningMethod,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from laplace_debiased.curvature.eigenbasis import EigenbasisMatrix
from laplace_debiased.curvature.streams import Curvature
from laplace_debiased.posterior import (
    calibrating,
    checkpoint,
    conformal,
    diagnostics,
    evaluation,
    fitting,
    grid_search,
    memory,
    predicting,
    state,
    tuning,
    uncertainties,
)
from laplace_debiased.posterior.evidence import log_det_ratio
from laplace_debiased.posterior.identity import check_not_replaced
from laplace_debiased.posterior.likelihoods import (
    BINARY,
    Kind,
    backend_of_labels,
    check_knows_labels,
    check_link,
    kind_of,
)
from laplace_debiased.posterior.measuring import Estimate
from laplace_debiased.posterior.memory import FitMemory
from laplace_debiased.posterior.sampling_error import SamplingError
from laplace_debiased.posterior.settings import DECOMPOSITION_TOLERANCE, Settings
from laplace_debiased.posterior.upstream import without_link_reminder
from laplace_debiased.predictive.blocks import Covariance
from laplace_debiased.predictive.calibration import TOLERANCE, Calibration
from laplace_debiased.predictive.forward_mode import SampledPredictive
from laplace_debiased.predictive.report import PredictionReport
from laplace_debiased.predictive.samples import sampled_outputs
from laplace_debiased.predictive.uncertainty import Uncertainty
from laplace_debiased.quadratics.bias import BiasReport
from laplace_debiased.rows.arguments import without_targets
from laplace_debiased.rows.checks import check_between, check_integer, check_positive
from laplace_debiased.rows.inputs import (
    Inputs,
    all_finite,
    at_least_single,
    check_finite_predictions,
    num_examples,
    on_device,
    warn_of_autocast,
)
from laplace_debiased.rows.model_state import evaluating, unchanged_on_failure
from laplace_debiased.rows.positions import set_class_axis
from laplace_debiased.rows.selection import Selection
from laplace_debiased.rows.sharing import thread_restored
from laplace_debiased.rows.substitution import run
from laplace_debiased.rows.user_warnings import warn_user
from laplace_debiased.sampling.loaders import loader_of_batch
from laplace_debiased.sampling.processes import own_module, present_group

_GENERATOR: ContextVar[torch.Generator | None] = ContextVar("generator", default=None)
FORGOTTEN = (
    "The calibration was for the posterior before, of other data, prior precision or "
    "temperature, and is forgotten: call `calibrate` again."
)


class KronDebiasedLaplace(KronLaplace):
    """Laplace approximation with debiased K-FAC over all weights.

    Has the interface of laplace-torch's ``KronLaplace`` and its keywords. Parameters
    whose uses are not supported stay at their trained values, and a warning lists them
    when the posterior is fitted; other backends than curvlinops' refuse some of them.

    What differs: GLM predictions need no Jacobians, predictions do not write into the
    model, which runs in eval mode whatever its own, and ``generator`` is honoured
    everywhere. The posterior of a model in half precision is in single: ``H``, the
    precision and ``log_marginal_likelihood()`` are float32 where laplace-torch's are
    float16, in which sums over all data overflow; samples and predictions have the
    model's dtype.

    Args:
        model: The trained network.
        likelihood: ``"classification"`` (of logits: a softmax at the network's end is
            warned of), ``"regression"``, ``"reward_modeling"``, or
            ``"binary_classification"``, which laplace-torch has not: of labels that are
            0 or 1, or probabilities between them, by one logit each, as
            ``BCEWithLogitsLoss`` takes them. Outputs and labels are ``[batch,
            labels]``; those of one label may be ``[batch]``, and predictions are then
            ``[batch, 1]``. So may those of a regression with one output.
        sigma_noise: Standard deviation of a regression's noise, as in ``KronLaplace``,
            like all that follow until ``magnitudes``. It is one unless it is given or
            tuned (:meth:`optimize_prior_precision`).
        prior_precision: A scalar, or one for each parameter tensor; to be tuned by
            :meth:`calibrate` or :meth:`optimize_prior_precision`. A fit drops those of
            parameters that it leaves out.
        prior_mean: Mean of the prior. A number is that of all parameters but those of
            normalizing layers and other scales of activations, such as layer scales,
            which have their trained values; a vector that of each, such as a fine-tuned
            network's pretrained ones. A fit drops those of parameters that it leaves
            out.
        temperature: Temperature of the likelihood.
        enable_backprop: Whether gradients flow through predictions to the inputs.
        dict_key_x: Key of the inputs in mappings, whose rows are counted; not needed if
            all their tensors have a row for each example.
        dict_key_y: Key of the targets in mappings. A network that takes the other
            entries by keywords does not get them.
        backend: A curvature backend of laplace-torch; None for ``CurvlinopsGGN``.
        damping: Whether to spread the prior precision over the Kronecker factors.
        backend_kwargs: Keywords of the backend.
        asdl_fisher_kwargs: Options of the backend's Kronecker factors; with curvlinops
            ``mc_samples`` and ``kfac_approx``.
        magnitudes: Which directional curvature replaces the eigenvalues: ``"kfac"``
            (that of the other points' K-FAC, the paper's) or ``"ggn"`` (that of each
            layer's exact GGN block; needs a curvlinops backend).
        budget: Number of training points that get backward passes; None for all that
            the loader yields.
        estimator: ``"cross_fit"`` (each point gives directions and magnitudes, but none
            magnitudes along its own directions) or ``"two_batch"`` (some points give
            directions, the others magnitudes: the paper's).
        num_folds: Number of folds of ``"cross_fit"``.
        direction_fraction: Share of the points that give directions with
            ``"two_batch"``; ``"auto"`` for the best share by theory for Gaussian data,
            to which a forward pass over ``budget`` points gives the effective rank of
            the output curvature (:mod:`laplace_debiased.sampling.shares`).
        sampling: How the budget is drawn: ``"curvature"`` (from a pool of points, with
            probabilities that grow with the curvature of the loss in the network's
            output, which takes forward passes; the pool also gives input covariances
            and the loss) or ``"uniform"``. None for ``"curvature"`` with the curvlinops
            backends, the only ones that support it. In regression, all points of the
            pool are equally probable with ``CurvlinopsGGN``.
        pool_size: Number of points in the pool; None for 32 times the budget, or with
            ``fisher_rank`` 8 times.
        sampling_floor: Share of the uniform distribution in the probabilities by which
            curvature sampling draws, in (0, 1]: it bounds the weights.
        fisher_rank: Number of columns of the output curvature's square root that are
            kept for each point, the largest ones; one more column, the sum of the
            others by random signs, stands for them without bias. A point then takes
            ``fisher_rank + 1`` backward passes, and more points can have some: with
            ten classes, 512 points of rank 1 cost what 128 do. None for all, one less
            than classes; needs ``CurvlinopsGGN``, not ``stochastic``.
        seed: Makes draw and assignment of the points reproducible.
        memory_limit: Bytes that a GLM prediction may take for a chunk of examples, and
            rows that a fit with ``ggn`` magnitudes keeps; may be changed at any time.
            None for 1 GiB, or a quarter of a GPU's memory.
        fit_memory_limit: Bytes that a fit may take in each process, beside network,
            data and a pass over a batch; it needs a curvlinops backend. Where factors
            of all layers are more, some layers are measured after the others, each by
            passes of their own over the same points, with the same posterior. A fit
            that is larger even so is refused before it begins. None for one turn;
            :meth:`fit_memory` tells what a fit takes. May be changed at any time.
        strict: Whether to refuse parameters whose uses are not supported.
        decomposition_tolerance: How far a factor of 2,048 or more rows may be, as a
            share of its norm, from what is decomposed: its leading directions, with the
            mean of the eigenvalues along all others, so that its trace is exact
            (:attr:`decomposition_error` says what that changes). Zero to decompose
            all factors in full.
        forward_samples: Number of samples of the parameters that estimate the moments
            of outputs, by a pass in forward mode each, without backward passes; None
            for exact moments, by a backward pass for each output. ``"auto"`` for 64
            samples where there are more than 256 outputs. A variance's relative
            standard error is the root of two over their number
            (:mod:`~laplace_debiased.predictive.forward_mode`). May be changed at any
            time.
        class_axis: Axis of the network's output that has the classes, if it has
            positions, such as tokens or pixels: -1 for ``[batch, positions, classes]``,
            1 for ``[batch, classes, height, width]``. Targets are then of shape
            ``[batch, positions]`` or ``[batch, height, width]``; the loss is the sum
            over positions but for those with ``ignore_index``, and predictions are of
            each position (:mod:`~laplace_debiased.rows.positions`).

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If an argument is out of range or does not fit the others.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from laplace_debiased import KronDebiasedLaplace
        >>> _ = torch.manual_seed(0)
        >>> X = torch.randn(200, 2)
        >>> train = DataLoader(TensorDataset(X, (X[:, 0] > 0).long()), batch_size=50)
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
        ... )
        >>> la = KronDebiasedLaplace(model, "classification", budget=100)
        >>> la.fit(train)
        >>> la.prior_precision = 2.0
        >>> la(X[:3]).shape  # probabilities
        torch.Size([3, 2])
        >>> la.sample(5).shape  # of all parameters
        torch.Size([5, 42])
        >>> list(la.curvature_standard_errors)  # of each layer
        ['0', '2']
    """

    _key = ("all", "kron_debiased")
    # whether variances are those of the samples, where outputs are sampled
    _samples_variances = True

    # laplace-torch declares that a mean may be a number, and that points are counted,
    # while here they have weights
    mean: Tensor
    n_data: float  # type: ignore[assignment]

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | str,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type[CurvatureInterface] | None = None,
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
            (memory_limit, fit_memory_limit),
            strict,
            forward_samples,
            class_axis,
        )
        prior = (sigma_noise, prior_precision, prior_mean, temperature)
        batches = (enable_backprop, dict_key_x, dict_key_y)
        curvature = (backend, damping, backend_kwargs, asdl_fisher_kwargs)
        known = kind_of(likelihood).known
        given = (own_module(model), known, *prior, *batches, *curvature)
        super().__init__(*given)
        self._check_settings(likelihood, damping)

    def _configure(
        self,
        settings: Settings,
        limits: tuple[int | None, int | None],
        strict: bool,
        forward_samples: int | str | None,
        class_axis: int | None,
    ) -> None:
        """Take over what laplace-torch does not know of, before anything is built."""
        self.memory_limit, self.fit_memory_limit = limits
        if self.memory_limit is not None:
            check_integer("memory_limit", self.memory_limit, 1)
        if class_axis is not None:
            check_integer("class_axis", class_axis)
        predicting.check_forward_samples(forward_samples)
        self.forward_samples, self.class_axis = forward_samples, class_axis
        self.settings, self.strict = settings, strict
        self._estimate: Estimate | None = None
        self._selection: Selection | None = None
        self._seen = fitting.Seen()
        self._calibration: Calibration | None = None
        self._is_tuned = self._is_warned = self._is_sampling_known = False

    def _check_settings(self, likelihood: Likelihood | str, damping: bool) -> None:
        """Refuse settings that do not go with laplace-torch's, or the likelihood."""
        self.likelihood = likelihood
        self.damping = damping  # laplace-torch's last-layer class forgets it
        check_knows_labels(likelihood, self._backend_cls)
        self.settings.check_damping(self.damping)
        fitting.check_backend(self)
        # those with an own forward pass are not known before it is run
        self._candidates = list(self.params)
        self._is_tuned = bool((torch.as_tensor(self._prior_precision) != 1).any())

    @property
    def backend(self) -> CurvatureInterface:
        """The curvature backend."""
        if self._backend is None and self.likelihood == BINARY:
            self._backend = backend_of_labels(self)
        return super().backend

    @property
    def _kind(self) -> Kind:
        """What is particular to the likelihood."""
        return kind_of(self.likelihood)

    @property
    def calibration(self) -> Calibration | None:
        """What :meth:`calibrate` chose; None before, and after any other change."""
        return self._calibration

    @property
    def curvature(self) -> Curvature | None:
        """What was measured, and grows with further data; None before the first fit."""
        return None if self._estimate is None else self._estimate.curvature

    @property
    def sampling_error(self) -> SamplingError | None:
        """The error by which points were used; None if the backend does not tell."""
        return None if self._estimate is None else self._estimate.error

    def _init_H(self) -> None:
        # laplace-torch allocates factors, which it then replaces: these take no memory,
        # and tell it that there is a prior alone
        zero = torch.zeros((), device=self._device, dtype=self._dtype)
        shapes = [
            (len(param), param.shape[1:].numel())[: param.ndim] if param.ndim else (1,)
            for param in self.fitted_params
        ]
        kfacs = [[zero.expand(n, n) for n in shape] for shape in shapes]
        self.H = Kron(cast("list[tuple[Tensor] | Tensor]", kfacs))

    def _check_H_init(self) -> None:
        if self._estimate is None:
            raise AttributeError("Laplace not fitted. Run fit() first.")
        check_not_replaced(self.model, self.fitted_params)

    @property
    def H_facs(self) -> Kron | None:
        """The curvature's Kronecker factors, debiased.

        None before the first fit, and with ``ggn`` magnitudes, which do not factor.
        """
        return self.H.factors() if isinstance(self.H, EigenbasisMatrix) else None

    @H_facs.setter
    def H_facs(self, factors: Kron | None) -> None:
        if factors is not None:
            raise AttributeError("`H_facs` follows from the fit and cannot be set.")

    @property
    def _dtype(self) -> torch.dtype:
        """The posterior's dtype: half precision cannot hold sums over all data."""
        return torch.promote_types(super()._dtype.to_real(), torch.float32)

    @property
    def fitted_params(self) -> list[Tensor]:
        """The parameters that the posterior is over."""
        return self.params

    @property
    def parameter_kinds(self) -> dict[str, str]:
        """What is known of each parameter's curvature, by its name.

        It is ``"kronecker"`` for matrices and their biases, ``"exact"`` for small
        parameters by themselves, as scales of normalizations and class tokens are,
        ``"diagonal"`` for large ones that are used in other ways, as position
        embeddings are, and ``"left out"`` for those that stay at their trained values.
        """
        self._check_H_init()
        assert self._selection is not None
        kinds = self._selection.kinds()
        own = {id(param): kinds[k] for k, param in enumerate(self.fitted_params)}
        return {
            name: own.get(id(param), "left out")
            for name, param in self.model.named_parameters()
            if param.requires_grad or id(param) in own
        }

    # a tensor in laplace-torch's base class, a matrix of another class in its K-FAC's
    @property
    def posterior_precision(self) -> EigenbasisMatrix:  # type: ignore[override]
        """The posterior precision, that of the prior included."""
        return cast("EigenbasisMatrix", super().posterior_precision)

    @KronLaplace.prior_precision.setter
    def prior_precision(self, prior_precision: float | Tensor) -> None:
        """Change the prior precision: a scalar, or one for each parameter tensor."""
        with unchanged_on_failure(self):  # also where the warning is an error
            self._set_prior_precision(prior_precision)
            self._forget_calibration()
            self._is_tuned = True

    def _set_prior_precision(self, prior_precision: float | Tensor) -> None:
        """Check and take over a prior precision, of which callers keep their tensor."""
        own = prior_precision
        if isinstance(prior_precision, Tensor):
            own = prior_precision.clone()
        # laplace-torch's setter takes the value over before it has checked its length
        with unchanged_on_failure(self):
            cast("Any", KronLaplace).prior_precision.fset(self, own)
            values = self._prior_precision
            if not (values.isfinite() & (values >= 0)).all():
                raise ValueError(
                    f"`prior_precision` must be finite and at least zero, got {values}."
                )

    def _forget_calibration(self) -> None:
        """Forget the calibration of what has been changed, and say so."""
        if self._calibration is not None:
            warn_user(FORGOTTEN)
        self._calibration = None

    # a property in laplace-torch's base class, which declares it as an attribute, too
    @property
    def sigma_noise(self) -> Tensor:
        """Standard deviation of a regression's noise."""
        return self._sigma_noise

    @sigma_noise.setter
    def sigma_noise(self, sigma_noise: float | Tensor) -> None:
        with unchanged_on_failure(self):
            cast("Any", KronLaplace).sigma_noise.fset(self, sigma_noise)
            check_positive("sigma_noise", self._sigma_noise)
            if self._kind.link is not None and self._sigma_noise != 1:
                raise ValueError("`sigma_noise` is for regression alone.")

    @property
    def temperature(self) -> float:
        """Temperature of the likelihood."""
        return self._temperature

    @temperature.setter
    def temperature(self, temperature: float) -> None:
        check_positive("temperature", temperature)
        if temperature != vars(self).get("_temperature"):
            self._forget_calibration()
        self._temperature = temperature

    @property
    def prior_precision_diag(self) -> Tensor:
        """Diagonal of the prior precision, ``[params]``."""
        sizes = [param.numel() for param in self.fitted_params]
        precisions = self.prior_precision.expand(len(sizes))
        return torch.cat(
            [p.expand(size) for p, size in zip(precisions, sizes, strict=True)]
        )

    @property
    def log_likelihood(self) -> Tensor:
        """Log likelihood of the training data, a regression's at all positions."""
        self._check_H_init()
        value = super().log_likelihood
        if self.likelihood != Likelihood.REGRESSION:
            return value
        # laplace-torch normalizes the density of one position
        further = self.n_data * (predicting.num_targets(self) - self.n_outputs)
        sigma = self.sigma_noise.to(value)
        return value - further * (sigma * (2 * pi) ** 0.5).log()

    def log_marginal_likelihood(
        self,
        prior_precision: Tensor | None = None,
        sigma_noise: Tensor | None = None,
    ) -> Tensor:
        """Approximate the log marginal likelihood of the training data.

        Args:
            prior_precision: A new prior precision; None to leave it.
            sigma_noise: A new standard deviation of a regression's noise, likewise.

        Returns:
            A scalar, which is differentiable in both.

        Raises:
            AttributeError: If there is no fit yet.
            ValueError: If it is not finite, as with a prior precision of zero.
        """
        self._check_H_init()
        with unchanged_on_failure(self):
            value = super().log_marginal_likelihood(prior_precision, sigma_noise)
            self._check_is_proper("The log marginal likelihood", value)
        return value

    def _check_is_proper(self, name: str, value: Tensor) -> None:
        """Refuse what is not finite since directions have no precision."""
        if not all_finite(value):
            raise ValueError(
                f"{name} is not finite: the prior precision, {self.prior_precision}, "
                "must be larger, since the data leave some directions open."
            )

    @property
    def log_det_ratio(self) -> Tensor:
        """Log determinant of the posterior precision over that of the prior."""
        if self.damping:  # it is spread over factors, and added to no eigenvalue
            return super().log_det_ratio
        return log_det_ratio(self.posterior_precision)

    @property
    def scatter(self) -> Tensor:
        """Squared distance of the mean from the prior's, by the prior precision."""
        offset = self.prior_offset
        return (offset * self.prior_precision_diag) @ offset

    @property
    def prior_offset(self) -> Tensor:
        """The mean's offset from the prior's, ``[params]``.

        Scales and shifts of normalizations have none, unless ``prior_mean`` is given
        for each parameter: they are not near zero before training, and their squared
        norms would decide the prior precision of all others.
        """
        self._check_H_init()
        offset = (self.mean - self.prior_mean).to(self._dtype)
        parts = list(offset.split([param.numel() for param in self.fitted_params]))
        for position in self._centred:
            parts[position] = torch.zeros_like(parts[position])
        return torch.cat(parts)

    @property
    def _centred(self) -> set[int]:
        """Positions of parameters whose prior has their trained values as its mean."""
        if self._selection is None or self.prior_mean.numel() > 1:
            return set()
        layers = [own for own in self._selection.layers if own.is_normalization]
        return {position for layer in layers for position in layer.parameters}

    def square_norm(self, value: Tensor) -> Tensor:
        """Compute the squared distance of parameters from the mean.

        Args:
            value: The parameters ``[params]``.

        Returns:
            The distance by the posterior precision.
        """
        return super().square_norm(value.to(self._dtype))

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
        """Fit the posterior at the model's parameters.

        Curvature and loss are scaled from the points used to N, the size of
        ``train_loader.dataset``, also where a sampler visits a part of it, and without
        the points of ``magnitude_loader``. If anything fails, the last fitted posterior
        and the model stay as they were. Predictions of the same posterior may run side
        by side, but not while another thread fits it.

        A ``DataLoader`` over a map-style dataset is read by index, by loaders of its
        own: neither the global random numbers nor those of the loader are advanced,
        unless examples draw some, or a sampler tells its indices only by an epoch.
        Anything else is iterated over once, with all that this advances. It must come
        to an end; N is the number of points that it yields, if its dataset has no
        length. With a ``budget``, no more of its points are held than are drawn from,
        and a batch.

        Args:
            train_loader: Yields ``(X, y)``, or mappings with the keys ``dict_key_x``
                and ``dict_key_y``, whose rows are counted. Without
                ``magnitude_loader``, its points are assigned to the two roles at
                random, reproducibly by ``seed``.
            override: Whether to forget the last fit. Otherwise the data count as
                further data: with ``kfac`` magnitudes, the factors of both roles add
                up; with ``ggn``, the factors that give directions, and the magnitudes,
                for which the earlier ones are expressed in the new directions. A point
                of the same dataset keeps its role, so that without a budget the same
                data again double the curvature; with ``ggn`` and ``"cross_fit"``, their
                directions are those of all points, and its trace is doubled.
            progress_bar: Whether to show progress bars.
            magnitude_loader: Yields the points that give magnitudes; then
                ``train_loader`` yields those that give directions. All points of both
                are used, whatever the ``budget``.
            checkpoint: A folder that each stage of the fit is written to, once it is
                done: scores, factors and decompositions. The same fit goes on there
                after it was killed, to the same posterior bit by bit. Once it is done,
                the folder may be deleted.

        Raises:
            TypeError: If ``override`` is no bool.
            ValueError: If data or model are not valid, or the checkpoint is that of a
                fit with other data, model or settings, or damaged.
        """
        seen = fitting.Seen() if override else self._seen
        group = present_group()
        with unchanged_on_failure(self, *self.model.modules()), group.together():
            if not isinstance(override, bool):
                raise TypeError(
                    f"`override` must be a bool, got {type(override).__name__}: pass "
                    "`magnitude_loader` by its name."
                )
            warn_of_autocast(self._device)
            if not override:
                self._forget_calibration()
            self._calibration = None
            folds = fitting.assign(
                self, train_loader, magnitude_loader, seen, group=group
            )
            path = None if checkpoint is None else Path(checkpoint)
            fitting.update(
                self,
                folds,
                seen,
                progress_bar=progress_bar,
                checkpoint=path,
                group=group,
            )
            for message in fitting.messages(self, seen, folds.explicit):
                warn_user(message)
            self.model.eval()

    @thread_restored
    def fit_memory(
        self, train_loader: DataLoader, *, magnitude_loader: DataLoader | None = None
    ) -> FitMemory:
        """Tell what :meth:`fit` would take, before it begins.

        The network is run on few examples; the posterior stays as it is. Data that are
        no dataset with indices are iterated over, as by a fit. Processes that make a
        fit together must all call it.

        Args:
            train_loader: As in :meth:`fit`.
            magnitude_loader: As in :meth:`fit`.

        Returns:
            Bytes at most, and bytes that remain, also as text.

        Raises:
            ValueError: If data or model are not valid, or ``fit_memory_limit`` is too
                small; it names the largest layers.
        """
        planned = copy(self)
        group = present_group()
        with unchanged_on_failure(*self.model.modules()), group.together():
            folds = fitting.assign(
                planned, train_loader, magnitude_loader, fitting.Seen(), group=group
            )
            return memory.of_fit(planned, folds, group=group)

    @thread_restored
    def partial_fit(
        self,
        batch: Any,
        magnitude_batch: Any = None,
        decay: float = 1.0,
        num_data: int | None = None,
    ) -> None:
        """Bring the posterior up to date with a mini-batch, at the model's parameters.

        The model keeps its mode.

        Curvature and loss are averages over all points so far, in which the points of
        a batch lose the share ``1 - decay`` of their weight with each further batch.
        After :meth:`fit`, these are all N. With ``kfac`` magnitudes, without decay, and
        with the same share of points for directions in each, and as many positions in
        each example, batches one by one equal a fit to all of them. With ``ggn``,
        directions are those of all points so far, along which earlier curvature is
        known by its eigenvalues in the last directions. A calibration is forgotten,
        with a warning.

        Args:
            batch: A batch ``(X, y)``, or a mapping, whose tensors, lists and tuples
                have a row for each point; those of other lengths are shared by all.
                Without ``magnitude_batch``, its points are assigned to the folds at
                random; if they are more than ``budget``, as many of them are drawn as
                in :meth:`fit`.
            magnitude_batch: A batch that gives magnitudes; then ``batch`` gives
                directions. All points of both are used, whatever the ``budget``, and
                count.
            decay: Factor on the weight of earlier points, in (0, 1].
            num_data: Number of points that curvature and loss are scaled to; None for
                the number of points so far, decayed like their weights.

        Raises:
            TypeError: If an argument has a wrong type.
            ValueError: If data, model or an argument are not valid.
        """
        seen, group = self._seen, present_group()
        key = self.dict_key_y
        with unchanged_on_failure(self, *self.model.modules()), group.together():
            check_between("decay", decay, "(0, 1]")
            if num_data is not None:
                check_integer("num_data", num_data, 1)
            loader = loader_of_batch(batch, "batch", key, group)
            magnitude_loader = None
            if magnitude_batch is not None:
                name = "magnitude_batch"
                magnitude_loader = loader_of_batch(magnitude_batch, name, key, group)
            warn_of_autocast(self._device)
            self._forget_calibration()
            folds = fitting.assign(self, loader, magnitude_loader, seen, True, group)
            fitting.update(self, folds, seen, decay, num_data, group=group)
            for message in fitting.messages(self, seen, explicit=True):
                warn_user(message)

    def _find_candidates(self, X: Inputs, batch_size: int) -> list[Tensor]:
        """Return the parameters that the posterior could be over."""
        self._candidates = self._trainable()
        return self._candidates

    def _trainable(self) -> list[Tensor]:
        """The parameters that require gradients by now."""
        return [param for param in self.model.parameters() if param.requires_grad]

    @thread_restored
    def __call__(
        self,
        x: Inputs,
        pred_type: PredType | str = PredType.GLM,
        joint: bool = False,
        link_approx: LinkApprox | str = LinkApprox.PROBIT,
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
        fitting: bool = False,
        **model_kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict as laplace-torch does, where sampling ignores ``generator``.

        Args:
            x: Inputs, a tensor or a mapping.
            pred_type: As in ``KronLaplace.__call__``, like all that follow.
            joint: Whether to return a joint distribution of all outputs.
            link_approx: How the link function is approximated.
            n_samples: Number of samples.
            diagonal_output: Whether variances of outputs are enough.
            generator: Random numbers for sampling.
            fitting: Whether a reward model predicts classes.
            **model_kwargs: Further keywords of the network, with ``pred_type="nn"``.

        Returns:
            As ``KronLaplace.__call__``: calibrated probabilities, or mean and variance
            of the network's output, in which the noise of a regression is not
            (:meth:`uncertainty` has both).

        Raises:
            AttributeError: If there is no fit yet.
            TypeError: If there are further keywords with ``pred_type="glm"``.
            ValueError: If data are not valid, or predictions are not finite.
        """
        if pred_type == PredType.GLM and model_kwargs:
            raise TypeError(
                f"Predictions have no arguments {sorted(model_kwargs)}: keywords of a "
                "network need `pred_type='nn'`."
            )
        calibrating.warn_if_untuned(self)
        # laplace-torch's `__call__` does not pass its generator on to where it samples
        context = copy_context()
        context.run(_GENERATOR.set, generator)
        prediction = context.run(
            super().__call__,
            x,
            pred_type,
            joint,
            link_approx,
            n_samples,
            diagonal_output,
            generator,
            fitting,
            **model_kwargs,
        )
        if isinstance(prediction, Tensor):
            check_finite_predictions(prediction)
            return prediction.to(self.mean.dtype)
        f_mu, f_var = prediction
        check_finite_predictions(f_mu, f_var)
        return f_mu.to(self.mean.dtype), f_var.to(self.mean.dtype)

    @thread_restored
    def sample(
        self, n_samples: int = 100, generator: torch.Generator | None = None
    ) -> Tensor:
        """Sample from the posterior.

        Args:
            n_samples: Number of samples.
            generator: Random numbers.

        Returns:
            Samples ``[n_samples, params]``.

        Raises:
            AttributeError: If there is no fit yet.
            ValueError: If they are not finite, as they may be with a prior precision of
                zero.
        """
        self._check_H_init()
        samples = super().sample(n_samples, generator or _GENERATOR.get())
        self._check_is_proper("A sample of the posterior", samples)
        return samples.to(self.mean.dtype)

    def _glm_functional_samples(
        self,
        f_mu: Tensor,
        f_var: Tensor,
        n_samples: int,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        if self._is_certain:  # no covariance to draw from
            return f_mu.to(self.mean.dtype).expand(n_samples, *f_mu.shape)
        samples = super()._glm_functional_samples(
            f_mu, f_var, n_samples, diagonal_output, generator or _GENERATOR.get()
        )
        return samples.to(self.mean.dtype)

    @thread_restored
    def _glm_predictive_distribution(
        self, X: Inputs, joint: bool = False, diagonal_output: bool = False
    ) -> tuple[Tensor, Tensor]:
        self._check_H_init()
        kind = "joint" if joint else "diagonal" if diagonal_output else "full"
        if kind != "diagonal":
            predicting.check_has_covariances(self)
        X = self._inputs(X)
        with evaluating(self.model):
            if self._is_certain:
                f_mu, f_var = self._certain_moments(X, kind)
            else:
                f_mu, f_var = self._output_moments(X, kind)
        predicting.check_rows(self, X, f_mu)
        check_finite_predictions(f_mu, f_var)
        f_mu = at_least_single(f_mu)
        if self._calibration is not None:
            f_mu, f_var = self._calibration.outputs(f_mu, f_var)
        return (f_mu.flatten() if joint else f_mu), f_var

    def _inputs(self, X: Inputs) -> Inputs:
        """Return what the network is called with, on its device."""
        # another posterior of the same network may have another one
        set_class_axis(self.model, self.class_axis)
        return on_device(without_targets(self.model, X, self.dict_key_y), self._device)

    @property
    def _network(self) -> nn.Module:
        """The user's network."""
        return self.model

    @property
    def _keeps_graphs(self) -> bool:
        """Whether gradients flow through predictions, here and now."""
        return self.enable_backprop and torch.is_grad_enabled()

    @property
    def _is_certain(self) -> bool:
        """Whether calibrated predictions are those of the trained network."""
        return self._calibration is not None and self._calibration.scale == 0

    def _certain_moments(self, X: Inputs, kind: str) -> tuple[Tensor, Tensor]:
        """Compute the outputs without the covariance that calibration takes out."""
        with torch.set_grad_enabled(self._keeps_graphs):
            output = run(self.model, X)
        shape = Covariance(kind).shape(*output.shape)
        return output, output.new_zeros(shape, dtype=self._dtype)

    def _output_moments(self, X: Inputs, kind: str) -> tuple[Tensor, Tensor]:
        """Compute mean and covariance of the linearized network's output."""
        predictive = self._predictive(self.posterior_precision)
        return predictive.moments(X, num_examples(X, self.dict_key_x), kind)

    def _output_changes(self, X: Inputs) -> Iterator[tuple[Tensor, Tensor]] | None:
        """Yield the outputs, and samples' deviations; None if moments are exact."""
        if predicting.num_samples(self) is None:
            return None
        # all that estimates moments by samples has them
        predictive = self._predictive(self.posterior_precision)
        sampled = cast("SampledPredictive", predictive)
        return sampled.changes(X, num_examples(X, self.dict_key_x))

    def _variances_by_prior(
        self, X: Inputs, prior_precisions: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """Compute mean and variances of the outputs for scalar prior precisions.

        Returns:
            The mean ``[batch, C]``, and the variances ``[batch, C, K]``.
        """
        self._check_H_init()
        if self.damping:
            raise ValueError("With `damping`, each prior precision needs its own pass.")
        curvature = cast("EigenbasisMatrix", self.H) * self._H_factor
        with evaluating(self.model):
            f_mu, variances = self._output_variances(
                self._inputs(X), curvature, prior_precisions
            )
        check_finite_predictions(f_mu, variances)
        return at_least_single(f_mu), variances

    def _output_variances(
        self, X: Inputs, curvature: EigenbasisMatrix, prior_precisions: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """Do so for prepared inputs, by the scaled curvature."""
        predictive = self._predictive(curvature)
        return predictive.variances(
            X, num_examples(X, self.dict_key_x), prior_precisions
        )

    def _predictive(self, posterior: EigenbasisMatrix) -> predicting.Predictive:
        """Return the linearized network's predictive with a posterior precision."""
        self._check_H_init()
        count = predicting.num_samples(self)
        if count is not None and not self._is_sampling_known:
            self._is_sampling_known = True
            if self.forward_samples == predicting.AUTO:
                assert self._selection is not None
                message = predicting.are_sampled(count, self._selection.num_outputs)
                warn_user(message)
        return predicting.predictive(self, posterior)

    def _glm_forward_call(
        self,
        x: Inputs,
        likelihood: Likelihood | str,
        joint: bool = False,
        link_approx: LinkApprox | str = LinkApprox.PROBIT,
        n_samples: int = 100,
        diagonal_output: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        check_link(likelihood, link_approx)
        if self.class_axis is not None:
            prediction = predicting.by_position(self, x, joint, link_approx)
            return cast("Tensor | tuple[Tensor, Tensor]", prediction)
        link = kind_of(likelihood).link
        # laplace-torch computes the covariance of all outputs here, too
        if link is None:
            if diagonal_output and not joint:
                return self._glm_predictive_distribution(x, diagonal_output=True)
        elif link_approx == LinkApprox.PROBIT or self._is_certain:
            f_mu, f_var = self._glm_predictive_distribution(x, diagonal_output=True)
            return link.probit(f_mu, f_var)
        return super()._glm_forward_call(
            x, likelihood, joint, link_approx, n_samples, diagonal_output
        )

    def _glm_predictive_samples(
        self,
        f_mu: Tensor,
        f_var: Tensor,
        n_samples: int,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        samples = self._glm_functional_samples(
            f_mu, f_var, n_samples, diagonal_output, generator
        )
        link = self._kind.link
        return samples if link is None else link.probabilities(samples)

    def _sampled_outputs(
        self,
        X: Inputs,
        n_samples: int,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> Iterator[Tensor]:
        """Yield the network's output for each posterior sample."""
        yield from sampled_outputs(
            self.model,
            self.fitted_params,
            self._calibrated_sample(n_samples, generator),
            self._inputs(X),
            **model_kwargs,
        )

    def _calibrated_sample(
        self, n_samples: int, generator: torch.Generator | None
    ) -> Tensor:
        """Sample from the posterior whose covariance the calibration scales."""
        samples = self.sample(n_samples, generator)
        if self._calibration is None:
            return samples
        return self.mean + self._calibration.scale**0.5 * (samples - self.mean)

    def _calibrated_outputs(
        self,
        X: Inputs,
        n_samples: int,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> Iterator[Tensor]:
        """Yield the network's calibrated output for each posterior sample."""
        self._check_H_init()
        temperature = self._calibration.temperature if self._calibration else 1.0
        for output in self._sampled_outputs(X, n_samples, generator, **model_kwargs):
            predicting.check_rows(self, X, output)
            own = output if self.enable_backprop else output.detach()
            yield own / temperature

    @thread_restored
    def _nn_functional_samples(
        self,
        X: Inputs,
        n_samples: int = 100,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        with evaluating(self.model):
            outputs = self._calibrated_outputs(X, n_samples, generator, **model_kwargs)
            return torch.stack(predicting.of_output(self, X, list(outputs)))

    @thread_restored
    def _nn_predictive_samples(
        self,
        X: Inputs,
        n_samples: int = 100,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        samples = self._nn_functional_samples(X, n_samples, generator, **model_kwargs)
        kind, axis = self._kind, self.class_axis
        if kind.link is None or not kind.is_classification:
            return samples
        of_samples = -1 if axis is None or axis < 0 else axis + 1
        return kind.link.probabilities(samples, of_samples)

    # the base class declares each further keyword as a dictionary
    @thread_restored
    def _nn_predictive_classification(  # type: ignore[override]
        self,
        X: Inputs,
        n_samples: int = 100,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        with evaluating(self.model):
            total = torch.zeros((), device=self._device)
            outputs = self._calibrated_outputs(X, n_samples, generator, **model_kwargs)
            for output in outputs:
                total = total + predicting.probabilities(self, output)
            (mean,) = predicting.of_output(self, X, [total / n_samples])
            return mean

    @thread_restored
    def optimize_prior_precision(  # type: ignore[override]
        self,
        pred_type: PredType | str = PredType.GLM,
        method: TuningMethod | str = TuningMethod.MARGLIK,
        n_steps: int = 100,
        lr: float = 1e-1,
        init_prior_prec: float | Tensor = 1.0,
        prior_structure: PriorStructure | str = PriorStructure.SCALAR,
        val_loader: DataLoader | None = None,
        loss: grid_search.Loss | None = None,
        log_prior_prec_min: float = -4,
        log_prior_prec_max: float = 4,
        grid_size: int = 100,
        link_approx: LinkApprox | str = LinkApprox.PROBIT,
        n_samples: int = 100,
        verbose: bool = False,
        progress_bar: bool = False,
        log_prior_prec_base: float = 10.0,
        *,
        tune_sigma_noise: bool = False,
    ) -> None:
        """Tune the prior precision as laplace-torch does, and keep the model's mode.

        A grid search judges each prior precision for itself, and regressions by the
        Gaussian negative log likelihood
        (:mod:`~laplace_debiased.posterior.grid_search`); a choice at the end of the
        grid warns. With the probit approximation, or one output, and a metric as the
        loss, it takes one pass over the data for all of them. The marginal likelihood
        is maximized by Newton's method (:mod:`~laplace_debiased.posterior.evidence`),
        except with ``damping``. If anything fails, the prior precision stays as it was.

        Args:
            pred_type: As in ``KronLaplace.optimize_prior_precision``, like all others.
            method: How to tune.
            n_steps: Largest number of steps; a handful is enough.
            lr: Step size of gradient ascent, with ``damping`` only.
            init_prior_prec: Where to start.
            prior_structure: Whether there is one precision for all parameters.
            val_loader: Yields validation data.
            loss: What is minimized on them: a metric, or a function of predictions and
                targets, which are classes, or have the outputs' shape.
            log_prior_prec_min: Beginning of the grid.
            log_prior_prec_max: End of the grid.
            grid_size: Number of its points.
            link_approx: How the link function is approximated.
            n_samples: Number of samples.
            verbose: Whether to print the result.
            progress_bar: Whether to show a progress bar.
            log_prior_prec_base: Base of the grid's logarithms.
            tune_sigma_noise: Whether to maximize the marginal likelihood over
                ``sigma_noise``, too, in regression
                (:mod:`~laplace_debiased.posterior.noise`).

        Raises:
            ValueError: If no validation loss is finite, the marginal likelihood has no
                maximum that is, or ``sigma_noise`` cannot be tuned.
        """
        tuning.check_prior_structure(prior_structure)
        if tune_sigma_noise:
            tuning.check_noise_can_be_tuned(self, method, prior_structure)
        loss = grid_search.default_loss(self) if loss is None else loss
        climbs = method == TuningMethod.MARGLIK and not self.damping
        if climbs and prior_structure != PriorStructure.DIAG:
            if val_loader is not None:
                warn_user(tuning.NEEDS_NO_VALIDATION)
            is_layerwise = prior_structure == PriorStructure.LAYERWISE
            self._climb((init_prior_prec, is_layerwise, n_steps), tune_sigma_noise)
            if verbose:
                print(f"Optimized prior precision is {self.prior_precision}.")
            return
        with (
            evaluating(self.model),
            unchanged_on_failure(self),
            without_link_reminder(),
        ):
            self._calibration = None
            super().optimize_prior_precision(
                pred_type,
                method,
                n_steps,
                lr,
                init_prior_prec,
                prior_structure,
                val_loader,
                loss,
                log_prior_prec_min,
                log_prior_prec_max,
                grid_size,
                link_approx,
                n_samples,
                verbose,
                progress_bar,
                log_prior_prec_base,
            )

    def _climb(
        self, start: tuple[float | Tensor, bool, int], tune_sigma_noise: bool
    ) -> None:
        """Maximize the marginal likelihood by Newton's method."""
        self._check_H_init()
        with unchanged_on_failure(self):
            self._calibration = None
            if tune_sigma_noise:
                tuning.maximize_over_noise(self, *start)
            self.prior_precision = tuning.maximize_marginal_likelihood(self, *start)

    # the base class declares functions of one argument, and gives them two or three
    def _gridsearch(  # type: ignore[override]
        self,
        loss: grid_search.Loss,
        interval: Tensor,
        val_loader: DataLoader,
        pred_type: PredType | str,
        link_approx: LinkApprox | str = LinkApprox.PROBIT,
        n_samples: int = 100,
        progress_bar: bool = False,
    ) -> Tensor:
        return grid_search.grid_search(
            self,
            loss,
            interval,
            val_loader,
            progress_bar,
            pred_type=pred_type,
            link_approx=link_approx,
            n_samples=n_samples,
        )

    @thread_restored
    def calibrate(
        self,
        val_loader: DataLoader,
        *,
        optimize_prior: bool = True,
        tolerance: float = TOLERANCE,
        progress_bar: bool = False,
    ) -> Calibration:
        """Make probabilities agree with validation data, in one pass over them.

        The marginal likelihood chooses the prior precision. The validation data then
        choose a temperature of the network's outputs, and the share of the posterior's
        covariance that probabilities keep, which may be none: few data change little
        (:mod:`~laplace_debiased.predictive.calibration`). From then on, all predictions
        are calibrated: those of ``la(x)``, whatever its arguments, and samples of
        outputs, while :meth:`uncertainty` tells what the whole posterior knows. A
        further fit, another prior precision or temperature forgets the calibration.

        Args:
            val_loader: Yields validation data, in the form of training data, that the
                network was not trained with.
            optimize_prior: Whether to choose the prior precision; else it stays.
            tolerance: Mean negative log likelihood of the validation data in nats, of
                all labels of a point together, that may be given up for more
                covariance, which inputs need that have changed since training;
                ``math.inf`` keeps all of it.
            progress_bar: Whether to show a progress bar.

        Returns:
            What was chosen, also as ``la.calibration``; as text, it says so in a line.

        Raises:
            AttributeError: If there is no fit yet.
            ValueError: If it is no classification, data are not valid, or the marginal
                likelihood has no maximum.
        """
        self._check_H_init()
        with unchanged_on_failure(self), present_group().together():
            if optimize_prior:
                self.optimize_prior_precision()
            chosen = calibrating.calibrate(self, val_loader, tolerance, progress_bar)
            self._calibration, self._is_tuned = chosen, True
        return chosen

    @thread_restored
    def uncertainty(self, x: Inputs) -> Uncertainty:
        """Tell how uncertain predictions are, and why, at the price of a prediction.

        Args:
            x: Inputs, a tensor or a mapping.

        Returns:
            Probabilities, and total, aleatoric and epistemic uncertainty of each
            example, or of each of its labels. With exact moments, there are no random
            numbers: they are within 3 % of those of many samples of the outputs, or .02
            nats. Outputs of a position, and more than 256 classes, are then taken as
            independent, which makes ``epistemic`` larger. With moments by samples, they
            have the samples' error.

        Raises:
            AttributeError: If there is no fit yet.
            ValueError: If it is a reward model, or there are no examples.
        """
        self._check_H_init()
        calibrating.warn_if_untuned(self)
        return uncertainties.uncertainty(self, x)

    @thread_restored
    def report(
        self,
        test_loader: Iterable,
        foreign_loader: Iterable | None = None,
        *,
        progress_bar: bool = False,
    ) -> PredictionReport:
        """Tell what predictions of test data are worth, beside the network alone.

        Args:
            test_loader: Yields test data that nothing was chosen by.
            foreign_loader: Yields data that the network was not trained for, or their
                inputs alone.
            progress_bar: Whether to show progress bars.

        Returns:
            Scores, as text and table, and a figure.

        Raises:
            AttributeError: If there is no fit yet.
            ValueError: If data are not valid, there are none, or it is a reward model.
        """
        self._check_H_init()
        calibrating.warn_if_untuned(self)
        return evaluation.report(self, test_loader, foreign_loader, progress_bar)

    @thread_restored
    def conformal_sets(
        self, loader: DataLoader, coverage: float = 0.9
    ) -> conformal.ConformalSets:
        """Find sets of classes that hold the true one with a given probability.

        The probability is over data and new example, which must be exchangeable: it
        holds on average, not for each class or kind of example, and not for foreign
        ones. Compute the sets after :meth:`calibrate`.

        Args:
            loader: Yields data that neither training nor :meth:`calibrate` has used.
            coverage: The probability, in (0, 1).

        Returns:
            Called on inputs, it returns whether each class is in the set, bool
            ``[batch, classes]``; raises RuntimeError once the posterior has changed.

        Raises:
            AttributeError: If there is no fit yet.
            ValueError: If it is no classification, or arguments are not valid.
        """
        self._check_H_init()
        calibrating.warn_if_untuned(self)
        return conformal.ConformalSets(self, loader, coverage)

    @thread_restored
    def conformal_intervals(
        self, loader: DataLoader, coverage: float = 0.9
    ) -> conformal.ConformalIntervals:
        """Find intervals that hold the target with a given probability.

        As :meth:`conformal_sets`, for a regression, and for each output by itself.

        Args:
            loader: Yields data that neither training nor tuning has used.
            coverage: The probability, in (0, 1).

        Returns:
            Called on inputs, it returns lower and upper ends ``[batch, outputs]``;
            raises RuntimeError once the posterior has changed.

        Raises:
            AttributeError: If there is no fit yet.
            ValueError: If it is no regression, or arguments are not valid.
        """
        self._check_H_init()
        calibrating.warn_if_untuned(self)
        return conformal.ConformalIntervals(self, loader, coverage)

    @thread_restored
    def state_dict(self) -> dict[str, Any]:
        """Return the fitted posterior, with its calibration.

        Returns:
            A flat dictionary of plain values and tensors, whose keys are paths such as
            ``layers.0.name``. ``torch.load`` reads it with ``weights_only=True``.

        Raises:
            AttributeError: If there is no fit yet.
        """
        return state.state_dict(self)

    @thread_restored
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a fitted posterior.

        A warning tells if the model has other parameters than those it was fitted at.

        Args:
            state_dict: From :meth:`state_dict`.

        Raises:
            ValueError: If it is of another format, class, kind of magnitudes,
                likelihood or network, or an entry is missing or damaged. Then the last
                posterior stays.
        """
        with unchanged_on_failure(self, *self.model.modules()):
            self._load(state_dict)
            if not state.is_at_parameters(self):
                warn_user(state.OTHER_PARAMETERS)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted posterior to a file, whole or not at all.

        If writing is interrupted, even by a crash, a former file stays as it was.

        Args:
            path: The file, for :meth:`load` or ``torch.load`` with
                ``weights_only=True``.

        Raises:
            AttributeError: If there is no fit yet.
        """
        checkpoint.write(self.state_dict(), path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take over a fitted posterior from a file.

        Args:
            path: The file, from :meth:`save`.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged, or as :meth:`load_state_dict`.
        """
        self.load_state_dict(checkpoint.read(path, self._device))

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy is made from, in this process or in another one."""
        detached = {
            name: value.detach()
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and not value.is_leaf
        }
        return vars(self) | detached | {"_backend": None}  # made where it is needed

    def _load(self, state_dict: dict[str, Any]) -> None:
        self._candidates = self._trainable()
        state.load(self, state_dict)

    @property
    def curvature_standard_errors(self) -> dict[str, float]:
        """Relative standard error of the curvature's scale in each layer.

        Of the trace of each layer's curvature, over draws of the points, random signs
        and sampled labels; NaN for a layer without curvature.

        Raises:
            AttributeError: If there is no fit yet.
            ValueError: If the backend does not tell what each point contributes.
        """
        return diagnostics.known_sampling_error(self).relative_errors()

    @property
    def decomposition_error(self) -> float:
        """What isotropic rests of large factors change, at most, as a share of all.

        Of the effective number of parameters, and so of the mean of the outputs'
        variances over the training points, at the present prior precision: see
        :func:`~laplace_debiased.posterior.diagnostics.decomposition_error`. It falls at
        least as fast as the prior precision grows.

        Raises:
            AttributeError: If there is no fit yet.
            ValueError: If the posterior has ``damping``.
        """
        return diagnostics.decomposition_error(self)

    def curvature_intervals(
        self, level: float = 0.95
    ) -> dict[str, tuple[float, float]]:
        """Confidence intervals for the curvature's scale in each layer.

        Of the trace of each layer's curvature from all data; NaN for a layer without
        curvature. Wider than by normal quantiles where few points carry the error
        (:mod:`~laplace_debiased.posterior.sampling_error`).

        Args:
            level: Confidence level, in (0, 1).

        Returns:
            The ends of each layer's interval, by the layer's name.

        Raises:
            AttributeError: If there is no fit yet.
            ValueError: If the level is out of range, or the backend does not tell what
                each point contributes.
        """
        check_between("level", level, "(0, 1)")
        return diagnostics.known_sampling_error(self).intervals(level)

    def log_marginal_likelihood_standard_error(self) -> Tensor:
        """Estimate the standard error of the log marginal likelihood.

        See :func:`~laplace_debiased.posterior.diagnostics.marginal_likelihood_error`.

        Returns:
            A scalar, at the present prior precision.

        Raises:
            AttributeError: If there is no fit yet.
            ValueError: If the backend does not tell what each point contributes, the
                posterior has ``damping``, or the marginal likelihood is not finite.
        """
        error = diagnostics.marginal_likelihood_error(self)
        if error.isnan():  # infinite that of a single point may be
            self._check_is_proper("The log marginal likelihood's error", error)
        return error

    @thread_restored
    def bias_report(
        self,
        train_loader: DataLoader | None = None,
        num_directions: int = 100,
        *,
        magnitude_loader: DataLoader | None = None,
    ) -> BiasReport:
        """Tell how biased the curvature would be without debiasing.

        The K-FAC of some folds is measured along its own eigenvectors, and so is that
        of the held-out fold. There are no intervals
        (:func:`~laplace_debiased.quadratics.bias.kfac_bias`).

        Args:
            train_loader: What the posterior was fitted to: with ``ggn`` magnitudes, the
                folds' K-FAC is computed again. Not needed with ``kfac``.
            num_directions: Number of directions with the largest curvature.
            magnitude_loader: As in :meth:`fit`.

        Returns:
            The report.

        Raises:
            AttributeError: If there is no fit yet.
            ValueError: If ``train_loader`` is needed, but not given.
        """
        return diagnostics.bias_report(
            self, train_loader, magnitude_loader, num_directions
        )
