"""Outputs of a network for samples of its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from laplace_debiased.rows.inputs import Inputs
from laplace_debiased.rows.substitution import Substitution, run


def sampled_outputs(
    model: nn.Module,
    params: Sequence[Tensor],
    samples: Tensor,
    X: Inputs,
    **model_kwargs: Any,
) -> Iterator[Tensor]:
    """Yield the network's output for each sample of its parameters.

    laplace-torch writes the samples into the model; here it is not touched.

    Args:
        model: The network.
        params: The parameters that were sampled.
        samples: Samples ``[samples, params]``.
        X: Inputs, a tensor or a mapping.
        **model_kwargs: Further keywords of the network.

    Yields:
        Outputs ``[batch, outputs]``.
    """
    sizes = [param.numel() for param in params]
    for sample in samples:
        values = {
            id(param): part.view(param.shape).to(param.dtype)
            for param, part in zip(params, sample.split(sizes), strict=True)
        }
        with Substitution(values):
            output = run(model, X, **model_kwargs)
        yield output
