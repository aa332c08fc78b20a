"""The augmentation of nnU-Net v1, by the classes of `batchgenerators` (Isensee et al., 2020) themselves.

Slow, on the CPU and in one thread at a time: for comparisons with results that were made with it. Those classes draw
from numpy's and Python's global generators, so these are seeded for each batch under a lock, and put back afterwards.
"""

import math
import random
import threading
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoseg.augment import geometry
from autoseg.augment.default import is_planar, rotation_limit_rad
from autoseg.augment.foreign import Transform
from autoseg.mirroring import ALL_AXES, Flips

_GLOBAL_GENERATORS = threading.Lock()


def classic(patch: tuple[int, ...], flips: Flips = ALL_AXES) -> Transform:
    """The transform from boxes of `enlarged(patch)` to patches, of the type that `foreign.Transform` describes."""
    steps = _steps(patch, flips)

    def transform(image: Tensor, labels: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        batch = {"data": image.cpu().numpy(), "seg": labels.cpu().numpy()[:, None].astype(np.float32)}
        seed = int(rng.integers(2**32 - 1))
        with _GLOBAL_GENERATORS:
            numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
            try:
                np.random.seed(seed)  # noqa: NPY002 - batchgenerators knows no other generator
                random.seed(seed)
                for step in steps:
                    batch = step(**batch)
            finally:
                np.random.set_state(numpy_state)  # noqa: NPY002
                random.setstate(python_state)
        changed = torch.from_numpy(np.ascontiguousarray(batch["data"], dtype=np.float32))
        changed_labels = torch.from_numpy(batch["seg"][:, 0].round().astype(np.int64))
        return changed.to(image.device), changed_labels.to(labels.device)

    return transform


def enlarged(patch: tuple[int, ...]) -> tuple[int, ...]:
    """The box that patches are rotated in: room for a turn about any one axis, divided by 0.85, of one centre."""
    limit = min(rotation_limit_rad(patch), math.pi / 2)
    first = 1 if is_planar(patch) else 0
    reach = [float(edge) for edge in patch]
    for a, b in combinations(range(first, len(patch)), 2):
        for one, other in ((a, b), (b, a)):
            turned = patch[one] * math.cos(limit) + patch[other] * math.sin(limit)
            reach[one] = max(reach[one], turned)
    box = [int(edge / 0.85) for edge in reach]
    box[:first] = patch[:first]
    return tuple(edge + (edge - wanted) % 2 for edge, wanted in zip(box, patch))


Step = Callable[..., dict[str, Any]]


def _in_planes(step: Step) -> Step:
    """`step` with all planes (B, C, Z, Y, X) of a sample as channels (B, C Z, Y, X) of one 2D image."""

    def folded(**batch: Any) -> dict[str, Any]:
        planes = {name: array.reshape(len(array), -1, *array.shape[3:]) for name, array in batch.items()}
        return {name: array.reshape(*batch[name].shape[:3], *array.shape[2:]) for name, array in step(**planes).items()}

    return folded


def _mirror_sides(flips: Flips) -> Step:
    """Mirrors half of the samples along left-right and gives labels their other names, as no original class can."""
    assert flips.left_right is not None
    axis: int = flips.left_right

    def mirror(data: np.ndarray, seg: np.ndarray) -> dict[str, Any]:
        for sample in np.flatnonzero(np.random.uniform(size=len(data)) < 0.5):  # noqa: NPY002 - as the other steps
            data[sample] = np.flip(data[sample], 1 + axis).copy()
            seg[sample] = np.flip(seg[sample], 1 + axis).copy()
            geometry.rename(torch.from_numpy(seg[sample]), flips.indices)
        return {"data": data, "seg": seg}

    return mirror


def _mirrors(flips: Flips, dimension: int) -> list[Step]:
    """The steps that mirror along every axis along which there are mirror images."""
    from batchgenerators.transforms.spatial_transforms import MirrorTransform

    plain = tuple(axis for axis in range(dimension) if axis in flips.axes)
    if not flips.indices:
        return [MirrorTransform(plain)] if plain else []
    plain = tuple(axis for axis in plain if axis != flips.left_right)
    return [*([MirrorTransform(plain)] if plain else []), _mirror_sides(flips)]


def _steps(patch: tuple[int, ...], flips: Flips) -> list[Step]:
    # Imported only when asked for: it brings in all of scikit-image.
    from batchgenerators.transforms import color_transforms as color
    from batchgenerators.transforms import noise_transforms as noise
    from batchgenerators.transforms.resample_transforms import SimulateLowResolutionTransform
    from batchgenerators.transforms.spatial_transforms import SpatialTransform

    planar = is_planar(patch)
    limit = rotation_limit_rad(patch, flips.left_right)
    angle = (-limit, limit)
    spatial = SpatialTransform(
        patch[1:] if planar else patch,
        patch_center_dist_from_border=None,
        do_elastic_deform=False,
        angle_x=angle,
        angle_y=angle,
        angle_z=angle,
        scale=(0.7, 1.4),
        border_mode_data="constant",
        border_cval_data=0,
        order_data=3,
        border_mode_seg="constant",
        border_cval_seg=-1,
        order_seg=1,
        random_crop=False,
        p_scale_per_sample=0.2,
        p_rot_per_sample=0.2,
    )
    return [
        _in_planes(spatial) if planar else spatial,
        noise.GaussianNoiseTransform(p_per_sample=0.1),
        noise.GaussianBlurTransform((0.5, 1.0), p_per_sample=0.2, p_per_channel=0.5),
        color.BrightnessMultiplicativeTransform((0.75, 1.25), p_per_sample=0.15),
        color.ContrastAugmentationTransform(p_per_sample=0.15),
        SimulateLowResolutionTransform(
            zoom_range=(0.5, 1.0),
            per_channel=True,
            p_per_channel=0.5,
            order_downsample=0,
            order_upsample=3,
            p_per_sample=0.25,
            ignore_axes=(0,) if planar else None,
        ),
        color.GammaTransform((0.7, 1.5), invert_image=True, per_channel=True, retain_stats=True, p_per_sample=0.1),
        color.GammaTransform((0.7, 1.5), invert_image=False, per_channel=True, retain_stats=True, p_per_sample=0.3),
        *_mirrors(flips, len(patch)),
    ]
