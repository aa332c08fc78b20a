"""Images and masks in two folders, in any naming; or in data/{train,val,test}/{images,masks}, whose split is kept.

The pairs are guessed from the names (see pairing) and shown before anything is written. Label values are those that the
masks hold, called class_<value> unless names are given; channels are those of the first image.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from autoseg.datasets.importing import Draft, Entry, Part, Place, Request, common_ending, ending_of, files_at, put
from autoseg.datasets.pairing import case_names, pair, stems
from autoseg.parallel import map_cases, raise_failures
from autoseg.readers import read_labels, read_stored
from autoseg.records import AutosegError

HOUNSFIELD = -500
"""An image whose values reach below this was taken for CT: no other modality counts so far down."""
MOST_VALUES = 256
"""More label values than this are no classes: the masks are images, or instances with a number each."""

PARTS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
IMAGES = ("images", "image", "imgs", "img")
MASKS = ("masks", "mask", "labels", "label", "segmentations", "annotations")


def find(request: Request) -> Draft:
    """The pairs of two folders (or quoted patterns) of images and masks."""
    if request.masks is None:
        raise AutosegError("say where the masks are: autoseg dataset import folders IMAGES MASKS -d Dataset001_Name")
    return draft_of(request, [("", "Tr", files_at(request.source), files_at(request.masks))])


def find_split(request: Request) -> Draft:
    """The pairs of FOLDER/{train,val}/{images,masks}, as one fold; FOLDER/test becomes imagesTs and labelsTs."""
    top = Path(request.source).expanduser()
    parts: list[tuple[str, Part, list[Path], list[Path]]] = []
    for folder in sorted(entry for entry in top.iterdir() if entry.is_dir()) if top.is_dir() else ():
        if (part := PARTS.get(folder.name.lower())) is not None:
            images, masks = (files_at(str(one_of(folder, names))) for names in (IMAGES, MASKS))
            parts.append((part, "Ts" if part == "test" else "Tr", images, masks))
    found = [part for part, *_ in parts]
    if sorted(set(found) & {"train", "val"}) != ["train", "val"] or len(found) > len(set(found)):
        raise AutosegError(f"{top} must hold one folder train and one folder val, each with images and masks")
    draft = draft_of(request, parts)
    fold = {
        part: tuple(e.case for e in draft.entries if e.shown[0].startswith(f"{part}: ")) for part in ("train", "val")
    }
    return replace(draft, folds=(fold,))


def one_of(folder: Path, names: Sequence[str]) -> Path:
    """The sub-folder that has one of `names`. Raises AutosegError if there is none."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and entry.name.lower() in names:
            return entry
    raise AutosegError(f"{folder} has no folder {names[0]} (also understood: {', '.join(names[1:])})")


def draft_of(request: Request, parts: Sequence[tuple[str, Part, list[Path], list[Path]]]) -> Draft:
    """The draft of several (name, part, images, masks), each paired by itself; names are "" where there is but one."""
    images = [path for *_, some, _ in parts for path in some]
    masks = [path for *_, some in parts for path in some]
    ending = common_ending(images, masks)
    entries: list[Entry] = []
    left_over: list[str] = []
    paired: list[tuple[str, Part, Path, Path]] = []
    for name, part, some_images, some_masks in parts:
        image_names, mask_names = (
            stems(files, [len(ending_of(f)) for f in files]) for files in (some_images, some_masks)
        )
        pairs = pair(image_names, mask_names)
        left_over += [f"{name}: {line}" if name else line for line in pairs.left_over]
        cases = case_names(image_names)
        paired += [(cases[i], part, some_images[i], some_masks[m]) for i, m in pairs.found]
        shown = [(f"{name}: {image_names[i]}" if name else image_names[i], mask_names[m]) for i, m in pairs.found]
        entries += [
            Entry(case=cases[i], part=part, shown=row, write=pair_writer(some_images[i], some_masks[m]))
            for row, (i, m) in zip(shown, pairs.found)
        ]
    if not entries:
        raise AutosegError("no image has a mask:\n" + "\n".join(f"  {line}" for line in left_over[:20]))
    if len({entry.case for entry in entries}) < len(entries):
        prefixed = (e.shown[0].split(": ")[0] for e in entries)
        entries = [replace(entry, case=f"{prefix}_{entry.case}") for entry, prefix in zip(entries, prefixed)]
    values = label_values([mask for *_, mask in paired], request)
    channels, notes = channels_of(paired[0][2], request)
    return Draft(
        entries=tuple(entries),
        channels=channels,
        labels=name_values(values, dict(request.labels)),
        ending=ending,
        notes=notes,
        left_over=tuple(left_over),
        guessed=True,
    )


def pair_writer(image: Path, mask: Path) -> Callable[[Place], None]:
    """What writes one pair of files."""

    def write(place: Place) -> None:
        put(image, place.image())
        put(mask, place.label, like=image)

    return write


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


def channels_of(image: Path, request: Request) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names for the channels of `image`, and what a person should know about them."""
    given = request.channels
    stored = read_stored(image, channels=len(given) or None)
    count = len(stored.array)
    if given:
        return given, ()
    if count == 3 and stored.picture:
        return ("R", "G", "B"), ()
    notes = ["the channel names decide the normalisation; give them with --channels, for example --channels CT"]
    if stored.array.min() < HOUNSFIELD:
        notes = [f"{image.name} holds values down to {stored.array.min():g}: if this is CT, give --channels CT"]
    return (("image",) if count == 1 else tuple(f"channel_{n}" for n in range(count))), tuple(notes)
