"""Post-processing: keep only the largest connected component where held-out predictions show that it helps.

The rule is nnU-Net's (Isensee et al., Nature Methods 2021). First all foreground classes together: accepted if the mean
foreground Dice rises and no class mean falls. Then, with more than one class, each class by itself in order, on top of
what was accepted: accepted if its own mean Dice rises.

Every removal takes whole components of one class, since a component of one class lies within one component of the
foreground. So each case is looked at once: the size of every component, how much of it is right, and the foreground
component it belongs to. Every Dice of every candidate rule follows from that table by arithmetic.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cc3d
import numpy as np

from autoseg.records import SCHEMA_VERSION, record
from autoseg.volume import bounding_box


@record
class Step:
    """Keep the largest component of the voxels that belong to any of `members` (class indices)."""

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

    def describe(self, names: Sequence[str] = ()) -> str:
        """The steps in words; `names` are the class names in order, background first."""
        if not self.steps:
            return "nothing: keeping only largest components raised no mean Dice"
        lines = []
        for step in self.steps:
            who = ", ".join(names[i] if i < len(names) else f"class {i}" for i in step.members)
            known = step.dice_before is not None and step.dice_after is not None
            gain = f" (mean Dice {step.dice_before:.4f} to {step.dice_after:.4f})" if known else ""
            lines.append(f"keep the largest component of {who}{gain}")
        return "; ".join(lines)


@dataclass(frozen=True, eq=False, kw_only=True)
class Components:
    """The components of one case, each within one class: four arrays (n,); and (classes,) counts of the truth."""

    owner: np.ndarray
    """Class index."""
    size: np.ndarray
    """Voxels."""
    hits: np.ndarray
    """Voxels that have the same class in the truth."""
    parent: np.ndarray
    """Which component of the whole foreground it is a part of, counted from 0."""
    truth: np.ndarray
    """True voxels of each class, background included."""


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
    alone = [step.members[0] for step in rule.steps if len(step.members) == 1]
    for step in rule.steps:
        if len(step.members) > 1:
            labels = keep_largest(labels, step.members)
    # The steps of single classes come last and do not touch each other's voxels.
    return keep_largest_each(labels, alone) if alone else labels


def fit(pairs: Iterable[tuple[np.ndarray, np.ndarray]], class_count: int) -> PostProcessing:
    """Choose the steps from held-out cases: pairs of truth and prediction, class indices (Z, Y, X) on one grid.

    `class_count` includes the background. Pairs are taken one at a time, and only their components are remembered.
    """
    return choose([find_components(truth, prediction, class_count) for truth, prediction in pairs], class_count)


def find_components(truth: np.ndarray, prediction: np.ndarray, class_count: int) -> Components:
    """Take the measure of every component of a prediction; both arrays are class indices (Z, Y, X) on one grid.

    Raises ValueError if they differ in shape.
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
        hits=np.bincount(component[truth[inside] == predicted], minlength=count),
        parent=parent,
        truth=np.bincount(truth.ravel(), minlength=class_count),
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
        both = np.bincount(owner, weights=case.size[keep], minlength=class_count) + case.truth
        total += 2 * hits / np.maximum(both, 1)
        defined += both > 0
    defined[0] = 0
    return np.divide(total, defined, out=np.full(class_count, np.nan), where=defined > 0)


def _mean(values: np.ndarray) -> float | None:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else None


def _rises(before: float | None, after: float | None) -> bool:
    return before is not None and after is not None and after > before
