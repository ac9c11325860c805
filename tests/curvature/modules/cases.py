"""One small model for every kind of module and option, with inputs: what several suites must hold for all of them.

Each case is ``(build, inputs)``; inputs are one argument, a tuple or a mapping, as everywhere. No example depends on
another one, and everything that is random in training is off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.helpers import randn

Case = tuple[Callable[[], nn.Module], Any]

FEATURES = randn(3, 4, seed=1)
SEQUENCE = randn(3, 4, 4, seed=1)
WORDS = torch.tensor([[0, 1, 1, 5], [2, 2, 2, 2], [4, 0, 3, 1]])
CAUSAL = torch.triu(torch.ones(4, 4, dtype=torch.bool), diagonal=1)
PADDED = torch.tensor([[False, False, False, True], [False] * 4, [False, True, True, True]])
#: Images of one to three dimensions, with four channels.
IMAGES = {spatial: randn(3, 4, *(5, 4, 3)[:spatial], seed=2) for spatial in (1, 2, 3)}
SMALL_IMAGES = {spatial: randn(2, 4, *(3, 3, 3)[:spatial], seed=2) for spatial in (1, 2, 3)}


class Model(nn.Module):
    """Modules, and a function of them and the inputs: ``Model(lambda model, x: model.layer(x), layer=...)``."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def under(first: nn.Module, width: int) -> nn.Module:
    """A module under a linear layer, so that its output gradients differ from example to example."""
    return nn.Sequential(first, nn.Tanh(), nn.Linear(width, 2))


def tied(first: nn.Module, second: nn.Module, *names: str) -> nn.Module:
    """Two modules one after the other with parameters in common."""
    for name in names or ("weight",):
        setattr(second, name, getattr(first, name))
    return nn.Sequential(first, nn.Tanh(), second)


def frozen(module: nn.Module, *names: str) -> nn.Module:
    """The module with some of its parameters frozen."""
    for name in names:
        module.get_parameter(name).requires_grad_(False)
    return module


# Convolutions


def conv(spatial: int, *channels: int, transposed: bool = False, **options: Any) -> nn.Module:
    kind = f"Conv{'Transpose' * transposed}{spatial}d"
    return getattr(nn, kind)(*(channels or (4, 2)), **options)


CONV: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "stride and padding": {"kernel_size": 3, "stride": 2, "padding": 1},
    "groups and dilation": {"kernel_size": 2, "dilation": 2, "padding": 1, "groups": 2},
    "no bias, same": {"kernel_size": 3, "padding": "same", "padding_mode": "circular", "bias": False},
}
CONV_TRANSPOSE: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "output padding": {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    "groups and dilation": {"kernel_size": 2, "dilation": 2, "groups": 2},
    "no bias, large padding": {"kernel_size": 2, "padding": 2, "stride": 2, "groups": 2, "bias": False},
}
CONVOLUTIONS: dict[str, Case] = {
    **{
        f"conv{spatial}d, {name}": (lambda spatial=spatial, options=options: conv(spatial, **options), images)
        for spatial, images in IMAGES.items()
        for name, options in CONV.items()
    },
    **{
        f"conv transpose {spatial}d, {name}": (
            lambda spatial=spatial, options=options: conv(spatial, transposed=True, **options),
            images,
        )
        for spatial, images in SMALL_IMAGES.items()
        for name, options in CONV_TRANSPOSE.items()
    },
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 8, (3, 2), groups=4), IMAGES[2]),
    "conv transpose 2d, sides differ": (
        lambda: nn.ConvTranspose2d(4, 2, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(1, 3)),
        IMAGES[2],
    ),
    "conv transpose 2d, output_size": (
        lambda: Model(
            lambda model, x: model.layer(x, output_size=(10, 7)), layer=nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1)
        ),
        IMAGES[2],
    ),
}

# Linear maps


class Conv1D(nn.Module):
    """The linear layer of Hugging Face's GPT-2, whose weight is ``[in, out]``."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.shape[:-1], self.nf)


class LowRank(nn.Module):
    """LoRA: a frozen linear layer and a trainable product beside it."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.up(self.down(x))


class Linear(nn.Module):
    """The linear layer of PyTorch Geometric, which is no ``nn.Linear``."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def lora() -> nn.Module:
    return nn.Sequential(LowRank(nn.Linear(4, 5), 2), nn.Tanh(), LowRank(nn.Linear(5, 2), 2))


LINEAR: dict[str, Case] = {
    "linear": (lambda: under(nn.Linear(4, 3), 3), FEATURES),
    "linear over time": (lambda: under(nn.Linear(4, 3), 3), SEQUENCE),
    "linear, no bias, on images": (lambda: nn.Linear(4, 2, bias=False), randn(3, 2, 3, 4, seed=1)),
    "linear, frozen weight": (lambda: under(frozen(nn.Linear(4, 3), "weight"), 3), SEQUENCE),
    "linear, frozen bias": (lambda: under(frozen(nn.Linear(4, 3), "bias"), 3), SEQUENCE),
    "linear, keyword": (lambda: Model(lambda model, x: model.layer(input=x), layer=nn.Linear(4, 2)), SEQUENCE),
    "linear, flattened time": (
        lambda: Model(lambda model, x: model.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2]), layer=nn.Linear(4, 2)),
        SEQUENCE,
    ),
    "linear over time, activation in place": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)),
        SEQUENCE,
    ),
    "linear, weight used without a call": (
        lambda: Model(
            lambda model, x: functional.linear(x, model.layer.weight, bias=model.layer.bias), layer=nn.Linear(4, 2)
        ),
        SEQUENCE,
    ),
    "linear, weight used without a call, and without its bias": (
        lambda: Model(
            lambda model, x: model.layer(functional.linear(x, model.layer.weight).tanh()), layer=nn.Linear(4, 4)
        ),
        SEQUENCE,
    ),
    "linear, frozen bias, weight used without a call": (
        lambda: Model(
            lambda model, x: functional.linear(x, model.layer.weight, 2 * model.layer.bias),
            layer=frozen(nn.Linear(4, 2), "bias"),
        ),
        SEQUENCE,
    ),
    "linear, tied, weight used without a call": (
        lambda: Model(
            lambda model, x: model.layers(functional.linear(x, model.layers[0].weight).tanh()),
            layers=tied(nn.Linear(4, 4), nn.Linear(4, 4), "weight"),
        ),
        SEQUENCE,
    ),
    "hugging face conv1d": (lambda: nn.Sequential(Conv1D(5, 4), nn.Tanh(), Conv1D(2, 5)), SEQUENCE),
    "pytorch geometric linear": (lambda: under(Linear(4, 3), 3), SEQUENCE),
    "lora": (lora, FEATURES),
    "lora over time": (lora, SEQUENCE),
}

# Embeddings


def bags(function: Callable[..., Tensor], **options: Any) -> nn.Module:
    return Model(
        lambda model, *inputs: model.head(function(model.bag, *inputs).tanh()),
        bag=nn.EmbeddingBag(6, 3, **options),
        head=nn.Linear(3, 2),
    )


class ScaledWordEmbedding(nn.Embedding):
    """The words of Hugging Face's BART and Gemma."""

    def forward(self, words: Tensor) -> Tensor:
        return super().forward(words) * 2.5


class LearnedPositionalEmbedding(nn.Embedding):
    """The positions of Hugging Face's OPT, which begin at the third row."""

    def forward(self, words: Tensor) -> Tensor:
        return super().forward(torch.arange(words.shape[1]).expand(words.shape) + 2)


class PositionalEmbedding(nn.Embedding):
    """The positions of Hugging Face's Whisper: the same rows for all examples."""

    def forward(self, words: Tensor) -> Tensor:
        return self.weight[: words.shape[1]]


#: Three bags of two, none and five words, one of which occurs twice.
FLAT = torch.tensor([0, 4, 3, 1, 1, 5, 2])
STARTS = torch.tensor([0, 2, 2])
EMBEDDINGS: dict[str, Case] = {
    "embedding": (lambda: under(nn.Embedding(6, 3), 3), WORDS),
    "embedding of one word": (lambda: under(nn.Embedding(6, 3), 3), WORDS[:, 0]),
    "embedding, padding_idx": (lambda: under(nn.Embedding(6, 3, padding_idx=2), 3), WORDS),
    "embedding, scaled": (lambda: under(ScaledWordEmbedding(6, 3, padding_idx=2), 3), WORDS),
    "embedding, from the third row on": (lambda: under(LearnedPositionalEmbedding(7, 3), 3), WORDS),
    "embedding, the same rows for all examples": (
        lambda: Model(
            lambda model, x: model.head((model.words(x) + model.positions(x)).tanh()),
            words=ScaledWordEmbedding(6, 3),
            positions=PositionalEmbedding(5, 3),
            head=nn.Linear(3, 2),
        ),
        WORDS,
    ),
    "embedding bag, sum": (lambda: bags(lambda bag, x: bag(x), mode="sum"), WORDS),
    "embedding bag, mean": (lambda: bags(lambda bag, x: bag(x), mode="mean"), WORDS),
    "embedding bag, mean with padding_idx": (lambda: bags(lambda bag, x: bag(x), mode="mean", padding_idx=2), WORDS),
    "embedding bag, weights": (
        lambda: bags(lambda bag, x, w: bag(x, per_sample_weights=w), mode="sum", padding_idx=1),
        (WORDS, randn(3, 4, seed=3)),
    ),
    "embedding bag, offsets": (lambda: bags(lambda bag, x, o: bag(x, o), mode="mean"), (FLAT, STARTS)),
    "embedding bag, offsets, weights and padding_idx": (
        lambda: bags(lambda bag, x, o, w: bag(x, o, per_sample_weights=w), mode="sum", padding_idx=1),
        (FLAT, STARTS, randn(7, seed=3)),
    ),
    "embedding bag, include_last_offset": (
        lambda: bags(lambda bag, x, o: bag(input=x, offsets=o), mode="mean", include_last_offset=True),
        (FLAT, torch.tensor([0, 2, 2, 7])),
    ),
}

# Normalisations


def with_statistics(model: nn.Module) -> nn.Module:
    """A model in evaluation mode, its running averages far from those of a fresh one."""
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            with torch.no_grad():
                module.running_mean.copy_(randn(module.num_features, seed=5))
                module.running_var.copy_(0.5 + randn(module.num_features, seed=6).square())
    return model.eval()


def after_conv(norm: nn.Module, *, spatial: int = 2) -> nn.Module:
    return nn.Sequential(conv(spatial, kernel_size=2), norm, nn.Tanh(), conv(spatial, 2, 1, kernel_size=1))


class ShiftedRMSNorm(nn.Module):
    """The normalisation of Hugging Face's Gemma: a weight of zero is a gain of one."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.weight) * x * (x.square().mean(-1, keepdim=True) + 0.1).rsqrt()


class LayerNorm2d(nn.LayerNorm):
    """The normalisation of channels in torchvision's and timm's ConvNeXt: a subclass with another forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class GroupNorm1(nn.GroupNorm):
    """The normalisation of timm's PoolFormer: a subclass with another forward pass."""

    def __init__(self, features: int) -> None:
        super().__init__(1, features)

    def forward(self, x: Tensor) -> Tensor:
        return functional.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


NORMALISATIONS: dict[str, Case] = {
    "layer norm": (lambda: under(nn.LayerNorm(4), 4), SEQUENCE),
    "layer norm of a vector": (lambda: under(nn.LayerNorm(4), 4), FEATURES),
    "layer norm of two dimensions": (lambda: under(nn.LayerNorm((4, 4), eps=0.1), 4), SEQUENCE),
    "layer norm, no bias": (lambda: under(nn.LayerNorm(4, bias=False), 4), SEQUENCE),
    "layer norm, frozen weight": (lambda: under(frozen(nn.LayerNorm(4), "weight"), 4), SEQUENCE),
    "layer norm, not affine": (lambda: under(nn.LayerNorm(4, elementwise_affine=False), 4), SEQUENCE),
    "rms norm": (lambda: under(nn.RMSNorm(4, eps=0.1), 4), SEQUENCE),
    "rms norm of another library": (lambda: under(ShiftedRMSNorm(4), 4), SEQUENCE),
    "rms norm of another library, of a vector": (lambda: under(ShiftedRMSNorm(4), 4), FEATURES),
    "layer norm of channels": (lambda: after_conv(LayerNorm2d(2)), IMAGES[2]),
    "layer norm of channels, as many as positions": (lambda: under(LayerNorm2d(4), 4), SEQUENCE),
    "layer norm of channels, frozen weight": (lambda: after_conv(frozen(LayerNorm2d(2), "weight")), IMAGES[2]),
    "group norm of another library": (lambda: after_conv(GroupNorm1(2)), IMAGES[2]),
    "group norm": (lambda: after_conv(nn.GroupNorm(1, 2)), IMAGES[2]),
    "group norm of two groups": (lambda: nn.GroupNorm(2, 4, eps=0.1), IMAGES[1]),
    **{
        f"instance norm {spatial}d": (
            lambda spatial=spatial: after_conv(
                getattr(nn, f"InstanceNorm{spatial}d")(2, affine=True, eps=0.1), spatial=spatial
            ),
            images,
        )
        for spatial, images in IMAGES.items()
    },
    "instance norm, running statistics": (
        lambda: with_statistics(nn.InstanceNorm1d(4, affine=True, track_running_stats=True)),
        IMAGES[1],
    ),
    "batch norm of vectors": (lambda: with_statistics(under(nn.BatchNorm1d(4, eps=0.1), 4)), FEATURES),
    **{
        f"batch norm {spatial}d": (
            lambda spatial=spatial: with_statistics(
                after_conv(getattr(nn, f"BatchNorm{spatial}d")(2), spatial=spatial)
            ),
            images,
        )
        for spatial, images in IMAGES.items()
    },
}

# Recurrence


def outputs_and_state(model: nn.Module, *inputs: Any) -> Tensor:
    """All that a recurrent module returns, an example a row; it is the model's ``rnn``, time after the batch."""
    outputs, state = model.rnn(*inputs)
    states = state if isinstance(state, tuple) else (state,)
    return torch.cat([outputs.flatten(1), *(part.transpose(0, 1).flatten(1) for part in states)], dim=1)


def time_first(model: nn.Module, x: Tensor) -> Tensor:
    return model.rnn(x.transpose(0, 1))[0].transpose(0, 1)


def steps(model: nn.Module, x: Tensor) -> Tensor:
    """A loop over time with a cell; of an LSTM's state both parts are read."""
    state = None
    for step in x.unbind(1):
        state = model.cell(step, state)
    return torch.cat(state, dim=1) if isinstance(state, tuple) else state


RECURRENT: dict[str, dict[str, Any]] = {
    "plain": {},
    "two layers, both directions": {"num_layers": 2, "bidirectional": True},
    "no bias": {"bias": False},
}
STATE = randn(2, 3, 3, seed=4)
RECURRENCE: dict[str, Case] = {
    **{
        f"{kind}, {name}": (
            lambda kind=kind, options=options: Model(
                outputs_and_state, rnn=getattr(nn, kind)(4, 3, batch_first=True, **options)
            ),
            SEQUENCE,
        )
        for kind in ("RNN", "LSTM", "GRU")
        for name, options in RECURRENT.items()
    },
    **{
        f"{kind}, time first": (lambda kind=kind: Model(time_first, rnn=getattr(nn, kind)(4, 3)), SEQUENCE)
        for kind in ("RNN", "LSTM", "GRU")
    },
    **{
        f"{kind}, initial state": (
            lambda kind=kind: Model(
                outputs_and_state, rnn=getattr(nn, kind)(4, 3, batch_first=True, bidirectional=True)
            ),
            (SEQUENCE, STATE),
        )
        for kind in ("RNN", "GRU")
    },
    "LSTM, initial state and projections": (
        lambda: Model(
            lambda model, x, h, c: outputs_and_state(model, x, (h, c)),
            rnn=nn.LSTM(4, 3, num_layers=2, proj_size=2, batch_first=True),
        ),
        (SEQUENCE, STATE[..., :2], STATE),
    ),
    "LSTM, projections in both directions": (
        lambda: Model(
            outputs_and_state, rnn=nn.LSTM(4, 3, num_layers=2, proj_size=2, bidirectional=True, batch_first=True)
        ),
        SEQUENCE,
    ),
    "RNN, relu": (
        lambda: Model(outputs_and_state, rnn=nn.RNN(4, 3, nonlinearity="relu", batch_first=True)),
        SEQUENCE,
    ),
    "RNN cell": (lambda: Model(steps, cell=nn.RNNCell(4, 3)), SEQUENCE),
    "RNN cell, relu, no bias": (lambda: Model(steps, cell=nn.RNNCell(4, 3, False, nonlinearity="relu")), SEQUENCE),
    "LSTM cell": (lambda: Model(steps, cell=nn.LSTMCell(4, 3)), SEQUENCE),
    "GRU cell": (lambda: Model(steps, cell=nn.GRUCell(4, 3)), SEQUENCE),
}

# Attention


def attending(call: Callable[..., Any] | None = None, **options: Any) -> nn.Module:
    """Attention, called on its input for query, key and value or as ``call`` does."""
    attention = nn.MultiheadAttention(4, 2, **{"batch_first": True, **options})
    return Model(call or (lambda model, x: model.attention(x, x, x)[0]), attention=attention)


def attend_time_first(model: nn.Module, x: Tensor) -> Tensor:
    sequence = x.transpose(0, 1)
    return model.attention(sequence, sequence, sequence)[0].transpose(0, 1)


def crossing(model: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return model.attention(query, key, value, need_weights=False)[0]


def weights_too(model: nn.Module, x: Tensor) -> Tensor:
    """The attention weights of each head are part of the output."""
    output, weights = model.attention(x, x, x, average_attn_weights=False)
    return torch.cat([output.flatten(1), weights.flatten(1)], dim=1)


class Vit(nn.Module):
    """A vision transformer: a class token and positions as bare parameters, and an encoder layer of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.positions = nn.Parameter(torch.zeros(1, 4, 4))
        self.patches = nn.Linear(3, 4)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0, norm_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.cat([self.token.expand(len(x), -1, -1), self.patches(x)], dim=1) + self.positions
        return self.head(self.encoder(hidden)[:, 0])


KEY, VALUE = randn(3, 5, 4, seed=7), randn(3, 5, 4, seed=8)
ATTENTION: dict[str, Case] = {
    "self-attention": (attending, SEQUENCE),
    "self-attention, time first": (
        lambda: attending(attend_time_first, batch_first=False),
        SEQUENCE,
    ),
    "self-attention, no bias": (lambda: attending(bias=False), SEQUENCE),
    "self-attention, bias_kv and zero_attn": (lambda: attending(add_bias_kv=True, add_zero_attn=True), SEQUENCE),
    "self-attention, weights are output": (lambda: attending(weights_too), SEQUENCE),
    "self-attention, activation in place": (
        lambda: attending(lambda model, x: model.attention(x, x, x)[0].sigmoid_()),
        SEQUENCE,
    ),
    "self-attention, attn_mask": (
        lambda: attending(lambda model, x: model.attention(x, x, x, attn_mask=CAUSAL, is_causal=True)[0]),
        SEQUENCE,
    ),
    "self-attention, key_padding_mask": (
        lambda: attending(lambda model, x, p: model.attention(x, x, x, key_padding_mask=p)[0]),
        (SEQUENCE, PADDED),
    ),
    "cross-attention": (lambda: attending(crossing), (SEQUENCE, KEY, VALUE)),
    "cross-attention, key is value": (lambda: attending(lambda m, q, k: crossing(m, q, k, k)), (SEQUENCE, KEY)),
    "cross-attention, kdim and vdim": (
        lambda: attending(crossing, kdim=3, vdim=2),
        (SEQUENCE, KEY[..., :3], VALUE[..., :2]),
    ),
    "cross-attention, kdim, no bias": (
        lambda: attending(crossing, kdim=3, bias=False),
        (SEQUENCE, KEY[..., :3], VALUE),
    ),
    "transformer decoder layer": (
        lambda: Model(
            lambda model, target, memory: model.layer(target, memory),
            layer=nn.TransformerDecoderLayer(4, 2, 5, batch_first=True, dropout=0.0),
        ),
        (SEQUENCE, KEY),
    ),
    "vision transformer": (Vit, randn(3, 3, 3, seed=1)),
}

# Tied weights and bare parameters


class LanguageModel(nn.Module):
    """An embedding that is the output layer's weight too, and positions that are added to it."""

    def __init__(self, *, bias: bool, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 3, padding_idx)
        self.positions = nn.Parameter(torch.zeros(4, 3))
        self.hidden, self.norm = nn.Linear(3, 3), nn.LayerNorm(3)
        self.head = nn.Linear(3, 6, bias=bias)
        self.head.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.norm(self.hidden(self.embed(words) + self.positions).tanh()))


def tied_recurrence() -> nn.Module:
    """Input and state are multiplied with one weight, and each has a bias of its own."""
    rnn = nn.RNN(4, 4, batch_first=True)
    rnn.weight_hh_l0 = rnn.weight_ih_l0
    return Model(outputs_and_state, rnn=rnn)


def tied_attention() -> nn.Module:
    """The output projection is the weight of a linear layer too."""
    model = Model(lambda model, x: model.layer(model.attention(x, x, x)[0].tanh()), attention=attending().attention)
    model.layer = nn.Linear(4, 4)
    model.layer.weight = model.attention.out_proj.weight
    return model


class Bare(nn.Module):
    """Parameters that the model holds itself, one by one and in containers; one is a scalar, one is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.shifts = nn.ParameterList([nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(1, 2))])
        self.mixing = nn.ParameterDict({"matrix": nn.Parameter(torch.zeros(4, 4))})
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        mixed = (x + self.shifts[0]) @ self.mixing["matrix"]
        return self.scale * self.layer((mixed @ self.mixing["matrix"]).tanh()) + self.shifts[1]


SHARED: dict[str, Case] = {
    "language model": (lambda: LanguageModel(bias=False), WORDS),
    "language model, bias": (lambda: LanguageModel(bias=True), WORDS),
    "language model, padding_idx": (lambda: LanguageModel(bias=True, padding_idx=1), WORDS),
    "tied linear layers": (lambda: tied(nn.Linear(4, 4), nn.Linear(4, 4)), SEQUENCE),
    "tied linear layers, one bias": (lambda: tied(nn.Linear(4, 4), nn.Linear(4, 4), "weight", "bias"), SEQUENCE),
    "tied linear and transposed": (lambda: tied(Conv1D(3, 4), nn.Linear(3, 4), "weight"), SEQUENCE),
    "tied parts of a recurrence": (tied_recurrence, SEQUENCE),
    "tied attention and linear": (tied_attention, SEQUENCE),
    "tied convolutions of different strides": (
        lambda: tied(nn.Conv1d(4, 4, 3, padding=2), nn.Conv1d(4, 4, 3, stride=2)),
        IMAGES[1],
    ),
    "called twice": (lambda: Model(lambda m, x: m.layer(m.layer(x).tanh()), layer=nn.Linear(4, 4)), SEQUENCE),
    "called on lengths that differ": (
        lambda: Model(lambda m, x: m.layer(x) + m.layer(x[:, :2]).mean(1, keepdim=True), layer=nn.Linear(4, 2)),
        SEQUENCE,
    ),
    "bare parameters": (Bare, FEATURES),
    "bare parameters over time": (Bare, SEQUENCE),
}

CASES: dict[str, Case] = {
    **LINEAR,
    **CONVOLUTIONS,
    **EMBEDDINGS,
    **NORMALISATIONS,
    **RECURRENCE,
    **ATTENTION,
    **SHARED,
}

#: A few of them that differ in what their rows are like.
TYPICAL = [
    "linear over time",
    "conv2d, depthwise",
    "conv transpose 1d, groups and dilation",
    "embedding",
    "embedding bag, weights",
    "layer norm",
    "LSTM, plain",
    "self-attention",
    "language model, bias",
    "bare parameters over time",
]
