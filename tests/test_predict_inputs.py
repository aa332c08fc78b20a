"""What predict finds in the folders that it is given: images that are none, and files of others in its way."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
from test_going_on import CASES, again, labels, stamps, status, write_input
from test_predict import finished_run
from toys import grid

import autoseg
from autoseg.readers import write_image
from autoseg.records import AutosegError, load_json, save_json
from autoseg.schema import Run
from autoseg.volume import Grid


def test_files_that_are_not_ours_are_refused_before_anything_is_done(tmp_path):
    finished_run(tmp_path / "m" / "fold_0")
    for number, case in enumerate(CASES[:3]):
        write_input(tmp_path, case, number)
    truth = tmp_path / "out" / "c1.nii.gz"
    truth.parent.mkdir()
    truth.write_bytes(b"drawn by hand")
    (tmp_path / "out" / "c2_probabilities.nii.gz").write_bytes(b"of another model")
    (tmp_path / "out" / "c9.nii.gz").write_bytes(b"in nobody's way")
    with pytest.raises(
        AutosegError, match=r"holds 1 files .* none of our predictions .*: c1\.nii\.gz; give another -o"
    ):
        again(tmp_path)
    with pytest.raises(AutosegError, match=r"holds 2 files .*: c1\.nii\.gz, c2_probabilities\.nii\.gz; "):
        again(tmp_path, save_probabilities=True)
    assert truth.read_bytes() == b"drawn by hand"
    assert len(labels(tmp_path / "out")) == 3 and not (tmp_path / "out" / "status.csv").exists()
    truth.unlink()
    again(tmp_path)
    assert (tmp_path / "out" / "c9.nii.gz").read_bytes() == b"in nobody's way"
    # The list alone says whose they are.
    write_input(tmp_path, "c1", 7)
    (tmp_path / "out" / "status.csv").unlink()
    with pytest.raises(AutosegError, match=r"holds 3 files"):
        again(tmp_path)


def test_a_file_whose_command_was_killed_before_its_line_was_done_is_ours(tmp_path, monkeypatch):
    import autoseg.pipeline.predict as module

    class Killed(BaseException):
        pass

    def die(logits, trace, model, path, rule=None, probabilities=False):
        real(logits, trace, model, path, rule, probabilities)
        raise Killed

    real = module.export
    finished_run(tmp_path / "m" / "fold_0")
    write_input(tmp_path, "c0", 0)
    monkeypatch.setattr(module, "export", die)
    with pytest.raises(Killed):
        again(tmp_path)
    assert (tmp_path / "out" / "c0.nii.gz").is_file()
    assert (status(tmp_path)["c0"]["status"], status(tmp_path)["c0"]["file"]) == ("begun", "c0.nii.gz")
    monkeypatch.setattr(module, "export", real)
    again(tmp_path)
    assert status(tmp_path)["c0"]["status"] == "done"


def test_a_file_that_could_be_written_in_part_alone_is_taken_back(tmp_path, monkeypatch):
    import autoseg.pipeline.predict as module

    def fail(array, stored, path):
        raise OSError("the disk is full")

    finished_run(tmp_path / "m" / "fold_0")
    write_input(tmp_path, "c0", 0)
    monkeypatch.setattr(module, "write_image", fail)
    with pytest.raises(AutosegError, match="c0: OSError: the disk is full"):
        again(tmp_path, save_probabilities=True)
    assert labels(tmp_path / "out") == {}


def test_bad_files_harm_only_themselves(tmp_path, capsys):
    """A missing channel, a file without number, one of another kind: three lines; two cases are predicted."""
    finished_run(tmp_path / "m" / "fold_0", channels=("T1", "T2"))
    for number, case in enumerate(CASES[:3]):
        write_input(tmp_path, case, number)
        shutil.copy(tmp_path / "in" / f"{case}_0000.nii.gz", tmp_path / "in" / f"{case}_0001.nii.gz")
    lost = (tmp_path / "in" / "c1_0001.nii.gz").rename(tmp_path / "kept.nii.gz")
    shutil.copy(tmp_path / "in" / "c0_0000.nii.gz", tmp_path / "in" / "notes.nii.gz")
    (tmp_path / "in" / "c0_0000.png").write_bytes(b"a thumbnail")
    for name in ("dataset.json", "status.csv", ".DS_Store", "._c0_0000.nii.gz", "c0.json", "readme.txt"):
        (tmp_path / "in" / name).write_text("{}")
    with pytest.raises(AutosegError) as caught:
        again(tmp_path)
    assert str(caught.value).splitlines() == [
        "predict failed for 3 of 5 cases:",
        "  c0_0000.png: of another kind (.png) than most images there (.nii.gz); put it into another folder",
        "  c1: missing c1_0001.nii.gz in in; the model reads T1, T2, a file each or all in one; give just these",
        "  notes.nii.gz: no channel number in its name, in in; rename it to notes_0000.nii.gz, or remove it",
    ]
    assert "Predicted: 2 of 5 cases" in capsys.readouterr().out
    rows = status(tmp_path)
    assert {case: row["status"] for case, row in rows.items()} == {
        "c0": "done",
        "c0_0000.png": "failed",
        "c1": "failed",
        "c2": "done",
        "notes.nii.gz": "failed",
    }
    assert rows["c1"]["reason"].startswith("missing c1_0001.nii.gz in in; the model reads T1, T2")
    before = stamps(tmp_path / "out")
    # What is mended is predicted, and a file that is gone leaves no line.
    lost.rename(tmp_path / "in" / "c1_0001.nii.gz")
    (tmp_path / "in" / "notes.nii.gz").unlink()
    (tmp_path / "in" / "c0_0000.png").unlink()
    assert len(again(tmp_path)) == 3
    assert {row["status"] for row in status(tmp_path).values()} == {"done"} and len(status(tmp_path)) == 3
    assert {name for name, stamp in stamps(tmp_path / "out").items() if stamp != before.get(name)} == {"c1.nii.gz"}


def test_a_link_whose_file_was_not_fetched_is_a_case_that_failed(tmp_path):
    finished_run(tmp_path / "m" / "fold_0")
    write_input(tmp_path, "c0", 0)
    (tmp_path / "in" / "c1_0000.nii.gz").symlink_to("/nowhere/c1")
    with pytest.raises(AutosegError, match=r"c1_0000\.nii\.gz is a link to /nowhere/c1, which is not there; fetch it"):
        again(tmp_path)
    assert {case: row["status"] for case, row in status(tmp_path).items()} == {"c0": "done", "c1": "failed"}
    (tmp_path / "in" / "c1_0000.nii.gz").unlink()
    write_input(tmp_path, "c1", 1)
    assert len(again(tmp_path)) == 2


def test_images_of_another_scale_than_those_of_training_are_named_in_one_line(tmp_path, capsys):
    """Axes of the model's images are 8 mm long on average; one case is in metres, one in centimetres."""
    finished_run(tmp_path / "m" / "fold_0")
    for case, unit in (("c0", 1.0), ("cm", 0.1), ("m", 0.001)):
        image = np.random.default_rng(0).normal(100, 20, (4, 6, 8)).astype(np.float32)
        spacing = tuple(unit * side for side in (2.0, 1.3, 1.1))
        write_image(image, grid(image.shape, spacing_mm=spacing), tmp_path / "in" / f"{case}_0000.nii.gz")
    again(tmp_path)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("warning"))
    assert line == (
        "warning: 2 of 3 cases have another scale than those of training: cm, m (voxels of 0.142 mm a side and an "
        "extent of 0.819 mm, in training 1.42 mm and 8.19 mm); look at the header: metres or centimetres for "
        "millimetres?"
    )


def test_a_folder_in_which_nothing_matches_is_refused_with_the_reason(tmp_path):
    finished_run(tmp_path / "m" / "fold_0")
    write_input(tmp_path, "c0", 0)
    (tmp_path / "in" / "c0_0000.nii.gz").rename(tmp_path / "in" / "scan.nii.gz")
    with pytest.raises(AutosegError, match=r"set of cases:\n  scan\.nii\.gz: no channel number in its name"):
        again(tmp_path)
    assert not (tmp_path / "out").exists()


def test_images_of_other_channels_are_told_what_the_model_reads(tmp_path):
    made = finished_run(tmp_path / "m" / "fold_0")
    write_image(np.ones((3, 7, 9, 11), np.float32), grid((7, 9, 11)), tmp_path / "in" / "c0_0000.nii.gz")
    said = "3 channels or time points, expected are 1; the model reads MR, a file each or all in one; give just these"
    with pytest.raises(AutosegError, match=said):
        again(tmp_path)
    with pytest.raises(AutosegError, match=said):
        autoseg.load(made, device="cpu").predict(tmp_path / "in" / "c0_0000.nii.gz")


def test_results_take_the_ending_of_their_image_in_small_letters(tmp_path):
    finished_run(tmp_path / "m" / "fold_0")
    write_input(tmp_path, "c0", 0)
    (tmp_path / "in" / "c0_0000.nii.gz").rename(tmp_path / "in" / "c0_0000.NII.GZ")
    again(tmp_path)
    assert list(labels(tmp_path / "out")) == ["c0.nii.gz"] == [status(tmp_path)["c0"]["file"]]


def test_predictions_beside_their_images_are_no_images(tmp_path):
    finished_run(tmp_path / "m" / "fold_0")
    write_input(tmp_path, "c0", 0)
    again(tmp_path, "in", save_probabilities=True)
    before = stamps(tmp_path / "in")
    assert len(again(tmp_path, "in", save_probabilities=True)) == 1
    assert stamps(tmp_path / "in") == before and len(before) == 3


def test_images_of_another_dimension_or_without_numbers_are_named(tmp_path, capsys):
    """A volume network refuses a single slice; networks of slices take it, and say so."""
    flat = Grid(shape=(1, 9, 11), spacing_mm=(1.0, 1.3, 1.1), dimension=2)
    image = np.random.default_rng(0).normal(100, 20, (7, 9, 11)).astype(np.float32)
    write_image(image[:1], flat, tmp_path / "in" / "flat_0000.nii.gz")
    write_image(image, grid(image.shape), tmp_path / "in" / "whole_0000.nii.gz")
    image[3, 4, 5] = np.nan
    write_image(image, grid(image.shape), tmp_path / "in" / "nan_0000.nii.gz")
    bad = r"  nan: channel MR has 1 voxels that are NaN or infinite; replace them, for example by 0, in the file"
    made = finished_run(tmp_path / "m" / "fold_0")
    with pytest.raises(
        AutosegError, match=rf"2 of 3 cases:\n  flat: this is a 2D image, and 3d_fullres sees .*\n{bad}"
    ):
        again(tmp_path)
    # A plan of volumes with a network of slices; then one of 2D images.
    finished_run(made, dimension=2)
    capsys.readouterr()
    with pytest.raises(AutosegError, match=rf"1 of 3 cases:\n{bad}"):
        again(tmp_path)
    assert "flat is a 2D image, and the model knows volumes: it is taken for a single slice" in capsys.readouterr().out
    run = load_json(Run, made / "run.json")
    save_json(replace(run, plan=replace(run.plan, dimension=2)), made / "run.json")
    with pytest.raises(AutosegError, match=rf"1 of 3 cases:\n{bad}"):
        again(tmp_path)
    said = capsys.readouterr().out
    assert "whole is a 3D image, and the model knows 2D images: each slice is segmented for itself" in said
    assert "flat is" not in said


def test_an_image_that_says_no_size_is_named_where_the_model_was_made_for_another(tmp_path, capsys):
    finished_run(tmp_path / "m" / "fold_0", dimension=2)
    flat = Grid(shape=(1, 9, 11), spacing_mm=(1.0, 1.0, 1.0), dimension=2)
    for case in ("a", "b"):
        pixels = np.random.default_rng(0).integers(0, 255, (1, 9, 11), np.uint8)
        write_image(pixels, flat, tmp_path / "in" / f"{case}_0000.png")
    (tmp_path / "in" / "b.json").write_text('{"spacing": [1.0, 1.0]}')
    again(tmp_path)
    said = capsys.readouterr().out
    assert "a does not say its voxel size: 1 mm is taken, and the model was made for 1.3 x 1.1 mm; put" in said
    assert "b does not say" not in said


def test_loaded_in_python_the_same_is_refused_or_said(tmp_path):
    made = finished_run(tmp_path / "fold_0")
    image = np.random.default_rng(0).normal(100, 20, (7, 9, 11)).astype(np.float32)
    flat = sitk.GetImageFromArray(image[0])
    with pytest.raises(AutosegError, match="this is a 2D image, and 3d_fullres sees volumes"):
        autoseg.load(made, device="cpu").predict(flat)
    image[0, 0, :2] = np.inf, np.nan
    with pytest.raises(AutosegError, match="channel MR has 2 voxels that are NaN or infinite"):
        autoseg.load(made, device="cpu").predict(image, spacing=(2.0, 1.0, 1.0))
    finished_run(made, dimension=2)
    with pytest.warns(UserWarning, match="channel_0 is a 2D image, and the model knows volumes"):
        assert autoseg.load(made, device="cpu").predict(flat).labels.shape == (9, 11)
