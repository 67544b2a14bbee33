r"""Debiased mini-batch curvature for laplace-torch.

Directions come from one mini-batch, magnitudes from another (arXiv 2410.14325).
Importing the package registers the structure ``"kron_debiased"`` with laplace-torch.
"""

from laplace import Laplace

from laplace_debiased.curvature.eigenbasis import EigenbasisMatrix
from laplace_debiased.curvature.operator import DebiasedKFACLinearOperator
from laplace_debiased.curvature.scores import curvature_scores
from laplace_debiased.posterior.laplace import KronDebiasedLaplace
from laplace_debiased.posterior.last_layer import KronDebiasedLLLaplace
from laplace_debiased.quadratics.bias import bias_report
from laplace_debiased.quadratics.cg import CGResult, cg, debiased_cg
from laplace_debiased.quadratics.derivatives import (
    DirectionalDerivatives,
    directional_derivatives,
)
from laplace_debiased.quadratics.eigenspace import (
    Eigenspace,
    overlap,
    principal_angles,
    top_eigenspace,
)
from laplace_debiased.quadratics.eigenspace_comparison import (
    EigenspaceComparison,
    compare_eigenspaces,
)
from laplace_debiased.quadratics.optimizer import DebiasedCG
from laplace_debiased.quadratics.report import BiasReport, Comparison
from laplace_debiased.sampling.draw import draw_points

__version__ = "0.1.0"

__all__ = [
    "BiasReport",
    "CGResult",
    "Comparison",
    "DebiasedCG",
    "DebiasedKFACLinearOperator",
    "DirectionalDerivatives",
    "EigenbasisMatrix",
    "Eigenspace",
    "EigenspaceComparison",
    "KronDebiasedLLLaplace",
    "KronDebiasedLaplace",
    "Laplace",
    "__version__",
    "bias_report",
    "cg",
    "compare_eigenspaces",
    "curvature_scores",
    "debiased_cg",
    "directional_derivatives",
    "draw_points",
    "overlap",
    "principal_angles",
    "top_eigenspace",
]
