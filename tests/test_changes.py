"""Raw data that are no longer those that were prepared."""

import os
import shutil
import time
from dataclasses import replace

import pytest
from test_pipeline import NAME, PLAN, TRAIN
from toys import balls_dataset, write_balls

from autoseg.layout import open_dataset
from autoseg.pipeline.changes import refuse_changed
from autoseg.pipeline.data import plan_and_preprocess
from autoseg.pipeline.train import train_fold
from autoseg.records import AutosegError, load_json
from autoseg.schema import Fingerprint, Fold
from autoseg.workspace import Workspace

FOLD = Fold(train=("p0_1", "p1_0", "p1_1"), val=("p0_0",))
SMALL = replace(PLAN, configurations=("2d",))


@pytest.fixture
def place(tmp_path):
    """Site A is prepared; it lies outside the workspace."""
    balls_dataset(tmp_path / "A" / NAME)
    place = Workspace(tmp_path / "root")
    plan_and_preprocess(place, str(tmp_path / "A" / NAME), SMALL)
    return place


def compare(place, raw):
    fingerprint = load_json(Fingerprint, place.prepared(NAME) / "fingerprint.json")
    refuse_changed(place, NAME, open_dataset(raw), FOLD, fingerprint, "CURE")


def test_files_that_changed_after_they_were_prepared_are_not_trained_on(place, tmp_path):
    raw = tmp_path / "A" / NAME
    compare(place, raw)
    os.utime(raw / "imagesTr" / "p0_1_0000.nii.gz")
    os.utime(raw / "dataset.json")
    compare(place, raw)
    before = (raw / "imagesTr" / "p0_1_0000.nii.gz").read_bytes()
    shutil.copy2(raw / "imagesTr" / "p1_1_0000.nii.gz", raw / "imagesTr" / "p0_1_0000.nii.gz")
    with pytest.raises(AutosegError, match=r"1 cases of .* are not those that were prepared: p0_1; .* Run: CURE$"):
        compare(place, raw)
    (raw / "imagesTr" / "p0_1_0000.nii.gz").write_bytes(before)
    compare(place, raw)
    shutil.copy2(raw / "labelsTr" / "p1_1.nii.gz", raw / "labelsTr" / "p1_0.nii.gz")
    with pytest.raises(AutosegError, match=r"prepared: p1_0; .* Run: autoseg plan_and_preprocess -d 7$"):
        train_fold(place, "7", "2d", "all", TRAIN)


def test_labels_to_score_against_and_another_folder_are_compared_whatever_their_time(place, tmp_path):
    raw, other = tmp_path / "A" / NAME, tmp_path / "B" / NAME
    shutil.copytree(raw, other)
    later = time.time() + 1000
    os.utime(place.prepared(NAME) / "fingerprint.json", (later, later))
    compare(place, other)
    write_balls(other, "p1_1", 9)
    with pytest.raises(AutosegError, match=f"were prepared from {raw}: p1_1;"):
        compare(place, other)
    shutil.copy2(raw / "labelsTr" / "p1_1.nii.gz", raw / "labelsTr" / "p0_0.nii.gz")
    with pytest.raises(AutosegError, match="were prepared: p0_0;"):
        compare(place, raw)


def test_another_dataset_of_the_same_name_does_not_take_the_place_of_the_first(place, tmp_path):
    raw, other = tmp_path / "A" / NAME, tmp_path / "B" / NAME
    shutil.copytree(raw, other)
    plan_and_preprocess(place, str(other), SMALL)  # a copy is the same dataset
    assert place.dataset("7") == (NAME, other)
    write_balls(other, "p1_1", 9)
    plan_and_preprocess(place, "7", SMALL)  # it may change
    with pytest.raises(AutosegError, match=f"^{other} is another dataset called {NAME}, .*; rename one of the two"):
        plan_and_preprocess(place, str(raw), SMALL)
    assert place.dataset("7") == (NAME, other)
    shutil.rmtree(other)
    plan_and_preprocess(place, str(raw), SMALL)
    assert place.dataset("7") == (NAME, raw)
