"""Regions, the ignore label and partly annotated cases, from raw files to scored predictions, on two balls."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from toys import TINY, balls_dataset, write_balls
from typer.testing import CliRunner

from autoseg.bundle import ModelCard
from autoseg.cli import app
from autoseg.evaluation import evaluate_folders
from autoseg.layout import open_dataset
from autoseg.pipeline.data import check, plan_and_preprocess
from autoseg.pipeline.fit import FitOptions, fit
from autoseg.pipeline.planning import PlanOptions
from autoseg.pipeline.predict import PredictOptions, predict
from autoseg.pipeline.recipe import TrainOptions
from autoseg.pipeline.train import train_fold
from autoseg.preprocess import ANNOTATED
from autoseg.readers import read_image, read_labels, write_labels
from autoseg.records import AutosegError, load_json
from autoseg.schema import Fingerprint, Plan
from autoseg.splits import Splits
from autoseg.store import read_case
from autoseg.workspace import Workspace

NAME = "Dataset007_Balls"
REGIONS = {"background": 0, "small": 300, "both": [7, 300]}
PLAN = PlanOptions(configurations=("3d_fullres",), request=TINY)
TRAIN = TrainOptions(
    epochs=1,
    device="cpu",
    changes={"steps_per_epoch": 8, "validation_steps": 1, "learning_rate": 0.02, "momentum": 0.9, "tune": False},
)


def fitted(root, **more) -> tuple[Workspace, ModelCard]:
    """A model of the first fold of three cases, cross-validated on c0."""
    workspace = Workspace(root)
    raw = workspace.raw(NAME)
    if not raw.exists():
        balls_dataset(raw, cases=3, prefix="c", **more)
    folds = [{"train": ["c1", "c2"], "val": ["c0"]}, {"train": ["c0"], "val": ["c1", "c2"]}]
    (raw / "splits_final.json").write_text(json.dumps(folds))
    (card,) = fit(workspace, NAME, FitOptions(plan=PLAN, train=TRAIN, folds=(0,)))
    return workspace, card


def predicted(workspace, root, **options):
    write_balls(root, "x", seed=11, split="Ts")
    predict(workspace, root / "imagesTs", root / "out", PredictOptions(dataset=NAME, device="cpu", **options))
    return read_labels(root / "out" / "x.nii.gz")[0].array[0]


def rewrite(path, change):
    volume, stored = read_labels(path)
    write_labels(change(volume.array[0].astype(np.int16)), stored, path)


def test_regions_all_the_way(tmp_path, capsys):
    workspace, card = fitted(tmp_path, labels=REGIONS)
    printed = capsys.readouterr().out
    assert "both [7, 300] as 7, small [300] as 300" in printed
    assert set(card.dice) == {"both", "small", "foreground"}
    assert card.dice["both"] > 0.1
    plan = load_json(Plan, workspace.plan_folder(NAME, "default") / "plan.json")
    assert next(reason for reason in plan.reasons if reason.decision == "labels").outcome.endswith("small [300] as 300")
    configuration = plan.configuration("3d_fullres")
    assert plan.in_channels(replace(configuration, previous_stage="3d_lowres")) == 3, "a mask a value, not a region"
    found = predicted(workspace, tmp_path, save_probabilities=True)
    assert set(np.unique(found)) <= {0, 7, 300}
    maps = read_image([tmp_path / "out" / "x_probabilities.nii.gz"], channels=2)[0].array
    assert maps.shape == (2, *found.shape)
    assert ((maps[0] > 0.5) | (maps[1] > 0.5)).sum() >= (found > 0).sum()

    summary = evaluate_folders(tmp_path / "labelsTs", tmp_path / "out", labels=open_dataset(workspace.raw(NAME)).labels)
    assert summary.labels == {"both": (7, 300), "small": (300,)}
    truth = read_labels(tmp_path / "labelsTs" / "x.nii.gz")[0].array[0]
    both = summary.scores[0]
    assert both.dice == pytest.approx(2 * ((found > 0) & (truth > 0)).sum() / ((found > 0).sum() + (truth > 0).sum()))
    # The same from the command line, where the labels are named by their dataset.
    given = ["evaluate", str(tmp_path / "labelsTs"), str(tmp_path / "out"), "-d", str(workspace.raw(NAME))]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    assert "both" in done.output
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["labels"] == {"both": [7, 300], "small": [300]}


def test_check_prints_the_order_that_was_found(tmp_path, capsys):
    workspace = Workspace(tmp_path)
    balls_dataset(workspace.raw(NAME), cases=2, labels=REGIONS)
    check(workspace, NAME)
    assert "both [7, 300] as 7, small [300] as 300" in capsys.readouterr().out
    balls_dataset(workspace.raw(NAME), cases=2, labels=REGIONS, regions_class_order=[300, 7])
    check(workspace, NAME)
    assert "predictions lose the difference" in capsys.readouterr().out


def test_ignored_voxels_all_the_way(tmp_path, capsys):
    """A quarter of each case is ignored, and lies about: its labels are those of the other ball."""
    labels = {"background": 0, "big": 7, "ignore": 1, "small": 300}
    workspace = Workspace(tmp_path)
    raw = workspace.raw(NAME)
    balls_dataset(raw, cases=3, prefix="c", labels=labels)

    def ignore_a_quarter(array):
        array = array.copy()
        array[:, : array.shape[1] // 2, : array.shape[2] // 2] = 1
        return array

    for path in (raw / "labelsTr").iterdir():
        rewrite(path, ignore_a_quarter)
    workspace, card = fitted(tmp_path)
    printed = capsys.readouterr().out
    assert "voxels of value 1 are ignored" in printed
    assert card.dice["big"] > 0.1

    fingerprint = load_json(Fingerprint, workspace.prepared(NAME) / "fingerprint.json")
    (stats,) = fingerprint.intensities
    assert stats.minimum > 4, "background under the ignored value is no foreground"
    case = read_case(workspace.cases(NAME, "default", "3d_fullres"), "c0")
    assert set(case.locations) == {ANNOTATED, 1, 2}
    assert set(np.unique(case.labels[...])) <= {-1, 0, 1, 2, 3}

    # What a prediction says there changes no score; elsewhere it does.
    found = predicted(workspace, tmp_path)
    assert set(np.unique(found)) <= {0, 7, 300}
    rewrite(tmp_path / "labelsTs" / "x.nii.gz", ignore_a_quarter)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    before = evaluate_folders(tmp_path / "labelsTs", tmp_path / "out")
    rewrite(tmp_path / "out" / "x.nii.gz", lambda array: np.where(ignore_a_quarter(array) == 1, 300, array))
    assert evaluate_folders(tmp_path / "labelsTs", tmp_path / "out").scores == before.scores
    rewrite(tmp_path / "out" / "x.nii.gz", lambda array: np.full_like(array, 300))
    assert evaluate_folders(tmp_path / "labelsTs", tmp_path / "out").scores != before.scores


def test_partly_annotated_cases_all_the_way(tmp_path):
    """In the first two cases only one ball is drawn; both are learnt, and each is scored where it was annotated."""
    workspace = Workspace(tmp_path)
    raw = workspace.raw(NAME)
    annotated = {"c0": ["big"], "c1": ["small"]}
    balls_dataset(raw, cases=3, prefix="c", annotated=annotated)
    with pytest.raises(AutosegError, match="2 errors"):
        check(workspace, NAME)
    for case, gone in (("c0", 300), ("c1", 7)):
        rewrite(raw / "labelsTr" / f"{case}.nii.gz", lambda array, gone=gone: np.where(array == gone, 0, array))
    check(workspace, NAME)
    _, card = fitted(tmp_path)
    assert card.dice["big"] > 0.1
    assert card.dice["small"] is None, "not scored in c0, where it was not annotated"
    shutil.copytree(raw / "labelsTr", tmp_path / "truth")
    summary = evaluate_folders(raw / "labelsTr", tmp_path / "truth")
    assert [score.label for score in summary.scores] == ["big", "small", "big", "small"]
    assert [score.dice for score in summary.scores] == [1, 1, 1, 1]


def test_what_was_annotated_is_part_of_the_data(tmp_path):
    """Cases are looked at again, and a run with other annotations is another run."""
    workspace = Workspace(tmp_path)
    raw = workspace.raw(NAME)
    balls_dataset(raw, cases=2)
    first = plan_and_preprocess(workspace, NAME, PLAN).data_hash
    rewrite(raw / "labelsTr" / "p0_0.nii.gz", lambda array: np.where(array == 300, 0, array))
    second = plan_and_preprocess(workspace, NAME, PLAN).data_hash
    balls = json.loads((raw / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps(balls | {"annotated": {"p0_0": ["big"]}}))
    assert len({first, second, plan_and_preprocess(workspace, NAME, PLAN).data_hash}) == 3
    folds = load_json(Splits, workspace.prepared(NAME) / "splits.json").folds
    lacking = next(number for number, fold in enumerate(folds) if fold.train == ("p0_0",))
    with pytest.raises(AutosegError, match=f"fold {lacking} trains on no case in which small was annotated"):
        train_fold(workspace, NAME, "3d_fullres", str(lacking), TRAIN)
