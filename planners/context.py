"""Neighbouring slices as further input channels of the 2D network, where they are asked for.

A 2D network of t slices (2.5D, a slab) labels the middle one. It is trained and predicts slice by slice as without
neighbours, on the same prepared cases; only its first convolution, which reads t times the channels, is another.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from autoseg.planners.grid import by
from autoseg.records import AutosegError
from autoseg.schema import MOST_CONTEXT, Configuration, Plan, Reason


def refuse_even(slices: int) -> None:
    """AutosegError for a number of slices without a middle, and for too many."""
    if slices % 2 == 0 or not 1 <= slices <= MOST_CONTEXT:
        raise AutosegError(
            f"--context {slices}: a network labels the middle one of its slices; give an odd number, at most "
            f"{MOST_CONTEXT}"
        )


def with_context(plan: Plan, slices: int, asked: Sequence[str] = ()) -> Plan:
    """`plan` with 2D networks that see so many slices, an odd number, and why. Pure: equal arguments give equal plans.

    asked: the configurations that are wanted at all; empty: every one. Raises AutosegError with the cure if no 2D
    configuration of 3D images is among them, for a number of slices without a middle, and for networks that are told of
    their slices themselves.
    """
    option = f"--context {slices}"
    refuse_even(slices)
    if plan.dimension == 2:
        raise AutosegError(
            f"{option}: the images of {plan.dataset} are 2D and have no neighbouring slices; leave it out"
        )
    planar = {configuration.name for configuration in plan.configurations if configuration.dimension == 2}
    if not planar:
        raise AutosegError(f"{option}: the plan has 3D configurations only, which see all slices anyway; leave it out")
    if asked and not planar & {*asked}:
        raise AutosegError(
            f"{option} is for {' and '.join(sorted(planar))}, and only {', '.join(asked)} is asked for; add "
            f"-c {min(planar)}, or leave out --context"
        )
    for configuration in plan.configurations:
        if "context" in configuration.network.options:
            name = configuration.network.name
            raise AutosegError(
                f"{option}: {name} is told itself how many slices it sees, since all of it grows with them; leave out "
                f"--context and ask for the network {name}(context={slices})"
            )
    made = tuple(replace(c, context=slices) if c.name in planar else c for c in plan.configurations)
    reasons = [_reason(plan, configuration) for configuration in made if configuration.name in planar]
    return replace(plan, configurations=made, reasons=(*plan.reasons, *reasons))


def _reason(plan: Plan, configuration: Configuration) -> Reason:
    channels, single = plan.in_channels(configuration), plan.in_channels(replace(configuration, context=1))
    more = (channels - single) * math.prod(configuration.patch)
    return Reason(
        decision=f"{configuration.name}: context",
        rule="as many slices as asked for, the middle one of which is labelled; those beyond the ends of an image are "
        "zero. Patch, batch and network stay: only the first convolution reads the neighbours, and what fills memory "
        "is what convolutions put out",
        inputs=f"--context {configuration.context}, patch {by(configuration.patch)}: {more:,} more numbers to read",
        outcome=f"{configuration.context} slices, {channels} input channels instead of {single}",
    )
