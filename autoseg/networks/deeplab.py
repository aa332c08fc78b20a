"""DeepLabV3+ (Chen et al., ECCV 2018): atrous convolutions side by side, and a small decoder that interpolates.

The encoder shrinks by `output_stride` (16, or 8 for finer maps) and is dilated from there on. Its last map is seen at
several rates at once and as its mean, enlarged, joined with an early map of few channels, and refined. Convolutions
after the encoder are separable, as in the paper's most accurate model. Nothing is enlarged by transposed convolution.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from autoseg.networks.base import Architecture, Network
from autoseg.networks.blocks import CONVOLUTION
from autoseg.networks.options import Options, Share, read_options
from autoseg.networks.parts import ACTIVATIONS, NORMS, ConvNormAct, choose, initialise_he, same_size
from autoseg.networks.resnet import ResNet
from autoseg.networks.stages import OutputStride, check_stages, hold_resolution
from autoseg.networks.strides import total
from autoseg.networks.xception import Separable, Xception
from autoseg.records import record
from autoseg.schema import Dimension, NetworkSpec

RATES = (6, 12, 18)
"""At an output stride of 16."""
Rate = Annotated[int, Field(ge=1, le=96)]
Backbone = Literal["xception65", "resnet50", "resnet101"]


@record
class DeepLabOptions(Options):
    """What beside its stages makes a DeepLabV3+."""

    backbone: Backbone = "xception65"
    output_stride: OutputStride = 16
    rates: Annotated[tuple[Rate, ...], Field(min_length=1, max_length=8)] = RATES
    head_features: PositiveInt = 256
    """Of the pyramid and the decoder."""
    skip_features: PositiveInt = 48
    """Of the early map where it joins the decoder."""
    dropout: Share = 0.1


class Pyramid(nn.Module):
    """Atrous spatial pyramid pooling: a pointwise convolution, one of `kernel` for each rate, and the mean of all."""

    def __init__(
        self, in_channels: int, features: int, kernel: Sequence[int], rates: Sequence[int], dropout: float,
        norm: str, activation: str,
    ) -> None:  # fmt: skip
        super().__init__()
        point, dimension = (1,) * len(kernel), len(kernel)
        self.branches = nn.ModuleList([ConvNormAct(in_channels, features, point, norm=norm, activation=activation)])
        for rate in rates:
            self.branches.append(
                Separable(in_channels, features, kernel, dilation=rate, norm=norm, activation=activation)
            )
        self.mean = CONVOLUTION[dimension](in_channels, features, 1, bias=norm == "none")
        self.mean_norm = nn.Sequential(
            choose(NORMS, norm, "norm")(dimension, features), choose(ACTIVATIONS, activation, "activation")(features)
        )
        self.project = nn.Sequential(
            ConvNormAct((len(rates) + 2) * features, features, point, norm=norm, activation=activation),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, *spatial) -> (B, features, *spatial)."""
        # Spread before it is normalised: so the mean of one sample alone has enough voxels for a batch norm.
        mean = self.mean(x.mean(tuple(range(2, x.ndim)), keepdim=True)).expand(-1, -1, *x.shape[2:])
        branches = [branch(x) for branch in self.branches]
        joined: Tensor = self.project(torch.cat([*branches, self.mean_norm(mean)], 1))
        return joined


class DeepLabV3Plus(Network):
    """`encoder`, `pyramid` on its last map, `refine` of `spec.decoder_blocks[0]` convolutions joined by an early map.

    The early map has the resolution of stage 1, where `refine` works too. `head_features` is the width of pyramid and
    decoder, `skip_features` that of the early map where it joins them.
    """

    heads_prefixes = ("head.",)

    def __init__(self, spec: NetworkSpec, in_channels: int, heads: int) -> None:
        super().__init__()
        check_stages(spec, levels=1)
        options = read_options(DeepLabOptions, spec)
        features, few = options.head_features, options.skip_features
        norm, activation = options.norm, options.activation
        strides, dilations = hold_resolution(spec.strides, options.output_stride)
        self.divisor = total(strides)
        self.scales = ((1,) * spec.dimension,)
        if options.backbone == "xception65":
            self.first_weight = "encoder.stem.0.0.weight"
            self.encoder: Xception | ResNet = Xception(
                spec, in_channels, strides, dilations, norm=norm, activation=activation
            )
        else:
            self.first_weight = "encoder.conv1.weight"
            self.encoder = ResNet(
                spec, in_channels, strides, dilations, bottleneck=True, norm=norm, activation=activation
            )
        kernel, point = spec.kernels[1], (1,) * spec.dimension
        self.pyramid = Pyramid(
            self.encoder.widths[-1], features, spec.kernels[-1], options.rates, options.dropout, norm, activation
        )
        self.reduce = ConvNormAct(self.encoder.widths[1], few, point, norm=norm, activation=activation)
        channels = (features + few, *(features,) * (spec.decoder_blocks[0] - 1))
        self.refine = nn.Sequential(
            *(Separable(one, features, kernel, norm=norm, activation=activation) for one in channels)
        )
        self.head = CONVOLUTION[spec.dimension](features, heads, 1)
        initialise_he(self)

    def scales_of(self, x: Tensor, all_scales: bool) -> Sequence[Tensor]:
        """As `Network.scales_of`; a list of one."""
        maps = self.encoder(x)
        skip = self.reduce(maps[1])
        joined = torch.cat([same_size(self.pyramid(maps[-1]), skip), skip], 1)
        return [same_size(self.head(self.refine(joined)), x)]


def deeplabv3plus_spec(
    dimension: Dimension,
    *,
    backbone: Backbone = "xception65",
    output_stride: OutputStride = 16,
    rates: Sequence[int] = (),
    norm: str = "batch",
    activation: str = "relu",
    dropout: float = 0.1,
) -> NetworkSpec:
    """With Xception-65, or ResNet50 or 101, as the encoder.

    rates: of the pyramid; left out 6, 12 and 18 at an output stride of 16, at 8 twice as much. Raises ValueError for
    options that there are none of.
    """
    options = DeepLabOptions(
        backbone=backbone,
        output_stride=output_stride,
        rates=tuple(rates) or RATES,
        norm=norm,
        activation=activation,
        dropout=dropout,
    )
    if not rates:
        options = replace(options, rates=tuple(rate * 16 // output_stride for rate in RATES))
    xception = backbone == "xception65"
    residual = (1, 3, 4, 6 if backbone == "resnet50" else 23, 3)
    return NetworkSpec(
        name="deeplabv3plus",
        dimension=dimension,
        features=(64, 128, 256, 728, 2048) if xception else (64, 256, 512, 1024, 2048),
        strides=((2,) * dimension,) * 5,
        kernels=((3 if xception else 7,) * dimension, *((3,) * dimension,) * 4),
        # Of the fourth stage of Xception one block is of the entry flow, 16 are the middle flow.
        encoder_blocks=(2, 1, 1, 17, 2) if xception else residual,
        decoder_blocks=(2,),
        options=asdict(options),
    )


DEEPLABV3PLUS = Architecture(
    build=DeepLabV3Plus, spec=deeplabv3plus_spec, source="Chen et al., ECCV 2018 (DeepLabv3+, Xception-65)"
)
