"""Which mask belongs to which image, and what cases are called: from names alone."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoseg.datasets.pairing import case_names, keys_of, pair, words


@pytest.mark.parametrize(
    ("images", "masks", "found", "left"),
    [
        ([], [], set(), 0),
        (["a"], ["anything"], {(0, 0)}, 0),
        (["im_1", "im_2", "im_10"], ["10_seg", "1_seg", "2_seg"], {(0, 1), (1, 2), (2, 0)}, 0),
        (["case_001", "case_002"], ["Mask 1", "Mask 2"], {(0, 0), (1, 1)}, 0),
        (["p1_f1", "p1_f2", "p2_f1"], ["p1_f1_gt", "p1_f2_gt", "p2_f1_gt"], {(0, 0), (1, 1), (2, 2)}, 0),
        (["001_20200101_t1", "002_20200317_t1"], ["001_seg", "002_seg"], {(0, 0), (1, 1)}, 0),
        (["case1_2", "case1_3"], ["case1_2_s", "case1_3_s", "case2_1_s"], {(0, 0), (1, 1)}, 1),
        # One image with two masks, and an image and a mask without partner.
        (["x1", "x2", "x3"], ["x1_a", "x1_b", "x2_a", "x4_a"], {(1, 2)}, 3),
        # One image is not paired with the mask that has no name of its own.
        (["p7"], ["seg", "seg_2"], set(), 3),
        (["scan", "scan_2"], ["seg", "seg_2"], {(0, 0), (1, 1)}, 0),
        (["p2", "p2_repeat"], ["p2_ab", "p2_repeat_cd"], {(0, 0), (1, 1)}, 0),
    ],
)
def test_names_are_paired_where_they_say_so_and_listed_elsewhere(images, masks, found, left):
    pairs = pair(images, masks)
    assert set(pairs.found) == found
    assert len(pairs.left_over) == left


def test_ambiguous_names_say_what_they_fit():
    assert pair(["x1", "x2"], ["x1_a", "x1_b"]).left_over == ("image x1: fits x1_a, x1_b", "image x2: no mask")


def test_words_and_keys():
    assert words("Case_007L") == ("case", "7", "l")
    assert words("000") == ("0",)
    assert keys_of(["img_1_a", "img_12_a"]) == [("1",), ("12",)]
    assert keys_of(["alone"]) == [()]
    assert keys_of(["1_1", "1_2", "2_1"]) == [("1", "1"), ("1", "2"), ("2", "1")]
    assert case_names(["a/t1", "b/t1"]) == ["a", "b"]
    assert case_names(["x 1_0000", "x 2_0000"]) == ["x_1", "x_2"]
    assert case_names(["only/one"]) == ["one"]
    assert case_names(["f_0000", "f_0001"]) == ["f_0000", "f_0001"], "numbers of cases, not of channels"
    assert case_names(["aux", "Com1.a", "-b: c", "été"]) == [
        "case_aux",
        "case_Com1.a",
        "b_c",
        "été",
    ]


@settings(max_examples=50, deadline=None)
@given(
    numbers=st.lists(st.integers(0, 9999), min_size=2, max_size=12, unique=True),
    prefixes=st.tuples(st.sampled_from(["", "im_", "scan-"]), st.sampled_from(["", "seg_", "Label "])),
    suffixes=st.tuples(st.sampled_from(["", "_t1", "_0000"]), st.sampled_from(["", "_mask", ".gt"])),
    seed=st.randoms(),
)
def test_numbered_names_find_each_other_whatever_surrounds_them(numbers, prefixes, suffixes, seed):
    images = [f"{prefixes[0]}{n:04d}{suffixes[0]}" for n in numbers]
    masks = [f"{prefixes[1]}{n}{suffixes[1]}" for n in numbers]
    order = list(range(len(masks)))
    seed.shuffle(order)
    pairs = pair(images, [masks[n] for n in order])
    assert {(i, order[m]) for i, m in pairs.found} == {(n, n) for n in order}
