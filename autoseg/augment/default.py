"""The augmentation of nnU-Net v2 (Isensee et al., Nature Methods 2021): its transforms, order and distributions.

Everything random is drawn for the whole batch before a voxel is read, from one generator that the caller seeds: two
callers with spawned generators share nothing. (The original's worker processes share one torch stream, so that their
on/off decisions repeat one another.) Three more choices. Noise strength is a standard deviation, as the original's
code has it, not a variance, as it is called there. The source box is exactly what the drawn map reads; the original
shows black corners beyond a fixed box. Mirroring happens while reading: in distribution every later step commutes
with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoseg.augment import artefacts, geometry, intensity, spline
from autoseg.augment.artefacts import Artefacts
from autoseg.augment.policy import Policy, Range
from autoseg.mirroring import ALL_AXES, Flips
from autoseg.records import record
from autoseg.schema import Dimension

Source = tuple[Tensor, Tensor]

ELASTIC_CELLS = 4
"""Of the control grid of elastic displacements along every axis that moves; a cell is a quarter of the patch."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Draws:
    """What was drawn for a batch of B samples with C channels; D spatial axes. A neutral value means "left out"."""

    patch: tuple[int, ...]
    affine: np.ndarray
    """(B, D, D): patch offsets to source offsets, in voxels; neutral: the identity."""
    mirrored: np.ndarray
    """(B, D) bool."""
    noise_sigma: np.ndarray
    """(B,); neutral: 0."""
    noise_seed: np.ndarray
    """(B,) int64."""
    blur_sigma: np.ndarray
    """(B, C, D) in voxels; neutral: 0."""
    brightness: np.ndarray
    """(B, C); neutral: 1, as of all that follow."""
    contrast: np.ndarray
    zoom: np.ndarray
    """(B, C, D)."""
    gamma_inverted: np.ndarray
    gamma: np.ndarray
    displacement: np.ndarray
    """(B, D, *points): control points of a spline, in patch voxels; neutral: 0. It acts before `affine`."""
    artefacts: Artefacts
    turn_rad: np.ndarray
    """(B, angles); this and the next three are what `affine` was made of, for people to read."""
    scale: np.ndarray
    """(B,); above 1 objects shrink."""
    enlargement: np.ndarray
    """(B,); above 1 objects grow."""
    shear_rad: np.ndarray
    """(B, axes that move)."""

    def source_shape(self, sample: int) -> tuple[int, ...]:
        """Shape of the box, centred on the patch centre, that sample number `sample` is made from."""
        return geometry.source_shape(self.affine[sample], self.patch, self.displacement[sample])

    def is_mirrored(self, sample: int) -> tuple[bool, ...]:
        """Which axes of the patch are reversed in sample number `sample`."""
        return tuple(self.mirrored[sample].tolist())

    def part(self, samples: slice) -> "Draws":
        """What was drawn for these samples of the batch."""
        arrays: dict[str, Any] = {
            name: value[samples] for name, value in vars(self).items() if isinstance(value, np.ndarray)
        }
        return replace(self, artefacts=self.artefacts.part(samples), **arrays)

    def in_stacks(self, slices: int) -> "Draws":
        """The same for stacks of so many slices around each 2D patch, all of which are changed alike."""
        affine = np.tile(np.eye(3), (len(self.affine), 1, 1))
        affine[:, 1:, 1:] = self.affine
        return replace(
            self,
            patch=(slices, *self.patch),
            affine=affine,
            mirrored=np.pad(self.mirrored, ((0, 0), (1, 0))),
            blur_sigma=np.pad(self.blur_sigma, ((0, 0), (0, 0), (1, 0))),
            zoom=np.pad(self.zoom, ((0, 0), (0, 0), (1, 0)), constant_values=1.0),
            displacement=np.pad(self.displacement, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :, None],
            artefacts=self.artefacts.in_stacks(),
        )


@record
class DefaultAugmentation:
    """Draws and applies a `Policy` to patches of one shape.

    `masked`: one entry a channel, whether its voxels outside the image content (label -1) are set to zero at the end.
    `flips`: the mirror images there are, and what labels become in them. `context`: slices that a 2D network sees, see
    `Configuration.context`; those of a channel are one image, so they move, and change their grey values, together.
    """

    policy: Policy
    patch: tuple[int, ...]
    dimension: Dimension
    masked: tuple[bool, ...]
    flips: Flips = ALL_AXES
    context: int = 1

    @property
    def planar(self) -> bool:
        """Whether axis 0 of a 3D patch is so short that it takes no part in rotation, scaling and low resolution."""
        return is_planar(self.patch)

    @property
    def fixed(self) -> int:
        """How many of the first axes take no part in these."""
        return int(self.planar)

    def draw(self, rng: np.random.Generator, batch: int, channels: int, cases: Sequence[str] = ()) -> Draws:
        """Decide everything for `batch` samples of `channels` channels.

        The count of numbers taken from `rng` depends on the shapes alone, never on what is drawn.
        """
        policy, axes = self.policy, len(self.patch)
        each = (batch, channels)
        chosen = rng.random(batch) < policy.rotation
        limit = rotation_limit_rad(self.patch, self.flips.left_right)
        angles = rng.uniform(-limit, limit, (batch, 1 if axes == 2 or self.planar else 3)) * chosen[:, None]
        scales = np.where(rng.random(batch) < policy.scaling, rng.uniform(*policy.scale, batch), 1.0)
        affine = np.tile(np.eye(axes), (batch, 1, 1))
        for matrix, angle, scale in zip(affine, angles, scales):
            moving = slice(1, None) if self.planar else slice(None)
            matrix[moving, moving] = geometry.rotation(angle) * scale
        noisy = rng.random(batch) < policy.noise
        noise_sigma = noisy * rng.uniform(*policy.noise_sigma, batch)
        noise_seed = rng.integers(2**63 - 1, size=batch)
        blurred = _chosen(rng, policy.blur, policy.blur_channel, each)
        blur_sigma = blurred[..., None] * rng.uniform(*policy.blur_sigma, (*each, axes))
        brightness = _about_one(rng, policy.brightness, policy.brightness_factor, each, policy.halved)
        contrast = _about_one(rng, policy.contrast, policy.contrast_factor, each, policy.halved)
        coarse = _chosen(rng, policy.low_resolution, policy.low_resolution_channel, each)
        zoom = np.repeat(np.where(coarse, rng.uniform(*policy.zoom, each), 1.0)[..., None], axes, axis=-1)
        if self.planar:
            zoom[..., 0] = 1.0
        gamma_inverted = _about_one(rng, policy.gamma_inverted, policy.gamma_exponent, each, policy.halved)
        gamma = _about_one(rng, policy.gamma, policy.gamma_exponent, each, policy.halved)
        mirrored = (rng.random((batch, axes)) < policy.mirror) & np.isin(range(axes), self.flips.axes)
        # What nnU-Net's list lacks comes from streams of its own: it moves nothing that is drawn for that list.
        new, bends = rng.spawn(2)
        enlargement = np.where(new.random(batch) < policy.enlarging, new.uniform(*policy.enlargement, batch), 1.0)
        sheared = new.random((batch, 1)) < policy.shear
        shear_rad = sheared * np.deg2rad(new.uniform(*policy.shear_degrees, (batch, axes - self.fixed)))
        for matrix, larger, leaning in zip(affine, enlargement, shear_rad):
            if larger != 1 or leaning.any():
                matrix[self.fixed :, self.fixed :] @= geometry.shear(leaning) / larger
        draws = Draws(
            patch=self.patch,
            affine=affine,
            mirrored=mirrored,
            noise_sigma=noise_sigma,
            noise_seed=noise_seed,
            blur_sigma=blur_sigma,
            brightness=brightness,
            contrast=contrast,
            zoom=zoom,
            gamma_inverted=gamma_inverted,
            gamma=gamma,
            displacement=self._draw_displacement(bends, batch),
            artefacts=artefacts.draw(new, policy, batch, channels, axes, self.fixed),
            turn_rad=angles,
            scale=scales,
            enlargement=enlargement,
            shear_rad=shear_rad,
        )
        return draws if self.context == 1 else draws.in_stacks(self.context)

    def _draw_displacement(self, rng: np.random.Generator, batch: int) -> np.ndarray:
        """Control points (B, D, *points) of displacements in voxels: none along, nor different along, a fixed axis.

        Without elastic deformation there is one point, and nothing is drawn from `rng`, which is for this alone.
        """
        axes = len(self.patch)
        if self.policy.elastic == 0:
            return np.zeros((batch, axes, *[1] * axes))
        points = [1] * self.fixed + [ELASTIC_CELLS + 3] * (axes - self.fixed)
        share = (rng.random(batch) < self.policy.elastic) * rng.uniform(*self.policy.elastic_share, batch)
        reach = share[:, None] * [spline.spacing(edge, count) for edge, count in zip(self.patch, points)]
        return rng.uniform(-1, 1, (batch, axes, *points)) * reach.reshape(batch, axes, *[1] * axes)

    def apply(self, draws: Draws, sources: Sequence[Source]) -> tuple[Tensor, Tensor]:
        """Make a batch from one (image, labels) source a sample, on the device where the sources are.

        A source is an image (C, *source_shape) float32 and labels (*source_shape) of an integer type, outside the image
        content 0 and -1; a larger source of the same centre gives the same result. Returns the image (B, C, *patch)
        float32 and the labels (B, *patch) int64, none negative. Sources are left as they are.

        With `context` a source is a stack of slices; the image is (B, C * context, *patch), channel by channel with
        its slices side by side, and the labels are those of the middle slice.
        """
        first = sources[0][0]
        image = torch.empty((len(sources), len(first), *draws.patch), dtype=torch.float32, device=first.device)
        labels = torch.empty((len(sources), *draws.patch), dtype=torch.int64, device=first.device)
        for sample, (source_image, source_labels) in enumerate(sources):
            self._place(draws, sample, source_image, source_labels, image[sample], labels[sample])
            _shade(draws, sample, image[sample])
        image, labels = finish(image, labels, self.masked)
        if self.context == 1:
            return image, labels
        return image.flatten(1, 2), labels[:, self.context // 2].contiguous()

    def follow(self, draws: Draws, maps: Sequence[Tensor]) -> Tensor:
        """Move label maps, one (*source_shape) a sample, as `apply` moves the labels of the same boxes.

        Returns (B, *patch) int64, or (B, context, *patch) of stacks; places outside the image content, -1, become 0.
        """
        first = maps[0]
        moved = torch.empty((len(maps), *draws.patch), dtype=torch.int64, device=first.device)
        for sample, labels in enumerate(maps):
            # An image without channels: only labels are moved.
            none = first.new_empty((0, *labels.shape), dtype=torch.float32)
            self._place(draws, sample, none, labels, none.new_empty((0, *draws.patch)), moved[sample])
        return moved.clamp_(min=0)

    def _place(
        self, draws: Draws, sample: int, image: Tensor, labels: Tensor, out_image: Tensor, out_labels: Tensor
    ) -> None:
        """Read a box, image (C, *source) and labels (*source), as drawn into (C, *patch) and (*patch)."""
        shape = draws.source_shape(sample)
        image, labels = geometry.centre(image, shape), geometry.centre(labels, shape)
        affine, mirrored, bent = draws.affine[sample], draws.mirrored[sample], draws.displacement[sample]
        if np.array_equal(affine, np.eye(len(shape))) and not bent.any():
            geometry.mirror_into(image, labels, mirrored, out_image, out_labels)
        else:
            bent = geometry.mirror_displacement(bent, mirrored)
            geometry.warp_into(image, labels, affine * np.where(mirrored, -1.0, 1.0), out_image, out_labels, bent)
        across = self.flips.left_right
        # Counted from the last axis, since a stack of slices has one more in front.
        if across is not None and self.flips.indices and mirrored[across - len(self.patch)]:
            geometry.rename(out_labels, self.flips.indices)


def is_planar(patch: tuple[int, ...]) -> bool:
    """Whether a 3D patch is more than three times as long as its axis 0: it is then moved slice by slice."""
    return len(patch) == 3 and max(patch) / patch[0] > 3


def rotation_limit_rad(patch: tuple[int, ...], left_right: int | None = None) -> float:
    """Largest angle: 30 degrees about each axis in 3D, 180 in a plane, 15 in a plane longer than 3 : 2 (only if 2D).

    30 in a plane that holds the axis `left_right`: half a turn and a mirror image along the other axis make a mirror
    image along this one, in which no label has traded places.
    """
    if len(patch) == 2 and max(patch) / min(patch) > 1.5:
        return np.deg2rad(15)
    if len(patch) == 3 and not is_planar(patch):
        return np.deg2rad(30)
    in_plane = left_right is not None and left_right >= len(patch) - 2
    return np.deg2rad(30 if in_plane else 180)


def finish(image: Tensor, labels: Tensor, masked: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """In place: masked channels of (B, C, *patch) to zero where labels (B, *patch) are -1, then those labels to 0."""
    if any(masked):
        outside = labels < 0
        for channel in np.flatnonzero(masked).tolist():
            image[:, channel].masked_fill_(outside, 0.0)
    return image, labels.clamp_(min=0)


def _chosen(rng: np.random.Generator, sample: float, channel: float, each: tuple[int, int]) -> np.ndarray:
    """(B, C) bool: which channels of the samples that were chosen."""
    return (rng.random((each[0], 1)) < sample) & (rng.random(each) < channel)


def _about_one(
    rng: np.random.Generator, probability: float, span: Range, each: tuple[int, int], halved: bool
) -> np.ndarray:
    """(B, C) factors, 1 in samples not chosen; otherwise uniform, `halved` with equal chance below or above 1."""
    chosen = rng.random((each[0], 1)) < probability
    below = rng.random(each) < (0.5 if halved else (1.0 - span[0]) / (span[1] - span[0]))
    factors = np.where(below, rng.uniform(span[0], 1.0, each), rng.uniform(1.0, span[1], each))
    return np.where(chosen, factors, 1.0)


def _shade(draws: Draws, sample: int, image: Tensor) -> None:
    """All changes of grey values of one sample (C, *patch), in place, channel by channel in the order of the policy."""
    if draws.noise_sigma[sample] > 0:
        intensity.add_noise(image, float(draws.noise_sigma[sample]), int(draws.noise_seed[sample]))
    for channel, values in enumerate(image):
        at = sample, channel
        if draws.blur_sigma[at].any():
            intensity.blur(values, tuple(draws.blur_sigma[at].tolist()))
        if draws.brightness[at] != 1:
            values.mul_(float(draws.brightness[at]))
        if draws.contrast[at] != 1:
            intensity.change_contrast(values, float(draws.contrast[at]))
        if (draws.zoom[at] != 1).any():
            intensity.lower_resolution(values, tuple(draws.zoom[at].tolist()))
        if draws.gamma_inverted[at] != 1:
            intensity.change_gamma(values, float(draws.gamma_inverted[at]), inverted=True)
        if draws.gamma[at] != 1:
            intensity.change_gamma(values, float(draws.gamma[at]), inverted=False)
    artefacts.spoil(draws.artefacts, sample, image)
