"""A plan in words: what was decided, by which rule, from what."""

import textwrap

from autoseg.planners.edits import added, edited
from autoseg.planners.grid import by
from autoseg.planners.request import words
from autoseg.schema import Plan

WIDTH = 110


def explain(plan: Plan) -> str:
    """The plan as text for a person: a table of its configurations, then every decision with its reason."""
    memory = f", {plan.gpu_memory_gb:g} GB of GPU memory" if plan.gpu_memory_gb is not None else ""
    lines = [
        f"Plan {plan.name!r} for {plan.dataset}: preset {plan.preset}{memory}",
        *([f"Asked for: {asked}"] if (asked := words(plan.request)) else []),
        "",
        f"{'configuration':20}{'patch':18}{'batch':>6}  spacing (mm)",
    ]
    by_hand = dict.fromkeys(edited(plan), "  (edited)") | dict.fromkeys(added(plan), "  (added)")
    for configuration in plan.configurations:
        patch, spacing = by(configuration.patch), by(configuration.spacing_mm)
        mark = by_hand.get(configuration.name, "")
        slices = f"  (sees {configuration.context} slices)" if configuration.context > 1 else ""
        lines.append(f"{configuration.name:20}{patch:18}{configuration.batch_size:6}  {spacing}{slices}{mark}")
    if by_hand:
        lines += ["", f"By hand: {', '.join(sorted(by_hand))}; where a reason below says otherwise, plan.json holds"]
    for reason in plan.reasons:
        lines += ["", f"{reason.decision}: {reason.outcome}", *_indented("rule", reason.rule)]
        if reason.inputs:
            lines += _indented("from", reason.inputs)
    return "\n".join(lines) + "\n"


def _indented(title: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"  {title}: ", subsequent_indent=" " * (len(title) + 4))
