"""Models of nnU-Net: predictions equal those that it made itself, and what is not a model of it is refused, unrun."""

import json
import os
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nnunet_toys import (
    CASCADE,
    DATA,
    FULLRES,
    IMAGE,
    LOWRES,
    REGIONS,
    RESIDUAL,
    agreement,
    altered,
    altered_checkpoint,
    model_in,
    unpacked,
    zipped,
)
from typer.testing import CliRunner

import autoseg
from autoseg.bundle import read
from autoseg.cli import app
from autoseg.interop.nnunet import choose, open_nnunet
from autoseg.interop.nnunet_weights import read_checkpoint
from autoseg.pipeline.predict import PredictOptions, predict
from autoseg.postprocess import Step, apply_steps
from autoseg.readers import read_stored
from autoseg.records import AutosegError
from autoseg.workspace import Workspace

RECORDED = [
    (CASCADE, "3d_lowres", "0", False),
    (CASCADE, "3d_lowres", "01", True),
    (CASCADE, "3d_cascade_fullres", "0", False),
    (CASCADE, "3d_cascade_fullres", "01", True),
    (RESIDUAL, "2d", "0", False),
    (RESIDUAL, "2d", "0", True),
    (REGIONS, "3d_fullres", "0", False),
    (REGIONS, "3d_fullres", "0", True),
]


def recorded(toy, configuration, folds, mirror) -> np.ndarray:
    """What nnU-Net predicted."""
    return read_stored(DATA / f"{toy.stem}_{configuration}_f{folds}_m{int(mirror)}.nii.gz").array[0]


def refused(source, *arguments) -> str:
    """The words with which an import is refused."""
    with pytest.raises(AutosegError) as error:
        open_nnunet(source, *arguments)
    return str(error.value)


@pytest.fixture
def results(tmp_path):
    return unpacked(REGIONS, tmp_path / "nnUNet_results")


@pytest.fixture
def model(results):
    return model_in(results)


# Agreement


def test_every_recorded_prediction_is_asked_for():
    names = {f"{toy.stem}_{name}_f{folds}_m{int(mirror)}.nii.gz" for toy, name, folds, mirror in RECORDED}
    assert names == {path.name for path in DATA.glob("Dataset*.nii.gz")}


@pytest.mark.parametrize(
    ("toy", "configuration", "folds", "mirror"), RECORDED, ids=lambda value: getattr(value, "stem", str(value))
)
def test_an_imported_model_predicts_what_nnunet_predicts(tmp_path, toy, configuration, folds, mirror):
    open_nnunet(toy, configuration, tuple(folds)).write(tmp_path / "m.autoseg")
    loaded = autoseg.load(tmp_path / "m.autoseg", device="cpu")
    found = loaded.predict(IMAGE, mirror=mirror, postprocess=False).labels
    expected = recorded(toy, configuration, folds, mirror)
    equal, dice = agreement(found, expected)
    assert equal >= 0.9995 and min(dice.values()) >= 0.999, (equal, dice)
    assert set(np.unique(found)) == set(np.unique(expected))


def test_the_command_makes_a_file_that_predicts(tmp_path):
    """All folds are the default, and the post-processing that nnU-Net has chosen for them is applied."""
    target = tmp_path / "model.autoseg"
    done = CliRunner().invoke(app, ["import-nnunet", str(RESIDUAL), "-o", str(target)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "2d: fold 0, trained by nnUNetTrainer" in done.output
    assert "keep the largest component of core, shell" in done.output
    for path in IMAGE:
        (tmp_path / "in").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "in" / path.name)
    predict(Workspace(tmp_path), tmp_path / "in", tmp_path / "out", PredictOptions(model=target, device="cpu"))
    merged = recorded(RESIDUAL, "2d", "0", True).astype(np.int16)
    expected = apply_steps(merged, [Step(members=(1, 2))], (1.0, 1.0, 1.0))
    assert agreement(read_stored(tmp_path / "out" / "toy.nii.gz").array[0], expected)[0] >= 0.9995
    assert CliRunner().invoke(app, ["info", str(target)]).exit_code == 0


def test_a_folder_and_its_zip_make_the_same_model(tmp_path, results, model):
    zip_of_one = zipped(model, tmp_path / "root.zip")
    first = open_nnunet(REGIONS)
    for source in (results, model, results.parent, zip_of_one):
        other = open_nnunet(source)
        assert other.weights == first.weights
        assert other.content.plan == first.content.plan
    assert open_nnunet(model, "3d_fullres").weights == open_nnunet(model, model.name).weights == first.weights


def test_a_cascade_brings_its_first_stage_along(tmp_path):
    results = unpacked(CASCADE, tmp_path)
    found = open_nnunet(results / FULLRES, None, ("1",))
    assert [stage.configuration for stage in found.content.stages] == ["3d_lowres", "3d_cascade_fullres"]
    # Of the first stage all folds predict, whichever were chosen of the second.
    assert [stage.folds for stage in found.content.stages] == [(0, 1), (1,)]
    first, second = found.content.plan.configurations
    assert (first.prior, first.previous_stage) == ("logits", None)
    assert (second.prior, second.previous_stage) == ("labels", "3d_lowres")
    assert found.weights == open_nnunet(CASCADE, "3d_cascade_fullres", ["1"]).weights

    altered(
        results / LOWRES / "plans.json", lambda plans: plans["configurations"]["3d_lowres"].update(spacing=[4, 2, 2])
    )
    assert "another plan of 3d_lowres" in refused(results / FULLRES)
    shutil.rmtree(results / LOWRES)
    assert f"put the trained folder {LOWRES} beside it" in refused(results)


def test_scores_and_post_processing_are_those_of_these_folds(tmp_path):
    card = open_nnunet(CASCADE, "3d_lowres").content.stages[-1].card
    assert card.cases == 4 and set(card.folds) == {"fold_0", "fold_1"}
    assert set(card.dice) == {"foreground", "core", "shell"} and 0.5 < card.dice["shell"] <= 1
    summary = json.loads(
        zipfile.ZipFile(CASCADE).read(f"Dataset001_Cascade/{LOWRES}/crossval_results_folds_0_1/postprocessing.json")
    )
    # The dataset lists shell, which is 2, before core, which is 1.
    assert card.dice["core"] == summary["input_folder"]["mean"]["1"]["Dice"]
    assert card.dice["shell"] == summary["input_folder"]["mean"]["2"]["Dice"]
    assert card.dice_postprocessed["foreground"] == summary["postprocessed"]["foreground_mean"]["Dice"]
    assert open_nnunet(CASCADE, "3d_lowres", ["1", "0"]).content.stages[-1].card.folds == card.folds

    one = open_nnunet(CASCADE, "3d_lowres", ["1"])
    assert one.content.stages[-1].card is None
    assert "belongs to others" in one.notes[-1] and "crossval_results_folds_0_1" in one.notes[-1]

    whole = open_nnunet(REGIONS).content.stages[-1].card
    assert set(whole.dice) == {"foreground", "whole", "core"} and whole.dice["whole"] > 0.9


def test_post_processing_is_read_from_json_alone(results, model):
    folder = model / "crossval_results_folds_0"
    rules = folder / "postprocessing.json"

    def ask(*pairs):
        altered(rules, lambda content: content.update(dict(pairs)))

    function = "remove_all_but_largest_component_from_segmentation"
    ask(
        ("postprocessing_fns", [function] * 2),
        ("postprocessing_kwargs", [{"labels_or_regions": c} for c in ([2, 1], 1)]),
    )
    card = open_nnunet(results).content.stages[-1].card
    assert [step.members for step in card.postprocessing.steps] == [(2, 1), (1,)]
    ask(("postprocessing_kwargs", [{"labels_or_regions": [1, 5]}] * 2))
    assert "speaks of labels [5]" in refused(results)
    ask(("postprocessing_fns", ["os.system"]))
    assert "asks for 'os.system'" in refused(results)
    rules.write_text("{}")
    assert "postprocessing_fns is missing" in refused(results)
    rules.unlink()
    assert "postprocessing.pkl alone" in open_nnunet(results).notes[-1]
    shutil.rmtree(folder)
    assert open_nnunet(results).notes[-1] == "post-processing: none was fitted for these folds"


def test_the_fold_of_all_cases_stands_alone_or_is_asked_for(model):
    shutil.copytree(model / "fold_0", model / "fold_all")
    assert open_nnunet(model).content.stages[0].folds == (0,)
    assert open_nnunet(model, None, ["all"]).content.stages[0].folds == ("all",)
    shutil.rmtree(model / "fold_0")
    assert open_nnunet(model).content.stages[0].folds == ("all",)


def test_the_licence_of_the_data_is_passed_on(results, model):
    altered(model / "dataset.json", lambda content: content.update(licence="CC BY-SA 4.0"))
    assert "dataset.json states the licence 'CC BY-SA 4.0'" in open_nnunet(results).content.note


# What is asked for and not there


def test_what_is_missing_is_named(tmp_path, results, model):
    assert "does not exist" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no model of nnU-Net v2" in refused(tmp_path / "empty")
    assert "has no finished fold 3, 4; it has 0" in refused(results, None, ["0", "3", "4"])
    said = refused(CASCADE)
    assert "holds 2 models; choose one" in said and "-c 3d_lowres " in said and "-c 3d_cascade_fullres " in said
    said = refused(CASCADE, "2d")
    assert "has no model '2d'" in said and "-c 3d_lowres " in said
    assert "has no model '2d'; it has\n  -c 3d_fullres" in refused(model, "2d")
    (model / "fold_0" / "checkpoint_final.pth").rename(model / "fold_0" / "checkpoint_best.pth")
    assert "finish the training with nnU-Net first" in refused(model)
    assert "holds no model" in refused(results)


def test_of_two_trainers_the_folder_is_named(tmp_path):
    places = ["A__P__3d_fullres", "B__P__3d_fullres"]
    with pytest.raises(AutosegError, match=r"2 models of 3d_fullres; choose one:\n  -c A__P__3d_fullres\n  -c B__"):
        choose(tmp_path, places, "3d_fullres")
    assert choose(tmp_path, places, "B__P__3d_fullres") == "B__P__3d_fullres"


def test_folds_of_two_configurations_are_no_model(tmp_path):
    results = unpacked(CASCADE, tmp_path)
    shutil.copytree(results / FULLRES / "fold_0", results / LOWRES / "fold_2")
    assert "several configurations: 3d_cascade_fullres, 3d_lowres" in refused(results, "3d_lowres")


# What is damaged


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("plans.json", "{", "plans.json is no valid JSON"),
        ("dataset.json", "[" * 100_000, "dataset.json is no valid JSON"),
        ("plans.json", "[]", "must hold an object {...}, found list"),
        ("plans.json", "{}", "configurations is missing"),
        ("dataset.json", "{}", "dataset.json has faults"),
        ("plans.json", '{"configurations": {"3d_fullres": 1}}', "no complete model of nnU-Net v2"),
        ("plans.json", '{"configurations": {"3d_fullres": {}}}', "image_reader_writer is missing"),
    ],
)
def test_unsound_descriptions_are_refused(results, model, name, text, expected):
    (model / name).write_text(text)
    assert expected in refused(results)


def test_a_description_that_is_too_large_is_not_read(results, model, monkeypatch):
    monkeypatch.setattr("autoseg.interop.nnunet.MOST_JSON_BYTES", 3000)
    assert "larger than any description" in refused(results)
    assert "unpacks to" in refused(REGIONS)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_checkpoint_cut_or_altered_anywhere_ends_in_words(tmp_path, data):
    path = tmp_path / "checkpoint.pth"
    with zipfile.ZipFile(REGIONS) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".pth"))
        whole = archive.read(name)
    if data.draw(st.booleans()):
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        with pytest.raises(AutosegError):
            read_checkpoint(path)
        return
    changed = bytearray(whole)
    # The description of the tensors comes first, the directory of the zip last.
    for place in data.draw(st.lists(st.one_of(st.integers(0, 20_000), st.integers(len(whole) - 9000, len(whole) - 1)))):
        changed[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(changed)
    try:
        read_checkpoint(path)
    except AutosegError as error:
        assert str(path) in str(error)


def test_a_damaged_zip_is_refused(tmp_path):
    whole = REGIONS.read_bytes()
    broken = tmp_path / "broken.zip"
    broken.write_bytes(whole[:-200])
    assert "is no zip file, or a damaged one" in refused(broken)
    at = whole.index(b"plans.json") + 60
    broken.write_bytes(whole[:at] + bytes(byte ^ 255 for byte in whole[at : at + 400]) + whole[at + 400 :])
    assert "plans.json cannot be unpacked" in refused(broken)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c.pop("network_weights"), "'network_weights' is missing"),
        (lambda c: c.update(init_args=3), "missing or of another kind"),
        (lambda c: c["network_weights"].update(extra="text"), "names or weights are of another kind"),
        (lambda c: c["init_args"].update(configuration=["3d_fullres"]), "names or weights are of another kind"),
        (lambda c: c.update(trainer_name=None), "names or weights are of another kind"),
        (lambda c: c.update(inference_allowed_mirroring_axes=(0, 7)), "names or weights are of another kind"),
        (lambda c: c.update(inference_allowed_mirroring_axes=torch.ones(3)), "missing or of another kind"),
        (lambda c: c["init_args"].update(configuration="3d_lowres"), "has no configuration '3d_lowres'"),
        (lambda c: c["network_weights"].update({"decoder.attention.weight": torch.ones(1)}), "no U-Net of ours"),
        (lambda c: c["network_weights"].pop("decoder.seg_layers.1.bias"), "heads.0.bias is missing"),
        (
            lambda c: c["network_weights"].update({"decoder.seg_layers.1.bias": torch.ones(5)}),
            "heads.0.bias is (5,), by the plan (2,)",
        ),
        (lambda c: c.update(network_weights={}), "fewer than the planned network has blocks"),
    ],
)
def test_unfit_checkpoints_are_refused(results, model, change, expected):
    altered_checkpoint(model / "fold_0" / "checkpoint_final.pth", change)
    assert expected in refused(results)


def test_axes_that_may_be_mirrored_are_those_of_the_checkpoint(results, model):
    path = model / "fold_0" / "checkpoint_final.pth"
    for axes, expected in ((None, ()), ((0, 2), (0, 2))):
        altered_checkpoint(path, lambda c, axes=axes: c.update(inference_allowed_mirroring_axes=axes))
        assert open_nnunet(results).content.configuration.mirror_axes == expected


# What is hostile


class Bait:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("where", ["beside", "inside"])
@pytest.mark.parametrize("form", ["torch", "old torch", "pickle"])
def test_nothing_in_a_checkpoint_is_run(tmp_path, results, model, where, form):
    path, marker = model / "fold_0" / "checkpoint_final.pth", tmp_path / "was_run"
    content = {"network_weights": {}, "init_args": {"configuration": "3d_fullres"}, "trainer_name": "nnUNetTrainer"}
    if where == "beside":
        content["my_init_kwargs"] = Bait(marker)
    else:
        content["network_weights"] = {"decoder.seg_layers.1.bias": Bait(marker)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    said = refused(results)
    assert ("nothing in it was run" if form == "torch" else "cannot be read (File is not a zip file)") in said
    assert not marker.exists()
    # The bait is a real one.
    if form == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert marker.is_dir()


def test_nothing_in_the_post_processing_is_run(tmp_path, results, model):
    marker = tmp_path / "was_run"
    path = model / "crossval_results_folds_0" / "postprocessing.pkl"
    path.write_bytes(pickle.dumps(Bait(marker)))
    open_nnunet(results).write(tmp_path / "m.autoseg")
    path.with_suffix(".json").unlink()
    open_nnunet(results).write(tmp_path / "m.autoseg")
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.is_dir()


def test_names_in_a_zip_lead_nowhere(tmp_path, results):
    """Members that would land outside, or over other files, if the zip were unpacked."""
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    source = zipped(results.parent, inner / "model.zip")
    with zipfile.ZipFile(source, "a") as archive:
        for name in ("../evil.txt", "../../evil.pth", f"{tmp_path}/evil.txt", "fold_0/../../../evil.json", "..\\evil"):
            archive.writestr(name, "evil")
    open_nnunet(source).write(inner / "m.autoseg")
    assert not list(tmp_path.rglob("*evil*"))
    assert sorted(path.name for path in inner.iterdir()) == ["m.autoseg", "model.zip"]

    # A whole model under such a name is read as any other, and its name goes nowhere either.
    with zipfile.ZipFile(REGIONS) as there, zipfile.ZipFile(inner / "up.zip", "w") as archive:
        for name in there.namelist():
            archive.writestr(f"../../{name}", there.read(name))
    open_nnunet(inner / "up.zip").write(inner / "m.autoseg")
    assert set(read(inner / "m.autoseg").content.members) == {"3d_fullres/fold_0.safetensors"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "nnUNet_results"]


def test_a_configuration_cannot_be_called_by_a_path(results, model):
    name = "../../3d_fullres"
    altered(model / "plans.json", lambda p: p["configurations"].update({name: p["configurations"]["3d_fullres"]}))
    altered_checkpoint(model / "fold_0" / "checkpoint_final.pth", lambda c: c["init_args"].update(configuration=name))
    assert "configuration" in refused(results)


def test_what_would_grow_is_refused_before_it_does(tmp_path, results, model):
    path = model / "fold_0" / "checkpoint_final.pth"
    whole = path.read_bytes()
    path.write_bytes(bytes(4 << 20))
    assert "unpacks to 4,194,304 bytes" in refused(zipped(results.parent, tmp_path / "bomb.zip"))

    path.write_bytes(whole)
    unpacked_there = tmp_path / "checkpoint"
    with zipfile.ZipFile(path) as archive:
        archive.extractall(unpacked_there)
    zipped(unpacked_there, path)
    assert "is packed, which nnU-Net's checkpoints are not" in refused(results)


def test_lists_that_would_be_written_out_without_end_are_not(results, model):
    nested = ["x"]
    for _ in range(60):
        nested = [nested] * 10
    path = model / "fold_0" / "checkpoint_final.pth"
    altered_checkpoint(path, lambda c: c.update(trainer_name=nested))
    assert "names or weights are of another kind" in refused(results)
