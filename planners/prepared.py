"""What the images are once a plan's own preparation is done with them: the planner plans for those.

It works on the fingerprint: shapes and spacing of the cases once slices are thicker, their shapes after the crops, the
channel that several were combined to. So
spacing rule, median image, patch, batch and the choice of configurations follow from what the networks will see.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from autoseg.crops import describe
from autoseg.planners.default import SCHEMES
from autoseg.planners.grid import by
from autoseg.records import AutosegError
from autoseg.schema import Fingerprint, Plan, Preparation, Reason

RSS = "rss"
"""What the one channel is called that several were combined to."""

CLEARLY = 1.01
"""By so much the distance between slices is larger than any other spacing, or it is not known which they are."""


def as_prepared(fingerprint: Fingerprint, preparation: Preparation) -> Fingerprint:
    """The fingerprint of the images as `preparation` leaves them; itself where that is nothing.

    Raises AutosegError that names a case of which the crops leave nothing, for 2D images that would get slices, and for
    channels or slices that cannot be combined.
    """
    if preparation == Preparation():
        return fingerprint
    if preparation.combined:
        if preparation.combined == fingerprint.channel_names and len(preparation.combined) == 1:
            raise AutosegError(
                f"the images of {fingerprint.dataset} have one channel, {fingerprint.channel_names[0]}, and there is "
                "nothing to combine it with; plan without --combine"
            )
        if len(preparation.combined) != len(fingerprint.channel_names):
            raise AutosegError(
                f"{' and '.join(preparation.combined)} are to be combined, and the images of {fingerprint.dataset} "
                f"have the channels {', '.join(fingerprint.channel_names)}; plan without --combine or --like"
            )
        fingerprint = replace(fingerprint, channel_names=(RSS,), intensities=(None,))
    if preparation.thin != Preparation().thin:
        refuse_thinning(fingerprint, preparation.thin)
        # Statistics of the foreground are those of single slices.
        fingerprint = replace(fingerprint, intensities=(None,) * len(fingerprint.channel_names))
    cases = []
    for case in fingerprint.cases:
        a, b, c = (mm * factor for mm, factor in zip(case.spacing_mm, preparation.thin))
        shape: tuple[int, ...] = tuple(-(-n // factor) for n, factor in zip(case.shape, preparation.thin))
        for crop in preparation.crops:
            try:
                shape = crop.extent(shape)
            except AutosegError as error:
                raise AutosegError(f"case {case.case} of {fingerprint.dataset}: {error}; give smaller ones") from None
            if fingerprint.dimension == 2 and shape[0] != 1:
                raise AutosegError(f"{describe(crop)}: 2D images have one voxel along Z; give 0 as its first number")
        z, y, x = shape
        cases.append(replace(case, shape=(z, y, x), spacing_mm=(a, b, c)))
    return replace(fingerprint, cases=tuple(cases))


def thinning(asked: Sequence[int], fingerprint: Fingerprint) -> tuple[int, int, int]:
    """How many voxels along each axis (Z, Y, X) become one: as asked for each, or for slices, which lie furthest apart.

    Raises AutosegError where no axis has clearly the largest spacing.
    """
    if len(asked) == 3:
        return asked[0], asked[1], asked[2]
    spacing = np.median([case.spacing_mm for case in fingerprint.cases], axis=0).tolist()
    if max(spacing) < CLEARLY * sorted(spacing)[1]:
        raise AutosegError(
            f"--thin {asked[0]}: voxels are {by(spacing)} mm (Z, Y, X; median), so it is not clear which way slices "
            f"lie; give a number for each axis, for example --thin 1,1,{asked[0]}"
        )
    z, y, x = (asked[0] if mm == max(spacing) else 1 for mm in spacing)
    return z, y, x


def refuse_thinning(fingerprint: Fingerprint, thin: Sequence[int]) -> None:
    """AutosegError for images that have no slices, or would have a single one, and for values without a magnitude."""
    if fingerprint.dimension == 2:
        raise AutosegError(f"--thin: the images of {fingerprint.dataset} are 2D and have no slices")
    largest = tuple(max(edges) for edges in zip(*(case.shape for case in fingerprint.cases)))
    if any(1 < edge <= factor for edge, factor in zip(largest, thin)):
        raise AutosegError(
            f"--thin {','.join(map(str, thin))}: images have at most {by(largest)} voxels (Z, Y, X), of which one "
            "would be left along an axis; give smaller numbers"
        )
    for channel in fingerprint.channel_names:
        if (scheme := SCHEMES.get(channel.lower())) in ("ct", "rgb"):
            raise AutosegError(
                f"--thin: the values of channel {channel} have a scale of their own ({scheme}), which the root of the "
                "sum of squares of slices does not keep; it is for magnitudes, such as MR"
            )


def with_preparation(plan: Plan, preparation: Preparation, fingerprint: Fingerprint) -> Plan:
    """`plan`, made for the fingerprint `as_prepared`, with what it was made for, and why; the plan itself if nothing.

    fingerprint: as measured.
    """
    if preparation == Preparation():
        return plan
    reasons = []
    if preparation.combined:
        reasons.append(
            Reason(
                decision="channels",
                rule="as asked for, the root of the sum of their squares is the one channel that networks read",
                inputs=f"--combine {RSS}",
                outcome=f"{RSS} of {', '.join(preparation.combined)}",
            )
        )
    if preparation.thin != Preparation().thin:
        factors = by(preparation.thin)
        reasons.append(
            Reason(
                decision="slices",
                rule="as asked for, so many neighbouring voxels along each axis become one, of the root of the sum of "
                "their squares; of several classes in them the later wins; predictions label all voxels of each",
                inputs=f"--thin {','.join(map(str, preparation.thin))}",
                outcome=f"{factors} voxels (Z, Y, X of the files) become one",
            )
        )
    if preparation.crops:
        before, after = (
            by(tuple(np.median([case.shape for case in facts.cases], axis=0).tolist()))
            for facts in (fingerprint, as_prepared(fingerprint, preparation))
        )
        reasons.append(
            Reason(
                decision="crops",
                rule="as asked for, each from what the one before left; spacing, patch and batch are planned for what "
                "they leave, and predictions are background outside of it",
                inputs=f"median image {before} voxels after the crop to content (Z, Y, X of the files)",
                outcome=f"{', then '.join(map(describe, preparation.crops))}: median image {after} voxels",
            )
        )
    return replace(plan, preparation=preparation, reasons=(*reasons, *plan.reasons))
