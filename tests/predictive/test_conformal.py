from math import inf

import pytest
import torch

from laplace_debiased.predictive.conformal import conformal_threshold


@pytest.mark.parametrize(("size", "coverage"), [(9, 0.9), (50, 0.8), (99, 0.95)])
def test_coverage_is_within_its_binomial_error(size, coverage):
    draws = torch.rand(4000, size + 1)
    held = [conformal_threshold(d[:-1], coverage) >= d[-1].item() for d in draws]
    expected = -(-(size + 1) * coverage // 1) / (size + 1)
    error = (expected * (1 - expected) / 4000) ** 0.5
    assert abs(sum(held) / 4000 - expected) < 4 * error + 1e-9


def test_too_few_scores_exclude_nothing():
    assert conformal_threshold(torch.rand(8), 0.9) == inf
    assert conformal_threshold(torch.arange(9.0), 0.9) == 8


@pytest.mark.parametrize("coverage", [0.0, 1.0, -0.1, float("nan")])
def test_coverage_must_be_a_probability(coverage):
    with pytest.raises(ValueError, match="`coverage` must lie"):
        conformal_threshold(torch.rand(8), coverage)
