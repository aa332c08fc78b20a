"""MultiResUNet (Ibtehaz and Rahman, Neural Networks 2020): blocks that see several scales, and skips with convolutions.

A MultiRes block chains three 3x3 convolutions, which together see what 3x3, 5x5 and 7x7 ones would, and gives the
outputs of all three side by side, added to a 1x1 convolution of its input. A Res path takes a skip across through
units of a 3x3 convolution beside a 1x1 one, more of them the finer the level, as encoder and decoder differ most there.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from autoseg.networks.base import Architecture
from autoseg.networks.options import Options, read_options
from autoseg.networks.parts import ACTIVATIONS, NORMS, ConvNormAct, choose
from autoseg.networks.pooled import PooledUNet, check_stages, convolutions, doubled, halving_spec, transposed
from autoseg.networks.unet import check_spec
from autoseg.records import record
from autoseg.schema import Dimension, NetworkSpec


@record
class MultiResOptions(Options):
    """`alpha`: the width W of a block is alpha times the features U of its stage."""

    alpha: Annotated[float, Field(gt=0.0, le=16.0)] = 1.67


def block_widths(features: int, alpha: float) -> tuple[int, int, int]:
    """Channels of the three convolutions of a block: W/6, W/3 and W/2, rounded down, of W = alpha * features."""
    width = alpha * features
    return max(1, int(width / 6)), max(1, int(width / 3)), max(1, int(width / 2))


class Chain(nn.ModuleList):
    """Convolutions one after another, and the outputs of all of them side by side."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, *spatial) -> (B, sum of widths, *spatial)."""
        outputs = []
        for convolution in self:
            x = convolution(x)
            outputs.append(x)
        return torch.cat(outputs, 1)


class Residual(nn.Module):
    """`body` plus a 1x1 convolution of the input, then activation and norm, in this order."""

    def __init__(
        self, body: nn.Module, in_channels: int, out_channels: int, dimension: int, options: MultiResOptions
    ) -> None:
        super().__init__()
        self.body = body
        self.shortcut = ConvNormAct(in_channels, out_channels, (1,) * dimension, norm=options.norm, activation="none")
        self.end = nn.Sequential(
            choose(ACTIVATIONS, options.activation, "activation")(out_channels),
            choose(NORMS, options.norm, "norm")(dimension, out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, *spatial) -> (B, out, *spatial)."""
        out: Tensor = self.end(self.body(x) + self.shortcut(x))
        return out


def multires_block(in_channels: int, features: int, kernel: Sequence[int], options: MultiResOptions) -> Residual:
    """A MultiRes block; it gives `sum(block_widths(features, alpha))` channels."""
    widths = block_widths(features, options.alpha)
    made = convolutions((in_channels, *widths), kernel, options)
    return Residual(Chain(made), in_channels, sum(widths), len(kernel), options)


class ResPath(nn.Sequential):
    """The join of the MultiResUNet: `units` residual units on the way across, all `width` wide."""

    def __init__(
        self, in_channels: int, width: int, units: int, kernel: Sequence[int], options: MultiResOptions
    ) -> None:
        widths = (in_channels, *(width,) * units)
        super().__init__(
            *(Residual(convolutions(pair, kernel, options), *pair, len(kernel), options) for pair in pairwise(widths))
        )

    def forward(self, skip: Tensor, below: Tensor) -> Tensor:  # type: ignore[override]
        """(B, in, *spatial) -> (B, width, *spatial); what lies below is not looked at."""
        out: Tensor = super().forward(skip)
        return out


def multires_unet(spec: NetworkSpec, in_channels: int, heads: int) -> PooledUNet:
    """`spec.encoder_blocks[i]` MultiRes blocks in stage i, `spec.decoder_blocks[i]` in the decoder level beside it."""
    check_spec(spec)
    check_stages(spec)
    options = read_options(MultiResOptions, spec)
    features, kernels, levels = spec.features, spec.kernels, range(len(spec.decoder_blocks))
    given = [sum(block_widths(width, options.alpha)) for width in features]

    def level(number: int, channels: int, blocks: int) -> nn.Module:
        entering = (channels, *(given[number],) * (blocks - 1))
        return nn.Sequential(*(multires_block(one, features[number], kernels[number], options) for one in entering))

    before = (in_channels, *given)
    network = PooledUNet(
        spec,
        heads,
        encoder=[level(i, before[i], blocks) for i, blocks in enumerate(spec.encoder_blocks)],
        joins=[ResPath(given[i], features[i], len(levels) - i, kernels[i], options) for i in levels],
        ups=[transposed(given[i + 1], features[i], spec.strides[i + 1]) for i in levels],
        decoder=[level(i, 2 * features[i], blocks) for i, blocks in enumerate(spec.decoder_blocks)],
        widths=given,
        dropout=options.dropout,
    )
    network.beside_first = ("encoder.0.0.0.shortcut.0.weight",)
    return network


def multires_unet_spec(
    dimension: Dimension,
    *,
    width: int = 32,
    stages: int = 5,
    alpha: float = 1.67,
    norm: str = "batch",
    activation: str = "relu",
    dropout: float = 0.0,
) -> NetworkSpec:
    """U = `width` features, doubled in each of the `stages`; one block a stage."""
    return halving_spec(
        "multires_unet",
        dimension,
        doubled(width, stages),
        {"norm": norm, "activation": activation, "dropout": dropout, "alpha": alpha},
        encoder_blocks=(1,) * stages,
        decoder_blocks=(1,) * (stages - 1),
    )


MULTIRES_UNET = Architecture(
    build=multires_unet, spec=multires_unet_spec, source="Ibtehaz and Rahman, Neural Networks 2020"
)
