"""What is refused before anything is done, and errors of the system in words."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from toys import balls_dataset, grid
from typer.testing import CliRunner

from autoseg import cli
from autoseg.cases import Case
from autoseg.cli.failures import in_words
from autoseg.cli.options import split_folds
from autoseg.pipeline import predict as predicting
from autoseg.pipeline.recipe import TrainOptions, refuse_without_effect
from autoseg.readers import itk, write_image, write_labels
from autoseg.records import AutosegError, refuse_unwritable, sole_writer
from autoseg.team import LED

RUNNER = CliRunner()


@pytest.fixture
def called(monkeypatch):
    """(sources, options) that the verb predict comes to."""
    seen = []
    monkeypatch.setattr(predicting, "predict", lambda place, sources, target, options: seen.append((sources, options)))
    return seen


@pytest.mark.parametrize(
    "line",
    [
        ["predict", "-i", "a", "-o", "out", "-o", "b"],
        ["predict", "-i", "a", "-o", "out", "--run", "x", "--run=x"],
        ["fit", "-d", "1", "--budget", "1h", "--dataset", "1"],
        ["train", "1", "2d", "0", "--epochs", "3", "--epochs", "3"],
        ["dataset", "make", "vessels", "--seed", "1", "--seed", "2"],
    ],
)
def test_an_option_of_one_value_given_twice_is_refused(line, called):
    refused = RUNNER.invoke(cli.app, line)
    assert refused.exit_code == 2
    assert "is given 2 times, and takes one value" in " ".join(refused.output.split())
    assert not called


def test_options_that_may_be_repeated_still_may_be(called):
    line = ["predict", "-i", "a.nii.gz", "-i", "more", "-o", "out", "-f", "0,1", "-f", "all", "-f", "1", "--no-tta"]
    done = RUNNER.invoke(cli.app, [*line, "--no-tta"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    ((sources, options),) = called
    assert [path.name for path in sources] == ["a.nii.gz", "more"]
    assert options.folds == ("0", "1", "all")
    assert split_folds(None) == ()


def test_cases_of_several_sources_are_put_together_and_one_name_twice_is_refused(tmp_path):
    for name in ("one/a_0000.nii.gz", "one/b_0000.nii.gz", "two/c_0000.nii.gz", "three/b_0000.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    out = tmp_path / "out"
    (one / "b_0000.nrrd").touch()
    found, bad = predicting.gather_cases([one, two / "c_0000.nii.gz", one], 1, out)
    assert [case.id for case in found] == ["a", "b", "c"]
    assert [(place.name, list(unread)) for place, unread in bad.items()] == [
        ("one", ["b_0000.nrrd"]),
        ("c_0000.nii.gz", []),
    ]
    assert predicting.gather_cases([one, one / "b_0000.nii.gz"], 1, out)[0][1:] == [
        Case(id="b", images=(str(one / "b_0000.nii.gz"),))
    ]
    with pytest.raises(AutosegError, match=r"one/b_0000.nii.gz and .*three/b_0000.nii.gz are both called b"):
        predicting.gather_cases([one, three], 1, out)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--epochs", {"epochs": 3}),
        ("--extend", {"extend_seconds": 60.0}),
        ("--set", {"changes": {"seed": 3}}),
        ("--loss", {"loss": "dice"}),
        ("--seed", {"seed": 0}),
    ],
)
def test_validating_alone_takes_no_option_of_training(option, value):
    refuse_without_effect(TrainOptions(run="other", plan="other", device="cpu", changes={}, validate_only=True))
    with pytest.raises(AutosegError, match=f"--validate-only trains nothing, so it takes no {option}"):
        refuse_without_effect(TrainOptions(validate_only=True, **value))


def test_a_file_in_the_place_of_a_folder_is_refused_before_the_work(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "below"):
        with pytest.raises(AutosegError, match="is or lies below a file"):
            refuse_unwritable(folder)
    refuse_unwritable(tmp_path / "new" / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is left behind"
    (tmp_path / "truth").mkdir()
    said = RUNNER.invoke(cli.app, ["evaluate", str(tmp_path / "truth"), str(tmp_path), "-o", str(file)]).exception
    assert "is or lies below a file" in str(said)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no folder that nobody can write to")
def test_a_folder_that_cannot_be_written_is_named():
    for refuse in (refuse_unwritable, lambda folder: sole_writer(folder).__enter__()):
        with pytest.raises(AutosegError, match=r"nothing can be written to /proc/self/nope: .*; give another folder"):
            refuse(Path("/proc/self/nope"))


def test_errors_of_the_system_say_what_where_and_what_to_do(monkeypatch):
    monkeypatch.delenv("AUTOSEG_TRACEBACK", raising=False)
    full = OSError(errno.ENOSPC, "No space left on device")
    assert in_words(full).startswith("No space left on device; the disk is full: free space on it")
    denied = PermissionError(errno.EACCES, "Permission denied", "/data/x")
    assert in_words(denied).startswith("/data/x: Permission denied; change its permissions, or give another path")
    assert "AUTOSEG_TRACEBACK=1" in in_words(denied)
    assert in_words(OSError("a mistake of the program")) is None
    monkeypatch.setenv("AUTOSEG_TRACEBACK", "1")
    assert in_words(denied) is None


@pytest.mark.parametrize("mistake", [False, True])
def test_a_verb_that_meets_one_ends_in_one_line_and_a_mistake_shows_its_place(tmp_path, mistake, monkeypatch, capsys):
    def verb(*args):
        raise KeyError("x") if mistake else IsADirectoryError(errno.EISDIR, "Is a directory", str(tmp_path))

    monkeypatch.delenv("AUTOSEG_TRACEBACK", raising=False)
    monkeypatch.setattr("autoseg.pipeline.share.info", verb)
    monkeypatch.setattr("sys.argv", ["autoseg", "info", "x"])
    with pytest.raises(KeyError if mistake else SystemExit):
        cli.run()
    said = capsys.readouterr().err
    if not mistake:
        assert said.startswith(f"error: {tmp_path}: Is a directory; ")
        assert said.count("\n") == 1


def test_names_that_leave_their_folder_are_refused_before_anything_is_written(tmp_path):
    balls_dataset(tmp_path / "raw" / "Dataset007_Balls", cases=2)
    for line in (["plan_and_preprocess", "-d", "7", "--plan", "../evil"], ["fit", "-d", "7", "--run", "../x"]):
        refused = RUNNER.invoke(cli.app, [*line, "--workspace", str(tmp_path)])
        assert "cannot be the name of a folder" in str(refused.exception)
        assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_verbs_of_cases_are_watched_over_but_for_one_process_of_several(monkeypatch):
    assert LED in cli.ONE_OF_SEVERAL
    ran = []
    monkeypatch.setattr(cli, "supervise", lambda work: ran.append("watched") or 0)
    monkeypatch.setattr(cli, "run", lambda: ran.append("alone"))
    for name in cli.ONE_OF_SEVERAL:
        monkeypatch.delenv(name, raising=False)
    for verb in ("train", "evaluate", "ensemble", "postprocess", "overlay"):
        monkeypatch.setattr("sys.argv", ["autoseg", verb])
        with pytest.raises(SystemExit):
            cli.main()
    assert ran == ["watched"] * 5
    monkeypatch.setattr("sys.argv", ["autoseg", "train"])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    cli.main()
    assert ran[5:] == ["alone"]


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kept", [0, 11, 200])
def test_a_label_file_that_a_full_disk_cut_short_is_no_label_file(tmp_path, monkeypatch, ending, kept):
    labels = np.random.default_rng(0).integers(0, 9, (5, 7, 11)).astype(np.uint8)
    file = tmp_path / f"case{ending}"
    write_labels(labels, grid(), file)
    whole = itk.sitk.WriteImage

    def cut(image, name, **more):
        whole(image, name, **more)
        os.truncate(name, kept)

    monkeypatch.setattr(itk.sitk, "WriteImage", cut)
    before = file.read_bytes()
    with pytest.raises(OSError, match="full disk") as full:
        write_labels(labels, grid(), file)
    assert full.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert file.read_bytes() == before


@pytest.mark.parametrize("shape", [(1, 7, 11), (5, 7, 11), (3, 5, 7, 11)])
def test_whole_nifti_files_of_every_kind_are_written(tmp_path, shape):
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    place = grid(shape[-3:], dimension=2 if shape[0] == 1 else 3)
    for ending in (".nii", ".nii.gz"):
        write_image(image, place, tmp_path / f"x{ending}")
        assert (tmp_path / f"x{ending}").is_file()
