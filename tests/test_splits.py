"""Folds: the peer's without groups, whole patients with them, and no leak ever."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import KFold

from autoseg.records import AutosegError, save_json
from autoseg.schema import Fold
from autoseg.splits import Splits, check_splits, kfold, make_splits, mended, read_splits

CASES = [f"case_{i:03d}" for i in range(23)]
FRAMES = [f"patient{i:02d}_frame{f}" for i in range(11) for f in (1, 2)]


@settings(max_examples=20, deadline=None)
@given(st.integers(5, 60), st.integers(2, 5))
def test_kfold_equals_scikit_learn(count, folds):
    items = [f"c{i:02d}" for i in range(count)]
    theirs = KFold(folds, shuffle=True, random_state=12345).split(items)
    expected = [(tuple(items[i] for i in a), tuple(items[i] for i in b)) for a, b in theirs]
    assert kfold(items, folds) == expected


def test_every_case_is_held_out_once():
    splits = make_splits(CASES)
    assert len(splits.folds) == 5
    assert sorted(case for fold in splits.folds for case in fold.val) == CASES
    assert all(not set(fold.train) & set(fold.val) for fold in splits.folds)


def test_order_of_the_cases_does_not_matter():
    assert make_splits(CASES[::-1]) == make_splits(CASES)


def test_few_cases_give_as_many_folds():
    assert len(make_splits(CASES[:3]).folds) == 3
    with pytest.raises(AutosegError, match="at least 2"):
        make_splits(CASES[:1])


def test_patients_stay_whole():
    splits = make_splits(FRAMES, group_by=r"(patient\d+)")
    for fold in splits.folds:
        assert not {case[:9] for case in fold.train} & {case[:9] for case in fold.val}
        assert len(fold.train) + len(fold.val) == 22


def test_the_test_set_is_locked_away_whole():
    splits = make_splits(FRAMES, group_by=r"(patient\d+)", test_fraction=0.2)
    assert len(splits.test) == 4
    locked = {case[:9] for case in splits.test}
    assert len(locked) == 2
    for fold in splits.folds:
        assert not locked & {case[:9] for case in (*fold.train, *fold.val)}


def test_all_trains_on_everything_but_the_test_set():
    splits = make_splits(FRAMES, group_by=r"(patient\d+)", test_fraction=0.2)
    assert set(splits.fold("all").train) == set(FRAMES) - set(splits.test)
    with pytest.raises(AutosegError, match="no fold 5"):
        splits.fold(5)


@pytest.mark.parametrize(("pattern", "word"), [("(", "no valid"), ("nobody", "does not match")])
def test_a_wrong_pattern_is_said(pattern, word):
    with pytest.raises(AutosegError, match=word):
        make_splits(FRAMES, group_by=pattern)


@pytest.mark.parametrize(
    ("splits", "word"),
    [
        (Splits(folds=(Fold(train=("case_001", "case_002"), val=("case_002",)),)), "in training and in validation"),
        (Splits(folds=(Fold(train=("case_001",), val=("case_002",)),), test=("case_001",)), "locked test set"),
        (
            Splits(folds=(Fold(train=("case_001",), val=("nobody",)),)),
            "does not have: nobody; take them out of its folds",
        ),
        (Splits(folds=(Fold(train=("case_001",), val=()),)), "no validation"),
    ],
)
def test_leaks_are_found(splits, word):
    with pytest.raises(AutosegError, match=word):
        check_splits(splits, CASES, "here")


def test_a_patient_on_both_sides_of_given_folds_is_a_leak():
    splits = Splits(folds=(Fold(train=("patient00_frame1",), val=("patient00_frame2",)),))
    check_splits(splits, FRAMES, "here")
    with pytest.raises(AutosegError, match="patient00 in training and in validation"):
        check_splits(Splits(folds=splits.folds, group_by=r"(patient\d+)"), FRAMES, "here")


def test_both_file_forms_are_read(tmp_path):
    splits = make_splits(CASES)
    save_json(splits, tmp_path / "splits.json")
    assert read_splits(tmp_path / "splits.json", CASES) == splits
    peer = [{"train": list(fold.train), "val": list(fold.val)} for fold in splits.folds]
    (tmp_path / "splits_final.json").write_text(json.dumps(peer))
    assert read_splits(tmp_path / "splits_final.json", CASES).folds == splits.folds


@pytest.mark.parametrize("text", ["{", '{"folds": 3}', "[1]"])
def test_a_broken_file_is_named(tmp_path, text):
    (tmp_path / "splits.json").write_text(text)
    with pytest.raises(AutosegError, match=r"splits\.json"):
        read_splits(tmp_path / "splits.json", CASES)


# Cases that come and go.


def test_a_removed_case_leaves_its_fold_and_the_others_stay_as_they_are():
    before = make_splits(CASES)
    gone = before.folds[1].val[0]
    after, said = mended(before, [case for case in CASES if case != gone])
    assert said == (f"no longer in the dataset, and taken out: {gone}",)
    for one, other in zip(before.folds, after.folds, strict=True):
        assert other.val == tuple(case for case in one.val if case != gone)
        assert other.train == tuple(case for case in one.train if case != gone)
    assert mended(after, after.every()) == (after, ())


def test_new_cases_are_held_out_where_fewest_are_and_learnt_elsewhere():
    before = make_splits(["a", "b", "c", "d", "e"])
    held = [fold.val for fold in before.folds]
    after, said = mended(before, ["a", "b", "c", "d", "e", "x", "y"])
    assert [fold.val for fold in after.folds] == [(*held[0], "x"), (*held[1], "y"), *held[2:]]
    assert said == ("new, and held out by fold 0: x", "new, and held out by fold 1: y")
    assert after.shares_out() and set(after.folds[0].train) == {"a", "b", "c", "d", "e", "x", "y"} - set(
        after.folds[0].val
    )


def test_a_new_case_goes_where_its_patient_is():
    pattern = r"(patient\d+)"
    before = make_splits(FRAMES, group_by=pattern, test_fraction=0.2)
    seen, locked = before.folds[2].val[0][:9], before.test[0][:9]
    new = [f"{seen}_frame9", f"{locked}_frame9"]
    after, _ = mended(before, [*FRAMES, *new])
    assert new[0] in after.folds[2].val and new[1] in after.test
    check_splits(after, [*FRAMES, *new], "here")


def test_a_fold_that_held_out_nothing_else_goes_unless_a_new_case_fills_it():
    before = make_splits(["a", "b", "c"])
    (gone,) = before.folds[1].val
    stay = sorted({"a", "b", "c"} - {gone})
    after, said = mended(before, stay)
    assert [fold.val for fold in after.folds] == [before.folds[0].val, before.folds[2].val]
    assert said[1] == "fold 1 held out nothing else and is gone; those after it count one less"
    filled, _ = mended(before, [*stay, "x"])
    assert [fold.val for fold in filled.folds] == [before.folds[0].val, ("x",), before.folds[2].val]
    with pytest.raises(AutosegError, match="cross-validation needs 2: add cases"):
        mended(before, stay[:1])


def test_folds_that_hold_out_only_some_cases_take_no_new_ones():
    given = Splits(folds=(Fold(train=("a", "b"), val=("c",)),))
    assert mended(given, ["a", "c", "x"])[0].folds == (Fold(train=("a",), val=("c",)),)
