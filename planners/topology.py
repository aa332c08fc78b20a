"""Strides and kernels of a U-Net from voxel spacing and patch size: which axis is halved when, which kernel is 3 wide.

Coarse axes wait: an axis is halved only together with the finest ones, so voxels become isotropic on the way down,
and its kernels stay 1 until then. Source: nnU-Net (Isensee et al., Nature Methods 2021, supplement).
"""

import math
from collections.abc import Sequence

from autoseg.records import record


@record
class Topology:
    """The shape of a U-Net. Tuples in array order; one stride and one kernel a stage, the first stride all ones."""

    patch: tuple[int, ...]
    """The size asked for, rounded up to a multiple of `divisors`."""
    divisors: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]


def topology(spacing_mm: Sequence[float], size: Sequence[float], min_edge: int) -> Topology:
    """Downsample by 2 until no axis may be halved any more.

    `spacing_mm` and `size` (voxels, possibly fractional as medians are) have two or three entries in array order;
    no edge is halved below `min_edge`. A size too small to be halved at all gives a single stage.
    """
    spacing, edges = list(spacing_mm), list(size)
    kernel = [1] * len(spacing)
    strides, kernels = [(1,) * len(spacing)], []
    while axes := to_halve(spacing, edges, min_edge):
        finest = min(spacing)
        kernel = [3 if k == 3 or s / finest < 2 else 1 for k, s in zip(kernel, spacing)]
        kernels.append(tuple(kernel))
        stride = tuple(2 if axis in axes else 1 for axis in range(len(spacing)))
        strides.append(stride)
        spacing = [s * step for s, step in zip(spacing, stride)]
        edges = [math.ceil(edge / 2) if step == 2 else edge for edge, step in zip(edges, stride)]
    kernels.append((3,) * len(spacing))
    divisors = tuple(math.prod(steps) for steps in zip(*strides))
    patch = tuple(math.ceil(edge / divisor) * divisor for edge, divisor in zip(size, divisors))
    return Topology(patch=patch, divisors=divisors, strides=tuple(strides), kernels=tuple(kernels))


def to_halve(spacing: list[float], edges: list[float], min_edge: int) -> list[int]:
    """Axes that are long enough and less than twice as coarse as the finest of those that are long enough."""
    long = [axis for axis, edge in enumerate(edges) if edge >= 2 * min_edge]
    finest = min((spacing[axis] for axis in long), default=0.0)
    chosen = [axis for axis in long if spacing[axis] / finest < 2]
    # One axis alone is halved only while it is clearly the longest.
    if len(chosen) == 1 and edges[chosen[0]] < 3 * min_edge:
        return []
    return chosen
