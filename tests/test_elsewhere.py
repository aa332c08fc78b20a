"""A raw dataset that lies outside the workspace: later commands find it by its number."""

from dataclasses import replace

import pytest
from test_pipeline import NAME, PLAN
from toys import balls_dataset

from autoseg.pipeline.best import BestOptions, find_best
from autoseg.pipeline.data import plan_and_preprocess
from autoseg.pipeline.recipe import TrainOptions
from autoseg.pipeline.train import train_fold
from autoseg.records import AutosegError
from autoseg.workspace import Workspace


def test_what_was_planned_by_path_is_found_by_number_and_by_name(tmp_path):
    raw = tmp_path / "my data" / NAME
    balls_dataset(raw)
    place = Workspace(tmp_path / "root")
    with pytest.raises(AutosegError, match=rf"run: autoseg plan_and_preprocess -d '{raw}' --plan small$"):
        train_fold(place, str(raw), "3d_fullres", "0", TrainOptions(plan="small"))
    plan_and_preprocess(place, str(raw), replace(PLAN, name="small", configurations=("2d",)))
    assert place.dataset("7") == (NAME, raw)
    with pytest.raises(AutosegError, match=r"are not prepared .* run: autoseg plan_and_preprocess -d 7 --plan small$"):
        train_fold(place, "7", "3d_fullres", "0", TrainOptions(plan="small"))
    with pytest.raises(AutosegError, match=f"train them: autoseg fit -d {NAME} -c all$"):
        find_best(place, NAME, BestOptions())


def test_a_folder_that_is_gone_is_named(tmp_path):
    place = Workspace(tmp_path / "root")
    place.remember(NAME, tmp_path / "gone")
    with pytest.raises(AutosegError, match="gone is no folder"):
        plan_and_preprocess(place, "7", PLAN)
