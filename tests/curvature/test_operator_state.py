import pytest
import torch
from torch import nn

from tests.cases import batch, network
from tests.curvature.test_operator import SIZE, matrix, operator, sources


def test_state_dict_restores_the_operator(tmp_path):
    model = network("mlp")
    first = operator(model, *sources("mlp"), magnitudes="ggn")
    torch.save(first.state_dict(), tmp_path / "operator.pt")
    state_dict = torch.load(tmp_path / "operator.pt", weights_only=True)
    X, y = batch("mlp", SIZE, seed=7)
    second = operator(model, (X, y), (X, y), magnitudes="ggn")
    second.load_state_dict(state_dict)
    assert torch.equal(matrix(first), matrix(second))


def test_state_dict_of_another_format_is_refused():
    linear_operator = operator(network("mlp"), *sources("mlp"))
    state_dict = linear_operator.state_dict()
    del state_dict["format"]  # as before there was one
    with pytest.raises(ValueError, match="has format None"):
        linear_operator.load_state_dict(state_dict)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"settings": None}, r"lacks \['settings'\]"),
        ({"directions": []}, "'directions': 0, .* but 2 layers"),
    ],
)
def test_state_dict_that_is_not_whole_is_refused(entries, message):
    first = operator(network("mlp"), *sources("mlp"))
    other = operator(network("mlp"), *sources("mlp"))
    given = first.state_dict() | entries
    before = matrix(other)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict({k: v for k, v in given.items() if v is not None})
    assert torch.equal(matrix(other), before)


def test_state_dict_of_another_operator_is_refused():
    state_dict = operator(network("mlp"), *sources("mlp")).state_dict()
    other = operator(network("mlp"), *sources("mlp"), magnitudes="ggn")
    with pytest.raises(ValueError, match="was computed with"):
        other.load_state_dict(state_dict)
    other = operator(network("sequence"), *sources("sequence"))
    with pytest.raises(ValueError, match=r"parameters of shapes .* operator has"):
        other.load_state_dict(state_dict)


def test_state_dict_of_another_shape_is_refused():
    (_, y), _ = sources("mlp")
    turned = nn.Linear(3, 4).double(), nn.Linear(4, 3).double()
    data = [(torch.randn(len(y), own.in_features).double(), y % 3) for own in turned]
    first, other = (
        operator(own, batch, batch) for own, batch in zip(turned, data, strict=True)
    )
    with pytest.raises(ValueError, match=r"shapes \[\[4, 3\], \[4\]\]"):
        other.load_state_dict(first.state_dict())
