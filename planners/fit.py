"""Patch and batch size that fit the memory target, for one configuration.

Start with a patch far too large, in the proportions of the image; shrink the axis that covers most of the median image
until the network fits; spend what is left on the batch. Source: nnU-Net (Isensee et al., Nature Methods 2021).

Differences: a network halves at least once (images under 8 voxels are padded); every step of shrinking saves voxels.
"""

import math
from collections.abc import Callable
from typing import Protocol, TypeVar

from autoseg.planners.grid import by
from autoseg.planners.memory import activations
from autoseg.planners.rules import Budget, Rules
from autoseg.planners.topology import Topology, topology
from autoseg.records import AutosegError
from autoseg.schema import Configuration, Dimension, NetworkSpec, Reason


class Stepwise(Protocol):
    """A patch, what its edges are multiples of, and the strides of its network."""

    @property
    def patch(self) -> tuple[int, ...]: ...
    @property
    def divisors(self) -> tuple[int, ...]: ...
    @property
    def strides(self) -> tuple[tuple[int, ...], ...]: ...


Shape = TypeVar("Shape", bound=Stepwise)


def fit(
    name: str,
    spacing_mm: tuple[float, ...],
    median_shape: tuple[float, ...],
    dataset_voxels: float,
    *,
    heads: int,
    gpu_memory_gb: float,
    rules: Rules,
) -> tuple[Configuration, tuple[Reason, ...]]:
    """The configuration `name` with patch, batch size and network, and why they came out so.

    `spacing_mm` and `median_shape` (voxels) have two or three entries in plan order; `dataset_voxels` counts the whole
    dataset, slices included, in 2D too. Batch Dice and cascade are for the caller to set.
    Raises AutosegError if no patch fits.
    """
    budget = rules.budget(len(spacing_mm))
    allowed = budget.activations * (gpu_memory_gb / rules.reference_gb)

    first = start(spacing_mm, median_shape, budget, rules)
    shape = first
    needed = activations(network_of(shape, rules), shape.patch, heads)
    steps = 0
    while needed / budget.batch * budget.must_fit > allowed:
        shape = shrink(shape, spacing_mm, median_shape, rules)
        needed = activations(network_of(shape, rules), shape.patch, heads)
        steps += 1

    by_memory = round(allowed / needed * budget.batch)
    by_coverage = round(dataset_voxels * rules.coverage / math.prod(shape.patch))
    batch_size = max(min(by_memory, by_coverage), rules.min_batch)

    network = network_of(shape, rules)
    reasons = (
        Reason(
            decision=f"{name}: patch",
            rule=f"largest patch in the proportions of the image of which {budget.must_fit} samples fit in memory; "
            "shrink the axis that covers most of the median image",
            inputs=f"median image {by(median_shape)} voxels at {by(spacing_mm)} mm, start {by(first.patch)}, "
            f"{gpu_memory_gb:g} GB",
            outcome=f"{by(shape.patch)} voxels " + (f"after {steps} steps" if steps else "(nothing to shrink)"),
        ),
        Reason(
            decision=f"{name}: network",
            rule="halve the finest axes and those less than twice as coarse while the shortest edge stays at "
            f"{rules.min_edge} or more; kernels see 3 voxels along an axis once it is less than twice as coarse",
            inputs=f"patch {by(shape.patch)} voxels, spacing {by(spacing_mm)} mm",
            outcome=f"{len(shape.strides)} stages, strides {_list(shape.strides)}, kernels {_list(shape.kernels)}",
        ),
        Reason(
            decision=f"{name}: batch size",
            rule=f"what memory allows, at most {rules.coverage:.0%} of the voxels of the dataset, "
            f"at least {rules.min_batch}",
            inputs=f"memory allows {by_memory} ({needed:,} activations a sample), "
            f"{rules.coverage:.0%} of the dataset is {patches(by_coverage)}",
            outcome=str(batch_size),
        ),
    )
    configuration = Configuration(
        name=name,
        dimension=network.dimension,
        spacing_mm=spacing_mm,
        median_shape=median_shape,
        patch=shape.patch,
        batch_size=batch_size,
        batch_dice=False,
        network=network,
        prepared=name,
    )
    return configuration, reasons


def patches(count: int) -> str:
    """A number of patches in words; none is what is left of a share of a small dataset when it is rounded."""
    return "less than 1 patch" if count < 1 else "1 patch" if count == 1 else f"{count} patches"


def _list(stages: tuple[tuple[int, ...], ...]) -> str:
    return " ".join("x".join(str(step) for step in stage) for stage in stages)


def start_size(spacing: tuple[float, ...], median: tuple[float, ...], budget: Budget) -> list[float]:
    """A cube in mm of `start_voxels`, but no larger than the median image."""
    cube = (budget.start_voxels * math.prod(spacing)) ** (1 / len(spacing))
    return [min(max(1, round(cube / s)), edge) for s, edge in zip(spacing, median)]


def start(spacing: tuple[float, ...], median: tuple[float, ...], budget: Budget, rules: Rules) -> Topology:
    """Topology of the patch that shrinking starts from."""
    size = start_size(spacing, median, budget)
    found = topology(spacing, size, rules.min_edge)
    if len(found.strides) == 1:
        # With edges of 3 x min_edge along the fine axes, some axis is halved, whatever the spacing.
        fine = [s / min(spacing) < 2 for s in spacing]
        size = [max(edge, 3 * rules.min_edge) if grow else edge for edge, grow in zip(size, fine)]
        found = topology(spacing, size, rules.min_edge)
    return found


def shrink(shape: Topology, spacing: tuple[float, ...], median: tuple[float, ...], rules: Rules) -> Topology:
    """One step smaller along the axis that covers most of the median image; the last of equals.

    An axis is passed over where its step would leave no voxel or no downsampling, or where rounding up to the
    divisors of the new network would take back what the step saves. So every step saves voxels, and shrinking ends.
    """
    smaller = step_down(shape, median, lambda size: topology(spacing, size, rules.min_edge))
    if smaller is not None:
        return smaller
    raise AutosegError(
        f"no patch smaller than {by(shape.patch)} voxels can be planned at {by(spacing)} mm, and it does not fit; "
        "give more GPU memory, or a target spacing that is more alike along the axes"
    )


def step_down(
    shape: Shape, median: tuple[float, ...], at: Callable[[tuple[int, ...]], Shape], least_stages: int = 2
) -> Shape | None:
    """As `shrink`, for whatever has a patch, divisors and strides `at` a size; None where nothing is left to save."""
    axes = sorted(range(len(median)), key=lambda a: (shape.patch[a] / median[a], a), reverse=True)
    for axis in axes:
        # A smaller patch may be halved less often and so allow finer steps: from 256, divisible by 64, to 224, not 192.
        trial = _less(shape.patch, axis, shape.divisors[axis])
        step = at(trial).divisors[axis]
        smaller = at(_less(shape.patch, axis, step))
        if len(smaller.strides) >= least_stages and 0 < math.prod(smaller.patch) < math.prod(shape.patch):
            return smaller
    return None


def _less(patch: tuple[int, ...], axis: int, step: int) -> tuple[int, ...]:
    return tuple(edge - step if a == axis else edge for a, edge in enumerate(patch))


def network_of(shape: Topology, rules: Rules) -> NetworkSpec:
    """The network of that shape: features double a stage up to the cap."""
    stages = len(shape.strides)
    dimension: Dimension = 2 if len(shape.patch) == 2 else 3
    most = rules.budget(dimension).max_features
    blocks = (*rules.encoder_blocks, *(rules.encoder_blocks[-1] for _ in range(stages)))
    return NetworkSpec(
        name=rules.network,
        dimension=dimension,
        features=tuple(min(most, rules.base_features * 2**stage) for stage in range(stages)),
        strides=shape.strides,
        kernels=shape.kernels,
        encoder_blocks=blocks[:stages],
        decoder_blocks=(rules.decoder_blocks,) * (stages - 1),
    )
