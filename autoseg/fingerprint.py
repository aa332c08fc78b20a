"""Dataset -> Fingerprint: shapes and spacings after the crop, intensities of the foreground, and on which side it lies.

Follows nnU-Net's fingerprint (Isensee et al., Nature Methods 2021). Every case gives the same number of intensity
samples, drawn with replacement, so that a case with much foreground does not outvote the others. 10 million
samples in all are taken: the standard error of a percentile is then far below what normalisation can feel.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autoseg.labels import Labels
from autoseg.preprocess import Cropped
from autoseg.records import AutosegError
from autoseg.schema import CaseFingerprint, ChannelStats, Dimension, Fingerprint
from autoseg.volume import canonical_grid

SAMPLES = 10_000_000
SEED = 1234


@dataclass(frozen=True, eq=False, kw_only=True)
class Measured:
    """What one case adds: its shape and spacing, and intensity samples float32 (C, n), n = 0 without foreground."""

    facts: CaseFingerprint
    samples: np.ndarray
    dimension: Dimension


def measure_case(
    cropped: Cropped, labels: Labels, content_hash: str, case_count: int, annotated: tuple[str, ...] | None = None
) -> Measured:
    """Measure one cropped case of a dataset of `case_count` cases. Ignored voxels are no foreground."""
    foreground = np.flatnonzero(labels.is_foreground(cropped.labels))
    channels = cropped.image.shape[0]
    if foreground.size:
        drawn = np.random.default_rng(SEED).choice(foreground, SAMPLES // case_count)
        samples = cropped.image.reshape(channels, -1)[:, drawn]
    else:
        samples = np.empty((channels, 0), np.float32)
    facts = CaseFingerprint(
        case=cropped.case,
        shape=cropped.labels.shape,
        spacing_mm=canonical_grid(cropped.stored).spacing_mm,
        crop_ratio=cropped.ratio,
        content_hash=content_hash,
        annotated=annotated,
        across=across(cropped.labels, foreground, labels),
        voxels=count_voxels(cropped.labels, labels),
    )
    return Measured(facts=facts, samples=samples, dimension=cropped.stored.dimension)


def across(indices: np.ndarray, foreground: np.ndarray, labels: Labels) -> dict[int, float]:
    """Class -> its centre of mass along the last axis of a label map (Z, Y, X), 0 to 1, to four digits.

    Only of classes that occur. `foreground`: flat positions of all voxels that have a class.
    """
    width = indices.shape[-1]
    found = indices.reshape(-1)[foreground]
    counts = np.bincount(found, minlength=len(labels.stored))
    sums = np.bincount(found, weights=foreground % width, minlength=len(labels.stored))
    return {
        index: round(float(sums[own].sum() / counts[own].sum() + 0.5) / width, 4)
        for index, own in enumerate(map(list, labels.members), start=1)
        if counts[own].any()
    }


def count_voxels(indices: np.ndarray, labels: Labels) -> dict[int, int]:
    """Index -> number of voxels of a label map that have it. Those outside the image content are background."""
    counts = np.bincount(indices.reshape(-1).clip(min=0), minlength=len(labels.known))[: len(labels.stored)]
    return {index: int(count) for index, count in enumerate(counts) if count}


def median_frequency_weights(fingerprint: Fingerprint, labels: Labels) -> tuple[float, ...] | None:
    """Weight of each class by median frequency, background first; None if the fingerprint has no counts of voxels.

    The frequency of a class (or region) is its share of the voxels of those cases in which it occurs; its weight is the
    median of all frequencies over its own (Eigen and Fergus, ICCV 2015). A class that never occurs has weight 1.
    """
    counts = [case.voxels for case in fingerprint.cases if case.voxels is not None]
    if len(counts) < len(fingerprint.cases):
        return None
    frequencies = []
    for members in ((0,), *labels.members):
        own = [sum(found.get(index, 0) for index in members) for found in counts]
        every = sum(sum(found.values()) for found, voxels in zip(counts, own) if voxels)
        frequencies.append(sum(own) / every if every else None)
    middle = float(np.median([frequency for frequency in frequencies if frequency is not None]))
    return tuple(1.0 if frequency is None else middle / frequency for frequency in frequencies)


def channel_stats(samples: np.ndarray) -> ChannelStats | None:
    """Statistics of one channel's samples (n,); None if there are none."""
    if not samples.size:
        return None
    low, median, high = np.percentile(samples, (0.5, 50, 99.5))
    return ChannelStats(
        mean=float(samples.mean(dtype=np.float64)),
        median=float(median),
        std=float(samples.std(dtype=np.float64)),
        minimum=float(samples.min()),
        maximum=float(samples.max()),
        percentile_00_5=float(low),
        percentile_99_5=float(high),
    )


def summarise(dataset: str, channel_names: Sequence[str], measured: Sequence[Measured]) -> Fingerprint:
    """Fingerprint of all measured cases, in the order given.

    Raises AutosegError if 2D and 3D images are mixed: no single plan fits both.
    """
    dimensions = {m.dimension for m in measured}
    if len(dimensions) != 1:
        flat = [m.facts.case for m in measured if m.dimension == 2]
        raise AutosegError(
            f"{dataset} mixes 2D and 3D images ({len(flat)} of {len(measured)} are 2D, {flat[0]} for one); "
            "make two datasets of them"
        )
    samples = np.concatenate([m.samples for m in measured], axis=1)
    return Fingerprint(
        dataset=dataset,
        dimension=dimensions.pop(),
        channel_names=tuple(channel_names),
        cases=tuple(m.facts for m in measured),
        intensities=tuple(channel_stats(channel) for channel in samples),
    )
