"""The parts that U-Nets are built of: convolution blocks, residual blocks, instance normalisation.

Channels are normalised sample by sample, never over the batch: medical batches are small and their
intensities differ from patient to patient. Activations are overwritten in place where autograd allows it.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.01
"""Slope of the leaky ReLU for negative values; the initialisation assumes it too."""

CONVOLUTION: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, Any] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
AVERAGE_POOL: dict[int, Any] = {2: nn.AvgPool2d, 3: nn.AvgPool3d}
CONVOLVE: dict[int, Any] = {2: F.conv2d, 3: F.conv3d}


class InstanceNorm(nn.Module):
    """Each channel of each sample to mean 0 and variance 1, then a learned scale and offset; 2D and 3D alike."""

    def __init__(self, channels: int, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        # One group a channel is the same formula. The CPU kernel of group_norm is three to five times faster; on CUDA
        # autocast would run group_norm in float32, at twice the memory.
        if x.is_cuda:
            return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.epsilon)
        return F.group_norm(x, x.shape[1], self.weight, self.bias, self.epsilon)


class ConvBlock(nn.Module):
    """Convolution, instance norm, leaky ReLU (left out where `active` is false)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Sequence[int],
        stride: Sequence[int] | None = None,
        *,
        bias: bool = True,
        active: bool = True,
    ) -> None:
        super().__init__()
        self.dimension = len(kernel)
        self.padding = tuple(edge // 2 for edge in kernel)
        self.conv = CONVOLUTION[self.dimension](
            in_channels,
            out_channels,
            kernel_size=tuple(kernel),
            stride=tuple(stride or (1,) * self.dimension),
            padding=self.padding,
            bias=bias,
        )
        self.norm = InstanceNorm(out_channels)
        self.active = active

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """(B, C, *spatial) -> (B, out, *spatial / stride).

        With `skip` the block sees the channels of `x` followed by those of `skip` (stride 1 only).
        """
        if skip is None:
            x = self.conv(x)
        else:
            # A convolution over concatenated channels is a sum of two: no copy of both inputs is made or kept.
            convolve, parts = CONVOLVE[self.dimension], (x.shape[1], skip.shape[1])
            of_x, of_skip = self.conv.weight.split(parts, dim=1)
            x = convolve(x, of_x, self.conv.bias, padding=self.padding)
            x += convolve(skip, of_skip, padding=self.padding)
        x = self.norm(x)
        return F.leaky_relu_(x, SLOPE) if self.active else x


class ResidualBlock(nn.Module):
    """Two convolution blocks around a shortcut (ResNet-D, He et al., CVPR 2019).

    The shortcut averages where the block strides and projects where it changes channels. The scale of the last norm
    starts at 0, so that the block starts as its shortcut alone.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: Sequence[int], stride: Sequence[int], *, bias: bool = True
    ) -> None:
        super().__init__()
        self.first = ConvBlock(in_channels, out_channels, kernel, stride, bias=bias)
        self.second = ConvBlock(out_channels, out_channels, kernel, bias=bias, active=False)
        nn.init.zeros_(self.second.norm.weight)
        shortcut: list[nn.Module] = []
        if max(stride) > 1:
            shortcut.append(AVERAGE_POOL[len(stride)](tuple(stride), tuple(stride)))
        if in_channels != out_channels:
            shortcut.append(ConvBlock(in_channels, out_channels, (1,) * len(kernel), bias=False, active=False))
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, *spatial) -> (B, out, *spatial / stride)."""
        out = self.second(self.first(x))
        out += self.shortcut(x)
        return F.leaky_relu_(out, SLOPE)


def initialise(module: nn.Module) -> None:
    """Kaiming-normal weights and zero biases for every convolution in `module` (He et al., ICCV 2015)."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            nn.init.kaiming_normal_(part.weight, a=SLOPE)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
