"""Which dataset a person means."""

from pathlib import Path

import pytest

from autoseg.records import AutosegError
from autoseg.workspace import Workspace, given


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


def test_a_dataset_that_lies_elsewhere_is_remembered(tmp_path):
    elsewhere = tmp_path / "my data" / "Dataset007_Balls"
    elsewhere.mkdir(parents=True)
    (elsewhere / "dataset.json").write_text("{}")
    place = Workspace(tmp_path / "root")
    place.remember("Dataset007_Balls", elsewhere)
    assert place.dataset("7") == place.dataset("Dataset007_Balls") == ("Dataset007_Balls", elsewhere)
    inside = place.raw("Dataset007_Balls")
    inside.mkdir(parents=True)  # what is put into the workspace later is what its name means
    assert place.dataset("7") == ("Dataset007_Balls", inside)
    assert place.prepared_from("Dataset007_Balls") == elsewhere
    place.remember("Dataset007_Balls", inside)
    assert place.prepared_from("Dataset007_Balls") == inside


def test_a_folder_in_which_nothing_was_prepared_is_no_dataset(tmp_path):
    place = Workspace(tmp_path)
    place.prepared("Dataset007_Balls").mkdir(parents=True)
    assert place.datasets() == {}
    (place.prepared("Dataset007_Balls") / "fingerprint.json").touch()
    assert place.datasets() == {"Dataset007_Balls": place.raw("Dataset007_Balls")}


def test_a_dataset_of_the_workspace_needs_no_note(place):
    place.remember("Dataset001_Liver", place.raw("Dataset001_Liver"))
    assert not place.prepared("Dataset001_Liver").exists()


def test_commands_are_written_for_a_shell(monkeypatch, tmp_path):
    monkeypatch.setenv("AUTOSEG_HOME", str(tmp_path))
    command = Workspace.find(Path("my data")).command("train", "/a b/D", "2d", "0", *given("--run", "x y"))
    assert command == "autoseg train '/a b/D' 2d 0 --run 'x y' --workspace 'my data'"
    assert Workspace.find(None).command("info", *given("--plan", "default")) == "autoseg info"


@pytest.mark.parametrize(
    "name", ["", ".", "../evil", "a/b", "a\\b", ".x", "x.", "x ", "-x", "nul", "CON.txt", "a*", "é:"]
)
def test_names_that_are_no_folder_everywhere_are_refused(tmp_path, name):
    place = Workspace(tmp_path)
    with pytest.raises(AutosegError, match=r"--plan .* letters, digits"):
        place.plan_folder("D", name)
    with pytest.raises(AutosegError, match="--run"):
        place.fold("D", name, "2d", 0)


@pytest.mark.parametrize("name", ["default", "lr=0.01", "2d x", "v1.2", "console", "à_1", "x"])
def test_ordinary_names_are_not(tmp_path, name):
    assert Workspace(tmp_path).plan_folder("D", name).name == name
