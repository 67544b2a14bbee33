r"""Slopes and curvatures of mini-batch quadratics along many directions.

Along a direction d, a quadratic with gradient g and curvature H has the slope
:math:`d^\top g` and the curvature :math:`d^\top (H + \delta I) d`. Both are sums over
examples. With the Jacobian J of an example's output and the Hessian :math:`\Lambda` of
its loss in the output,

.. math::
    d^\top g = \sum_n (J_n d)^\top \nabla \ell_n, \qquad
    d^\top H d = \sum_n (J_n d)^\top \Lambda_n (J_n d)

for the generalized Gauss-Newton matrix; the Hessian's is a derivative of the slope.
The products :math:`J_n d` come from forward mode, one pass for each direction, or from
the rows of the Jacobian, one backward pass for each output, whatever the number of
directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from tqdm import tqdm

from laplace_debiased.curvature.curvlinops_adapter import CURVATURES
from laplace_debiased.rows.batches import select_rows, with_examples
from laplace_debiased.rows.checks import check_choice
from laplace_debiased.rows.inputs import (
    Batch,
    Inputs,
    check_finite_inputs,
    check_targets,
    moved,
    on_device,
)
from laplace_debiased.rows.left_out import refusal
from laplace_debiased.rows.linearization import (
    changes_by_matrix,
    linearize,
    rows_per_example,
)
from laplace_debiased.rows.model_state import check_repeatable
from laplace_debiased.rows.output_curvature import (
    Loss,
    OutputCurvature,
    are_probabilities,
    ends_in_link,
    example_losses,
    is_counted,
    loss_scale,
)
from laplace_debiased.rows.positions import standalone
from laplace_debiased.rows.selection import Selection, check_real, select
from laplace_debiased.rows.separation import check_no_hidden_uses, check_outputs
from laplace_debiased.rows.sharing import MATH_ATTENTION, everywhere
from laplace_debiased.rows.substitution import (
    Substitution,
    largest_activation,
    run,
)
from laplace_debiased.rows.user_warnings import warn_user

MODES = ("auto", "forward", "reverse")

# values of parameters by their `id`
Parameters = dict[int, Tensor]
# from inputs and targets of a batch to slopes and curvatures, both [batch, K]
Measure = Callable[[Inputs, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class DirectionalDerivatives:
    """Slopes and curvatures along K directions, example by example.

    Args:
        slopes: What each example contributes to the slopes, ``[examples, K]``.
        curvatures: What each example contributes to the curvatures, without damping,
            ``[examples, K]``.
        scale: Factor on the sums over examples: one over the number of terms if the
            loss is their mean, else one.
        damping: Curvature of the damping along each direction ``[K]``.
    """

    slopes: Tensor
    curvatures: Tensor
    scale: float
    damping: Tensor

    @property
    def slope(self) -> Tensor:
        """Slopes of all examples together, ``[K]``."""
        return self.scale * self.slopes.sum(0)

    @property
    def curvature(self) -> Tensor:
        """Curvatures of all examples together, with damping, ``[K]``."""
        return self.scale * self.curvatures.sum(0) + self.damping


@standalone
def directional_derivatives(
    model_func: nn.Module,
    loss_func: Loss,
    params: list[Tensor],
    data: Iterable[Batch],
    directions: Tensor,
    *,
    curvature: str = "ggn",
    damping: float = 0.0,
    mode: str = "auto",
    memory_limit: int = 2**30,
    progress_bar: bool = False,
) -> DirectionalDerivatives:
    """Compute slopes and curvatures along directions.

    Args:
        model_func: The neural network, with output ``[batch, outputs]``, whose examples
            do not mix. Its mode (train or eval) is left as it is; layers with batch
            statistics or dropout must be in eval mode.
        loss_func: ``MSELoss``, ``CrossEntropyLoss`` or ``BCEWithLogitsLoss`` with
            reduction ``"sum"`` or ``"mean"`` (over all data that are not ignored).
        params: The parameters that the quadratic is over.
        data: Batches ``(X, y)``, iterated over once.
        directions: Directions as columns ``[params, K]``, of any norm.
        curvature: ``"ggn"`` or ``"hessian"``.
        damping: Damping, added to the curvature along unit vectors.
        mode: ``"forward"`` for one forward-mode pass for each direction, ``"reverse"``
            for one backward pass for each output (GGN and supported layers only),
            ``"auto"`` for the latter where it is possible and takes fewer passes.
        memory_limit: Bytes that derivatives may take at a time; more directions or
            examples are taken in turns.
        progress_bar: Whether to show a progress bar over the batches.

    Returns:
        Slopes and curvatures of each example.

    Raises:
        ValueError: If an argument is not supported, shapes do not match, the data are
            empty or not finite, or the network mixes examples or is random.

    Example:
        >>> import torch
        >>> from laplace_debiased import directional_derivatives
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> data = [(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.ones(2, 1))]
        >>> derivatives = directional_derivatives(
        ...     model,
        ...     torch.nn.MSELoss(reduction="sum"),
        ...     list(model.parameters()),
        ...     data,
        ...     torch.eye(2),
        ... )
        >>> derivatives.slope, derivatives.curvature
        (tensor([-2., -4.]), tensor([2., 8.]))
    """
    check_real(params)
    check_repeatable(model_func)
    check_choice("curvature", curvature, CURVATURES)
    check_choice("mode", mode, MODES)
    OutputCurvature(loss_func)  # refuses what is not supported
    num_params = sum(param.numel() for param in params)
    if directions.ndim != 2 or len(directions) != num_params:
        raise ValueError(
            f"`directions` must have shape [{num_params}, K], one column for each "
            f"direction, got {tuple(directions.shape)}."
        )
    if mode == "reverse" and curvature == "hessian":
        raise ValueError("`mode='reverse'` needs `curvature='ggn'`, got 'hessian'.")

    measure: Measure | None = None
    slopes, curvatures, num_outputs, num_counted = [], [], 0, 0
    probabilities: Tensor | bool = True
    bar = tqdm(data, "[Directional derivatives]", disable=not progress_bar)
    for X, y in with_examples(bar):
        X, y = on_device(X, directions.device), moved(y, directions.device)
        check_finite_inputs(X)
        with torch.no_grad():
            output = run(model_func, X)
        y, num_outputs = check_targets(output, y, loss_func), output.shape[1]
        probabilities &= are_probabilities(loss_func, output)
        if measure is None:
            settings = (model_func, loss_func, params, directions, memory_limit)
            quadratic = _Quadratic(*settings)
            measure = _measure(quadratic, curvature, mode, X, len(y))
        slope, curved = measure(X, y)
        num_counted += int(is_counted(loss_func, y).sum())
        slopes.append(slope)
        curvatures.append(curved)
    if not slopes:
        raise ValueError("The data source is empty: there is nothing to measure.")
    if probabilities:
        warn_user(ends_in_link(loss_func))
    return DirectionalDerivatives(
        torch.cat(slopes),
        torch.cat(curvatures),
        loss_scale(loss_func, num_counted, num_outputs),
        damping * directions.square().sum(0),
    )


@dataclass(frozen=True, eq=False)
class _Quadratic:
    """What is differentiated, and how much at a time."""

    model: nn.Module
    loss_func: Loss
    params: Sequence[Tensor]
    directions: Tensor
    memory_limit: int


def _measure(
    quadratic: _Quadratic, curvature: str, mode: str, X: Inputs, batch_size: int
) -> Measure:
    """Choose the mode that is possible and takes fewer passes."""
    if curvature == "hessian" or mode == "forward":
        check_outputs(quadratic.model, X, batch_size)
        check_no_hidden_uses(quadratic.model, quadratic.params, X, batch_size)
        return (_forward_hessian if curvature == "hessian" else _forward_ggn)(quadratic)
    selection = select(quadratic.model, quadratic.params, X, batch_size, dense=True)
    if mode == "reverse" and selection.left_out:
        raise ValueError(refusal(selection.left_out))
    fewer = selection.num_outputs < quadratic.directions.shape[1]
    if mode == "reverse" or (fewer and not selection.left_out):
        return _reverse_ggn(quadratic, selection)
    return _forward_ggn(quadratic)


def _reverse_ggn(quadratic: _Quadratic, selection: Selection) -> Measure:
    r"""Multiply directions by the rows of the Jacobian.

    A layer's change of the output along a direction D is :math:`\sum_s g_s^\top D x_s`.
    Either the Jacobian :math:`\sum_s g_s x_s^\top` is formed for each output, or the
    product :math:`D x_s` for each position, whichever takes fewer multiplications.
    """
    params, layers = quadratic.params, selection.layers
    parts = quadratic.directions.split([param.numel() for param in params])
    num_directions = quadratic.directions.shape[1]
    entries = rows_per_example(layers, selection.num_outputs)

    def measure(X: Inputs, y: Tensor) -> tuple[Tensor, Tensor]:
        entry = params[0].element_size()
        size = max(2, quadratic.memory_limit // (entries * entry))
        measured = [
            measure_some(select_rows(X, part, len(y)), y[part])
            for part in torch.arange(len(y)).split(size)
        ]
        slopes, curvatures = zip(*measured, strict=True)
        return torch.cat(slopes), torch.cat(curvatures)

    def measure_some(X: Inputs, y: Tensor) -> tuple[Tensor, Tensor]:
        linear = linearize(quadratic.model, params, layers, X, len(y), check=True)
        output = linear.output.detach()
        changes = output.new_zeros(*output.shape, num_directions)  # [batch, C, K]
        for layer in layers:
            if layer.name not in linear.gradients:
                continue
            gradients = linear.gradients[layer.name]
            if layer.vector is not None:
                changes += gradients.flatten(3).sum(2) @ parts[layer.vector]
            if layer.matrix is not None:
                own = layer.as_matrix(parts[layer.matrix].T).flatten(1).T
                inputs, limit = linear.dense_inputs(layer), quadratic.memory_limit
                changes += changes_by_matrix(gradients, inputs, own, limit)
        changes = changes.movedim(2, 0)
        return _slopes_and_curvatures(quadratic.loss_func, output, changes, y)

    return measure


def _slopes_and_curvatures(
    loss_func: Loss, output: Tensor, changes: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Turn changes of the output into slopes and curvatures.

    Args:
        loss_func: The loss.
        output: Network output ``[batch, C]``.
        changes: Its change along each direction ``[K, batch, C]``.
        y: Targets.

    Returns:
        Slopes and curvatures of each example, both ``[batch, K]``.
    """
    gradient = grad(lambda f: example_losses(loss_func, f, y).sum())

    def derivatives(change: Tensor) -> tuple[Tensor, Tensor]:
        slope, product = jvp(gradient, (output,), (change,))[:2]
        return (slope * change).sum(1), (product * change).sum(1)

    slopes, curvatures = vmap(derivatives)(changes)
    return slopes.T, curvatures.T


def _forward_ggn(quadratic: _Quadratic) -> Measure:
    """Differentiate the output along each direction."""
    network, at = _functional(quadratic)

    def measure(X: Inputs, y: Tensor) -> tuple[Tensor, Tensor]:
        def change(direction: Parameters) -> Tensor:
            return jvp(lambda values: network(values, X), (at,), (direction,))[1]

        chunk = _chunk_size(quadratic, X, quadratic.memory_limit)
        changes = torch.cat(
            [vmap(change)(part) for part in _chunks(quadratic.directions, at, chunk)]
        )
        with torch.no_grad():
            output = network(at, X)
        return _slopes_and_curvatures(quadratic.loss_func, output, changes, y)

    return measure


def _forward_hessian(quadratic: _Quadratic) -> Measure:
    """Differentiate the losses twice along each direction."""
    network, at = _functional(quadratic)

    def measure(X: Inputs, y: Tensor) -> tuple[Tensor, Tensor]:
        def losses(values: Parameters) -> Tensor:
            return example_losses(quadratic.loss_func, network(values, X), y)

        def derivatives(direction: Parameters) -> tuple[Tensor, Tensor]:
            def slope(values: Parameters) -> Tensor:
                return jvp(losses, (values,), (direction,))[1]

            return jvp(slope, (at,), (direction,))[:2]

        chunk = _chunk_size(quadratic, X, quadratic.memory_limit // 2)
        parts = [
            vmap(derivatives)(part) for part in _chunks(quadratic.directions, at, chunk)
        ]
        slopes, curvatures = zip(*parts, strict=True)
        return torch.cat(slopes).T, torch.cat(curvatures).T

    return measure


def _functional(
    quadratic: _Quadratic,
) -> tuple[Callable[[Parameters, Inputs], Tensor], Parameters]:
    """Return the network as a function of the parameters, and their values."""
    own = {id(param): param.detach() for param in quadratic.model.parameters()}
    if any(id(param) not in own for param in quadratic.params):
        raise ValueError("`params` must be parameters of the model.")
    at = {id(param): param.detach() for param in quadratic.params}

    def network(values: Parameters, X: Inputs) -> Tensor:
        with (
            everywhere(MATH_ATTENTION),
            Substitution(own | values),
        ):
            try:
                return run(quadratic.model, X)
            except RuntimeError as error:  # also where a function lacks forward mode
                hint = "`mode='reverse'` needs no forward mode of the network."
                raise RuntimeError(f"{error}\n{hint}") from error

    return network, at


def _chunks(directions: Tensor, like: Parameters, size: int) -> Iterable[Parameters]:
    """Yield directions as tangents ``[size, *shape]`` of each parameter."""
    sizes = [value.numel() for value in like.values()]
    for rows in directions.T.split(size):
        yield {
            key: part.reshape(len(rows), *value.shape)
            for (key, value), part in zip(
                like.items(), rows.split(sizes, dim=1), strict=True
            )
        }


def _chunk_size(quadratic: _Quadratic, X: Inputs, memory_limit: int) -> int:
    """Find how many directions fit, by the largest activation of the network."""
    return max(1, memory_limit // (6 * largest_activation(quadratic.model, X)))
