"""Augmentation by code from elsewhere: a callable that is handed a whole batch and a generator.

Only a seed is drawn beforehand; the callable decides the rest. What it returns is checked, since a wrong shape or type
would otherwise surface far away, in the network.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from autoseg.augment import geometry
from autoseg.augment.default import Source, finish
from autoseg.records import AutosegError

Transform = Callable[[Tensor, Tensor, np.random.Generator], tuple[Tensor, Tensor]]
"""`(image (B, C, *box) float32, labels (B, *box) int64, rng) -> (image (B, C, *patch), labels (B, *patch))`.

Labels are -1 outside the image content; the callable may change its arguments in place. It should take every random
decision from `rng`, so that a seed repeats a run. Where the plan tells left from right (`Plan.mirroring`), it must not
mirror along that axis: nobody else could say which samples it has mirrored.
"""


@dataclass(frozen=True, eq=False, kw_only=True)
class SeedDraw:
    """What was drawn for a batch: the seed of the callable, and the box that each sample is cut to."""

    box: tuple[int, ...]
    seed: int
    first: int = 0
    """The first sample of the batch that is in the callable's hands, where it is not handed the whole."""

    def source_shape(self, sample: int) -> tuple[int, ...]:
        """Shape of the box, centred on the patch centre, that sample number `sample` is made from."""
        return self.box

    def is_mirrored(self, sample: int) -> tuple[bool, ...]:
        """Never known: a callable from elsewhere does not say what it did."""
        raise AutosegError(
            "an augmentation from elsewhere does not say which patches it mirrors, and the network must be told where "
            "each lies; train it with --set augmentation=default or none"
        )

    def part(self, samples: slice) -> "SeedDraw":
        """The same, with random numbers of their own for these samples."""
        return replace(self, first=samples.start or 0)


@dataclass(frozen=True, eq=False, kw_only=True)
class ForeignAugmentation:
    """Runs `transform`, called `name` in errors, on boxes of shape `box`; see `DefaultAugmentation` for the rest."""

    name: str
    transform: Transform
    box: tuple[int, ...]
    patch: tuple[int, ...]
    masked: tuple[bool, ...]

    def draw(self, rng: np.random.Generator, batch: int, channels: int, cases: Sequence[str] = ()) -> SeedDraw:
        """Draw the seed of one batch."""
        return SeedDraw(box=self.box, seed=int(rng.integers(2**63 - 1)))

    def apply(self, draws: SeedDraw, sources: Sequence[Source]) -> tuple[Tensor, Tensor]:
        """Make a batch from one (image, labels) source a sample, as `DefaultAugmentation.apply` does.

        Raises AutosegError when the callable fails or returns arrays of another shape, type or device.
        """
        image = torch.stack([geometry.centre(image, draws.box) for image, _ in sources])
        labels = torch.stack([geometry.centre(labels, draws.box) for _, labels in sources]).long()
        expected = (image.shape[:2] + torch.Size(self.patch), labels.shape[:1] + torch.Size(self.patch))
        device = image.device
        try:
            result = self.transform(
                image, labels, np.random.default_rng((draws.seed, draws.first) if draws.first else draws.seed)
            )
        except Exception as error:
            raise AutosegError(
                f"the augmentation {self.name} failed on an image batch of shape {tuple(image.shape)} with labels of "
                f"shape {tuple(labels.shape)}: {type(error).__name__}: {error}"
            ) from error
        image, labels = self._checked(result, expected, device)
        return finish(image, labels.long(), self.masked)

    def follow(self, draws: SeedDraw, maps: Sequence[Tensor]) -> Tensor:
        """Never: a callable from elsewhere moves one label map only."""
        raise AutosegError(
            f"the augmentation {self.name} cannot move the earlier stage's predictions of a cascade along with the "
            "labels; train the cascade with --set augmentation=default or none"
        )

    def _checked(self, result: object, expected: tuple[torch.Size, torch.Size], device: torch.device) -> Source:
        if not (isinstance(result, tuple) and len(result) == 2 and all(isinstance(part, Tensor) for part in result)):
            raise AutosegError(f"the augmentation {self.name} must return (image, labels), two tensors")
        image, labels = result
        wrong = []
        for part, tensor, shape in zip(("image", "labels"), (image, labels), expected):
            if tensor.shape != shape:
                wrong.append(f"{part} of shape {tuple(tensor.shape)} instead of {tuple(shape)}")
            if tensor.device != device:
                wrong.append(f"{part} on {tensor.device} instead of {device}")
        if image.dtype != torch.float32:
            wrong.append(f"image of type {image.dtype} instead of torch.float32")
        if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
            wrong.append(f"labels of type {labels.dtype} instead of an integer type")
        if wrong:
            raise AutosegError(f"the augmentation {self.name} returned {'; '.join(wrong)}")
        return image, labels
