"""A raw dataset of nnU-Net v2: taken as it is, without a second copy of the voxels where the file system can.

Its splits_final.json comes along: nnU-Net keeps it with the preprocessed data, nnUNet_preprocessed beside nnUNet_raw.
"""

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from autoseg.datasets.importing import Draft, Entry, Place, Request, fetched
from autoseg.readers import is_named
from autoseg.records import AutosegError

FOLDERS: tuple[str, ...] = ("imagesTr", "labelsTr", "imagesTs", "labelsTs")
SPLITS = "splits_final.json"


def find(request: Request) -> Draft:
    """All files of the dataset folder, one entry a file."""
    top = Path(request.source).expanduser().resolve()
    card = read_card(top / "dataset.json")
    channels, labels, ending = (card.pop(key) for key in ("channel_names", "labels", "file_ending"))
    folders, listed = FOLDERS, card.get("dataset")
    if isinstance(listed, dict):
        # Files of cases that are listed stay where they are.
        folders = FOLDERS[2:]
        card["dataset"] = {case: where_it_is(entry, top) for case, entry in listed.items()}
    files = fetched([file for name in folders for file in sorted((top / name).glob("*")) if is_named(file)])
    labelled = sum(file.parent.name == "labelsTr" and file.name.endswith(ending) for file in files)
    targets = {file.relative_to(top).as_posix(): file for file in files if not file.name.startswith(".")}
    notes: tuple[str, ...] = ("files share their bytes with the source, if on one disk: what edits one edits both",)
    if splits := find_splits(top):
        targets[SPLITS] = splits
        notes += (f"folds of {splits}",)
    return Draft(
        entries=tuple(
            Entry(case=target, shown=(target,), write=partial(place_file, file, target))
            for target, file in targets.items()
        ),
        unit="files",
        channels=request.channels or channels,
        labels=dict(request.labels) or labels,
        ending=ending,
        facts={"numTraining": len(listed) if isinstance(listed, dict) else labelled} | card,
        notes=notes,
    )


def dataset_name(source: str) -> str | None:
    """The folder's own name if nnU-Net would take it."""
    name = Path(source).expanduser().resolve().name
    return name if name.startswith("Dataset") else None


def read_card(path: Path) -> dict[str, Any]:
    """The content of dataset.json, its channel names in order as a tuple. Raises AutosegError if it is no v2 dataset.

    Only what is needed here is looked at; the dataset is checked before it gets its name.
    """
    if not path.is_file():
        raise AutosegError(f"{path} does not exist; give a raw dataset folder of nnU-Net, like nnUNet_raw/Dataset001_X")
    try:
        card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8-sig"))
        named = card["channel_names"]
        card["channel_names"] = tuple(named[number] for number in sorted(named, key=int))
        if not isinstance(card["labels"], dict) or not isinstance(card["file_ending"], str):
            raise TypeError("labels or file_ending of another kind")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AutosegError(
            f"{path} cannot be understood ({error}); nnU-Net v2 needs channel_names, labels and file_ending (a task of "
            "the Decathlon: use `import msd`)"
        ) from None
    return card


def where_it_is(entry: Any, top: Path) -> Any:
    """A case of the list `dataset`, with absolute paths; what cannot be understood stays as it is."""
    try:
        found = {**entry, "images": [str(top / os.path.expandvars(image)) for image in entry["images"]]}
        return found | {"label": str(top / os.path.expandvars(entry["label"]))} if entry.get("label") else found
    except (KeyError, TypeError, AttributeError):
        return entry


def find_splits(top: Path) -> Path | None:
    """The folds: in the raw dataset, else with the preprocessed data."""
    folders = (top, top.parent.parent / "nnUNet_preprocessed" / top.name)
    return next((folder / SPLITS for folder in folders if (folder / SPLITS).is_file()), None)


def place_file(file: Path, target: str, place: Place) -> None:
    """Give one file its place: a second name for the same bytes where file system and owner allow it, else a copy."""
    path = place.folder / target
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file.resolve(), path)
    except OSError:
        shutil.copyfile(file, path)
