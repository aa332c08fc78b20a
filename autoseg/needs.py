"""What a planner must know of a network and cannot find out by itself, since planning knows nothing of torch.

`networks.footprint.needs_of` fills it for any architecture.
"""

from collections.abc import Callable
from dataclasses import dataclass

from autoseg.schema import Dimension, NetworkSpec


@dataclass(frozen=True, kw_only=True)
class NetworkNeeds:
    """A network that a plan is asked for, with what it needs. Sizes are in voxels, one entry a spatial axis."""

    name: str
    """As it was asked for, options included."""
    dimensions: tuple[int, ...]
    spec: Callable[[Dimension], NetworkSpec] | None
    """The network of its source, for voxels that are alike along all axes; where they are not, its strides and kernels
    may be changed axis by axis. None: its stages are planned for the patch, as those of the presets are."""
    divisors: Callable[[NetworkSpec], tuple[int, ...]]
    """What patches should be multiples of, lest they be padded."""
    smallest: Callable[[NetworkSpec], tuple[int, ...]]
    """The smallest patch that it can be trained on."""
    bytes: Callable[[NetworkSpec, tuple[int, ...], int], int]
    """(spec, patch, batch) -> bytes that a training step needs."""
    told_place: Callable[[NetworkSpec], bool] = lambda spec: False
    """Whether it is told where a patch lies, which mirror images would contradict."""
    counted: str = ""
    """How the bytes were counted, in words."""
