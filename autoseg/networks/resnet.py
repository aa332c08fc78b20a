"""Residual encoders (He et al., CVPR 2016) whose tensors are called as torchvision calls them, in 2D and 3D.

So weights that were published for ImageNet fit by name: conv1, bn1, layer1.0.conv1, layer1.0.downsample.0 and so on
(`autoseg.published`). In blocks of three convolutions the middle one strides, as in torchvision.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from autoseg.networks.blocks import CONVOLUTION
from autoseg.networks.parts import ACTIVATIONS, MAX_POOL, NORMS, ConvNormAct, choose
from autoseg.networks.stages import Strides
from autoseg.schema import NetworkSpec

EXPANSION = 4
"""How many times wider a block of three convolutions is outside than inside."""


def convolution(
    in_channels: int,
    out_channels: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    norm: str,
) -> nn.Module:
    """A convolution with "same" padding, and a bias only where no norm follows."""
    conv: nn.Module = CONVOLUTION[len(kernel)](
        in_channels,
        out_channels,
        kernel_size=tuple(kernel),
        stride=tuple(stride),
        padding=tuple(gap * (edge // 2) for gap, edge in zip(dilation, kernel)),
        dilation=tuple(dilation),
        bias=norm == "none",
    )
    return conv


class Block(nn.Module):
    """Two convolutions around a shortcut, or three of which the outer ones are 1 wide (`bottleneck`).

    The shortcut projects where the block strides or changes its channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        *,
        bottleneck: bool,
        norm: str,
        activation: str,
    ) -> None:
        super().__init__()
        point = (1,) * len(kernel)
        norm_of, active = choose(NORMS, norm, "norm"), choose(ACTIVATIONS, activation, "activation")
        inner = max(1, out_channels // EXPANSION) if bottleneck else out_channels
        middle = (in_channels if not bottleneck else inner, inner, kernel, stride, dilation)
        last = (inner, out_channels, kernel, point, dilation)
        layers = [(in_channels, inner, point, point, point), middle, (inner, out_channels, point, point, point)]
        self.convolutions = 3 if bottleneck else 2
        self.active = nn.ModuleList()
        for number, layer in enumerate(layers if bottleneck else [middle, last], 1):
            self.add_module(f"conv{number}", convolution(*layer, norm))
            self.add_module(f"bn{number}", norm_of(len(kernel), layer[1]))
            self.active.append(active(layer[1]))
        self.downsample: nn.Module | None = None
        if in_channels != out_channels or max(stride) > 1:
            project = convolution(in_channels, out_channels, point, stride, point, norm)
            self.downsample = nn.Sequential(project, norm_of(len(kernel), out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, *spatial) -> (B, out, *spatial / stride)."""
        out = x
        for number, active in enumerate(self.active, 1):
            out = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(out))
            if number == self.convolutions:
                out = out + (x if self.downsample is None else self.downsample(x))
            out = active(out)
        return out


class ResNet(nn.Module):
    """A stem of convolutions (one in the paper), a max-pooling, then a layer of residual blocks a stage.

    `spec.strides` is the stem's, then the pooling's, then that of each further layer; `spec.encoder_blocks` counts the
    convolutions of the stem, then the blocks of each layer; `spec.features` are the widths that stages give.
    """

    def __init__(
        self,
        spec: NetworkSpec,
        in_channels: int,
        strides: Strides,
        dilations: Strides,
        *,
        bottleneck: bool,
        norm: str,
        activation: str,
    ) -> None:
        """strides, dilations: of each stage, in place of those of `spec`."""
        super().__init__()
        dimension, channels = spec.dimension, spec.features[0]
        self.widths = spec.features
        self.conv1 = convolution(in_channels, channels, spec.kernels[0], strides[0], dilations[0], norm)
        self.bn1 = choose(NORMS, norm, "norm")(dimension, channels)
        self.active = choose(ACTIVATIONS, activation, "activation")(channels)
        more = range(spec.encoder_blocks[0] - 1)
        self.stem = nn.Sequential(
            *(ConvNormAct(channels, channels, spec.kernels[0], norm=norm, activation=activation) for _ in more)
        )
        # As wide as reaches both neighbours of every voxel that is kept, and nothing along an axis that stays.
        window = tuple(2 * (step // 2) + 1 for step in strides[1])
        self.pool = MAX_POOL[dimension](window, strides[1], tuple(edge // 2 for edge in window))
        self.layers = len(spec.features) - 1
        for number in range(1, self.layers + 1):
            width, blocks = spec.features[number], []
            for place in range(spec.encoder_blocks[number]):
                # The pooling has strided for the first layer; a stage that keeps its resolution is dilated after its
                # first block, which still sees neighbours as they are.
                first = place == 0
                stride = strides[number] if first and number > 1 else (1,) * dimension
                dilation = dilations[number - 1] if first else dilations[number]
                block = Block(channels, width, spec.kernels[number], stride, dilation, bottleneck=bottleneck,
                              norm=norm, activation=activation)  # fmt: skip
                blocks.append(block)
                channels = width
            self.add_module(f"layer{number}", nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (B, C, *spatial) -> one map a stage, that of the stem first."""
        maps = [self.stem(self.active(self.bn1(self.conv1(x))))]
        for number in range(1, self.layers + 1):
            x = maps[-1] if number > 1 else self.pool(maps[0])
            maps.append(getattr(self, f"layer{number}")(x))
        return maps
