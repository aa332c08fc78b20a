"""The U-Net with a residual encoder (Isensee et al., nnU-Net Revisited, MICCAI 2024): more depth where it pays."""

from torch import nn

from autoseg.networks.blocks import ConvBlock, ResidualBlock
from autoseg.networks.unet import UNet, check_spec
from autoseg.schema import NetworkSpec


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
