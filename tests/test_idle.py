"""What a recipe may say: numbers within their range, and nothing that would do nothing."""

import json
from pathlib import Path

import pytest

from autoseg.pipeline.idle import EFFECTS, refuse_frozen
from autoseg.pipeline.recipe import TrainOptions, make_recipe
from autoseg.recipes import RECIPES
from autoseg.records import AutosegError, from_json, to_json
from autoseg.schema import Recipe


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("steps_per_epoch", 0, "greater than 0"),
        ("validation_steps", -1, "greater than or equal to 0"),
        ("learning_rate", -0.01, "greater than or equal to 0"),
        ("momentum", 1.0, "less than 1"),
        ("momentum", -0.1, "greater than or equal to 0"),
        ("weight_decay", -1e-5, "greater than or equal to 0"),
        ("poly_exponent", -1, "greater than or equal to 0"),
        ("clip_norm", -1, "greater than or equal to 0"),
        ("foreground_fraction", 1.1, "less than or equal to 1"),
        ("foreground_fraction", -0.1, "greater than or equal to 0"),
        ("loader_threads", 0, "greater than 0"),
        ("checkpoint_minutes", 0, "greater than 0"),
        ("max_bad_steps", 0, "greater than 0"),
    ],
)
def test_numbers_that_would_break_training_are_refused_by_name(tmp_path, field, value, allowed):
    said = f"  {field}: Input should be {allowed} .found {value}"
    with pytest.raises(AutosegError, match=f"--set .*\\n{said}"):
        make_recipe(TrainOptions(changes={field: value}))
    file = tmp_path / "mine.toml"
    file.write_text(f"{field} = {value}")
    with pytest.raises(AutosegError, match=f"mine.toml .*\\n{said}"):
        make_recipe(TrainOptions(recipe=file))


def test_lengths_and_seeds_too():
    for options in (TrainOptions(epochs=0), TrainOptions(epochs=-2), TrainOptions(seed=-1)):
        with pytest.raises(AutosegError, match="Input should be greater than"):
            make_recipe(options)


def test_the_ends_of_the_ranges_are_possible_and_recipes_are_read_as_they_were_written():
    ends = {"learning_rate": 0, "momentum": 0, "clip_norm": 0, "weight_decay": 0, "validation_steps": 0}
    for changes in (ends, {"foreground_fraction": 0}, {"foreground_fraction": 1.0}, {"batch_size": 1}):
        made = make_recipe(TrainOptions(changes=changes))
        assert from_json(Recipe, to_json(made)) == made


IDLE = [
    ({"optimizer": "adam", "momentum": 0.9}, "momentum=0.9 is that of sgd and does nothing with optimizer=adam"),
    ({"optimizer": "rmsprop", "momentum": 0.5}, "nothing with optimizer=rmsprop"),
    ({"schedule": "cosine", "poly_exponent": 2.0}, "poly_exponent=2.0 is that of poly .* schedule=cosine"),
    ({"ema_decay": 0.99}, "ema_decay=0.99 is that of ema and does nothing with weights=last; take weights=ema"),
    ({"match_steps": False}, "match_steps=False does nothing without copies"),
    ({"offline_copies": 2, "augmentation": "none"}, "offline_copies=2 are augmented copies"),
    ({"patch_position": "uniform", "foreground_fraction": 0.5}, "take one of default, balanced, components"),
    ({"patch_position": "fixed", "redraw_empty": 3}, "redraw_empty=3 does nothing with patch_position=fixed"),
    ({"freeze_encoder_epochs": 2}, "freeze_encoder_epochs=2 is for an encoder that has learnt .* without --pretrained"),
    ({"encoder_rate": 0.1}, "encoder_rate=0.1 is for an encoder"),
]
WORKING = [
    {"optimizer": "sgd", "momentum": 0.9},
    {"schedule": " poly", "poly_exponent": 2.0},
    {"weights": "ema", "ema_decay": 0.99},
    {"offline_copies": 2, "match_steps": False},
    {"patch_position": "components", "foreground_fraction": 0.5},
    {"patch_position": "uniform", "foreground_fraction": 0.0},
    {"patch_position": "normal", "redraw_empty": 3},
]


@pytest.mark.parametrize(("changes", "said"), IDLE)
def test_a_stated_field_that_would_do_nothing_is_refused(tmp_path, changes, said):
    with pytest.raises(AutosegError, match=said):
        make_recipe(TrainOptions(epochs=9, changes=changes))
    file = tmp_path / "mine.toml"
    file.write_text("\n".join(f"{key} = {json.dumps(value)}" for key, value in changes.items()))
    with pytest.raises(AutosegError, match=said):
        make_recipe(TrainOptions(epochs=9, recipe=file))


def test_every_effect_is_tried_here():
    assert {effect.field for effect in EFFECTS} <= {field for changes, _ in IDLE for field in changes}


@pytest.mark.parametrize("changes", WORKING)
def test_the_same_field_is_taken_where_it_does_something(changes):
    made = make_recipe(TrainOptions(epochs=9, changes=changes))
    taken = {field: getattr(made, field) for field in changes}
    assert taken == {field: value.strip() if isinstance(value, str) else value for field, value in changes.items()}


def test_an_encoder_is_set_apart_where_it_has_learnt_something():
    apart = {"freeze_encoder_epochs": 2, "encoder_rate": 0.1}
    assert make_recipe(TrainOptions(epochs=9, pretrained=Path("resnet34.pth"), changes=apart)).encoder_rate == 0.1


def test_all_idle_fields_are_named_at_once():
    with pytest.raises(AutosegError, match=r"(?s)momentum=0\.5.*ema_decay=0\.5"):
        make_recipe(TrainOptions(changes={"optimizer": "adam", "momentum": 0.5, "ema_decay": 0.5}))


def test_defaults_and_what_a_named_recipe_brings_along_are_nobodys_statement():
    defaults = {"optimizer": "adam", "momentum": 0.99, "ema_decay": 0.999, "match_steps": True, "encoder_rate": 1}
    make_recipe(TrainOptions(changes=defaults))
    # It has foreground_fraction=0 and no augmentation, for its own way of placing patches.
    desai = TrainOptions(recipe=Path("desai_unet"), changes={"patch_position": "foreground"})
    assert make_recipe(desai).foreground_fraction == RECIPES["desai_unet"].changes["foreground_fraction"] == 0
    with pytest.raises(AutosegError, match="augmented copies"):
        make_recipe(TrainOptions(recipe=Path("desai_unet"), changes={"offline_copies": 4}))


@pytest.mark.parametrize(
    ("recipe", "seconds_a_step", "epochs"),
    [
        (Recipe(epochs=9, freeze_encoder_epochs=9), None, "all of the 9 epochs"),
        (Recipe(epochs=9, freeze_encoder_epochs=8), None, None),
        # 7200 s: 100 steps in epochs of five at 1.07 of their time.
        (Recipe(budget_seconds=7200.0, freeze_encoder_epochs=19), 72.0, "all of the about 19 epochs"),
        (Recipe(budget_seconds=7200.0, freeze_encoder_epochs=18), 72.0, None),
        (Recipe(budget_seconds=7200.0, freeze_encoder_epochs=49), 1.0, None),
        (Recipe(budget_seconds=7200.0, freeze_encoder_epochs=50), None, "about 50 epochs"),
        # 250 steps an epoch at the most: 7200 / (250 * 0.0107).
        (Recipe(budget_seconds=7200.0, freeze_encoder_epochs=2600), 0.01, None),
        (Recipe(budget_seconds=1.0), 72.0, None),
    ],
)
def test_an_encoder_that_would_never_learn_is_refused(recipe, seconds_a_step, epochs):
    if epochs is None:
        refuse_frozen(recipe, seconds_a_step)
    else:
        with pytest.raises(AutosegError, match=epochs):
            refuse_frozen(recipe, seconds_a_step)
