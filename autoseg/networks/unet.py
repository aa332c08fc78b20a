"""The U-Net in two and three dimensions (Ronneberger et al., MICCAI 2015), laid out as in nnU-Net v2.

An encoder is a sequence of stages, each of which strides first and hands its result to the decoder level of equal
size. Every decoder level has a head of its own, so that training may supervise all of them while inference pays
for the highest only.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from autoseg.networks.base import Architecture, Network, spec_problems
from autoseg.networks.blocks import CONVOLUTION, TRANSPOSED, ConvBlock, initialise
from autoseg.networks.strides import running, total
from autoseg.schema import Dimension, NetworkSpec


class UNet(Network):
    """Encoder stages and a decoder of convolution blocks, for images (B, C, Z, Y, X) or (B, C, Y, X).

    `encoder` has one module a stage of `spec`: stage i strides by `spec.strides[i]`, gives `spec.features[i]` channels.
    """

    first_weight = "encoder.0.0.conv.weight"

    def __init__(self, spec: NetworkSpec, encoder: Sequence[nn.Module], heads: int) -> None:
        super().__init__()
        self.divisor, self.scales = total(spec.strides), running(spec.strides[:-1])
        self.encoder = nn.ModuleList(encoder)
        self.up = nn.ModuleList()
        self.merge = nn.ModuleList()
        self.refine = nn.ModuleList()
        self.heads = nn.ModuleList()
        for level, blocks in enumerate(spec.decoder_blocks):
            features, kernel, stride = spec.features[level], spec.kernels[level], spec.strides[level + 1]
            self.up.append(TRANSPOSED[spec.dimension](spec.features[level + 1], features, stride, stride))
            self.merge.append(ConvBlock(2 * features, features, kernel))
            self.refine.append(nn.Sequential(*(ConvBlock(features, features, kernel) for _ in range(blocks - 1))))
            self.heads.append(CONVOLUTION[spec.dimension](features, heads, 1))
        initialise(self)

    def scales_of(self, x: Tensor, all_scales: bool) -> list[Tensor]:
        """As `Network.scales_of`; a scale for every decoder level."""
        skips = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        skips.pop()
        outputs: list[Tensor] = []
        for level in reversed(range(len(self.heads))):
            x = self.up[level](x)
            x = self.refine[level](self.merge[level](x, skips.pop()))
            if all_scales or level == 0:
                outputs.append(self.heads[level](x))
        return outputs[::-1]


def check_spec(spec: NetworkSpec) -> None:
    """Raise ValueError, with all problems, unless `spec` describes a U-Net."""
    stages = len(spec.features)
    problems = [] if stages > 1 else [f"features: a U-Net needs two stages or more, found {stages}"]
    problems += spec_problems(spec, stages - 1)
    if any(step != 1 for stride in spec.strides[:1] for step in stride):
        problems.append(f"strides: the first stage keeps full resolution, found {spec.strides[0]}")
    if problems:
        raise ValueError(f"the network specification {spec.name!r} is wrong:\n  " + "\n  ".join(problems))


def unet(spec: NetworkSpec, in_channels: int, heads: int) -> UNet:
    """The plain U-Net: `spec.encoder_blocks[i]` convolution blocks in stage i, the first of them strided."""
    check_spec(spec)
    stages, channels = [], in_channels
    for features, stride, kernel, blocks in zip(spec.features, spec.strides, spec.kernels, spec.encoder_blocks):
        first = ConvBlock(channels, features, kernel, stride)
        stages.append(nn.Sequential(first, *(ConvBlock(features, features, kernel) for _ in range(blocks - 1))))
        channels = features
    return UNet(spec, stages, heads)


def unet_spec(dimension: Dimension, *, name: str = "unet", stages: int = 6) -> NetworkSpec:
    """A plain U-Net of nnU-Net's widths: 32 features, doubled a stage up to 512 in 2D and 320 in 3D."""
    return NetworkSpec(
        name=name,
        dimension=dimension,
        features=tuple(min(32 * 2**stage, 512 if dimension == 2 else 320) for stage in range(stages)),
        strides=((1,) * dimension, *((2,) * dimension,) * (stages - 1)),
        kernels=((3,) * dimension,) * stages,
        encoder_blocks=(2,) * stages,
        decoder_blocks=(2,) * (stages - 1),
    )


UNET = Architecture(
    build=unet,
    spec=unet_spec,
    source="Isensee et al., Nature Methods 2021 (nnU-Net)",
    deep_supervision=True,
    levels_follow_patch=True,
)
