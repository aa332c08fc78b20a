"""Fronts: signed distance functions of simple shapes, and their motion under a speed field.

A front is where a function is zero; it is negative inside. It moves along its normal by the level-set equation
phi_t + F |grad phi| = 0 (Osher and Sethian 1988), solved with Godunov's upwind gradient. One-sided differences are of
second order (ENO, Osher and Shu 1991) and so is the step in time (Heun): with first order a sphere of ten voxels would
grow several per cent too slowly. Arrays are (Z, Y, X), positions and lengths millimetres; an axis of one voxel is
skipped, which makes the same code planar.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from autoseg.datasets.fields import Axes, Triple


def sphere(at: Axes, centre_mm: Sequence[float], radius_mm: float) -> np.ndarray:
    """Signed distance to a sphere; in a plane, to a circle. `at` are positions as `voxel_centres` gives them."""
    return np.sqrt(sum((p - c) ** 2 for p, c in zip(at, centre_mm))) - radius_mm


def tube(at: Axes, path_mm: np.ndarray, radius_mm: float) -> np.ndarray:
    """Distance to the polyline `path_mm` (n >= 2 points, 3) less the radius: a tube with round ends.

    Exact outside, and inside as long as the path bends with a radius above that of the tube.
    """
    nearest = np.inf
    for start, stop in itertools.pairwise(path_mm):
        along = stop - start
        offset = [p - s for p, s in zip(at, start)]
        share = sum(o * a for o, a in zip(offset, along)) / max(float(along @ along), 1e-12)
        share = np.clip(share, 0, 1)
        nearest = np.minimum(nearest, sum((o - share * a) ** 2 for o, a in zip(offset, along)))
    return np.sqrt(nearest) - radius_mm


def plate(
    at: Axes, centre_mm: Sequence[float], normal: Sequence[float] | np.ndarray, radius_mm: float, thickness_mm: float
) -> np.ndarray:
    """Signed distance to a round plate (a flat cylinder) across the unit vector `normal`; in a plane, a rectangle."""
    offset = [p - c for p, c in zip(at, centre_mm)]
    height = sum(o * n for o, n in zip(offset, normal))
    across = np.sqrt(np.maximum(sum(o**2 for o in offset) - height**2, 0)) - radius_mm
    above = np.abs(height) - thickness_mm / 2
    return np.minimum(np.maximum(across, above), 0) + np.hypot(np.maximum(across, 0), np.maximum(above, 0))


SHAPES: dict[str, Callable[..., np.ndarray]] = {"sphere": sphere, "tube": tube, "plate": plate}


def stable_step(speed: np.ndarray, spacing_mm: Triple, cfl: float = 0.5) -> float:
    """Longest step in time for which no front crosses more than the share `cfl` of a voxel; inf where nothing moves.

    The share is counted along all axes together: the step is cfl / (max |F| * sum of 1 / spacing).
    """
    rate = float(np.abs(speed).max()) * sum(1 / h for h, n in zip(spacing_mm, speed.shape) if n > 1)
    return cfl / rate if rate > 0 else np.inf


def _one_sided(phi: np.ndarray, axis: int, spacing: float) -> tuple[np.ndarray, np.ndarray]:
    """Backward and forward differences per millimetre along `axis`, second-order ENO, linear beyond the border."""
    phi = np.moveaxis(phi, axis, 0)
    first, last = 2 * phi[:1] - phi[1:2], 2 * phi[-1:] - phi[-2:-1]
    slope = np.diff(np.concatenate((first, phi, last)), axis=0) / spacing
    bend = np.diff(slope, axis=0)
    flat = np.zeros_like(bend[:1])
    bend = np.concatenate((flat, bend, flat))
    # At each face the gentler of the two neighbouring curvatures, and none where they disagree in sign.
    gentle = np.where(np.abs(bend[:-1]) < np.abs(bend[1:]), bend[:-1], bend[1:])
    gentle = np.where(bend[:-1] * bend[1:] > 0, gentle, 0) / 2
    backward, forward = slope[:-1] + gentle[:-1], slope[1:] - gentle[1:]
    return np.moveaxis(backward, 0, axis), np.moveaxis(forward, 0, axis)


def upwind_norm(phi: np.ndarray, direction: np.ndarray, spacing_mm: Triple) -> np.ndarray:
    """Godunov's |grad phi|, taken from the side that a front moving with the sign of `direction` comes from."""
    square = np.zeros_like(phi)
    outward = direction > 0
    for axis, spacing in enumerate(spacing_mm):
        if phi.shape[axis] > 1:
            backward, forward = _one_sided(phi, axis, spacing)
            behind = np.where(outward, backward, -backward)
            ahead = np.where(outward, -forward, forward)
            square += np.maximum(np.maximum(behind, ahead), 0) ** 2
    return np.sqrt(square)


def evolve(phi: np.ndarray, speed: np.ndarray, spacing_mm: Triple, time: float, cfl: float = 0.5) -> np.ndarray:
    """Move the front of `phi` along its normal for `time` with `speed` (mm per unit time, positive outwards)."""
    if time <= 0 or not np.any(speed):
        return phi.copy()
    steps = int(np.ceil(time / stable_step(speed, spacing_mm, cfl)))
    step = phi.dtype.type(time / steps)
    for _ in range(steps):
        guess = phi - step * speed * upwind_norm(phi, speed, spacing_mm)
        phi = (phi + guess - step * speed * upwind_norm(guess, speed, spacing_mm)) / 2
    return phi


def reinitialise(phi: np.ndarray, spacing_mm: Triple, band_mm: float) -> np.ndarray:
    """Make `phi` a signed distance again within `band_mm` of its front; no voxel changes its side.

    Solves phi_t = sign(phi) (1 - |grad phi|) (Sussman, Smereka and Osher 1994) with the sign smoothed as by Peng et al.
    (1999), which holds the front in place to a fraction of a voxel.
    """
    side = phi < 0
    spacing = min(h for h, n in zip(spacing_mm, phi.shape) if n > 1)
    slope = upwind_norm(phi, phi, spacing_mm)
    sign = phi / np.sqrt(phi**2 + (slope * spacing) ** 2 + np.finfo(phi.dtype).tiny)
    tiny = np.finfo(phi.dtype).eps * phi.dtype.type(spacing)
    step = stable_step(sign, spacing_mm)
    if not np.isfinite(step):
        return phi.copy()
    for _ in range(int(np.ceil(band_mm / step))):
        phi = phi + phi.dtype.type(step) * sign * (1 - upwind_norm(phi, sign, spacing_mm))
        phi = np.where(side, np.minimum(phi, -tiny), np.maximum(phi, 0))
    return phi
