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

import torch
from torch import Tensor, nn

from autoseg.networks.base import Architecture
from autoseg.networks.blocks import CONVOLUTION, TRANSPOSED
from autoseg.networks.options import Limits, read_options, with_options
from autoseg.networks.parts import ACTIVATIONS, NORMS, ConvNormAct, initialise_he
from autoseg.networks.position import MODES, position_of
from autoseg.networks.unet import check_spec
from autoseg.networks.volumetric import (
    SIZES,
    SLICE_LIMITS,
    SLICE_OPTIONS,
    Relative,
    Slices,
    Volumetric,
    doubling_spec,
    dropped,
    image_channels,
    opening_kernel,
    through_slices,
)
from autoseg.schema import Dimension, NetworkSpec, Option

OPTIONS: dict[str, Option] = {
    "norm": "none",
    "activation": "prelu",
    "down_activation": "prelu",
    "dropout": 0.0,
    "noise": 0.0,
    "first_kernel": 0,
}
"""down_activation: behind the strided convolutions. dropout: of whole channels, behind each stage. noise: standard
deviation of what is added to the image in training. first_kernel: edge of the kernel that reads the image; 0: that of
its stage."""

KNEE_OPTIONS: dict[str, Option] = {
    "norm": "batch",
    "activation": "relu",
    "down_activation": "selu",
    "dropout": 0.25,
    "noise": 0.01,
}
"""Those of the knee study. It calls its noise small; how small is not known."""

LIMITS: dict[str, Limits] = {
    "norm": tuple(NORMS),
    "activation": tuple(ACTIVATIONS),
    "down_activation": tuple(ACTIVATIONS),
    "dropout": (0.0, 0.9),
    "noise": (0.0, 10.0),
    "first_kernel": (0, 15),
    "position": MODES,
    **SLICE_LIMITS,
}

RELATIVE_OPTIONS: dict[str, Option] = {**OPTIONS, "position": "add"}
SLICE_VNET_OPTIONS: dict[str, Option] = {**OPTIONS, **SLICE_OPTIONS}


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
    options = read_options(spec, RELATIVE_OPTIONS if relative else OPTIONS, LIMITS)
    axes, norm = spec.dimension, NORMS[options["norm"]]
    convolve = partial(ConvNormAct, norm=options["norm"], activation=options["activation"])
    biased = options["norm"] == "none"

    def stage(channels: int, features: int, kernels: list[tuple[int, ...]]) -> nn.Module:
        widths = (channels, *(features,) * len(kernels))
        convs = (convolve(a, b, kernel) for a, b, kernel in zip(widths, widths[1:], kernels))
        return nn.Sequential(Stage(nn.Sequential(*convs), features), *dropped(spec, options))

    encoder: list[nn.Module] = []
    channels = in_channels
    for features, stride, kernel, blocks in zip(spec.features, spec.strides, spec.kernels, spec.encoder_blocks):
        kernels = [kernel] * blocks
        if encoder:
            down = CONVOLUTION[axes](channels, features, stride, stride, bias=biased)
            parts = [down, norm(axes, features), ACTIVATIONS[options["down_activation"]](features)]
            channels = features
        else:
            parts = [Noise(options["noise"])]
            kernels[0] = opening_kernel(spec, options["first_kernel"])
        encoder.append(nn.Sequential(*parts, stage(channels, features, kernels)))
        channels = features

    up, decoder = [], []
    for level, blocks in enumerate(spec.decoder_blocks):
        features, stride = spec.features[level], spec.strides[level + 1]
        below = spec.features[-1] if level == len(spec.decoder_blocks) - 1 else 2 * spec.features[level + 1]
        rise = TRANSPOSED[axes](below, features, stride, stride, bias=biased)
        up.append(nn.Sequential(rise, norm(axes, features), ACTIVATIONS[options["activation"]](features)))
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
    if relative:
        widths = [2 * features for features in spec.features[:-1]]
        network.position = position_of(options["position"], axes, spec.features[-1], widths)
    initialise_he(network)
    return network


def slice_vnet(spec: NetworkSpec, in_channels: int, heads: int) -> Slices:
    """The V-Net on a few slices, without strides between them; see `Slices`."""
    check_spec(spec)
    options = read_options(spec, SLICE_VNET_OPTIONS, LIMITS)
    channels = image_channels(spec, in_channels, options["context"])
    return Slices(vnet(through_slices(spec, "vnet"), channels, heads), options["context"], options["reduce"])


def vnet_spec(
    name: str,
    own_options: dict[str, Option],
    dimension: Dimension,
    *,
    size: str = "paper",
    width: int = 16,
    **options: Option,
) -> NetworkSpec:
    """Of the paper: five stages of 1, 2, 3, 3 and 3 convolutions and 16 to 256 features, back by 3, 3, 2 and 1.

    size: tiny, small or large, of two, three or five stages, with the blocks of the knee study; large reads the image
    with a kernel of 5. width: features of the first stage. Raises ValueError for an unknown size or option.
    """
    if size not in ("paper", *SIZES):
        raise ValueError(f"size: choose one of paper, {', '.join(SIZES)}, found {size!r}")
    stages = SIZES.get(size, 5)
    spec = doubling_spec(
        name,
        dimension,
        features=[width * 2**stage for stage in range(stages)],
        kernel=5 if size == "paper" else 3,
        encoder_blocks=(1, 2, 3, 3, 3) if size == "paper" else (2,) * stages,
        decoder_blocks=(1, 2, 3, 3) if size == "paper" else (2,) * (stages - 1),
    )
    of_size = {} if size == "paper" else KNEE_OPTIONS | ({"first_kernel": 5} if size == "large" else {})
    return with_options(spec, of_size | options, own_options, LIMITS)


SOURCE = "Milletari et al., 3DV 2016"
KNEE = "the knee-cartilage study of Imperial College"

VNET = Architecture(build=vnet, spec=partial(vnet_spec, "vnet", OPTIONS), source=SOURCE)
RELATIVE_VNET = Architecture(
    build=partial(vnet, relative=True),
    spec=partial(vnet_spec, "relative_vnet", RELATIVE_OPTIONS),
    source=f"{SOURCE}, with the position of {KNEE}",
)
SLICE_VNET = Architecture(
    build=slice_vnet,
    spec=partial(vnet_spec, "slice_vnet", SLICE_VNET_OPTIONS),
    source=f"{SOURCE}, on slices as in {KNEE}",
    dimensions=(2,),
)
