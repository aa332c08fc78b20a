"""Whether a gain in Dice stands against chance: the paired bootstrap over cases (Efron and Tibshirani, 1993)."""

import numpy as np

DRAWS = 10_000
"""Resamples. The strictest level that they can tell from 0 is 1 / DRAWS; more would not change a decision here."""
AT_ONCE = 1 << 22
"""Numbers of a piece of all resamples that are turned to floating point at a time."""


class Resamples:
    """`DRAWS` times as many cases as there are, drawn with replacement: the same for every step that is compared."""

    def __init__(self, cases: int, seed: int = 0) -> None:
        self.cases = cases
        # How often each draw takes each case, (DRAWS, cases).
        self._counts: np.ndarray | None = None
        self._seed = seed

    def counts(self) -> np.ndarray:
        """How often each draw has each case, uint16 (DRAWS, cases); drawn when they are first needed."""
        if self._counts is None:
            rng = np.random.default_rng(self._seed)
            self._counts = np.zeros((DRAWS, self.cases), dtype=np.uint16)
            rows = max(1, AT_ONCE // max(self.cases, 1))
            for first in range(0, DRAWS, rows):
                drawn = rng.integers(self.cases, size=(min(rows, DRAWS - first), self.cases))
                places = drawn + self.cases * np.arange(len(drawn))[:, None]
                counted = np.bincount(places.ravel(), minlength=drawn.size)
                self._counts[first : first + rows] = counted.reshape(drawn.shape)
        return self._counts

    def lower_bound(self, before: np.ndarray, after: np.ndarray, level: float) -> float:
        """One-sided lower bound, with `level` left to chance, of the gain in the mean over columns of column means.

        before, after: Dice (cases, columns) of the same cases, NaN where undefined. A draw without any defined case
        shows no gain.
        """
        gains = []
        counts = self.counts()
        rows = max(1, AT_ONCE // max(self.cases, 1))
        for first in range(0, DRAWS, rows):
            weights = counts[first : first + rows].astype(float)
            gains.append(_mean(_weighted(after, weights)) - _mean(_weighted(before, weights)))
        ordered = np.sort(np.nan_to_num(np.concatenate(gains), nan=0.0))
        return float(ordered[int(level * DRAWS)])


def means(table: np.ndarray) -> np.ndarray:
    """Mean of each column over the rows that define it, NaN without one."""
    return _weighted(table, np.ones((1, len(table))))[0]


def mean_of(values: np.ndarray) -> float | None:
    """Mean of the values that are defined, None without one."""
    mean = _mean(values[None])[0]
    return None if np.isnan(mean) else float(mean)


def _weighted(table: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Means (draws, columns) of the defined values of each column with `weights` (draws, rows)."""
    defined = ~np.isnan(table)
    return _ratio(weights @ np.nan_to_num(table, nan=0.0), weights @ defined.astype(float))


def _mean(table: np.ndarray) -> np.ndarray:
    """Mean of the defined values of each row, NaN without one."""
    defined = ~np.isnan(table)
    return _ratio(np.nan_to_num(table, nan=0.0).sum(1), defined.sum(1).astype(float))


def _ratio(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)
