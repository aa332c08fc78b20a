"""The default planner: from fingerprint and rules to a plan, with a reason for every decision.

Configurations: `2d` always; `3d_fullres` for 3D images; `3d_lowres` and `3d_cascade_fullres` where the full-resolution
patch sees too little of an image. Source: nnU-Net (Isensee et al., Nature Methods 2021).
"""

import math
import re
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np

from autoseg.labels import Labels
from autoseg.needs import NetworkNeeds
from autoseg.planners.asked import fit_asked
from autoseg.planners.fit import fit
from autoseg.planners.grid import Triple, axis_order, by, median_shape, target_spacing
from autoseg.planners.rules import Rules
from autoseg.planners.sides import mirroring
from autoseg.records import AutosegError
from autoseg.schema import ChannelNorm, Configuration, Fingerprint, Plan, Reason

MEMORY_RANGE_GB = (2.0, 80.0)

Fitted = Callable[[str, tuple[float, ...], tuple[float, ...], float], tuple[Configuration, tuple[Reason, ...]]]
"""`fit` or `fit_asked` for the memory and rules at hand: name, spacing, median shape, voxels of the dataset."""

Scheme = Literal["zscore", "ct", "none", "rescale", "rgb"]

SCHEMES: dict[str, Scheme] = {
    "ct": "ct",
    "nonorm": "none",
    "zscore": "zscore",
    "rescale_to_0_1": "rescale",
    "rgb_to_0_1": "rgb",
}
"""Normalisation by channel name in lower case; every other name is z-score."""
NEARLY_CT = re.compile(r"(?<![a-z0-9])(cb)?ct(?![a-z])|hounsfield")
"""In names in lower case that people give to CT, and that mean z-score as they stand."""


def plan(
    fingerprint: Fingerprint,
    labels: Labels,
    rules: Rules,
    *,
    gpu_memory_gb: float | None = None,
    spacing_mm: Triple | None = None,
    name: str = "default",
    needs: NetworkNeeds | None = None,
) -> Plan:
    """Plan every configuration of a dataset. Pure: equal arguments give equal plans.

    `gpu_memory_gb` (2 to 80) is the memory that a training step may fill, by default what the preset is made for.
    `spacing_mm` (Z, Y, X in canonical order) replaces the target spacing; its first entry is not used in 2D.
    `needs`: of the network to plan for, in place of the preset's.
    Raises AutosegError for a request that cannot be planned.
    """
    memory_gb = rules.reference_gb if gpu_memory_gb is None else gpu_memory_gb
    refuse_memory(memory_gb)
    if not fingerprint.cases:
        raise AutosegError(f"the fingerprint of {fingerprint.dataset} has no cases; take it again")

    target, spacing_reason = target_spacing(fingerprint, rules, spacing_mm)
    order, order_reason = axis_order(fingerprint, target)
    channels, channel_reasons = _normalisation(fingerprint, rules)
    mirrored, mirror_reasons = mirroring(fingerprint, labels, order)

    spacing: Triple = (target[order[0]], target[order[1]], target[order[2]])
    shape = median_shape(fingerprint, target)
    median: Triple = (shape[order[0]], shape[order[1]], shape[order[2]])

    fitted: Fitted
    if needs is None:
        fitted = partial(fit, heads=labels.heads, gpu_memory_gb=memory_gb, rules=rules)
    else:
        fitted = partial(fit_asked, needs=needs, gpu_memory_gb=memory_gb, rules=rules)
    dimensions = (2, 3) if needs is None else needs.dimensions
    if dimensions == (3,) and median[0] == 1:
        raise AutosegError(f"{needs.name if needs else ''} is a 3D network, and the images are slices; choose another")
    if needs and needs.spec and median[0] == 1 and 2 in dimensions and needs.spec(2).slices > 1:
        raise AutosegError(f"{needs.name} sees neighbouring slices, and the images have a single one; choose another")
    configurations, reasons = _configurations(spacing, median, len(fingerprint.cases), fitted, rules, dimensions)
    return Plan(
        name=name,
        dataset=fingerprint.dataset,
        preset=rules.name,
        network=None if needs is None else needs.name,
        gpu_memory_gb=memory_gb,
        dimension=fingerprint.dimension,
        axis_order=order,
        channels=channels,
        labels=labels,
        mirroring=mirrored,
        configurations=configurations,
        reasons=(*_labels(labels), spacing_reason, order_reason, *channel_reasons, *mirror_reasons, *reasons),
    )


def refuse_memory(gigabytes: float) -> None:
    """AutosegError for GPU memory that no plan is made for."""
    low, high = MEMORY_RANGE_GB
    if not low <= gigabytes <= high:
        raise AutosegError(f"plans are made for {low:g} to {high:g} GB of GPU memory, not {gigabytes:g}")


def _labels(labels: Labels) -> tuple[Reason, ...]:
    """What regions, merged labels and the ignored value mean for the network and what it writes; else nothing."""
    rule = "regions have a sigmoid each and are written as regions_class_order says, else larger ones first"
    if labels.merges:
        rule = (
            "labels that --merge names are one class in training, scores and prediction; their files stay as they are"
        )
    return tuple(
        Reason(
            decision="labels",
            rule=f"{rule}; ignored voxels take part in nothing",
            inputs=", ".join(f"{name} {value}" for name, value in labels.scored.items()),
            outcome=remark,
        )
        for remark in labels.remarks()
    )


def _normalisation(fingerprint: Fingerprint, rules: Rules) -> tuple[tuple[ChannelNorm, ...], tuple[Reason, ...]]:
    """How each channel is normalised, and why."""
    crop_ratio = float(np.median([case.crop_ratio for case in fingerprint.cases]))
    channels, reasons = [], []
    for channel, stats in zip(fingerprint.channel_names, fingerprint.intensities, strict=True):
        scheme = SCHEMES.get(channel.lower(), "zscore")
        if scheme == "ct" and stats is None:
            raise AutosegError(
                f"channel {channel!r} of {fingerprint.dataset} is normalised by its foreground intensities, but no "
                "case has foreground; check the label files, or name the channel 'zscore' in dataset.json"
            )
        masked = scheme == "zscore" and crop_ratio < rules.masked_below
        outcome = f"{scheme}, inside the non-zero region only" if masked else scheme
        if channel.lower() not in SCHEMES and NEARLY_CT.search(channel.lower()):
            outcome += "; if its values are Hounsfield units, call it 'CT' in dataset.json"
        channels.append(ChannelNorm(channel=channel, scheme=scheme, masked=masked, stats=stats))
        reasons.append(
            Reason(
                decision=f"normalisation of {channel}",
                rule=f"by the channel's name ({', '.join(SCHEMES)}, else zscore); zscore inside the non-zero region "
                f"only where cropping leaves less than {rules.masked_below:.0%} of an image",
                inputs=f"channel {channel!r}, cropping leaves {crop_ratio:.0%} (median)",
                outcome=outcome,
            )
        )
    return tuple(channels), tuple(reasons)


def _configurations(
    spacing: Triple, median: Triple, cases: int, fitted: Fitted, rules: Rules, dimensions: Collection[int]
) -> tuple[tuple[Configuration, ...], tuple[Reason, ...]]:
    """Every configuration worth training; `spacing` (mm) and `median` (voxels) are full resolution, in plan order.

    dimensions: those that the network has.
    """
    voxels = math.prod(median) * cases
    planar: tuple[Configuration, ...] = ()
    reasons: tuple[Reason, ...] = ()
    if 2 in dimensions:
        flat, reasons = fitted("2d", spacing[1:], median[1:], voxels)
        planar = (replace(flat, batch_dice=True),)
    if median[0] == 1 or 3 not in dimensions:
        none = Reason(
            decision="3d_fullres",
            rule="3D networks need more than one slice" if 3 in dimensions else "the network is a 2D network",
            inputs=f"median image {by(median)} voxels",
            outcome="no 3D configuration",
        )
        return planar, (*reasons, none, _batch_dice(planar))

    full, full_reasons = fitted("3d_fullres", spacing, median, voxels)
    low, low_reasons = _lowres(full, cases, fitted, rules)
    configurations = [*planar, full]
    if low is not None:
        full = replace(full, batch_dice=True)
        cascade = replace(full, name="3d_cascade_fullres", previous_stage=low.name)
        configurations = [*planar, full, low, cascade]
        low_reasons += (
            Reason(
                decision="3d_cascade_fullres",
                rule="with a low-resolution configuration, a second network refines its prediction at full resolution",
                inputs=f"predictions of {low.name}, prepared cases of {full.name}",
                outcome=f"as {full.name}, with the predicted classes as extra inputs",
            ),
        )
    chosen = tuple(configurations)
    return chosen, (*reasons, *full_reasons, *low_reasons, _batch_dice(chosen))


def _lowres(
    full: Configuration, cases: int, fitted: Fitted, rules: Rules
) -> tuple[Configuration | None, tuple[Reason, ...]]:
    """The low-resolution configuration, or None where `full` sees enough of an image or little would be gained."""
    spacing, voxels = full.spacing_mm, math.prod(full.median_shape)
    covered = math.prod(full.patch) / voxels
    low: Configuration | None = None
    reasons: tuple[Reason, ...] = ()
    while math.prod((low or full).patch) / voxels < rules.lowres_below:
        coarsest = max(spacing)
        finer = [coarsest / s > 2 for s in spacing]
        # Axes finer than half of the coarsest catch up first; then all grow together.
        spacing = tuple(s * rules.lowres_step if grow or not any(finer) else s for s, grow in zip(spacing, finer))
        shape = tuple(old / new * edge for old, new, edge in zip(full.spacing_mm, spacing, full.median_shape))
        voxels = math.prod(shape)
        low, reasons = fitted("3d_lowres", spacing, tuple(max(1.0, round(edge)) for edge in shape), voxels * cases)

    rule = (
        f"where a patch of {full.name} covers less than {rules.lowres_below:.0%} of the median image, images are made "
        f"coarser until it does, if that leaves at most 1/{rules.lowres_gain:g} of the voxels"
    )
    inputs = f"patch {by(full.patch)}, median image {by(full.median_shape)} voxels: {covered:.0%}"
    if low is None:
        outcome = "not needed"
    elif math.prod(full.median_shape) / voxels < rules.lowres_gain:
        outcome = f"not worth it: {by(low.spacing_mm)} mm would do, hardly coarser than {full.name}"
        low, reasons = None, ()
    else:
        outcome = f"{by(low.spacing_mm)} mm, median image {by(low.median_shape)} voxels"
    return low, (Reason(decision="3d_lowres", rule=rule, inputs=inputs, outcome=outcome), *reasons)


def _batch_dice(configurations: tuple[Configuration, ...]) -> Reason:
    pooled = [configuration.name for configuration in configurations if configuration.batch_dice]
    return Reason(
        decision="batch Dice",
        rule="Dice is pooled over the batch where a patch sees a small part of an image: in 2D, and at full resolution "
        "where a low-resolution configuration exists",
        inputs=f"configurations {', '.join(configuration.name for configuration in configurations)}",
        outcome=f"pooled in {', '.join(pooled) or 'none of them'}",
    )
