"""Records: refused when wrong, whole on disk."""

import os
from dataclasses import FrozenInstanceError, replace

import pytest

from autoseg.records import AutosegError, atomic_write, hash_text, load_json, record, save_json, sync


@record
class Toy:
    name: str
    size: tuple[int, ...] = ()
    weight: float | None = None


def test_round_trip(tmp_path):
    toy = Toy(name="a", size=(5, 7, 11), weight=0.1)
    save_json(toy, tmp_path / "deep" / "toy.json")
    assert load_json(Toy, tmp_path / "deep" / "toy.json") == toy
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["toy.json"]


def test_a_record_is_frozen_and_replace_validates():
    toy = Toy(name="a")
    with pytest.raises(FrozenInstanceError):
        toy.name = "b"
    with pytest.raises(ValueError, match="size"):
        replace(toy, size="wide")


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_undefined_numbers_are_refused(weight):
    with pytest.raises(ValueError, match="finite"):
        Toy(name="a", weight=weight)


def test_a_wrong_file_reports_every_problem_with_its_place(tmp_path):
    (tmp_path / "toy.json").write_text('{"size": [5, "x"], "wait": 1}')
    with pytest.raises(AutosegError) as error:
        load_json(Toy, tmp_path / "toy.json")
    for part in ("toy.json", "name: ", "size.1: ", "wait: ", '"x"'):
        assert part in str(error.value)


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(AutosegError, match="does not exist"):
        load_json(Toy, tmp_path / "toy.json")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write("half of the new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_hash_tells_where_one_text_ends():
    assert hash_text("ab", "c") != hash_text("a", "bc")
    assert hash_text("ab", "c") == hash_text("ab", "c")


def test_windows_syncs_files_through_a_handle_that_may_write_and_no_folders(tmp_path, monkeypatch):
    opened = []
    real = os.open
    file = tmp_path / "a"
    file.touch()
    with monkeypatch.context() as change:
        change.setattr(os, "name", "nt")
        change.setattr(os, "open", lambda path, flags: opened.append((path, flags)) or real(path, flags))
        sync(file)
        sync(tmp_path)
    assert opened == [(file, os.O_RDWR)]
