import pytest
import torch
from torch import nn

from laplace_debiased.rows.model_state import (
    check_repeatable,
    evaluating,
    measuring,
    unchanged_on_failure,
)
from laplace_debiased.rows.substitution import run


def test_gradients_and_modes_are_restored():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[0].weight.grad = gradient = torch.randn(2, 2)
    expected = gradient.clone()
    model[1].eval()
    with measuring(model):
        model.train()
        model(torch.ones(1, 2)).sum().backward()
        model.zero_grad()
        model[0].bias.grad = torch.ones(2)
    assert model[0].weight.grad is gradient
    assert torch.equal(gradient, expected)
    assert model[0].bias.grad is None
    assert model.training and not model[1].training


def test_hooks_and_flags_are_restored_after_an_error():
    model = nn.Sequential(nn.Linear(2, 2))
    kept = []
    model.register_forward_hook(lambda *_: kept.append(1))
    with pytest.raises(KeyboardInterrupt), measuring(model):
        model.register_forward_pre_hook(lambda *_: kept.append(2))
        model[0].register_forward_hook(lambda *_: kept.append(3))
        model[0].register_full_backward_hook(lambda *_: kept.append(4))
        model.requires_grad_(False)
        raise KeyboardInterrupt
    model(torch.ones(1, 2)).sum().backward()
    assert kept == [1]


def test_new_hooks_stay_after_success():
    model = nn.Linear(2, 2)
    with measuring(model):
        assert not model.training
        handle = model.register_forward_hook(lambda *_: None)
    assert model.training and handle.id in model._forward_hooks


@pytest.mark.parametrize(
    "module",
    [
        nn.BatchNorm1d(4),
        nn.BatchNorm1d(4, track_running_stats=False).eval(),
        nn.InstanceNorm1d(4, track_running_stats=True),
        nn.Dropout(0.1),
        nn.LSTM(4, 4, num_layers=2, dropout=0.1),
        nn.MultiheadAttention(4, 2, dropout=0.1),
        nn.RReLU(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_modules_that_vary_are_refused(module):
    model = nn.Sequential(nn.Linear(4, 4), module)
    with pytest.raises(ValueError, match=rf"Module '1' \({type(module).__name__}\)"):
        check_repeatable(model)


@pytest.mark.parametrize(
    "module",
    [
        nn.BatchNorm1d(4).eval(),
        nn.InstanceNorm1d(4),
        nn.InstanceNorm1d(4, track_running_stats=True).eval(),
        nn.Dropout(0.1).eval(),
        nn.Dropout(0.0),
        nn.LSTM(4, 4, dropout=0.1),
        nn.RReLU().eval(),
        nn.MultiheadAttention(4, 2),
        nn.LayerNorm(4),
    ],
    ids=lambda module: type(module).__name__,
)
def test_modules_that_do_not_vary_are_accepted(module):
    check_repeatable(nn.Sequential(nn.Linear(4, 4), module))


def test_modes_differ_while_evaluating_only():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.Dropout())).eval()
    model[1].train()  # a part of a model in eval mode
    modes = [module.training for module in model.modules()]
    with pytest.raises(KeyboardInterrupt), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyboardInterrupt
    assert [module.training for module in model.modules()] == modes


def test_attributes_come_back_on_failure():
    class Thing:
        pass

    thing = Thing()
    thing.kept, thing.changed = 1, 2
    with pytest.raises(KeyboardInterrupt), unchanged_on_failure(thing):
        thing.changed, thing.new = 3, 4
        raise KeyboardInterrupt
    assert vars(thing) == {"kept": 1, "changed": 2}
    with unchanged_on_failure(thing):
        thing.changed = 3
    assert thing.changed == 3


class Writing(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("added", "replaced", "grown"):
            self.register_buffer(name, torch.zeros(1))

    def forward(self, x):
        self.added.add_(1)
        self.replaced = self.replaced + 1
        self.grown = torch.zeros(2)
        return x


@pytest.mark.parametrize("call", [run, lambda model, x: model(x)])
def test_buffers_come_back_but_for_caches(call):
    model = Writing()
    buffers = dict(model.named_buffers())
    with measuring(model):
        call(model, torch.ones(1))
    for name in ("added", "replaced"):
        assert getattr(model, name) is buffers[name]
        assert not buffers[name].any()
    assert model.grown.shape == (2,)


def test_tensors_that_are_no_buffers_come_back_but_for_caches():
    class Computing(nn.Module):
        """Computes tensors anew in each pass, as old weight normalization does."""

        def __init__(self):
            super().__init__()
            self.own, self.computed = nn.Parameter(torch.ones(1)), torch.zeros(1)
            self.grown = torch.zeros(1)

        def forward(self, x):
            self.computed, self.grown = 2 * self.own, torch.zeros(2)
            self.new = self.computed
            return x * self.computed

    model = Computing()
    computed = model.computed
    run(model, torch.ones(1))
    assert model.computed is computed and not computed.any()
    assert model.grown.shape == (2,) and model.new.item() == 2


def test_running_a_network_does_not_write_its_buffers():
    model = Writing()
    run(model, torch.ones(1))
    assert not model.added.any() and not model.replaced.any()


def test_the_last_of_several_restores_the_modes():
    model = nn.Sequential(nn.Dropout())
    first, second = evaluating(model), evaluating(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not model[0].training
    second.__exit__(None, None, None)
    assert model.training and model[0].training
