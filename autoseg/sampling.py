"""Which patches a training step sees, cut from the prepared cases and assembled into a Batch.

Everything random in step n comes from a generator seeded with (seed, stream, n). So any step can be repeated on its
own, the streams of training and validation never meet, the number of threads changes nothing, and a resumed run
needs no saved random state. A patch is chosen by its centre; only the box that its drawn transform needs is read.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoseg.augment import Augmentation, Drawn
from autoseg.augment.prior import PriorDraws, corrupt, draw_prior, to_masks
from autoseg.labels import UNSEEN
from autoseg.preprocess import ANNOTATED, PreparedCase
from autoseg.records import AutosegError
from autoseg.store import load_case, read_case
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


def place_axis(size: int, patch: int, wanted: int | None, rng: np.random.Generator) -> int:
    """Where a patch starts on one axis: around voxel `wanted`, or anywhere for None.

    The patch stays inside the image wherever it can (at the far border too); a short axis is centred in the patch.
    """
    if size <= patch:
        return -((patch - size) // 2)
    if wanted is None:
        return int(rng.integers(0, size - patch + 1))
    return int(np.clip(wanted - patch // 2, 0, size - patch))


def choose_patch(case: PreparedCase, patch: Sequence[int], foreground: bool, rng: np.random.Generator) -> Box:
    """Choose one patch of a case (2D patches: one slice): anywhere, or centred on a voxel of a random class.

    With `foreground` a class is drawn uniformly among those that the case holds, then one of its stored voxels; a
    case without foreground gives a random patch. Where a case has ignored voxels, a random patch is centred on one of
    the others: otherwise it might show nothing to learn from.
    """
    shape = case.labels.shape
    edges = (1,) * (3 - len(patch)) + tuple(patch)
    wanted: Sequence[int | None] = (None, None, None)
    classes = sorted(case.locations.keys() - {ANNOTATED}) if foreground else []
    voxels = case.locations.get(ANNOTATED)
    if classes:
        voxels = case.locations[classes[int(rng.integers(len(classes)))]]
    if voxels is not None:
        wanted = [int(v) for v in voxels[int(rng.integers(len(voxels)))]]
    start = tuple(place_axis(n, edge, want, rng) for n, edge, want in zip(shape, edges, wanted))
    return Box(start=start, stop=tuple(a + edge for a, edge in zip(start, edges)))


@dataclass(frozen=True, eq=False, kw_only=True)
class Prior:
    """Where a cascade's second stage finds the earlier stage's label maps, and what becomes of them."""

    maps: Callable[[str], Any]
    """Case -> class indices (Z, Y, X) on the case's prepared grid, read slice by slice."""
    foreground: tuple[int, ...]
    corrupted: bool
    """Whether the masks are spoilt a little, as in training."""


def forced_foreground(batch: int, fraction: float) -> list[bool]:
    """Which samples of a batch must show foreground: the last ones, at least one, so that every batch has its share."""
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
    team: Team = ALONE
    """Every process draws the whole batch, as one alone would, and reads and assembles its own samples."""

    @property
    def own(self) -> slice:
        """Which samples of a batch are this process's."""
        return self.team.own(self.batch_size)

    def sources(self, step: int) -> Sources:
        """Everything of step `step`, read from the cases. Raises AutosegError that names the case it failed on."""
        rng = generator(self.seed, self.stream, step)
        chosen = rng.integers(len(self.case_names), size=self.batch_size)
        forced = forced_foreground(self.batch_size, self.foreground_fraction)
        patches, arrays, priors, positions = [], [], [], []
        draws: Drawn | None = None
        own = range(self.batch_size)[self.own]
        for sample, (index, foreground) in enumerate(zip(chosen, forced)):
            name = self.case_names[index]
            try:
                case = self.cases[name]
                box = choose_patch(case, self.patch, foreground, rng)
                if draws is None:
                    # A child stream: how much the patches draw does not move what the transforms draw.
                    child = generator(self.seed, self.stream, step).spawn(1)[0]
                    cases = [self.case_names[index] for index in chosen]
                    draws = self.augmentation.draw(child, self.batch_size, case.image.shape[0], cases)
                shape = draws.source_shape(sample)
                source = grow(box, shape)
                if sample in own:
                    arrays.append(cut_sources(case, source, len(shape)))
                if sample in own and self.prior is not None:
                    priors.append(cut_source(self.prior.maps(name), source, len(shape), 0).short())
                if sample in own and self.positions:
                    positions.append(position_of(box, case.labels.shape, draws.is_mirrored(sample)[-len(self.patch) :]))
            except Exception as error:
                raise AutosegError(f"loading a patch of case {name} failed: {type(error).__name__}: {error}") from error
            patches.append(Patch(case=name, box=box, forced_foreground=foreground))
        assert draws is not None
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
