"""U-Nets around an encoder that was made to classify, a ResNet34 or a VGG: weights published for ImageNet fit by name.

The decoder is a U-Net's (Ronneberger et al., MICCAI 2015): at each level nearest-neighbour enlargement, the map of the
encoder beside it, two convolutions. Every level has a head of its own; all but the first are for training.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from autoseg.networks.base import Architecture, Network
from autoseg.networks.blocks import CONVOLUTION
from autoseg.networks.options import Options, read_options
from autoseg.networks.parts import DROPOUT, ConvNormAct, initialise_he
from autoseg.networks.pooled import convolutions
from autoseg.networks.resnet import ResNet
from autoseg.networks.stages import check_stages
from autoseg.networks.strides import running, total
from autoseg.networks.unet import check_spec
from autoseg.networks.vgg import CONVOLUTIONS, VGG
from autoseg.records import record
from autoseg.schema import Dimension, NetworkSpec


@record
class EncoderUNetOptions(Options):
    """What beside its stages makes such a U-Net. `dropout` leaves out channels before the heads."""

    decoder_features: tuple[PositiveInt, ...] = (16, 32, 64, 128, 256)
    """Of each level, the finest first."""


class EncoderUNet(Network):
    """`spec.decoder_blocks[i]` convolutions of `decoder_features[i]` channels at level i, level 0 at full resolution.

    skips: channels of the encoder's map at each level, the finest first, 0 where it has none of that size;
    kernels: of each level's convolutions; scales: how much smaller than the image each level is.
    A subclass makes `self.encoder` before, and `self.centre` if more than the encoder lies below the lowest level.
    """

    encoder: nn.Module
    centre: nn.Module

    def add_decoder(
        self, spec: NetworkSpec, heads: int, *, skips: Sequence[int], kernels: Sequence[Sequence[int]]
    ) -> None:
        """The levels, from the options of `spec`. Raises ValueError unless each level has a width."""
        options = read_options(EncoderUNetOptions, spec)
        norm, activation, widths = options.norm, options.activation, options.decoder_features
        if len(widths) != len(skips):
            raise ValueError(f"options: decoder_features needs {len(skips)} positive numbers, found {widths}")
        self.divisor = total(spec.strides)
        self.decoder, self.heads = nn.ModuleList(), nn.ModuleList()
        self.dropout = DROPOUT[spec.dimension](options.dropout)
        below = (*widths[1:], spec.features[-1])
        for level, width in enumerate(widths):
            channels = (below[level] + skips[level], *(width,) * (spec.decoder_blocks[level] - 1))
            blocks = (ConvNormAct(one, width, kernels[level], norm=norm, activation=activation) for one in channels)
            self.decoder.append(nn.Sequential(*blocks))
            self.heads.append(CONVOLUTION[spec.dimension](width, heads, 1))
        initialise_he(self)

    def scales_of(self, x: Tensor, all_scales: bool) -> Sequence[Tensor]:
        """As `Network.scales_of`; a scale for every level of the decoder."""
        image, maps = x, self.encoder(x)
        x, outputs = self.centre(maps.pop()), []
        nearest: Any = F.interpolate
        for level in reversed(range(len(self.decoder))):
            size = (maps[-1] if maps else image).shape[2:]
            x = nearest(x, size=size, mode="nearest")
            x = self.decoder[level](torch.cat([x, maps.pop()], 1) if maps else x)
            if all_scales or level == 0:
                outputs.append(self.heads[level](self.dropout(x)))
        return outputs[::-1]


class ResNetUNet(EncoderUNet):
    """Level i enlarges the level below it by `spec.strides[i]` and convolves with the kernel of stage i.

    Levels 0 and 1 have the kernel of stage 1. The stem strides, so level 0 is one at the size of the image that has no
    map beside it.
    """

    first_weight = "encoder.conv1.weight"

    def __init__(self, spec: NetworkSpec, in_channels: int, heads: int) -> None:
        super().__init__()
        levels = len(spec.features)
        check_stages(spec, levels=levels)
        options = read_options(EncoderUNetOptions, spec)
        whole = (1,) * spec.dimension
        self.scales = (whole, *running(spec.strides[:-1]))
        self.encoder = ResNet(
            spec,
            in_channels,
            spec.strides,
            (whole,) * levels,
            bottleneck=False,
            norm=options.norm,
            activation=options.activation,
        )
        self.centre = nn.Identity()
        kernels = (spec.kernels[1], *spec.kernels[1:])
        self.add_decoder(spec, heads, skips=(0, *spec.features[:-1]), kernels=kernels)


class VGGUNet(EncoderUNet):
    """A level beside every stage of the VGG; the last of `spec` is of convolutions below its last pooling.

    That stage is not part of what was published, and so not of the encoder that can be frozen.
    """

    first_weight = "encoder.features.0.weight"

    def __init__(self, spec: NetworkSpec, in_channels: int, heads: int) -> None:
        super().__init__()
        check_spec(spec)
        options = read_options(EncoderUNetOptions, spec)
        *widths, lowest = spec.features
        self.scales = running(spec.strides[:-1])
        self.encoder = VGG(spec, in_channels, norm=options.norm, activation=options.activation)
        self.centre = convolutions((widths[-1], *(lowest,) * spec.encoder_blocks[-1]), spec.kernels[-1], options)
        self.add_decoder(spec, heads, skips=widths, kernels=spec.kernels[:-1])


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
        options=asdict(EncoderUNetOptions(norm=norm, activation=activation, dropout=dropout)),
    )


def vgg_unet_spec(
    dimension: Dimension,
    *,
    depth: Literal[16, 19] = 16,
    norm: str = "batch",
    activation: str = "relu",
    dropout: float = 0.0,
) -> NetworkSpec:
    """The convolutions of VGG16 or VGG19, two more of 512 channels below, and the decoder of `resnet34_unet`.

    Raises ValueError for another depth.
    """
    if depth not in CONVOLUTIONS:
        raise ValueError(f"depth: choose one of {', '.join(map(str, CONVOLUTIONS))}, found {depth!r}")
    return NetworkSpec(
        name="vgg_unet",
        dimension=dimension,
        features=(64, 128, 256, 512, 512, 512),
        strides=((1,) * dimension, *((2,) * dimension,) * 5),
        kernels=((3,) * dimension,) * 6,
        encoder_blocks=(*CONVOLUTIONS[depth], 2),
        decoder_blocks=(2,) * 5,
        options=asdict(EncoderUNetOptions(norm=norm, activation=activation, dropout=dropout)),
    )


RESNET34_UNET = Architecture(
    build=ResNetUNet,
    spec=resnet34_unet_spec,
    source="He et al., CVPR 2016 (ResNet34), with the decoder of Ronneberger et al., MICCAI 2015",
    deep_supervision=True,
)
VGG_UNET = Architecture(
    build=VGGUNet,
    spec=vgg_unet_spec,
    source="Simonyan and Zisserman, ICLR 2015 (VGG16, VGG19), with the decoder of Ronneberger et al., MICCAI 2015",
    deep_supervision=True,
)
