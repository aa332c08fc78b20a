"""Resampling against the classical way: scikit-image in float64, one whole volume a label and a class.

Labels are compared with batchgenerators' `resize_segmentation`, which does that (and from 0.25.5 on by the same rule).

    OMP_NUM_THREADS=1 python benchmarks/resample.py [--pairs 3] [--only cubic labels export]

Both sides run in turns. Printed for each row: how many times faster (median, smallest and largest
of the pairs), the peak memory beyond the input, and how far the results agree. Inputs are made from a fixed seed:
smooth noise for the image, ellipsoid organs in 30 % air for labels and logits.
"""

import argparse
import statistics
import time
import tracemalloc
from collections.abc import Callable, Sequence

import numpy as np
from batchgenerators.augmentations.utils import resize_segmentation
from scipy import ndimage
from skimage.transform import resize

from autoseg.resample import resample_argmax, resample_image, resample_labels
from autoseg.schema import Resampling

Work = Callable[[], np.ndarray]
CLASSES = 15
"""Background and 14 organs."""
EVEN = (1.0, 1.0, 1.0)


def smooth_noise(shape: Sequence[int]) -> np.ndarray:
    """Float32 image of `shape`: noise blurred over two voxels, and a little sharp noise."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(shape, dtype=np.float32)
    return ndimage.gaussian_filter(noise, 2) * 10 + 0.1 * noise


def organ_logits(shape: Sequence[int]) -> np.ndarray:
    """Float16 logits (CLASSES, *shape) as a network gives them: sure inside ellipsoids, soft at their borders."""
    rng = np.random.default_rng(1)
    axes = np.ogrid[tuple(slice(0, 1, n * 1j) for n in shape)]
    logits = np.empty((CLASSES, *shape), np.float16)
    body = np.sqrt(sum(((a - 0.5) / 0.55) ** 2 for a in axes))
    logits[0] = np.clip(12 * (body - 0.9), -6, 6)
    for index in range(1, CLASSES):
        centre, radius = rng.uniform(0.25, 0.75, 3), rng.uniform(0.08, 0.2, 3)
        distance = np.sqrt(sum(((a - c) / r) ** 2 for a, c, r in zip(axes, centre, radius)))
        logits[index] = np.clip(8 * (1 - distance), -12, 8) + rng.normal(0, 0.02, shape)
    return logits


def classical_image(image: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Cubic resize of one channel."""
    return resize(image.astype(float), shape, order=3, mode="edge", anti_aliasing=False).astype(np.float32)


def classical_export(logits: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """All classes resized, then the largest taken."""
    out = np.empty((len(logits), *shape), logits.dtype)
    for logit, result in zip(logits, out):
        result[...] = resize(logit.astype(float), shape, order=1, mode="edge", anti_aliasing=False)
    return out.argmax(axis=0)


def peak_bytes(work: Work) -> int:
    """Most memory that `work` holds at once, its result included."""
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def compare(
    name: str, classical: Work, ours: Work, agreement: Callable[[np.ndarray, np.ndarray], str], pairs: int
) -> None:
    """Run both in turns and print one row."""
    expected, found = classical(), ours()
    times: list[tuple[float, float]] = []
    for _ in range(pairs):
        marks = [time.perf_counter()]
        for work in (classical, ours):
            work()
            marks.append(time.perf_counter())
        times.append((marks[1] - marks[0], marks[2] - marks[1]))
    ratios = [a / b for a, b in times]
    memory = peak_bytes(ours) / peak_bytes(classical)
    before, after = (statistics.median(column) for column in zip(*times))
    spread = f"min {min(ratios):.1f}, max {max(ratios):.1f}; {before:.3f} s -> {after:.3f} s"
    row = f"{name:8s} {statistics.median(ratios):6.1f}x  ({spread})  memory {memory:.3f}x"
    print(f"{row}  {agreement(expected, found)}", flush=True)


def largest_difference(expected: np.ndarray, found: np.ndarray) -> str:
    """Agreement of images."""
    return f"largest difference {np.abs(expected - found).max() / np.ptp(expected):.1e} of the range"


def differing_voxels(expected: np.ndarray, found: np.ndarray) -> str:
    """Agreement of labels."""
    return f"{np.count_nonzero(expected != found)} of {expected.size} voxels differ"


def main() -> None:
    """Print the rows that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, help="timed pairs a row")
    parser.add_argument("--only", nargs="+", choices=("cubic", "labels", "export"), help="rows to run (default: all)")
    options = parser.parse_args()
    rules, rows = Resampling(), options.only or ("cubic", "labels", "export")
    old, new = (128, 192, 192), (160, 160, 160)
    if "cubic" in rows:
        image = smooth_noise(old)
        compare(
            "cubic",
            lambda: classical_image(image, new),
            lambda: resample_image(image[None], EVEN, EVEN, new, rules)[0],
            largest_difference,
            options.pairs,
        )
    if "labels" in rows:
        labels = organ_logits(old).argmax(axis=0).astype(np.int16)
        compare(
            "labels",
            lambda: resize_segmentation(labels, new, order=1),
            lambda: resample_labels(labels, EVEN, EVEN, new, rules),
            differing_voxels,
            options.pairs,
        )
    if "export" in rows:
        logits, size = organ_logits((128, 128, 128)), (256, 256, 256)
        compare(
            "export",
            lambda: classical_export(logits, size),
            lambda: resample_argmax(logits, EVEN, EVEN, size, rules),
            differing_voxels,
            options.pairs,
        )


if __name__ == "__main__":
    main()
