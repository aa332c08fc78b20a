"""One binary mask a structure, merged to classes in an order of overlap.

Understood are MASKS/case/structure.nii.gz, MASKS/structure/case.nii.gz and, where the structures are named by --order
or --labels, MASKS/case_structure.nii.gz. A structure without a file is absent in that case. Overlaps are counted for
each pair of structures; without an order they are refused, since which one is right cannot be known.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from autoseg.datasets.folders import by_channel, channels_of, names_of, without
from autoseg.datasets.importing import (
    Draft,
    Entry,
    Overlaps,
    Place,
    Request,
    apart,
    common_ending,
    files_at,
    merge,
    put,
    whole_order,
)
from autoseg.datasets.pairing import Key, Pairs, case_names, pair, within, words
from autoseg.readers import on_grid_of, read_stored, whole_labels, write_labels
from autoseg.records import AutosegError
from autoseg.volume import canonical_grid, mismatch

ByCase = dict[str, dict[str, Path]]
"""Case -> structure -> file."""


def find(request: Request) -> Draft:
    """The images of one folder (or quoted pattern) with their masks of another."""
    if request.masks is None:
        raise AutosegError("say where the masks are: autoseg dataset import masks IMAGES MASKS -d Dataset001_Name")
    scans, masks = apart(files_at(request.source), files_at(request.masks))
    images = by_channel(scans, request.channels)
    named = tuple(name for name, _ in request.labels if name != "background") or request.order
    groups, pairs = best_grouping(list(images), dict(zip(names_of(masks), masks)), named)
    cases, files = list(groups), list(images.values())
    structures = named or tuple(sorted({structure for group in groups.values() for structure in group}))
    order = whole_order(request.order, structures)
    given = dict(request.labels)
    values = {"background": 0} | {name: given.get(name, n + 1) for n, name in enumerate(structures)}
    ids = case_names(list(images))
    absent = {name: sum(name not in groups[cases[m]] for _, m in pairs.found) for name in structures}
    channels, notes = channels_of(files[0], request)
    return Draft(
        entries=tuple(
            Entry(
                case=ids[i],
                shown=(list(images)[i], f"{cases[m]}: {', '.join(groups[cases[m]])}".removeprefix(": ")),
                write=partial(write_case, files[i], groups[cases[m]], values, order),
            )
            for i, m in pairs.found
        ),
        channels=channels,
        labels=values,
        ending=common_ending(scans, ()),
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
    """Structure: the longest of `structures` that the name holds; case: the other words, as in the first such name."""
    groups: ByCase = defaultdict(dict)
    called: dict[Key, str] = {}
    for name, path in masks.items():
        found = words(name)
        fitting = [structure for structure in structures if within(words(structure), found)]
        if not fitting:
            raise AutosegError(f"mask {name} names none of the structures {', '.join(structures)}")
        structure = max(fitting, key=lambda s: len(words(s)))
        inner = words(structure)
        # From the end: the structure is what the file is, the words before it where it lies.
        at = max(at for at in range(len(found)) if found[at : at + len(inner)] == inner)
        rest = found[:at] + found[at + len(inner) :]
        # As it is written, where nothing but the structure can be cut out of it.
        written = without(name, structure)
        case = called.setdefault(rest, written if words(written) == rest else " ".join(rest))
        if structure in groups[case]:
            raise AutosegError(f"two masks of {structure} for one case: {groups[case][structure]} and {path}")
        groups[case][structure] = path
    return dict(groups)


def write_case(
    images: Sequence[Path], masks: Mapping[str, Path], values: dict[str, int], order: Sequence[str], place: Place
) -> Overlaps:
    """Put the images of one case and its merged labels in their places; returns the overlaps.

    Raises AutosegError for masks on another grid than the image, and for those of several values.
    """
    image = read_stored(images[0])
    grid = canonical_grid(image.grid)
    inside: dict[str, np.ndarray] = {}
    for name, path in masks.items():
        mask = read_stored(path, indices=True)
        volume, _ = whole_labels(on_grid_of(mask, image), path)
        if difference := mismatch(grid, volume.grid):
            raise AutosegError(f"{path} and {images[0]} differ in {difference}; export the mask on the image's grid")
        found = np.unique(volume.array)
        if np.count_nonzero(found) > 1:
            raise AutosegError(
                f"{path} holds the values {', '.join(map(str, found[:5]))}, so it is no binary mask; for label "
                "maps use: autoseg dataset import folders"
            )
        inside[name] = volume.array[0] != 0
    labels, overlaps = merge(inside, values, order)
    for channel, path in enumerate(images):
        put(path, place.image(channel))
    write_labels(labels, image.grid, place.label)
    return overlaps
