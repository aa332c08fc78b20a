"""A raw dataset of nnU-Net v2: taken as it is, without a second copy of the voxels where the file system can.

Its splits_final.json comes along: nnU-Net keeps it with the preprocessed data, nnUNet_preprocessed beside nnUNet_raw.
"""

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from autoseg.datasets.importing import Draft, Entry, Place, Request, linked
from autoseg.records import AutosegError

FOLDERS = ("imagesTr", "labelsTr", "imagesTs", "labelsTs")
SPLITS = "splits_final.json"


def find(request: Request) -> Draft:
    """All files of the dataset folder, one entry a file."""
    top = Path(request.source).expanduser().resolve()
    path = top / "dataset.json"
    if not path.is_file():
        raise AutosegError(
            f"{top} has no dataset.json; give a raw dataset folder of nnU-Net, like nnUNet_raw/Dataset001_X"
        )
    try:
        card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8-sig"))
        labels, ending = card["labels"], card["file_ending"]
        channels = tuple(card["channel_names"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AutosegError(
            f"{path} lacks {error}; nnU-Net v2 needs channel_names, labels and file_ending (a task of the Decathlon: "
            "use `import msd`)"
        ) from None
    for entry in card.get("dataset", {}).values():
        # Where cases are listed, their files stay where they are.
        entry["images"] = [str(top / os.path.expandvars(image)) for image in entry["images"]]
        entry["label"] = str(top / os.path.expandvars(entry["label"]))
    files = [file for name in FOLDERS for file in sorted((top / name).glob("*")) if file.is_file()]
    files += [splits] if (splits := find_splits(top)) else []
    return Draft(
        entries=tuple(
            Entry(case=file.relative_to(top).as_posix() if top in file.parents else file.name, shown=(file.name,),
                  write=partial(place_file, file, top))
            for file in files
            if not file.name.startswith(".")
        ),
        unit="files",
        channels=request.channels or channels,
        labels=dict(request.labels) or labels,
        ending=ending,
        facts={key: value for key, value in card.items() if key not in ("channel_names", "labels", "file_ending")},
        notes=(f"folds of {splits}",) if splits else (),
    )  # fmt: skip


def dataset_name(source: str) -> str | None:
    """The folder's own name if nnU-Net would take it."""
    name = Path(source).expanduser().resolve().name
    return name if name.startswith("Dataset") else None


def find_splits(top: Path) -> Path | None:
    """The folds: in the raw dataset, else with the preprocessed data."""
    folders = (top, top.parent.parent / "nnUNet_preprocessed" / top.name)
    return next((folder / SPLITS for folder in folders if (folder / SPLITS).is_file()), None)


def place_file(file: Path, top: Path, place: Place) -> None:
    """Give one file its place: a second name for the same bytes where possible, else a copy."""
    target = place.folder / (file.relative_to(top) if top in file.parents else file.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not linked(file, target):
        shutil.copyfile(file, target)
