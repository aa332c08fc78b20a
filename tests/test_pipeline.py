"""The verbs end to end on small synthetic data, through the command line's own functions."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from safetensors.torch import load_file
from toys import TINY, balls_dataset, write_balls

from autoseg.layout import open_dataset
from autoseg.pipeline.crossval import cross_validate
from autoseg.pipeline.data import check, plan_and_preprocess
from autoseg.pipeline.planning import PlanOptions
from autoseg.pipeline.predict import PredictOptions, predict
from autoseg.pipeline.recipe import TrainOptions
from autoseg.pipeline.share import export_model
from autoseg.pipeline.train import train_fold
from autoseg.planners import plan_like
from autoseg.records import AutosegError, load_json, save_json
from autoseg.schema import Fingerprint, Request, Run
from autoseg.splits import Splits
from autoseg.store import list_cases
from autoseg.workspace import Workspace

NAME = "Dataset007_Balls"
QUICK = {"steps_per_epoch": 6, "validation_steps": 1, "learning_rate": 0.02}
PLAN = PlanOptions(request=TINY)
TRAIN = TrainOptions(epochs=3, device="cpu", changes=QUICK)


@pytest.fixture
def place(tmp_path):
    balls_dataset(tmp_path / "raw" / NAME)
    return Workspace(tmp_path)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_check_finds_nothing_in_good_data_and_writes_nothing(place, capsys):
    check(place, "7")
    assert "no errors, 0 warnings" in capsys.readouterr().out
    assert [p.name for p in place.root.iterdir()] == ["raw"]


def test_errors_are_all_listed_and_nothing_is_written(place, capsys):
    raw = place.raw(NAME)
    (raw / "imagesTr" / "p0_0_0000.nii.gz").write_bytes(b"not an image")
    labels = sitk.ReadImage(str(raw / "labelsTr" / "p0_1.nii.gz"))
    sitk.WriteImage(labels + 1, str(raw / "labelsTr" / "p0_1.nii.gz"))
    with pytest.raises(AutosegError, match="2 errors"):
        plan_and_preprocess(place, "7", PLAN)
    printed = capsys.readouterr().out
    assert "p0_0" in printed
    assert "label values 1, 8, 301" in printed
    assert [p.name for p in place.root.iterdir()] == ["raw"]


def test_a_second_run_does_only_what_is_missing_or_changed(place, capsys):
    plan_and_preprocess(place, "007", PLAN)
    prepared = place.cases(NAME, "default", "3d_fullres")
    before = tree(place.prepared(NAME))
    stamps = {p: p.stat().st_mtime_ns for p in prepared.rglob("*.b2nd")}
    shutil.rmtree(prepared / "p0_1")
    capsys.readouterr()
    plan_and_preprocess(place, "7", PLAN)
    assert "3 of 4 cases are prepared already" in capsys.readouterr().out
    assert tree(place.prepared(NAME)) == before
    assert {p for p in stamps if p.stat().st_mtime_ns != stamps[p]} == set((prepared / "p0_1").glob("*.b2nd"))
    write_balls(place.raw(NAME), "p0_0", seed=9)
    plan_and_preprocess(place, "7", PLAN)
    assert tree(place.prepared(NAME)) != before
    assert len(list_cases(prepared)) == 4


def test_one_failing_case_is_named_and_the_others_are_prepared(place, monkeypatch):
    import autoseg.pipeline.preparing as preparing

    def fail(folder, case, key, patch=None):
        if case.case == "p1_0":
            raise OSError("disk says no")
        real(folder, case, key, patch=patch)

    real = preparing.write_case
    monkeypatch.setattr(preparing, "write_case", fail)
    with pytest.raises(AutosegError, match="p1_0: OSError: disk says no"):
        plan_and_preprocess(place, "7", PLAN)
    assert list_cases(place.cases(NAME, "default", "3d_fullres")) == ("p0_0", "p0_1", "p1_1")


def test_folds_given_with_the_data_are_honoured_and_leaks_refused(place):
    given = place.raw(NAME) / "splits_final.json"
    given.write_text(json.dumps([{"train": ["p0_0", "p0_1", "p1_0"], "val": ["p1_1"]}]))
    plan_and_preprocess(place, "7", replace(PLAN, configurations=("3d_fullres",)))
    assert len(json.loads((place.prepared(NAME) / "splits.json").read_text())["folds"]) == 1
    with pytest.raises(AutosegError, match="p1 in training and in validation"):
        plan_and_preprocess(place, "7", replace(PLAN, group_by=r"(p\d)"))


def remove_case(place, case):
    for path in (f"imagesTr/{case}_0000.nii.gz", f"labelsTr/{case}.nii.gz"):
        (place.raw(NAME) / path).unlink()


def test_cases_may_come_and_go_after_planning(place, capsys):
    """Four folds of one case each; p1_0 goes and p9_0 comes, which takes its place in the folds."""
    options = replace(PLAN, configurations=("2d",), test_fraction=0.0)
    plan_and_preprocess(place, "7", options)
    before = load_json(Splits, place.prepared(NAME) / "splits.json")
    remove_case(place, "p1_0")
    write_balls(place.raw(NAME), "p9_0", 9)
    with pytest.raises(AutosegError, match=r"splits\.json names .*: p1_0; plan again .*plan_and_preprocess -d 7"):
        train_fold(place, "7", "2d", "0", TRAIN)
    capsys.readouterr()
    plan_and_preprocess(place, "7", options)
    after = load_json(Splits, place.prepared(NAME) / "splits.json")
    said = capsys.readouterr().out
    place_of = next(number for number, fold in enumerate(before.folds) if fold.val == ("p1_0",))
    assert "Folds: no longer in the dataset, and taken out: p1_0" in said
    assert f"Folds: new, and held out by fold {place_of}: p9_0" in said
    assert "under another --run" in said and "in no fold" not in said
    assert [fold.val for fold in after.folds] == [
        ("p9_0",) if number == place_of else fold.val for number, fold in enumerate(before.folds)
    ]
    plan_and_preprocess(place, "7", options)
    assert load_json(Splits, place.prepared(NAME) / "splits.json") == after
    assert "Folds: new" not in capsys.readouterr().out


def test_the_options_that_made_the_folds_may_be_repeated_after_a_case_has_gone(place):
    options = replace(PLAN, configurations=("2d",), test_fraction=0.25)
    plan_and_preprocess(place, "7", options)
    before = load_json(Splits, place.prepared(NAME) / "splits.json")
    remove_case(place, before.folds[0].val[0])
    for _ in range(2):
        plan_and_preprocess(place, "7", options)
    assert load_json(Splits, place.prepared(NAME) / "splits.json").test == before.test


def test_folds_that_were_given_are_refused_with_the_names_that_are_gone(place):
    given = place.raw(NAME) / "splits_final.json"
    given.write_text(json.dumps([{"train": ["p0_0", "p0_1", "p1_0"], "val": ["p1_1"]}]))
    remove_case(place, "p0_1")
    with pytest.raises(
        AutosegError, match=r"splits_final\.json names .* not have: p0_1; take them out of its folds, or"
    ):
        plan_and_preprocess(place, "7", PLAN)


def test_a_missing_channel_and_a_broken_label_stand_in_one_table(tmp_path, capsys):
    raw = tmp_path / "raw" / NAME
    balls_dataset(raw, channel_names={"0": "a", "1": "b"})
    for path in sorted((raw / "imagesTr").iterdir()):
        shutil.copy(path, str(path).replace("_0000.", "_0001."))
    (raw / "imagesTr" / "p0_0_0001.nii.gz").unlink()
    (raw / "imagesTr" / "p0_1_0000.nii.gz").rename(raw / "imagesTr" / "p0_1.nii.gz")
    (raw / "labelsTr" / "p1_1.nii.gz").write_bytes(b"broken")
    with pytest.raises(AutosegError, match="4 errors in the dataset, see the table"):
        check(Workspace(tmp_path), "7")
    _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[:2] for row in rows] == [["error", name] for name in ("p0_0", "p0_1", "p0_1.nii.gz", "p1_1")]
    assert "missing p0_0_0001.nii.gz in imagesTr" in rows[0] and "missing p0_1_0000.nii.gz" in rows[1]
    assert "rename it to p0_1_0000.nii.gz" in rows[2] and "labelsTr/p1_1.nii.gz" in rows[3]
    with pytest.raises(AutosegError, match="nothing was written"):
        plan_and_preprocess(Workspace(tmp_path), "7", PLAN)
    assert not (tmp_path / "prepared").exists()


def test_other_folds_than_those_made_before_are_refused(place):
    plan_and_preprocess(place, "7", PLAN)
    with pytest.raises(AutosegError, match="other folds"):
        plan_and_preprocess(place, "7", replace(PLAN, group_by=r"(p\d)"))


def test_training_before_preparing_says_what_to_run(place):
    with pytest.raises(AutosegError, match="autoseg plan_and_preprocess -d 7"):
        train_fold(place, "7", "3d_fullres", "0", TRAIN)
    plan_and_preprocess(place, "7", replace(PLAN, configurations=("2d",)))
    with pytest.raises(AutosegError, match="4 cases are not prepared"):
        train_fold(place, "7", "3d_fullres", "0", TRAIN)
    with pytest.raises(AutosegError, match="no fold 4"):
        train_fold(place, "7", "2d", "4", TRAIN)
    with pytest.raises(AutosegError, match="no configuration '3d'; it has 2d, 3d_fullres"):
        train_fold(place, "7", "3d", "0", TRAIN)


def test_from_raw_images_to_scored_predictions(place, capsys, tmp_path):
    """Two folds, a resumed and a refused run, ensemble prediction in the grid and values of the input, evaluation."""
    from autoseg.evaluation import evaluate_folders

    plan_and_preprocess(place, "7", PLAN)
    for fold in ("0", "1"):
        summary = train_fold(place, "7", "3d_fullres", fold, TRAIN)
        folder = place.fold(NAME, "default", "3d_fullres", fold)
        again = evaluate_folders(place.raw(NAME) / "labelsTr", folder / "validation", partial=True, quiet=True)
        assert [s.dice for s in again.scores] == [s.dice for s in summary.scores]
        assert again.classes == summary.classes
        run = load_json(Run, folder / "run.json")
        assert run.finished is not None
        assert run.recipe.epochs == 3
        names = {p.name for p in folder.iterdir()}
        assert {"run.json", "weights.safetensors", "metrics.jsonl", "progress.png", "validation"} <= names

    printed = capsys.readouterr().out
    assert "Computing: float32, eager, contiguous" in printed
    assert "nothing was probed: training takes about" in printed
    assert run.tuning is not None
    assert run.tuning.precision == "float32"
    assert train_fold(place, "7", "3d_fullres", "0", TRAIN).scores
    assert "trained already" in capsys.readouterr().out
    train_fold(place, "7", "3d_fullres", "1", replace(TRAIN, epochs=4))
    assert "Computing as before: float32" in capsys.readouterr().out
    changed = replace(TRAIN, run="plain", epochs=1, changes=QUICK | {"tune": False})
    train_fold(place, "7", "3d_fullres", "1", changed)
    assert "nothing was probed: tune=false" in capsys.readouterr().out
    shutil.rmtree(place.fold(NAME, "plain", "3d_fullres", 1))
    with pytest.raises(AutosegError, match=r"another recipe.*--run"):
        train_fold(place, "7", "3d_fullres", "0", replace(TRAIN, changes={**QUICK, "clip_norm": 1.0}))
    with pytest.raises(AutosegError, match="--epochs"):
        train_fold(place, "7", "3d_fullres", "2", replace(TRAIN, changes={"epochs": 4}))

    cross_validate([place.fold(NAME, "default", "3d_fullres", fold) for fold in (0, 1)], open_dataset(place.raw(NAME)))
    unseen = tmp_path / "new"
    write_balls(unseen, "x", seed=11, split="Ts")
    outcomes = predict(place, unseen / "imagesTs", tmp_path / "out", PredictOptions(save_probabilities=True))
    printed = capsys.readouterr().out
    assert f"Model: {NAME} 3d_fullres, fold 0, 1" in printed
    assert [outcome.case for outcome in outcomes] == ["x"]
    image = sitk.ReadImage(str(unseen / "imagesTs" / "x_0000.nii.gz"))
    labels = sitk.ReadImage(str(tmp_path / "out" / "x.nii.gz"))
    for of in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        assert np.allclose(getattr(image, of)(), getattr(labels, of)(), atol=1e-6)
    assert set(np.unique(sitk.GetArrayFromImage(labels))) <= {0, 7, 300}
    maps = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "x_probabilities.nii.gz")))
    assert np.allclose(maps.sum(-1 if maps.shape[-1] == 3 else 0), 1, atol=1e-3)

    with pytest.raises(AutosegError, match="fold 3 is not trained"):
        predict(place, unseen / "imagesTs", tmp_path / "out", PredictOptions(folds=("3",)))
    train_fold(place, "7", "3d_fullres", "0", replace(TRAIN, run="second", epochs=1))
    with pytest.raises(AutosegError, match=r"2 models.*\n.*--run default\n.*--run second"):
        predict(place, unseen / "imagesTs", tmp_path / "out", PredictOptions())
    predict(place, unseen / "imagesTs", tmp_path / "out2", PredictOptions(run="second", mirror=False))
    assert (tmp_path / "out2" / "x.nii.gz").is_file()


def test_predicting_without_a_model_says_what_to_do(place, tmp_path):
    with pytest.raises(AutosegError, match=r"no finished model.*autoseg train"):
        predict(place, tmp_path, tmp_path / "out", PredictOptions())
    with pytest.raises(AutosegError, match="holds no fold"):
        predict(place, tmp_path, tmp_path / "out", PredictOptions(model=tmp_path))


def test_one_bad_image_harms_only_itself(place, tmp_path):
    plan_and_preprocess(place, "7", PLAN)
    train_fold(place, "7", "3d_fullres", "0", replace(TRAIN, epochs=1))
    unseen = tmp_path / "new"
    for seed, name in enumerate(("a", "b", "c")):
        write_balls(unseen, name, seed, "Ts")
    bad = unseen / "imagesTs" / "b_0000.nii.gz"
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(AutosegError, match=r"1 of 3 cases:\n  b: "):
        predict(place, unseen / "imagesTs", tmp_path / "out", PredictOptions(mirror=False))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.nii.gz", "c.nii.gz", "status.csv"]


def test_pretrained_weights_are_where_training_starts(place):
    plan_and_preprocess(place, "7", PLAN)
    train_fold(place, "7", "3d_fullres", "0", replace(TRAIN, epochs=1))
    first = place.fold(NAME, "default", "3d_fullres", "0")
    still = {**QUICK, "learning_rate": 0.0}
    train_fold(place, "7", "3d_fullres", "0", replace(TRAIN, epochs=1, run="fine", pretrained=first, changes=still))
    fine = place.fold(NAME, "fine", "3d_fullres", "0")
    assert (fine / "weights.safetensors").read_bytes() == (first / "weights.safetensors").read_bytes()
    with pytest.raises(AutosegError, match="pretrained"):
        train_fold(place, "7", "3d_fullres", "0", replace(TRAIN, epochs=1, run="fine", changes=still))


def test_a_model_file_is_planned_like_and_fine_tuned(place, tmp_path, capsys):
    """Other classes, another spacing and a channel more: the plan is that of the file, the known class stays known."""
    changes = TINY.changes | {"configurations.3d_fullres.spacing_mm": "[1.2, 1, 1]"}
    plan_and_preprocess(place, "7", PlanOptions(request=Request(changes=changes)))
    train_fold(place, "7", "3d_fullres", "0", TRAIN)
    export_model(place, tmp_path / "m.autoseg", PredictOptions())
    source = load_json(Run, place.fold(NAME, "default", "3d_fullres", 0) / "run.json").plan
    other = place.raw("Dataset008_More")
    for seed in range(4):
        write_balls(other, f"c{seed}", seed + 20, channels=2)
    labels = {"background": 0, "little": 300, "big": 7}
    facts = {"channel_names": {"0": "PD", "1": "MR"}, "labels": labels, "numTraining": 4, "file_ending": ".nii.gz"}
    (other / "dataset.json").write_text(json.dumps(facts))

    options = PlanOptions(request=Request(like=str(tmp_path / "m.autoseg")), configurations=("3d_fullres",))
    made = plan_and_preprocess(place, "8", options)
    assert "as in m.autoseg, made for Dataset007_Balls (--like)" in capsys.readouterr().out
    ours, theirs = made.configuration("3d_fullres"), source.configuration("3d_fullres")
    assert ours == replace(theirs, median_shape=ours.median_shape)
    assert ours.median_shape != theirs.median_shape
    assert [channel.channel for channel in made.channels] == ["PD", "MR"]
    assert made.channels[1] == source.channels[0]
    assert made.labels.names == ("background", "little", "big")
    assert made.dataset == "Dataset008_More"
    assert plan_and_preprocess(place, "8", replace(options, keep=True)) == made

    still = replace(TRAIN, epochs=1, pretrained=tmp_path / "m.autoseg", changes={**QUICK, "learning_rate": 0.0})
    train_fold(place, "8", "3d_fullres", "0", still)
    assert "background taken over, little new, big taken over, small dropped" in capsys.readouterr().out
    fold = place.fold("Dataset008_More", "default", "3d_fullres", 0)
    new = load_file(fold / "weights.safetensors")
    old = load_file(place.fold(NAME, "default", "3d_fullres", 0) / "weights.safetensors")
    assert torch.equal(new["encoder.0.0.conv.weight"][:, 1], old["encoder.0.0.conv.weight"][:, 0])
    assert not new["encoder.0.0.conv.weight"][:, 0].any()
    assert torch.equal(new["heads.0.weight"][[0, 2]], old["heads.0.weight"][[0, 1]])
    table = (fold / "pretrained.txt").read_text()
    assert len(table.splitlines()) == len(new) + 2
    assert "PD zero, MR taken over" in table
    with pytest.raises(AutosegError, match="for 3D images"):
        plan_like(
            source,
            replace(load_json(Fingerprint, place.prepared(NAME) / "fingerprint.json"), dimension=2),
            source.labels,
            source,
            "m.autoseg",
        )


def test_a_plan_is_kept_only_for_the_data_and_labels_it_was_made_from(place):
    keeping = PlanOptions(keep=True, configurations=("2d",))
    first = plan_and_preprocess(place, "7", replace(PLAN, configurations=("2d",)))
    assert plan_and_preprocess(place, "7", keeping) == first
    card = place.raw(NAME) / "dataset.json"
    card.write_text(card.read_text().replace("big", "huge"))
    renamed = plan_and_preprocess(place, "7", keeping)
    assert renamed.labels.names == ("background", "huge", "small")
    card.write_text(card.read_text().replace('"MR"', '"CT"'))
    assert plan_and_preprocess(place, "7", PlanOptions(configurations=("2d",))).channels[0].scheme == "ct"


def test_cases_in_no_fold_are_named(place, capsys):
    given = place.raw(NAME) / "splits_final.json"
    given.write_text(json.dumps([{"train": ["p0_0", "p0_1", "p1_0"], "val": ["p1_1"]}]))
    write_balls(place.raw(NAME), "p9_0", 9)
    plan_and_preprocess(place, "7", replace(PLAN, configurations=("2d",)))
    assert "1 cases are in no fold and will not be used, for example p9_0" in capsys.readouterr().out


def test_cases_prepared_for_another_plan_are_not_trained_on(place):
    plan_and_preprocess(place, "7", PLAN)
    coarser = PlanOptions(request=replace(TINY, spacing_mm=(2.0, 1.9, 1.8)), configurations=("2d",))
    plan_and_preprocess(place, "7", coarser)
    with pytest.raises(AutosegError, match=r"not prepared in .* as the plan says"):
        train_fold(place, "7", "3d_fullres", "0", TRAIN)


def test_validating_again_needs_the_plan_of_the_run(place, monkeypatch):
    plan_and_preprocess(place, "7", PLAN)
    train_fold(place, "7", "3d_fullres", "0", TRAIN)
    folder = place.fold(NAME, "default", "3d_fullres", 0)
    before = tree(folder / "validation")
    save_json(replace(load_json(Run, folder / "run.json"), validation_seconds=1e6), folder / "run.json")
    monkeypatch.setattr("autoseg.pipeline.train.time", SimpleNamespace(monotonic=lambda: 7.0))
    train_fold(place, "7", "3d_fullres", "0", TrainOptions(device="cpu", validate_only=True))
    assert tree(folder / "validation") == before
    assert load_json(Run, folder / "run.json").validation_seconds == 0, "the record of the first validation is gone"
    plan_and_preprocess(place, "7", PlanOptions(request=replace(TINY, spacing_mm=(2.0, 1.9, 1.8))))
    with pytest.raises(AutosegError, match="another plan"):
        train_fold(place, "7", "3d_fullres", "0", TrainOptions(device="cpu", validate_only=True))
    assert tree(folder / "validation") == before


def test_a_validation_made_again_stands_beside_the_former_until_it_is_whole(place, monkeypatch):
    plan_and_preprocess(place, "7", PLAN)
    train_fold(place, "7", "3d_fullres", "0", TRAIN)
    folder = place.fold(NAME, "default", "3d_fullres", 0)
    before = tree(folder / "validation")
    again, only = folder / "validation_again", TrainOptions(device="cpu", validate_only=True)
    with monkeypatch.context() as patch:
        patch.setattr(
            "autoseg.pipeline.validation.save_summary", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            train_fold(place, "7", "3d_fullres", "0", only)
    assert tree(folder / "validation") == before
    (kept,) = again.glob("*.nii.gz")
    stamp = kept.stat().st_mtime_ns
    train_fold(place, "7", "3d_fullres", "0", TRAIN)
    assert again.is_dir(), "the same training again is content with what there is"
    train_fold(place, "7", "3d_fullres", "0", only)
    assert not again.exists()
    assert (folder / "validation" / kept.name).stat().st_mtime_ns == stamp, "it went on where it was"
    assert tree(folder / "validation") == before


def test_an_image_is_never_overwritten_by_its_labels(place, tmp_path):
    plan_and_preprocess(place, "7", PLAN)
    train_fold(place, "7", "3d_fullres", "0", TRAIN)
    write_balls(tmp_path, "x", seed=11, split="Ts")
    image = tmp_path / "imagesTs" / "scan.nii.gz"
    (tmp_path / "imagesTs" / "x_0000.nii.gz").rename(image)
    before = image.read_bytes()
    with pytest.raises(AutosegError, match="would be overwritten; give another -o"):
        predict(place, image, tmp_path / "imagesTs", PredictOptions())
    assert image.read_bytes() == before
    with pytest.raises(AutosegError, match="below a file"):
        predict(place, image, image, PredictOptions())
