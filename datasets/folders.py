"""Images and masks in two folders, in any naming; or in data/{train,val,test}/{images,masks}, whose split is kept.

The pairs are guessed from the names (see pairing) and shown before anything is written. Label values are those that the
masks hold, called class_<value> unless names are given; channels are those of the first image, or one file each where
their names are given and the files are called after them.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from autoseg.datasets.importing import (
    Draft,
    Entry,
    Part,
    Place,
    Request,
    apart,
    common_ending,
    ending_of,
    files_at,
    put,
)
from autoseg.datasets.pairing import case_names, pair, stems, within, words
from autoseg.parallel import map_cases, raise_failures
from autoseg.readers import read_labels, read_stored
from autoseg.records import AutosegError

HOUNSFIELD = -500
"""An image whose values reach below this was taken for CT: no other modality counts so far down."""
MOST_VALUES = 256
"""More label values than this are no classes: the masks are images, or instances with a number each."""

PARTS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
IMAGES = ("images", "image", "imgs", "img", "magn")
MASKS = ("masks", "mask", "labels", "label", "segmentations", "annotations")


def find(request: Request) -> Draft:
    """The pairs of two folders (or quoted patterns) of images and masks."""
    if request.masks is None:
        raise AutosegError("say where the masks are: autoseg dataset import folders IMAGES MASKS -d Dataset001_Name")
    return draft_of(request, [("", "Tr", *apart(files_at(request.source), files_at(request.masks)))])


def find_split(request: Request) -> Draft:
    """The pairs of FOLDER/{train,val}/{images,masks}, as one fold; FOLDER/test becomes imagesTs and labelsTs.

    A test folder without masks is passed over, with a note: it is what `predict` takes as it is.
    """
    top = Path(request.source).expanduser()
    parts: list[tuple[str, Part, list[Path], list[Path]]] = []
    notes: tuple[str, ...] = ()
    for folder in sorted(entry for entry in top.iterdir() if entry.is_dir()) if top.is_dir() else ():
        if (part := PARTS.get(folder.name.lower())) is None:
            continue
        if part == "test" and not any(entry.name.lower() in MASKS for entry in folder.iterdir()):
            notes = (f"{folder} has no masks and is left out; its images can be given to autoseg predict",)
            continue
        images, masks = (files_at(str(one_of(folder, names))) for names in (IMAGES, MASKS))
        parts.append((part, "Ts" if part == "test" else "Tr", images, masks))
    found = [part for part, *_ in parts]
    if sorted(set(found) & {"train", "val"}) != ["train", "val"] or len(found) > len(set(found)):
        raise AutosegError(f"{top} must hold one folder train and one folder val, each with images and masks")
    draft = draft_of(request, parts)
    fold = {
        part: tuple(e.case for e in draft.entries if e.shown[0].startswith(f"{part}: ")) for part in ("train", "val")
    }
    return replace(draft, folds=(fold,), notes=(*draft.notes, *notes))


def one_of(folder: Path, names: Sequence[str]) -> Path:
    """The sub-folder that has one of `names`. Raises AutosegError if there is none."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and entry.name.lower() in names:
            return entry
    raise AutosegError(f"{folder} has no folder {names[0]} (also understood: {', '.join(names[1:])})")


def draft_of(request: Request, parts: Sequence[tuple[str, Part, list[Path], list[Path]]]) -> Draft:
    """The draft of several (name, part, images, masks), each paired by itself; names are "" where there is but one."""
    entries: list[Entry] = []
    left_over: list[str] = []
    paired: list[tuple[tuple[Path, ...], Path]] = []
    ending = common_ending(
        [path for *_, images, _ in parts for path in images],
        [path for *_, masks in parts for path in masks],
    )
    for name, part, images, masks in parts:
        cases = by_channel(images, request.channels)
        image_names, mask_names = list(cases), names_of(masks)
        pairs = pair(image_names, mask_names)
        left_over += [f"{name}: {line}" if name else line for line in pairs.left_over]
        ids = case_names(image_names)
        for i, m in pairs.found:
            files = cases[image_names[i]]
            paired.append((files, masks[m]))
            entries.append(
                Entry(
                    case=ids[i],
                    part=part,
                    shown=(f"{name}: {image_names[i]}" if name else image_names[i], mask_names[m]),
                    write=partial(write_pair, files, masks[m]),
                )
            )
    if not entries:
        raise AutosegError("no image has a mask:\n" + "\n".join(f"  {line}" for line in left_over[:20]))
    if len(parts) > 1 and len({entry.case for entry in entries}) < len(entries):
        # The same names in train and val: the part tells them apart.
        entries = [replace(entry, case=f"{entry.shown[0].split(': ')[0]}_{entry.case}") for entry in entries]
    values = label_values([mask for _, mask in paired], request)
    channels, notes = channels_of(paired[0][0], request)
    return Draft(
        entries=tuple(entries),
        channels=channels,
        labels=name_values(values, dict(request.labels)),
        ending=ending,
        notes=notes,
        left_over=tuple(left_over),
        guessed=True,
    )


def names_of(paths: Sequence[Path]) -> list[str]:
    """Names of files to be paired: the path without its ending, from where they part."""
    return stems(paths, [len(ending_of(path)) for path in paths])


def by_channel(images: Sequence[Path], channels: Sequence[str]) -> dict[str, tuple[Path, ...]]:
    """Name of a case -> its files, one a channel where names end in _0000, _0001, ... or hold the channels' names.

    Without channels, and where the first file holds them all, each file is a case. Raises AutosegError if a case lacks
    a channel or has two files for one.
    """
    names = names_of(images)
    if len(channels) < 2 or len(read_stored(images[0]).array) == len(channels):
        return dict(zip(names, ((image,) for image in images)))
    marks = [[n for n, channel in enumerate(channels) if within(words(channel), words(name))] for name in names]
    if all(re.search(r"_\d{4}$", name) and int(name[-4:]) < len(channels) for name in names):
        marks = [[int(name[-4:])] for name in names]
        bare = [name[:-5] for name in names]
    elif any(marks):
        # Of several names that fit, such as T1 and T1 ce, the longest is meant.
        marks = [sorted(found, key=lambda n: -len(words(channels[n])))[:1] for found in marks]
        bare = [without(name, channels[found[0]]) if found else name for name, found in zip(names, marks)]
    else:
        return dict(zip(names, ((image,) for image in images)))
    cases: dict[str, dict[int, Path]] = {}
    for name, case, found, image in zip(names, bare, marks, images):
        if not found:
            raise AutosegError(f"image {name} names none of the channels {', '.join(channels)}; leave it out")
        if (other := cases.setdefault(case, {}).setdefault(found[0], image)) is not image:
            raise AutosegError(f"{image} and {other} are both channel {channels[found[0]]} of case {case}")
    for case, files in cases.items():
        if lacking := [channel for n, channel in enumerate(channels) if n not in files]:
            raise AutosegError(f"case {case} has no image of {', '.join(lacking)}")
    return {case: tuple(files[n] for n in range(len(channels))) for case, files in cases.items()}


def without(name: str, channel: str) -> str:
    """A name without the words of a channel where it names it last, and without what joined them."""
    sought = r"[\W_]*".join(re.escape(word) for word in re.findall(r"\d+|[^\W\d_]+", channel))
    found = list(re.finditer(rf"[ _.-]*(?<![^\W_]){sought}(?![^\W_])", name, re.IGNORECASE))
    if not found:
        return name
    return (name[: found[-1].start()] + name[found[-1].end() :]).strip(" _.-/")


def write_pair(images: Sequence[Path], mask: Path, place: Place) -> None:
    """Put the files of one case in their places."""
    for channel, image in enumerate(images):
        put(image, place.image(channel))
    put(mask, place.label, like=images[0])


def label_values(masks: Sequence[Path], request: Request) -> set[int]:
    """All values that the masks hold."""

    def values_of(mask: Path) -> set[int]:
        found = np.unique(read_labels(mask)[0].array)
        if len(found) > MOST_VALUES:
            raise AutosegError(f"{mask} holds {len(found)} values; it is an image, or gives each object its own number")
        return set(found.tolist())

    outcomes = map_cases(values_of, masks, name=lambda mask: mask.name, what="look at masks", workers=request.workers)
    return set().union(*raise_failures(outcomes, "looking at masks"))


def name_values(found: set[int], given: dict[str, int]) -> dict[str, int]:
    """Names for the values found; AutosegError if names are given but not for all."""
    if not given:
        return {"background": 0} | {f"class_{value}": value for value in sorted(found - {0})}
    named = ({} if "background" in given else {"background": 0}) | given
    if missing := sorted(found - set(named.values())):
        raise AutosegError(
            f"the masks hold the values {', '.join(map(str, missing))}, which --labels does not name; it names "
            + ", ".join(f"{name}={value}" for name, value in named.items())
        )
    return named


def channels_of(images: Sequence[Path], request: Request) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names for the channels of a case, and what a person should know about them."""
    image, given = images[0], request.channels
    single = "give --channels a name for each, with commas: R,G,B"
    stored = (
        read_stored(image, channels=1, cure="give files of one channel each")
        if len(images) > 1
        else read_stored(image, channels=len(given) or None, cure=single)
    )
    count = len(stored.array)
    if given:
        return given, ()
    if count == 3 and stored.picture:
        return ("R", "G", "B"), ()
    notes = ["the channel names decide the normalisation; give them with --channels, for example --channels CT"]
    if stored.array.min() < HOUNSFIELD:
        notes = [f"{image.name} holds values down to {stored.array.min():g}: if this is CT, give --channels CT"]
    return (("image",) if count == 1 else tuple(f"channel_{n}" for n in range(count))), tuple(notes)
