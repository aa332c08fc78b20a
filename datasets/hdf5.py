"""Images and labels as arrays in HDF5 files: one file with both, or files x.im and x.seg (or alike) side by side.

Arrays are (Z, Y, X) or (Y, X), images also with a channel axis, labels also one-hot, both at their first or last axis.
Which array of a file is which is told by its name, and by there being no other. HDF5 has no word for voxel size, so the
spacing is asked for unless the arrays carry an attribute `spacing` (mm, in array order) or `element_size_um`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from autoseg.datasets.folders import MOST_VALUES, name_values
from autoseg.datasets.importing import Draft, Entry, Overlaps, Place, Request, encode, fetched, merge, whole_order
from autoseg.datasets.pairing import case_names, pair, stems
from autoseg.parallel import map_cases, raise_failures
from autoseg.readers import Stored, is_named
from autoseg.records import AutosegError
from autoseg.volume import Grid, Triple

ENDINGS = (".h5", ".hdf5", ".hdf", ".im", ".seg")
LABEL_ENDINGS = (".seg",)
LABEL_WORDS = ("label", "seg", "mask", "gt", "annotation")


@dataclass(frozen=True, kw_only=True)
class Array:
    """An array in a file, undecoded. `spacing_mm` as the file says it, if it does."""

    path: Path
    name: str
    shape: tuple[int, ...]
    whole: bool
    spacing_mm: tuple[float, ...] | None

    @property
    def is_label(self) -> bool:
        """Whether file or array are called like labels."""
        called = self.name.rsplit("/")[-1].lower()
        return self.path.name.lower().endswith(LABEL_ENDINGS) or any(word in called for word in LABEL_WORDS)

    def spacing_in(self, space: tuple[int, ...]) -> Triple | None:
        """The voxel size (Z, Y, X) in mm for an array of the shape `space` without channels; None if not stated."""
        stated = self.spacing_mm or ()
        if len(stated) < len(space) or not all(0 < value < float("inf") for value in stated):
            return None
        z, y, x = (1.0, *stated)[-3:]
        return z, y, x

    def read(self) -> np.ndarray:
        """The voxels."""
        with h5py().File(self.path, "r") as file:
            return np.asarray(file[self.name])


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a label array holds: its shape in space, its values and, if it is one-hot, how many classes."""

    space: tuple[int, ...]
    values: frozenset[int]
    classes: int | None
    complete: bool
    """Whether each voxel has exactly one of the one-hot classes."""


def h5py() -> Any:
    """The module h5py; AutosegError says how to get it."""
    try:
        import h5py as module
    except ImportError:
        raise AutosegError('HDF5 files need the package h5py; run: pip install "autoseg[hdf5]"') from None
    return module


def arrays_of(path: Path) -> list[Array]:
    """Every numeric array of two to four axes in a file. Raises AutosegError if it is no HDF5."""
    found: list[Array] = []

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py().Dataset) and item.dtype.kind in "uifb" and 2 <= item.ndim <= 4:
            found.append(
                Array(
                    path=path, name=name, shape=item.shape, whole=item.dtype.kind in "uib", spacing_mm=spacing_of(item)
                )
            )

    try:
        with h5py().File(path, "r") as file:
            file.visititems(visit)
    except OSError as error:
        raise AutosegError(f"{path} cannot be read as HDF5: {error}") from None
    return found


def spacing_of(item: Any) -> tuple[float, ...] | None:
    """The voxel size that an array's attributes state, in mm and array order."""
    for key, factor in (("spacing", 1.0), ("element_size_um", 1e-3)):
        value = item.attrs.get(key)
        if value is not None and np.size(value) in (2, 3):
            return tuple(float(v) * factor for v in np.ravel(value))
    return None


def find(request: Request) -> Draft:
    """The pairs of image and label arrays of a folder, or of two (images, masks)."""
    texts = [request.source, *([request.masks] if request.masks else [])]
    files = sorted({file for text in texts for file in hdf5_files(Path(text).expanduser())})
    pairs, names, left_over = pairs_of([array for file in files for array in arrays_of(file)], request.masks)
    if not pairs:
        raise AutosegError("no image array has labels:\n" + "\n".join(f"  {line}" for line in left_over[:20]))
    spacing = request.spacing_mm
    silent = [image.path for image, labels in pairs if image.spacing_in(layout_of(image, labels)[0]) is None]
    if spacing is None and silent:
        raise AutosegError(
            f"{silent[0]} does not say how large its voxels are; give --spacing Z,Y,X in mm (1,1,1 if it truly is "
            "unknown)"
        )

    seen = raise_failures(
        map_cases(look, pairs, name=lambda p: p[1].path.name, what="look at labels", workers=request.workers),
        "looking at labels",
    )
    given, first = dict(request.labels), 0
    notes: tuple[str, ...] = ()
    if any(one.classes for one in seen):
        values, first = one_hot_classes(seen, given)
        kind = "the first is background" if first else "background is where none is set"
        notes = (f"labels are one-hot, {len(values) - 1} classes; {kind}",)
    else:
        values = name_values(set().union(*(one.values for one in seen)), given)
        if request.order:
            raise AutosegError("--order is for one-hot labels, and those of these files are label maps; leave it out")
    order = whole_order(request.order, [name for name in values if name != "background"])
    channels = 1 if (axis := channel_axis(pairs[0][0].shape, seen[0].space)) is None else pairs[0][0].shape[axis]
    return Draft(
        entries=tuple(
            Entry(
                case=case,
                shown=tuple(f"{array.path.name}:{array.name} {array.shape}" for array in (image, labels)),
                write=partial(write_case, image, labels, spacing, values, order, first),
            )
            for case, (image, labels) in zip(case_names(names), pairs)
        ),
        channels=request.channels or (("image",) if channels == 1 else tuple(f"channel_{n}" for n in range(channels))),
        labels=values,
        ending=".nii.gz",
        notes=notes,
        left_over=left_over,
        guessed=True,
        ordered=bool(request.order),
    )


def look(both: tuple[Array, Array]) -> Seen:
    """What the label array of a pair holds. Raises AutosegError if it holds no labels."""
    space, hot = layout_of(*both)
    labels = both[1].read()
    values = np.unique(labels)
    called = f"{both[1].path}: {both[1].name}"
    if not np.array_equal(values, np.rint(values)):
        raise AutosegError(f"{called} holds fractions, so it is no label array")
    if len(values) > MOST_VALUES:
        raise AutosegError(f"{called} holds {len(values)} values; it is an image, or gives each object its own number")
    if hot is not None and not set(values.tolist()) <= {0, 1}:
        raise AutosegError(f"{called} has an axis of classes but other values than 0 and 1")
    return Seen(
        space=space,
        values=frozenset(values.astype(int).tolist()),
        classes=None if hot is None else labels.shape[hot],
        complete=hot is not None and bool((labels.sum(hot) == 1).all()),
    )


def one_hot_classes(seen: Sequence[Seen], given: dict[str, int]) -> tuple[dict[str, int], int]:
    """Names and values of one-hot classes, and the position of the first that is no background: 0 or 1.

    The first is background if one fewer is named, or if none is named and each voxel has exactly one class.
    """
    if None in (counts := {one.classes for one in seen}):
        raise AutosegError("some label arrays are one-hot and some are not; import them separately")
    count, *others = sorted(counts)  # type: ignore[type-var]
    assert count is not None
    if others:
        raise AutosegError(f"label arrays have {sorted(counts)} classes; they must agree")  # type: ignore[type-var]
    named = [name for name in given if name != "background"]
    first = 1 if (len(named) == count - 1 if named else all(one.complete for one in seen)) else 0
    if named and len(named) != count - first:
        raise AutosegError(f"{len(named)} labels are named, the arrays have {count} classes; name each, in their order")
    names = named or [f"class_{n + 1}" for n in range(count - first)]
    return {"background": 0} | {name: given.get(name, n + 1) for n, name in enumerate(names)}, first


def hdf5_files(path: Path) -> list[Path]:
    """The HDF5 files at a folder or file."""
    files = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    found = [f for f in files if is_named(f) and f.suffix.lower() in ENDINGS and not f.name.startswith(".")]
    if not found:
        raise AutosegError(f"{path} has no HDF5 file ({', '.join(ENDINGS)})")
    return fetched(found)


def pairs_of(
    arrays: Sequence[Array], masks: str | None
) -> tuple[list[tuple[Array, Array]], list[str], tuple[str, ...]]:
    """(image, labels) of each case, a name for each, and what is left over."""
    below = Path(masks).expanduser().resolve() if masks else None

    def labels_here(array: Array) -> bool:
        return below in (array.path.resolve(), *array.path.resolve().parents) if below else array.is_label

    images, labels = ([a for a in arrays if labels_here(a) == kind] for kind in (False, True))
    together = {a.path for a in images} & {a.path for a in labels}

    def names(of: list[Array]) -> list[str]:
        found = stems([a.path for a in of], [len(a.path.suffix) for a in of])
        # Several cases in one file, or a file with further arrays: the place in the file tells them apart.
        several = len({a.path for a in of}) < len(of)
        return [f"{stem}/{a.name}" if several else stem for a, stem in zip(of, found)] if of else []

    image_names = names(images)
    pairs = pair(image_names, names(labels))
    left = tuple(line for line in pairs.left_over)
    if together and not pairs.found:
        left += (f"{next(iter(together))} holds several images or labels; give one of each a file",)
    return [(images[i], labels[m]) for i, m in pairs.found], [image_names[i] for i, _ in pairs.found], left


def layout_of(image: Array, labels: Array) -> tuple[tuple[int, ...], int | None]:
    """Shape in space of a pair, and the axis of the labels that is one-hot, if one is.

    Raises AutosegError if the two shapes do not belong together.
    """
    if image.shape == labels.shape and len(image.shape) < 4:
        return image.shape, None
    # Where both ends fit, the axis of the classes is the shorter one.
    ends = (-1, 0) if labels.shape[-1] <= labels.shape[0] else (0, -1)
    for hot in (None, *ends):
        space = labels.shape if hot is None else labels.shape[:-1] if hot == -1 else labels.shape[1:]
        # With a channel axis as well as one-hot labels, only four axes leave no doubt about which is which.
        channels = (image.shape[:-1], image.shape[1:]) if hot is None or len(image.shape) == 4 else ()
        if space in (image.shape, *channels) and len(space) in (2, 3):
            return space, hot
    raise AutosegError(f"{image.path}: image {image.shape} and labels {labels.shape} do not belong together")


def channel_axis(shape: tuple[int, ...], space: tuple[int, ...]) -> int | None:
    """The channel axis of an image array of this shape: 0, -1, or None without one."""
    return None if shape == space else -1 if shape[:-1] == space else 0


def write_case(
    image: Array,
    labels: Array,
    spacing_mm: Triple | None,
    values: dict[str, int],
    order: Sequence[str],
    first: int,
    place: Place,
) -> Overlaps:
    """Write one case as NIfTI, one file a channel, and its labels; returns the overlaps of one-hot classes."""
    space, hot = layout_of(image, labels)
    z, y, x = (1, *space)[-3:]
    spacing = spacing_mm or image.spacing_in(space)
    assert spacing is not None
    grid = Grid(shape=(z, y, x), spacing_mm=spacing, dimension=2 if len(space) == 2 else 3)
    voxels, axis = image.read(), channel_axis(image.shape, space)
    channels = voxels if axis is None else np.moveaxis(voxels, axis, 0)
    stored = Stored(array=plain(channels.reshape(-1, z, y, x)), grid=grid)
    for channel in range(len(stored.array)):
        encode(stored, place.image(channel), channel)
    found, overlaps = labels.read(), Overlaps()
    if hot is not None:
        planes = np.moveaxis(found, hot, 0)[first:]
        found, overlaps = merge(dict(zip((name for name in values if name != "background"), planes)), values, order)
    found = found if found.dtype.kind in "iu" else found.astype(np.int32)
    encode(Stored(array=found.reshape(1, z, y, x), grid=grid), place.label)
    return overlaps


def plain(array: np.ndarray) -> np.ndarray:
    """Booleans as bytes, half precision as single; everything else as it is."""
    return (
        array.astype({"b": np.uint8, "f": np.float32}[array.dtype.kind]) if array.dtype in (bool, np.float16) else array
    )
