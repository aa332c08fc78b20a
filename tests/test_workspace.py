"""Which dataset a person means."""

from pathlib import Path

import pytest

from autoseg.records import AutosegError
from autoseg.workspace import Workspace


@pytest.fixture
def place(tmp_path):
    for name in ("Dataset001_Liver", "Dataset012_Knee", "my_own"):
        (tmp_path / "raw" / name).mkdir(parents=True)
        (tmp_path / "raw" / name / "dataset.json").write_text("{}")
    return Workspace(tmp_path)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("1", "Dataset001_Liver"),
        ("001", "Dataset001_Liver"),
        ("12", "Dataset012_Knee"),
        ("Dataset012_Knee",) * 2,
        ("my_own",) * 2,
    ],
)
def test_number_or_name(place, text, name):
    assert place.dataset(text) == (name, place.raw(name))


def test_path_of_a_raw_folder_anywhere(place, tmp_path):
    other = tmp_path / "elsewhere" / "Dataset001_Other"
    other.mkdir(parents=True)
    (other / "dataset.json").write_text("{}")
    assert place.dataset(str(other)) == ("Dataset001_Other", other)
    with pytest.raises(AutosegError, match=r"dataset\.json"):
        place.dataset(str(tmp_path / "elsewhere"))


def test_what_is_not_there_lists_what_is(place):
    with pytest.raises(AutosegError, match="Dataset001_Liver, Dataset012_Knee"):
        place.dataset("7")


def test_two_datasets_of_one_number_are_not_guessed_between(place):
    place.raw("Dataset001_Lung").mkdir()
    with pytest.raises(AutosegError, match="ambiguous"):
        place.dataset("1")


def test_root_option_then_environment_then_here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AUTOSEG_HOME", raising=False)
    assert Workspace.find(None).root == tmp_path / "autoseg_data"
    monkeypatch.setenv("AUTOSEG_HOME", str(tmp_path / "home"))
    assert Workspace.find(None).root == tmp_path / "home"
    assert Workspace.find(tmp_path / "given").root == tmp_path / "given"


def test_suggested_commands_name_the_workspace_only_where_an_option_did(monkeypatch, tmp_path):
    monkeypatch.setenv("AUTOSEG_HOME", str(tmp_path))
    assert Workspace.find(None).option == ""
    assert Workspace.find(Path("my data")).option == " --workspace 'my data'"
