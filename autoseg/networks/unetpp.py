"""UNet++ (Zhou et al., DLMIA 2018): between encoder and decoder lie nodes that bring the two closer step by step.

Node (i, j) lies on level i: (i, 0) is the encoder, and (i, j) reads the nodes (i, 0) ... (i, j - 1) of its level beside
(i + 1, j - 1), brought up by a transposed convolution. With n levels each (0, j), j = 1 ... n - 1, ends a U-Net of its
own, of depth j + 1, and has a head: the outputs of deep supervision, all of the size of the image, whose losses are
averaged. The deepest is the output.
"""

import torch
from torch import Tensor, nn

from autoseg.networks.base import Architecture, Network
from autoseg.networks.blocks import CONVOLUTION
from autoseg.networks.options import Options, read_options
from autoseg.networks.parts import initialise_he
from autoseg.networks.pooled import (
    check_stages,
    convolutions,
    doubled,
    first_weight,
    halving_spec,
    pooled,
    transposed,
)
from autoseg.networks.strides import total
from autoseg.networks.unet import check_spec
from autoseg.schema import Dimension, NetworkSpec


class UNetPlusPlus(Network):
    """`spec.encoder_blocks[i]` convolutions in node (i, 0), `spec.decoder_blocks[i]` in each node (i, j) beside it.

    Raises ValueError for a specification that does not fit.
    """

    def __init__(self, spec: NetworkSpec, in_channels: int, heads: int) -> None:
        super().__init__()
        check_spec(spec)
        check_stages(spec)
        options = read_options(Options, spec)
        features = spec.features
        outputs = len(features) - 1
        self.divisor, self.scales = total(spec.strides), ((1,) * spec.dimension,) * outputs
        self.output_weights = (1 / outputs,) * outputs
        before = (in_channels, *features)
        encoder = [
            convolutions((before[i], *(features[i],) * blocks), spec.kernels[i], options)
            for i, blocks in enumerate(spec.encoder_blocks)
        ]
        self.encoder = nn.ModuleList(pooled(spec, encoder, options.dropout))
        self.ups = nn.ModuleDict()
        self.nodes = nn.ModuleDict()
        for i, blocks in enumerate(spec.decoder_blocks):
            for j in range(1, outputs + 1 - i):
                widths = ((j + 1) * features[i], *(features[i],) * blocks)
                self.ups[f"{i}_{j}"] = transposed(features[i + 1], features[i], spec.strides[i + 1])
                self.nodes[f"{i}_{j}"] = convolutions(widths, spec.kernels[i], options)
        self.heads = nn.ModuleList(CONVOLUTION[spec.dimension](features[0], heads, 1) for _ in range(outputs))
        self.first_weight = first_weight(self)
        initialise_he(self)

    def scales_of(self, x: Tensor, all_scales: bool) -> list[Tensor]:
        """As `Network.scales_of`; all of the size of the image, that of the deepest U-Net first."""
        levels: list[list[Tensor]] = []
        for depth, stage in enumerate(self.encoder):
            x = stage(x)
            levels.append([x])
            # A new level completes one node of each level above it.
            for i in reversed(range(depth)):
                node = f"{i}_{depth - i}"
                up = self.ups[node](levels[i + 1][-1])
                levels[i].append(self.nodes[node](torch.cat((*levels[i], up), 1)))
        asked = range(len(self.heads)) if all_scales else range(1)
        # The first head is that of the deepest, whatever their number.
        return [self.heads[number](levels[0][-1 - number]) for number in asked]


def unetpp_spec(
    dimension: Dimension,
    *,
    width: int = 32,
    stages: int = 5,
    norm: str = "batch",
    activation: str = "relu",
    dropout: float = 0.0,
) -> NetworkSpec:
    """`width` features, doubled in each of the `stages`; two convolutions a node."""
    return halving_spec(
        "unetpp",
        dimension,
        doubled(width, stages),
        {"norm": norm, "activation": activation, "dropout": dropout},
    )


UNETPP = Architecture(build=UNetPlusPlus, spec=unetpp_spec, source="Zhou et al., DLMIA 2018", deep_supervision=True)
