"""How magnetic resonance spoils an image: bias field, motion, ghosts, Rician noise, one coarse axis.

Each function is the deterministic twin of a draw and changes one channel (*patch) in place, on the device where it is.
Lengths are voxels. Prepared images have no zero that means "no signal", so where a change is one of the signal, the
darkest voxel of the patch counts as none. Axes run in plan order, coarsest first, so motion in the finest plane is
motion along the last two.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoseg.augment import intensity, spline
from autoseg.augment.policy import Policy, Range

BIAS_POINTS = 4
"""Control points an axis: one cell of a cubic spline, so the field is a cubic polynomial along each axis."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Artefacts:
    """What was drawn for a batch of B samples with C channels; D spatial axes. A neutral value means "left out"."""

    motion_length: np.ndarray
    """(B, C) voxels; neutral: 0."""
    motion_angle: np.ndarray
    """(B, C) radians, from the last axis towards the one before it."""
    bias_log: np.ndarray
    """(B, C, *points): logarithm of the gain at the control points; neutral: 0."""
    ghost_strength: np.ndarray
    """(B, C); neutral: 0."""
    ghost_copies: np.ndarray
    """(B, C) integers."""
    ghost_axis: np.ndarray
    """(B, C) integers."""
    anisotropy: np.ndarray
    """(B, C, D): share of voxels that is left along each axis; neutral: 1."""
    rician_sigma: np.ndarray
    """(B,); neutral: 0."""
    rician_seed: np.ndarray
    """(B,) int64."""

    def part(self, samples: slice) -> "Artefacts":
        """What was drawn for these samples of the batch."""
        arrays: dict[str, Any] = {name: value[samples] for name, value in vars(self).items()}
        return replace(self, **arrays)

    def in_stacks(self) -> "Artefacts":
        """The same for stacks of slices, which have one more axis in front; a channel's slices are changed alike."""
        return replace(
            self,
            bias_log=self.bias_log[:, :, None],
            ghost_axis=self.ghost_axis + 1,
            anisotropy=np.pad(self.anisotropy, ((0, 0), (0, 0), (1, 0)), constant_values=1.0),
        )


def draw(rng: np.random.Generator, policy: Policy, batch: int, channels: int, axes: int, fixed: int) -> Artefacts:
    """Decide everything for `batch` samples; how many numbers are drawn depends on the sizes alone.

    fixed: how many of the first of the `axes` axes are coarse already; no ghost and no low resolution runs along them.
    """
    each = (batch, channels)

    def chosen(probability: float) -> np.ndarray:
        return (rng.random((batch, 1)) < probability) & (rng.random(each) < policy.artefact_channel)

    def strength(probability: float, span: Range) -> np.ndarray:
        return chosen(probability) * rng.uniform(*span, each)

    motion_length = strength(policy.motion, policy.motion_length)
    motion_angle = rng.uniform(0, 2 * math.pi, each)
    bias = strength(policy.bias, policy.bias_log)
    points = rng.uniform(-1, 1, (*each, *[BIAS_POINTS] * axes))
    ghost_strength = strength(policy.ghosting, policy.ghost_strength)
    ghost_copies = rng.integers(policy.ghost_copies[0], policy.ghost_copies[1] + 1, each)
    ghost_axis = rng.integers(fixed, axes, each)
    coarse = chosen(policy.anisotropy)[..., None] & (np.arange(axes) == rng.integers(fixed, axes, each)[..., None])
    anisotropy = np.where(coarse, rng.uniform(*policy.anisotropy_zoom, each)[..., None], 1.0)
    return Artefacts(
        motion_length=motion_length,
        motion_angle=motion_angle,
        bias_log=bias.reshape(*each, *[1] * axes) * points,
        ghost_strength=ghost_strength,
        ghost_copies=ghost_copies,
        ghost_axis=ghost_axis,
        anisotropy=anisotropy,
        rician_sigma=(rng.random(batch) < policy.rician) * rng.uniform(*policy.rician_sigma, batch),
        rician_seed=rng.integers(2**63 - 1, size=batch),
    )


def spoil(drawn: Artefacts, sample: int, image: Tensor) -> None:
    """Everything drawn for one sample (C, *patch), in place, in the order in which a scanner does it."""
    for channel, values in enumerate(image):
        at = sample, channel
        if drawn.motion_length[at] > 0:
            blur_by_motion(values, float(drawn.motion_length[at]), float(drawn.motion_angle[at]))
        if drawn.bias_log[at].any():
            add_bias(values, drawn.bias_log[at])
        if drawn.ghost_strength[at] > 0:
            axis, copies = int(drawn.ghost_axis[at]), int(drawn.ghost_copies[at])
            add_ghosts(values, axis, copies, float(drawn.ghost_strength[at]))
        if (drawn.anisotropy[at] != 1).any():
            intensity.lower_resolution(values, tuple(drawn.anisotropy[at].tolist()))
    if drawn.rician_sigma[sample] > 0:
        generator = torch.Generator(device=image.device).manual_seed(int(drawn.rician_seed[sample]))
        for values in image:
            add_rician_noise(values, float(drawn.rician_sigma[sample]), generator)


def motion_kernel(length: float, angle_rad: float) -> np.ndarray:
    """Weights (edge, edge), edge odd, of a straight path of `length` voxels centred on the voxel; their sum is 1.

    The path starts at `angle_rad` from the last axis towards the first and is divided among the voxels beside it as
    linear interpolation would.
    """
    radius = math.ceil(length / 2)
    kernel = np.zeros((2 * radius + 1, 2 * radius + 1))
    count = max(1, 8 * math.ceil(length))
    along = ((np.arange(count) + 0.5) / count - 0.5) * length
    row, column = radius + along * math.sin(angle_rad), radius + along * math.cos(angle_rad)
    for down in (0, 1):
        for right in (0, 1):
            y, x = np.floor(row).astype(int) + down, np.floor(column).astype(int) + right
            weight = (1 - np.abs(row - y)) * (1 - np.abs(column - x)) / count
            inside = (y < len(kernel)) & (x < len(kernel))  # beyond, the weight is 0
            np.add.at(kernel, (y[inside], x[inside]), weight[inside])
    return kernel


def blur_by_motion(image: Tensor, length: float, angle_rad: float) -> None:
    """Mean of `image` (*spatial) along a straight path in the plane of its last two axes, reflected at the borders."""
    kernel = motion_kernel(length, angle_rad)
    radius, (height, width) = len(kernel) // 2, image.shape[-2:]
    padded = intensity.reflect(intensity.reflect(image, image.ndim - 2, radius), image.ndim - 1, radius)
    smooth = torch.zeros_like(image)
    for y, x in zip(*np.nonzero(kernel)):
        smooth.add_(padded[..., y : y + height, x : x + width], alpha=float(kernel[y, x]))
    image.copy_(smooth)


def add_bias(image: Tensor, log_gains: np.ndarray) -> None:
    """Multiply the signal of `image` (*spatial) by a smooth field, exp of a cubic polynomial along every axis.

    log_gains: (*points), the logarithms at the control points of a spline, see `spline.weights`.
    """
    control = torch.from_numpy(log_gains.astype(np.float32)).to(image.device)
    gain = spline.expand(control, tuple(image.shape)).exp_()
    dark = image.min()
    image.sub_(dark).mul_(gain).add_(dark)


def add_ghosts(image: Tensor, axis: int, copies: int, strength: float) -> None:
    """Replace a share `strength` of `image` (*spatial) by `copies` equal copies, evenly shifted along `axis`, wrapped.

    It is what remains when in k-space all lines but every (copies + 1)-th one along `axis` are weaker.
    """
    edge = image.shape[axis]
    ghosts = torch.zeros_like(image)
    for copy in range(1, copies + 1):
        ghosts.add_(image.roll(round(copy * edge / (copies + 1)), axis), alpha=strength / copies)
    image.mul_(1 - strength).add_(ghosts)


def add_rician_noise(image: Tensor, sigma: float, generator: torch.Generator) -> None:
    """The magnitude of the signal of `image` (any shape) with Gaussian noise in its real and in its imaginary part.

    `sigma` is the standard deviation of each; without signal the mean becomes sigma sqrt(pi / 2) (Gudbjartsson and
    Patz, MRM 1995). The noise depends on the generator and the kind of its device.
    """
    dark = image.min()
    real, imaginary = (torch.randn(image.shape, generator=generator, device=image.device) for _ in range(2))
    image.sub_(dark).add_(real, alpha=sigma)
    image.copy_(torch.hypot(image, imaginary.mul_(sigma))).add_(dark)
