"""What was made with other weights, plans or folds than there are now is neither followed nor taken for present."""

from dataclasses import replace

import pytest
from toys import configuration, plan

from autoseg.bundle import ModelCard
from autoseg.cases import Case
from autoseg.ensemble import Candidate, Choice, Member, open_choice
from autoseg.layout import Dataset
from autoseg.model import in_folders
from autoseg.pipeline.cascade import NextStage, map_path
from autoseg.pipeline.crossval import all_folds, held_out, refuse_mixture
from autoseg.pipeline.fit import Task, with_common_choices
from autoseg.pipeline.pairs import divided_otherwise
from autoseg.pipeline.recipe import SHORT, TrainOptions, make_recipe
from autoseg.pipeline.train import agree_with_existing
from autoseg.pipeline.validation import forget_later
from autoseg.postprocess import PostProcessing, Step
from autoseg.records import AutosegError, hash_text, load_json, save_json
from autoseg.schema import Fold, Recipe, Run
from autoseg.splits import Splits

LOW = configuration("3d_lowres", spacing_mm=(4.0, 2.0, 1.5))
CASCADE = configuration("3d_cascade_fullres", previous_stage="3d_lowres")
STAGES = plan(LOW, configuration(), CASCADE)


def put_fold(folder, made, name, number=0, weights=b"w", **more):
    """A finished fold: its facts, and a file in place of weights."""
    fold = folder / name / f"fold_{number}"
    facts = Run(
        autoseg_version="1",
        versions={},
        dataset=made.dataset,
        configuration=name,
        fold=number,
        cases=Fold(train=("b",), val=("a",)),
        plan=made,
        recipe=Recipe(),
        data_hash="",
        device="cpu",
        started="2026-01-01T00:00:00+00:00",
        finished="2026-01-01T00:00:00+00:00",
    )
    save_json(replace(facts, **more), fold / "run.json")
    (fold / "weights.safetensors").write_bytes(weights)
    return fold


def test_a_cascade_may_be_edited_after_its_first_stage_was_trained_and_the_first_stage_not(tmp_path):
    edited = plan(LOW, configuration(), replace(CASCADE, batch_size=3))
    low = put_fold(tmp_path, STAGES, "3d_lowres")
    later = put_fold(tmp_path, edited, "3d_cascade_fullres")
    found = in_folders([later], [low])
    assert found.configuration.batch_size == 3 and found.before is not None
    other = put_fold(tmp_path, plan(replace(LOW, batch_size=3), configuration(), CASCADE), "3d_lowres", 1)
    with pytest.raises(AutosegError, match="make no cascade"):
        in_folders([later], [other])


def test_more_training_of_the_first_stage_takes_back_what_the_second_said(tmp_path):
    low = put_fold(tmp_path, STAGES, "3d_lowres")
    full = put_fold(tmp_path, STAGES, "3d_fullres")
    later = put_fold(tmp_path, STAGES, "3d_cascade_fullres", 1)
    for fold in (low, full, later):
        (fold / "validation").mkdir()
        (fold / "probabilities").mkdir()
        (fold.parent / "model.json").touch()
    forget_later(low, "3d_lowres")
    assert sorted(path.name for path in later.iterdir()) == ["run.json", "weights.safetensors"]
    assert not (later.parent / "model.json").exists()
    for fold in (low, full):
        assert (fold / "validation").is_dir() and (fold / "probabilities").is_dir()
        assert (fold.parent / "model.json").is_file()


def test_folds_may_differ_in_what_their_length_chose_and_in_nothing_else(tmp_path):
    def mixed(**more):
        folds = [put_fold(tmp_path, STAGES, "3d_fullres", n, recipe=Recipe(**more) if n else Recipe()) for n in (0, 1)]
        refuse_mixture(folds, [load_json(Run, fold / "run.json") for fold in folds])

    mixed(optimizer="adamw", learning_rate=0.003, warmup_steps=20, budget_seconds=60.0, seed=3, epochs=7)
    mixed(keep_probabilities=False, loader_threads=1, checkpoint_minutes=1.0)
    with pytest.raises(AutosegError, match="different plans or recipes"):
        mixed(loss="dice")
    with pytest.raises(AutosegError, match="different plans or recipes"):
        mixed(learning_rate=0.02)


def test_folds_of_different_data_are_not_merged_and_a_lost_case_is_named(tmp_path):
    folds = [put_fold(tmp_path, STAGES, "3d_fullres", n, data_hash=f"{n}") for n in (0, 1)]
    with pytest.raises(AutosegError, match=r"fold_1 and .*fold_0 were trained on different data"):
        refuse_mixture(folds, [load_json(Run, fold / "run.json") for fold in folds])
    here = Dataset(
        name="x",
        folder="",
        channel_names=("MR",),
        labels=STAGES.labels,
        file_ending=".nii.gz",
        cases=(Case(id="b", images=("b_0000.nii.gz",), label="b.nii.gz"),),
    )
    with pytest.raises(AutosegError, match="fold_0 held out a, which the dataset no longer has; put the case back"):
        held_out(folds[0], load_json(Run, folds[0] / "run.json"), here)


def test_later_folds_of_fit_take_the_choices_of_the_first(tmp_path):
    def task(number):
        folder = tmp_path / "3d_fullres" / f"fold_{number}"
        return Task(configuration=configuration(), fold=number, folder=folder, cases=1)

    tasks, options = [task(0), task(1)], TrainOptions(changes={"clip_norm": 3.0})
    assert with_common_choices(options, tasks, tasks[0]) is options, "nothing is begun"
    put_fold(tmp_path, STAGES, "3d_fullres", recipe=Recipe(**SHORT, batch_size=3))
    assert with_common_choices(options, tasks, tasks[0]) is options, "its own run says it"
    later = with_common_choices(options, tasks, tasks[1])
    assert with_common_choices(TrainOptions(changes={"batch_size": 7}), tasks, tasks[1]).changes["batch_size"] == 7
    chosen = {"momentum": 0.99, "schedule": "poly", **SHORT, "batch_size": 3, "validation_steps": 50}
    assert later.changes == {"clip_norm": 3.0, **chosen}
    assert make_recipe(later).optimizer == "adamw", "nobody has stated its momentum"
    stated = TrainOptions(changes={"momentum": 0.5})
    others = {"batch_size": 3, "validation_steps": 50}
    assert with_common_choices(stated, tasks, tasks[1]).changes == {"momentum": 0.5, **others}


def test_folds_of_another_division_are_not_those_of_today(tmp_path):
    """Fold 0 held out a; by another division of the same cases it would hold out b."""
    fold = put_fold(tmp_path, STAGES, "3d_fullres")
    (fold / "validation").mkdir()
    (fold / "validation" / "summary.json").touch()
    today = Splits(folds=(Fold(train=("b",), val=("a",)),))
    other = Splits(folds=(Fold(train=("a",), val=("b",)),))
    assert all_folds(fold.parent, today) == (fold,)
    assert all_folds(fold.parent, other) is None
    assert divided_otherwise([fold], other) and not divided_otherwise([fold], today)


RULE = PostProcessing(cases=2, steps=(Step(members=(1,)),))


def chosen(folder, *folds, before=()):
    """A choice of the configuration of `folds`, of their weights, in `folder`."""
    trained = in_folders(folds, before)
    name = folds[0].parent.name
    member = Member(folder=name, folds=tuple(trained.folds), weights=trained.hashes())
    choice = Choice(
        dataset=STAGES.dataset,
        cases=2,
        chosen=0,
        reason="",
        candidates=(Candidate(members=(member,), dice={}, mean=None),),
        draws=1,
        seed=0,
        dice_postprocessed={},
        postprocessing=RULE,
    )
    save_json(choice, folder / "model.json")


def test_some_folds_of_a_single_winner_have_its_rule_and_others_are_named(tmp_path):
    folds = [put_fold(tmp_path, STAGES, "3d_fullres", number, bytes([number])) for number in range(3)]
    chosen(tmp_path, *folds[:2])
    hashes = dict(in_folders(folds[:2]).folds)
    card = ModelCard(
        dataset=STAGES.dataset,
        configuration="3d_fullres",
        folds=hashes,
        cases=2,
        dice={},
        dice_postprocessed={},
        postprocessing=RULE,
    )
    save_json(card, folds[0].parent / "model.json")
    for asked in ((), ("1",)):
        found = open_choice(tmp_path, asked)
        assert found is not None and found.postprocessing()[0] == RULE
    with pytest.raises(AutosegError, match="compared fold 0, 1 of 3d_fullres, and fold 2 had no part in that"):
        open_choice(tmp_path, ("2",))


def test_a_cascade_whose_first_stage_lost_a_fold_is_not_the_one_that_was_compared(tmp_path):
    low = [put_fold(tmp_path, STAGES, "3d_lowres", number, bytes([number])) for number in range(2)]
    later = [put_fold(tmp_path, STAGES, "3d_cascade_fullres", number, bytes([9, number])) for number in range(2)]
    chosen(tmp_path, *later, before=low)
    for asked in ((), ("0",)):
        assert open_choice(tmp_path, asked) is not None
    (low[1] / "weights.safetensors").unlink()
    for asked in ((), ("0",)):
        with pytest.raises(AutosegError, match="whose earlier stage has other weights or folds"):
            open_choice(tmp_path, asked)


def test_maps_of_logits_and_of_labels_have_other_names(tmp_path):
    low = put_fold(tmp_path, STAGES, "3d_lowres")
    stage = NextStage(configuration=CASCADE, prepared=tmp_path)
    first, second = (
        map_path(low, replace(stage, configuration=replace(CASCADE, prior=prior)), tmp_path, "a")
        for prior in ("logits", "labels")
    )
    assert first != second
    assert first.name == f"a.{hash_text('', '')[:8]}.b2nd", "as before there were two kinds"


def test_a_run_of_another_plan_says_what_differs(tmp_path):
    fold = put_fold(tmp_path, STAGES, "3d_fullres")
    run = load_json(Run, fold / "run.json")
    other = plan(LOW, replace(configuration(), batch_size=3), CASCADE)
    with pytest.raises(AutosegError, match=r"another plan \(plan: 3d_fullres.batch_size 2, now 3\); give"):
        agree_with_existing(fold, replace(run, plan=other), TrainOptions(validate_only=True))
