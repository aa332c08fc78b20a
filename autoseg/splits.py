"""Cross-validation folds: deterministic, whole patients together, a test set that training never sees.

Without groups the folds are those of nnU-Net: KFold(5, shuffle, seed 12345) over the sorted case identifiers.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from autoseg.records import SCHEMA_VERSION, AutosegError, problems, record
from autoseg.schema import Fold

SEED = 12345
FOLDS = 5


@record
class Splits:
    """All folds, and the cases of the locked test set, which are in none of them."""

    schema_version: int = SCHEMA_VERSION
    folds: tuple[Fold, ...]
    test: tuple[str, ...] = ()
    group_by: str | None = None

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
            f"cross-validation needs at least 2 {'groups' if group_by else 'cases'} beside the test set, "
            f"found {len(names)}; add cases or lower --test-fraction"
        )
    folds = tuple(
        Fold(train=_members(rest, groups), val=_members(held, groups))
        for rest, held in kfold(names, min(FOLDS, len(names)))
    )
    splits = Splits(folds=folds, test=_members(locked, groups), group_by=group_by)
    check_splits(splits, cases, "the folds made here")
    return splits


def _members(names: Sequence[str], groups: dict[str, list[str]]) -> tuple[str, ...]:
    return tuple(sorted(case for name in names for case in groups[name]))


def check_splits(splits: Splits, cases: Sequence[str], source: str) -> None:
    """Raise AutosegError that lists every leak: a case or group on both sides, a test case in a fold, unknown cases."""
    complaints = []
    known = set(cases)
    group = {case: name for name, members in groups_of(list(known), splits.group_by).items() for case in members}
    test_groups = {group[case] for case in splits.test if case in known}
    for number, fold in enumerate(splits.folds):
        unknown = sorted((set(fold.train) | set(fold.val)) - known)
        if unknown:
            complaints.append(f"fold {number} names unknown cases, for example {unknown[0]}")
        sides = [{group[case] for case in side if case in known} for side in (fold.train, fold.val)]
        if not all(sides):
            complaints.append(f"fold {number} has no {'training' if not sides[0] else 'validation'} case")
        if both := sorted(sides[0] & sides[1]):
            complaints.append(f"fold {number} has {both[0]} in training and in validation")
        if leaked := sorted((sides[0] | sides[1]) & test_groups):
            complaints.append(f"fold {number} uses {leaked[0]}, which is in the locked test set")
    if complaints:
        raise AutosegError(f"{source}: " + "; ".join(complaints))


def read_splits(path: Path, cases: Sequence[str], group_by: str | None = None) -> Splits:
    """Read and check a splits file: ours, or nnU-Net's list of {train, val}.

    `group_by` is checked against it where given. Raises AutosegError that says what is wrong with it.
    """
    try:
        content = json.loads(path.read_text())
        if isinstance(content, list):
            content = {"folds": content}
        splits = TypeAdapter(Splits).validate_python(content)
    except ValidationError as error:
        raise AutosegError(f"{path} is no valid splits file:\n{problems(error)}") from None
    except ValueError as error:
        raise AutosegError(f"{path} is no valid JSON: {error}") from None
    if group_by is not None:
        splits = Splits(folds=splits.folds, test=splits.test, group_by=group_by)
    check_splits(splits, cases, str(path))
    return splits
