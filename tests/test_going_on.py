"""Prediction and preprocessing that are cut short, by one bad case or by kill -9, and the same command again."""

import csv
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from test_pipeline import NAME, PLAN, tree
from test_predict import finished_run
from toys import TINY, balls_dataset, grid

from autoseg.bundle import ModelCard
from autoseg.model import CARD, weights_hash
from autoseg.pipeline.data import plan_and_preprocess
from autoseg.pipeline.predict import PredictOptions, predict
from autoseg.postprocess import PostProcessing, Step
from autoseg.readers import write_image
from autoseg.records import AutosegError, remove_leftovers, save_json, sole_writer
from autoseg.workspace import Workspace

CASES = [f"c{number}" for number in range(10)]
BEGIN = """
import os, signal, sys, threading, time
from autoseg import cli

def die(number=None):
    os.kill(number or os.getpid(), signal.SIGKILL)
    time.sleep(60)

def main(change):
    # What is changed is imported after the fork, as in use.
    real = cli.run
    cli.run = lambda: (change(), real())
    cli.main()
"""


@pytest.fixture
def place(tmp_path):
    """Ten small images, and a model with random weights."""
    finished_run(tmp_path / "m" / "fold_0")
    for number, case in enumerate(CASES):
        write_input(tmp_path, case, number)
    return tmp_path


def write_input(place, case, seed, ending=".nii.gz"):
    image = np.random.default_rng(seed).normal(100, 20, (7, 9 + seed % 3, 11)).astype(np.float32)
    write_image(image, grid(image.shape), place / "in" / f"{case}_0000{ending}")


def options(place, **more):
    return PredictOptions(model=place / "m", mirror=False, device="cpu", **more)


def again(place, out="out", **more):
    return predict(Workspace(place), place / "in", place / out, options(place, **more))


def status(place, out="out"):
    with (place / out / "status.csv").open(newline="") as file:
        return {row["case"]: row for row in csv.DictReader(file)}


def labels(folder):
    """Name -> bytes of everything but the list, hidden things included."""
    return {name: content for name, content in tree(folder).items() if name != "status.csv"}


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.nii.gz")}


def add_rule(place):
    """Say that cross-validation chose to keep the largest component only."""
    card = ModelCard(
        dataset="Dataset001_Toy",
        configuration="3d_fullres",
        folds={"fold_0": weights_hash(place / "m" / "fold_0")},
        cases=4,
        dice={},
        dice_postprocessed={},
        postprocessing=PostProcessing(cases=4, steps=(Step(members=(1, 2), dice_before=0.5, dice_after=0.6),)),
    )
    save_json(card, place / "m" / CARD)


def truncate(place, case):
    path = place / "in" / f"{case}_0000.nii.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path, whole


def command(change, *words, cwd):
    """The verb in a process of its own, with parts of the program exchanged by `change`."""
    return subprocess.run(
        [sys.executable, "-P", "-c", f"{BEGIN}\n{change}\nmain(change)", *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


def predict_command(change, place, *more):
    words = ("predict", "-i", place / "in", "-o", place / "out", "-m", place / "m", "--no-tta", "--device", "cpu")
    return command(change, *words, *more, cwd=place)


def test_one_truncated_image_among_ten_gives_nine_files_one_reason_and_a_second_run_only_what_was_repaired(
    place, capsys
):
    path, whole = truncate(place, "c4")
    with pytest.raises(AutosegError, match=r"predict failed for 1 of 10 cases:\n  c4: .*truncated"):
        again(place)
    good = [case for case in CASES if case != "c4"]
    assert sorted(labels(place / "out")) == [f"{case}.nii.gz" for case in good]
    rows = status(place)
    assert {case: row["status"] for case, row in rows.items()} == dict.fromkeys(good, "done") | {"c4": "failed"}
    assert "c4_0000.nii.gz is truncated or damaged" in rows["c4"]["reason"]
    assert (rows["c4"]["file"], rows["c3"]["file"], rows["c3"]["reason"]) == ("", "c3.nii.gz", "")
    assert all(float(row["seconds"]) >= 0 for row in rows.values())
    assert len({row["key"] for row in rows.values()}) == 10

    before = stamps(place / "out"), (place / "out" / "status.csv").read_bytes()
    capsys.readouterr()
    with pytest.raises(AutosegError, match=r"1 of 10 cases:\n  c4: .*truncated"):
        again(place)
    said = capsys.readouterr().out
    assert "9 of 10 cases are predicted already" in said
    assert "1 of 10 cases failed before" in said
    assert "--retry-failed" in said
    assert (stamps(place / "out"), (place / "out" / "status.csv").read_bytes()) == before

    path.write_bytes(whole)
    assert [outcome.value.name for outcome in again(place)] == [f"{case}.nii.gz" for case in CASES]
    after = stamps(place / "out")
    assert {name for name in after if after[name] != before[0].get(name)} == {"c4.nii.gz"}
    assert {row["status"] for row in status(place).values()} == {"done"}
    assert "c4" not in capsys.readouterr().err


def test_what_failed_is_tried_again_only_when_asked(place, monkeypatch):
    import autoseg.pipeline.predict as module

    def fail(paths, **more):
        if "c7_" in paths[0].name:
            raise OSError("the disk says no")
        return real(paths, **more)

    real = module.read_image
    monkeypatch.setattr(module, "read_image", fail)
    with pytest.raises(AutosegError, match="c7: OSError: the disk says no"):
        again(place)
    monkeypatch.setattr(module, "read_image", real)
    with pytest.raises(AutosegError, match="c7: OSError: the disk says no"):
        again(place)
    before = stamps(place / "out")
    assert len(again(place, retry_failed=True)) == 10
    after = stamps(place / "out")
    assert after.pop("c7.nii.gz")
    assert after == before


def test_no_case_at_all_is_an_error_and_leaves_no_list(tmp_path):
    finished_run(tmp_path / "m" / "fold_0")
    (tmp_path / "in").mkdir()
    with pytest.raises(AutosegError, match="no file ends in"):
        again(tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["image", "weights", "step", "rule", "removed", "list"])
def test_a_change_of_what_decides_the_voxels_is_noticed(tmp_path, change):
    finished_run(tmp_path / "m" / "fold_0")
    for number, case in enumerate(CASES[:3]):
        write_input(tmp_path, case, number)
    again(tmp_path)
    before, rows = stamps(tmp_path / "out"), status(tmp_path)
    more = {}
    if change == "image":
        write_input(tmp_path, "c1", seed=30)
    elif change == "weights":
        finished_run(tmp_path / "m" / "fold_0", seed=1)
    elif change == "step":
        more = {"step": 0.7}
    elif change == "rule":
        add_rule(tmp_path)
    elif change == "removed":
        (tmp_path / "out" / "c1.nii.gz").unlink()
    else:
        (tmp_path / "out" / "status.csv").unlink()
        with pytest.raises(AutosegError, match="holds 3 files that would be overwritten"):
            again(tmp_path)
        for case in CASES[:3]:
            (tmp_path / "out" / f"{case}.nii.gz").unlink()
    again(tmp_path, **more)
    anew = {name for name, stamp in stamps(tmp_path / "out").items() if stamp != before.get(name)}
    assert anew == ({"c1.nii.gz"} if change in ("image", "removed") else {f"{case}.nii.gz" for case in CASES[:3]})
    keys = {case: row["key"] for case, row in status(tmp_path).items()}
    changed = {case for case in keys if keys[case] != rows[case]["key"]}
    assert changed == {"image": {"c1"}, "removed": set(), "list": set()}.get(change, set(CASES[:3]))


def test_what_decides_no_voxel_is_no_reason_to_predict_again(tmp_path):
    finished_run(tmp_path / "m" / "fold_0")
    write_input(tmp_path, "c0", 0)
    again(tmp_path, save_probabilities=True)
    before = stamps(tmp_path / "out")
    os.utime(tmp_path / "in" / "c0_0000.nii.gz", (0, 0))
    os.utime(tmp_path / "m" / "fold_0" / "weights.safetensors", (0, 0))
    again(tmp_path)
    assert stamps(tmp_path / "out") == before
    # Probabilities that are asked for and not there are.
    (tmp_path / "out" / "c0_probabilities.nii.gz").unlink()
    again(tmp_path, save_probabilities=True)
    assert all(stamp > before[name] for name, stamp in stamps(tmp_path / "out").items())
    assert len(stamps(tmp_path / "out")) == 2


def test_no_file_of_another_image_or_model_stays_beside_a_new_line(tmp_path):
    finished_run(tmp_path / "m" / "fold_0")
    write_input(tmp_path, "c0", 0)
    write_input(tmp_path, "c1", 1)
    again(tmp_path, save_probabilities=True)
    truncate(tmp_path, "c1")
    with pytest.raises(AutosegError, match="1 of 2"):
        again(tmp_path)
    assert sorted(labels(tmp_path / "out")) == ["c0.nii.gz", "c0_probabilities.nii.gz"]
    (tmp_path / "in" / "c0_0000.nii.gz").unlink()
    (tmp_path / "in" / "c1_0000.nii.gz").unlink()
    write_input(tmp_path, "c0", 0, ".nrrd")
    again(tmp_path)
    assert sorted(labels(tmp_path / "out")) == ["c0.nrrd"]
    assert {case: row["status"] for case, row in status(tmp_path).items()} == {"c0": "done", "c1": "failed"}


def test_a_list_that_is_none_is_not_written_over(tmp_path):
    finished_run(tmp_path / "m" / "fold_0")
    write_input(tmp_path, "c0", 0)
    (tmp_path / "out").mkdir()
    for text in (
        "patient,state\n1,well\n",
        "case,status,reason\nc0,done\n",
        "case,status,reason,seconds,file,key\na,b\n",
    ):
        (tmp_path / "out" / "status.csv").write_text(text)
        with pytest.raises(AutosegError, match=r"first line must be case,status,reason.*Delete it"):
            again(tmp_path)
        assert (tmp_path / "out" / "status.csv").read_text() == text


def test_prediction_killed_while_a_file_is_written_goes_on_from_there(place):
    """kill -9 of the whole command when half of c5 is written; then the same command, and one that was let be."""
    killed = predict_command(
        """
def change():
    import autoseg.readers.itk as itk
    real = itk.sitk.WriteImage
    def write(image, path, **more):
        real(image, path, **more)
        if ".c5.nii.gz." in path:
            os.truncate(path, os.path.getsize(path) // 2)
            die(os.getppid())
    itk.sitk.WriteImage = write
""",
        place,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = sorted(path.name for path in (place / "out").iterdir())
    assert [name for name in left if not name.startswith(".")] == [f"{c}.nii.gz" for c in CASES[:5]] + ["status.csv"]
    assert any(name.startswith(".c5.nii.gz.") for name in left)
    before = stamps(place / "out")

    assert len(again(place)) == 10
    assert stamps(place / "out").items() >= before.items()
    again(place, "whole")
    assert labels(place / "out") == labels(place / "whole")
    assert sorted(path.name for path in (place / "out").iterdir()) == [f"{c}.nii.gz" for c in CASES] + ["status.csv"]
    columns = ("case", "status", "reason", "file", "key")
    assert [[row[c] for c in columns] for row in status(place).values()] == [
        [row[c] for c in columns] for row in status(place, "whole").values()
    ]


def test_a_case_that_has_prediction_killed_is_reported_and_the_others_are_predicted(place):
    """c6 dies while it is read and c5 computed: both are tried alone, c5 is done, c6 named with stage and memory."""
    done = predict_command(
        """
def change():
    import autoseg.pipeline.predict as predict
    from autoseg.supervise import JOURNAL
    computing = threading.Event()
    real_read, real_logits = predict.read_image, predict.Model.logits
    def read(paths, **more):
        if "c6_" in paths[0].name:
            JOURNAL.suspects or computing.wait()
            die()
        return real_read(paths, **more)
    def logits(model, case, **more):
        if case.case == "c5" and not JOURNAL.suspects:
            computing.set()
            time.sleep(60)
        return real_logits(model, case, **more)
    predict.read_image, predict.Model.logits = read, logits
""",
        place,
    )
    assert done.returncode == 1, done.stderr
    assert "c5 (predict: computing)" in done.stderr
    assert "c6 (predict: reading)" in done.stderr
    assert "going on with each of them alone" in done.stderr
    assert "going on without c6" in done.stderr
    assert done.stderr.rstrip().splitlines()[-2] == "error: predict failed for 1 of 10 cases:"
    good = [case for case in CASES if case != "c6"]
    assert sorted(labels(place / "out")) == [f"{case}.nii.gz" for case in good]
    row = status(place)["c6"]
    assert row["status"] == "failed"
    assert row["key"]
    for words in ("SIGKILL", "memory runs out", "GiB at its peak", "(reading)"):
        assert words in row["reason"]
    # Not tried again unasked: nothing kills this process.
    with pytest.raises(AutosegError, match="c6: the process died of SIGKILL"):
        again(place)
    again(place, retry_failed=True)
    again(place, "whole")
    assert labels(place / "out") == labels(place / "whole")


QUICK = replace(PLAN, workers=1, configurations=("3d_fullres",))


def make_raw(root):
    raw = root / "raw" / NAME
    balls_dataset(raw, cases=4, prefix="p")
    return Workspace(root)


KILLS = {
    "half an array": """
    real = store._write_array
    def write(array, path, patch):
        real(array, path, patch)
        if ".p2." in str(path) and path.name == "labels.b2nd":
            os.truncate(path, os.path.getsize(path) // 2)
            die(os.getppid())
    store._write_array = write
""",
    "before the rename": """
    real = store.Path.rename
    def rename(path, target):
        if path.name == ".p2.new":
            die(os.getppid())
        return real(path, target)
    store.Path.rename = rename
""",
    "after the rename": """
    real = store.shutil.rmtree
    def rmtree(path, **more):
        if path.name == ".p2.new" and path.parent.joinpath("p2").exists():
            path.parent.joinpath(".p2.old").mkdir()
            die(os.getppid())
        real(path, **more)
    store.shutil.rmtree = rmtree
""",
    "while the plan is saved": """
    import autoseg.records as records
    real = records.os.replace
    def replace(old, new):
        if new.name == "plan.json":
            die(os.getppid())
        real(old, new)
    records.os.replace = replace
""",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an uninterrupted preprocessing makes."""
    place = make_raw(tmp_path_factory.mktemp("whole"))
    plan_and_preprocess(place, "7", QUICK)
    return tree(place.prepared(NAME))


@pytest.mark.parametrize("kill", KILLS)
def test_preprocessing_that_was_killed_goes_on_from_there(tmp_path, whole, kill, capsys):
    place = make_raw(tmp_path)
    words = [word for field, value in TINY.changes.items() for word in ("--set", f"{field}={value}")]
    killed = command(
        f"def change():\n    import autoseg.store as store{KILLS[kill]}",
        *("plan_and_preprocess", "-d", "7", "-c", "3d_fullres", "--workers", "1", "--workspace", tmp_path, *words),
        cwd=tmp_path,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    there = tree(place.prepared(NAME))
    hidden = {name for name in there if any(part.startswith(".") for part in name.split("/"))}
    # What stands under its final name is whole, and half of it is there.
    assert there.items() - {(name, there[name]) for name in hidden} <= whole.items()
    if kill != "while the plan is saved":
        assert sum(name.endswith("case.json") for name in there.keys() - hidden) >= 2
    before = {path: path.stat().st_mtime_ns for path in place.prepared(NAME).rglob("p[01]/*")}

    plan_and_preprocess(place, "7", QUICK)
    said = capsys.readouterr().out
    assert "fingerprint reused" in said
    assert ("cases are prepared already" in said) == (kill != "while the plan is saved")
    assert tree(place.prepared(NAME)) == whole
    assert not [path for path in place.prepared(NAME).rglob(".*")]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_case_that_has_preprocessing_killed_is_named_and_the_others_are_prepared(tmp_path):
    place = make_raw(tmp_path)
    done = command(
        """
def change():
    import autoseg.pipeline.preparing as preparing
    real = preparing.write_case
    def write(folder, ready, *more, **and_more):
        if ready.case == "p1":
            die()
        real(folder, ready, *more, **and_more)
    preparing.write_case = write
""",
        *("plan_and_preprocess", "-d", "7", "-c", "3d_fullres", "--workers", "2", "--workspace", tmp_path),
        cwd=tmp_path,
    )
    assert done.returncode == 1, done.stderr
    assert re.search(r"preprocess failed for 1 of \d cases:\n  p1: the process died of SIGKILL", done.stderr)
    assert "(preprocess)" in done.stderr
    there = {path.name for path in place.cases(NAME, "default", "3d_fullres").iterdir()}
    assert there == {"p0", "p2", "p3"}


def test_only_leftovers_of_our_own_are_removed(tmp_path):
    gone = [".a.nii.gz.ab12_z9x", ".status.csv.k3k3k3k3.tmp"]
    stay = [".a.nii.gz", ".a.nii.gz.backup.tmp", ".b.nii.gz.ab12_z9x", "a.nii.gz.ab12_z9x", ".config.settings", "a.tmp"]
    for name in (gone[0], *stay):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.nii.gz").write_text("half")
    (tmp_path / gone[1]).write_text("half")
    remove_leftovers(tmp_path, ["a.nii.gz", "status.csv"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(stay)


def test_two_commands_never_write_to_one_folder_at_a_time(tmp_path):
    code = (
        "import sys; from pathlib import Path; from autoseg.records import sole_writer\n"
        "with sole_writer(Path('out')):\n    print('in', Path('out/first').exists(), flush=True)"
    )
    with sole_writer(tmp_path / "out"):
        second = subprocess.Popen([sys.executable, "-P", "-c", code], cwd=tmp_path, stdout=-1, stderr=-1, text=True)
        assert "another command is writing to out; waiting" in second.stderr.readline()
        (tmp_path / "out" / "first").touch()
    assert second.communicate()[0] == "in True\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["first"]
