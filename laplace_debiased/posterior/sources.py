"""Kronecker factors from laplace-torch's curvature backends."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from backpack import extend
from curvlinops import FisherType, KFACType
from laplace.curvature import BackPackInterface, CurvatureInterface, EFInterface
from laplace.curvature.asdl import AsdlInterface
from laplace.curvature.curvlinops import CurvlinopsInterface
from laplace.utils import Kron, split_batch
from torch import Generator, Tensor
from tqdm import tqdm

from laplace_debiased.curvature.eigenbasis import Factors
from laplace_debiased.curvature.factors import DirectionalCurvatures, KroneckerFactors
from laplace_debiased.curvature.streams import scale_gradients
from laplace_debiased.rows.layers import curvature_blocks
from laplace_debiased.rows.output_curvature import OutputCurvature
from laplace_debiased.rows.seeds import mixed_seed
from laplace_debiased.rows.selection import find_layers
from laplace_debiased.rows.sweep import (
    Accumulator,
    Inputs,
    SweepSummary,
    at_least_single,
    check_finite_inputs,
    check_targets,
    sweep,
)
from laplace_debiased.sampling.folds import Fold

_CURVLINOPS_OPTIONS = {"kfac_approx", "mc_samples"}


@dataclass
class CurvatureSource:
    """Measures curvature by a laplace-torch backend.

    Args:
        backend: The backend.
        params: The parameters.
        options: Options of the backend's ``kron``: with curvlinops ``mc_samples`` and
            ``kfac_approx``, with ASDL those of its Fisher configuration.
        seed: Seed for sampled labels, which are drawn anew in each sweep: what gives
            directions must not share its noise with what judges them.
        fisher_rank: As in
            :class:`~laplace_debiased.rows.output_curvature.OutputCurvature`.
        progress_bar: Whether to show a progress bar.

    Raises:
        ValueError: If there is an option that curvlinops' backends do not have.
    """

    backend: CurvatureInterface
    params: list[Tensor]
    options: dict[str, Any]
    seed: int
    fisher_rank: int | None = None
    progress_bar: bool = False

    def __post_init__(self):
        self._num_sweeps = 0
        unknown = self.options.keys() - _CURVLINOPS_OPTIONS
        if unknown and isinstance(self.backend, CurvlinopsInterface):
            raise ValueError(
                f"`asdl_fisher_kwargs` has {sorted(unknown)}, but the curvlinops "
                f"backends know {sorted(_CURVLINOPS_OPTIONS)}."
            )

    @property
    def takes_weights(self) -> bool:
        """Whether points may have weights, and give inputs by forward passes."""
        return isinstance(self.backend, CurvlinopsInterface)

    def kfacs(self, fold: Fold) -> tuple[list[Factors], SweepSummary]:
        """Compute K-FAC's factors.

        Args:
            fold: The points.

        Returns:
            The factors ``[G, A]`` or ``[G]`` of each parameter, G summed over the
            weighted points, and a summary with their negative log likelihood as the
            loss.

        Raises:
            ValueError: If data, layers or backend are not supported.
        """
        if not self.takes_weights:
            return self._kfacs_of_backend(fold.loader, fold.num_points)
        blocks = self._blocks()
        factors = KroneckerFactors(blocks, self._approximation)
        summary = self._sweep(fold.loader, blocks, factors, fold.weights)
        kfacs = factors.kfacs(self.params[0].dtype)
        return scale_gradients(kfacs, self.backend.factor), summary

    def survey(self, loader: Iterable) -> tuple[list[Factors], SweepSummary]:
        """Compute input covariances, losses and traces by forward passes alone.

        Args:
            loader: Yields the points.

        Returns:
            The factors of each parameter as in :meth:`kfacs`, with gradient covariances
            of zeros, and a summary.
        """
        blocks = self._blocks()
        factors = KroneckerFactors(blocks, self._approximation)
        summary = self._sweep(loader, blocks, factors, backward=False)
        return factors.kfacs(self.params[0].dtype), summary

    def directional_curvatures(
        self, fold: Fold, eigenvectors: list[Factors]
    ) -> tuple[list[Factors], SweepSummary]:
        """Measure exact curvature along given directions.

        Args:
            fold: The points.
            eigenvectors: Directions of each parameter.

        Returns:
            The curvatures of each parameter, summed over the weighted points, and a
            summary as in :meth:`kfacs`.

        Raises:
            ValueError: If data, layers or backend are not supported.
        """
        blocks = self._blocks()
        curvatures = DirectionalCurvatures(blocks, eigenvectors)
        summary = self._sweep(fold.loader, blocks, curvatures, fold.weights)
        eigenvalues = curvatures.eigenvalues(self.params[0].dtype)
        return scale_gradients(eigenvalues, self.backend.factor), summary

    def loss(self, fold: Fold) -> SweepSummary:
        """Compute the loss alone, by forward passes.

        Args:
            fold: The points.

        Returns:
            A summary as in :meth:`kfacs`.
        """
        return self._sweep(
            fold.loader, [], KroneckerFactors([]), fold.weights, backward=False
        )

    def output_curvature(self, loader: Iterable) -> Tensor:
        """Sum the curvature of the loss in the network's output, by forward passes.

        Args:
            loader: Yields the points.

        Returns:
            The sum ``[outputs, outputs]``, in double precision.

        Raises:
            ValueError: If inputs or targets are not valid.
        """
        backend, device = self.backend, self.params[0].device
        generator = Generator(device=device).manual_seed(self._next_seed())
        total = torch.zeros((), dtype=torch.float64, device=device)
        for batch in loader:
            X, y = self._checked_batch(batch)
            with torch.no_grad():
                output = backend.model(X)
            y = check_targets(output, y, backend.lossfunc)
            output, y = at_least_single(output), at_least_single(y)
            columns = self._output_curvature.columns(output, y, generator).double()
            total = total + torch.einsum("kni,knj->ij", columns, columns)
        return total

    @property
    def _output_curvature(self) -> OutputCurvature:
        fisher_type = (
            FisherType.EMPIRICAL
            if isinstance(self.backend, EFInterface)
            else getattr(self.backend, "_kron_fisher_type", FisherType.TYPE2)
        )
        return OutputCurvature(
            self.backend.lossfunc,
            FisherType(fisher_type).value,
            self.options.get("mc_samples", 1) if self.takes_weights else 1,
            self.fisher_rank,
        )

    def _checked_batch(self, batch: Any) -> tuple[Inputs, Tensor]:
        """Move a batch to the parameters' device."""
        X, y = split_batch(batch, self.backend.dict_key_y)
        device = self.params[0].device
        X, y = (X.to(device) if isinstance(X, Tensor) else X), y.to(device)
        check_finite_inputs(X)
        return X, y

    @property
    def _approximation(self) -> str:
        return self.options.get("kfac_approx", KFACType.EXPAND)

    @property
    def layers(self) -> list[str]:
        """Names of the layers."""
        return list(dict.fromkeys(block.layer.name for block in self._blocks()))

    def _next_seed(self) -> int:
        self._num_sweeps += 1
        return mixed_seed(self.seed, self._num_sweeps)

    def _blocks(self) -> list:
        layers = find_layers(self.backend.model, self.params)
        return curvature_blocks(layers, separate_weight_and_bias=True)

    def _sweep(
        self,
        loader: Iterable,
        blocks: list,
        accumulator: Accumulator,
        weights: Tensor | None = None,
        backward: bool = True,
    ) -> SweepSummary:
        layers = list({block.layer.name: block.layer for block in blocks}.values())
        data = (split_batch(batch, self.backend.dict_key_y) for batch in loader)
        summary = sweep(
            self.backend.model,
            layers,
            tqdm(
                data, "[Computing Hessian]", len(loader), disable=not self.progress_bar
            ),
            self._output_curvature,
            accumulator,
            weights=weights,
            backward=backward,
            seed=self._next_seed(),
        )
        factor = self.backend.factor
        return replace(
            summary,
            loss=factor * summary.loss,
            losses=factor * summary.losses,
            contributions=factor * accumulator.contributions.matrix(),
        )

    def _kfacs_of_backend(
        self, loader: Iterable, num_data: int
    ) -> tuple[list[Factors], SweepSummary]:
        """Sum what the backend computes for each batch."""
        backend = self.backend
        reinstall_hooks(backend)
        device, dtype = self.params[0].device, self.params[0].dtype
        total = Kron.init_from_model(self.params, device, dtype)
        loss = torch.zeros((), device=device, dtype=dtype)
        num_outputs = 0
        for batch in tqdm(loader, "[Computing Hessian]", disable=not self.progress_bar):
            X, y = self._checked_batch(batch)
            if isinstance(X, MutableMapping) and isinstance(backend, BackPackInterface):
                raise ValueError(
                    "The BackPACK backends do not support dict-like inputs."
                )
            with torch.no_grad():
                output = backend.model(X)
            y = check_targets(output, y, backend.lossfunc)
            num_outputs = output.shape[-1]
            batch_loss, batch_kron = backend.kron(X, y, N=num_data, **self.options)
            total += Kron(self._aligned(batch_kron.kfacs))
            loss = loss + batch_loss.detach()
        return total.kfacs, SweepSummary(num_data, num_data, loss, num_outputs)

    def _aligned(self, kfacs: list[Factors]) -> list[Factors]:
        """Select the factors of the parameters that take part, in their order.

        Raises:
            ValueError: If the backend has no factors for a parameter.
        """
        if isinstance(self.backend, AsdlInterface):
            # ASDL returns frozen parameters, too
            owners = [
                param
                for module in self.backend.model.modules()
                if getattr(module, "fisher", None) is not None
                for param in (module.weight, getattr(module, "bias", None))
                if param is not None
            ]
            of = {id(p): kfac for p, kfac in zip(owners, kfacs, strict=True)}
            kfacs = [of[id(param)] for param in self.params if id(param) in of]
        sizes = [torch.Size([len(f) for f in kfac]).numel() for kfac in kfacs]
        if sizes != [param.numel() for param in self.params]:
            raise ValueError(
                f"{type(self.backend).__name__} has no Kronecker factors for some "
                "parameters: their layers are not supported by it. Exclude them by "
                "`requires_grad_(False)`, or use the default backend."
            )
        return kfacs


def reinstall_hooks(backend: CurvatureInterface) -> None:
    """Make sure that BackPACK's hooks are where it believes them to be.

    A prediction by any BackPACK backend removes the hooks of all models, but leaves
    the marks by which BackPACK knows that it had installed them.

    Args:
        backend: The backend; nothing happens unless it is BackPACK's.
    """
    if not isinstance(backend, BackPackInterface):
        return
    for extended in (backend._model, backend.lossfunc):
        for module in extended.modules():
            module._backpack_extend = any(
                getattr(hook, "__module__", "").startswith("backpack")
                for hook in module._forward_hooks.values()
            )
        extend(extended)
