"""Prepared cases on disk: one folder a case, and the only file that knows what is in it.

`image.b2nd` and `labels.b2nd` are Blosc2 arrays whose blocks suit the patches that will be cut from them,
`locations.zip` the voxels to centre patches on, `case.json` the trace, the key and the size of every other file. A
folder is written under a hidden name and renamed last: a folder that is listed is whole. The same case always gives
the same bytes.

LZ4 after a byte shuffle was chosen by measuring on MR images: patches come back twice as fast as with ZSTD, for a
quarter more disk. Arrays are opened anew for every read, 0.2 ms: so any number of threads may read one case at once,
and a thousand cases hold no file open. Blosc2 4.14 keeps Python's lock while it decodes an array, 9 ms for 128^3
voxels of float32: threads take turns at that, and cases that fit are better held in memory (`load_case`).

Locations are stored as raw numbers: the header of a .npy is an expression that numpy parses, and two threads that parse
at once may fail under Python 3.11 with "AST constructor recursion depth mismatch".
"""

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile, ZipInfo

import blosc2
import numpy as np

from autoseg.preprocess import PreparedCase
from autoseg.records import SCHEMA_VERSION, AutosegError, load_json, record, sync, to_json
from autoseg.restore import Trace

IMAGE, LABELS, LOCATIONS, CARD = "image.b2nd", "labels.b2nd", "locations.zip", "case.json"

VOXEL = np.dtype("<i4")
"""One coordinate of a location; a location is three of them (Z, Y, X)."""
BLOCK_BYTES = 128 << 10
"""What is decompressed at once: fits the second-level cache of a core."""
CHUNK_BYTES = 6 << 20
"""What lies together in the file: fits the third-level cache."""
USUAL_PATCH = (128, 128, 128)
"""The patch to lay arrays out for where none is given."""
READ_MARGIN = 1.5
"""A turned or shrunk patch is cut from a larger box; chunks reach up to this many patch edges."""


@record
class StoredCase:
    """What case.json says. `sizes` holds the bytes of the other files: a shorter file is a broken copy."""

    schema_version: int = SCHEMA_VERSION
    key: str
    trace: Trace
    sizes: dict[str, int]


class StoredArray:
    """An array on disk that is read slice by slice: `stored[:, 3:9]` is a numpy array. Safe to share among threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        array = self._open()
        self.shape: tuple[int, ...] = tuple(array.shape)
        self.dtype: np.dtype = array.dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the whole array takes in memory."""
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        """Read a part. Raises AutosegError if the file cannot be decoded."""
        array = self._open()
        try:
            return np.asarray(array[key])
        except (RuntimeError, ValueError) as error:
            raise _broken(self._path, error) from None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[...].astype(dtype or self.dtype, copy=False)

    def _open(self) -> blosc2.NDArray:
        try:
            # One thread: a patch is small, and the readers are threads themselves.
            return blosc2.open(str(self._path), mode="r", mmap_mode="r", dparams={"nthreads": 1})
        except (RuntimeError, ValueError, OSError) as error:
            raise _broken(self._path, error) from None


def write_case(folder: Path, case: PreparedCase, key: str, patch: Sequence[int] | None = None) -> None:
    """Write `case` to folder/<case name>, whole or not at all; an older one of that name is replaced.

    key: whatever tells that the case need not be prepared again; `stored_key` returns it. patch: shape of the patches
    that will be read most, two or three axes.
    """
    final, new, old = folder / case.case, folder / f".{case.case}.new", folder / f".{case.case}.old"
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        _write_array(np.asarray(case.image, np.float32), new / IMAGE, patch or USUAL_PATCH)
        _write_array(_smallest(np.asarray(case.labels)), new / LABELS, patch or USUAL_PATCH)
        with ZipFile(new / LOCATIONS, "w") as file:
            for index in sorted(case.locations):
                # A ZipInfo of one's own bears no time of day.
                file.writestr(ZipInfo(str(index)), case.locations[index].astype(VOXEL).tobytes())
        sizes = {path.name: path.stat().st_size for path in sorted(new.iterdir())}
        # Not synced file by file, since cases can be made again: after a power cut a file may be short, its size tells
        # so, and the case is prepared again.
        (new / CARD).write_text(to_json(StoredCase(key=key, trace=case.trace, sizes=sizes)))
        if final.exists():
            final.rename(old)
        new.rename(final)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def share_case(source: Path, folder: Path, case_id: str, key: str) -> None:
    """Put the whole case of the folder `source` into `folder` too, under `key`: its arrays lie on the disk once.

    Either folder may be written anew or removed and the other keeps its case. Where the disk knows no hard links the
    files are copied.
    """
    final, new, old = folder / case_id, folder / f".{case_id}.new", folder / f".{case_id}.old"
    card = replace(_card(source / case_id), key=key)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        for name in card.sizes:
            try:
                os.link(source / case_id / name, new / name)
            except OSError:
                shutil.copyfile(source / case_id / name, new / name)
        (new / CARD).write_text(to_json(card))
        if final.exists():
            final.rename(old)
        new.rename(final)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_map(path: Path, labels: np.ndarray, patch: Sequence[int]) -> None:
    """Write a label map (Z, Y, X) by itself, whole or not at all; `StoredArray(path)` reads it."""
    _write_alone(path, _smallest(labels), patch, blosc2.Codec.LZ4)


def write_bytes(path: Path, array: np.ndarray, patch: Sequence[int]) -> None:
    """As `write_map`, for uint8 (..., Z, Y, X) that is seldom read: ZSTD, smaller than LZ4 and slower to write."""
    _write_alone(path, array, patch, blosc2.Codec.ZSTD)


def _write_alone(path: Path, array: np.ndarray, patch: Sequence[int], codec: blosc2.Codec) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The folds of a cascade may miss the same map at the same time.
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        _write_array(array, temporary, patch, codec)
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed `write_case` left in `folder`. Only while nobody else writes there."""
    for ending in ("new", "old"):
        for left in folder.glob(f".*.{ending}"):
            shutil.rmtree(left)


def read_case(folder: Path, case_id: str) -> PreparedCase:
    """The case with its arrays on disk: `.image[...]` and `.labels[...]` read what is asked for, from any thread.

    Raises AutosegError if the case is not there or not whole.
    """
    place = folder / case_id
    card = _card(place)
    try:
        with ZipFile(place / LOCATIONS) as stored:
            locations = {
                int(index): np.frombuffer(stored.read(index), VOXEL).reshape(-1, 3) for index in stored.namelist()
            }
    except (ValueError, OSError, EOFError, BadZipFile) as error:
        raise _broken(place / LOCATIONS, error) from None
    image: Any = StoredArray(place / IMAGE)
    labels: Any = StoredArray(place / LABELS)
    return PreparedCase(case=case_id, image=image, labels=labels, locations=locations, trace=card.trace)


def load_case(folder: Path, case_id: str) -> PreparedCase:
    """The case with its arrays in memory. Raises AutosegError if it is not there or not whole."""
    case = read_case(folder, case_id)
    return PreparedCase(
        case=case.case, image=case.image[...], labels=case.labels[...], locations=case.locations, trace=case.trace
    )


def stored_classes(folder: Path, case_id: str) -> tuple[int, ...]:
    """The keys of the case's locations, which are not read. Raises AutosegError if they are not there or not whole."""
    place = folder / case_id
    _card(place)
    try:
        with ZipFile(place / LOCATIONS) as stored:
            return tuple(int(index) for index in stored.namelist())
    except (ValueError, OSError, EOFError, BadZipFile) as error:
        raise _broken(place / LOCATIONS, error) from None


def stored_key(folder: Path, case_id: str) -> str | None:
    """The key that the case was written with, or None if it is not there or not whole."""
    try:
        return _card(folder / case_id).key
    except AutosegError:
        return None


def list_cases(folder: Path) -> tuple[str, ...]:
    """Names of all whole cases, sorted; empty if the folder does not exist."""
    if not folder.is_dir():
        return ()
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return tuple(name for name in names if stored_key(folder, name) is not None)


def layout(shape: Sequence[int], patch: Sequence[int], itemsize: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Chunk and block shapes for reading patches out of an array whose trailing axes are (Z, Y, X).

    nnU-Net's rule. A block starts as the patch's powers of two and is halved, where it is largest relative to a read,
    until it fits `BLOCK_BYTES`; a chunk grows from it block by block, where it is smallest, up to `CHUNK_BYTES`.
    A two-axis patch lies in one slice, and so do its blocks and chunks. Leading axes are cut into single entries.
    """
    size = tuple(shape[-3:])
    edges = (1,) * (3 - len(patch)) + tuple(patch)
    read = [min(n, max(1, int(READ_MARGIN * edge))) if edge > 1 else 1 for n, edge in zip(size, edges)]
    block = [min(n, _power_of_two(edge)) for n, edge in zip(size, edges)]
    while math.prod(block) * itemsize > BLOCK_BYTES:
        axis = max((a for a in range(3) if block[a] > 1), key=lambda a: (block[a] / read[a], a))
        block[axis] = _power_of_two(block[axis]) // 2
    chunk = list(block)
    growing = {axis for axis in range(3) if chunk[axis] < read[axis]}
    while growing:
        axis = min(growing, key=lambda a: (chunk[a] / read[a], -size[a], a))
        grown = list(chunk)
        grown[axis] = min(chunk[axis] + block[axis], size[axis])
        if math.prod(grown) * itemsize > CHUNK_BYTES:
            break
        chunk = grown
        if chunk[axis] >= read[axis]:
            growing.remove(axis)
    lead = (1,) * (len(shape) - 3)
    return (*lead, *chunk), (*lead, *block)


def _power_of_two(n: int) -> int:
    """Smallest power of two that is not less than `n`."""
    return 1 << (n - 1).bit_length()


def _smallest(labels: np.ndarray) -> np.ndarray:
    """Labels in the smallest signed type that holds them all."""
    low, high = int(labels.min()), int(labels.max())
    for kind in (np.int8, np.int16, np.int32):
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return labels.astype(kind, copy=False)
    raise ValueError(f"labels from {low} to {high} do not fit 32 bits")


def _write_array(array: np.ndarray, path: Path, patch: Sequence[int], codec: blosc2.Codec = blosc2.Codec.LZ4) -> None:
    chunks, blocks = layout(array.shape, patch, array.dtype.itemsize)
    settings = {"codec": codec, "clevel": 5, "filters": [blosc2.Filter.SHUFFLE], "nthreads": 1}
    blosc2.asarray(
        np.ascontiguousarray(array), chunks=chunks, blocks=blocks, urlpath=str(path), mode="w", cparams=settings
    )


def _card(place: Path) -> StoredCase:
    """case.json of a folder, once the other files have the sizes it says. Raises AutosegError otherwise."""
    if not (place / CARD).is_file():
        raise AutosegError(f"there is no prepared case {place.name!r} in {place.parent}; run the preprocessing first")
    try:
        card = load_json(StoredCase, place / CARD)
    except AutosegError as error:
        raise _broken(place / CARD, error) from None
    for name in (IMAGE, LABELS, LOCATIONS):
        path = place / name
        if not path.is_file() or path.stat().st_size != card.sizes.get(name):
            raise _broken(path, "missing or cut short")
    return card


def _broken(path: Path, why: object) -> AutosegError:
    return AutosegError(f"{path} cannot be read ({why}); delete the folder {path.parent} and preprocess again")
