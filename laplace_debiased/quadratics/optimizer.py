r"""A second-order optimizer with debiased conjugate gradients.

In each step the loss is approximated by a quadratic with the GGN as curvature,
:math:`q(s) = g^\top s + \frac12 s^\top (H + \delta I) s`. Conjugate gradients on one
mini-batch give directions, another mini-batch their slopes and curvatures (Tatzel et
al., 2024, arXiv 2410.14325). The damping :math:`\delta` may adapt to how well the
quadratic predicts the loss (Levenberg-Marquardt, as in Martens, 2010).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from laplace_debiased.quadratics.cg import cg, rescale
from laplace_debiased.rows.checks import check_between
from laplace_debiased.rows.interrupts import on_failure
from laplace_debiased.rows.selection import check_real
from laplace_debiased.rows.sharing import MATH_ATTENTION, everywhere, thread_restored

Closure = Callable[[], tuple[Tensor, Tensor]]


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    """Join tensors of any memory layout to a vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _check_pair(returned: Any) -> None:
    """Refuse what a closure returned unless it is losses and output."""
    is_pair = isinstance(returned, tuple | list) and len(returned) == 2
    if not is_pair or not all(isinstance(part, Tensor) for part in returned):
        raise TypeError(
            "A closure must return a pair of tensors, the losses and the network's "
            f"output that they were computed from, got {type(returned).__name__}."
        )


class BatchQuadratic:
    r"""The quadratic of a mini-batch, by automatic differentiation.

    Args:
        losses: Each example's loss ``[batch]``, or their mean, computed from
            ``output``; what they add to that counts in the gradient alone.
        output: The network's output, with its graph.
        params: The parameters.
        damping: Added to the curvature's diagonal.
    """

    def __init__(
        self, losses: Tensor, output: Tensor, params: list[Tensor], damping: float = 0.0
    ):
        loss = losses.mean()
        if not loss.isfinite():
            raise ValueError(f"The loss is {loss.item()}.")
        self.loss = loss.detach()
        self._output, self._params, self._damping = output, params, damping
        (self._output_gradient,) = torch.autograd.grad(loss, output, create_graph=True)
        self.gradient = self._in_parameters(loss)
        # J^T w is linear in w: its derivative in w, along v, is J v
        self._weights = torch.zeros_like(output, requires_grad=True)
        self._linear = self._in_parameters(output, self._weights, create_graph=True)

    def _in_parameters(
        self, of: Tensor, column: Tensor | None = None, create_graph: bool = False
    ) -> Tensor:
        """Compute a gradient, or multiply a transposed Jacobian by a column."""
        return _flat(
            torch.autograd.grad(
                of,
                self._params,
                column,
                retain_graph=True,
                create_graph=create_graph,
                allow_unused=True,
                materialize_grads=True,
            )
        )

    def output_change(self, direction: Tensor) -> Tensor:
        """Multiply the Jacobian by a direction ``[D]``, to the output's shape."""
        (change,) = torch.autograd.grad(
            self._linear, self._weights, direction, retain_graph=True
        )
        return change

    def output_curvature_product(self, change: Tensor) -> Tensor:
        """Multiply the loss curvature in the output by a change of the output."""
        if not self._output_gradient.requires_grad:  # the loss is linear in it
            return torch.zeros_like(change)
        (product,) = torch.autograd.grad(
            self._output_gradient, self._output, change, retain_graph=True
        )
        return product

    def __matmul__(self, direction: Tensor) -> Tensor:
        """Multiply the damped GGN by a direction ``[D]``."""
        product = self.output_curvature_product(self.output_change(direction))
        return self._in_parameters(self._output, product) + self._damping * direction

    def change(self, step: Tensor) -> Tensor:
        """Predict the change of the loss by a step ``[D]``."""
        return self.gradient @ step + step @ (self @ step) / 2

    def along(self, directions: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Measure slopes at a start, and curvatures, by Jacobian products alone.

        Args:
            directions: Directions as columns ``[D, K]``.
            start: Where the slopes are measured ``[D]``.

        Returns:
            Slopes ``[K]``, and curvatures between all directions ``[K, K]``.
        """
        columns = [*directions.unbind(1), start]
        changes = [self.output_change(column) for column in columns]
        curved = torch.stack(
            [self.output_curvature_product(change).flatten() for change in changes], 1
        )
        flat = torch.stack([change.flatten() for change in changes], 1)
        all_columns = torch.stack(columns, 1)
        products = flat.T @ curved + self._damping * all_columns.T @ all_columns
        slopes = directions.T @ self.gradient + products[:-1, -1]
        return slopes, products[:-1, :-1]


class DebiasedCG(Optimizer):
    """Hessian-free optimization with debiased conjugate gradients.

    A step calls one closure for directions and one for magnitudes, each on a mini-batch
    of its own::

        def closure(X, y):
            output = model(X)
            return cross_entropy(output, y, reduction="none"), output

        optimizer.step(lambda: closure(X, y), lambda: closure(X_other, y_other))

    With one closure, the first half of its examples gives directions, the second half
    magnitudes; two closures are cheaper, since each product then takes half the batch.

    As with any optimizer, mode and buffers of the network are the closures' affair. In
    train mode, BatchNorm makes a quadratic that of its mini-batch with the batch's own
    statistics, which one closure's halves share, and each call of a closure updates the
    running ones: one for each mini-batch, and one more with ``adapt_damping``. Dropout
    is drawn once for a quadratic, but anew when the damping adapts.

    The gradient is that of the losses, also of what they add to the loss of the output,
    such as a penalty of the weights. The curvature is the GGN of the loss in the
    output, in which penalties are not: add twice the factor of a squared norm to
    ``damping``, or steps are too long.

    Args:
        params: The parameters, in one group.
        lr: Factor on each step.
        damping: Damping of the quadratics, at the beginning.
        adapt_damping: Whether to adapt the damping to the ratio of actual and predicted
            reduction of the loss, on the mini-batch that gave magnitudes.
        max_iterations: Largest number of conjugate gradient iterations in a step.
        rtol: Tolerance for the residual of conjugate gradients, relative to the
            gradient.
        warm_start: Factor on the last step to get the first iterate; zero for none.
        subspace: Whether to minimize in the span of the directions
            (:func:`~laplace_debiased.quadratics.cg.debiased_cg`).
        debias: Whether magnitudes come from other points. Otherwise a step uses all
            points for both, which is plain conjugate gradients.

    Raises:
        ValueError: If an argument is out of range, or there is more than one group.

    Example:
        >>> import torch
        >>> from laplace_debiased import DebiasedCG
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(3, 1)
        >>> X = torch.randn(100, 3)
        >>> y = X @ torch.tensor([[1.0], [2.0], [3.0]])
        >>> def closure(rows):
        ...     output = model(X[rows])
        ...     return (output - y[rows]).square().sum(1), output
        >>> optimizer = DebiasedCG(model.parameters(), damping=1e-3)
        >>> losses = []
        >>> for step in range(5):
        ...     a, b = torch.randperm(100)[:40].split(20)
        ...     losses.append(optimizer.step(lambda: closure(a), lambda: closure(b)))
        >>> bool(losses[-1] < 1e-2 * losses[0])
        True
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1.0,
        damping: float = 1.0,
        adapt_damping: bool = False,
        max_iterations: int = 10,
        rtol: float = 1e-3,
        warm_start: float = 0.0,
        subspace: bool = False,
        debias: bool = True,
    ):
        for name, value, interval in (
            ("lr", lr, "[0, inf)"),
            ("damping", damping, "[0, inf)"),
            ("rtol", rtol, "[0, 1]"),
            ("warm_start", warm_start, "[0, 1]"),
        ):
            check_between(name, value, interval)
        if adapt_damping and damping == 0:
            raise ValueError("`adapt_damping` needs a positive `damping`, got 0.")
        if max_iterations < 1:
            raise ValueError(
                f"`max_iterations` must be at least 1, got {max_iterations}."
            )
        defaults = {
            "lr": lr,
            "damping": damping,
            "adapt_damping": adapt_damping,
            "max_iterations": max_iterations,
            "rtol": rtol,
            "warm_start": warm_start,
            "subspace": subspace,
            "debias": debias,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take the parameters; the constructor calls this once.

        Args:
            param_group: The parameters, and options of their own.

        Raises:
            ValueError: If there are parameters already, or complex ones.
        """
        if self.param_groups:
            raise ValueError("DebiasedCG supports one parameter group.")
        super().add_param_group(param_group)
        check_real(self._params)

    @property
    def _params(self) -> list[Tensor]:
        return [p for p in self.param_groups[0]["params"] if p.requires_grad]

    # torch's optimizers take one closure, which returns the loss alone
    @thread_restored
    @torch.enable_grad()
    def step(  # type: ignore[override]
        self, direction_closure: Closure, magnitude_closure: Closure | None = None
    ) -> Tensor:
        """Make a step.

        Args:
            direction_closure: Returns losses and output of the mini-batch that gives
                directions: each example's loss ``[batch]``, or their mean, and the
                network's output that they were computed from.
            magnitude_closure: The same for the mini-batch that gives magnitudes; None
                to split the first one.

        Returns:
            The loss before the step, on the points that gave magnitudes.

        Raises:
            TypeError: If a closure returns no pair of tensors.
            ValueError: If a closure's losses cannot be split, or losses, curvature or
                step are not finite.

        Whatever is raised, also by a closure or an interrupt, parameters, state and
        damping then stay.
        """
        group, params = self.param_groups[0], self._params
        split = magnitude_closure is None and group["debias"]
        first, other = self._quadratics(direction_closure, magnitude_closure)
        warm = group["warm_start"]
        result = cg(
            first,
            -first.gradient,
            warm * self._last_step(params) if warm else None,
            rtol=group["rtol"],
            max_iterations=group["max_iterations"],
        )
        if other is not first and result.num_iterations:
            slopes, curvatures = other.along(result.directions, result.start)
            result = rescale(result, slopes, curvatures, group["subspace"])
        change = result.solution
        if not change.isfinite().all():
            raise ValueError("The step is not finite: it was not made.")
        # the quadratic is that of the present parameters: ask it before they change
        predicted = 0.0
        if group["adapt_damping"]:
            predicted = other.change(group["lr"] * change).item()
        with on_failure(self._undo(params)):
            self._keep_step(params, change)
            self._move(params, group["lr"] * change)
            if group["adapt_damping"]:
                with torch.no_grad():
                    losses, _ = (magnitude_closure or direction_closure)()
                losses = losses[len(losses) // 2 :] if split else losses
                self._adapt_damping((losses.mean() - other.loss).item(), predicted)
        return other.loss

    def _undo(self, params: list[Tensor]) -> Callable[[], None]:
        """Return what restores parameters, state and damping."""
        group = self.param_groups[0]
        damping, values = group["damping"], [p.detach().clone() for p in params]
        states = [dict(self.state[p]) if p in self.state else None for p in params]

        @torch.no_grad()
        def undo() -> None:
            group["damping"] = damping
            for p, value, state in zip(params, values, states, strict=True):
                p.copy_(value)
                if state is None:
                    self.state.pop(p, None)
                else:
                    self.state[p] = state

        return undo

    @staticmethod
    @torch.no_grad()
    def _move(params: list[Tensor], step: Tensor) -> None:
        parts = step.split([p.numel() for p in params])
        for p, part in zip(params, parts, strict=True):
            p.add_(part.view(p.shape))

    def _quadratics(
        self, direction_closure: Closure, magnitude_closure: Closure | None
    ) -> tuple[BatchQuadratic, BatchQuadratic]:
        """Build the quadratic of each role; without debiasing they are one."""
        group, params = self.param_groups[0], self._params

        def quadratic(losses: Tensor, output: Tensor) -> BatchQuadratic:
            return BatchQuadratic(losses, output, params, group["damping"])

        def call(closure: Closure) -> tuple[Tensor, Tensor]:
            with everywhere(MATH_ATTENTION):
                returned = closure()
            _check_pair(returned)
            return returned

        if magnitude_closure is not None:
            if not group["debias"]:
                raise ValueError("`magnitude_closure` needs `debias=True`.")
            return quadratic(*call(direction_closure)), quadratic(
                *call(magnitude_closure)
            )
        losses, output = call(direction_closure)
        if not group["debias"]:
            single = quadratic(losses, output)
            return single, single
        if losses.ndim != 1 or len(losses) < 2:
            raise ValueError(
                "To split a mini-batch, `direction_closure` must return the losses of "
                f"at least two examples, got shape {tuple(losses.shape)}: use a loss "
                "with `reduction='none'`, or give `magnitude_closure`."
            )
        half = len(losses) // 2
        return quadratic(losses[:half], output), quadratic(losses[half:], output)

    def _last_step(self, params: list[Tensor]) -> Tensor:
        return _flat(
            [self.state[p].get("last_step", torch.zeros_like(p)) for p in params]
        ).detach()

    def _keep_step(self, params: list[Tensor], step: Tensor) -> None:
        parts = step.split([p.numel() for p in params])
        for p, part in zip(params, parts, strict=True):
            self.state[p]["last_step"] = part.view_as(p).clone()

    def _adapt_damping(self, actual: float, predicted: float) -> None:
        """Trust the quadratic more if it predicted the loss well, less if not."""
        if actual == predicted == 0:  # no step
            return
        group = self.param_groups[0]
        ratio = actual / predicted if predicted < 0 else float("-inf")
        if ratio > 0.75:
            group["damping"] *= 2 / 3
        elif not ratio >= 0.25:  # nor NaN
            group["damping"] *= 3 / 2
