r"""Laplace approximations with debiased Kronecker-factored curvature.

The posterior precision is :math:`U \mathrm{diag}(\lambda) U^\top + \delta I`, with
eigenvectors from some of the training points and eigenvalues measured on others
(arXiv 2410.14325). Importing this module registers the structures with laplace-torch:
``Laplace(model, likelihood, hessian_structure="kron_debiased")``.
"""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from typing import Any
from warnings import warn

import torch
from laplace import KronLaplace, KronLLLaplace
from laplace.curvature.curvlinops import CurvlinopsInterface
from laplace.utils import select_rows, split_batch
from laplace.utils.enums import Likelihood
from torch import Tensor, nn
from torch.utils.data import DataLoader

from laplace_debiased.posterior.diagnostics import Diagnostics
from laplace_debiased.posterior.last_layer import LastLayer
from laplace_debiased.posterior.measuring import Earlier, Estimate, Estimator
from laplace_debiased.posterior.prediction import Prediction
from laplace_debiased.posterior.sampling_error import SamplingError
from laplace_debiased.posterior.settings import Debiasing, check_integer
from laplace_debiased.posterior.sources import CurvatureSource
from laplace_debiased.posterior.state import Checkpoint
from laplace_debiased.rows.layers import Block, curvature_blocks
from laplace_debiased.rows.model_state import (
    check_repeatable,
    frozen,
    measuring,
    unchanged_on_failure,
)
from laplace_debiased.rows.seeds import mixed_seed
from laplace_debiased.rows.selection import (
    LeftOut,
    find_layers,
    notice,
    refusal,
    select,
    unrecorded,
)
from laplace_debiased.rows.sweep import Inputs, check_finite_inputs, check_two_examples
from laplace_debiased.sampling.folds import (
    Folds,
    Points,
    draw_uniformly,
    explicit_folds,
    loader_of_batch,
)
from laplace_debiased.sampling.shares import best_share, effective_rank


class KronDebiasedLaplace(Checkpoint, Diagnostics, Prediction, KronLaplace):
    """Laplace approximation with debiased K-FAC over all weights.

    Has the interface of laplace-torch's ``KronLaplace`` and its keywords. Parameters in
    layers that are not supported stay at their trained values, and a warning lists them
    when the posterior is fitted.

    Args:
        model: The trained network.
        likelihood: ``"classification"``, ``"regression"`` or ``"reward_modeling"``.
        *args: Further arguments of ``KronLaplace``.
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
        pool_size: Number of points in the pool; None for 32 times the budget.
        sampling_floor: Share of the uniform distribution in the probabilities by which
            curvature sampling draws, in (0, 1]: it bounds the weights.
        fisher_rank: Number of columns of the output curvature's square root that are
            kept for each point, the largest ones; one more column stands for the
            others, without bias. A point then takes ``fisher_rank + 1`` backward passes
            instead of one for each output. None for all; needs ``CurvlinopsGGN``, not
            ``stochastic``.
        seed: Makes draw and assignment of the points reproducible.
        memory_limit: Bytes that a GLM prediction may take for a chunk of examples; may
            be changed at any time.
        strict: Whether to refuse parameters in layers that are not supported.
        **kwargs: Further keywords of ``KronLaplace``.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If an argument is out of range or does not fit the others.
    """

    _key = ("all", "kron_debiased")
    _accumulates = True

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | str,
        *args: Any,
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
        memory_limit: int = 2**30,
        strict: bool = False,
        **kwargs: Any,
    ):
        self.debiasing = Debiasing(
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
        )
        check_integer("memory_limit", memory_limit, 1)
        self.memory_limit = memory_limit
        self._strict = strict
        self._generator: torch.Generator | None = None
        self._weight, self._num_points, self._num_updates = 0, 0, 0
        self.sampling_error: SamplingError | None = None
        self._left_out = self._find_left_out(model)
        with frozen([param for entry in self._left_out for param in entry.params]):
            super().__init__(model, likelihood, *args, **kwargs)
        # laplace-torch's last-layer class forgets `damping` on the way
        arguments = signature(super().__init__).bind(model, likelihood, *args, **kwargs)
        self.damping = arguments.arguments.get("damping", False)
        self.debiasing.check_damping(self.damping)
        self.debiasing.check_backend(
            self._backend_cls, self._backend_kwargs.get("stochastic", False)
        )

    def _find_left_out(self, model: nn.Module) -> list[LeftOut]:
        """Find the parameters in layers that are not supported."""
        trainable = [param for param in model.parameters() if param.requires_grad]
        _, left_out = select(model, trainable)
        if left_out and self._strict:
            raise ValueError(refusal(left_out))
        return left_out

    def _init_H(self) -> None:
        # laplace-torch allocates factors, which it then replaces
        self.H = None

    @property
    def _dtype(self) -> torch.dtype:
        """The posterior's dtype: half precision cannot hold sums over all data."""
        return torch.promote_types(super()._dtype, torch.float32)

    @property
    def _fitted_params(self) -> list[Tensor]:
        """The parameters that the posterior is over."""
        return self.params

    @property
    def _fitted_names(self) -> list[str]:
        """Their names in the model."""
        fitted = {id(param) for param in self._fitted_params}
        return [n for n, p in self.model.named_parameters() if id(p) in fitted]

    @KronLaplace.prior_precision.setter
    def prior_precision(self, prior_precision: float | Tensor) -> None:
        """Change the prior precision: a scalar, or one for each parameter tensor."""
        # laplace-torch's setter takes the value over before it has checked its length
        with unchanged_on_failure(self):
            KronLaplace.prior_precision.fset(self, prior_precision)

    @property
    def prior_precision_diag(self) -> Tensor:
        """Diagonal of the prior precision, ``[params]``."""
        sizes = [param.numel() for param in self._fitted_params]
        precisions = self.prior_precision.expand(len(sizes))
        return torch.cat(
            [p.expand(size) for p, size in zip(precisions, sizes, strict=True)]
        )

    @property
    def scatter(self) -> Tensor:
        """Squared distance of the mean from the prior's, by the prior precision."""
        delta = (self.mean - self.prior_mean).to(self._dtype)
        return (delta * self.prior_precision_diag) @ delta

    def square_norm(self, value: Tensor) -> Tensor:
        """Compute the squared distance of parameters from the mean.

        Args:
            value: The parameters ``[params]``.

        Returns:
            The distance by the posterior precision.
        """
        return super().square_norm(value.to(self._dtype))

    def fit(
        self,
        train_loader: DataLoader,
        magnitude_loader: DataLoader | None = None,
        override: bool = True,
        progress_bar: bool = False,
    ) -> None:
        """Fit the posterior at the model's parameters.

        Curvature and loss are scaled from the points used to N, the size of
        ``train_loader.dataset``, also where a sampler visits a part of it, and without
        the points of ``magnitude_loader``. If anything fails, the last fitted posterior
        and the model stay as they were.

        Args:
            train_loader: Yields ``(X, y)``, or mappings with the keys ``dict_key_x``
                and ``dict_key_y``. Without ``magnitude_loader``, its points are
                assigned to the two roles at random, reproducibly by ``seed``.
            magnitude_loader: Yields the points that give magnitudes; then
                ``train_loader`` yields those that give directions. All points of both
                are used, whatever the ``budget``.
            override: Whether to forget the last fit. Otherwise the data count as
                further data: with ``kfac`` magnitudes, the factors of both roles add
                up; with ``ggn``, the factors that give directions, and the magnitudes,
                for which the earlier ones are expressed in the new directions.
            progress_bar: Whether to show progress bars.

        Raises:
            ValueError: If data or model are not valid.
        """
        if not override and not self._accumulates:
            raise ValueError(
                "Last-layer Laplace approximations do not support `override=False`."
            )
        decay = 0 if override else 1
        with unchanged_on_failure(self):
            folds = self._folds(
                train_loader, magnitude_loader, self._seed(decay), decay
            )
            self._update(folds, decay, progress_bar=progress_bar)
        self.model.eval()
        self._warn_of_small_budget(folds.explicit)

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
        with as many points for directions in each, batches one by one equal a fit to
        all of them. With ``ggn``, directions are those of all points so far, along
        which earlier curvature is known by its eigenvalues in the last directions.

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
        if not 0 < decay <= 1:
            raise ValueError(f"`decay` must lie in (0, 1], got {decay}.")
        if num_data is not None:
            check_integer("num_data", num_data, 1)
        if not self._accumulates:
            raise ValueError(
                "Last-layer Laplace approximations do not support `partial_fit`."
            )
        loader, magnitude_loader = loader_of_batch(batch), None
        if magnitude_batch is not None:
            magnitude_loader = loader_of_batch(magnitude_batch, "magnitude_batch")
        with unchanged_on_failure(self):
            seed = self._seed(decay)
            folds = self._folds(loader, magnitude_loader, seed, decay, "batch")
            if folds.explicit:
                folds = replace(folds, num_data=folds.num_points)
            self._update(folds, decay, num_data)

    def _update(
        self,
        folds: Folds,
        decay: float,
        num_data: int | None = None,
        progress_bar: bool = False,
    ) -> None:
        """Add new points to the earlier ones, at the model's parameters.

        Args:
            folds: The new points, which stand for ``folds.num_data``.
            decay: Factor on the weight of earlier points, zero to forget them.
            num_data: Number of points that curvature and loss are scaled to; None for
                the weight of all.
            progress_bar: Whether to show progress bars.
        """
        remembered = decay * self._weight
        weight = remembered + folds.num_data
        share = remembered / weight
        earlier = None
        if remembered:
            earlier = Estimate(
                self.H_facs, self.loss, self.n_outputs, self.sampling_error
            ).scaled(remembered / self.n_data, decay)
        with measuring(self.model):
            estimator = self._estimator(folds, self._seed(decay), progress_bar)
            estimate = self._estimate(estimator, earlier, share)
        if earlier is not None:
            estimate = earlier.merge(estimate, share)
        num_data = weight if num_data is None else num_data
        self._take_over(estimate.scaled(num_data / weight), num_data)
        self._weight = weight
        self._num_points = decay * self._num_points + self._num_used(folds)
        self._num_updates = 1 + (self._num_updates if decay else 0)

    def _take_over(self, estimate: Estimate, num_data: float) -> None:
        """Make an estimate the posterior, at the model's parameters."""
        H = estimate.curvature.decompose(self.damping)
        mean = torch.cat([param.reshape(-1) for param in self._fitted_params])
        self.H_facs, self.H = estimate.curvature, H
        self.mean = mean if self.enable_backprop else mean.detach()
        self.loss, self.n_outputs = estimate.loss, estimate.num_outputs
        self.n_data = num_data
        self.sampling_error = estimate.error
        self.model.output_size = estimate.num_outputs

    def _num_used(self, folds: Folds) -> int:
        """Number of points that get backward passes."""
        if folds.explicit or self.debiasing.budget is None:
            return folds.num_points
        return min(self.debiasing.budget, folds.num_points)

    def _seed(self, decay: float) -> int:
        """Seed of the draws: all further data have their own."""
        own, index = self.debiasing.seed, self._num_updates if decay else 0
        return mixed_seed(own, index) if index else own

    def _folds(
        self,
        loader: DataLoader,
        magnitude_loader: DataLoader | None,
        seed: int,
        decay: float = 1.0,
        name: str = "train_loader",
    ) -> Folds:
        """Assign points to folds: those to use, or those to draw from.

        Args:
            loader: Yields the points, or those that give directions.
            magnitude_loader: Yields those that give magnitudes.
            seed: Seed of the draw.
            decay: Factor on the weight of earlier points.
            name: The loader's name in messages.

        Returns:
            The folds.
        """
        is_first = not decay * self._weight
        if magnitude_loader is not None:
            folds = explicit_folds(loader, magnitude_loader)
            if is_first:
                self._prepare(folds.first_batch())
            return folds
        d = self.debiasing
        num_points = d.num_candidates if self._draws else d.budget
        points = draw_uniformly(loader, num_points, seed, name)
        if is_first:
            self._prepare(points.first_batch())
        best = self._best_share(points) if d.finds_share else None
        return points.split(d.shares(best))

    def _best_share(self, points: Points) -> float:
        """Find out, by a forward pass, which share should give directions."""
        num_used = min(self.debiasing.budget or len(points), len(points))
        with measuring(self.model):
            source = self._source(self.debiasing.seed)
            curvature = source.output_curvature(points.some(num_used))
        dimensions = [block.shape[0] for block in self._blocks()]
        return best_share(num_used, dimensions, effective_rank(curvature))

    def _blocks(self) -> list[Block]:
        """The blocks of the fitted parameters."""
        layers = find_layers(self.model, self._fitted_params)
        return curvature_blocks(layers, separate_weight_and_bias=True)

    @property
    def _draws(self) -> bool:
        """Whether points are drawn by their curvature."""
        d = self.debiasing
        if d.sampling is None:
            return issubclass(self._backend_cls, CurvlinopsInterface)
        return d.sampling == "curvature"

    def _prepare(self, batch: Any) -> None:
        """Find out what the posterior is over, and whether the network is supported."""
        with measuring(self.model):
            check_repeatable(self.model)
        X, y = split_batch(batch, self.dict_key_y)
        X = X.to(self._device) if isinstance(X, Tensor) else X
        self._find_parameters(X, len(y))
        check_finite_inputs(X)
        layers = find_layers(self.model, self._fitted_params)
        with measuring(self.model):
            check_two_examples(self.model, layers, X, len(y))

    def _find_parameters(self, X: Inputs, batch_size: int) -> None:
        """Find out, before curvature is measured, what the posterior is over."""
        if self.params:
            self._leave_out_unrecorded(select_rows(X, torch.arange(1), batch_size))
        if not self.params:
            raise ValueError(
                "The model has no parameters with `requires_grad=True` in supported "
                "layers: there is nothing to fit."
            )
        if self._left_out:
            warn(notice(self._left_out, self.n_params), stacklevel=5)

    def _leave_out_unrecorded(self, example: Inputs) -> None:
        """Leave out what only running the network can show."""
        layers = find_layers(self.model, self.params)
        with measuring(self.model):
            left_out = unrecorded(self.model, layers, example)
        if left_out and self._strict:
            raise ValueError(refusal(left_out))
        dropped = {id(param) for entry in left_out for param in entry.params}
        self._left_out = self._left_out + left_out
        self._fit_only([param for param in self.params if id(param) not in dropped])

    def _fit_only(self, params: list[Tensor]) -> None:
        """Take parameters out, and check the prior against the others."""
        if len(params) == len(self._fitted_params):
            return
        self.params, self.is_subset_params = params, True
        self._count_params()

    def _count_params(self) -> None:
        """Count the parameters anew, and check the prior against them."""
        params = self._fitted_params
        self.n_params = sum(param.numel() for param in params)
        self.n_layers = len(params)
        self.prior_precision = self._prior_precision
        self.prior_mean = self._prior_mean

    def _estimate(
        self, estimator: Estimator, earlier: Estimate | None, share: float
    ) -> Estimate:
        """Measure curvature and loss of new points, along directions of all."""
        if self.debiasing.magnitudes == "kfac":
            return estimator.kfac()
        if earlier is None:
            return estimator.ggn()
        return estimator.ggn(Earlier(earlier.curvature.factors(), share))

    def _estimator(
        self, folds: Folds, seed: int, progress_bar: bool = False
    ) -> Estimator:
        d = self.debiasing
        source = self._source(seed, progress_bar)
        estimator = Estimator(source, folds, d.cross_fit and not folds.explicit)
        if self._num_used(folds) < folds.num_points:
            estimator.draw(d.budget, seed, d.sampling_floor)
        return estimator

    def _source(self, seed: int, progress_bar: bool = False) -> CurvatureSource:
        return CurvatureSource(
            self.backend,
            self._fitted_params,
            self._asdl_fisher_kwargs,
            seed,
            self.debiasing.fisher_rank,
            progress_bar,
        )


class KronDebiasedLLLaplace(LastLayer, KronDebiasedLaplace, KronLLLaplace):
    """Laplace approximation with debiased K-FAC over the last layer.

    Has the interface of laplace-torch's ``KronLLLaplace``, its keywords, and those of
    :class:`KronDebiasedLaplace`. As in laplace-torch, ``override=False`` is refused.
    """

    _key = ("last_layer", "kron_debiased")
