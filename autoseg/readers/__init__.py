"""Image files <-> canonical volumes: one table of readers, one file a family of formats.

Inside, 3D images lie in canonical orientation, float32 for images and integers for labels; 2D images stay as they
are, with Z = 1. What is written goes back to the grid of the file that was read.

Channels of pictures (PNG, BMP, TIFF) are fitted to the number that is expected, only where nothing is lost:
an opacity that never changes is dropped, three equal colours count as one grey, one grey serves as three colours.
An opacity is kept as a channel only if the expected number says so. All else is refused.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from autoseg.readers import gipl, metaimage, nifti, nrrd, picture, tiff
from autoseg.readers.itk import Stored
from autoseg.records import AutosegError
from autoseg.volume import Grid, Volume, canonical_grid, from_canonical, mismatch, to_canonical

__all__ = [
    "ENDINGS",
    "READERS",
    "Reader",
    "Stored",
    "expected_in_file",
    "files_of",
    "join",
    "not_there",
    "on_grid_of",
    "read_image",
    "read_labels",
    "read_pair",
    "read_stored",
    "reader_for",
    "says_size",
    "whole_labels",
    "write_image",
    "write_labels",
]


class Reader(Protocol):
    """What a family of formats offers; each module in this folder is one."""

    ENDINGS: tuple[str, ...]
    """File name endings in small letters, with their dots."""
    TYPES: tuple[str, ...]
    """numpy types that can be written, integers from small to large."""

    def files(self, path: Path) -> tuple[Path, ...]:
        """All files that reading `path` reads, itself first."""

    def read(self, path: Path, *, indices: bool = False) -> Stored:
        """Decode `path`; with `indices`, palette images give palette indices, else colours. Raises AutosegError."""

    def write(self, path: Path, array: np.ndarray, grid: Grid) -> None:
        """Encode array (C, Z, Y, X), of one of TYPES, on its grid: whole or not at all. Raises AutosegError."""


READERS: dict[str, Reader] = {
    "nifti": nifti,
    "nrrd": nrrd,
    "metaimage": metaimage,
    "gipl": gipl,
    "tiff": tiff,
    "picture": picture,
}

ENDINGS: dict[str, Reader] = {ending: reader for reader in READERS.values() for ending in reader.ENDINGS}


def reader_for(path: Path) -> Reader:
    """The reader of `path` by its ending, whatever its case. Raises AutosegError that lists the known endings."""
    name = path.name.lower()
    for ending, reader in ENDINGS.items():
        if name.endswith(ending):
            return reader
    if name.endswith((".jpg", ".jpeg", ".jp2")):
        raise AutosegError(f"{path}: JPEG alters the image where it compresses; export the original as .png")
    if name.endswith((".dcm", ".hdr", ".img")):
        raise AutosegError(f"{path}: convert it to .nii.gz first; this format is not read directly")
    raise AutosegError(f"{path}: no reader for this ending; known are {', '.join(ENDINGS)}")


def files_of(path: Path) -> tuple[Path, ...]:
    """All files that reading `path` reads: itself, and what lies beside it (voxels of .mhd, spacing of .tif)."""
    return reader_for(path).files(path)


def is_named(path: Path) -> bool:
    """Whether there is a file of this name, or a link to one that is not there: reading the latter says so."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def not_there(path: Path) -> str:
    """What to say of a file that cannot be found: it may be a link whose file has not been fetched."""
    if path.is_symlink():
        return (
            f"{path} is a link to {os.readlink(path)}, which is not there; fetch it (datalad get, git annex get), "
            "mount the drive that it lies on, or remove the link"
        )
    return f"{path} does not exist"


def says_size(path: Path) -> bool:
    """Whether a file says how large its voxels are, itself or by a file beside it; decodes nothing."""
    return reader_for(path) not in (tiff, picture) or len(files_of(path)) > 1


def read_stored(path: Path, *, channels: int | None = None, indices: bool = False, cure: str = "") -> Stored:
    """One file in its own axis order and type, its channels fitted to the number expected (None: any).

    Raises AutosegError if the file is missing, damaged, or holds another number of channels. `cure`: what to do about
    that number; without one, what helps where dataset.json says it.
    """
    reader = reader_for(path)
    if not path.is_file():
        raise AutosegError(not_there(path))
    stored = fit_channels(reader.read(path, indices=indices), channels, path)
    if channels is not None and len(stored.array) != channels:
        found = len(stored.array)
        # The fourth axis of a volume may be either.
        kind = "channels or time points" if found > 1 and not stored.picture else "channels"
        usual = "add the files of the others, or correct channel_names"
        if found > channels:
            usual = "name each in channel_names, or save each time point as an image of its own"
        raise AutosegError(f"{path} holds {found} {kind}, expected are {channels}; {cure or usual}")
    return stored


def fit_channels(stored: Stored, channels: int | None, path: Path) -> Stored:
    """Drop, merge or repeat the channels of a picture by the rules of this module; others stay as they are."""
    array = stored.array
    if stored.alpha and channels != len(array):
        if array[-1].min() != array[-1].max():
            raise AutosegError(f"{path} is transparent in places; save it without alpha, or name alpha as a channel")
        array = array[:-1]
    if stored.picture and channels == 1 and len(array) == 3 and (array[0] == array[1:]).all():
        array = array[:1]
    if stored.picture and channels == 3 and len(array) == 1:
        array = array.repeat(3, axis=0)
    return stored if array is stored.array else replace(stored, array=array, alpha=False)


def read_image(paths: Sequence[Path], *, channels: int | None = None, cure: str = "") -> tuple[Volume, Grid]:
    """All channels of one case, from one file or a file a channel: canonical float32 volume, and the first file's grid.

    `channels` is the number expected, None for any; `cure` is what to do about another number. Raises AutosegError if a
    file cannot be read, the number differs or the files lie on different grids.
    """
    parts = [read_stored(path, channels=expected_in_file(len(paths), channels), cure=cure) for path in paths]
    return join(parts, paths, channels, cure)


def expected_in_file(files: int, channels: int | None) -> int | None:
    """How many channels one file must hold where `files` files hold `channels` channels; None if that is open."""
    return channels if files == 1 else 1 if files == channels else None


def join(parts: Sequence[Stored], paths: Sequence[Path], channels: int | None, cure: str = "") -> tuple[Volume, Grid]:
    """Decoded files of one case -> canonical float32 volume, and the first file's grid; see `read_image`."""
    first = parts[0]
    grids = [canonical_grid(part.grid) for part in parts]
    for path, grid in zip(paths[1:], grids[1:]):
        if difference := mismatch(grids[0], grid):
            raise AutosegError(
                f"{path.name} and {paths[0].name} are channels of one case on different grids ({difference}); "
                "resample one onto the other"
            )
    count = sum(len(part.array) for part in parts)
    if channels is not None and count != channels:
        raise AutosegError(
            f"{paths[0]}: {count} channels in {len(paths)} files, expected are {channels}; "
            + (cure or "correct channel_names")
        )
    array = np.empty((count, *grids[0].shape), np.float32)
    place = 0
    # A number too large for float32 becomes infinite, which the check of the voxels reports.
    with np.errstate(over="ignore"):
        for part in parts:
            array[place : place + len(part.array)] = to_canonical(part.array, part.grid)
            place += len(part.array)
    return Volume(array=array, grid=grids[0]), first.grid


def read_labels(path: Path) -> tuple[Volume, Grid]:
    """Labels of one case: canonical integer volume (1, Z, Y, X) with the values of the file, and the file's grid.

    Floating-point files are accepted if all values are whole; palette pictures give palette indices.
    Raises AutosegError for several channels (colours), fractions and what cannot be read.
    """
    return whole_labels(read_stored(path, indices=True), path)


def whole_labels(stored: Stored, path: Path) -> tuple[Volume, Grid]:
    """A decoded label file -> canonical integer volume, and the file's grid; see `read_labels`."""
    stored = fit_channels(stored, 1, path)
    if len(stored.array) != 1:
        kind = "colours" if stored.picture else f"{len(stored.array)} channels"
        raise AutosegError(
            f"{path} holds {kind}; labels must be one integer a voxel: replace each colour "
            "or channel by its label value"
        )
    array = stored.array
    if array.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            whole = array.astype(np.int32)
        if not np.array_equal(whole, array):
            raise AutosegError(
                f"{path} holds labels that are no whole numbers; was it interpolated, or is it an image?"
            )
        array = whole
    return Volume(array=to_canonical(array, stored.grid), grid=canonical_grid(stored.grid)), stored.grid


def on_grid_of(mask: Stored, image: Stored) -> Stored:
    """`mask` voxel by voxel on the grid of `image`, where it says no voxel size itself and the shapes agree."""
    return mask if mask.sized or mask.grid.shape != image.grid.shape else replace(mask, grid=image.grid)


def read_pair(first: Path, second: Path) -> tuple[Volume, Volume]:
    """Two label files of one case as by `read_labels`; one that says no voxel size lies on the grid of the other."""
    one, two = (read_stored(path, indices=True) for path in (first, second))
    one, two = on_grid_of(one, two), on_grid_of(two, one)
    return whole_labels(one, first)[0], whole_labels(two, second)[0]


def write_labels(labels: np.ndarray, stored: Grid, path: Path) -> None:
    """Write canonical integer labels (Z, Y, X) onto the grid `stored`, in the smallest type that holds their values.

    Raises AutosegError if the format cannot hold them; ValueError if the shape is not that of the canonical grid.
    """
    if labels.dtype.kind not in "iub":
        raise ValueError(f"labels must be integers, found {labels.dtype}")
    back = _back(labels[None], stored)
    kind = _smallest(back, reader_for(path), path)
    reader_for(path).write(path, back.astype(kind, copy=False), stored)


def write_image(array: np.ndarray, stored: Grid, path: Path) -> None:
    """Write a canonical image (C, Z, Y, X) or (Z, Y, X) onto the grid `stored`.

    Integers keep their type where the format has it, fractions become float32; pictures take whole numbers only.
    Raises AutosegError if the format cannot hold it; ValueError if the shape is not that of the canonical grid.
    """
    reader = reader_for(path)
    back = _back(array if array.ndim == 4 else array[None], stored)
    if back.dtype.kind == "f" and "float32" in reader.TYPES:
        kind = "float32"
    elif back.dtype.kind == "f" and not np.array_equal(np.rint(back), back):
        raise AutosegError(f"{path}: {path.suffix} holds whole numbers only; use .nii.gz, .nrrd or .tif")
    else:
        kind = back.dtype.name if back.dtype.name in reader.TYPES else _smallest(back, reader, path)
    reader.write(path, back.astype(kind, copy=False), stored)


def _back(array: np.ndarray, stored: Grid) -> np.ndarray:
    if array.shape[1:] != canonical_grid(stored).shape:
        raise ValueError(f"array of shape {array.shape[1:]} does not fit the grid {canonical_grid(stored).shape}")
    return from_canonical(array, stored)


def _smallest(array: np.ndarray, reader: Reader, path: Path) -> str:
    low, high = int(array.min()), int(array.max())
    kinds = [kind for kind in reader.TYPES if "int" in kind]
    for kind in kinds:
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return kind
    ending = re.search(r"\.\w+$", path.name)
    raise AutosegError(
        f"{path}: values {low} to {high} do not fit {ending[0] if ending else path.name}; use .nii.gz or .nrrd"
    )
