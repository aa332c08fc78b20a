"""find_best: what is compared, that noise chooses no pair, that predict follows the choice for these weights only."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from toys import balls_dataset, write_balls

import autoseg
from autoseg.checkpoint import save_weights
from autoseg.ensemble import Choice, Chosen
from autoseg.evaluation import evaluate_pairs, save_summary
from autoseg.evaluation.folders import MERGED
from autoseg.labels import Labels
from autoseg.layout import open_dataset
from autoseg.merging import merge
from autoseg.model import Trained, open_model
from autoseg.networks import build
from autoseg.pipeline import pairs, probabilities
from autoseg.pipeline.best import BestOptions, find_best
from autoseg.pipeline.crossval import held_out
from autoseg.pipeline.data import plan_and_preprocess
from autoseg.pipeline.planning import PlanOptions
from autoseg.pipeline.predict import PredictOptions, choose_model, export, predict
from autoseg.pipeline.share import export_model
from autoseg.readers import read_image, read_labels, read_stored, write_labels
from autoseg.records import AutosegError, load_json, save_json
from autoseg.schema import Fingerprint, Recipe, Request, Run
from autoseg.settings import in_json
from autoseg.splits import read_splits
from autoseg.store import read_case, stored_key
from autoseg.workspace import Workspace

NAME = "Dataset007_Balls"
CPU = torch.device("cpu")
QUICK = BestOptions(device="cpu", workers=1)
CASES = [f"c{n}" for n in range(6)]
FOLDS = json.dumps([{"train": CASES[:3], "val": CASES[3:]}, {"train": CASES[3:], "val": CASES[:3]}])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """What `prepared_workspace` makes, once for all tests."""
    root = tmp_path_factory.mktemp("best")
    return root, prepared_workspace(root)[1]


@pytest.fixture
def place(base, tmp_path):
    """A copy of it: the workspace and the plan."""
    shutil.copytree(base[0], tmp_path, dirs_exist_ok=True)
    return Workspace(tmp_path), base[1]


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
    options = PlanOptions(request=Request(changes=in_json(small)), configurations=("3d_fullres",))
    made = plan_and_preprocess(workspace, "7", options)
    full = made.configuration("3d_fullres")
    made = replace(made, configurations=(full, *(replace(full, name=name) for name in ("left", "old", "right"))))
    save_json(made, workspace.plan_folder(NAME, "default") / "plan.json")
    return workspace, made


def cross_validated(workspace, made, name, said, run="default", kept=True, data=None):
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
            data_hash=data or fingerprint.data_hash(),
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


def test_a_pair_that_is_right_where_either_is_sure_wins_and_predict_follows_it(place, tmp_path, capsys):
    """`left` knows class 1 only and `right` class 2: Dice (1, 0) and (0, 1). Their mean is right in both, Dice 1."""
    workspace, made = place
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
    alone = autoseg.load(run, device="cpu").predict(
        tmp_path / "imagesTs" / "x_0000.nii.gz", mirror=False, postprocess=False, probabilities=True
    )
    assert np.array_equal(alone.labels, read_stored(tmp_path / "both" / "x.nii.gz").array[0])
    assert alone.probabilities is not None and alone.probabilities.shape == (3, *alone.labels.shape)
    capsys.readouterr()
    predict(workspace, tmp_path / "imagesTs", tmp_path / "both", options)
    assert "1 of 1 cases are predicted already" in capsys.readouterr().out

    torch.manual_seed(99)
    fold = workspace.fold(NAME, "default", "right", 1)
    save_weights(build(made.configuration("right").network, 1, 3), fold / "weights.safetensors")
    with pytest.raises(AutosegError, match="names right, which was trained further since"):
        predict(workspace, tmp_path / "imagesTs", tmp_path / "both", options)


def test_one_run_among_several_and_all_of_them(place, tmp_path, capsys):
    """Choices of one run lie in it, those of several above; a configuration alone is followed too."""
    workspace, made = place
    cross_validated(workspace, made, "left", knows(1))
    cross_validated(workspace, made, "left", perfect, run="big")
    runs = workspace.root / "runs" / NAME
    one = find_best(workspace, "7", replace(QUICK, runs=("default",)))
    assert one.reason == "the only one that is trained"
    assert (runs / "default" / "model.json").is_file()
    assert f"autoseg predict -d {NAME} --run default follows it" in capsys.readouterr().out
    with pytest.raises(AutosegError, match=r"2 models could be meant(.|\n)*find_best -d"):
        choose_model(workspace, PredictOptions(dataset="7"))
    both = find_best(workspace, "7", QUICK)
    assert both.candidates[0].name == "big/left"
    assert both.winner.name == "big/left", "the pair is no better"
    chosen = choose_model(workspace, PredictOptions(dataset="7"))
    assert isinstance(chosen, Chosen) and chosen.where == runs / "model.json"
    assert isinstance(choose_model(workspace, PredictOptions(dataset="7", run="default")), Chosen)
    assert isinstance(choose_model(workspace, PredictOptions(dataset="7", run="big")), Trained)
    assert isinstance(choose_model(workspace, PredictOptions(configuration="left", run="big")), Trained)
    assert isinstance(choose_model(workspace, PredictOptions(model=runs / "default")), Chosen)
    assert isinstance(choose_model(workspace, PredictOptions(model=runs / "default" / "left")), Trained)
    with pytest.raises(AutosegError, match=r"no run 'small' of .* big, default"):
        find_best(workspace, "7", replace(QUICK, runs=("small",)))
    export_model(workspace, tmp_path / "x.autoseg", PredictOptions(dataset="7"))
    assert (tmp_path / "x.autoseg").is_file(), "a single configuration fits into a file"
    shutil.rmtree(runs / "big")
    find_best(workspace, "7", QUICK)
    assert not (runs / "model.json").exists(), "it would be followed first, and names what is gone"
    assert choose_model(workspace, PredictOptions(dataset="7")).where == runs / "default" / "model.json"


def perfect(labels):
    truth = np.where(labels > 0, labels, 0)
    return np.stack([np.where(truth == index, 3.0, -3.0) for index in range(3)]).astype(np.float32)


def test_missing_probabilities_are_predicted_and_stale_ones_never_read(place, tmp_path, capsys):
    """Without kept ones the networks, of random weights, speak: another pair than that of the hand-made ones."""
    workspace, made = place
    cross_validated(workspace, made, "left", knows(1), kept=False)
    cross_validated(workspace, made, "right", knows(2))
    fold = workspace.fold(NAME, "default", "left", 0)
    stale = fold / "probabilities" / "0123456789abcdef"
    stale.mkdir(parents=True)
    (stale / "c3.01234567.b2nd").write_bytes(b"of other weights")
    card = workspace.cases(NAME, "default", "3d_fullres") / "c3" / "case.json"
    said = card.read_text()
    card.write_text(said.replace(stored_key(card.parent.parent, "c3"), "of another plan"))
    with pytest.raises(AutosegError, match=r"left/fold_0 cannot predict 1 cases, for example c3: (.|\n)*--run"):
        find_best(workspace, "7", QUICK)
    card.write_text(said)
    find_best(workspace, "7", QUICK)
    assert not stale.exists()
    prepared = workspace.cases(NAME, "default", "3d_fullres")
    kept = probabilities.path_of(probabilities.place_of(fold), prepared, "c3")
    case = read_case(prepared, "c3")
    expected = open_model([fold], CPU).logits(case)
    found = made.labels.probabilities(probabilities.read(kept, made.labels))
    assert np.allclose(found, made.labels.probabilities(expected), atol=0.006)
    assert sum(1 for _ in (fold / "probabilities").rglob("*.b2nd")) == 3


def test_a_stop_in_the_middle_loses_nothing(place, tmp_path, capsys, monkeypatch):
    workspace, made = place
    cross_validated(workspace, made, "left", knows(1))
    cross_validated(workspace, made, "right", knows(2))
    written = []

    def stop(labels, stored, path):
        if len(written) == 2:
            raise KeyboardInterrupt
        write_labels(labels, stored, path)
        written.append(path)

    monkeypatch.setattr(pairs, "write_labels", stop)
    with pytest.raises(KeyboardInterrupt):
        find_best(workspace, "7", QUICK)
    run = workspace.root / "runs" / NAME / "default"
    assert not (run / "model.json").exists()
    stamps = {path: path.stat().st_mtime_ns for path in written}
    monkeypatch.setattr(pairs, "write_labels", write_labels)
    choice = find_best(workspace, "7", QUICK)
    assert choice.winner.name == "left + right"
    assert {path: path.stat().st_mtime_ns for path in written} == stamps
    monkeypatch.setattr(pairs, "write_labels", stop)
    assert find_best(workspace, "7", QUICK) == choice, "nothing is predicted again"


def test_regions_are_averaged_as_regions_and_an_absent_class_counts_for_nobody(tmp_path, capsys):
    """`any` is both balls, `small` one of them, `never` has a value that no voxel has."""
    labels = {"background": 0, "any": [7, 300], "small": 300, "never": 9}
    workspace, made = prepared_workspace(tmp_path, labels=labels)
    members = dict(zip(made.labels.names[1:], made.labels.members))

    def says(sure, strength):
        def said(indices):
            inside = [np.isin(indices, own) for own in members.values()]
            peaks = [strength if name == sure else -0.3 for name in members]
            return np.stack([np.where(*both, -4.0) for both in zip(inside, peaks)]).astype(np.float32)

        return said

    cross_validated(workspace, made, "left", says("any", 6.0))
    cross_validated(workspace, made, "right", says("small", 6.0))
    choice = find_best(workspace, "7", QUICK)
    assert choice.absent == ("never",)
    assert choice.winner.name == "left + right"
    assert set(choice.winner.dice) == {"any", "small"}
    assert choice.winner.mean is not None and choice.winner.mean > 0.9
    assert "No case has never" in capsys.readouterr().out


def test_a_configuration_without_all_folds_is_named_and_left_out(place, tmp_path, capsys):
    workspace, made = place
    with pytest.raises(AutosegError, match="autoseg fit -d Dataset007_Balls -c all"):
        find_best(workspace, "7", QUICK)
    cross_validated(workspace, made, "left", knows(1))
    cross_validated(workspace, made, "old", knows(2), data="of last year")
    cross_validated(workspace, made, "right", knows(2))
    (workspace.fold(NAME, "default", "right", 1) / "validation" / "summary.json").unlink()
    choice = find_best(workspace, "7", QUICK)
    assert [one.name for one in choice.candidates] == ["left"]
    chosen = choose_model(workspace, PredictOptions(dataset="7"))
    assert chosen.describe().endswith("model.json; not compared: old, right")
    printed = capsys.readouterr().out
    assert "default/right, 2 of 2 folds are trained, 1 validated" in printed
    assert "default/old, it was trained on other data" in printed
    shutil.rmtree(workspace.fold(NAME, "default", "left", 0).parent)
    elsewhere = replace(workspace, option=" --workspace 'my data'")
    cure = "autoseg fit -d Dataset007_Balls -c all --run NAME --workspace 'my data'"
    with pytest.raises(AutosegError, match=f"was trained on other data than there are now, so their scores.*: {cure}"):
        find_best(elsewhere, "7", QUICK)


def test_what_cannot_be_merged_or_has_other_labels_is_named_and_left_out(place, capsys):
    workspace, made = place
    for name in ("left", "right"):
        cross_validated(workspace, made, name, knows(1))
    path = workspace.fold(NAME, "default", "right", 1) / "run.json"
    save_json(replace(load_json(Run, path), recipe=Recipe(loss="dice")), path)
    assert [one.name for one in find_best(workspace, "7", QUICK).candidates] == ["left"]
    assert "default/right, " in (printed := capsys.readouterr().out) and "different plans or recipes" in printed
    facts = workspace.raw(NAME) / "dataset.json"
    facts.write_text(facts.read_text().replace('"big"', '"huge"'))
    with pytest.raises(AutosegError, match="trained on other data"):
        find_best(workspace, "7", QUICK)
    assert "left, it has other labels or channels than the dataset has now" in capsys.readouterr().out


def test_plans_that_merge_labels_are_compared_among_themselves(place, tmp_path, capsys):
    workspace, made = place
    binary = replace(made, labels=merge(made.labels, {"balls": ("big", "small")}))
    for name in ("left", "right"):
        cross_validated(workspace, binary, name, lambda labels: np.stack([labels < 1, labels > 0]) * 9.0, run="a")
    cross_validated(workspace, made, "left", knows(1), run="b")
    choice = find_best(workspace, "7", QUICK)
    assert choice.candidates[0].name == "a/left" and choice.candidates[0].dice["balls"] > 0.99
    assert "b/left, it merges labels otherwise than a/left" in capsys.readouterr().out
    write_balls(tmp_path, "x", seed=11, split="Ts")
    predict(workspace, tmp_path / "imagesTs", tmp_path / "out", PredictOptions(dataset=NAME, device="cpu"))
    assert load_json(Labels, tmp_path / "out" / MERGED) == binary.labels
