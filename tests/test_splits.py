"""Folds: the peer's without groups, whole patients with them, and no leak ever."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import KFold

from autoseg.records import AutosegError, save_json
from autoseg.schema import Fold
from autoseg.splits import Splits, check_splits, kfold, make_splits, read_splits

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
        (Splits(folds=(Fold(train=("case_001",), val=("nobody",)),)), "unknown"),
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
