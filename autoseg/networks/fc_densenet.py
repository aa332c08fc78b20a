"""Fully convolutional DenseNets, the "one hundred layers Tiramisu" (Jégou et al., CVPR workshops 2017).

Each layer of a dense block reads all that was made before it in the block and adds a few maps. Going down, a block
hands on its input beside its new maps; going up, only the new ones, or the maps would pile up. `features` of a
specification are the maps that each layer of a stage adds (k in the paper), and blocks are layers.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from autoseg.networks.base import Architecture, Network
from autoseg.networks.blocks import CONVOLUTION
from autoseg.networks.options import Options, Share, read_options
from autoseg.networks.parts import ACTIVATIONS, MAX_POOL, NORMS, choose, initialise_he
from autoseg.networks.pooled import first_weight, halving_spec, transposed
from autoseg.networks.strides import total
from autoseg.networks.unet import check_spec
from autoseg.records import record
from autoseg.schema import Dimension, NetworkSpec


@record
class DenseOptions(Options):
    """`first_features`: maps that the first convolution gives."""

    dropout: Share = 0.2
    first_features: Annotated[int, Field(ge=1)] = 48


def dense_layer(in_channels: int, out_channels: int, kernel: Sequence[int], options: DenseOptions) -> nn.Sequential:
    """Norm, activation, convolution, dropout."""
    activation: Any = choose(ACTIVATIONS, options.activation, "activation")(in_channels)
    if options.norm == "none" and hasattr(activation, "inplace"):
        activation.inplace = False  # its input is then what others read too
    return nn.Sequential(
        choose(NORMS, options.norm, "norm")(len(kernel), in_channels),
        activation,
        CONVOLUTION[len(kernel)](in_channels, out_channels, tuple(kernel), padding=tuple(k // 2 for k in kernel)),
        nn.Dropout(options.dropout),
    )


class DenseBlock(nn.ModuleList):
    """Layers that each read the input and the maps of all layers before them."""

    def __init__(
        self, in_channels: int, growth: int, layers: int, kernel: Sequence[int], options: DenseOptions
    ) -> None:
        super().__init__(dense_layer(in_channels + i * growth, growth, kernel, options) for i in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, *spatial) -> the new maps, (B, growth * layers, *spatial)."""
        made: list[Tensor] = []
        for layer in self:
            made.append(layer(torch.cat((x, *made), 1)))
        return torch.cat(made, 1)


class FCDenseNet(Network):
    """`spec.encoder_blocks[i]` layers in stage i, `spec.decoder_blocks[i]` in the decoder level beside it.

    Raises ValueError for a specification that does not fit.
    """

    encoder_prefixes = ("first.", "encoder.", "down.")

    def __init__(self, spec: NetworkSpec, in_channels: int, heads: int) -> None:
        super().__init__()
        check_spec(spec)
        options = read_options(DenseOptions, spec)
        dimension, kernel = spec.dimension, spec.kernels[0]
        self.divisor, self.scales = total(spec.strides), ((1,) * dimension,)
        channels = options.first_features
        self.first = CONVOLUTION[dimension](in_channels, channels, kernel, padding=tuple(k // 2 for k in kernel))
        self.encoder = nn.ModuleList()
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        self.decoder = nn.ModuleList()
        skips: list[int] = []
        for number, (growth, layers) in enumerate(zip(spec.features, spec.encoder_blocks)):
            if number > 0:
                step = dense_layer(channels, channels, (1,) * dimension, options)
                self.down.append(step.append(MAX_POOL[dimension](spec.strides[number])))
            self.encoder.append(DenseBlock(channels, growth, layers, spec.kernels[number], options))
            channels += growth * layers
            skips.append(channels)
        new = spec.features[-1] * spec.encoder_blocks[-1]
        for level, layers in reversed(list(enumerate(spec.decoder_blocks))):
            growth = spec.features[level]
            self.up.insert(0, transposed(new, new, spec.strides[level + 1], edge=3))
            channels = new + skips[level]
            self.decoder.insert(0, DenseBlock(channels, growth, layers, spec.kernels[level], options))
            new = growth * layers
        self.heads = nn.ModuleList([CONVOLUTION[dimension](channels + new, heads, 1)])
        self.first_weight = first_weight(self)
        initialise_he(self)

    def scales_of(self, x: Tensor, all_scales: bool) -> list[Tensor]:
        """As `Network.scales_of`; one scale."""
        x = self.first(x)
        skips: list[Tensor] = []
        for number, block in enumerate(self.encoder):
            if number > 0:
                x = self.down[number - 1](skips[-1])
            new = block(x)
            skips.append(torch.cat((x, new), 1))
        skips.pop()
        for level in reversed(range(len(skips))):
            x = torch.cat((self.up[level](new), skips.pop()), 1)
            new = self.decoder[level](x)
        return [self.heads[0](torch.cat((x, new), 1))]


def _member(name: str, growth: int, down: tuple[int, ...], bottom: int) -> Architecture:
    """Layers of the blocks on the way `down`, from the finest, and at the `bottom`; the way up mirrors that down."""

    def spec(
        dimension: Dimension,
        *,
        growth: int = growth,
        down: tuple[int, ...] = down,
        bottom: int = bottom,
        norm: str = "batch",
        activation: str = "relu",
        dropout: float = 0.2,
        first_features: int = 48,
    ) -> NetworkSpec:
        return halving_spec(
            name,
            dimension,
            (growth,) * (len(down) + 1),
            {"norm": norm, "activation": activation, "dropout": dropout, "first_features": first_features},
            encoder_blocks=(*down, bottom),
            decoder_blocks=down,
        )

    return Architecture(build=FCDenseNet, spec=spec, source="Jégou et al., CVPR workshops 2017")


FC_DENSENET56 = _member("fc_densenet56", growth=12, down=(4,) * 5, bottom=4)
FC_DENSENET67 = _member("fc_densenet67", growth=16, down=(5,) * 5, bottom=5)
FC_DENSENET103 = _member("fc_densenet103", growth=16, down=(4, 5, 7, 10, 12), bottom=15)
