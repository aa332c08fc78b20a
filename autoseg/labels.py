"""Labels: what the integers of a label file mean, and the only place that knows.

Files may hold any integers. Inside, a label map holds indices: 0 is the background, 1, 2, ... are the other values,
the one after the last marks ignored voxels, and `UNSEEN` voxels outside the image content. Most often each class has
one value and classes exclude each other: a network gives a softmax over the background and all classes. Where classes
are regions of several values, which may overlap, it gives a sigmoid each, and a label map is painted from them region
by region, a later one over an earlier one. Several values may also be merged into one class (see autoseg/merging.py):
then they share an index, and exclude all other classes as ever. Arrays may be numpy arrays or torch tensors: only
methods that both share are used.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from pydantic import ValidationError

from autoseg.records import AutosegError, problems, record

UNSEEN = -1
LEAST, MOST = -(2**31), 2**31 - 1
"""The smallest and largest value that a class may have in files: predictions are written with at most 32 bits."""
IGNORE = "ignore"
"""The name that marks, in dataset.json, the value of voxels that nobody annotated."""


@record
class Labels:
    """Class names and the integer that each has in the files; position 0 is the background.

    `names` and `values` run in parallel. Of a region its value is the one that is written where the region is
    predicted and none that comes after it.
    """

    names: tuple[str, ...]
    values: tuple[int, ...]
    regions: tuple[tuple[int, ...], ...] = ()
    """All values of each class but the background; empty where every class has its one value."""
    ignore: int | None = None
    """The value of voxels that take part in nothing."""
    parts: tuple[tuple[int, ...], ...] = ()
    """All values of each class but the background, where some were merged; a merged class is written as its value."""

    def __post_init__(self) -> None:
        if len(self.names) != len(self.values) or len(self.names) < 2:
            raise ValueError("labels need a background and at least one class, each with one value")
        entries = self.regions or self.values
        if len(set(entries)) != len(entries) or len(set(self.names)) != len(self.names):
            named = zip(self.names[-len(entries) :], entries)
            twice = [f"{name} = {value}" for name, value in named if entries.count(value) > 1] or list(self.names)
            raise ValueError(f"{' and '.join(twice)}: each must have a name and a value of its own")
        if self.regions and len(self.regions) != len(self.names) - 1:
            raise ValueError(f"{len(self.names) - 1} classes need as many regions, got {len(self.regions)}")
        for name, value, region in zip(self.names[1:], self.values[1:], self.regions):
            if self.values[0] in region or len(set(region)) != len(region):
                raise ValueError(f"region {name!r} must hold values other than the background's, each once")
            if value not in region:
                raise ValueError(f"region {name!r} is written as {value}, which is none of its values {list(region)}")
        if self.parts:
            every = [value for own in self.parts for value in own]
            if self.regions or len(self.parts) != len(self.names) - 1 or len({self.values[0], *every}) <= len(every):
                raise ValueError(f"merged classes have values of their own, and are no regions: {list(self.parts)}")
            if any(value not in own for value, own in zip(self.values[1:], self.parts)):
                raise ValueError(f"merged classes are written as one of their values, not as {list(self.values[1:])}")
        if self.ignore in self.stored or any(self.ignore in own for own in self.parts):
            raise ValueError(f"the value {self.ignore} is ignored and cannot be that of a class too; give one another")

    @classmethod
    def from_dataset(cls, labels: Mapping[str, Any], order: Any = None) -> "Labels":
        """Read the `labels` of dataset.json: name -> integer, or list of integers for a region; and `ignore`.

        The background comes first whatever its place. order: `regions_class_order`, the value that each region is
        written as, in the order of `labels`, later ones over earlier ones. Without it both follow from inclusion, see
        `by_inclusion`. Raises AutosegError that names what is missing or wrong.
        """
        entries: dict[str, tuple[int, ...]] = {}
        for name, value in labels.items():
            members = value if isinstance(value, list | tuple) and value else [value]
            if not all(isinstance(member, int) and not isinstance(member, bool) for member in members):
                raise AutosegError(
                    f"dataset.json: label {name!r} must be an integer or a list of them, found {value!r}"
                )
            if too_large := [member for member in members if not LEAST <= member <= MOST]:
                raise AutosegError(
                    f"dataset.json: label {name!r} is {too_large[0]}; values lie between {LEAST} and {MOST}: give it "
                    "another value, there and in the label files"
                )
            entries[name] = tuple(sorted(members))
        if "background" not in entries:
            raise AutosegError('dataset.json: `labels` must name the background, for example {"background": 0, ...}')
        for name in ("background", IGNORE):
            if len(entries.get(name, (0,))) != 1:
                raise AutosegError(f"dataset.json: label {name!r} must be one integer, found {labels[name]!r}")
        background, ignored = entries.pop("background")[0], entries.pop(IGNORE, None)
        written = {name: members[0] for name, members in entries.items()}
        regions: dict[str, tuple[int, ...]] = {}
        if any(len(members) > 1 for members in entries.values()):
            written = by_inclusion(entries) if order is None else in_order(entries, order)
            regions = {name: entries[name] for name in written}
        try:
            return cls(
                names=("background", *written),
                values=(background, *written.values()),
                regions=tuple(regions.values()),
                ignore=ignored[0] if ignored else None,
            )
        except ValidationError as error:
            said = problems(error).strip().removeprefix("(whole file): ")
            raise AutosegError(f"dataset.json: labels: {said}") from None

    @property
    def exclusive(self) -> bool:
        """Whether every voxel has one class: softmax. Otherwise classes are regions that may overlap: sigmoids."""
        return not self.regions

    @property
    def stored(self) -> tuple[int, ...]:
        """The value in files of each index of a label map, ignored voxels apart."""
        if self.exclusive:
            return self.values
        return tuple(dict.fromkeys((self.values[0], *(value for region in self.regions for value in region))))

    @property
    def known(self) -> tuple[int, ...]:
        """The value in files of each index of a label map: those of `stored`, then the ignored one."""
        return self.stored if self.ignore is None else (*self.stored, self.ignore)

    @property
    def allowed(self) -> tuple[int, ...]:
        """All values that a label file may hold: those of `known`, and of merged classes the others."""
        return (*self.known, *(value for own in self.parts for value in own if value not in self.values))

    @property
    def merges(self) -> dict[str, tuple[int, ...]]:
        """Name of each class that was merged from several labels -> their values in files."""
        return {name: own for name, own in zip(self.names[1:], self.parts) if len(own) > 1}

    @property
    def ignored(self) -> int | None:
        """The index of ignored voxels in a label map, which is the last one; None without such a value."""
        return None if self.ignore is None else len(self.stored)

    @property
    def count(self) -> int:
        """Number of classes, background included."""
        return len(self.names)

    @property
    def heads(self) -> int:
        """Number of output channels that a network needs: one a class, and where they exclude each other background."""
        return len(self.names) if self.exclusive else len(self.regions)

    @property
    def foreground(self) -> Sequence[int]:
        """Indices in a label map that belong to some class."""
        return range(1, len(self.stored))

    @property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """The indices in a label map of each class but the background."""
        if self.exclusive:
            return tuple((index,) for index in self.foreground)
        place = {value: index for index, value in enumerate(self.stored)}
        return tuple(tuple(place[value] for value in region) for region in self.regions)

    @property
    def scored(self) -> dict[str, int | tuple[int, ...]]:
        """Name of each class but the background -> its value in files, or all values of a region or merged class."""
        return {**dict(zip(self.names[1:], self.regions or self.values[1:])), **self.merges}

    @property
    def meaning(self) -> tuple[object, ...]:
        """All that decides what a stored label map means; for keys of what was made from one."""
        told = (self.values, self.regions, self.ignore)
        if self.parts:
            return (*told, self.parts)
        return self.values if self.exclusive and self.ignore is None else told

    def flags(self, annotated: Sequence[str] | None) -> tuple[bool, ...]:
        """Whether each class but the background is among `annotated` names; None: all are."""
        return tuple(annotated is None or name in annotated for name in self.names[1:])

    def unexpected(self, found: np.ndarray) -> list[int]:
        """Values of `found` (any shape, as stored in a file) that no class has."""
        return sorted(set(np.unique(found).tolist()) - set(self.allowed))

    def not_annotated(self, indices: np.ndarray, annotated: Sequence[str]) -> list[int]:
        """Values of a label map that belong to a class, but to none of those called `annotated`."""
        allowed = {UNSEEN, 0, self.ignored}
        allowed.update(i for own, said in zip(self.members, self.flags(annotated)) if said for i in own)
        return sorted(self.known[index] for index in set(np.unique(indices).tolist()) - allowed)

    def union(self, indices: np.ndarray, starts: Sequence[int], axis: int) -> np.ndarray:
        """A label map whose voxels along `axis`, from each of `starts` to the next, became one that keeps the labels.

        Of several classes the one in most regions wins, of these the later; then ignored voxels, then the background,
        last `UNSEEN`.
        """
        depth = [sum(index in own for own in self.members) for index in self.foreground]
        classes = sorted(self.foreground, key=lambda index: (depth[index - 1], index))
        order = np.asarray([UNSEEN, 0, *([] if self.ignored is None else [self.ignored]), *classes], indices.dtype)
        rank = np.argsort(order % len(order)).astype(order.dtype)  # that of UNSEEN is last, so -1 finds it
        return order[np.maximum.reduceat(rank[indices], starts, axis)]

    def is_foreground(self, indices: Any) -> Any:
        """Mask of a label map, same shape: where some class is."""
        return (indices > 0) & (indices < len(self.stored))

    def to_indices(self, stored: np.ndarray) -> np.ndarray:
        """Stored values -> int16 indices, same shape. Raises ValueError for values that no class has."""
        values = np.asarray(self.allowed)
        order = np.argsort(values)
        place = order[np.searchsorted(values, stored, sorter=order).clip(0, len(values) - 1)]
        if not np.array_equal(values[place], stored):
            raise ValueError(f"unexpected label values {self.unexpected(stored)}; expected {sorted(self.allowed)}")
        owner = {value: index for index, own in enumerate(self.parts, start=1) for value in own}
        owner |= {value: index for index, value in enumerate(self.known)}
        return np.asarray([owner[value] for value in self.allowed], np.int16)[place]

    def to_values(self, indices: np.ndarray) -> np.ndarray:
        """Indices -> stored values, same shape, in the smallest of uint8, int16 and int32 that holds them all.

        Raises AutosegError for values that none of them holds.
        """
        fitting = (
            kind
            for kind in (np.uint8, np.int16, np.int32)
            if all(np.iinfo(kind).min <= value <= np.iinfo(kind).max for value in self.known)
        )
        if (kind := next(fitting, None)) is None:
            raise AutosegError(f"label values are {sorted(self.known)}, and can lie between {LEAST} and {MOST} only")
        return np.asarray(self.known, dtype=kind)[indices]

    def decode(self, logits: Any) -> Any:
        """Logits (heads, ...) -> indices (...), for numpy arrays and torch tensors alike.

        Regions are painted where their logit is above 0, and may come one after the other, as any iterable of (...).
        """
        if self.exclusive:
            return logits.argmax(0)
        place = {value: index for index, value in enumerate(self.stored)}
        painted: Any = 0
        for value, logit in zip(self.values[1:], logits):
            inside = logit > 0
            painted = painted * ~inside + inside * place[value]
        return painted

    def probabilities(self, logits: Any) -> Any:
        """Logits (heads, ...) -> probabilities of the same shape: softmax of classes, a sigmoid of each region."""
        if not self.exclusive:
            return 0.5 + 0.5 * np.tanh(0.5 * logits) if isinstance(logits, np.ndarray) else logits.sigmoid()
        if isinstance(logits, np.ndarray):
            weights = np.exp(logits - logits.max(0))
            return weights / weights.sum(0)
        return logits.softmax(0)

    def logits(self, probabilities: np.ndarray) -> np.ndarray:
        """Probabilities above 0 and, of regions, below 1 -> logits of the same shape that give them."""
        return np.log(probabilities if self.exclusive else probabilities / (1 - probabilities))

    def decide(self, probabilities: Any) -> Any:
        """Probabilities (heads, ...) -> indices (...): the most probable class; regions where more than one half."""
        return self.decode(probabilities if self.exclusive else probabilities - 0.5)

    def describe(self, members: Sequence[int]) -> str:
        """The class that consists of exactly these indices of a label map, or all classes that they touch, by name."""
        chosen = set(members)
        exact = [name for name, own in zip(self.names[1:], self.members) if set(own) == chosen]
        return ", ".join(exact or [name for name, own in zip(self.names[1:], self.members) if chosen & set(own)])

    def remarks(self) -> tuple[str, ...]:
        """What a person should know of regions, merged labels and the ignored value, one line each; most often none."""
        lines = []
        if self.regions:
            painted = ", ".join(
                f"{name} {list(region)} as {value}"
                for name, value, region in zip(self.names[1:], self.values[1:], self.regions)
            )
            lines.append(f"regions, written later ones over earlier ones: {painted}")
        for name, own in self.merges.items():
            value = self.values[self.names.index(name)]
            lines.append(f"{name} is one class of the labels {', '.join(map(str, own))}, and is written as {value}")
        if self.ignore is not None:
            lines.append(f"voxels of value {self.ignore} are ignored")
        return tuple(lines)

    def ambiguities(self) -> tuple[str, ...]:
        """For each value that cannot be written so that all its regions can be read from it: what would be lost."""
        regions = dict(zip(self.names[1:], self.regions))
        written = dict(zip(self.names[1:], self.values[1:]))
        found = []
        for value in self.stored[1:] if self.regions else ():
            inside = [name for name, region in regions.items() if value in region]
            painted = written[inside[-1]]
            kept = [name for name, region in regions.items() if painted in region]
            if kept != inside:
                found.append(
                    f"labels: a voxel of {', '.join(inside)} is written as {painted}, which means {', '.join(kept)}; "
                    "predictions lose the difference: put larger regions first, and correct regions_class_order"
                )
        return tuple(dict.fromkeys(found))


def by_inclusion(entries: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The order in which regions are written and the value of each: larger ones first, with a value of their own.

    A region's own values are in no region that it contains; of several, which then lie in the same regions, it gets
    the smallest. Raises AutosegError if two regions overlap only partly, or one has no value of its own.
    """
    for (a, first), (b, second) in combinations(entries.items(), 2):
        shared = set(first) & set(second)
        if shared and shared != set(first) and shared != set(second):
            raise AutosegError(
                f"dataset.json: the regions {a!r} and {b!r} share {sorted(shared)} and neither contains the other, so "
                'nothing says which is written over which; add "regions_class_order" with a value for each region'
            )
    written: dict[str, int] = {}
    for name in sorted(entries, key=lambda name: -len(entries[name])):
        inner = {v for other in entries.values() if set(other) < set(entries[name]) for v in other}
        own = set(entries[name]) - inner
        if not own:
            raise AutosegError(
                f"dataset.json: region {name!r} consists of smaller regions alone, so nothing says which value is "
                'written where only it is predicted; add "regions_class_order" with a value for each region'
            )
        written[name] = min(own)
    return written


def in_order(entries: Iterable[str], order: Any) -> dict[str, int]:
    """The value that each region is written as, from `regions_class_order`; AutosegError if it is none."""
    names = list(entries)
    if not isinstance(order, list | tuple) or [type(value) for value in order] != [int] * len(names):
        raise AutosegError(
            f"dataset.json: regions_class_order must give one integer for each of {', '.join(names)} in this order, "
            f"found {order!r}; leave it out where larger regions contain smaller ones"
        )
    return dict(zip(names, order))
