"""A page of slices side by side, each with the outlines of its labels and a few words below."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from autoseg.evaluation.overlay import NAMED, window
from autoseg.records import atomic_write

TILE = 2.6
"""Width of a slice in inches."""
LETTERS = 40
"""Of a line of words below a slice."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Tile:
    """One slice: grey values and labels (Y, X), the background 0."""

    title: str
    image: np.ndarray
    labels: np.ndarray
    words: tuple[str, ...] = ()


def draw_page(
    tiles: Sequence[Tile],
    path: Path,
    *,
    names: Mapping[int, str],
    heading: str,
    columns: int = 3,
    aspect: float = 1.0,
) -> None:
    """Draw `tiles`, row by row, to the PNG `path`; grey values from black to white as suits the first one.

    names: what each label is called; others are not outlined. aspect: height of a voxel, in widths. Without
    matplotlib's global state, so that it needs no display.
    """
    first = tiles[0]
    low, high = window(first.image.astype(np.float64), np.isin(first.labels, list(names)))
    palette = colormaps["tab10" if len(names) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    colours = {label: palette[number % len(palette)] for number, label in enumerate(names)}
    below = [[line for word in tile.words for line in textwrap.wrap(word, LETTERS)] for tile in tiles]
    rows = -(-len(tiles) // columns)
    height = TILE * min(4.0, max(0.25, aspect * first.image.shape[0] / first.image.shape[1]))
    height += 0.3 + 0.13 * max(map(len, below))
    figure = Figure(figsize=(TILE * columns, height * rows + 0.8), layout="constrained", facecolor="black")
    canvas = FigureCanvasAgg(figure)
    grid = [*figure.subplots(rows, columns, squeeze=False).flat]
    for axes in grid:
        axes.set_axis_off()
    for axes, tile, lines in zip(grid, tiles, below):
        axes.imshow(tile.image, cmap="gray", vmin=low, vmax=high, aspect=aspect, interpolation="nearest")
        for label, colour in colours.items():
            inside = tile.labels == label
            if min(inside.shape) > 1 and inside.any() and not inside.all():
                axes.contour(inside, levels=[0.5], colors=[colour], linewidths=1)
        axes.set_title(tile.title, color="white", fontsize="small")
        place = {"transform": axes.transAxes, "ha": "center", "va": "top"}
        axes.text(0.5, -0.03, "\n".join(lines), color="white", fontsize=5.5, **place)
    figure.suptitle(heading, color="white", fontsize="medium", wrap=True)
    shown = [label for label in names if any((tile.labels == label).any() for tile in tiles)][:NAMED]
    if shown:
        patches = [Patch(color=colours[label], label=names[label]) for label in shown]
        style = {"ncols": min(4, len(shown)), "fontsize": "small", "labelcolor": "white", "frameon": False}
        figure.legend(handles=patches, loc="outside lower center", **style)
    with atomic_write(path, "wb") as file:
        canvas.print_png(file)
