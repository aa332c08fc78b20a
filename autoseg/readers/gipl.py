"""GIPL: .gipl and .gipl.gz. The format knows spacing and origin but no direction, and is always 3D."""

import struct
from pathlib import Path

import numpy as np

from autoseg.readers import itk
from autoseg.readers.itk import Stored
from autoseg.records import AutosegError
from autoseg.volume import Grid

ENDINGS: tuple[str, ...] = (".gipl.gz", ".gipl")
TYPES: tuple[str, ...] = ("uint8", "int8", "int16", "uint16", "float32", "float64")

HEADER_BYTES = 256
BYTES_A_VOXEL = {1: 1, 7: 1, 8: 1, 15: 2, 16: 2, 31: 4, 32: 4, 64: 4, 65: 8}
"""Type code of the header -> size of one voxel."""


def files(path: Path) -> tuple[Path, ...]:
    """All files that reading `path` reads."""
    return (path,)


def read(path: Path, *, indices: bool = False) -> Stored:
    """Decode one file; see `Reader.read`."""
    header = itk.head(path, HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        raise AutosegError(f"{path} is too short for a GIPL header; it is damaged or not what its name says")
    *size, kind = struct.unpack_from(">5H", header)
    # SimpleITK fills up truncated files without a word.
    itk.check_length(path, HEADER_BYTES + int(np.prod(np.maximum(size, 1))) * BYTES_A_VOXEL.get(kind, 1))
    return itk.read(path)


def write(path: Path, array: np.ndarray, grid: Grid) -> None:
    """Encode one file; see `Reader.write`. Raises AutosegError for what the format cannot say."""
    if grid.dimension == 2 or len(array) > 1 or not np.allclose(grid.direction, np.eye(3)):
        raise AutosegError(
            f"{path}: GIPL holds neither 2D images nor several channels nor a direction; use .nii.gz or .nrrd"
        )
    itk.write(path, array, grid)
