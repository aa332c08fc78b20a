"""What only many cases together show: some of another scale than the rest, and classes that none has.

Decided: sizes are compared by the geometric mean of their axes, which scans along another axis, thick slices and a long
field of view change little, and a wrong unit changes in full. A case stands out if it differs from the median more than
`FAR` times: eight, so that centimetres for millimetres stand out where the cases vary a little too.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from autoseg.cases import names
from autoseg.labels import Labels
from autoseg.raw import Finding
from autoseg.restore import plan_axes
from autoseg.schema import CaseFingerprint, Configuration, Plan
from autoseg.volume import Grid, canonical_grid

FAR = 8.0


def size_mm(shape: Sequence[float], spacing_mm: Sequence[float]) -> tuple[float, float]:
    """Mean side of a voxel and mean extent of an image in mm, over its axes in whatever order; geometric means."""
    side = float(np.exp(np.log(spacing_mm).mean()))
    return side, side * float(np.exp(np.log(shape).mean()))


def is_far(value: float, usual: float) -> bool:
    """Whether a size differs more than `FAR` times from what is usual."""
    return max(value / usual, usual / value) > FAR


def of_another_scale(cases: Sequence[CaseFingerprint], flat: bool) -> list[Finding]:
    """A warning for cases whose voxels, and one for others whose extent, are far from the median. flat: all are 2D."""
    first = 1 if flat else 0
    sizes = {case.case: size_mm(case.shape[first:], case.spacing_mm[first:]) for case in cases}
    found, named = [], set[str]()
    for place, what in enumerate(("voxels", "an extent")):
        usual = math.exp(float(np.median([math.log(size[place]) for size in sizes.values()]))) if sizes else 1.0
        far = {name: size[place] for name, size in sizes.items() if is_far(size[place], usual) and name not in named}
        if not far:
            continue
        named |= far.keys()
        low, high = f"{min(far.values()):.3g}", f"{max(far.values()):.3g}"
        found.append(
            Finding(
                case="",
                severity="warning",
                problem=f"{what} of {low if low == high else f'{low} to {high}'} mm a side: {names(sorted(far))}; the "
                f"median of all cases is {usual:.3g} mm",
                cure="look at the header: metres or centimetres for millimetres? correct it, or remove the case",
            )
        )
    return found


def unlike_training(stored: Grid, plan: Plan, configuration: Configuration) -> str | None:
    """What to say of an image to predict whose extent is far from those of training, or whose voxels are far coarser.

    None for any other. Finer voxels say nothing: a plan may be coarse on purpose. Nor do extents if a plan crops.
    """
    if stored.dimension != plan.dimension:
        return None
    grid = canonical_grid(stored)
    axes = plan_axes(stored, plan.orientation, plan.axis_order)[0][-len(configuration.spacing_mm) :]
    side, extent = size_mm([grid.shape[axis] for axis in axes], [grid.spacing_mm[axis] for axis in axes])
    usual_side, usual_extent = size_mm(configuration.median_shape, configuration.spacing_mm)
    if not (is_far(extent, usual_extent) and not plan.preparation.crops) and side <= FAR * usual_side:
        return None
    return (
        f"voxels of {side:.3g} mm a side and an extent of {extent:.3g} mm, in training {usual_side:.3g} mm and "
        f"{usual_extent:.3g} mm"
    )


def without_a_class(cases: Sequence[CaseFingerprint], labels: Labels) -> list[Finding]:
    """A warning for classes that occur in no case; an error if none has any. Cases without counts say nothing."""
    counts: list[Mapping[int, int]] = [case.voxels for case in cases if case.voxels is not None]
    if not cases or len(counts) < len(cases):
        return []
    present = {index for found in counts for index, count in found.items() if count}
    never = [name for name, own in zip(labels.names[1:], labels.members) if not present.intersection(own)]
    if not never:
        return []
    if len(never) == len(labels.names) - 1:
        return [
            Finding(
                case="",
                severity="error",
                problem="no case has any foreground, so there is nothing to learn",
                cure="look at the label files: are they the right ones?",
            )
        ]
    return [
        Finding(
            case="",
            severity="warning",
            problem=f"in no case: {names(never)}; it will be scored as missed wherever it is predicted",
            cure="remove it from `labels` of dataset.json, or look at the values in the label files",
        )
    ]
