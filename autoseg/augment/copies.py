"""A few fixed changes of every case in place of new ones all the time, as if augmented copies lay on disk.

Copy 0 of a case is the case itself; in 2D every slice is a case here. What is drawn for each other copy depends on
seed, case and number alone, and is applied to whichever patch of the case is chosen: nothing is written, and a patch of
a copy is what the copy of the whole case would show there, but for changes that follow the patch (elastic displacement,
bias field, statistics of its grey values). The masks that a cascade's second stage reads are still corrupted anew each
time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from autoseg.augment.default import Source

if TYPE_CHECKING:
    from autoseg.augment import Augmentation

_STREAM = 0xC0
"""Keeps the generators of copies apart from those of steps, which are seeded likewise."""


@dataclass(frozen=True, eq=False, kw_only=True)
class CopyDraws:
    """Which copy each sample shows, and what was drawn for it: for one sample, by an augmentation of its own."""

    copies: tuple[int, ...]
    samples: tuple[tuple["Augmentation", Any], ...]

    def source_shape(self, sample: int) -> tuple[int, ...]:
        """Shape of the box, centred on the patch centre, that sample number `sample` is made from."""
        return self.samples[sample][1].source_shape(0)

    def is_mirrored(self, sample: int) -> tuple[bool, ...]:
        """Which axes of the patch are reversed in sample number `sample`; AutosegError if it cannot be told."""
        return self.samples[sample][1].is_mirrored(0)

    def part(self, samples: slice) -> "CopyDraws":
        """What was drawn for these samples of the batch."""
        return CopyDraws(copies=self.copies[samples], samples=self.samples[samples])


@dataclass(frozen=True, eq=False, kw_only=True)
class FixedCopies:
    """Shows each case as it is and as `copies` fixed copies, each as often; `plain` changes nothing."""

    augmentation: "Augmentation"
    plain: "Augmentation"
    copies: int
    seed: int

    def draw(self, rng: np.random.Generator, batch: int, channels: int, cases: Sequence[str] = ()) -> CopyDraws:
        """Choose a copy for each sample; `cases` are the names of what they are of: cases, in 2D slices."""
        if len(cases) != batch:
            raise ValueError(f"{batch} samples, but the names of {len(cases)} cases")
        copies = tuple(rng.integers(self.copies + 1, size=batch).tolist())
        samples = []
        for case, copy in zip(cases, copies):
            own = np.random.default_rng((self.seed, _STREAM, copy, *case.encode()))
            maker = self.augmentation if copy else self.plain
            samples.append((maker, maker.draw(own, 1, channels, (case,))))
        return CopyDraws(copies=copies, samples=tuple(samples))

    def apply(self, draws: CopyDraws, sources: Sequence[Source]) -> tuple[Tensor, Tensor]:
        """Make a batch from one (image, labels) source a sample, as `DefaultAugmentation.apply` does."""
        made = [maker.apply(drawn, [source]) for (maker, drawn), source in zip(draws.samples, sources, strict=True)]
        return torch.cat([image for image, _ in made]), torch.cat([labels for _, labels in made])

    def follow(self, draws: CopyDraws, maps: Sequence[Tensor]) -> Tensor:
        """Label maps of the same boxes, moved as the labels were; AutosegError if the augmentation cannot."""
        return torch.cat([maker.follow(drawn, [one]) for (maker, drawn), one in zip(draws.samples, maps, strict=True)])
