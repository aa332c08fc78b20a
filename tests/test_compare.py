"""Comparing models by the Dice of the same cases: worked by hand, with classes and cases that define nothing."""

import numpy as np
import pytest

from autoseg.ensemble import Member, mean_of
from autoseg.evaluation import summarise
from autoseg.evaluation.compare import class_means, dice_table, difference, mean_dice, occurring
from autoseg.evaluation.metrics import score_case
from autoseg.pipeline.best import compare, comparison_table, decide

CLASSES = {"big": 1, "small": 2, "never": 3}
NAN = np.nan


def summary_of(pairs):
    """Summary of pairs of truth and prediction, each a list of values along one line."""
    arrays = [tuple(np.array(side, np.int16).reshape(1, 1, -1) for side in pair) for pair in pairs]
    scores = [score for n, pair in enumerate(arrays) for score in score_case(f"c{n}", *pair, (1.0, 1.0, 1.0), CLASSES)]
    return summarise(scores, CLASSES, 1.0)


def member(name):
    return Member(folder=name, folds=("fold_0",), weights=(name,))


def test_a_class_that_no_case_has_counts_for_nobody():
    """One false voxel of `never` turns its mean from undefined to 0: (1 + 2/3 + 0) / 3 against (1 + 2/3) / 2."""
    clean = summary_of([([1, 2, 2, 0, 0], [1, 2, 0, 0, 0])])
    false = summary_of([([1, 2, 2, 0, 0], [1, 2, 0, 3, 0])])
    assert clean.foreground["dice"].mean == pytest.approx(5 / 6)
    assert false.foreground["dice"].mean == pytest.approx(5 / 9)
    assert occurring(clean) == occurring(false) == ("big", "small")
    found = compare({(member("a"),): false, (member("b"),): clean}, {member("a"): 1.0, member("b"): 1.0}, ["c0"])
    assert [one.mean for one in found] == pytest.approx([5 / 6, 5 / 6])
    assert set(found[0].dice) == {"big", "small"}


def test_data_without_any_foreground_breaks_nothing():
    nothing = summary_of([([0, 0], [0, 0])])
    assert occurring(nothing) == ()
    found = compare({(member("a"),): nothing, (member("b"),): nothing}, {member("a"): 1.0, member("b"): None}, ["c0"])
    assert [one.mean for one in found] == [None, None]
    assert decide(found, 1) == (0, "no pair has a higher mean Dice")
    assert "undefined" in comparison_table(found, 0, "why", ["big"], 1)


def test_means_leave_out_what_is_undefined():
    table = np.array([[1.0, NAN, NAN], [0.5, 0.2, NAN]])
    assert class_means(table) == pytest.approx([0.75, 0.2, NAN], nan_ok=True)
    assert class_means(table, np.array([[2, 0], [1, 3]])) == pytest.approx(
        np.array([[1.0, NAN, NAN], [2.5 / 4, 0.2, NAN]]), nan_ok=True
    )
    assert mean_dice(table) == pytest.approx(0.475)
    assert mean_dice(np.full((2, 2), NAN)) is None
    found = dice_table(summary_of([([1, 0], [1, 0]), ([2, 2], [0, 2])]), ["c1", "c0"], ["small", "big"])
    assert found == pytest.approx(np.array([[2 / 3, NAN], [NAN, 1.0]]), nan_ok=True)


def test_a_constant_gain_is_certain_and_noise_is_not():
    rng = np.random.default_rng(3)
    first = rng.uniform(0.5, 0.8, (20, 2))
    assert difference(first + 0.05, first) == pytest.approx((0.05, 0.05, 0.05))
    noise = rng.normal(0, 0.1, (20, 2))
    gap, low, high = difference(first + noise - noise.mean(0), first)
    assert gap == pytest.approx(0, abs=1e-12)
    assert low < -0.01 < 0.01 < high
    assert difference(first + noise, first) == difference(first + noise, first), "the draws have a seed"
    assert difference(np.full((3, 1), NAN), first[:3, :1]) == (None, None, None)


def test_the_interval_is_that_of_the_mean_of_twenty_differences():
    """Standard error of a mean: the bootstrap interval is near +-1.96 of it (n = 200, deviation 0.1: 0.0139)."""
    rng = np.random.default_rng(5)
    second = np.full((200, 1), 0.5)
    noise = rng.normal(0.02, 0.1, (200, 1))
    gap, low, high = difference(second + noise, second)
    error = noise.std(ddof=1) / np.sqrt(200)
    assert (gap - low, high - gap) == pytest.approx((1.96 * error, 1.96 * error), rel=0.1)


def candidates(gain, cases, spread=0.0):
    """`a` alone, `b` alone and worse, and their pair better than `a` by `gain`, with alternating noise."""
    base = np.linspace(0.6, 0.8, cases)
    noise = spread * np.where(np.arange(cases) % 2, 1, -1)
    made = {}
    for members, dice in (
        ((member("a"),), base),
        ((member("b"),), base - 0.1),
        ((member("a"), member("b")), base + gain + noise),
    ):
        whole = summary_of([([1, 2], [1, 2])])
        one = whole.scores[0]
        scores = [type(one)(**{**vars(one), "case": f"c{n}", "dice": value}) for n, value in enumerate(dice)]
        made[members] = summarise(scores, {"big": 1}, 1.0)
    return compare(made, {member("a"): 2.0, member("b"): 1.0}, [f"c{n}" for n in range(cases)])


def test_a_pair_must_win_by_more_than_noise_and_on_enough_cases():
    sure = candidates(0.02, 8)
    assert [one.name for one in sure] == ["a + b", "a", "b"]
    assert decide(sure, 8)[0] == 0
    assert sure[0].seconds == 3.0
    unsure = candidates(0.01, 8, spread=0.2)
    assert unsure[0].name == "a + b"
    assert decide(unsure, 8) == (1, "no pair, which takes longer, is better by more than noise: all intervals reach 0")
    few = candidates(0.02, 5)
    place, reason = decide(few, 5)
    assert few[place].name == "a"
    assert "5 cases are too few" in reason
    worse = candidates(-0.02, 8)
    assert decide(worse, 8) == (0, "no pair has a higher mean Dice")
    lines = comparison_table(sure, 0, "why", ["never"], 8).splitlines()
    assert lines[3].split()[:4] == ["*", "a", "+", "b"]
    assert "+0.0200 (+0.0200 to +0.0200)" in lines[3]
    assert any("No case has never" in line for line in lines)


def test_of_equal_candidates_the_simpler_then_the_faster_comes_first():
    same = summary_of([([1, 2], [1, 2])])
    a, b = member("a"), member("b")
    found = compare({(a, b): same, (a,): same, (b,): same}, {a: 2.0, b: 1.0}, ["c0"])
    assert [one.name for one in found] == ["b", "a", "a + b"]


def test_means_of_arrays_change_none_of_them():
    maps = [np.full((2, 3), value, np.float32) for value in (0.0, 0.5, 1.0)]
    assert mean_of(iter(maps)) == pytest.approx(np.full((2, 3), 0.5))
    assert [one[0, 0] for one in maps] == [0.0, 0.5, 1.0]
