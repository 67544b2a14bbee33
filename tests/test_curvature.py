import torch

from laplace_debiased.curvature import CURVATURES, GGNCurvature, KFACCurvature
from laplace_debiased.eigenbasis import decompose, project
from tests.dense import relative_error
from tests.test_eigenbasis import SIZES, positive_definite


def kfacs():
    return [[positive_definite(side) for side in block] for block in SIZES]


def two_batch():
    return KFACCurvature([kfacs(), kfacs()])


def test_kfac_merge_equals_factors_of_all_data():
    # G is a sum over the points, A a mean
    first, second = two_batch(), two_batch()
    merged = first.merge(second, share=0.25)
    for own, new, all_data in zip(first.folds, second.folds, merged.folds, strict=True):
        for a, b, c in zip(own, new, all_data, strict=True):
            assert torch.allclose(c[0], a[0] + b[0])
            if len(c) == 2:
                assert torch.allclose(c[1], 0.25 * a[1] + 0.75 * b[1])


def test_kfac_merge_of_the_same_data_doubles_the_curvature():
    curvature = two_batch()
    merged = curvature.merge(curvature, share=0.5)
    assert relative_error(merged.to_matrix(), 2 * curvature.to_matrix()) < 1e-10


def test_ggn_merge_adds_up_in_the_same_eigenbasis():
    vectors = decompose(kfacs())
    first = GGNCurvature(vectors, [[torch.rand(*block)] for block in SIZES])
    second = GGNCurvature(vectors, [[torch.rand(*block)] for block in SIZES])
    expected = first.to_matrix() + second.to_matrix()
    assert relative_error(first.merge(second, 0.1).to_matrix(), expected) < 1e-6


def test_magnitudes_are_measured_along_the_directions():
    directions, magnitudes = kfacs(), kfacs()
    H = KFACCurvature([directions, magnitudes]).decompose(damping=True)
    assert H.damping
    for actual, expected in zip(
        H.eigenvalues, project(magnitudes, decompose(directions)), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_state_dicts_rebuild_the_curvature():
    for curvature in (
        two_batch(),
        GGNCurvature(decompose(kfacs()), [[torch.rand(*b).double()] for b in SIZES]),
    ):
        (kind,) = [k for k in CURVATURES.values() if isinstance(curvature, k)]
        rebuilt = kind(**curvature.state_dict())
        assert torch.equal(rebuilt.to_matrix(), curvature.to_matrix())
