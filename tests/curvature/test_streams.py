import torch
from torch import kron

from laplace_debiased.curvature.eigenbasis import decompose, eigendecompose, project
from laplace_debiased.curvature.streams import CURVATURES, GGNCurvature, KFACCurvature
from tests.curvature.test_eigenbasis import SIZES, positive_definite
from tests.dense import relative_error


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


def ggn():
    values = [[torch.rand(*block).double()] for block in SIZES]
    vectors, factor_values = eigendecompose(kfacs())
    return GGNCurvature(vectors, values, factor_values)


def test_factors_are_those_that_gave_the_directions():
    factors = kfacs()
    vectors, values = eigendecompose(factors)
    rebuilt = GGNCurvature(vectors, [], values).factors()
    for own, expected in zip(rebuilt, factors, strict=True):
        assert all(torch.allclose(*pair) for pair in zip(own, expected, strict=True))


def test_curvature_along_other_directions_equals_dense_algebra():
    curvature, directions = ggn(), decompose(kfacs())
    values = curvature.along(directions)
    bases = [kron(*each) if len(each) == 2 else each[0] for each in directions]
    V = torch.block_diag(*bases)
    expected = (V.T @ curvature.to_matrix() @ V).diagonal()
    actual = torch.cat([value.flatten() for (value,) in values])
    assert relative_error(actual, expected) < 1e-10
    for (own,), (measured,) in zip(curvature.eigenvalues, values, strict=True):
        assert torch.allclose(own.sum(), measured.sum())


def test_ggn_merge_adds_up_along_the_directions_of_all():
    first, second = ggn(), ggn()
    merged = first.merge(second, share=0.25)
    moved = GGNCurvature(second.eigenvectors, first.along(second.eigenvectors), [])
    expected = moved.to_matrix() + second.to_matrix()
    assert relative_error(merged.to_matrix(), expected) < 1e-10
    assert merged.factor_eigenvalues is second.factor_eigenvalues
    again = first.merge(first, share=0.5)
    assert relative_error(again.to_matrix(), 2 * first.to_matrix()) < 1e-10


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
        ggn(),
    ):
        (kind,) = [k for k in CURVATURES.values() if isinstance(curvature, k)]
        rebuilt = kind(**curvature.state_dict())
        assert torch.equal(rebuilt.to_matrix(), curvature.to_matrix())
        merged = rebuilt.merge(rebuilt, share=0.5).to_matrix()
        assert relative_error(merged, 2 * curvature.to_matrix()) < 1e-10


def test_kfac_merge_averages_the_shares():
    first = KFACCurvature([kfacs(), kfacs()], [0.2, 0.8])
    second = KFACCurvature([kfacs(), kfacs()], [0.8, 0.2])
    merged = first.merge(second, share=0.25)
    assert torch.allclose(torch.tensor(merged.shares), torch.tensor([0.65, 0.35]))
