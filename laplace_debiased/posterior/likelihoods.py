"""Likelihoods: laplace-torch's, and that of labels that are 0 or 1."""

from __future__ import annotations

from dataclasses import dataclass

from laplace.baselaplace import BaseLaplace
from laplace.curvature import CurvatureInterface
from laplace.utils.enums import Likelihood, LinkApprox
from torch.nn import BCEWithLogitsLoss, CrossEntropyLoss, MSELoss

from laplace_debiased.posterior.upstream import is_curvlinops
from laplace_debiased.predictive.links import SIGMOID, SOFTMAX, Link
from laplace_debiased.rows.checks import plain_text
from laplace_debiased.rows.output_curvature import Loss

# of one logit, or of one for each of several labels that do not exclude each other
BINARY = "binary_classification"


@dataclass(frozen=True)
class Kind:
    """What is particular to a likelihood.

    Args:
        known: What laplace-torch takes it for.
        loss: Its negative logarithm, up to a factor.
        link: How probabilities are made of outputs; None of a regression.
        is_classification: Whether predictions are probabilities.
    """

    known: Likelihood
    loss: type[Loss]
    link: Link | None = None
    is_classification: bool = False

    def loss_func(self) -> Loss:
        """Return the loss, summed over the data."""
        return self.loss(reduction="sum")


_KINDS: dict[str, Kind] = {
    Likelihood.REGRESSION: Kind(Likelihood.REGRESSION, MSELoss),
    Likelihood.CLASSIFICATION: Kind(
        Likelihood.CLASSIFICATION, CrossEntropyLoss, SOFTMAX, True
    ),
    BINARY: Kind(Likelihood.CLASSIFICATION, BCEWithLogitsLoss, SIGMOID, True),
    Likelihood.REWARD_MODELING: Kind(
        Likelihood.REWARD_MODELING, CrossEntropyLoss, SOFTMAX
    ),
}


def kind_of(likelihood: str) -> Kind:
    """Return what is particular to a likelihood.

    Args:
        likelihood: Its name.

    Returns:
        What is particular to it.

    Raises:
        ValueError: If there is no such likelihood.
    """
    if likelihood not in _KINDS:
        names = [plain_text(own) for own in _KINDS]
        raise ValueError(
            f"Invalid likelihood type {likelihood}: it must be one of {names}."
        )
    return _KINDS[likelihood]


def backend_of_labels(la: BaseLaplace) -> CurvatureInterface:
    """Build a posterior's backend, with the loss of labels.

    Args:
        la: The posterior.

    Returns:
        The backend, which takes the likelihood for laplace-torch's classification.
    """
    backend = la._backend_cls(
        la.model,
        Likelihood.CLASSIFICATION,
        dict_key_x=la.dict_key_x,
        dict_key_y=la.dict_key_y,
        **la._backend_kwargs,
    )
    backend.lossfunc = kind_of(BINARY).loss_func()
    return backend


def check_knows_labels(likelihood: str, backend: type[CurvatureInterface]) -> None:
    """Refuse labels with a backend that knows the curvature of a softmax alone.

    Args:
        likelihood: The likelihood.
        backend: The backend.

    Raises:
        ValueError: If it does not know the likelihood.
    """
    if likelihood == BINARY and not is_curvlinops(backend):
        raise ValueError(
            f"{backend.__name__} does not know the likelihood {BINARY!r}: use "
            "`CurvlinopsGGN`."
        )


def check_link(likelihood: str, link_approx: str) -> None:
    """Refuse an approximation that a likelihood has not.

    Args:
        likelihood: The likelihood.
        link_approx: The approximation.

    Raises:
        ValueError: If it has none of this name.
    """
    bridges = LinkApprox.BRIDGE, LinkApprox.BRIDGE_NORM
    if likelihood == BINARY and link_approx in bridges:
        raise ValueError(
            f"`link_approx={plain_text(link_approx)!r}` is the "
            "Dirichlet distribution of classes that exclude each other: labels have "
            "'probit' and 'mc'."
        )
