"""Metrics of one case: overlap, volume and surface distances of every class, from two label arrays.

Two choices make this quick. The counts of all classes come from one joint histogram of truth and prediction. The
surfaces of all classes come from one comparison of each array with its neighbours; distances are then looked up in a
k-d tree over the surface voxels of a class, so that time and memory follow the surfaces and not the volume. Against
exact Euclidean distance maps on boxes around each class this measured several times faster, and it is exact in double
precision, so that a distance equal to the tolerance counts as within it.

Definitions, because programs differ by more than 100 mm on the same pair (Podobnik and Vrtovec, arXiv 2410.02630):

* A surface voxel of a class is a voxel of it with at least one face neighbour outside the class; beyond the edge of
  the image lies background. In 2D (Z = 1) only the neighbours in the slice count.
* A distance runs from the centre of a surface voxel to the centre of the nearest surface voxel of the other mask.
* HD95 is the larger of the two directed 95th percentiles (linear interpolation between ranks).
* ASSD is the sum of both directed sets of distances divided by the number of surface voxels of both masks.
* Surface Dice is the share of surface voxels of both masks that lie within the tolerance (after Nikolov et al.,
  arXiv 1809.04430, with voxels in place of surface elements).

Empty masks: if truth and prediction are both empty, everything but the counts and volumes is None. If only one is
empty, Dice, IoU and surface Dice are 0 and the distances are None. `CaseScore.undefined` says which it was.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.spatial import cKDTree

from autoseg.records import record

DEFAULT_TOLERANCE_MM = 1.0

Values = int | tuple[int, ...]
"""What a class is in a label file: a value, or several that make a region."""

Undefined = Literal["truth empty", "prediction empty", "truth and prediction empty"]
TRUTH_EMPTY: Undefined = "truth empty"
PREDICTION_EMPTY: Undefined = "prediction empty"
BOTH_EMPTY: Undefined = "truth and prediction empty"


@record
class CaseScore:
    """All metrics of one class in one case. None means undefined; `undefined` says why."""

    case: str
    label: str
    tp: int
    fp: int
    fn: int
    tn: int
    dice: float | None
    iou: float | None
    volume_truth_ml: float | None
    """None in 2D, where a slice has no thickness to speak of; so are the other volumes in millilitres."""
    volume_prediction_ml: float | None
    volume_error_ml: float | None
    """Prediction minus truth."""
    volume_error_relative: float | None
    """(Prediction - truth) / truth, of areas in 2D; None where the truth is empty."""
    hd95_mm: float | None
    assd_mm: float | None
    surface_dice: float | None
    undefined: Undefined | None = None


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How a metric is shown and which direction is better; "zero": the closer to zero, whatever its sign."""

    title: str
    better: Literal["higher", "lower", "zero"]
    unit: str = ""


METRICS: dict[str, Metric] = {
    "dice": Metric(title="Dice", better="higher"),
    "iou": Metric(title="IoU", better="higher"),
    "surface_dice": Metric(title="surface Dice", better="higher"),
    "hd95_mm": Metric(title="HD95", better="lower", unit="mm"),
    "assd_mm": Metric(title="ASSD", better="lower", unit="mm"),
    "volume_error_ml": Metric(title="volume error", better="zero", unit="ml"),
    "volume_error_relative": Metric(title="relative error", better="zero"),
}
"""Every metric that is averaged, by the name of its field in `CaseScore`."""


def score_case(
    case: str,
    truth_ZYX: np.ndarray,
    prediction_ZYX: np.ndarray,
    spacing_mm: Sequence[float],
    labels: Mapping[str, Values],
    tolerance_mm: float = DEFAULT_TOLERANCE_MM,
    ignore: int | None = None,
) -> tuple[CaseScore, ...]:
    """Score every class of `labels` (name -> value in the arrays), one CaseScore a class, in the order given.

    A class may be a region of several values, and regions may overlap. Voxels where the truth has the value `ignore`
    are left out of all counts, and for surfaces both masks are background there: what is left is compared as it is cut.

    Both arrays are integers of one shape (Z, Y, X); Z = 1 is a 2D image. `spacing_mm` runs (Z, Y, X). A class called
    "background" is passed over, and a value that `labels` does not name belongs to no class.
    Raises ValueError for arrays that differ in shape or are no integers.
    """
    if truth_ZYX.shape != prediction_ZYX.shape or truth_ZYX.ndim != 3:
        raise ValueError(
            f"{case}: need two (Z, Y, X) arrays of one shape, got {truth_ZYX.shape}, {prediction_ZYX.shape}"
        )
    classes = {name: value for name, value in labels.items() if name != "background"}
    if any(isinstance(value, tuple) for value in classes.values()):
        scores: list[CaseScore] = []
        for name, value in classes.items():
            members = value if isinstance(value, tuple) else (value,)
            truth, prediction = (np.isin(array, members).astype(np.uint8) for array in (truth_ZYX, prediction_ZYX))
            if ignore is not None:
                truth[truth_ZYX == ignore] = 2
            scores += score_case(
                case, truth, prediction, spacing_mm, {name: 1}, tolerance_mm, None if ignore is None else 2
            )
        return tuple(scores)
    values = tuple(value for value in classes.values() if isinstance(value, int))
    truth, prediction = class_indices(truth_ZYX, values), class_indices(prediction_ZYX, values)
    ignored = None if ignore is None else truth_ZYX == ignore
    if ignored is not None:
        prediction = np.where(ignored, prediction.dtype.type(0), prediction)
    joint = joint_histogram(truth, prediction, len(classes) + 1)
    if ignored is not None:
        joint[0, 0] -= ignored.sum()
    distances = surface_distances(truth, prediction, spacing_mm, len(classes) + 1)
    voxel_ml = float(np.prod(spacing_mm)) / 1000 if truth.shape[0] > 1 else None
    return tuple(
        _score(case, name, index, joint, voxel_ml, distances[index], tolerance_mm)
        for index, name in enumerate(classes, start=1)
    )


def _score(
    case: str,
    name: str,
    index: int,
    joint: np.ndarray,
    voxel_ml: float | None,
    distances: tuple[np.ndarray, np.ndarray],
    tolerance_mm: float,
) -> CaseScore:
    tp = int(joint[index, index])
    in_truth, in_prediction = int(joint[index].sum()), int(joint[:, index].sum())
    fp, fn = in_prediction - tp, in_truth - tp
    undefined = empty_reason(in_truth, in_prediction)
    dice = iou = hd95_mm = assd_mm = surface_dice = None
    if undefined != BOTH_EMPTY:
        dice, iou, surface_dice = 2 * tp / (in_truth + in_prediction), tp / (tp + fp + fn), 0.0
    if undefined is None:
        to_truth, to_prediction = distances
        both = np.concatenate(distances)
        hd95_mm = float(max(np.percentile(to_truth, 95), np.percentile(to_prediction, 95)))
        assd_mm = float(both.mean())
        # Products of spacings carry rounding errors: three steps of 0.1 mm must count as within 0.3 mm.
        surface_dice = float((both <= tolerance_mm * (1 + 1e-9)).mean())
    return CaseScore(
        case=case,
        label=name,
        tp=tp,
        fp=fp,
        fn=fn,
        tn=int(joint.sum()) - tp - fp - fn,
        dice=dice,
        iou=iou,
        volume_truth_ml=None if voxel_ml is None else in_truth * voxel_ml,
        volume_prediction_ml=None if voxel_ml is None else in_prediction * voxel_ml,
        volume_error_ml=None if voxel_ml is None else (in_prediction - in_truth) * voxel_ml,
        volume_error_relative=(in_prediction - in_truth) / in_truth if in_truth else None,
        hd95_mm=hd95_mm,
        assd_mm=assd_mm,
        surface_dice=surface_dice,
        undefined=undefined,
    )


def empty_reason(in_truth: int, in_prediction: int) -> Undefined | None:
    """Which of two masks is empty, given their voxel counts; None if neither is."""
    if in_truth and in_prediction:
        return None
    if in_truth or in_prediction:
        return PREDICTION_EMPTY if in_truth else TRUTH_EMPTY
    return BOTH_EMPTY


def class_indices(labels: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """Values -> 1, 2, ... in the order of `values`, and 0 for every other value; same shape, contiguous.

    Raises ValueError if `labels` are no integers.
    """
    if labels.dtype.kind not in "iub":
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    low, high = (int(labels.min()), int(labels.max())) if labels.size else (0, 0)
    kind = np.uint8 if len(values) < 256 else np.uint16
    table = np.zeros(high - low + 1, dtype=kind)
    for index, value in enumerate(values, start=1):
        if low <= value <= high:
            table[value - low] = index
    if low == 0 and np.array_equal(table, np.arange(high + 1)):
        return np.ascontiguousarray(labels, dtype=kind)
    return np.take(table, labels if low == 0 else labels.astype(np.int64) - low)


def joint_histogram(truth: np.ndarray, prediction: np.ndarray, class_count: int) -> np.ndarray:
    """Voxels of each pair of classes, (class_count, class_count) int64: entry [t, p] is truth t predicted as p.

    Both arrays are class indices (Z, Y, X) below `class_count`.
    """
    joint = np.zeros(class_count * class_count, dtype=np.int64)
    # bincount wants 8 bytes a voxel; slice by slice that stays in the cache and never doubles the memory of a case.
    for slice_truth, slice_prediction in zip(truth, prediction):
        pair = slice_truth.astype(np.intp) * class_count + slice_prediction
        joint += np.bincount(pair.ravel(), minlength=joint.size)
    return joint.reshape(class_count, class_count)


def surface_distances(
    truth: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float], class_count: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each class, in mm: every surface voxel of the prediction to the truth, and of the truth to the prediction.

    Both arrays are class indices (Z, Y, X) below `class_count`, `spacing_mm` runs (Z, Y, X). Entry 0, the background,
    and classes that either array lacks have two empty arrays.
    """
    edge_truth, edge_prediction = surface(truth), surface(prediction)
    shared = edge_truth & edge_prediction & (truth == prediction)
    points_truth = _points(truth, edge_truth, shared, spacing_mm, class_count)
    points_prediction = _points(prediction, edge_prediction, shared, spacing_mm, class_count)
    nothing = np.empty(0)
    distances = [(nothing, nothing)]
    for mine, theirs in zip(points_truth[1:], points_prediction[1:]):
        if len(mine[0]) and len(theirs[0]):
            distances.append((_nearest(theirs, mine[0]), _nearest(mine, theirs[0])))
        else:
            distances.append((nothing, nothing))
    return distances


def surface(labels: np.ndarray) -> np.ndarray:
    """The surface voxels of all foreground classes of `labels` (Z, Y, X), as a mask of the same shape.

    A surface voxel has at least one face neighbour of another class; beyond the edge of the image lies background.
    Z = 1 is a 2D image, whose voxels have no neighbours in Z.
    """
    edge = np.zeros(labels.shape, dtype=bool)
    for axis in range(3):
        if axis == 0 and labels.shape[0] == 1:
            continue
        along, mark = np.moveaxis(labels, axis, 0), np.moveaxis(edge, axis, 0)
        differs = along[1:] != along[:-1]
        mark[1:] |= differs
        mark[:-1] |= differs
        mark[0] = mark[-1] = True
    return edge & (labels > 0)


def _points(
    labels: np.ndarray, edge: np.ndarray, shared: np.ndarray, spacing_mm: Sequence[float], class_count: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each class its surface points (n, 3) in mm, and which of them (n,) the other surface has as well."""
    place = np.flatnonzero(edge)
    owner = labels.ravel()[place]
    place = place[np.argsort(owner, kind="stable")]
    stops = np.cumsum(np.bincount(owner, minlength=class_count))
    points = np.stack(np.unravel_index(place, labels.shape), axis=1) * np.asarray(spacing_mm, dtype=float)
    return list(zip(np.split(points, stops[:-1]), np.split(shared.ravel()[place], stops[:-1])))


def _nearest(from_points: tuple[np.ndarray, np.ndarray], to_points: np.ndarray) -> np.ndarray:
    """Distance in mm of each of `from_points` to the nearest of `to_points`; shared points are 0 without a search."""
    points, shared = from_points
    distances = np.zeros(len(points))
    if not shared.all():
        # Sliding-midpoint splits suit points on a regular grid and build several times faster than medians.
        tree = cKDTree(to_points, balanced_tree=False, compact_nodes=False)
        distances[~shared] = tree.query(points[~shared])[0]
    return distances
