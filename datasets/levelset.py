"""Synthetic vessels from level sets: a data set with exact masks, learnable on a CPU in minutes.

Each case is a few curved tubes, partly branches of one another, whose wall a random speed field has moved. The image
is a smooth step across that wall plus bias and noise; the mask is where the level-set function is negative. Spheres
and plates of the same brightness lie between the vessels, so no intensity tells a vessel apart: only shape does.
Every case has a random stream of its own, so case 3 is the same however many cases are made and in which order.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import AfterValidator, Field

from autoseg.datasets.fields import SPEEDS, Axes, gaussian_process, random_speed, voxel_centres
from autoseg.datasets.fronts import evolve, plate, reinitialise, sphere, tube
from autoseg.parallel import map_cases, raise_failures
from autoseg.readers import write_image, write_labels
from autoseg.records import AutosegError, record, save_json
from autoseg.schema import Dimension
from autoseg.volume import Grid

BYTES_A_VOXEL = 220
"""Peak memory of `make_case`, measured: the differences of the front, and fields larger than the volume."""


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= pair[0] <= pair[1]:
        raise ValueError("the lowest value comes first, and none is below 0")
    return pair


Range = Annotated[tuple[float, float], AfterValidator(_ordered)]
Count = Annotated[tuple[int, int], AfterValidator(_ordered)]
Level = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Length = Annotated[float, Field(gt=0)]


@record
class VesselSettings:
    """What a synthetic case looks like. Pairs are the lowest and highest value of a uniform draw, ends included.

    Intensities are in units of the mean contrast between vessel and background, which is 0.
    """

    dimension: Dimension = 3
    shape: tuple[int, int, int] = (40, 56, 56)
    """Voxels (Z, Y, X); Z is 1 when `dimension` is 2."""
    spacing_mm: tuple[Length, Length, Length] = (1.2, 0.8, 0.8)
    tubes: Count = (4, 6)
    radius_mm: Range = (2.3, 3.4)
    branch_probability: Share = 0.5
    """Share of the tubes after the first that start on an earlier one."""
    speeds: tuple[str, ...] = ("gaussian", "sinusoidal", "affine")
    """Names in SPEEDS; each case draws one."""
    speed_amplitude_mm: Level = 0.8
    """Furthest that any point of the wall moves."""
    speed_length_mm: Length = 5.0
    boundary_mm: Level = 1.2
    """Thickness of the wall, over which the image goes from dark to bright."""
    contrast: Range = (0.8, 1.2)
    white_noise: Level = 0.15
    correlated_noise: Level = 0.1
    correlation_mm: Length = 1.5
    bias: Level = 0.1
    bias_length_mm: Length = 20.0
    spheres: Count = (2, 4)
    sphere_radius_mm: Range = (9.0, 12.0)
    plates: Count = (0, 1)
    plate_radius_mm: Range = (9.0, 12.0)
    plate_thickness_mm: Range = (8.0, 10.0)
    distractor_contrast: Range = (0.9, 1.1)
    """Brightness of spheres and plates, relative to the vessels of their case."""
    clearance_mm: Level = 3.0
    """Dark gap that spheres and plates keep to the vessels."""
    empty_probability: Share = 0.0
    """Share of the cases that have no vessel."""

    def __post_init__(self) -> None:
        if (self.dimension == 2) != (self.shape[0] == 1):
            raise ValueError(f"shape {self.shape} does not suit dimension {self.dimension}: Z is 1 in 2D alone")
        if min(self.shape[3 - self.dimension :]) < 2:
            raise ValueError(f"shape {self.shape} needs at least two voxels an axis")
        unknown = [name for name in self.speeds if name not in SPEEDS]
        if unknown or not self.speeds:
            raise ValueError(f"no speed field {', '.join(unknown) or 'is named'}; there are {', '.join(SPEEDS)}")

    @property
    def size_mm(self) -> np.ndarray:
        """Distance between the outermost voxel centres, (Z, Y, X)."""
        return (np.array(self.shape) - 1) * self.spacing_mm


def smooth_step(distance_mm: np.ndarray, thickness_mm: float) -> np.ndarray:
    """1 inside, 0 outside, 1/2 on the front, along a cubic over `thickness_mm` centred on it; a plain step for 0."""
    if thickness_mm <= 0:
        return (distance_mm < 0).astype(distance_mm.dtype)
    t = np.clip(0.5 - distance_mm / thickness_mm, 0, 1)
    return t * t * (3 - 2 * t)


def vessel_front(rng: np.random.Generator, settings: VesselSettings) -> np.ndarray:
    """Draw the vessels of one case: signed distance (Z, Y, X) in mm, float32, accurate near the wall.

    An empty case is as far from any wall as the volume is wide.
    """
    size = settings.size_mm
    if rng.random() < settings.empty_probability:
        return np.full(settings.shape, np.linalg.norm(size), dtype=np.float32)
    at = voxel_centres(settings.shape, settings.spacing_mm)
    paths: list[np.ndarray] = []
    front = np.full(settings.shape, np.linalg.norm(size))
    for _ in range(rng.integers(*settings.tubes, endpoint=True)):
        parent = paths[rng.integers(len(paths))] if paths and rng.random() < settings.branch_probability else None
        paths.append(_path(rng, size, parent))
        front = np.minimum(front, tube(at, paths[-1], rng.uniform(*settings.radius_mm)))
    speed = random_speed(
        rng,
        settings.speeds[rng.integers(len(settings.speeds))],
        settings.shape,
        settings.spacing_mm,
        length_mm=settings.speed_length_mm,
        amplitude_mm=settings.speed_amplitude_mm,
    )
    front = evolve(front.astype(np.float32), speed, settings.spacing_mm, time=1.0)
    return reinitialise(front, settings.spacing_mm, band_mm=settings.boundary_mm + settings.clearance_mm)


def _path(rng: np.random.Generator, size_mm: np.ndarray, parent: np.ndarray | None) -> np.ndarray:
    """A cubic Bezier curve of 17 points (Z, Y, X) in mm from face to opposite face, or from `parent` to a face."""
    axis = rng.choice(np.flatnonzero(size_mm > 0))
    points = rng.uniform(0.15, 0.85, (4, 3)) * size_mm
    ends = (-0.05, 1.05) if rng.random() < 0.5 else (1.05, -0.05)
    # The inner points are ordered along the axis, so that the curve bends but does not fold back.
    points[:, axis] = np.array([ends[0], *(0.33, 0.67)[:: 1 if ends[0] < 0 else -1], ends[1]]) * size_mm[axis]
    if parent is not None:
        points[0] = parent[rng.integers(len(parent) // 4, 3 * len(parent) // 4 + 1)]
        points[1] = (points[0] + points[2]) / 2
    t = np.linspace(0, 1, 17)
    return np.stack([(1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3], axis=1) @ points


def _distractors(rng: np.random.Generator, settings: VesselSettings, at: Axes) -> Iterable[np.ndarray]:
    """Signed distances of bright structures that are no vessels."""
    for _ in range(rng.integers(*settings.spheres, endpoint=True)):
        yield sphere(at, rng.uniform(0, 1, 3) * settings.size_mm, rng.uniform(*settings.sphere_radius_mm))
    for _ in range(rng.integers(*settings.plates, endpoint=True)):
        normal = rng.standard_normal(3) * (settings.size_mm > 0)
        yield plate(
            at,
            rng.uniform(0, 1, 3) * settings.size_mm,
            normal / np.linalg.norm(normal),
            rng.uniform(*settings.plate_radius_mm),
            rng.uniform(*settings.plate_thickness_mm),
        )


def make_case(rng: np.random.Generator, settings: VesselSettings) -> tuple[np.ndarray, np.ndarray]:
    """One case: image (1, Z, Y, X) float32 and labels (Z, Y, X) uint8, 1 where `vessel_front` is negative."""
    front = vessel_front(rng, settings)
    at = voxel_centres(settings.shape, settings.spacing_mm)
    image = smooth_step(front, settings.boundary_mm)
    for other in _distractors(rng, settings, at):
        apart = np.maximum(other, settings.clearance_mm - front)
        image = np.maximum(image, rng.uniform(*settings.distractor_contrast) * smooth_step(apart, settings.boundary_mm))
    image = image * rng.uniform(*settings.contrast)
    smooth = ((settings.bias, settings.bias_length_mm), (settings.correlated_noise, settings.correlation_mm))
    for level, length in smooth:
        image += level * gaussian_process(rng, settings.shape, settings.spacing_mm, length)
    image += settings.white_noise * rng.standard_normal(settings.shape)
    return image[None].astype(np.float32), (front < 0).astype(np.uint8)


def case_rng(seed: int, part: int, index: int) -> np.random.Generator:
    """The random stream of case `index` of the training cases (part 0) or the test cases (part 1)."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(part, index)))


def make_dataset(
    folder: Path,
    settings: VesselSettings,
    cases: int,
    test_cases: int,
    seed: int,
    *,
    workers: int | None = None,
    quiet: bool = False,
) -> None:
    """Write a raw data set in nnU-Net's layout to `folder`: images, labels and, last of all, dataset.json.

    The same seed gives the same voxels, whatever the number of cases and workers. Raises AutosegError if `folder` holds
    anything, since cases of two data sets must not mix.
    """
    if folder.exists() and any(folder.iterdir()):
        raise AutosegError(f"{folder} is not empty; choose a new dataset name or remove the folder first")
    grid = Grid(shape=settings.shape, spacing_mm=settings.spacing_mm, dimension=settings.dimension)

    def write(name: str, part: int, index: int) -> None:
        image, labels = make_case(case_rng(seed, part, index), settings)
        kind = ("Tr", "Ts")[part]
        write_image(image, grid, folder / f"images{kind}" / f"{name}_0000.nii.gz")
        write_labels(labels, grid, folder / f"labels{kind}" / f"{name}.nii.gz")

    jobs = [(f"vessels_{index:03d}", 0, index) for index in range(cases)]
    jobs += [(f"vessels_test_{index:03d}", 1, index) for index in range(test_cases)]
    outcomes = map_cases(
        lambda job: write(*job),
        jobs,
        name=lambda job: job[0],
        what="make vessels",
        workers=workers,
        cost=lambda job: BYTES_A_VOXEL * int(np.prod(settings.shape)),
        quiet=quiet,
    )
    raise_failures(outcomes, "making vessels")
    save_json(
        {
            "name": folder.name,
            "description": "Synthetic vessels from level sets, among bright spheres and plates; the masks are exact",
            "licence": "CC0-1.0",
            "channel_names": {"0": "magnitude"},
            "labels": {"background": 0, "vessel": 1},
            "file_ending": ".nii.gz",
            "numTraining": cases,
            "numTest": test_cases,
            "seed": seed,
        },
        folder / "dataset.json",
    )


def best_threshold_dice(cases: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
    """Mean foreground Dice that the best single intensity threshold reaches over `cases` of (image, labels).

    What is brighter than the threshold counts as foreground; the first channel is used, and every label above 0 is
    foreground. Cases without foreground have no Dice and are left out; ValueError if none is left.
    """
    pairs = [(np.asarray(image)[0].ravel(), np.asarray(labels).ravel() > 0) for image, labels in cases]
    pairs = [(image, inside) for image, inside in pairs if inside.any()]
    if not pairs:
        raise ValueError("no case has foreground: the Dice of a threshold is not defined")
    thresholds = np.unique(np.concatenate([np.quantile(image, np.linspace(0, 1, 513)) for image, _ in pairs]))
    total = np.zeros(len(thresholds))
    for image, inside in pairs:
        above = image.size - np.searchsorted(np.sort(image), thresholds, side="right")
        hit = inside.sum() - np.searchsorted(np.sort(image[inside]), thresholds, side="right")
        total += 2 * hit / (above + inside.sum())
    return float(total.max() / len(pairs))
