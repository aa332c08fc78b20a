"""Which patches a training step sees, cut from the prepared cases and assembled into a Batch.

Everything random in step n comes from a generator seeded with (seed, stream, n). So any step can be repeated on its
own, the streams of training and validation never meet, the number of threads changes nothing, and a resumed run
needs no saved random state. A patch is chosen by its centre; only the box that its drawn transform needs is read.
"""

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoseg.augment import Augmentation, Drawn
from autoseg.augment.prior import PriorDraws, corrupt, draw_prior, to_masks
from autoseg.labels import UNSEEN, Labels
from autoseg.placement import USUAL, Components, Placement, choose_patch, find_components, shows_foreground
from autoseg.preprocess import ANNOTATED, PreparedCase
from autoseg.records import AutosegError
from autoseg.store import load_case, read_case, stored_classes
from autoseg.team import ALONE, Team
from autoseg.volume import Box, cut, relative_place


class Stream(IntEnum):
    """Independent random streams of one seed."""

    TRAINING = 0
    VALIDATION = 1
    WEIGHTS = 2
    DROPOUT = 3


def generator(seed: int, stream: Stream, step: int) -> np.random.Generator:
    """The generator of one step of one stream."""
    return np.random.default_rng((seed, int(stream), step))


class PreparedCases:
    """Prepared cases by name, kept in memory as long as they fit in `memory` bytes, read patch by patch beyond that.

    Cases that came first stay: a cache that evicts would only churn, since every case is as likely as any other.
    """

    def __init__(self, folder: Path, memory: int) -> None:
        self.folder, self.left = folder, memory
        self._cases: dict[str, PreparedCase] = {}
        self._components: dict[str, Components] = {}
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> PreparedCase:
        case = self._cases.get(name)
        if case is not None:
            return case
        case = read_case(self.folder, name)
        size = case.image.size * 4 + case.labels.size * 2
        with self._lock:
            fits = size <= self.left
            self.left -= size if fits else 0
        if fits:
            case = load_case(self.folder, name)
        return self._cases.setdefault(name, case)

    def components(self, name: str, labels: Labels) -> Components:
        """See `find_components`; found when a case is first asked for, and kept."""
        if name not in self._components:
            self._components[name] = find_components(np.asarray(self[name].labels[...]), labels)
        return self._components[name]

    def holding(self, names: Iterable[str]) -> dict[int, tuple[str, ...]]:
        """Class number, from 1 -> those of the cases `names` that hold it; only classes that some case holds."""
        found: dict[int, list[str]] = {}
        for name in names:
            for index in stored_classes(self.folder, name):
                found.setdefault(index, []).append(name)
        return {index: tuple(found[index]) for index in sorted(found.keys() - {ANNOTATED})}


@dataclass(frozen=True, kw_only=True)
class Patch:
    """Where one sample is cut: its centre box has the patch's shape, in plan order (Z, Y, X)."""

    case: str
    box: Box
    forced_foreground: bool


@dataclass(frozen=True, eq=False, kw_only=True)
class Sources:
    """One step's boxes as read from disk, and the transforms drawn for them.

    Where several processes share a batch, `patches` are those of the whole batch and all else is of this process's own.
    """

    step: int
    patches: tuple[Patch, ...]
    draws: Drawn
    arrays: tuple[tuple[Tensor, Tensor], ...]
    """One (image (C, ...) float32, labels (...) int16) a sample; spatial axes as in the patch."""
    priors: tuple[Tensor, ...] = ()
    """In a cascade, the earlier stage's labels (...) of the same boxes."""
    prior_draws: PriorDraws | None = None
    positions: tuple[tuple[float, ...], ...] = ()
    """See `Batch.position`; only of a `Sampler` with `positions`."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """What one training step sees: image (B, C, *patch) float32, labels (B, *patch) int64, a label map.

    Where several processes share a batch, `patches` are those of the whole batch and B counts this process's own.
    """

    step: int
    patches: tuple[Patch, ...]
    image: Tensor
    labels: Tensor
    annotated: Tensor | None = None
    """Which classes were annotated, (B, classes without background) bool; None where no case lacks any."""
    position: Tensor | None = None
    """Where each patch lies in its image, (B, axes of the patch) float32, by `relative_place`, and negated along axes
    that were mirrored; None where the network does not ask."""

    @property
    def cases(self) -> tuple[str, ...]:
        """Names of the cases, one a patch."""
        return tuple(patch.case for patch in self.patches)


@dataclass(frozen=True, eq=False, kw_only=True)
class Prior:
    """Where a cascade's second stage finds the earlier stage's label maps, and what becomes of them."""

    maps: Callable[[str], Any]
    """Case -> class indices (Z, Y, X) on the case's prepared grid, read slice by slice."""
    foreground: tuple[int, ...]
    corrupted: bool
    """Whether the masks are spoilt a little, as in training."""


def forced_foreground(batch: int, fraction: float, step: int) -> list[bool]:
    """Which samples of the batch of a step must show foreground: the last ones, at least one, so that every batch has
    its share. Of batches of one patch as many steps as the fraction says, evenly spread, the first among them."""
    if batch == 1:
        return [math.ceil((step + 1) * fraction) > math.ceil(step * fraction)]
    first = min(round(batch * (1 - fraction)), batch - 1) if fraction > 0 else batch
    return [sample >= first for sample in range(batch)]


def grow(box: Box, shape: Sequence[int]) -> Box:
    """The box of `shape` (as many trailing axes as it has) with the same centre; an odd surplus goes to the end."""
    start, stop = list(box.start), list(box.stop)
    for axis, edge in zip(range(3 - len(shape), 3), shape):
        start[axis] -= (edge - (box.stop[axis] - box.start[axis])) // 2
        stop[axis] = start[axis] + edge
    return Box(start=tuple(start), stop=tuple(stop))


def position_of(box: Box, shape: Sequence[int], mirrored: Sequence[bool]) -> tuple[float, ...]:
    """Where the patch `box` lies in an image of `shape` (Z, Y, X), by `relative_place`, for as many trailing axes as
    `mirrored` has: along those that are, as in the mirror image of the whole."""
    last = range(3 - len(mirrored), 3)
    places = [relative_place(box.start[a], box.stop[a] - box.start[a], shape[a]) for a in last]
    return tuple(-place if flipped else place for place, flipped in zip(places, mirrored))


def cut_source(array: Any, box: Box, dimension: int, fill: int) -> Tensor:
    """One box of `array` (..., Z, Y, X), read from where it lies; `fill` outside. 2D: the box's one slice."""
    size = array.shape[-3:]
    inner = tuple(slice(min(max(a, 0), n), max(min(b, n), 0)) for a, b, n in zip(box.start, box.stop, size))
    shift = tuple(s.start for s in inner)
    local = Box(
        start=tuple(a - s for a, s in zip(box.start, shift)), stop=tuple(b - s for b, s in zip(box.stop, shift))
    )
    part = cut(np.asarray(array[(..., *inner)]), local, fill)
    return torch.from_numpy(part if dimension == 3 else part[..., 0, :, :])


def cut_sources(case: PreparedCase, box: Box, dimension: int) -> tuple[Tensor, Tensor]:
    """Image (C, ...) and labels (...) of one box; outside the case the image is 0 and the label `UNSEEN`."""
    return cut_source(case.image, box, dimension, 0), cut_source(case.labels, box, dimension, UNSEEN).short()


@contextmanager
def naming(case: str) -> Iterator[None]:
    """Whatever fails within is an AutosegError that names the case."""
    try:
        yield
    except Exception as error:
        raise AutosegError(f"loading a patch of case {case} failed: {type(error).__name__}: {error}") from error


@dataclass(frozen=True, eq=False, kw_only=True)
class Sampler:
    """Makes the sources of any step: cases uniformly with replacement, patches, transforms.

    `case_names` are the cases to draw from; `patch` has two or three axes.
    """

    cases: PreparedCases
    case_names: tuple[str, ...]
    patch: tuple[int, ...]
    batch_size: int
    foreground_fraction: float
    augmentation: Augmentation
    seed: int
    stream: Stream
    prior: Prior | None = None
    annotated: Mapping[str, tuple[bool, ...]] | None = None
    """Case -> which classes were annotated, background apart; None where no case lacks any."""
    positions: bool = False
    """Whether the network asks where its patches lie."""
    placement: Placement = USUAL
    team: Team = ALONE
    """Every process draws the whole batch, as one alone would, and reads and assembles its own samples."""

    @property
    def own(self) -> slice:
        """Which samples of a batch are this process's."""
        return self.team.own(self.batch_size)

    @cached_property
    def holding(self) -> dict[int, tuple[str, ...]]:
        """Class number, from 1 -> the cases that hold it."""
        return self.cases.holding(self.case_names)

    def shown(self, patch: Patch) -> str:
        """What a sample is of, for augmentations that change the same always alike: its case, in 2D its slice."""
        return patch.case if len(self.patch) == 3 else f"{patch.case} {patch.box.start[0]}"

    def place(self, case: PreparedCase, foreground: bool, wanted: int | None, rng: np.random.Generator) -> Box:
        """One patch of a case; drawn again as often as the placement says while it shows no foreground.

        Every process looks at the patches of the whole batch, since what is drawn next depends on it.
        """
        chosen, labels = self.placement, self.placement.labels

        def components() -> Components:
            assert labels is not None
            return self.cases.components(case.case, labels)

        draw = partial(choose_patch, case, self.patch, foreground, rng)
        draw = partial(draw, position=chosen.position, wanted=wanted, components=components)
        box = draw()
        if labels is not None and case.locations.keys() - {ANNOTATED}:
            for _ in range(chosen.redraw_empty):
                if shows_foreground(case, box, labels):
                    break
                box = draw()
        return box

    def sources(self, step: int) -> Sources:
        """Everything of step `step`, read from the cases. Raises AutosegError that names the case it failed on."""
        rng = generator(self.seed, self.stream, step)
        chosen = rng.integers(len(self.case_names), size=self.batch_size)
        position = self.placement.position
        share = self.foreground_fraction if position.share is None else position.share
        forced = forced_foreground(self.batch_size, share, step)
        names: list[str] = [self.case_names[index] for index in chosen]
        wanted: list[int | None] = [None] * self.batch_size
        if position.balanced and self.holding:
            for place in range(forced.count(False), self.batch_size):  # the forced ones come last
                shown = list(self.holding)[int(rng.integers(len(self.holding)))]
                held = self.holding[shown]
                wanted[place], names[place] = shown, held[int(rng.integers(len(held)))]
        patches, arrays, priors, positions = [], [], [], []
        for name, foreground, index in zip(names, forced, wanted):
            with naming(name):
                box = self.place(self.cases[name], foreground, index, rng)
            patches.append(Patch(case=name, box=box, forced_foreground=foreground))
        # A child stream: how much the patches draw does not move what the transforms draw.
        child = generator(self.seed, self.stream, step).spawn(1)[0]
        with naming(names[0]):
            channels = self.cases[names[0]].image.shape[0]
            draws: Drawn = self.augmentation.draw(child, self.batch_size, channels, [self.shown(p) for p in patches])
        for sample in range(self.batch_size)[self.own]:
            name, box = patches[sample].case, patches[sample].box
            with naming(name):
                case, shape = self.cases[name], draws.source_shape(sample)
                source = grow(box, shape)
                arrays.append(cut_sources(case, source, len(shape)))
                if self.prior is not None:
                    priors.append(cut_source(self.prior.maps(name), source, len(shape), 0).short())
                if self.positions:
                    positions.append(position_of(box, case.labels.shape, draws.is_mirrored(sample)[-len(self.patch) :]))
        prior_draws = None
        if self.prior is not None and self.prior.corrupted:
            prior_draws = draw_prior(rng, self.batch_size, len(self.prior.foreground)).part(self.own)
        return Sources(
            step=step,
            patches=tuple(patches),
            draws=draws.part(self.own),
            arrays=tuple(arrays),
            priors=tuple(priors),
            prior_draws=prior_draws,
            positions=tuple(positions),
        )

    def assemble(self, sources: Sources, device: torch.device) -> Batch:
        """Move the sources to `device` and apply their transforms there."""
        moved = [(image.to(device, non_blocking=True), labels.to(device)) for image, labels in sources.arrays]
        image, labels = self.augmentation.apply(sources.draws, moved)
        if self.prior is not None:
            priors = self.augmentation.follow(sources.draws, [labels.to(device) for labels in sources.priors])
            masks = to_masks(priors, self.prior.foreground)
            if sources.prior_draws is not None:
                masks = corrupt(masks, sources.prior_draws)
            image = torch.cat([image, masks.reshape(len(masks), -1, *self.patch)], dim=1)
        annotated = None
        if self.annotated is not None:
            annotated = torch.tensor([self.annotated[patch.case] for patch in sources.patches[self.own]], device=device)
        position = torch.tensor(sources.positions, device=device) if self.positions else None
        return Batch(
            step=sources.step,
            patches=sources.patches,
            image=image,
            labels=labels,
            annotated=annotated,
            position=position,
        )


def prefetch(load: Callable[[int], Sources], steps: Iterable[int], threads: int) -> Iterator[Sources]:
    """`load(step)` for every step, in order, read ahead by `threads` threads.

    An error in a thread is raised here, with its own traceback, as soon as the consumer asks for the next step, even
    if the failing step lies further ahead; nothing waits for ever.
    """
    pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="patches")
    waiting: deque[Future[Sources]] = deque()

    def next_ready() -> Sources:
        for future in waiting:
            if future.done() and (error := future.exception()) is not None:
                raise error
        return waiting.popleft().result()

    try:
        for step in steps:
            waiting.append(pool.submit(load, step))
            if len(waiting) > 2 * threads:
                yield next_ready()
        while waiting:
            yield next_ready()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
