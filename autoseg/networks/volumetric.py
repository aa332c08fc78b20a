"""What the 3D U-Net and the V-Net share: stages down, stages up, skips or none, and two ways to feed them.

`Relative` networks are told where in its image a patch lies; `Slices` is a 3D network for a few neighbouring slices
that gives the middle one. Both are variants of the knee-cartilage study of Imperial College (its sizes tiny, small and
large are in `SIZES`).
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from autoseg.networks.base import Network
from autoseg.networks.blocks import CONVOLUTION
from autoseg.networks.parts import DROPOUT
from autoseg.networks.position import Mode, Position
from autoseg.networks.strides import total
from autoseg.records import record
from autoseg.schema import Dimension, NetworkSpec, Option

SIZES = {"tiny": 2, "small": 3, "large": 5}
"""Resolution levels of the sizes of the knee study; features double from each to the next."""


def _odd(number: int) -> int:
    if number and number % 2 == 0:
        raise ValueError("an odd number is needed")
    return number


FirstKernel = Annotated[int, Field(ge=0, le=15), AfterValidator(_odd)]
"""Edge of the kernel that reads the image; 0: that of its stage."""


@record
class RelativeOptions:
    """What networks have that are told of their place; see `position`."""

    position: Mode = "film"


@record
class SliceOptions:
    """What networks of few slices have; see `Slices`."""

    context: Annotated[int, Field(ge=1, le=31), AfterValidator(_odd)] = 5
    reduce: Literal["mean", "sum", "centre"] = "mean"


class Volumetric(Network):
    """An encoder and a decoder with one head, for images (B, C, Z, Y, X) or (B, C, Y, X).

    encoder: stage i strides by `spec.strides[i]`.
    up, decoder: for each level but the last, from the highest resolution down: `up[i]` brings the level below to level
    i, `decoder[i]` convolves it, with `highways` after the result of `encoder[i]` has been put behind its channels.
    """

    heads_prefixes = ("head.",)

    def __init__(
        self,
        spec: NetworkSpec,
        heads: int,
        *,
        encoder: Sequence[nn.Module],
        up: Sequence[nn.Module],
        decoder: Sequence[nn.Module],
        features: int,
        first_weight: str,
        highways: bool = True,
    ) -> None:
        super().__init__()
        self.first_weight = first_weight
        self.divisor, self.scales = total(spec.strides), ((1,) * spec.dimension,)
        self.highways = highways
        self.encoder = nn.ModuleList(encoder)
        self.up = nn.ModuleList(up)
        self.decoder = nn.ModuleList(decoder)
        self.head = CONVOLUTION[spec.dimension](features, heads, 1)
        self.position: Position | None = None

    def scales_of(self, x: Tensor, all_scales: bool, position: Tensor | None = None) -> list[Tensor]:
        """As `Network.scales_of`, of one scale. position (B, axes): see `Relative`; None: centred."""
        place = x.new_zeros(len(x), x.ndim - 2) if position is None else position.to(x)
        skips = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        bottom = skips.pop()
        for level in reversed(range(len(self.up))):
            x = self.up[level](x)
            if self.position is not None and level == len(self.up) - 1:
                x = self.position.enter(x, bottom, place)
            x = self.decoder[level](torch.cat((x, skips[level]), 1) if self.highways else x)
            if self.position is not None:
                x = self.position.tune(x, level, place)
        return [self.head(x)]


class Relative(Volumetric):
    """A network that is told where its patch lies: `position` has an entry an axis, -1 to 1, 0 in the middle."""

    takes_position = True

    def forward(self, x: Tensor, all_scales: bool = False, position: Tensor | None = None) -> Tensor | list[Tensor]:
        """As `Network.forward`. position (B, axes): in plan order, -1 where the patch begins the image and 1 where it
        ends it, 0 where it is centred or fills it; None: centred, all of them. ValueError for another shape."""
        if position is not None and position.shape != (len(x), x.ndim - 2):
            raise ValueError(f"position: {(len(x), x.ndim - 2)} numbers are needed, found {tuple(position.shape)}")
        return self.at_any_size(x, all_scales, lambda image, scales: self.scales_of(image, scales, position))


class Slices(Network):
    """A 2D network to others, a 3D one inside: from an odd number of neighbouring slices to logits of the middle one.

    Channels come slice after slice for each channel of the image: slice k of t of channel c is channel c * t + k.
    reduce: what becomes of the logits of the t slices: their `mean`, their `sum`, or those of the `centre`.
    """

    def __init__(self, inner: Network, context: int, reduce: str) -> None:
        super().__init__()
        self.inner = inner
        self.context = context
        self.reduce = reduce
        self.divisor = inner.divisor[1:]
        self.scales = tuple(scale[1:] for scale in inner.scales)
        self.output_weights = inner.output_weights
        self.heads_prefixes = tuple(f"inner.{prefix}" for prefix in inner.heads_prefixes)
        self.encoder_prefixes = tuple(f"inner.{prefix}" for prefix in inner.encoder_prefixes)
        # It has an entry a channel of the image, not one a slice.
        self.first_weight = f"inner.{inner.first_weight}"

    def scales_of(self, x: Tensor, all_scales: bool) -> list[Tensor]:
        """As `Network.scales_of`; x: (B, channels of the image * context, Y, X)."""
        volume = x.unflatten(1, (-1, self.context))
        return [self._reduced(logits) for logits in self.inner.scales_of(volume, all_scales)]

    def _reduced(self, logits: Tensor) -> Tensor:
        if self.reduce == "centre":
            return logits[:, :, self.context // 2]
        return logits.mean(2) if self.reduce == "mean" else logits.sum(2)


def through_slices(spec: NetworkSpec, name: str) -> NetworkSpec:
    """The 3D specification inside a `Slices` network: nothing strides along the slices, kernels are cubes.

    Raises ValueError unless `spec` is one in 2D.
    """
    if spec.dimension != 2:
        raise ValueError(f"the network {spec.name!r} sees slices: its dimension is 2, found {spec.dimension}")
    return replace(
        spec,
        name=name,
        dimension=3,
        strides=tuple((1, *stride) for stride in spec.strides),
        kernels=tuple((max(kernel), *kernel) for kernel in spec.kernels),
        options={key: value for key, value in spec.options.items() if key not in ("context", "reduce")},
    )


def image_channels(spec: NetworkSpec, in_channels: int, context: int) -> int:
    """Channels of the image, of whose slices there are `in_channels`. Raises ValueError if that does not come out."""
    if in_channels % context:
        raise ValueError(
            f"the network {spec.name!r} sees {context} slices of each channel; {in_channels} input channels are no "
            "multiple of that"
        )
    return in_channels // context


def opening_kernel(spec: NetworkSpec, edge: int) -> tuple[int, ...]:
    """The kernel that reads the image: that of the first stage, with `edge`, unless 0, for what is more than 1."""
    return tuple(edge if edge and own > 1 else own for own in spec.kernels[0])


def dropped(dimension: int, share: float) -> list[nn.Module]:
    """The dropout behind a stage, of whole channels, if there is one."""
    return [DROPOUT[dimension](share)] if share else []


def doubling_spec(
    name: str,
    dimension: Dimension,
    *,
    features: Sequence[int],
    kernel: int,
    encoder_blocks: Sequence[int],
    decoder_blocks: Sequence[int],
    options: dict[str, Option],
) -> NetworkSpec:
    """A specification that halves all axes at every stage but the first, with one kernel everywhere."""
    stages = len(features)
    return NetworkSpec(
        name=name,
        dimension=dimension,
        features=tuple(features),
        strides=((1,) * dimension, *((2,) * dimension,) * (stages - 1)),
        kernels=((kernel,) * dimension,) * stages,
        encoder_blocks=tuple(encoder_blocks),
        decoder_blocks=tuple(decoder_blocks),
        options=options,
    )


def variant(spec: Callable[..., NetworkSpec], name: str, **own: Option) -> Callable[..., NetworkSpec]:
    """What makes the specification of the variant `name`: `spec`, with options of its `own` beside those."""

    def made(dimension: Dimension, **stated: Option) -> NetworkSpec:
        further = {key: stated.pop(key, default) for key, default in own.items()}
        plain = spec(dimension, **stated)
        return replace(plain, name=name, options=plain.options | further)

    plain = inspect.signature(spec)
    more = [inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default) for key, default in own.items()]
    # People may state them by name, so they can be listed.
    made.__signature__ = plain.replace(parameters=[*plain.parameters.values(), *more])  # type: ignore[attr-defined]
    return made
