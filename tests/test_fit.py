"""fit: every fold, merged cross-validation, post-processing, budgets shared out, going on after any stop."""

from dataclasses import replace
from pathlib import Path

import pytest
from toys import BALLS, TINY, balls_dataset, configuration, plan, write_balls

from autoseg.bundle import ModelCard
from autoseg.ensemble import Choice
from autoseg.evaluation import evaluate_pairs, save_summary
from autoseg.labels import Labels
from autoseg.layout import open_dataset
from autoseg.model import in_folders, open_run
from autoseg.pipeline import fit as module
from autoseg.pipeline.best import BestOptions, find_best
from autoseg.pipeline.crossval import all_folds, cross_validate, held_out, validated
from autoseg.pipeline.data import plan_and_preprocess
from autoseg.pipeline.fit import FitOptions, Spent, Task, best, find_tasks, fit, fit_table, share, stages
from autoseg.pipeline.planning import PlanOptions
from autoseg.pipeline.predict import PredictOptions, predict
from autoseg.pipeline.recipe import TrainOptions
from autoseg.pipeline.train import train_fold
from autoseg.postprocess import PostProcessing, Step
from autoseg.readers import read_labels, write_labels
from autoseg.records import AutosegError, load_json, save_json
from autoseg.schema import Fold, Request, Run
from autoseg.settings import in_json
from autoseg.splits import Splits
from autoseg.supervise import JOURNAL
from autoseg.workspace import Workspace

NAME = "Dataset007_Balls"
QUICK = {"steps_per_epoch": 6, "validation_steps": 1, "learning_rate": 0.02, "momentum": 0.9}
PLAN = PlanOptions(request=TINY)
OPTIONS = FitOptions(plan=PLAN, train=TrainOptions(epochs=3, device="cpu", changes=QUICK))


@pytest.fixture
def place(tmp_path):
    balls_dataset(tmp_path / "raw" / NAME, cases=3)
    return Workspace(tmp_path)


def test_all_folds_are_trained_merged_and_followed_by_predict(place, capsys, tmp_path):
    cards = fit(place, "7", OPTIONS)
    assert [card.configuration for card in cards] == ["3d_fullres"]
    assert not (place.cases(NAME, "default", "2d")).exists(), "only what is trained is prepared"
    card = cards[0]
    folder = place.run(NAME, "default", "3d_fullres")
    assert set(card.folds) == {"fold_0", "fold_1", "fold_2"}
    assert card.cases == 3
    dataset = open_dataset(place.raw(NAME))
    folds = [folder / name for name in sorted(card.folds)]
    pairs = [pair for fold in folds for pair in held_out(fold, open_run(fold), dataset)]
    assert sorted(pair[0] for pair in pairs) == ["p0_0", "p0_1", "p1_0"]
    summary = evaluate_pairs(pairs, open_run(folds[0]).plan.labels, quiet=True)
    assert card.dice["foreground"] == pytest.approx(summary.foreground["dice"].mean)
    assert (folder / "crossval" / "summary.json").is_file()
    assert load_json(ModelCard, folder / "model.json") == card

    capsys.readouterr()
    assert fit(place, "7", OPTIONS) == cards
    again = capsys.readouterr().out
    assert "== fold" not in again, "nothing is trained twice"

    unseen = tmp_path / "new"
    write_balls(unseen, "x", seed=11, split="Ts")
    predict(place, unseen / "imagesTs", tmp_path / "out", PredictOptions(device="cpu"))
    printed = capsys.readouterr().out
    assert "fold 0, 1, 2" in printed
    assert f"Post-processing: {card.postprocessing.describe(Labels.from_dataset(BALLS))}" in printed


def test_on_a_cpu_the_sum_of_all_folds_is_announced(capsys):
    task = Task(configuration=configuration(), fold=0, folder=Path("nowhere"), cases=1)
    usual = FitOptions(plan=PLAN, train=TrainOptions(device="cpu"))
    module.say_total([task, task, task], usual)
    assert "3 folds train for 6h in all, since on a CPU each trains for 2h" in capsys.readouterr().out
    for told in (OPTIONS, replace(usual, budget_seconds=60.0)):
        module.say_total([task], told)
    assert capsys.readouterr().out == ""


def test_a_fold_with_a_case_that_kills_does_not_keep_the_others_from_being_trained(place, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setitem(JOURNAL.dead, ("validate", "p0_0"), "the process died of SIGKILL")
        with pytest.raises(
            AutosegError, match=r"1 of 1 held-out cases of .* cannot be predicted:\n  p0_0: the process"
        ):
            fit(place, "7", OPTIONS)
    folders = [place.fold(NAME, "default", "3d_fullres", fold) for fold in range(3)]
    assert sorted(validated(folder) for folder in folders) == [False, True, True]
    capsys.readouterr()
    fit(place, "7", OPTIONS)
    assert all(validated(folder) for folder in folders)
    assert capsys.readouterr().out.count("== fold") == 1


def test_a_rule_that_helps_is_found_stored_and_applied_unless_left_out(place, capsys, tmp_path, monkeypatch):
    """Held-out predictions are replaced by the truth plus an island: without it Dice is 1."""
    monkeypatch.setattr("autoseg.postprocess.search.LEVEL", 0.3)  # for want of more than two cases
    fit(place, "7", replace(OPTIONS, folds=(0, 1)))
    folder = place.run(NAME, "default", "3d_fullres")
    folds = [folder / "fold_0", folder / "fold_1"]
    dataset = open_dataset(place.raw(NAME))
    for fold in folds:
        for _, truth, prediction in held_out(fold, open_run(fold), dataset):
            volume, stored = read_labels(truth)
            spoilt = volume.array[0].copy()
            spoilt[0, 0, :2] = 7
            write_labels(spoilt, stored, prediction)
        summary = evaluate_pairs(held_out(fold, open_run(fold), dataset), open_run(fold).plan.labels, quiet=True)
        save_summary(summary, fold / "validation")
    (folder / "model.json").unlink()
    capsys.readouterr()
    card = cross_validate(folds, dataset)
    assert "verdict" in capsys.readouterr().out, "what was tried is shown"
    assert [step.members for step in card.postprocessing.steps][-1] in [(1,), (1, 2)]
    assert card.dice["big"] < 1
    assert card.dice_postprocessed["big"] == 1
    assert (folder / "crossval_postprocessed" / "summary.json").is_file()
    rule, words = in_folders(folds).postprocessing()
    assert rule == card.postprocessing
    assert "largest component of" in words

    write_balls(tmp_path, "x", seed=11, split="Ts")
    capsys.readouterr()
    predict(place, tmp_path / "imagesTs", tmp_path / "out", PredictOptions(postprocess=False, device="cpu"))
    assert "Post-processing: none, as asked" in capsys.readouterr().out

    monkeypatch.undo()
    (folder / "model.json").unlink()
    assert cross_validate(folds, dataset).postprocessing.steps == ()
    assert not (folder / "crossval_postprocessed").exists(), "scores of the earlier rule"


def test_a_rule_of_other_weights_is_not_used(place):
    fit(place, "7", replace(OPTIONS, folds=(0,)))
    fold = place.fold(NAME, "default", "3d_fullres", 0)
    card = load_json(ModelCard, fold.parent / "model.json")
    rule = PostProcessing(cases=1, steps=(Step(members=(1,), dice_before=0.1, dice_after=0.2),))
    save_json(replace(card, postprocessing=rule), fold.parent / "model.json")
    assert in_folders([fold]).postprocessing()[0] == rule
    save_json(replace(card, folds={"fold_0": "other"}, postprocessing=rule), fold.parent / "model.json")
    assert in_folders([fold]).postprocessing()[0] is None


def test_the_last_fold_trained_by_hand_completes_the_cross_validation(place, capsys):
    fit(place, "7", replace(OPTIONS, folds=(0, 1)))
    folder = place.run(NAME, "default", "3d_fullres")
    splits = load_json(Splits, place.prepared(NAME) / "splits.json")
    assert all_folds(folder, splits) is None
    capsys.readouterr()
    train_fold(place, "7", "3d_fullres", "2", OPTIONS.train)
    assert "Cross-validation of 3 folds, 3 held-out cases" in capsys.readouterr().out
    assert set(load_json(ModelCard, folder / "model.json").folds) == {"fold_0", "fold_1", "fold_2"}


def test_stages_come_in_order_and_the_earlier_one_with_every_fold():
    low, full = configuration("3d_lowres"), configuration("3d_fullres")
    cascade = configuration("3d_cascade_fullres", previous_stage="3d_lowres")
    flat = configuration("2d", patch=(6, 8), spacing_mm=(1.0, 0.5))
    made = plan(flat, low, full, cascade)
    assert stages(made, ()) == ("3d_fullres",)
    assert stages(plan(flat), ()) == ("2d",)
    assert stages(plan(cascade, full, low), ("all",)) == ("3d_lowres", "3d_cascade_fullres", "3d_fullres")
    assert stages(made, ("3d_cascade_fullres", "2d")) == ("3d_lowres", "3d_cascade_fullres", "2d")
    with pytest.raises(AutosegError, match="has no configuration"):
        stages(made, ("4d",))
    splits = Splits(folds=tuple(Fold(train=tuple({*"abc"} - {held}), val=(held,)) for held in "abc"))
    options = replace(OPTIONS, configurations=("3d_cascade_fullres",), folds=(1,))
    nowhere = Workspace(Path("nowhere"))
    tasks = find_tasks(nowhere, made, splits, options)
    assert [task.name for task in tasks] == ["3d_lowres/0", "3d_lowres/1", "3d_lowres/2", "3d_cascade_fullres/1"]
    with pytest.raises(AutosegError, match="no fold 3; choose among 0 to 2"):
        find_tasks(nowhere, made, splits, replace(options, folds=(3,)))
    with pytest.raises(AutosegError, match="1 training cases are held out in no fold, for example c"):
        find_tasks(nowhere, made, replace(splits, folds=splits.folds[:2]), options)


def test_all_configurations_are_trained_compared_and_the_best_is_followed(place, capsys, tmp_path):
    small = {
        "configurations.2d.patch": [16, 16],
        "configurations.2d.batch_size": 2,
        "configurations.2d.network.features": [4, 6, 8],
    }
    (place.raw(NAME) / "splits_final.json").write_text(
        '[{"train": ["p0_0", "p0_1"], "val": ["p1_0"]}, {"train": ["p1_0"], "val": ["p0_0", "p0_1"]}]'
    )
    planning = PlanOptions(request=Request(changes=TINY.changes | in_json(small)))
    options = FitOptions(plan=planning, train=replace(OPTIONS.train, epochs=1), configurations=("all",))
    cards = fit(place, "7", options)
    assert {card.configuration for card in cards} == {"2d", "3d_fullres"}
    printed = capsys.readouterr().out
    assert printed.count("held-out cases are kept for find_best") == 4
    assert "2d + 3d_fullres" in printed
    assert f"Next: autoseg predict -i IN -o OUT -d {NAME} --run default\n" in printed
    choice = load_json(Choice, place.root / "runs" / NAME / "default" / "model.json")
    assert len(choice.candidates) == 3
    assert len(choice.winner.members) == 1, "three cases are too few for a pair"
    fit(place, "7", options)
    again = capsys.readouterr().out
    assert "== fold" not in again
    assert "scoring" not in again
    write_balls(tmp_path, "x", seed=11, split="Ts")
    predict(place, tmp_path / "imagesTs", tmp_path / "out", PredictOptions(dataset="7", device="cpu", mirror=False))
    assert f"{choice.winner.name}, fold 0, 1; chosen by find_best among 3" in capsys.readouterr().out


def test_the_time_to_compare_is_set_aside_too(tmp_path, monkeypatch):
    """Two configurations of 5 folds, none done: 10 s a case and fold, 40 cases; one pair of 20 cases at 10 * 3 / 13."""
    flat = configuration("2d", patch=(6, 8), spacing_mm=(1.0, 0.5))
    tasks = [
        Task(configuration=made, fold=n, folder=tmp_path / made.name / f"fold_{n}", cases=4)
        for made in (configuration(), flat)
        for n in range(5)
    ]
    monkeypatch.setattr(module, "seconds_a_case", lambda *_: 10.0)
    options = replace(OPTIONS, budget_seconds=2000.0, configurations=("all",))
    budget = share(Workspace(tmp_path), plan(), tasks, tasks[0], Spent(), options)
    assert budget == pytest.approx((1960 - 400 - 20 * 10 * 3 / 13) / 10)


def five_tasks(root) -> list[Task]:
    made = configuration()
    return [Task(configuration=made, fold=n, folder=root / f"fold_{n}", cases=4) for n in range(5)]


def test_time_is_shared_out_after_validation_is_set_aside(tmp_path, monkeypatch):
    """Budget 1000 s, 2 % set aside, 100 s spent; 1 of 5 folds validated at 10 s a case: (980 - 140 - 4 * 40) / 4."""
    tasks = five_tasks(tmp_path)
    spent = Spent(preparing=100.0, validating={"3d_fullres/0": 40.0})
    options = replace(OPTIONS, budget_seconds=1000.0)
    monkeypatch.setattr(module, "validated", lambda folder: folder == tasks[0].folder)
    budget = share(Workspace(tmp_path), plan(), tasks, tasks[1], spent, options)
    assert budget == pytest.approx((980 - 140 - 160) / 4)
    with pytest.raises(AutosegError, match=r"--budget 5m is too short.*fewer --folds"):
        share(Workspace(tmp_path), plan(), tasks, tasks[1], spent, replace(options, budget_seconds=300.0))


def test_a_fold_that_was_started_keeps_its_budget(place, monkeypatch):
    monkeypatch.setattr(module, "LEAST_TRAINING_S", 0.5)
    options = replace(OPTIONS, folds=(0,), train=TrainOptions(device="cpu", changes=QUICK), budget_seconds=9.0)
    plan_and_preprocess(place, "7", PLAN)  # not out of the budget, which would not last on a busy machine
    fit(place, "7", options)
    fold = place.fold(NAME, "default", "3d_fullres", 0)
    given = open_run(fold).recipe.budget_seconds
    assert given is not None
    assert 0.5 <= given < 9
    tasks = [Task(configuration=configuration(), fold=0, folder=fold, cases=1)]
    spent = load_json(Spent, place.root / "runs" / NAME / "default" / "fit.json")
    assert spent.preparing > 0
    assert set(spent.validating) == {"3d_fullres/0"}
    assert share(place, plan(), tasks, tasks[0], spent, options) == given


def test_the_table_shows_undefined_values_as_such():
    card = ModelCard(
        dataset=NAME,
        configuration="2d",
        folds={"fold_0": "x"},
        cases=2,
        dice={"big": None, "foreground": 0.5},
        dice_postprocessed={"big": None, "foreground": 0.75},
        postprocessing=PostProcessing(cases=2),
    )
    lines = fit_table([card]).splitlines()
    assert lines[-2].split() == ["2d", "1", "2", "big", "undefined", "undefined"]
    assert lines[-1].split()[-2:] == ["0.5000", "0.7500"]
    lower = replace(card, configuration="3d_cascade_fullres", dice_postprocessed={"foreground": 0.25})
    assert best([card, lower]) == best([card, lower], ("all",)) == "2d"
    assert best([card, lower], ("3d_cascade_fullres",)) == "3d_cascade_fullres", "the one that was asked for"


def test_folds_of_other_options_are_refused_and_a_part_never_replaces_the_whole(place):
    whole = fit(place, "7", OPTIONS)
    folder = place.run(NAME, "default", "3d_fullres")
    assert fit(place, "7", replace(OPTIONS, folds=(0,))) == whole
    assert load_json(ModelCard, folder / "model.json") == whole[0]
    other = replace(OPTIONS.train, changes=QUICK | {"learning_rate": 0.5})
    with pytest.raises(AutosegError, match="another recipe"):
        fit(place, "7", replace(OPTIONS, train=other))
    beside = replace(OPTIONS.plan, name="beside")
    with pytest.raises(
        AutosegError, match=r"the plan 'default', and this is 'beside'; .* --run beside, .*--plan default"
    ):
        fit(place, "7", replace(OPTIONS, plan=beside, train=replace(OPTIONS.train, plan="beside")))
    assert not place.plan_folder(NAME, "beside").exists(), "nothing is prepared for what cannot be trained"
    (folder / "fold_0" / "validation" / "summary.json").unlink()
    with pytest.raises(AutosegError, match=r"train them: autoseg fit -d Dataset007_Balls -c 3d_fullres$"):
        find_best(place, "7", BestOptions())
    with pytest.raises(AutosegError, match=r"no plan 'segnet' for .*, only default; run: .* --network segnet"):
        train_fold(place, "7", "3d_fullres", "0", replace(OPTIONS.train, plan="segnet"))
    run = load_json(Run, folder / "fold_1" / "run.json")
    save_json(replace(run, recipe=other_recipe(run.recipe)), folder / "fold_1" / "run.json")
    (folder / "model.json").unlink()
    with pytest.raises(AutosegError, match="different plans or recipes"):
        cross_validate([folder / "fold_0", folder / "fold_1"], open_dataset(place.raw(NAME)))


def other_recipe(recipe):
    return replace(recipe, learning_rate=recipe.learning_rate * 2)


def test_work_is_booked_where_it_belongs():
    """40 s beside the training of a fold, 30 of them its validation; later 5 more of validation in 6 s."""
    spent = Spent(preparing=100.0).with_fold("2d/0", 30.0, 40.0)
    assert spent == Spent(preparing=110.0, validating={"2d/0": 30.0})
    assert spent.with_fold("2d/0", 35.0, 6.0) == Spent(preparing=111.0, validating={"2d/0": 35.0})
    assert spent.with_fold("2d/0", 30.0, 0.0) == spent
