"""Debiased K-FAC as a linear operator, in curvlinops' conventions.

The top eigenvectors of a mini-batch's curvature are extreme for that batch only, so
curvature along them is overestimated. Debiasing takes *directions* (eigenvectors) from
one data source and *magnitudes* (directional curvatures) from another:

- Tatzel, L., Mucsányi, B., Hackel, O., Hennig, P. (2024). Debiasing Mini-Batch
  Quadratics for Applications in Deep Learning (arXiv 2410.14325), Section 4.2.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from curvlinops import FisherType, KFACType
from curvlinops._torch_base import CurvatureLinearOperator, PyTorchLinearOperator
from torch import Tensor, nn

from laplace_debiased.curvature.eigenbasis import (
    Factors,
    decompose,
    from_eigenbasis,
    project,
    spectrum,
    to_eigenbasis,
)
from laplace_debiased.curvature.factors import DirectionalCurvatures, KroneckerFactors
from laplace_debiased.rows.layers import Block, curvature_blocks
from laplace_debiased.rows.model_state import check_repeatable
from laplace_debiased.rows.output_curvature import Loss, OutputCurvature
from laplace_debiased.rows.seeds import mixed_seed
from laplace_debiased.rows.selection import find_layers
from laplace_debiased.rows.sweep import Inputs, sweep

MAGNITUDES = ("kfac", "ggn")

Data = Iterable[tuple[Inputs, Tensor]]


def check_magnitudes(magnitudes: str) -> None:
    """Refuse an unknown kind of magnitudes.

    Args:
        magnitudes: The kind.

    Raises:
        ValueError: If it is not known.
    """
    if magnitudes not in MAGNITUDES:
        raise ValueError(
            f"`magnitudes` must be one of {list(MAGNITUDES)}, got {magnitudes!r}."
        )


def apply_spectra(
    blocks: list[Block],
    eigenvectors: list[Factors],
    spectra: list[Tensor],
    M: list[Tensor],
) -> list[Tensor]:
    """Multiply a block-diagonal matrix, given by its eigendecomposition.

    Args:
        blocks: The blocks.
        eigenvectors: Eigenvectors of each block.
        spectra: Eigenvalues of each block, of the block's shape.
        M: Matrix in tensor list format, ``[*param.shape, columns]`` for each parameter.

    Returns:
        The product, in the same format.
    """
    product: list[Tensor | None] = [None] * len(M)
    for block, vectors, values in zip(blocks, eigenvectors, spectra, strict=True):
        parts = [M[position].movedim(-1, 0) for position in block.positions]
        columns = [p.reshape(len(p), *block.shape[:-1], -1) for p in parts]
        matrix = torch.cat(columns, dim=-1)
        matrix = from_eigenbasis(to_eigenbasis(matrix, vectors) * values, vectors)
        columns = matrix.split([column.shape[-1] for column in columns], dim=-1)
        for position, part, column in zip(block.positions, parts, columns, strict=True):
            product[position] = column.reshape(part.shape).movedim(0, -1)
    return product


class EigenbasisLinearOperator(PyTorchLinearOperator):
    """A symmetric operator, given by its eigendecomposition.

    Args:
        params: The parameters it acts on.
        blocks: Its diagonal blocks.
        eigenvectors: Eigenvectors of each block.
        spectra: Eigenvalues of each block, of the block's shape.
    """

    SELF_ADJOINT = True

    def __init__(
        self,
        params: list[Tensor],
        blocks: list[Block],
        eigenvectors: list[Factors],
        spectra: list[Tensor],
    ):
        shapes = [tuple(param.shape) for param in params]
        super().__init__(shapes, shapes)
        self._blocks, self._eigenvectors = blocks, eigenvectors
        self._spectra = spectra

    def _matmat(self, M: list[Tensor]) -> list[Tensor]:
        return apply_spectra(self._blocks, self._eigenvectors, self._spectra, M)

    @property
    def device(self) -> torch.device:
        """The operator's device."""
        return self._spectra[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The operator's dtype."""
        return self._spectra[0].dtype


class DebiasedKFACLinearOperator(CurvatureLinearOperator):
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
    changes afterwards, build a new operator.

    Args:
        model_func: The neural network, with output ``[batch, outputs]``. Its mode
            (train or eval) is left as it is; layers with batch statistics or dropout
            must be in eval mode.
        loss_func: ``MSELoss``, ``CrossEntropyLoss`` or ``BCEWithLogitsLoss`` with
            reduction ``"sum"`` or ``"mean"`` (over the magnitude data).
        params: The parameters that the operator acts on.
        direction_data: Batches ``(X, y)`` that give the eigenvectors.
        magnitude_data: Batches ``(X, y)`` that give the eigenvalues.
        magnitudes: ``"kfac"`` or ``"ggn"``.
        fisher_type: ``"type-2"``, ``"mc"`` or ``"empirical"``, as in curvlinops.
        mc_samples: Number of sampled labels for each example with ``"mc"``.
        fisher_rank: With ``"type-2"``, number of columns of the output curvature's
            square root to keep for each example, the largest ones; one more stands for
            the others, without bias. None for all.
        kfac_approx: ``"expand"`` or ``"reduce"``, for weight-sharing layers.
        separate_weight_and_bias: Whether weight and bias are blocks of their own.
        direction_weights: A weight for each direction example ``[examples]``, in the
            order of the data. A weight of two counts an example twice.
        magnitude_weights: A weight for each magnitude example.
        seed: Seed for sampled labels, which differ between the two sources.
        progressbar: Whether to show progress bars.

    Raises:
        ValueError: If an argument is not supported.
    """

    SELF_ADJOINT = True

    def __init__(
        self,
        model_func: nn.Module,
        loss_func: Loss,
        params: list[Tensor],
        direction_data: Data,
        magnitude_data: Data,
        *,
        magnitudes: str = "kfac",
        fisher_type: str = FisherType.TYPE2,
        mc_samples: int = 1,
        fisher_rank: int | None = None,
        kfac_approx: str = KFACType.EXPAND,
        separate_weight_and_bias: bool = True,
        direction_weights: Tensor | None = None,
        magnitude_weights: Tensor | None = None,
        seed: int = 2147483647,
        progressbar: bool = False,
    ):
        check_magnitudes(magnitudes)
        self._output_curvature = OutputCurvature(
            loss_func, fisher_type, mc_samples, fisher_rank
        )
        self._layers = find_layers(model_func, params)
        self._blocks = curvature_blocks(self._layers, separate_weight_and_bias)
        KroneckerFactors(self._blocks, kfac_approx)  # refuses an unknown `kfac_approx`
        self._magnitudes = magnitudes
        self._kfac_approx = kfac_approx
        self._separate_weight_and_bias = separate_weight_and_bias
        self._direction_data, self._direction_weights = (
            direction_data,
            direction_weights,
        )
        self._magnitude_weights = magnitude_weights
        self._seed = seed
        self._eigenvectors: list[Factors] | None = None
        self._eigenvalues: list[Factors] | None = None
        self._num_data: int | None = None

        # curvlinops' own constructor reads the data up to twice, to count them
        self._model_func, self._loss_func = model_func, loss_func
        self._params, self._data = list(params), magnitude_data
        self._progressbar = progressbar
        shapes = self._get_in_shape()
        PyTorchLinearOperator.__init__(self, shapes, shapes)

    def compute(self) -> None:
        """Compute eigenvectors and eigenvalues, by one pass over each source.

        Raises:
            ValueError: If data or weights are not valid, or the network mixes examples
                or is random.
        """
        check_repeatable(self._model_func)
        directions = KroneckerFactors(self._blocks, self._kfac_approx)
        self._sweep(
            self._direction_data, directions, self._direction_weights, "Directions", 0
        )
        eigenvectors = decompose(directions.kfacs(self.dtype))

        if self._magnitudes == "kfac":
            magnitudes = KroneckerFactors(self._blocks, self._kfac_approx)
        else:
            magnitudes = DirectionalCurvatures(self._blocks, eigenvectors)
        summary = self._sweep(
            self._data, magnitudes, self._magnitude_weights, "Magnitudes", 1
        )
        if self._magnitudes == "kfac":
            eigenvalues = project(magnitudes.kfacs(self.dtype), eigenvectors)
        else:
            eigenvalues = magnitudes.eigenvalues(self.dtype)
        if self._loss_func.reduction == "mean":
            for values in eigenvalues:
                values[0] /= summary.total_weight

        self._eigenvectors, self._eigenvalues = (
            [[tensor.to(self.dtype) for tensor in block] for block in blocks]
            for blocks in (eigenvectors, eigenvalues)
        )
        self._num_data = summary.num_data

    def _sweep(self, data, accumulator, weights, description, index):
        return sweep(
            self._model_func,
            self._layers,
            data,
            self._output_curvature,
            accumulator,
            weights=weights,
            seed=mixed_seed(self._seed, index),
            progress_bar=self._progressbar,
            description=description,
        )

    def _maybe_compute(self) -> None:
        if self._eigenvalues is None:
            self.compute()

    def _get_normalization_factor(self, X: Inputs, y: Tensor) -> float:
        if self._loss_func.reduction == "sum":
            return 1.0
        self._maybe_compute()
        return len(y) / self._num_data

    @property
    def eigenvectors(self) -> list[Factors]:
        """Eigenvectors of each block: ``[U_G, U_A]``, or ``[U_G]`` for a bias."""
        self._maybe_compute()
        return self._eigenvectors

    @property
    def spectra(self) -> list[Tensor]:
        """Eigenvalues of each block, ``[d_out, d_in]`` or ``[d_out]``."""
        self._maybe_compute()
        return [spectrum(values) for values in self._eigenvalues]

    def _matmat(self, M: list[Tensor]) -> list[Tensor]:
        return apply_spectra(self._blocks, self.eigenvectors, self.spectra, M)

    @property
    def trace(self) -> Tensor:
        """Trace of the operator."""
        return sum(values.sum() for values in self.spectra)

    @property
    def det(self) -> Tensor:
        """Determinant of the operator."""
        return torch.stack([values.prod() for values in self.spectra]).prod()

    @property
    def logdet(self) -> Tensor:
        """Log determinant of the operator, minus infinity if it is singular."""
        return sum(values.log().sum() for values in self.spectra)

    @property
    def frobenius_norm(self) -> Tensor:
        """Frobenius norm of the operator."""
        return sum(values.square().sum() for values in self.spectra).sqrt()

    def inverse(self, damping: float = 0.0) -> EigenbasisLinearOperator:
        """Invert the damped operator.

        Args:
            damping: Added to each eigenvalue.

        Returns:
            The inverse of the operator plus ``damping`` times the identity.

        Raises:
            ValueError: If the damped operator is not positive definite.
        """
        damped = [values + damping for values in self.spectra]
        smallest = min(values.min().item() for values in damped)
        if smallest <= 0:
            raise ValueError(
                f"`damping` must make all eigenvalues positive, got {damping}, which "
                f"leaves {smallest}."
            )
        return EigenbasisLinearOperator(
            self._params,
            self._blocks,
            self.eigenvectors,
            [values.reciprocal() for values in damped],
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what was computed, and by which settings.

        Returns:
            A dictionary of plain values and tensors, without the model.
        """
        self._maybe_compute()
        return {
            "settings": self._settings(),
            "eigenvectors": self._eigenvectors,
            "eigenvalues": self._eigenvalues,
            "num_data": self._num_data,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what another operator computed.

        Args:
            state_dict: From :meth:`state_dict`.

        Raises:
            ValueError: If settings or shapes differ.
        """
        settings = self._settings()
        if state_dict["settings"] != settings:
            raise ValueError(
                f"`state_dict` was computed with {state_dict['settings']}, this "
                f"operator has {settings}."
            )
        eigenvectors = state_dict["eigenvectors"]
        shapes = [tuple(len(v) for v in vectors) for vectors in eigenvectors]
        expected = [block.shape for block in self._blocks]
        if shapes != expected:
            raise ValueError(
                f"`state_dict` has blocks of shapes {shapes}, the model {expected}."
            )
        self._eigenvectors = eigenvectors
        self._eigenvalues = state_dict["eigenvalues"]
        self._num_data = state_dict["num_data"]

    def _settings(self) -> dict[str, Any]:
        return {
            "loss": type(self._loss_func).__name__,
            "reduction": self._loss_func.reduction,
            "magnitudes": self._magnitudes,
            "fisher_type": str(FisherType(self._output_curvature.fisher_type).value),
            "mc_samples": self._output_curvature.mc_samples,
            "fisher_rank": self._output_curvature.fisher_rank,
            "kfac_approx": str(KFACType(self._kfac_approx).value),
            "separate_weight_and_bias": self._separate_weight_and_bias,
            "seed": self._seed,
        }
