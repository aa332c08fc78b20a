"""Schedules by hand, what a plateau and a patience count, and rates that never jump where they should not."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training import parts, write_cases
from torch import nn

from autoseg.checkpoint import read_progress
from autoseg.history import read_metrics
from autoseg.optimizers import OPTIMIZERS
from autoseg.rates import SCHEDULES, Leg, Moment, early_stop, learning_rate, lowest, next_leg, reductions
from autoseg.records import AutosegError
from autoseg.schema import Recipe
from autoseg.step import make_optimizer
from autoseg.training import train


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rates")
    write_cases(folder / "cases")
    return folder


def rates(recipe, moments):
    return [learning_rate(recipe, moment) for moment in moments]


def epochs(*numbers):
    return [Moment(epoch=number) for number in numbers]


def test_step_decay_drops_every_third_epoch():
    recipe = Recipe(learning_rate=5e-5, schedule="step(factor=0.9, period=3)")
    assert rates(recipe, epochs(*range(60))) == pytest.approx([5e-5 * 0.9 ** math.floor(n / 3) for n in range(60)])
    every = Recipe(learning_rate=0.01, schedule="step(factor=0.8, period=1)")
    assert rates(every, epochs(0, 1, 2)) == pytest.approx([0.01, 0.008, 0.0064])


def test_subtracting_ends_at_a_floor_and_the_other_reading_never_does():
    recipe = Recipe(learning_rate=1e-4, schedule="subtract(amount=1e-6, floor=2e-6)")
    assert rates(recipe, epochs(0, 1, 50, 98, 99, 500)) == pytest.approx([1e-4, 9.9e-5, 5e-5, 2e-6, 2e-6, 2e-6])
    assert learning_rate(Recipe(learning_rate=1e-7, schedule="subtract"), Moment(epoch=3)) == 1e-7
    keras = Recipe(learning_rate=1e-4, schedule="inverse_time(decay=1e-6)")
    at = [Moment(step=0), Moment(step=250), Moment(step=10**6)]
    assert rates(keras, at) == pytest.approx([1e-4, 1e-4 / 1.00025, 5e-5])


def test_cosine_constant_and_stable_decay_by_hand():
    at = [Moment(progress=p) for p in (0.0, 1 / 3, 0.5, 0.9, 1.0)]
    tenth = Recipe(learning_rate=0.1)
    assert rates(replace(tenth, schedule="cosine"), at)[:3] == pytest.approx([0.1, 0.075, 0.05])
    assert rates(replace(tenth, schedule="constant"), at) == [0.1] * 5
    assert rates(replace(tenth, schedule="wsd(decay=0.4)"), at) == pytest.approx([0.1, 0.1, 0.1, 0.025, 0.0])


def test_warm_up_goes_with_every_schedule():
    for name in SCHEDULES:
        recipe = Recipe(learning_rate=0.8, schedule=name, warmup_steps=3)
        full = [learning_rate(replace(recipe, warmup_steps=0), Moment(step=n, progress=0.1)) for n in range(6)]
        warm = [learning_rate(recipe, Moment(step=n, progress=0.1)) for n in range(6)]
        assert warm == pytest.approx([rate * min(1, (n + 1) / 4) for n, rate in enumerate(full)])


def test_a_plateau_is_counted_by_hand():
    losses = (3.0, 2.0, 2.0, 2.5, None, 1.0, 1.5, 1.5)
    assert [reductions(losses[:n], 2) for n in range(9)] == [0, 0, 0, 0, 1, 1, 1, 1, 2]
    assert reductions((), 1) == reductions((5.0,), 1) == 0
    assert reductions((None,) * 6, 2) == 3
    recipe = Recipe(learning_rate=0.1, schedule="plateau(factor=0.5, patience=2)")
    assert learning_rate(recipe, Moment(losses=losses)) == 0.025
    assert lowest(losses) == 5
    assert lowest((None,)) is None


def test_the_stop_waits_for_its_patience_and_anew_after_an_extension():
    recipe = Recipe(stop_patience=3)
    losses = (2.0, 1.0, 1.0, 1.5, 1.5)
    assert early_stop(recipe, Moment(losses=losses[:4])) is None
    assert early_stop(recipe, Moment(losses=losses)) == (
        "no lower validation loss in 3 epochs, the lowest was 1 in epoch 1"
    )
    assert "never finite" in early_stop(recipe, Moment(losses=(None,) * 3))
    assert early_stop(Recipe(), Moment(losses=losses * 9)) is None
    leg = Leg(epochs=9, budget_seconds=None, epoch=5)
    assert early_stop(recipe, Moment(losses=(*losses, 1.2, 1.2), leg=leg)) is None
    assert early_stop(recipe, Moment(losses=(*losses, 1.2, 1.2, 1.2), leg=leg))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schedule": "plateau(patience=5)", "stop_patience": 5}, "before schedule plateau.patience=5. has lowered"),
        ({"schedule": "plateu"}, "choose one of poly, step"),
        ({"schedule": "step(factor=1.5)"}, "less than 1.*its options: factor=0.9, period=3"),
        ({"schedule": "poly(exponent=2)"}, "its options: none"),
        ({"schedule": "step(0.5)"}, "write it as key=value"),
        ({"schedule": "plateau", "validation_steps": 0}, "no validation loss for schedule=plateau to go by"),
        ({"stop_patience": 3, "weights": "best", "validation_steps": 0}, "stop_patience and weights=best to go by"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(changes, said):
    from autoseg.pipeline.recipe import TrainOptions, make_recipe

    with pytest.raises(AutosegError, match=f"(?s){said}"):
        make_recipe(TrainOptions(changes=changes))
    fine = {"schedule": "plateau(patience=4)", "stop_patience": 5}
    assert make_recipe(TrainOptions(changes=fine)).stop_patience == 5


OTHER = st.floats(0.3, 0.95) | st.floats(1.05, 4.0)
LENGTHS = st.lists(st.tuples(st.floats(0.02, 0.98), OTHER), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.floats(0.05, 0.9), st.booleans())
def test_stable_decay_never_jumps_whenever_a_run_is_made_longer_or_shorter(changes, decay, to_the_end):
    """Each change: after so much of what is left, the whole becomes longer or shorter by a factor."""
    recipe = Recipe(budget_seconds=1000.0, learning_rate=0.1, schedule=f"wsd(decay={decay})")
    done, leg, rate = 0.0, None, None
    for way, factor in changes:
        total = recipe.budget_seconds
        begin = 0.0 if leg is None else leg.progress
        share = 1.0 if leg is None else leg.share
        way = 1.0 if to_the_end else way
        at = [begin + (1 - begin) * way * n / 200 for n in range(200)]  # short of the end by one step
        course = rates(recipe, [Moment(step=n + 1, progress=p, leg=leg) for n, p in enumerate(at)])
        assert min(course) > 0
        assert max(course) <= 0.1 * (1 + 1e-9)
        assert course[0] == pytest.approx(0.1 if rate is None else rate)
        steepest = max(1 / decay, share / (1 - begin))
        assert max(abs(a - b) for a, b in pairwise(course)) <= 0.1 * steepest * (at[1] - at[0]) * (1 + 1e-6)
        assert learning_rate(recipe, Moment(progress=1.0, leg=leg)) == pytest.approx(0.0, abs=1e-9)
        done, rate = at[-1] * total, course[-1]
        recipe = replace(recipe, budget_seconds=max(total * factor, done * 1.01))
        now = Moment(
            step=200, epoch=4, progress=done / recipe.budget_seconds, leg=leg or Leg(epochs=1000, budget_seconds=total)
        )
        leg = next_leg(recipe, now, rate)
        assert next_leg(recipe, replace(now, leg=leg), rate) == leg


BEFORE_AND_AFTER = {
    "poly": [1, 0.5**0.9, 0.5**0.9, 0.25**0.9],
    "cosine": [1, 0.5, 0.5, (1 + math.cos(0.75 * math.pi)) / 2],
    "constant": [1, 1, 1, 1],
    "step(factor=0.5, period=1)": [1, 0.5, 0.25, 0.125],
    "subtract(amount=0.002, floor=0.005)": [1, 0.8, 0.6, 0.5],
    "inverse_time(decay=1)": [1, 1 / 2, 1 / 3, 1 / 4],
    "wsd(decay=0.5)": [1, 1, 1, 0.5],
    "plateau(factor=0.5, patience=1)": None,
}


def test_runs_of_every_schedule_go_on_with_more_epochs(place, tmp_path):
    """Two epochs of one step, then two more: the rates of all four."""
    assert {text.partition("(")[0] for text in BEFORE_AND_AFTER} == set(SCHEDULES)
    for text, shares in BEFORE_AND_AFTER.items():
        short = {"schedule": text, "steps_per_epoch": 1, "validation_steps": 1, "augmentation": "none"}
        run = f"{tmp_path}/{text.partition('(')[0]}"
        train(parts(place, run, epochs=2, **short))
        made = parts(place, run, epochs=4, **short)
        assert train(made).step == 4
        lines = read_metrics(made.folder)
        if shares is None:
            losses = [line["validation_loss"] for line in lines]
            shares = [0.5 ** reductions(losses[:epoch], 1) for epoch in range(4)]
        assert [line["learning_rate"] for line in lines] == pytest.approx([0.01 * share for share in shares]), text
        assert [line["epoch"] for line in lines] == [0, 1, 2, 3]


def test_stable_decay_begins_at_once_where_a_run_is_made_shorter(place, tmp_path):
    """Three epochs of ten, then two more and no further: from the full rate down to half of it, and to the end."""
    fields = {"schedule": "wsd(decay=0.5)", "steps_per_epoch": 1, "validation_steps": 1, "augmentation": "none"}

    class Ended(BaseException):
        pass

    def end(lines):
        if len(lines) == 4:
            raise Ended

    with pytest.raises(Ended):
        train(parts(place, f"{tmp_path}/run", epochs=10, checkpoint_minutes=1e-9, **fields), end)
    made = parts(place, f"{tmp_path}/run", epochs=5, **fields)
    assert read_progress(made.folder).epoch == 3
    train(made)
    rates = [line["learning_rate"] for line in read_metrics(made.folder)]
    assert rates == pytest.approx([0.01, 0.01, 0.01, 0.01, 0.005])


def test_a_run_that_learns_nothing_ends_within_its_patience_and_goes_on_only_if_made_longer(place, tmp_path, capsys):
    still = {"learning_rate": 1e-12, "stop_patience": 2, "steps_per_epoch": 1, "validation_steps": 1}
    still["schedule"] = "plateau(factor=0.5, patience=1)"
    made = parts(place, f"{tmp_path}/run", epochs=40, **still)
    state = train(made)
    losses = [line["validation_loss"] for line in read_metrics(made.folder)]
    assert len(losses) == state.step == lowest(losses) + 3 < 40
    said = capsys.readouterr().out
    first = said.index("no lower validation loss in 1 epochs: learning rate 1e-12 -> 5e-13")
    assert first < said.index("no lower validation loss in 2 epochs, the lowest was")
    assert train(parts(place, f"{tmp_path}/run", epochs=40, **still)).step == state.step
    longer = train(parts(place, f"{tmp_path}/run", epochs=41, **still))
    assert state.step + 2 <= longer.step <= 41
    assert read_progress(made.folder).leg.epoch == state.epoch


def test_optimizers_of_the_table_have_the_usual_settings():
    assert set(OPTIMIZERS) == set(get_args(get_type_hints(Recipe)["optimizer"]))
    made = {
        name: make_optimizer(nn.Linear(3, 2), Recipe(optimizer=name, learning_rate=0.003, weight_decay=0.02))
        for name in OPTIMIZERS
    }
    adam = made["adam"].param_groups[0]
    assert (adam["betas"], adam["eps"], adam["lr"], adam["weight_decay"]) == ((0.9, 0.999), 1e-8, 0.003, 0.02)
    assert made["sgd"].param_groups[0]["nesterov"]
    assert isinstance(made["rmsprop"], torch.optim.RMSprop)
    assert made["rmsprop"].param_groups[0]["alpha"] == 0.9
    # Without a gradient Adam moves by its weight decay through the moments, AdamW by that share of the weight itself.
    moved = {}
    for name in ("adam", "adamw"):
        weight = nn.Parameter(torch.tensor([2.0]))
        weight.grad = torch.zeros(1)
        OPTIMIZERS[name]([weight], Recipe(learning_rate=0.1, weight_decay=0.02)).step()
        moved[name] = 2.0 - weight.item()
    assert moved == {"adam": pytest.approx(0.1, rel=1e-4), "adamw": pytest.approx(2.0 * 0.1 * 0.02, rel=1e-4)}
