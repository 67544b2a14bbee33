"""Networks, losses and data that tests are parametrized over."""

import torch
from torch import nn

NUM_OUTPUTS = 3


class MeanOverSequence(nn.Module):
    def forward(self, x):
        return x.mean(1)


class Recurrent(nn.Module):
    """Calls a layer twice, on inputs of different lengths."""

    def __init__(self):
        super().__init__()
        self.shared, self.head = nn.Linear(3, 3), nn.Linear(3, NUM_OUTPUTS)

    def forward(self, x):
        hidden = self.shared(x).tanh().mean(1, keepdim=True)
        return self.head(self.shared(hidden).squeeze(1).tanh())


class Attention(nn.Module):
    """Self-attention whose projections are modules."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(*qkv)
        return self.out(attended.transpose(1, 2).flatten(2))


class Residual(nn.Module):
    def __init__(self, *modules):
        super().__init__()
        self.body = nn.Sequential(*modules)

    def forward(self, x):
        return x + self.body(x)


def with_statistics(network):
    """Norms as after training: statistics, scales and shifts that are not trivial."""
    for module in network.modules():
        if getattr(module, "running_mean", None) is not None:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
        if not isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, mean=0.5)
    return network


def _normalized(*layers, features):
    return with_statistics(_cnn(*layers, features=features))


def _resnet():
    body = (nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2))
    return with_statistics(
        nn.Sequential(
            nn.Conv2d(1, 2, 2, bias=False),
            nn.BatchNorm2d(2),
            nn.ReLU(),
            Residual(*body),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2, NUM_OUTPUTS),
        )
    )


def _transformer():
    return with_statistics(
        nn.Sequential(
            Residual(nn.LayerNorm(4), Attention(4, heads=2)),
            Residual(nn.RMSNorm(4), nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)),
            MeanOverSequence(),
            nn.Linear(4, NUM_OUTPUTS),
        )
    )


class Product(nn.Module):
    """Multiplies by matrices that are stored as ``[d_in, d_out]``."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(3, 4))
        self.second = nn.Parameter(torch.randn(4, 2))
        self.shift = nn.Parameter(torch.randn(2))

    def forward(self, x):
        hidden = torch.matmul(x, self.first).tanh().flatten(0, 1)
        hidden = torch.addmm(self.shift, hidden, self.second).tanh()
        return hidden.unflatten(0, x.shape[:2]).mean(1)


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
    "conv3d": (
        lambda: _cnn(
            nn.Conv3d(1, 2, 2, stride=(1, 2, 1), padding=(1, 0, 1)), features=36
        ),
        (1, 2, 4, 2),
    ),
    "conv-transpose-1d": (
        lambda: _cnn(
            nn.ConvTranspose1d(2, 3, 3, dilation=3, output_padding=2), features=33
        ),
        (2, 3),
    ),
    "conv-transpose-2d": (
        lambda: _cnn(
            nn.ConvTranspose2d(
                4, 6, (3, 2), (2, 1), (1, 0), (1, 0), groups=2, dilation=(2, 1)
            ),
            nn.Conv2d(6, 1, 3, stride=2),
            features=6,
        ),
        (4, 3, 4),
    ),
    "conv-transpose-3d": (
        lambda: _cnn(
            nn.ConvTranspose3d(2, 2, 2, stride=2, groups=2, bias=False), features=32
        ),
        (2, 1, 1, 2),
    ),
    "products": (
        lambda: nn.Sequential(Product(), nn.Tanh(), nn.Linear(2, NUM_OUTPUTS)),
        (3, 3),
    ),
    "batch-norm-1d": (
        lambda: _normalized(nn.Linear(4, 5), nn.BatchNorm1d(5), features=5),
        (4,),
    ),
    "group-norm": (
        lambda: _normalized(nn.Conv2d(1, 4, 2), nn.GroupNorm(2, 4), features=36),
        (1, 4, 4),
    ),
    "instance-norm": (
        lambda: _normalized(
            nn.Conv1d(1, 2, 2), nn.InstanceNorm1d(2, affine=True), features=10
        ),
        (1, 6),
    ),
    "layer-norm-2d": (
        lambda: _normalized(nn.Conv1d(1, 2, 2), nn.LayerNorm([2, 3]), features=6),
        (1, 4),
    ),
    "resnet": (_resnet, (1, 4, 4)),
    "transformer": (_transformer, (3, 4)),
    "recurrent": (Recurrent, (2, 3)),
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
    # the same numbers in each dtype
    y = torch.randn(size, NUM_OUTPUTS, dtype=torch.float64, generator=generator)
    return X, ((y > 0) if loss == "bce" else y).to(dtype)


def split(X, y, *sizes):
    """A data source with batches of the given sizes."""
    return list(zip(X.split(sizes), y.split(sizes), strict=True))
