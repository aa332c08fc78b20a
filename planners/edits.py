"""What people changed in plan.json by hand, and how it outlives a new plan; and how two plans differ.

A plan keeps a hash of each configuration as the planner (and --set) made it. A configuration that no longer has that
hash was edited, one without a hash was added; both stay when the dataset is planned again, unless told otherwise. So
do the schemes of the normalisation. An edit of anything else cannot outlive a new plan, which is then refused.

The planner gives its reasons before --set and edits change anything; `overruled` makes them say so.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from pydantic import TypeAdapter

from autoseg.records import AutosegError, hash_text
from autoseg.schema import ChannelNorm, Configuration, Plan, Reason, Request
from autoseg.settings import fields

CHANNELS = "channels"
"""Key of the normalisation among the hashes."""
REST = "plan"
"""Key of everything else."""
NAMES = ("2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres")
"""What planners call their configurations; all else in a plan without hashes was added by hand."""

DECISIONS = {
    "patch": ("{}: patch", "{}"),
    "batch_size": ("{}: batch size", "{}"),
    "network": ("{}: network", "{}"),
    "spacing_mm": ("{}", "target spacing"),
    "mirror_axes": ("{}: mirror images",),
    "batch_dice": ("batch Dice",),
    "axis_order": ("axis order",),
    "mirroring": ("left and right",),
}
"""Field of a configuration, or of the plan -> the decisions that give it, the first that has a reason; {} is the
configuration. Any other field is a decision of its own."""

Row = tuple[str, str, str]
"""Field, value in one plan, value in the other; "-" where there is none."""


def stamp(value: Configuration | Plan | tuple[ChannelNorm, ...]) -> str:
    """Hash of what is said in it; what equals its default is left out, so that fields added later change nothing."""
    kind: Any = tuple[ChannelNorm, ...] if isinstance(value, tuple) else type(value)
    return hash_text(TypeAdapter(kind).dump_json(value, exclude_defaults=True).decode())


def schemes(channels: tuple[ChannelNorm, ...]) -> tuple[ChannelNorm, ...]:
    """The part of the normalisation that people choose: without the statistics, which are measured."""
    return tuple(replace(channel, stats=None) for channel in channels)


def rest(plan: Plan) -> Plan:
    """The plan without what has hashes of its own, and without what says nothing: of the channels, the statistics."""
    measured = tuple(replace(channel, scheme="none", masked=False, outliers=None) for channel in plan.channels)
    return replace(_bare(plan), channels=measured)


def stamped(plan: Plan, fresh: Plan, kept: Collection[str] = ()) -> Plan:
    """`plan` with the hashes of what it holds; of what `fresh` holds for the names `kept` from an earlier plan.

    So what was kept counts as edited for ever, and what --set changed does not.
    """
    hashes = {c.name: stamp(c) for c in plan.configurations if c.name not in kept}
    hashes |= {c.name: stamp(c) for c in fresh.configurations if c.name in kept}
    hashes[CHANNELS] = stamp(schemes(fresh.channels if CHANNELS in kept else plan.channels))
    return replace(plan, planned=hashes | {REST: stamp(rest(plan))})


def edited(plan: Plan) -> set[str]:
    """Names of the configurations that are not as they were planned; CHANNELS, REST where the other parts are not."""
    now = {c.name: stamp(c) for c in plan.configurations}
    now |= {CHANNELS: stamp(schemes(plan.channels)), REST: stamp(rest(plan))}
    return {name for name, planned in plan.planned.items() if name in now and now[name] != planned}


def added(plan: Plan) -> set[str]:
    """Names of the configurations that no planner made."""
    planned = plan.planned or dict.fromkeys(NAMES)
    return {c.name for c in plan.configurations if c.name not in planned}


def keep_edits(old: Plan, fresh: Plan) -> tuple[Plan, dict[str, str]]:
    """The `fresh` plan with what was edited in or added to `old`, and name -> a line about each thing kept.

    Raises AutosegError if an edit cannot be kept: one of another part of the plan, or for axes that run otherwise.
    """
    changed, own = edited(old), added(old)
    if REST in changed:
        fields_now = ", ".join(field for field, *_ in differing(rest(old), rest(fresh))) or "nothing"
        raise AutosegError(
            f"the plan {old.name!r} was edited outside its configurations and schemes, and a new plan cannot keep that "
            f"(the new one differs in: {fields_now}); give the change as --set FIELD=VALUE with --discard-edits, or "
            "make another plan with --plan NAME"
        )
    mine = {c.name: c for c in old.configurations}
    made = {c.name: c for c in fresh.configurations}
    names = [name for name in mine if name in changed | own]
    axes = [(plan.orientation, plan.axis_order, plan.dimension) for plan in (old, fresh)]
    if names and axes[0] != axes[1]:
        raise AutosegError(
            f"the new plan has its axes as {axes[1]}, but {', '.join(names)} of the plan {old.name!r} was edited for "
            f"{axes[0]}; give --discard-edits, or make a new plan with --plan NAME"
        )
    for name in names:
        # What a kept configuration reads from must stay as well.
        for needed in (mine[name].prepared, mine[name].previous_stage):
            if needed in mine and needed not in made and needed not in names:
                names.append(needed)
    kept = {name: _said(mine[name], made.get(name), name in own) for name in names}
    configurations = [mine[c.name] if c.name in kept else c for c in fresh.configurations]
    configurations += [mine[name] for name in names if name not in made]
    channels = fresh.channels
    if CHANNELS in changed:
        before = {channel.channel: channel for channel in old.channels}
        channels = tuple(
            replace(before[c.channel], stats=c.stats) if c.channel in before else c for c in fresh.channels
        )
        kept[CHANNELS] = f"normalisation: kept as edited: {', '.join(f'{c.channel} {c.scheme}' for c in channels)}"
    return replace(fresh, configurations=tuple(configurations), channels=channels), kept


def _said(mine: Configuration, made: Configuration | None, own: bool) -> str:
    """A line about a configuration that is kept."""
    if made is None:
        return f"{mine.name}: kept, {'added by hand' if own else 'the planner would not make it any more'}"
    rows = [f"{field} {value} (planned: {planned})" for field, value, planned in differing(mine, made)]
    return f"{mine.name}: kept as edited: {', '.join(rows) or 'equal to what is planned now'}"


def overruled(plan: Plan, ruled: Plan) -> Plan:
    """`plan` with the reasons of `ruled`, which say what was asked for instead where the two differ.

    ruled: the same plan as its rules give it, before --set and edits. What was added by hand has no reason.
    """
    known = {reason.decision for reason in ruled.reasons}
    instead: dict[str, list[tuple[str, str]]] = {}

    def note(name: str, rows: Sequence[Row]) -> None:
        for field, now, given in rows:
            part, _, inner = field.partition(".")
            places = [place.format(name) for place in DECISIONS.get(part, (f"{name}: {part}" if name else part,))]
            decision = next((place for place in places if place in known), places[0])
            called = inner if decision.startswith(f"{name}: ") else field if decision == name else f"{name} {field}"
            instead.setdefault(decision, []).append((f"{called} {now}".strip(), f"{called} {given}".strip()))

    by_rule = {configuration.name: configuration for configuration in ruled.configurations}
    for configuration in plan.configurations:
        if configuration.name in by_rule:
            note(configuration.name, differing(configuration, by_rule[configuration.name]))
    for channel, norm in zip(plan.channels, ruled.channels):
        if rows := differing(channel, norm):
            decision = f"normalisation of {channel.channel}"
            instead[decision] = [(f"{field} {now}", f"{field} {given}") for field, now, given in rows]
    note("", differing(_bare(plan), _bare(ruled)))

    def said(reason: Reason) -> Reason:
        if reason.decision not in instead:
            return reason
        now = ", ".join(value for value, _ in instead[reason.decision])
        rule = f"--set or an edit of plan.json, on which no other decision rests; without it: {reason.rule}"
        return replace(reason, rule=rule, outcome=f"{now}, as asked for; the rule gives {reason.outcome}")

    unsaid = (
        Reason(decision=decision, rule="as planned", inputs="", outcome=", ".join(given for _, given in rows))
        for decision, rows in instead.items()
        if decision not in known
    )
    return replace(plan, reasons=tuple(map(said, (*ruled.reasons, *unsaid))))


def differing(first: Any, second: Any) -> list[Row]:
    """The fields in which two records differ, with both values as people write them."""
    left, right = dict(fields(first)), dict(fields(second))
    return [
        (name, left.get(name, "-"), right.get(name, "-"))
        for name in (*left, *(name for name in right if name not in left))
        if left.get(name) != right.get(name)
    ]


def difference(first: Plan, second: Plan) -> list[Row]:
    """The fields in which two plans differ; a configuration or channel that only one has is one row."""
    rows = differing(*(_bare(plan) for plan in (first, second)))
    for kind in ("configurations", "channels"):
        left, right = ({getattr(e, "name", None) or e.channel for e in getattr(p, kind)} for p in (first, second))
        for name in sorted(left ^ right):
            here = ("there", "-") if name in left else ("-", "there")
            rows.append((f"{kind}.{name}", *here))
    pairs = {c.name: c for c in second.configurations}
    for configuration in first.configurations:
        if configuration.name in pairs:
            found = differing(configuration, pairs[configuration.name])
            rows += [(f"{configuration.name}.{field}", *values) for field, *values in found]  # type: ignore[misc]
    norms = {c.channel: c for c in second.channels}
    for channel in first.channels:
        if channel.channel in norms:
            rows += [(f"{channel.channel}.{field}", *v) for field, *v in differing(channel, norms[channel.channel])]  # type: ignore[misc]
    return rows


def _bare(plan: Plan) -> Plan:
    """The plan without what is compared by name, and without what says nothing about training."""
    return replace(plan, name="", configurations=(), channels=(), reasons=(), planned={}, request=Request())
