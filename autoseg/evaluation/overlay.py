"""Pictures of segmentations: the slices of each case that show most of it, without and with the labels on them.

Slices lie in the plane of best resolution, else axial, as radiologists see them: the patient's right on the left, front
or head on top, in true proportions. Grey values are spread over what surrounds the foreground. Without a truth each
class has a colour; with one, green is right, blue is too much, red is missing, orange is another class, and arrows
point at the thickest mistakes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from scipy import ndimage

from autoseg.cases import ending_of
from autoseg.evaluation.folders import as_predicted, files_by_case, find_labels
from autoseg.labels import Labels
from autoseg.parallel import map_cases, raise_failures
from autoseg.readers import Stored, on_grid_of, read_stored, whole_labels
from autoseg.records import AutosegError, atomic_write, refuse_unwritable
from autoseg.volume import Grid, canonical_grid, mismatch, to_canonical

SLICES = 3
OPACITY = 0.5
COARSE = 1.5
"""An axis this many times coarser than both others is the one that slices are stacked along."""
ARROWS = 3
"""At most so many mistakes of a slice are pointed at."""
THICK = 2.0
"""Voxels from the middle of a mistake to its edge that make it worth an arrow; rims of one voxel are everywhere."""
NAMED = 12
"""Classes that the legend names before it only counts."""

AXES = ("axial", "coronal", "sagittal")
EDGES = (("R", "A"), ("R", "S"), ("A", "S"))
"""What lies at the left and at the upper edge of a slice across each canonical axis."""

RIGHT, TOO_MUCH, MISSING, OTHER_CLASS = 1, 2, 3, 4
VERDICTS: dict[int, tuple[str, tuple[float, float, float]]] = {
    RIGHT: ("right (TP)", (0.1, 0.75, 0.2)),
    TOO_MUCH: ("too much (FP)", (0.15, 0.35, 1.0)),
    MISSING: ("missing (FN)", (0.95, 0.1, 0.1)),
    OTHER_CLASS: ("another class", (1.0, 0.6, 0.0)),
}


@dataclass(frozen=True, eq=False, kw_only=True)
class Scene:
    """What is drawn of one case: canonical arrays (Z, Y, X), the image also (Z, Y, X, 3) in colour."""

    case: str
    image: np.ndarray
    prediction: np.ndarray
    truth: np.ndarray | None
    grid: Grid
    labels: Labels | None = None
    """What the values mean; None: 0 is the background, and classes have no names."""

    @property
    def background(self) -> int:
        """The value of voxels that belong to nothing."""
        return 0 if self.labels is None else self.labels.values[0]

    @property
    def ignored(self) -> int | None:
        """The value of the truth where nobody knows, so that there is no verdict."""
        return None if self.labels is None else self.labels.ignore

    @property
    def classes(self) -> dict[str, int | tuple[int, ...]]:
        """Name -> value, or values of a region, of each class; values that no class has are called by their number."""
        known = {} if self.labels is None else self.labels.scored
        passed = {self.background, self.ignored, *(() if self.labels is None else self.labels.allowed)}
        maps = [self.prediction] if self.truth is None else [self.truth, self.prediction]
        found = sorted({value for array in maps for value in np.unique(array).tolist()} - passed)
        return {**known, **{f"label {value}": value for value in found}}


def overlay_folders(
    images: Path, prediction: Path, target: Path, *, truth: Path | None = None, workers: int | None = None
) -> list[Path]:
    """Draw every case of `prediction` that has an image to `target`/CASE.png; folders, or single files of one case.

    Images are CASE_0000 or CASE with any known ending, truths CASE. Raises AutosegError if no prediction has an image,
    or for cases whose files lie on different grids (the others are drawn).
    """
    files, predictions = files_at(images, "images"), files_at(prediction)
    truths = files_at(truth) if truth is not None else {}
    if images.is_file() and prediction.is_file():
        files = dict.fromkeys(predictions, images)
        truths = dict.fromkeys(predictions, truth) if truth is not None and truth.is_file() else truths
    cases = [case for case in predictions if f"{case}_0000" in files or case in files]
    if not cases:
        raise AutosegError(f"no file of {prediction} has an image in {images}; for CASE.nii.gz it is CASE_0000.nii.gz")
    if passed := sorted(set(predictions) - set(cases)):
        print(f"without image, not drawn: {', '.join(passed[:5])}{' ...' if len(passed) > 5 else ''}")
    if lacking := [case for case in cases if truth is not None and case not in truths]:
        print(f"{len(lacking)} cases have no truth and are drawn by class, for example {lacking[0]}")
    folders = [path if path.is_dir() else path.parent for path in (prediction, *([truth] if truth else []), images)]
    labels, annotated = as_predicted(find_labels(*folders), *folders) or (None, {})
    pictures = {case: target / f"{case}.png" for case in cases}
    given = {path.resolve() for paths in (files, predictions, truths) for path in paths.values()}
    if replaced := [path for path in pictures.values() if path.resolve() in given]:
        raise AutosegError(f"{replaced[0]} is one of the files to draw; give another folder for the pictures with -o")
    refuse_unwritable(target)

    def one(case: str) -> Path:
        image = files.get(f"{case}_0000", files.get(case))
        assert image is not None
        scene = load(case, image, predictions[case], truths.get(case), labels)
        draw(only(scene, annotated.get(case)), pictures[case])
        return pictures[case]

    outcomes = map_cases(one, cases, name=lambda case: case, what="draw", workers=workers)
    return raise_failures(outcomes, "drawing")


def files_at(path: Path, kind: str = "label files") -> dict[str, Path]:
    """File name without ending -> file, of a folder or a single file. Raises AutosegError if there is none."""
    if not path.is_file():
        return files_by_case(path, kind)
    return {path.name[: -len(ending_of(path))]: path}


def load(case: str, image: Path, prediction: Path, truth: Path | None, labels: Labels | None) -> Scene:
    """Read the files of one case. Raises AutosegError if they lie on different grids."""
    stored = read_stored(image)
    grid = canonical_grid(stored.grid)

    def labels_at(path: Path) -> np.ndarray:
        volume, _ = whole_labels(on_grid_of(read_stored(path, indices=True), stored), path)
        difference = mismatch(grid, volume.grid)
        if difference and (stored.sized or volume.grid.shape != grid.shape):
            raise AutosegError(f"{path} and {image} differ in {difference}; give the image that was segmented")
        return volume.array[0]

    found, true = labels_at(prediction), None if truth is None else labels_at(truth)
    return Scene(case=case, image=picture_of(stored), prediction=found, truth=true, grid=grid, labels=labels)


def only(scene: Scene, annotated: Sequence[str] | None) -> Scene:
    """Where there is a truth: without what is predicted of classes that were not annotated in this case; None: all."""
    if scene.truth is None or scene.labels is None or annotated is None:
        return scene
    known = [np.ravel(value) for name, value in scene.labels.scored.items() if name in annotated]
    kept = np.isin(scene.prediction, np.concatenate([*known, []]))
    return replace(scene, prediction=np.where(kept, scene.prediction, scene.background))


def picture_of(stored: Stored) -> np.ndarray:
    """The first channel (Z, Y, X), canonical; of a colour picture all three, last."""
    if stored.picture and len(stored.array) >= 3:
        return np.moveaxis(to_canonical(stored.array[:3], stored.grid), 0, -1)
    return to_canonical(stored.array[:1], stored.grid)[0]


def plane(grid: Grid) -> int:
    """The canonical axis that slices are stacked along: the clearly coarsest, else from feet to head."""
    coarse = int(np.argmax(grid.spacing_mm))
    others = [spacing for axis, spacing in enumerate(grid.spacing_mm) if axis != coarse]
    return coarse if grid.dimension == 3 and grid.spacing_mm[coarse] > COARSE * max(others) else 0


def pick(areas: np.ndarray, count: int = SLICES) -> tuple[int, ...]:
    """Positions of `count` slices with much foreground that lie apart, in order; the middle one if there is none.

    areas: foreground of each slice. After the largest, the next largest that is at least 1 / (`count` + 1) of the
    extent of the foreground away from those chosen, so that neighbours that look alike are not all there is to see.
    """
    filled = np.flatnonzero(areas)
    if not filled.size:
        return (len(areas) // 2,)
    apart = max(1, int(filled[-1] - filled[0] + 1) // (count + 1))
    chosen: list[int] = []
    for position in filled[np.argsort(-areas[filled], kind="stable")].tolist():
        if all(abs(position - other) >= apart for other in chosen):
            chosen.append(position)
    return tuple(sorted(chosen[:count]))


def window(shown: np.ndarray, inside: np.ndarray) -> tuple[float, float]:
    """Grey values to show from black to white: those of the foreground, widened on both sides by their range.

    shown: the slices drawn, inside: foreground of the same shape. Without foreground the 1st to 99th percentile.
    """
    finite = shown[np.isfinite(shown)]
    if not finite.size:
        return 0.0, 1.0
    low, high = np.percentile(finite, (0.5, 99.5)).tolist()
    values = shown[inside & np.isfinite(shown)]
    if values.size:
        first, last = np.percentile(values, (1, 99)).tolist()
        low, high = max(low, first - (last - first)), min(high, last + (last - first))
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def verdicts(truth: np.ndarray, prediction: np.ndarray, labels: Labels | None = None) -> np.ndarray:
    """RIGHT, TOO_MUCH, MISSING or OTHER_CLASS for each voxel, 0 for background in both; by regions if there are any."""
    background, ignored = (0, None) if labels is None else (labels.values[0], labels.ignore)
    classes = () if labels is None else labels.regions or labels.parts
    same = [np.isin(truth, own) == np.isin(prediction, own) for own in classes] or [truth == prediction]
    marks = np.zeros(truth.shape, np.uint8)
    found, there = prediction != background, truth != background
    marks[found & ~there] = TOO_MUCH
    marks[~found & there] = MISSING
    marks[found & there] = OTHER_CLASS
    marks[found & there & np.logical_and.reduce(same)] = RIGHT
    marks[truth == ignored] = 0
    return marks


def thickest(marks: np.ndarray) -> list[tuple[int, int]]:
    """(row, column) of the middles of up to ARROWS mistakes in a slice of verdicts (rows, columns), the thickest first.

    A mistake is a connected area of one verdict; its middle is its voxel farthest from what is none of it.
    """
    found: list[tuple[float, int, int]] = []
    for mark in (TOO_MUCH, MISSING, OTHER_CLASS):
        # The edge of the picture bounds a mistake too.
        depth = ndimage.distance_transform_edt(np.pad(marks == mark, 1))[1:-1, 1:-1]
        islands, count = ndimage.label(marks == mark)
        middles = ndimage.maximum_position(depth, islands, range(1, count + 1))
        found += [(-float(depth[at]), int(at[0]), int(at[1])) for at in middles if depth[at] >= THICK]
    return [(row, column) for _, row, column in sorted(found)[:ARROWS]]


def upright(array: np.ndarray, axis: int, position: int) -> np.ndarray:
    """One slice as it is drawn, first row on top: head or front on top, the patient's right or front on the left."""
    cut = np.take(array, position, axis)
    return cut if axis == 0 else cut[::-1]


def draw(scene: Scene, path: Path) -> None:
    """Draw one case to the PNG `path`: above the slices as they are, below with the labels on them.

    Without matplotlib's global state, so that it may be called from any thread and needs no display.
    """
    axis = plane(scene.grid)
    foreground = scene.prediction != scene.background
    if scene.truth is not None:
        foreground = foreground | (scene.truth != scene.background) & (scene.truth != scene.ignored)
    positions = pick(foreground.sum(tuple(a for a in range(3) if a != axis)))
    shown, inside = (np.take(array, positions, axis) for array in (scene.image, foreground))
    low, high = window(shown.astype(np.float64), inside) if scene.image.ndim == 3 else (0.0, float(max(1, shown.max())))
    colours, legend = colouring(scene)
    marks = scene.prediction if scene.truth is None else verdicts(scene.truth, scene.prediction, scene.labels)
    rows, columns = [edge for a, edge in enumerate(scene.grid.spacing_mm) if a != axis]
    height = scene.grid.shape[1 if axis == 0 else 0] * rows / (scene.grid.shape[1 if axis == 2 else 2] * columns)
    flat = len(positions) == 1
    size = (8.0, 4.0 * height + 0.9) if flat else (3.2 * len(positions), 6.4 * height + 0.9)
    figure = Figure(figsize=(size[0], min(max(size[1], 2.5), 16.0)), layout="constrained", facecolor="black")
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(1 if flat else 2, 2 if flat else len(positions), squeeze=False)
    for number, position in enumerate(positions):
        below = grid[0, 1] if flat else grid[1, number]
        for axes in (grid[0, number], below):
            axes.set_axis_off()
            grey = upright(scene.image, axis, position)
            grey = grey if grey.ndim == 2 else np.clip(grey / high, 0, 1)
            axes.imshow(grey, cmap="gray", vmin=low, vmax=high, aspect=rows / columns, interpolation="nearest")
        marked = upright(marks, axis, position)
        below.imshow(colours(marked), aspect=rows / columns, interpolation="nearest")
        for row, column in thickest(marked) if scene.truth is not None else ():
            # From the nearer side of the picture, so that most of the organ stays free.
            side = 1 if 2 * column > marked.shape[1] else -1
            below.annotate(
                "",
                (column, row),
                xytext=(side * 20, 0),
                textcoords="offset points",
                arrowprops={"arrowstyle": "->", "color": "yellow", "linewidth": 1.2},
            )
        if scene.grid.dimension == 3:
            count = scene.grid.shape[axis]
            grid[0, number].set_title(f"{AXES[axis]} {position + 1} of {count}", color="white", fontsize="small")
            for (x, y), letter in zip(((0.02, 0.5), (0.5, 0.95)), EDGES[axis]):
                where = {"transform": grid[0, number].transAxes, "ha": "center", "va": "center"}
                grid[0, number].text(x, y, letter, color="yellow", fontsize="small", **where)
    figure.suptitle(heading(scene), color="white", fontsize="medium", wrap=True)
    if legend:
        patches = [Patch(color=colour, label=name) for name, colour in legend]
        style = {"ncols": min(4, len(legend)), "fontsize": "small", "labelcolor": "white", "frameon": False}
        figure.legend(handles=patches, loc="outside lower center", **style)
    with atomic_write(path, "wb") as file:
        canvas.print_png(file)


def heading(scene: Scene) -> str:
    """The case and, where a truth is given, the Dice of each class that is in either map."""
    if scene.truth is None:
        empty = (scene.prediction == scene.background).all()
        return f"{scene.case}: nothing was found" if empty else scene.case
    known = np.ones(scene.truth.shape, bool) if scene.ignored is None else scene.truth != scene.ignored
    dice = []
    for name, values in scene.classes.items():
        a, b = (np.isin(array, values) & known for array in (scene.truth, scene.prediction))
        if total := np.count_nonzero(a) + np.count_nonzero(b):
            dice.append(f"{name} {2 * np.count_nonzero(a & b) / total:.3f}")
    return f"{scene.case}: Dice " + ", ".join(dice[:NAMED]) if dice else f"{scene.case}: nothing to find, nothing found"


def colouring(scene: Scene) -> tuple[Any, list[tuple[str, Any]]]:
    """What turns marks (Y, X) into colours (Y, X, 4), and (name, colour) of each mark in the case, for the legend."""
    if scene.truth is not None:
        marks = {value: colour for value, (_, colour) in VERDICTS.items()}
        several = len(scene.classes) > 1
        legend: list[tuple[str, Any]] = [entry for value, entry in VERDICTS.items() if several or value != OTHER_CLASS]
    else:
        # A value of several regions is that of the last one, which is painted over the others. A class has one colour
        # in all cases, by its place among the names.
        order = list(scene.classes)
        classes = {value: name for name, values in scene.classes.items() for value in np.ravel(values).tolist()}
        palette = colormaps["tab10" if len(order) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
        present = [value for value in np.unique(scene.prediction).tolist() if value in classes]
        marks = {value: palette[order.index(classes[value]) % len(palette)] for value in present}
        named = {classes[value]: marks[value] for value in present}
        legend = [(name, named[name]) for name in order if name in named]
        if len(legend) > NAMED:
            legend = [*legend[:NAMED], (f"and {len(legend) - NAMED} more", (0.5, 0.5, 0.5))]

    def colours(cut: np.ndarray) -> np.ndarray:
        painted = np.zeros((*cut.shape, 4))
        for value, colour in marks.items():
            painted[cut == value] = (*colour, OPACITY)
        return painted

    return colours, legend
