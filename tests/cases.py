"""Networks, losses and data that tests are parametrized over."""

import torch
from torch import nn

NUM_OUTPUTS = 3


class MeanOverSequence(nn.Module):
    def forward(self, x):
        return x.mean(1)


def _mlp(bias=True):
    return nn.Sequential(
        nn.Linear(4, 5, bias=bias), nn.Tanh(), nn.Linear(5, NUM_OUTPUTS, bias=bias)
    )


def _cnn(*convolutions, features):
    layers = []
    for convolution in convolutions:
        layers += [convolution, nn.Tanh()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, NUM_OUTPUTS))


# name: (network, shape of one input)
NETWORKS = {
    "mlp": (_mlp, (4,)),
    "mlp-without-bias": (lambda: _mlp(bias=False), (4,)),
    "cnn-stride-padding": (
        lambda: _cnn(
            nn.Conv2d(2, 3, 3, stride=2, padding=1),
            nn.Conv2d(3, 2, 2, bias=False),
            features=8,
        ),
        (2, 6, 5),
    ),
    "cnn-padding": (
        lambda: _cnn(nn.Conv2d(1, 2, 3, padding=1), features=40),
        (1, 4, 5),
    ),
    "cnn-dilation-same": (
        lambda: _cnn(
            nn.Conv2d(1, 2, (3, 2), dilation=(2, 1), padding="same"),
            nn.Conv2d(2, 1, 3, stride=2),
            features=4,
        ),
        (1, 6, 5),
    ),
    "cnn-circular": (
        lambda: _cnn(
            nn.Conv2d(1, 2, 3, padding=(1, 2), padding_mode="circular", stride=2),
            features=24,
        ),
        (1, 5, 5),
    ),
    "cnn-groups": (
        lambda: _cnn(
            nn.Conv2d(2, 4, 2, groups=2),
            nn.Conv2d(4, 4, 2, groups=4, stride=2),
            features=4,
        ),
        (2, 4, 4),
    ),
    "conv1d": (
        lambda: _cnn(nn.Conv1d(2, 3, 3, padding=1, stride=2), features=9),
        (2, 6),
    ),
    "sequence": (
        lambda: nn.Sequential(
            nn.Linear(3, 4), nn.Tanh(), MeanOverSequence(), nn.Linear(4, NUM_OUTPUTS)
        ),
        (5, 3),
    ),
}

LOSSES = {
    "cross-entropy": nn.CrossEntropyLoss,
    "mse": nn.MSELoss,
    "bce": nn.BCEWithLogitsLoss,
}


def network(name, seed=0, dtype=torch.float64):
    """A network with random weights, in eval mode."""
    torch.manual_seed(seed)
    build, _ = NETWORKS[name]
    return build().to(dtype).eval()


def batch(name, size, loss="cross-entropy", seed=1, dtype=torch.float64):
    """Inputs and targets for a network."""
    generator = torch.Generator().manual_seed(seed)
    _, shape = NETWORKS[name]
    X = torch.randn(size, *shape, dtype=torch.float64, generator=generator).to(dtype)
    if loss == "cross-entropy":
        return X, torch.randint(NUM_OUTPUTS, (size,), generator=generator)
    y = torch.randn(size, NUM_OUTPUTS, dtype=dtype, generator=generator)
    return X, (y > 0).to(dtype) if loss == "bce" else y


def split(X, y, *sizes):
    """A data source with batches of the given sizes."""
    return list(zip(X.split(sizes), y.split(sizes), strict=True))
