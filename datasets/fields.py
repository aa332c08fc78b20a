"""Random smooth scalar fields on a voxel grid: speeds that deform a front, bias and correlated noise.

A Gaussian process is drawn with the Fourier transform: white noise times the square root of the spectrum of its
kernel. The transform makes a periodic field, so it is drawn larger than asked for and cut, which leaves opposite
faces independent. Arrays are (Z, Y, X), lengths millimetres; nothing varies along an axis of one voxel.
"""

from collections.abc import Callable

import numpy as np
import scipy.fft

Triple = tuple[float, float, float]
Shape = tuple[int, int, int]
Axes = tuple[np.ndarray, np.ndarray, np.ndarray]


def voxel_centres(shape: Shape, spacing_mm: Triple) -> Axes:
    """Positions of the voxel centres in millimetres, index times spacing: three float64 arrays that broadcast."""
    z, y, x = np.ogrid[: shape[0], : shape[1], : shape[2]]
    return z * spacing_mm[0], y * spacing_mm[1], x * spacing_mm[2]


def gaussian_process(rng: np.random.Generator, shape: Shape, spacing_mm: Triple, length_mm: float) -> np.ndarray:
    """Stationary Gaussian process of mean 0 and variance 1 with autocorrelation exp(-r^2 / (2 length^2)).

    So the autocorrelation falls to exp(-1/2) at a distance of `length_mm`, whatever the spacing; a length far below the
    spacing gives white noise. Returns float32 of `shape`.
    """
    # Beyond three lengths the autocorrelation is 0.01: enough room for the periodic copies not to be noticed.
    drawn = [
        1 if n == 1 else scipy.fft.next_fast_len(n + int(np.ceil(3 * length_mm / h)), real=True)
        for n, h in zip(shape, spacing_mm)
    ]
    white = rng.standard_normal(drawn, dtype=np.float32)
    full = [scipy.fft.fftfreq(n, h) for n, h in zip(drawn, spacing_mm)]
    half = [*full[:2], scipy.fft.rfftfreq(drawn[2], spacing_mm[2])]

    def damping(frequencies: list[np.ndarray]) -> list[np.ndarray]:
        return [np.exp(-((np.pi * length_mm * f) ** 2)) for f in frequencies]

    # The filter is a product over the axes, and so is its mean square, which is the variance that it leaves.
    spread = np.sqrt(np.prod([np.mean(d**2) for d in damping(full)]))
    z, y, x = damping(half)
    kernel = (z[:, None, None] * y[:, None] * x / spread).astype(np.float32)
    field = scipy.fft.irfftn(scipy.fft.rfftn(white) * kernel, s=drawn)
    return np.ascontiguousarray(field[: shape[0], : shape[1], : shape[2]])


def sinusoidal_modes(rng: np.random.Generator, shape: Shape, spacing_mm: Triple, length_mm: float) -> np.ndarray:
    """Sum of four plane waves of random direction, phase, weight and wavelength (4 to 8 times `length_mm`)."""
    at = voxel_centres(shape, spacing_mm)
    moving = np.array([n > 1 for n in shape])
    field = np.zeros(shape)
    for _ in range(4):
        wave = rng.standard_normal(3) * moving
        wave *= 2 * np.pi / (np.linalg.norm(wave) * length_mm * rng.uniform(4, 8))
        phase, weight = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1)
        field += weight * np.sin(sum(k * p for k, p in zip(wave, at)) + phase)
    return field.astype(np.float32)


def affine(rng: np.random.Generator, shape: Shape, spacing_mm: Triple, length_mm: float) -> np.ndarray:
    """A random offset plus a random slope along each axis; the slope spans the volume, so `length_mm` is not used."""
    at = voxel_centres(shape, spacing_mm)
    field = np.full(shape, rng.uniform(-1, 1))
    for slope, position in zip(rng.uniform(-1, 1, 3), at):
        field += slope * (2 * position / max(position.max(), 1e-9) - 1)
    return field.astype(np.float32)


SPEEDS: dict[str, Callable[[np.random.Generator, Shape, Triple, float], np.ndarray]] = {
    "gaussian": gaussian_process,
    "sinusoidal": sinusoidal_modes,
    "affine": affine,
}


def random_speed(
    rng: np.random.Generator, kind: str, shape: Shape, spacing_mm: Triple, *, length_mm: float, amplitude_mm: float
) -> np.ndarray:
    """A field of SPEEDS scaled so that its largest absolute value is `amplitude_mm`, per unit of time; float32.

    Bounding the largest value, not the spread, keeps a tube whose radius exceeds the amplitude from vanishing.
    """
    if kind not in SPEEDS:
        raise ValueError(f"no speed field {kind!r}; there are {', '.join(SPEEDS)}")
    field = SPEEDS[kind](rng, shape, spacing_mm, length_mm)
    return field * np.float32(amplitude_mm / max(float(np.abs(field).max()), 1e-9))
