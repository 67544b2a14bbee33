import math
import re

import pytest
import torch
from curvlinops import GGNLinearOperator
from torch import nn

from laplace_debiased import compare_eigenspaces, top_eigenspace
from laplace_debiased.quadratics.eigenspace import Eigenspace
from tests.cases import batch, network

K = 6


@pytest.fixture(scope="module")
def dense_curvatures():
    """GGN of three mini-batches, as operators and as matrices."""
    model, (X, y) = network("mlp"), batch("mlp", 60)
    params, eye = list(model.parameters()), torch.eye(43).double()
    operators = {
        f"batch {k}": GGNLinearOperator(
            model, nn.CrossEntropyLoss(), params, [(X[k::3], y[k::3])]
        )
        for k in range(3)
    }
    return operators, [operator @ eye for operator in operators.values()]


@pytest.fixture(scope="module")
def comparison(dense_curvatures):
    operators, _ = dense_curvatures
    return compare_eigenspaces(
        {name: top_eigenspace(H, K, tol=1e-14) for name, H in operators.items()}
    )


def test_comparison_equals_dense_decompositions(dense_curvatures, comparison):
    _, matrices = dense_curvatures
    spaces = [torch.linalg.eigh(H) for H in matrices]
    for i, (values, U) in enumerate(spaces):
        expected = values.flip(0)[:K]
        assert torch.allclose(comparison.eigenvalues[i], expected, rtol=1e-9)
        for j, (_, V) in enumerate(spaces):
            cosines = torch.linalg.svdvals(U[:, -K:].T @ V[:, -K:])
            mean = cosines.square().mean()
            assert torch.allclose(comparison.overlaps[i, j], mean, rtol=1e-8)
            angles = comparison.angles[i, j]
            assert torch.allclose(angles.cos(), cosines, rtol=1e-8)
    assert comparison.random_overlap == K / 43


def test_table_has_spectra_side_by_side_and_overlaps(comparison):
    text = str(comparison)
    assert "| mean eigenvalue | batch 0 | batch 1 | batch 2 |" in text
    means = comparison.eigenvalues[:, 1:5].mean(1).tolist()
    assert "| 2 to 5 | " + " | ".join(f"{m:.3g}" for m in means) + " |" in text
    pairs = re.findall(r"^\| batch (\d), batch (\d) \| ([\d.]+) \|", text, re.M)
    expected = [(0, 1), (0, 2), (1, 2)]
    assert [(int(i), int(j)) for i, j, _ in pairs] == expected
    for (i, j), (_, _, value) in zip(expected, pairs, strict=True):
        assert value == f"{comparison.overlaps[i, j]:.3f}"


def test_angles_in_the_table_are_degrees():
    eye, values = torch.eye(4).double(), torch.tensor([2.0, 1.0]).double()
    tilted = eye[:, 1] * math.cos(0.5) + eye[:, 2] * math.sin(0.5)
    pair = {
        "a": Eigenspace(values, eye[:, :2]),
        "b": Eigenspace(values, torch.stack([eye[:, 0], tilted], 1)),
    }
    assert "| a, b | 0.885 | 0.0° | 14.3° | 28.6° |" in str(compare_eigenspaces(pair))


def test_figure_shows_spectra_and_angles(comparison, tmp_path):
    figure = comparison.plot(tmp_path / "spectra.png")
    assert (tmp_path / "spectra.png").read_bytes().startswith(b"\x89PNG")
    spectra, angles = figure.axes
    drawn = [line.get_ydata() for line in spectra.lines]
    assert drawn == [pytest.approx(row.tolist()) for row in comparison.eigenvalues]
    degrees = comparison.angles[0, 2].rad2deg().tolist()
    assert angles.lines[1].get_ydata() == pytest.approx(degrees)


def test_eigenspaces_that_cannot_be_compared_are_refused():
    values, eye = torch.ones(2), torch.eye(4)
    space = Eigenspace(values, eye[:, :2])
    with pytest.raises(ValueError, match=r"got 1 of shape \[\(4, 2\)\]"):
        compare_eigenspaces({"a": space})
    other = Eigenspace(torch.ones(3), eye[:, :3])
    with pytest.raises(ValueError, match=r"got 2 of shape \[\(4, 2\), \(4, 3\)\]"):
        compare_eigenspaces({"a": space, "b": other})
