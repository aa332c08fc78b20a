"""Recipes by name: each is possible, says what its source says, and yields to --set."""

from dataclasses import fields
from pathlib import Path

import pytest
from toys import configuration
from typer.testing import CliRunner

from autoseg.cli import app
from autoseg.networks import NETWORKS
from autoseg.pipeline.recipe import TrainOptions, for_length, make_recipe, say_large_batch, say_other_network
from autoseg.rates import Moment, learning_rate
from autoseg.recipes import RECIPES
from autoseg.records import AutosegError
from autoseg.schema import Recipe, Request
from autoseg.settings import parse_call


def named(name, **changes):
    return TrainOptions(recipe=Path(name), changes=changes)


@pytest.mark.parametrize("name", RECIPES)
def test_every_named_recipe_is_possible_and_kept_by_short_runs(name, capsys):
    recipe = make_recipe(named(name))
    entry = RECIPES[name]
    assert entry.changes.keys() <= {field.name for field in fields(Recipe)}
    assert all(getattr(recipe, key) == value for key, value in entry.changes.items())
    assert entry.source
    assert entry.beside
    network, choices = parse_call(entry.network)
    assert network == entry.network_name
    architecture = NETWORKS[network]
    assert architecture.spec(architecture.dimensions[0], **choices).name == network
    assert for_length(recipe, named(name), "cpu", None) == recipe
    assert capsys.readouterr().out == ""


def test_rates_and_schedules_of_the_knee_study():
    made = [make_recipe(named(f"desai_{network}")) for network in ("unet", "segnet", "deeplab")]
    assert [(r.optimizer, r.learning_rate, r.schedule, r.epochs) for r in made] == [
        ("adam", 1e-2, "step(factor=0.8,period=1)", 100),
        ("adam", 1e-3, "constant", 100),
        ("adam", 1e-4, "constant", 100),
    ]
    assert {(r.loss, r.augmentation, r.weights) for r in made} == {("dice", "none", "best")}
    # 120 volumes of 72 slices an epoch.
    assert [(r.batch_size, r.steps_per_epoch) for r in made] == [(35, 247), (15, 576), (12, 720)]


def test_batches_of_the_other_works():
    made = {name: make_recipe(named(name)) for name in ("knee_vnet", "knee_unet3d", "tiramisu")}
    assert [recipe.batch_size for recipe in made.values()] == [1, 1, 3]
    tiramisu = made["tiramisu"]
    assert (tiramisu.optimizer, tiramisu.weight_decay, tiramisu.epochs) == ("rmsprop", 1e-4, 750)
    assert tiramisu.steps_per_epoch * tiramisu.batch_size == 366


def test_a_batch_that_is_larger_than_planned_is_said(capsys):
    for batch_size in (None, 1, 2):
        say_large_batch(Recipe(batch_size=batch_size), configuration(batch_size=2))
    assert capsys.readouterr().out == ""
    say_large_batch(make_recipe(named("desai_unet")), configuration(batch_size=2))
    assert "batches of 35 patches, and 2 were planned" in capsys.readouterr().out


def test_decay_and_losses_of_the_bones_and_of_the_vessels():
    bones, fcn, unet = (make_recipe(named(name)) for name in ("auckland_resnet34", "vessels_fcn", "vessels_unet"))
    assert (bones.optimizer, bones.learning_rate, bones.batch_size) == ("adam", 1e-4, 16)
    assert (bones.loss, bones.weights) == ("dice+categorical_focal(gamma=2)", "best")
    assert learning_rate(bones, Moment(epoch=30)) == pytest.approx(7e-5)
    assert (fcn.loss, unet.loss) == ("focal_tversky", "dice_ce")
    for made in (fcn, unet):
        assert (made.optimizer, made.schedule) == ("adamw", "plateau(factor=0.1,patience=5)")
        assert made.stop_patience > 5


def test_set_and_files_with_a_base_beat_the_recipe(tmp_path):
    assert make_recipe(named("desai_unet", learning_rate=0.5)).learning_rate == 0.5
    file = tmp_path / "mine.toml"
    file.write_text('base = "desai_unet"\nlearning_rate = 0.02\n')
    mine = make_recipe(TrainOptions(recipe=file))
    assert (mine.learning_rate, mine.optimizer, mine.epochs) == (0.02, "adam", 100)
    assert make_recipe(TrainOptions(recipe=file, epochs=3)).epochs == 3
    file.write_text('base = "desai"\n')
    with pytest.raises(AutosegError, match="none of desai_unet, desai_segnet"):
        make_recipe(TrainOptions(recipe=file))
    with pytest.raises(AutosegError, match="neither a file nor one of desai_unet"):
        make_recipe(named("desai"))
    with pytest.raises(AutosegError, match=r"missing\.toml does not exist"):
        make_recipe(TrainOptions(recipe=tmp_path / "missing.toml"))


def test_another_network_than_that_of_the_recipe_is_said(capsys, tmp_path):
    changes = {"configurations.2d.batch_size": "3", "preparation.function": "mine:f"}
    asked = Request(network="unet", merge={"knee": ("femur", "tibia")}, changes=changes)
    say_other_network(named("desai_segnet"), "unet", "7 --workspace here", asked)
    said = capsys.readouterr().out
    assert "made for the network segnet, this plan has unet" in said
    held = "--merge knee=femur,tibia --set preparation.function=mine:f"
    assert f"autoseg fit -d 7 --workspace here {held} --network 'segnet' --recipe desai_segnet --run segnet;" in said
    file = tmp_path / "file.toml"
    file.write_text('base = "desai_deeplab"')
    say_other_network(TrainOptions(recipe=file), "unet", "7", Request())
    assert f"--network 'deeplabv3plus(rates=[2, 4, 6], dropout=0.5)' --recipe {file}" in capsys.readouterr().out
    file.write_text("epochs = 3")
    for options in (named("desai_segnet"), TrainOptions(), TrainOptions(recipe=file)):
        say_other_network(options, "segnet", "7", Request())
    assert capsys.readouterr().out == ""


def test_schedules_are_listed_with_their_options():
    said = CliRunner().invoke(app, ["train", "1", "2d", "0", "--help-fields"]).output
    assert "\nstep(factor=0.9, period=3) " in said
    assert "\nwsd(decay=0.2) " in said


def test_the_list_names_all():
    said = CliRunner().invoke(app, ["recipes"]).output
    assert all(f"\n{name} " in said for name in RECIPES)
    assert "step(factor=0.8,period=1)" in said
