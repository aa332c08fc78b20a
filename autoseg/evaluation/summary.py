"""Scores of many cases put together: means per class, what was undefined and why, as JSON, CSV and a table.

An undefined value never enters a mean as a number: it is left out and counted beside it. A class that no case defines
has no mean and is left out of the foreground mean in turn, so one absent class cannot spoil the whole. Distances are
undefined where a class was missed altogether, which flatters their means; the table says how often that happened.
"""

import csv
import dataclasses
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path

from autoseg.evaluation.metrics import (
    BOTH_EMPTY,
    METRICS,
    PREDICTION_EMPTY,
    TRUTH_EMPTY,
    CaseScore,
    Values,
)
from autoseg.records import SCHEMA_VERSION, atomic_write, record, save_json

WORST_SHOWN = 5


@record
class Mean:
    """Mean and sample standard deviation of the `count` values that are defined; `undefined` more are not."""

    mean: float | None
    std: float | None
    """None below two values."""
    count: int
    undefined: int


@record
class ClassSummary:
    """One class over all cases: a Mean for each name of METRICS, and in how many cases which mask was empty."""

    label: str
    means: dict[str, Mean]
    truth_empty: int
    """The class was predicted where there is none."""
    prediction_empty: int
    """The class was missed altogether."""
    both_empty: int


@record
class Summary:
    """Everything that `evaluate` found; written as summary.json."""

    schema_version: int = SCHEMA_VERSION
    tolerance_mm: float
    """Of the surface Dice."""
    labels: dict[str, int | tuple[int, ...]]
    """Foreground classes, name -> value, or the values of a region."""
    foreground: dict[str, Mean]
    """The mean over classes of the class means; here `count` and `undefined` count classes."""
    classes: tuple[ClassSummary, ...]
    scores: tuple[CaseScore, ...]
    """Case after case, and within a case in the order of `labels`; classes that were not annotated are missing."""


def mean_of(values: Iterable[float | None]) -> Mean:
    """The Mean of `values`, None standing for undefined."""
    values = list(values)
    defined = [value for value in values if value is not None]
    return Mean(
        mean=statistics.fmean(defined) if defined else None,
        std=statistics.stdev(defined) if len(defined) > 1 else None,
        count=len(defined),
        undefined=len(values) - len(defined),
    )


def summarise(scores: Iterable[CaseScore], labels: Mapping[str, Values], tolerance_mm: float) -> Summary:
    """Put the scores of all cases together; `labels` are as for `score_case`, a "background" is left out."""
    scores = tuple(scores)
    classes = []
    for label in (name for name in labels if name != "background"):
        own = [score for score in scores if score.label == label]
        reasons = [score.undefined for score in own]
        classes.append(
            ClassSummary(
                label=label,
                means={metric: mean_of(getattr(score, metric) for score in own) for metric in METRICS},
                truth_empty=reasons.count(TRUTH_EMPTY),
                prediction_empty=reasons.count(PREDICTION_EMPTY),
                both_empty=reasons.count(BOTH_EMPTY),
            )
        )
    return Summary(
        tolerance_mm=tolerance_mm,
        labels={name: value for name, value in labels.items() if name != "background"},
        foreground={metric: mean_of(entry.means[metric].mean for entry in classes) for metric in METRICS},
        classes=tuple(classes),
        scores=scores,
    )


def save_summary(summary: Summary, folder: Path) -> None:
    """Write `folder`/summary.json, and the scores as `folder`/summary.csv; an undefined value is an empty cell."""
    save_json(summary, folder / "summary.json")
    with atomic_write(folder / "summary.csv") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(CaseScore)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(score) for score in summary.scores)


def table(summary: Summary) -> str:
    """The summary as text: mean +- standard deviation per class, the worst cases, and what was undefined."""
    shown = [name for name in METRICS if any(entry.means[name].count for entry in summary.classes)]
    head = ["class", *(f"{METRICS[name].title} [{METRICS[name].unit}]".removesuffix(" []") for name in shown), "cases"]
    rows = [[entry.label, *(_cell(entry.means[name]) for name in shown), _cases(entry)] for entry in summary.classes]
    if len(rows) > 1:
        rows.append(["mean of classes", *(_cell(summary.foreground[name]) for name in shown), ""])
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [head, *rows]]
    lines.insert(1, "-" * max(map(len, lines)))
    lines.append(f"mean +- standard deviation; surface Dice at {summary.tolerance_mm:g} mm")
    return "\n".join(lines + _worst(summary) + _in_words(summary)) + "\n"


def _cell(mean: Mean) -> str:
    if mean.mean is None:
        return "undefined"
    return f"{mean.mean:.3f}" if mean.std is None else f"{mean.mean:.3f} +- {mean.std:.3f}"


def _cases(entry: ClassSummary) -> str:
    dice = entry.means["dice"]
    return f"{dice.count}" if not dice.undefined else f"{dice.count} of {dice.count + dice.undefined}"


def _worst(summary: Summary) -> list[str]:
    """Lines that name the cases of the lowest mean Dice, each with its worst class."""
    cases: dict[str, list[tuple[float, str]]] = {}
    for score in summary.scores:
        if score.dice is not None:
            cases.setdefault(score.case, []).append((score.dice, score.label))
    if len(cases) < 2:
        return []
    ranked = sorted((statistics.fmean(dice for dice, _ in found), case, min(found)) for case, found in cases.items())
    lines = ["", "lowest mean Dice:"]
    for mean, case, (dice, label) in ranked[:WORST_SHOWN]:
        lines.append(f"  {case}: {mean:.3f}" + (f", worst class {label} {dice:.3f}" if len(summary.labels) > 1 else ""))
    return lines


def _in_words(summary: Summary) -> list[str]:
    """Lines that say which masks were empty, and what that did to the means."""
    lines = []
    for entry in summary.classes:
        facts = []
        if entry.prediction_empty:
            facts.append(f"missed altogether in {entry.prediction_empty} (Dice 0, no distances)")
        if entry.truth_empty:
            facts.append(f"predicted where there is none in {entry.truth_empty} (Dice 0, no distances)")
        if entry.both_empty:
            facts.append(f"rightly not predicted in {entry.both_empty} (left out of the means)")
        if facts:
            lines.append(f"  {entry.label}: {'; '.join(facts)}")
    return ["", "cases with an empty mask:", *lines] if lines else []
