"""The U-Net with a residual encoder (Isensee et al., nnU-Net Revisited, MICCAI 2024): more depth where it pays."""

from dataclasses import replace

from torch import nn

from autoseg.networks.base import Architecture
from autoseg.networks.blocks import ConvBlock, ResidualBlock
from autoseg.networks.unet import UNet, check_spec, unet_spec
from autoseg.schema import Dimension, NetworkSpec


def resenc(spec: NetworkSpec, in_channels: int, heads: int) -> UNet:
    """A stem of one convolution block, then `spec.encoder_blocks[i]` residual blocks in stage i, the first strided.

    The stem belongs to the first stage, has its width and keeps full resolution.
    """
    check_spec(spec)
    channels = spec.features[0]
    stages: list[nn.Module] = []
    for features, stride, kernel, blocks in zip(spec.features, spec.strides, spec.kernels, spec.encoder_blocks):
        parts: list[nn.Module] = [] if stages else [ConvBlock(in_channels, channels, kernel)]
        parts.append(ResidualBlock(channels, features, kernel, stride))
        parts.extend(ResidualBlock(features, features, kernel, (1,) * spec.dimension) for _ in range(blocks - 1))
        stages.append(nn.Sequential(*parts))
        channels = features
    return UNet(spec, stages, heads)


def resenc_spec(dimension: Dimension, *, stages: int = 6) -> NetworkSpec:
    """The residual-encoder U-Net of nnU-Net's widths and depths: 1, 3, 4, 6, 6, ... blocks, one in the decoder."""
    plain = unet_spec(dimension, name="resenc", stages=stages)
    blocks = (1, 3, 4, *(6,) * stages)[:stages]
    return replace(plain, encoder_blocks=blocks, decoder_blocks=(1,) * (stages - 1))


RESENC = Architecture(
    build=resenc,
    spec=resenc_spec,
    source="Isensee et al., MICCAI 2024 (nnU-Net Revisited)",
    deep_supervision=True,
    levels_follow_patch=True,
)
