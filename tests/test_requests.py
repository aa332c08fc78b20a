"""What a plan was asked for by options holds for later plans of that name, in both verbs that plan, and is said."""

import json
import shlex
from dataclasses import replace

import pytest
from test_pipeline import NAME
from toys import balls_dataset, plan
from typer.testing import CliRunner

from autoseg.cli import app
from autoseg.crops import CropTo, Margins
from autoseg.pipeline.data import plan_and_preprocess
from autoseg.pipeline.planning import PlanOptions
from autoseg.planners import asks, difference, joined, kept, refuse_other_network, request_of, words
from autoseg.records import AutosegError, load_json, save_json
from autoseg.schema import Plan, Request
from autoseg.workspace import Workspace

CROPS = (CropTo(kind="crop_to", size=(0, 20, 24)), Margins(kind="margins", low=(0, 1, 0), high=(0, 0, 2)))
ALL = Request(
    preset="resenc_m",
    gpu_memory_gb=6.5,
    spacing_mm=(3.0, 1.0, 0.5),
    context=5,
    crops=CROPS,
    combine="rss",
    thin=(1, 1, 2),
    merge={"both": ("big", "300")},
    changes={"configurations.2d.batch_size": "3", "preparation.function": '"mine:doubled"'},
)
FLAT = PlanOptions(configurations=("2d",))


def test_a_request_is_said_as_it_is_typed(tmp_path, monkeypatch):
    assert words(Request()) == ""
    assert words(Request(network="resenc(stages=3)", context=1)) == "--network 'resenc(stages=3)' --context 1"
    assert words(replace(ALL, crops=(), changes={})) == (
        "--preset resenc_m --gpu-memory 6.5 --spacing 3,1,0.5 --context 5 --combine rss "
        "--thin 1,1,2 --merge both=big,300"
    )
    given = []
    monkeypatch.setattr("autoseg.pipeline.data.plan_and_preprocess", lambda *line: given.append(line[-1].request))
    for request in (ALL, Request(like=str(tmp_path / "a model.autoseg"))):
        line = ["plan_and_preprocess", "-d", "7", *shlex.split(words(request)), "--workspace", str(tmp_path)]
        CliRunner().invoke(app, line, catch_exceptions=False)
        assert given.pop() == request


def test_what_is_asked_for_now_changes_that_alone():
    before = replace(plan(), request=ALL)
    assert kept(before, Request()) == ALL
    now = Request(context=3, crops=CROPS[:1], changes={"configurations.2d.batch_size": "7"})
    left = kept(before, now)
    assert asks(left).keys() == {"preset", "gpu_memory_gb", "spacing_mm", "combine", "thin", "merge", "changes"}
    assert left.changes == {"preparation.function": '"mine:doubled"'}
    assert joined(left, now) == replace(
        ALL, context=3, crops=CROPS[:1], changes={**ALL.changes, "configurations.2d.batch_size": "7"}
    )
    assert kept(before, ALL) == Request()


def test_a_plan_that_does_not_say_what_it_was_asked_for_keeps_its_network():
    older = replace(plan(), network="vnet")
    assert kept(older, Request()) == Request(network="vnet")
    assert kept(older, Request(preset="unet")) == Request(), "a preset has a network of its own"
    assert request_of(replace(older, request=ALL)) == ALL


def test_a_preset_for_the_plan_of_another_network_is_refused():
    before = replace(plan(), network="resenc(stages=3)")
    for now in (Request(), Request(network="resenc(stages=3)", preset="resenc_l"), Request(context=3)):
        refuse_other_network(before, now)
    refuse_other_network(plan(), Request(preset="resenc_l"))
    with pytest.raises(AutosegError, match=r"--preset resenc_l asks for .* own; add --network 'resenc.stages=3"):
        refuse_other_network(before, Request(preset="resenc_l"))
    with pytest.raises(AutosegError, match=r"for resenc.stages=3., and vnet was asked for; give the new plan a name"):
        refuse_other_network(before, Request(network="vnet", preset="resenc_l"))


def test_what_a_plan_was_asked_for_makes_no_run_another():
    asked = replace(plan(), request=ALL)
    assert asked.concerning() == plan().concerning()
    assert difference(asked, plan()) == []


@pytest.fixture
def place(tmp_path):
    balls_dataset(tmp_path / "raw" / NAME)
    return Workspace(tmp_path)


def test_the_same_verb_again_without_options_plans_the_same(place, capsys):
    asked = Request(
        crops=CROPS,
        context=3,
        gpu_memory_gb=4.0,
        spacing_mm=(2.0, 1.5, 1.5),
        changes={"configurations.2d.batch_size": "3"},
    )
    first = plan_and_preprocess(place, "7", replace(FLAT, request=asked))
    assert "As asked for before" not in capsys.readouterr().out
    path = place.plan_folder(NAME, "default") / "plan.json"
    assert load_json(Plan, path) == first
    said = (
        "--gpu-memory 4 --spacing 2,1.5,1.5 --context 3 --crop 'crop_to(size=[0, 20, 24])' "
        "--crop 'margins(low=[0, 1, 0], high=[0, 0, 2])' --set configurations.2d.batch_size=3"
    )
    # Again, as fit does it, and after an edit was discarded.
    for again in (FLAT, replace(FLAT, keep=True), replace(FLAT, discard_edits=True)):
        assert plan_and_preprocess(place, "7", again) == first
        out = capsys.readouterr().out
        assert f"As asked for before: {said} (an option given again changes it" in out and f"delete {path})" in out
    # Other data: planned anew, as asked.
    card = place.raw(NAME) / "dataset.json"
    card.write_text(card.read_text().replace("big", "huge"))
    renamed = plan_and_preprocess(place, "7", replace(FLAT, keep=True))
    assert renamed.labels.names == ("background", "huge", "small")
    assert renamed.request == first.request and renamed.preparation == first.preparation
    assert renamed.configuration("2d") == first.configuration("2d")
    # One option changes one thing.
    single = plan_and_preprocess(place, "7", replace(FLAT, keep=True, request=Request(context=1)))
    assert single.request == replace(first.request, context=1)
    assert single.configuration("2d") == replace(first.configuration("2d"), context=1)
    path.unlink()
    fresh = plan_and_preprocess(place, "7", FLAT)
    assert fresh.request == Request() and not fresh.preparation.crops


def test_edits_by_hand_are_later_than_what_was_set_before_and_earlier_than_what_is_set_now(place):
    def sized(batch):
        return replace(FLAT, request=Request(changes={"configurations.2d.batch_size": str(batch)}))

    plan_and_preprocess(place, "7", sized(3))
    path = place.plan_folder(NAME, "default") / "plan.json"
    content = json.loads(path.read_text())
    content["configurations"][0]["batch_size"] = 5
    path.write_text(json.dumps(content))
    assert plan_and_preprocess(place, "7", FLAT).configuration("2d").batch_size == 5
    assert plan_and_preprocess(place, "7", replace(FLAT, discard_edits=True)).configuration("2d").batch_size == 3
    assert plan_and_preprocess(place, "7", sized(4)).configuration("2d").batch_size == 4


def test_what_cannot_be_asked_for_together_is_refused_before_a_case_is_read(place):
    made = replace(plan(), request=Request(spacing_mm=(3.0, 1.0, 0.5)))
    save_json(made, place.plan_folder(NAME, "default") / "plan.json")
    for case in (place.raw(NAME) / "imagesTr").iterdir():
        case.write_bytes(b"")
    with pytest.raises(AutosegError, match=r"--like takes over .* leave out --spacing, or make a plan of another name"):
        plan_and_preprocess(place, "7", replace(FLAT, request=Request(like=str(place.root / "m.autoseg"))))


def test_a_field_that_was_set_and_is_no_more_is_named_with_the_cure(place):
    made = plan_and_preprocess(place, "7", FLAT)
    path = place.plan_folder(NAME, "default") / "plan.json"
    save_json(replace(made, request=Request(changes={"configurations.3d_lowres.batch_size": "2"})), path)
    with pytest.raises(AutosegError, match=r"as before; to forget it, delete plan.json.*no '3d_lowres'"):
        plan_and_preprocess(place, "7", FLAT)


def test_the_memory_of_a_preset_counts_for_a_network_too(place):
    asked = replace(FLAT, request=Request(network="resenc(stages=2)", preset="resenc_l"), name="mine")
    assert plan_and_preprocess(place, "7", asked).gpu_memory_gb == 24.0
