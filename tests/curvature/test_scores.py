import pytest
import torch
from torch import nn

from laplace_debiased import DebiasedKFACLinearOperator, curvature_scores, draw_points
from tests import dense
from tests.cases import LOSSES, batch, network, split

SIZE = 30


@pytest.mark.parametrize("loss_name", LOSSES)
def test_scores_are_traces_of_the_output_curvature(loss_name):
    model, (X, y) = network("mlp"), batch("mlp", SIZE, loss_name)
    loss = LOSSES[loss_name](reduction="sum")
    scores = curvature_scores(model, loss, split(X, y, 11, 19))
    for n in range(5):
        columns = dense.output_columns(model(X[n : n + 1]), y[n : n + 1], loss)
        assert torch.allclose(scores[n], sum(c.square().sum() for c in columns))


def test_drawn_points_give_an_unbiased_operator():
    model, (X, y) = network("mlp"), batch("mlp", SIZE)
    for parameter in model.parameters():
        parameter.data *= 4
    loss = nn.CrossEntropyLoss(reduction="sum")
    params = list(model.parameters())
    scores = curvature_scores(model, loss, [(X, y)])

    def trace(points, weights):
        data = [(X[points], y[points])]
        return DebiasedKFACLinearOperator(
            model,
            loss,
            params,
            [(X, y)],
            data,
            magnitudes="ggn",
            magnitude_weights=weights,
        ).trace

    exact = trace(torch.arange(SIZE), None)
    estimates = torch.stack(
        [trace(*draw_points(scores, 8, seed=s)) for s in range(200)]
    )
    uniform = torch.stack(
        [trace(*draw_points(torch.ones(SIZE), 8, seed=s)) for s in range(200)]
    )
    assert (estimates.mean() - exact).abs() < 4 * estimates.std() / 200**0.5
    assert estimates.std() < 0.9 * uniform.std()


def test_models_that_vary_are_refused_and_stay():
    model = network("batch-norm-1d").train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"call `model.eval\(\)`"):
        curvature_scores(model, nn.CrossEntropyLoss(), [batch("batch-norm-1d", SIZE)])
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
