"""The U-Net in two and three dimensions (Ronneberger et al., MICCAI 2015), laid out as in nnU-Net v2.

An encoder is a sequence of stages, each of which strides first and hands its result to the decoder level of equal
size. Every decoder level has a head of its own, so that training may supervise all of them while inference pays
for the highest only.
"""

from collections.abc import Sequence
from math import prod

from torch import Tensor, nn

from autoseg.networks.blocks import CONVOLUTION, TRANSPOSED, ConvBlock, initialise
from autoseg.schema import NetworkSpec

FIRST = "encoder.0.0.conv.weight"
"""The tensor that reads the image, (features, input channels, *kernel), in every network of this layout."""
HEADS = "heads."
"""What names of tensors that give logits, (heads, ...), begin with."""


class UNet(nn.Module):
    """Encoder stages and a decoder of convolution blocks, for images (B, C, Z, Y, X) or (B, C, Y, X).

    `encoder` has one module a stage of `spec`: stage i strides by `spec.strides[i]`, gives `spec.features[i]` channels.
    """

    def __init__(self, spec: NetworkSpec, encoder: Sequence[nn.Module], heads: int) -> None:
        super().__init__()
        self.divisor = tuple(prod(stride[axis] for stride in spec.strides) for axis in range(spec.dimension))
        """What each spatial size must be a multiple of."""
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

    def forward(self, x: Tensor, all_scales: bool = False) -> Tensor | list[Tensor]:
        """Images (B, C, *spatial) -> logits (B, heads, *spatial).

        With `all_scales`: a list with the logits of every decoder level, highest resolution first. Raises ValueError
        that names the size to pad to where a spatial size is no multiple of the total stride.
        """
        check_size(tuple(x.shape[2:]), self.divisor)
        skips = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        skips.pop()
        outputs: list[Tensor] = []
        for level in reversed(range(len(self.heads))):
            x = self.up[level](x)
            x = self.refine[level](self.merge[level](x, skips.pop()))
            if all_scales:
                outputs.append(self.heads[level](x))
        return outputs[::-1] if all_scales else self.heads[0](x)


def check_size(size: tuple[int, ...], divisor: tuple[int, ...]) -> None:
    """Raise ValueError unless each spatial size is a positive multiple of its divisor."""
    if len(size) != len(divisor):
        raise ValueError(f"the network takes {len(divisor)} spatial axes, the input has size {size}")
    fitting = tuple(max(-(-edge // unit), 1) * unit for edge, unit in zip(size, divisor))
    if fitting != size:
        raise ValueError(f"input size {size} is no multiple of the network's total stride {divisor}; pad to {fitting}")


def check_spec(spec: NetworkSpec) -> None:
    """Raise ValueError, with all problems, unless `spec` describes a U-Net."""
    stages, problems = len(spec.features), []
    expected = {"strides": stages, "kernels": stages, "encoder_blocks": stages, "decoder_blocks": stages - 1}
    if stages < 2:
        problems.append(f"features: a U-Net needs two stages or more, found {stages}")
    for field, count in expected.items():
        if len(getattr(spec, field)) != count:
            problems.append(f"{field}: {count} entries are needed for {stages} stages, found {getattr(spec, field)}")
    for field in ("features", "encoder_blocks", "decoder_blocks"):
        if min(getattr(spec, field), default=1) < 1:
            problems.append(f"{field}: every entry must be 1 or more, found {getattr(spec, field)}")
    for field in ("strides", "kernels"):
        for entry in getattr(spec, field):
            if len(entry) != spec.dimension or min(entry) < 1:
                problems.append(f"{field}: {spec.dimension} positive numbers a stage are needed, found {entry}")
    if any(edge % 2 == 0 for kernel in spec.kernels for edge in kernel):
        problems.append(f"kernels: sizes must be odd, found {spec.kernels}")
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
