r"""Output variances as a function of the prior precision.

With :math:`u = \log \delta`, the logarithm of a variance :math:`\sum_i a_i /
(\lambda_i + e^u)` with :math:`a_i \geq 0` is analytic for :math:`|\mathrm{Im}\, u| <
\pi`, whatever the eigenvalues are. Interpolated from n Chebyshev nodes on an interval
of length 2L in u, its error falls like :math:`\rho^{-n}` with :math:`\log \rho =
\mathrm{asinh}(\pi / L)` (Trefethen, 2013, Theorem 8.2): a pass that computes the
variances at few prior precisions tells them at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import asinh, ceil, log, pi

import numpy as np
import torch
from numpy.polynomial import chebyshev
from torch import Tensor

TOLERANCE = 1e-4


@dataclass(frozen=True)
class PriorInterval:
    """An interval of prior precisions, and the nodes to interpolate from.

    Args:
        low: The smallest prior precision.
        high: The largest.
        tolerance: Relative error of interpolated variances, about.
    """

    low: float
    high: float
    tolerance: float = TOLERANCE

    @property
    def nodes(self) -> list[float]:
        """The prior precisions at which variances are to be computed, K of them."""
        center, half = self._center_and_half
        points = chebyshev.chebpts1(self._count)
        return np.exp(center + half * points).tolist()

    @property
    def _center_and_half(self) -> tuple[float, float]:
        ends = log(self.low), log(self.high)
        return sum(ends) / 2, max((ends[1] - ends[0]) / 2, 1e-3)

    @property
    def _count(self) -> int:
        _, half = self._center_and_half
        return max(2, 1 + ceil(-log(self.tolerance) / asinh(pi / half)))

    def at(self, variances: Tensor, prior_precision: Tensor) -> Tensor:
        """Interpolate variances.

        Args:
            variances: Variances at the nodes ``[..., K]``.
            prior_precision: Prior precisions, a scalar or ``[grid]``, which may require
                gradients.

        Returns:
            Variances ``[...]`` or ``[..., grid]``.

        Raises:
            ValueError: If a prior precision lies outside of the interval.
        """
        slack = 1 + 1e-6
        outside = (prior_precision * slack < self.low) | (
            prior_precision > self.high * slack
        )
        if outside.any():
            raise ValueError(
                f"Prior precisions must lie in [{self.low:g}, {self.high:g}], got "
                f"{prior_precision.min().item():g}..{prior_precision.max().item():g}."
            )
        tiny = torch.finfo(variances.dtype).tiny
        logs = variances.clamp(min=tiny).log()
        return (logs @ self._weights(prior_precision).to(logs)).exp()

    def _weights(self, prior_precision: Tensor) -> Tensor:
        """Weights of the nodes ``[K(, grid)]``: sums of Chebyshev polynomials."""
        center, half = self._center_and_half
        count = self._count
        nodes = torch.as_tensor(chebyshev.chebpts1(count))
        orders = torch.arange(count, dtype=torch.float64)
        # T_k at the nodes, orthogonal there
        values = torch.cos(orders[:, None] * nodes.arccos())  # [k, K]
        scaled = values * (2 / count)
        scaled[0] /= 2
        x = ((prior_precision.double().log() - center) / half).clamp(-1, 1)
        polynomials = [torch.ones_like(x), x]
        while len(polynomials) < count:
            polynomials.append(2 * x * polynomials[-1] - polynomials[-2])
        # [k, K] and [k, grid] -> [K, grid]
        return torch.tensordot(
            scaled.to(x.device), torch.stack(polynomials), ([0], [0])
        )
