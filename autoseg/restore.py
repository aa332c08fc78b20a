"""restore(): the exact way back from what a network says of a prepared case to its file, by the case's `Trace`.

It undoes in reverse what `preprocess.prepare` did to the axes: resample -> plan order -> crops and slices -> crop to
content. `project` goes the same way from one stage of a cascade to the next.
"""

from collections.abc import Sequence

import numpy as np

from autoseg.labels import Labels
from autoseg.records import record
from autoseg.resample import resample_argmax, resample_labels, resample_logits
from autoseg.schema import Configuration, Orientation, Resampling
from autoseg.volume import Box, Grid, canonical_axes, canonical_grid, cut, paste


@record
class Trace:
    """All that leads from a prepared case back to its file. `axis_order`, `spacing_mm` and `shape` as in the plan.

    `crop` is a box of the canonical grid, and reaches outside of it where the case was padded.
    """

    case: str
    stored: Grid
    crop: Box
    axis_order: tuple[int, int, int]
    orientation: Orientation = "canonical"
    spacing_mm: tuple[float, float, float]
    shape: tuple[int, int, int]
    thin: tuple[int, int, int] = (1, 1, 1)
    """So many voxels of the canonical grid, counted from the start of `crop`, became one (see `Preparation.thin`)."""
    content: Box | None = None
    """Where some did: the box of the canonical grid that was there to make them of; the last ones may lack some."""

    @property
    def cropped_shape(self) -> tuple[int, int, int]:
        """Shape after the crop and before resampling, in plan order."""
        return tuple(self.crop.shape[axis] // self.thin[axis] for axis in self.axes[0])  # type: ignore[return-value]

    @property
    def original_spacing_mm(self) -> tuple[float, float, float]:
        """Spacing before resampling, in plan order."""
        spacing = canonical_grid(self.stored).spacing_mm
        return tuple(spacing[axis] * self.thin[axis] for axis in self.axes[0])  # type: ignore[return-value]

    @property
    def covered(self) -> Box:
        """The box of the canonical grid that predictions are for."""
        inside = self.crop.within(canonical_grid(self.stored).shape)
        return inside if self.content is None else inside.shared(self.content)

    @property
    def axes(self) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        """See `plan_axes`."""
        return plan_axes(self.stored, self.orientation, self.axis_order)


def plan_axes(
    stored: Grid, orientation: Orientation, axis_order: Sequence[int]
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """How a canonical array of a case gets to plan order: (order, flips).

    Plan axis i is canonical axis order[i], reversed where flips[i]. 2D images are never turned.
    """
    order, flips = (0, 1, 2), (False, False, False)
    if orientation == "file":
        back, reversed_ = canonical_axes(stored)
        order = (back.index(0), back.index(1), back.index(2))
        flips = (reversed_[order[0]], reversed_[order[1]], reversed_[order[2]])
    elif orientation == "ras" and stored.dimension == 3:
        flips = (False, True, True)
    return tuple(order[axis] for axis in axis_order), tuple(flips[axis] for axis in axis_order)


def turn(array: np.ndarray, axes: tuple[tuple[int, ...], tuple[bool, ...]]) -> np.ndarray:
    """The trailing canonical axes of `array` in plan order; contiguous."""
    order, flips = axes
    lead = array.ndim - 3
    moved = array.transpose(*range(lead), *(lead + axis for axis in order))
    return np.ascontiguousarray(np.flip(moved, tuple(lead + axis for axis, flip in enumerate(flips) if flip)))


def restore(logits: np.ndarray, trace: Trace, labels: Labels, configuration: Configuration) -> np.ndarray:
    """Inverse of `prepare` for logits (K, Z, Y, X): label map int16 on the file's canonical grid, background outside.

    The logits are resampled, not the labels, and one class at a time, so that memory does not grow with the classes.
    """
    current, original = trace.spacing_mm, trace.original_spacing_mm
    indices = _decode(logits, current, original, trace.cropped_shape, labels, configuration.resampling)
    return _uncrop(indices, trace, 0)


def project(
    logits: np.ndarray, trace: Trace, onto: Trace, labels: Labels, configuration: Configuration, later: Configuration
) -> np.ndarray:
    """Logits (K, Z, Y, X) of one configuration -> label map int16 on the prepared grid `onto` of the stage `later`.

    What the next stage of a cascade reads. Both are the same case, so both have the same crop. By `later.prior` the
    logits are resampled, by the rules of their own stage, or the labels that `restore` makes of them, as labels and by
    the rules of the later stage. There what is outside the image content counts as background; nnU-Net gives it a label
    of its own, which can tell at the rim of the content where a class reaches it.
    """
    if later.prior == "labels":
        indices = restore(logits, trace, labels, configuration)
        cropped = cut(indices, onto.crop, 0)
        for axis, factor in enumerate(onto.thin):
            cropped = labels.union(cropped, range(0, cropped.shape[axis], factor), axis) if factor > 1 else cropped
        cropped = turn(cropped, onto.axes)
        return resample_labels(cropped, onto.original_spacing_mm, onto.spacing_mm, onto.shape, later.resampling)
    return _decode(logits, trace.spacing_mm, onto.spacing_mm, onto.shape, labels, configuration.resampling)


def _decode(
    logits: np.ndarray,
    current_mm: Sequence[float],
    target_mm: Sequence[float],
    shape: Sequence[int],
    labels: Labels,
    rules: Resampling,
) -> np.ndarray:
    """Resampled logits -> label map, a head at a time."""
    if labels.exclusive:
        return resample_argmax(logits, current_mm, target_mm, shape, rules)
    heads = (resample_logits(logit[None], current_mm, target_mm, shape, rules)[0] for logit in logits)
    return labels.decode(heads).astype(np.int16)


def restore_probabilities(logits: np.ndarray, trace: Trace, labels: Labels, configuration: Configuration) -> np.ndarray:
    """As `restore`, but float32 probabilities (K, Z, Y, X); outside the crop the background is certain."""
    current, original = trace.spacing_mm, trace.original_spacing_mm
    resampled = resample_logits(logits, current, original, trace.cropped_shape, configuration.resampling)
    probabilities = _uncrop(labels.probabilities(resampled).astype(np.float32), trace, 0)
    if labels.exclusive:
        outside = np.ones(probabilities.shape[1:], bool)
        outside[trace.covered.slices()] = False
        probabilities[0][outside] = 1
    return probabilities


def _uncrop(array: np.ndarray, trace: Trace, fill: float) -> np.ndarray:
    """Trailing axes from cropped plan order back to the whole canonical grid."""
    order, flips = trace.axes
    lead = array.ndim - 3
    array = np.flip(array, tuple(lead + axis for axis, flip in enumerate(flips) if flip))
    back = array.transpose(*range(lead), *(lead + order.index(axis) for axis in range(3)))
    covered = trace.covered
    box = covered.moved(tuple(-a for a in trace.crop.start))
    for axis, factor in enumerate(trace.thin):
        first, last = box.start[axis], box.stop[axis]
        if factor > 1:
            back = back.take(np.arange(first, last) // factor, lead + axis)
        else:
            back = back[(*[slice(None)] * (lead + axis), slice(first, last))]
    return paste(back, covered, canonical_grid(trace.stored).shape, fill)
