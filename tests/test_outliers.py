"""What check says of cases taken together, and of what planning would refuse."""

import json

import numpy as np
import pytest
import SimpleITK as sitk
from test_pipeline import NAME, PLAN
from toys import LABELS, balls_dataset, configuration, grid, plan

from autoseg.outliers import of_another_scale, size_mm, unlike_training, without_a_class
from autoseg.pipeline.data import check, plan_and_preprocess
from autoseg.raw import Finding, findings_table, hash_voxels
from autoseg.records import AutosegError
from autoseg.schema import CaseFingerprint
from autoseg.workspace import Workspace


def facts(case, spacing_mm=(1.0, 1.0, 1.0), shape=(5, 7, 11), voxels=None):
    return CaseFingerprint(case=case, shape=shape, spacing_mm=spacing_mm, crop_ratio=1.0, voxels=voxels)


def test_sizes_do_not_depend_on_the_axis_of_the_slices():
    assert size_mm((4, 2, 1), (0.5, 8.0, 2.0)) == pytest.approx((2.0, 4.0))
    assert size_mm((2, 1, 4), (8.0, 2.0, 0.5)) == pytest.approx((2.0, 4.0))


def test_cases_of_another_scale_are_named_in_one_line_each():
    usual = [facts(f"c{n}", (1.0 + n / 10, 1.0, 1.0)) for n in range(5)]
    assert of_another_scale([], flat=False) == of_another_scale(usual[:1], flat=False) == []
    assert of_another_scale([*usual, facts("thick", (6.0, 1.0, 1.0))], flat=False) == []
    odd = [facts("metres", (0.001,) * 3), facts("cm", (0.1,) * 3), facts("thumb", (0.5, 0.5, 0.5), (1, 1, 1))]
    voxels, extent = of_another_scale([*usual, *odd], flat=False)
    assert voxels.severity == extent.severity == "warning"
    assert voxels.problem.startswith("voxels of 0.001 to 0.1 mm a side: cm, metres; the median of all cases is 1.0")
    assert extent.problem.startswith("an extent of 0.5 mm a side: thumb; ")
    many = of_another_scale([*usual, *(facts(f"m{n}", (0.001,) * 3) for n in range(2))], flat=False)
    assert len(many) == 1 and "0.001 mm a side: m0, m1;" in many[0].problem


def test_in_2d_the_axis_without_slices_has_no_say():
    """In-plane ten times as large; with the third axis counted it would be less than five."""
    cases = [*(facts(f"c{n}", (1.0, 0.5, 0.5), (1, 9, 9)) for n in range(3)), facts("x", (1.0, 5.0, 5.0), (1, 9, 9))]
    (found,) = of_another_scale(cases, flat=True)
    assert "5 mm a side: x" in found.problem
    assert of_another_scale(cases, flat=False) == []


def test_an_image_to_predict_is_compared_with_the_plan():
    """The configuration has images of 20 x 4 x 10 mm: 9.28 mm on average, in voxels of 1 mm."""
    here = configuration(spacing_mm=(2.0, 0.5, 1.0), patch=(10, 8, 10))
    made = plan(here)
    assert unlike_training(grid((4, 20, 10), (1.0, 1.0, 1.0)), made, here) is None
    assert "voxels of 0.1 mm" in (unlike_training(grid((4, 20, 10), (0.1, 0.1, 0.1)), made, here) or "")
    assert "voxels of 9 mm" in (unlike_training(grid((1, 2, 1), (9.0, 9.0, 9.0)), made, here) or "")
    assert unlike_training(grid((99, 99, 99), (0.1, 0.1, 0.1)), made, here) is None, "fine voxels of the usual extent"
    flat = configuration("2d", (0.5, 1.0), (8, 10))
    turned = plan(flat, axis_order=(1, 0, 2))
    assert unlike_training(grid((8, 900, 10), (0.5, 9.0, 1.0)), turned, flat) is None, (
        "slices lie along the second axis"
    )


def test_classes_that_no_case_has():
    some, none = facts("a", voxels={0: 9, 1: 3}), facts("b", voxels={0: 9})
    assert without_a_class([], LABELS) == without_a_class([facts("old"), none], LABELS) == []
    assert without_a_class([some, facts("c", voxels={2: 1})], LABELS) == []
    (found,) = without_a_class([some, none], LABELS)
    assert (found.severity, found.problem.split(";")[0]) == ("warning", "in no case: lesion")
    (found,) = without_a_class([none, none], LABELS)
    assert (found.severity, found.case) == ("error", "") and "no case has any foreground" in found.problem


def test_a_warning_of_many_cases_is_one_row_and_errors_have_a_row_each():
    made = [
        Finding(case=f"c{number}", severity=severity, problem="no foreground", cure="look")
        for severity in ("warning", "error")
        for number in range(9)
    ]
    rows = findings_table(made).splitlines()[1:]
    assert [row.split()[1] for row in rows[:9]] == [f"c{number}" for number in range(9)]
    assert [" ".join(row.split()) for row in rows[9:]] == ["warning c0, c1, c2, c3, c4 and 4 more no foreground look"]


def test_decoded_voxels_are_compared_with_their_shape():
    image, labels = np.arange(12, dtype=np.float32).reshape(1, 1, 3, 4), np.zeros((1, 3, 4), np.int16)
    whole = hash_voxels(image, labels, None)
    assert hash_voxels(image.copy(order="F"), labels, None) == whole
    first, second = whole.split("-")
    for one, other, annotated in ((image + 1, labels, None), (image, labels + 1, None), (image, labels, ["x"])):
        left, right = hash_voxels(one, other, annotated).split("-")
        assert (left == first, right == second) == (one is image, other is labels and annotated is None)
    assert hash_voxels(image.reshape(1, 1, 4, 3), labels, None).split("-")[0] != first


@pytest.fixture
def place(tmp_path):
    balls_dataset(tmp_path / "raw" / NAME, prefix="c")
    return Workspace(tmp_path)


def said_by_check(place, capsys):
    """Rows of the table as [severity, case, rest], and whether there is an error."""
    failed = False
    try:
        check(place, "7")
    except AutosegError:
        failed = True
    rows = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    return [row for row in rows if row[0] in ("error", "warning")], failed


def test_a_case_that_was_written_anew_is_the_same_case(place, capsys):
    raw = place.raw(NAME)
    image = sitk.ReadImage(str(raw / "imagesTr" / "c0_0000.nii.gz"), sitk.sitkFloat64)
    labels = sitk.ReadImage(str(raw / "labelsTr" / "c0.nii.gz"), sitk.sitkInt32)
    for case, turned in (("c1", "LPS"), ("c2", "SRA")):
        sitk.WriteImage(sitk.DICOMOrient(image, turned), str(raw / "imagesTr" / f"{case}_0000.nii.gz"))
        sitk.WriteImage(sitk.DICOMOrient(labels, turned), str(raw / "labelsTr" / f"{case}.nii.gz"))
    rows, failed = said_by_check(place, capsys)
    assert failed and [row[1] for row in rows] == ["c1", "c2"]
    assert all(row[2].startswith("same image and labels as c0") for row in rows)


def test_check_refuses_what_planning_would(place, capsys):
    raw = place.raw(NAME)
    for case in ("c1", "c2", "c3"):
        (raw / "imagesTr" / f"{case}_0000.nii.gz").unlink()
        (raw / "labelsTr" / f"{case}.nii.gz").unlink()
    card = raw / "dataset.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), "numTraining": 1}))
    rows, failed = said_by_check(place, capsys)
    (row,) = rows
    assert failed and row[2].startswith("cross-validation needs at least 2 cases, found 1  add cases")
    with pytest.raises(AutosegError, match=r"at least 2 cases, found 1; add cases$"):
        plan_and_preprocess(place, "7", PLAN)
    assert [path.name for path in place.root.iterdir()] == ["raw"], "nothing is left that looks like a dataset"


def test_check_refuses_images_of_two_dimensions_together(place, capsys):
    raw = place.raw(NAME)
    for folder in ("imagesTr", "labelsTr"):
        for path in (raw / folder).glob("c1*"):
            sitk.WriteImage(sitk.ReadImage(str(path))[:, :, 7], str(path))
    rows, failed = said_by_check(place, capsys)
    (row,) = rows
    assert failed and "mixes 2D and 3D images (1 of 4 are 2D, c1 for one)" in row[2]
