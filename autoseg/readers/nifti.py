"""NIfTI-1 in one file: .nii and .nii.gz.

SimpleITK says where the voxels lie (the sform if its axes are orthogonal, else the qform) and writes; the voxels are
decoded here. SimpleITK would turn NaN and infinity into 0, take a spacing of zero for 1 mm, fill up truncated files,
and read the voxels of `x.nii` in place of those of `x.nii.gz` where both exist, all without a word.
Several channels are a fourth axis, vector voxels or colours.
"""

import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from autoseg.readers import itk
from autoseg.readers.itk import Stored
from autoseg.records import AutosegError
from autoseg.volume import Grid

ENDINGS: tuple[str, ...] = (".nii.gz", ".nii")
TYPES: tuple[str, ...] = (
    "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64",
)  # fmt: skip

HEADER_BYTES = 348

CODES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip
"""Type code of the header -> numpy type."""
COLOURS = {128: 3, 2304: 4}
"""Type code -> bytes a voxel, one a channel."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a header says about the voxels. `kind` is a numpy type with its byte order, `offset` is in bytes."""

    sizes: tuple[int, ...]
    kind: np.dtype
    colours: int
    offset: int
    slope: float
    intercept: float


def files(path: Path) -> tuple[Path, ...]:
    """All files that reading `path` reads."""
    return (path,)


def read(path: Path, *, indices: bool = False) -> Stored:
    """Decode one file; see `Reader.read`."""
    try:
        packed = path.read_bytes()
        content = gzip.decompress(packed) if path.suffix.lower() == ".gz" else packed
    except (OSError, EOFError, zlib.error) as error:
        raise AutosegError(f"{path} is truncated or damaged inside; copy or export it again ({error})") from None
    header = read_header(content, path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise itk.unreadable(path, error) from None
    grid = itk.grid_of(reader, path)

    voxels = int(np.prod(header.sizes, dtype=np.int64))
    expected = header.offset + voxels * header.colours * header.kind.itemsize
    if len(content) < expected:
        raise AutosegError(f"{path} is truncated: it holds {len(content)} of {expected} bytes; copy or export it again")
    array = np.frombuffer(content, header.kind, voxels * header.colours, header.offset)
    # A copy in the machine's byte order that may be written to, and that lets go of the content.
    array = array.astype(header.kind.newbyteorder("="))
    if header.colours > 1:
        array = np.moveaxis(array.reshape(*grid.shape, header.colours), -1, 0)
    else:
        array = array.reshape(-1, *grid.shape)
        if (header.slope, header.intercept) != (1.0, 0.0):
            array = array.astype("f4" if header.kind.itemsize <= 2 else "f8")
            array = array * array.dtype.type(header.slope) + array.dtype.type(header.intercept)
    return Stored(array=array, grid=grid)


def read_header(content: bytes, path: Path) -> Header:
    """Unpack the header of an unpacked file. Raises AutosegError for what cannot be a valid image."""
    # The header begins with its own size, which also tells version and byte order.
    orders = {struct.pack(order + "i", HEADER_BYTES): order for order in "<>"}
    order = orders.get(content[:4])
    if order is None or len(content) < HEADER_BYTES:
        second = content[4:7] in (b"n+2", b"ni2")
        reason = "is NIfTI-2; save it as NIfTI-1" if second else "has no NIfTI header; it is not what its name says"
        raise AutosegError(f"{path} {reason}")

    def unpack(form: str, place: int) -> tuple:
        return struct.unpack_from(order + form, content, place)

    (count, *dimensions), (code,), spacing = unpack("8h", 40), unpack("h", 70), unpack("8f", 76)
    offset, slope, intercept = unpack("3f", 108)
    (coded,), sform = unpack("h", 254), unpack("12f", 280)
    sizes = tuple(dimensions[:count]) if 1 <= count <= 7 else ()
    if not sizes or min(sizes) < 1 or not HEADER_BYTES <= offset < 2**31:
        raise AutosegError(f"{path}: its header says sizes {sizes} from byte {offset:g}; it is damaged")
    if code not in CODES and code not in COLOURS:
        raise AutosegError(f"{path} holds voxels of NIfTI type {code} (complex or rare); save it as integers or floats")
    if any(not np.isfinite(s) or (s == 0 and n > 1) for n, s in zip(sizes[:3], spacing[1:4])):
        raise AutosegError(
            f"{path}: the spacing {spacing[1:4]} in its header (pixdim) must be finite and not zero; correct it"
        )
    if coded > 0 and not np.isfinite(sform).all():
        raise AutosegError(f"{path}: the sform in its header is no number; correct it")
    # By the standard a slope of zero means that the voxels are the values.
    scaled = slope != 0 and np.isfinite((slope, intercept)).all()
    return Header(
        sizes=sizes,
        kind=np.dtype(order + CODES.get(code, "u1")),
        colours=COLOURS.get(code, 1),
        offset=int(offset),
        slope=slope if scaled else 1.0,
        intercept=intercept if scaled else 0.0,
    )


def write(path: Path, array: np.ndarray, grid: Grid) -> None:
    """Encode one file; see `Reader.write`."""
    itk.write(path, array, grid)
