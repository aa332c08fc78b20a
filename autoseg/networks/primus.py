"""Primus V3 (Wald, Roy, Isensee et al., arXiv 2503.01835, and the third version in nnU-Net 2.8): a plain transformer.

Residual convolutions turn the image into tokens, one for every 8 voxels along each axis; projections of the higher
resolutions are added to the tokens with learnt weights that begin near zero. The blocks are those of EVA-02: attention
with rotary positions along each axis and a norm before its projection, then SwiGLU; each is scaled by a learnt number a
channel, and left out at random in training, the later ones more often. Transposed convolutions bring tokens back.

The learnt positions are those of a grid of tokens, option `grid`: patch / 8, for the patch that is trained with.
Elsewhere they are interpolated; rotary positions go on as they are. The sources are for 3D with 8 x 8 x 8 voxels a
token; other strides and 2D are our extension of the same rules.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from autoseg.networks.base import Architecture, Network
from autoseg.networks.blocks import CONVOLUTION, SLOPE, TRANSPOSED, ResidualBlock, initialise
from autoseg.networks.options import Share, read_options
from autoseg.networks.parts import INTERPOLATION
from autoseg.networks.strides import total
from autoseg.networks.unet import check_spec
from autoseg.records import record
from autoseg.schema import Dimension, NetworkSpec


@record
class PrimusOptions:
    """`grid`: tokens along each axis of a patch; none: 16. `drop_path`: how often the last block is left out in
    training; the first never is. `layer_scale`: what each block is scaled by at first."""

    attention_heads: Annotated[int, Field(ge=1)] = 6
    grid: tuple[Annotated[int, Field(ge=1)], ...] = ()
    drop_path: Share = 0.2
    layer_scale: Annotated[float, Field(ge=0.0, le=10.0)] = 0.1


SIZES = {"S": (12, 6, 396), "B": (12, 12, 792), "M": (16, 12, 864), "L": (24, 16, 1056)}
"""Size -> transformer blocks, attention heads, features of a token."""

RATIO = 8 / 3
"""Features inside a SwiGLU for each outside."""

RAISE: dict[int, Any] = {2: F.conv_transpose2d, 3: F.conv_transpose3d}

TEMPERATURE = 10_000.0
"""The lowest rotary frequency is near one radian in as many tokens."""


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each voxel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) -> the same."""
        normed: Tensor = self.norm(x.movedim(1, -1)).movedim(-1, 1)
        return normed


class Attention(nn.Module):
    """Self-attention with rotary positions; keys have no bias, and a norm comes before the last projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        """(B, tokens, C), angles (tokens, pairs) -> (B, tokens, C)."""
        query, key, value = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        seen = F.scaled_dot_product_attention(rotated(query, angles), rotated(key, angles), value)
        out: Tensor = self.out(self.norm(seen.transpose(1, 2).flatten(2)))
        return out


class SwiGLU(nn.Module):
    """Two projections, one the gate of the other, a norm, and the projection back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inside = int(width * RATIO)
        self.gate = nn.Linear(width, inside)
        self.value = nn.Linear(width, inside)
        self.norm = nn.LayerNorm(inside)
        self.out = nn.Linear(inside, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> the same."""
        out: Tensor = self.out(self.norm(F.silu(self.gate(x)) * self.value(x)))
        return out


class DropPath(nn.Dropout):
    """In training leaves what it is given out with probability `p`, sample by sample; the rest is larger for it."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> the same."""
        if not self.training or self.p == 0:
            return x
        kept = torch.rand(len(x), *(1,) * (x.ndim - 1), device=x.device) >= self.p
        return x * kept.to(x.dtype) / (1 - self.p)


class TransformerBlock(nn.Module):
    """Attention and SwiGLU, each normed before, scaled after, and added; left out at random in training."""

    def __init__(self, width: int, heads: int, scale: float, drop: float) -> None:
        super().__init__()
        self.drop = DropPath(drop)
        self.first_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.first_scale = nn.Parameter(torch.full((width,), scale))
        self.second_norm = nn.LayerNorm(width)
        self.mlp = SwiGLU(width)
        self.second_scale = nn.Parameter(torch.full((width,), scale))

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        """(B, tokens, C) -> the same."""
        x = x + self.drop(self.first_scale * self.attention(self.first_norm(x), angles))
        dropped: Tensor = self.drop(self.second_scale * self.mlp(self.second_norm(x)))
        return x + dropped


class Head(nn.Module):
    """A transposed convolution without overlap to the logits, whose weight has the classes first."""

    def __init__(self, in_channels: int, heads: int, stride: Sequence[int]) -> None:
        super().__init__()
        self.stride = tuple(stride)
        self.weight = nn.Parameter(torch.empty(heads, in_channels, *stride))
        self.bias = nn.Parameter(torch.zeros(heads))
        nn.init.kaiming_normal_(self.weight.transpose(0, 1), a=SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, *spatial) -> (B, heads, *spatial * stride)."""
        raised: Tensor = RAISE[x.ndim - 2](x, self.weight.transpose(0, 1), self.bias, self.stride)
        return raised


class Primus(Network):
    """Primus V3, for images (B, C, Z, Y, X) or (B, C, Y, X).

    The last stage of `spec` is the transformer: its features are those of a token, its blocks those of the transformer,
    its kernel that of the projection to tokens, and it does not stride. The stages before it are the residual blocks.
    """

    first_weight = "stages.0.0.first.conv.weight"
    beside_first = ("stages.0.0.shortcut.0.conv.weight",)
    heads_prefixes = ("head.",)
    encoder_prefixes = ("stages.", "to_tokens.", "projection", "places", "blocks.", "norm.")

    def __init__(self, spec: NetworkSpec, in_channels: int, heads: int) -> None:
        super().__init__()
        check_spec(spec)
        options = read_options(PrimusOptions, spec)
        grid = options.grid or (16,) * spec.dimension
        _check(spec, options.attention_heads, grid)
        axes, width, depth = spec.dimension, spec.features[-1], spec.encoder_blocks[-1]
        self.divisor, self.scales = total(spec.strides), ((1,) * axes,)

        self.stages = nn.ModuleList()
        channels = in_channels
        for features, stride, kernel, blocks in zip(
            spec.features[:-1], spec.strides, spec.kernels, spec.encoder_blocks
        ):
            strides = (stride, *((1,) * axes,) * (blocks - 1))
            widths = pairwise((channels, *(features,) * blocks))
            biased = len(self.stages) == 0
            self.stages.append(
                nn.Sequential(
                    *(ResidualBlock(a, b, kernel, step, bias=biased) for (a, b), step in zip(widths, strides))
                )
            )
            channels = features
        convolution = CONVOLUTION[axes]
        self.to_tokens = convolution(
            channels, width, spec.kernels[-1], padding=tuple(edge // 2 for edge in spec.kernels[-1])
        )
        self.projections = nn.ModuleList()
        for level, features in enumerate(spec.features[:-2]):
            left = total(spec.strides[level + 1 :])
            self.projections.append(convolution(features, width, left, left))
        self.projection_scales = nn.Parameter(torch.full((len(self.projections),), 1e-5))

        # With a batch of one: a layout of memory is for tensors of as many axes as an image.
        self.places = nn.Parameter(torch.zeros(1, width, *grid))
        self.blocks = nn.ModuleList(
            TransformerBlock(
                width,
                options.attention_heads,
                options.layer_scale,
                options.drop_path * block / max(depth - 1, 1),
            )
            for block in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.bands = width // options.attention_heads // (2 * axes)

        steps = [stride for stride in spec.strides if max(stride) > 1][::-1]
        falling = decoder_widths(width, heads, len(steps))
        self.decoder = nn.Sequential()
        for before, after, step in zip(falling, falling[1:-1], steps):
            self.decoder.extend((TRANSPOSED[axes](before, after, step, step), ChannelNorm(after), nn.GELU()))
        self.head = Head(falling[-2], heads, steps[-1])
        self._initialise()

    def scales_of(self, x: Tensor, all_scales: bool) -> list[Tensor]:
        """As `Network.scales_of`, of one scale."""
        added: Tensor | float = 0.0
        for level, stage in enumerate(self.stages):
            x = stage(x)
            if level < len(self.projections):
                added = added + self.projection_scales[level] * self.projections[level](x)
        x = self.to_tokens(x) + added
        grid = x.shape[2:]
        x = x + self._places(grid)
        tokens = x.flatten(2).transpose(1, 2)
        angles = rotary_angles(grid, self.bands, x.device)
        for block in self.blocks:
            tokens = block(tokens, angles)
        x = self.norm(tokens).transpose(1, 2).unflatten(2, grid)
        return [self.head(self.decoder(x))]

    def _places(self, grid: Sequence[int]) -> Tensor:
        if tuple(self.places.shape[2:]) == tuple(grid):
            return self.places
        mode = INTERPOLATION[len(grid)]
        return F.interpolate(self.places, size=tuple(grid), mode=mode, align_corners=False)

    def _initialise(self) -> None:
        initialise(self)
        for part in self.stages.modules():
            if isinstance(part, ResidualBlock):
                nn.init.ones_(part.second.norm.weight)
        for part in self.blocks.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        nn.init.trunc_normal_(self.places, std=0.02)
        # The deeper a block, the more has been added before it.
        for number, block in enumerate(self.blocks, 1):
            assert isinstance(block, TransformerBlock)
            for linear in (block.attention.out, block.mlp.out):
                linear.weight.data /= (2 * number) ** 0.5


def rotary_angles(grid: Sequence[int], bands: int, device: torch.device) -> Tensor:
    """By what each pair of features of a token is turned, in radians: (tokens, axes * bands), axis after axis."""
    frequencies = TEMPERATURE ** -(torch.arange(bands, device=device, dtype=torch.float32) / max(bands, 1))
    places = torch.meshgrid(*(torch.arange(edge, device=device) for edge in grid), indexing="ij")
    return torch.cat([place.reshape(-1, 1) * frequencies for place in places], 1)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """`x` (..., tokens, C) with each pair of its first features turned by `angles` (tokens, pairs); others stay."""
    turned, rest = x[..., : 2 * angles.shape[-1]], x[..., 2 * angles.shape[-1] :]
    first, second = turned[..., ::2], turned[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    pairs = torch.stack((first * cos - second * sin, second * cos + first * sin), -1)
    return torch.cat((pairs.flatten(-2).to(x.dtype), rest), -1)


def decoder_widths(width: int, heads: int, steps: int) -> list[int]:
    """Channels before and after each transposed convolution: from a token's to `heads`, in a geometric row on the way
    to twice that, in multiples of 8."""
    factor = (width / (2 * heads)) ** (1 / steps)
    between = [max(8, round((width / factor**step + 1e-6) / 8) * 8) for step in range(1, steps)]
    return [width, *between, heads]


def _check(spec: NetworkSpec, heads: int, grid: Sequence[int]) -> None:
    """Raise ValueError unless `spec` describes a Primus."""
    width = spec.features[-1]
    if max(spec.strides[-1]) > 1 or max(map(max, spec.strides)) == 1:
        raise ValueError(
            f"the network {spec.name!r} strides before its last stage, the transformer, and not in it; found "
            f"{spec.strides}"
        )
    if set(spec.decoder_blocks) != {1}:
        raise ValueError(f"decoder_blocks: the network {spec.name!r} has one everywhere, found {spec.decoder_blocks}")
    if width % heads or width // heads < 2 * spec.dimension:
        raise ValueError(
            f"the network {spec.name!r} divides the features of its last stage among {heads} attention heads, each of "
            f"{2 * spec.dimension} or more; found {width}"
        )
    if len(grid) != spec.dimension:
        raise ValueError(f"option grid of the network {spec.name!r}: one number an axis is needed, found {grid}")


def primus_spec(
    dimension: Dimension,
    *,
    size: str = "S",
    grid: Sequence[int] = (),
    drop_path: float = 0.2,
    layer_scale: float = 0.1,
) -> NetworkSpec:
    """Primus V3 of one of `SIZES`; grid: tokens along each axis of a patch. Raises ValueError for an unknown size."""
    if size not in SIZES:
        raise ValueError(f"size: choose one of {', '.join(SIZES)}, found {size!r}")
    depth, attention_heads, width = SIZES[size]
    return NetworkSpec(
        name="primus_v3",
        dimension=dimension,
        features=(32, 64, 256, 1024, width),
        strides=((1,) * dimension, *((2,) * dimension,) * 3, (1,) * dimension),
        kernels=(*((3,) * dimension,) * 4, (1,) * dimension),
        encoder_blocks=(1, 1, 1, 1, depth),
        decoder_blocks=(1,) * 4,
        options={
            "attention_heads": attention_heads,
            "grid": tuple(grid) or (16,) * dimension,
            "drop_path": drop_path,
            "layer_scale": layer_scale,
        },
    )


PRIMUS_V3 = Architecture(
    build=Primus, spec=primus_spec, source="Wald, Roy, Isensee et al., arXiv 2503.01835; version 3 in nnU-Net 2.8"
)
