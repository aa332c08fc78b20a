"""Pictures: .png and .bmp, always 2D; the pixel size is 1 mm unless a file beside it says it, see `sidecar`.

Pillow decodes them, since SimpleITK cannot read grey with alpha and expands palettes; but Pillow would cut 16-bit
colours down to 8 bits, so those go through SimpleITK. Grey levels are taken as they are: 16 bits are not scaled to 8.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from autoseg.readers import itk, sidecar
from autoseg.readers.itk import Stored, staged
from autoseg.records import AutosegError
from autoseg.volume import Grid

ENDINGS: tuple[str, ...] = (".png", ".bmp")
TYPES: tuple[str, ...] = ("uint8", "uint16")

GREY, GREY_ALPHA = 0, 4
"""Colour types in the header of a PNG."""

# Whole-slide images are larger than Pillow believes in; the files are the user's own.
Image.MAX_IMAGE_PIXELS = None


def files(path: Path) -> tuple[Path, ...]:
    """All files that reading `path` reads."""
    beside = sidecar.find(path, strict=False)
    return (path,) if beside is None else (path, beside)


def read(path: Path, *, indices: bool = False) -> Stored:
    """Decode one file; see `Reader.read`."""
    header = itk.head(path, 26)
    deep = header[:4] == b"\x89PNG" and len(header) == 26 and header[24] == 16
    if deep and header[25] == GREY_ALPHA:
        raise AutosegError(
            f"{path} is 16-bit grey with alpha, which cannot be read without loss; save it without alpha"
        )
    if deep and header[25] != GREY:
        array = itk.read(path).array[:, 0]
        return as_stored(path, array, alpha=len(array) == 4)
    try:
        with Image.open(path) as opened:
            image: Image.Image = opened
            if image.mode == "P" and not indices:
                image = image.convert("RGBA" if "transparency" in image.info else "RGB")
            if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
                raise AutosegError(f"{path} has the colour mode {image.mode}; save it as grey or RGB")
            alpha = image.mode in ("LA", "RGBA")
            array = np.array(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise itk.unreadable(path, error) from None
    array = array.astype(np.uint8) if array.dtype == bool else array
    return as_stored(path, np.moveaxis(np.atleast_3d(array), -1, 0), alpha)


def as_stored(path: Path, array: np.ndarray, alpha: bool) -> Stored:
    """A picture (C, Y, X) as stored array and grid. Raises AutosegError for a file beside it with three numbers."""
    spacing = sidecar.read(path, strict=False)
    if spacing is not None and len(spacing) != 2:
        raise AutosegError(f'{sidecar.find(path, strict=False)} must hold {{"spacing": [y, x]}}: {path.name} is 2D')
    y, x = spacing or (1.0, 1.0)
    grid = Grid(shape=(1, *array.shape[1:]), spacing_mm=(1.0, y, x), dimension=2)
    return Stored(array=array[:, None], grid=grid, picture=True, alpha=alpha, sized=spacing is not None)


def write(path: Path, array: np.ndarray, grid: Grid) -> None:
    """Encode one file; see `Reader.write`. Raises AutosegError for 3D images, and for 16 bits in BMP."""
    png = path.suffix.lower() == ".png"
    if grid.dimension != 2 or len(array) not in (1, 3, 4):
        raise AutosegError(
            f"{path}: {path.suffix} holds only 2D images with 1, 3 or 4 channels; use .nii.gz, .nrrd or .tif"
        )
    if not png and array.dtype != np.uint8:
        raise AutosegError(f"{path}: .bmp holds values 0 to 255; use .png, .nii.gz or .nrrd")
    with staged(path) as temporary:
        if png:
            itk.write(temporary, array, Grid(shape=grid.shape, spacing_mm=(1.0, 1.0, 1.0), dimension=2))
        else:
            pixels = np.moveaxis(array[:, 0], 0, -1)
            Image.fromarray(pixels[..., 0] if len(array) == 1 else pixels).save(temporary)
        sidecar.stage(temporary, path, grid, strict=False)
