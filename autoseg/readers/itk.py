"""What the families that SimpleITK reads share: decode, check the geometry, encode, and write atomically.

SimpleITK repairs or ignores some broken headers in silence and reads some truncated files without a word, so the
families check what it does not. Its own warnings are switched off: whatever matters is raised as an error here.
"""

import errno
import gzip
import os
import re
import shutil
import tempfile
import textwrap
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from autoseg.records import AutosegError, sync
from autoseg.volume import Grid

sitk.ProcessObject.SetGlobalWarningDisplay(False)

GZIP_LEAST = 18
"""Bytes of a gzip file that holds nothing."""
LONGEST_HEADER = 4096
"""A NIfTI header has 352 bytes, or 544 in version 2, and may have a little more."""
REASON = 200
"""Most letters that are shown of what SimpleITK says."""
ORTHONORMAL = 1e-3
"""Largest entry of DᵀD - 1 for a direction matrix D that still counts as a rotation or reflection."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Stored:
    """One file as it is: array (C, Z, Y, X) in the file's own type and axis order, and its grid."""

    array: np.ndarray
    grid: Grid
    picture: bool = False
    """Whether the channels are grey or red, green, blue."""
    alpha: bool = False
    """Whether the last channel is opacity."""
    sized: bool = True
    """Whether the file says how large its voxels are; if not, the spacing is 1 mm."""


def read(path: Path) -> Stored:
    """Decode `path` through SimpleITK. Channels are vector components or the fourth axis.

    Raises AutosegError that names the file if it cannot be decoded or its geometry is none.
    """
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise unreadable(path, error) from None
    return stored_of(image, path)


def stored_of(image: sitk.Image, path: Path) -> Stored:
    """A SimpleITK image as if it had been read from `path`, which only errors name."""
    grid = grid_of(image, path)
    array = sitk.GetArrayFromImage(image)
    if np.iscomplexobj(array):
        raise AutosegError(f"{path} holds complex numbers; save magnitude and phase as separate channels")
    if image.GetNumberOfComponentsPerPixel() > 1:
        if image.GetDimension() == 4:
            raise AutosegError(
                f"{path} has both a fourth axis and several values a voxel; keep one of the two as channels"
            )
        array = np.moveaxis(array, -1, 0)
    elif image.GetDimension() < 4:
        array = array[None]
    return Stored(array=array.reshape(array.shape[0], *grid.shape), grid=grid)


def unreadable(path: Path, error: Exception) -> AutosegError:
    """The error of a decoder in words for people."""
    text = " ".join(str(error).split())
    if "orthonormal" in text:
        return AutosegError(
            f"{path}: its axes are not at right angles (a sheared or degenerate sform), and there is no valid qform "
            "instead; resample it to a rectangular grid, or repair the header"
        )
    if "spacing is not supported" in text:
        return AutosegError(f"{path}: a spacing is zero or no number; correct the header")
    if "determinant is 0" in text:
        return AutosegError(f"{path}: its direction matrix is singular; correct the header")
    return AutosegError(f"{path} cannot be read, it is damaged or not what its name says; replace it ({reason(text)})")


def reason(text: str) -> str:
    """What a decoder or encoder said, without where in its source; the first words of a long speech."""
    return textwrap.shorten(text.split("ERROR:")[-1], REASON, placeholder=" ...")


def grid_of(image: sitk.Image | sitk.ImageFileReader, path: Path) -> Grid:
    """The grid of a 2D, 3D or 4D image, or of a header that was read. Raises AutosegError if it is not rectangular."""
    dimension = image.GetDimension()
    if dimension not in (2, 3, 4):
        raise AutosegError(f"{path} has {dimension} dimensions; 2, 3, or 4 (the fourth for channels) are supported")
    space = min(dimension, 3)
    direction, spacing, origin = np.eye(3), np.ones(3), np.zeros(3)
    direction[:space, :space] = np.reshape(image.GetDirection(), (dimension, dimension))[:space, :space]
    spacing[:space] = np.abs(image.GetSpacing()[:space])
    origin[:space] = image.GetOrigin()[:space]
    if not (
        np.isfinite(direction).all() and np.isfinite(spacing).all() and np.isfinite(origin).all() and spacing.all()
    ):
        raise AutosegError(f"{path}: spacing, origin or direction is zero or no number; correct the header")
    if np.abs(direction.T @ direction - np.eye(3)).max() > ORTHONORMAL:
        raise AutosegError(
            f"{path}: its axes are not at right angles or its direction matrix is scaled; resample it to a rectangular "
            "grid, or repair the header"
        )
    size = (*image.GetSize()[:space], 1)[:3]
    return Grid(
        shape=size[::-1],
        spacing_mm=tuple(spacing[::-1].tolist()),
        origin_mm=tuple(origin.tolist()),  # type: ignore[arg-type]
        direction=tuple(tuple(row) for row in direction.tolist()),  # type: ignore[arg-type]
        dimension=2 if dimension == 2 else 3,
    )


def write(path: Path, array: np.ndarray, grid: Grid) -> None:
    """Encode array (C, Z, Y, X) on `grid` through SimpleITK, compressed where the format can, whole or not at all."""
    space: int = grid.dimension
    plain = array[:, 0] if space == 2 else array
    vector = len(array) > 1
    image = sitk.GetImageFromArray(np.moveaxis(plain, 0, -1) if vector else plain[0], isVector=vector)
    image.SetSpacing(grid.spacing_mm[::-1][:space])
    image.SetOrigin(grid.origin_mm[:space])
    image.SetDirection(np.asarray(grid.direction)[:space, :space].ravel().tolist())
    with staged(path) as temporary:
        try:
            sitk.WriteImage(image, str(temporary), useCompression=True)
        except RuntimeError as error:
            raise AutosegError(f"{path} cannot be written: {reason(str(error))}") from None
        if path.name.lower().endswith((".nii", ".nii.gz")) and not whole(temporary, array.nbytes):
            raise OSError(errno.ENOSPC, "not all of it could be written, as on a full disk", str(path))


def whole(path: Path, voxels: int) -> bool:
    """Whether a NIfTI file holds so many bytes of voxels and a header. Its writer says nothing of a full disk."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if path.suffix.lower() == ".gz":
            if size < GZIP_LEAST:
                return False
            file.seek(-4, os.SEEK_END)  # gzip ends with the size of what it holds, modulo 4 GiB
            size = int.from_bytes(file.read(4), "little")
    return (size - voxels) % 2**32 < LONGEST_HEADER


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Lend a path of the same name in a new folder beside `path`; what is written there moves to its place at the end.

    The name is kept because formats of two files write it into the header; the file called `path` moves last. On an
    error nothing moves. Missing folders are made. Raises AutosegError if no file of that name was written: some writers
    change an ending that they know in small letters only.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield folder / path.name
        if not (folder / path.name).is_file():
            made = ", ".join(sorted(part.name for part in folder.iterdir())) or "nothing"
            raise AutosegError(f"{path} was not written, but {made}; give its ending in small letters")
        for part in sorted(folder.iterdir(), key=lambda part: part.name == path.name):
            sync(part)
            os.replace(part, path.parent / part.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def head(path: Path, count: int) -> bytes:
    """The first `count` bytes of a file that may be compressed with gzip."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            return file.read(count)
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, error) from None


def check_length(path: Path, expected: int) -> None:
    """Raise AutosegError if the file, unpacked, is shorter than `expected` bytes.

    gzip ends with the unpacked length; only where that does not fit (several members, or truncated) is all unpacked.
    """
    if path.suffix.lower() != ".gz":
        length = path.stat().st_size
    else:
        with path.open("rb") as file:
            file.seek(-4, os.SEEK_END)
            if int.from_bytes(file.read(4), "little") == expected % 2**32:
                return
        length = 0
        try:
            with gzip.open(path) as file:
                while block := file.read(1 << 22):
                    length += len(block)
        except (OSError, EOFError, zlib.error):
            raise AutosegError(f"{path} is truncated or damaged inside; copy or export it again") from None
    if length < expected:
        raise AutosegError(f"{path} is truncated: it holds {length} of {expected} bytes; copy or export it again")


def with_voxel_file(path: Path, key: bytes) -> tuple[Path, ...]:
    """`path`, and the file of voxels that its text header names after `key`, if it names one.

    Raises AutosegError if that file is missing or if the header names a series of files.
    """
    found = re.search(rb"(?im)^" + key + rb"([^\r\n]+)", head(path, 1 << 16).split(b"\n\n")[0])
    name = found[1].decode(errors="replace").strip() if found else "LOCAL"
    if name.upper() == "LOCAL":
        return (path,)
    if name.upper().startswith("LIST") or "%" in name:
        raise AutosegError(f"{path} spreads its voxels over several files ({name}); save it as one file")
    voxels = path.parent / name
    if not voxels.is_file():
        raise AutosegError(
            f"{path} names {name} as the file of its voxels, and there is none; put it beside {path.name}"
        )
    return path, voxels
