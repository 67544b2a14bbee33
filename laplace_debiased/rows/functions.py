"""The functions of torch whose uses of parameters give rows."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F

from laplace_debiased.rows import normalization_uses as normalizations
from laplace_debiased.rows.embedding_uses import EmbeddingUse
from laplace_debiased.rows.matrix_uses import ConvolutionUse, LinearUse
from laplace_debiased.rows.uses import Use

USES: dict[Callable, Callable[..., Use]] = {
    F.linear: LinearUse,
    F.conv1d: ConvolutionUse,
    F.conv2d: ConvolutionUse,
    F.conv3d: ConvolutionUse,
    F.embedding: EmbeddingUse,
    F.layer_norm: normalizations.layer_norm,
    F.rms_norm: normalizations.rms_norm,
    F.group_norm: normalizations.group_norm,
    F.batch_norm: normalizations.batch_norm,
    F.instance_norm: normalizations.instance_norm,
}
