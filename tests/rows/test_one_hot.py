"""One-hot rows: what is computed from them equals what dense rows give."""

import pytest
import torch
from torch import nn

from laplace_debiased.rows.layers import join_positions
from laplace_debiased.rows.one_hot import OneHotRows
from laplace_debiased.rows.selection import select
from tests.rows.recording import supported

BATCH, POSITIONS, SIZE = 5, 4, 7


def rows(seed=0):
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(SIZE, (BATCH, POSITIONS), generator=generator)
    values = torch.randint(2, (BATCH, POSITIONS), generator=generator).double()
    return OneHotRows(numbers, values, SIZE)


def dense(own):
    one_hot = nn.functional.one_hot(own.numbers, SIZE).double()
    return (one_hot * own.values[:, :, None]).unsqueeze(2)


def test_covariance_and_lengths_are_those_of_dense_rows():
    own, weights = rows(), torch.rand(BATCH).double()
    x = dense(own).squeeze(2)
    expected = torch.einsum("n,nsi,nsj->ij", weights, x, x)
    assert torch.allclose(torch.diag(own.covariance(weights)), expected)
    assert torch.allclose(own.squared_lengths(), x.square().sum((1, 2)))
    assert own.shape == dense(own).shape


def test_compressed_rows_are_dense_rows_of_the_numbers_that_there_are():
    own = rows()
    some, numbers = own.compressed()
    assert torch.equal(some, dense(own)[..., numbers])
    assert set(numbers.tolist()) == set(own.numbers.flatten().tolist())


def test_rows_are_split_and_joined():
    first, second = rows(0), rows(1)
    joined = join_positions([first, second])
    assert torch.equal(dense(joined), torch.cat([dense(first), dense(second)], 1))
    parts = first.split(2)
    assert torch.equal(torch.cat([dense(part) for part in parts]), dense(first))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding_idx": 1},
        {"padding_idx": -1},
        {"scale_grad_by_freq": True},
        {"sparse": True},
        {"max_norm": 0.5},
    ],
)
def test_embeddings_have_one_hot_rows(options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(3, 4, **options), nn.Flatten(), nn.Linear(8, 2)
    ).double()
    X = torch.tensor([[1, 1], [0, 2], [1, 2], [2, 2]])
    selection = select(model, list(model.parameters()), X, len(X))
    kinds = {layer.name: layer.is_embedding for layer in selection.layers}
    assert kinds == {"0": True, "2": False}
    _, _, left_out = supported(model, X, dense=True)
    assert [entry.name for entry in left_out] == ["0.weight"]
