"""TIFF: .tif and .tiff, 2D, or 3D as one page a slice.

TIFF says nothing reliable about voxel size (its resolution is that of a printer), so spacing is 1 mm unless a file
beside it says it, see `sidecar`; one page is 2D unless that file has three numbers.
Thumbnails and other reduced copies are passed over. tifffile decodes, since SimpleITK misreads planar colours, grey
with alpha, palettes, one-bit masks and truncated stacks without a word; LZW, for which tifffile wants another package,
goes through SimpleITK where it reads it right.
"""

from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from autoseg.readers import itk, sidecar
from autoseg.readers.itk import Stored, staged
from autoseg.records import AutosegError
from autoseg.volume import Grid

ENDINGS: tuple[str, ...] = (".tif", ".tiff")
TYPES: tuple[str, ...] = ("uint8", "int8", "int16", "uint16", "int32", "uint32", "float32", "float64")

LOSSY = {6, 7, 33003, 33004, 33005, 34712}
"""Compression codes of JPEG and JPEG 2000."""
LZW = 5
REDUCED = 1
"""Bit of the file type of a page."""
ALPHA, OTHER_ALPHA = (1,), (2,)
"""The extra sample is an opacity, with which the colours are multiplied or not."""
GREY, RGB, PALETTE = 1, 2, 3
"""Photometric codes; 0 is grey with white as zero, and its numbers are taken as they are too."""


def files(path: Path) -> tuple[Path, ...]:
    """All files that reading `path` reads."""
    beside = sidecar.find(path, strict=True)
    return (path,) if beside is None else (path, beside)


def read(path: Path, *, indices: bool = False) -> Stored:
    """Decode one file; see `Reader.read`."""
    try:
        with tifffile.TiffFile(path) as tiff:
            pages: list[Any] = [page for page in list[Any](tiff.pages) if not page.subfiletype & REDUCED]
            first = pages[0]
            tiff.filehandle.seek(tiff.pages.next_page_offset or 0)
            if any(tiff.filehandle.read(tiff.tiff.offsetsize)):
                raise AutosegError(f"{path} is truncated: pages are missing; copy or export it again")
            if (tiff.imagej_metadata or {}).get("images", 1) > len(pages):
                raise AutosegError(f"{path} is an ImageJ stack without an entry for each slice; save it as .nrrd")
            if first.compression in LOSSY:
                raise AutosegError(
                    f"{path} is compressed with loss (JPEG), which alters what is learnt; export without loss"
                )
            if len({page.shape for page in pages}) > 1:
                raise AutosegError(f"{path} has pages of several sizes; keep only the image itself")
            if first.axes not in ("YX", "YXS", "SYX"):
                raise AutosegError(
                    f"{path} has axes {first.axes}, which is neither a picture nor a stack; save one page a slice"
                )
            array = through_itk(path, first) if first.compression == LZW else np.stack([p.asarray() for p in pages])
            if first.axes == "SYX":
                array = np.moveaxis(array, 1, -1)
            if first.photometric == PALETTE and not indices:
                array = np.moveaxis(np.asarray(first.colormap)[:, array], 0, -1)
            samples = array.shape[3] if array.ndim == 4 else 1
            alpha = samples in (2, 4) and first.extrasamples in (ALPHA, OTHER_ALPHA)
    except (OSError, ValueError, IndexError, KeyError, tifffile.TiffFileError) as error:
        raise itk.unreadable(path, error) from None
    except Exception as error:
        # Decompressors raise classes of their own.
        if isinstance(error, AutosegError) or "decompress" not in str(error):
            raise
        raise itk.unreadable(path, error) from None
    array = np.moveaxis(array.reshape(*array.shape[:3], samples), -1, 0)
    array = array.astype(np.uint8) if array.dtype == bool else array
    beside = sidecar.read(path, strict=True)
    flat = len(pages) == 1 and (beside is None or len(beside) == 2)
    spacing = (1.0, 1.0, 1.0, *(beside or ()))[-3:]
    grid = Grid(shape=array.shape[1:], spacing_mm=spacing, dimension=2 if flat else 3)  # type: ignore[arg-type]
    return Stored(array=array, grid=grid, picture=samples <= 4, alpha=alpha, sized=beside is not None)


def through_itk(path: Path, page: tifffile.TiffPage) -> np.ndarray:
    """Decode with SimpleITK: array (Z, Y, X) or (Z, Y, X, S). Raises AutosegError for layouts that it misreads."""
    plain = page.photometric in (GREY, RGB) and page.axes in ("YX", "YXS") and page.samplesperpixel != 2
    if not plain or page.bitspersample not in (8, 16, 32):
        raise AutosegError(
            f"{path}: this layout is not supported with LZW compression; save it with deflate or uncompressed"
        )
    array = np.moveaxis(itk.read(path).array, 0, -1)
    return array if page.axes == "YXS" else array[..., 0]


def write(path: Path, array: np.ndarray, grid: Grid) -> None:
    """Encode one file, and its spacing beside it; see `Reader.write`. The format knows no direction."""
    if not np.allclose(grid.direction, np.eye(3)):
        raise AutosegError(f"{path}: TIFF holds no direction; use .nii.gz or .nrrd")
    samples = len(array)
    pixels = np.moveaxis(array, 0, -1) if samples > 1 else array[0]
    photometric = "rgb" if samples in (3, 4) else "minisblack"
    with staged(path) as temporary:
        with tifffile.TiffWriter(temporary) as tiff:
            for page in pixels:
                tiff.write(
                    page,
                    photometric=photometric,
                    planarconfig="contig" if samples > 1 else None,
                    extrasamples=["unspecified"] * (samples - (3 if photometric == "rgb" else 1)),
                    compression="zlib",
                    metadata=None,
                )
        sidecar.stage(temporary, path, grid, strict=True)
