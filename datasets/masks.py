"""One binary mask a structure, merged to classes in an order of overlap.

Understood are MASKS/case/structure.nii.gz, MASKS/structure/case.nii.gz and, where the structures are named by --order
or --labels, MASKS/case_structure.nii.gz. A structure without a file is absent in that case. Overlaps are counted for
each pair of structures; without an order they are refused, since which one is right cannot be known.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from autoseg.datasets.folders import channels_of
from autoseg.datasets.importing import (
    Draft,
    Entry,
    Overlaps,
    Place,
    Request,
    common_ending,
    ending_of,
    files_at,
    merge,
    put,
)
from autoseg.datasets.pairing import Pairs, case_names, pair, stems, within, words
from autoseg.readers import read_labels, read_stored, write_labels
from autoseg.records import AutosegError
from autoseg.volume import canonical_grid, mismatch

SHOWN = 8
"""Structures of a case that the table names."""

ByCase = dict[str, dict[str, Path]]
"""Case -> structure -> file."""


def find(request: Request) -> Draft:
    """The images of one folder (or quoted pattern) with their masks of another."""
    if request.masks is None:
        raise AutosegError("say where the masks are: autoseg dataset import masks IMAGES MASKS -d Dataset001_Name")
    images = files_at(request.source)
    masks = [path for path in files_at(request.masks) if path not in set(images)]
    image_names, mask_names = (stems(files, [len(ending_of(f)) for f in files]) for files in (images, masks))
    named = tuple(request.order) or tuple(name for name, _ in request.labels if name != "background")
    groups, pairs = best_grouping(image_names, dict(zip(mask_names, masks)), named)
    cases = list(groups)
    structures = named or tuple(sorted({structure for group in groups.values() for structure in group}))
    given = dict(request.labels)
    values = {"background": 0} | {name: given.get(name, n + 1) for n, name in enumerate(structures)}
    ids = case_names(image_names)
    absent = {name: sum(name not in groups[cases[m]] for _, m in pairs.found) for name in structures}
    channels, notes = channels_of(images[:1], request)
    return Draft(
        entries=tuple(
            Entry(
                case=ids[i],
                shown=(image_names[i], f"{cases[m]}: {', '.join(sorted(groups[cases[m]])[:SHOWN])}".removeprefix(": ")),
                write=masks_writer(images[i], groups[cases[m]], values, structures),
            )
            for i, m in pairs.found
        ),
        channels=channels,
        labels=values,
        ending=common_ending(images, masks[:0]),
        notes=(
            *notes,
            *(f"{name} has no mask in {count} cases: taken as absent" for name, count in absent.items() if count),
        ),
        left_over=pairs.left_over,
        guessed=True,
        ordered=bool(request.order),
    )


def best_grouping(images: Sequence[str], masks: Mapping[str, Path], named: Sequence[str]) -> tuple[ByCase, Pairs]:
    """The way of telling case and structure apart that gives most pairs, and these pairs (image, case).

    Raises AutosegError if no way gives a pair.
    """
    ways = [by_name(masks, named)] if named else [by_part(masks, -1), by_part(masks, -2)]
    paired = [(groups, pair(images, list(groups))) for groups in ways if groups]
    best = max(paired, key=lambda way: len(way[1].found), default=None)
    if best is None or not best[1].found:
        raise AutosegError(
            "no image has masks; expected are MASKS/case/structure.nii.gz or MASKS/structure/case.nii.gz, or give the "
            f"structures' names with --order; found are {', '.join(list(masks)[:4])}"
        )
    return best


def by_part(masks: Mapping[str, Path], at: int) -> ByCase:
    """Structure: the part of the path at `at` (-1 file name, -2 its folder); case: the other parts."""
    groups: ByCase = defaultdict(dict)
    for name, path in masks.items():
        parts = name.split("/")
        if len(parts) < -at:
            return {}
        groups["/".join([*parts[:at], *parts[len(parts) + at + 1 :]])][parts[at]] = path
    return dict(groups)


def by_name(masks: Mapping[str, Path], structures: Sequence[str]) -> ByCase:
    """Structure: the longest of `structures` that the name holds; case: the other words."""
    groups: ByCase = defaultdict(dict)
    for name, path in masks.items():
        found = words(name)
        fitting = [structure for structure in structures if within(words(structure), found)]
        if not fitting:
            raise AutosegError(f"mask {name} names none of the structures {', '.join(structures)}")
        structure = max(fitting, key=lambda s: len(words(s)))
        inner = words(structure)
        # From the end: the structure is what the file is, the words before it where it lies.
        at = max(at for at in range(len(found)) if found[at : at + len(inner)] == inner)
        case = " ".join(found[:at] + found[at + len(inner) :])
        if structure in groups[case]:
            raise AutosegError(f"two masks of {structure} for one case: {groups[case][structure]} and {path}")
        groups[case][structure] = path
    return dict(groups)


def masks_writer(
    image: Path, masks: Mapping[str, Path], values: dict[str, int], order: Sequence[str]
) -> Callable[[Place], Overlaps]:
    """What writes one image and its merged labels."""

    def write(place: Place) -> Overlaps:
        stored = read_stored(image)
        grid = canonical_grid(stored.grid)
        inside: dict[str, np.ndarray] = {}
        for name, path in masks.items():
            decoded = read_stored(path, indices=True)
            volume, _ = read_labels(path)
            difference = mismatch(grid, volume.grid)
            if difference and (decoded.sized or volume.grid.shape != grid.shape):
                raise AutosegError(f"{path} and {image} differ in {difference}; export the mask on the image's grid")
            found = np.unique(volume.array)
            if np.count_nonzero(found) > 1:
                raise AutosegError(
                    f"{path} holds the values {', '.join(map(str, found[:5]))}, so it is no binary mask; for label "
                    "maps use: autoseg dataset import folders"
                )
            inside[name] = volume.array[0] != 0
        labels, overlaps = merge(inside, values, order)
        put(image, place.image())
        write_labels(labels, stored.grid, place.label)
        return overlaps

    return write
