"""Folds side by side leave what folds one after the other leave; one that fails harms only itself."""

import json
from dataclasses import replace

import pytest
from test_fit import NAME, OPTIONS
from toys import balls_dataset

from autoseg.pipeline.crossval import validated
from autoseg.pipeline.data import plan_and_preprocess
from autoseg.pipeline.fit import fit
from autoseg.pipeline.folds import LOG, Fold, last_lines, train_side_by_side, where_it_is
from autoseg.records import AutosegError
from autoseg.workspace import Workspace


@pytest.fixture
def place(tmp_path):
    balls_dataset(tmp_path / "raw" / NAME, cases=3)
    return Workspace(tmp_path)


@pytest.mark.slow
def test_fit_trains_folds_side_by_side_and_merges_them(place, capsys):
    (card,) = fit(place, "7", replace(OPTIONS, processes=2))
    printed = capsys.readouterr().out
    assert set(card.folds) == {"fold_0", "fold_1", "fold_2"}
    assert card.cases == 3
    for fold in range(3):
        folder = place.fold(NAME, "default", "3d_fullres", fold)
        assert f"3d_fullres/{fold} on cpu: {folder / LOG}" in printed
        assert "mean of classes" in (folder / LOG).read_text()
    assert fit(place, "7", replace(OPTIONS, processes=2)) == (card,)
    assert LOG not in capsys.readouterr().out, "nothing is trained twice"


@pytest.mark.slow
def test_a_fold_that_fails_is_named_and_the_others_are_trained(place, capsys):
    plan_and_preprocess(place, "7", OPTIONS.plan)
    good = OPTIONS.train
    bad = replace(good, changes={**(good.changes or {}), "augmentation": "nowhere:at_all"})
    folds = [
        Fold(configuration="3d_fullres", fold=n, folder=place.fold(NAME, "default", "3d_fullres", n), options=options)
        for n, options in enumerate((bad, good))
    ]
    with pytest.raises(AutosegError, match=r"1 of 2 folds failed; .*\n  3d_fullres/0: code 1, .*train\.log"):
        train_side_by_side(place, "7", folds, processes=2)
    assert "No module named 'nowhere'" in capsys.readouterr().out
    assert [validated(fold.folder) for fold in folds] == [False, True]


def test_how_far_a_fold_has_come_in_words(tmp_path):
    fold = Fold(configuration="2d", fold=3, folder=tmp_path, options=OPTIONS.train)
    assert where_it_is(fold) == "2d/3: first epoch"
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"progress": 0.254, "mean_pseudo_dice": None}) + "\n")
    assert where_it_is(fold) == "2d/3: 25%, Dice ?"
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"progress": 0.5, "mean_pseudo_dice": 0.8124}) + "\n")
    assert where_it_is(fold) == "2d/3: 50%, Dice 0.812"


def test_the_end_of_a_log(tmp_path):
    assert last_lines(tmp_path / "none") == ""
    (tmp_path / "log").write_text("\n".join(map(str, range(40))))
    assert last_lines(tmp_path / "log").splitlines() == [str(n) for n in range(28, 40)]
