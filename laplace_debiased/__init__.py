r"""Debiased mini-batch curvature for laplace-torch.

The top eigenvectors of a mini-batch's curvature are extreme for that batch only.
Directions therefore come from one mini-batch, and magnitudes from another (arXiv
2410.14325). Importing the package registers the structure ``"kron_debiased"`` with
laplace-torch.

The folders are in reading order; none imports one below it::

    rows/        network -> rows of inputs and gradients, layer by layer
    curvature/   rows -> directions and magnitudes; the method itself is `debias`
    sampling/    loader -> weighted folds
    predictive/  posterior -> moments and samples of outputs
    quadratics/  bias, eigenspaces, slopes and curvatures, conjugate gradients
    posterior/   folds -> posterior, with laplace-torch's interface
    integrations/  callbacks that fit when a trainer is done
    comparison/  what `python -m laplace_debiased` runs

``la.fit(train_loader)`` calls, in this order::

    posterior/laplace        fit
    posterior/likelihoods        by the loss of the likelihood
    posterior/fitting        assign the points, then update the posterior
    sampling/folds           draw points, split them into folds
    sampling/loaders             by their dataset indices
    sampling/processes           those of all processes, if there are several
    rows/selection           which parameters are in which layers
    rows/tracing                 by running the network on few examples
    posterior/memory         how many layers a memory limit has room for at a time
    posterior/measuring      pool -> draw -> factors -> directions and magnitudes
    posterior/resuming           but for what a checkpoint has
    posterior/sources            of the folds, by curvlinops' conventions
    rows/sweep                   a forward pass a batch, a backward pass a column
    rows/recorder                    records the uses of parameters
    rows/uses                            as rows
    rows/copies                          or by a copy for each example
    curvature/factors                sums them to Kronecker factors
    curvature/symmetric_products         above the diagonal alone
    sampling/draw                which points get backward passes
    curvature/debias             directions of some folds, magnitudes of others
    curvature/decomposition          eigenvectors
    curvature/eigenbasis     the matrix `la.H`

and ``la(x)`` calls::

    posterior/laplace        probit, samples or moments
    predictive/links             probabilities of classes, or of labels
    posterior/predicting     exact moments, or samples where outputs are many
    predictive/moments       covariance of the outputs
    predictive/blocks            block by block, some outputs after the others
    predictive/isotropic         directions of equal precision together
    curvature/jacobians              rows -> Jacobians in the eigenbasis
    rows/linearization           rows of the Jacobian
    rows/recorder                    recorded as in a fit
"""

from laplace import Laplace

from laplace_debiased.curvature.eigenbasis import EigenbasisMatrix
from laplace_debiased.curvature.operator import DebiasedKFACLinearOperator
from laplace_debiased.curvature.scores import curvature_scores
from laplace_debiased.posterior.laplace import KronDebiasedLaplace
from laplace_debiased.posterior.last_layer import KronDebiasedLLLaplace
from laplace_debiased.posterior.merging import merge
from laplace_debiased.predictive.calibration import Calibration
from laplace_debiased.predictive.report import PredictionReport
from laplace_debiased.predictive.uncertainty import Uncertainty
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
    "Calibration",
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
    "PredictionReport",
    "Uncertainty",
    "__version__",
    "bias_report",
    "cg",
    "compare_eigenspaces",
    "curvature_scores",
    "debiased_cg",
    "directional_derivatives",
    "draw_points",
    "merge",
    "overlap",
    "principal_angles",
    "top_eigenspace",
]
