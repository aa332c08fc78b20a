"""Cross-validation folds: deterministic, whole patients together, a test set that training never sees.

Without groups the folds are those of nnU-Net: KFold(5, shuffle, seed 12345) over the sorted case identifiers.
Where cases come or go later, those that stay keep their fold (`mended`): new ones are shared out, nothing is shuffled.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from autoseg.records import SCHEMA_VERSION, AutosegError, problems, record
from autoseg.schema import Fold

SEED = 12345
FOLDS = 5
SHOWN = 5
"""How many cases are named before they are counted."""
GIVEN = "take them out of its folds, or put their images and labels back into the dataset"
"""What to do about cases that only a splits file knows, which somebody wrote."""


@record
class Splits:
    """All folds, and the cases of the locked test set, which are in none of them."""

    schema_version: int = SCHEMA_VERSION
    folds: tuple[Fold, ...]
    test: tuple[str, ...] = ()
    group_by: str | None = None
    test_fraction: float | None = None
    """What was asked for when the folds were made; None where others made them."""

    def every(self) -> tuple[str, ...]:
        """All cases, those of the test set included, sorted."""
        return tuple(sorted({case for fold in self.folds for case in (*fold.train, *fold.val)} | set(self.test)))

    def shares_out(self) -> bool:
        """Whether every case but those of the test set is held out by one fold and learnt by the others."""
        held = sorted(case for fold in self.folds for case in fold.val)
        parts = [sorted((*fold.train, *fold.val)) for fold in self.folds]
        return len(parts) > 1 and all(part == held for part in parts) and len(set(held)) == len(held)

    def fold(self, fold: int | str) -> Fold:
        """Fold `fold`, or everything on both sides for `all`. Raises AutosegError for a fold that does not exist."""
        if fold == "all":
            cases = tuple(sorted({case for entry in self.folds for case in (*entry.train, *entry.val)}))
            return Fold(train=cases, val=cases)
        if not isinstance(fold, int) or not 0 <= fold < len(self.folds):
            raise AutosegError(f"there is no fold {fold}; choose 0 to {len(self.folds) - 1}, or `all`")
        return self.folds[fold]


def kfold(items: Sequence[str], folds: int, seed: int = SEED) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """(rest, held out) for each fold of the shuffled items; equal to scikit-learn's KFold with the same seed."""
    order = np.arange(len(items))
    # The legacy stream, since only it gives the peer's folds.
    np.random.RandomState(seed).shuffle(order)
    parts = np.array_split(order, folds)
    return [
        (
            tuple(items[i] for i in range(len(items)) if i not in held),
            tuple(items[i] for i in sorted(held)),
        )
        for held in (set(part.tolist()) for part in parts)
    ]


def groups_of(cases: Sequence[str], pattern: str | None) -> dict[str, list[str]]:
    """Group name -> cases. The group is what the pattern's first parentheses match, or the whole match.

    Raises AutosegError for a broken pattern and for cases that it does not match.
    """
    if pattern is None:
        return {case: [case] for case in sorted(cases)}
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise AutosegError(f"--group-by {pattern!r} is no valid regular expression: {error}") from None
    groups: dict[str, list[str]] = {}
    missed = []
    for case in sorted(cases):
        match = regex.search(case)
        if match is None:
            missed.append(case)
        else:
            groups.setdefault(match[1] if regex.groups else match[0], []).append(case)
    if missed:
        raise AutosegError(f"--group-by {pattern!r} does not match {len(missed)} cases, for example {missed[0]}")
    return groups


def make_splits(cases: Sequence[str], *, group_by: str | None = None, test_fraction: float = 0.0) -> Splits:
    """Split `cases` into at most five folds of whole groups, after setting whole groups aside for testing.

    test_fraction: share of the groups, rounded, at least one where it is above 0.
    """
    if not 0 <= test_fraction < 1:
        raise AutosegError(f"--test-fraction must be at least 0 and below 1, got {test_fraction}")
    groups = groups_of(cases, group_by)
    names = sorted(groups)
    locked: list[str] = []
    if test_fraction:
        count = max(1, round(test_fraction * len(names)))
        locked = sorted(np.random.default_rng(SEED).permutation(names)[:count].tolist())
        names = [name for name in names if name not in locked]
    if len(names) < 2:
        raise AutosegError(
            f"cross-validation needs at least 2 {'groups' if group_by else 'cases'}"
            f"{' beside the test set' if locked else ''}, found {len(names)}; add cases"
            f"{' or lower --test-fraction' if locked else ''}"
        )
    folds = tuple(
        Fold(train=_members(rest, groups), val=_members(held, groups))
        for rest, held in kfold(names, min(FOLDS, len(names)))
    )
    splits = Splits(folds=folds, test=_members(locked, groups), group_by=group_by, test_fraction=test_fraction)
    check_splits(splits, cases, "the folds made here")
    return splits


def _members(names: Sequence[str], groups: dict[str, list[str]]) -> tuple[str, ...]:
    return tuple(sorted(case for name in names for case in groups[name]))


def mended(splits: Splits, cases: Sequence[str]) -> tuple[Splits, tuple[str, ...]]:
    """The splits for a dataset that has `cases` now, and in a line each what has changed.

    Cases that are gone leave their folds, and a fold that held out nothing else goes too. New cases are shared out
    where all others are (else they stay outside): to the fold of their group, or to the test set if that has it, and a
    new group is held out by the fold that holds out fewest cases. Raises AutosegError if fewer than two folds are left.
    """
    before, now = set(splits.every()), set(cases)
    gone, new = sorted(before - now), sorted(now - before)
    said = []
    if gone:
        said.append(f"no longer in the dataset, and taken out: {_few(gone)}")
    held = [[case for case in fold.val if case in now] for fold in splits.folds]
    test = [case for case in splits.test if case in now]
    if new and splits.shares_out():
        members = groups_of(sorted(before | now), splits.group_by)
        for group in [set(own) for own in members.values()]:
            if not (fresh := sorted(group & set(new))):
                continue
            number = next((n for n, fold in enumerate(splits.folds) if group & set(fold.val)), None)
            if group & set(splits.test):
                test += fresh
                said.append(f"new, of a patient in the locked test set, and put there: {_few(fresh)}")
                continue
            if number is None:
                number = min(range(len(held)), key=lambda n: len(held[n]))
            held[number] += fresh
            said.append(f"new, and held out by fold {number}: {_few(fresh)}")
        inside = {case for part in held for case in part}
        folds = [Fold(train=tuple(sorted(inside - set(part))), val=tuple(sorted(part))) for part in held]
    else:
        trained = [tuple(case for case in fold.train if case in now) for fold in splits.folds]
        folds = [Fold(train=train, val=tuple(val)) for train, val in zip(trained, held)]
    left = [number for number, fold in enumerate(folds) if fold.val]
    for number in sorted(set(range(len(folds))) - set(left)):
        said.append(f"fold {number} held out nothing else and is gone; those after it count one less")
    if splits.shares_out() and len(left) < 2:
        raise AutosegError(f"{len(left)} folds are left without {_few(gone)}; cross-validation needs 2: add cases")
    return replace(splits, folds=tuple(folds[n] for n in left), test=tuple(sorted(test))), tuple(said)


def _few(cases: Sequence[str]) -> str:
    return ", ".join(cases[:SHOWN]) + (f" and {len(cases) - SHOWN} more" if len(cases) > SHOWN else "")


def check_splits(splits: Splits, cases: Sequence[str], source: str, cure: str = GIVEN) -> None:
    """Raise AutosegError that lists every leak: a case or group on both sides, a test case in a fold, unknown cases.

    cure: what to do about cases that the dataset does not have.
    """
    complaints = []
    known = set(cases)
    group = {case: name for name, members in groups_of(list(known), splits.group_by).items() for case in members}
    test_groups = {group[case] for case in splits.test if case in known}
    if unknown := sorted(set(splits.every()) - known - set(splits.test)):
        raise AutosegError(f"{source} names cases that the dataset does not have: {_few(unknown)}; {cure}")
    for number, fold in enumerate(splits.folds):
        sides = [{group[case] for case in side if case in known} for side in (fold.train, fold.val)]
        if not all(sides):
            complaints.append(f"fold {number} has no {'training' if not sides[0] else 'validation'} case")
        if both := sorted(sides[0] & sides[1]):
            complaints.append(f"fold {number} has {both[0]} in training and in validation")
        if leaked := sorted((sides[0] | sides[1]) & test_groups):
            complaints.append(f"fold {number} uses {leaked[0]}, which is in the locked test set")
    if complaints:
        raise AutosegError(f"{source}: " + "; ".join(complaints))


def read_splits(path: Path, cases: Sequence[str], group_by: str | None = None, cure: str = GIVEN) -> Splits:
    """Read and check a splits file: ours, or nnU-Net's list of {train, val}.

    `group_by` is checked against it where given; `cure` as for `check_splits`. Raises AutosegError.
    """
    splits = load_splits(path)
    if group_by is not None:
        splits = replace(splits, group_by=group_by)
    check_splits(splits, cases, str(path), cure)
    return splits


def load_splits(path: Path) -> Splits:
    """Read a splits file without looking at what it says of which cases. Raises AutosegError if it is none."""
    try:
        content = json.loads(path.read_text())
        if isinstance(content, list):
            content = {"folds": content}
        return TypeAdapter(Splits).validate_python(content)
    except ValidationError as error:
        raise AutosegError(f"{path} is no valid splits file:\n{problems(error)}") from None
    except ValueError as error:
        raise AutosegError(f"{path} is no valid JSON: {error}") from None
