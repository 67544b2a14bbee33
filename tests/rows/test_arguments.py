"""The signature of ``forward`` tells how a network is called with a mapping."""

import pytest
import torch
from torch import nn

from laplace_debiased.rows.arguments import arguments, ignored_keys, without_targets
from laplace_debiased.rows.inputs import num_examples


def module(forward):
    return type("Network", (nn.Module,), {"forward": forward})()


class Wrapper(nn.Module):
    """Hands all on to another network."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, *args, **kwargs):
        return self.base(*args, **kwargs)


class Adapter(nn.Module):
    """Names some of what it hands on, as adapters do."""

    def __init__(self, base):
        super().__init__()
        self.base, self.other = base, nn.Identity()

    def get_base_model(self):
        return self.base

    def forward(self, inputs_embeds=None, **kwargs):
        return self.base(**kwargs)


def by_name(self, input_ids=None, mask=None, labels=None):
    return input_ids, mask, labels


def by_any_name(self, input_ids=None, labels=None, **options):
    return input_ids, options, labels


def anything(self, **batch):
    return batch


def mapping(self, batch, temperature=1.0):
    return batch


def several(self, *inputs, **options):
    return inputs


BATCH = {"input_ids": torch.ones(2, 3), "mask": torch.ones(2, 3), "index": [4, 7]}


@pytest.mark.parametrize(
    "wrap", [lambda model: model, Wrapper, Adapter, nn.DataParallel]
)
@pytest.mark.parametrize(
    ("forward", "keys"),
    [
        (by_name, ["input_ids", "mask"]),
        (by_any_name, ["input_ids", "mask", "index"]),
        (anything, ["input_ids", "mask", "index"]),
        (mapping, None),
        (several, None),
    ],
)
def test_signatures_tell_what_is_taken(forward, keys, wrap):
    model = wrap(module(forward))
    args, kwargs = arguments(model, BATCH)
    if keys is None:
        assert args == [BATCH] and not kwargs
    else:
        assert not args and list(kwargs) == keys
        assert all(kwargs[key] is BATCH[key] for key in keys)
    is_ignored = forward is by_name
    assert ignored_keys(model, BATCH) == (["index"] if is_ignored else [])
    with_targets = BATCH | {"labels": torch.ones(2)}
    rest = without_targets(model, with_targets, "labels")
    assert list(rest) == list(with_targets if keys is None else BATCH)


def test_a_network_that_keeps_another_one_need_not_hand_all_on():
    def forward(self, batch, **options):
        return self.module(**batch)

    model = module(forward)
    model.module = module(by_name)
    assert arguments(model, BATCH) == ([BATCH], {})


def test_keywords_go_to_the_networks_device():
    model = module(by_name)
    model.weight = nn.Parameter(torch.ones(2, device="meta"))
    _, kwargs = arguments(model, BATCH)
    assert {value.device.type for value in kwargs.values()} == {"meta"}


def test_targets_do_not_tell_that_keywords_are_taken():
    def forward(self, batch, labels=None):
        return batch

    batch = {"x": torch.ones(2), "labels": torch.ones(2)}
    assert without_targets(module(forward), batch, "labels") is batch


def test_tensors_are_one_argument():
    X = torch.ones(2, 3)
    assert arguments(module(by_name), X) == ([X], {})
    assert without_targets(module(by_name), X, "labels") is X


def test_rows_of_any_key_are_counted_where_they_agree():
    assert num_examples({"pixel_values": torch.ones(2, 3), "size": 5}, "input_ids") == 2
    batch = {"pixel_values": torch.ones(2, 3), "positions": torch.arange(7)}
    assert num_examples(batch, "positions") == 7
    with pytest.raises(ValueError, match=r"'positions'\], of which none is"):
        num_examples(batch, "input_ids")
