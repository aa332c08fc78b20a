"""The V-Net (Milletari et al., 3DV 2016), and its variants told of their place and of few slices.

Every stage adds its input to what its convolutions make of it; strided convolutions go down, transposed ones up, PReLU
everywhere, kernels of 5, no norm. A decoder stage works on the up-sampled map and the skip side by side, and so has
twice the features of its level. The activation of a stage's last convolution comes before the addition, so that a stage
whose convolutions give nothing is the identity.

`size` gives the members of the knee-cartilage study of Imperial College: two convolutions a stage with kernels of 3,
batch norm and dropout of whole channels, SELU behind the strided convolutions, a little noise on the image in training.
(They started with one feature; here with as many as the paper.)
"""

from functools import partial
from math import ceil
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from autoseg.networks.base import Architecture
from autoseg.networks.blocks import CONVOLUTION, TRANSPOSED
from autoseg.networks.options import Options, read_options
from autoseg.networks.parts import ACTIVATIONS, NORMS, ConvNormAct, choose, initialise_he
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
from autoseg.schema import Dimension, NetworkSpec, Option


@record
class VNetOptions(Options):
    """`down_activation`: behind the strided convolutions. `dropout`: of whole channels, behind each stage. `noise`:
    standard deviation of what is added to the image in training."""

    norm: str = "none"
    activation: str = "prelu"
    down_activation: str = "prelu"
    noise: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0
    first_kernel: FirstKernel = 0


@record
class RelativeVNetOptions(VNetOptions, RelativeOptions):
    """Those of the V-Net that is told of its place."""


@record
class SliceVNetOptions(VNetOptions, SliceOptions):
    """Those of the V-Net of few slices."""


PAPER: dict[str, Option] = {
    "norm": "none",
    "activation": "prelu",
    "down_activation": "prelu",
    "dropout": 0.0,
    "noise": 0.0,
    "first_kernel": 0,
}
KNEE_STUDY: dict[str, Option] = {
    "norm": "batch",
    "activation": "relu",
    "down_activation": "selu",
    "dropout": 0.25,
    "noise": 0.01,
    "first_kernel": 0,
}
"""The study calls its noise small; how small is not known."""


class Noise(nn.Module):
    """Adds normal noise of standard deviation `sigma` in training."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> the same."""
        return x + self.sigma * torch.randn_like(x) if self.training and self.sigma else x


class Stage(nn.Module):
    """What `convs` make of an image, plus the image; its channels are repeated, or cut, to the `features` of those."""

    def __init__(self, convs: nn.Module, features: int) -> None:
        super().__init__()
        self.convs = convs
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> (B, features, *spatial)."""
        shortcut = x
        if x.shape[1] != self.features:
            copies = ceil(self.features / x.shape[1])
            shortcut = x.repeat(1, copies, *(1,) * (x.ndim - 2))[:, : self.features]
        return self.convs(x) + shortcut


def vnet(spec: NetworkSpec, in_channels: int, heads: int, *, relative: bool = False) -> Volumetric:
    """`spec.encoder_blocks[i]` convolutions in stage i, `spec.decoder_blocks[i]` in level i of the decoder.

    Raises ValueError for a specification that does not fit.
    """
    check_spec(spec)
    options = read_options(RelativeVNetOptions if relative else VNetOptions, spec)
    axes, biased = spec.dimension, options.norm == "none"
    norm = choose(NORMS, options.norm, "norm")
    activation = choose(ACTIVATIONS, options.activation, "activation")
    down_activation = choose(ACTIVATIONS, options.down_activation, "down_activation")
    convolve = partial(ConvNormAct, norm=options.norm, activation=options.activation)

    def stage(channels: int, features: int, kernels: list[tuple[int, ...]]) -> nn.Module:
        widths = (channels, *(features,) * len(kernels))
        convs = (convolve(a, b, kernel) for a, b, kernel in zip(widths, widths[1:], kernels))
        return nn.Sequential(Stage(nn.Sequential(*convs), features), *dropped(axes, options.dropout))

    encoder: list[nn.Module] = []
    channels = in_channels
    for features, stride, kernel, blocks in zip(spec.features, spec.strides, spec.kernels, spec.encoder_blocks):
        kernels = [kernel] * blocks
        if encoder:
            down = CONVOLUTION[axes](channels, features, stride, stride, bias=biased)
            parts = [down, norm(axes, features), down_activation(features)]
            channels = features
        else:
            parts = [Noise(options.noise)]
            kernels[0] = opening_kernel(spec, options.first_kernel)
        encoder.append(nn.Sequential(*parts, stage(channels, features, kernels)))
        channels = features

    up, decoder = [], []
    for level, blocks in enumerate(spec.decoder_blocks):
        features, stride = spec.features[level], spec.strides[level + 1]
        below = spec.features[-1] if level == len(spec.decoder_blocks) - 1 else 2 * spec.features[level + 1]
        rise = TRANSPOSED[axes](below, features, stride, stride, bias=biased)
        up.append(nn.Sequential(rise, norm(axes, features), activation(features)))
        decoder.append(stage(2 * features, 2 * features, [spec.kernels[level]] * blocks))

    network = (Relative if relative else Volumetric)(
        spec,
        heads,
        encoder=encoder,
        up=up,
        decoder=decoder,
        features=2 * spec.features[0],
        first_weight="encoder.0.1.0.convs.0.0.weight",
    )
    network.adds_image = True
    if isinstance(options, RelativeVNetOptions):
        widths = [2 * features for features in spec.features[:-1]]
        network.position = position_of(options.position, axes, spec.features[-1], widths)
    initialise_he(network)
    return network


def slice_vnet(spec: NetworkSpec, in_channels: int, heads: int) -> Slices:
    """The V-Net on a few slices, without strides between them; see `Slices`."""
    check_spec(spec)
    options = read_options(SliceVNetOptions, spec)
    channels = image_channels(spec, in_channels, options.context)
    return Slices(vnet(through_slices(spec, "vnet"), channels, heads), options.context, options.reduce)


def vnet_spec(
    dimension: Dimension,
    *,
    size: str = "paper",
    width: int = 16,
    norm: str | None = None,
    activation: str | None = None,
    down_activation: str | None = None,
    dropout: float | None = None,
    noise: float | None = None,
    first_kernel: int | None = None,
) -> NetworkSpec:
    """Of the paper: five stages of 1, 2, 3, 3 and 3 convolutions and 16 to 256 features, back by 3, 3, 2 and 1.

    size: tiny, small or large, of two, three or five stages, with the blocks of the knee study; large reads the image
    with a kernel of 5. width: features of the first stage. Raises ValueError for an unknown size.
    """
    if size not in ("paper", *SIZES):
        raise ValueError(f"size: choose one of paper, {', '.join(SIZES)}, found {size!r}")
    paper, stages = size == "paper", SIZES.get(size, 5)
    usual = PAPER if paper else KNEE_STUDY | {"first_kernel": 5 if size == "large" else 0}
    stated = {
        "norm": norm,
        "activation": activation,
        "down_activation": down_activation,
        "dropout": dropout,
        "noise": noise,
        "first_kernel": first_kernel,
    }
    return doubling_spec(
        "vnet",
        dimension,
        features=[width * 2**stage for stage in range(stages)],
        kernel=5 if paper else 3,
        encoder_blocks=(1, 2, 3, 3, 3) if paper else (2,) * stages,
        decoder_blocks=(1, 2, 3, 3) if paper else (2,) * (stages - 1),
        options=usual | {key: value for key, value in stated.items() if value is not None},
    )


SOURCE = "Milletari et al., 3DV 2016"
KNEE = "the knee-cartilage study of Imperial College"

VNET = Architecture(build=vnet, spec=vnet_spec, source=SOURCE)
RELATIVE_VNET = Architecture(
    build=partial(vnet, relative=True),
    spec=variant(vnet_spec, "relative_vnet", position="film"),
    source=f"{SOURCE}, with the position of {KNEE}",
)
SLICE_VNET = Architecture(
    build=slice_vnet,
    spec=variant(vnet_spec, "slice_vnet", context=5, reduce="mean"),
    source=f"{SOURCE}, on slices as in {KNEE}",
    dimensions=(2,),
)
