"""What the posterior of a fit depends on, and is of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from laplace_debiased.posterior.upstream import split_batch
from laplace_debiased.rows.digests import digest
from laplace_debiased.sampling.folds import Fold, Folds
from laplace_debiased.sampling.loaders import subset_of
from laplace_debiased.sampling.processes import Alone

if TYPE_CHECKING:
    from laplace_debiased.posterior.fitting import Seen
    from laplace_debiased.posterior.laplace import KronDebiasedLaplace

Progress: TypeAlias = "tuple[Seen, float, float | None, Sequence[int]]"
# examples of a fold whose contents are compared
_SAMPLES = 32


def check_not_replaced(model: nn.Module, params: Sequence[Tensor]) -> None:
    """Refuse parameters that are the network's no more.

    Args:
        model: The network.
        params: The parameters.

    Raises:
        ValueError: If one is none of the network's.
    """
    own = {id(param) for param in model.parameters()}
    gone = sum(id(param) not in own for param in params)
    if gone:
        raise ValueError(
            f"{gone} of the posterior's parameters are no longer the model's, which "
            "has new ones, such as by `load_state_dict(..., assign=True)`: fit or load "
            "the posterior again. Without `assign`, values are copied into the "
            "parameters that there are."
        )


def identity(
    la: KronDebiasedLaplace,
    folds: Folds,
    progress: Progress,
    of_batch: Callable[[Any], Any] = lambda batch: batch,
) -> dict[str, str]:
    """Tell fits apart: those that agree in all of this give the same posterior.

    Args:
        la: The posterior, whose parameters are known.
        folds: The points.
        progress: What was seen before, the factor on its weight, the number of points
            that all is scaled to, and how many layers are measured at a time.
        of_batch: Returns what is compared of a batch.

    Returns:
        Digests, by what they are of.
    """
    model, settings = la.model, vars(la.settings)
    backend = (la._backend_cls.__name__, la._backend_kwargs, la._asdl_fisher_kwargs)
    of_model = {id(param): name for name, param in model.named_parameters()}
    own = (la._key, [of_model[id(param)] for param in la.fitted_params])
    options = (settings, backend, la.likelihood, la.class_axis, *progress[1:])
    named = (dict(model.named_parameters()), dict(model.named_buffers()))
    fitted = [name for name, own in named[0].items() if own.requires_grad]
    points = [_of_fold(fold, of_batch) for fold in folds.folds]
    return {
        "data": digest([folds.num_data, folds.explicit, *points]),
        "model": digest([str(model), *named, fitted]),
        "settings": digest(options),
        "parameters": digest(own),
        "earlier posterior": digest(la.state_dict() if progress[0].weight else None),
    }


def _of_fold(fold: Fold, of_batch: Callable[[Any], Any]) -> str:
    """Tell which points there are, with which weights, and what some of them are."""
    count = min(_SAMPLES, fold.num_points)
    positions = torch.linspace(0, fold.num_points - 1, count, dtype=torch.float64)
    some = subset_of(fold.loader, positions.round().long().unique())
    indices = getattr(fold.loader.dataset, "indices", [])
    return digest([torch.as_tensor(indices), fold.weights, *map(of_batch, some)])


def check_same_fit(
    la: KronDebiasedLaplace,
    folds: Folds,
    progress: Progress,
    group: Alone,
) -> None:
    """Refuse processes that do not fit the same.

    Of examples, targets are compared, since inputs may be drawn anew.

    Args:
        la: The posterior of this process.
        folds: Its points.
        progress: As in :func:`identity`.
        group: The processes.

    Raises:
        ValueError: If processes differ.
    """
    own = identity(la, folds, progress, lambda b: split_batch(b, la.dict_key_y)[1])
    found = group.gathered(own)
    differ = [key for key in own if len({other[key] for other in found}) > 1]
    if differ:
        raise ValueError(
            f"The processes have different {' and '.join(differ)}: each must have the "
            "same dataset, model and settings. Fit parts of the data that are datasets "
            "of their own without a process group, and `merge` the posteriors."
        )
