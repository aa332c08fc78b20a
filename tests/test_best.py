"""find_best: what is compared, that noise chooses no pair, that predict follows the choice for these weights only."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from toys import balls_dataset, write_balls

import autoseg
from autoseg.checkpoint import save_weights
from autoseg.ensemble import Choice
from autoseg.evaluation import evaluate_pairs, save_summary
from autoseg.layout import open_dataset
from autoseg.model import open_model
from autoseg.networks import build
from autoseg.pipeline import probabilities
from autoseg.pipeline.best import BestOptions, find_best
from autoseg.pipeline.crossval import held_out
from autoseg.pipeline.data import PlanOptions, plan_and_preprocess
from autoseg.pipeline.predict import PredictOptions, export, predict
from autoseg.pipeline.share import export_model
from autoseg.readers import read_image, read_labels
from autoseg.records import AutosegError, load_json, save_json
from autoseg.schema import Fingerprint, Recipe, Run
from autoseg.splits import read_splits
from autoseg.store import read_case
from autoseg.workspace import Workspace

NAME = "Dataset007_Balls"
CPU = torch.device("cpu")
QUICK = BestOptions(device="cpu", workers=1)
CASES = [f"c{n}" for n in range(6)]
FOLDS = json.dumps([{"train": CASES[:3], "val": CASES[3:]}, {"train": CASES[3:], "val": CASES[:3]}])


def prepared_workspace(root, **more):
    """Six prepared cases in two folds, and a plan with the configurations `left` and `right` on the same grid."""
    workspace = Workspace(root)
    balls_dataset(workspace.raw(NAME), cases=6, prefix="c", **more)
    (workspace.raw(NAME) / "splits_final.json").write_text(FOLDS)
    small = {
        "configurations.3d_fullres.patch": [16, 16, 16],
        "configurations.3d_fullres.batch_size": 2,
        "configurations.3d_fullres.network.features": [4, 6, 8],
    }
    made = plan_and_preprocess(workspace, "7", PlanOptions(changes=small, configurations=("3d_fullres",)))
    full = made.configuration("3d_fullres")
    made = replace(made, configurations=tuple(replace(full, name=name) for name in ("left", "right")))
    save_json(made, workspace.plan_folder(NAME, "default") / "plan.json")
    return workspace, made


def cross_validated(workspace, made, name, said, run="default", kept=True):
    """Both folds of a configuration as training leaves them: random weights, and predictions that `said` makes up.

    said: labels (Z, Y, X) of a prepared case -> logits (heads, Z, Y, X).
    """
    dataset = open_dataset(workspace.raw(NAME))
    splits = read_splits(workspace.prepared(NAME) / "splits.json", CASES)
    fingerprint = load_json(Fingerprint, workspace.prepared(NAME) / "fingerprint.json")
    configuration = made.configuration(name)
    prepared = workspace.cases(NAME, "default", "3d_fullres")
    for number, cases in enumerate(splits.folds):
        folder = workspace.fold(NAME, run, name, number)
        torch.manual_seed(len(name) + number)
        save_weights(build(configuration.network, 1, made.labels.heads), folder / "weights.safetensors")
        facts = Run(
            autoseg_version=autoseg.__version__,
            versions={},
            dataset=NAME,
            configuration=name,
            fold=number,
            cases=cases,
            plan=made,
            recipe=Recipe(),
            data_hash=fingerprint.data_hash(),
            device="cpu",
            started="2026-01-01T00:00:00+00:00",
            finished="2026-01-01T00:00:00+00:00",
            validation_seconds=3.0,
        )
        save_json(facts, folder / "run.json")
        model = open_model([folder], CPU)
        (folder / "validation").mkdir()
        for case_id, _, path in held_out(folder, facts, dataset):
            case = read_case(prepared, case_id)
            logits = said(case.labels[...])
            if kept:
                place = probabilities.path_of(probabilities.place_of(folder), prepared, case_id)
                probabilities.keep(place, logits, made.labels, configuration.patch)
            export(logits, case.trace, model, path)
        summary = evaluate_pairs(held_out(folder, facts, dataset), made.labels, quiet=True)
        save_summary(summary, folder / "validation")


def knows(sure: int):
    """Certain of class `sure` and of the background, and takes the other class, a little, for background."""

    def said(labels):
        truth = np.where(labels > 0, labels, 0)
        logits = np.full((3, *truth.shape), -4.0, np.float32)
        logits[0] = 0.0
        logits[sure][truth == sure] = 6.0
        logits[3 - sure][truth == 3 - sure] = -0.3
        return logits

    return said


def test_a_pair_that_is_right_where_either_is_sure_wins_and_predict_follows_it(tmp_path, capsys):
    """`left` knows class 1 only and `right` class 2: Dice (1, 0) and (0, 1). Their mean is right in both, Dice 1."""
    workspace, made = prepared_workspace(tmp_path)
    cross_validated(workspace, made, "left", knows(1))
    cross_validated(workspace, made, "right", knows(2))
    choice = find_best(workspace, "7", QUICK)
    printed = capsys.readouterr().out
    assert choice.winner.name == "left + right"
    assert choice.winner.mean == pytest.approx(1, abs=0.03)
    assert [one.mean for one in choice.candidates[1:]] == pytest.approx([0.5, 0.5], abs=0.03)
    assert choice.winner.low is not None and choice.winner.low > 0.4
    assert choice.winner.seconds == pytest.approx(2.0), "3 s for 3 cases, twice"
    assert "*  left + right" in printed
    assert "by more than noise" in printed
    run = workspace.root / "runs" / NAME / "default"
    assert load_json(Choice, run / "model.json") == choice
    predicted = list((run / "ensembles" / "left+right").glob("*/*.nii.gz"))
    assert sorted(path.name for path in predicted) == [f"{case}.nii.gz" for case in CASES]
    with pytest.raises(AutosegError, match=r"one configuration; export one of them \(-c left --run default"):
        export_model(workspace, tmp_path / "x.autoseg", PredictOptions(dataset="7"))

    write_balls(tmp_path, "x", seed=11, split="Ts")
    options = PredictOptions(dataset="7", device="cpu", mirror=False, save_probabilities=True, postprocess=False)
    predict(workspace, tmp_path / "imagesTs", tmp_path / "both", options)
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(
        f"Model: {NAME} the mean of left, fold 0, 1 + right, fold 0, 1; chosen by find_best among 3"
    )
    maps = []
    for name in ("left", "right"):
        predict(workspace, tmp_path / "imagesTs", tmp_path / name, replace(options, configuration=name))
        maps.append(read_image([tmp_path / name / "x_probabilities.nii.gz"])[0].array)
    mean, _ = read_image([tmp_path / "both" / "x_probabilities.nii.gz"])
    assert np.allclose(mean.array, (maps[0] + maps[1]) / 2, atol=1e-6)
    labels, _ = read_labels(tmp_path / "both" / "x.nii.gz")
    assert np.array_equal(made.labels.to_indices(labels.array[0]), mean.array.argmax(0))
    capsys.readouterr()
    predict(workspace, tmp_path / "imagesTs", tmp_path / "both", options)
    assert "1 of 1 cases are predicted already" in capsys.readouterr().out

    torch.manual_seed(99)
    fold = workspace.fold(NAME, "default", "right", 1)
    save_weights(build(made.configuration("right").network, 1, 3), fold / "weights.safetensors")
    with pytest.raises(AutosegError, match="names right, which was trained further since"):
        predict(workspace, tmp_path / "imagesTs", tmp_path / "both", options)
