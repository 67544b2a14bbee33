import torch

from laplace_debiased.curvature.debias import project
from laplace_debiased.curvature.decomposition import decompose, eigenvectors
from laplace_debiased.curvature.streams import (
    CURVATURE_TYPES,
    GGNCurvature,
    KFACCurvature,
)
from tests.curvature.factors import LAYERS, bases, kronecker_factors, spectra
from tests.dense import relative_error


def two_batch():
    return KFACCurvature(LAYERS, [kronecker_factors(), kronecker_factors()])


def test_kfac_merge_equals_factors_of_all_data():
    # G is a sum over the points, A a mean
    first, second = two_batch(), two_batch()
    merged = first.merge(second, share=0.25)
    for own, new, all_data in zip(first.folds, second.folds, merged.folds, strict=True):
        for a, b, c in zip(own, new, all_data, strict=True):
            assert torch.allclose(c.gradients, a.gradients + b.gradients)
            if c.inputs is not None:
                assert torch.allclose(c.inputs, 0.25 * a.inputs + 0.75 * b.inputs)


def test_kfac_merge_of_the_same_data_doubles_the_curvature():
    curvature = two_batch()
    merged = curvature.merge(curvature, share=0.5)
    assert relative_error(merged.to_matrix(), 2 * curvature.to_matrix()) < 1e-10


def ggn():
    return GGNCurvature(LAYERS, *reversed_order(*decompose(kronecker_factors())))


def reversed_order(directions, values):
    return directions, spectra(), values


def test_factors_are_those_that_gave_the_directions():
    factors = kronecker_factors()
    vectors, values = decompose(factors)
    rebuilt = GGNCurvature(LAYERS, vectors, [], values).factors()
    for own, expected in zip(rebuilt, factors, strict=True):
        for a, b in zip(own.tensors(), expected.tensors(), strict=True):
            assert torch.allclose(a, b)


def test_curvature_along_other_directions_equals_dense_algebra():
    curvature, directions = ggn(), eigenvectors(kronecker_factors())
    values = curvature.along(directions)
    V = torch.block_diag(*bases(directions))
    expected = (V.T @ curvature.to_matrix() @ V).diagonal()
    of = {}
    for layer, own in zip(LAYERS, values, strict=True):
        of |= {layer.matrix: own.matrix, layer.vector: own.vector}
    of.pop(None, None)
    actual = torch.cat([of[position].flatten() for position in sorted(of)])
    assert relative_error(actual, expected) < 1e-10
    for own, measured in zip(curvature.spectra, values, strict=True):
        for a, b in zip(own.tensors(), measured.tensors(), strict=True):
            assert torch.allclose(a.sum(), b.sum())


def test_ggn_merge_adds_up_along_the_directions_of_all():
    first, second = ggn(), ggn()
    merged = first.merge(second, share=0.25)
    moved = GGNCurvature(LAYERS, second.directions, first.along(second.directions), [])
    expected = moved.to_matrix() + second.to_matrix()
    assert relative_error(merged.to_matrix(), expected) < 1e-10
    assert merged.factor_eigenvalues is second.factor_eigenvalues
    again = first.merge(first, share=0.5)
    assert relative_error(again.to_matrix(), 2 * first.to_matrix()) < 1e-10


def test_magnitudes_are_measured_along_the_directions():
    directions, magnitudes = kronecker_factors(), kronecker_factors()
    curvature = KFACCurvature(LAYERS, [directions, magnitudes])
    assert curvature.decompose(damping=True).damping
    expected = project(magnitudes, eigenvectors(directions))
    for own, values in zip(curvature.debiased().magnitudes, expected, strict=True):
        assert torch.equal(own.gradients, values.gradients)


def test_state_dicts_rebuild_the_curvature(tmp_path):
    for name, curvature in (("kfac", two_batch()), ("ggn", ggn())):
        torch.save(curvature.state_dict(), tmp_path / "curvature.pt")
        saved = torch.load(tmp_path / "curvature.pt", weights_only=True)
        rebuilt = CURVATURE_TYPES[name].from_state_dict(LAYERS, saved)
        assert torch.equal(rebuilt.to_matrix(), curvature.to_matrix())
        merged = rebuilt.merge(rebuilt, share=0.5).to_matrix()
        assert relative_error(merged, 2 * curvature.to_matrix()) < 1e-10


def test_kfac_merge_averages_the_shares():
    first = KFACCurvature(LAYERS, two_batch().folds, [0.2, 0.8])
    second = KFACCurvature(LAYERS, two_batch().folds, [0.8, 0.2])
    merged = first.merge(second, share=0.25)
    assert torch.allclose(torch.tensor(merged.shares), torch.tensor([0.65, 0.35]))
