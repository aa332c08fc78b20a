"""What was edited in a plan by hand outlives a new plan, and is always said; plans are shown and compared."""

import json
from dataclasses import replace

import pytest
from test_pipeline import NAME
from test_planners import fingerprint, labels
from toys import balls_dataset, configuration, plan
from typer.testing import CliRunner

from autoseg.cli import app
from autoseg.pipeline.data import plan_and_preprocess
from autoseg.pipeline.planning import PlanOptions, make_plan
from autoseg.planners import added, difference, edited, explain, keep_edits, stamped
from autoseg.records import AutosegError, load_json, save_json
from autoseg.schema import ChannelStats, Plan, Request
from autoseg.settings import change, in_json
from autoseg.workspace import Workspace

RUNNER = CliRunner()


def planned(*configurations, **more):
    made = plan(*configurations, **more)
    return stamped(made, made)


FULL, FLAT = configuration(), configuration("2d", (1.0, 0.5), (6, 8))


def with_batch(made, name, batch_size):
    return replace(
        made,
        configurations=tuple(replace(c, batch_size=batch_size) if c.name == name else c for c in made.configurations),
    )


def test_a_plan_as_it_was_made_has_no_edits():
    made = planned(FULL, FLAT)
    assert edited(made) == added(made) == set()
    assert keep_edits(made, plan(FULL, FLAT))[1] == {}
    assert edited(plan(FULL)) == set(), "an older plan without hashes"
    assert added(plan(FULL, configuration("mine"))) == {"mine"}


def test_an_edited_configuration_is_kept_again_and_again():
    edit = with_batch(planned(FULL, FLAT), "3d_fullres", 5)
    assert edited(edit) == {"3d_fullres"}
    fresh = plan(FULL, replace(FLAT, batch_size=9))
    for _ in range(2):
        merged, kept = keep_edits(edit, fresh)
        assert kept == {"3d_fullres": "3d_fullres: kept as edited: batch_size 5 (planned: 2)"}
        assert [c.batch_size for c in merged.configurations] == [5, 9]
        edit = stamped(merged, fresh, kept)
        assert edited(edit) == {"3d_fullres"}


def test_what_set_changes_is_planned_and_no_edit():
    fresh = plan(FULL, FLAT)
    assert edited(stamped(with_batch(fresh, "2d", 7), fresh)) == set()
    edit = with_batch(planned(FULL, FLAT), "3d_fullres", 5)
    merged, kept = keep_edits(edit, fresh)
    assert edited(stamped(with_batch(merged, "3d_fullres", 6), fresh, kept)) == {"3d_fullres"}


def test_an_added_configuration_stays_with_what_it_reads_from():
    low = configuration("3d_lowres")
    mine = replace(configuration("mine"), prepared="3d_fullres", previous_stage="3d_lowres")
    old = planned(FULL, low)
    old = replace(old, configurations=(*old.configurations, mine))
    merged, kept = keep_edits(old, plan(FULL))
    assert [c.name for c in merged.configurations] == ["3d_fullres", "mine", "3d_lowres"]
    assert kept["mine"] == "mine: kept, added by hand"
    assert "would not make it any more" in kept["3d_lowres"]
    unused, kept = keep_edits(planned(FULL, low), plan(FULL))
    assert [c.name for c in unused.configurations] == ["3d_fullres"] and not kept


def test_an_edited_normalisation_keeps_its_scheme():
    made = planned(FULL)
    edit = replace(made, channels=(replace(made.channels[0], scheme="rescale"),))
    fresh = plan(FULL, masked=True)
    merged, kept = keep_edits(edit, fresh)
    assert merged.channels[0].scheme == "rescale" and not merged.channels[0].masked
    assert kept == {"channels": "normalisation: kept as edited: MR rescale"}
    assert edited(stamped(merged, fresh, kept)) == {"channels"}


def test_edits_for_other_axes_are_refused():
    edit = with_batch(planned(FULL), "3d_fullres", 5)
    with pytest.raises(AutosegError, match="--discard-edits"):
        keep_edits(edit, plan(FULL, axis_order=(2, 0, 1)))
    keep_edits(planned(FULL), plan(FULL, axis_order=(2, 0, 1)))


def test_edits_that_a_new_plan_cannot_keep_are_not_lost_in_silence():
    made = planned(FULL)
    turned = replace(made, axis_order=(2, 0, 1))
    assert edited(turned) == {"plan"}
    with pytest.raises(AutosegError, match=r"differs in: axis_order\); give the change as --set"):
        keep_edits(turned, plan(FULL))
    stats = ChannelStats(mean=1.0, median=1.0, std=2.0, percentile_00_5=0.0, percentile_99_5=3.0, minimum=0, maximum=4)
    other = replace(made, channels=(replace(made.channels[0], stats=stats),))
    assert edited(other) == {"plan"}, "statistics edited by hand"
    assert edited(replace(made, reasons=(), name="other")) == set()


def test_differences_name_each_field_once():
    first = plan(FULL, FLAT, channels=("MR",))
    assert difference(first, first) == []
    assert difference(first, replace(first, name="other", reasons=())) == []
    second = replace(with_batch(first, "2d", 3), preset="resenc_l", configurations=(FULL, configuration("mine")))
    assert difference(first, second) == [
        ("preset", "'unet'", "'resenc_l'"),
        ("configurations.2d", "there", "-"),
        ("configurations.mine", "-", "there"),
    ]
    third = with_batch(first, "2d", 3)
    assert difference(first, third) == [("2d.batch_size", "2", "3")]
    assert difference(first, plan(FULL, FLAT, scheme="ct")) == [("MR.scheme", "'zscore'", "'ct'")]


def reasons_of(made):
    return {reason.decision: reason for reason in made.reasons}


def test_reasons_say_what_was_asked_for_and_what_the_rule_gives():
    facts, classes = fingerprint((20, (36, 50, 35), (1, 1, 1))), labels(3)
    ruled, _ = make_plan(facts, classes, PlanOptions(), Request(), {}, None)
    asked = {
        "configurations.3d_fullres.patch": [7, 8, 9],
        "configurations.3d_fullres.network.features": [4, 8, 12],
        "configurations.3d_fullres.batch_dice": True,
        "configurations.0.resampling.image_order": 1,
        "channels.0.scheme": "rescale",
        "mirroring.forbidden": [0],
    }
    request = Request(changes=in_json(asked))
    made, _ = make_plan(facts, classes, PlanOptions(request=request), request, {}, None)
    said, given = reasons_of(made), reasons_of(ruled)
    assert {decision for decision in said if said[decision] != given.get(decision)} == {
        *("3d_fullres: patch", "3d_fullres: network", "batch Dice", "normalisation of T1"),
        *("2d: resampling", "left and right"),
    }
    patch = said["3d_fullres: patch"]
    assert patch.outcome == f"(7, 8, 9), as asked for; the rule gives {given['3d_fullres: patch'].outcome}"
    assert patch.rule.endswith(f"without it: {given['3d_fullres: patch'].rule}")
    assert said["3d_fullres: network"].outcome.startswith("features (4, 8, 12), as asked for; the rule gives ")
    assert said["batch Dice"].outcome.startswith("3d_fullres batch_dice True, as asked for; the rule gives pooled in")
    assert said["2d: resampling"].outcome == "image_order 1, as asked for; the rule gives image_order 3"
    assert said["normalisation of T1"].outcome == "scheme 'rescale', as asked for; the rule gives zscore"
    # Made again without options, and edited by hand since.
    again, _ = make_plan(facts, classes, PlanOptions(), request, request.changes, made)
    assert again == made
    mine = with_batch(made, "2d", 3)
    edit, _ = make_plan(facts, classes, PlanOptions(), request, request.changes, mine)
    batch = given["2d: batch size"].outcome
    assert reasons_of(edit)["2d: batch size"].outcome == f"3, as asked for; the rule gives {batch}"
    assert reasons_of(edit)["3d_fullres: patch"] == patch
    note = "By hand: 2d; where a reason below says otherwise, plan.json holds"
    assert note in explain(mine) and note not in explain(made)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("batch_size", 0, "greater than 0"),
        ("patch", [0, 6, 8], "greater than 0"),
        ("patch", [6, 8], "the patch of 3d_fullres has 3 edges, found 2"),
    ],
)
def test_a_plan_without_a_patch_or_a_batch_is_refused_by_option_and_in_a_file(tmp_path, field, value, said):
    with pytest.raises(AutosegError, match=said):
        change(plan(), {f"configurations.3d_fullres.{field}": value})
    path = tmp_path / "plan.json"
    save_json(plan(), path)
    content = json.loads(path.read_text())
    content["configurations"][0][field] = value
    path.write_text(json.dumps(content))
    with pytest.raises(AutosegError, match=rf"(?s)configurations\.0.*{said}"):
        load_json(Plan, path)


def test_edits_in_the_file_survive_planning_and_are_shown(tmp_path, capsys):
    balls_dataset(tmp_path / "raw" / NAME)
    place = Workspace(tmp_path)
    only = PlanOptions(configurations=("2d",))
    plan_and_preprocess(place, "7", only)
    path = place.plan_folder(NAME, "default") / "plan.json"
    first = load_json(Plan, path)
    content = json.loads(path.read_text())
    content["configurations"][0]["batch_size"] = 4
    content["configurations"].append({**content["configurations"][1], "name": "small", "patch": [8, 8, 8]})
    path.write_text(json.dumps(content))
    by_hand = load_json(Plan, path)
    capsys.readouterr()
    plan_and_preprocess(
        place, "7", replace(only, request=Request(spacing_mm=(2.0, 1.5, 1.5)), configurations=("2d", "small"))
    )
    said = capsys.readouterr().out
    assert "2d: kept as edited: spacing_mm" in said and "small: kept, added by hand; --discard-edits" in said
    made = load_json(Plan, path)
    assert made.configuration("2d") == by_hand.configuration("2d")
    assert made.configuration("small") == by_hand.configuration("small")
    assert made.configuration("3d_fullres").spacing_mm == (2.0, 1.5, 1.5)
    assert "  (edited)" in explain(made) and "  (added)" in explain(made)

    line = ["plan", "-d", "7", "--workspace", str(tmp_path)]
    shown = RUNNER.invoke(app, line, catch_exceptions=False).output
    assert "edited by hand" in shown and "added by hand" in shown
    planned_anew = plan_and_preprocess(place, "7", replace(only, discard_edits=True))
    assert edited(planned_anew) == added(planned_anew) == set()
    assert planned_anew.configuration("3d_fullres") == made.configuration("3d_fullres"), "what was asked for holds"
    path.unlink()
    assert plan_and_preprocess(place, "7", only) == first
    plan_and_preprocess(place, "7", replace(only, name="big", request=Request(gpu_memory_gb=2.5)))
    compared = RUNNER.invoke(app, [*line, "--diff", "default", "big"], catch_exceptions=False).output
    assert compared.splitlines()[0].split() == ["field", "default", "big"]
    assert "gpu_memory_gb  8.0      2.5" in compared
    alone = RUNNER.invoke(app, [*line, "--plan", "big"], catch_exceptions=False).output
    assert "default" not in alone and "big" in alone
    assert "rule:" in RUNNER.invoke(app, [*line, "--explain"], catch_exceptions=False).output
    with pytest.raises(AutosegError, match="there are big, default"):
        RUNNER.invoke(app, [*line, "--diff", "default", "none"], catch_exceptions=False)


def test_a_plan_that_was_broken_by_hand_is_not_overwritten(tmp_path):
    balls_dataset(tmp_path / "raw" / NAME)
    place = Workspace(tmp_path)
    made = plan_and_preprocess(place, "7", PlanOptions(configurations=("2d",)))
    path = place.plan_folder(NAME, "default") / "plan.json"
    path.write_text(path.read_text().replace('"batch_size": 2', '"batch_size": "two"'))
    before = path.read_text()
    with pytest.raises(AutosegError, match=r"configurations\.0\.batch_size"):
        plan_and_preprocess(place, "7", PlanOptions(configurations=("2d",)))
    assert path.read_text() == before
    assert plan_and_preprocess(place, "7", PlanOptions(configurations=("2d",), discard_edits=True)) == made


def test_a_run_minds_only_what_its_configuration_reads():
    low = configuration("3d_lowres")
    cascade = replace(configuration("3d_cascade_fullres"), prepared="3d_fullres", previous_stage="3d_lowres")
    made = planned(FLAT, FULL, low, cascade)
    more = replace(made, configurations=(*made.configurations, configuration("mine")))
    for name in ("2d", "3d_fullres", "3d_cascade_fullres"):
        assert more.concerning(name) == made.concerning(name)
    other = with_batch(made, "3d_lowres", 9)
    assert other.concerning("3d_fullres") == made.concerning("3d_fullres")
    assert other.concerning("3d_cascade_fullres") != made.concerning("3d_cascade_fullres")
    assert replace(made, gpu_memory_gb=9.0).concerning("2d") != made.concerning("2d")


def test_no_plan_yet_says_what_to_run(tmp_path):
    balls_dataset(tmp_path / "raw" / NAME)
    with pytest.raises(AutosegError, match="no plan yet; run: autoseg plan_and_preprocess -d 7"):
        RUNNER.invoke(app, ["plan", "-d", "7", "--workspace", str(tmp_path)], catch_exceptions=False)
    save_json(plan(FULL), tmp_path / "prepared" / NAME / "old" / "plan.json")
    assert "3d_fullres" in RUNNER.invoke(app, ["plan", "-d", "7", "--workspace", str(tmp_path)]).output
