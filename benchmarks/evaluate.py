"""Time the evaluation of 5 pairs of 160 x 128 x 96 voxels with 14 labels against plain ways to the same numbers.

Counts: one joint histogram against boolean masks per label. Surface distances: k-d trees over the surfaces of all
labels against exact distance maps per label, over the whole volume (scipy) and over the box around both masks (edt,
where it is installed). Pair by pair in turn on one core. Run it with OMP_NUM_THREADS=1.
"""

import sys
import time
from collections.abc import Callable

import numpy as np
from scipy import ndimage

from autoseg.evaluation.metrics import joint_histogram, surface, surface_distances
from autoseg.volume import bounding_box

SHAPE, SPACING_MM, LABELS, PAIRS, TOLERANCE_MM = (160, 128, 96), (2.5, 0.8, 0.8), 14, 5, 1.0


def make_pair(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Ellipsoids of all sizes with uneven surfaces, and a prediction that is off by about a voxel in places."""
    noise = [ndimage.gaussian_filter(rng.standard_normal(SHAPE), 5) for _ in range(2)]
    uneven = [field / field.std() for field in noise]
    axes = np.ogrid[tuple(slice(n) for n in SHAPE)]
    truth, prediction = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    for label in range(1, LABELS + 1):
        centre = [rng.uniform(0.15, 0.85) * n for n in SHAPE]
        radii = rng.uniform(6, 28, 3)
        distance = np.sqrt(sum(((a - c) / r) ** 2 for a, c, r in zip(axes, centre, radii)))
        truth[distance + 0.05 * uneven[0] < 1] = label
        prediction[distance + 0.05 * uneven[0] + 0.05 * uneven[1] < 1] = label
    return truth, prediction


def plain_counts(truth: np.ndarray, prediction: np.ndarray) -> list[tuple[int, int, int]]:
    counts = []
    for label in range(1, LABELS + 1):
        mine, theirs = truth == label, prediction == label
        counts.append((int((mine & theirs).sum()), int((~mine & theirs).sum()), int((mine & ~theirs).sum())))
        (~mine & ~theirs).sum()
    return counts


def one_pass_counts(truth: np.ndarray, prediction: np.ndarray) -> list[tuple[int, int, int]]:
    joint = joint_histogram(truth, prediction, LABELS + 1)
    hits, rows, columns = joint.diagonal(), joint.sum(1), joint.sum(0)
    return [(int(hits[i]), int(columns[i] - hits[i]), int(rows[i] - hits[i])) for i in range(1, LABELS + 1)]


def distances_to_numbers(to_truth: np.ndarray, to_prediction: np.ndarray) -> tuple[float, float, float]:
    both = np.concatenate([to_truth, to_prediction])
    hd95_mm = max(np.percentile(to_truth, 95), np.percentile(to_prediction, 95))
    return float(hd95_mm), float(both.mean()), float((both <= TOLERANCE_MM).mean())


def tree_distances(truth: np.ndarray, prediction: np.ndarray) -> list[tuple[float, float, float]]:
    return [distances_to_numbers(*both) for both in surface_distances(truth, prediction, SPACING_MM, LABELS + 1)[1:]]


def map_distances(
    distance_map: Callable[[np.ndarray], np.ndarray], truth: np.ndarray, prediction: np.ndarray, boxes: bool
) -> list[tuple[float, float, float]]:
    numbers = []
    for label in range(1, LABELS + 1):
        masks = [truth == label, prediction == label]
        if boxes:
            box = bounding_box(masks[0] | masks[1]).slices()
            masks = [mask[box] for mask in masks]
        edges = [surface(mask.view(np.uint8)) for mask in masks]
        numbers.append(distances_to_numbers(distance_map(~edges[0])[edges[1]], distance_map(~edges[1])[edges[0]]))
    return numbers


def main() -> None:
    rng = np.random.default_rng(0)
    ways: dict[str, Callable[[np.ndarray, np.ndarray], list]] = {
        "counts, one pass": one_pass_counts,
        "counts, boolean masks": plain_counts,
        "surfaces, k-d trees": tree_distances,
        "surfaces, scipy maps of the volume": lambda t, p: map_distances(
            lambda outside: ndimage.distance_transform_edt(outside, sampling=SPACING_MM), t, p, boxes=False
        ),
    }
    try:
        import edt
    except ImportError:
        print("edt is not installed; its row is left out", file=sys.stderr)
    else:
        ways["surfaces, edt maps of boxes"] = lambda t, p: map_distances(
            lambda outside: edt.edt(outside, anisotropy=SPACING_MM), t, p, boxes=True
        )
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    worst: dict[str, float] = dict.fromkeys(ways, 0.0)
    for _ in range(PAIRS):
        truth, prediction = make_pair(rng)
        results = {}
        for name, way in ways.items():
            started = time.perf_counter()
            results[name] = way(truth, prediction)
            seconds[name].append(time.perf_counter() - started)
            base = next(other for other in results if other.split(",")[0] == name.split(",")[0])
            difference = np.abs(np.subtract(results[name], results[base])).max()
            worst[name] = max(worst[name], float(difference))
    for name in ways:
        base = next(other for other in ways if other.split(",")[0] == name.split(",")[0])
        ratio = np.median(np.divide(seconds[name], seconds[base]))
        print(
            f"{name:36s} {np.median(seconds[name]) * 1000:9.1f} ms a pair   {ratio:6.1f} x the first   "
            f"largest difference {worst[name]:.2g}"
        )


if __name__ == "__main__":
    main()
