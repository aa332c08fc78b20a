"""What the search has tried, as a table for people; and the Dice before and after."""

from collections.abc import Sequence

from autoseg.labels import Labels
from autoseg.postprocess.steps import PostProcessing, Step

MOST_REFUSED = 10
"""Refused steps that the table shows, those of the largest gain; all of them are stored."""


def trials(rule: PostProcessing, labels: Labels) -> str:
    """The steps that were tried: mean Dice, gain, what it is at least, and whether it is kept; the honest Dice in all.

    Empty for rules that come without these numbers. What changes no case is only counted.
    """
    tried = [step for step in rule.rejected if step.verdict]
    if not tried and not any(step.level for step in rule.steps):
        return ""
    shown = sorted((step for step in tried if step.verdict != "changes nothing"), key=_order)
    rows = [["step", "mean Dice", "gain", "at least", "verdict"]]
    for step in (*rule.steps, *shown[:MOST_REFUSED]):
        both = f"{_number(step.dice_before)} to {_number(step.dice_after)}"
        # The bound leaves so much to chance: 5 %, less for what was searched.
        bound = "" if step.bound is None or step.level is None else f"{step.bound:+.5f} ({1 - step.level:.2%})"
        rows.append([step.describe(labels), both, _gain(step), bound, step.verdict or "kept"])
    lines = _aligned(rows) if len(rows) > 1 else []
    counts = [
        (len(shown) - MOST_REFUSED, "were refused with less gain"),
        (len(tried) - len(shown), "change nothing in any case"),
    ]
    lines += [f"{count} other steps {what}" for count, what in counts if count > 0]
    if rule.dice_crossfitted:
        honest = (f"{name} {_number(dice)}" for name, dice in zip(labels.names[1:], rule.dice_crossfitted))
        lines.append(
            f"cross-fitted Dice (each fifth of the cases by what is chosen on the others): {', '.join(honest)}"
        )
    return "\n".join(lines)


def before_and_after(rule: PostProcessing, labels: Labels) -> str:
    """Mean Dice of each class as predicted, processed, and cross-fitted, with a sentence on what these mean."""
    columns: list[tuple[str, Sequence[float | None]]] = [
        ("as predicted", rule.dice),
        ("processed", rule.dice_processed),
    ]
    if rule.dice_crossfitted:
        columns.append(("cross-fitted", rule.dice_crossfitted))
    rows = [["class", *(title for title, _ in columns)]]
    for number, name in enumerate(labels.names[1:]):
        rows.append([name, *(_number(values[number]) for _, values in columns)])
    if len(rows) > 2:
        defined = [[value for value in values if value is not None] for _, values in columns]
        rows.append(["mean of classes", *(_number(sum(v) / len(v) if v else None) for v in defined)])
    lines = [*_aligned(rows), f"mean Dice of {rule.cases} cases"]
    if rule.steps:
        lines.append(
            "`processed` is measured on the cases that the steps were chosen on, so it flatters them"
            + (
                "; `cross-fitted` is honest: each fifth of the cases is processed by what is chosen on the others"
                if rule.dice_crossfitted
                else ", and the cases are too few to do otherwise"
            )
        )
    return "\n".join(lines)


def _order(step: Step) -> float:
    known = step.dice_after is not None and step.dice_before is not None
    return step.dice_before - step.dice_after if known else 1.0  # type: ignore[operator]


def _gain(step: Step) -> str:
    if step.dice_before is None or step.dice_after is None:
        return ""
    return f"{step.dice_after - step.dice_before:+.5f}"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
