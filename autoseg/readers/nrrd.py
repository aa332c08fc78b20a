"""NRRD: .nrrd, and .nhdr with its voxels in a file beside it."""

from pathlib import Path

import numpy as np

from autoseg.readers import itk
from autoseg.readers.itk import Stored
from autoseg.volume import Grid

ENDINGS: tuple[str, ...] = (".nrrd", ".nhdr")
TYPES: tuple[str, ...] = (
    "uint8",
    "int8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "int64",
    "uint64",
    "float32",
    "float64",
)


def files(path: Path) -> tuple[Path, ...]:
    """All files that reading `path` reads."""
    return itk.with_voxel_file(path, rb"data ?file:\s*")


def read(path: Path, *, indices: bool = False) -> Stored:
    """Decode one file; see `Reader.read`."""
    files(path)
    return itk.read(path)


def write(path: Path, array: np.ndarray, grid: Grid) -> None:
    """Encode one file; see `Reader.write`."""
    itk.write(path, array, grid)
