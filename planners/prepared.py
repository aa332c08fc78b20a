"""What the images are once a plan's own preparation is done with them: the planner plans for those.

It works on the fingerprint: the shapes of the cases after the crops, the channel that several were combined to. So
spacing rule, median image, patch, batch and the choice of configurations follow from what the networks will see.
"""

from dataclasses import replace

import numpy as np

from autoseg.crops import describe
from autoseg.planners.grid import by
from autoseg.records import AutosegError
from autoseg.schema import Fingerprint, Plan, Preparation, Reason

RSS = "rss"
"""What the one channel is called that several were combined to."""


def as_prepared(fingerprint: Fingerprint, preparation: Preparation) -> Fingerprint:
    """The fingerprint of the images as `preparation` leaves them; itself where that is nothing.

    Raises AutosegError that names a case of which the crops leave nothing, for 2D images that would get slices, and for
    channels that cannot be combined.
    """
    if preparation == Preparation():
        return fingerprint
    if preparation.combined:
        if not len(preparation.combined) == len(fingerprint.channel_names) > 1:
            raise AutosegError(
                f"{' and '.join(preparation.combined)} are to be combined, and the images of {fingerprint.dataset} "
                f"have the channels {', '.join(fingerprint.channel_names)}; plan without --combine or --like"
            )
        fingerprint = replace(fingerprint, channel_names=(RSS,), intensities=(None,))
    cases = []
    for case in fingerprint.cases:
        shape: tuple[int, ...] = case.shape
        for crop in preparation.crops:
            try:
                shape = crop.extent(shape)
            except AutosegError as error:
                raise AutosegError(f"case {case.case} of {fingerprint.dataset}: {error}; give smaller ones") from None
            if fingerprint.dimension == 2 and shape[0] != 1:
                raise AutosegError(f"{describe(crop)}: 2D images have one voxel along Z; give 0 as its first number")
        z, y, x = shape
        cases.append(replace(case, shape=(z, y, x)))
    return replace(fingerprint, cases=tuple(cases))


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
