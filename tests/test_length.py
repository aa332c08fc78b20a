"""How long a run trains: by default, when it is given again, when it is made longer, and when it is told to stop."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pipeline import NAME, PLAN, QUICK
from toys import balls_dataset

import autoseg.pipeline.recipe as recipes
from autoseg.checkpoint import Progressed, read_progress
from autoseg.history import METRICS, read_metrics
from autoseg.pipeline.data import plan_and_preprocess
from autoseg.pipeline.recipe import TrainOptions, for_length, make_recipe
from autoseg.pipeline.train import train_fold
from autoseg.records import AutosegError, load_json
from autoseg.schedule import Rhythm
from autoseg.schema import Recipe, Run
from autoseg.settings import parse_duration, say_duration
from autoseg.supervise import JOURNAL
from autoseg.workspace import Workspace

CHANGES = {**QUICK, "steps_per_epoch": 3, "augmentation": "none"}
TRAIN = TrainOptions(epochs=2, device="cpu", changes=CHANGES)
ANY = replace(TRAIN, epochs=None)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2h", 7200), ("90m", 5400), ("1h30m", 5400), ("45s", 45), ("2d", 172800), ("1.5h", 5400), (" 1H 5s", 3605)],
)
def test_durations(text, seconds):
    assert parse_duration(text, "--budget") == seconds


@pytest.mark.parametrize("text", ["2", "7200", "", "0h", "-1h", "30m1h", "2 hours", "1h30", "h", "nan", "2h2h"])
def test_other_durations_are_refused_with_examples(text):
    with pytest.raises(AutosegError, match=r"--budget .*for example 2h, 90m"):
        parse_duration(text, "--budget")


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 10**8))
def test_what_is_said_is_read_back(seconds):
    assert parse_duration(say_duration(seconds), "--budget") == seconds


def test_only_one_length_and_none_by_set():
    with pytest.raises(AutosegError, match="give one of them"):
        make_recipe(replace(TRAIN, budget_seconds=9.0))
    with pytest.raises(AutosegError, match="--budget"):
        make_recipe(TrainOptions(changes={"budget_seconds": 5.0}))
    assert make_recipe(TrainOptions(budget_seconds=9.0)).budget_seconds == 9.0
    with pytest.raises(AutosegError, match="greater than 0"):
        make_recipe(TrainOptions(budget_seconds=0.0))


def test_a_length_that_nothing_states_is_that_of_the_run(tmp_path):
    existing = Recipe(epochs=7, budget_seconds=50.0, poly_exponent=0.5)
    again = make_recipe(TrainOptions(), existing)
    assert (again.epochs, again.budget_seconds, again.poly_exponent) == (7, 50.0, 0.9)
    assert make_recipe(TrainOptions(epochs=8), existing).budget_seconds is None
    file = tmp_path / "recipe.toml"
    file.write_text("epochs = 7\n")
    assert make_recipe(TrainOptions(recipe=file), existing).budget_seconds == 50.0


@pytest.mark.parametrize(
    ("recipe", "device", "timed", "short"),
    [
        (Recipe(epochs=19, steps_per_epoch=250), "cpu", None, True),
        (Recipe(epochs=20, steps_per_epoch=250), "cpu", None, False),
        (Recipe(budget_seconds=4998.0), "cpu", None, True),
        (Recipe(budget_seconds=5002.0), "cpu", None, False),
        (Recipe(budget_seconds=5002.0), "cpu", 2.0, True),
        (Recipe(budget_seconds=498.0), "cuda", None, True),
        (Recipe(budget_seconds=502.0), "cuda", None, False),
        (Recipe(budget_seconds=7200.0, epochs=3), "cuda", 0.1, True),
    ],
)
def test_a_run_of_fewer_than_5000_steps_takes_adamw(recipe, device, timed, short, capsys):
    chosen = for_length(recipe, TrainOptions(), device, timed)
    found = (chosen.optimizer, chosen.learning_rate, chosen.warmup_steps)
    assert found == (("adamw", 0.003, 20) if short else ("sgd", 0.01, 0))
    assert ("--set optimizer=sgd" in capsys.readouterr().out) == short


@pytest.mark.parametrize(("width", "rate"), [(1, 0.003), (711, 0.003), (6400, 0.001), (32000, 0.00045)])
def test_a_short_run_of_a_network_without_norm_takes_smaller_steps_the_wider_it_is(width, rate, capsys):
    chosen = for_length(Recipe(epochs=3), TrainOptions(), "cpu", None, width=width)
    assert chosen == replace(for_length(Recipe(epochs=3), TrainOptions(), "cpu", None), learning_rate=rate)
    assert f"learning rate {rate} for a network without normalisation" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "timed", "least", "batch"),
    [
        (7200.0, 14.4, 1, 2),  # 500 steps: 500 / 2000 of 7 patches
        (7200.0, 5.0, 1, 5),  # 1440 steps
        (7200.0, 14.4, 4, 4),
        (7200.0, 14.4, 9, None),
        (7200.0, 3.5, 1, None),  # 2057 steps
        (60.0, 14.4, 1, 2),
        (60.0, None, 1, None),
    ],
)
def test_a_run_by_time_has_enough_steps_if_need_be_of_small_batches(seconds, timed, least, batch, capsys):
    chosen = recipes.for_time(Recipe(budget_seconds=seconds), 7, least, timed)
    assert chosen.batch_size == batch
    assert ("--set batch_size=7" in capsys.readouterr().out) == (batch is not None)


def test_a_stated_batch_and_a_run_by_epochs_are_left_alone():
    for recipe in (Recipe(epochs=3), Recipe(budget_seconds=9.0, batch_size=6)):
        assert recipes.for_time(recipe, 7, 1, 5.0) == recipe
    chosen = Recipe(budget_seconds=9.0, batch_size=2)
    assert make_recipe(TrainOptions(budget_seconds=9.0), chosen).batch_size == 2, "a run keeps what it has chosen"
    assert make_recipe(TrainOptions(budget_seconds=9.0, changes={"batch_size": 6}), chosen).batch_size == 6


def test_a_batch_size_of_ones_own_trains_and_goes_on(prepared):
    options = replace(TRAIN, changes={**CHANGES, "batch_size": 1})
    folder = train(prepared, "single", options)
    assert load_json(Run, folder / "run.json").recipe.batch_size == 1
    longer = train(prepared, "single", replace(options, epochs=3))
    assert read_progress(longer).step == 9


@pytest.mark.parametrize("field", ["optimizer='sgd'", "learning_rate=0.01", "momentum=0.9", "warmup_steps=3"])
def test_a_stated_optimizer_is_left_alone(field, tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text(field)
    name, value = tomllib.loads(field).popitem()
    for options in (TrainOptions(changes={name: value}), TrainOptions(recipe=file)):
        recipe = make_recipe(options)
        assert for_length(recipe, options, "cpu", None) == recipe
        # Nor does the run that is there decide: what it disagrees with is refused by name.
        assert make_recipe(options, Recipe(optimizer="adamw", learning_rate=0.003)).learning_rate == 0.01


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 50),
        ({"steps_per_epoch": 25}, 5),
        ({"steps_per_epoch": 3}, 1),
        ({"steps_per_epoch": 4000}, 50),
        ({"steps_per_epoch": 25, "validation_steps": 7}, 7),
        ({"steps_per_epoch": 25, "validation_steps": 0}, 0),
        ({"steps_per_epoch": 25, "weights": "best"}, 50),
        ({"steps_per_epoch": 25, "stop_patience": 3}, 50),
        # Copies make an epoch longer, and its validation no better.
        ({"steps_per_epoch": 25, "offline_copies": 3, "match_steps": False}, 5),
    ],
)
def test_a_short_epoch_is_judged_by_a_fifth_of_its_steps(changes, expected):
    assert make_recipe(TrainOptions(changes=changes)).validation_steps == expected


def test_a_run_keeps_the_validation_it_began_with():
    existing = Recipe(steps_per_epoch=25, validation_steps=50)
    assert make_recipe(TrainOptions(changes={"steps_per_epoch": 25}), existing).validation_steps == 50


def test_the_optimizer_that_nothing_states_is_that_of_the_run():
    existing = Recipe(epochs=7, optimizer="adamw", learning_rate=0.003, warmup_steps=20)
    assert make_recipe(TrainOptions(epochs=10**6), existing) == replace(existing, epochs=10**6)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    place = Workspace(tmp_path_factory.mktemp("length"))
    raw = place.raw(NAME)
    balls_dataset(raw, cases=4, prefix="p")
    plan_and_preprocess(place, "7", replace(PLAN, configurations=("3d_fullres",)))
    return place


def train(place, run, options):
    train_fold(place, "7", "3d_fullres", "0", replace(options, run=run))
    return place.fold(NAME, run, "3d_fullres", "0")


def test_on_a_cpu_the_default_is_two_hours_and_says_why(prepared, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(recipes, "CPU_BUDGET_SECONDS", 1.0)
    folder = train(prepared, "default_length", ANY)
    said = capsys.readouterr().out
    assert "training for 1s, because the default of 1000 epochs of 3 steps takes days on a CPU" in said
    assert "--budget 8h or --epochs 1000" in said
    assert load_json(Run, folder / "run.json").recipe.budget_seconds == 1.0
    train(prepared, "default_length", ANY)
    said = capsys.readouterr().out
    assert "trained already (1s of training" in said
    assert "because" not in said
    assert recipes.for_new_run(Recipe(), ANY, "cuda") == Recipe()
    file = tmp_path / "recipe.toml"
    file.write_text("epochs = 9\n")
    assert recipes.for_new_run(Recipe(epochs=9), TrainOptions(recipe=file), "cpu") == Recipe(epochs=9)


def test_the_default_budget_is_two_hours():
    assert recipes.CPU_BUDGET_SECONDS == 7200


def test_a_run_that_ended_before_its_first_checkpoint_makes_room_for_another(prepared, capsys, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr("autoseg.pipeline.train.train", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(prepared, "begun", TRAIN)
    folder = train(prepared, "begun", replace(TRAIN, loss="ce"))
    assert "has no checkpoint yet of another recipe: begun anew" in capsys.readouterr().out
    assert load_json(Run, folder / "run.json").recipe.loss == "ce"


def test_a_finished_run_goes_on_with_more_epochs_or_more_time(prepared, capsys):
    folder = train(prepared, "longer", TRAIN)
    first = (folder / "weights.safetensors").read_bytes()
    scored = (folder / "validation" / "summary.json").stat().st_mtime_ns
    capsys.readouterr()
    train(prepared, "longer", ANY)
    assert "trained already (2 epochs of 3 steps" in capsys.readouterr().out
    assert (folder / "validation" / "summary.json").stat().st_mtime_ns == scored
    for fewer in (replace(TRAIN, epochs=1), replace(ANY, budget_seconds=0.001)):
        with pytest.raises(AutosegError, match="2 epochs are trained already"):
            train(prepared, "longer", fewer)
    with pytest.raises(AutosegError, match=r"another recipe \(recipe: .*loss 'dice_ce', now 'ce'.*\); give"):
        train(prepared, "longer", replace(TRAIN, epochs=4, loss="ce"))

    train(prepared, "longer", replace(TRAIN, epochs=4))
    said = capsys.readouterr().out
    assert "from 2 epochs of 3 steps to 4 epochs of 3 steps; 6 steps are done" in said
    assert "learning rate 0.011 -> 0.011" in said
    run = load_json(Run, folder / "run.json")
    assert run.recipe.epochs == 4
    assert run.finished is not None
    assert read_progress(folder).step == 12
    second = (folder / "weights.safetensors").read_bytes()
    assert first != second
    assert (folder / "validation" / "summary.json").stat().st_mtime_ns > scored

    done = read_progress(folder)
    train(prepared, "longer", replace(ANY, extend_seconds=1.0))
    assert "of training; 12 steps are done" in capsys.readouterr().out
    run = load_json(Run, folder / "run.json")
    assert run.recipe.budget_seconds == math.ceil(done.seconds + 1.0), "what was trained and the extension, rounded up"
    assert read_progress(folder).step > 12
    assert (folder / "weights.safetensors").read_bytes() != second
    steps = [line["step"] for line in read_metrics(folder)]
    assert steps == sorted(set(steps))
    train(prepared, "longer", ANY)
    assert "trained already" in capsys.readouterr().out


def test_an_unfinished_run_by_time_keeps_what_it_has_left(prepared, capsys):
    folder = train(prepared, "unfinished", replace(ANY, budget_seconds=0.5))
    run = load_json(Run, folder / "run.json")
    longer = replace(run, finished=None, recipe=replace(run.recipe, budget_seconds=100.0))
    extended = recipes.with_length(longer, longer.recipe, TrainOptions(extend_seconds=20.0), folder)
    assert extended.recipe.budget_seconds == 120.0
    assert recipes.with_length(longer, longer.recipe, TrainOptions(), folder) is longer
    shorter = recipes.with_length(longer, replace(longer.recipe, budget_seconds=60.0), TrainOptions(), folder)
    assert shorter.recipe.budget_seconds == 60.0
    assert "the schedule is recomputed: learning rate" in capsys.readouterr().out
    for factor, said in ((0.9, ""), (1e-4, f"; to begin it anew from these weights: --run NAME --pretrained {folder}")):
        recipe = replace(longer.recipe, schedule=f"step(factor={factor}, period=1)")
        recipes.with_length(replace(longer, recipe=recipe), recipe, TrainOptions(extend_seconds=20.0), folder)
        assert re.search(rf"goes on at learning rate [\de.-]+{re.escape(said)}\n", capsys.readouterr().out)


def test_a_run_by_time_goes_on_by_epochs_that_are_more_than_it_has(prepared, capsys, monkeypatch):
    stages = []
    monkeypatch.setattr(JOURNAL, "stage", stages.append)
    folder = train(prepared, "by_time", replace(ANY, budget_seconds=0.5))
    assert stages == ["while fold 0 of 3d_fullres trained", ""], "what is said if the process dies"
    run = load_json(Run, folder / "run.json")
    # 100 steps in 20 epochs of its own are as many as 33 epochs of 3.
    rhythm = Rhythm(budget_seconds=0.5, steps=5, validation_steps=1)
    done = Progressed(step=100, epoch=20, epoch_start=100, rhythm=rhythm, seconds=0.5, rate=0.001)
    monkeypatch.setattr(recipes, "read_progress", lambda folder: done)
    capsys.readouterr()

    def by_epochs(epochs):
        wanted = make_recipe(replace(TRAIN, epochs=epochs), run.recipe)
        return recipes.with_length(run, wanted, TrainOptions(epochs=epochs), folder)

    with pytest.raises(AutosegError, match=r"100 steps, as many as 33\.3 epochs of 3, are trained already"):
        by_epochs(33)
    longer = by_epochs(34)
    assert (longer.recipe.epochs, longer.recipe.budget_seconds, longer.finished) == (34, None, None)
    assert "to 34 epochs of 3 steps; 100 steps are done" in capsys.readouterr().out


def test_extending_needs_a_run_and_its_checkpoint(prepared):
    with pytest.raises(AutosegError, match="there is none"):
        train(prepared, "nothing", replace(ANY, extend_seconds=5.0))
    folder = train(prepared, "bare", replace(TRAIN, epochs=1))
    for checkpoint in folder.glob("checkpoint_*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(AutosegError, match="no checkpoint any more"):
        train(prepared, "bare", replace(TRAIN, epochs=3))


def test_a_kill_in_the_whole_case_validation_costs_no_training(prepared, monkeypatch):
    import autoseg.pipeline.train as module

    def die(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "validate_fold", die)
    with pytest.raises(KeyboardInterrupt):
        train(prepared, "killed", TRAIN)
    monkeypatch.undo()
    folder = prepared.fold(NAME, "killed", "3d_fullres", "0")
    before = (folder / "weights.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(module, "train", die)
    train(prepared, "killed", TRAIN)
    assert (folder / "weights.safetensors").stat().st_mtime_ns == before
    assert (folder / "validation" / "summary.json").is_file()


def test_the_command_saves_and_goes_on_after_sigterm(prepared):
    whole = train(prepared, "whole", replace(TRAIN, epochs=8))
    command = [sys.executable, "-P", "-m", "autoseg", "train", "7", "3d_fullres", "0", "--epochs", "8"]
    command += ["--device", "cpu", "--run", "stopped", "--workspace", str(prepared.root)]
    command += [f"--set={name}={value}" for name, value in CHANGES.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        folder = prepared.fold(NAME, "stopped", "3d_fullres", "0")
        metrics = folder / METRICS
        while child.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.02)
        child.send_signal(signal.SIGTERM)
        said, errors = child.communicate()
    assert child.returncode == 143, errors
    assert "SIGTERM: stopped. The same command goes on from the last checkpoint" in said
    assert "Traceback" not in errors
    assert 3 <= read_progress(folder).step < 24
    assert load_json(Run, folder / "run.json").finished is None
    train(prepared, "stopped", replace(TRAIN, epochs=8))
    assert (folder / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()


def test_the_loss_has_an_option_and_is_checked_wherever_it_comes_from(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text('loss = "dice + 2*focal(gamma = 3)"')
    assert make_recipe(TrainOptions(recipe=file)).loss == "dice+2*focal(gamma=3)"
    assert make_recipe(TrainOptions(recipe=file, loss="ce")).loss == "ce"
    with pytest.raises(AutosegError, match="use the option --loss"):
        make_recipe(TrainOptions(changes={"loss": "ce"}))
    with pytest.raises(AutosegError, match=r"unknown loss 'dize' \(did you mean 'dice'\?\); choose one of dice_ce, "):
        make_recipe(TrainOptions(loss="dize"))
    file.write_text('loss = "focal(gama=3)"')
    with pytest.raises(AutosegError, match="no option 'gama'; it has gamma=2"):
        make_recipe(TrainOptions(recipe=file))


def test_an_early_stop_finishes_the_run_and_its_record_says_why(prepared, capsys):
    still = {**CHANGES, "steps_per_epoch": 1, "learning_rate": 0.0, "stop_patience": 1, "weights": "best"}
    options = replace(TRAIN, epochs=40, changes=still)
    folder = train(prepared, "early", options)
    run, done = load_json(Run, folder / "run.json"), read_progress(folder)
    assert run.ended.startswith("no lower validation loss in 1 epochs, the lowest was")
    assert run.finished is not None
    assert done.epoch < 40
    capsys.readouterr()
    train(prepared, "early", options)
    assert f"ended early: {run.ended}" in capsys.readouterr().out
    train(prepared, "early", replace(options, epochs=done.epoch + 1))
    assert read_progress(folder).epoch == done.epoch + 1
    assert load_json(Run, folder / "run.json").ended is None


def test_a_run_that_was_made_longer_keeps_its_length_under_a_named_recipe(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('base = "desai_unet"\nbatch_size = 4\n')
    for place in (Path("desai_unet"), file):
        named = TrainOptions(recipe=place)
        assert make_recipe(named).epochs == 100
        longer = make_recipe(replace(named, epochs=200), make_recipe(named))
        assert make_recipe(named, longer) == longer
    file.write_text('base = "desai_unet"\nepochs = 300\n')
    assert make_recipe(named, longer).epochs == 300, "whoever edits a file means it"


def test_no_memory_for_the_batch_is_said_with_what_to_do(prepared, monkeypatch, capsys):
    import autoseg.pipeline.train as module

    def full(*arguments, **more):
        raise torch.OutOfMemoryError("tried to allocate 7 GiB")

    monkeypatch.setattr(module, "train", full)
    with pytest.raises(AutosegError, match=r"no memory for batches of 9 patches \(tried.*--set batch_size=4"):
        train(prepared, "crowded", replace(TRAIN, changes={**CHANGES, "tune": False, "batch_size": 9}))
    assert "batches of 9 patches, and 2 were planned to fill the memory" in capsys.readouterr().out


def test_blanks_in_a_schedule_make_no_other_recipe():
    a, b = (
        make_recipe(TrainOptions(changes={"schedule": text}))
        for text in ("step(factor=0.8,period=1)", " step( factor=0.8, period=1 )")
    )
    assert a == b
