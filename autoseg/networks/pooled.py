"""What U-Nets have in common whose levels are joined by max-pooling: the walk down, up and across, and its parts.

An architecture hands in what is its own: the blocks of a level, how a level is brought up, and what happens to a skip
on its way across. Levels are numbered from the finest, 0. Strides may differ from axis to axis.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from autoseg.networks.base import Network
from autoseg.networks.blocks import CONVOLUTION, TRANSPOSED
from autoseg.networks.options import Options
from autoseg.networks.parts import INTERPOLATION, MAX_POOL, ConvNormAct, initialise_he
from autoseg.networks.strides import running, total
from autoseg.schema import Dimension, NetworkSpec, Option


class PooledUNet(Network):
    """Encoder levels, each pooled from the one before; decoder levels that read the skip beside what comes up.

    encoder: a module a stage, from the width of the stage above to its own. The next have one a decoder level:
    joins: (skip, what lies below) -> what of the skip goes across; ups: what lies below -> the size of the level;
    decoder: both side by side -> widths[level].
    supervised: how many levels, from the finest, have a head.
    dropout: share of activations dropped at the end of the two lowest encoder levels.
    """

    def __init__(
        self,
        spec: NetworkSpec,
        heads: int,
        *,
        encoder: Sequence[nn.Module],
        joins: Sequence[nn.Module],
        ups: Sequence[nn.Module],
        decoder: Sequence[nn.Module],
        widths: Sequence[int],
        supervised: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.divisor, self.scales = total(spec.strides), running(spec.strides)[:supervised]
        self.encoder = nn.ModuleList(pooled(spec, encoder, dropout))
        self.joins = nn.ModuleList(joins)
        self.ups = nn.ModuleList(ups)
        self.decoder = nn.ModuleList(decoder)
        self.heads = nn.ModuleList(CONVOLUTION[spec.dimension](width, heads, 1) for width in widths[:supervised])
        self.first_weight = first_weight(self)
        initialise_he(self)

    def scales_of(self, x: Tensor, all_scales: bool) -> list[Tensor]:
        """As `Network.scales_of`; a scale for every level that has a head."""
        skips = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        skips.pop()
        outputs: list[Tensor] = []
        for level in reversed(range(len(skips))):
            x = self.decoder[level](torch.cat((self.joins[level](skips.pop(), x), self.ups[level](x)), 1))
            if level == 0 or (all_scales and level < len(self.heads)):
                outputs.append(self.heads[level](x))
        return outputs[::-1]


class Unchanged(nn.Module):
    """The join of the plain U-Net: the skip as it is."""

    def forward(self, skip: Tensor, below: Tensor) -> Tensor:
        """(B, C, *spatial) -> the same."""
        return skip


def pooled(spec: NetworkSpec, encoder: Sequence[nn.Module], dropout: float) -> list[nn.Module]:
    """The encoder stages, each after the pooling before it; the lowest two end with dropout."""
    stages: list[nn.Module] = []
    for number, (stage, stride) in enumerate(zip(encoder, spec.strides)):
        parts = [stage]
        if number > 0:
            parts.insert(0, MAX_POOL[spec.dimension](stride))
        if dropout and number >= len(encoder) - 2:
            parts.append(nn.Dropout(dropout))
        stages.append(nn.Sequential(*parts))
    return stages


def convolutions(widths: Sequence[int], kernel: Sequence[int], options: Options) -> nn.Sequential:
    """Convolutions in a row, each with norm and activation, from the first of `widths` to the next and so on."""
    norm, activation = options.norm, options.activation
    return nn.Sequential(*(ConvNormAct(a, b, kernel, norm=norm, activation=activation) for a, b in pairwise(widths)))


def transposed(in_channels: int, out_channels: int, stride: Sequence[int], edge: int = 0) -> nn.Module:
    """A transposed convolution to `stride` times the size; `edge` of its kernel is odd, or 0 for that of the stride."""
    kernel = [edge or step for step in stride]
    padding = [max(0, (k - step + 1) // 2) for k, step in zip(kernel, stride)]
    missing = [step - k + 2 * pad for k, step, pad in zip(kernel, stride, padding)]
    conv: Any = TRANSPOSED[len(stride)]
    made: nn.Module = conv(in_channels, out_channels, kernel, tuple(stride), padding, output_padding=missing)
    return made


def interpolated(stride: Sequence[int], mode: str = "") -> nn.Module:
    """To `stride` times the size, without weights; linearly unless `mode` is "nearest"."""
    factors = tuple(float(step) for step in stride)
    if mode == "nearest":
        return nn.Upsample(scale_factor=factors, mode="nearest")
    return nn.Upsample(scale_factor=factors, mode=INTERPOLATION[len(stride)], align_corners=False)


def first_weight(network: nn.Module) -> str:
    """Name of the first convolution's weight; the one that reads the image, where the encoder is made first."""
    return next(name for name, parameter in network.named_parameters() if parameter.ndim > 2)


MOST_STAGES = 12
"""For networks whose parts grow with the square of the stages; a patch has no edge of 2^12 voxels."""


def check_stages(spec: NetworkSpec) -> None:
    """Raise ValueError for more than MOST_STAGES stages: a plan must not ask for endless building with few weights."""
    if len(spec.features) > MOST_STAGES:
        raise ValueError(f"features: {spec.name} has at most {MOST_STAGES} stages, found {len(spec.features)}")


def halving_spec(
    name: str,
    dimension: Dimension,
    features: Sequence[int],
    options: dict[str, Option],
    *,
    encoder_blocks: Sequence[int] = (),
    decoder_blocks: Sequence[int] = (),
) -> NetworkSpec:
    """A specification that pools by 2 and convolves with 3 along every axis; two blocks a stage unless stated."""
    stages = len(features)
    return NetworkSpec(
        name=name,
        dimension=dimension,
        features=tuple(features),
        strides=((1,) * dimension, *((2,) * dimension,) * (stages - 1)),
        kernels=((3,) * dimension,) * stages,
        encoder_blocks=tuple(encoder_blocks) or (2,) * stages,
        decoder_blocks=tuple(decoder_blocks) or (2,) * (stages - 1),
        options=options,
    )


def doubled(width: int, stages: int) -> tuple[int, ...]:
    """`width`, twice as many features in each stage after the first."""
    return tuple(width * 2**stage for stage in range(stages))
