"""Where the patches of training lie: POSITIONS by name, for `Recipe.patch_position`.

A batch has patches that must show foreground, centred on a voxel of some class, and others. `foreground_fraction` is
the share of the first in the positions that mix both: `default`, `balanced` and `components`, which differ in how that
voxel is drawn. The other positions place all patches alike. `components` and `balanced` are kept apart on purpose: the
first makes a class's small parts as frequent as its large ones, the second makes its few cases as frequent as many.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import cc3d
import numpy as np

from autoseg.labels import Labels
from autoseg.preprocess import ANNOTATED, LOCATION_SEED, MOST_LOCATIONS, PreparedCase
from autoseg.records import AutosegError
from autoseg.schema import Recipe
from autoseg.volume import Box, bounding_box

Centre = Sequence[int | None]
"""The voxel (Z, Y, X) that a patch is placed around; None: anywhere along that axis."""
Components = Mapping[int, tuple[np.ndarray, ...]]
"""Class number, from 1 -> voxels (n, 3) of each of its connected components."""


def place_axis(size: int, patch: int, wanted: int | None, rng: np.random.Generator) -> int:
    """Where a patch starts on one axis: around voxel `wanted`, or anywhere for None.

    The patch stays inside the image wherever it can (at the far border too); a short axis is centred in the patch.
    """
    if size <= patch:
        return -((patch - size) // 2)
    if wanted is None:
        return int(rng.integers(0, size - patch + 1))
    return int(np.clip(wanted - patch // 2, 0, size - patch))


def anywhere(case: PreparedCase, edges: Sequence[int], rng: np.random.Generator) -> Centre:
    """Every place alike. Where a case has ignored voxels, one of the others: else a patch might show nothing to learn
    from."""
    voxels = case.locations.get(ANNOTATED)
    return (None, None, None) if voxels is None else _draw(voxels, rng)


def near_the_middle(case: PreparedCase, edges: Sequence[int], rng: np.random.Generator) -> Centre:
    """Starts are normal around that of the middle patch, with a standard deviation of a quarter of it."""
    middle = [max(n - edge, 0) / 2 for n, edge in zip(case.labels.shape, edges)]
    starts = [rng.normal(start, start / 4) for start in middle]
    return _annotated(case, [round(start) + edge // 2 for start, edge in zip(starts, edges)])


def in_the_middle(case: PreparedCase, edges: Sequence[int], rng: np.random.Generator) -> Centre:
    """Always the middle patch."""
    return _annotated(case, [(n - edge) // 2 + edge // 2 for n, edge in zip(case.labels.shape, edges)])


def _annotated(case: PreparedCase, voxel: list[int]) -> Centre:
    """`voxel`, or in a case with ignored voxels the nearest of the known others."""
    voxels = case.locations.get(ANNOTATED)
    return voxel if voxels is None else voxels[((voxels - voxel) ** 2).sum(1).argmin()].tolist()


def _draw(voxels: np.ndarray, rng: np.random.Generator) -> Centre:
    return [int(v) for v in voxels[int(rng.integers(len(voxels)))]]


@dataclass(frozen=True, kw_only=True)
class Position:
    """One entry of POSITIONS."""

    about: str
    free: Callable[[PreparedCase, Sequence[int], np.random.Generator], Centre] = anywhere
    """(case, edges of the patch, generator) -> centre of a patch that need not show foreground."""
    share: float | None = None
    """Of patches that must; None: `Recipe.foreground_fraction`."""
    balanced: bool = False
    """Whether first the class is drawn and then a case that has it; else first the case, then one of its classes."""
    by_component: bool = False
    """Whether of the class a connected component is drawn and then one of its voxels; else any voxel."""


POSITIONS: dict[str, Position] = {
    "default": Position(about="foreground_fraction of them on a voxel of a random class of the case, others anywhere"),
    "normal": Position(about="normally distributed around the middle of the volume", free=near_the_middle, share=0.0),
    "uniform": Position(about="anywhere", share=0.0),
    "fixed": Position(about="in the middle of the volume", free=in_the_middle, share=0.0),
    "foreground": Position(about="all on a voxel of a random class; anywhere in a case that has none", share=1.0),
    "balanced": Position(
        about="as default, but every class of the dataset alike, however few cases have it", balanced=True
    ),
    "components": Position(
        about="as default, but every connected component of a class alike, however small", by_component=True
    ),
}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How a sampler places its patches. `labels` must be given for all that is not the default."""

    position: Position = POSITIONS["default"]
    redraw_empty: int = 0
    labels: Labels | None = None

    @classmethod
    def of(cls, recipe: Recipe, labels: Labels) -> "Placement":
        """What a recipe says."""
        return cls(position=POSITIONS[recipe.patch_position], redraw_empty=recipe.redraw_empty, labels=labels)


USUAL = Placement()
"""Also that of the pseudo-validation, whatever the recipe says."""


def check_placement(recipe: Recipe) -> None:
    """AutosegError for a position that does not exist."""
    if recipe.patch_position not in POSITIONS:
        raise AutosegError(f"unknown patch_position {recipe.patch_position!r}; choose one of {', '.join(POSITIONS)}")


def describe_positions() -> list[str]:
    """One line a position: its name, and where patches lie."""
    width = max(map(len, POSITIONS))
    return [f"{name:{width}}  {position.about}" for name, position in POSITIONS.items()]


def choose_patch(
    case: PreparedCase,
    patch: Sequence[int],
    foreground: bool,
    rng: np.random.Generator,
    *,
    position: Position = POSITIONS["default"],
    wanted: int | None = None,
    components: Callable[[], Components] | None = None,
) -> Box:
    """Choose one patch of a case (2D patches: one slice), as `position` says.

    With `foreground` it is centred on a stored voxel of the class `wanted`, which the case must hold; None: of a class
    drawn uniformly among those that it holds, and if it holds none, a patch as without. `components` gives those of
    the case; only asked where the position goes by them.
    """
    shape = case.labels.shape
    edges = (1,) * (3 - len(patch)) + tuple(patch)
    held = sorted(case.locations.keys() - {ANNOTATED}) if foreground else []
    if held:
        chosen = held[int(rng.integers(len(held)))] if wanted is None else wanted
        voxels = case.locations[chosen]
        if position.by_component and components is not None:
            parts = components()[chosen]
            voxels = parts[int(rng.integers(len(parts)))]
        centre = _draw(voxels, rng)
    else:
        centre = position.free(case, edges, rng)
    start = tuple(place_axis(n, edge, want, rng) for n, edge, want in zip(shape, edges, centre))
    return Box(start=start, stop=tuple(a + edge for a, edge in zip(start, edges)))


def shows_foreground(case: PreparedCase, box: Box, labels: Labels) -> bool:
    """Whether a patch of a case holds a voxel of any class."""
    inner = tuple(slice(max(a, 0), b) for a, b in zip(box.start, box.stop))
    return bool(labels.is_foreground(np.asarray(case.labels[inner])).any())


def find_components(indices: np.ndarray, labels: Labels) -> Components:
    """Voxels (n, 3) of every connected component (26 neighbours) of each class that a label map (Z, Y, X) holds.

    Of the components of a class together about as many voxels as `find_locations` keeps of it, the same number of each
    that has so many, at least one; drawn with a fixed seed.
    """
    rng = np.random.default_rng(LOCATION_SEED)
    found: dict[int, tuple[np.ndarray, ...]] = {}
    for index, members in enumerate(labels.members, start=1):
        mask = np.isin(indices, members)
        if not mask.any():
            continue
        box = bounding_box(mask)
        # As uint8: cc3d 4.1 fails on some small boolean arrays.
        marked = cc3d.connected_components(mask[box.slices()].astype(np.uint8), connectivity=26)
        where = np.flatnonzero(marked)
        numbers = marked.ravel()[where]
        ends = np.cumsum(np.bincount(numbers)[1:])
        most = max(1, MOST_LOCATIONS // len(ends))
        chosen = [
            part if len(part) <= most else np.sort(rng.choice(part, most, replace=False))
            for part in np.split(where[np.argsort(numbers, kind="stable")], ends[:-1])
        ]
        found[index] = tuple(
            (np.stack(np.unravel_index(part, marked.shape), axis=1) + box.start).astype(np.int32) for part in chosen
        )
    return found
