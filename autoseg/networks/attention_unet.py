"""The attention U-Net (Oktay et al., MIDL 2018): skips are weighted by what the coarser level deems worth a look.

A gate reads a skip x and the decoder level below it, g, on the grid of g: a = sigmoid(psi(relu(Wx x + Wg g))), with
1x1 convolutions, Wx strided and to half the width of x. What goes across is x times a, interpolated to its size. As in
the paper the finest skip has no gate.

In 3D all is as in the paper: widths from 16, linear interpolation upwards, deep supervision. The widespread 2D variant
has widths from 64, and a convolution after up-sampling.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from autoseg.networks.base import Architecture, Network, cut_back
from autoseg.networks.blocks import CONVOLUTION
from autoseg.networks.options import Options, read_options
from autoseg.networks.parts import INTERPOLATION, same_size
from autoseg.networks.pooled import PooledUNet, Unchanged, convolutions, doubled, halving_spec, interpolated
from autoseg.networks.unet import check_spec
from autoseg.records import record
from autoseg.schema import Dimension, NetworkSpec


class Attention(nn.Module):
    """The coefficients of a gate; `stride` is that between the two levels it reads."""

    def __init__(self, skip: int, below: int, stride: tuple[int, ...]) -> None:
        super().__init__()
        conv, inner = CONVOLUTION[len(stride)], max(1, skip // 2)
        self.of_skip = conv(skip, inner, 1, stride, bias=False)
        self.of_below = conv(below, inner, 1)
        self.psi = conv(inner, 1, 1)

    def forward(self, skip: Tensor, below: Tensor) -> Tensor:
        """(B, C, *spatial), (B, D, *spatial / stride) -> (B, 1, *spatial), from 0 to 1."""
        both = torch.relu(self.of_skip(skip) + self.of_below(below))
        return same_size(torch.sigmoid(self.psi(both)), skip)


class AttentionGate(nn.Module):
    """The join of the attention U-Net: the skip times its coefficients."""

    def __init__(self, skip: int, below: int, stride: tuple[int, ...]) -> None:
        super().__init__()
        self.attention = Attention(skip, below, stride)

    def forward(self, skip: Tensor, below: Tensor) -> Tensor:
        """(B, C, *spatial), (B, D, *spatial / stride) -> (B, C, *spatial)."""
        return skip * self.attention(skip, below)


def gates(spec: NetworkSpec, *, finest: bool) -> list[nn.Module]:
    """A gate for each skip of `spec`; only with `finest` for the one at full resolution."""
    made: list[nn.Module] = [] if finest else [Unchanged()]
    for i in range(len(made), len(spec.features) - 1):
        made.append(AttentionGate(spec.features[i], spec.features[i + 1], spec.strides[i + 1]))
    return made


@torch.no_grad()
def attention_maps(network: Network, x: Tensor) -> list[Tensor]:
    """Images (B, C, *spatial) -> the coefficients of each gate, (B, 1, *spatial) from 0 to 1, the finest first.

    Those of lower levels are interpolated linearly. Raises ValueError for a network without gates.
    """
    found: list[Tensor] = []
    attentions = [part for part in network.modules() if isinstance(part, Attention)]
    if not attentions:
        raise ValueError(f"{type(network).__name__} has no attention gates; an attention_unet has")
    hooks = [part.register_forward_hook(lambda part, inputs, output: found.append(output)) for part in attentions]
    try:
        network(x)
    finally:
        for hook in hooks:
            hook.remove()
    size = tuple(x.shape[2:])
    padded = [edge + -edge % unit for edge, unit in zip(size, network.divisor)]
    mode = INTERPOLATION[len(size)]
    full = [interpolate(one, padded, mode=mode, align_corners=False) for one in reversed(found)]
    return [cut_back(one, size, (1,) * len(size)) for one in full]


@record
class AttentionOptions(Options):
    """`up`: by what a level is brought up; `supervised`: whether every decoder level has a head."""

    up: Literal["conv", "linear"] = "conv"
    gate_finest: bool = False
    supervised: bool = False


def attention_unet(spec: NetworkSpec, in_channels: int, heads: int) -> PooledUNet:
    """`spec.encoder_blocks[i]` convolutions in stage i, `spec.decoder_blocks[i]` in the decoder level beside it."""
    check_spec(spec)
    options = read_options(AttentionOptions, spec)
    features, widths, levels = spec.features, (in_channels, *spec.features), range(len(spec.decoder_blocks))
    if options.up == "conv":
        ups = [up_convolution(spec, i, options) for i in levels]
        brought = features
    else:
        ups = [interpolated(spec.strides[i + 1]) for i in levels]
        brought = features[1:]
    return PooledUNet(
        spec,
        heads,
        encoder=[
            convolutions((widths[i], *(features[i],) * blocks), spec.kernels[i], options)
            for i, blocks in enumerate(spec.encoder_blocks)
        ],
        joins=gates(spec, finest=options.gate_finest),
        ups=ups,
        decoder=[
            convolutions((features[i] + brought[i], *(features[i],) * blocks), spec.kernels[i], options)
            for i, blocks in enumerate(spec.decoder_blocks)
        ],
        widths=features,
        supervised=len(levels) if options.supervised else 1,
        dropout=options.dropout,
    )


def up_convolution(spec: NetworkSpec, level: int, options: Options) -> nn.Module:
    """From the width and size of the stage below `level` to its own: nearest neighbours, then a convolution."""
    return nn.Sequential(
        interpolated(spec.strides[level + 1], "nearest"),
        *convolutions((spec.features[level + 1], spec.features[level]), spec.kernels[level], options),
    )


def attention_unet_spec(
    dimension: Dimension,
    *,
    width: int = 0,
    stages: int = 5,
    norm: str = "batch",
    activation: str = "relu",
    dropout: float = 0.0,
    up: str = "",
    gate_finest: bool = False,
    supervised: bool | None = None,
) -> NetworkSpec:
    """`width` features, doubled in each of the `stages`; what is left out differs between 2D and 3D, see above."""
    flat = dimension == 2
    return halving_spec(
        "attention_unet",
        dimension,
        doubled(width or (64 if flat else 16), stages),
        {
            "norm": norm,
            "activation": activation,
            "dropout": dropout,
            "up": up or ("conv" if flat else "linear"),
            "gate_finest": gate_finest,
            "supervised": not flat if supervised is None else supervised,
        },
    )


ATTENTION_UNET = Architecture(
    build=attention_unet, spec=attention_unet_spec, source="Oktay et al., MIDL 2018", deep_supervision=True
)
