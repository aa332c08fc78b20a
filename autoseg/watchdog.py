"""Names a class that the network does not predict, and why: counts of what training has shown, and a diagnosis.

What every training batch shows is counted where it lies, one histogram of its labels a step; the counts are part of
each checkpoint. A class whose pseudo-Dice has been 0 or undefined for `PATIENCE` epochs is named in one line, with the
first cause that holds and its cure. What was said is in metrics.jsonl, so that it is said once.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autoseg.labels import Labels
from autoseg.rates import by_validation_loss
from autoseg.records import record
from autoseg.sampling import Sampler
from autoseg.schema import Recipe
from autoseg.settings import parse_sum

PATIENCE = 5
"""Epochs without a prediction after which a class is named."""
SOONEST = (0.1, 1000)
"""Nothing is said before so much of the training is done, or so many steps: small classes come late."""
RARE_PATCHES = 0.05
"""Share of the patches below which a class is shown too seldom."""
RARE_VOXELS = 0.001
"""Share of the voxels below which a loss that sums over voxels hardly sees a class."""
BLIND = {"ce", "bce"}
"""Losses in which every voxel counts the same."""


@record
class Shown:
    """What the batches of training have shown so far, those of skipped steps included."""

    patches: int = 0
    voxels: int = 0
    """Ignored ones left out."""
    patches_with: tuple[int, ...] = ()
    """Patches that hold a voxel of each class but the background."""
    voxels_of: tuple[int, ...] = ()

    def plus(self, counts: Tensor) -> "Shown":
        """With `counts` added, (2, classes with background): see `count_shown`."""
        (patches, *with_), (voxels, *of) = counts.tolist()
        return Shown(
            patches=self.patches + patches,
            voxels=self.voxels + voxels,
            patches_with=tuple(a + b for a, b in zip(self.patches_with or [0] * len(with_), with_)),
            voxels_of=tuple(a + b for a, b in zip(self.voxels_of or [0] * len(of), of)),
        )


def count_shown(target: Tensor, labels: Labels) -> Tensor:
    """Of a batch of label maps (B, ...): patches that hold each class and its voxels, (2, classes) int64.

    In place of the background's: all patches, all voxels that are not ignored. On the device of `target`.
    """
    # One after the other: no copy of the batch, and three times as fast as one histogram with shifted labels.
    found = torch.stack([torch.bincount(sample.flatten(), minlength=len(labels.known)) for sample in target])
    of_classes = found[:, 1 : len(labels.stored)]
    if not labels.exclusive:
        of_classes = torch.stack([torch.stack([found[:, index] for index in own]).sum(0) for own in labels.members], 1)
    columns = torch.cat([found[:, : labels.ignored].sum(1, keepdim=True), of_classes], 1)
    present = columns > 0
    present[:, 0] = True
    return torch.stack([present.sum(0), columns.sum(0)])


CAUSES: Mapping[str, str] = {
    "in no case": "no training case of the fold holds it, as the plan prepares them: give folds in which some do "
    "(splits.json in the raw dataset folder), train `all`, or see whether --crop cut it away",
    "skipped": "{skipped} of {steps} steps were skipped because the loss was not finite; see bad_steps.jsonl",
    "never shown": "{cases} training cases hold it, but no patch showed it; in a new run (--run NAME): {oftener}",
    "few voxels": "loss {loss} hardly sees so few; in a new run (--run NAME): --loss dice_ce, tversky or weighted_ce",
    "seldom shown": "it is shown too seldom; in a new run (--run NAME): {oftener}",
    "not learnt": "it is shown often enough: it may need more steps, or the images may not tell it; look at them with "
    "autoseg overlay",
}
"""Why a class may not be predicted, and what to do."""
OFTENER = {
    "default": "--set patch_position=balanced for a class of few cases, components for small parts, or a larger "
    "foreground_fraction",
    "balanced": "--set patch_position=components for small parts, or a larger foreground_fraction",
    "components": "--set patch_position=balanced for a class of few cases, or a larger foreground_fraction",
}
"""By patch position: what shows a class more often."""


def silent_classes(lines: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Those of the classes `names` that the last `PATIENCE` of `lines` (of metrics.jsonl, oldest first) all lack.

    None where there are fewer lines, or where nothing is to be said yet.
    """
    last = lines[-PATIENCE:]
    if len(last) < PATIENCE or (last[-1]["progress"] < SOONEST[0] and last[-1]["step"] < SOONEST[1]):
        return []
    return [name for name in names if not any(line["pseudo_dice"].get(name) for line in last)]


def watch(
    lines: Sequence[Mapping[str, Any]], shown: Shown, labels: Labels, recipe: Recipe, training: Sampler, judged: Sampler
) -> list[dict[str, str]]:
    """For each class that is not predicted: its `name`, a key of CAUSES as `cause`, and `said`, a line for people.

    lines: those of metrics.jsonl, that of the epoch which ends included; what they say is not said again. judged: what
    the pseudo-Dice is taken from; a class that none of its cases holds, or none of the patches that a recipe goes by,
    cannot be judged, and is left out unless training lacks it too.
    """
    names = labels.names[1:]
    if not (silent := silent_classes(lines, names)):
        return []
    known = {(one["name"], one["cause"]) for line in lines for one in line.get("silent", ())}
    steps, skipped = lines[-1]["step"], lines[-1]["skipped_steps"]
    found = []
    for index, name in enumerate(names, start=1):
        cases = len(training.holding.get(index, ()))
        if name not in silent or (cases and index not in judged.holding):
            continue
        patches, voxels = (counts[index - 1] if counts else 0 for counts in (shown.patches_with, shown.voxels_of))
        # Where all epochs look at the same patches, a class that none of them holds is undefined for ever.
        if patches and all(line["pseudo_dice"].get(name) is None for line in lines) and by_validation_loss(recipe):
            continue
        share = voxels / max(shown.voxels, 1)
        cause = "not learnt"
        if not cases:
            cause = "in no case"
        elif skipped > steps / 2:
            cause = "skipped"
        elif not patches:
            cause = "never shown"
        elif share < RARE_VOXELS and {term for _, term, _ in parse_sum(recipe.loss)} <= BLIND:
            cause = "few voxels"
        elif patches < RARE_PATCHES * shown.patches:
            cause = "seldom shown"
        if (name, cause) in known:
            continue
        oftener = OFTENER.get(recipe.patch_position, "--set patch_position=balanced or components")
        why = CAUSES[cause].format(skipped=skipped, steps=steps, cases=cases, loss=recipe.loss, oftener=oftener)
        said = (
            f"class {name} was not found in the last {PATIENCE} epochs (pseudo-Dice 0 or undefined); {patches} of "
            f"{shown.patches} training patches so far held it, {share:.2g} of all voxels: {why}"
        )
        found.append({"name": name, "cause": cause, "said": said})
    return found
