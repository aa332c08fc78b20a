"""Several labels as one class: binary or multi-class training from the same label files (`--merge cartilage=1,2,3`).

A plan with merged labels knows one class in place of its parts, in sampling, loss, scores, post-processing and
prediction; labels that are not merged stay classes of their own. Label files are read as they are: each value of a part
becomes the index of the class. What is predicted is written as the smallest of its values, and a folder of such
predictions says so (see `evaluation.folders`), so that nobody scores them against the first part alone. A case counts
as annotated in a merged class only if it is in all parts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from autoseg.labels import IGNORE, UNSEEN, Labels
from autoseg.records import AutosegError
from autoseg.schema import CaseFingerprint, Fingerprint

Merges = Mapping[str, Sequence[str | int]]
"""Name of a class -> the labels that it is made of, each by name or value."""


def parse_merges(texts: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """`["cartilage=1,2,3"]` -> {"cartilage": ("1", "2", "3")}. Raises AutosegError for text of another form."""
    found: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, equals, listed = text.partition("=")
        parts = tuple(part.strip() for part in listed.split(","))
        if not equals or not name.strip() or not all(parts):
            raise AutosegError(f"--merge {text!r}: write it as NAME=LABEL,LABEL,... with names or values of labels")
        if name.strip() in found:
            raise AutosegError(f"--merge {name.strip()} is given twice; name all its labels at once")
        found[name.strip()] = parts
    return found


def merge(labels: Labels, merges: Merges) -> Labels:
    """`labels` with some of them merged; a merged class stands where the first of its parts stood.

    Raises AutosegError for a label that is not there or in two classes, for the background, ignored voxels and regions,
    and for the name of a label that is no part.
    """
    if not merges:
        return labels
    if labels.regions:
        raise AutosegError(
            "--merge is for labels that exclude each other, and these are regions, which may overlap; name one more "
            "region in dataset.json: a list of values"
        )
    inside = {name: tuple(_index(labels, part, name) for part in parts) for name, parts in merges.items()}
    owner: dict[int, str] = {}
    for name, own in inside.items():
        if len(set(own)) < 2:
            raise AutosegError(f"--merge {name}: a merged class has two labels or more")
        for index in own:
            if owner.setdefault(index, name) != name:
                raise AutosegError(f"--merge: the label {labels.names[index]!r} is in {owner[index]} and in {name}")
        if name == IGNORE or (name in labels.names and labels.names.index(name) not in own):
            raise AutosegError(f"--merge {name}: this is the name of another label; choose a new one")
    parts: dict[str, tuple[int, ...]] = {}
    for index, (name, value) in enumerate(zip(labels.names[1:], labels.values[1:]), start=1):
        taken = owner.get(index, name)
        parts[taken] = (*parts.get(taken, ()), value)
    return Labels(
        names=(labels.names[0], *parts),
        values=(labels.values[0], *map(min, parts.values())),
        ignore=labels.ignore,
        parts=tuple(tuple(sorted(own)) for own in parts.values()),
    )


def _index(labels: Labels, part: str | int, name: str) -> int:
    """The position of a label, given by its name or value."""
    listed = [*zip(labels.names, labels.values), (IGNORE, labels.ignore)]
    # A name comes first: a label may be called by a number that is the value of another.
    found = [i for i, (own, _) in enumerate(listed) if own == part] or [
        i for i, (_, value) in enumerate(listed) if str(value) == str(part)
    ]
    if found and 0 < found[0] < labels.count:
        return found[0]
    if found:
        raise AutosegError(f"--merge {name}: {part} is {listed[found[0]][0]}, which is no part of a class")
    known = ", ".join(f"{name} = {value}" for name, value in zip(labels.names[1:], labels.values[1:]))
    raise AutosegError(f"--merge {name}: there is no label {part}; there are {known}")


def is_merged(labels: Labels, finer: Labels) -> bool:
    """Whether `labels` are `finer`, of which some may be merged."""
    try:
        return merge(finer, labels.merges) == labels
    except AutosegError:
        return False


def made_of(labels: Labels, finer: Labels) -> tuple[tuple[int, ...], ...]:
    """For each class of `labels`, the background first, the classes of `finer` (positions) that were merged into it.

    Raises AutosegError if they are not `finer` merged.
    """
    if not is_merged(labels, finer):
        raise AutosegError(f"the plan has the labels {labels.scored}, which are not {finer.scored} merged; plan again")
    place = {value: index for index, value in enumerate(finer.values)}
    return ((0,), *(tuple(place[value] for value in own) for own in labels.parts))


def renumber(indices: np.ndarray, finer: Labels, labels: Labels) -> np.ndarray:
    """A label map of `finer` labels as one of `labels`, which are `finer` merged; of the same shape and type."""
    if not labels.parts:
        return indices
    # `UNSEEN` is -1 and finds the last entry.
    table = np.full(len(finer.known) + 1, UNSEEN, indices.dtype)
    for index, own in enumerate(made_of(labels, finer)):
        table[list(own)] = index
    if finer.ignored is not None:
        table[finer.ignored] = labels.ignored
    return table[indices]


def annotated_as(annotated: Mapping[str, Sequence[str]], finer: Labels, labels: Labels) -> dict[str, tuple[str, ...]]:
    """Case -> classes of `labels` that were annotated in it, from those of `finer`; of cases where not all were."""
    if not labels.parts:
        return {case: tuple(names) for case, names in annotated.items()}
    inside = dict(zip(labels.names[1:], made_of(labels, finer)[1:]))
    return {
        case: tuple(name for name, own in inside.items() if all(finer.names[index] in names for index in own))
        for case, names in annotated.items()
    }


def seen_as(fingerprint: Fingerprint, finer: Labels, labels: Labels) -> Fingerprint:
    """The fingerprint of a dataset of `finer` labels as it is with `labels`; itself if none are merged.

    Classes are counted together, and lie where their voxels lie on average.
    """
    if not labels.parts:
        return fingerprint
    inside, annotated = made_of(labels, finer), annotated_as(fingerprint.annotated(), finer, labels)

    def merged(case: CaseFingerprint) -> CaseFingerprint:
        counts, places = case.voxels, case.across
        if counts is None:  # of an earlier version, as it says nothing of either
            return replace(case, across=None, annotated=annotated.get(case.case))
        present = {index: [i for i in own if counts.get(i)] for index, own in enumerate(inside)}
        voxels = {index: sum(counts[i] for i in own) for index, own in present.items() if own}
        if places is not None:
            moments = {index: sum(counts[i] * places[i] for i in present[index]) for index in voxels if index}
            places = {index: round(moment / voxels[index], 4) for index, moment in moments.items()}
        return replace(case, voxels=voxels, across=places, annotated=annotated.get(case.case))

    return replace(fingerprint, cases=tuple(merged(case) for case in fingerprint.cases))
