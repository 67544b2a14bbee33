"""With ``ggn`` magnitudes, rows that fit into memory spare further passes."""

import gc
from unittest import mock

import pytest
import torch

from laplace_debiased.curvature.directional import DirectionalCurvatures
from laplace_debiased.curvature.factors import KroneckerFactors
from laplace_debiased.posterior import sources
from laplace_debiased.rows.kept import KeptRows
from laplace_debiased.rows.layers import Layer
from laplace_debiased.rows.sweep import Nothing
from tests import dense
from tests.cases import network
from tests.fits import SIZE, debiased, loader, posterior


def fitted(name, **kwargs):
    """A posterior, and how many points its sweeps have seen."""
    la = debiased(network(name), magnitudes="ggn", **kwargs)
    with mock.patch.object(sources, "sweep", wraps=sources.sweep) as sweep:
        la.fit(loader(name))
    return la, sum(len(call.kwargs["weights"]) for call in sweep.call_args_list)


@pytest.mark.parametrize("budget", [None, 24])
@pytest.mark.parametrize("name", ["mlp", "cnn-stride-padding", "resnet"])
def test_kept_rows_give_what_a_second_pass_gives(name, budget):
    la, num_seen = fitted(name, budget=budget)
    again, num_seen_again = fitted(name, budget=budget, memory_limit=1)
    num_pooled = 0 if budget is None else SIZE
    num_used = budget or SIZE
    assert num_seen == num_pooled + num_used
    assert num_seen_again == num_pooled + 2 * num_used
    assert dense.relative_error(posterior(la), posterior(again)) < 1e-10
    assert torch.equal(la.loss, again.loss)
    errors = zip(
        la.curvature_standard_errors.values(),
        again.curvature_standard_errors.values(),
        strict=True,
    )
    assert all(own == pytest.approx(other) for own, other in errors)


@pytest.mark.parametrize("budget", [None, 24])
@pytest.mark.parametrize(
    "random",
    [{"fisher_rank": 1}, {"backend_kwargs": {"stochastic": True}}],
    ids=["random signs", "sampled labels"],
)
def test_memory_does_not_matter_for_what_is_random(random, budget):
    la, _ = fitted("mlp", budget=budget, **random)
    again, _ = fitted("mlp", budget=budget, memory_limit=1, **random)
    assert dense.relative_error(posterior(la), posterior(again)) < 1e-10


def test_folds_share_the_room():
    whole = fitted("mlp")[0]
    with mock.patch.object(sources, "KeptRows", wraps=KeptRows) as kept:
        la, _ = fitted("mlp", memory_limit=60_000)
    first, second = (call.args[1] for call in kept.call_args_list)
    assert 0 < second < first == 60_000
    assert dense.relative_error(posterior(la), posterior(whole)) < 1e-10


@pytest.mark.parametrize("room", [79, 80])
def test_rows_are_given_up_as_soon_as_those_to_come_will_not_fit(room):
    kept = KeptRows(Nothing(), room, num_points=4)
    layer = Layer("a", 0, None, 5, 2)
    taken = []
    for _ in range(2):
        kept.start_batch(torch.ones(2))
        kept.add_gradients(layer, torch.ones(2, 1, 1, 5))
        taken.append(kept.is_complete)
    assert taken == 2 * [room == 80]
    replayed = mock.Mock()
    kept.replay(replayed)
    assert replayed.add_gradients.call_count == (2 if room == 80 else 0)


def test_kept_rows_keep_no_sums():
    """Sums in double precision are gone once there are factors."""
    alive = []

    def measured(*args):
        found = [o for o in gc.get_objects() if isinstance(o, KroneckerFactors)]
        alive.append(sum(bool(own._gradients) for own in found))
        return DirectionalCurvatures(*args)

    gc.collect()
    with mock.patch.object(sources, "DirectionalCurvatures", measured):
        fitted("mlp")
    assert alive == [0, 0]
