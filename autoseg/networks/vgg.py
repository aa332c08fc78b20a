"""VGG encoders (Simonyan and Zisserman, ICLR 2015) whose tensors are called as torchvision calls them, in 2D and 3D.

One row of layers, numbered through: a convolution, its norm where there is one, its activation; a pooling ends each
stage. With `norm=batch` the names are those of torchvision's vgg16_bn, with `norm=none` those of its vgg16.
"""

from typing import Any

from torch import Tensor, nn

from autoseg.networks.blocks import CONVOLUTION
from autoseg.networks.parts import ACTIVATIONS, MAX_POOL, NORMS, choose
from autoseg.schema import NetworkSpec

CONVOLUTIONS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
"""Layers with weights, the three that classify counted -> convolutions of each stage."""


class VGG(nn.Module):
    """`spec.encoder_blocks[i]` convolutions in stage i, for all stages of `spec` but the last.

    Each stage ends with a pooling by the stride of the next.
    """

    def __init__(self, spec: NetworkSpec, in_channels: int, *, norm: str, activation: str) -> None:
        super().__init__()
        norm_of, active = choose(NORMS, norm, "norm"), choose(ACTIVATIONS, activation, "activation")
        layers: list[nn.Module] = []
        channels = in_channels
        for number, stride in enumerate(spec.strides[1:]):
            width, kernel = spec.features[number], spec.kernels[number]
            for _ in range(spec.encoder_blocks[number]):
                conv: Any = CONVOLUTION[spec.dimension]
                # With a bias even where a norm follows: as published.
                layers.append(conv(channels, width, kernel, padding=tuple(edge // 2 for edge in kernel)))
                if norm != "none":
                    layers.append(norm_of(spec.dimension, width))
                layers.append(active(width))
                channels = width
            layers.append(MAX_POOL[spec.dimension](stride))
        self.features = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (B, C, *spatial) -> one map a stage, the finest first, and last what the last pooling gives."""
        maps = []
        for layer in self.features:
            if isinstance(layer, tuple(MAX_POOL.values())):
                maps.append(x)
            x = layer(x)
        return [*maps, x]
