"""Where every voxel of a patch is taken from: rotation, scaling, shear and mirroring as one affine map in voxel units.

A map takes voxel offsets from the patch centre to voxel offsets from the centre of the source box, so the source need
be no larger than `source_shape` says. Mirroring is folded into the map, and so is an elastic displacement, which moves
an offset before the map does: a patch is read once, and interpolated once. Nothing here is random.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from autoseg.augment import spline
from autoseg.labels import UNSEEN

# Voxels handled at once: on the CPU what stays in the cache, elsewhere what keeps temporary arrays below ~0.5 GB.
_SLAB_CPU = 1 << 17
_SLAB_DEVICE = 1 << 22

# Interpolated label weights closer than this are a tie, which the nearest voxel decides.
_TIE = 1e-4

# Room for the rounding of float32 coordinates, so that no sample point leaves its box.
_ROUNDING = 1e-2


def rotation(angles_rad: np.ndarray) -> np.ndarray:
    """Rotation matrix (D, D) in array order, of three angles (about axis 0, then 1, then 2) or of one angle (2D)."""
    if len(angles_rad) == 1:
        return _turn(2, 0, 1, angles_rad[0])
    about_0, about_1, about_2 = angles_rad
    return _turn(3, 0, 1, about_2) @ _turn(3, 2, 0, about_1) @ _turn(3, 1, 2, about_0)


def _turn(dimension: int, first: int, second: int, angle_rad: float) -> np.ndarray:
    matrix = np.eye(dimension)
    matrix[first, first] = matrix[second, second] = math.cos(angle_rad)
    matrix[first, second] = -math.sin(angle_rad)
    matrix[second, first] = math.sin(angle_rad)
    return matrix


def shear(angles_rad: np.ndarray) -> np.ndarray:
    """Matrix (D, D) of volume 1: each axis in turn leans by its angle towards the next one, the last to the first."""
    matrix = np.eye(len(angles_rad))
    for axis, angle in enumerate(angles_rad):
        step = np.eye(len(angles_rad))
        step[axis, (axis + 1) % len(angles_rad)] += math.tan(angle)
        matrix = matrix @ step
    return matrix


def source_shape(affine: np.ndarray, patch: tuple[int, ...], displacement: np.ndarray | None = None) -> tuple[int, ...]:
    """Shape of the smallest box, centred on the patch centre, that linear interpolation at the mapped patch reads.

    Each edge is as even or odd as the patch edge, so that both centres are the same point of the voxel grid. With a
    displacement, as in `warp_into`, room for the largest one of each axis is added.
    """
    moved = np.zeros(len(patch)) if displacement is None else np.abs(displacement).reshape(len(patch), -1).max(1)
    shape = []
    for axis, row in enumerate(affine):
        if _is_exact(row, axis) and not moved[axis]:
            shape.append(patch[axis])
            continue
        reach = sum(abs(weight) * ((edge - 1) / 2 + far) for weight, edge, far in zip(row, patch, moved))
        shape.append(patch[axis] + 2 * math.ceil(reach - (patch[axis] - 1) / 2 + _ROUNDING))
    return tuple(shape)


def _is_exact(row: np.ndarray, axis: int) -> bool:
    """Whether a row of an affine map keeps its axis as it is or mirrors it: whole voxels, nothing to interpolate."""
    return abs(row[axis]) == 1 and np.count_nonzero(row) == 1


def centre(array: Tensor, shape: tuple[int, ...]) -> Tensor:
    """View of the box of `shape` in the middle of the last axes of `array`.

    Raises ValueError when the box does not fit, or when its centre would lie half a voxel off.
    """
    for axis, (have, want) in enumerate(zip(array.shape[-len(shape) :], shape), start=array.ndim - len(shape)):
        if have < want or (have - want) % 2:
            raise ValueError(
                f"a box of shape {shape} is not centred in an array of shape {tuple(array.shape)}; "
                "every edge must be as long, or longer by an even number of voxels"
            )
        array = array.narrow(axis, (have - want) // 2, want)
    return array


def mirror_into(image: Tensor, labels: Tensor, mirrored: np.ndarray, out_image: Tensor, out_labels: Tensor) -> None:
    """Copy image (C, *patch) and labels (*patch) to the outputs of the same shapes, `mirrored` (D,) axes reversed."""
    axes = [axis - len(mirrored) for axis in np.flatnonzero(mirrored).tolist()]
    out_image.copy_(image.flip(axes) if axes else image)
    out_labels.copy_(labels.flip(axes) if axes else labels)


def rename(labels: Tensor, indices: Sequence[int]) -> None:
    """In place: every voxel of index i in `labels` (any shape) becomes indices[i]; `UNSEEN` stays what it is."""
    # -1 reads the last entry of the table.
    table = torch.tensor((*indices, UNSEEN), dtype=labels.dtype, device=labels.device)
    labels.copy_(table[labels.long()])


def mirror_displacement(displacement: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
    """The displacement (D, *points) of the mirror image, where `mirrored` (D,) axes are reversed."""
    signs = np.where(mirrored, -1.0, 1.0).reshape(-1, *[1] * len(mirrored))
    return np.flip(displacement, tuple(1 + axis for axis in np.flatnonzero(mirrored).tolist())) * signs


def warp_into(
    image: Tensor,
    labels: Tensor,
    affine: np.ndarray,
    out_image: Tensor,
    out_labels: Tensor,
    displacement: np.ndarray | None = None,
) -> None:
    """Sample `image` (C, *source) and `labels` (*source) at the mapped voxels of a patch, into the outputs.

    With a `displacement`, control points (D, *points) of a spline (`spline.weights`) in patch voxels, an offset o of
    the patch is mapped as o + displacement(o).

    Intensities are interpolated linearly. A label is the one with the largest linearly interpolated weight, as if
    every label had been interpolated by itself; a tie goes to the nearest voxel. `out_image` is (C, *patch) float32,
    `out_labels` (*patch) of any integer type; both contiguous. The source is the box of `source_shape` exactly.
    """
    patch, source = out_labels.shape, labels.shape
    device = image.device
    bends = None if displacement is None or not displacement.any() else _bends(affine, displacement, patch, device)
    smooth = [axis for axis, row in enumerate(affine) if (bends and bends[axis]) or not _is_exact(row, axis)]
    strides = image.stride()[1:]
    if labels.stride() != strides:
        image, labels = image.contiguous(), labels.contiguous()
        strides = labels.stride()
    # Corner k of a cell adds one voxel along smooth[b] for every bit b of k, the last axis being the lowest bit.
    shifts = [0]
    for axis in smooth:
        shifts = [shift + step for shift in shifts for step in (0, strides[axis])]
    terms = _coordinate_terms(affine, patch, source, device)
    # A box cut out of a larger array is read where it lies: it is addressed by its strides and never copied.
    span = 1 + sum((edge - 1) * stride for edge, stride in zip(source, strides))
    flat_image = [channel.as_strided((span,), (1,)) for channel in image]
    flat_labels = labels.as_strided((span,), (1,))

    row_voxels = math.prod(patch[1:])
    rows = max(1, (_SLAB_CPU if device.type == "cpu" else _SLAB_DEVICE) // row_voxels)
    for start in range(0, patch[0], rows):
        stop = min(start + rows, patch[0])
        bent = [None if bend is None else bend[0][start:stop] @ bend[1] for bend in bends or [None] * len(patch)]
        index, fractions = _cells(terms, start, stop, strides, smooth, bent)
        for channel, values in zip(out_image, flat_image):
            corners = [values[shift:].index_select(0, index) for shift in shifts]
            for fraction in reversed(fractions):
                corners = [torch.lerp(a, b, fraction) for a, b in zip(corners[::2], corners[1::2])]
            channel[start:stop].view(-1).copy_(corners[0])
        found = _vote([flat_labels[shift:].index_select(0, index) for shift in shifts], fractions)
        out_labels[start:stop].view(-1).copy_(found)


def _coordinate_terms(
    affine: np.ndarray, patch: tuple[int, ...], source: tuple[int, ...], device: torch.device
) -> list[list[Tensor]]:
    """[source axis][patch axis] -> (edge,) vector: what each patch axis adds to the coordinate along a source axis."""
    offsets = [np.arange(edge) - (edge - 1) / 2 for edge in patch]
    table = np.stack([np.concatenate([row[axis] * offsets[axis] for axis in range(len(patch))]) for row in affine])
    table[:, : patch[0]] += (np.array(source)[:, None] - 1) / 2
    return [list(row.split(list(patch))) for row in torch.from_numpy(table.astype(np.float32)).to(device)]


def _bends(
    affine: np.ndarray, displacement: np.ndarray, patch: tuple[int, ...], device: torch.device
) -> list[tuple[Tensor, Tensor] | None]:
    """For each source axis what displacements add to the coordinate: a product of (rows, points) and (points, row).

    None where they add nothing. Only the first axis is left to expand, so that a few rows at a time are made.
    """
    control = torch.from_numpy(np.einsum("ij,j...->i...", affine, displacement).astype(np.float32)).to(device)
    first = torch.from_numpy(spline.weights(patch[0], control.shape[1])).to(control)
    rows = spline.expand(control, tuple(patch[1:])).flatten(2)
    return [(first, row) if row.any() else None for row in rows]


def _cells(
    terms: list[list[Tensor]],
    start: int,
    stop: int,
    strides: tuple[int, ...],
    smooth: list[int],
    bent: Sequence[Tensor | None],
) -> tuple[Tensor, list[Tensor]]:
    """Rows start:stop of the patch -> flat index of each voxel's lower source corner, and its place in the cell.

    bent: what displacements add along each source axis, (rows, voxels a row), None for nothing.
    """
    index: Tensor | None = None
    fractions = []
    for axis, (first, *others) in enumerate(terms):
        place = first[start:stop].view(-1, *[1] * len(others))
        for other, vector in enumerate(others, start=1):
            place = place + vector.view(-1, *[1] * (len(others) - other))
        place = place.reshape(-1)
        if (bend := bent[axis]) is not None:
            place = place + bend.view(-1)
        lower = place.floor()
        # Integers: a flat index beyond 2^24 has no exact float32.
        step = lower.int().mul_(strides[axis])
        index = step if index is None else index.add_(step)
        if axis in smooth:
            fractions.append(place.sub_(lower))
    assert index is not None
    return index, fractions


def _vote(corners: list[Tensor], fractions: list[Tensor]) -> Tensor:
    """Corner labels, each (N,), and the place in the cell along each axis -> the heaviest label of every cell (N,)."""
    result = corners[0]
    if len(corners) == 1:
        return result
    # Nearly all cells lie inside one structure: only the others pay for the vote. (XOR is far faster than `!=`.)
    mixed = corners[0] ^ corners[1]
    for corner in corners[2:]:
        mixed |= corners[0] ^ corner
    where = mixed.nonzero().view(-1)
    if where.numel() == 0:
        return result
    labels = torch.stack([corner.index_select(0, where) for corner in corners])
    weights = torch.ones(1, where.numel(), device=result.device)
    for fraction in fractions:
        high = fraction.index_select(0, where)
        weights = torch.stack([weights * (1 - high), weights * high], dim=1).flatten(0, 1)
    scores = torch.stack([(weights * (labels == label)).sum(0) for label in labels]).add_(weights, alpha=_TIE)
    result.index_copy_(0, where, labels.gather(0, scores.max(0, keepdim=True).indices).squeeze(0))
    return result
