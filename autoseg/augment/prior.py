"""Corrupt the masks that a cascade's second stage reads, so that it learns to doubt them.

Out-of-fold predictions still are better than those of a new hospital: masks are grown, shrunk, closed or opened, and
small components vanish. Distributions are nnU-Net's (Isensee et al., Nature Methods 2021). As everywhere, parameters
are drawn first and applied by a deterministic twin, on the device where the masks are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cc3d
import numpy as np
import torch
from torch import Tensor

from autoseg.records import record

OPERATIONS = ("dilate", "erode", "close", "open")


@record
class PriorPolicy:
    """Probabilities a sample, and of each mask of a sample that was chosen."""

    change: float = 0.4
    change_mask: float = 0.5
    radius: tuple[int, int] = (1, 8)
    """Smallest and largest radius of the ball, in voxels."""
    remove: float = 0.2
    remove_mask: float = 0.5
    largest_removed: float = 0.15
    """Only components smaller than this share of the patch vanish."""


DEFAULT_PRIOR = PriorPolicy()


@dataclass(frozen=True, eq=False, kw_only=True)
class PriorDraws:
    """What was drawn for the masks of one batch: B samples, F foreground masks."""

    order: np.ndarray
    """(B, F): in which order the masks are changed."""
    operation: np.ndarray
    """(B, F): index into OPERATIONS; -1 leaves the mask."""
    radius: np.ndarray
    """(B, F) in voxels."""
    removed: np.ndarray
    """(B, F) in [0, 1): which of the small components vanishes, as a share of their count; -1: none."""

    def part(self, samples: slice) -> "PriorDraws":
        """What was drawn for these samples of the batch."""
        return PriorDraws(**{name: value[samples] for name, value in vars(self).items()})


def draw_prior(rng: np.random.Generator, batch: int, masks: int, policy: PriorPolicy = DEFAULT_PRIOR) -> PriorDraws:
    """Decide everything for `masks` masks of `batch` samples; how many numbers are drawn depends on the sizes alone."""
    each = (batch, masks)
    changed = (rng.random((batch, 1)) < policy.change) & (rng.random(each) < policy.change_mask)
    removed = (rng.random((batch, 1)) < policy.remove) & (rng.random(each) < policy.remove_mask)
    return PriorDraws(
        order=rng.permuted(np.tile(np.arange(masks), (batch, 1)), axis=1),
        operation=np.where(changed, rng.integers(len(OPERATIONS), size=each), -1),
        radius=rng.integers(policy.radius[0], policy.radius[1] + 1, size=each),
        removed=np.where(removed, rng.random(each), -1.0),
    )


def corrupt(masks: Tensor, draws: PriorDraws, policy: PriorPolicy = DEFAULT_PRIOR) -> Tensor:
    """Masks (B, F, *patch) of 0 and 1, float32 -> the same, changed as drawn.

    The masks exclude each other before and after: a voxel that a mask gains leaves the others.
    """
    out = masks.clone()
    for sample, order in enumerate(draws.order):
        mine = out[sample]
        for index in order.tolist():
            if (operation := int(draws.operation[sample, index])) >= 0 and mine[index].any():
                before = mine[index].bool()
                after = morph(before, OPERATIONS[operation], int(draws.radius[sample, index]))
                mine.masked_fill_((after & ~before)[None], 0.0)
                mine[index] = after
        for index in order.tolist():
            if (share := float(draws.removed[sample, index])) >= 0:
                limit = policy.largest_removed * mine[index].numel()
                _remove_component(mine[index], share, limit)
    return out


def morph(mask: Tensor, operation: str, radius: int) -> Tensor:
    """Binary morphology of `mask` (*spatial), bool, by a ball (a disk in 2D) of `radius` voxels; one of OPERATIONS.

    What lies beyond the border has no say: from there nothing grows in, and nothing is eaten away.
    """
    if operation == "dilate":
        return _dilate(mask, radius)
    if operation == "erode":
        return ~_dilate(~mask, radius)
    if operation == "close":
        return ~_dilate(~_dilate(mask, radius), radius)
    if operation == "open":
        return _dilate(~_dilate(~mask, radius), radius)
    raise ValueError(f"unknown operation {operation!r}; choose one of {', '.join(OPERATIONS)}")


def _dilate(mask: Tensor, radius: int) -> Tensor:
    """Voxels within `radius` of the mask. A ball is no product of lines, so it is convolved by Fourier transform."""
    if not mask.any():
        return mask
    found = mask.nonzero()
    low = (found.min(0).values - radius).clamp(min=0).tolist()
    high = (found.max(0).values + radius + 1).tolist()
    box = tuple(slice(a, min(b, n)) for a, b, n in zip(low, high, mask.shape))
    inner = mask[box].float()
    # Room on one side of every axis: what wraps around there is cut off.
    size = [edge + 2 * radius for edge in inner.shape]
    spectrum = torch.fft.rfftn(inner, s=size) * torch.fft.rfftn(_ball(radius, mask.ndim, inner.device), s=size)
    counts = torch.fft.irfftn(spectrum, s=size)
    grown = counts[tuple(slice(radius, radius + edge) for edge in inner.shape)] > 0.5
    out = mask.clone()
    out[box] = grown
    return out


def _ball(radius: int, dimension: int, device: torch.device) -> Tensor:
    """(2 radius + 1, ...) float32: 1 within `radius` voxels of the centre."""
    squared = torch.zeros((1,) * dimension, device=device)
    for axis in range(dimension):
        line = torch.arange(-radius, radius + 1, device=device) ** 2
        squared = squared + line.view(*(-1 if axis == other else 1 for other in range(dimension)))
    return (squared <= radius**2).float()


def _remove_component(mask: Tensor, share: float, limit: float) -> None:
    """In place: of the components of `mask` (*spatial) smaller than `limit` voxels, remove number share * count."""
    # As uint8: cc3d 4.1 fails on some small boolean arrays.
    voxels = mask.cpu().numpy().astype(np.uint8)
    if mask.ndim == 3:
        groups, count = cc3d.connected_components(voxels, connectivity=26, return_N=True)
    else:
        groups, count = cc3d.connected_components(voxels, connectivity=8, return_N=True)
    sizes = np.bincount(groups.ravel(), minlength=count + 1)
    small = 1 + np.flatnonzero(sizes[1:] < limit)
    if len(small):
        gone = small[int(share * len(small))]
        mask[torch.from_numpy(groups == gone).to(mask.device)] = 0


def to_masks(indices: Tensor, foreground: Sequence[int]) -> Tensor:
    """Class indices (B, *patch) -> masks (B, F, *patch) of 0 and 1, float32, one a foreground class."""
    return torch.stack([indices == index for index in foreground], dim=1).float()
