"""Debiased mini-batch curvature for laplace-torch.

Directions come from one mini-batch, magnitudes from another (arXiv 2410.14325).
Importing the package registers the structure ``"kron_debiased"`` with laplace-torch.
"""

from laplace import Laplace

from laplace_debiased.bias import BiasReport, bias_report
from laplace_debiased.cg import CGResult, cg, debiased_cg
from laplace_debiased.derivatives import (
    DirectionalDerivatives,
    directional_derivatives,
)
from laplace_debiased.eigenbasis import EigenbasisMatrix
from laplace_debiased.eigenspace import overlap, principal_angles, top_eigenspace
from laplace_debiased.laplace import KronDebiasedLaplace, KronDebiasedLLLaplace
from laplace_debiased.operator import DebiasedKFACLinearOperator
from laplace_debiased.optimizer import DebiasedCG
from laplace_debiased.sampling import draw
from laplace_debiased.scores import curvature_scores
from laplace_debiased.spectra import EigenspaceComparison, compare_eigenspaces

__all__ = [
    "BiasReport",
    "CGResult",
    "DebiasedCG",
    "DebiasedKFACLinearOperator",
    "DirectionalDerivatives",
    "EigenbasisMatrix",
    "EigenspaceComparison",
    "KronDebiasedLLLaplace",
    "KronDebiasedLaplace",
    "Laplace",
    "bias_report",
    "cg",
    "compare_eigenspaces",
    "curvature_scores",
    "debiased_cg",
    "directional_derivatives",
    "draw",
    "overlap",
    "principal_angles",
    "top_eigenspace",
]
