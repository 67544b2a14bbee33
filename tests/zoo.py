"""Small architectures that people use, and what is to become of each.

The parameters of a member are all exact, or left out by their names, or the member is
refused as a whole.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.pytorch_utils import Conv1D

from tests.cases import (
    NUM_OUTPUTS,
    Attention,
    MeanOverSequence,
    Residual,
    network,
    with_statistics,
)

VOCABULARY = 7
WIDTH = 4


def tokens(*shape):
    """Makes inputs that are numbers of tokens."""
    return lambda size, generator: torch.randint(
        VOCABULARY, (size, *shape), generator=generator
    )


def reals(*shape):
    """Makes inputs that are real."""
    return lambda size, generator: torch.randn(
        size, *shape, dtype=torch.float64, generator=generator
    )


def mapping(length):
    """Makes mappings of tokens and masks."""

    def inputs(size, generator):
        lengths = torch.randint(1, length + 1, (size, 1), generator=generator)
        return {
            "input_ids": tokens(length)(size, generator),
            "attention_mask": torch.arange(length) < lengths,
        }

    return inputs


_VECTORS = reals(WIDTH)


@dataclass(frozen=True)
class Member:
    """An architecture.

    Args:
        build: Returns the network.
        inputs: From a number of examples and a generator to inputs.
        no_rows: Patterns of names of parameters that have no dense rows, with a part
            of the reason: a posterior has blocks of their own for them.
        left_out: Those of parameters that a posterior leaves out, too.
        refused: What the message says, if all is refused.
    """

    build: Callable[[], nn.Module]
    inputs: Callable = _VECTORS
    no_rows: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    refused: str | None = None

    def reason(self, name, dense=False):
        """Why a parameter is left out; None if it is not."""
        patterns = (self.no_rows if dense else {}) | self.left_out
        found = [why for part, why in patterns.items() if fnmatch(name, part)]
        return found[0] if found else None


def sequences(length):
    """Makes mappings of real sequences and masks."""

    def inputs(size, generator):
        lengths = torch.randint(1, length + 1, (size, 1), generator=generator)
        return {
            "values": reals(length, WIDTH)(size, generator),
            "mask": (torch.arange(length) < lengths).double(),
            "number": torch.arange(size),
        }

    return inputs


class Keywords(nn.Module):
    """Takes the values of a mapping by their names, and returns a mapping."""

    def __init__(self):
        super().__init__()
        self.body, self.head = _layer(), _head()

    def forward(self, values=None, mask=None, labels=None):
        assert labels is None
        hidden = self.body(values).tanh() * mask[:, :, None]
        return SequenceClassifierOutput(logits=self.head(hidden.sum(1)))


class Model(nn.Module):
    """Modules and parameters by name, and a function of them and the input."""

    def __init__(self, forward, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self._function = forward

    def forward(self, x):
        return self._function(self, x)


def _head(width=WIDTH):
    return nn.Linear(width, NUM_OUTPUTS)


def _layer(width=WIDTH):
    return nn.Linear(width, width)


def _cnn(*layers, width):
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, NUM_OUTPUTS)
    )


# --- convolutional networks


def _preactivation_resnet():
    def block(width):
        return Residual(
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
        )

    return _cnn(nn.Conv2d(1, 2, 3, padding=1), block(2), nn.ReLU(), width=2)


class SqueezeExcite(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)

    def forward(self, x):
        scale = self.squeeze(x.mean((2, 3), keepdim=True)).relu()
        return x * self.excite(scale).sigmoid()


def _inverted_bottleneck():
    return _cnn(
        nn.Conv2d(1, 4, 1, bias=False),
        nn.BatchNorm2d(4),
        nn.Hardswish(inplace=True),
        nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
        nn.BatchNorm2d(4),
        nn.Hardswish(inplace=True),
        SqueezeExcite(4),
        nn.Conv2d(4, 2, 1),
        width=2,
    )


def _u_net():
    def forward(self, x):
        top = self.down(x).relu()
        low = self.middle(F.max_pool2d(top, 2)).relu()
        up = F.interpolate(low, scale_factor=2, mode="bilinear", align_corners=False)
        return self.out(self.up(torch.cat([top, up], 1)).relu()).mean((2, 3))

    return Model(
        forward,
        down=nn.Conv2d(1, 2, 3, padding=1),
        middle=nn.Conv2d(2, 3, 3, padding=1),
        up=nn.Conv2d(5, 2, 3, padding=1),
        out=nn.Conv2d(2, NUM_OUTPUTS, 1),
    )


def _densenet():
    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, layer(x).relu()], 1)
        return self.head(x.amax((2, 3)))

    layers = nn.ModuleList(nn.Conv2d(1 + k, 1, 3, padding=1) for k in range(3))
    return Model(forward, layers=layers, head=_head())


def _dilated():
    """A temporal network: causal, gated, with ever larger dilations."""

    def forward(self, x):
        for layer, dilation in ((self.first, 1), (self.second, 2)):
            signal, gate = layer(F.pad(x, (2 * dilation, 0))).chunk(2, 1)
            x = x + signal.tanh() * gate.sigmoid()
        return self.head(x[..., -1])

    return Model(
        forward,
        first=nn.Conv1d(2, 4, 3),
        second=nn.Conv1d(2, 4, 3, dilation=2),
        head=_head(2),
    )


class Standardized(nn.Conv2d):
    """Weight standardization."""

    def _conv_forward(self, x, weight, bias):
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std()
        return super()._conv_forward(x, weight, bias)


class PaddingByItself(nn.Conv2d):
    """Pads as TensorFlow does."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


def _padding_by_themselves():
    """As in EfficientNet-Lite: padding by a module of each convolution."""

    class StaticPadding(nn.Conv2d):
        def __init__(self, *args, ends, **kwargs):
            super().__init__(*args, **kwargs)
            self.stride = list(self.stride)
            self.padding_of_its_own = nn.ZeroPad2d(ends) if any(ends) else nn.Identity()

        def forward(self, x):
            x = self.padding_of_its_own(x)
            return F.conv2d(x, self.weight, self.bias, self.stride, groups=self.groups)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.expand = StaticPadding(2, 4, 1, ends=(0, 0, 0, 0), bias=False)
            self.depthwise = StaticPadding(4, 4, 3, ends=(1, 1, 1, 1), groups=4)
            self.project = StaticPadding(4, 2, 1, ends=(0, 0, 0, 0), bias=False)
            self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in (4, 4, 2))
            self.relu6 = nn.ReLU6(inplace=True)

        def forward(self, x):
            inputs = x
            x = self.relu6(self.norms[0](self.expand(x)))
            x = self.relu6(self.norms[1](self.depthwise(x)))
            x = self.norms[2](self.project(x))
            keep = torch.ones(len(x), 1, 1, 1, dtype=x.dtype)
            return inputs + (x * keep if self.training else x)

    stem = StaticPadding(1, 2, 3, stride=2, ends=(0, 1, 0, 1), bias=False)
    return _cnn(stem, nn.ReLU6(inplace=True), Block(), width=2)


# --- transformers


def _vision_transformer():
    def forward(self, x):
        patches = self.patches(x).flatten(2).mT
        first = self.token.expand(len(x), -1, -1)
        x = torch.cat([first, patches], 1) + self.positions
        return self.head(self.norm(self.block(x))[:, 0])

    return Model(
        forward,
        patches=nn.Conv2d(1, WIDTH, 2, stride=2),
        token=nn.Parameter(torch.randn(1, 1, WIDTH)),
        positions=nn.Parameter(torch.randn(1, 5, WIDTH)),
        block=Residual(nn.LayerNorm(WIDTH), Attention(WIDTH, heads=2)),
        norm=nn.LayerNorm(WIDTH),
        head=_head(),
    )


def _encoder(**options):
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2)


def _padded_encoder():
    """Tokens of several lengths, the first of which is never padding."""

    def forward(self, batch):
        padding = ~batch["attention_mask"]
        padding[:, 0] = False
        x = self.tokens(batch["input_ids"])
        return self.head(self.encoder(x, src_key_padding_mask=padding).mean(1))

    return Model(
        forward,
        tokens=nn.Embedding(VOCABULARY, WIDTH),
        encoder=_encoder(norm_first=False),
        head=_head(),
    )


def _decoder():
    def forward(self, x):
        length = x.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(
            length, dtype=torch.float64
        )
        x = self.tokens(x) + self.positions.weight[:length]
        return self.head(self.blocks(x, mask=mask, is_causal=True)[:, -1])

    return Model(
        forward,
        tokens=nn.Embedding(VOCABULARY, WIDTH),
        positions=nn.Embedding(8, WIDTH),
        blocks=_encoder(norm_first=True, activation="gelu"),
        head=_head(),
    )


def _encoder_decoder():
    layer = nn.TransformerDecoderLayer(WIDTH, 2, 8, batch_first=True)
    return Model(
        lambda self, x: self.head(self.decoder(x[:, :2], self.memory(x)).mean(1)),
        memory=_layer(),
        decoder=nn.TransformerDecoder(layer, 1),
        head=_head(),
    )


def _tied_language_model():
    def forward(self, x):
        hidden = self.body(self.tokens(x).mean(1)).tanh()
        return F.linear(hidden, self.tokens.weight)[:, :NUM_OUTPUTS]

    return Model(forward, tokens=nn.Embedding(VOCABULARY, WIDTH), body=_layer())


def _gpt_2():
    """Its matrices are stored transposed."""
    return nn.Sequential(Conv1D(WIDTH, WIDTH), nn.GELU(), _head())


def _transposed_by_hand():
    def forward(self, x):
        hidden = (x @ self.first.T).tanh()
        return self.head(F.linear(hidden, self.second.mT, self.shift).mean(1))

    return Model(
        forward,
        first=nn.Parameter(torch.randn(5, WIDTH)),
        second=nn.Parameter(torch.randn(5, WIDTH)),
        shift=nn.Parameter(torch.randn(WIDTH)),
        head=nn.Sequential(nn.Tanh(), _head()),
    )


def _scaled_product():
    def forward(self, x):
        return self.head(torch.addmm(x, x, self.weight, alpha=0.5))

    weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
    return Model(forward, weight=weight, head=nn.Sequential(nn.Tanh(), _head()))


def _mixer():
    def forward(self, x):
        x = x + self.of_positions(x.mT).mT
        return self.head((x + self.of_channels(x)).mean(1))

    return Model(
        forward,
        of_positions=nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 3)),
        of_channels=nn.Sequential(nn.LayerNorm(WIDTH), _layer()),
        head=_head(),
    )


def _windows():
    """Attention in windows, which are joined to the axis of examples."""

    def forward(self, x):
        windows = x.unflatten(1, (2, 2)).flatten(0, 1)
        return self.head(self.attention(windows).unflatten(0, (-1, 2)).mean((1, 2)))

    return Model(forward, attention=Attention(WIDTH, heads=2), head=_head())


def _latent_queries():
    """A perceiver: queries are parameters."""

    def forward(self, x):
        queries = self.query(self.latents).expand(len(x), -1, -1)
        attended = F.scaled_dot_product_attention(queries, self.key(x), self.value(x))
        return self.head(attended.flatten(1))

    return Model(
        forward,
        latents=nn.Parameter(torch.randn(2, WIDTH)),
        query=_layer(),
        key=_layer(),
        value=_layer(),
        head=_head(2 * WIDTH),
    )


# --- recurrent networks


def _recurrent(kind):
    return Model(
        lambda self, x: self.head(self.body(x)[0][:, -1]),
        body=kind(WIDTH, WIDTH, batch_first=True),
        head=_head(),
    )


def _cells():
    def forward(self, x):
        state = x.new_zeros(len(x), WIDTH)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state)

    return Model(forward, cell=nn.GRUCell(WIDTH, WIDTH), head=_head())


def _unrolled():
    """A gated recurrent unit of linear layers."""

    def forward(self, x):
        state = x.new_zeros(len(x), WIDTH)
        for step in x.unbind(1):
            update, new = (self.input(step) + self.state(state)).chunk(2, 1)
            state = torch.lerp(state, new.tanh(), update.sigmoid())
        return self.head(state)

    return Model(
        forward,
        input=nn.Linear(WIDTH, 2 * WIDTH),
        state=nn.Linear(WIDTH, 2 * WIDTH, bias=False),
        head=_head(),
    )


def _ode():
    def forward(self, x):
        for _ in range(4):
            middle = x + 0.1 * self.field(x)
            x = x + 0.2 * self.field(middle)
        return self.head(x)

    return Model(forward, field=nn.Sequential(_layer(), nn.Tanh()), head=_head())


# --- shared and aliased modules


def _aliased():
    """Modules under two names, one of which runs twice."""
    block, head = _layer(), _head()
    return Model(
        lambda self, x: self.net(x.tanh()),
        blocks=nn.ModuleList([block, block]),
        head=head,
        net=nn.Sequential(block, block, head),
    )


def _tied():
    """Two layers with one weight, and biases of their own."""
    first, second = _layer(), _layer()
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), _head())


def _siamese():
    """Both halves of an input go through one body, joined on the axis of examples."""

    def forward(self, x):
        both = self.body(torch.cat(x.chunk(2, 1))).tanh()
        left, right = both.chunk(2)
        return self.head(left * right)

    return Model(forward, body=nn.Linear(2, WIDTH), head=_head())


def _sequence_first():
    def forward(self, x):
        x = self.norm(self.body(x.transpose(0, 1)).tanh())
        joined = self.head(x.flatten(0, 1))  # tokens first, then examples
        return joined.unflatten(0, x.shape[:2]).tanh().mean(0)

    return Model(forward, body=_layer(), norm=nn.LayerNorm(WIDTH), head=_head())


def _self_attention(batch_first):
    def forward(self, x):
        x = x if batch_first else x.transpose(0, 1)
        x = self.attention(x, x, x, need_weights=False)[0]
        return x[:, 0, :NUM_OUTPUTS] if batch_first else x[0, :, :NUM_OUTPUTS]

    attention = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first)
    return Model(forward, attention=attention)


# --- adapters


def _lora():
    def forward(self, x):
        return self.head((self.base(x) + self.up(self.down(x))).tanh())

    base = _layer().requires_grad_(False)
    down, up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)
    return Model(forward, base=base, down=down, up=up, head=_head())


def _dora():
    """Its matrices also run on an identity, to get the norm of what they add."""

    def forward(self, x):
        eye = torch.eye(WIDTH, dtype=x.dtype)
        weight = self.base.weight + self.up(self.down(eye)).T
        scale = self.magnitude / weight.norm(dim=1)
        return self.head((scale * (self.base(x) + self.up(self.down(x)))).tanh())

    base = _layer().requires_grad_(False)
    down, up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)
    magnitude = nn.Parameter(torch.rand(WIDTH))
    return Model(
        forward, base=base, down=down, up=up, magnitude=magnitude, head=_head()
    )


# --- mixtures


def _experts(count):
    return nn.ModuleList(_layer() for _ in range(count))


def _soft_mixture():
    def forward(self, x):
        outputs = torch.stack([expert(x).tanh() for expert in self.experts], 1)
        return self.head((self.gate(x).softmax(1).unsqueeze(2) * outputs).sum(1))

    return Model(forward, gate=nn.Linear(WIDTH, 2), experts=_experts(2), head=_head())


def route(self, x):
    """Send each row through the expert of its largest gate."""
    gates = self.gate(x).softmax(-1)
    shares, chosen = gates.max(-1)
    output = torch.zeros_like(x)
    for k, expert in enumerate(self.experts):
        rows = chosen == k
        if rows.any():
            output[rows] = shares[rows].unsqueeze(-1) * expert(x[rows]).tanh()
    return output


def _top_1_mixture():
    return Model(
        lambda self, x: self.head(x + route(self, x)),
        gate=nn.Linear(WIDTH, 2),
        experts=_experts(2),
        head=_head(),
    )


def _top_1_mixture_of_tokens():
    return Model(
        lambda self, x: self.head((x + route(self, x)).mean(1)),
        gate=nn.Linear(WIDTH, 3),
        experts=_experts(3),
        head=_head(),
    )


# --- weights that are computed


def _hooked_weight_norm():
    with warnings.catch_warnings():  # torch has a newer one
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.utils.weight_norm(_layer()), nn.Tanh(), _head())


def _normed(norm):
    return nn.Sequential(norm(_layer()), nn.Tanh(), _head())


def _pruned():
    model = nn.Sequential(_layer(), nn.Tanh(), _head())
    prune.random_unstructured(model[0], "weight", amount=0.5)
    return model


def _hypernetwork():
    """The weights of each example are the output of a layer."""

    def forward(self, x):
        weights = self.weights(x).unflatten(1, (WIDTH, WIDTH))
        return self.head((weights @ x.unsqueeze(2)).squeeze(2).tanh())

    return Model(forward, weights=nn.Linear(WIDTH, WIDTH**2), head=_head())


class OnePlusNorm(nn.RMSNorm):
    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, 1 + self.weight)


class SquaredNorm(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight**2, self.bias)


# --- hooks and methods of instances


def _tripled(position):
    model = network("mlp")
    model[position].register_forward_hook(lambda module, args, output: 3 * output)
    return model


def _shifted_inputs():
    model = network("mlp")
    model[2].register_forward_pre_hook(lambda module, args: (args[0].exp(),))
    return model


def _own_forward():
    model = network("mlp")
    layer = model[0]
    layer.forward = lambda x: 2 * F.linear(x.exp(), layer.weight, layer.bias)
    return model


def _watched_gradients():
    seen = []

    def forward(self, x):
        hidden = self.body(x)
        if hidden.requires_grad:
            hidden.register_hook(seen.append)
        return self.head(hidden.tanh())

    return Model(forward, body=_layer(), head=_head())


# --- what happens inside of forward


def _checkpointed(use_reentrant):
    def forward(self, x):
        x = checkpoint(self.body, x, use_reentrant=use_reentrant)
        return self.head(x.tanh())

    body = nn.Sequential(_layer(), nn.Tanh(), _layer())
    return Model(forward, body=body, head=_head())


def _autocast():
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x)

    return Model(forward, net=network("mlp"))


def _compiled():
    return torch.compile(network("mlp"))


@torch.compile(backend="eager")
def _compiled_layer(x, layer):
    return F.linear(x, layer.weight, layer.bias).tanh()


def _compiled_function():
    return Model(
        lambda self, x: self.head(_compiled_layer(x, self.body)),
        body=_layer(),
        head=_head(),
    )


def _scripted_function():
    with warnings.catch_warnings():  # torch has a newer one
        warnings.simplefilter("ignore")
        function = torch.jit.script(_script)
    return Model(
        lambda self, x: self.head(function(x, self.body.weight, self.body.bias)),
        body=_layer(),
        head=_head(),
    )


def _script(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor):
    return torch.nn.functional.linear(x, weight, bias)


def _called_functionally():
    """One module at its own parameters, another one at a function of them."""

    def forward(self, x):
        own = dict(self.body.named_parameters())
        x = torch.func.functional_call(self.body, own, (x,)).tanh()
        scaled = {"weight": 2 * self.scaled.weight}
        return self.head(torch.func.functional_call(self.scaled, scaled, (x,)))

    return Model(forward, body=_layer(), scaled=_layer(), head=_head())


def _watched_weights():
    """Divides by a weight's norm, through which no gradient is to flow."""
    return Model(
        lambda self, x: self.head(self.body(x)) / self.body.weight.detach().norm(),
        body=_layer(),
        head=_head(),
    )


def _of(output):
    """The outputs that Hugging Face's and other classifiers have."""
    return Model(lambda self, x: output(self.net(x)), net=network("mlp"))


def _dropping():
    return Model(
        lambda self, x: self.head(F.dropout(self.body(x), 0.5)),
        body=_layer(),
        head=_head(),
    )


def _noisy():
    return Model(
        lambda self, x: self.head(self.body(x) + 0.01 * torch.randn_like(x)),
        body=_layer(),
        head=_head(),
    )


class Sine(torch.autograd.Function):
    """An activation of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx, tangent):
        return tangent * ctx.saved_tensors[0].cos()


class Linear(torch.autograd.Function):
    """A layer with a gradient of its own."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.T @ x


def _vmapped():
    """An ensemble whose members are one."""
    return Model(
        lambda self, x: self.head(torch.func.vmap(self.body)(x).tanh()),
        body=_layer(),
        head=_head(),
    )


def _filtered():
    return Model(
        lambda self, x: self.head(torch.fft.fft(self.body(x), dim=1).real.mean(1)),
        body=_layer(),
        head=_head(),
    )


def _neural_operator():
    """Multiplies frequencies by complex numbers (Li et al., 2020)."""

    def forward(self, x):
        filtered = torch.fft.irfft(torch.fft.rfft(x) @ self.spectral, WIDTH)
        return self.head((filtered + self.body(x)).tanh())

    spectral = nn.Parameter(torch.randn(3, 3, dtype=torch.complex128))
    return Model(forward, spectral=spectral, body=_layer(), head=_head())


def _modulated():
    """FiLM: one input scales and shifts the features of another."""

    def forward(self, x):
        scale, shift = self.modulation(x).chunk(2, 1)
        return self.head((scale * self.body(x) + shift).relu())

    return Model(
        forward, modulation=nn.Linear(WIDTH, 2 * WIDTH), body=_layer(), head=_head()
    )


def _set():
    """A deep set of the entries of a vector."""
    return Model(
        lambda self, x: self.head(self.body(x.unsqueeze(2)).relu().sum(1)),
        body=nn.Linear(1, WIDTH),
        head=_head(),
    )


def _graph():
    """A graph network: the adjacency is a function of the example."""

    def forward(self, x):
        adjacency = (x @ x.mT).softmax(2)
        for layer in self.layers:
            x = layer(adjacency @ x).relu()
        return self.head(x.mean(1))

    return Model(forward, layers=nn.ModuleList([_layer(), _layer()]), head=_head())


def _positions():
    """A layer whose input is constant."""

    def forward(self, x):
        table = torch.linspace(0, 1, 12, dtype=x.dtype).view(3, WIDTH)
        return self.head((x + self.positions(table)).tanh().mean(1))

    return Model(forward, positions=_layer(), head=_head())


def _empty():
    def forward(self, x):
        return self.head(self.nothing(x[:, :0]) + self.body(x))

    return Model(
        forward,
        nothing=nn.Linear(0, WIDTH),
        none=nn.Linear(WIDTH, 0),
        body=_layer(),
        head=_head(),
    )


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


def _by_batch_size():
    """Mixes examples, where no gradient tells of it."""
    return Model(lambda self, x: self.head(x) / len(x), head=_head())


def _mixing_tokens():
    """Mixes examples below all layers, where inputs have no gradients."""

    def forward(self, x):
        one_hot = F.one_hot(x, VOCABULARY).double().mean(1)
        return self.head(one_hot - one_hot.mean(0))

    return Model(forward, head=nn.Linear(VOCABULARY, NUM_OUTPUTS))


def _scripted():
    with warnings.catch_warnings():  # torch has a newer one
        warnings.simplefilter("ignore")
        return nn.Sequential(torch.jit.script(_layer()), _head())


_SHARED, _ROUTED = "values that examples share", "depends on the examples"
_IMAGE, _SEQUENCE = reals(1, 4, 4), reals(3, WIDTH)

ZOO = {
    "mlp, in place": Member(
        lambda: nn.Sequential(_layer(), nn.ReLU(inplace=True), _head())
    ),
    "pre-activation resnet": Member(_preactivation_resnet, _IMAGE),
    "inverted bottleneck, squeeze and excite": Member(_inverted_bottleneck, _IMAGE),
    "u-net": Member(_u_net, _IMAGE),
    "densenet": Member(_densenet, _IMAGE),
    "dilated, gated": Member(_dilated, reals(2, 5)),
    "transposed convolution": Member(
        lambda: _cnn(nn.ConvTranspose2d(1, 2, 2, stride=2), nn.ReLU(), width=2),
        _IMAGE,
    ),
    "padding by itself": Member(
        lambda: _cnn(PaddingByItself(1, 2, 2), nn.Tanh(), width=2), _IMAGE
    ),
    "padding by modules of their own": Member(_padding_by_themselves, _IMAGE),
    "weight standardization": Member(
        lambda: _cnn(Standardized(1, 2, 2), nn.ReLU(), width=2),
        _IMAGE,
        {"0.weight": "is used by `mean`"},
    ),
    "vision transformer": Member(
        _vision_transformer,
        _IMAGE,
        {"token": "is used by `", "positions": "is used by `add`"},
    ),
    "encoder, padded": Member(
        _padded_encoder, mapping(5), {"tokens.weight": "is a table of embeddings"}
    ),
    "encoder": Member(
        lambda: nn.Sequential(_encoder(), MeanOverSequence(), _head()), _SEQUENCE
    ),
    "decoder, causal": Member(
        _decoder,
        tokens(5),
        {
            "tokens.weight": "is a table of embeddings",
            "positions.weight": "is used by `add`",
        },
    ),
    "encoder and decoder": Member(
        _encoder_decoder, _SEQUENCE, {"*multihead_attn.in_proj_*": "used by `linear`"}
    ),
    "tied language model": Member(
        _tied_language_model, tokens(3), {"tokens.weight": "in different ways"}
    ),
    "gpt-2's matrices": Member(_gpt_2),
    "matrices transposed by hand": Member(_transposed_by_hand, _SEQUENCE),
    "scaled product": Member(_scaled_product, no_rows={"weight": "used by `addmm`"}),
    "mixer": Member(_mixer, _SEQUENCE),
    "windows": Member(_windows, reals(4, WIDTH)),
    "latent queries": Member(
        _latent_queries,
        _SEQUENCE,
        {"latents": "is used by `linear`", "query.*": "is used by `linear`"},
    ),
    "lstm": Member(
        lambda: _recurrent(nn.LSTM), _SEQUENCE, left_out={"body.*": "is used by `lstm`"}
    ),
    "gru": Member(
        lambda: _recurrent(nn.GRU), _SEQUENCE, left_out={"body.*": "is used by `gru`"}
    ),
    "recurrent cells": Member(_cells, _SEQUENCE, {"cell.*": "is used by `gru_cell`"}),
    "unrolled": Member(_unrolled, _SEQUENCE),
    "ordinary differential equation": Member(_ode),
    "aliased modules": Member(_aliased),
    "tied weights": Member(_tied),
    "siamese": Member(_siamese),
    "sequence first": Member(_sequence_first, _SEQUENCE),
    "attention, batch first": Member(lambda: _self_attention(True), _SEQUENCE),
    "attention, sequence first": Member(lambda: _self_attention(False), _SEQUENCE),
    "lora": Member(_lora),
    "dora": Member(
        _dora,
        no_rows={"down.*": _SHARED, "up.*": _SHARED, "magnitude": "is used by `div`"},
    ),
    "soft mixture": Member(_soft_mixture),
    "top-1 mixture": Member(_top_1_mixture, left_out={"experts.*": _ROUTED}),
    "top-1 mixture of tokens": Member(
        _top_1_mixture_of_tokens, _SEQUENCE, left_out={"experts.*": _ROUTED}
    ),
    "weight norm": Member(
        lambda: _normed(nn.utils.parametrizations.weight_norm),
        no_rows={"0.parametrizations.*": "is used by `_weight_norm`"},
    ),
    "weight norm, by a hook": Member(
        _hooked_weight_norm, no_rows={"0.weight_*": "is used by `_weight_norm`"}
    ),
    "spectral norm": Member(
        lambda: _normed(nn.utils.parametrizations.spectral_norm),
        no_rows={"0.parametrizations.*": "is used by `"},
    ),
    "pruned": Member(_pruned, no_rows={"0.weight_orig": "is used by `mul`"}),
    "hypernetwork": Member(_hypernetwork),
    "norm by 1 + w": Member(
        lambda: nn.Sequential(_layer(), OnePlusNorm(WIDTH), _head()),
        no_rows={"1.weight": "is used by `add`"},
    ),
    "norm by a square": Member(
        lambda: nn.Sequential(_layer(), SquaredNorm(WIDTH), _head()),
        no_rows={"1.weight": "is used by `pow`"},
    ),
    "hook on a layer": Member(lambda: _tripled(0)),
    "hook on the last layer": Member(lambda: _tripled(2)),
    "hook before a layer": Member(_shifted_inputs, reals(4)),
    "a forward of its own": Member(_own_forward),
    "hook on a gradient": Member(_watched_gradients),
    "checkpointing": Member(lambda: _checkpointed(False)),
    "reentrant checkpointing": Member(
        lambda: _checkpointed(True), refused="use_reentrant=False"
    ),
    "autocast": Member(_autocast),
    "compiled": Member(_compiled),
    "compiled function": Member(_compiled_function),
    "traced": Member(
        lambda: torch.fx.symbolic_trace(nn.Sequential(_layer(), nn.Tanh(), _head()))
    ),
    "data parallel": Member(
        lambda: nn.DataParallel(nn.Sequential(_layer(), nn.Tanh(), _head()))
    ),
    "scripted function": Member(
        _scripted_function, left_out={"body.*": "where no gradients are recorded"}
    ),
    "called functionally": Member(
        _called_functionally, no_rows={"scaled.weight": "is used by `mul`"}
    ),
    "watched weights": Member(
        _watched_weights, left_out={"body.weight": "also used by `detach`"}
    ),
    "model output": Member(lambda: _of(lambda f: SequenceClassifierOutput(logits=f))),
    "dictionary": Member(lambda: _of(lambda f: {"features": f + 1, "logits": f})),
    "keywords": Member(Keywords, sequences(3)),
    "tuple": Member(lambda: _of(lambda f: (f, f)), refused="tuple.*tensor"),
    "dictionary without logits": Member(
        lambda: _of(lambda f: {"scores": f}), refused="dict.*logits"
    ),
    "dropout without a mode": Member(_dropping, refused="same examples"),
    "noise": Member(_noisy, refused="same examples"),
    "a function of its own": Member(
        lambda: Model(
            lambda self, x: self.head(Sine.apply(self.body(x))),
            body=_layer(),
            head=_head(),
        )
    ),
    "a layer of its own": Member(
        lambda: Model(
            lambda self, x: self.head(Linear.apply(x, self.body.weight)),
            body=nn.Linear(WIDTH, WIDTH, bias=False),
            head=_head(),
        ),
        left_out={"body.weight": "where no gradients are recorded"},
    ),
    "mapped": Member(_vmapped, left_out={"body.*": "is used by `linear`"}),
    "fourier": Member(_filtered, _SEQUENCE),
    "neural operator": Member(_neural_operator, left_out={"spectral": "is complex"}),
    "complex outputs": Member(
        lambda: Model(lambda self, x: torch.fft.fft(self.head(x)), head=_head()),
        refused="output is complex",
    ),
    "modulated": Member(_modulated),
    "set": Member(_set),
    "graph": Member(_graph, _SEQUENCE),
    "learned activation": Member(
        lambda: nn.Sequential(_layer(), nn.PReLU(), _head()),
        no_rows={"1.weight": "is used by `prelu`"},
    ),
    "bilinear": Member(
        lambda: Model(
            lambda self, x: self.head(self.pairs(x, x)),
            pairs=nn.Bilinear(WIDTH, WIDTH, WIDTH),
            head=_head(),
        ),
        no_rows={"pairs.*": "is used by `bilinear`"},
    ),
    "constant inputs": Member(_positions, _SEQUENCE, {"positions.*": _SHARED}),
    "size zero": Member(
        _empty, left_out={"nothing.weight": "no entries", "none.*": "no entries"}
    ),
    "batch statistics": Member(
        lambda: nn.Sequential(
            nn.BatchNorm1d(WIDTH, track_running_stats=False), _head()
        ),
        refused="batch statistics",
    ),
    "mixing below": Member(
        lambda: nn.Sequential(Centred(), _head()), refused="depends on .*others"
    ),
    "mixing above": Member(
        lambda: nn.Sequential(_head(), Centred()), refused="depends on .*others"
    ),
    "mixing of tokens": Member(_mixing_tokens, tokens(3), refused="others"),
    "batch size in the output": Member(_by_batch_size, refused="others"),
    "scripted": Member(_scripted, refused="is scripted"),
}

REFUSED = [name for name, member in ZOO.items() if member.refused]
FITTED = [name for name, member in ZOO.items() if not member.refused]
EXACT = [name for name in FITTED if not (ZOO[name].no_rows or ZOO[name].left_out)]


def build(name):
    """A network with random weights and statistics, in double precision."""
    torch.manual_seed(0)
    return with_statistics(ZOO[name].build().double()).eval()


def data(name, size, seed=1):
    """Inputs, and classes."""
    generator = torch.Generator().manual_seed(seed)
    X = ZOO[name].inputs(size, generator)
    return X, torch.randint(NUM_OUTPUTS, (size,), generator=generator)


def plain(model):
    """The network as a function to a tensor, run eagerly."""
    original = getattr(model, "_orig_mod", model)

    def function(X):
        with torch.compiler.set_stance("force_eager"):
            if isinstance(original, Keywords):
                output = original(X["values"], X["mask"])
            else:
                output = original(X)
        return output["logits"] if isinstance(output, dict) else output

    return function
