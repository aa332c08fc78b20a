"""The steps of post-processing: each is a named change of a label map, in physical units, that a table describes.

Steps that remove (`largest`, `islands`) take whole components of the union of their members and make them background.
Steps that fill (`holes`, `closing`) take background voxels alone, so no other class is ever overwritten; where a step
has several members, a filled voxel gets the class of the nearest of them, of equally near ones the first.

Components connect by faces, edges and corners (26 neighbours, 8 where Z = 1), holes by faces, as the complement must.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import cc3d
import numpy as np
from scipy.spatial import cKDTree

from autoseg.evaluation.metrics import surface
from autoseg.labels import Labels
from autoseg.records import SCHEMA_VERSION, AutosegError, record
from autoseg.volume import Box, bounding_box

MOST_REACH = 50
"""Voxels that a closing may reach along an axis: a step from a file must not ask for endless work."""
ROUNDING = 1e-6
"""Sizes and distances that differ by this share are equal: products of spacings carry rounding errors."""

KINDS = {
    "largest": "keep the largest component of {who}",
    "islands": "remove components of {who} below {below_mm3:g} mm3",
    "holes": "fill holes of {who}",
    "closing": "close gaps of {who} with a radius of {radius_mm:g} mm",
}
"""Kind of step -> what it does, in words. The fields named there are its parameters."""
REMOVING = ("largest", "islands")


@record
class Step:
    """One step: what is done to the voxels of `members` (indices of a label map), and what it was measured to do."""

    kind: Literal["largest", "islands", "holes", "closing"] = "largest"
    members: tuple[int, ...]
    below_mm3: float | None = None
    """Of `islands`: components of a smaller volume go. In 2D images the volume of a voxel is area times 1 mm."""
    radius_mm: float | None = None
    """Of `closing`: the radius of the ball, in 2D images of the disc."""
    dice_before: float | None = None
    """Mean Dice of the members without and with this step; None if no case defines it."""
    dice_after: float | None = None
    bound: float | None = None
    """One-sided lower bound of the gain by a paired bootstrap over cases; None if there was no gain to test."""
    level: float | None = None
    """The probability that `bound` leaves to chance."""
    verdict: str = ""
    """Of a step that was turned down: why."""

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("a step needs members")
        for name in ("below_mm3", "radius_mm"):
            value = getattr(self, name)
            if (value is not None) != (f"{{{name}:g}}" in KINDS[self.kind]):
                raise ValueError(f"a step of the kind {self.kind!r} {'needs' if value is None else 'has no'} {name}")
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, found {value}")

    @property
    def action(self) -> tuple[object, ...]:
        """What is done, without what it was measured to do."""
        return self.kind, self.members, self.below_mm3, self.radius_mm

    def describe(self, labels: Labels | None = None) -> str:
        """The step in words, with the names of `labels` if given."""
        who = labels.describe(self.members) if labels else ", ".join(f"class {index}" for index in self.members)
        return KINDS[self.kind].format(who=who, below_mm3=self.below_mm3, radius_mm=self.radius_mm)


@record
class PostProcessing:
    """The steps to apply, in order, and those that were tried and turned down. `cases`: how many the search saw."""

    schema_version: int = SCHEMA_VERSION
    cases: int
    steps: tuple[Step, ...] = ()
    rejected: tuple[Step, ...] = ()
    dice: tuple[float | None, ...] = ()
    """Mean Dice of each class but the background in these cases, as predicted; None if no case defines it."""
    dice_processed: tuple[float | None, ...] = ()
    """The same after the steps: of the cases that they were chosen on, so it flatters them."""
    dice_crossfitted: tuple[float | None, ...] = ()
    """The same where each case is processed by what the search chooses without it; empty for too few cases."""

    def describe(self, labels: Labels | None = None) -> str:
        """The steps in words, with the names of `labels` if given."""
        if not self.steps:
            few = any(step.verdict == "too few cases" for step in self.rejected)
            tried = any(step.verdict for step in self.rejected) or not self.rejected
            return "nothing: " + (
                f"{self.cases} cases are too few to tell a gain from chance"
                if few
                else "no step has raised the mean Dice beyond chance"
                if tried
                else "keeping only largest components raised no mean Dice"
            )
        lines = []
        for step in self.steps:
            # Steps that were fitted elsewhere come without their Dice.
            known = step.dice_before is not None and step.dice_after is not None
            gain = f" (mean Dice {step.dice_before:.4f} to {step.dice_after:.4f})" if known else ""
            lines.append(f"{step.describe(labels)}{gain}")
        return "; ".join(lines)


def apply(labels: np.ndarray, rule: PostProcessing, spacing_mm: Sequence[float]) -> np.ndarray:
    """Apply the steps of `rule` to class indices (Z, Y, X) with voxels of `spacing_mm` (Z, Y, X); see `apply_steps`.

    Those that are out of reach are left out: an image of very fine voxels is segmented without them.
    """
    left_out = out_of_reach(rule.steps, spacing_mm, labels.shape[0] == 1)
    return apply_steps(labels, [step for step in rule.steps if step not in left_out], spacing_mm)


def out_of_reach(steps: Iterable[Step], spacing_mm: Sequence[float], flat: bool) -> tuple[Step, ...]:
    """The closings among `steps` that reach over more than MOST_REACH voxels of `spacing_mm` (Z, Y, X)."""
    return tuple(
        step
        for step in steps
        if step.radius_mm is not None and max(_reach(step.radius_mm, spacing_mm, flat)) > MOST_REACH
    )


def _reach(radius_mm: float, spacing_mm: Sequence[float], flat: bool) -> list[int]:
    """Voxels that a closing reaches along each axis."""
    return [0 if flat and axis == 0 else int(radius_mm * (1 + ROUNDING) / step) for axis, step in enumerate(spacing_mm)]


def apply_steps(
    labels: np.ndarray, steps: Sequence[Step], spacing_mm: Sequence[float], flat: bool | None = None
) -> np.ndarray:
    """Apply steps one after the other to class indices (Z, Y, X), none of them negative.

    Returns a new array of the same shape and type, or `labels` itself if nothing changes. flat: whether it is a 2D
    image, whose voxels have no neighbours in Z; by default where Z = 1. Raises AutosegError for a closing that reaches
    over more than MOST_REACH voxels.
    """
    flat = labels.shape[0] == 1 if flat is None else flat
    box = bounding_box(labels > 0).slices()
    before = after = labels[box]
    for together in _passes(steps):
        if together[0].kind in REMOVING:
            after = _remove(after, together, float(np.prod(spacing_mm)))
        else:
            after = _fill(after, together[0], spacing_mm, flat)
    if after is before:
        return labels
    out = labels.copy()
    out[box] = after
    return out


def _passes(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """Steps that one pass can do: neighbours in the order that remove, and whose members have nothing in common."""
    together: list[Step] = []
    for step in steps:
        taken = {index for other in together for index in other.members}
        if together and (
            step.kind not in REMOVING or together[0].kind not in REMOVING or not taken.isdisjoint(step.members)
        ):
            yield together
            together = []
        together.append(step)
    if together:
        yield together


def _lookup(labels: np.ndarray, members: Sequence[int], value: int = 1) -> np.ndarray:
    """A table (indices,) that holds `value` at `members` and 0 elsewhere."""
    table = np.zeros(max(int(labels.max(initial=0)), *members) + 1, dtype=np.uint16 if value > 255 else np.uint8)
    table[list(members)] = value
    return table


def _remove(labels: np.ndarray, steps: Sequence[Step], voxel_mm3: float) -> np.ndarray:
    of_step = _lookup(labels, [index for step in steps for index in step.members], len(steps))
    for number, step in enumerate(steps, start=1):
        of_step[list(step.members)] = number
    chosen = of_step[labels]
    components, count = cc3d.connected_components(chosen, connectivity=26, return_N=True)
    size = sum((np.bincount(layer.ravel(), minlength=count + 1) for layer in components), np.zeros(count + 1, np.int64))
    owner = np.zeros(count + 1, dtype=np.int64)
    owner[components] = chosen
    gone = np.zeros(count + 1, dtype=bool)
    for number, step in enumerate(steps, start=1):
        own = owner == number
        if step.below_mm3 is None:
            # Several largest components of one size are all kept.
            gone[own] = size[own] < size[own].max(initial=0)
        else:
            gone[own] = is_below(size[own] * voxel_mm3, step.below_mm3)
    gone[0] = False
    return np.where(gone[components], labels.dtype.type(0), labels) if gone.any() else labels


def is_below(volume_mm3: np.ndarray, below_mm3: float) -> np.ndarray:
    """Which volumes are islands below `below_mm3`; equal ones are not."""
    return volume_mm3 < below_mm3 * (1 - ROUNDING)


def _fill(labels: np.ndarray, step: Step, spacing_mm: Sequence[float], flat: bool) -> np.ndarray:
    places, values = filling(labels, step, spacing_mm, flat)
    if not len(places[0]):
        return labels
    out = labels.copy()
    out[places] = values
    return out


def filling(
    labels: np.ndarray, step: Step, spacing_mm: Sequence[float], flat: bool
) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Where a step that fills changes class indices (Z, Y, X), as three arrays (n,), and to what (n,)."""
    mask = _lookup(labels, step.members).astype(bool)[labels]
    # Neither holes nor a closing reach beyond the box that holds the mask.
    box = bounding_box(mask)
    inner, mask = labels[box.slices()], mask[box.slices()]
    full = _closed(mask, step.radius_mm, spacing_mm, flat) if step.radius_mm is not None else _filled(mask, flat)
    new = np.nonzero(full & (inner == 0))
    values = _nearest(np.where(mask, inner, 0), new, spacing_mm) if len(new[0]) else np.zeros(0, labels.dtype)
    return tuple(axis + start for axis, start in zip(new, box.start)), values


def _filled(mask: np.ndarray, flat: bool) -> np.ndarray:
    """`mask` with all that it encloses: parts of the rest, connected by faces, that do not reach the edge."""
    parts, count = cc3d.connected_components((~mask).view(np.uint8), connectivity=6, return_N=True)
    closed = np.ones(count + 1, dtype=bool)
    for axis in (1, 2) if flat else (0, 1, 2):
        for end in (0, -1):
            closed[np.unique(parts.take(end, axis))] = False
    closed[0] = True
    return closed[parts]


def _closed(mask: np.ndarray, radius_mm: float, spacing_mm: Sequence[float], flat: bool) -> np.ndarray:
    """Morphological closing with all voxels within `radius_mm`, as if the image had no edge."""
    radius = radius_mm * (1 + ROUNDING)
    reach = _reach(radius_mm, spacing_mm, flat)
    if max(reach) > MOST_REACH:
        raise AutosegError(
            f"closing with a radius of {radius_mm:g} mm reaches over {max(reach)} voxels here, and at most "
            f"{MOST_REACH} are possible; is the spacing of the image right?"
        )
    # The ball as rows of voxels along X: (z, y) -> how far the row reaches to both sides.
    rows = {}
    for z in range(-reach[0], reach[0] + 1):
        for y in range(-reach[1], reach[1] + 1):
            left = radius**2 - (z * spacing_mm[0]) ** 2 - (y * spacing_mm[1]) ** 2
            if left >= 0:
                rows[z, y] = int(left**0.5 / spacing_mm[2])
    grown = _grown(np.pad(mask, [(n, n) for n in reach]), rows)
    inner = Box(start=tuple(reach), stop=tuple(n + r for n, r in zip(mask.shape, reach)))
    closed: np.ndarray = ~_grown(~grown, rows)[inner.slices()]
    return closed


def _grown(mask: np.ndarray, rows: dict[tuple[int, int], int]) -> np.ndarray:
    """Dilation by a symmetric set of rows along X; voxels outside the array are False."""
    widths = [mask]
    for reach in range(1, max(rows.values()) + 1):
        wider = widths[-1].copy()
        wider[..., reach:] |= mask[..., :-reach]
        wider[..., :-reach] |= mask[..., reach:]
        widths.append(wider)
    out = np.zeros_like(mask)
    for (z, y), reach in rows.items():
        (to_z, from_z), (to_y, from_y) = _shift(z), _shift(y)
        out[to_z, to_y] |= widths[reach][from_z, from_y]
    return out


def _shift(by: int) -> tuple[slice, slice]:
    """Slices (to, from) of one axis that move what lies there by `by` voxels."""
    ahead, behind = slice(abs(by), None), slice(None, -abs(by) or None)
    return (ahead, behind) if by > 0 else (behind, ahead)


def _nearest(labels: np.ndarray, places: tuple[np.ndarray, ...], spacing_mm: Sequence[float]) -> np.ndarray:
    """For each of `places` the class of the nearest voxel of `labels`, of equally near ones the lowest."""
    classes = np.flatnonzero(np.bincount(labels.ravel())[1:]) + 1
    if len(classes) == 1:
        return np.full(len(places[0]), classes[0])
    edge = np.nonzero(surface(labels))
    owner, points = labels[edge], np.stack(edge, axis=1) * np.asarray(spacing_mm)
    distances = np.full((len(classes), len(places[0])), np.inf)
    for number, index in enumerate(classes):
        if len(own := points[owner == index]):
            tree = cKDTree(own, balanced_tree=False, compact_nodes=False)
            distances[number] = tree.query(np.stack(places, axis=1) * np.asarray(spacing_mm))[0]
    nearest: np.ndarray = classes[np.argmax(distances <= distances.min(0) * (1 + ROUNDING), axis=0)]
    return nearest
