"""Networks of all kinds, as somebody's plug-ins might be, with their multiply-adds by hand.

`NETWORKS` maps a name to `Network`: a builder, the MACs by hand, and the words that have to be in the note where the count
cannot be verified. `register_all()` makes models of them, named `zoo_NAME`. In the sums, 1024 is 32x32 pixels, 10 the classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize


@dataclass(frozen=True)
class Network:
    build: Callable[[], nn.Module]
    macs: int | None  # by hand; None where the count is not verified
    unverified: str = ""  # a word of the note; empty if the count has to be verified
    refused: str = ""  # a word of the sentence that refuses to train it


NETWORKS: dict[str, Network] = {}


def network(macs: int | None, unverified: str = "", refused: str = "") -> Callable[[Callable[[], nn.Module]], Any]:
    def decorate(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        NETWORKS[build.__name__] = Network(build, macs, unverified, refused)
        return build

    return decorate


def register_all() -> None:
    from cifar.registry import models

    for name, entry in NETWORKS.items():
        models.register(f"zoo_{name}")(entry.build)


class Net(nn.Module):
    """A network from a function: run(self, images) -> logits."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.1 * torch.randn(*shape))


def head(width: int, *layers: nn.Module) -> nn.Sequential:
    """Layers of images, then the mean over the pixels and a linear layer: 10 width multiply-adds."""
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


# -- convolutions --------------------------------------------------------------------------------------------------------


@network(96 * 16 * 3 * 32 + 160)
def conv_1d() -> nn.Module:
    """Rows of pixels as a sequence of 32 places with 96 channels."""
    return nn.Sequential(
        nn.Flatten(1, 2), nn.Conv1d(96, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 10)
    )


@network(1 * 4 * 27 * 3 * 1024 + 4 * 8 * 27 * 3 * 256 + 80)
def conv_3d() -> nn.Module:
    """The colours as a third dimension."""
    layers = nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 8, 3, padding=1, stride=(1, 2, 2))
    return nn.Sequential(nn.Unflatten(1, (1, 3)), *layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 10))


@network(27 * 12 * 1024 + 3 * 12 * 9 * 1024 + 120)
def grouped() -> nn.Module:
    return head(12, nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1, groups=4))


@network(27 * 16 * 256 + 16 * 25 * 256 + 16 * 32 * 256 + 320)
def depthwise_separable() -> nn.Module:
    depthwise = nn.Conv2d(16, 16, 5, padding=2, groups=16, bias=False)
    return head(32, nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), depthwise, nn.Conv2d(16, 32, 1))


@network(27 * 8 * 256 + 8 * 6 * 4 * 256 + 60)
def transposed() -> nn.Module:
    """A transposed convolution multiplies each of its 16x16 inputs by its whole filter."""
    return head(6, nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, stride=2))


@network(27 * 8 * 1024 + 8 * 8 * 9 * 1024 + 80)
def dilated_and_reflected() -> nn.Module:
    first = nn.Conv2d(3, 8, 3, padding="same", padding_mode="reflect")
    return head(8, first, nn.ReLU(), nn.Conv2d(8, 8, 3, padding=2, dilation=2, padding_mode="circular"))


@network(27 * 8 * 1024 + 80)
def weight_normed() -> nn.Module:
    return head(8, parametrizations.weight_norm(nn.Conv2d(3, 8, 3, padding=1)), nn.ReLU())


@network(27 * 8 * 1024 + 80)
def weight_normed_by_hooks() -> nn.Module:
    """The older way, which cannot be copied."""
    return head(8, nn.utils.weight_norm(nn.Conv2d(3, 8, 3, padding=1)), nn.ReLU())


@network(27 * 8 * 1024 + (8 * 27 + 8) + 80)
def spectral_normed() -> nn.Module:
    """In each forward pass the weight, as (8, 27), is multiplied by a vector from both sides."""
    return head(8, parametrizations.spectral_norm(nn.Conv2d(3, 8, 3, padding=1)), nn.ReLU())


@network(27 * 8 * 1024 + 3 * 64 * 9 * 1024 + 80)
def shared() -> nn.Module:
    """One convolution, called three times."""
    again = nn.Conv2d(8, 8, 3, padding=1)
    return head(8, nn.Conv2d(3, 8, 3, padding=1), again, nn.ReLU(), again, nn.ReLU(), again)


@network(27 * 8 * 900 + 8 * 900 * 10)
def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))


class StandardisedConv(nn.Conv2d):
    """Qiao et al. 2019: a weight of mean 0 and standard deviation 1."""

    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / std, self.bias, self.stride, self.padding)


@network(27 * 8 * 1024 + 80)
def weight_standardised() -> nn.Module:
    return head(8, StandardisedConv(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU())


@network(None, "aten.convolution")
def functional_conv() -> nn.Module:
    def run(s: Any, x: Tensor) -> Tensor:
        return s.head(F.conv2d(s.conv(x), s.filters).mean((2, 3)))

    return Net(run, conv=nn.Conv2d(3, 8, 3, padding=1), filters=weight(8, 8, 3, 3), head=nn.Linear(8, 10))


@network(64 * 4 * 12 * 12 + 12 * 10)
def locally_connected() -> nn.Module:
    """Patches of 4x4... each with a filter of its own: 64 places, 48 inputs, 12 outputs."""

    def run(s: Any, x: Tensor) -> Tensor:
        patches = F.unfold(x, 4, stride=4)  # (B, 48, 64)
        return s.head(torch.einsum("bkl,lko->blo", patches, s.filters).relu().mean(1))

    return Net(run, filters=weight(64, 48, 12), head=nn.Linear(12, 10))


@network(None, "aten.mul of 1×2×1×9×32×32 and 1×2×8×9×32×32")
def involution() -> nn.Module:
    """Li et al. 2021: the sum over a neighbourhood, weighted by what each pixel says; written as a product and a sum."""

    def run(s: Any, x: Tensor) -> Tensor:
        x = s.stem(x)
        kernels = s.kernels(x).view(len(x), 2, 1, 9, 32, 32)
        patches = F.unfold(x, 3, padding=1).view(len(x), 2, 8, 9, 32, 32)
        return s.head((kernels * patches).sum(3).flatten(1, 2).mean((2, 3)))

    return Net(run, stem=nn.Conv2d(3, 16, 3, padding=1), kernels=nn.Conv2d(16, 18, 1), head=nn.Linear(16, 10))


@network(None, "torchvision.deform_conv2d")
def deformable() -> nn.Module:
    from torchvision.ops import DeformConv2d

    def run(s: Any, x: Tensor) -> Tensor:
        return s.head(s.deformed(x, s.offsets(x)).mean((2, 3)))

    offsets = nn.Conv2d(3, 18, 3, padding=1)
    return Net(run, offsets=offsets, deformed=DeformConv2d(3, 8, 3, padding=1), head=nn.Linear(8, 10))


# -- recurrent -----------------------------------------------------------------------------------------------------------


def rows(x: Tensor) -> Tensor:
    """(B, 3, 32, 32) -> (B, 32, 96): a sequence of rows."""
    return x.permute(0, 2, 1, 3).flatten(2)


@network(32 * 4 * (96 * 24 + 24 * 24) + 240)
def lstm() -> nn.Module:
    return Net(lambda s, x: s.head(s.lstm(rows(x))[0][:, -1]), lstm=nn.LSTM(96, 24, batch_first=True), head=nn.Linear(24, 10))


@network(32 * (4 * 24 * (96 + 8) + 24 * 8) + 32 * (4 * 24 * (8 + 8) + 24 * 8) + 80)
def projected_lstm() -> nn.Module:
    """Two layers whose states are projected to 8."""
    layers = nn.LSTM(96, 24, num_layers=2, proj_size=8, batch_first=True, bias=False)
    return Net(lambda s, x: s.head(s.lstm(rows(x))[0][:, -1]), lstm=layers, head=nn.Linear(8, 10))


@network(32 * 2 * 3 * 16 * (96 + 16) + 32 * 2 * 3 * 16 * (32 + 16) + 320)
def bidirectional_gru() -> nn.Module:
    gru = nn.GRU(96, 16, num_layers=2, bidirectional=True, batch_first=True)
    return Net(lambda s, x: s.head(s.gru(rows(x))[0].mean(1)), gru=gru, head=nn.Linear(32, 10))


@network(32 * 20 * (96 + 20) + 200)
def plain_rnn() -> nn.Module:
    """(steps, batch, features), which is PyTorch's own order."""
    rnn = nn.RNN(96, 20, nonlinearity="relu")
    return Net(lambda s, x: s.head(s.rnn(rows(x).transpose(0, 1))[1][-1]), rnn=rnn, head=nn.Linear(20, 10))


@network(32 * 4 * 16 * (96 + 16) + 160)
def lstm_cell() -> nn.Module:
    def run(s: Any, x: Tensor) -> Tensor:
        state = None
        for row in rows(x).unbind(1):
            state = s.cell(row, state)
        return s.head(state[0])

    return Net(run, cell=nn.LSTMCell(96, 16), head=nn.Linear(16, 10))


class LastState(nn.GRU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0][:, -1]


@network(32 * 3 * 16 * (96 + 16) + 160)
def gru_subclass() -> nn.Module:
    return Net(lambda s, x: s.head(s.gru(rows(x))), gru=LastState(96, 16, batch_first=True), head=nn.Linear(16, 10))


@network((32 + 20) * 3 * 16 * (96 + 16) // 2 + 160)
def packed_gru() -> nn.Module:
    """Of two halves of the rows the second is shorter: 16 + 10 steps."""

    def run(s: Any, x: Tensor) -> Tensor:
        halves = rows(x).view(len(x) * 2, 16, 96)
        lengths = torch.tensor([16, 10] * len(x))
        packed = nn.utils.rnn.pack_padded_sequence(halves, lengths, batch_first=True, enforce_sorted=False)
        return s.head(s.gru(packed)[1][0].view(len(x), 2, 16).mean(1))

    return Net(run, gru=nn.GRU(96, 16, batch_first=True), head=nn.Linear(16, 10))


# -- matrix products -----------------------------------------------------------------------------------------------------


@network(27 * 16 * 1024 + (16 + 1) * 16 * 10)
def bilinear() -> nn.Module:
    def run(s: Any, x: Tensor) -> Tensor:
        features = s.conv(x).relu().mean((2, 3))
        return s.bilinear(features, features)

    return Net(run, conv=nn.Conv2d(3, 16, 3, padding=1), bilinear=nn.Bilinear(16, 16, 10))


@network(27 * 16 * 1024 + (16 + 1) * 3 * 10)
def functional_bilinear() -> nn.Module:
    def run(s: Any, x: Tensor) -> Tensor:
        return F.bilinear(s.conv(x).mean((2, 3)), x.mean((2, 3)), s.weights)

    return Net(run, conv=nn.Conv2d(3, 16, 3, padding=1), weights=weight(10, 16, 3))


@network(27 * 8 * 1024 + 8 * 8 * 1024 + 640)
def bilinear_pooling() -> nn.Module:
    """Lin et al. 2015: the products of all pairs of channels, summed over the pixels."""

    def run(s: Any, x: Tensor) -> Tensor:
        features = s.conv(x).flatten(2)
        return s.head((features @ features.transpose(1, 2)).flatten(1))

    return Net(run, conv=nn.Conv2d(3, 8, 3, padding=1), head=nn.Linear(64, 10))


@network(3072 * 16 + 160)
def matrix_by_vector() -> nn.Module:
    def run(s: Any, x: Tensor) -> Tensor:
        return s.head(torch.stack([torch.mv(s.weights, image) for image in x.flatten(1)]))

    return Net(run, weights=weight(16, 3072), head=nn.Linear(16, 10))


@network(96 * 12 * 32 + 2 * 12 * 12 * 32 + 12 * 32 * 4 + 4 * 10)
def other_products() -> nn.Module:
    """mm, baddbmm, addmm and tensordot: rows (32, 96), twelve features."""

    def run(s: Any, x: Tensor) -> Tensor:
        h = torch.tensordot(rows(x), s.first, dims=([2], [0]))  # (B, 32, 12)
        h = torch.baddbmm(h, h.relu(), s.second.expand(len(x), 12, 12))
        h = h.flatten(0, 1).mm(s.third).view_as(h)
        return torch.addmm(s.bias, torch.tensordot(h, s.fourth, 2), s.fifth)

    parts = {"first": weight(96, 12), "second": weight(12, 12), "third": weight(12, 12)}
    return Net(run, **parts, fourth=weight(32, 12, 4), fifth=weight(4, 10), bias=weight(10))


@network(64 * 48 * 32 + 3 * 64 * 32 * 32 + 2 * 64 * 64 * 32 + 64 * 32 * 32 + 320)
def attention() -> nn.Module:
    """Patches of 4x4, one layer of attention with two heads."""

    def run(s: Any, x: Tensor) -> Tensor:
        x = s.patches(x).flatten(2).transpose(1, 2)  # (B, 64, 32)
        q, k, v = (part(x).view(len(x), 64, 2, 16).transpose(1, 2) for part in (s.q, s.k, s.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return s.head((x + s.out(y)).mean(1))

    parts = {name: nn.Linear(32, 32) for name in ("q", "k", "v", "out")}
    return Net(run, patches=nn.Conv2d(3, 32, 4, 4), **parts, head=nn.Linear(32, 10))


@network(64 * 48 * 32 + 2 * 64 * 64 * 32 + 320)
def attention_by_einsum() -> nn.Module:
    def run(s: Any, x: Tensor) -> Tensor:
        x = s.patches(x).flatten(2).transpose(1, 2)
        weights = torch.einsum("bic,bjc->bij", x, x).softmax(-1)
        return s.head(torch.einsum("bij,bjc->bic", weights, x).mean(1))

    return Net(run, patches=nn.Conv2d(3, 32, 4, 4), head=nn.Linear(32, 10))


@network(None, "nn.MultiheadAttention")
def library_attention() -> nn.Module:
    def run(s: Any, x: Tensor) -> Tensor:
        x = s.patches(x).flatten(2).transpose(1, 2)
        return s.head(s.attention(x, x, x)[0].mean(1))

    attention = nn.MultiheadAttention(32, 2, batch_first=True)
    return Net(run, patches=nn.Conv2d(3, 32, 4, 4), attention=attention, head=nn.Linear(32, 10))


@network(64 * 48 * 32 + 32 * 64 * 24 * 2 + 64 * 32 * 48 * 2 + 320)
def mixer() -> nn.Module:
    """Tolstikhin et al. 2021: linear layers over patches, then over channels."""

    def run(s: Any, x: Tensor) -> Tensor:
        x = s.patches(x).flatten(2)  # (B, 32, 64)
        x = x + s.tokens(x)
        x = x.transpose(1, 2)
        return s.head((x + s.channels(x)).mean(1))

    tokens = nn.Sequential(nn.Linear(64, 24), nn.GELU(), nn.Linear(24, 64))
    channels = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))
    return Net(run, patches=nn.Conv2d(3, 32, 4, 4), tokens=tokens, channels=channels, head=nn.Linear(32, 10))


class LowRankLinear(nn.Linear):
    """Hu et al. 2021: a linear layer and a second one of low rank beside it."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__(inputs, outputs)
        self.down, self.up = weight(inputs, rank), weight(rank, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down @ self.up


@network(3072 * 32 + 3072 * 2 + 2 * 32 + 320)
def low_rank_adapter() -> nn.Module:
    return nn.Sequential(nn.Flatten(), LowRankLinear(3072, 32, rank=2), nn.ReLU(), nn.Linear(32, 10))


class Product(nn.Module):
    """The weight as a product of two factors, made anew in each forward pass."""

    def __init__(self, outputs: int, inputs: int, rank: int) -> None:
        super().__init__()
        self.left, self.right = weight(outputs, rank), weight(rank, inputs)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.left @ self.right


@network(3072 * 16 + 16 * 4 * 3072 + 160)
def factored_weight() -> nn.Module:
    layer = nn.Linear(3072, 16)
    parametrize.register_parametrization(layer, "weight", Product(16, 3072, 4))
    return nn.Sequential(nn.Flatten(), layer, nn.ReLU(), nn.Linear(16, 10))


class Multiply(torch.autograd.Function):
    """A product with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return gradient @ w.T, x.T @ gradient


@network(3072 * 16 + 160)
def autograd_function() -> nn.Module:
    return Net(lambda s, x: s.head(Multiply.apply(x.flatten(1), s.weights)), weights=weight(3072, 16), head=nn.Linear(16, 10))


# -- what is no product ---------------------------------------------------------------------------------------------------


@network(27 * 16 * 1024 + 16 * 4 + 4 * 16 + 16 * 16 * 9 * 1024 + 160)
def gated() -> nn.Module:
    """Squeeze and excitation, layer scale, learned positions, a normalisation by hand: pointwise products are not counted."""

    def run(s: Any, x: Tensor) -> Tensor:
        x = s.stem(x) + s.positions
        x = x * s.excite(x.mean((2, 3)))[:, :, None, None]
        y = (x - x.mean(1, keepdim=True)) * torch.rsqrt(x.var(1, keepdim=True) + 1e-5) * s.scale
        return s.head((x + s.layer_scale * s.conv(y)).relu().mean((2, 3)))

    excite = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16), nn.Sigmoid())
    parts = {"positions": weight(16, 32, 32), "scale": weight(16, 1, 1), "layer_scale": weight(16, 1, 1)}
    stem, conv = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
    return Net(run, stem=stem, excite=excite, conv=conv, **parts, head=nn.Linear(16, 10))


@network(27 * 8 * 256 + 2 * 8 * 8 * 9 * 1024 + 80)
def upsampled() -> nn.Module:
    """Interpolation, a shuffle of pixels and pooling."""
    layers = (
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Conv2d(8, 8, 3, padding=1),
    )
    return head(
        8, *layers, nn.MaxPool2d(2), nn.Upsample(scale_factor=2), nn.LocalResponseNorm(3), nn.Conv2d(8, 8, 3, padding=1)
    )


@network(48 * 10)
def embedded() -> nn.Module:
    """Eight grey levels, each with a vector of 48 numbers."""

    def run(s: Any, x: Tensor) -> Tensor:
        levels = (x.mean(1).flatten(1).sigmoid() * 8).long().clamp(0, 7)
        return s.head(s.levels(levels).mean(1) + s.bags(levels))

    return Net(run, levels=nn.Embedding(8, 48), bags=nn.EmbeddingBag(8, 48, mode="sum"), head=nn.Linear(48, 10))


@network(27 * 8 * 1024 + 80)
def integer_and_boolean() -> nn.Module:
    """A boolean mask and an integer shift are parameters without a gradient; a buffer counts the calls."""

    def run(s: Any, x: Tensor) -> Tensor:
        s.calls += 1
        return s.head(s.conv(x.roll(1, -1) * s.mask + s.shift).mean((2, 3)))

    module = Net(run, conv=nn.Conv2d(3, 8, 3, padding=1), head=nn.Linear(8, 10))
    module.mask = nn.Parameter(torch.rand(32, 32) > 0.1, requires_grad=False)
    module.shift = nn.Parameter(torch.zeros(3, 1, 1, dtype=torch.int64), requires_grad=False)
    module.register_buffer("calls", torch.zeros((), dtype=torch.int64))
    return module


@network(27 * 8 * 1024 + 80)
def checkpointed() -> nn.Module:
    """Recomputes its stem in the backward pass."""
    from torch.utils.checkpoint import checkpoint

    def run(s: Any, x: Tensor) -> Tensor:
        return s.head(checkpoint(s.stem, x, use_reentrant=False).mean((2, 3)))

    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Dropout(0.1), nn.BatchNorm2d(8), nn.SiLU())
    return Net(run, stem=stem, head=nn.Linear(8, 10))


@network(27 * 8 * 1024 + 80, refused="tuple")
def two_outputs() -> nn.Module:
    def run(s: Any, x: Tensor) -> Any:
        features = s.conv(x).mean((2, 3))
        return s.head(features), features

    return Net(run, conv=nn.Conv2d(3, 8, 3, padding=1), head=nn.Linear(8, 10))


# -- what cannot be verified ----------------------------------------------------------------------------------------------


@network(None, "aten._fft_r2c")
def fourier() -> nn.Module:
    def run(s: Any, x: Tensor) -> Tensor:
        return s.head(torch.fft.irfft2(torch.fft.rfft2(s.stem(x)) * s.filters, s=(32, 32)).mean((2, 3)))

    return Net(run, stem=nn.Conv2d(3, 8, 1), filters=weight(8, 32, 17), head=nn.Linear(8, 10))


@network(None, "complex")
def complex_numbers() -> nn.Module:
    def run(s: Any, x: Tensor) -> Tensor:
        return s.head((torch.complex(rows(x), rows(x).flip(1)) @ torch.complex(s.real, s.imaginary)).abs().mean(1))

    return Net(run, real=weight(96, 16), imaginary=weight(96, 16), head=nn.Linear(16, 10))


@network(None, "aten.grid_sampler_2d")
def spatial_transformer() -> nn.Module:
    """Jaderberg et al. 2015."""

    def run(s: Any, x: Tensor) -> Tensor:
        ys, xs = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
        shifts = s.shifts(x.mean((2, 3)))[:, None, None, :]
        return s.head(F.grid_sample(x, torch.stack([xs, ys], -1).to(x) + shifts, align_corners=False))

    return Net(run, shifts=nn.Linear(3, 2), head=head(8, nn.Conv2d(3, 8, 3)))


@network(None, "cdist")
def prototypes() -> nn.Module:
    return Net(
        lambda s, x: -torch.cdist(s.stem(x).mean((2, 3)), s.prototypes), stem=nn.Conv2d(3, 8, 3), prototypes=weight(10, 8)
    )


@network(None, "sparse")
def sparse() -> nn.Module:
    def run(s: Any, x: Tensor) -> Tensor:
        places = torch.tensor([[0, 1, 2, 3], [5, 50, 500, 3000]], device=x.device)
        matrix = torch.sparse_coo_tensor(places, s.values, (4, 3072))
        return s.head(torch.sparse.mm(matrix, x.flatten(1).T).T)

    return Net(run, values=weight(4), head=nn.Linear(4, 10))


@network(None, "aten.linalg_matrix_exp")
def orthogonal() -> nn.Module:
    layer = parametrizations.orthogonal(nn.Linear(16, 16), orthogonal_map="matrix_exp")
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), layer, nn.Linear(16, 10))


@network(None, "1×3072×1 and 3072×16")
def product_in_disguise() -> nn.Module:
    """A linear layer, written as a product and a sum."""

    def run(s: Any, x: Tensor) -> Tensor:
        return s.head((x.flatten(1).unsqueeze(-1) * s.weights).sum(1).relu())

    return Net(run, weights=weight(3072, 16), head=nn.Linear(16, 10))


@network(None, "torch.Tensor.numpy")
def outside_of_pytorch() -> nn.Module:
    """Computes in NumPy."""

    def run(s: Any, x: Tensor) -> Tensor:
        features = torch.from_numpy(x.detach().cpu().flatten(1).numpy() @ s.matrix)
        return s.head(features.to(x))

    module = Net(run, head=nn.Linear(8, 10))
    module.matrix = torch.randn(3072, 8).numpy()
    return module


@network(None, "depends on the image")
def chosen_pixels() -> nn.Module:
    """A linear layer of the pixels that are brighter than the mean."""

    def run(s: Any, x: Tensor) -> Tensor:
        return torch.stack([s.head(s.pixel(image.mean(0)[image.mean(0) > 0.5].unsqueeze(1)).sum(0)) for image in x])

    return Net(run, pixel=nn.Linear(1, 8), head=nn.Linear(8, 10))


LIBRARY = torch.library.Library("zoo", "DEF")
LIBRARY.define("multiply(Tensor x, Tensor w) -> Tensor")
LIBRARY.impl("multiply", torch.matmul, "CompositeExplicitAutograd")


class MultiplyElsewhere(Multiply):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return torch.ops.zoo.multiply(x, w)


@network(None, "zoo.multiply")
def operator_of_somebody() -> nn.Module:
    def run(s: Any, x: Tensor) -> Tensor:
        return s.head(MultiplyElsewhere.apply(x.flatten(1), s.weights))

    return Net(run, weights=weight(3072, 8), head=nn.Linear(8, 10))
