"""Messages about parameters lead with their share, and are short."""

import pytest

from laplace_debiased.rows.left_out import LeftOut, refusal, warning


def entries(*modules):
    """Left-out parameters of modules: name, type, reason and sizes by key."""
    found = []
    for name, kind, reason, sizes in modules:
        for key, size in sizes.items():
            full = f"{name}.{key}" if name else key
            found.append(LeftOut(full, kind, len(found), size, reason))
    return found


def test_modules_of_a_type_are_counted():
    convolutions = [
        (f"blocks.{k}.conv", "Conv2dSame", "is used by `sigmoid`", {"weight": 10})
        for k in range(49)
    ]
    own = ("token", "Vision", "is used by `cat`", {"first": 10})
    message = warning(entries(own, *convolutions), 500)
    assert message.startswith("50 % of the parameters (500 of 1,000) stay at their")
    assert (
        "49 × Conv2dSame (weight), such as blocks.0.conv, is used by `sigmoid`, token "
        "(Vision: first) is used by `cat`. Pass `strict=True`"
    ) in message


def test_parameters_of_a_module_are_named_together():
    own = [("a", "Linear", "is not used", {"weight": 4, "bias": 2})]
    assert "a (Linear: weight, bias) is not used." in refusal(entries(*own))
    own = [("", "Net", "is not used", {"scale": 4})]
    assert "(model) (Net: scale) is not used." in refusal(entries(*own))


def test_messages_are_short_whatever_the_network():
    modules = [
        (f"layer.{k}", f"Kind{k % 20}", "is used by `mul`", {f"p{k}.{j}": 7})
        for k in range(400)
        for j in range(5)
    ]
    for message in (warning(entries(*modules), 1), refusal(entries(*modules))):
        assert len(message) < 1000
        assert "and 9,800 in 280 further modules" in message
    keys = {f"key{k}": 1 for k in range(50)}
    message = refusal(entries(("table", "Table", "is used by `mul`", keys)))
    assert "(Table: key0, key1, key2, key3, key4, 45 more) is used" in message


@pytest.mark.parametrize(
    ("left_out", "fitted", "share"),
    [
        (1, 10**6, "Less than 0.1 %"),
        (10**6, 1, "More than 99.9 %"),
        (4, 996, "0.4 %"),
        (995, 5, "99.5 %"),
        (1, 2, "33 %"),
    ],
)
def test_shares(left_out, fitted, share):
    own = entries(("a", "Linear", "is not used", {"weight": left_out}))
    assert warning(own, fitted).startswith(f"{share} of the parameters")
