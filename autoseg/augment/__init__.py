"""Augmentation: everything random is drawn for a batch first, then applied on the device where the batch is.

An augmentation is made once for a run. Each batch, `draw` decides, `Draws.source_shape` tells the sampler how large a
box to cut for each sample, and `apply` turns the boxes into a batch:

    augmentation = make_augmentation("default", patch=(128, 128, 128), dimension=3, masked=(False,))
    draws = augmentation.draw(rng, batch=2, channels=1)
    image, labels = augmentation.apply(draws, [cut(sample, draws.source_shape(sample)) for sample in range(2)])

`default` is nnU-Net v2's, `none` leaves patches as they are; `desai`, `strong` and `mr_artefacts` are other policies,
see `policy.py`; `batchgenerators` is nnU-Net v1's by the original classes; `package.module:name` is a callable of your
own, see `Transform`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from autoseg.augment import classic, foreign
from autoseg.augment.copies import FixedCopies
from autoseg.augment.default import DefaultAugmentation, Source
from autoseg.augment.foreign import Transform
from autoseg.augment.policy import POLICIES, Policy
from autoseg.mirroring import ALL_AXES, Flips
from autoseg.own import own
from autoseg.records import AutosegError
from autoseg.schema import Dimension

__all__ = [
    "AUGMENTATIONS",
    "Augmentation",
    "Drawn",
    "FixedCopies",
    "Policy",
    "Source",
    "Transform",
    "make_augmentation",
]


class Drawn(Protocol):
    """What `draw` returns: opaque to the caller but for the boxes to cut."""

    def source_shape(self, sample: int) -> tuple[int, ...]:
        """Shape of the box, centred on the patch centre, that sample number `sample` is made from."""
        ...

    def is_mirrored(self, sample: int) -> tuple[bool, ...]:
        """Which axes of the patch are reversed in sample number `sample`; AutosegError if it cannot be told."""
        ...

    def part(self, samples: slice) -> "Drawn":
        """What was drawn for these samples of the batch."""
        ...


class Augmentation(Protocol):
    """What `make_augmentation` returns."""

    def draw(self, rng: np.random.Generator, batch: int, channels: int, cases: Sequence[str] = ()) -> Any:
        """Decide everything for a batch; returns a `Drawn`. `cases`: what each sample is of, by name (in 2D the
        slice), which `FixedCopies` needs."""
        ...

    def apply(self, draws: Any, sources: Sequence[Source]) -> tuple[Tensor, Tensor]:
        """One (image (C, *box), labels (*box)) a sample -> image (B, C, *patch) float32, labels (B, *patch) int64."""
        ...

    def follow(self, draws: Any, maps: Sequence[Tensor]) -> Tensor:
        """Label maps of the same boxes, moved as the labels were: (B, *patch) int64; AutosegError if it cannot."""
        ...


Maker = Callable[[tuple[int, ...], Dimension, tuple[bool, ...], Flips], Augmentation]


def _follow(policy: Policy) -> Maker:
    return lambda patch, dimension, masked, flips: DefaultAugmentation(
        policy=policy, patch=patch, dimension=dimension, masked=masked, flips=flips
    )


def _classic(patch: tuple[int, ...], dimension: Dimension, masked: tuple[bool, ...], flips: Flips) -> Augmentation:
    return foreign.ForeignAugmentation(
        name="batchgenerators",
        transform=classic.classic(patch, flips),
        box=classic.enlarged(patch),
        patch=patch,
        masked=masked,
    )


AUGMENTATIONS: dict[str, Maker] = {
    **{name: _follow(policy) for name, policy in POLICIES.items()},
    "batchgenerators": _classic,
}


def check_augmentation(name: str) -> None:
    """AutosegError for a name that is neither in AUGMENTATIONS nor a callable's `package.module:name`."""
    if ":" in name:
        own(name, "augmentation")
    elif name not in AUGMENTATIONS:
        known = ", ".join(AUGMENTATIONS)
        raise AutosegError(f"unknown augmentation {name!r}; choose one of {known}, or package.module:name of your own")


def make_augmentation(
    name: str,
    *,
    patch: Sequence[int],
    dimension: Dimension,
    masked: Sequence[bool],
    flips: Flips = ALL_AXES,
    context: int = 1,
) -> Augmentation:
    """The augmentation called `name` for patches of shape `patch`: (Z, Y, X), or (Y, X) where `dimension` is 2.

    `masked`: one entry a channel, whether its voxels outside the image content (label -1) are set to zero at the end.
    `flips`: the mirror images there are. A callable of your own does not see it: see `foreign.Transform`.
    `context`: slices that a 2D network sees, see `Configuration.context`.
    Raises AutosegError for a name that is neither in AUGMENTATIONS nor a callable's `package.module:name`, and for one
    that cannot change several slices alike.
    """
    patch, masked = tuple(patch), tuple(masked)
    if len(patch) != dimension or min(patch) < 1:
        raise ValueError(f"a patch of shape {patch} does not fit a {dimension}D configuration")
    if ":" not in name:
        check_augmentation(name)
    if context > 1 and name not in POLICIES:
        raise AutosegError(
            f"the augmentation {name} would change each of the {context} slices that the network sees in its own way; "
            "train with --set augmentation=default or none, or plan without --context"
        )
    if ":" in name:
        return foreign.ForeignAugmentation(
            name=name, transform=own(name, "augmentation"), box=patch, patch=patch, masked=masked
        )
    made = AUGMENTATIONS[name](patch, dimension, masked, flips)
    return replace(made, context=context) if isinstance(made, DefaultAugmentation) else made
