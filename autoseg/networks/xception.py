"""The modified aligned Xception (Chollet, CVPR 2017; Chen et al., ECCV 2018) as an encoder, in 2D and 3D.

All its convolutions but those of the stem and the shortcuts are depthwise separable, strided ones take the place of
pooling, and a norm and an activation stand after each depthwise convolution too.
"""

from collections.abc import Sequence
from itertools import pairwise
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
    """A stem of convolutions (two in the paper, the first of half the width), stages of blocks, and an exit of two.

    In each stage the first block strides and projects its shortcut, the others add to what they are given; only the
    second of the exit, which widens, adds to nothing. `spec.features` are the widths that stages give,
    `spec.encoder_blocks` the convolutions of the stem and the blocks of each stage.
    """

    def __init__(
        self, spec: NetworkSpec, in_channels: int, strides: Strides, dilations: Strides, *, norm: str, activation: str
    ) -> None:
        """strides, dilations: of each stage, in place of those of `spec`. ValueError for an exit of one block."""
        super().__init__()
        first, *inner, last = spec.features
        stem_blocks, *_, exit_blocks = spec.encoder_blocks
        if exit_blocks < 2:
            raise ValueError(f"encoder_blocks: the exit has two blocks or more, found {exit_blocks}")
        wide, wider = max(1, last // 2), max(1, 3 * last // 4)
        self.widths = (*inner, wide, last)
        stem = [first] * stem_blocks
        if stem_blocks > 1:
            stem[0] = max(1, first // 2)
        self.stem = nn.Sequential()
        for channels, width in pairwise((in_channels, *stem)):
            stride = (1,) * spec.dimension if len(self.stem) else strides[0]
            self.stem.append(
                ConvNormAct(channels, width, spec.kernels[0], stride=stride, norm=norm, activation=activation)
            )

        def strided(stage: int, channels: int, widths: Sequence[int]) -> XceptionBlock:
            point, stride = (1,) * spec.dimension, strides[stage]
            project = ConvNormAct(channels, widths[-1], point, stride=stride, norm=norm, activation="none")
            return XceptionBlock(
                channels,
                widths,
                spec.kernels[stage],
                stride=stride,
                dilation=dilations[stage - 1],
                shortcut=project,
                norm=norm,
                activation=activation,
            )

        def further(stage: int, channels: int, widths: Sequence[int], adds: bool = True) -> XceptionBlock:
            return XceptionBlock(
                channels,
                widths,
                spec.kernels[stage],
                dilation=dilations[stage],
                shortcut=nn.Identity() if adds else None,
                norm=norm,
                activation=activation,
            )

        self.stages, channels = nn.ModuleList(), first
        for stage, width in enumerate(inner, 1):
            same = (width,) * UNITS
            rest = (further(stage, width, same) for _ in range(spec.encoder_blocks[stage] - 1))
            self.stages.append(nn.ModuleList([strided(stage, channels, same), *rest]))
            channels = width
        stage = len(spec.features) - 1
        exits = [strided(stage, channels, (channels, wide, wide)), further(stage, wide, (wider, wider, last), False)]
        rest = (further(stage, last, (last,) * UNITS) for _ in range(exit_blocks - 2))
        self.stages.append(nn.ModuleList([*exits, *rest]))
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
