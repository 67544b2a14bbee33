"""Networks whose outputs are probabilities, where logits are expected."""

import warnings

import pytest
import torch
from laplace.curvature import AsdlGGN, CurvlinopsGGN
from torch import nn

from laplace_debiased import (
    DebiasedKFACLinearOperator,
    curvature_scores,
    directional_derivatives,
)
from tests.cases import batch, network
from tests.fits import SUBSETS, debiased, loader

MESSAGE = "as if it ended in a softmax"


class InBetween(nn.Module):
    """A softmax before the last layer is none at the end."""

    def __init__(self):
        super().__init__()
        self.net, self.last = network("mlp"), nn.Linear(3, 3).double()

    def forward(self, x):
        return self.last(self.net(x).softmax(1))


@pytest.mark.parametrize("backend", [CurvlinopsGGN, AsdlGGN])
def test_fits_warn(backend):
    model = nn.Sequential(*network("mlp"), nn.Softmax(1)).float()
    X, y = batch("mlp", 40)
    data = [(X.float(), y)]
    la = debiased(model, backend=backend)
    with pytest.warns(UserWarning, match=MESSAGE):
        la.fit(data)
    with pytest.warns(UserWarning, match=MESSAGE):
        la.partial_fit(data[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_classes", [3, 1000])
def test_rounding_hides_no_softmax(dtype, num_classes):
    model = nn.Sequential(nn.Linear(4, num_classes), nn.Softmax(1)).to(dtype)
    data = [(torch.randn(50, 4, dtype=dtype), torch.zeros(50, dtype=torch.long))]
    with pytest.warns(UserWarning, match=MESSAGE):
        curvature_scores(model, nn.CrossEntropyLoss(), data)


def test_the_last_layer_and_all_interfaces_warn():
    model = nn.Sequential(*network("mlp"), nn.Softmax(1))
    params, loss, data = list(model.parameters()), nn.CrossEntropyLoss(), None
    X, y = batch("mlp", 20)
    data = [(X[:5], y[:5]), (X[5:], y[5:])]
    directions = torch.ones(sum(p.numel() for p in params), 1, dtype=torch.float64)
    operator = DebiasedKFACLinearOperator(model, loss, params, data, data)
    la = debiased(model, subset="last_layer", last_layer_name="2", budget=10)
    for function in (
        operator.compute,
        lambda: directional_derivatives(model, loss, params, data, directions),
        lambda: la.fit(loader()),
    ):
        with pytest.warns(UserWarning, match=MESSAGE):
            function()


@pytest.mark.parametrize("subset", SUBSETS)
def test_others_do_not(subset):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{MESSAGE}")
        for model in (
            network("mlp"),
            nn.Sequential(*network("mlp"), nn.LogSoftmax(1)),
            InBetween(),
        ):
            name = {"last_layer": "last" if isinstance(model, InBetween) else "2"}
            options = {"last_layer_name": name[subset]} if subset in name else {}
            debiased(model, subset=subset, **options).fit(loader())
        # in regression, outputs may be shares
        shares = nn.Sequential(*network("mlp"), nn.Softmax(1))
        debiased(shares, "regression").fit(loader(likelihood="regression"))
