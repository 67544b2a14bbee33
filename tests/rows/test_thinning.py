"""Some positions of an example in the place of all."""

import pytest
import torch

from laplace_debiased.curvature.factors import KroneckerFactors
from laplace_debiased.rows.output_curvature import OutputCurvature
from laplace_debiased.rows.selection import select
from laplace_debiased.rows.sweep import sweep
from laplace_debiased.rows.uses import ConvolutionUse, Layout, LinearUse, Thinning
from tests import dense

USES = {
    "linear": LinearUse(torch.randn(3, 10, 4)),
    "linear, sequence-first": LinearUse(torch.randn(10, 3, 4)),
    "convolution": ConvolutionUse(
        torch.randn(3, 2, 9, 7), torch.randn(4, 2, 3, 3), None, 1, 1
    ),
    "strided, grouped": ConvolutionUse(
        torch.randn(3, 4, 11), torch.randn(4, 2, 2), None, 2, 0, 2, 2
    ),
    "volume": ConvolutionUse(torch.randn(3, 1, 4, 5, 6), torch.randn(2, 1, 2, 2, 2)),
    "a window each": ConvolutionUse(torch.randn(6, 2, 5, 5), torch.randn(4, 2, 3, 3)),
}


def layout_of(name):
    return Layout(1) if "sequence-first" in name else Layout()


@pytest.mark.parametrize("factor", [1, 2, 4, 9, 100])
@pytest.mark.parametrize("name", USES)
def test_all_starts_together_take_each_position_equally_often(name, factor):
    use, layout = USES[name], layout_of(name)
    rows = use.input_rows(layout, 3)
    num_axes = 1 if isinstance(use, LinearUse) else use.weight.ndim - 2
    num_starts = round(factor ** (1 / num_axes)) ** num_axes
    taken = [
        use.input_rows(layout, 3, Thinning(factor, start))
        for start in range(num_starts)
    ]
    assert all(part.shape[1] >= 1 for part in taken)
    assert all(part.shape[2:] == rows.shape[2:] for part in taken)
    for example in range(3):
        own = {tuple(row.flatten().tolist()) for row in rows[example]}
        found = [tuple(r.flatten().tolist()) for part in taken for r in part[example]]
        assert set(found) <= own
        if factor <= 4:  # no axis is shorter than the distance
            counts = {row: found.count(row) for row in own}
            assert set(counts) == own and len(set(counts.values())) == 1


def test_sizes_fall_with_the_factor():
    use = USES["convolution"]
    sizes = [
        use.input_rows(Layout(), 3, Thinning(f, 0)).shape[1] for f in (1, 4, 9, 16)
    ]
    assert sizes == [63, 20, 9, 6]


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
    some = torch.stack([covariances(16, seed) for seed in range(200)])
    assert dense.relative_error(some[0], expected) > 1e-3
    assert dense.relative_error(some.mean(0), expected) < 0.02
