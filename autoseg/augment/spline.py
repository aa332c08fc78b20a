"""Smooth random fields: uniform cubic B-splines through a few control points a patch (Rueckert et al., IEEE TMI 1999).

A field is a weighted mean of its control points everywhere, so it stays between the smallest and the largest of them.
"""

import numpy as np
import torch
from torch import Tensor


def weights(edge: int, points: int) -> np.ndarray:
    """(edge, points): the weight of each control point at each voxel of an axis; every row sums to 1.

    The first and the last voxel are the outer borders of the points - 3 cells between control points. A single
    point is a constant. Raises ValueError for two or three points, which make no cell.
    """
    if points == 1:
        return np.ones((edge, 1))
    if points < 4:
        raise ValueError(f"a cubic spline needs at least 4 control points, or one for a constant; found {points}")
    cells = points - 3
    place = np.linspace(0, cells, edge) if edge > 1 else np.array([cells / 2])
    cell = np.minimum(place.astype(int), cells - 1)
    t = place - cell
    parts = (1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3
    table = np.zeros((edge, points))
    for step, part in enumerate(parts):
        table[np.arange(edge), cell + step] = part / 6
    return table


def spacing(edge: int, points: int) -> float:
    """Voxels between two control points of an axis; 0 where there is but one."""
    return (edge - 1) / (points - 3) if points > 1 else 0.0


def expand(control: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Control points (..., *points) -> the field (..., *shape) over as many last axes as `shape` has."""
    field = control
    for axis, edge in enumerate(shape, start=control.ndim - len(shape)):
        table = torch.from_numpy(weights(edge, field.shape[axis])).to(field)
        field = torch.tensordot(field, table, dims=([axis], [1])).movedim(-1, axis)
    return field
