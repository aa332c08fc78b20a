from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats

from autoseg.labels import Labels
from autoseg.postprocess import PostProcessing, Step, apply, apply_steps, before_and_after, choose, measure, trials
from autoseg.postprocess.search import SEARCHED, Search, island_sizes
from autoseg.postprocess.significance import Resamples
from autoseg.records import load_json, save_json

UNIT = (1.0, 1.0, 1.0)
ONE = Labels.from_dataset({"background": 0, "liver": 1})
TWO = Labels.from_dataset({"background": 0, "liver": 7, "lesion": 200})
NESTED = Labels.from_dataset({"background": 0, "whole": [1, 2], "core": 2, "ignore": 9})


def row(*values):
    return np.array(values, np.int16).reshape(1, 1, -1)


def rule_for(pairs, labels=TWO, spacing=UNIT, scored=None):
    return choose([measure(truth, prediction, labels, spacing, scored) for truth, prediction in pairs], labels)


def plain_dice(truth, prediction, members, ignored=None):
    seen = truth != ignored
    true, found = np.isin(truth, members) & seen, np.isin(prediction, members) & seen
    both = true.sum() + found.sum()
    return 2 * (true & found).sum() / both if both else np.nan


def verdicts(rule):
    return {(step.kind, step.members): step.verdict for step in rule.rejected}


# Empty masks, and classes that never occur.


def test_empty_predictions_teach_nothing():
    rule = rule_for([(np.zeros((3, 5, 7), np.int16), np.zeros((3, 5, 7), np.int16))] * 12)
    assert rule.cases == 12 and rule.steps == ()
    assert {step.verdict for step in rule.rejected} == {"changes nothing"}
    assert rule.dice == (None, None)
    assert rule_for([]).steps == ()


def test_a_class_that_never_occurs_breaks_nothing():
    good, bad = row(1, 1, 1, 0, 0, 0, 0), row(1, 1, 1, 0, 0, 0, 1)
    rule = rule_for([(good, bad)] * 20)
    assert [(step.kind, step.members) for step in rule.steps] == [("largest", (1, 2))]
    assert rule.dice == (pytest.approx(6 / 7), None) and rule.dice_processed == (1, None)
    assert rule.dice_crossfitted == (1, None)


def test_a_false_alarm_that_vanishes_counts_as_a_gain():
    # Class 2 is nowhere in the truth; its Dice 0 becomes undefined, and class 1 stays perfect.
    rule = rule_for([(row(1, 1, 1, 0, 0), row(1, 1, 1, 0, 2))] * 6)
    assert [(s.members, s.dice_before, s.dice_after) for s in rule.steps] == [((1, 2), 0.5, 1.0)]


# What is kept, and what is refused.


def test_islands_help_where_the_largest_component_would_harm():
    """Two true parts, the smaller of 20 voxels, and specks of up to three: only islands gain."""
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(25):
        truth = np.zeros((3, 9, 31), np.int16)
        truth[0:2, 1:6, 1:6] = 1
        truth[0:2, 1:6, 9:11] = 1
        prediction = truth.copy()
        for place in rng.choice((15, 19, 23, 27), size=3, replace=False):
            prediction[0, 7, place : place + rng.integers(1, 4)] = 1
        pairs.append((truth, prediction))
    rule = rule_for(pairs, ONE, spacing=(2.0, 1.0, 1.0))
    assert [(step.kind, step.members, step.below_mm3) for step in rule.steps] == [("islands", (1,), 10.0)]
    assert rule.steps[0].bound > 0 and rule.dice_processed == (1,) and rule.dice_crossfitted == (1,)
    assert verdicts(rule)["largest", (1,)] == "no gain"
    truth, prediction = pairs[0]
    assert np.array_equal(apply(prediction, rule, (2.0, 1.0, 1.0)), truth)


def test_holes_and_gaps_are_closed_where_that_is_right():
    truth = np.zeros((6, 12, 14), np.int16)
    truth[0:5, 1:11, 1:13] = 1
    pairs = []
    for number in range(20):
        prediction = truth.copy()
        prediction[2, 4:6, 3 + number % 5 : 7 + number % 5] = 0
        prediction[0:5, 1:11, 11] = 0
        pairs.append((truth, prediction))
    rule = rule_for(pairs, ONE)
    assert [step.kind for step in rule.steps] == ["holes", "closing"]
    # The part behind the gap is the smaller component, so keeping the largest would lose it.
    assert verdicts(rule)["largest", (1,)] == "no gain"
    assert rule.dice_processed[0] > 0.99 > 0.95 > rule.dice[0]
    assert [step.dice_before for step in rule.steps[1:]] == [step.dice_after for step in rule.steps[:1]]


def test_a_case_too_fine_for_a_closing_does_not_end_the_search():
    """Closings follow the middle spacing of most cases: 1 to 3 mm, 100 to 300 voxels of the last one."""
    truth = row(1, 1, 1, 1)
    cases = [measure(truth, row(1, 0, 1, 1), ONE, spacing) for spacing in [UNIT] * 9 + [(1.0, 1.0, 0.01)]]
    found = choose(cases, ONE)
    assert not any(step.kind == "closing" for step in (*found.steps, *found.rejected))
    found = choose(cases[:9], ONE)
    assert any(step.kind == "closing" for step in (*found.steps, *found.rejected))


def test_a_gain_that_could_be_chance_is_refused():
    gains, loses = (row(1, 1, 1, 0, 0), row(1, 1, 1, 0, 1)), (row(1, 1, 1, 0, 1), row(1, 1, 1, 0, 1))
    # One case in twenty: two of five draws have none of it.
    rule = rule_for([gains] + [(gains[0], gains[0])] * 19, ONE)
    assert rule.steps == () and verdicts(rule)["largest", (1,)] == "within chance"
    assert rule.rejected[0].dice_after > rule.rejected[0].dice_before and rule.rejected[0].bound == 0
    assert "beyond chance" in rule.describe(ONE)
    # 1/7 is won in eleven cases and 1/4 lost in six: a rise of the mean that proves nothing.
    rule = rule_for([gains] * 11 + [loses] * 6, ONE)
    assert verdicts(rule)["largest", (1,)] == "within chance" and rule.rejected[0].bound < 0
    assert [s.kind for s in rule_for([gains] * 16 + [loses] * 1, ONE).steps] == ["largest"]


def test_few_cases_prove_nothing_and_it_is_said():
    pair = row(1, 1, 1, 0, 0), row(1, 1, 1, 0, 1)
    rule = rule_for([pair] * 4, ONE)
    assert rule.steps == () and verdicts(rule)["largest", (1,)] == "too few cases"
    assert "4 cases are too few" in rule.describe(ONE)
    rule = rule_for([pair] * 5, ONE)
    assert [step.kind for step in rule.steps] == ["largest"]
    assert verdicts(rule)["islands", (1,)] == "too few cases", "what is searched needs more"
    assert rule.dice_crossfitted == ()


def test_a_class_that_would_fall_stops_the_foreground_step_but_not_the_other_class():
    # Class 2 lies apart from class 1 and is right; the island of class 1 is wrong.
    truth, prediction = row(1, 1, 1, 0, 2, 0, 0), row(1, 1, 1, 0, 2, 0, 1)
    rule = rule_for([(truth, prediction)] * 6)
    assert [step.members for step in rule.steps] == [(1,)]
    assert verdicts(rule)["largest", (1, 2)] == "no gain"
    assert np.array_equal(apply(prediction, rule, UNIT), truth)
    # The island of 12 voxels costs class 1 more than class 2 loses.
    truth, prediction = row(*[1] * 5, 0, 2, *[0] * 5), row(*[1] * 5, 0, 2, 0, *[1] * 4)
    assert verdicts(rule_for([(truth, prediction)] * 6))["largest", (1, 2)] in ("no gain", "another class loses")


def test_many_classes_do_not_make_chance_finds():
    """Specks as often right as wrong, in six classes: nothing that was searched is found, in five such datasets."""
    labels = Labels(names=tuple("bcdefgh"), values=tuple(range(7)))
    for seed in range(5):
        rng = np.random.default_rng(seed)
        pairs = []
        for _ in range(15):
            truth = np.zeros((1, 13, 29), np.int16)
            prediction = truth.copy()
            for index in range(1, 7):
                truth[0, 2 * index, 1:12] = prediction[0, 2 * index, 1:12] = index
                for place in (15, 18, 21):
                    prediction[0, 2 * index, place] = index * rng.integers(2)
                    truth[0, 2 * index, place] = index * rng.integers(2)
            pairs.append((truth, prediction))
        rule = rule_for(pairs, labels)
        assert [step for step in rule.steps if step.kind != "largest"] == []
        assert rule.rejected[-1].level == pytest.approx(0.05 / (7 * SEARCHED))


# Regions, ignored voxels, classes that were not annotated.


def test_a_region_is_cleaned_with_all_that_lies_within():
    truth, prediction = row(0, 1, 2, 2, 1, 0, 0, 0), row(0, 1, 2, 2, 1, 0, 2, 1)
    rule = rule_for([(truth, prediction)] * 6, NESTED)
    assert [step.members for step in rule.steps] == [(1, 2)]
    assert apply(prediction, rule, UNIT).tolist() == truth.tolist()
    assert "component of whole (mean Dice" in rule.describe(NESTED)
    assert {step.members for step in rule.rejected} == {(1, 2), (2,)}, "the foreground is tried once"


def test_a_step_that_harms_another_region_is_not_taken():
    # The whole would rise from 8/10 to 6/7 without its two small parts, one of which is all there is of the core.
    truth, prediction = row(1, 1, 1, 0, 2, 0, 0, 0), row(1, 1, 1, 0, 2, 0, 1, 1)
    labels = Labels.from_dataset({"background": 0, "whole": [1, 2], "core": 2, "apart": 3})
    rule = rule_for([(truth, prediction)] * 20, labels)
    refused = next(s for s in rule.rejected if s.kind == "largest" and s.members == (1, 2))
    assert refused.verdict == "another class loses"
    assert (refused.dice_before, refused.dice_after) == pytest.approx((8 / 10, 6 / 7))
    assert all(2 not in step.members for step in rule.steps)


def test_ignored_voxels_make_a_component_large_and_count_in_no_dice():
    truth, prediction = row(1, 1, 0, 3, 3, 3), row(1, 1, 0, 1, 1, 1)
    case = measure(truth, prediction, NESTED, UNIT)
    assert (case.size.tolist(), case.counted.tolist(), case.hits.tolist()) == ([2, 3], [2, 0], [[0, 2, 0], [0, 0, 0]])
    assert case.true.tolist() == [2, 0]
    # Removing the smaller, true part would cost everything; the ignored one cannot be told from it by prediction.
    rule = rule_for([(truth, prediction)] * 6, NESTED)
    assert rule.dice == (1, None)
    assert rule.steps == ()


def test_classes_that_were_not_annotated_have_no_say():
    # Class 1 would gain from keeping its largest part, if it had been annotated.
    pair = row(1, 1, 0, 0, 0, 2), row(1, 1, 0, 1, 0, 2)
    assert [step.members for step in rule_for([pair] * 6).steps] == [(1,)]
    assert rule_for([pair] * 6, scored=(False, True)).steps == ()


def test_shapes_must_match():
    with pytest.raises(ValueError, match="shape"):
        measure(row(1, 0), row(1, 0, 0), ONE, UNIT)


# The tables against scoring everything again.


@st.composite
def datasets(draw):
    labels = draw(st.sampled_from([ONE, TWO, NESTED]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    top, spacing = len(labels.stored), draw(st.sampled_from([UNIT, (3.0, 1.0, 0.7)]))
    pairs = []
    for _ in range(draw(st.integers(5, 9))):
        shape = tuple(rng.integers((1, 4, 5), (5, 9, 12)))
        fields = ndimage.gaussian_filter(rng.standard_normal((len(labels.known), *shape)), (0, 1, 1, 1))
        truth = fields.argmax(0).astype(np.int16)
        near = np.where(truth < top, truth, 0)
        wrong = rng.random(shape) < rng.choice([0.05, 0.3])
        pairs.append((truth, np.where(wrong, rng.integers(0, top, shape), near).astype(np.int16)))
    return labels, spacing, pairs


@settings(max_examples=40, deadline=None)
@given(datasets())
def test_every_number_of_the_search_is_that_of_scoring_everything_again(dataset):
    labels, spacing, pairs = dataset
    rule = rule_for(pairs, labels, spacing)

    def means(steps):
        scores = [
            [plain_dice(truth, apply_steps(found, steps, spacing), own, labels.ignored) for own in labels.members]
            for truth, found in pairs
        ]
        defined = ~np.isnan(scores)
        return [
            np.nansum(column) / count if count else None for column, count in zip(np.transpose(scores), defined.sum(0))
        ]

    assert rule.dice == pytest.approx(means(()))
    assert rule.dice_processed == pytest.approx(means(rule.steps))
    for number, step in enumerate(rule.steps):
        if step.members in labels.members[1:]:
            own = labels.members.index(step.members)
            assert step.dice_before == pytest.approx(means(rule.steps[:number])[own])
            assert step.dice_after == pytest.approx(means(rule.steps[: number + 1])[own])
            assert step.bound > 0


@settings(max_examples=40, deadline=None)
@given(datasets(), st.data())
def test_removing_by_the_table_is_removing_on_the_map(dataset, data):
    """Also after other removals, which take apart what they leave of overlapping classes."""
    labels, spacing, pairs = dataset
    cases = [measure(truth, found, labels, spacing) for truth, found in pairs]
    search = Search(cases, labels, lambda function, items: [function(item) for item in items])
    state, rows = search.start, np.arange(len(cases))
    for _ in range(3):
        members = data.draw(st.sampled_from(search.targets))
        state = data.draw(st.sampled_from(search.removals(state, members, rows)))
        scores = [
            [plain_dice(truth, apply_steps(found, state.steps, spacing), own, labels.ignored) for own in labels.members]
            for truth, found in pairs
        ]
        assert search.dice(state) == pytest.approx(np.array(scores), nan_ok=True)


# The parts.


def test_sizes_to_try_are_round_numbers_above_the_quantiles():
    assert island_sizes(np.zeros(0)) == []
    assert island_sizes(np.array([1.0, 3.0, 4.0, 30.0])) == [5.0, 20.0, 50.0]
    assert island_sizes(np.array([5.0])) == [10.0], "an island of 5 mm3 is not below 5 mm3"
    assert all(a < b for a, b in pairwise(island_sizes(np.geomspace(1e-6, 1e6, 50))))


def test_the_bound_is_that_of_scipy():
    rng = np.random.default_rng(1)
    before = rng.uniform(0.5, 0.9, (40, 1))
    after = before + rng.normal(0.01, 0.03, (40, 1))
    bound = Resamples(40).lower_bound(before, after, 0.05)
    other = stats.bootstrap(((after - before)[:, 0],), np.mean, confidence_level=0.9, method="percentile", rng=rng)
    assert bound == pytest.approx(other.confidence_interval.low, abs=5e-4)


def test_the_bound_knows_undefined_cases():
    # Class 2 has no defined case once its false alarm is gone: the mean over classes is then that of class 1.
    before, after = np.array([[0.5, 0.0]] * 6), np.array([[0.5, np.nan]] * 6)
    assert Resamples(6).lower_bound(before, after, 0.05) == 0.25
    rare = np.full((30, 1), np.nan)
    rare[0] = 0.5
    assert Resamples(30).lower_bound(rare, rare + 0.1, 0.05) == 0, "a third of the draws have no case of it"


def test_the_same_cases_give_the_same_bound_in_pieces(monkeypatch):
    rng = np.random.default_rng(2)
    before, after = rng.random((7, 2)), rng.random((7, 2))
    once = Resamples(7).lower_bound(before, after, 0.05)
    monkeypatch.setattr("autoseg.postprocess.significance.AT_ONCE", 1000)
    assert Resamples(7).lower_bound(before, after, 0.05) == pytest.approx(once, abs=0.02)


def test_tables_show_what_was_kept_and_what_was_not(tmp_path):
    truth, prediction = row(1, 1, 1, 0, 2, 0, 0), row(1, 1, 1, 0, 2, 0, 1)
    rule = rule_for([(truth, prediction)] * 12)
    shown = trials(rule, TWO).splitlines()
    assert shown[1].startswith("keep the largest component of liver") and shown[1].endswith("kept")
    assert "+0.14286 (95.00%)" in shown[1]
    assert any(line.endswith("no gain") for line in shown) and "change nothing" in shown[-2]
    assert shown[-1].endswith("liver 1.0000, lesion 1.0000")
    table = before_and_after(rule, TWO).splitlines()
    assert table[1].split() == ["liver", "0.8571", "1.0000", "1.0000"]
    assert "flatters" in table[-1] and "honest" in table[-1]
    assert trials(PostProcessing(cases=2, steps=(Step(members=(1,)),)), TWO) == "", "of a rule without numbers"
    save_json(rule, tmp_path / "rule.json")
    assert load_json(PostProcessing, tmp_path / "rule.json") == rule
