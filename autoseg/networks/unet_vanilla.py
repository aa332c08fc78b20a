"""The U-Net as it was published (Ronneberger et al., MICCAI 2015), with convolutions that keep the size.

Two convolutions with ReLU a level, no norm, max-pooling, transposed convolutions that halve the width, dropout at the
end of the contracting path. The variant of Desai et al. (arXiv:1902.01977) is the same network with the options of
`DESAI`: six levels, one norm at the end of a level, transposed convolutions of kernel 3.
"""

from dataclasses import replace
from typing import Annotated

from pydantic import AfterValidator, Field
from torch import nn

from autoseg.networks.base import Architecture
from autoseg.networks.options import Options, Share, read_options
from autoseg.networks.parts import NORMS, choose
from autoseg.networks.pooled import PooledUNet, Unchanged, convolutions, doubled, halving_spec, transposed
from autoseg.networks.unet import check_spec
from autoseg.records import record
from autoseg.schema import Dimension, NetworkSpec, Option

DESAI: dict[str, Option] = {
    "stages": 6,
    "width": 32,
    "norm": "batch",
    "norm_once": True,
    "up_kernel": 3,
    "dropout": 0.0,
}
"""Keyword arguments of `unet_vanilla_spec`; in 3D the source has half the width."""


def _odd(edge: int) -> int:
    if edge and edge % 2 == 0:
        raise ValueError("an odd number, or 0 for the edge of the stride")
    return edge


@record
class VanillaOptions(Options):
    """`norm_once`: at the end of a level, not after each convolution. `up_kernel`: of transposed convolutions."""

    norm: str = "none"
    dropout: Share = 0.5
    norm_once: bool = False
    up_kernel: Annotated[int, Field(ge=0, le=9), AfterValidator(_odd)] = 0


def unet_vanilla(spec: NetworkSpec, in_channels: int, heads: int) -> PooledUNet:
    """`spec.encoder_blocks[i]` convolutions in stage i, `spec.decoder_blocks[i]` in the decoder level beside it."""
    check_spec(spec)
    options = read_options(VanillaOptions, spec)

    def level(number: int, channels: int, blocks: int) -> nn.Module:
        features = spec.features[number]
        each = replace(options, norm="none") if options.norm_once else options
        made = convolutions((channels, *(features,) * blocks), spec.kernels[number], each)
        if options.norm_once:
            made.append(choose(NORMS, options.norm, "norm")(spec.dimension, features))
        return made

    widths = (in_channels, *spec.features)
    levels = range(len(spec.decoder_blocks))
    return PooledUNet(
        spec,
        heads,
        encoder=[level(i, widths[i], blocks) for i, blocks in enumerate(spec.encoder_blocks)],
        joins=[Unchanged() for _ in levels],
        ups=[
            transposed(spec.features[i + 1], spec.features[i], spec.strides[i + 1], options.up_kernel) for i in levels
        ],
        decoder=[level(i, 2 * spec.features[i], blocks) for i, blocks in enumerate(spec.decoder_blocks)],
        widths=spec.features,
        dropout=options.dropout,
    )


def unet_vanilla_spec(
    dimension: Dimension,
    *,
    width: int = 64,
    stages: int = 5,
    norm: str = "none",
    activation: str = "relu",
    dropout: float = 0.5,
    norm_once: bool = False,
    up_kernel: int = 0,
) -> NetworkSpec:
    """`width` features, doubled in each of the `stages`."""
    return halving_spec(
        "unet_vanilla",
        dimension,
        doubled(width, stages),
        {
            "norm": norm,
            "activation": activation,
            "dropout": dropout,
            "norm_once": norm_once,
            "up_kernel": up_kernel,
        },
    )


UNET_VANILLA = Architecture(build=unet_vanilla, spec=unet_vanilla_spec, source="Ronneberger et al., MICCAI 2015")
