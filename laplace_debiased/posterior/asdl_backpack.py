"""Kronecker factors from laplace-torch's ASDL and BackPACK backends."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from laplace.curvature import CurvatureInterface
from laplace.utils import Kron
from torch import Tensor, nn
from tqdm import tqdm

from laplace_debiased.curvature.debias import Directions, Factors, scale_gradients
from laplace_debiased.curvature.decomposition import decompose
from laplace_debiased.curvature.kronecker import Kronecker, Spectrum
from laplace_debiased.posterior.sources import checked_batches
from laplace_debiased.posterior.upstream import loss_of
from laplace_debiased.rows.arguments import arguments
from laplace_debiased.rows.layers import Layer
from laplace_debiased.rows.output_curvature import are_probabilities, is_counted
from laplace_debiased.rows.sweep import SweepSummary
from laplace_debiased.sampling.folds import Fold


def _is_backpack(backend: type[CurvatureInterface]) -> bool:
    return any("backpack" in base.__module__ for base in backend.__mro__)


def check_installed(backend: type[CurvatureInterface]) -> None:
    """Refuse a backend whose library is missing.

    Args:
        backend: The backend.

    Raises:
        ModuleNotFoundError: If it is missing, with what brings it.
    """
    library = "backpack" if _is_backpack(backend) else "asdl"
    try:
        __import__(library)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{backend.__name__} needs the module `{library}`: "
            f'pip install "laplace-debiased[{library}]".',
            name=library,
        ) from error


@dataclass(frozen=True, eq=False)
class BackendSource:
    """Lets a backend compute the factors of each batch, and sums them.

    Args:
        model: The network.
        params: The parameters.
        layers: The layers that they are in.
        backend: An ASDL or BackPACK backend.
        options: Options of the backend's ``kron``.
        progress_bar: Whether to show progress bars.
        tolerance: How far large factors may be from what is decomposed.
    """

    model: nn.Module
    params: Sequence[Tensor]
    layers: Sequence[Layer]
    backend: CurvatureInterface
    options: dict[str, Any]
    progress_bar: bool = False
    tolerance: float = 0.0

    takes_weights = False

    def factors(self, fold: Fold, seed: int) -> tuple[Factors, SweepSummary]:
        """See :meth:`~laplace_debiased.posterior.sources.Source.factors`."""
        reinstall_hooks(self.backend)
        first = self.params[0]
        params = cast("list[nn.Parameter]", list(self.params))
        total = Kron.init_from_model(params, first.device, first.dtype)
        loss = torch.zeros((), device=first.device, dtype=first.dtype)
        num_outputs, num_seen = 0, 0
        probabilities: Tensor | bool = True
        batches = checked_batches(self.model, fold.loader, self.backend)
        with tqdm(
            desc="[Computing Hessian]",
            total=fold.num_points,
            disable=not self.progress_bar,
        ) as bar:
            for X, y, output in batches:
                self._check_batch(X, y)
                num_outputs = output.shape[-1]
                probabilities &= are_probabilities(loss_of(self.backend), output)
                try:
                    batch_loss, kron = self.backend.kron(
                        X, y, N=fold.num_points, **self.options
                    )
                except (AttributeError, TypeError) as error:
                    self._check_output(X, error)
                    raise
                total += Kron(self._aligned(kron))
                loss = loss + batch_loss.detach()
                num_seen += len(y)
                bar.update(len(y))
        if num_seen != fold.num_points:
            raise ValueError(
                f"{fold.num_points} points of the dataset give {num_seen} examples: "
                "one each is needed."
            )
        # the points have equal weights
        weight = fold.weights[0].item()
        factors = scale_gradients(self._by_layer(total), weight)
        summary = SweepSummary(
            fold.num_points,
            fold.weights.sum().item(),
            weight * loss,
            num_outputs,
            bool(probabilities),
        )
        return factors, summary

    def part(self, layers: Sequence[Layer], index: int) -> BackendSource:
        """Not supported: `fit_memory_limit` is refused with this backend."""
        raise NotImplementedError

    def gradients(self, fold: Fold, seed: int) -> tuple[Factors, SweepSummary]:
        """Not supported: curvature sampling is refused with this backend."""
        raise NotImplementedError

    def inputs(self, fold: Fold, seed: int) -> tuple[Factors, SweepSummary]:
        """Not supported: curvature sampling is refused with this backend."""
        raise NotImplementedError

    def curvatures(
        self, fold: Fold, directions: Directions, seed: int
    ) -> tuple[list[Spectrum], SweepSummary]:
        """Not supported: ``ggn`` magnitudes are refused with this backend."""
        raise NotImplementedError

    def decompose(
        self, factors: Sequence[Kronecker]
    ) -> tuple[list[Kronecker], list[Kronecker]]:
        """See :meth:`~laplace_debiased.posterior.sources.Source.decompose`."""
        return decompose(factors, self.tolerance)

    def _check_batch(self, X: Any, y: Tensor) -> None:
        if not is_counted(loss_of(self.backend), y).all():
            raise ValueError(
                f"{type(self.backend).__name__} does not honour `ignore_index`: leave "
                "those points out, or use `CurvlinopsGGN`."
            )
        if not isinstance(X, MutableMapping):
            return
        if _is_backpack(type(self.backend)):
            raise ValueError("The BackPACK backends do not support dict-like inputs.")
        if not arguments(self.model, X)[0]:
            raise ValueError(
                f"{type(self.backend).__name__} hands mappings on as one argument, but "
                "the model takes keywords: pass a module whose `forward(batch)` "
                "returns logits, or use the default backend."
            )

    def _check_output(self, X: Any, error: Exception) -> None:
        """Say so if a backend failed since the network returns no tensor."""
        with torch.no_grad():
            output = self.model(X)
        if not isinstance(output, Tensor):
            raise ValueError(
                f"{type(self.backend).__name__} needs a model that returns a tensor, "
                f"but this one returns {type(output).__name__}: pass a module whose "
                "`forward(x)` returns its logits, or use the default backend."
            ) from error

    def _by_layer(self, kron: Kron) -> Factors:
        """Put together what belongs to a layer.

        laplace-torch spreads a scale of the curvature over the factors of each
        parameter. A weight's G is then proportional to that of the bias.
        """
        factors, kfacs = [], _kfacs(kron)
        for layer in self.layers:
            G, *inputs = kfacs[layer.parameters[0]]
            if layer.matrix is not None and layer.vector is not None:
                (own,) = kfacs[layer.vector]
                ratio = _trace(G) / _trace(own) if _trace(own) > 0 else 1.0
                G, inputs = own, [ratio * A for A in inputs]
            factors.append(Kronecker(G, *inputs))
        return factors

    def _aligned(self, kron: Kron) -> list[tuple[Tensor] | Tensor]:
        """Select the factors of the parameters that take part, in their order.

        Raises:
            ValueError: If the backend has no factors for a parameter.
        """
        kfacs = _kfacs(kron)
        if not _is_backpack(type(self.backend)):
            # ASDL returns frozen parameters, too
            owners = [
                param
                for module in self.backend.model.modules()
                if getattr(module, "fisher", None) is not None
                for param in (module.weight, getattr(module, "bias", None))
                if param is not None
            ]
            of = {id(p): kfac for p, kfac in zip(owners, kfacs, strict=True)}
            kfacs = [of[id(param)] for param in self.params if id(param) in of]
        sizes = [torch.Size([len(f) for f in kfac]).numel() for kfac in kfacs]
        # of a matrix that is stored transposed, they have factors in another order
        is_transposed = any(layer.is_transposed for layer in self.layers)
        if is_transposed or sizes != [param.numel() for param in self.params]:
            raise ValueError(
                f"{type(self.backend).__name__} has no Kronecker factors for some "
                "parameters: their layers are not supported by it. Exclude them by "
                "`requires_grad_(False)`, or use the default backend."
            )
        return cast("list[tuple[Tensor] | Tensor]", kfacs)


def _kfacs(kron: Kron) -> list[list[Tensor]]:
    """Return a list of factors for each parameter: laplace-torch declares tuples."""
    return cast("list[list[Tensor]]", kron.kfacs)


def _trace(matrix: Tensor) -> Tensor:
    # torch's own is not implemented for half precision in all versions
    return matrix.diagonal().sum()


def reinstall_hooks(backend: CurvatureInterface) -> None:
    """Make sure that BackPACK's hooks are where it believes them to be.

    A prediction by any BackPACK backend removes the hooks of all models, but leaves
    the marks by which BackPACK knows that it had installed them.

    Args:
        backend: The backend; nothing happens unless it is BackPACK's.
    """
    if not _is_backpack(type(backend)):
        return
    from backpack import extend

    for extended in (backend._model, loss_of(backend)):
        # torch declares that modules have no other attributes
        modules = cast("Iterator[Any]", extended.modules())
        for module in modules:
            module._backpack_extend = any(
                getattr(hook, "__module__", "").startswith("backpack")
                for hook in module._forward_hooks.values()
            )
        extend(extended)
