"""Sources of curvature: what measures it on given points."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import torch
from laplace.curvature import CurvatureInterface
from torch import Generator, Tensor, nn

from laplace_debiased.curvature.debias import Directions, Factors, scale_gradients
from laplace_debiased.curvature.decomposition import decompose
from laplace_debiased.curvature.directional import DirectionalCurvatures
from laplace_debiased.curvature.factors import EXPAND, KroneckerFactors
from laplace_debiased.curvature.kronecker import Kronecker, Spectrum
from laplace_debiased.posterior.upstream import (
    inputs_and_targets,
    loss_of,
    output_curvature,
)
from laplace_debiased.rows.inputs import (
    Inputs,
    at_least_single,
    check_finite_inputs,
    check_targets,
)
from laplace_debiased.rows.kept import KeptRows
from laplace_debiased.rows.layers import Layer
from laplace_debiased.rows.output_curvature import OutputCurvature
from laplace_debiased.rows.positions import class_axis_of, num_positions
from laplace_debiased.rows.substitution import run
from laplace_debiased.rows.sweep import Accumulator, SweepSummary, sweep
from laplace_debiased.rows.targets import arranged_targets
from laplace_debiased.sampling.folds import Fold
from laplace_debiased.sampling.processes import ALONE, Alone

# neighbouring positions of a point tell much the same
POOL_POSITIONS = 8
_OPTIONS = {"kfac_approx", "mc_samples"}


class Source(Protocol):
    """Measures curvature, loss and contributions, as weighted sums over points."""

    @property
    def layers(self) -> Sequence[Layer]:
        """The layers."""

    @property
    def params(self) -> Sequence[Tensor]:
        """The parameters that they are over."""

    @property
    def takes_weights(self) -> bool:
        """Whether points may differ in weight, and give inputs by forward passes."""

    def part(self, layers: Sequence[Layer], index: int) -> Source:
        """Return a source of some of the layers alone.

        What is drawn, and so what is measured of a layer, is as with all layers.

        Args:
            layers: The layers.
            index: The number of the part.

        Returns:
            The source.
        """

    def factors(self, fold: Fold, seed: int) -> tuple[Factors, SweepSummary]:
        """Compute K-FAC's factors.

        Args:
            fold: The points.
            seed: Seed for sampled labels.

        Returns:
            The factors of each layer, G summed over the weighted points and A averaged,
            and a summary with their negative log likelihood as the loss.
        """

    def gradients(self, fold: Fold, seed: int) -> tuple[Factors, SweepSummary]:
        """Compute gradient covariances alone.

        Args:
            fold: The points.
            seed: Seed for sampled labels.

        Returns:
            As :meth:`factors`, without input covariances.
        """

    def inputs(self, fold: Fold, seed: int) -> tuple[Factors, SweepSummary]:
        """Compute input covariances, losses and traces, by forward passes alone.

        Of many positions of a point, some are taken.

        Args:
            fold: The points.
            seed: Seed of the positions that are taken.

        Returns:
            As :meth:`factors`, without gradient covariances.
        """

    def curvatures(
        self, fold: Fold, directions: Directions, seed: int
    ) -> tuple[list[Spectrum], SweepSummary]:
        """Measure exact curvature along directions.

        Args:
            fold: The points.
            directions: Directions of each layer.
            seed: Seed for sampled labels.

        Returns:
            The curvatures of each layer, summed over the weighted points, and a summary
            as in :meth:`factors`.
        """

    def decompose(
        self, factors: Sequence[Kronecker]
    ) -> tuple[list[Kronecker], list[Kronecker]]:
        """Compute eigenvectors and eigenvalues of factors.

        Args:
            factors: Factors of each layer.

        Returns:
            As :func:`~laplace_debiased.curvature.decomposition.decompose`.
        """


@dataclass(frozen=True, eq=False)
class RowSource:
    """Measures curvature by the network's rows, as curvlinops' backends define it.

    Args:
        model: The network.
        params: The parameters.
        layers: The layers that they are in.
        backend: A curvlinops backend of laplace-torch, which gives loss and Fisher
            type.
        options: ``mc_samples`` and ``kfac_approx``, as in curvlinops.
        fisher_rank: As in
            :class:`~laplace_debiased.rows.output_curvature.OutputCurvature`.
        progress_bar: Whether to show progress bars.
        room: Bytes that rows may take which are kept for :meth:`curvatures` of the same
            folds, so that these need no passes.
        tolerance: How far large factors may be from what is decomposed.
        group: The processes among which points and decompositions are divided.
        among: All layers, if those that are measured are some of them.

    Raises:
        ValueError: If there is another option.
    """

    model: nn.Module
    params: Sequence[Tensor]
    layers: Sequence[Layer]
    backend: CurvatureInterface
    options: dict[str, Any]
    fisher_rank: int | None = None
    progress_bar: bool = False
    room: int = 0
    tolerance: float = 0.0
    group: Alone = ALONE
    among: Sequence[Layer] | None = None
    _kept: dict[Fold, tuple[KeptRows, SweepSummary | None]] = field(
        default_factory=dict, init=False
    )

    takes_weights = True

    def __post_init__(self) -> None:
        unknown = self.options.keys() - _OPTIONS
        if unknown:
            raise ValueError(
                f"`asdl_fisher_kwargs` has {sorted(unknown)}, but the curvlinops "
                f"backends know {sorted(_OPTIONS)}."
            )

    def part(self, layers: Sequence[Layer], index: int) -> RowSource:  # noqa: ARG002
        """See :meth:`Source.part`."""
        return replace(self, layers=layers, among=self.layers)

    def factors(self, fold: Fold, seed: int) -> tuple[Factors, SweepSummary]:
        """See :meth:`Source.factors`."""
        accumulator = self._kronecker_factors()
        summary = self._keeping_sweep(fold, accumulator, seed)
        return self._scaled(accumulator.factors()), summary

    def gradients(self, fold: Fold, seed: int) -> tuple[Factors, SweepSummary]:
        """See :meth:`Source.gradients`."""
        accumulator = self._kronecker_factors(takes_inputs=False)
        summary = self._keeping_sweep(fold, accumulator, seed)
        return self._scaled(accumulator.gradients()), summary

    def inputs(self, fold: Fold, seed: int) -> tuple[Factors, SweepSummary]:
        """See :meth:`Source.inputs`."""
        accumulator = self._kronecker_factors(takes_gradients=False)
        part = self._sweep(fold, accumulator, seed, backward=False)
        summary = self._whole(part, accumulator)
        return accumulator.inputs(), summary

    def curvatures(
        self, fold: Fold, directions: Directions, seed: int
    ) -> tuple[list[Spectrum], SweepSummary]:
        """See :meth:`Source.curvatures`."""
        accumulator = DirectionalCurvatures(self.layers, directions)
        if fold in self._kept:
            rows, part = self._kept.pop(fold)
            rows.replay(accumulator)
        else:
            part = self._sweep(fold, accumulator, seed)
        summary = self._whole(part, accumulator)
        factor = self.backend.factor
        spectra = [own.map(lambda v: factor * v) for own in accumulator.spectra()]
        return spectra, summary

    def _scaled(self, factors: Factors) -> Factors:
        return scale_gradients(factors, self.backend.factor)

    def decompose(
        self, factors: Sequence[Kronecker]
    ) -> tuple[list[Kronecker], list[Kronecker]]:
        """See :meth:`Source.decompose`."""
        return decompose(factors, self.tolerance, self.group.eighs)

    @property
    def _output_curvature(self) -> OutputCurvature:
        mc_samples = self.options.get("mc_samples", 1)
        return output_curvature(self.backend, mc_samples, self.fisher_rank)

    def _is_random(self, num_outputs: int) -> bool:
        """Tell whether labels are sampled, or columns added by random signs."""
        draws = self._output_curvature.draws(num_outputs)
        return draws or class_axis_of(self.model) is not None

    @property
    def _approximation(self) -> str:
        return self.options.get("kfac_approx", EXPAND)

    def _kronecker_factors(self, **takes: bool) -> KroneckerFactors:
        return KroneckerFactors(self.layers, self.params, self._approximation, **takes)

    def _keeping_sweep(
        self, fold: Fold, accumulator: KroneckerFactors, seed: int
    ) -> SweepSummary:
        """Make a pass, and keep its rows if there is room."""
        room = self.room - sum(rows.num_bytes for rows, _ in self._kept.values())
        if room <= 0:
            return self._whole(self._sweep(fold, accumulator, seed), accumulator)
        rows = KeptRows(accumulator, room, fold.num_points)
        part = self._sweep(fold, rows, seed)
        rows.release()
        if rows.is_complete:
            self._kept[fold] = rows, part
        return self._whole(part, accumulator)

    def _sweep(
        self, fold: Fold, accumulator: Accumulator, seed: int, backward: bool = True
    ) -> SweepSummary | None:
        """Make a pass over this process's part of a fold, if there is one."""
        is_thinned = not backward and self._approximation == EXPAND
        curvature = self._output_curvature
        # what is drawn depends on the batch, as do the signs of positions
        draws = is_thinned or curvature.is_random
        draws = draws or class_axis_of(self.model) is not None
        part = fold.part(self.group.rank, self.group.size, draws)
        if part is None:
            return None
        return sweep(
            self.model,
            self.params,
            self.layers,
            (inputs_and_targets(batch, self.backend) for batch in part.loader),
            curvature,
            accumulator,
            weights=part.weights,
            backward=backward,
            positions=POOL_POSITIONS if is_thinned else None,
            seed=seed,
            start=part.start,
            progress_bar=self.progress_bar,
            description="Computing Hessian",
            num_points=part.num_points,
            among=self.among,
        )

    def _whole(
        self,
        part: SweepSummary | None,
        accumulator: KroneckerFactors | DirectionalCurvatures,
    ) -> SweepSummary:
        """Put together what all processes have seen, in accumulator and summary."""
        factor = self.backend.factor
        if part is not None:
            part = replace(part, **cast("Any", accumulator.per_example()))
        accumulator.add_up(self.group.totals)
        parts = self.group.gathered(part, self.params[0].device)
        whole = SweepSummary.joined([own for own in parts if own is not None])
        assert whole.losses is not None
        contributions = whole.contributions
        return replace(
            whole,
            loss=factor * whole.loss,
            losses=factor * whole.losses,
            contributions=None if contributions is None else factor * contributions,
            is_random=self._is_random(whole.num_outputs),
        )


def checked_batches(
    model: nn.Module, loader: Iterable, backend: CurvatureInterface
) -> Iterator[tuple[Inputs, Tensor, Tensor]]:
    """Run a network on batches, and refuse what is not valid.

    Args:
        model: The network.
        loader: Yields the batches.
        backend: The backend, which gives the loss.

    Yields:
        Inputs, targets and outputs.

    Raises:
        ValueError: If inputs, outputs or targets are not valid.
    """
    for batch in loader:
        X, y = inputs_and_targets(batch, backend)
        check_finite_inputs(X)
        with torch.no_grad():
            output = run(model, X)
        y = arranged_targets(model, y, loss_of(backend))
        yield X, check_targets(output, y, loss_of(backend)), output


def total_output_curvature(
    model: nn.Module,
    loader: Iterable,
    backend: CurvatureInterface,
    curvature: OutputCurvature,
    seed: int,
) -> Tensor:
    """Sum the curvature of the loss in the network's output, by forward passes.

    Args:
        model: The network.
        loader: Yields the points.
        backend: The backend, which gives the loss.
        curvature: The curvature of a point's loss in the output.
        seed: Seed for sampled labels.

    Returns:
        The sum over points, and their positions if there are several, ``[outputs,
        outputs]``, in double precision.

    Raises:
        ValueError: If inputs or targets are not valid.
    """
    device = next(model.parameters()).device
    generator = Generator(device=device).manual_seed(seed)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for _, y, output in checked_batches(model, loader, backend):
        output, y = at_least_single(output), at_least_single(y)
        columns = curvature.columns(output, y, generator).double()
        # those of positions are apart: [columns, batch * positions, outputs]
        columns = columns.reshape(len(columns), len(y) * num_positions(y), -1)
        # [columns, points, outputs] -> [outputs, outputs]
        total = total + torch.einsum("kni,knj->ij", columns, columns)
    return total
