r"""Square roots of a loss's Hessian in the outputs, of few columns.

The Hessian of cross-entropy is :math:`\Lambda = \mathrm{diag}(p) - p p^\top`. With
classes in descending order of their probabilities, of which :math:`t_k = \sum_{j \geq
k} p_j` is left from class k on, its Cholesky factor has the columns

.. math::
    \sqrt{p_k t_{k+1} / t_k} \Bigl(e_k - \sum_{j > k} (p_j / t_{k+1}) e_j\Bigr),
    \qquad k = 1, \dots, C - 1 .

They are one less than classes, and the first ones have nearly all of the trace: two
classes that are confused take one. What the first r leave is :math:`t_{r+1}` times the
Hessian of the classes that remain, with probabilities :math:`q = p / t_{r+1}` and the
root :math:`(I - q 1^\top) \mathrm{diag}(\sqrt q)`; random signs of its columns make one
of them.

Source: the Cholesky factor of a multinomial's covariance is that of Tanabe and Sagae,
1992 (Journal of the Royal Statistical Society B 54).
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad


def softmax_root(
    output: Tensor, rank: int | None = None, generator: Generator | None = None
) -> Tensor:
    """Compute a root of cross-entropy's Hessian.

    Args:
        output: Logits ``[batch, C]``.
        rank: How many columns are kept; one more stands for all others, which are added
            with random signs. None for all.
        generator: Draws the signs.

    Returns:
        Columns ``[columns, batch, C]``, the sum of whose outer products is the Hessian,
        in expectation if there are fewer than C - 1.
    """
    num_classes = output.shape[1]
    # half precision cannot add up the small ones
    dtype = torch.promote_types(output.dtype, torch.float32)
    p, order = output.to(dtype).softmax(1).sort(1, descending=True)
    left = p.flip(1).cumsum(1).flip(1)  # t_k
    after = pad(left[:, 1:], (0, 1))  # t_{k+1}
    tiny = torch.finfo(p.dtype).tiny
    count = num_columns(num_classes - 1, rank)
    kept = count if count == max(1, num_classes - 1) else count - 1
    # the quotient first: products of two of them underflow
    sizes = (p * (after / left.clamp(min=tiny))).sqrt()[:, :kept]
    # [batch, kept, C], which may be large
    columns = p[:, None] / after[:, :kept, None].clamp(min=tiny)
    columns.triu_(1).neg_()
    columns.diagonal(dim1=1, dim2=2).fill_(1)
    columns *= sizes[:, :, None]
    if kept < count:
        own, total = p[:, kept:], left[:, kept : kept + 1]
        own = own / total.clamp(min=tiny)
        signed = own.sqrt() * _signs(own, generator)
        rest = total.sqrt() * (signed - own * signed.sum(1, keepdim=True))
        columns = torch.cat([columns, pad(rest, (kept, 0))[:, None]], 1)
    in_order = torch.empty_like(columns)
    in_order.scatter_(2, order[:, None].expand_as(columns), columns)
    return in_order.movedim(1, 0).to(output.dtype)


def diagonal_root(
    sizes: Tensor, rank: int | None = None, generator: Generator | None = None
) -> Tensor:
    """Compute a root of a diagonal Hessian.

    Args:
        sizes: Roots of the diagonal ``[batch, C]``.
        rank: As in :func:`softmax_root`; the largest ones of each example are kept.
        generator: Draws the signs.

    Returns:
        Columns ``[columns, batch, C]``.
    """
    count = num_columns(sizes.shape[1], rank)
    if count == sizes.shape[1]:
        return torch.diag_embed(sizes).movedim(1, 0)
    values, largest = sizes.topk(count - 1, dim=1)
    kept = sizes.new_zeros(*values.shape, sizes.shape[1])
    kept.scatter_(2, largest[:, :, None], values[:, :, None])
    rest = sizes.scatter(1, largest, 0.0) * _signs(sizes, generator)
    return torch.cat([kept, rest[:, None]], 1).movedim(1, 0)


def num_columns(full_rank: int, rank: int | None) -> int:
    """Count the columns of a root.

    Args:
        full_rank: Number of columns of an exact one.
        rank: As in :func:`softmax_root`.

    Returns:
        The number, at least one.
    """
    return max(1, full_rank if rank is None else min(full_rank, rank + 1))


def _signs(like: Tensor, generator: Generator | None) -> Tensor:
    bits = torch.randint(2, like.shape, device=like.device, generator=generator)
    return (2 * bits - 1).to(like.dtype)
