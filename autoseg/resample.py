"""Images, labels and logits onto another grid: one small operator an axis, applied one axis after the other.

What is computed is nnU-Net's resampling (Isensee et al., Nature Methods 2021): interpolation at voxel centres with
edge padding and no smoothing, and strongly anisotropic cases slice by slice. How it is computed was decided here:

* Splines are linear and separable, so a cubic resize is one matrix an axis. The matrices are those of
  `scipy.ndimage.zoom` itself; their weights fade within a dozen voxels, so only a band of each is multiplied.
* Linear interpolation lies between its corners. Where all corners of a cell agree on a label, or on the class with
  the largest logit, so does every point of the cell. Only the few voxels along borders are ever interpolated.
* A voxel gets the label of largest linear weight, so no label arises that the neighbours do not have: where three
  meet, asking for half of the weight would leave holes. Weights are whole numbers, and ties therefore exact.

Arrays are (C, Z, Y, X), shapes and spacings (Z, Y, X); numpy does all the work, in float32.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from autoseg.schema import Resampling

BAND_ROWS = 32
"""Output voxels that share one dense block of a spline matrix."""
NEGLIGIBLE = 1e-7
"""Spline weights below this are dropped: the weights of a voxel sum to 1, and float32 resolves no more."""
SLAB_VOXELS = 1 << 20
"""Output voxels that are worked on at a time where only some of them need interpolation."""
POINTS = 1 << 14
"""Single voxels interpolated at a time, few enough for the processor's cache."""
DENSE_SHARE = 0.3
"""Share of undecided voxels above which interpolating a whole slab is cheaper than picking them out."""
ROUNDING = 1e-6
"""Bound on the float32 error of the difference of two linear interpolations, relative to the largest value."""


def is_separate(current_mm: Sequence[float], target_mm: Sequence[float], threshold: float = 3.0) -> int | None:
    """The axis to resample apart from the other two, or None.

    It is the axis with the largest spacing where the largest is more than `threshold` times the smallest, judged by
    the current spacing first and by the target's if that is not so. Two axes that are equally coarse: None.
    """
    for spacing in (current_mm, target_mm):
        largest = max(spacing)
        if largest / min(spacing) > threshold:
            coarse = [axis for axis, mm in enumerate(spacing) if mm == largest]
            return coarse[0] if len(coarse) == 1 else None
    return None


def resample_image(
    array: np.ndarray, current_mm: Sequence[float], target_mm: Sequence[float], shape: Sequence[int], rules: Resampling
) -> np.ndarray:
    """Image (C, Z, Y, X) -> float32 (C, *shape), the same extent with other voxels.

    Splines of order 2 and more overshoot, so their result is clipped to the range of the input: that of the whole
    channel, or of each slice where slices are resampled on their own, as nnU-Net does. An unchanged shape returns the
    input as float32.
    """
    return _resample_channels(array, _way(array.shape[1:], shape, current_mm, target_mm, rules.image_order, rules))


def resample_logits(
    logits: np.ndarray, current_mm: Sequence[float], target_mm: Sequence[float], shape: Sequence[int], rules: Resampling
) -> np.ndarray:
    """Logits (K, Z, Y, X) of any float type -> float32 (K, *shape)."""
    return _resample_channels(logits, _way(logits.shape[1:], shape, current_mm, target_mm, rules.logit_order, rules))


def resample_argmax(
    logits: np.ndarray, current_mm: Sequence[float], target_mm: Sequence[float], shape: Sequence[int], rules: Resampling
) -> np.ndarray:
    """The class with the largest resampled logit: finite logits (K, Z, Y, X) -> int16 (Z, Y, X) of `shape`.

    Equal, voxel for voxel, to `resample_logits(...).argmax(0)`; memory does not grow with the number of classes.
    """
    way = _way(logits.shape[1:], shape, current_mm, target_mm, rules.logit_order, rules)
    if max(way.orders) > 1:
        return _running_argmax(_channel(logit, way) for logit in logits)
    logits = np.ascontiguousarray(logits)
    undecided = len(logits)
    taps = tuple(_taps(old, new, order) for old, new, order in zip(way.old, way.new, way.orders))
    out = np.empty(way.new, np.int16)
    for slab, points in _spread(_clear_winner(logits, undecided), taps, undecided, out):
        if points.size > DENSE_SHARE * out[slab].size:
            out[slab] = _running_argmax(_blend_slab(logit, taps, way.steps, slab) for logit in logits)
            continue
        for some in _pieces(points):
            place, corners = _corners(some, taps)
            weights = {axis: taps[axis].weights(place[axis]) for axis in way.steps if taps[axis].high is not None}
            voxels, corners = _compact(corners)
            out.reshape(-1)[some] = _running_argmax(
                _blend_points(logit.reshape(-1).take(voxels).astype(np.float32), corners, weights) for logit in logits
            )
    return out


def resample_labels(
    labels: np.ndarray, current_mm: Sequence[float], target_mm: Sequence[float], shape: Sequence[int], rules: Resampling
) -> np.ndarray:
    """Integer labels (Z, Y, X) -> the same type, of `shape`.

    The indicator of each label is interpolated linearly, and a voxel gets the label whose indicator is largest there.
    Of labels that tie it is that of the nearest input voxel (of two equally near along an axis, the later one), or
    the smallest if the nearest voxel's label is not among them: nnU-Net's rule as of batchgenerators 0.25.5.
    Label order 0 takes the nearest voxel. Raises ValueError for other orders: cubic weights can be negative.
    """
    way = _way(labels.shape, shape, current_mm, target_mm, rules.label_order, rules)
    if max(way.orders) > 1:
        raise ValueError(f"labels can be resampled with order 0 or 1, not {max(way.orders)}")
    # Through the plane of an axis apart the rule decides once more, between the slices; a nearest slice needs no rule.
    later = [axis for axis in way.steps if axis == way.apart and way.orders[axis] == 1]
    for axes in ([axis for axis in way.steps if axis not in later], later):
        new = [way.new[axis] if axis in axes else size for axis, size in enumerate(labels.shape)]
        labels = _heaviest(labels, [_taps(*sizes) for sizes in zip(labels.shape, new, way.orders)]) if axes else labels
    return labels


# How a resampling is laid out


@dataclass(frozen=True)
class _Way:
    """Shapes, interpolation order of each axis, the axis apart, and the order in which axes are done."""

    old: tuple[int, ...]
    new: tuple[int, ...]
    orders: tuple[int, ...]
    apart: int | None
    steps: tuple[int, ...]


def _way(
    old: Sequence[int],
    new: Sequence[int],
    current_mm: Sequence[float],
    target_mm: Sequence[float],
    order: int,
    rules: Resampling,
) -> _Way:
    """Lay out a resampling. A single slice that stays one has no through-plane axis, whatever its spacing says."""
    flat = old[0] == new[0] == 1
    apart = None if flat else is_separate(current_mm, target_mm, rules.anisotropy_threshold)
    orders = tuple(rules.through_plane_order if axis == apart else order for axis in range(3))
    # The axis that shrinks most goes first and leaves the others less to do. An axis apart goes last, so that slices
    # can be clipped, or first where it only drops slices.
    steps = sorted((axis for axis in range(3) if old[axis] != new[axis]), key=lambda axis: new[axis] / old[axis])
    if apart in steps:
        drops = orders[apart] == 0 and new[apart] < old[apart]
        steps.sort(key=lambda axis: (axis == apart) != drops)
    return _Way(tuple(old), tuple(new), orders, apart, tuple(steps))


# Whole channels


def _resample_channels(array: np.ndarray, way: _Way) -> np.ndarray:
    if not way.steps:
        return array.astype(np.float32, copy=False)
    out = np.empty((len(array), *way.new), np.float32)
    for channel, result in zip(array, out):
        result[...] = _channel(channel, way)
    return out


def _channel(channel: np.ndarray, way: _Way) -> np.ndarray:
    """One channel (Z, Y, X) the whole way, float32; clipped once its splines in the plane are done."""
    out = channel.astype(np.float32, copy=False)
    splines = [axis for axis in way.steps if axis != way.apart and way.orders[axis] > 1]
    for axis in way.steps:
        if splines and axis == splines[0]:
            across = None if way.apart is None else tuple(a for a in range(3) if a != way.apart)
            low, high = out.min(across, keepdims=True), out.max(across, keepdims=True)
        if way.orders[axis] > 1:
            out = _spline(out, axis, _bands(way.old[axis], way.new[axis], way.orders[axis]))
        else:
            out = _blend(out, axis, _taps(way.old[axis], way.new[axis], way.orders[axis]))
        if splines and axis == splines[-1]:
            out.clip(low, high, out=out)
    return out


def _running_argmax(values: Iterable[np.ndarray]) -> np.ndarray:
    """Index of the first array that is largest, element by element, as int16; one array is held at a time."""
    arrays = iter(values)
    best = next(arrays)
    winner = np.zeros(best.shape, np.int16)
    for index, value in enumerate(arrays, start=1):
        np.copyto(winner, index, where=value > best)
        best = np.maximum(best, value)
    return winner


# Operators of one axis


class _Band(NamedTuple):
    """Outputs [start, stop) are `weights` (stop - start, last - first) times inputs [first, last)."""

    start: int
    stop: int
    first: int
    last: int
    weights: np.ndarray


@lru_cache(maxsize=64)
def _bands(old: int, new: int, order: int) -> tuple[_Band, ...]:
    """The spline matrix of an axis, cut into blocks of rows without their negligible columns."""
    matrix = ndimage.zoom(np.eye(old), (new / old, 1), order=order, mode="nearest", grid_mode=True)
    bands = []
    for start in range(0, new, BAND_ROWS):
        rows = matrix[start : start + BAND_ROWS]
        used = np.flatnonzero((np.abs(rows) > NEGLIGIBLE).any(axis=0))
        first, last = int(used[0]), int(used[-1]) + 1
        weights = np.ascontiguousarray(rows[:, first:last], np.float32)
        bands.append(_Band(start, start + len(rows), first, last, weights))
    return tuple(bands)


def _spline(array: np.ndarray, axis: int, bands: tuple[_Band, ...]) -> np.ndarray:
    """Apply banded weights along one axis of a float32 array (Z, Y, X)."""
    array = np.ascontiguousarray(array)
    out = np.empty((*array.shape[:axis], bands[-1].stop, *array.shape[axis + 1 :]), np.float32)
    # Seen as (before, axis, after), every product reads and writes views: nothing is transposed or copied.
    before, after = math.prod(array.shape[:axis]), math.prod(array.shape[axis + 1 :])
    source, target = array.reshape(before, -1, after), out.reshape(before, -1, after)
    for start, stop, first, last, weights in bands:
        if after == 1:
            np.matmul(source[:, first:last, 0], weights.T, out=target[:, start:stop, 0])
        else:
            np.matmul(weights, source[:, first:last], out=target[:, start:stop])
    return out


class _Taps(NamedTuple):
    """Order 0 or 1: output i is input low[i], or its blend with high[i], whose weight is share[i] / parts."""

    old: int
    low: np.ndarray
    high: np.ndarray | None
    share: np.ndarray
    parts: int

    def weights(self, place: np.ndarray | slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """Float32 weights of the lower and the higher tap of outputs `place`."""
        higher = (self.share[place] / self.parts).astype(np.float32)
        return 1 - higher, higher


@lru_cache(maxsize=256)
def _taps(old: int, new: int, order: int) -> _Taps:
    """Where output i, centred on (old / new) (i + 1/2) - 1/2, reads; the coordinate is clamped to the edge voxels."""
    step = np.arange(new)
    share = np.zeros(new, np.int64)
    if old == new:
        return _Taps(old, step, None, share, 1)
    if order == 0:
        # In floating point, as scipy does it: which slice an exact tie goes to is decided by rounding there.
        nearest = np.floor((old / new) * (step + 0.5) - 0.5 + 0.5).astype(np.intp)
        return _Taps(old, nearest.clip(0, old - 1), None, share, 1)
    parts = 2 * new
    coordinate = (old * (2 * step + 1) - new).clip(0, (old - 1) * parts)
    low, share = np.divmod(coordinate, parts)
    return _Taps(old, low, np.minimum(low + 1, old - 1), share, parts)


def _blend(array: np.ndarray, axis: int, taps: _Taps) -> np.ndarray:
    """Apply taps along one axis of a float32 array (Z, Y, X)."""
    out = array.take(taps.low, axis)
    if taps.high is not None:
        lower, higher = (w.reshape([-1 if a == axis else 1 for a in range(3)]) for w in taps.weights())
        out *= lower
        above = array.take(taps.high, axis)
        above *= higher
        out += above
    return out


# Decided cells, and the points of all others


def _spread(
    corners: np.ndarray, taps: Sequence[_Taps], undecided: int, out: np.ndarray
) -> Iterator[tuple[slice, np.ndarray]]:
    """Fill `out`, slab by slab, with the value that all corners of a voxel's cell share, or `undecided`.

    corners: input values (Z, Y, X), overwritten. Yields each slab of Z planes with the flat indices, in the whole of
    `out`, of its undecided voxels, for the caller to settle before asking for the next.
    """
    for axis, tap in enumerate(taps):
        if tap.high is not None:
            # A cell is named by its lowest corner; the last one has only itself.
            planes = np.moveaxis(corners, axis, 0)
            np.copyto(planes[:-1], undecided, where=planes[:-1] != planes[1:])
    cells = corners.take(taps[2].low, axis=2).take(taps[1].low, axis=1)
    plane = out[0].size
    step = max(1, SLAB_VOXELS // plane)
    for start in range(0, len(out), step):
        slab = slice(start, min(start + step, len(out)))
        np.take(cells, taps[0].low[slab], axis=0, out=out[slab], mode="clip")
        yield slab, np.flatnonzero(out[slab] == undecided) + start * plane


def _pieces(points: np.ndarray) -> Iterator[np.ndarray]:
    return (points[start : start + POINTS] for start in range(0, len(points), POINTS))


def _corners(points: np.ndarray, taps: Sequence[_Taps]) -> tuple[list[np.ndarray], np.ndarray]:
    """Output voxels, flat (n,) -> their (z, y, x), and the flat input indices of their corners, (a, b, c, n).

    a, b and c are 2 where the axis is interpolated and 1 where it is not.
    """
    index = np.zeros((1, 1, 1, len(points)), np.intp)
    place: list[np.ndarray] = []
    stride = 1
    for axis in (2, 1, 0):
        tap = taps[axis]
        points, here = np.divmod(points, len(tap.low))
        ends = [tap.low[here]] if tap.high is None else [tap.low[here], tap.high[here]]
        index = index + stride * np.stack(ends).reshape([-1 if a == axis else 1 for a in range(3)] + [len(here)])
        stride *= tap.old
        place.insert(0, here)
    return place, index


def _clear_winner(logits: np.ndarray, undecided: int) -> np.ndarray:
    """Class with the largest logit (Z, Y, X), int16; `undecided` where rounding could let another class catch up."""
    flat = logits.reshape(len(logits), -1)
    winner = np.zeros(flat.shape[1], np.int16)
    lead = np.empty(flat.shape[1], np.float32)
    size = np.float32(0)
    for start in range(0, len(winner), POINTS):
        part = slice(start, start + POINTS)
        best = flat[0, part].astype(np.float32)
        second = np.full_like(best, -np.inf)
        size = max(size, -best.min())
        for index in range(1, len(flat)):
            value = flat[index, part].astype(np.float32)
            np.copyto(winner[part], index, where=value > best)
            np.maximum(second, np.minimum(best, value), out=second)
            np.maximum(best, value, out=best)
            size = max(size, -value.min())
        size = max(size, best.max())
        np.subtract(best, second, out=lead[part])
    winner[lead <= ROUNDING * size] = undecided
    return winner.reshape(logits.shape[1:])


def _compact(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct entries of `index`, and where among them each entry lies: many points share few corners."""
    first = index.min()
    near = index - first
    seen = np.zeros(near.max() + 1, bool)
    seen[near] = True
    return np.flatnonzero(seen) + first, (np.cumsum(seen) - 1)[near]


def _blend_points(
    values: np.ndarray, corners: np.ndarray, weights: Mapping[int, tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    """One class at single points: the arithmetic of `_blend` in the same order, so equal to the last bit.

    values: float32 (m,); corners: where in them the corners (a, b, c, n) lie; weights: axis -> lower and higher (n,).
    """
    blended = values.take(corners)
    for axis, (lower, higher) in weights.items():
        low, high = np.split(blended, 2, axis)
        blended = low * lower + high * higher
    return blended.reshape(-1)


def _blend_slab(logit: np.ndarray, taps: Sequence[_Taps], steps: Sequence[int], slab: slice) -> np.ndarray:
    """One class (Z, Y, X) on a slab of output planes, from the input planes that it needs."""
    depth = taps[0]
    low, high = depth.low[slab], None if depth.high is None else depth.high[slab]
    first, last = low[0], (low if high is None else high)[-1] + 1
    depth = _Taps(depth.old, low - first, None if high is None else high - first, depth.share[slab], depth.parts)
    values = logit[first:last].astype(np.float32)
    for axis in steps:
        values = _blend(values, axis, taps[axis] if axis else depth)
    return values


def _heaviest(labels: np.ndarray, taps: Sequence[_Taps]) -> np.ndarray:
    """Labels (Z, Y, X) by the rule of `resample_labels`, all interpolated axes at once.

    A voxel's candidates are the labels of its corners, so the work does not grow with the number of labels.
    """
    undecided = int(labels.max()) + 1
    # The smallest type with room for the mark: what is moved and compared most is small.
    out = np.empty([len(tap.low) for tap in taps], np.min_scalar_type(min(int(labels.min()), -undecided - 1)))
    flat = labels.reshape(-1)
    for _, points in _spread(labels.astype(out.dtype), taps, undecided, out):
        for some in _pieces(points):
            place, index = _corners(some, taps)
            weight, nearest = np.ones((1, len(some))), np.zeros(len(some), np.intp)
            for axis, tap in enumerate(taps):
                if tap.high is not None:
                    share = tap.share[place[axis]]
                    weight = np.stack([weight * (tap.parts - share), weight * share], 1).reshape(-1, len(some))
                    nearest = 2 * nearest + (2 * share >= tap.parts)
            # Between whole numbers, one half more decides a tie and nothing else.
            weight[nearest, np.arange(len(some))] += 0.5
            corner = flat.take(index).astype(out.dtype).reshape(weight.shape)
            # The first corner of each label gathers the weight of the others.
            for first, label in enumerate(corner):
                weight[first] += (weight[first + 1 :] * (corner[first + 1 :] == label)).sum(axis=0)
            out.reshape(-1)[some] = np.where(weight == weight.max(axis=0), corner, undecided).min(axis=0)
    return out.astype(labels.dtype, copy=False)
