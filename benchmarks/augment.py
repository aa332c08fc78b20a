"""Milliseconds a sample for drawing and applying an augmentation, in one thread: python benchmarks/augment.py

Cutting the box is counted where it copies nothing: boxes are views of a random volume large enough for every draw.
"""

import argparse
import time
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoseg.augment import Augmentation, make_augmentation
from autoseg.augment.default import DefaultAugmentation
from autoseg.augment.policy import MR_ARTEFACTS, STRONG, TRANSFORMS, certain, used

PATCHES = ((128, 128, 128), (40, 56, 40))
# No draw reaches further: 1.4 times the diagonal of the largest patch, and a voxel on both sides.
VOLUME = (314, 314, 314)


@cache
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


def measure(augmentation: Augmentation, patch: tuple[int, ...], rng: np.random.Generator) -> float:
    """Milliseconds of one batch of one sample."""
    image, labels = volume(0)
    start = time.perf_counter()
    draws = augmentation.draw(rng, 1, 1)
    augmentation.apply(draws, [cut(image, labels, draws.source_shape(0))])
    return 1000 * (time.perf_counter() - start)


def peers(patch: tuple[int, ...]) -> dict[str, Any]:
    """The transforms that batchgenerators has too, by the names of `policy.TRANSFORMS`, on every sample."""
    from batchgenerators.transforms.noise_transforms import RicianNoiseTransform
    from batchgenerators.transforms.spatial_transforms import SpatialTransform

    still = {"do_rotation": False, "do_scale": False, "random_crop": False, "patch_center_dist_from_border": None}
    return {
        "elastic": SpatialTransform(
            patch, alpha=(0.0, 900.0), sigma=(9.0, 13.0), order_data=1, order_seg=1, p_el_per_sample=1, **still
        ),
        "Rician noise": RicianNoiseTransform((0.0, 0.1)),
    }


def measure_peer(step: Any, patch: tuple[int, ...]) -> float:
    """Milliseconds of one of `peers` on one sample of the patch's own size."""
    image, labels = cut(*volume(0), patch)
    batch = {"data": image[None].numpy().copy(), "seg": labels[None, None].numpy().astype(np.float32)}
    start = time.perf_counter()
    step(**batch)
    return 1000 * (time.perf_counter() - start)


def each_transform(patch: tuple[int, ...], samples: int) -> None:
    """Print one line a transform, always applied; in turn with batchgenerators' where that has one."""
    theirs = peers(patch)
    plain = make_augmentation("none", patch=patch, dimension=3, masked=(False,))
    assert isinstance(plain, DefaultAugmentation)
    for name in TRANSFORMS:
        policy = certain(MR_ARTEFACTS if name in used(MR_ARTEFACTS) else STRONG, [name])
        alone, rng = replace(plain, policy=policy), np.random.default_rng(0)
        pairs = [
            (measure(alone, patch, rng), measure_peer(theirs[name], patch) if name in theirs else np.nan)
            for _ in range(samples)
        ]
        ours, peer = np.median(pairs, axis=0)
        print(
            f"{name} {patch}: {ours:.1f} ms a sample" + ("" if np.isnan(peer) else f", batchgenerators {peer:.1f} ms")
        )


def main() -> None:
    """Print one line a patch shape, or one a transform."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="default", help="augmentation, as in a recipe")
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--transforms", action="store_true", help="each transform by itself instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for patch in PATCHES:
        if options.transforms:
            each_transform(patch, options.samples)
            continue
        augmentation = make_augmentation(options.name, patch=patch, dimension=3, masked=(False,))
        rng = np.random.default_rng(0)
        times = [measure(augmentation, patch, rng) for _ in range(options.samples)]
        print(f"{options.name} {patch}: mean {np.mean(times):.1f} ms, median {np.median(times):.1f} ms a sample")


if __name__ == "__main__":
    main()
