"""Milliseconds a sample for drawing and applying an augmentation, in one thread: python benchmarks/augment.py

Cutting the box is counted where it copies nothing: boxes are views of a random volume large enough for every draw.
"""

import argparse
import time

import numpy as np
import torch
from torch import Tensor

from autoseg.augment import make_augmentation

PATCHES = ((128, 128, 128), (40, 56, 40))
# No draw reaches further: 1.4 times the diagonal of the largest patch, and a voxel on both sides.
VOLUME = (314, 314, 314)


def volume(seed: int) -> tuple[Tensor, Tensor]:
    """A random image (1, *VOLUME) and labels 0, 1, 2 in two nested balls."""
    image = torch.randn(1, *VOLUME, generator=torch.Generator().manual_seed(seed))
    axis = (torch.arange(VOLUME[0]) - VOLUME[0] / 2) ** 2
    squared = axis[:, None, None] + axis[:, None] + axis
    return image, (squared < 50**2).short() + (squared < 30**2).short()


def cut(image: Tensor, labels: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The box of `shape` in the middle of a volume, as views."""
    start = [(whole - edge) // 2 for whole, edge in zip(VOLUME, shape)]
    box = tuple(slice(first, first + edge) for first, edge in zip(start, shape))
    return image[(slice(None), *box)], labels[box]


def measure(name: str, patch: tuple[int, ...], samples: int) -> np.ndarray:
    """Milliseconds of each of `samples` batches of one sample."""
    augmentation = make_augmentation(name, patch=patch, dimension=3, masked=(False,))
    image, labels = volume(0)
    rng = np.random.default_rng(0)
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        draws = augmentation.draw(rng, 1, 1)
        augmentation.apply(draws, [cut(image, labels, draws.source_shape(0))])
        times.append(1000 * (time.perf_counter() - start))
    return np.array(times)


def main() -> None:
    """Print one line a patch shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="default", help="augmentation, as in a recipe")
    parser.add_argument("--samples", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for patch in PATCHES:
        times = measure(options.name, patch, options.samples)
        print(f"{options.name} {patch}: mean {times.mean():.1f} ms, median {np.median(times):.1f} ms a sample")


if __name__ == "__main__":
    main()
