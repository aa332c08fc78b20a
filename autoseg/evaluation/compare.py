"""Compare models on the same cases: mean Dice over the classes that occur, and whether a difference is more than noise.

The Dice of many cases is a table (cases, classes), NaN where undefined. A class that no case has counts for nobody:
otherwise one false voxel would turn its mean from undefined to 0, and decide between two models by itself.
"""

from collections.abc import Sequence

import numpy as np

from autoseg.evaluation.summary import Summary

DRAWS = 2000
LEVEL = 0.95
FEWEST_CASES = 6
"""All of n cases favour the same one of two equal models with probability 2 ** (1 - n): below six, over 1 - LEVEL."""


def occurring(summary: Summary) -> tuple[str, ...]:
    """The classes that the truth of some case holds, in the order of the summary."""
    present = {score.label for score in summary.scores if score.tp + score.fn > 0}
    return tuple(label for label in summary.labels if label in present)


def dice_table(summary: Summary, cases: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Dice (cases, classes) of a summary; NaN where it is undefined or the class was not annotated."""
    table = np.full((len(cases), len(classes)), np.nan)
    rows = {case: row for row, case in enumerate(cases)}
    columns = {label: column for column, label in enumerate(classes)}
    for score in summary.scores:
        if score.case in rows and score.label in columns and score.dice is not None:
            table[rows[score.case], columns[score.label]] = score.dice
    return table


def class_means(table: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Mean of each column over the rows that define it, NaN without one: (classes,).

    weights: (draws, cases), how often each case counts; then (draws, classes).
    """
    weights = np.ones((1, len(table))) if weights is None else weights
    defined = weights @ ~np.isnan(table)
    means = np.divide(weights @ np.nan_to_num(table), defined, out=np.full(defined.shape, np.nan), where=defined > 0)
    return means[0] if len(means) == 1 else means


def mean_dice(table: np.ndarray) -> float | None:
    """Mean over classes of the class means; None if no class has one."""
    means = class_means(table)
    return None if np.isnan(means).all() else float(np.nanmean(means))


def difference(
    first: np.ndarray, second: np.ndarray, seed: int = 0
) -> tuple[float, float, float] | tuple[None, None, None]:
    """`mean_dice` of the first table minus that of the second, on the same cases, and its interval of LEVEL.

    The interval is that of the percentile bootstrap (Efron and Tibshirani 1993) over DRAWS draws of cases, the same
    for both. In each draw only classes count that both define. Three times None if no class has a mean in both.
    """
    shared = ~np.isnan(class_means(first)) & ~np.isnan(class_means(second))
    if not shared.any():
        return None, None, None
    counts = np.random.default_rng(seed).multinomial(len(first), np.full(len(first), 1 / len(first)), size=DRAWS)
    gaps = class_means(first[:, shared], counts) - class_means(second[:, shared], counts)
    gaps = gaps[~np.isnan(gaps).all(1)]
    drawn = np.nanmean(gaps, axis=1)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float((class_means(first) - class_means(second))[shared].mean()), float(low), float(high)
