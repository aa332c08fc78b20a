"""Labels: any integers in, indices inside, the same integers out."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoseg.labels import Labels
from autoseg.records import AutosegError

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
        ({"background": 0, "whole": [1, 2]}, "region"),
        ({"background": 0, "a": 1, "ignore": 2}, "ignore"),
        ({"a": 1}, "background"),
        ({"background": 0, "a": "1"}, "integer"),
        ({"background": 0, "a": 1, "b": 1}, "unique"),
        ({"background": 0}, "at least one class"),
    ],
)
def test_what_is_not_supported_is_refused_with_its_word(entry, word):
    with pytest.raises(AutosegError, match=word):
        Labels.from_dataset(entry)


def test_probabilities_agree_between_numpy_and_torch_and_sum_to_one():
    logits = np.random.default_rng(0).normal(0, 50, (4, 5, 7)).astype(np.float32)
    ours = ODD.probabilities(logits)
    assert np.allclose(ours.sum(0), 1, atol=1e-6)
    assert np.allclose(ours, ODD.probabilities(torch.from_numpy(logits)).numpy(), atol=1e-6)
    assert np.array_equal(ODD.decode(logits), ODD.decode(torch.from_numpy(logits)).numpy())
