"""A callback for Hugging Face's ``Trainer``: a posterior when training ends."""

from __future__ import annotations

import os
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from laplace_debiased.integrations.after_training import AfterTraining
from laplace_debiased.posterior.laplace import KronDebiasedLaplace


class LaplaceCallback(TrainerCallback):
    """Fits a posterior to a model when its training ends.

    Args:
        likelihood: ``"classification"``, ``"binary_classification"`` or
            ``"regression"``.
        subset_of_weights: ``"all"`` or ``"last_layer"``.
        val_loader: Validation data, such as ``trainer.get_eval_dataloader()``; None for
            what the trainer evaluated on last while it trained, if it did.
        path: Where to save the posterior, beside the model's own checkpoint.
        **options: Further keywords of
            :class:`~laplace_debiased.posterior.laplace.KronDebiasedLaplace`.

    Attributes:
        posterior: The posterior; None before training ended.

    Example:
        With a model and data of your own:

        >>> from laplace_debiased.integrations.hugging_face import LaplaceCallback
        >>> callback = LaplaceCallback("classification", budget=128)
        >>> # Trainer(model, ..., callbacks=[callback]).train()
        >>> callback.posterior is None  # before that
        True
    """

    def __init__(
        self,
        likelihood: str = "classification",
        subset_of_weights: str = "all",
        *,
        val_loader: DataLoader | None = None,
        path: str | os.PathLike[str] | None = None,
        **options: Any,
    ):
        self._val_loader = val_loader
        self._after = AfterTraining(likelihood, subset_of_weights, path, options)
        self.posterior: KronDebiasedLaplace | None = None
        self._evaluated: DataLoader | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Check the options, and forget earlier evaluations, maybe of test data.

        Args:
            args: The trainer's arguments.
            state: Its state.
            control: Its control.
            **kwargs: What else the trainer passes.
        """
        self._after.check()
        self._evaluated = None

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: DataLoader | None = None,
        **kwargs: Any,
    ) -> None:
        """Remember the validation data.

        Args:
            args: The trainer's arguments.
            state: Its state.
            control: Its control.
            eval_dataloader: What it evaluated on.
            **kwargs: What else the trainer passes.
        """
        self._evaluated = eval_dataloader

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        train_dataloader: DataLoader | None = None,
        **kwargs: Any,
    ) -> None:
        """Fit the posterior.

        Args:
            args: The trainer's arguments.
            state: Its state.
            control: Its control.
            model: The model that was trained.
            train_dataloader: The training data.
            **kwargs: What else the trainer passes.
        """
        assert model is not None and train_dataloader is not None
        val = self._evaluated if self._val_loader is None else self._val_loader
        # kept even if it cannot be tuned
        self.posterior = self._after.fit(model, train_dataloader)
        self._after.tune(self.posterior, val)
        self._after.save(self.posterior)
