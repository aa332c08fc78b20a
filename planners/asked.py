"""Patch and batch size for a network that was asked for by name, by the bytes that it really needs.

The network keeps the widths and levels of its source. Its strides and kernels follow the voxels by the rule of
`topology`: an axis waits, unhalved and with kernels of 1, while it is twice as coarse as the finest. The networks of
the presets, whose source plans their levels, and a network of one's own, which has no source, take those of `topology`.
Everything else is as in `fit`: start large in the proportions of the image, shrink until the samples that must fit do,
spend what is left on the batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from autoseg.needs import NetworkNeeds
from autoseg.planners.fit import network_of, patches, start, start_size, step_down
from autoseg.planners.grid import by
from autoseg.planners.rules import Rules
from autoseg.planners.topology import to_halve, topology
from autoseg.records import AutosegError
from autoseg.schema import Configuration, Dimension, NetworkSpec, Reason

USABLE = 0.8
"""Share of the memory that a step is planned to fill; the rest is for CUDA, the workspaces of kernels and fragments."""


@dataclass(frozen=True, kw_only=True)
class Sized:
    """The network for patches of a size, and that size as the network likes it."""

    patch: tuple[int, ...]
    divisors: tuple[int, ...]
    network: NetworkSpec

    @property
    def strides(self) -> tuple[tuple[int, ...], ...]:
        """Of the network, a stage each."""
        return self.network.strides


def fit_asked(
    name: str,
    spacing_mm: tuple[float, ...],
    median_shape: tuple[float, ...],
    dataset_voxels: float,
    *,
    needs: NetworkNeeds,
    gpu_memory_gb: float,
    rules: Rules,
) -> tuple[Configuration, tuple[Reason, ...]]:
    """As `fit.fit`, for the network that `needs` describes; raises AutosegError if no patch fits."""
    budget = rules.budget(len(spacing_mm))
    allowed = gpu_memory_gb * 2**30 * USABLE

    def at(size: Sequence[float]) -> Sized:
        return sized(size, spacing_mm, needs, rules)

    if needs.spec is None:
        first = at(start(spacing_mm, median_shape, budget, rules).patch)
    else:
        first = at(start_size(spacing_mm, median_shape, budget))
    shape, steps = first, 0
    while (needed := needs.bytes(shape.network, shape.patch, budget.must_fit)) > allowed:
        smaller = step_down(shape, median_shape, at, 2 if needs.spec is None else 1)
        if smaller is None:
            raise AutosegError(
                f"{needs.name} needs {gib(needed)} for {budget.must_fit} patches of {by(shape.patch)} voxels ({name}), "
                f"its smallest, and {gib(allowed)} may be used; give more --gpu-memory, or another network"
            )
        shape, steps = smaller, steps + 1

    def step_bytes(batch: int) -> int:
        return needs.bytes(shape.network, shape.patch, batch)

    by_coverage = round(dataset_voxels * rules.coverage / math.prod(shape.patch))
    most = max(by_coverage, rules.min_batch)
    by_memory = largest_batch(step_bytes, allowed, budget.must_fit, most)
    batch_size = max(min(by_memory, most), rules.min_batch)

    told_place = needs.told_place(shape.network)
    configuration = Configuration(
        name=name,
        dimension=shape.network.dimension,
        spacing_mm=spacing_mm,
        median_shape=median_shape,
        patch=shape.patch,
        batch_size=batch_size,
        batch_dice=False,
        network=shape.network,
        context=shape.network.slices,
        mirror_axes=() if told_place else None,
        prepared=name,
    )
    places = Reason(
        decision=f"{name}: mirror images",
        rule="a network that is told where a patch lies learns what differs from place to place, and in a mirror image "
        "places differ otherwise",
        inputs=needs.name,
        outcome="none, in training and prediction",
    )
    counted = f"{gib(step_bytes(batch_size))} {needs.counted}".strip()
    reasons = (
        Reason(
            decision=f"{name}: network",
            rule=_rule(needs, rules),
            inputs=f"spacing {by(spacing_mm)} mm, patches are multiples of {by(shape.divisors)}, at least "
            f"{by(needs.smallest(shape.network))} voxels",
            outcome=f"{needs.name}, {len(shape.strides)} stages of {', '.join(map(str, shape.network.features))} "
            f"features, strides {_list(shape.strides)}, kernels {_list(shape.network.kernels)}",
        ),
        Reason(
            decision=f"{name}: patch",
            rule=f"largest patch in the proportions of the image of which {budget.must_fit} samples fit in memory; "
            f"a step may fill {USABLE:.0%} of it",
            inputs=f"median image {by(median_shape)} voxels at {by(spacing_mm)} mm, start {by(first.patch)}, "
            f"{gib(allowed)} of {gpu_memory_gb:g} GB",
            outcome=f"{by(shape.patch)} voxels " + (f"after {steps} steps" if steps else "(nothing to shrink)"),
        ),
        Reason(
            decision=f"{name}: batch size",
            rule=f"what memory allows, at most {rules.coverage:.0%} of the voxels of the dataset, "
            f"at least {rules.min_batch}",
            inputs=f"memory allows {by_memory}{' or more' if by_memory == most else ''}, "
            f"{rules.coverage:.0%} of the dataset is {patches(by_coverage)}",
            outcome=f"{batch_size}, with which a step needs {counted}",
        ),
        *((places,) if told_place else ()),
    )
    return configuration, reasons


def sized(size: Sequence[float], spacing_mm: Sequence[float], needs: NetworkNeeds, rules: Rules) -> Sized:
    """The network for patches of `size` voxels, and that size rounded up to what the network likes."""
    dimension: Dimension = 2 if len(size) == 2 else 3
    if needs.spec is None:
        shape = topology(spacing_mm, size, rules.min_edge)
        network = replace(network_of(shape, rules.as_deep_as(needs.name)), name=needs.name)
        return Sized(patch=shape.patch, divisors=shape.divisors, network=network)
    network = adapted(needs.spec(dimension), spacing_mm, size, rules.min_edge)
    divisors = needs.divisors(network)
    patch = tuple(
        max(math.ceil(edge / divisor) * divisor, least)
        for edge, divisor, least in zip(size, divisors, needs.smallest(network))
    )
    if "grid" in network.options:  # of tokens, which positions are learnt for
        tokens = tuple(edge // divisor for edge, divisor in zip(patch, divisors))
        network = replace(network, options={**network.options, "grid": tokens})
    return Sized(patch=patch, divisors=divisors, network=network)


def adapted(network: NetworkSpec, spacing_mm: Sequence[float], size: Sequence[float], min_edge: int) -> NetworkSpec:
    """`network` for voxels of `spacing_mm` and patches of `size`: along which axes its stages stride and see.

    An axis is strided at a stage while it is less than twice as coarse as the finest and long enough, see `topology`;
    its kernels are 1 until it is less than twice as coarse. Widths and the number of stages stay.
    """
    spacing, edges = list(spacing_mm), list(size)
    seen = [False] * len(spacing)
    strides, kernels = [], []
    for stride, kernel in zip(network.strides, network.kernels, strict=True):
        axes = to_halve(spacing, edges, min_edge * max(stride) // 2) if max(stride) > 1 else []
        step = tuple(n if axis in axes else 1 for axis, n in enumerate(stride))
        spacing = [s * n for s, n in zip(spacing, step)]
        edges = [math.ceil(edge / n) for edge, n in zip(edges, step)]
        seen = [old or s / min(spacing) < 2 for old, s in zip(seen, spacing)]
        strides.append(step)
        kernels.append(tuple(k if see else 1 for k, see in zip(kernel, seen)))
    if max(map(max, strides)) == 1:
        return network  # a patch too short to be halved is padded, rather than seen at full resolution throughout
    return replace(network, strides=tuple(strides), kernels=tuple(kernels))


def largest_batch(needed: Callable[[int], int], allowed: float, least: int, most: int) -> int:
    """The largest batch from `least`, which is known to fit, to `most` whose bytes are allowed."""
    if most <= least:
        return most if needed(most) <= allowed else least
    some, more = needed(least), needed(min(2 * least, most))
    a_sample = max((more - some) / (min(2 * least, most) - least), 1.0)
    batch = max(least, min(most, least + int((allowed - some) / a_sample)))
    while batch > least and needed(batch) > allowed:
        batch -= 1
    return batch


def gib(count: float) -> str:
    """Bytes as people write them."""
    return f"{count / 2**30:.2f} GiB"


def _rule(needs: NetworkNeeds, rules: Rules) -> str:
    if needs.spec is None:
        return (
            "its levels are planned for the patch: halve the finest axes and those less than twice as coarse while the "
            f"shortest edge stays at {rules.min_edge} or more"
        )
    return (
        "widths and levels are those of its source; a level strides along the finest axes and those less than twice as "
        f"coarse while the shortest edge stays at {rules.min_edge} or more, and kernels see one voxel along an axis "
        "until it is less than twice as coarse"
    )


def _list(stages: tuple[tuple[int, ...], ...]) -> str:
    return " ".join("x".join(str(step) for step in stage) for stage in stages)
