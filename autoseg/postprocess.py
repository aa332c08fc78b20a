"""Post-processing: keep only the largest connected component where held-out predictions show that it helps.

The rule is nnU-Net's (Isensee et al., Nature Methods 2021). First all foreground classes together: accepted if the mean
foreground Dice rises and no class mean falls. Then, with more than one class, each class by itself in order, on top of
what was accepted: accepted if its own mean Dice rises.

Every removal takes whole components of one class, since a component of one class lies within one component of the
foreground. So each case is looked at once: the size of every component, how much of it is right, and the foreground
component it belongs to. Every Dice of every candidate rule follows from that table by arithmetic.

Regions overlap, and what is removed from one is removed from those within: there each candidate rule is tried on the
predictions themselves, and is accepted only if no other region's mean falls.

Ignored voxels count for the size of a component, since prediction does not know them, and for no Dice.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import cc3d
import numpy as np

from autoseg.labels import Labels
from autoseg.records import SCHEMA_VERSION, record
from autoseg.volume import bounding_box


@record
class Step:
    """Keep the largest component of the voxels that belong to any of `members` (indices of a label map)."""

    members: tuple[int, ...]
    dice_before: float | None
    """Mean Dice of the members without and with this step; None if no case defines it."""
    dice_after: float | None


@record
class PostProcessing:
    """The steps to apply, in order, and those that were tried and turned down. `cases`: how many the fit saw."""

    schema_version: int = SCHEMA_VERSION
    cases: int
    steps: tuple[Step, ...] = ()
    rejected: tuple[Step, ...] = ()

    def describe(self, labels: Labels | None = None) -> str:
        """The steps in words, with the names of `labels` if given."""
        if not self.steps:
            return "nothing: keeping only largest components raised no mean Dice"
        lines = []
        for step in self.steps:
            who = labels.describe(step.members) if labels else ", ".join(f"class {index}" for index in step.members)
            # Steps that were fitted elsewhere come without their Dice.
            known = step.dice_before is not None and step.dice_after is not None
            gain = f" (mean Dice {step.dice_before:.4f} to {step.dice_after:.4f})" if known else ""
            lines.append(f"keep the largest component of {who}{gain}")
        return "; ".join(lines)


@dataclass(frozen=True, eq=False, kw_only=True)
class Components:
    """The components of one case, each within one class: five arrays (n,); and two (classes,) of the truth."""

    owner: np.ndarray
    """Class index."""
    size: np.ndarray
    """Voxels."""
    counted: np.ndarray
    """Voxels that the truth does not ignore."""
    hits: np.ndarray
    """Voxels that have the same class in the truth."""
    parent: np.ndarray
    """Which component of the whole foreground it is a part of, counted from 0."""
    truth: np.ndarray
    """True voxels of each class, background included."""
    scored: np.ndarray
    """Whether the class was annotated."""


def keep_largest(labels: np.ndarray, members: Sequence[int]) -> np.ndarray:
    """Remove all but the largest connected component of the voxels whose class is one of `members`.

    `labels` are class indices (Z, Y, X). Returns a new array, or `labels` itself if there is nothing to remove. Voxels
    connect by faces, edges and corners (26 neighbours, 8 where Z = 1). Several largest components of one size are all
    kept; removed voxels become background.
    """
    return _remove(labels, members, together=True)


def keep_largest_each(labels: np.ndarray, members: Sequence[int]) -> np.ndarray:
    """Like `keep_largest` of each of `members` in turn, in one pass."""
    return _remove(labels, members, together=False)


def _remove(labels: np.ndarray, members: Sequence[int], together: bool) -> np.ndarray:
    box = bounding_box(labels > 0).slices()
    inner = labels[box]
    chosen = np.isin(inner, np.asarray(members))
    classes = chosen.astype(np.uint8) if together else np.where(chosen, inner, labels.dtype.type(0))
    groups, count = cc3d.connected_components(classes, connectivity=26, return_N=True)
    if count < 2:
        return labels
    size = sum(np.bincount(layer.ravel(), minlength=count + 1) for layer in groups)
    owner = np.zeros(count + 1, dtype=np.int64)
    owner[groups] = classes
    largest = np.zeros(owner.max() + 1, dtype=np.int64)
    np.maximum.at(largest, owner, size)
    small = size < largest[owner]
    small[0] = False
    if not small.any():
        return labels
    out = labels.copy()
    out[box][small[groups]] = 0
    return out


def apply(labels: np.ndarray, rule: PostProcessing) -> np.ndarray:
    """Apply the steps of `rule` to class indices (Z, Y, X); same shape and type."""
    return apply_steps(labels, [step.members for step in rule.steps])


def apply_steps(labels: np.ndarray, steps: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Keep the largest component of each of `steps`, the members of one after the other."""
    # Single indices at the end do not touch each other's voxels: one pass does for all.
    first = next((place for place in range(len(steps), 0, -1) if len(steps[place - 1]) > 1), 0)
    for members in steps[:first]:
        labels = keep_largest(labels, members)
    alone = [members[0] for members in steps[first:]]
    return keep_largest_each(labels, alone) if alone else labels


def fit(pairs: Iterable[tuple[np.ndarray, np.ndarray]], class_count: int) -> PostProcessing:
    """Choose the steps from held-out cases: pairs of truth and prediction, class indices (Z, Y, X) on one grid.

    `class_count` includes the background. Pairs are taken one at a time, and only their components are remembered.
    """
    return choose([find_components(truth, prediction, class_count) for truth, prediction in pairs], class_count)


def find_components(
    truth: np.ndarray,
    prediction: np.ndarray,
    class_count: int,
    ignored: int | None = None,
    scored: Sequence[bool] | None = None,
) -> Components:
    """Take the measure of every component of a prediction; both arrays are class indices (Z, Y, X) on one grid.

    ignored: the index of voxels of the truth that are in no Dice, not below class_count. scored: whether each class but
    the background was annotated, None: all. Raises ValueError if the arrays differ in shape.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"truth {truth.shape} and prediction {prediction.shape} differ in shape")
    of_class, count = cc3d.connected_components(prediction, connectivity=26, return_N=True)
    inside = prediction > 0
    # cc3d 4.1 fails on some thin boolean arrays (more components than it reserves room for), never on integers.
    of_foreground = cc3d.connected_components(inside.view(np.uint8), connectivity=26)
    predicted, component = prediction[inside], of_class[inside].astype(np.intp) - 1
    owner, parent = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    owner[component] = predicted
    parent[component] = of_foreground[inside].astype(np.int64) - 1
    return Components(
        owner=owner,
        size=np.bincount(component, minlength=count),
        counted=np.bincount(component if ignored is None else component[truth[inside] != ignored], minlength=count),
        hits=np.bincount(component[truth[inside] == predicted], minlength=count),
        parent=parent,
        truth=np.bincount(truth.ravel(), minlength=class_count)[:class_count],
        scored=np.asarray((False, *(scored or (True,) * (class_count - 1)))),
    )


def choose(cases: Sequence[Components], class_count: int) -> PostProcessing:
    """Choose the steps from the components of all cases.

    Dice is undefined, and left out of means, where truth and prediction are both empty. Keeping the largest component
    of one class never empties that class, but keeping that of the whole foreground can empty a class: one that was
    wrongly predicted where there is none then turns from Dice 0 to undefined. That is a gain, so a class mean that
    becomes undefined has not fallen.
    """
    kept = [np.ones(len(case.owner), dtype=bool) for case in cases]
    before = _class_means(cases, kept, class_count)
    steps, rejected = [], []

    trial = [_largest(case, keep, None) for case, keep in zip(cases, kept)]
    after = _class_means(cases, trial, class_count)
    step = Step(members=tuple(range(1, class_count)), dice_before=_mean(before), dice_after=_mean(after))
    if _rises(step.dice_before, step.dice_after) and not np.any(after < before):
        kept, before = trial, after
        steps.append(step)
    else:
        rejected.append(step)

    # With a single class the foreground is that class.
    for index in range(1, class_count) if class_count > 2 else ():
        trial = [_largest(case, keep, index) for case, keep in zip(cases, kept)]
        after = _class_means(cases, trial, class_count)
        step = Step(members=(index,), dice_before=_mean(before[[index]]), dice_after=_mean(after[[index]]))
        if _rises(step.dice_before, step.dice_after):
            kept, before = trial, after
            steps.append(step)
        else:
            rejected.append(step)
    return PostProcessing(cases=len(cases), steps=tuple(steps), rejected=tuple(rejected))


def _largest(case: Components, kept: np.ndarray, index: int | None) -> np.ndarray:
    """Which components remain of those `kept` when only the largest of class `index`, or of the foreground, does."""
    group = case.parent if index is None else np.arange(len(kept))
    mine = kept if index is None else kept & (case.owner == index)
    sizes = np.bincount(group[mine], weights=case.size[mine], minlength=len(kept))
    return kept & (~mine | (sizes[group] == sizes.max(initial=0)))


def _class_means(cases: Sequence[Components], kept: Sequence[np.ndarray], class_count: int) -> np.ndarray:
    """Mean Dice (classes,) over the cases that define it, with `kept` components only; NaN without one."""
    total, defined = np.zeros(class_count), np.zeros(class_count)
    for case, keep in zip(cases, kept):
        owner = case.owner[keep]
        hits = np.bincount(owner, weights=case.hits[keep], minlength=class_count)
        both = np.bincount(owner, weights=case.counted[keep], minlength=class_count) + case.truth
        total += np.where(case.scored, 2 * hits / np.maximum(both, 1), 0)
        defined += case.scored & (both > 0)
    return np.divide(total, defined, out=np.full(class_count, np.nan), where=defined > 0)


Measure = Callable[[Sequence[tuple[int, ...]]], Sequence[np.ndarray]]
"""The members of steps -> the Dice of every region in every case once they are applied, see `region_dice`."""


def choose_for_regions(measure: Measure, regions: Sequence[tuple[int, ...]]) -> PostProcessing:
    """Choose the steps for overlapping regions, given the members of each; `measure` tries steps on all cases.

    The whole foreground first, then every region in order: accepted if the mean Dice (of all regions, of this one)
    rises and that of no region falls.
    """
    foreground = tuple(sorted({index for region in regions for index in region}))
    steps: list[Step] = []
    rejected: list[Step] = []
    cases = measure(())
    before = _means(cases)
    for number, members in enumerate((foreground, *regions)):
        if number > 0 and set(members) == set(foreground):
            continue
        after = _means(measure([*(step.members for step in steps), members]))
        own = slice(None) if number == 0 else slice(number - 1, number)
        step = Step(members=members, dice_before=_mean(before[own]), dice_after=_mean(after[own]))
        if _rises(step.dice_before, step.dice_after) and not np.any(after < before):
            before = after
            steps.append(step)
        else:
            rejected.append(step)
    return PostProcessing(cases=len(cases), steps=tuple(steps), rejected=tuple(rejected))


def region_dice(
    truth: np.ndarray, prediction: np.ndarray, labels: Labels, scored: Sequence[bool] | None = None
) -> np.ndarray:
    """Dice of each region (R,) of two label maps; NaN where both are empty or the region was not annotated."""
    if labels.ignored is not None:
        prediction = np.where(truth == labels.ignored, 0, prediction)
    dice = np.full(len(labels.members), np.nan)
    for number, members in enumerate(labels.members):
        true, found = np.isin(truth, members), np.isin(prediction, members)
        both = np.count_nonzero(true) + np.count_nonzero(found)
        if both and (scored is None or scored[number]):
            dice[number] = 2 * np.count_nonzero(true & found) / both
    return dice


def _means(cases: Sequence[np.ndarray]) -> np.ndarray:
    """Mean of each column over the cases that define it, NaN without one."""
    table = np.stack(cases)
    defined = (~np.isnan(table)).sum(0)
    return np.divide(np.nansum(table, 0), defined, out=np.full(table.shape[1], np.nan), where=defined > 0)


def _mean(values: np.ndarray) -> float | None:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else None


def _rises(before: float | None, after: float | None) -> bool:
    return before is not None and after is not None and after > before
