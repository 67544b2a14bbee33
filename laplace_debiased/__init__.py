"""Debiased mini-batch curvature for laplace-torch.

Directions come from one mini-batch, magnitudes from another (arXiv 2410.14325).
Importing the package registers the structure ``"kron_debiased"`` with laplace-torch.
"""

from laplace import Laplace

from laplace_debiased.eigenbasis import EigenbasisMatrix
from laplace_debiased.laplace import KronDebiasedLaplace, KronDebiasedLLLaplace
from laplace_debiased.operator import DebiasedKFACLinearOperator

__all__ = [
    "DebiasedKFACLinearOperator",
    "EigenbasisMatrix",
    "KronDebiasedLLLaplace",
    "KronDebiasedLaplace",
    "Laplace",
]
