"""Parts that published architectures share: a convolution with its norm and activation, in 2D and 3D, by name.

The U-Nets of the presets have faster ones of their own (`blocks`). Norm and activation are those of each paper unless
the options `norm` and `activation` of a specification say otherwise.
"""

from collections.abc import Callable, Sequence
from math import prod, sqrt
from typing import Any

from torch import Tensor, nn

from autoseg.networks.blocks import CONVOLUTION, InstanceNorm

BATCH_NORM: dict[int, Any] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MAX_POOL: dict[int, Any] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
DROPOUT: dict[int, Any] = {2: nn.Dropout2d, 3: nn.Dropout3d}
"""Whole channels at a time."""
INTERPOLATION = {2: "bilinear", 3: "trilinear"}

NORMS: dict[str, Callable[[int, int], nn.Module]] = {
    "batch": lambda dimension, channels: BATCH_NORM[dimension](channels),
    "instance": lambda dimension, channels: InstanceNorm(channels),
    "group": lambda dimension, channels: nn.GroupNorm(
        min(32, channels) if channels % min(32, channels) == 0 else 1, channels
    ),
    "none": lambda dimension, channels: nn.Identity(),
}
"""(dimension, channels) -> the norm."""

ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "relu": lambda channels: nn.ReLU(inplace=True),
    "leaky_relu": lambda channels: nn.LeakyReLU(0.01, inplace=True),
    "prelu": lambda channels: nn.PReLU(channels),
    "elu": lambda channels: nn.ELU(inplace=True),
    "selu": lambda channels: nn.SELU(inplace=True),
    "gelu": lambda channels: nn.GELU(),
    "none": lambda channels: nn.Identity(),
}
"""channels -> the activation."""


def choose(table: dict[str, Callable[..., nn.Module]], name: object, what: str) -> Callable[..., nn.Module]:
    """The entry `name` of a table. Raises ValueError that lists the names there are."""
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"{what}: choose one of {', '.join(table)}, found {name!r}")
    return table[name]


class ConvNormAct(nn.Sequential):
    """Convolution ("same" padding), norm, activation; the number of axes is that of `kernel`.

    bias: of the convolution; by default there is one where no norm follows.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Sequence[int],
        *,
        stride: Sequence[int] | int = 1,
        dilation: Sequence[int] | int = 1,
        groups: int = 1,
        norm: str = "batch",
        activation: str = "relu",
        bias: bool | None = None,
    ) -> None:
        dimension = len(kernel)
        gaps = (dilation,) * dimension if isinstance(dilation, int) else tuple(dilation)
        conv = CONVOLUTION[dimension](
            in_channels,
            out_channels,
            kernel_size=tuple(kernel),
            stride=stride if isinstance(stride, int) else tuple(stride),
            padding=tuple(gap * (edge // 2) for gap, edge in zip(gaps, kernel)),
            dilation=gaps,
            groups=groups,
            bias=norm == "none" if bias is None else bias,
        )
        super().__init__(
            conv,
            choose(NORMS, norm, "norm")(dimension, out_channels),
            choose(ACTIVATIONS, activation, "activation")(out_channels),
        )


def initialise_he(module: nn.Module) -> None:
    """Convolutions of `module`: normal weights of variance 2 / fan-in, biases 0 (He et al., ICCV 2015).

    Fan-in is how many numbers an output is summed of. Of a transposed convolution each output sees only every stride-th
    voxel of the kernel; torch takes its input channels for its outputs, and does not know strides.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            fan_in = part.in_channels // part.groups * prod(part.kernel_size)
            if isinstance(part, nn.ConvTranspose2d | nn.ConvTranspose3d):
                nn.init.normal_(part.weight, std=sqrt(2 * prod(part.stride) / fan_in))
            else:
                nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def same_size(x: Tensor, like: Tensor) -> Tensor:
    """`x` interpolated linearly to the spatial size of `like`."""
    interpolate: Any = nn.functional.interpolate
    scaled: Tensor = interpolate(x, size=like.shape[2:], mode=INTERPOLATION[x.ndim - 2], align_corners=False)
    return scaled
