"""The 3D U-Net (Cicek et al., MICCAI 2016), and its variants without skips, told of its place, and of few slices.

Pooling instead of strides, batch norm, ReLU; the last convolution before a pooling doubles the features, so that the
highest resolution has few; the up-convolution keeps them. Convolutions are padded, where the paper's are not.

`size` gives the members of the knee-cartilage study of Imperial College (without skips: its "highwayless" network),
`unet3d(stages=6, width=16, widen=false)` the network of Desai et al. (arXiv:1902.01977) with five poolings and 16 to
512 features.
"""

from functools import partial

from torch import nn

from autoseg.networks.base import Architecture
from autoseg.networks.blocks import TRANSPOSED
from autoseg.networks.options import Options, read_options
from autoseg.networks.parts import MAX_POOL, ConvNormAct, initialise_he
from autoseg.networks.position import position_of
from autoseg.networks.unet import check_spec
from autoseg.networks.volumetric import (
    SIZES,
    FirstKernel,
    Relative,
    RelativeOptions,
    SliceOptions,
    Slices,
    Volumetric,
    doubling_spec,
    dropped,
    image_channels,
    opening_kernel,
    through_slices,
    variant,
)
from autoseg.records import record
from autoseg.schema import Dimension, NetworkSpec


@record
class UNet3dOptions(Options):
    """`widen`: only the last convolution of an encoder stage has all its features, those before it half. `dropout`: of
    whole channels, behind each stage."""

    widen: bool = True
    first_kernel: FirstKernel = 0


@record
class RelativeUNet3dOptions(UNet3dOptions, RelativeOptions):
    """Those of the 3D U-Net that is told of its place."""


@record
class SliceUNet3dOptions(UNet3dOptions, SliceOptions):
    """Those of the 3D U-Net of few slices."""


def unet3d(
    spec: NetworkSpec, in_channels: int, heads: int, *, highways: bool = True, relative: bool = False
) -> Volumetric:
    """`spec.encoder_blocks[i]` convolutions in stage i, after a pooling by `spec.strides[i]`; `spec.decoder_blocks[i]`
    in level i of the decoder. Raises ValueError for a specification that does not fit."""
    check_spec(spec)
    options = read_options(RelativeUNet3dOptions if relative else UNet3dOptions, spec)
    convolve = partial(ConvNormAct, norm=options.norm, activation=options.activation)
    first_kernel = opening_kernel(spec, options.first_kernel)

    encoder: list[nn.Module] = []
    channels = in_channels
    for stage, features in enumerate(spec.features):
        kernel, stride, blocks = spec.kernels[stage], spec.strides[stage], spec.encoder_blocks[stage]
        fewer = max(1, features // 2) if options.widen else features
        pooled = max(stride) > 1
        parts: list[nn.Module] = [MAX_POOL[spec.dimension](stride, stride)] if pooled else []
        for block in range(blocks):
            width = features if block == blocks - 1 else fewer
            parts.append(convolve(channels, width, kernel if encoder or block else first_kernel))
            channels = width
        encoder.append(nn.Sequential(*parts, *dropped(spec.dimension, options.dropout)))

    up, decoder = [], []
    for level, blocks in enumerate(spec.decoder_blocks):
        below, features, kernel = spec.features[level + 1], spec.features[level], spec.kernels[level]
        stride = spec.strides[level + 1]
        up.append(TRANSPOSED[spec.dimension](below, below, stride, stride, bias=False))
        first = convolve(below + features if highways else below, features, kernel)
        others = (convolve(features, features, kernel) for _ in range(blocks - 1))
        decoder.append(nn.Sequential(first, *others, *dropped(spec.dimension, options.dropout)))

    network = (Relative if relative else Volumetric)(
        spec,
        heads,
        encoder=encoder,
        up=up,
        decoder=decoder,
        features=spec.features[0],
        first_weight="encoder.0.0.0.weight",
        highways=highways,
    )
    if isinstance(options, RelativeUNet3dOptions):
        if options.position == "add" and options.norm == "instance":
            raise ValueError(
                f"the network {spec.name!r} would not notice its place: instance norm takes away what position=add "
                "adds; choose position=film, or norm=batch"
            )
        network.position = position_of(options.position, spec.dimension, spec.features[-1], spec.features[:-1])
    initialise_he(network)
    return network


def slice_unet3d(spec: NetworkSpec, in_channels: int, heads: int) -> Slices:
    """The 3D U-Net on a few slices, without poolings between them; see `Slices`."""
    check_spec(spec)
    options = read_options(SliceUNet3dOptions, spec)
    channels = image_channels(spec, in_channels, options.context)
    return Slices(unet3d(through_slices(spec, "unet3d"), channels, heads), options.context, options.reduce)


def unet3d_spec(
    dimension: Dimension,
    *,
    size: str = "paper",
    stages: int | None = None,
    width: int = 32,
    norm: str = "batch",
    activation: str = "relu",
    dropout: float = 0.0,
    widen: bool = True,
    first_kernel: int | None = None,
) -> NetworkSpec:
    """Of the paper: four stages of two convolutions, the first with 32 features. `size`: tiny, small or large, of two,
    three or five stages; large reads the image with a kernel of 5.

    stages: another number of them. width: features of the first convolution. Raises ValueError for an unknown size.
    """
    if size not in ("paper", *SIZES):
        raise ValueError(f"size: choose one of paper, {', '.join(SIZES)}, found {size!r}")
    stages = SIZES.get(size, 4) if stages is None else stages
    first = 2 * width if widen else width
    return doubling_spec(
        "unet3d",
        dimension,
        features=[first * 2**stage for stage in range(stages)],
        kernel=3,
        encoder_blocks=(2,) * stages,
        decoder_blocks=(2,) * (stages - 1),
        options={
            "norm": norm,
            "activation": activation,
            "dropout": dropout,
            "widen": widen,
            "first_kernel": first_kernel if first_kernel is not None else 5 if size == "large" else 0,
        },
    )


SOURCE = "Cicek et al., MICCAI 2016"
KNEE = "the knee-cartilage study of Imperial College"

UNET3D = Architecture(build=unet3d, spec=unet3d_spec, source=SOURCE)
UNET3D_NOHIGHWAY = Architecture(
    build=partial(unet3d, highways=False),
    spec=variant(unet3d_spec, "unet3d_nohighway"),
    source=f"{SOURCE}, without skips as in {KNEE}",
)
RELATIVE_UNET3D = Architecture(
    build=partial(unet3d, relative=True),
    spec=variant(unet3d_spec, "relative_unet3d", position="film"),
    source=f"{SOURCE}, with the position of {KNEE}",
)
SLICE_UNET3D = Architecture(
    build=slice_unet3d,
    spec=variant(unet3d_spec, "slice_unet3d", context=5, reduce="mean"),
    source=f"{SOURCE}, on slices as in {KNEE}",
    dimensions=(2,),
)
