"""Schedules by hand, and a training loop whose time is told by a toy clock."""

from signal import SIGTERM

import numpy as np
import pytest
import torch
from test_training import parts, weights, write_cases

from autoseg.checkpoint import load_checkpoint, read_progress
from autoseg.history import read_metrics
from autoseg.rates import Moment, learning_rate
from autoseg.schedule import choose_rhythm, is_over, progress
from autoseg.schema import Recipe
from autoseg.signals import Requests, Stopped
from autoseg.step import make_optimizer
from autoseg.training import train

TIMED = {"epochs": 1000, "steps_per_epoch": 250, "validation_steps": 50, "augmentation": "none"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("schedule")
    write_cases(folder / "cases")
    return folder


class Clock:
    """Seconds that pass only in the network: so many a training step, a third of that in validation."""

    def __init__(self, network, seconds):
        self.now, self.seconds, self.steps, self.rates = 1000.0, seconds, 0, []
        self.ended = self.now
        network.register_forward_pre_hook(self.tick)

    def tick(self, network, inputs):
        if network.training:
            self.now += self.seconds(self.steps)
            self.steps += 1
            self.ended = self.now
        else:
            self.now += self.seconds(self.steps) / 3

    def __call__(self):
        return self.now


def test_poly_by_hand():
    recipe = Recipe(epochs=4, learning_rate=0.1)
    at = [progress(recipe, step=step, seconds=9.0) for step in (0, 500, 1000)]
    rates = [learning_rate(recipe, Moment(progress=now)) for now in at]
    assert rates == [0.1, pytest.approx(0.1 * 0.5**0.9), 0.0]
    by_time = Recipe(budget_seconds=200.0)
    assert progress(by_time, step=10**6, seconds=50.0) == 0.25
    assert progress(by_time, step=0, seconds=201.0) == 1.0


def test_the_warm_up_rises_to_the_schedule_in_equal_parts():
    recipe = Recipe(learning_rate=0.8, warmup_steps=3, poly_exponent=1.0)
    rates = [learning_rate(recipe, Moment(step=step, progress=0.5)) for step in (0, 1, 2, 3, 4)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    assert learning_rate(Recipe(learning_rate=0.8), Moment()) == 0.8


@pytest.mark.parametrize(
    ("seconds_a_step", "steps", "validation_steps"),
    [(0.01, 250, 50), (1.0, 135, 27), (5.0, 27, 5), (20.0, 7, 1), (700.0, 5, 1)],
)
def test_epochs_of_a_run_by_time(seconds_a_step, steps, validation_steps):
    """7200 s in 50 epochs of steps that cost 1.07 of their own time."""
    rhythm = choose_rhythm(Recipe(budget_seconds=7200.0), 7200.0, seconds_a_step)
    assert (rhythm.steps, rhythm.validation_steps) == (steps, validation_steps)


def test_epochs_of_a_run_by_time_suit_the_validation_that_they_are_given():
    recipe = Recipe(budget_seconds=7200.0)
    assert choose_rhythm(recipe, 7200.0, 20.0, 4).steps == 20, "five times the validation, not 7"
    assert choose_rhythm(recipe, 7200.0, 1.0, 4).steps == 135
    assert choose_rhythm(recipe, 7200.0, 1.0, 4).validation_steps == 4
    assert choose_rhythm(Recipe(budget_seconds=7200.0, validation_steps=0), 7200.0, 1.0).validation_steps == 0


def test_a_run_ends_nearest_to_its_budget():
    recipe = Recipe(budget_seconds=100.0)
    assert not is_over(recipe, step=9, seconds=95.0, recent=[9.0, 10.0], closing=0.0)
    assert is_over(recipe, step=9, seconds=95.5, recent=[9.0, 10.0], closing=0.0)
    assert is_over(recipe, step=9, seconds=94.0, recent=[9.0, 10.0], closing=2.0)
    assert is_over(recipe, step=20, seconds=98.0, recent=[], closing=0.0)
    assert not is_over(recipe, step=0, seconds=0.0, recent=[], closing=0.0)


def uneven(step):
    return (0.8, 2.4, 1.0, 1.2)[step % 4] * (1.3 if step > 40 else 1.0)


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_decay_is_complete_when_the_time_is_over(place, tmp_path, interrupted):
    made = parts(place, f"{tmp_path}/run", budget_seconds=300.0, **TIMED)
    clock = Clock(made.network, uneven)
    if interrupted:
        asked = Requests()

        def stop(network, inputs):
            asked.stop = SIGTERM if clock.steps == 61 else None

        made.network.register_forward_pre_hook(stop)
        with pytest.raises(Stopped):
            train(made, requests=asked, clock=clock)
        used = clock.now - 1000.0
        assert read_progress(made.folder).seconds == pytest.approx(used, abs=2.5)
        made = parts(place, f"{tmp_path}/run", budget_seconds=300.0, **TIMED)
        again = Clock(made.network, uneven)
        again.now, again.steps, first = 5000.0, 61, 5000.0 - used  # the time between is nobody's
        clock = again
    else:
        first = 1000.0
    state = train(made, clock=clock)
    optimizer = make_optimizer(made.network, made.recipe)
    load_checkpoint(made.folder, made.network, optimizer)
    assert optimizer.param_groups[0]["lr"] < 0.02 * made.recipe.learning_rate
    assert clock.ended - first == pytest.approx(300.0, rel=0.05)
    assert state.seconds == pytest.approx(300.0, rel=0.02)
    lines = read_metrics(made.folder)
    assert [line["epoch"] for line in lines] == list(range(len(lines)))
    assert np.all(np.diff([line["progress"] for line in lines]) > 0)
    assert np.all(np.diff([line["learning_rate"] for line in lines]) < 0)
    assert lines[-1]["step"] == state.step


def test_about_fifty_epochs_kept_over_a_stop_and_validation_below_a_fifth(place, tmp_path, capsys):
    made = parts(place, f"{tmp_path}/run", budget_seconds=450.0, **TIMED)
    clock = Clock(made.network, lambda step: 7.0 if step == 0 else 1.0)

    def look(lines):
        if len(lines) == 3:
            asked.stop = SIGTERM

    asked = Requests()
    with pytest.raises(Stopped):
        train(made, look, asked, clock)
    assert "a step takes 1 s: epochs of 8 steps and 1 validation steps" in capsys.readouterr().out
    chosen = read_progress(made.folder).rhythm
    made = parts(place, f"{tmp_path}/run", budget_seconds=450.0, **TIMED)
    clock = Clock(made.network, lambda step: 5.0)
    assert train(made, clock=clock).rhythm == chosen
    assert "a step takes" not in capsys.readouterr().out
    lines = read_metrics(made.folder)
    assert np.diff([line["step"] for line in lines])[:-1].tolist() == [8] * (len(lines) - 2)


def test_a_budget_shorter_than_a_few_steps_still_ends_with_a_line_and_weights(place, tmp_path):
    made = parts(place, f"{tmp_path}/run", budget_seconds=2.0, **TIMED)
    state = train(made, clock=Clock(made.network, lambda step: 5.0))
    assert state.step == 1
    assert len(read_metrics(made.folder)) == 1
    assert (made.folder / "weights.safetensors").is_file()


def test_more_epochs_go_on_from_the_last_checkpoint_with_a_higher_rate(place, tmp_path):
    short = {"steps_per_epoch": 4, "validation_steps": 1, "augmentation": "none"}
    made = parts(place, f"{tmp_path}/run", epochs=3, **short)
    train(made)
    before = weights(made)
    longer = parts(place, f"{tmp_path}/run", epochs=6, **short)
    state = train(longer)
    assert (state.step, state.epoch) == (24, 6)
    assert not torch.equal(before, weights(longer))
    lines = read_metrics(made.folder)
    assert [(line["epoch"], line["step"]) for line in lines] == [(n, 4 * n + 4) for n in range(6)]
    assert lines[3]["learning_rate"] == pytest.approx(0.01 * 0.5**0.9)
    assert lines[3]["learning_rate"] > lines[2]["learning_rate"]
    assert [line["progress"] for line in lines[2:4]] == [1.0, pytest.approx(4 / 6, abs=1e-5)]


def test_stable_decay_by_time_is_placed_by_the_clock_and_rises_again_when_extended(place, tmp_path):
    fields = {**TIMED, "schedule": "wsd(decay=0.4)", "steps_per_epoch": 5}
    train_with = {}
    for budget in (30.0, 60.0):
        made = parts(place, f"{tmp_path}/run", budget_seconds=budget, **fields)
        clock = Clock(made.network, lambda step: 1.0)
        train(made, clock=clock)
        train_with[budget] = read_metrics(made.folder)
    first, both = train_with.values()
    assert both[: len(first)] == first
    full = [line for line in first if line["progress"] < 0.6]
    assert [line["learning_rate"] for line in full] == [0.01] * len(full)
    assert first[-1]["learning_rate"] < 0.0015
    rates = [line["learning_rate"] for line in both[len(first) - 1 :]]
    # An epoch is about 6 s: a tenth of the new budget, a quarter of the way up or down.
    assert np.abs(np.diff(rates)).max() < 0.004
    assert max(rates) > 0.006
    assert rates[-1] < 0.0015


def test_under_a_budget_a_schedule_in_epochs_counts_those_of_the_rhythm(place, tmp_path):
    fields = {**TIMED, "schedule": "step(factor=0.5, period=2)", "steps_per_epoch": 5}
    made = parts(place, f"{tmp_path}/run", budget_seconds=25.0, **fields)
    train(made, clock=Clock(made.network, lambda step: 1.0))
    rates = [line["learning_rate"] for line in read_metrics(made.folder)]
    assert len(rates) > 3
    assert rates == pytest.approx([0.01 * 0.5 ** (epoch // 2) for epoch in range(len(rates))])


def test_losses_that_are_compared_are_of_the_same_patches_also_when_the_length_changes(place, tmp_path):
    """Two epochs of three validation steps, then by time: those of its rhythm would have one."""
    fields = {"validation_steps": 3, "augmentation": "none", "weights": "best", "learning_rate": 0.0}
    made = parts(place, f"{tmp_path}/run", epochs=2, steps_per_epoch=4, **fields)
    train(made, clock=Clock(made.network, lambda step: 1.0))
    budget = read_progress(made.folder).seconds + 25.0
    made = parts(place, f"{tmp_path}/run", budget_seconds=budget, steps_per_epoch=250, **fields)
    state = train(made, clock=Clock(made.network, lambda step: 1.0))
    assert (state.compared_steps, state.rhythm.validation_steps, state.rhythm.steps) == (3, 3, 15)
    assert len(state.validation_losses) > 2
    assert len(set(state.validation_losses)) == 1


def test_a_run_of_epochs_goes_on_by_time(place, tmp_path):
    made = parts(place, f"{tmp_path}/run", epochs=3, steps_per_epoch=4, validation_steps=1, augmentation="none")
    train(made, clock=Clock(made.network, lambda step: 1.0))
    done = read_progress(made.folder)
    budget = done.seconds + 40.0
    made = parts(place, f"{tmp_path}/run", budget_seconds=budget, **{**TIMED, "steps_per_epoch": 4})
    state = train(made, clock=Clock(made.network, lambda step: 1.0))
    assert state.seconds == pytest.approx(budget, abs=1.0)
    lines = read_metrics(made.folder)
    assert [line["epoch"] for line in lines] == list(range(len(lines)))
    assert lines[3]["learning_rate"] > lines[2]["learning_rate"]
    assert lines[3]["step"] == 16


def test_a_run_by_time_goes_on_by_epochs(place, tmp_path):
    made = parts(place, f"{tmp_path}/run", budget_seconds=25.0, **{**TIMED, "steps_per_epoch": 9})
    first = train(made, clock=Clock(made.network, lambda step: 1.0))
    assert first.rhythm is not None and first.rhythm.steps == 5
    made = parts(place, f"{tmp_path}/run", **{**TIMED, "epochs": 5, "steps_per_epoch": 9, "validation_steps": 2})
    state = train(made, clock=Clock(made.network, lambda step: 1.0))
    assert state.step == 45
    lines = read_metrics(made.folder)
    assert [line["epoch"] for line in lines] == list(range(len(lines)))
    steps = [line["step"] for line in lines if line["step"] >= first.step]
    assert steps[:2] == [first.step, first.step + 9], "epochs are as long as the recipe says"
    assert lines[-1]["progress"] == 1.0
