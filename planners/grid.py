"""The grid that images are resampled to: target spacing, axis order, and the median image on it.

Source: nnU-Net (Isensee et al., Nature Methods 2021), except that a 2D dataset has no through-plane spacing to invent.
"""

import math

import numpy as np

from autoseg.planners.rules import Rules
from autoseg.records import AutosegError
from autoseg.schema import Fingerprint, Reason

Triple = tuple[float, float, float]


def by(values: tuple[float, ...]) -> str:
    """A spatial tuple as a person writes it: `1 x 0.77 x 0.77`."""
    return " x ".join(f"{value:.6g}" for value in values)


def target_spacing(fingerprint: Fingerprint, rules: Rules, spacing_mm: Triple | None) -> tuple[Triple, Reason]:
    """Spacing of the full-resolution images in mm, canonical axis order, and why.

    `spacing_mm` is the user's wish, taken as it is; its first entry is not used in 2D. Raises AutosegError unless it
    has three positive numbers.
    """
    decision = "target spacing"
    unused = 3 - fingerprint.dimension
    if spacing_mm is not None:
        if len(spacing_mm) != 3 or not all(0 < s < math.inf for s in spacing_mm):
            raise AutosegError(f"a target spacing needs three positive numbers in mm (Z, Y, X), got {spacing_mm}")
        wish = Reason(
            decision=decision, rule="the spacing asked for", inputs="", outcome=f"{by(tuple(spacing_mm[unused:]))} mm"
        )
        return (spacing_mm[0], spacing_mm[1], spacing_mm[2]), wish
    spacings = np.array([case.spacing_mm for case in fingerprint.cases])
    target = np.percentile(spacings, 50, axis=0)
    shape = np.median([case.shape for case in fingerprint.cases], axis=0)
    coarse = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != coarse]
    median = tuple(target.tolist())
    rule = "median of all cases, axis by axis"
    inputs = f"median spacing {by(median[unused:])} mm, median shape {by(tuple(shape.tolist())[unused:])} voxels"
    thick = target[coarse] > rules.anisotropy * target[others].max()
    few = rules.anisotropy * shape[coarse] < shape[others].min()
    if fingerprint.dimension == 3 and thick and few:
        fine = np.percentile(spacings[:, coarse], 10)
        # The coarsest axis stays the coarsest, if only just, so that the axis order does not change.
        target[coarse] = fine if fine >= target[others].max() else target[others].max() + 1e-5
        rule += (
            f"; an axis more than {rules.anisotropy:g} times coarser and shorter than both others takes its 10th "
            "percentile, because interpolating the thinner slices to the median would blur them"
        )
    result = tuple(target.tolist())
    return result, Reason(decision=decision, rule=rule, inputs=inputs, outcome=f"{by(result[unused:])} mm")


def axis_order(fingerprint: Fingerprint, spacing_mm: Triple) -> tuple[tuple[int, int, int], Reason]:
    """Canonical axes in plan order: the coarsest first, the others as they were; unchanged for 2D datasets."""
    decision = "axis order"
    if fingerprint.dimension == 2:
        flat = Reason(decision=decision, rule="2D images keep their axes", inputs="", outcome="0, 1, 2")
        return (0, 1, 2), flat
    first = spacing_mm.index(max(spacing_mm))
    second, third = (axis for axis in range(3) if axis != first)
    reason = Reason(
        decision=decision,
        rule="the coarsest axis comes first, so that 2D slices lie in the plane of best resolution",
        inputs=f"target spacing {by(spacing_mm)} mm",
        outcome=f"{first}, {second}, {third}",
    )
    return (first, second, third), reason


def median_shape(fingerprint: Fingerprint, spacing_mm: Triple) -> Triple:
    """Median over the cases of their shape at `spacing_mm` in voxels, canonical axis order; can end in .5."""
    spacings = np.array([case.spacing_mm for case in fingerprint.cases])
    shapes = np.array([case.shape for case in fingerprint.cases])
    resampled = np.round(spacings / np.array(spacing_mm) * shapes).clip(1)
    if fingerprint.dimension == 2:
        resampled[:, 0] = 1
    z, y, x = np.median(resampled, axis=0).tolist()
    return z, y, x
