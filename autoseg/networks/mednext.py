"""MedNeXt (Roy et al., MICCAI 2023): a ConvNeXt made for segmentation, residual also where it changes resolution.

A block is a depth-wise convolution with a large kernel and a norm of each channel, an expansion to several times the
features by single voxels, GELU, and the way back; the input is added. Blocks that go down or up have a strided or a
transposed depth-wise convolution and a shortcut with a kernel of 1. Skips are added, not concatenated. Every
resolution has a head, the lowest too.

A network with kernels of 5 is meant to begin as one with kernels of 3 that has been trained (UpKern): `train
--pretrained` with that one up-samples its kernels, see `autoseg.transfer`. The norm behind each takes away that they
are larger in sum.
"""

from collections.abc import Sequence
from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from autoseg.networks.base import Architecture, Network
from autoseg.networks.blocks import CONVOLUTION, TRANSPOSED
from autoseg.networks.options import read_options
from autoseg.networks.parts import ACTIVATIONS, NORMS, choose
from autoseg.networks.strides import running, total
from autoseg.networks.unet import check_spec
from autoseg.networks.volumetric import doubling_spec
from autoseg.records import record
from autoseg.schema import Dimension, NetworkSpec


@record
class MedNeXtOptions:
    """`expansion`: how many times the features a block has inside, one number a stage, or one for all."""

    expansion: tuple[Annotated[int, Field(ge=1, le=32)], ...] = (2,)
    norm: str = "instance"
    activation: str = "gelu"


SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "S": ((2, 2, 2, 2, 2), (2, 2, 2, 2, 2)),
    "B": ((2, 2, 2, 2, 2), (2, 3, 4, 4, 4)),
    "M": ((3, 4, 4, 4, 4), (2, 3, 4, 4, 4)),
    "L": ((3, 4, 8, 8, 8), (3, 4, 8, 8, 8)),
}
"""Size -> blocks and expansion of each stage; the decoder mirrors the encoder."""


class Block(nn.Module):
    """A MedNeXt block; with a stride, and with `up`, the one that goes down or up by it."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Sequence[int],
        expansion: int,
        options: MedNeXtOptions,
        *,
        stride: Sequence[int] = (),
        up: bool = False,
    ) -> None:
        super().__init__()
        axes, inside = len(kernel), in_channels * expansion
        steps = tuple(stride) or (1,) * axes
        convolution = (TRANSPOSED if up else CONVOLUTION)[axes]
        padding = tuple(edge // 2 for edge in kernel)
        self.spatial = convolution(in_channels, in_channels, tuple(kernel), steps, padding, groups=in_channels)
        self.norm = choose(NORMS, options.norm, "norm")(axes, in_channels)
        self.expand = CONVOLUTION[axes](in_channels, inside, 1)
        self.activation = choose(ACTIVATIONS, options.activation, "activation")(inside)
        self.compress = CONVOLUTION[axes](inside, out_channels, 1)
        self.shortcut = convolution(in_channels, out_channels, 1, steps) if stride else nn.Identity()
        # A transposed convolution that is padded on both sides lacks what lies before its first voxel: zeros, as in the
        # networks of the authors.
        self.missing = [gap for step in reversed(steps) for gap in (step - 1, 0)] if up else []

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, *spatial) -> (B, out, *spatial / stride), or times the stride where it goes up."""
        out = self.compress(self.activation(self.expand(self.norm(self.spatial(x)))))
        out = out + self.shortcut(x)
        return F.pad(out, self.missing) if any(self.missing) else out


class MedNeXt(Network):
    """Stages of blocks, a strided block between each two, and the way back, for (B, C, Z, Y, X) or (B, C, Y, X)."""

    first_weight = "stem.weight"
    grows_kernels = True
    encoder_prefixes = ("stem.", "encoder.", "down.")

    def __init__(self, spec: NetworkSpec, in_channels: int, heads: int) -> None:
        super().__init__()
        check_spec(spec)
        options = read_options(MedNeXtOptions, spec)
        stages = len(spec.features)
        ratios = options.expansion * (stages if len(options.expansion) == 1 else 1)
        if len(ratios) != stages:
            raise ValueError(f"option expansion of the network {spec.name!r}: {stages} numbers or one, found {ratios}")
        self.divisor, self.scales = total(spec.strides), running(spec.strides)

        def blocks(stage: int, count: int) -> nn.Sequential:
            width, kernel = spec.features[stage], spec.kernels[stage]
            return nn.Sequential(*(Block(width, width, kernel, ratios[stage], options) for _ in range(count)))

        convolution = CONVOLUTION[spec.dimension]
        self.stem = convolution(in_channels, spec.features[0], 1)
        self.encoder = nn.ModuleList(blocks(stage, count) for stage, count in enumerate(spec.encoder_blocks))
        self.down, self.up, self.decoder = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level, count in enumerate(spec.decoder_blocks):
            width, lower, stride = spec.features[level], spec.features[level + 1], spec.strides[level + 1]
            kernel = spec.kernels[level + 1]
            self.down.append(Block(width, lower, kernel, ratios[level + 1], options, stride=stride))
            self.up.append(Block(lower, width, kernel, ratios[level], options, stride=stride, up=True))
            self.decoder.append(blocks(level, count))
        self.heads = nn.ModuleList(convolution(width, heads, 1) for width in spec.features)

    def scales_of(self, x: Tensor, all_scales: bool) -> list[Tensor]:
        """As `Network.scales_of`; a scale for every stage."""
        x = self.encoder[0](self.stem(x))
        skips = []
        for down, stage in zip(self.down, self.encoder[1:]):
            skips.append(x)
            x = stage(down(x))
        outputs = [self.heads[-1](x)] if all_scales else []
        for level in reversed(range(len(self.up))):
            x = self.decoder[level](self.up[level](x) + skips[level])
            if all_scales or level == 0:
                outputs.append(self.heads[level](x))
        return outputs[::-1]


def mednext_spec(
    dimension: Dimension,
    *,
    size: str = "S",
    kernel: int = 3,
    width: int = 32,
    expansion: Sequence[int] = (),
    norm: str = "instance",
    activation: str = "gelu",
) -> NetworkSpec:
    """Of the paper: five stages from `width` features, of one of `SIZES`, with kernels of 3 or 5.

    expansion: in place of that of the size. Raises ValueError for an unknown size.
    """
    if size not in SIZES:
        raise ValueError(f"size: choose one of {', '.join(SIZES)}, found {size!r}")
    blocks, usual = SIZES[size]
    return doubling_spec(
        "mednext",
        dimension,
        features=[width * 2**stage for stage in range(5)],
        kernel=kernel,
        encoder_blocks=blocks,
        decoder_blocks=blocks[:-1],
        options={"expansion": tuple(expansion) or usual, "norm": norm, "activation": activation},
    )


MEDNEXT = Architecture(build=MedNeXt, spec=mednext_spec, source="Roy et al., MICCAI 2023", deep_supervision=True)
