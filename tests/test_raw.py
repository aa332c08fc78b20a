"""Opening raw datasets in good and broken layouts, and checking their cases."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from autoseg.cases import Case, find_cases
from autoseg.labels import Labels
from autoseg.layout import open_dataset
from autoseg.raw import check_case, check_dataset, findings_table, hash_case, load_case
from autoseg.readers import read_image
from autoseg.records import AutosegError
from autoseg.volume import Grid, Volume

SHAPE = (5, 7, 11)
RNG = np.random.default_rng(0)
DESCRIPTION = {
    "channel_names": {"0": "FLAIR", "1": "T1"},
    "labels": {"background": 0, "liver": 7, "lesion": 1024},
    "file_ending": ".nii.gz",
    "numTraining": 3,
}


def save(path, array, spacing=(0.5, 1.5, 3.0), origin=(0.0, 0.0, 0.0), direction=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    if direction is not None:
        image.SetDirection(np.ravel(direction).tolist())
    sitk.WriteImage(image, str(path))


def describe(folder, **changes):
    content = {key: value for key, value in {**DESCRIPTION, **changes}.items() if value is not None}
    (folder / "dataset.json").write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path):
    """Three cases with two channels each."""
    folder = tmp_path / "Dataset007_Toy"
    for case in ("b", "a", "c_2020"):
        for channel in range(2):
            save(folder / "imagesTr" / f"{case}_{channel:04}.nii.gz", RNG.normal(size=SHAPE).astype(np.float32))
        save(folder / "labelsTr" / f"{case}.nii.gz", RNG.choice([0, 7, 1024], SHAPE).astype(np.int16))
    describe(folder)
    return folder


def refusal(folder):
    with pytest.raises(AutosegError) as caught:
        open_dataset(folder)
    return str(caught.value)


def findings_of(folder, case="a"):
    dataset = open_dataset(folder)
    return load_case(dataset, next(c for c in dataset.cases if c.id == case)).findings


# Good layouts.


def test_an_ending_in_capitals_is_that_of_the_files_and_results_have_small_letters(folder):
    for file in [*folder.glob("*Tr/a*.gz"), *folder.glob("*Tr/b*.gz")]:
        file.rename(file.with_name(file.name.replace(".nii.gz", ".NII.GZ")))
    describe(folder, file_ending=".NII.GZ")
    dataset = open_dataset(folder)
    assert dataset.file_ending == ".nii.gz"
    assert [(len(case.images), bool(case.label)) for case in dataset.cases] == [(2, True)] * 3


def test_a_good_dataset_opens(folder):
    dataset = open_dataset(folder)
    assert (dataset.name, dataset.file_ending) == ("Dataset007_Toy", ".nii.gz")
    assert dataset.channel_names == ("FLAIR", "T1")
    assert dataset.labels == Labels(names=("background", "liver", "lesion"), values=(0, 7, 1024))
    assert [case.id for case in dataset.cases] == ["a", "b", "c_2020"]
    first = dataset.cases[0]
    assert first.images == tuple(str(folder / "imagesTr" / f"a_{n:04}.nii.gz") for n in range(2))
    assert first.label == str(folder / "labelsTr" / "a.nii.gz")
    assert dataset.notes == ()


@pytest.mark.parametrize("channels", [["FLAIR", "T1"], {"1": "T1", "0": "FLAIR"}])
@pytest.mark.parametrize("key", ["channel_names", "modality"])
def test_channels_may_be_named_in_older_ways(folder, key, channels):
    describe(folder, **{"channel_names": None, key: channels})
    assert open_dataset(folder).channel_names == ("FLAIR", "T1")


def test_channels_are_ordered_as_numbers(folder):
    describe(folder, channel_names={str(n): f"c{n}" for n in reversed(range(11))})
    assert "a: missing a_0002.nii.gz, " in refusal(folder)


@pytest.mark.parametrize("absolute", [True, False])
def test_cases_may_be_listed(folder, absolute, monkeypatch):
    shutil.move(folder / "imagesTr", folder / "pictures")
    monkeypatch.setenv("TOY_LABELS", "labelsTr")
    start = f"{folder}/" if absolute else ""
    listing = {
        "y": {
            "images": [f"{start}pictures/b_0000.nii.gz", f"{start}pictures/b_0001.nii.gz"],
            "label": "$TOY_LABELS/b.nii.gz",
        },
        "x": {
            "images": [f"{start}pictures/a_0000.nii.gz", f"{start}pictures/a_0001.nii.gz"],
            "label": "labelsTr/a.nii.gz",
        },
    }
    describe(folder, dataset=listing, numTraining=2)
    dataset = open_dataset(folder)
    assert [case.id for case in dataset.cases] == ["x", "y"]
    assert load_case(dataset, dataset.cases[1]).findings == ()
    listing["x"]["label"] = "labelsTr/z.nii.gz"
    listing["y"]["images"] *= 2
    listing["../z"] = listing["y"]
    describe(folder, dataset=listing)
    assert "x: its entry in `dataset` lists " in refusal(folder)
    assert "which do not exist" in refusal(folder)
    assert "../z: its name in `dataset` cannot be that of a file" in refusal(folder)
    assert "y: its entry in `dataset` lists 4 images for 2 channel_names" in refusal(folder)


def test_one_file_may_hold_all_channels(tmp_path):
    folder = tmp_path / "Dataset008_Rgb"
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    colours = RNG.integers(0, 255, (7, 11, 3), dtype=np.uint8)
    Image.fromarray(colours).save(folder / "imagesTr" / "a_0000.png")
    Image.fromarray((colours[..., 0] > 99).astype(np.uint8)).save(folder / "labelsTr" / "a.png")
    describe(folder, channel_names={"0": "R", "1": "G", "2": "B"}, labels={"background": 0, "x": 1}, file_ending=".png")
    dataset = open_dataset(folder)
    loaded = load_case(dataset, dataset.cases[0])
    assert loaded.findings == ()
    assert loaded.stored.dimension == 2
    np.testing.assert_array_equal(loaded.image.array[:, 0], np.moveaxis(colours, -1, 0))
    np.testing.assert_array_equal(loaded.labels[0], colours[..., 0] > 99)


def test_a_wrong_number_of_cases_is_a_warning(folder):
    describe(folder, numTraining=5)
    (finding,) = check_dataset(open_dataset(folder), {})
    assert finding.severity == "warning"
    assert "numTraining 5, found are 3" in finding.problem


# Broken layouts: each with its cure.


def test_a_missing_description_is_found_nearby(folder):
    assert "give the folder that holds dataset.json" in refusal(folder / "nowhere")
    assert f"there is {folder / 'dataset.json'}" in refusal(folder.parent)
    (folder / "dataset.json").unlink()
    assert "has no dataset.json; it must name channel_names" in refusal(folder)


@pytest.mark.parametrize(("text", "said"), [('{"a": 1,}', "no valid JSON"), ("[1]", "must hold an object")])
def test_a_description_that_is_no_json_object(folder, text, said):
    (folder / "dataset.json").write_text(text)
    assert said in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"channel_names": None, "Channel_Name": {"0": "CT"}},
            "channel_names: missing ('Channel_Name' is not read; rename it)",
        ),
        ({"channel_names": {"1": "CT", "2": "T1"}}, 'keys must be "0", "1", ... without gaps, found \'1\''),
        ({"channel_names": {}}, 'channel_names: must be like {"0": "CT"}'),
        ({"labels": None, "label": {"background": 0}}, "labels: missing ('label' is not read; rename it)"),
        ({"labels": {"0": "background", "1": "liver"}}, 'write {"background": 0, "liver": 1}'),
        ({"labels": ["background", "liver"]}, 'labels: must be like {"background": 0'),
        ({"labels": {"background": 0, "all": [1, "2"]}}, "label 'all' must be an integer or a list of them"),
        ({"labels": {"background": 0, "a": [1, 2], "b": [2, 3]}}, 'add "regions_class_order"'),
        (
            {"labels": {"background": 0, "a": [1, 2], "b": 2}, "regions_class_order": [1]},
            "one integer for each of a, b",
        ),
        ({"labels": {"background": 0, "a": [1, 2], "b": 2}, "regions_class_order": [3, 2]}, "none of its values"),
        ({"labels": {"background": 0, "a": 1, "ignore": 1}}, "ignored and cannot be"),
        ({"labels": {"liver": 1}}, "must name the background"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "labels: a = 1 and b = 1: each must have"),
        ({"file_ending": None}, 'file_ending: missing; add "file_ending": ".nii.gz"'),
        ({"file_ending": "nii.gz"}, 'must begin with a dot; write ".nii.gz"'),
        ({"file_ending": ".jpg"}, "JPEG alters the image"),
        ({"file_ending": ".npz"}, "no reader for this ending; known are .nii.gz"),
        ({"file_ending": ".nii"}, "imagesTr: no file ends in .nii; it holds .nii.gz; correct file_ending"),
        (
            {"channel_names": {"0": "T1"}},
            "a: a_0001.nii.gz in imagesTr, but there are 1 channels; correct the numbers or channel_names",
        ),
    ],
)
def test_faults_of_the_description(folder, changes, said):
    describe(folder, **changes)
    assert said in refusal(folder)


def test_all_faults_of_the_description_come_at_once(folder):
    describe(folder, channel_names=None, labels={"background": 0, "all": "1"}, file_ending="nii")
    said = refusal(folder).splitlines()
    assert len(said) == 4
    assert [line.strip().split()[0].rstrip(":") for line in said[1:]] == ["channel_names", "label", "file_ending"]


def test_regions_and_an_order_that_loses_some(folder):
    describe(folder, labels={"background": 0, "lesion": 1024, "all": [7, 1024]})
    dataset = open_dataset(folder)
    assert dataset.labels.names == ("background", "all", "lesion")
    assert dataset.notes == ()
    describe(folder, labels={"background": 0, "lesion": 1024, "all": [7, 1024]}, regions_class_order=[1024, 7])
    dataset = open_dataset(folder)
    assert dataset.labels.names == ("background", "lesion", "all")
    assert "lesion, all is written as 7" in dataset.notes[0]


def test_what_was_annotated_in_which_case(folder):
    first = [hash_case(open_dataset(folder), case) for case in open_dataset(folder).cases]
    describe(folder, annotated={"a": ["lesion"], "b": ["lesion", "liver"]})
    dataset = open_dataset(folder)
    assert [case.annotated for case in dataset.cases] == [("lesion",), None, None]
    assert dataset.annotated() == {"a": ("lesion",)}
    assert [hash_case(dataset, case) == old for case, old in zip(dataset.cases, first)] == [False, True, True]
    (found,) = load_case(dataset, dataset.cases[0]).findings
    assert found.severity == "error"
    assert "label values 7, of classes that are not listed as annotated" in found.problem


@pytest.mark.parametrize(
    ("annotated", "said"),
    [
        (["a"], 'must be like {"case_1": ["liver"]}'),
        ({"a": []}, "annotated: a must list one or more of liver, lesion, found []"),
        ({"a": "liver"}, 'found "liver"'),
        ({"a": [["liver"]]}, 'found [["liver"]]'),
        ({"a": ["Liver"]}, 'found ["Liver"]'),
        ({"x": ["liver"]}, "annotated: x without images"),
        ({key: ["liver"] for key in ("a", "b", "c_2020")}, "annotated: no case has lesion"),
    ],
)
def test_faults_of_what_was_annotated(folder, annotated, said):
    describe(folder, annotated=annotated)
    assert said in refusal(folder)


def test_a_case_of_ignored_voxels_alone():
    made = Labels.from_dataset({"background": 0, "x": 1, "ignore": 4})
    place = Grid(shape=SHAPE, spacing_mm=(1.0, 1.0, 1.0))
    image = Volume(array=RNG.random((1, *SHAPE), np.float32), grid=place)
    for value, said in ((4, "nothing is annotated"), (0, "no foreground")):
        label = Volume(array=np.full((1, *SHAPE), value, np.uint8), grid=place)
        (found,), indices = check_case("c", image, label, made, ("MR",))
        assert said in found.problem
        assert set(np.unique(indices)) == {2 if value else 0}


def move(folder, source, target):
    (folder / source).rename(folder / target)


@pytest.mark.parametrize(
    ("source", "target", "said"),
    [
        ("imagesTr", "images", "imagesTr: no such folder; rename images?"),
        ("labelsTr", "Labels_Tr", "labelsTr: no such folder; rename Labels_Tr?"),
        ("labelsTr", "truth", "labelsTr: no such folder; put the labels there"),
        ("imagesTr/a_0001.nii.gz", "imagesTr/a_0003.nii.gz", "a: missing a_0001.nii.gz in imagesTr"),
        (
            "imagesTr/a_0000.nii.gz",
            "imagesTr/a.nii.gz",
            "a.nii.gz: no channel number in its name, in imagesTr; rename it to a_0000.nii.gz",
        ),
        ("labelsTr/a.nii.gz", "labelsTr/d.nii.gz", "d: label without image in imagesTr; add d_0000.nii.gz"),
        ("labelsTr/a.nii.gz", "labelsTr/a_0000.nii.gz", "a_0000.nii.gz: a label with a channel number, in labelsTr"),
    ],
)
def test_faults_of_the_layout(folder, source, target, said):
    move(folder, source, target)
    assert said in refusal(folder)


def test_empty_folders_and_other_endings(folder):
    for file in (folder / "labelsTr").iterdir():
        file.rename(file.with_name(file.name.replace(".nii.gz", ".nrrd")))
    assert "labelsTr: no file ends in .nii.gz, found is .nrrd" in refusal(folder)
    shutil.rmtree(folder / "imagesTr")
    (folder / "imagesTr").mkdir()
    assert "imagesTr: no file ends in .nii.gz; it holds no images" in refusal(folder)


def test_many_names_are_counted_rather_than_listed(tmp_path):
    (tmp_path / "in").mkdir()
    for n in range(25):
        (tmp_path / "in" / f"scan{n:02}.nii.gz").touch()
    with pytest.raises(AutosegError, match=r"  scan19\.nii\.gz: no channel number .*\n  and 5 more$"):
        find_cases(tmp_path / "in", 1)


def test_hidden_files_and_other_files_are_left_alone(folder):
    (folder / "imagesTr" / "._a_0000.nii.gz").write_text("left by a Mac")
    (folder / "imagesTr" / "._a_0000.png").write_text("left by a Mac")
    (folder / "imagesTr" / "notes.txt").write_text("hello")
    assert len(open_dataset(folder).cases) == 3
    assert len(find_cases(folder / "imagesTr", 2)) == 3


def test_cases_of_another_ending_are_named_and_not_left_out(folder):
    """b comes as .nii, as from another scanner; a picture of a case that is there leaves nothing out."""
    for path in ("imagesTr/b_0000", "imagesTr/b_0001", "labelsTr/b"):
        move(folder, f"{path}.nii.gz", f"{path}.nii")
    (folder / "imagesTr" / "a_0000.png").touch()
    assert refusal(folder).splitlines()[1:] == [
        "  *.nii: 2 files in imagesTr end in .nii, where dataset.json says .nii.gz: b_0000.nii, b_0001.nii; convert "
        "them, or move them out of imagesTr"
    ]


@pytest.mark.parametrize("listing", [True, False])
def test_a_link_whose_file_was_not_fetched_is_named(folder, listing):
    for path, target in (("imagesTr/a_0001.nii.gz", "../annex/a"), ("labelsTr/b.nii.gz", "/nowhere/b")):
        (folder / path).unlink()
        (folder / path).symlink_to(target)
    if listing:
        files = {case: [f"imagesTr/{case}_{n:04}.nii.gz" for n in range(2)] for case in ("a", "b", "c_2020")}
        describe(folder, dataset={c: {"images": own, "label": f"labelsTr/{c}.nii.gz"} for c, own in files.items()})
    (image,), (label,), none = (findings_of(folder, case) for case in ("a", "b", "c_2020"))
    assert image.problem == f"{folder}/imagesTr/a_0001.nii.gz is a link to ../annex/a, which is not there"
    assert label.problem == f"{folder}/labelsTr/b.nii.gz is a link to /nowhere/b, which is not there"
    assert image.cure.startswith("fetch it (datalad get, git annex get), mount") and none == ()
    (case,) = find_cases(folder / "imagesTr" / "a_0000.nii.gz", 2)
    with pytest.raises(AutosegError, match=r"is a link to \.\./annex/a, which is not there"):
        read_image([Path(image) for image in case.images])


# Prediction inputs.


def test_cases_of_a_folder_of_images(folder):
    images = folder / "imagesTr"
    for ending in (None, ".nii.gz"):
        cases = find_cases(images, 2, ending)
        assert [case.id for case in cases] == ["a", "b", "c_2020"]
        assert cases[1] == Case(id="b", images=(str(images / "b_0000.nii.gz"), str(images / "b_0001.nii.gz")))


def test_a_single_file_is_a_case(folder, tmp_path):
    images = folder / "imagesTr"
    assert find_cases(images / "b_0000.nii.gz", 2) == find_cases(images, 2)[1:2]
    save(tmp_path / "scan_2024.nrrd", np.zeros(SHAPE, np.uint8))
    (case,) = find_cases(tmp_path / "scan_2024.nrrd", 1)
    assert case == Case(id="scan_2024", images=(str(tmp_path / "scan_2024.nrrd"),))
    with pytest.raises(AutosegError, match=r"b_0002\.nii\.gz missing beside"):
        find_cases(images / "b_0000.nii.gz", 3)


def test_inputs_that_cannot_be_read(folder, tmp_path):
    with pytest.raises(AutosegError, match="does not exist; give a folder"):
        find_cases(tmp_path / "nothing", 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(AutosegError, match="it holds no images"):
        find_cases(tmp_path / "empty", 1)
    (folder / "imagesTr" / "a_0000.png").touch()
    with pytest.raises(
        AutosegError, match=r"a_0000\.png: of another kind \(\.png\) than most images there \(\.nii\.gz\); put"
    ):
        find_cases(folder / "imagesTr", 2)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a_0000.jpg").touch()
    with pytest.raises(AutosegError, match="JPEG alters"):
        find_cases(tmp_path / "photos", 1)


# Cases.


def test_a_case_without_foreground_is_a_warning(folder):
    save(folder / "labelsTr" / "a.nii.gz", np.zeros(SHAPE, np.uint8))
    dataset = open_dataset(folder)
    loaded = load_case(dataset, dataset.cases[0])
    assert [f.severity for f in loaded.findings] == ["warning"]
    assert "no foreground" in loaded.findings[0].problem
    assert loaded.labels.shape == SHAPE
    assert not loaded.labels.any()


def test_a_good_case_has_no_findings(folder):
    dataset = open_dataset(folder)
    loaded = load_case(dataset, dataset.cases[0])
    assert loaded.findings == ()
    assert (loaded.image.array.shape, loaded.image.array.dtype) == ((2, *SHAPE), np.float32)
    stored = sitk.GetArrayFromImage(sitk.ReadImage(dataset.cases[0].label))
    np.testing.assert_array_equal(loaded.labels, np.searchsorted([0, 7, 1024], stored))
    assert loaded.labels.dtype == np.int16
    assert loaded.stored.spacing_mm == (3.0, 1.5, 0.5)
    assert loaded.content_hash == hash_case(dataset, dataset.cases[0])


def label_with(folder, **header):
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "labelsTr" / "a.nii.gz")))
    save(folder / "labelsTr" / "a.nii.gz", labels, **header)


@pytest.mark.parametrize(
    ("header", "kind"),
    [
        ({"origin": (0.0, 0.0, 0.01)}, None),
        ({"spacing": (0.5, 1.5, 3.000001)}, None),
        ({"direction": [[1, -1e-6, 0], [1e-6, 1, 0], [0, 0, 1]]}, None),
        ({"origin": (0.0, 0.0, 3.0)}, "origin"),
        ({"spacing": (0.5, 1.5, 5.0)}, "spacing"),
        ({"direction": np.diag((-1, -1, 1))}, "origin"),
        ({"direction": [[0.6, -0.8, 0], [0.8, 0.6, 0], [0, 0, 1]]}, "shape"),
        ({"direction": [[0.96, -0.28, 0], [0.28, 0.96, 0], [0, 0, 1]]}, "direction"),
    ],
)
def test_the_label_must_lie_on_its_image(folder, header, kind):
    label_with(folder, **header)
    findings = findings_of(folder)
    if kind is None:
        assert findings == ()
        return
    (finding,) = findings
    assert finding.severity == "error"
    assert finding.problem.startswith(f"image and label differ in {kind}")
    assert "resample" in finding.cure


def test_a_label_stored_in_another_orientation_is_the_same(folder):
    before = load_case(open_dataset(folder), open_dataset(folder).cases[0]).labels
    path = folder / "labelsTr" / "a.nii.gz"
    sitk.WriteImage(sitk.DICOMOrient(sitk.ReadImage(str(path)), "SRA"), str(path))
    loaded = load_case(open_dataset(folder), open_dataset(folder).cases[0])
    assert loaded.findings == ()
    np.testing.assert_array_equal(loaded.labels, before)


def test_a_label_of_another_shape(folder):
    save(folder / "labelsTr" / "a.nii.gz", np.ones((5, 7, 12), np.uint8))
    (finding,) = findings_of(folder)
    assert "shape: 5 x 7 x 11 and 5 x 7 x 12" in finding.problem
    assert finding.cure == "resample the label onto the image"


def test_unexpected_label_values(folder):
    labels = np.zeros(SHAPE, np.int16)
    labels[0, 0, :3] = 7, 3, -1
    save(folder / "labelsTr" / "a.nii.gz", labels)
    (finding,) = findings_of(folder)
    assert finding.problem == "label values -1, 3, named are 0, 7, 1024"
    assert "dataset.json" in finding.cure


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_no_numbers(folder, value):
    array = RNG.normal(size=SHAPE).astype(np.float32)
    array[1, 2, 3] = array[4, 0, 0] = value
    save(folder / "imagesTr" / "a_0001.nii.gz", array)
    (finding,) = findings_of(folder)
    assert (finding.case, finding.severity) == ("a", "error")
    assert finding.problem == "channel T1 has 2 voxels that are NaN or infinite"


def test_a_number_too_large_for_float32_is_found(folder):
    array = np.ones(SHAPE)
    array[0, 0, 0] = 1e300
    save(folder / "imagesTr" / "a_0000.nii.gz", array)
    (finding,) = findings_of(folder)
    assert "channel FLAIR has 1 voxels" in finding.problem


def test_a_constant_channel_is_a_warning(folder):
    save(folder / "imagesTr" / "a_0001.nii.gz", np.full(SHAPE, 3, np.int16))
    (finding,) = findings_of(folder)
    assert finding.severity == "warning"
    assert finding.problem == "channel T1 has the value 3 everywhere"


def test_channels_on_different_grids(folder):
    save(folder / "imagesTr" / "a_0001.nii.gz", RNG.normal(size=SHAPE), spacing=(0.5, 1.5, 2.0))
    (finding,) = findings_of(folder)
    assert "a_0001.nii.gz and a_0000.nii.gz are channels of one case on different grids (spacing" in finding.problem
    assert finding.cure == "resample one onto the other"


def test_a_damaged_image_and_a_damaged_label_are_both_named(folder):
    for file in (folder / "imagesTr" / "a_0001.nii.gz", folder / "labelsTr" / "a.nii.gz"):
        file.write_bytes(file.read_bytes()[:-20])
    dataset = open_dataset(folder)
    loaded = load_case(dataset, dataset.cases[0])
    assert (loaded.image, loaded.labels, loaded.stored) == (None, None, None)
    assert ["a_0001.nii.gz" in loaded.findings[0].problem, "a.nii.gz" in loaded.findings[1].problem] == [True, True]
    assert all("truncated" in finding.problem and finding.severity == "error" for finding in loaded.findings)


def test_a_missing_label_and_a_file_that_vanished(folder):
    (folder / "labelsTr" / "a.nii.gz").unlink()
    dataset = open_dataset(folder)
    (finding,) = load_case(dataset, dataset.cases[0]).findings
    assert finding.problem == "no label file"
    assert finding.cure == "add labelsTr/a.nii.gz or remove the image"
    (folder / "imagesTr" / "b_0000.nii.gz").unlink()
    assert any("does not exist" in finding.problem for finding in load_case(dataset, dataset.cases[1]).findings)


def test_a_missing_second_channel_everywhere(folder):
    for case in ("a", "b", "c_2020"):
        (folder / "imagesTr" / f"{case}_0001.nii.gz").unlink()
    (finding,) = findings_of(folder)
    assert "holds 1 channels, expected are 2" in finding.problem
    assert "add the files of the others" in finding.cure


def test_a_tiff_label_takes_the_spacing_of_its_image(tmp_path):
    import tifffile

    folder = tmp_path / "Dataset009_Stack"
    for name, array in (("imagesTr/a_0000", RNG.normal(size=SHAPE)), ("labelsTr/a", RNG.integers(0, 2, SHAPE))):
        (folder / name).parent.mkdir(parents=True)
        tifffile.imwrite(folder / f"{name}.tif", array.astype(np.float32))
    describe(folder, channel_names={"0": "em"}, labels={"background": 0, "cell": 1}, file_ending=".tif", numTraining=1)
    (finding,) = findings_of(folder)
    assert (finding.severity, "1 mm is taken" in finding.problem) == ("warning", True)
    (folder / "imagesTr" / "a.json").write_text('{"spacing": [3, 1, 1]}')
    dataset = open_dataset(folder)
    loaded = load_case(dataset, dataset.cases[0])
    assert loaded.findings == ()
    assert loaded.stored.spacing_mm == (3.0, 1.0, 1.0)


def test_the_check_works_on_decoded_data():
    grid = Grid(shape=SHAPE, spacing_mm=(3.0, 1.5, 0.5))
    image = Volume(array=RNG.normal(size=(1, *SHAPE)).astype(np.float32), grid=grid)
    labels = Labels(names=("background", "x"), values=(3, -5))
    label = Volume(array=RNG.choice([3, -5], (1, *SHAPE)), grid=grid)
    findings, indices = check_case("k", image, label, labels, ["CT"])
    assert findings == ()
    np.testing.assert_array_equal(indices, label.array[0] == -5)
    assert check_case("k", image, None, labels, ["CT"]) == ((), None)


# Content and duplicates.


def test_the_hash_follows_content_and_meaning(folder):
    dataset = open_dataset(folder)
    first = hash_case(dataset, dataset.cases[0])
    assert first == hash_case(open_dataset(folder), dataset.cases[0])
    copy = folder.parent / "moved"
    shutil.copytree(folder, copy)
    moved = open_dataset(copy)
    assert hash_case(moved, moved.cases[0]) == first
    describe(copy, labels={"background": 0, "lesion": 1024, "liver": 7})
    assert hash_case(open_dataset(copy), moved.cases[0]) != first
    label_with(folder, origin=(0.0, 0.0, 1.0))
    image, label = hash_case(dataset, dataset.cases[0]).split("-")
    assert image == first.split("-")[0]
    assert label != first.split("-")[1]


def test_duplicates(folder):
    images, labels = folder / "imagesTr", folder / "labelsTr"
    for channel in range(2):
        for other in ("b", "c_2020"):
            shutil.copy(images / f"a_{channel:04}.nii.gz", images / f"{other}_{channel:04}.nii.gz")
    shutil.copy(labels / "a.nii.gz", labels / "b.nii.gz")
    dataset = open_dataset(folder)
    findings = check_dataset(dataset, {case.id: hash_case(dataset, case) for case in dataset.cases})
    assert [(f.case, f.severity, f.problem) for f in findings] == [
        ("b", "error", "same image and labels as a"),
        ("c_2020", "warning", "same image as a, other labels"),
    ]


def test_the_table_lists_everything_aligned_and_errors_first(folder):
    assert findings_table([]) == "no findings"
    save(folder / "imagesTr" / "a_0001.nii.gz", np.full(SHAPE, 3, np.int16))
    (folder / "labelsTr" / "c_2020.nii.gz").unlink()
    dataset = open_dataset(folder)
    findings = [f for case in dataset.cases for f in load_case(dataset, case).findings]
    head, first, second = findings_table(findings).splitlines()
    assert first.startswith("error     c_2020  no label file ")
    assert second.startswith("warning   a       channel T1 has")
    for row, cure in ((head, "cure"), (first, "add labelsTr"), (second, "check that")):
        assert row.index(cure) == head.index("cure")


# Real datasets.


def test_real_regions_are_read_as_written(real_data):
    labels = open_dataset(real_data / "Dataset042_BraTS").labels
    assert labels.regions == ((1, 2, 3, 4), (1, 3, 4), (4,))
    assert labels.values == (0, 2, 1, 4)


@pytest.mark.parametrize(
    ("name", "cases", "dimension"),
    [("Dataset004_Hippocampus", 195, 3), ("Dataset027_ACDC", 60, 3), ("Dataset120_Nuclei", 110, 2)],
)
def test_real_datasets_have_no_findings(real_data, name, cases, dimension):
    dataset = open_dataset(real_data / name)
    assert (len(dataset.cases), dataset.notes) == (cases, ())
    for case in dataset.cases[::30]:
        loaded = load_case(dataset, case)
        assert loaded.findings == ()
        assert loaded.stored.dimension == dimension
        assert loaded.labels.max() == dataset.labels.count - 1
    assert check_dataset(dataset, {case.id: hash_case(dataset, case) for case in dataset.cases}) == ()
