"""A trained model leaves its workspace as one file: it predicts as before, says what it is, and loads in Python."""

import hashlib
import re
import threading
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from safetensors.torch import load_file, save, save_file
from test_bundle import SOUND, content
from test_predict import SHAPE, finished_run
from toys import LABELS, OBLIQUE, configuration, grid, network, plan
from typer.testing import CliRunner

import autoseg
from autoseg.bundle import ModelCard, Stage, read, write
from autoseg.cli import app
from autoseg.model import weights_hash
from autoseg.networks import build
from autoseg.pipeline.postprocess import postprocess
from autoseg.pipeline.predict import PredictOptions, predict
from autoseg.pipeline.share import export_model, info
from autoseg.postprocess import PostProcessing, Step
from autoseg.readers import read_labels, write_image
from autoseg.records import AutosegError, load_json, save_json
from autoseg.schema import CaseFingerprint, Fingerprint, Request, Run
from autoseg.workspace import Workspace

RUNNER = CliRunner()
NAME = "Dataset001_Toy"
RULE = PostProcessing(cases=2, steps=(Step(members=(1, 2), dice_before=0.5, dice_after=0.6),))
CPU = PredictOptions(device="cpu", mirror=False)


def tree(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def card(folder) -> ModelCard:
    return ModelCard(
        dataset=NAME,
        configuration=folder.name,
        folds={fold.name: weights_hash(fold) for fold in sorted(folder.glob("fold_*"))},
        cases=2,
        dice={"liver": 0.5, "lesion": None, "foreground": 0.5},
        dice_postprocessed={"liver": 0.6, "lesion": None, "foreground": 0.6},
        postprocessing=RULE,
    )


@pytest.fixture
def place(tmp_path):
    """Two finished folds with cross-validated scores, their fingerprint, and images."""
    place = Workspace(tmp_path / "work")
    for seed in (0, 1):
        finished_run(place.fold(NAME, "default", "3d_fullres", seed), seed)
    folder = place.run(NAME, "default", "3d_fullres")
    save_json(card(folder), folder / "model.json")
    entry = CaseFingerprint(case="Jane Doe", shape=SHAPE, spacing_mm=(2.0, 1.0, 1.0), crop_ratio=1.0, content_hash="c")
    facts = Fingerprint(dataset=NAME, dimension=3, channel_names=("MR",), cases=(entry,), intensities=(None,))
    save_json(facts, place.prepared(NAME) / "fingerprint.json")
    for fold in folder.glob("fold_*"):
        run = load_json(Run, fold / "run.json")
        made = replace(run.plan, data_hash=facts.data_hash(), request=Request(like="/home/jane/knee.autoseg"))
        save_json(replace(run, plan=made), fold / "run.json")
    for name, seed in (("a", 1), ("b", 2)):
        image = np.random.default_rng(seed).normal(100, 20, SHAPE).astype(np.float32)
        stored = grid(SHAPE, (2.5, 1.2, 0.9), direction=OBLIQUE, origin_mm=(5.0, -3.0, 2.0))
        write_image(image, stored, tmp_path / "in" / f"{name}_0000.nii.gz")
    return place


def exported(place, tmp_path, **options):
    path = tmp_path / "toy.autoseg"
    export_model(place, path, PredictOptions(**options), licence="CC BY 4.0", note="a toy\x1b[2J")
    return path


def test_the_file_predicts_what_the_folders_predict(place, tmp_path, capsys):
    """Byte for byte, and to one status file: what either has predicted the other need not predict again."""
    path = exported(place, tmp_path)
    predict(place, tmp_path / "in", tmp_path / "one", CPU)
    words = capsys.readouterr().out.split("Post-processing: ")[1].splitlines()[0]
    assert words == RULE.describe(LABELS)
    elsewhere = Workspace(tmp_path / "nothing")
    predict(elsewhere, tmp_path / "in", tmp_path / "two", replace(CPU, model=path))
    printed = capsys.readouterr().out
    assert printed.startswith(f"Model: {NAME} 3d_fullres, fold 0, 1 ({path})\nPost-processing: {words}\n")
    one, two = tree(tmp_path / "one"), tree(tmp_path / "two")
    assert {k: v for k, v in one.items() if k != "status.csv"} == {k: v for k, v in two.items() if k != "status.csv"}
    assert len(np.unique(read_labels(tmp_path / "one" / "a.nii.gz")[0].array)) == 3
    predict(elsewhere, tmp_path / "in", tmp_path / "one", replace(CPU, model=path))
    assert "2 of 2 cases are predicted already" in capsys.readouterr().out


def test_the_rule_of_a_file_does_to_files_what_prediction_does_with_it(place, tmp_path):
    """Sizes in mm mean the same on both ways, on an oblique grid of other spacing than the model's."""
    folder = place.run(NAME, "default", "3d_fullres")
    steps = (
        Step(kind="islands", members=(1,), below_mm3=20.0),
        Step(kind="closing", members=(1, 2), radius_mm=2.0),
        Step(kind="holes", members=(2,)),
    )
    save_json(replace(card(folder), postprocessing=PostProcessing(cases=9, steps=steps)), folder / "model.json")
    path = exported(place, tmp_path)
    predict(place, tmp_path / "in", tmp_path / "one", CPU)
    predict(place, tmp_path / "in", tmp_path / "raw", replace(CPU, postprocess=False))
    for number, rule in enumerate((path, folder / "model.json")):
        target = tmp_path / f"processed_{number}"
        assert postprocess(place, tmp_path / "raw", target, rule=rule).steps == steps
        for name in ("a.nii.gz", "b.nii.gz"):
            raw, one, two = (
                read_labels(place / name)[0].array for place in (tmp_path / "raw", tmp_path / "one", target)
            )
            assert np.array_equal(one, two) and not np.array_equal(raw, one)


def test_single_folds_are_chosen_as_from_folders(place, tmp_path, capsys):
    path = exported(place, tmp_path)
    predict(place, tmp_path / "in", tmp_path / "one", replace(CPU, folds=("1",)))
    predict(place, tmp_path / "in", tmp_path / "two", replace(CPU, folds=("1",), model=path))
    assert tree(tmp_path / "one")["a.nii.gz"] == tree(tmp_path / "two")["a.nii.gz"]
    with pytest.raises(AutosegError, match="fold 3 is not trained to its end; finished: 0, 1"):
        predict(place, tmp_path / "in", tmp_path / "two", replace(CPU, folds=("3",), model=path))
    only = tmp_path / "only.autoseg"
    assert export_model(place, only, PredictOptions(folds=("1",))).stages[0].folds == (1,)


def test_export_asks_which_model_is_meant_and_overwrites_nothing_else(place, tmp_path):
    with pytest.raises(AutosegError, match=r"ends in \.autoseg"):
        export_model(place, tmp_path / "run.json", PredictOptions())
    finished_run(place.fold(NAME, "second", "3d_fullres", 0), 5)
    with pytest.raises(AutosegError, match=r"2 models(.|\n)*autoseg export -o .*x\.autoseg -d .*--run second"):
        export_model(place, tmp_path / "x.autoseg", PredictOptions())
    assert not (tmp_path / "x.autoseg").exists()
    path = exported(place, tmp_path, run="second")
    assert read(path).content.fingerprint is None, "the plan of this run was made from other data"
    with pytest.raises(AutosegError, match="is a file already"):
        export_model(place, tmp_path / "y.autoseg", PredictOptions(model=path))


def test_names_of_cases_stay_at_home(place, tmp_path):
    path = exported(place, tmp_path)
    assert b"jane" not in path.read_bytes().lower(), "neither of cases nor of folders"
    facts = read(path).content.fingerprint
    assert facts is not None
    assert facts.cases[0].case == "1"
    assert facts.cases[0].shape == SHAPE


def test_runs_with_a_network_of_ones_own_are_not_exported(place, tmp_path):
    fold = place.fold(NAME, "mine", "3d_fullres", 0)
    finished_run(fold)
    run = load_json(Run, fold / "run.json")
    own = replace(run.plan.configurations[0], network=replace(network(), name="mine:Net"))
    save_json(replace(run, plan=replace(run.plan, configurations=(own,))), fold / "run.json")
    with pytest.raises(AutosegError, match=r"'mine:Net' is not part of autoseg(.|\n)*run folder"):
        exported(place, tmp_path, run="mine")


def test_damaged_weights_are_not_exported(place, tmp_path):
    weights = place.fold(NAME, "default", "3d_fullres", 1) / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(AutosegError, match="damaged"):
        exported(place, tmp_path)
    assert not (tmp_path / "toy.autoseg").exists()


def test_by_hand(place, tmp_path):
    """As people type it: export, info and predict, and a folder or a damaged file in the place of a model."""
    path, root = str(tmp_path / "x.autoseg"), str(place.root)
    text = tmp_path / "LICENCE"
    text.write_text("Do as you like.\nNobody is liable.\n")
    run = ["export", "-d", "1", "-o", path, "--licence", str(text), "--workspace", root]
    assert RUNNER.invoke(app, run, catch_exceptions=False).exit_code == 0
    assert "Do as you like.\nNobody is liable." in RUNNER.invoke(app, ["info", path]).output
    images = ["predict", "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--no-tta", "--device", "cpu", "-m"]
    assert RUNNER.invoke(app, [*images, path], catch_exceptions=False).exit_code == 0
    assert set(tree(tmp_path / "out")) == {"a.nii.gz", "b.nii.gz", "status.csv"}
    (tmp_path / "cut.autoseg").write_bytes((tmp_path / "x.autoseg").read_bytes()[:-7])
    for verb in (["info"], images):
        for name, reason in (
            ("cut.autoseg", "is refused"),
            ("no.autoseg", "does not exist"),
            ("in", "is no f|no fold"),
        ):
            failed = RUNNER.invoke(app, [*verb, str(tmp_path / name)]).exception
            assert isinstance(failed, AutosegError)
            assert re.search(rf"{name} .*({reason})", str(failed))


def test_info_says_what_one_needs_to_know(place, tmp_path, capsys):
    path = exported(place, tmp_path)
    capsys.readouterr()
    info(path)
    printed = capsys.readouterr().out
    for said in (
        "background = 0, liver = 7, lesion = 200",
        "0 MR (zscore)",
        "1 cases, median size 7 x 12 x 15",
        "2 x 1.3 x 1.1 mm (Y, Z, X)",
        "4 x 6 x 8 voxels",
        "folds     0, 1",
        "0.5000          0.6000",
        "undefined       undefined",
        "keep the largest component of liver, lesion",
        "Licence: CC BY 4.0",
        "Note: a toy?[2J",
        f"autoseg {autoseg.__version__}",
    ):
        assert said in printed
    count = sum(p.numel() for p in build(configuration().network, 1, 3).parameters())
    assert f"{count:,} weights" in printed
    assert "\x1b" not in printed


def test_scores_and_rules_that_state_little_or_nonsense_do_no_harm(tmp_path, capsys):
    """Those of imported models have no Dice of single steps; a made-up one may name classes that there are not."""
    path = tmp_path / "toy.autoseg"

    def write_with(*members):
        rule = PostProcessing(cases=0, steps=(Step(members=members, dice_before=None, dice_after=None),))
        hashes = {"fold_0": hashlib.sha256(SOUND).hexdigest()[:16]}
        scores = replace(card(tmp_path), folds=hashes, dice={}, dice_postprocessed={}, postprocessing=rule)
        stages = (Stage(configuration="3d_fullres", folds=(0,), card=scores),)
        write(path, content(stages=stages), {"3d_fullres/fold_0.safetensors": SOUND})
        return rule

    for members, said in (((1, 2), "of liver, lesion\n"), ((2, 99), "lesion")):
        rule = write_with(*members)
        info(path)
        assert said in capsys.readouterr().out
        model = autoseg.load(path, device="cpu")
        assert model.rule == rule
        model.predict(np.zeros((3, 4, 5)), spacing=(3.0, 1.0, 0.5), mirror=False)
    for members in ((-1,), (1 << 70,)):
        with pytest.raises(AutosegError, match="names classes that cannot be"):
            write_with(*members)


def _other(change):
    tensors = {k: v.contiguous() for k, v in build(configuration().network, 1, 3).state_dict().items()}
    change(tensors)
    return save(tensors)


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (_other(lambda t: t.pop("heads.0.bias")), "'heads.0.bias' is missing"),
        (_other(lambda t: t.update(extra=torch.zeros(1))), "'extra' is not part"),
        (_other(lambda t: t.update({"heads.0.bias": torch.zeros(4)})), r"float32 \(4,\).*float32 \(3,\)"),
        (_other(lambda t: t.update({"heads.0.bias": torch.zeros(3, dtype=torch.float16)})), "float16"),
        (SOUND[:-4], "no sound safetensors"),
        (SOUND + b"0", "no sound safetensors"),
        (SOUND[:8] + b"[" + SOUND[9:], "no sound safetensors"),
        (SOUND.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1), "no sound safetensors"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, weights, reason):
    path = tmp_path / "bad.autoseg"
    write(path, content(), {"3d_fullres/fold_0.safetensors": weights})
    with pytest.raises(AutosegError, match=rf"bad\.autoseg is refused: .*{reason}"):
        autoseg.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"features": (4, 1 << 40)},
        {"features": (4, 1 << 62)},
        {"features": (0, 6)},
        {"encoder_blocks": (1, 10**9)},
        {"kernels": ((3, 3, 3), (1 << 31, 1, 1))},
        {"strides": ((1, 1, 1), (1 << 40, 1, 1))},
        {"strides": ((1, 1, 1),)},
        {"name": "unheard_of"},
    ],
)
def test_a_plan_of_another_network_takes_no_memory(tmp_path, change):
    """A network of 2 ** 40 channels would not fit anywhere: it is refused before anything is made of it."""
    path = tmp_path / "bad.autoseg"
    hostile = replace(configuration(), network=replace(network(), **change))
    write(path, content(plan=plan(hostile)), {"3d_fullres/fold_0.safetensors": SOUND})
    with pytest.raises(AutosegError, match=r"bad\.autoseg is refused: .* does not fit its plan"):
        autoseg.load(path)


def test_loaded_in_python_it_gives_what_the_verb_writes(place, tmp_path):
    path = exported(place, tmp_path)
    predict(place, tmp_path / "in", tmp_path / "out", replace(CPU, save_probabilities=True))
    state = torch.random.get_rng_state()
    for model in (autoseg.load(path, device="cpu"), autoseg.load(place.run(NAME, "default", "3d_fullres"))):
        source = tmp_path / "in" / "a_0000.nii.gz"
        written = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "a.nii.gz")))
        maps = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "a_probabilities.nii.gz")))
        maps = np.moveaxis(maps, -1, 0)
        for image in (source, str(source), [source], sitk.ReadImage(str(source)), [sitk.ReadImage(str(source))]):
            found = model.predict(image, mirror=False, probabilities=True)
            assert np.array_equal(found.labels, written)
            assert np.array_equal(found.probabilities, maps)
            assert found.grid.shape == SHAPE
        assert set(found.seconds) == {"read", "prepare", "compute", "restore"}
        assert model.predict(source, mirror=False).probabilities is None
        assert model.labels == {"background": 0, "liver": 7, "lesion": 200}
        assert model.channels == ("MR",)
    assert torch.equal(torch.random.get_rng_state(), state), "no random number is drawn"


def test_an_array_is_an_image_of_straight_axes(place, tmp_path):
    model = autoseg.load(exported(place, tmp_path), folds=[1])
    array = np.random.default_rng(3).normal(100, 20, SHAPE)
    write_image(array.astype(np.float32), grid(SHAPE, (2.5, 1.2, 0.9)), tmp_path / "x.nii.gz")
    expected = model.predict(tmp_path / "x.nii.gz", mirror=False)
    for form in (array, array[None], array.astype(np.float32)):
        found = model.predict(form, spacing=(2.5, 1.2, 0.9), mirror=False)
        assert found.labels.shape == SHAPE
        assert np.mean(found.labels == expected.labels) > 0.999
    for image, spacing, reason in (
        (array, None, "needs its `spacing`"),
        (array, (1.0, 1.0), "3 lengths"),
        (array, (1.0, 0.0, 1.0), "3 lengths"),
        (array[0], (1.0, 1.0, 1.0), r"of 1 channels \(MR\), not of shape \(12, 15\)"),
        (np.stack([array, array]), (1.0, 1.0, 1.0), "not of shape"),
        (array.astype(complex), (1, 1, 1), "complex"),
        (tmp_path / "x.nii.gz", (1, 1, 1), "goes with arrays"),
        ([], None, "list is empty"),
        ([3], None, "not int"),
        (tmp_path / "no.nii.gz", None, "does not exist"),
    ):
        with pytest.raises(AutosegError, match=reason):
            model.predict(image, spacing=spacing)


def test_a_2d_model_takes_and_gives_2d_arrays(tmp_path):
    fold = finished_run(tmp_path / "fold_0", dimension=2, channels=("R", "G", "B"))
    run = load_json(Run, fold / "run.json")
    save_json(replace(run, plan=replace(run.plan, dimension=2)), fold / "run.json")
    pixels = np.random.default_rng(0).integers(0, 255, (17, 23, 3), dtype=np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(pixels, isVector=True), str(tmp_path / "cell.png"))
    model = autoseg.load(fold, device="cpu")
    expected = model.predict(tmp_path / "cell.png", probabilities=True)
    assert expected.labels.shape == (17, 23)
    assert expected.probabilities.shape == (3, 17, 23)
    found = model.predict(np.moveaxis(pixels, -1, 0), spacing=(1.0, 1.0))
    assert np.array_equal(found.labels, expected.labels)


def test_threads_share_a_loaded_model(place, tmp_path):
    model = autoseg.load(exported(place, tmp_path), device="cpu")
    images = [tmp_path / "in" / f"{name}_0000.nii.gz" for name in "ab"] * 3
    alone = [model.predict(image, mirror=False).labels for image in images]
    together = [None] * len(images)

    def one(number):
        together[number] = model.predict(images[number], mirror=False).labels

    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(a, b) for a, b in zip(alone, together))
    assert not np.array_equal(alone[0], alone[1])


def test_both_stages_of_a_cascade_travel_together(tmp_path, capsys):
    """The file of a second stage holds the folds of the first, and predicts as both folders do."""
    place = Workspace(tmp_path)
    low = configuration("3d_lowres", spacing_mm=(4.0, 2.0, 2.0))
    late = configuration("3d_cascade_fullres", previous_stage="3d_lowres")
    made = plan(low, late)
    for here, seeds in ((low, (0, 1)), (late, (2,))):
        for seed in seeds:
            fold = finished_run(place.fold(NAME, "default", here.name, seed), seed)
            run = load_json(Run, fold / "run.json")
            save_json(replace(run, plan=made, configuration=here.name), fold / "run.json")
            torch.manual_seed(seed)
            tensors = build(here.network, made.in_channels(here), LABELS.heads).state_dict()
            save_file(dict(tensors), fold / "weights.safetensors")
    write_image(np.random.default_rng(1).normal(0, 1, SHAPE), grid(SHAPE), tmp_path / "in" / "x_0000.nii.gz")
    path = exported(place, tmp_path, configuration="3d_cascade_fullres")
    assert read(path).content.stages == (
        Stage(configuration="3d_lowres", folds=(0, 1)),
        Stage(configuration="3d_cascade_fullres", folds=(2,)),
    )
    predict(place, tmp_path / "in", tmp_path / "one", replace(CPU, configuration="3d_cascade_fullres"))
    predict(place, tmp_path / "in", tmp_path / "two", replace(CPU, model=path))
    assert tree(tmp_path / "one")["x.nii.gz"] == tree(tmp_path / "two")["x.nii.gz"]
    info(path)
    assert "3d_cascade_fullres, reads predictions of 3d_lowres" in capsys.readouterr().out
    one = load_file(place.fold(NAME, "default", "3d_lowres", 1) / "weights.safetensors")
    assert read(path).weights("3d_lowres/fold_1.safetensors").endswith(one["up.0.weight"].numpy().tobytes())
