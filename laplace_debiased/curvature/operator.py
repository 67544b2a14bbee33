"""Debiased K-FAC as a linear operator, in curvlinops' conventions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from laplace_debiased.curvature import operator_state
from laplace_debiased.curvature.curvlinops_adapter import (
    EigenbasisLinearOperator,
    LinearOperator,
    block_positions,
)
from laplace_debiased.curvature.debias import (
    Debiased,
    project,
    scale_gradients,
    two_batch,
)
from laplace_debiased.curvature.directional import DirectionalCurvatures
from laplace_debiased.curvature.factors import (
    APPROXIMATIONS,
    EXPAND,
    KroneckerFactors,
    is_joint,
)
from laplace_debiased.curvature.gradient import gradient_and_loss
from laplace_debiased.curvature.kronecker import Kronecker, Spectrum
from laplace_debiased.curvature.streams import CURVATURE_TYPES
from laplace_debiased.rows.batches import with_examples
from laplace_debiased.rows.checks import check_choice
from laplace_debiased.rows.inputs import Batch, on_device
from laplace_debiased.rows.layers import Layer
from laplace_debiased.rows.model_state import check_repeatable, unchanged_on_failure
from laplace_debiased.rows.output_curvature import (
    TYPE_2,
    Loss,
    OutputCurvature,
    ends_in_link,
    loss_scale,
)
from laplace_debiased.rows.positions import standalone
from laplace_debiased.rows.seeds import mixed_seed
from laplace_debiased.rows.selection import find_layers
from laplace_debiased.rows.sweep import Accumulator, SweepSummary, sweep
from laplace_debiased.rows.user_warnings import warn_user


class DebiasedKFACLinearOperator(LinearOperator):
    r"""K-FAC with eigenvectors from one data source and eigenvalues from another.

    For each layer, K-FAC on the direction data gives :math:`G \otimes A` with
    eigenvectors :math:`U = U_G \otimes U_A`. The operator is :math:`U \mathrm{diag}
    (\lambda) U^\top` with directional curvatures :math:`\lambda` on the magnitude data:

    - ``"kfac"``: :math:`\lambda_{ij} = (u_{G,i}^\top \tilde G u_{G,i})
      (u_{A,j}^\top \tilde A u_{A,j})`, along the K-FAC approximation of the magnitude
      data (arXiv 2410.14325);
    - ``"ggn"``: :math:`\lambda_{ij} = u^\top \tilde H u` with :math:`u = u_{G,i}
      \otimes u_{A,j}`, along the layer's exact GGN block.

    With the same data in both roles these are K-FAC and EKFAC. Each source is iterated
    over once, when the operator is first used or by :meth:`compute`; if the model
    changes afterwards, build a new operator. Unsupported uses of the parameters are
    refused then, since it takes a run of the network to see them.

    Args:
        model_func: The neural network, with output ``[batch, outputs]``. Its mode
            (train or eval) is left as it is; layers with batch statistics or dropout
            must be in eval mode.
        loss_func: ``MSELoss``, ``CrossEntropyLoss`` or ``BCEWithLogitsLoss`` with
            reduction ``"sum"`` or ``"mean"`` (over the magnitude data). Label smoothing
            counts; examples whose class is ``ignore_index`` do not, as if their weight
            were zero. Class weights are refused.
        params: The parameters that the operator acts on.
        direction_data: Batches ``(X, y)`` that give the eigenvectors.
        magnitude_data: Batches ``(X, y)`` that give the eigenvalues.
        magnitudes: ``"kfac"`` or ``"ggn"``.
        fisher_type: ``"type-2"``, ``"mc"`` or ``"empirical"``, as in curvlinops.
        mc_samples: Number of sampled labels for each example with ``"mc"``.
        fisher_rank: With ``"type-2"``, number of columns of the output curvature's
            square root to keep for each example, the largest ones; one more, the sum of
            the others by random signs, stands for them without bias. None for all.
        kfac_approx: ``"expand"`` or ``"reduce"``, for weight-sharing layers.
        separate_weight_and_bias: Whether weight and bias are blocks of their own.
        direction_weights: A weight for each direction example ``[examples]``, in the
            order of the data. A weight of two counts an example twice.
        magnitude_weights: A weight for each magnitude example, in the gradient, too.
        seed: Seed for sampled labels, which differ between the two sources.
        progressbar: Whether to show progress bars (curvlinops' name).

    Raises:
        ValueError: If an argument is not supported.

    Example:
        The trace of exact curvatures is exact, whatever points gave the directions:

        >>> import torch
        >>> from curvlinops import GGNLinearOperator
        >>> from laplace_debiased import DebiasedKFACLinearOperator
        >>> _ = torch.manual_seed(0)
        >>> model, loss = torch.nn.Linear(3, 2), torch.nn.CrossEntropyLoss()
        >>> params = list(model.parameters())
        >>> first, second = (
        ...     [(torch.randn(20, 3), torch.randint(2, (20,)))] for _ in range(2)
        ... )
        >>> debiased = DebiasedKFACLinearOperator(
        ...     model, loss, params, first, second, magnitudes="ggn"
        ... )
        >>> exact = GGNLinearOperator(model, loss, params, second) @ torch.eye(8)
        >>> torch.allclose(debiased.trace, exact.trace())
        True
        >>> inverse = debiased.inverse(damping=0.1)
        >>> torch.allclose(inverse @ (debiased @ exact + 0.1 * exact), exact, atol=1e-4)
        True
    """

    SELF_ADJOINT = True

    def __init__(
        self,
        model_func: nn.Module,
        loss_func: Loss,
        params: Sequence[Tensor],
        direction_data: Iterable[Batch],
        magnitude_data: Iterable[Batch],
        *,
        magnitudes: str = "kfac",
        fisher_type: str = TYPE_2,
        mc_samples: int = 1,
        fisher_rank: int | None = None,
        kfac_approx: str = EXPAND,
        separate_weight_and_bias: bool = True,
        direction_weights: Tensor | None = None,
        magnitude_weights: Tensor | None = None,
        seed: int = 2147483647,
        progressbar: bool = False,
    ):
        check_choice("magnitudes", magnitudes, CURVATURE_TYPES)
        check_choice("kfac_approx", kfac_approx, APPROXIMATIONS)
        self._output_curvature = OutputCurvature(
            loss_func, fisher_type, mc_samples, fisher_rank
        )
        self._model_func, self._loss_func = model_func, loss_func
        self._params = list(params)
        if not self._params:
            raise ValueError("`params` is empty: there is nothing to act on.")
        self._magnitudes, self._kfac_approx = magnitudes, kfac_approx
        self._joint = not separate_weight_and_bias
        self._data = {"Directions": direction_data, "Magnitudes": magnitude_data}
        self._weights = {
            "Directions": direction_weights,
            "Magnitudes": magnitude_weights,
        }
        self._seed, self._progress_bar = seed, progressbar
        self._layers: list[Layer] = []
        self._debiased: Debiased | None = None
        self._product: EigenbasisLinearOperator | None = None
        shapes = [tuple(param.shape) for param in self._params]
        super().__init__(shapes, shapes)

    @standalone
    def compute(self) -> None:
        """Compute eigenvectors and eigenvalues, by one pass over each source.

        Raises:
            ValueError: If data or weights are not valid, a parameter is not supported,
                or the network mixes examples or is random.
        """
        check_repeatable(self._model_func)
        data = iter(self._data["Directions"])
        first = list(_first(data))
        with unchanged_on_failure(self):
            for X, y in first:
                X = on_device(X, self.device)
                self._layers = find_layers(self._model_func, self._params, X, len(y))
            accumulator = self._kronecker_factors()
            self._sweep("Directions", chain(first, data), accumulator)
            factors = accumulator.factors()
            self._debiased = two_batch(factors, lambda own, _: self._measure(own))
            self._product = None

    def _kronecker_factors(self) -> KroneckerFactors:
        return KroneckerFactors(
            self._layers, self._params, self._kfac_approx, self._joint
        )

    def _measure(self, directions: list[Kronecker]) -> list[Kronecker] | list[Spectrum]:
        """Measure the magnitude data along directions."""
        data = self._data["Magnitudes"]
        if self._magnitudes == "kfac":
            factors = self._kronecker_factors()
            scale = self._scale(self._sweep("Magnitudes", data, factors))
            return scale_gradients(project(factors.factors(), directions), scale)
        curvatures = DirectionalCurvatures(self._layers, directions, self._joint)
        scale = self._scale(self._sweep("Magnitudes", data, curvatures))
        return [own.map(partial(torch.mul, scale)) for own in curvatures.spectra()]

    def _scale(self, summary: SweepSummary) -> float:
        """Factor from sums over the magnitude data to the loss."""
        if summary.are_probabilities:
            warn_user(ends_in_link(self._loss_func))
        return loss_scale(self._loss_func, summary.total_weight)

    def _sweep(
        self, role: str, data: Iterable[Batch], accumulator: Accumulator
    ) -> SweepSummary:
        source = self._data[role]
        return sweep(
            self._model_func,
            self._params,
            self._layers,
            data,
            self._output_curvature,
            accumulator,
            weights=self._weights[role],
            seed=mixed_seed(self._seed, list(self._data).index(role)),
            progress_bar=self._progress_bar,
            description=role,
            num_points=_num_points(source),
        )

    def _computed(self) -> Debiased:
        if self._debiased is None:
            self.compute()
        assert self._debiased is not None
        return self._debiased

    @property
    def device(self) -> torch.device:
        """The operator's device."""
        return self._params[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The operator's dtype."""
        return self._params[0].dtype

    def _layer_spectra(self) -> list[list[Tensor]]:
        """Eigenvalues of the blocks of each layer, the matrix's first."""
        magnitudes = self._computed().magnitudes
        return [
            [values.to(self.dtype) for values in self._own_spectra(layer, own)]
            for layer, own in zip(self._layers, magnitudes, strict=True)
        ]

    def _own_spectra(self, layer: Layer, own: Kronecker | Spectrum) -> list[Tensor]:
        if isinstance(own, Spectrum):
            return own.tensors()
        outer, *inner = own.tensors()
        spectra = [torch.outer(outer, values) for values in inner]
        if layer.vector is not None and not is_joint(layer, self._joint):
            spectra.append(outer)
        return spectra

    def _ordered(self, of_layers: list[list[Any]]) -> list[Any]:
        """Order what belongs to the blocks of each layer by their first parameter."""
        first = [
            positions[0]
            for layer, own in zip(self._layers, of_layers, strict=True)
            for positions in block_positions(layer, len(own) == 1)
        ]
        flat = [item for own in of_layers for item in own]
        return [flat[k] for k in sorted(range(len(flat)), key=first.__getitem__)]

    @property
    def eigenvectors(self) -> list[list[Tensor]]:
        """Eigenvectors of each block: ``[U_G, U_A]``, or ``[U_G]`` for a bias."""
        directions = self._computed().directions
        spectra = self._layer_spectra()
        return self._ordered(
            [
                [vectors.tensors()[: values.ndim] for values in own]
                for vectors, own in zip(directions, spectra, strict=True)
            ]
        )

    @property
    def spectra(self) -> list[Tensor]:
        """Eigenvalues of each block, ``[d_out, d_in]`` or ``[d_out]``."""
        return self._ordered(self._layer_spectra())

    def _with_spectra(self, spectra: list[list[Tensor]]) -> EigenbasisLinearOperator:
        vectors = [
            own.map(lambda tensor: tensor.to(self.dtype))
            for own in self._computed().directions
        ]
        return EigenbasisLinearOperator(self._params, self._layers, vectors, spectra)

    def _matmat(self, M: list[Tensor]) -> list[Tensor]:
        if self._product is None:
            self._product = self._with_spectra(self._layer_spectra())
        return self._product._matmat(M)

    @property
    def trace(self) -> Tensor:
        """Trace of the operator."""
        return torch.stack([values.sum() for values in self.spectra]).sum()

    @property
    def det(self) -> Tensor:
        """Determinant of the operator."""
        return torch.stack([values.prod() for values in self.spectra]).prod()

    @property
    def logdet(self) -> Tensor:
        """Log determinant of the operator, minus infinity if it is singular."""
        return torch.stack([values.log().sum() for values in self.spectra]).sum()

    @property
    def frobenius_norm(self) -> Tensor:
        """Frobenius norm of the operator."""
        squares = [values.square().sum() for values in self.spectra]
        return torch.stack(squares).sum().sqrt()

    def inverse(self, damping: float = 0.0) -> EigenbasisLinearOperator:
        """Invert the damped operator.

        Args:
            damping: Added to each eigenvalue.

        Returns:
            The inverse of the operator plus ``damping`` times the identity.

        Raises:
            ValueError: If the damped operator is not positive definite.
        """
        damped = [[values + damping for values in own] for own in self._layer_spectra()]
        smallest = min(values.min().item() for own in damped for values in own)
        if smallest <= 0:
            raise ValueError(
                f"`damping` must make all eigenvalues positive, got {damping}, which "
                f"leaves {smallest}."
            )
        return self._with_spectra([[v.reciprocal() for v in own] for own in damped])

    @standalone
    def gradient_and_loss(self) -> tuple[list[Tensor], Tensor]:
        """Compute gradient and loss on the magnitude data, as curvlinops does.

        With weights they are those of the quadratic that the operator belongs to.

        Returns:
            The gradient in each parameter, and the loss.
        """
        data, weights = self._data["Magnitudes"], self._weights["Magnitudes"]
        return gradient_and_loss(
            self._model_func, self._loss_func, self._params, data, weights
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what was computed, and by which settings.

        Returns:
            A dictionary of plain values and tensors, without the model.
        """
        return operator_state.state_dict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what another operator computed.

        Args:
            state_dict: From :meth:`state_dict`.

        Raises:
            ValueError: If format, settings or shapes differ.
        """
        operator_state.load(self, state_dict)


def _num_points(source: Iterable[Batch]) -> int | None:
    """Return the number of points, unless it takes reading them."""
    if isinstance(source, list | tuple):
        return sum(len(y) for _, y in source)
    return None


def _first(data: Iterator[Batch]) -> Iterator[Batch]:
    """Yield the first batch with examples, if there is one."""
    for batch in with_examples(data):
        yield batch
        return
