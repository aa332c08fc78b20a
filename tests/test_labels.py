"""Labels: any integers in, indices inside, the same integers out."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoseg.labels import Labels
from autoseg.records import AutosegError, load_json, save_json

ODD = Labels.from_dataset({"vein": 1024, "background": 0, "artery": 7, "stent": -3})


def test_background_comes_first_and_the_rest_keeps_its_order():
    assert ODD.names == ("background", "vein", "artery", "stent")
    assert ODD.values == (0, 1024, 7, -3)
    assert list(ODD.foreground) == [1, 2, 3]


def test_an_empty_mask_stays_empty():
    assert not ODD.to_indices(np.zeros((1, 5, 7), np.uint8)).any()


def test_values_by_hand():
    stored = np.array([[0, 7, 1024], [-3, 0, 7]])
    assert ODD.to_indices(stored).tolist() == [[0, 2, 1], [3, 0, 2]]
    back = ODD.to_values(np.array([[0, 2, 1], [3, 0, 2]]))
    assert back.tolist() == stored.tolist()
    assert back.dtype == np.int16


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-1000, 70_000).filter(bool), min_size=1, max_size=9, unique=True), st.integers(0, 99))
def test_indices_and_values_are_inverse(values, seed):
    labels = Labels.from_dataset({"background": 0, **{f"c{v}": v for v in values}})
    indices = np.random.default_rng(seed).integers(0, labels.count, (5, 7, 11))
    assert np.array_equal(labels.to_indices(labels.to_values(indices)), indices)


def test_unexpected_values_are_named():
    assert ODD.unexpected(np.array([0, 7, 8, 9])) == [8, 9]
    with pytest.raises(ValueError, match=r"\[8, 9\]"):
        ODD.to_indices(np.array([0, 7, 8, 9]))


@pytest.mark.parametrize(
    ("entry", "word"),
    [
        ({"background": 0, "a": 1, "ignore": 1}, "ignored and cannot be that of a class"),
        ({"background": 0, "a": 1, "ignore": [2, 3]}, "'ignore' must be one integer"),
        ({"background": [0, 2], "a": 1}, "'background' must be one integer"),
        ({"background": 0, "ignore": 2}, "at least one class"),
        ({"background": 0, "a": []}, "integer"),
        ({"background": 0, "a": [1, True]}, "integer"),
        ({"background": 0, "a": [0, 1]}, "other than the background's"),
        ({"background": 0, "a": [1, 2, 2]}, "each once"),
        ({"background": 0, "a": [1, 2], "b": [2, 1]}, r"a = \(1, 2\) and b = \(1, 2\): each must have"),
        ({"background": 0, "a": [1, 2], "b": [2, 3]}, "share .2. and neither contains the other"),
        ({"background": 0, "a": [1, 2], "b": 1, "c": 2}, "'a' consists of smaller regions alone"),
        ({"a": 1}, "background"),
        ({"background": 0, "a": "1"}, "integer"),
        ({"background": 0, "a": 1, "b": 1}, "a = 1 and b = 1: each must have"),
        ({"background": 0}, "at least one class"),
    ],
)
def test_what_is_not_supported_is_refused_with_its_word(entry, word):
    with pytest.raises(AutosegError, match=word) as caught:
        Labels.from_dataset(entry)
    said = str(caught.value)
    assert "\n" not in said and not any(word in said for word in ("pydantic", "validation error", "ArgsKwargs"))


# Regions.

BRATS = Labels.from_dataset({"background": 0, "core": [4, 1], "whole": [1, 2, 4], "enhancing": 4, "ignore": 9})


def test_larger_regions_come_first_and_have_values_of_their_own():
    assert BRATS.names == ("background", "whole", "core", "enhancing")
    assert BRATS.regions == ((1, 2, 4), (1, 4), (4,))
    assert BRATS.values == (0, 2, 1, 4)
    assert (BRATS.heads, BRATS.count, BRATS.exclusive) == (3, 4, False)
    assert BRATS.stored == (0, 1, 2, 4)
    assert BRATS.ignored == 4
    assert BRATS.members == ((1, 2, 3), (1, 3), (3,))
    assert BRATS.scored == {"whole": (1, 2, 4), "core": (1, 4), "enhancing": (4,)}
    assert "whole [1, 2, 4] as 2, core [1, 4] as 1, enhancing [4] as 4" in BRATS.remarks()[0]
    assert "9" in BRATS.remarks()[1]
    assert not ODD.remarks()


def test_lists_of_one_value_are_plain_classes():
    assert Labels.from_dataset({"background": [0], "a": [3], "b": 1}).exclusive


def test_regions_apart_from_each_other_keep_their_order():
    made = Labels.from_dataset({"background": 0, "left": [5, 6], "right": [3, 4], "tip": 6})
    assert made.names[1:] == ("left", "right", "tip")
    assert made.values[1:] == (5, 3, 6)


def test_a_given_order_is_taken_as_it_is():
    made = Labels.from_dataset({"background": 0, "a": [1, 2], "b": 1, "c": 2}, [1, 1, 2])
    assert (made.names[1:], made.values[1:]) == (("a", "b", "c"), (1, 1, 2))
    assert made.ambiguities() == ()


@pytest.mark.parametrize("order", [[1], [1, "2"], [1, True], {"a": 1, "b": 2}, [3, 2]])
def test_an_order_that_fits_no_region_is_refused(order):
    with pytest.raises(AutosegError, match=r"regions_class_order|none of its values"):
        Labels.from_dataset({"background": 0, "a": [1, 2], "b": 2}, order)


def test_an_order_that_loses_regions_is_said():
    entries = {"background": 0, "core": 2, "whole": [1, 2]}
    (said,) = Labels.from_dataset(entries, [2, 1]).ambiguities()
    assert "core, whole is written as 1, which means whole" in said
    assert Labels.from_dataset(entries).ambiguities() == ()
    assert BRATS.ambiguities() == ()


def test_later_regions_are_painted_over_earlier_ones():
    # whole: - + + + -; core: - - + - -; enhancing: - - + + +
    logits = np.array([[-1, 1, 1, 1, 0], [-1, 0, 2, -3, -1], [-1, -1, 1, 1, 1]], np.float32)
    assert BRATS.to_values(BRATS.decode(logits)).tolist() == [0, 2, 4, 4, 4]
    assert BRATS.decode(iter(logits)).tolist() == BRATS.decode(torch.from_numpy(logits)).tolist() == [0, 2, 3, 3, 3]
    swapped = Labels(names=BRATS.names, values=BRATS.values, regions=((1, 2, 4), (1, 4), (4,)))
    assert np.array_equal(swapped.decode(logits), BRATS.decode(logits)), "the ignored value changes nothing"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**30))
def test_what_is_decoded_from_the_true_regions_lies_in_the_same_regions(seed):
    indices = np.random.default_rng(seed).integers(0, 4, (5, 7))
    masks = np.stack([np.isin(indices, own) for own in BRATS.members])
    again = BRATS.decode(masks - 0.5)
    assert np.array_equal(np.stack([np.isin(again, own) for own in BRATS.members]), masks)


def test_sigmoids_agree_between_numpy_and_torch():
    logits = np.array([[-1000.0, -2, 0], [3, 1000, 0.5], [0, 0, 0]], np.float32)
    ours = BRATS.probabilities(logits)
    assert ours[:, 2] == pytest.approx([0.5, 1 / (1 + np.exp(-0.5)), 0.5])
    assert np.allclose(ours, BRATS.probabilities(torch.from_numpy(logits)).numpy(), atol=1e-6)


# The ignored value.


def test_the_ignored_value_has_the_last_index_and_no_head():
    made = Labels.from_dataset({"background": 0, "ignore": 1, "a": 7, "b": 2})
    assert (made.names, made.heads, made.ignored) == (("background", "a", "b"), 3, 3)
    indices = made.to_indices(np.array([1, 0, 7, 2]))
    assert indices.tolist() == [3, 0, 1, 2]
    assert made.to_values(indices).tolist() == [1, 0, 7, 2]
    assert made.is_foreground(indices).tolist() == [False, False, True, True]
    assert list(made.foreground) == [1, 2]
    assert made.unexpected(np.array([1, 3])) == [3]


def test_labels_that_were_saved_before_there_were_regions_still_load(tmp_path):
    path = tmp_path / "labels.json"
    path.write_text('{"names": ["background", "a"], "values": [0, 3]}')
    assert load_json(Labels, path) == Labels.from_dataset({"background": 0, "a": 3})
    save_json(BRATS, path)
    assert load_json(Labels, path) == BRATS


# Classes that were not annotated.


def test_values_of_classes_that_were_not_annotated():
    assert ODD.flags(None) == (True, True, True)
    assert ODD.flags(("stent",)) == (False, False, True)
    assert ODD.not_annotated(np.array([-1, 0, 3]), ["stent"]) == []
    assert ODD.not_annotated(np.array([-1, 0, 1, 2, 3]), ["stent"]) == [7, 1024]
    # Enhancing lies in the core, so that it may be there; the rest of the whole may not.
    assert BRATS.not_annotated(np.array([0, 1, 3, 4]), ["core"]) == []
    assert BRATS.not_annotated(np.array([0, 1, 2, 3, 4]), ["core"]) == [2]


def test_probabilities_agree_between_numpy_and_torch_and_sum_to_one():
    logits = np.random.default_rng(0).normal(0, 50, (4, 5, 7)).astype(np.float32)
    ours = ODD.probabilities(logits)
    assert np.allclose(ours.sum(0), 1, atol=1e-6)
    assert np.allclose(ours, ODD.probabilities(torch.from_numpy(logits)).numpy(), atol=1e-6)
    assert np.array_equal(ODD.decode(logits), ODD.decode(torch.from_numpy(logits)).numpy())


def test_values_that_cannot_be_written_are_refused_by_name():
    for value in (2**31, 3_000_000_000, -(2**31) - 1):
        with pytest.raises(AutosegError, match=f"label 'x' is {value}; values lie between -2147483648 and 2147483647"):
            Labels.from_dataset({"background": 0, "x": [5, value]})
    edge = Labels.from_dataset({"background": 0, "x": 2**31 - 1, "y": -(2**31)})
    np.testing.assert_array_equal(edge.to_values(np.array([1, 2])), [2**31 - 1, -(2**31)])
    with pytest.raises(AutosegError, match=r"3000000000\], and can lie between"):
        Labels(names=("background", "x"), values=(0, 3_000_000_000)).to_values(np.array([0, 1]))
