"""The U-Net with a ResNet34 encoder: skips at every scale, a decoder that interpolates.

The encoder is that of He et al. (CVPR 2016), the decoder a U-Net's (Ronneberger et al., MICCAI 2015): at each level
nearest-neighbour enlargement, the map of the encoder beside it, two convolutions. The stem strides, so there is a last
level at the size of the image that has no skip. Every level has a head of its own; all but the first are for training.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from autoseg.networks.base import Architecture, Network
from autoseg.networks.blocks import CONVOLUTION
from autoseg.networks.options import Options, read_options
from autoseg.networks.parts import DROPOUT, ConvNormAct, initialise_he
from autoseg.networks.resnet import ResNet
from autoseg.networks.stages import check_stages
from autoseg.networks.strides import running, total
from autoseg.records import record
from autoseg.schema import Dimension, NetworkSpec


@record
class ResNetUNetOptions(Options):
    """What beside its stages makes a ResNet U-Net."""

    decoder_features: tuple[PositiveInt, ...] = (16, 32, 64, 128, 256)
    """Of each level, the finest first."""


class ResNetUNet(Network):
    """`spec.decoder_blocks[i]` convolutions of `decoder_features[i]` channels at level i, level 0 at full resolution.

    Level i enlarges the level below it by `spec.strides[i]` and convolves with the kernel of stage i, levels 0 and 1
    with that of stage 1. `dropout` leaves out channels before the heads.
    """

    first_weight = "encoder.conv1.weight"

    def __init__(self, spec: NetworkSpec, in_channels: int, heads: int) -> None:
        super().__init__()
        levels = len(spec.features)
        check_stages(spec, levels=levels)
        options = read_options(ResNetUNetOptions, spec)
        norm, activation, widths = options.norm, options.activation, options.decoder_features
        if len(widths) != levels:
            raise ValueError(f"options: decoder_features needs {levels} positive numbers, found {widths}")
        self.divisor = total(spec.strides)
        whole = (1,) * spec.dimension
        self.scales = (whole, *running(spec.strides[:-1]))
        self.encoder = ResNet(
            spec, in_channels, spec.strides, (whole,) * levels, bottleneck=False, norm=norm, activation=activation
        )
        self.decoder, self.heads = nn.ModuleList(), nn.ModuleList()
        self.dropout = DROPOUT[spec.dimension](options.dropout)
        below = (*widths[1:], spec.features[-1])
        skips = (0, *spec.features[:-1])
        for level, width in enumerate(widths):
            channels = (below[level] + skips[level], *(width,) * (spec.decoder_blocks[level] - 1))
            kernel = spec.kernels[max(level, 1)]
            blocks = (ConvNormAct(one, width, kernel, norm=norm, activation=activation) for one in channels)
            self.decoder.append(nn.Sequential(*blocks))
            self.heads.append(CONVOLUTION[spec.dimension](width, heads, 1))
        initialise_he(self)

    def scales_of(self, x: Tensor, all_scales: bool) -> Sequence[Tensor]:
        """As `Network.scales_of`; a scale for every level of the decoder."""
        image, maps = x, self.encoder(x)
        x, outputs = maps.pop(), []
        nearest: Any = F.interpolate
        for level in reversed(range(len(self.decoder))):
            size = (maps[-1] if maps else image).shape[2:]
            x = nearest(x, size=size, mode="nearest")
            x = self.decoder[level](torch.cat([x, maps.pop()], 1) if maps else x)
            if all_scales or level == 0:
                outputs.append(self.heads[level](self.dropout(x)))
        return outputs[::-1]


def resnet34_unet_spec(
    dimension: Dimension, *, norm: str = "batch", activation: str = "relu", dropout: float = 0.0
) -> NetworkSpec:
    """3, 4, 6 and 3 blocks of 64, 128, 256 and 512 channels after the stem; 16 to 256 channels in the decoder."""
    return NetworkSpec(
        name="resnet34_unet",
        dimension=dimension,
        features=(64, 64, 128, 256, 512),
        strides=((2,) * dimension,) * 5,
        kernels=((7,) * dimension, *((3,) * dimension,) * 4),
        encoder_blocks=(1, 3, 4, 6, 3),
        decoder_blocks=(2,) * 5,
        options=asdict(ResNetUNetOptions(norm=norm, activation=activation, dropout=dropout)),
    )


RESNET34_UNET = Architecture(
    build=ResNetUNet,
    spec=resnet34_unet_spec,
    source="He et al., CVPR 2016 (ResNet34), with the decoder of Ronneberger et al., MICCAI 2015",
    deep_supervision=True,
)
