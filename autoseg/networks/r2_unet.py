"""The recurrent residual U-Net (Alom et al., arXiv:1802.06955, 2018), plain and with the gates of the attention U-Net.

A recurrent layer applies one convolution f again and again to its input and what it gave last: y0 = f(x), then
yk = f(x + y(k-1)) for k = 1 ... t. A block brings its input to the width of its level by a 1x1 convolution and adds the
outcome of its recurrent layers to that. Depth grows with t, the number of weights does not.
"""

from dataclasses import replace
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from autoseg.networks.attention_unet import gates, up_convolution
from autoseg.networks.base import Architecture
from autoseg.networks.blocks import CONVOLUTION
from autoseg.networks.options import Options, read_options
from autoseg.networks.parts import ConvNormAct
from autoseg.networks.pooled import PooledUNet, Unchanged, doubled, halving_spec
from autoseg.networks.unet import check_spec
from autoseg.records import record
from autoseg.schema import Dimension, NetworkSpec


@record
class RecurrentOptions(Options):
    """`t`: how often a recurrent layer sees its own output; without bounds a plan could ask for endless work."""

    t: Annotated[int, Field(ge=1, le=8)] = 2


class RecurrentLayer(nn.Module):
    """One convolution, norm and activation, applied 1 + t times."""

    def __init__(self, width: int, kernel: tuple[int, ...], options: RecurrentOptions) -> None:
        super().__init__()
        self.t = options.t
        self.once = ConvNormAct(width, width, kernel, norm=options.norm, activation=options.activation)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> the same shape."""
        y: Tensor = self.once(x)
        for _ in range(self.t):
            y = self.once(x + y)
        return y


class RecurrentBlock(nn.Module):
    """A 1x1 convolution, and recurrent layers whose outcome is added to it."""

    def __init__(
        self, in_channels: int, width: int, kernel: tuple[int, ...], layers: int, options: RecurrentOptions
    ) -> None:
        super().__init__()
        self.widen = CONVOLUTION[len(kernel)](in_channels, width, 1)
        self.layers = nn.Sequential(*(RecurrentLayer(width, kernel, options) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, *spatial) -> (B, width, *spatial)."""
        x = self.widen(x)
        out: Tensor = x + self.layers(x)
        return out


def r2_unet(spec: NetworkSpec, in_channels: int, heads: int, *, gated: bool = False) -> PooledUNet:
    """A block a stage; `spec.encoder_blocks[i]` and `spec.decoder_blocks[i]` are the recurrent layers in it."""
    check_spec(spec)
    options = read_options(RecurrentOptions, spec)
    features, levels = spec.features, range(len(spec.decoder_blocks))
    widths = (in_channels, *features)
    return PooledUNet(
        spec,
        heads,
        encoder=[
            RecurrentBlock(widths[i], features[i], spec.kernels[i], layers, options)
            for i, layers in enumerate(spec.encoder_blocks)
        ],
        joins=gates(spec, finest=True) if gated else [Unchanged() for _ in levels],
        ups=[up_convolution(spec, i, options) for i in levels],
        decoder=[
            RecurrentBlock(2 * features[i], features[i], spec.kernels[i], layers, options)
            for i, layers in enumerate(spec.decoder_blocks)
        ],
        widths=features,
        dropout=options.dropout,
    )


def r2_attention_unet(spec: NetworkSpec, in_channels: int, heads: int) -> PooledUNet:
    """`r2_unet` with a gate on every skip."""
    return r2_unet(spec, in_channels, heads, gated=True)


def r2_unet_spec(
    dimension: Dimension,
    *,
    width: int = 64,
    stages: int = 5,
    t: int = 2,
    norm: str = "batch",
    activation: str = "relu",
    dropout: float = 0.0,
) -> NetworkSpec:
    """`width` features, doubled in each of the `stages`; two recurrent layers a block."""
    return halving_spec(
        "r2_unet",
        dimension,
        doubled(width, stages),
        {"norm": norm, "activation": activation, "dropout": dropout, "t": t},
    )


def r2_attention_unet_spec(
    dimension: Dimension,
    *,
    width: int = 64,
    stages: int = 5,
    t: int = 2,
    norm: str = "batch",
    activation: str = "relu",
    dropout: float = 0.0,
) -> NetworkSpec:
    """As `r2_unet_spec`."""
    plain = r2_unet_spec(dimension, width=width, stages=stages, t=t, norm=norm, activation=activation, dropout=dropout)
    return replace(plain, name="r2_attention_unet")


R2_UNET = Architecture(build=r2_unet, spec=r2_unet_spec, source="Alom et al., arXiv:1802.06955 (2018)")
R2_ATTENTION_UNET = Architecture(
    build=r2_attention_unet,
    spec=r2_attention_unet_spec,
    source="Alom et al., arXiv:1802.06955 (2018), with the gates of Oktay et al., MIDL 2018",
)
