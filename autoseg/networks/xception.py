"""The modified aligned Xception (Chollet, CVPR 2017; Chen et al., ECCV 2018) as an encoder, in 2D and 3D.

All its convolutions but those of the stem and the shortcuts are depthwise separable, strided ones take the place of
pooling, and a norm and an activation stand after each depthwise convolution too.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from autoseg.networks.parts import ACTIVATIONS, ConvNormAct, choose
from autoseg.networks.stages import Strides
from autoseg.schema import NetworkSpec

UNITS = 3
"""Separable convolutions in a block."""


class Separable(nn.Sequential):
    """A depthwise and a pointwise convolution, each with its norm; an activation after both.

    `before`: an activation first in place of the last one, so that sums over shortcuts stay as they are.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Sequence[int],
        *,
        stride: Sequence[int] | int = 1,
        dilation: Sequence[int] | int = 1,
        norm: str,
        activation: str,
        before: bool = False,
    ) -> None:
        depthwise = ConvNormAct(
            in_channels, in_channels, kernel, stride=stride, dilation=dilation, groups=in_channels, norm=norm,
            activation=activation,
        )  # fmt: skip
        last = "none" if before else activation
        pointwise = ConvNormAct(in_channels, out_channels, (1,) * len(kernel), norm=norm, activation=last)
        super().__init__(apart(activation, in_channels) if before else nn.Identity(), depthwise, pointwise)


def apart(activation: str, channels: int) -> nn.Module:
    """An activation that leaves its input as it is: a shortcut still reads it."""
    made: Any = choose(ACTIVATIONS, activation, "activation")(channels)
    if hasattr(made, "inplace"):
        made.inplace = False
    return made


class XceptionBlock(nn.Module):
    """Three separable convolutions of `widths`, the last one strided, beside a `shortcut` unless that is None."""

    def __init__(
        self,
        in_channels: int,
        widths: Sequence[int],
        kernel: Sequence[int],
        *,
        stride: Sequence[int] | int = 1,
        dilation: Sequence[int],
        shortcut: nn.Module | None,
        norm: str,
        activation: str,
    ) -> None:
        super().__init__()
        channels = (in_channels, *widths[:-1])
        self.units = nn.ModuleList(
            Separable(
                one, other, kernel, stride=stride if place == UNITS - 1 else 1, dilation=dilation, norm=norm,
                activation=activation, before=True,
            )
            for place, (one, other) in enumerate(zip(channels, widths, strict=True))
        )  # fmt: skip
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, in, *spatial) -> what the block gives, and its last map before it strides."""
        before = x
        for unit in self.units[:-1]:
            before = unit(before)
        out = self.units[-1](before)
        return (out if self.shortcut is None else out + self.shortcut(x)), before


class Xception(nn.Module):
    """A stem of two convolutions, stages of blocks, and the exit of two blocks that are wider inside than before.

    In each stage the first block strides and projects its shortcut, the others add to what they are given.
    `spec.features` are the widths that stages give, `spec.encoder_blocks` (2 for the stem, 2 for the exit) the blocks.
    """

    def __init__(
        self, spec: NetworkSpec, in_channels: int, strides: Strides, dilations: Strides, *, norm: str, activation: str
    ) -> None:
        """strides, dilations: of each stage, in place of those of `spec`. ValueError for other stems or exits."""
        super().__init__()
        *inner, last = spec.features[1:]
        if spec.encoder_blocks[0] != 2 or spec.encoder_blocks[-1] != 2:
            raise ValueError(f"encoder_blocks: 2 for the stem and 2 for the exit, found {spec.encoder_blocks}")
        point, half = (1,) * spec.dimension, max(1, spec.features[0] // 2)
        wide, between = max(1, last // 2), max(1, 3 * last // 4)
        self.widths = (*inner, wide, last)

        def block(
            channels: int, widths: Sequence[int], stage: int, first: bool, shortcut: bool = True
        ) -> XceptionBlock:
            stride = strides[stage] if first else point
            straight: nn.Module | None = nn.Identity() if shortcut else None
            if first:
                straight = ConvNormAct(channels, widths[-1], point, stride=stride, norm=norm, activation="none")
            return XceptionBlock(
                channels, widths, spec.kernels[stage], stride=stride,
                dilation=dilations[stage - 1 if first else stage], shortcut=straight, norm=norm, activation=activation,
            )  # fmt: skip

        self.stem = nn.Sequential(
            ConvNormAct(in_channels, half, spec.kernels[0], stride=strides[0], norm=norm, activation=activation),
            ConvNormAct(half, spec.features[0], spec.kernels[0], norm=norm, activation=activation),
        )
        self.stages, channels = nn.ModuleList(), spec.features[0]
        for stage, width in enumerate(inner, 1):
            counts = range(spec.encoder_blocks[stage])
            self.stages.append(
                nn.ModuleList(block(width if n else channels, (width,) * UNITS, stage, first=n == 0) for n in counts)
            )
            channels = width
        exit_stage = len(spec.features) - 1
        self.stages.append(
            nn.ModuleList([
                block(channels, (channels, wide, wide), exit_stage, first=True),
                block(wide, (between, between, last), exit_stage, first=False, shortcut=False),
            ])
        )  # fmt: skip
        self.active = choose(ACTIVATIONS, activation, "activation")(last)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (B, C, *spatial) -> one map a stage: the last at its resolution, of `widths` channels."""
        x, maps = self.stem(x), []
        stages: Any = self.stages
        for stage in stages:
            for place, block in enumerate(stage):
                x, before = block(x)
                if place == 0:
                    maps.append(before)
        return [*maps, self.active(x)]
