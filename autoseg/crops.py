"""Crops that a plan asks for after the crop to content: to a fixed size, around the centre of mass, fixed margins.

The image alone decides where a crop lies, never its labels, so prediction crops as training does. Numbers are voxels
of what the crop to content and thinned slices leave of the file, at its own spacing, in canonical axes (Z, Y, X), which
run to the patient's superior, posterior and left side; 2D images have one voxel along Z. A size of 0 leaves an axis
whole. Each crop starts from what the one before it left.
"""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, NonNegativeInt, TypeAdapter, ValidationError

from autoseg.records import AutosegError, problems, record
from autoseg.settings import parse_call

Sizes = tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt]
Shape = tuple[int, ...]


@record
class CropTo:
    """To `size` around the middle of the image; padded where the image is smaller."""

    kind: Literal["crop_to"]
    size: Sizes

    def extent(self, shape: Sequence[int]) -> Shape:
        """Shape of an image of `shape` after the crop."""
        return tuple(size or n for size, n in zip(self.size, shape))

    def start(self, shape: Sequence[int], centre: Callable[[], Sequence[float]]) -> Shape:
        """Where it begins in an image of `shape` whose centre of mass `centre` gives; below 0 where it is padded."""
        return tuple((n - edge) // 2 for n, edge in zip(shape, self.extent(shape)))


@record
class CropAround:
    """To `size` around the centre of mass of the intensities, moved by `offset`, but not beyond the image's borders.

    Padded, and centred on the image, where the image is smaller.
    """

    kind: Literal["crop_around_mass"]
    size: Sizes
    offset: tuple[int, int, int] = (0, 0, 0)

    def extent(self, shape: Sequence[int]) -> Shape:
        """As `CropTo.extent`."""
        return tuple(size or n for size, n in zip(self.size, shape))

    def start(self, shape: Sequence[int], centre: Callable[[], Sequence[float]]) -> Shape:
        """As `CropTo.start`."""
        starts = []
        for n, edge, middle, offset in zip(shape, self.extent(shape), centre(), self.offset):
            wanted = math.floor(middle + offset - (edge - 1) / 2 + 0.5)
            starts.append(min(max(wanted, 0), n - edge) if edge <= n else (n - edge) // 2)
        return tuple(starts)


@record
class Margins:
    """Away with so many voxels at both ends of each axis: `low` at its beginning, `high` at its end."""

    kind: Literal["margins"]
    low: Sizes
    high: Sizes

    def extent(self, shape: Sequence[int]) -> Shape:
        """As `CropTo.extent`. Raises AutosegError if nothing is left."""
        left = tuple(n - low - high for n, low, high in zip(shape, self.low, self.high))
        if min(left) < 1:
            raise AutosegError(f"{describe(self)} leaves nothing of an image of {' x '.join(map(str, shape))} voxels")
        return left

    def start(self, shape: Sequence[int], centre: Callable[[], Sequence[float]]) -> Shape:
        """As `CropTo.start`."""
        return self.low


Crop = Annotated[CropTo | CropAround | Margins, Field(discriminator="kind")]

CROPS: dict[str, type[CropTo] | type[CropAround] | type[Margins]] = {
    "crop_to": CropTo,
    "crop_around_mass": CropAround,
    "margins": Margins,
}


def parse_crop(text: str) -> CropTo | CropAround | Margins:
    """`crop_to(size=[160, 288, 288])` -> the crop. Raises AutosegError that says what is wrong, and what there is."""
    try:
        name, options = parse_call(text)
    except AutosegError as error:
        raise AutosegError(f"--crop {error}") from None
    if name not in CROPS:
        raise AutosegError(f"unknown crop {name!r}; choose one of {', '.join(CROPS)}")
    try:
        made = TypeAdapter(CROPS[name]).validate_python({"kind": name, **options})
    except ValidationError as error:
        raise AutosegError(f"--crop {text!r}: three numbers of voxels (Z, Y, X) an option\n{problems(error)}") from None
    return made


def describe(crop: CropTo | CropAround | Margins) -> str:
    """As `parse_crop` reads it."""
    said = {name: value for name, value in vars(crop).items() if not name.startswith("_") and name != "kind"}
    return f"{crop.kind}({', '.join(f'{name}={list(value)}' for name, value in said.items())})"


def centre_of_mass(image: np.ndarray) -> tuple[float, float, float]:
    """Of the intensities of an image (C, Z, Y, X) above their minimum, in voxels; the mean over the channels.

    The middle where a channel is constant.
    """
    places = []
    for channel in image:
        place = []
        for axis, n in enumerate(channel.shape):
            others = tuple(other for other in range(3) if other != axis)
            mass = channel.sum(axis=others, dtype=np.float64) - float(channel.min()) * (channel.size // n)
            total = mass.sum()
            place.append(float((mass * np.arange(n)).sum() / total) if total > 0 else (n - 1) / 2)
        places.append(place)
    z, y, x = np.mean(places, axis=0).tolist()
    return z, y, x
