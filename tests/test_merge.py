"""Several labels as one class: the same label files, planned, trained, predicted and scored both ways."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_planners import fingerprint as flat_fingerprint
from test_regions import NAME, PLAN, TRAIN
from toys import balls_dataset, grid, write_balls
from typer.testing import CliRunner

from autoseg.cli import app
from autoseg.evaluation import evaluate_folders
from autoseg.evaluation.folders import MERGED, note_merged
from autoseg.evaluation.overlay import OTHER_CLASS, RIGHT, verdicts
from autoseg.fingerprint import measure_case, median_frequency_weights
from autoseg.labels import UNSEEN, Labels
from autoseg.losses import make_loss
from autoseg.merging import annotated_as, made_of, merge, parse_merges, renumber, seen_as
from autoseg.pipeline.combine import combine
from autoseg.pipeline.data import plan_and_preprocess
from autoseg.pipeline.predict import PredictOptions, predict
from autoseg.pipeline.train import train_fold
from autoseg.planners import PLANNERS, plan
from autoseg.preprocess import Cropped
from autoseg.readers import read_labels, write_labels
from autoseg.records import AutosegError, from_json, load_json, to_json
from autoseg.store import load_case
from autoseg.volume import Box
from autoseg.workspace import Workspace

KNEE = Labels.from_dataset({"background": 0, "femur": 7, "tibia": 2, "ignore": 9, "patella": 30, "meniscus": 4})
CARTILAGE = merge(KNEE, {"cartilage": ("7", "tibia", "30")})
STORED = np.array([0, 7, 2, 30, 4, 9], np.int16)


def test_a_merged_class_has_one_index_and_is_written_as_its_smallest_value():
    assert (CARTILAGE.names, CARTILAGE.values) == (("background", "cartilage", "meniscus"), (0, 2, 4))
    assert (CARTILAGE.parts, CARTILAGE.merges) == (((2, 7, 30), (4,)), {"cartilage": (2, 7, 30)})
    assert (CARTILAGE.heads, CARTILAGE.ignored, CARTILAGE.members) == (3, 3, ((1,), (2,)))
    assert CARTILAGE.to_indices(STORED).tolist() == [0, 1, 1, 1, 2, 3]
    assert CARTILAGE.to_values(CARTILAGE.to_indices(STORED)).tolist() == [0, 2, 2, 2, 4, 9]
    assert CARTILAGE.scored == {"cartilage": (2, 7, 30), "meniscus": 4}
    assert CARTILAGE.unexpected(np.array([0, 30, 5])) == [5]
    with pytest.raises(ValueError, match=r"label values \[5\]; expected \[0, 2, 4, 7, 9, 30\]"):
        CARTILAGE.to_indices(np.array([5]))
    assert from_json(Labels, to_json(CARTILAGE)) == CARTILAGE
    assert "cartilage is one class of the labels 2, 7, 30, and is written as 2" in CARTILAGE.remarks()
    binary = merge(KNEE, {"bone": ("2", "7", "30"), "soft": ("meniscus", "4", "femur")} | {"bone": ("2", "30")})
    assert binary.scored == {"soft": (4, 7), "bone": (2, 30)}, "in the order of their first parts"
    assert merge(KNEE, {}) == KNEE
    assert merge(KNEE, {"femur": ("femur", "tibia")}).values == (0, 2, 30, 4), "the name of a part may stay"


def test_keys_of_labels_that_are_not_merged_are_as_they_were():
    assert Labels(names=("background", "a"), values=(0, 1)).meaning == (0, 1)
    assert KNEE.meaning == ((0, 7, 2, 30, 4), (), 9)
    assert len({str(merge(KNEE, {"x": parts}).meaning) for parts in (("2", "7"), ("2", "30"), ("2", "7", "30"))}) == 3


def test_what_cannot_be_merged_is_refused():
    assert parse_merges([" c = 1, 2 ", "d=tibia,3"]) == {"c": ("1", "2"), "d": ("tibia", "3")}
    for text in ("c", "=1,2", "c=1,,2", "c="):
        with pytest.raises(AutosegError, match="write it as NAME=LABEL,LABEL"):
            parse_merges([text])
    with pytest.raises(AutosegError, match="given twice"):
        parse_merges(["c=1,2", "c=3,4"])
    for merges, reason in {
        "c=2,5": "no label 5; there are femur = 7, tibia = 2",
        "c=2,shin": "no label shin",
        "c=2,tibia": "two labels or more",
        "c=2,background": "background, which is no part",
        "c=2,0": "0 is background",
        "c=2,9": "9 is ignore",
        "c=2,ignore": "ignore, which is no part",
        "meniscus=2,7": "name of another label",
        "background=2,7": "name of another label",
        "ignore=2,7": "name of another label",
    }.items():
        with pytest.raises(AutosegError, match=reason):
            merge(KNEE, parse_merges([merges]))
    with pytest.raises(AutosegError, match="'tibia' is in c and in d"):
        merge(KNEE, parse_merges(["c=2,7", "d=2,4"]))
    with pytest.raises(AutosegError, match="these are regions"):
        merge(Labels.from_dataset({"background": 0, "all": [1, 2], "core": 2}), {"c": ("1", "2")})
    for wrong in ({"parts": ((2, 7), (7, 4))}, {"parts": ((7, 30), (4,))}, {"parts": ((2, 7),)}, {"ignore": 30}):
        with pytest.raises(ValueError, match=r"merged classes|is ignored"):
            replace(CARTILAGE, **wrong)


@given(st.permutations([1, 2, 3, 4, 5]), st.integers(2, 4), st.integers(0, 2**20))
def test_a_label_map_is_merged_as_its_file_would_be(values, size, seed):
    names = ["a", "b", "c", "d", "e"]
    finer = Labels.from_dataset({"background": 0, "ignore": 6, **dict(zip(names, values))})
    rng = np.random.default_rng(seed)
    labels = merge(finer, {"m": [int(v) for v in rng.permutation(values)[:size]]})
    stored = rng.integers(0, 7, (2, 3, 5)).astype(np.int16)
    found = renumber(finer.to_indices(stored), finer, labels)
    assert found.dtype == np.int16 and np.array_equal(found, labels.to_indices(stored))
    assert renumber(np.array([UNSEEN, 0], np.int16), finer, labels).tolist() == [UNSEEN, 0]
    assert renumber(stored, finer, finer) is stored


def test_a_case_is_annotated_in_a_merged_class_only_with_all_its_parts():
    listed = {"a": ("femur", "tibia", "meniscus"), "b": ("femur", "tibia", "patella"), "c": ("patella",)}
    assert made_of(CARTILAGE, KNEE) == ((0,), (2, 1, 3), (4,))
    assert annotated_as(listed, KNEE, CARTILAGE) == {"a": ("meniscus",), "b": ("cartilage",), "c": ()}
    assert annotated_as(listed, KNEE, KNEE) == listed
    with pytest.raises(AutosegError, match=r"which are not .* merged; plan again"):
        made_of(CARTILAGE, Labels.from_dataset({"background": 0, "femur": 7}))


def test_a_case_without_any_class_that_is_annotated_teaches_nothing():
    """Parts that it has of a merged class are neither background nor the class."""
    logits = torch.randn(2, 3, 5, 7, generator=torch.manual_seed(1), requires_grad=True)
    target = torch.from_numpy(CARTILAGE.to_indices(np.resize(STORED, (2, 5, 7)))).long()
    annotated = torch.tensor([CARTILAGE.flags(()), CARTILAGE.flags(None)])
    make_loss("dice_ce", labels=CARTILAGE, batch_dice=False)(logits, target, annotated=annotated).backward()
    assert logits.grad.isfinite().all() and logits.grad[0].abs().max() < 1e-7 < logits.grad[1].abs().max()


def test_the_fingerprint_is_what_merged_files_would_have():
    rng = np.random.default_rng(3)
    stored = rng.choice(STORED, (5, 7, 11))
    stored[:, :, :6][stored[:, :, :6] == 7] = 0

    def measured(labels):
        box = Box(start=(0, 0, 0), stop=stored.shape)
        case = Cropped(
            case="a", stored=grid(), image=np.ones((1, *stored.shape), np.float32), labels=labels.to_indices(stored),
            content=None, crop=box, ratio=1.0,
        )  # fmt: skip
        return measure_case(case, labels, "h", 1, ("femur", "tibia", "patella")).facts

    facts = replace(flat_fingerprint((1, (5, 7, 11), (3, 1, 0.5))), cases=(measured(KNEE),))
    (found,), expected = seen_as(facts, KNEE, CARTILAGE).cases, measured(CARTILAGE)
    assert found.voxels == expected.voxels and set(found.across) == {1, 2}
    assert found.across == pytest.approx(expected.across, abs=2e-4)
    assert found.annotated == ("cartilage",)
    assert seen_as(facts, KNEE, KNEE) is facts
    assert seen_as(facts, KNEE, CARTILAGE).data_hash() == facts.data_hash()
    share = [(stored == 0).sum(), np.isin(stored, (2, 7, 30)).sum(), (stored == 4).sum()]
    weights = median_frequency_weights(seen_as(facts, KNEE, CARTILAGE), CARTILAGE)
    assert weights == pytest.approx(np.median(share) / np.array(share))


def test_a_merged_pair_is_no_pair_any_more():
    sides = Labels.from_dataset({"background": 0, "kidney_left": 1, "kidney_right": 2, "spleen": 3})
    facts = flat_fingerprint((4, (40, 64, 64), (1, 1, 1)))
    case = replace(facts.cases[0], across={1: 0.8, 2: 0.2, 3: 0.7}, voxels={0: 9, 1: 5, 2: 5, 3: 2})
    facts = replace(facts, cases=(case,) * 4)
    assert plan(facts, sides, PLANNERS["unet"]).mirroring.swapped == ((1, 2),)
    kidney = merge(sides, {"kidney": (1, 2)})
    made = plan(seen_as(facts, sides, kidney), kidney, PLANNERS["unet"])
    assert (made.mirroring.swapped, made.mirroring.forbidden) == ((), ())
    halved = merge(sides, {"organ": (2, 3)})
    made = plan(seen_as(facts, sides, halved), halved, PLANNERS["unet"])
    assert made.mirroring.forbidden == (made.axis_order.index(2),), "the other side has no mate any more"


# Scores.


def volumes(folder, **cases):
    for name, values in cases.items():
        array = np.asarray(values, np.int16).reshape(1, 2, -1)
        write_labels(array, grid(array.shape), folder / f"{name}.nii.gz")
    return folder


LISTED = {"background": 0, "a": 1, "b": 2, "c": 3}
TRUTH = [0, 0, 0, 1, 1, 2, 2, 3, 3, 3]
MULTI = [0, 0, 1, 2, 1, 2, 0, 3, 1, 3]
ONE = [0, 1, 1, 1, 1, 1, 0, 3, 3, 0]


@pytest.fixture
def scored(tmp_path):
    """Truth of three labels, predictions of a multi-class model, and of one that merges a and b."""
    volumes(tmp_path / "truth", x=TRUTH)
    (tmp_path / "truth" / "dataset.json").write_text(json.dumps({"labels": LISTED}))
    volumes(tmp_path / "multi", x=MULTI)
    note_merged(merge(Labels.from_dataset(LISTED), {"ab": (1, 2)}), volumes(tmp_path / "one", x=ONE))
    return tmp_path


def dice(root, prediction, **options):
    summary = evaluate_folders(root / "truth", root / prediction, quiet=True, **options)
    return {score.label: score.dice for score in summary.scores}


def test_both_models_are_scored_on_merged_labels(scored):
    assert dice(scored, "one") == {"ab": pytest.approx(2 * 3 / (4 + 5)), "c": pytest.approx(2 * 2 / (3 + 2))}
    merged = dice(scored, "multi", merges={"ab": ("a", "2")})
    assert merged == {"ab": pytest.approx(2 * 3 / (4 + 5)), "c": pytest.approx(2 * 2 / (3 + 2))}
    whole = {"all": ("a", "b", "c")}
    assert dice(scored, "one", merges=whole) == {"all": pytest.approx(2 * 5 / (7 + 7))}
    assert dice(scored, "multi", merges=whole) == {"all": pytest.approx(2 * 6 / (7 + 7))}
    assert set(dice(scored, "multi")) == {"a", "b", "c"}
    fine = Labels.from_dataset(LISTED)
    assert dice(scored, "one", labels=fine, annotated={"x": ("a", "c")}) == {"c": 0.8}, "b was not annotated"
    assert dice(scored, "one", labels=merge(fine, {"ab": (1, 2)})) == dice(scored, "one")


def test_merged_predictions_are_never_scored_by_their_parts(scored):
    with pytest.raises(AutosegError, match="ab is one class of the labels 1, 2, which the predictions no longer tell"):
        dice(scored, "one", merges={"bc": ("b", "c")})
    other = Labels.from_dataset({"background": 0, "ab": 1, "c": 3})
    with pytest.raises(AutosegError, match="Where the truth has them merged too, remove that file"):
        dice(scored, "one", labels=other)
    (scored / "one" / MERGED).unlink()
    volumes(scored / "joined", x=[min(value, 1) if value < 3 else 3 for value in TRUTH])
    summary = evaluate_folders(scored / "joined", scored / "one", labels=other, quiet=True)
    assert [score.dice for score in summary.scores] == pytest.approx([2 / 3, 0.8])
    (scored / "truth" / "dataset.json").unlink()
    assert dice(scored, "multi", merges={"ab": (1, 2)})["ab"] == pytest.approx(2 / 3), "values are names, too"
    note_merged(None, scored / "one")
    assert not (scored / "one" / MERGED).exists()


def test_evaluate_says_what_it_scored_together(scored):
    command = ["evaluate", str(scored / "truth"), str(scored / "multi")]
    done = CliRunner().invoke(app, [*command, "--merge", "tissue=a,b"])
    assert done.exit_code == 0 and "tissue: the labels 1, 2 as one class" in done.output
    assert json.loads((scored / "multi" / "summary.json").read_text())["labels"] == {"tissue": [1, 2], "c": 3}
    assert "scored" not in CliRunner().invoke(app, command).output
    done = CliRunner().invoke(app, ["evaluate", str(scored / "truth"), str(scored / "one")])
    assert done.exit_code == 0 and "ab: the labels 1, 2 as one class" in done.output


def test_folders_made_from_merged_predictions_say_so_too(scored, tmp_path):
    volumes(tmp_path / "third", x=[2] * 10)
    combine([tmp_path / "one", tmp_path / "multi", tmp_path / "third"], tmp_path / "voted")
    assert load_json(Labels, tmp_path / "voted" / MERGED).merges == {"ab": (1, 2)}
    voted = read_labels(tmp_path / "voted" / "x.nii.gz")[0].array.ravel().tolist()
    assert voted == [0, 1, 1, 1, 1, 1, 0, 3, 1, 1] or voted == [0, 1, 1, 1, 1, 1, 0, 3, 1, 0]
    done = CliRunner().invoke(
        app, ["postprocess", str(tmp_path / "one"), "-o", str(tmp_path / "done"), "--truth", str(tmp_path / "truth")]
    )
    assert done.exit_code == 0, done.output
    rule = tmp_path / "done" / "postprocessing.json"
    assert json.loads(rule.read_text())["labels"]["names"] == ["background", "ab", "c"]
    assert load_json(Labels, tmp_path / "done" / MERGED).merges == {"ab": (1, 2)}
    (tmp_path / "truth" / "dataset.json").rename(tmp_path / "multi" / "dataset.json")
    done = CliRunner().invoke(
        app,
        [
            "postprocess",
            str(tmp_path / "multi"),
            "-o",
            str(tmp_path / "d2"),
            "--rule",
            str(rule),
            "-d",
            str(tmp_path / "multi"),
        ],
    )
    assert done.exit_code == 1 and "the files have" in str(done.exception), "a rule for other classes"


def test_verdicts_of_an_overlay_are_those_of_merged_classes():
    labels = merge(Labels.from_dataset(LISTED), {"ab": (1, 2)})
    marks = verdicts(np.array([1, 2, 3, 3]), np.array([1, 1, 1, 3]), labels)
    assert marks.tolist() == [RIGHT, RIGHT, OTHER_CLASS, RIGHT]


# All the way.


def test_the_same_files_both_ways(tmp_path, capsys):
    workspace = Workspace(tmp_path)
    raw = workspace.raw(NAME)
    balls_dataset(raw, cases=3, prefix="c")
    before = {path: path.read_bytes() for path in (raw / "labelsTr").iterdir()}
    folds = [{"train": ["c1", "c2"], "val": ["c0"]}, {"train": ["c0"], "val": ["c1", "c2"]}]
    (raw / "splits_final.json").write_text(json.dumps(folds))
    plan_and_preprocess(workspace, NAME, PLAN)
    asked = replace(PLAN, name="binary", request=replace(PLAN.request, merge={"balls": ("big", "300")}))
    made = plan_and_preprocess(workspace, NAME, asked)
    printed = capsys.readouterr().out
    assert "labels: balls is one class of the labels 7, 300, and is written as 7" in printed
    assert "shared with" not in printed, "label maps are others"
    assert {path: path.read_bytes() for path in (raw / "labelsTr").iterdir()} == before
    fine, coarse = (load_case(workspace.cases(NAME, name, "3d_fullres"), "c0") for name in ("default", "binary"))
    assert np.array_equal(coarse.image, fine.image) and np.array_equal(coarse.labels, np.minimum(fine.labels, 1))
    assert sorted(coarse.locations) == [1]

    # Planned again it stays what it is.
    again = plan_and_preprocess(workspace, NAME, replace(PLAN, name="binary"))
    printed = capsys.readouterr().out
    assert again.labels == made.labels and "3 of 3 cases are prepared already" in printed
    assert "As asked for before: --merge balls=big,300" in printed
    unknown = replace(PLAN, name="other", request=replace(PLAN.request, merge={"balls": ("7", "5")}))
    with pytest.raises(AutosegError, match="no label 5"):
        plan_and_preprocess(workspace, NAME, unknown)

    train = replace(TRAIN, plan="binary", run="binary", loss="weighted_ce+dice")
    summary = train_fold(workspace, NAME, "3d_fullres", "0", train)
    assert summary.labels == {"balls": (7, 300)}
    held_out = workspace.fold(NAME, "binary", "3d_fullres", 0) / "validation"
    assert set(np.unique(read_labels(held_out / "c0.nii.gz")[0].array)) <= {0, 7}
    # The numbers of the fold are those of `evaluate`, whether or not the dataset is named.
    for options in ({}, {"labels": Labels.from_dataset({"background": 0, "big": 7, "small": 300})}):
        found = evaluate_folders(raw / "labelsTr", held_out, partial=True, quiet=True, **options)
        assert found.scores == summary.scores
    write_balls(tmp_path, "x", seed=11, split="Ts")
    predict(workspace, tmp_path / "imagesTs", tmp_path / "out", PredictOptions(dataset=NAME, device="cpu"))
    assert set(np.unique(read_labels(tmp_path / "out" / "x.nii.gz")[0].array)) <= {0, 7}
    assert load_json(Labels, tmp_path / "out" / MERGED) == made.labels
    assert (
        "balls"
        in CliRunner()
        .invoke(app, ["plan", "-d", NAME, "--explain", "--plan", "binary", "--workspace", str(tmp_path)])
        .output
    )
