"""Grid, Volume, Box: where voxels lie in space, and the moves that lose nothing.

Arrays are (C, Z, Y, X). A 2D image is Z = 1 with `Grid.dimension` 2. World coordinates are ITK's: left-posterior-
superior, millimetres. The canonical grid is the one of the 48 axis orders and flips whose axes lie closest to these.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from autoseg.records import record
from autoseg.schema import Dimension

Triple = tuple[float, float, float]

TIE = 1e-4
"""Entries of direction matrices that differ by less count as equal."""


@record
class Grid:
    """A voxel grid in space. Shape and spacing run (Z, Y, X); origin and direction run (x, y, z) as in ITK."""

    shape: tuple[int, int, int]
    spacing_mm: Triple
    origin_mm: Triple = (0.0, 0.0, 0.0)
    direction: tuple[Triple, Triple, Triple] = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    """Row-major 3 x 3: column j is the world direction of array axis 2 - j."""
    dimension: Dimension = 3

    def affine(self) -> np.ndarray:
        """4 x 4 matrix from voxel index (x, y, z, 1) to world (x, y, z, 1) in millimetres."""
        matrix = np.eye(4)
        matrix[:3, :3] = np.asarray(self.direction) * np.asarray(self.spacing_mm[::-1])
        matrix[:3, 3] = self.origin_mm
        return matrix

    def agrees(self, other: "Grid", tolerance_mm: float = 1e-2) -> bool:
        """Whether both grids have one shape and no corner lies further apart than `tolerance_mm`."""
        return self.shape == other.shape and self.distance_mm(other) <= tolerance_mm

    def distance_mm(self, other: "Grid") -> float:
        """Largest distance between matching corner voxels of two grids, with this grid's shape, in millimetres."""
        corners = np.array([(*corner, 1) for corner in itertools.product(*((0, n - 1) for n in self.shape[::-1]))]).T
        gap = (self.affine() - other.affine()) @ corners
        return float(np.linalg.norm(gap[:3], axis=0).max())


@dataclass(frozen=True, eq=False, kw_only=True)
class Volume:
    """An array (C, Z, Y, X) and the grid it lies on."""

    array: np.ndarray
    grid: Grid

    def __post_init__(self) -> None:
        if self.array.ndim != 4 or self.array.shape[1:] != self.grid.shape:
            raise ValueError(f"array of shape {self.array.shape} does not fit a grid of shape {self.grid.shape}")


@record
class Box:
    """A block of voxels, start inclusive and stop exclusive, in array order; may reach outside the array."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Edge lengths in voxels."""
        return tuple(b - a for a, b in zip(self.start, self.stop))

    def slices(self) -> tuple[Any, ...]:
        """Slices that cut the box from the trailing axes; the box must lie inside the array."""
        return (..., *(slice(a, b) for a, b in zip(self.start, self.stop)))

    def within(self, shape: tuple[int, ...]) -> "Box":
        """The part of it that lies inside an array of `shape`; empty or negative along an axis where none does."""
        return Box(
            start=tuple(min(max(a, 0), n) for a, n in zip(self.start, shape)),
            stop=tuple(max(min(b, n), 0) for b, n in zip(self.stop, shape)),
        )

    def shared(self, other: "Box") -> "Box":
        """The part that lies inside another box too; negative along an axis where none does."""
        return Box(
            start=tuple(max(a, b) for a, b in zip(self.start, other.start)),
            stop=tuple(min(a, b) for a, b in zip(self.stop, other.stop)),
        )

    def moved(self, by: tuple[int, ...]) -> "Box":
        """The same block `by` voxels further."""
        return Box(start=tuple(a + d for a, d in zip(self.start, by)), stop=tuple(b + d for b, d in zip(self.stop, by)))


def bounding_box(mask: np.ndarray) -> Box:
    """Smallest box that holds every true voxel of `mask`; the whole array if there is none."""
    start, stop = [], []
    for axis in range(mask.ndim):
        hit = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        start.append(int(hit[0]) if hit.size else 0)
        stop.append(int(hit[-1]) + 1 if hit.size else mask.shape[axis])
    return Box(start=tuple(start), stop=tuple(stop))


def cut(array: np.ndarray, box: Box, fill: float) -> np.ndarray:
    """Copy `box` out of the trailing axes of `array`; voxels outside the array become `fill`."""
    size = array.shape[array.ndim - len(box.start) :]
    lead = array.shape[: array.ndim - len(box.start)]
    inner = box.within(size)
    if inner == box:
        return array[box.slices()].copy()
    out = np.full((*lead, *box.shape), fill, dtype=array.dtype)
    if min(inner.shape) > 0:
        out[inner.moved(tuple(-a for a in box.start)).slices()] = array[inner.slices()]
    return out


def relative_place(start: int, edge: int, size: int) -> float:
    """Where a patch of `edge` voxels that starts at `start` lies on an axis of `size`: -1 the first place, 1 the last.

    0, in the middle, where the patch fills the axis. In the mirror image of the axis it is the negative.
    """
    return 2 * start / (size - edge) - 1 if size > edge else 0.0


def paste(array: np.ndarray, box: Box, shape: tuple[int, ...], fill: float) -> np.ndarray:
    """Inverse of cutting `box` from an array of trailing `shape`: put `array` back, `fill` elsewhere.

    What the box has outside of `shape` is left out.
    """
    if array.shape[array.ndim - len(shape) :] != box.shape:
        raise ValueError(f"an array of shape {array.shape} was not cut by a box of shape {box.shape}")
    return cut(
        array, Box(start=tuple(-a for a in box.start), stop=tuple(n - a for n, a in zip(shape, box.start))), fill
    )


def canonical_axes(grid: Grid) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """How to reach the canonical grid: (order, flips), both in (Z, Y, X).

    Canonical axis i is stored axis order[i], reversed where flips[i]. Of the 48 candidates the one whose direction
    matrix has the largest trace is taken; ties (axes at 45 degrees) are broken by the entries of the matrix, so that
    every stored form of one volume reaches the same grid. 2D images stay as they are.
    """
    if grid.dimension == 2:
        return (0, 1, 2), (False, False, False)
    stored = np.asarray(grid.direction)
    choices = list(itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)))
    matrices = np.array([stored[:, list(columns)] * signs for columns, signs in choices])
    # Compared within a tolerance, not by rounded values: files keep directions in float32, and a tie that lies where
    # rounding turns would be decided by that noise.
    left = np.arange(len(choices))
    for scores in (matrices.trace(axis1=1, axis2=2), *matrices.reshape(len(choices), 9).T):
        left = left[scores[left] >= scores[left].max() - TIE]
    columns, signs = choices[left[0]]
    order = tuple(2 - columns[2 - i] for i in range(3))
    return order, tuple(signs[2 - i] < 0 for i in range(3))


def canonical_grid(grid: Grid) -> Grid:
    """The canonical grid of the same voxels."""
    order, flips = canonical_axes(grid)
    affine = grid.affine()
    direction = np.asarray(grid.direction)
    corner = np.array([0.0, 0.0, 0.0, 1.0])
    new_direction = np.empty((3, 3))
    for axis, (source, flip) in enumerate(zip(order, flips)):
        if flip:
            corner[2 - source] = grid.shape[source] - 1
        new_direction[:, 2 - axis] = direction[:, 2 - source] * (-1 if flip else 1)
    return Grid(
        shape=tuple(grid.shape[s] for s in order),  # type: ignore[arg-type]
        spacing_mm=tuple(grid.spacing_mm[s] for s in order),  # type: ignore[arg-type]
        origin_mm=tuple((affine @ corner)[:3].tolist()),
        direction=tuple(tuple(row) for row in (new_direction + 0.0).tolist()),  # type: ignore[arg-type]
        dimension=grid.dimension,
    )


def to_canonical(array: Any, grid: Grid) -> Any:
    """Array whose trailing axes lie on the stored `grid` -> the same voxels on `canonical_grid(grid)`; contiguous."""
    order, flips = canonical_axes(grid)
    lead = array.ndim - 3
    moved = array.transpose(*range(lead), *(lead + s for s in order))
    return np.ascontiguousarray(np.flip(moved, tuple(lead + i for i, flip in enumerate(flips) if flip)))


def from_canonical(array: Any, grid: Grid) -> Any:
    """Inverse of `to_canonical`: array on `canonical_grid(grid)` -> the same voxels on the stored `grid`."""
    order, flips = canonical_axes(grid)
    lead = array.ndim - 3
    back = np.flip(array, tuple(lead + i for i, flip in enumerate(flips) if flip))
    return np.ascontiguousarray(back.transpose(*range(lead), *(lead + order.index(s) for s in range(3))))


def mismatch(first: Grid, second: Grid, tolerance: float = 0.1) -> str | None:
    """What tells two grids apart, in words that begin with the kind: dimension, shape, spacing, direction or origin.

    None if they are the same but for rounding: no corner is off by more than `tolerance` times the smallest voxel edge.
    """
    if first.dimension != second.dimension:
        return f"dimension: {first.dimension}D and {second.dimension}D"
    if first.shape != second.shape:
        return f"shape: {_listed(first.shape)} and {_listed(second.shape)} voxels (z, y, x)"
    allowed = tolerance * min(first.spacing_mm[3 - first.dimension :])
    distance = first.distance_mm(second)
    if distance <= allowed:
        return None
    reach = np.asarray(first.shape) - 1
    spacings = np.asarray(first.spacing_mm), np.asarray(second.spacing_mm)
    if (np.abs(spacings[0] - spacings[1]) * reach).max() > allowed:
        return f"spacing: {_listed(first.spacing_mm)} and {_listed(second.spacing_mm)} mm (z, y, x)"
    turned = np.linalg.norm(np.asarray(first.direction) - np.asarray(second.direction), axis=0)[::-1]
    if (turned * spacings[0] * reach).max() > allowed:
        return f"direction: {first.direction} and {second.direction}, up to {distance:.4g} mm apart"
    return f"origin: {_listed(first.origin_mm)} and {_listed(second.origin_mm)} mm (x, y, z), {distance:.4g} mm apart"


def _listed(numbers: tuple[float, ...]) -> str:
    return " x ".join(f"{number:.6g}" for number in numbers)
