"""Some positions of an example in the place of all."""

from collections import Counter
from random import Random

import pytest
import torch

from laplace_debiased.curvature.factors import KroneckerFactors
from laplace_debiased.rows.layers import Layer
from laplace_debiased.rows.matrix_uses import ConvolutionUse, LinearUse
from laplace_debiased.rows.output_curvature import OutputCurvature
from laplace_debiased.rows.selection import select
from laplace_debiased.rows.sweep import sweep
from laplace_debiased.rows.thinning import Thinning, num_taken, thinnings
from laplace_debiased.rows.uses import Layout
from tests import dense

USES = {
    "linear": LinearUse(torch.randn(3, 10, 4)),
    "linear, sequence-first": LinearUse(torch.randn(10, 3, 4)),
    "convolution": ConvolutionUse(
        torch.randn(3, 2, 9, 7), torch.randn(4, 2, 3, 3), None, 1, 1
    ),
    "strided, dilated, grouped": ConvolutionUse(
        torch.randn(3, 4, 11), torch.randn(4, 2, 2), None, 2, 0, 2, 2
    ),
    "same": ConvolutionUse(
        torch.randn(3, 2, 5, 4), torch.randn(4, 2, 2, 3), None, 1, "same"
    ),
    "volume": ConvolutionUse(torch.randn(3, 1, 4, 5, 6), torch.randn(2, 1, 2, 2, 2)),
    "windows": ConvolutionUse(torch.randn(6, 2, 5, 5), torch.randn(4, 2, 3, 3)),
    "windows, apart": ConvolutionUse(torch.randn(6, 2, 5, 5), torch.randn(4, 2, 3, 3)),
}
LAYOUTS = {
    "linear, sequence-first": Layout(1),
    "windows, apart": Layout(0, neighbours=False),
}


@pytest.mark.parametrize("name", USES)
def test_rows_are_those_of_the_chosen_positions(name):
    use, layout = USES[name], LAYOUTS.get(name, Layout())
    rows = use.input_rows(layout, 3)
    chosen = torch.tensor([[0, 2], [1, 1], [3, rows.shape[1] - 1]])

    def choice(batch_size, num_positions):
        assert (batch_size, num_positions) == rows.shape[:2]
        return chosen

    some = use.input_rows(layout, 3, choice)
    expected = torch.stack([rows[n, own] for n, own in enumerate(chosen)])
    assert torch.equal(some, expected)


@pytest.mark.parametrize(("taken", "positions"), [(1, 1), (3, 7), (8, 49), (49, 49)])
def test_each_position_is_taken_equally_often(taken, positions):
    counts = Counter()
    for seed in range(300):
        chosen = Thinning(taken, positions, Random(seed).getrandbits(32))(5, positions)
        assert chosen.shape == (5, taken)
        assert all(len(set(own)) == taken for own in chosen.tolist())
        counts.update(chosen.flatten().tolist())
    assert set(counts) == set(range(positions))
    expected = 1500 * taken / positions
    assert max(abs(count - expected) for count in counts.values()) < 0.15 * expected


def test_calls_have_their_share_of_positions():
    counts = Counter()
    for seed in range(400):
        draw = Thinning(4, 25, Random(seed).getrandbits(32))
        sizes = [draw(2, num_positions).shape[1] for num_positions in (1, 20, 4)]
        assert sum(sizes) == 4
        counts.update(dict(enumerate(sizes)))
    means = [counts[call] / 400 for call in range(3)]
    expected = [4 * size / 25 for size in (1, 20, 4)]
    assert means == pytest.approx(expected, abs=0.06)


def test_calls_continue_in_a_pass():
    layer = Layer("a", 0, None, 4, 2, num_positions=50)
    of_layer = thinnings(4, 0)
    assert of_layer(layer) is of_layer(layer)
    assert sum(of_layer(layer)(3, 1).shape[1] for _ in range(50)) == 4


def test_all_positions_need_no_choice():
    layer = Layer("a", 0, None, 64, 64, num_positions=20)
    assert thinnings(20, 0)(layer) is None
    assert thinnings(19, 0)(layer) is not None


def test_layers_of_many_inputs_have_fewer_positions():
    def taken(d_in, num_positions):
        layer = Layer("a", 0, None, 64, d_in, num_positions=num_positions)
        return num_taken(layer, 32)

    assert [taken(64, 1000), taken(64, 20), taken(64, 1)] == [32, 20, 1]
    assert [taken(640, 100), taken(6400, 100), taken(6400, 2)] == [20, 4, 2]


def test_covariances_of_some_positions_are_unbiased():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3, padding=1),
        torch.nn.Tanh(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(3, 2),
    ).double()
    X = torch.randn(40, 1, 12, 12).double().cumsum(2).cumsum(3)  # no two places alike
    data = [(part, torch.zeros(len(part)).long()) for part in X.split(8)]
    params = list(model.parameters())
    layers = select(model, params, X, len(X)).layers

    def covariances(positions, seed=0):
        factors = KroneckerFactors(layers, params)
        summary = sweep(
            model,
            params,
            layers,
            data,
            OutputCurvature(torch.nn.CrossEntropyLoss()),
            factors,
            backward=False,
            positions=positions,
            seed=seed,
        )
        assert summary.num_data == 40
        return factors.inputs()[0].inputs

    expected = covariances(None)
    some = torch.stack([covariances(8, seed) for seed in range(200)])
    assert dense.relative_error(some[0], expected) > 1e-3
    assert dense.relative_error(some.mean(0), expected) < 0.02
