"""A task of the Medical Segmentation Decathlon (Antonelli et al., Nature Communications 2022): its folder or its .tar.

dataset.json names channels, labels and training cases. Images of several channels are split along their fourth axis
into one file a channel; all others are copied byte for byte. Hidden files (`._x`, left by macOS in the archives) are
passed over. From an archive only plain files of the known folders are taken, under their own last name.
"""

import json
import lzma
import re
import shutil
import tarfile
import zlib
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from autoseg.datasets.importing import Draft, Entry, Place, Request, encode, ending_of, put
from autoseg.readers import read_stored
from autoseg.records import AutosegError

FOLDERS = ("imagesTr", "labelsTr", "imagesTs")
FACTS = ("name", "description", "reference", "licence", "release")


def find(request: Request) -> Draft:
    """The cases of a task folder or archive. An archive is unpacked to the scratch folder, its files are then moved."""
    source = Path(request.source).expanduser()
    packed = source.is_file()
    top = unpack(source, request.scratch) if packed else task_folder(source)
    card = read_card(top)
    channels = request.channels or tuple(named(card, "modality", top).values())
    labels = {name: value for value, name in named(card, "labels", top).items() if value} | {"background": 0}
    entries = [training_entry(top, listed, channels, packed) for listed in card.get("training") or ()]
    entries += [test_entry(top, listed, channels, packed) for listed in card.get("test") or ()]
    if missing := [entry.shown for entry in entries if entry.shown[-1].startswith("missing")]:
        raise AutosegError(f"{source}: {len(missing)} listed files are {missing[0][-1]}; unpack or download it again")
    if not any(entry.part == "Tr" for entry in entries):
        raise AutosegError(f"{top / 'dataset.json'} lists no training case")
    return Draft(
        entries=tuple(entries),
        channels=channels,
        labels=dict(request.labels) or dict(sorted(labels.items(), key=lambda label: label[1])),
        ending=".nii.gz",
        facts={key: card[key] for key in FACTS if isinstance(card.get(key), str)},
    )


def dataset_name(source: str) -> str | None:
    """Task04_Hippocampus or Task04_Hippocampus.tar -> Dataset004_Hippocampus; None for other names."""
    found = re.match(r"Task0*(\d{1,3})_(\w+)", Path(source).expanduser().resolve().name)
    return f"Dataset{int(found[1]):03d}_{found[2]}" if found else None


def task_folder(source: Path) -> Path:
    """The folder that holds dataset.json: `source` itself or the only one below it that does."""
    for folder in (source, *sorted(source.glob("*/"))):
        if (folder / "dataset.json").is_file():
            return folder
    raise AutosegError(f"{source} has no dataset.json; give a task folder of the Decathlon, or its .tar")


def read_card(top: Path) -> dict[str, Any]:
    """The content of dataset.json. Raises AutosegError if it is not that of the Decathlon."""
    path = top / "dataset.json"
    try:
        card = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise AutosegError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(card, dict) or not all(isinstance(card.get(key), dict) for key in ("modality", "labels")):
        hint = "; this is a dataset of nnU-Net: use `import nnunet`" if "channel_names" in card else ""
        raise AutosegError(f"{path} has no `modality` and `labels` as those of the Decathlon have{hint}")
    return card


def named(card: dict[str, Any], key: str, top: Path) -> dict[int, str]:
    """{"0": name, ...} with its numbers as numbers, in order."""
    try:
        return {int(number): str(card[key][number]) for number in sorted(card[key], key=int)}
    except ValueError:
        raise AutosegError(f"{top / 'dataset.json'}: the keys of {key} must be numbers, found {[*card[key]]}") from None


def training_entry(top: Path, listed: Any, channels: tuple[str, ...], move: bool) -> Entry:
    """The entry of {"image": path, "label": path}; only the last part of each path counts."""
    if not isinstance(listed, dict) or not all(isinstance(listed.get(key), str) for key in ("image", "label")):
        raise AutosegError(f'{top / "dataset.json"}: a training case must be {{"image": ..., "label": ...}}: {listed}')
    image, label = at(top, "imagesTr", listed["image"]), at(top, "labelsTr", listed["label"])
    return entry_of(image, label, channels, move)


def test_entry(top: Path, listed: Any, channels: tuple[str, ...], move: bool) -> Entry:
    """The entry of a test image, which has no label; some releases list it like a training case."""
    image = listed.get("image") if isinstance(listed, dict) else listed
    if not isinstance(image, str):
        raise AutosegError(f"{top / 'dataset.json'}: a test case must be the path of an image: {listed}")
    return entry_of(at(top, "imagesTs", image), None, channels, move)


def at(top: Path, folder: str, listed: str) -> Path:
    """The file called as `listed` ends, in `folder`; some releases list .nii for .nii.gz."""
    path = top / folder / PurePosixPath(listed).name
    packed = path.with_name(path.name + ".gz")
    return packed if not path.is_file() and packed.is_file() else path


def entry_of(image: Path, label: Path | None, channels: tuple[str, ...], move: bool) -> Entry:
    """One case, called as its image."""
    absent = [path.name for path in (image, label) if path is not None and not path.is_file()]
    shown = (f"missing, for example {absent[0]}",) if absent else (image.name, label.name if label else "")
    write = partial(write_case, image, label, len(channels), move)
    return Entry(case=image.name[: -len(ending_of(image))], part="Tr" if label else "Ts", shown=shown, write=write)


def write_case(image: Path, label: Path | None, channels: int, move: bool, place: Place) -> None:
    """Put the image, split into its channels, and the label in their places."""
    if channels == 1:
        put(image, place.image(), move=move)
    else:
        stored = read_stored(image, channels=channels)
        for channel in range(channels):
            encode(stored, place.image(channel), channel)
    if label is not None:
        put(label, place.label, move=move)


def unpack(archive: Path, scratch: Path) -> Path:
    """Write the files of a .tar or .tar.gz that a task consists of below `scratch`; returns the folder that holds them.

    Links, devices and everything outside the known folders are passed over, so that nothing is written elsewhere.
    Raises AutosegError for what is no archive, is truncated, names a file twice or would not fit on the disk.
    """
    print(f"unpacking {archive} ({archive.stat().st_size / 1e6:.0f} MB)", flush=True)
    taken: set[str] = set()
    free = shutil.disk_usage(scratch).free
    try:
        with tarfile.open(archive) as opened:
            for member in opened:
                target = wanted(member)
                if target is None:
                    continue
                if target in taken:
                    raise AutosegError(f"{archive} holds {target} twice; it is not what the Decathlon gives out")
                taken.add(target)
                free -= member.size
                if free < 0:
                    raise AutosegError(f"{archive} does not fit on the disk of {scratch.parent}; make room")
                content = opened.extractfile(member)
                assert content is not None
                (scratch / target).parent.mkdir(parents=True, exist_ok=True)
                with content, (scratch / target).open("wb") as file:
                    shutil.copyfileobj(content, file, 1 << 20)
            # gzip keeps its checksum at the very end, behind what tarfile reads.
            while opened.fileobj is not None and opened.fileobj.read(1 << 20):
                pass
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise AutosegError(f"{archive} cannot be unpacked, it is truncated or no .tar ({error})") from None
    if "dataset.json" not in taken:
        raise AutosegError(f"{archive} holds no dataset.json beside imagesTr; it is no task of the Decathlon")
    return scratch


def wanted(member: tarfile.TarInfo) -> str | None:
    """Where a member belongs: dataset.json or FOLDER/FILE; None for what is not wanted."""
    parts = PurePosixPath(member.name).parts
    # Back slashes and colons would lead elsewhere on Windows.
    if not member.isfile() or not parts or parts[-1].startswith(".") or ".." in parts or set("\\:") & set(parts[-1]):
        return None
    if parts[-1] == "dataset.json" and len(parts) <= 2:
        return parts[-1]
    inside = len(parts) in (2, 3) and parts[-2] in FOLDERS and parts[-1].endswith((".nii", ".nii.gz"))
    return f"{parts[-2]}/{parts[-1]}" if inside else None
