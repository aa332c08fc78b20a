"""A plan taken over from another model, for fine-tuning: its network then meets images prepared as it knows them."""

from dataclasses import replace

from autoseg.labels import Labels
from autoseg.planners.grid import by, median_shape
from autoseg.planners.sides import mirroring
from autoseg.records import AutosegError
from autoseg.schema import Configuration, Fingerprint, Plan, Reason


def plan_like(source: Plan, fingerprint: Fingerprint, labels: Labels, own: Plan, origin: str) -> Plan:
    """The plan `source` for the data of `fingerprint`, with their labels. Pure: equal arguments give equal plans.

    Spacing, axis order, patch, batch and network stay as they are, and so does the normalisation of every channel
    that `source` knows by name, with the statistics of its data. Channels that it does not know are normalised as in
    `own`, the plan that the data would have had. Left and right are those of the new labels. origin: where
    `source` comes from, for the reasons.

    Raises AutosegError if one is made for 2D and the other for 3D images.
    """
    if source.dimension != fingerprint.dimension:
        raise AutosegError(
            f"the plan of {origin} is for {source.dimension}D images, and those of {fingerprint.dataset} are "
            f"{fingerprint.dimension}D; plan without --like"
        )
    there = {channel.channel: channel for channel in source.channels}
    rule = f"as in {origin}, made for {source.dataset} (--like)"
    reasons = [
        Reason(
            decision=configuration.name,
            rule=rule,
            inputs="",
            outcome=f"spacing {by(configuration.spacing_mm)} mm, patch {by(configuration.patch)}, batch "
            f"{configuration.batch_size}, network {configuration.network.name}",
        )
        for configuration in source.configurations
    ]
    for channel in own.channels:
        taken = there.get(channel.channel)
        reasons.append(
            Reason(
                decision=f"normalisation of {channel.channel}",
                rule=rule if taken else f"{origin} does not know this channel, so it is normalised as these data ask",
                inputs="",
                outcome=f"{taken.scheme}, with the statistics of {source.dataset}" if taken else channel.scheme,
            )
        )
    mirrored, mirror_reasons = mirroring(fingerprint, labels, source.axis_order, source.orientation)
    return replace(
        source,
        name=own.name,
        dataset=own.dataset,
        labels=labels,
        mirroring=mirrored,
        channels=tuple(there.get(channel.channel, channel) for channel in own.channels),
        configurations=tuple(
            replace(configuration, median_shape=_median(configuration, source, fingerprint))
            for configuration in source.configurations
        ),
        reasons=(*reasons, *mirror_reasons),
    )


def _median(configuration: Configuration, source: Plan, fingerprint: Fingerprint) -> tuple[float, ...]:
    """Median shape of the new images at the configuration's spacing, in plan order; without the first axis in 2D."""
    spacing = [1.0] * (3 - configuration.dimension) + [*configuration.spacing_mm]
    z, y, x = (spacing[source.axis_order.index(axis)] for axis in range(3))
    shape = median_shape(fingerprint, (z, y, x))
    return tuple(shape[axis] for axis in source.axis_order)[3 - configuration.dimension :]
