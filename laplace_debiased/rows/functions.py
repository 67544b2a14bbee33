"""The functions of torch whose uses of parameters give rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from laplace_debiased.rows import matrix_uses as matrices
from laplace_debiased.rows import normalization_uses as normalizations
from laplace_debiased.rows.embedding_uses import EmbeddingUse
from laplace_debiased.rows.transposed_convolution_uses import TransposedConvolutionUse
from laplace_debiased.rows.uses import Use

# None where the call is one of another kind
USES: dict[Callable, Callable[..., Use | None]] = {
    F.linear: matrices.linear,
    torch.matmul: matrices.product,
    Tensor.matmul: matrices.product,
    Tensor.__matmul__: matrices.product,
    torch.mm: matrices.matrix_product,
    Tensor.mm: matrices.matrix_product,
    torch.addmm: matrices.shifted_product,
    Tensor.addmm: matrices.shifted_product,
    F.conv1d: matrices.ConvolutionUse,
    F.conv2d: matrices.ConvolutionUse,
    F.conv3d: matrices.ConvolutionUse,
    F.conv_transpose1d: TransposedConvolutionUse,
    F.conv_transpose2d: TransposedConvolutionUse,
    F.conv_transpose3d: TransposedConvolutionUse,
    F.embedding: EmbeddingUse,
    F.layer_norm: normalizations.layer_norm,
    F.rms_norm: normalizations.rms_norm,
    F.group_norm: normalizations.group_norm,
    F.batch_norm: normalizations.batch_norm,
    F.instance_norm: normalizations.instance_norm,
}
