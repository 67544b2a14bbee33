"""What this library knows of laplace-torch's private parts and optional backends.

Releases after 0.3 make ASDL and BackPACK optional: they are imported where one of their
backends is used, and nowhere else.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from laplace.curvature import CurvatureInterface, EFInterface
from laplace.curvature.curvlinops import CurvlinopsInterface
from laplace.utils.feature_extractor import FeatureExtractor
from torch import Tensor, nn

from laplace_debiased.rows.arguments import by_keywords, without_targets
from laplace_debiased.rows.checks import plain_text
from laplace_debiased.rows.inputs import Batch, Inputs, check_targets, moved, on_device
from laplace_debiased.rows.output_curvature import (
    EMPIRICAL,
    TYPE_2,
    Loss,
    OutputCurvature,
    is_counted,
)
from laplace_debiased.rows.targets import targets_of_points


def is_curvlinops(backend: type[CurvatureInterface]) -> bool:
    """Whether a backend's curvature is computed from rows, by this library."""
    return issubclass(backend, CurvlinopsInterface)


def is_empirical(backend: type[CurvatureInterface]) -> bool:
    """Whether a backend's curvature is the empirical Fisher."""
    return issubclass(backend, EFInterface)


def is_stochastic(backend_kwargs: dict[str, Any]) -> bool:
    """Whether a backend samples labels."""
    return bool(backend_kwargs.get("stochastic", False))


@contextmanager
def without_link_reminder() -> Iterator[None]:
    """Silence a reminder to predict by the `link_approx` that a prior was tuned with.

    laplace-torch gives it with each call, also where the argument was passed.

    Yields:
        Nothing.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="By default `link_approx` is `probit`"
        )
        yield


def loss_of(backend: CurvatureInterface) -> Loss:
    """Return a backend's loss, a module that laplace-torch declares as any callable."""
    return cast("Loss", backend.lossfunc)


def output_curvature(
    backend: CurvatureInterface, mc_samples: int = 1, fisher_rank: int | None = None
) -> OutputCurvature:
    """Return the curvature of a backend's loss in the output.

    Args:
        backend: The backend.
        mc_samples: Number of sampled labels for each example, if it samples.
        fisher_rank: Number of columns that are kept.

    Returns:
        The output curvature, by the backend's Fisher type.
    """
    fisher_type = (
        EMPIRICAL
        if is_empirical(type(backend))
        else getattr(backend, "_kron_fisher_type", TYPE_2)
    )
    kind = plain_text(fisher_type)
    return OutputCurvature(loss_of(backend), kind, mc_samples, fisher_rank)


def split_batch(batch: Any, key: str) -> tuple[Inputs, Any]:
    """Split what a loader yields.

    Args:
        batch: A pair ``(X, y)``, or a mapping.
        key: Key of the targets in mappings.

    Returns:
        Inputs and targets.

    Raises:
        ValueError: If there are no targets, or further entries.
    """
    if isinstance(batch, MutableMapping) and key in batch:
        return batch, batch[key]
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    found = list(batch) if isinstance(batch, MutableMapping) else type(batch).__name__
    told = f"{found} without targets"
    if isinstance(batch, tuple | list) and len(batch) > 2:
        told = f"{len(batch)} entries: several inputs go into a mapping"
    raise ValueError(
        "Batches must be pairs (X, y), or mappings whose targets are the entry "
        f"`dict_key_y`, {key!r}; got {told}."
    )


def inputs_and_targets(batch: Any, backend: CurvatureInterface) -> Batch:
    """Split a batch, and move it to the model's device.

    Args:
        batch: A pair ``(X, y)``, or a mapping.
        backend: The backend, which knows the key of the targets.

    Returns:
        Inputs and targets.

    Raises:
        TypeError: If they are no tensors, but for mappings of inputs.
        ValueError: If there are no targets.
    """
    key = backend.dict_key_y
    X, y = split_batch(batch, key)
    if not isinstance(y, Tensor):
        raise TypeError(f"Targets must be a tensor, got {type(y).__name__}.")
    device = next(backend.model.parameters()).device
    X = without_targets(backend.model, X, key)
    return on_device(X, device), moved(y, device)


def counted_targets(
    model: nn.Module, loss: Loss, y: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor]:
    """Arrange and check the targets of predictions.

    Args:
        model: The network.
        loss: The loss.
        y: The targets of a batch.
        mean: Means of its outputs ``[points, outputs]``.

    Returns:
        A target for each point, and whether the loss counts it ``[points]``.

    Raises:
        ValueError: If targets are not valid, or probabilities of classes.
    """
    y = targets_of_points(model, y, loss, mean)
    if isinstance(loss, nn.CrossEntropyLoss) and y.is_floating_point():
        raise ValueError(
            f"Targets must be class indices, got {y.dtype}: of probabilities, pass "
            "`y.argmax(1)`."
        )
    y = check_targets(mean, y, loss)
    return y, is_counted(loss, y)


class PicklableExtractor(FeatureExtractor):
    """laplace-torch's extractor of features, which other processes and copies can use.

    Its own has a local function as a hook, which cannot be pickled, and which writes
    the features of a copy into the original. It calls the network with one argument,
    which a further hook turns into keywords where the network takes these.

    Args:
        original: The extractor, which is not used any more.
        target_key: Key of the targets in mappings.
    """

    def __init__(self, original: FeatureExtractor, target_key: str):
        super().__init__(
            original.model, None, original.enable_backprop, original.feature_reduction
        )
        hook = partial(by_keywords, target_key)
        self.model.register_forward_pre_hook(hook, with_kwargs=True)
        if original.last_layer is not None:
            # the constructor's own hook, which is the last one
            original.last_layer._forward_hooks.popitem()
            self.set_last_layer(original._last_layer_name)

    def _get_hook(self, name: str) -> Any:
        return partial(self._keep_features, name)

    def _keep_features(
        self, name: str, _module: nn.Module, inputs: tuple[Tensor, ...], _output: Any
    ) -> None:
        features = inputs[0]
        self._features[name] = features if self.enable_backprop else features.detach()

    def __getstate__(self) -> dict[str, Any]:
        """Return all but the last features, which may have a graph."""
        return vars(self) | {"_features": {}}
