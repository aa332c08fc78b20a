"""The verb postprocess: others' label files in, processed ones out."""

import json
from dataclasses import replace

import numpy as np
import pytest
from test_predict import finished_run
from toys import OBLIQUE, ball, grid
from typer.testing import CliRunner

from autoseg.bundle import ModelCard
from autoseg.cli import app
from autoseg.ensemble import Candidate, Choice, Member
from autoseg.labels import Labels
from autoseg.pipeline.postprocess import NAME, STATUS, RuleFile, postprocess
from autoseg.pipeline.status import Status, begin
from autoseg.postprocess import PostProcessing, Step
from autoseg.readers import read_labels, read_stored, write_labels
from autoseg.records import AutosegError, load_json, save_json
from autoseg.workspace import Workspace

GRID = grid(shape=(6, 9, 13), spacing_mm=(3.0, 1.0, 0.5), origin_mm=(1.0, -2.0, 30.0), direction=OBLIQUE)
DATASET = {"labels": {"background": 0, "liver": 7, "lesion": 200}}


@pytest.fixture
def folders(tmp_path):
    """Truth of ten cases, and predictions with a speck and a hole; an eleventh prediction has no truth."""
    truths, found = tmp_path / "truth", tmp_path / "pred"
    for number in range(11):
        truth = np.where(ball(GRID.shape, (2, 4, 4), 2.5 + number / 20), 7, 0)
        truth[3, 4, 4] = 200
        prediction = truth.copy()
        prediction[5, 8, 10 : 11 + number % 2] = 7
        prediction[2, 4, 4] = 0
        if number < 10:
            write_labels(truth, GRID, truths / f"case{number}.nii.gz")
        write_labels(prediction, GRID, found / f"case{number}.nii.gz")
    (tmp_path / "dataset.json").write_text(json.dumps(DATASET))
    return tmp_path


def run(folders, **options):
    return postprocess(Workspace(folders), folders / "pred", folders / "out", workers=1, **options)


def voxels(path):
    return read_labels(path)[0].array[0]


def test_a_rule_is_found_written_and_applied_to_every_file(folders, capsys):
    rule = run(folders, truth=folders / "truth")
    assert [(step.kind, step.members) for step in rule.steps] == [("largest", (1, 2)), ("holes", (1, 2))]
    printed = capsys.readouterr().out
    assert "10 of 11 predictions can be compared" in printed and "Processed: 11 of 11" in printed
    assert "1.0000     1.0000" in printed and "is honest" in printed
    for number in range(10):
        assert np.array_equal(
            voxels(folders / f"out/case{number}.nii.gz"), voxels(folders / f"truth/case{number}.nii.gz")
        )
    stored = read_stored(folders / "out" / "case10.nii.gz")
    assert set(np.unique(stored.array)) == {0, 7, 200} and stored.grid.agrees(GRID)
    assert np.allclose(stored.grid.direction, OBLIQUE)
    file = load_json(RuleFile, folders / "out" / NAME)
    assert file.postprocessing == rule and file.labels.names == ("background", "liver", "lesion")
    assert not [path for path in (folders / "out").iterdir() if path.name.startswith(".")]


def test_a_stored_rule_does_the_same_without_truth(folders):
    run(folders, truth=folders / "truth")
    (folders / "pred" / "case3.nii.gz").rename(folders / "pred" / "case3.NII.GZ")
    postprocess(Workspace(folders), folders / "pred", folders / "again", rule=folders / "out" / NAME, workers=1)
    for number in range(11):
        name = f"case{number}.nii.gz"
        assert (folders / "again" / name).read_bytes() == (folders / "out" / name).read_bytes()
    assert (folders / "again" / NAME).read_text() == (folders / "out" / NAME).read_text()


def test_without_a_dataset_every_value_is_a_class(folders):
    (folders / "dataset.json").unlink()
    run(folders, truth=folders / "truth")
    assert load_json(RuleFile, folders / "out" / NAME).labels.values == (0, 7, 200)


def test_the_rule_of_a_model_needs_to_know_the_labels(folders):
    card = ModelCard(
        dataset="Dataset001_Toy",
        configuration="3d_fullres",
        folds={},
        cases=8,
        dice={},
        dice_postprocessed={},
        postprocessing=PostProcessing(cases=8, steps=(Step(members=(1, 2)),)),
    )
    save_json(card, folders / "model.json")
    with pytest.raises(AutosegError, match="add -d DATASET"):
        run(folders, rule=folders / "model.json")
    assert run(folders, rule=folders / "model.json", dataset=str(folders)) == card.postprocessing
    assert (
        voxels(folders / "out" / "case10.nii.gz")[5, 8, 10] == 0 != voxels(folders / "pred" / "case10.nii.gz")[5, 8, 10]
    )
    odd = replace(card, postprocessing=PostProcessing(cases=8, steps=(Step(members=(5,)),)))
    save_json(odd, folders / "model.json")
    with pytest.raises(AutosegError, match=r"names the classes \[5\]"):
        run(folders, rule=folders / "model.json", dataset=str(folders))


def test_the_rule_of_a_choice_is_taken_with_the_labels_of_its_first_member(folders, capsys):
    """Probabilities beside the predictions are no case."""
    (folders / "pred" / "case3_probabilities.nii.gz").write_bytes((folders / "pred" / "case3.nii.gz").read_bytes())
    finished_run(folders / "small" / "3d_fullres" / "fold_0")
    member = Member(folder="small/3d_fullres", folds=("fold_0",), weights=("x",))
    choice = Choice(
        dataset="Dataset001_Toy",
        cases=8,
        chosen=0,
        reason="",
        candidates=(Candidate(members=(member,), dice={}, mean=None),),
        draws=1,
        seed=0,
        dice_postprocessed={},
        postprocessing=PostProcessing(cases=8, steps=(Step(members=(1, 2)),)),
    )
    save_json(choice, folders / "model.json")
    assert run(folders, rule=folders / "model.json") == choice.postprocessing
    assert "largest component of liver, lesion" in (printed := capsys.readouterr().out) and "11 of 11 cases" in printed
    save_json(choice, folders / "elsewhere" / "model.json")
    with pytest.raises(AutosegError, match="names small/3d_fullres, which holds no fold"):
        run(folders, rule=folders / "elsewhere" / "model.json")


def test_a_rule_for_other_labels_is_refused(folders):
    run(folders, truth=folders / "truth")
    other = {"labels": {"background": 0, "liver": 7, "lesion": 9}}
    (folders / "dataset.json").write_text(json.dumps(other))
    with pytest.raises(AutosegError, match="is for the labels"):
        run(folders, rule=folders / "out" / NAME, dataset=str(folders))


def test_a_bad_case_harms_only_itself(folders, capsys):
    (folders / "pred" / "case1.nii.gz").write_bytes(b"no image")
    write_labels(np.zeros((4, 9, 13), np.uint8), grid(shape=(4, 9, 13)), folders / "truth" / "case2.nii.gz")
    wrong = voxels(folders / "pred" / "case3.nii.gz")
    wrong[0, 0, 0] = 3
    write_labels(wrong, GRID, folders / "pred" / "case3.nii.gz")
    (folders / "out").mkdir()
    begin(Status(folders / "out", STATUS), {"case1": "case1.nii.gz"})
    (folders / "out" / "case1.nii.gz").write_bytes(b"of a command that was killed")
    with pytest.raises(AutosegError) as raised:
        run(folders, truth=folders / "truth")
    said = str(raised.value)
    assert "failed for 3" in said and "case2: truth and prediction lie on different grids" in said
    assert "unexpected label values [3]" in said and "with -d" in said
    written = sorted(path.name for path in (folders / "out").glob("*.nii.gz"))
    assert written == [f"case{number}.nii.gz" for number in (0, 10, 2, 4, 5, 6, 7, 8, 9)], "nothing of before is left"
    assert load_json(RuleFile, folders / "out" / NAME).postprocessing.cases == 7
    rows = Status(folders / "out", STATUS).rows
    assert [case for case, row in rows.items() if row.status == "failed"] == ["case1", "case3"]


def test_files_that_the_verb_did_not_make_are_left_alone(folders, capsys):
    keep = RuleFile(
        labels=Labels.from_dataset(DATASET["labels"]),
        postprocessing=PostProcessing(cases=8, steps=(Step(kind="largest", members=(1, 2)),)),
    )
    save_json(keep, folders / "rule.json")
    out = folders / "out"
    out.mkdir()
    (out / "case9.nii.gz").write_bytes(b"by hand")
    with pytest.raises(AutosegError, match=r"holds 1 files .*postprocess\.csv does not name.*: case9\.nii\.gz; give"):
        run(folders, truth=folders / "truth")
    assert "measure components" not in "".join(capsys.readouterr()), "refused before the search"
    (out / "case9.nii.gz").rename(out / "case9_by_hand.nii.gz")
    (out / NAME).write_text("{}")
    with pytest.raises(AutosegError, match=r"postprocessing\.json would be overwritten and is none of ours"):
        run(folders, rule=folders / "rule.json")
    assert sorted(path.name for path in out.iterdir()) == ["case9_by_hand.nii.gz", NAME]
    (out / NAME).unlink()
    for _ in range(2):
        run(folders, rule=folders / "rule.json")
        assert (out / "case9_by_hand.nii.gz").read_bytes() == b"by hand"
        assert len(list(out.iterdir())) == 11 + 3, "the cases, the one by hand, the rule and the list"


def test_what_cannot_be_meant_is_refused(folders):
    for options in ({}, {"truth": folders / "truth", "rule": folders / "x.json"}):
        with pytest.raises(AutosegError, match="--truth FOLDER"):
            run(folders, **options)
    for place in ("pred", "truth"):
        with pytest.raises(AutosegError, match="give another folder"):
            postprocess(Workspace(folders), folders / "pred", folders / place, truth=folders / "truth")
    with pytest.raises(AutosegError, match="files of one case share one name"):
        (folders / "none").mkdir()
        write_labels(np.ones((2, 3, 4), np.uint8), grid(shape=(2, 3, 4)), folders / "none" / "x.nii.gz")
        run(folders, truth=folders / "none")
    with pytest.raises(AutosegError, match="does not exist"):
        run(folders, rule=folders / "missing.json")


def test_the_command_line(folders):
    given = [str(folders / "pred"), "-o", str(folders / "out"), "--truth", str(folders / "truth"), "--workers", "1"]
    done = CliRunner().invoke(app, ["postprocess", *given])
    assert done.exit_code == 0 and "kept" in done.output
    assert (folders / "out" / "case10.nii.gz").is_file()
