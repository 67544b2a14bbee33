"""Moments and samples of a network whose output is that of its linear last layer.

The gradient of output c in the last layer's output is the c-th unit vector, whatever
the example, so that its features, the layer's inputs, are all that is needed: there is
no backward pass, and one forward pass for all samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from laplace_debiased.curvature.eigenbasis import EigenbasisMatrix
from laplace_debiased.predictive.blocks import BlockPosterior, block_posteriors
from laplace_debiased.rows.inputs import Inputs
from laplace_debiased.rows.matrix_uses import LinearUse
from laplace_debiased.rows.one_hot import OneHotRows
from laplace_debiased.rows.recorder import Recorder
from laplace_debiased.rows.substitution import run, stand_ins
from laplace_debiased.rows.uses import Use


class Features(NamedTuple):
    """A network's output, and what its last layer computed it from.

    Args:
        output: The output ``[batch, outputs]``.
        features: Input of the last layer ``[batch, d_in]``; None if the output is not
            that of the last layer, and no more.
    """

    output: Tensor
    features: Tensor | None


def features_of(
    model: nn.Module, params: Sequence[Tensor], X: Inputs, **model_kwargs: Any
) -> Features:
    """Run a network, and record the inputs of its last layer.

    Args:
        model: The network.
        params: Parameters of the last layer, the weight first.
        X: Inputs, a tensor or a mapping.
        **model_kwargs: Further keywords of the network.

    Returns:
        Output and features.
    """
    values = stand_ins(model)
    weight = values[id(params[0])]
    uses: list[tuple[Use, Tensor]] = []

    def on_use(use: Use, output: Tensor) -> Tensor:
        if use.weight is weight:
            uses.append((use, output))
        return output

    with Recorder(values, on_use):
        output = run(model, X, **model_kwargs)
    if len(uses) == 1:
        use, own_output = uses[0]
        is_linear = isinstance(use, LinearUse) and not use.is_transposed
        if output is own_output and is_linear and use.input.ndim == 2:
            return Features(output, use.input)
    return Features(output, None)


def last_layer_covariance(
    features: Tensor, posterior: EigenbasisMatrix, kind: str = "full"
) -> Tensor:
    """Compute the output covariance of a linear last layer from its features.

    Args:
        features: Input of the last layer ``[batch, d_in]``.
        posterior: Posterior precision of its weight and, if it has one, its bias.
        kind: As in
            :meth:`~laplace_debiased.predictive.moments.LinearizedPredictive.moments`.

    Returns:
        ``[batch, C, C]``, ``[batch, C]`` or ``[batch * C, batch * C]``.
    """
    weight, *bias = block_posteriors(posterior)
    gradients, rows = _rows(features, weight)
    if kind == "joint":
        gradients = gradients.expand(len(features), *gradients.shape[1:])
    covariance = weight.covariance(gradients, rows, kind)
    for block in bias:  # the same for all examples
        covariance += block.covariance(gradients, None, kind)
    return covariance


def last_layer_variances(
    features: Tensor, posterior: EigenbasisMatrix, shifts: Sequence[float]
) -> Tensor:
    """Compute the output variances of a linear last layer for several priors.

    Args:
        features: Input of the last layer ``[batch, d_in]``.
        posterior: As in :func:`last_layer_covariance`.
        shifts: Numbers that are added to the posterior precision, K of them.

    Returns:
        ``[batch, C, K]``.
    """
    weight, *bias = block_posteriors(posterior)
    gradients, rows = _rows(features, weight)
    variances = weight.variances(gradients, rows, shifts)
    for block in bias:  # the same for all examples
        variances += block.variances(gradients, None, shifts)
    return variances


def _rows(
    features: Tensor, weight: BlockPosterior
) -> tuple[Tensor, Tensor | OneHotRows]:
    """Return gradient rows ``[1, C, 1, 1, C]``, and rotated input rows."""
    num_outputs = len(weight.eigenvectors[0])
    gradients = torch.eye(num_outputs, dtype=features.dtype, device=features.device)
    # [1, C, S, groups, d_out], [batch, S, groups, d_in]
    rows = weight.rotate_inputs(features[:, None, None])
    return gradients[None, :, None, None], rows


def last_layer_outputs(
    features: Tensor, params: Sequence[Tensor], samples: Tensor
) -> Tensor:
    """Compute the outputs of a linear last layer for samples of its parameters.

    Args:
        features: Input of the last layer ``[batch, d_in]``.
        params: Its weight and, if it has one, its bias.
        samples: Samples ``[samples, params]``.

    Returns:
        Outputs ``[samples, batch, outputs]``.
    """
    weight, *bias = params
    weights = samples[:, : weight.numel()].unflatten(1, weight.shape)
    # [batch, d_in] @ [samples, d_in, outputs], one matrix product for all samples
    outputs = features @ weights.mT
    if bias:
        outputs = outputs + samples[:, weight.numel() :].unsqueeze(1)
    return outputs
