"""merge: one posterior from several, each of a part of the data."""

from functools import partial

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from laplace_debiased import merge
from laplace_debiased.posterior import fitting
from laplace_debiased.sampling.folds import Fold, Folds
from tests import dense
from tests.cases import batch, network
from tests.fits import SUBSETS, debiased, posterior

SIZES = (31, 16, 23)


@pytest.fixture(params=SUBSETS)
def make(request):
    model = network("mlp").double()
    return partial(debiased, model, subset=request.param)


def datasets(sizes=SIZES):
    X, y = batch("mlp", sum(sizes), dtype=torch.float64)
    parts = torch.arange(len(y)).split(sizes)
    return [TensorDataset(X[part], y[part]) for part in parts]


def loader(data):
    return DataLoader(data, batch_size=7)


def fitted(la, data):
    la.fit(loader(data))
    return la


def restored(make, parts, **settings):
    la = make(**settings)
    la.load_state_dict(merge(parts))
    return la


def fitted_to_folds_of_parts(la, parts):
    """A posterior of all points, each in the fold, and of the weight, of its part."""
    whole = ConcatDataset(parts)
    own = [fitting.assign(la, loader(part), None, fitting.Seen()) for part in parts]
    folds = []
    for k in range(2):
        places, weights = [], []
        for folds_of_part, start in zip(own, whole.cumulative_sizes, strict=True):
            fold = folds_of_part.folds[k]
            first = start - folds_of_part.num_data
            places += [first + index for index in fold.loader.dataset.indices]
            weights.append(fold.weights)
        folds.append(Fold(loader(Subset(whole, places)), torch.cat(weights)))
    fitting.update(la, Folds(tuple(folds), len(whole)), fitting.Seen())
    return la


@pytest.mark.parametrize("estimator", ["two_batch", "cross_fit"])
def test_merged_kfac_equals_one_fit_to_the_same_points(make, estimator):
    parts = datasets()
    fits = [fitted(make(estimator=estimator), part) for part in parts]
    merged = restored(make, fits, estimator=estimator)
    expected = fitted_to_folds_of_parts(make(estimator=estimator), parts)
    assert merged.n_data == sum(SIZES)
    for own, other in zip(
        merged.curvature.folds, expected.curvature.folds, strict=True
    ):
        for a, b in zip(own, other, strict=True):
            for matrix, exact in zip(a.tensors(), b.tensors(), strict=True):
                assert dense.relative_error(matrix, exact) < 1e-12
    whole = fitted(make(estimator=estimator), ConcatDataset(parts))
    assert torch.allclose(merged.loss, whole.loss, rtol=1e-12)
    X = parts[0].tensors[0]
    for la in (merged, expected):
        la.prior_precision = 2.0
    assert torch.allclose(merged(X), expected(X), rtol=1e-10)


def test_merged_even_parts_are_batches_one_by_one():
    model = network("mlp").double()
    parts = datasets((20, 20, 20))
    stream = debiased(model)
    fits = []
    for number, part in enumerate(parts):
        fits.append(debiased(model))
        fits[-1]._seen = fitting.Seen(0.0, 0.0, number)  # the seeds of the stream
        fits[-1].partial_fit(part.tensors)
        stream.partial_fit(part.tensors)
    merged = restored(partial(debiased, model), fits)
    error = dense.relative_error(merged.H.to_matrix(), stream.H.to_matrix())
    assert error < 1e-12
    assert merged._seen.weight == stream._seen.weight


def test_merged_ggn_is_near_one_fit_and_has_its_trace(make):
    parts = datasets((60, 60, 60, 60))
    fits = [fitted(make(magnitudes="ggn"), part) for part in parts]
    merged = restored(make, fits, magnitudes="ggn")
    expected = fitted(make(magnitudes="ggn"), ConcatDataset(parts))
    actual, exact = merged.H.to_matrix(), expected.H.to_matrix()
    # all points are used: a spectrum's sum does not depend on directions
    assert torch.allclose(actual.trace(), exact.trace(), rtol=1e-10)
    alone = dense.relative_error(4 * fits[0].H.to_matrix(), exact)
    assert dense.relative_error(actual, exact) < alone
    factors = merged.curvature.factors()
    mean = sum(own.curvature.factors()[0].inputs for own in fits) / 4
    assert dense.relative_error(factors[0].inputs, mean) < 1e-12


@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_order_and_grouping_do_not_matter(make, magnitudes, tmp_path):
    make = partial(make, magnitudes=magnitudes)
    fits = [fitted(make(), part) for part in datasets()]
    for k, la in enumerate(fits):
        la.save(tmp_path / f"{k}.pt")
    torch.save(merge([tmp_path / "0.pt", fits[1]]), tmp_path / "both.pt")
    first = restored(make, [tmp_path / "both.pt", str(tmp_path / "2.pt")])
    second = restored(make, fits[::-1])
    error = dense.relative_error(first.H.to_matrix(), second.H.to_matrix())
    # spectra are known along directions of their parts alone
    assert error < (1e-12 if magnitudes == "kfac" else 0.1)
    assert torch.allclose(first.H.to_matrix().trace(), second.H.to_matrix().trace())


def test_posteriors_that_were_loaded_or_fitted_twice_are_merged(make):
    parts = [fitted(make(), data) for data in datasets()]
    expected = restored(make, parts)
    parts[0] = restored(make, parts[:1])
    parts[1].fit(loader(datasets()[1]))
    assert (
        dense.relative_error(posterior(restored(make, parts)), posterior(expected))
        < 1e-12
    )


def test_a_merged_posterior_goes_on(make):
    fits = [fitted(make(budget=12, pool_size=14), part) for part in datasets()]
    alone = restored(make, fits[:1], budget=12, pool_size=14)
    assert torch.equal(alone.H.to_matrix(), fits[0].H.to_matrix())
    merged = restored(make, fits, budget=12, pool_size=14)
    assert merged._seen.num_points == 36
    # independent draws: variances of sums add up
    variances = [la.sampling_error.draw.covariance.diagonal() for la in fits]
    total = merged.sampling_error.draw.covariance.diagonal()
    assert torch.allclose(total, sum(variances))
    if merged._key[0] == "all":
        merged.partial_fit(datasets()[0].tensors)
        assert merged.n_data == sum(SIZES) + SIZES[0]


def test_calibration_is_forgotten(make):
    la = fitted(make(), datasets()[0])
    la.calibrate(loader(datasets()[1]), optimize_prior=False)
    assert la.calibration is not None
    assert restored(make, [la, la]).calibration is None


DIFFERENT = {
    "prior_precision": {"prior_precision": 3.0},
    "damping": {"damping": True},
    "magnitudes": {"magnitudes": "ggn"},
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_other_settings_are_refused_by_name(make, name):
    data = datasets()[0]
    one, other = fitted(make(), data), fitted(make(**DIFFERENT[name]), data)
    with pytest.raises(ValueError, match=f"posterior 0 and posterior 1.*'{name}'"):
        merge([one, other])


def test_other_parameters_folds_backends_and_networks_are_refused(tmp_path):
    from laplace.curvature.curvlinops import CurvlinopsEF

    model, data = network("mlp").double(), datasets()[0]
    la = fitted(debiased(model), data)
    la.save(tmp_path / "one.pt")
    empirical = fitted(debiased(model, backend=CurvlinopsEF), data)
    with pytest.raises(ValueError, match=r"one.pt and .*'backend'.*CurvlinopsEF"):
        merge([tmp_path / "one.pt", empirical])
    reduced = debiased(model, asdl_fisher_kwargs={"kfac_approx": "reduce"})
    with pytest.raises(ValueError, match="'approximation': 'expand' and 'reduce'"):
        merge([la, fitted(reduced, data)])
    with pytest.raises(ValueError, match="in as many folds"):
        merge([la, fitted(debiased(model, num_folds=3), data)])
    with pytest.raises(ValueError, match="'candidates'"):
        merge([la, fitted(debiased(network("mlp-without-bias").double()), data)])
    with torch.no_grad():
        next(model.parameters()).add_(1e-9)
    moved = fitted(debiased(model), data)
    with pytest.raises(ValueError, match=r"'mean' \(the model's parameters\)"):
        merge([tmp_path / "one.pt", moved])


def test_what_is_no_fitted_posterior_is_refused(tmp_path):
    la = fitted(debiased(network("mlp").double()), datasets()[0])
    with pytest.raises(ValueError, match="no posteriors"):
        merge([])
    with pytest.raises(AttributeError, match="not fitted"):
        merge([la, debiased(la.model)])
    torch.save({"other": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="format None"):
        merge([tmp_path / "other.pt"])
    damaged = la.state_dict()
    damaged["curvature.folds.0.0.inputs"] = torch.zeros(2, 2).double()
    torch.save(damaged, tmp_path / "damaged.pt")
    with pytest.raises(ValueError, match=r"shape \(2, 2\)"):
        merge([la, tmp_path / "damaged.pt"])
