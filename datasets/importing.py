"""What every import shares: the request, the draft that a source makes of it, and writing the draft as a dataset.

A source only finds things and says how to write each case; nothing is written before the draft was seen. Files are
copied byte for byte where their format may stay, and decoded and encoded in their own type and grid otherwise.
"""

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from autoseg.parallel import map_cases, raise_failures
from autoseg.readers import ENDINGS, Stored, files_of, is_named, not_there, on_grid_of, read_stored, reader_for
from autoseg.records import AutosegError, remove_leftovers, save_json, sole_writer
from autoseg.volume import Triple

Part = Literal["Tr", "Ts"]
Overlaps = Counter[tuple[str, str]]
"""(class that lost, class that won) -> voxels that both claimed."""

SINGLE = {".mhd": ".mha", ".nhdr": ".nrrd"}
"""Formats of two files -> the same in one."""
VOLUMES = (".nii.gz", ".nii", ".nrrd", ".mha", ".gipl", ".gipl.gz")
"""Endings of formats that keep spacing, origin and direction."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a person asked for. Empty tuples and None: not said."""

    source: str
    masks: str | None = None
    channels: tuple[str, ...] = ()
    labels: tuple[tuple[str, int], ...] = ()
    order: tuple[str, ...] = ()
    """Structures in the order of writing: the later one wins where two overlap."""
    spacing_mm: Triple | None = None
    scratch: Path
    """A folder on the disk of the target, removed at the end."""
    workers: int | None = None


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the files of one case go."""

    folder: Path
    part: Part
    case: str
    ending: str

    def image(self, channel: int = 0) -> Path:
        """The image file of one channel, or of all in one file."""
        return self.folder / f"images{self.part}" / f"{self.case}_{channel:04d}{self.ending}"

    @property
    def label(self) -> Path:
        """The label file."""
        return self.folder / f"labels{self.part}" / f"{self.case}{self.ending}"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One case to be written. `shown` are the names of its files, for the table."""

    case: str
    shown: tuple[str, ...]
    write: Callable[[Place], Overlaps | None]
    part: Part = "Tr"


@dataclass(frozen=True, eq=False, kw_only=True)
class Draft:
    """A dataset about to be written."""

    entries: tuple[Entry, ...]
    channels: tuple[str, ...]
    labels: dict[str, int]
    ending: str
    facts: dict[str, Any] = field(default_factory=dict)
    """More for dataset.json: licence, reference, ..."""
    folds: tuple[dict[str, tuple[str, ...]], ...] = ()
    notes: tuple[str, ...] = ()
    left_over: tuple[str, ...] = ()
    guessed: bool = False
    """Whether the pairs were found by their names, so that a person should look at them."""
    unit: str = "cases"
    """What an entry is."""
    ordered: bool = True
    """Whether an order of overlap was given; without one, overlaps are refused."""


def ending_of(path: Path) -> str:
    """The known ending of a file, in small letters. Raises AutosegError for a format without a reader."""
    reader_for(path)
    return next(ending for ending in ENDINGS if path.name.lower().endswith(ending))


def common_ending(images: Sequence[Path], masks: Sequence[Path]) -> str:
    """The ending that all files of a dataset get: the images' own where it can hold the masks, else .nii.gz."""
    kinds = {SINGLE.get(ending_of(path), ending_of(path)) for path in images}
    others = {SINGLE.get(ending_of(path), ending_of(path)) for path in masks}
    if len(kinds) == 1 and (kinds == others or kinds <= set(VOLUMES) or not others & set(VOLUMES)):
        return kinds.pop()
    return ".nii.gz"


def files_at(text: str) -> list[Path]:
    """Image files at a folder (whatever their depth), a file or a quoted pattern like 'data/*/t1.nii.gz', sorted.

    Hidden files and files of unknown formats are left out. Raises AutosegError if none is left, or one is a link to
    what is not there.
    """
    path = Path(text).expanduser()
    if path.is_dir():
        found = [file for file in path.rglob("*") if is_named(file)]
    elif is_named(path):
        found = [path]
    else:
        top, pattern = Path(path.anchor), str(path.relative_to(path.anchor)) if path.anchor else str(path)
        found = [file for file in top.glob(pattern) if is_named(file)] if "*" in pattern or "?" in pattern else []
    hidden = {file for file in found if any(part.startswith(".") for part in file.relative_to(path.anchor).parts[-2:])}
    known = sorted(file for file in set(found) - hidden if file.name.lower().endswith(tuple(ENDINGS)))
    if not known:
        kinds = sorted({file.suffix for file in found if file not in hidden})
        found_text = f"it holds only {', '.join(kinds)}" if kinds else "nothing is there"
        raise AutosegError(f"{text} has no image file ({found_text}); known are {', '.join(ENDINGS)}")
    return fetched(known)


def fetched(files: Sequence[Path]) -> list[Path]:
    """The files themselves. Raises AutosegError if there are links whose file is not there: a case less is no cure."""
    if gone := [file for file in files if not file.exists()]:
        raise AutosegError(f"{len(gone)} of {len(files)} files cannot be read: {not_there(gone[0])}")
    return list(files)


def apart(images: Sequence[Path], masks: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Images and masks without the files that both lists hold: they stay in the shorter one, whose pattern says more.

    Raises AutosegError if nothing tells them apart.
    """
    both = set(images) & set(masks)
    if both and len(images) == len(masks):
        raise AutosegError("all images are masks too; give patterns that tell them apart, like 'data/*/t1.nii.gz'")
    short = len(images) < len(masks)
    return (
        [path for path in images if short or path not in both],
        [path for path in masks if not short or path not in both],
    )


def put(source: Path, target: Path, *, move: bool = False, like: Path | None = None) -> None:
    """Put an image file at `target`, without loss: its bytes where the ending is the same, else encoded anew.

    like: the image of a mask, which lends its grid to a mask that knows no voxel size.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # A header that names the file of its voxels would point to nothing under a new name.
    alone = len([file for file in files_of(source) if file.suffix != ".json"]) == 1
    if not (alone and target.name.lower().endswith(ending_of(source))):
        stored = read_stored(source, indices=like is not None)
        encode(stored if like is None else on_grid_of(stored, read_stored(like)), target)
        return
    for file in files_of(source):
        to = target if file == source else target.with_suffix(".json")
        if move:
            os.replace(file, to)
        else:
            shutil.copyfile(file, to)


def encode(stored: Stored, target: Path, channel: int | None = None) -> None:
    """Write what was decoded, or one channel of it, in its own type, axis order and grid."""
    array = stored.array if channel is None else stored.array[channel : channel + 1]
    types = reader_for(target).TYPES
    kind = next((k for k in types if np.dtype(k) == array.dtype), None)
    if kind is None and array.dtype.kind == "f":
        kind = next((k for k in types if "float" in k and np.can_cast(array.dtype, k, "safe")), None)
    if kind is None and array.dtype.kind in "iu":
        low, high = int(array.min()), int(array.max())
        held = (k for k in types if "int" in k and np.iinfo(k).min <= low and high <= np.iinfo(k).max)
        kind = next(held, None)
    if kind is None:
        raise AutosegError(f"{target}: this format cannot hold {array.dtype} without loss; use .nii.gz")
    reader_for(target).write(target, array.astype(kind, copy=False), stored.grid)


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """Lend a hidden folder beside `target` that becomes `target` at the end, or is removed if anything fails.

    Raises AutosegError if `target` holds anything.
    """
    with sole_writer(target.parent):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise AutosegError(f"{target} exists; choose another dataset name with -d, or remove it first")
        remove_leftovers(target.parent, (target.name,))
        around = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        # tempfile gives a folder to its owner alone; the one inside may be read by whom the user lets read.
        folder = around / target.name
        try:
            folder.mkdir()
            yield folder
            if target.is_dir():
                target.rmdir()
            os.replace(folder, target)
        finally:
            shutil.rmtree(around, ignore_errors=True)


def write_draft(draft: Draft, folder: Path, workers: int | None) -> Overlaps:
    """Write all cases, then splits.json where folds are given and, last of all, dataset.json.

    Returns the voxels that two classes claimed. Raises AutosegError that names every case that failed.
    """
    # Windows and macOS take names that differ only in capitals for the same.
    doubled = [case for case, count in Counter(e.case.casefold() for e in draft.entries).items() if count > 1]
    if doubled:
        both = [entry for entry in draft.entries if entry.case.casefold() == doubled[0]]
        shown = " and ".join(entry.shown[0] for entry in both[:2])
        raise AutosegError(f"{shown} would both become case {both[0].case}; rename one of them")

    def one(entry: Entry) -> Overlaps:
        return entry.write(Place(folder=folder, part=entry.part, case=entry.case, ending=draft.ending)) or Counter()

    outcomes = map_cases(one, draft.entries, name=lambda entry: entry.case, what="import", workers=workers)
    overlaps: Overlaps = sum(raise_failures(outcomes, "import"), Counter())
    if overlaps and not draft.ordered:
        raise AutosegError(
            f"structures overlap:\n{overlap_table(overlaps)}\nsay which one wins with --order, the last one wins, for "
            f"example --order {','.join(name for name in draft.labels if name != 'background')}"
        )
    training = sum(entry.part == "Tr" for entry in draft.entries)
    if draft.folds:
        save_json({"folds": draft.folds}, folder / "splits.json")
    card = {
        "channel_names": {str(n): name for n, name in enumerate(draft.channels)},
        "labels": draft.labels,
        "numTraining": training,
        "file_ending": draft.ending,
        **draft.facts,
    }
    (folder / "dataset.json").write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return overlaps


def overlap_table(overlaps: Overlaps) -> str:
    """A line a pair of classes: how many voxels both claimed."""
    return "\n".join(f"  {won} over {lost}: {count} voxels" for (lost, won), count in sorted(overlaps.items()))


def whole_order(order: Sequence[str], structures: Sequence[str]) -> tuple[str, ...]:
    """The order of overlap: `order` if given, else that of `structures`. Raises AutosegError if it leaves one out."""
    if order and set(order) != set(structures):
        raise AutosegError(f"--order must name each of {', '.join(structures)} once, found {', '.join(order)}")
    return tuple(order or structures)


def merge(masks: dict[str, np.ndarray], values: dict[str, int], order: Sequence[str]) -> tuple[np.ndarray, Overlaps]:
    """Binary masks (Z, Y, X) by class -> one label map, the later class of `order` on top, and the overlaps.

    Classes may lack a mask, but not a place in `order`. The overlap of a pair of classes are the voxels that both
    claim, whether or not a third one covers them.
    """
    shape = next(iter(masks.values())).shape
    kind = np.uint8 if max(values.values()) < 256 and min(values.values()) >= 0 else np.int32
    labels = np.full(shape, values["background"], kind)
    claimed: Overlaps = Counter()
    present = sorted(masks, key=order.index)
    for place, name in enumerate(present):
        inside = masks[name].astype(bool)
        for lower in present[:place]:
            if count := int(np.count_nonzero(masks[lower].astype(bool) & inside)):
                claimed[lower, name] += count
        labels[inside] = values[name]
    return labels, claimed
