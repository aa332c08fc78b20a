"""A plan for a network by name, beside the default one: prepared cases are shared, and every verb works with it."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_pipeline import NAME, QUICK
from toys import balls_dataset, write_balls
from typer.testing import CliRunner

from autoseg.cli import app
from autoseg.cli.options import plan_name
from autoseg.networks import spec_of
from autoseg.networks.unet import UNet, unet
from autoseg.pipeline.data import plan_and_preprocess
from autoseg.pipeline.planning import PlanOptions
from autoseg.pipeline.predict import PredictOptions, predict
from autoseg.pipeline.recipe import TrainOptions
from autoseg.pipeline.share import export_model
from autoseg.pipeline.train import train_fold
from autoseg.records import AutosegError, load_json
from autoseg.schema import NetworkSpec, Plan, Request, Run
from autoseg.settings import in_json
from autoseg.store import list_cases, load_case, share_case
from autoseg.workspace import Workspace

ONLY = ("3d_fullres",)
FIXED = {
    "configurations.3d_fullres.patch": [16, 16, 16],
    "configurations.3d_fullres.batch_size": 2,
    "configurations.3d_fullres.network.features": [4, 6, 8],
}
REQUEST = Request(network="resenc(stages=3)", changes=in_json(FIXED))
ASKED = PlanOptions(name="resenc", request=REQUEST, configurations=ONLY)


class Own:
    """A network of one's own, as a function of the module."""

    @staticmethod
    def net(spec: NetworkSpec, in_channels: int, heads: int) -> UNet:
        return unet(replace(spec, name="unet"), in_channels, heads)


@pytest.fixture
def place(tmp_path):
    balls_dataset(tmp_path / "raw" / NAME)
    return Workspace(tmp_path)


def test_cases_of_another_plan_are_shared_and_survive_it(place, capsys):
    plan_and_preprocess(place, "7", PlanOptions(configurations=ONLY))
    made = plan_and_preprocess(place, "7", ASKED)
    said = capsys.readouterr().out
    assert "4 prepared cases shared with" in said
    assert made.network == "resenc(stages=3)"
    first, second = (place.cases(NAME, plan, "3d_fullres") for plan in ("default", "resenc"))
    for case in list_cases(first):
        assert (first / case / "image.b2nd").stat().st_ino == (second / case / "image.b2nd").stat().st_ino
    whole = load_case(first, "p0_0").image
    # The other plan is prepared anew, and then gone: what was shared stays as it was.
    plan_and_preprocess(place, "7", PlanOptions(configurations=ONLY, request=Request(spacing_mm=(2.0, 2.0, 2.0))))
    assert load_case(first, "p0_0").image.shape != whole.shape
    np.testing.assert_array_equal(load_case(second, "p0_0").image, whole)
    capsys.readouterr()
    # The plan keeps its network, and nothing is made twice.
    again = plan_and_preprocess(place, "7", replace(ASKED, request=replace(REQUEST, network=None)))
    assert again == made
    assert "4 of 4 cases are prepared already" in capsys.readouterr().out


def test_a_case_that_was_being_shared_when_killed_is_shared_again(place):
    plan_and_preprocess(place, "7", PlanOptions(configurations=ONLY))
    first, second = (place.cases(NAME, plan, "3d_fullres") for plan in ("default", "resenc"))
    second.mkdir(parents=True)
    (second / ".p0_0.new").mkdir()
    (second / ".p0_0.new" / "image.b2nd").write_bytes(b"torn")
    plan_and_preprocess(place, "7", ASKED)
    assert list_cases(second) == list_cases(first)
    assert not [*second.glob(".*")]


def test_without_hard_links_files_are_copied(place, monkeypatch):
    plan_and_preprocess(place, "7", PlanOptions(configurations=ONLY))
    first = place.cases(NAME, "default", "3d_fullres")

    def refuse(*paths):
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    share_case(first, place.root / "copy", "p0_0", "mine")
    np.testing.assert_array_equal(load_case(place.root / "copy", "p0_0").image, load_case(first, "p0_0").image)


def test_cases_that_are_prepared_otherwise_are_not_shared(place, capsys):
    plan_and_preprocess(place, "7", PlanOptions(configurations=ONLY, request=Request(spacing_mm=(2.0, 2.0, 2.0))))
    plan_and_preprocess(place, "7", ASKED)
    assert "shared" not in capsys.readouterr().out


def test_train_resume_predict_and_export_follow_the_network_of_the_plan(place, tmp_path):
    plan_and_preprocess(place, "7", ASKED)
    options = TrainOptions(plan="resenc", run="second", epochs=1, device="cpu", changes=QUICK)
    train_fold(place, "7", "3d_fullres", "0", options)
    train_fold(place, "7", "3d_fullres", "0", replace(options, epochs=2))
    run = load_json(Run, place.fold(NAME, "second", "3d_fullres", 0) / "run.json")
    assert run.plan.configuration("3d_fullres").network.name == "resenc"
    write_balls(tmp_path / "new", "seen", 9)
    write_balls(tmp_path / "new", "unseen", 10)
    chosen = PredictOptions(dataset="7", configuration="3d_fullres", run="second", folds=("0",), device="cpu")
    assert len(predict(place, tmp_path / "new" / "imagesTr", tmp_path / "out", chosen)) == 2
    export_model(place, tmp_path / "one.autoseg", chosen, "", "")
    alone = PredictOptions(model=tmp_path / "one.autoseg", device="cpu")
    predict(place, tmp_path / "new" / "imagesTr", tmp_path / "again", alone)
    for name in ("seen.nii.gz", "unseen.nii.gz"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_network_of_ones_own_is_planned_by_its_own_bytes(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", Own)
    made = plan_and_preprocess(
        place, "7", PlanOptions(name="net", request=Request(network="mine:net"), configurations=ONLY)
    )
    assert {c.network.name for c in made.configurations} == {"mine:net"}
    assert load_json(Plan, place.plan_folder(NAME, "net") / "plan.json") == made


def test_an_unknown_network_or_option_is_refused_before_anything_is_written(place):
    with pytest.raises(AutosegError, match="no option 'depth'; it has stages"):
        plan_and_preprocess(place, "7", replace(ASKED, request=replace(REQUEST, network="resenc(depth=3)")))
    assert not place.prepared(NAME).exists()


@pytest.mark.parametrize(
    ("plan", "network", "name"),
    [(None, None, "default"), ("mine", "unet", "mine"), (None, "resenc(stages=3)", "resenc"), (None, "a.b:Net", "Net")],
)
def test_a_plan_is_called_as_its_network_unless_told_otherwise(plan, network, name):
    assert plan_name(plan, network) == name


def test_networks_are_listed_and_described(tmp_path):
    listed = CliRunner().invoke(app, ["networks", "--patch", "64x64"])
    assert listed.exit_code == 0
    assert "20,618,955" in listed.output or "unet" in listed.output
    done = CliRunner().invoke(
        app, ["describe", "unet(stages=5)", "resenc(stages=3)", "--compare", "--patch", "64x96", "-o", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    assert {path.name for path in Path(tmp_path).iterdir()} == {
        *(f"{name}_2d.{ending}" for name in ("unet", "resenc") for ending in ("txt", "csv", "svg")),
        "parameters.png",
    }


def test_a_plan_is_not_silently_made_for_another_member_of_the_family(place):
    plan_and_preprocess(place, "7", ASKED)
    other = replace(REQUEST, network="resenc(stages=2)")
    with pytest.raises(AutosegError, match=r"is for resenc.stages=3., and .* --plan NAME"):
        plan_and_preprocess(place, "7", replace(ASKED, request=other))
    other = replace(other, changes=other.changes | {"configurations.3d_fullres.network.features": "[4, 6]"})
    made = plan_and_preprocess(place, "7", replace(ASKED, request=other, discard_edits=True))
    assert made.network == "resenc(stages=2)"


@pytest.mark.parametrize(
    "text", ["unet_vanilla(norm=foo)", "unet3d(stages=1)", "unet3d(width=0)", "mednext(expansion=3)"]
)
def test_options_that_cannot_be_are_refused_before_anything_is_planned(text):
    with pytest.raises(AutosegError) as refused:
        spec_of(text, 3)
    assert str(refused.value).startswith(text)
