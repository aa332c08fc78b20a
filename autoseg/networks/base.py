"""What all networks have in common: they take images of any size, and say what training and transfer must know.

`Network` pads to the total stride and cuts the logits back, so an architecture only writes `scales_of`. Architecture is
an entry of the table of networks: how it is built, the specification of its paper, and what it can do.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from autoseg.networks.strides import total
from autoseg.schema import NetworkSpec


class Network(nn.Module, ABC):
    """Base of the architectures that accept any size; a subclass sets the attributes and writes `scales_of`.

    Zeros are added behind the last voxels, so that lower scales stay where they are; images are normalised, so zero
    is their mean.
    """

    divisor: tuple[int, ...]
    """What the spatial sizes that `scales_of` sees are multiples of."""
    scales: tuple[tuple[int, ...], ...]
    """By how much each of the outputs of `scales_of` is smaller than the image, axis by axis; the first: not at all."""
    output_weights: tuple[float, ...] = ()
    """How much each of the outputs counts in deep supervision, in all 1; (): each half of the one before, the last not
    at all, as fits a decoder whose outputs are smaller and smaller (`losses.scale_weights`)."""
    first_weight: str = ""
    """Name of the tensor that reads the image, (features, input channels, *kernel)."""
    beside_first: tuple[str, ...] = ()
    """Names of further tensors that read it, as those of a shortcut beside the first convolution."""
    adds_image: bool = False
    """Whether the image is also added to what the first convolution gives, without weights that could be adapted."""
    grows_kernels: bool = False
    """Whether kernels may begin as smaller ones that have been trained, up-sampled; see `autoseg.transfer`."""
    heads_prefixes: tuple[str, ...] = ("heads.",)
    """What names of tensors that give logits, (heads, ...), begin with."""
    encoder_prefixes: tuple[str, ...] = ("encoder.",)
    """What names of tensors of the encoder begin with, which training can freeze or give a rate of its own."""
    takes_position: bool = False
    """Whether `forward` is called with `position`: where in its image each patch lies, see `sampling.Batch`. It takes
    None for the middle."""

    @abstractmethod
    def scales_of(self, x: Tensor, all_scales: bool) -> Sequence[Tensor]:
        """Images (B, C, *spatial), of a fitting size -> logits (B, heads, *spatial / scale), highest resolution first.

        Without `all_scales` only the first is asked for.
        """

    def forward(self, x: Tensor, all_scales: bool = False) -> Tensor | list[Tensor]:
        """Images (B, C, *spatial) of any size -> logits (B, heads, *spatial); with `all_scales` a list, see `scales`.

        Raises ValueError for another number of spatial axes than the network has.
        """
        return self.at_any_size(x, all_scales, self.scales_of)

    def at_any_size(
        self, x: Tensor, all_scales: bool, scales_of: Callable[[Tensor, bool], Sequence[Tensor]]
    ) -> Tensor | list[Tensor]:
        """What `scales_of` gives for `x` padded to a fitting size, cut back; for a `forward` that takes more."""
        size = tuple(x.shape[2:])
        if len(size) != len(self.divisor):
            raise ValueError(f"the network takes {len(self.divisor)} spatial axes, the input has size {size}")
        missing = [-edge % unit for edge, unit in zip(size, self.divisor)]
        if any(missing):
            x = F.pad(x, [pad for gap in reversed(missing) for pad in (0, gap)])
        outputs = scales_of(x, all_scales)
        if not all_scales:
            return cut_back(outputs[0], size, (1,) * len(size))
        return [cut_back(logits, size, scale) for logits, scale in zip(outputs, self.scales, strict=True)]


def cut_back(logits: Tensor, size: Sequence[int], scale: Sequence[int]) -> Tensor:
    """The part of `logits` (B, K, *padded / scale) that lies in an image of `size`.

    At a lower resolution a voxel does if its centre does, as in `losses.scale_targets`.
    """
    kept = tuple(len(range(factor // 2, edge, factor)) for edge, factor in zip(size, scale))
    own: tuple[Any, ...] = (..., *(slice(edge) for edge in kept))
    return logits if logits.shape[2:] == kept else logits[own]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One entry of the table of networks."""

    build: Callable[[NetworkSpec, int, int], nn.Module]
    """(spec, input channels, heads) -> the network. Raises ValueError for a specification that does not fit."""
    spec: Callable[..., NetworkSpec]
    """(dimension, **options) -> the network as its source has it, for images whose voxels are alike along all axes.
    Where they are not, strides and kernels may be changed axis by axis. The keyword arguments, all with defaults, are
    what `name(key=value)` may state."""
    source: str
    """Authors, where and when."""
    dimensions: tuple[int, ...] = (2, 3)
    deep_supervision: bool = False
    """Whether it gives more than one scale."""
    levels_follow_patch: bool = False
    """Its source has no fixed number of stages, but as many as the patch can be halved."""


LARGEST_STRIDE = 8
"""Of one stage along one axis."""
LARGEST_TOTAL = 1024
"""Of all stages along one axis: an image is padded to a multiple of it."""


def spec_problems(spec: NetworkSpec, levels: int) -> list[str]:
    """What is wrong with the stages of a specification, whatever is built of them; none: it can be tried.

    levels: how many entries `decoder_blocks` has.
    """
    stages, problems = len(spec.features), []
    expected = {"strides": stages, "kernels": stages, "encoder_blocks": stages, "decoder_blocks": levels}
    for field, count in expected.items():
        if len(getattr(spec, field)) != count:
            problems.append(f"{field}: {count} entries are needed for {stages} stages, found {getattr(spec, field)}")
    for field in ("features", "encoder_blocks", "decoder_blocks"):
        if min(getattr(spec, field), default=1) < 1:
            problems.append(f"{field}: every entry must be 1 or more, found {getattr(spec, field)}")
    for field in ("strides", "kernels"):
        for entry in getattr(spec, field):
            if len(entry) != spec.dimension or min(entry) < 1:
                problems.append(f"{field}: {spec.dimension} positive numbers a stage are needed, found {entry}")
    if any(edge % 2 == 0 for kernel in spec.kernels for edge in kernel):
        problems.append(f"kernels: sizes must be odd, found {spec.kernels}")
    # A specification may come with a file of unknown origin, and strides do not show in the shape of any tensor.
    if any(step > LARGEST_STRIDE for stride in spec.strides for step in stride):
        problems.append(f"strides: at most {LARGEST_STRIDE} in one stage, found {spec.strides}")
    elif max(total(spec.strides), default=1) > LARGEST_TOTAL:
        problems.append(f"strides: at most {LARGEST_TOTAL} in all along one axis, found {spec.strides}")
    return problems
