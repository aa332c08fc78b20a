import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from toys import LABELS

from autoseg.labels import Labels
from autoseg.postprocess import (
    PostProcessing,
    Step,
    apply,
    apply_steps,
    choose,
    choose_for_regions,
    find_components,
    fit,
    keep_largest,
    keep_largest_each,
    region_dice,
)
from autoseg.records import load_json, save_json

EXAMPLES = settings(max_examples=30, deadline=None)
FULL = np.ones((3, 3, 3), bool)


def plain_keep_largest(labels, members):
    """The same by scipy, one component at a time."""
    mask = np.isin(labels, members)
    components, count = ndimage.label(mask, FULL)
    sizes = [np.sum(components == index) for index in range(1, count + 1)]
    out = labels.copy()
    for index, size in enumerate(sizes, start=1):
        if size < max(sizes):
            out[components == index] = 0
    return out


def class_means(pairs, class_count):
    """Mean Dice of each foreground class over the cases that define it."""
    means = []
    for index in range(1, class_count):
        dice = [
            2
            * np.sum((truth == index) & (prediction == index))
            / (np.sum(truth == index) + np.sum(prediction == index))
            for truth, prediction in pairs
            if (truth == index).any() or (prediction == index).any()
        ]
        means.append(np.mean(dice) if dice else None)
    return means


def mean(values):
    defined = [value for value in values if value is not None]
    return np.mean(defined) if defined else None


def plain_fit(pairs, class_count):
    """The rule word for word: change all arrays, score them all again, compare."""
    everything = list(range(1, class_count))
    before, steps = class_means(pairs, class_count), []
    trial = [(truth, plain_keep_largest(prediction, everything)) for truth, prediction in pairs]
    after = class_means(trial, class_count)
    fell = any(a is not None and a < b - 1e-12 for a, b in zip(after, before) if b is not None)
    if mean(before) is not None and mean(after) > mean(before) + 1e-12 and not fell:
        pairs, steps = trial, [tuple(everything)]
    for index in everything if class_count > 2 else []:
        before = class_means(pairs, class_count)[index - 1]
        trial = [(truth, plain_keep_largest(prediction, [index])) for truth, prediction in pairs]
        after = class_means(trial, class_count)[index - 1]
        if before is not None and after > before + 1e-12:
            pairs, steps = trial, [*steps, (index,)]
    return steps, pairs


@st.composite
def label_arrays(draw, classes=3, count=1):
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(2, 11)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    background = draw(st.sampled_from([0.5, 0.8, 0.95]))
    kind = draw(st.sampled_from([np.uint8, np.int16, np.int32]))
    share = [background, *[(1 - background) / classes] * classes]
    return [rng.choice(classes + 1, size=shape, p=share).astype(kind) for _ in range(count)]


def row(*values):
    return np.array(values, np.uint8).reshape(1, 1, -1)


# Empty masks


def test_nothing_to_keep_leaves_an_empty_mask_alone():
    empty = np.zeros((3, 5, 7), np.int16)
    assert keep_largest(empty, (1, 2)) is empty
    assert keep_largest_each(empty, (1, 2)) is empty
    other = row(2, 0, 2)
    assert keep_largest(other, (1,)) is other


def test_empty_predictions_teach_nothing():
    rule = fit([(np.zeros((3, 5, 7), np.uint8), np.zeros((3, 5, 7), np.uint8))], 3)
    assert rule.cases == 1 and rule.steps == ()
    assert [step.members for step in rule.rejected] == [(1, 2), (1,), (2,)]
    assert all(step.dice_before is step.dice_after is None for step in rule.rejected)
    assert fit([], 2) == PostProcessing(cases=0, rejected=(Step(members=(1,), dice_before=None, dice_after=None),))


def test_a_false_alarm_that_vanishes_counts_as_a_gain():
    # Class 2 is nowhere in the truth; its Dice 0 becomes undefined, and class 1 stays perfect.
    rule = fit([(row(1, 1, 1, 0, 0), row(1, 1, 1, 0, 2))], 3)
    assert rule.steps == (Step(members=(1, 2), dice_before=0.5, dice_after=1.0),)


# By hand


def test_a_smaller_island_goes_and_equal_ones_stay():
    assert keep_largest(row(1, 1, 0, 1), (1,)).tolist() == row(1, 1, 0, 0).tolist()
    tied = row(1, 1, 0, 1, 1)
    assert keep_largest(tied, (1,)) is tied


def test_members_count_together_and_others_are_left_alone():
    labels = row(1, 2, 0, 1, 0, 3)
    assert keep_largest(labels, (1, 2)).tolist() == row(1, 2, 0, 0, 0, 3).tolist()
    assert keep_largest_each(row(1, 1, 0, 1, 2, 0, 2, 2), (1, 2)).tolist() == row(1, 1, 0, 0, 0, 0, 2, 2).tolist()


def test_corners_connect():
    labels = np.zeros((2, 2, 4), np.uint8)
    labels[0, 0, 0] = labels[1, 1, 1] = 1
    assert keep_largest(labels, (1,)) is labels
    flat = np.zeros((1, 3, 5), np.uint8)
    flat[0, 0, 0] = flat[0, 1, 1] = flat[0, 2, 4] = 1
    assert keep_largest(flat, (1,)).sum() == 2


def test_the_foreground_step_and_its_gain():
    # Dice before: 2 * 3 / (3 + 4) = 6 / 7; after removing the island: 1.
    rule = fit([(row(1, 1, 1, 0, 0, 0), row(1, 1, 1, 0, 1, 0))], 2)
    assert rule.cases == 1 and rule.rejected == ()
    assert rule.steps[0].members == (1,)
    assert rule.steps[0].dice_before == pytest.approx(6 / 7)
    assert rule.steps[0].dice_after == 1


def test_a_class_that_would_fall_stops_the_foreground_step_but_not_the_other_class():
    # Class 2 lies apart from class 1 and is right; the island of class 1 is wrong.
    truth, prediction = row(1, 1, 1, 0, 2, 0, 0), row(1, 1, 1, 0, 2, 0, 1)
    rule = fit([(truth, prediction)], 3)
    assert [step.members for step in rule.steps] == [(1,)]
    assert [step.members for step in rule.rejected] == [(1, 2), (2,)]
    assert np.array_equal(apply(prediction, rule), truth)


def test_the_mean_over_cases_decides():
    good = row(1, 1, 1, 0, 1), row(1, 1, 1, 0, 1)  # two true parts: keeping one costs 2/8 of the Dice
    bad = row(1, 1, 1, 0, 0), row(1, 1, 1, 0, 1)  # a false part: removing it gains 1/7
    assert fit([good, bad], 2).steps == ()
    assert len(fit([good, bad, bad], 2).steps) == 1


def test_words_say_what_is_done():
    assert "nothing" in PostProcessing(cases=3).describe()
    rule = PostProcessing(cases=3, steps=(Step(members=(1, 2), dice_before=0.5, dice_after=0.75),))
    assert rule.describe(LABELS) == ("keep the largest component of liver, lesion (mean Dice 0.5000 to 0.7500)")
    assert "class 1, class 2" in rule.describe()


def test_a_rule_survives_its_file(tmp_path):
    rule = fit([(row(1, 1, 1, 0, 2, 0, 0), row(1, 1, 1, 0, 2, 0, 1))], 3)
    save_json(rule, tmp_path / "postprocessing.json")
    assert load_json(PostProcessing, tmp_path / "postprocessing.json") == rule


def test_shapes_must_match():
    with pytest.raises(ValueError, match="shape"):
        fit([(row(1, 0), row(1, 0, 0))], 2)


# Against plain implementations


@EXAMPLES
@given(label_arrays(), st.sampled_from([(1,), (3,), (1, 2), (2, 3), (1, 2, 3)]))
def test_keeping_agrees_with_scipy(arrays, members):
    labels = arrays[0]
    before = labels.copy()
    kept = keep_largest(labels, members)
    assert kept.dtype == labels.dtype
    assert np.array_equal(kept, plain_keep_largest(labels, members))
    assert np.array_equal(labels, before), "the input must stay as it is"
    assert keep_largest(kept, members) is kept, "once is enough"
    one_by_one = labels
    for member in members:
        one_by_one = plain_keep_largest(one_by_one, [member])
    assert np.array_equal(keep_largest_each(labels, members), one_by_one)


@EXAMPLES
@given(label_arrays(count=2))
def test_components_add_up_to_the_counts(arrays):
    truth, prediction = arrays
    found = find_components(truth, prediction, 4)
    for index in range(1, 4):
        own = found.owner == index
        assert found.size[own].sum() == np.sum(prediction == index)
        assert found.hits[own].sum() == np.sum((prediction == index) & (truth == index))
        assert found.truth[index] == np.sum(truth == index)
        assert own.sum() == ndimage.label(prediction == index, FULL)[1]
    assert len(set(found.parent.tolist())) == ndimage.label(prediction > 0, FULL)[1]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 4), st.integers(1, 4))
def test_fitting_agrees_with_scoring_everything_again(seed, class_count, cases):
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(cases):
        shape = tuple(rng.integers((1, 4, 5), (5, 9, 12)))
        fields = rng.standard_normal((class_count, *shape))
        truth = ndimage.gaussian_filter(fields, (0, 1, 1, 1)).argmax(0)
        wrong = rng.random(shape) < rng.choice([0.05, 0.3])
        prediction = np.where(wrong, rng.integers(0, class_count, shape), np.where(rng.random() < 0.5, truth, 0))
        pairs.append((truth.astype(np.uint8), prediction.astype(np.uint8)))
    rule = fit(iter(pairs), class_count)
    steps, changed = plain_fit(pairs, class_count)
    assert [step.members for step in rule.steps] == steps
    assert rule.cases == cases
    assert len(rule.steps) + len(rule.rejected) == (class_count if class_count > 2 else 1)
    for (_, prediction), (_, expected) in zip(pairs, changed):
        assert np.array_equal(apply(prediction, rule), expected)
    if rule.steps and len(rule.steps[0].members) > 1:
        assert rule.steps[0].dice_before == pytest.approx(mean(class_means(pairs, class_count)))


# Regions, ignored voxels, classes that were not annotated.

NESTED = Labels.from_dataset({"background": 0, "whole": [1, 2], "core": 2, "ignore": 9})


def line(*values):
    return np.array([[values]])


def rule_for(pairs, labels=NESTED):
    def measure(steps):
        return [region_dice(truth, apply_steps(prediction, steps), labels) for truth, prediction in pairs]

    return choose_for_regions(measure, labels.members)


def test_dice_of_regions_by_hand():
    truth, prediction = line(0, 1, 2, 2, 3), line(1, 1, 1, 2, 2)
    assert region_dice(truth, prediction, NESTED).tolist() == [6 / 7, 2 / 3]
    assert region_dice(truth, prediction, NESTED, (False, True)).tolist() == pytest.approx([np.nan, 2 / 3], nan_ok=True)
    assert np.isnan(region_dice(line(0, 3), line(0, 2), NESTED)).all(), "ignored voxels are in no Dice"


def test_a_region_is_cleaned_with_all_that_lies_within():
    truth = line(0, 1, 2, 2, 1, 0, 0, 0)
    prediction = line(0, 1, 2, 2, 1, 0, 2, 1)
    rule = rule_for([(truth, prediction)])
    assert [step.members for step in rule.steps] == [(1, 2)]
    assert apply(prediction, rule).tolist() == truth.tolist()
    assert "component of whole (mean Dice" in rule.describe(NESTED)
    assert [step.members for step in rule.rejected] == [(2,)], "the foreground is tried once"


def test_a_step_that_harms_another_region_is_not_taken():
    # The whole would rise from 8/10 to 6/7 without its two small parts, one of which is all there is of the core.
    truth, prediction = line(1, 1, 1, 0, 2, 0, 0, 0), line(1, 1, 1, 0, 2, 0, 1, 1)
    labels = Labels.from_dataset({"background": 0, "whole": [1, 2], "core": 2, "apart": 3})
    rule = rule_for([(truth, prediction)], labels)
    assert rule.steps == ()
    assert [step.members for step in rule.rejected] == [(1, 2, 3), (1, 2), (2,), (3,)]
    assert (rule.rejected[1].dice_before, rule.rejected[1].dice_after) == pytest.approx((8 / 10, 6 / 7))


def test_steps_are_applied_one_after_the_other():
    # The rim of the larger part goes first: what remains of the core decides then.
    labels = line(1, 2, 2, 0, 2, 2, 2, 1, 1, 0, 1)
    assert apply_steps(labels, [(1,), (1, 2)]).tolist() == [[[0, 0, 0, 0, 2, 2, 2, 1, 1, 0, 0]]]
    assert apply_steps(labels, [(1, 2), (1,)]).tolist() == [[[0, 0, 0, 0, 2, 2, 2, 1, 1, 0, 0]]]
    apart = line(1, 1, 1, 0, 2, 1, 2, 2)
    assert apply_steps(apart, [(1,), (1, 2)]).tolist() == [[[1, 1, 1, 0, 0, 0, 0, 0]]]
    assert apply_steps(apart, [(1, 2), (1,)]).tolist() == [[[0, 0, 0, 0, 2, 1, 2, 2]]]


def test_ignored_voxels_make_a_component_large_and_count_in_no_dice():
    truth, prediction = line(1, 1, 0, 3, 3, 3), line(1, 1, 0, 1, 1, 1)
    found = find_components(truth, prediction, 3, ignored=3)
    assert (found.size.tolist(), found.counted.tolist(), found.hits.tolist()) == ([2, 3], [2, 0], [2, 0])
    assert found.truth.tolist() == [1, 2, 0]
    # Removing the smaller, true part would cost everything; the ignored one cannot be told from it by prediction.
    assert choose([found], 3).steps == ()
    assert choose([found], 3).rejected[0].dice_before == 1


def test_classes_that_were_not_annotated_have_no_say():
    # Class 1 would gain from keeping its largest part, if it had been annotated.
    truth, prediction = line(1, 1, 0, 0, 0, 2), line(1, 1, 0, 1, 0, 2)
    assert [step.members for step in choose([find_components(truth, prediction, 3)], 3).steps] == [(1,)]
    assert choose([find_components(truth, prediction, 3, scored=(False, True))], 3).steps == ()
