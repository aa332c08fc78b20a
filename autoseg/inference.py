"""Sliding-window inference: the image in overlapping tiles, stitched so that each tile's centre counts most.

Logits are averaged, over tiles with Gaussian weights, over mirrored views and networks with equal ones, always in
float32. Tiles lie on a regular grid, so the sum of their weights at a voxel is a product of one factor an axis: it is
divided out beforehand, and the stitched volume needs no volume of weights beside it.
Source: nnU-Net (Isensee et al., Nature Methods 2021).
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import combinations, product
from math import ceil, prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from autoseg.devices import release
from autoseg.records import AutosegError
from autoseg.volume import relative_place


@dataclass(frozen=True, kw_only=True)
class Swap:
    """What trades places, beside the voxels, in views mirrored along `axis` (a position in the patch).

    channels, heads: for each channel of the image and each head of the networks, the one whose place it takes.
    """

    axis: int
    channels: tuple[int, ...]
    heads: tuple[int, ...]


def tile_starts(size: int, patch: int, step: float) -> tuple[int, ...]:
    """First voxels of the tiles along one axis: evenly spread, at most `step * patch` apart, flush with both ends.

    size and patch in voxels, `patch <= size`; 0 < step <= 1. Raises ValueError otherwise.
    """
    if not 0 < step <= 1:
        raise ValueError(f"the step between tiles is a share of the patch, above 0 and at most 1; found {step}")
    if not 0 < patch <= size:
        raise ValueError(f"a patch of {patch} voxels does not fit into {size}; pad the image first")
    gaps = ceil((size - patch) / (patch * step))
    return tuple(round(i * (size - patch) / gaps) for i in range(gaps + 1)) if gaps else (0,)


def count_views(size: Sequence[int], patch: Sequence[int], mirror_axes: Sequence[int], step: float = 0.5) -> int:
    """How often a network is applied to an image of `size` (Z, Y, X), views mirrored along `mirror_axes` included."""
    planar, spatial = size[: 3 - len(patch)], size[3 - len(patch) :]
    tiles = prod(len(tile_starts(max(n, edge), edge, step)) for n, edge in zip(spatial, patch))
    return prod(planar) * tiles * 2 ** len(mirror_axes)


def tile_weights(starts: Sequence[int], size: int, patch: int) -> Tensor:
    """Weights (tiles, patch) of all tiles along one axis: Gaussian, normalised to sum to 1 at each of `size` voxels.

    The Gaussian has its peak at voxel patch // 2 and a standard deviation of patch / 8.
    """
    distance = (torch.arange(patch, dtype=torch.float64) - patch // 2) / (patch / 8)
    gaussian = torch.exp(-0.5 * distance**2)
    total = torch.zeros(size, dtype=torch.float64)
    for start in starts:
        total[start : start + patch] += gaussian
    return torch.stack([gaussian / total[start : start + patch] for start in starts]).float()


def predict_logits(
    networks: Sequence[Callable[..., Tensor]],
    image: Tensor,
    *,
    patch: Sequence[int],
    heads: int,
    context: int = 1,
    step: float = 0.5,
    mirror_axes: Sequence[int] = (),
    swap: Swap | None = None,
    tile_batch: int = 4,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Image (C, Z, Y, X) -> logits (K, Z, Y, X), float32 on the CPU: the mean over all networks and mirrored views.

    networks: in evaluation mode on `device`, from (B, C, *patch) to (B, heads, *patch). They share the tiles. One with
    an attribute `takes_position` that is true is called with `position` too, as in training (`sampling.Batch`).
    patch: size of a tile in voxels, (Z, Y, X), or (Y, X) for 2D networks, which see every slice of Z by itself. An
    image smaller than it is padded with zeros on both sides, the odd voxel at the end.
    context: slices of Z that a 2D network sees, odd; its own is the middle one of (B, C * context, *patch), channel by
    channel with the slices side by side. Beyond both ends of Z they are zero, as in training and beside a small image.
    step: distance between tiles as a share of the patch, at most. mirror_axes: positions in `patch`; all their
    combinations are flipped, predicted and flipped back. swap: what trades places then; None: nothing.
    tile_batch: tiles (or mirrored views of one) in a call; halved, and the stitched logits moved to the CPU, where the
    device has no memory for it.
    autocast: lower precision for the networks, for example torch.bfloat16; None leaves them in their own.
    progress: called with (tiles done, all tiles).

    Raises AutosegError where logits are not finite or one tile finds no memory, ValueError for arguments that do not
    fit each other.
    """
    if not networks or image.ndim != 4 or len(patch) not in (2, 3) or tile_batch < 1:
        raise ValueError(
            f"inference needs one network or more, an image (C, Z, Y, X), a patch of 2 or 3 sizes and a positive "
            f"tile_batch; found {len(networks)}, {tuple(image.shape)}, {tuple(patch)}, {tile_batch}"
        )
    if context % 2 == 0 or context < 1 or (context > 1 and len(patch) == 3):
        raise ValueError(f"2D networks see an odd number of slices, 3D ones have no context; found {context}, {patch}")
    if swap is not None and (len(swap.channels), len(swap.heads)) != (len(image), heads):
        raise ValueError(
            f"swap orders {len(swap.channels)} channels and {len(swap.heads)} heads, not {len(image)}, {heads}"
        )
    if not set(mirror_axes) <= set(range(len(patch))):
        raise ValueError(f"mirror_axes are positions in the patch {tuple(patch)}, found {tuple(mirror_axes)}")
    if swap is not None and context > 1:
        swap = replace(swap, channels=tuple(c * context + k for c in swap.channels for k in range(context)))
    device = torch.device(device)
    window = (1,) * (3 - len(patch)) + tuple(patch)
    size = tuple(image.shape[1:])
    image, inner = _pad_to(image.float(), window)
    padded = tuple(image.shape[1:])
    starts = [tile_starts(edge, length, step) for edge, length in zip(padded, window)]
    if len(patch) == 2:
        starts[0] = tuple(range(padded[0]))
    reach = context // 2
    image = F.pad(image, (0, 0, 0, 0, reach, reach)) if reach else image
    weights = [tile_weights(*along) for along in zip(starts, padded, window)]
    flips = [
        _Flip(axes, swap if swap is not None and swap.axis in axes else None)
        for count in range(len(mirror_axes) + 1)
        for axes in combinations(sorted(mirror_axes), count)
    ]
    tiles = list(product(*(range(len(along)) for along in starts)))

    logits = torch.zeros(heads, *padded, device=_where_to_stitch(device, heads * prod(padded)))
    precision = torch.autocast(device.type, dtype=autocast) if autocast else nullcontext()
    with torch.inference_mode(), precision:
        first = 0
        while first < len(tiles):
            group = tiles[first : first + tile_batch]
            boxes = [
                tuple(slice(along[i], along[i] + edge) for along, i, edge in zip(starts, tile, window))
                for tile in group
            ]
            # Cut (B, C, *window) and, in 2D, join the axis in front of the patch, which is `context` long, to C.
            seen = [image[:, z.start : z.stop + 2 * reach, y, x] for z, y, x in boxes]
            views = max(1, tile_batch // len(group))
            places = [[relative_place(s.start, *of) for s, *of in zip(box, window, padded)] for box in boxes]
            position = torch.tensor(places)[:, -len(patch) :]
            try:
                batch = torch.stack(seen).to(device).reshape(len(group), -1, *patch)
                mean = _mean_logits(networks, batch, position, flips, views, (len(group), heads, *patch))
            except torch.OutOfMemoryError as error:
                if tile_batch == 1 and logits.device.type == "cpu":
                    raise AutosegError(
                        f"{device} has no memory for a single tile of {' x '.join(map(str, patch))} voxels ({error}); "
                        "end what else computes there, or predict with --device cpu"
                    ) from error
                mean = None
            if mean is None:  # out here no traceback holds what the attempt had computed
                if tile_batch == 1:
                    logits = logits.cpu()
                tile_batch = max(tile_batch // 2, 1)
                release(device)
                continue
            for tile, box, of_tile in zip(group, boxes, mean):
                z, y, x = (along[i].to(logits.device) for along, i in zip(weights, tile))
                of_tile = of_tile.reshape(heads, *window).to(logits.device)
                logits[:, *box].addcmul_(of_tile, z[:, None, None] * y[:, None] * x)
            first += len(group)
            if progress:
                progress(first, len(tiles))
    logits = logits[:, *inner].cpu()
    return logits if padded == size else logits.contiguous()


class _Flip(NamedTuple):
    """One mirrored view of a patch: the axes to reverse, and what trades places."""

    axes: tuple[int, ...]
    swap: Swap | None

    def forth(self, batch: Tensor) -> Tensor:
        """Tiles (B, C, *patch) as the networks see them."""
        batch = batch if self.swap is None else batch[:, self.swap.channels]
        return batch.flip([axis + 2 for axis in self.axes])

    def moved(self, position: Tensor) -> Tensor:
        """Positions (B, axes) of the tiles in the mirror image of the whole."""
        signs = [-1.0 if axis in self.axes else 1.0 for axis in range(position.shape[1])]
        return position * position.new_tensor(signs)

    def back(self, logits: Tensor) -> Tensor:
        """Logits (B, K, *patch) of that view where they belong."""
        logits = logits if self.swap is None else logits[:, self.swap.heads]
        return logits.flip([axis + 2 for axis in self.axes])


def _mean_logits(
    networks: Sequence[Callable[..., Tensor]],
    batch: Tensor,
    position: Tensor,
    flips: Sequence[_Flip],
    views: int,
    expected: tuple[int, ...],
) -> Tensor:
    """Mean logits (B, K, *patch) of tiles (B, C, *patch) at `position` (B, axes) over networks and flips.

    There are `views` flips in one call.
    """
    total = torch.zeros(expected, device=batch.device)
    for first in range(0, len(flips), views):
        chosen = flips[first : first + views]
        flipped = torch.cat([flip.forth(batch) for flip in chosen])
        moved = torch.cat([flip.moved(position) for flip in chosen])
        for network in networks:
            where = {"position": moved.to(batch.device)} if getattr(network, "takes_position", False) else {}
            parts = network(flipped, **where).chunk(len(chosen))
            if parts[0].shape != expected:
                raise ValueError(f"the network gave {tuple(parts[0].shape)} for {tuple(batch.shape)}, not {expected}")
            for flip, part in zip(chosen, parts):
                total += flip.back(part)
    # The sum is finite only if every number is, and needs no array of truth values.
    if not total.sum().isfinite():
        raise AutosegError(
            "the network's logits are not finite. If the image holds values far from those of training, clip them; if "
            "the prediction ran in lower precision, use float32; if training diverged, train again at a lower rate"
        )
    return total.div_(len(flips) * len(networks))


def _pad_to(image: Tensor, window: Sequence[int]) -> tuple[Tensor, tuple[slice, ...]]:
    """Image (C, Z, Y, X) padded centrally with zeros to at least `window`, and the box where the image lies in it."""
    missing = [max(edge - size, 0) for edge, size in zip(window, image.shape[1:])]
    inner = tuple(slice(gap // 2, gap // 2 + size) for gap, size in zip(missing, image.shape[1:]))
    if any(missing):
        pads = [side for gap in reversed(missing) for side in (gap // 2, gap - gap // 2)]
        image = F.pad(image, pads)
    return image, inner


def _where_to_stitch(device: torch.device, numbers: int) -> torch.device:
    """The GPU if the float32 logits fill less than half of its free memory, so that tiles need not travel."""
    if device.type == "cuda" and 4 * numbers < torch.cuda.mem_get_info(device)[0] // 2:
        return device
    return torch.device("cpu")
