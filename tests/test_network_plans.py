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
        *(f"{name}_2d.{ending}" for name in ("unet_stages_5", "resenc_stages_3") for ending in ("txt", "csv", "svg")),
        "parameters.png",
    }
    assert (tmp_path / "unet_stages_5_2d.txt").read_text().startswith("unet(stages=5), 2D: ")


def test_one_network_is_listed_with_its_options_and_timed():
    listed = CliRunner().invoke(app, ["networks", "unet(stages=2)", "vnet(width=2)", "--patch", "8x12x16", "--time"])
    assert listed.exit_code == 0, listed.output
    rows = [line for line in listed.output.splitlines() if line.startswith(("unet", "vnet"))]
    assert [row.split()[0] for row in rows] == ["unet(stages=2)", "vnet(width=2)"]
    assert " yes " in rows[0] and " no " in rows[1] and "8 x 12 x 16" in rows[0]
    for command, reason in {
        ("networks", "mine:Net"): "a network of your own",
        ("networks", "slice_vnet", "--patch", "8x12x16"): "is for none of these",
        ("networks", "unett"): "unknown network",
    }.items():
        assert reason in str(CliRunner().invoke(app, [*command]).exception)


def test_a_plan_is_not_silently_made_for_another_member_of_the_family(place):
    plan_and_preprocess(place, "7", ASKED)
    other = replace(REQUEST, network="resenc(stages=2)")
    with pytest.raises(AutosegError, match=r"is for resenc.stages=3., and .* --plan NAME"):
        plan_and_preprocess(place, "7", replace(ASKED, request=other))
    other = replace(other, changes=other.changes | {"configurations.3d_fullres.network.features": "[4, 6]"})
    made = plan_and_preprocess(place, "7", replace(ASKED, request=other, discard_edits=True))
    assert made.network == "resenc(stages=2)"


@pytest.mark.parametrize(
    "text", ["unet_vanilla(norm=foo)", "unet3d(stages=1)", "unet3d(width=0)", "mednext(expansion=[2, 3])"]
)
def test_options_that_cannot_be_are_refused_before_anything_is_planned(text):
    with pytest.raises(AutosegError) as refused:
        spec_of(text, 3)
    assert str(refused.value).startswith(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mednext(width=abc)", "the network mednext: width must be a valid integer, not 'abc'"),
        ("unet_vanilla(stages=1.5)", "the network unet_vanilla: stages must be a valid integer, not 1.5"),
        ("relative_unet3d(position=3)", "the network relative_unet3d: position must be a valid string, not 3"),
        ("deeplabv3plus(backbone=vgg)", "backbone"),
    ],
)
def test_values_of_another_kind_are_refused_in_plain_words(text, said):
    with pytest.raises(AutosegError) as refused:
        spec_of(text, 3)
    assert said in str(refused.value) and "pydantic" not in str(refused.value)


def test_a_number_alone_stands_for_a_list_of_one():
    assert spec_of("mednext(expansion=3)", 3) == spec_of("mednext(expansion=[3])", 3)


MISTAKES = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, spec, in_channels, heads, extra=0):
        super().__init__()
        convolution = nn.Conv2d if spec.dimension == 2 else nn.Conv3d
        self.out = convolution(in_channels, heads + extra, 1)

    def forward(self, x, all_scales=False):
        return [self.out(x)]

class Flat(Net):
    dimensions = (2,)

    def __init__(self, spec, in_channels, heads):
        nn.Module.__init__(self)
        self.out = nn.Conv2d(in_channels, heads, 1)

class Wider(Net):
    def __init__(self, spec, in_channels, heads):
        super().__init__(spec, in_channels, heads, extra=1)

class Alone(Net):
    def forward(self, x, all_scales=False):
        return self.out(x)

class Named(Net):
    def forward(self, x, all_scales=False):
        return {"logits": self.out(x)}

class Crashes(Net):
    def forward(self, x, all_scales=False):
        return [self.absent(x)]

class Unbuilt(Net):
    def __init__(self, spec, in_channels, heads):
        self.width = spec.absent
"""


def test_mistakes_of_a_network_of_ones_own_are_told_when_it_is_planned(place, tmp_path, monkeypatch):
    (tmp_path / "networks_of_a_user.py").write_text(MISTAKES)
    monkeypatch.syspath_prepend(tmp_path)

    def planned(name):
        request = Request(network=f"networks_of_a_user:{name}")
        return plan_and_preprocess(place, "7", PlanOptions(name=name, request=request, configurations=ONLY))

    for name, said in {
        "Wider": r"Wider gives logits of shape \(2, 4, .* must have 3 channels, one a class",
        "Named": r"Named must give a list of tensors, not \{'logits'",
        "Crashes": r"Crashes failed on images of shape .*: AttributeError: 'Crashes' object has no attribute 'absent'",
        "Unbuilt": r"Unbuilt cannot be built of \(spec, 1 channels, 3 heads\): AttributeError",
        "Absent": "no class or function 'Absent'",
    }.items():
        with pytest.raises(AutosegError, match=said):
            planned(name)
        assert not place.plan_folder(NAME, name).exists()
    patch = planned("Net").configuration("3d_fullres").patch
    only_2d = PlanOptions(name="Flat", request=Request(network="networks_of_a_user:Flat"))
    assert [one.name for one in plan_and_preprocess(place, "7", only_2d).configurations] == ["2d"]
    assert planned("Alone").configuration("3d_fullres").patch == patch, "a tensor alone is a list of one"
