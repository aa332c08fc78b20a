"""prepare(): a raw case becomes what a network reads; the way back is in `restore`.

Order: crop to content -> what `Plan.preparation` asks for (channels, slices, crops, a function) -> normalise -> plan
order -> resample. Normalising comes before resampling because interpolation would smear the empty border into the
content, and before a crop pads, so that what is padded has no part in it. The image never depends on the labels, so
training and prediction go through the same function and see the same numbers.
"""

import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cc3d
import numpy as np

from autoseg.crops import centre_of_mass, describe
from autoseg.labels import UNSEEN, Labels
from autoseg.own import own
from autoseg.records import AutosegError
from autoseg.resample import resample_image, resample_labels
from autoseg.restore import Trace, plan_axes, turn
from autoseg.schema import ChannelNorm, Configuration, Plan, Preparation
from autoseg.volume import Box, Grid, Volume, bounding_box, canonical_grid, cut

LOCATION_SEED = 1234
ANNOTATED = -1
"""Among the locations of a case: voxels that are not ignored, where others are."""
MOST_LOCATIONS = 10_000
LEAST_FRACTION = 0.01

PREPROCESS_VERSION = 1
"""Part of every prepared case's key: raise it when the same input would now be prepared differently."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Cropped:
    """A case cut to its content, canonical order.

    image: float32 (C, Z, Y, X); labels: int16 (Z, Y, X), `UNSEEN` where background lies outside the content;
    content: bool (Z, Y, X), None where every voxel is content.
    """

    case: str
    stored: Grid
    image: np.ndarray
    labels: np.ndarray
    content: np.ndarray | None
    crop: Box
    ratio: float


@dataclass(frozen=True, eq=False, kw_only=True)
class PreparedCase:
    """What training and prediction read, in plan order.

    image: float32 (C, Z, Y, X); labels: integer (Z, Y, X), `UNSEEN` outside the content;
    locations: class number, from 1, or `ANNOTATED` -> int32 (n, 3), voxels of that class to centre patches on.
    """

    case: str
    image: np.ndarray
    labels: np.ndarray
    locations: dict[int, np.ndarray]
    trace: Trace
    before: "PreparedCase | None" = None
    """The same case as the stage before reads it, where a cascade is to predict it."""


def content_mask(image: np.ndarray) -> np.ndarray:
    """Voxels (Z, Y, X) that are non-zero in any channel of image (C, Z, Y, X), holes filled.

    A hole is a zero region that does not reach the border through faces; in a single slice, through edges of it.
    """
    mask = (image != 0).any(axis=0)
    if mask.all() or not mask.any():
        return mask
    # A rim of outside makes "touches the border" one component; a flat axis gets none, or it would connect all holes.
    rim = [(1, 1) if n > 1 else (0, 0) for n in mask.shape]
    # As uint8: cc3d 4.1 fails on some small boolean arrays.
    outside = cc3d.connected_components(np.pad(~mask, rim, constant_values=True).astype(np.uint8), connectivity=6)
    inner = tuple(slice(a, a + n) for (a, _), n in zip(rim, mask.shape))
    return outside[inner] != outside.flat[0]


def crop_to_content(case: str, image: Volume, labels: np.ndarray | None, stored: Grid) -> Cropped:
    """Cut a canonical case to the bounding box of its content (nnU-Net's crop to non-zero).

    labels: class indices (Z, Y, X) or None when predicting. An all-zero image is kept whole.
    """
    mask = content_mask(image.array)
    box = bounding_box(mask)
    inside = cut(mask, box, False)
    marked = np.zeros(box.shape, np.int16) if labels is None else cut(labels.astype(np.int16, copy=False), box, 0)
    full = bool(inside.all()) or not mask.any()
    if not full:
        marked[(marked == 0) & ~inside] = UNSEEN
    return Cropped(
        case=case,
        stored=stored,
        image=cut(image.array, box, 0),
        labels=marked,
        content=None if full else inside,
        crop=box,
        ratio=float(np.prod(box.shape) / mask.size),
    )


def thinned(cropped: Cropped, factors: Sequence[int], labels: Labels) -> Cropped:
    """Make every so many neighbouring voxels along each axis one: for slices, thicker ones. Its `crop` counts these.

    The image is the root of the sum of their squares. Where the last have fewer, their squares count as much more, as
    if there were more like them. Labels: see `Labels.union`; content is where any of them is.
    """
    image, marked, content = cropped.image, cropped.labels, cropped.content
    for axis, factor in enumerate(factors):
        if factor == 1:
            continue
        starts = range(0, marked.shape[axis], factor)
        there = np.diff([*starts, marked.shape[axis]]).reshape([-1 if a == axis else 1 for a in range(3)])
        squares = np.add.reduceat(np.square(image, dtype=np.float64), starts, axis + 1)
        image = np.sqrt(squares * (factor / there)).astype(np.float32)
        marked = labels.union(marked, starts, axis)
        content = content if content is None else np.logical_or.reduceat(content, starts, axis)
    crop = Box(start=(0, 0, 0), stop=marked.shape)
    return replace(cropped, image=image, labels=marked, content=content, crop=crop)


def crop_as_asked(cropped: Cropped, preparation: Preparation) -> tuple[Cropped, Box]:
    """The crops of a plan: what they leave of the case, and the box of the canonical grid that it is to fill.

    Raises AutosegError if they leave nothing.
    """
    box = inner = Box(start=(0, 0, 0), stop=cropped.labels.shape)
    for crop in preparation.crops:
        start, edges = crop.start(box.shape, partial(_middle, cropped.image, inner, box)), crop.extent(box.shape)
        box = Box(start=start, stop=tuple(a + n for a, n in zip(start, edges))).moved(box.start)
        # Of what is left, not of the image: what one crop has cut away does not come back as the padding of the next.
        inner = box.moved(tuple(-a for a in inner.start)).within(inner.shape).moved(inner.start)
        if min(inner.shape) < 1:
            raise AutosegError(f"{describe(crop)} leaves nothing of the image but what was padded")
    content = None if cropped.content is None else cropped.content[inner.slices()]
    left = replace(
        cropped,
        image=cropped.image[inner.slices()],
        labels=cropped.labels[inner.slices()],
        # As of an empty image: statistics need voxels.
        content=content if content is not None and content.any() else None,
        crop=inner.moved(cropped.crop.start),
    )
    return left, box.moved(cropped.crop.start)


def _middle(image: np.ndarray, inner: Box, box: Box) -> tuple[float, ...]:
    """Centre of mass of the image within `inner`, counted from the start of `box`."""
    found = centre_of_mass(image[inner.slices()])
    return tuple(c + a - b for c, a, b in zip(found, inner.start, box.start))


def lost_labels(cropped: Cropped, crop: Box, labels: Labels) -> tuple[int, int]:
    """How many labelled voxels of a case lie outside of `crop`, a box of the canonical grid; and how many it has."""
    every = labels.is_foreground(cropped.labels)
    kept = every[crop.moved(tuple(-a for a in cropped.crop.start)).within(every.shape).slices()]
    return int(every.sum() - kept.sum()), int(every.sum())


def apply_own(name: str, image: np.ndarray, spacing_mm: Sequence[float]) -> np.ndarray:
    """A user's preprocessing of an image (C, Z, Y, X), float32; see `Preparation.function`.

    Raises AutosegError where it fails, for a result of another shape, or with values that are not finite.
    """
    function = own(name, "preprocessing")
    try:
        made = np.asarray(function(np.array(image, np.float32), tuple(spacing_mm)), np.float32)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise AutosegError(
            f"the preprocessing {name!r}, called with (image (C, Z, Y, X), spacing_mm), failed: "
            f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno}); mend it, or plan without: "
            "--set preparation.function="
        ) from error
    if made.shape != image.shape:
        raise AutosegError(
            f"the preprocessing {name!r} gave an array of shape {made.shape} for an image of shape {image.shape}; it "
            "must give the image, changed, in its own shape"
        )
    if not np.isfinite(made).all():
        raise AutosegError(f"the preprocessing {name!r} made values that are not finite")
    return made


def normalise_channel(channel: np.ndarray, norm: ChannelNorm, content: np.ndarray | None) -> np.ndarray:
    """One channel (Z, Y, X) on its normalised scale, float32. Statistics are summed in float64."""
    inside = content if norm.masked else None
    if norm.outliers is not None:
        channel = without_outliers(channel, norm.outliers, inside)
    if norm.scheme in ("zscore", "zscore_minmax"):
        region = channel if inside is None else channel[inside]
        mean, std = region.mean(dtype=np.float64), max(region.std(dtype=np.float64), 1e-8)
        scaled = (channel - np.float32(mean)) / np.float32(std)
        if norm.scheme == "zscore_minmax":
            region = scaled if inside is None else scaled[inside]
            low = region.min()
            scaled = (scaled - low) / max(region.max() - low, np.float32(1e-8))
        return scaled if inside is None else np.where(inside, scaled, channel)
    if norm.scheme == "ct":
        if norm.stats is None:
            raise ValueError(f"channel {norm.channel!r}: CT normalisation needs the statistics of the fingerprint")
        clipped = channel.clip(norm.stats.percentile_00_5, norm.stats.percentile_99_5)
        return (clipped - np.float32(norm.stats.mean)) / np.float32(max(norm.stats.std, 1e-8))
    if norm.scheme == "rescale":
        shifted = channel - channel.min()
        return shifted / max(shifted.max(), np.float32(1e-8))
    if norm.scheme == "rgb":
        if channel.min() < 0 or channel.max() > 255:
            raise ValueError(
                f"channel {norm.channel!r} has values {channel.min():g} to {channel.max():g}, "
                "but its name asks for 8-bit colours, 0 to 255; rename it in dataset.json or convert the images"
            )
        return channel / np.float32(255)
    return channel


def without_outliers(channel: np.ndarray, deviations: float, inside: np.ndarray | None) -> np.ndarray:
    """`channel` (Z, Y, X) with every voxel further than so many standard deviations from the mean replaced by the mean.

    inside: where voxels count and change, None for everywhere. Of n voxels none is further than sqrt(n - 1) deviations.
    """
    region = channel if inside is None else channel[inside]
    mean, std = region.mean(dtype=np.float64), region.std(dtype=np.float64)
    far = np.abs(channel - mean) > deviations * std
    return np.where(far if inside is None else far & inside, np.float32(mean), channel)


def target_spacing_mm(configuration: Configuration, current_mm: Sequence[float]) -> tuple[float, float, float]:
    """Spacing of a prepared case; a 2D configuration keeps the case's own distance between slices."""
    if configuration.dimension == 2:
        return (current_mm[0], *configuration.spacing_mm)  # type: ignore[return-value]
    return configuration.spacing_mm  # type: ignore[return-value]


def new_shape(shape: Sequence[int], current_mm: Sequence[float], target_mm: Sequence[float]) -> tuple[int, ...]:
    """Shape of the same extent at another spacing, at least one voxel an axis."""
    return tuple(max(1, round(c / t * n)) for n, c, t in zip(shape, current_mm, target_mm))


def find_locations(indices: np.ndarray, labels: Labels) -> dict[int, np.ndarray]:
    """For each class that occurs in a label map (Z, Y, X), voxels (n, 3) drawn without replacement with a fixed seed.

    n is 10 000, all of them where there are fewer, and never less than 1 % of the class. A map with ignored voxels has
    such voxels of the annotated rest, background included, under `ANNOTATED`.
    """
    rng = np.random.default_rng(LOCATION_SEED)
    found = {}
    wanted = dict(enumerate(labels.members, start=1))
    if labels.ignored is not None and (indices == labels.ignored).any():
        wanted[ANNOTATED] = (UNSEEN, 0, *labels.foreground)
    for index, members in wanted.items():
        where = np.flatnonzero(np.isin(indices, members) if len(members) > 1 else indices == members[0])
        if not where.size:
            continue
        count = max(min(MOST_LOCATIONS, where.size), int(np.ceil(LEAST_FRACTION * where.size)))
        chosen = where if count == where.size else np.sort(rng.choice(where, count, replace=False))
        found[index] = np.stack(np.unravel_index(chosen, indices.shape), axis=1).astype(np.int32)
    return found


def prepare_each(cropped: Cropped, plan: Plan, configurations: Sequence[Configuration]) -> Iterator[PreparedCase]:
    """Prepare one cropped case for several configurations; it is normalised once.

    Raises ValueError if the image has another number of channels than the plan, AutosegError if nothing is left of it.
    """
    if len(plan.sources) != cropped.image.shape[0]:
        raise ValueError(f"the image has {cropped.image.shape[0]} channels, the plan expects {len(plan.sources)}")
    asked, thin, content = plan.preparation, plan.preparation.thin, None
    spacing = [mm * factor for mm, factor in zip(canonical_grid(cropped.stored).spacing_mm, thin)]
    if asked.combined:
        cropped = replace(cropped, image=np.linalg.norm(cropped.image, axis=0, keepdims=True))
    if thin != (1, 1, 1):
        content, cropped = cropped.crop, thinned(cropped, thin, plan.labels)
    crop = cropped.crop
    if asked.crops:
        cropped, crop = crop_as_asked(cropped, asked)
    if asked.function is not None:
        cropped = replace(cropped, image=apply_own(asked.function, cropped.image, spacing))
    axes = plan_axes(cropped.stored, plan.orientation, plan.axis_order)
    image = np.stack([normalise_channel(x, norm, cropped.content) for x, norm in zip(cropped.image, plan.channels)])
    labels = cropped.labels
    if crop != cropped.crop:
        padded = crop.moved(tuple(-a for a in cropped.crop.start))
        image, labels = cut(image, padded, 0), cut(labels, padded, UNSEEN)
    image = turn(image.astype(np.float32, copy=False), axes)
    labels = turn(labels, axes)
    if content is not None:
        ends = (tuple(n * factor for n, factor in zip(end, thin)) for end in (crop.start, crop.stop))
        crop = Box(start=next(ends), stop=next(ends)).moved(content.start)
    current = tuple(spacing[axis] for axis in axes[0])
    for configuration in configurations:
        target = target_spacing_mm(configuration, current)
        shape = new_shape(labels.shape, current, target)
        resampled = resample_labels(labels, current, target, shape, configuration.resampling)
        yield PreparedCase(
            case=cropped.case,
            image=resample_image(image, current, target, shape, configuration.resampling),
            labels=resampled,
            locations=find_locations(resampled, plan.labels),
            trace=Trace(
                case=cropped.case,
                stored=cropped.stored,
                crop=crop,
                axis_order=plan.axis_order,
                orientation=plan.orientation,
                spacing_mm=target,
                shape=shape,  # type: ignore[arg-type]
                thin=thin,
                content=content,
            ),
        )


def prepare(
    case: str, image: Volume, labels: np.ndarray | None, stored: Grid, plan: Plan, configuration: Configuration
) -> PreparedCase:
    """Canonical image (and class indices (Z, Y, X), None when predicting) -> the case as the network reads it."""
    return next(prepare_each(crop_to_content(case, image, labels, stored), plan, [configuration]))
