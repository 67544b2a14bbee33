"""A callback for Lightning: a posterior when training ends."""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any
from warnings import warn

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import Precision
from torch.utils.data import DataLoader

from laplace_debiased.integrations.after_training import AfterTraining
from laplace_debiased.posterior.laplace import KronDebiasedLaplace


class LaplaceCallback(Callback):
    """Fits a posterior to a module when its training ends.

    It uses the trainer's own data: the training data for the curvature, and the
    validation data for calibration. With a precision such as ``"bf16-true"``, batches
    are converted as the trainer converts them; ``"bf16-mixed"`` is the trainer's alone.

    Args:
        likelihood: ``"classification"``, ``"binary_classification"`` or
            ``"regression"``.
        subset_of_weights: ``"all"`` or ``"last_layer"``.
        network: Name of the submodule that gives outputs ``[batch, outputs]``; None if
            the module itself does.
        val_loader: Validation data; None for the trainer's.
        path: Where to save the posterior, which is of the last weights.
        **options: Further keywords of
            :class:`~laplace_debiased.posterior.laplace.KronDebiasedLaplace`.

    Attributes:
        posterior: The posterior; None before training ended.

    Example:
        With a trainer and a module of your own:

        >>> from laplace_debiased.integrations.lightning import LaplaceCallback
        >>> callback = LaplaceCallback("classification", budget=128)
        >>> # Trainer(callbacks=[callback]).fit(module, train_loader, val_loader)
        >>> callback.posterior is None  # before that
        True
    """

    def __init__(
        self,
        likelihood: str = "classification",
        subset_of_weights: str = "all",
        *,
        network: str | None = None,
        val_loader: DataLoader | None = None,
        path: str | os.PathLike[str] | None = None,
        **options: Any,
    ):
        self._network, self._val_loader = network, val_loader
        self._after = AfterTraining(likelihood, subset_of_weights, path, options)
        self.posterior: KronDebiasedLaplace | None = None

    def on_fit_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
    ) -> None:
        """Check the options before any training.

        Args:
            trainer: The trainer.
            pl_module: The module to train.

        Raises:
            AttributeError: If the module has no such network.
            TypeError: If there is no such keyword, or it has a wrong type.
            ValueError: If likelihood, subset or a keyword are not valid.
        """
        self._after.check()
        pl_module.get_submodule(self._network or "")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit the posterior.

        Args:
            trainer: The trainer.
            pl_module: The module that was trained.

        Raises:
            ValueError: If the trainer has several loaders, of training data, or of
                validation data where none is given.
        """
        network = pl_module.get_submodule(self._network or "")
        train = _only("train_dataloader", trainer.train_dataloader)
        val = self._val_loader
        if val is None and trainer.val_dataloaders is not None:
            val = _only("val_dataloaders", trainer.val_dataloaders)
        assert train is not None
        precision = trainer.precision_plugin
        val = None if val is None else _converted(val, precision)
        # kept even if it cannot be tuned
        self.posterior = self._after.fit(network, _converted(train, precision))
        self._after.tune(self.posterior, val)
        _warn_of_better_weights(trainer)
        # a trial run writes no checkpoints
        if not getattr(trainer, "fast_dev_run", False):
            self._after.save(self.posterior)


def _warn_of_better_weights(trainer: Trainer) -> None:
    """Warn if a checkpoint of the best weights is not that of the last ones."""
    kept = trainer.checkpoint_callback
    if not isinstance(kept, ModelCheckpoint) or kept.monitor is None:
        return
    last = trainer.callback_metrics.get(kept.monitor)
    if kept.best_model_path and last != kept.best_model_score:
        warn(
            "The posterior is of the last weights. The best by "
            f"{kept.monitor!r} are in {kept.best_model_path}: for theirs, load that "
            "checkpoint, and fit `Laplace` to the module.",
            stacklevel=2,
        )


@dataclass(frozen=True)
class _Converting:
    """Collates points to a batch in the trainer's precision."""

    collate: Callable[[list], Any]
    precision: Precision

    def __call__(self, points: list) -> Any:
        return self.precision.convert_input(self.collate(points))


def _converted(loader: DataLoader, precision: Precision) -> DataLoader:
    """Return a loader that yields what the trainer's steps get."""
    if type(precision).convert_input is Precision.convert_input:
        return loader
    own = copy(loader)
    own.collate_fn = _Converting(loader.collate_fn, precision)
    return own


def _only(name: str, loaders: Any) -> DataLoader | None:
    """Return the loader if there is a single one, None if there is none."""
    if isinstance(loaders, list | tuple):
        if not loaders:
            return None
        (loaders,) = loaders if len(loaders) == 1 else (None,)
    if not isinstance(loaders, DataLoader):
        raise ValueError(
            f"The trainer's `{name}` must be a single DataLoader: for validation data, "
            "pass `val_loader`."
        )
    return loaders
