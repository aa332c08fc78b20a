import csv
import json

import numpy as np
import pytest
import SimpleITK as sitk
from toys import LABELS, ball

from autoseg.evaluation import (
    METRICS,
    CaseScore,
    Summary,
    evaluate_folders,
    evaluate_pairs,
    save_summary,
    score_case,
    summarise,
    table,
)
from autoseg.records import AutosegError, load_json

SPACING = (3.0, 1.0, 0.5)
VALUES = {"liver": 7, "lesion": 200}


def save(array, path, spacing_mm=SPACING, origin_mm=(0.0, 0.0, 0.0)):
    """Write (Z, Y, X), or (Y, X) with two spacings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(np.asarray(array, np.uint8))
    image.SetSpacing(spacing_mm[::-1])
    image.SetOrigin(origin_mm[: image.GetDimension()])
    sitk.WriteImage(image, str(path))


def liver_and_lesion(lesion=True):
    """A liver of 7 and, unless `lesion` is false, a lesion of 200 within, in (9, 11, 13)."""
    array = np.where(ball((9, 11, 13), (4, 5, 6), 4), 7, 0)
    return np.where(ball((9, 11, 13), (4, 5, 7), 1.5) & lesion, 200, array).astype(np.uint8)


@pytest.fixture
def folders(tmp_path):
    """Two cases; the second has no lesion and its prediction none either."""
    truth, prediction = tmp_path / "truth", tmp_path / "prediction"
    for case, lesion in (("a", True), ("b", False)):
        save(liver_and_lesion(lesion), truth / f"{case}.nii.gz")
        save(np.roll(liver_and_lesion(lesion), 1, axis=2), prediction / f"{case}.nii.gz")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, **VALUES}}))
    return truth, prediction


def toy(case, label, dice, undefined=None, **more) -> CaseScore:
    values = dict.fromkeys(METRICS) | {"volume_truth_ml": None, "volume_prediction_ml": None} | more
    return CaseScore(case=case, label=label, tp=0, fp=0, fn=0, tn=1, undefined=undefined, **values | {"dice": dice})


# Empty masks


def test_undefined_scores_are_left_out_and_counted():
    scores = [
        toy("a", "liver", 0.5, hd95_mm=2.0),
        toy("b", "liver", 1.0, hd95_mm=4.0),
        toy("c", "liver", 0.0, "prediction empty"),
        toy("d", "liver", 0.0, "truth empty"),
        toy("e", "liver", None, "truth and prediction empty"),
        *(toy(case, "lesion", None, "truth and prediction empty") for case in "abcde"),
    ]
    summary = summarise(scores, VALUES, 1.0)
    liver, lesion = summary.classes
    assert (liver.means["dice"].mean, liver.means["dice"].count, liver.means["dice"].undefined) == (0.375, 4, 1)
    assert liver.means["dice"].std == pytest.approx(np.std([0.5, 1, 0, 0], ddof=1))
    assert (liver.means["hd95_mm"].mean, liver.means["hd95_mm"].count, liver.means["hd95_mm"].undefined) == (3, 2, 3)
    assert (liver.truth_empty, liver.prediction_empty, liver.both_empty) == (1, 1, 1)
    assert (lesion.means["dice"].mean, lesion.means["dice"].std, lesion.means["dice"].count) == (None, None, 0)
    # The class that no case defines does not spoil the mean of the others.
    assert summary.foreground["dice"].mean == 0.375
    assert (summary.foreground["dice"].count, summary.foreground["dice"].undefined) == (1, 1)


def test_nothing_defined_at_all_is_still_a_summary(tmp_path):
    summary = summarise([toy("a", "liver", None, "truth and prediction empty")], {"liver": 7}, 1.0)
    assert summary.foreground["dice"].mean is None
    save_summary(summary, tmp_path)
    assert load_json(Summary, tmp_path / "summary.json") == summary
    assert "rightly not predicted in 1" in table(summary)


# Means, files and table


def test_means_by_hand():
    scores = [toy("a", "liver", 0.5), toy("a", "lesion", 0.2), toy("b", "liver", 0.7), toy("b", "lesion", 0.0)]
    summary = summarise(scores, {"background": 0, **VALUES}, 2.5)
    assert [entry.label for entry in summary.classes] == ["liver", "lesion"]
    assert summary.labels == VALUES and summary.tolerance_mm == 2.5
    assert summary.classes[0].means["dice"].mean == pytest.approx(0.6)
    assert summary.foreground["dice"].mean == pytest.approx((0.6 + 0.1) / 2)


def test_folders_score_like_arrays_in_memory(folders):
    summary = evaluate_folders(*folders, tolerance_mm=0.5, workers=2, quiet=True)
    scores = []
    for case, lesion in (("a", True), ("b", False)):
        truth = liver_and_lesion(lesion)
        scores += score_case(case, truth, np.roll(truth, 1, axis=2), SPACING, VALUES, 0.5)
    assert summary == summarise(scores, VALUES, 0.5)
    assert summary.scores[3].undefined == "truth and prediction empty"
    assert summary.classes[0].means["hd95_mm"].mean == pytest.approx(0.5)
    pairs = [(case, *(folder / f"{case}.nii.gz" for folder in folders)) for case in "ab"]
    assert evaluate_pairs(pairs, LABELS, tolerance_mm=0.5, quiet=True) == summary


def test_the_files_hold_every_score(folders, tmp_path):
    summary = evaluate_folders(*folders, quiet=True)
    save_summary(summary, tmp_path / "out")
    assert load_json(Summary, tmp_path / "out" / "summary.json") == summary
    with (tmp_path / "out" / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["label"]) for row in rows] == [
        ("a", "liver"),
        ("a", "lesion"),
        ("b", "liver"),
        ("b", "lesion"),
    ]
    assert float(rows[0]["dice"]) == summary.scores[0].dice
    assert rows[3]["dice"] == "" and rows[3]["undefined"] == "truth and prediction empty"
    # Written beside the predictions, they are no label files.
    save_summary(summary, folders[1])
    assert evaluate_folders(*folders, quiet=True) == summary


def test_the_table_reads_well():
    scores = [
        toy("a", "liver", 0.5, hd95_mm=2.0),
        toy("a", "lesion", 0.0, "prediction empty"),
        toy("b", "liver", 1.0, hd95_mm=3.0),
        toy("b", "lesion", 0.0, "truth empty"),
        toy("c", "liver", 0.9, hd95_mm=4.0),
        toy("c", "lesion", None, "truth and prediction empty"),
    ]
    lines = table(summarise(scores, VALUES, 1.0)).splitlines()
    assert lines[0].split("  ")[0] == "class" and "HD95 [mm]" in lines[0]
    assert "IoU" not in lines[0], "a metric that no case defines has no column"
    liver, lesion, means = lines[2:5]
    assert liver.startswith("liver") and "0.800 +- 0.265" in liver and "3.000 +- 1.000" in liver
    assert lesion.endswith("2 of 3") and "undefined" in lesion
    assert means.startswith("mean of classes") and "0.400" in means
    assert len({line.index("0.") for line in (liver, lesion, means)}) == 1, "columns line up"
    worst = lines.index("lowest mean Dice:")
    assert lines[worst + 1] == "  a: 0.250, worst class lesion 0.000"
    words = "\n".join(lines)
    assert "lesion: missed altogether in 1" in words
    assert "predicted where there is none in 1" in words and "rightly not predicted in 1" in words


# Finding cases and labels


def test_labels_default_to_the_values_found(folders):
    (folders[0].parent / "dataset.json").unlink()
    summary = evaluate_folders(*folders, quiet=True)
    assert summary.labels == {"7": 7, "200": 200}


def test_labels_that_are_given_win(folders):
    (folders[0].parent / "dataset.json").write_text("{}")
    assert evaluate_folders(*folders, labels=LABELS, quiet=True).labels == VALUES


def test_cases_match_whatever_the_format(folders):
    truth, prediction = folders
    expected = evaluate_folders(truth, prediction, quiet=True)
    sitk.WriteImage(sitk.ReadImage(str(prediction / "a.nii.gz")), str(prediction / "a.nrrd"))
    (prediction / "a.nii.gz").unlink()
    assert evaluate_folders(truth, prediction, quiet=True) == expected


def test_a_flat_image_is_scored_in_2d(tmp_path):
    truth = np.zeros((7, 11), np.uint8)
    truth[2:5, 3:8] = 1
    save(truth, tmp_path / "truth" / "a.png", (1.0, 1.0))
    save(np.roll(truth, 1, axis=0), tmp_path / "prediction" / "a.png", (1.0, 1.0))
    (score,) = evaluate_folders(tmp_path / "truth", tmp_path / "prediction", quiet=True).scores
    assert (score.tp, score.fp, score.fn) == (10, 5, 5)
    assert score.volume_truth_ml is None and score.hd95_mm == pytest.approx(1.0)


# Errors in words


def test_missing_predictions_are_listed(folders):
    truth, prediction = folders
    (prediction / "a.nii.gz").unlink()
    with pytest.raises(AutosegError, match=r"no prediction for 1 of 2 cases .*: a; predict them.*--partial"):
        evaluate_folders(truth, prediction, quiet=True)
    assert {score.case for score in evaluate_folders(truth, prediction, partial=True, quiet=True).scores} == {"b"}
    (prediction / "b.nii.gz").rename(prediction / "other.nii.gz")
    with pytest.raises(AutosegError, match="no case of"):
        evaluate_folders(truth, prediction, partial=True, quiet=True)
    with pytest.raises(AutosegError, match="no folder with label files"):
        evaluate_folders(truth, prediction / "nowhere", quiet=True)


@pytest.mark.parametrize("partial", [False, True])
def test_where_no_name_agrees_a_file_and_the_pattern_are_named(folders, partial):
    truth, prediction = folders
    for case in "ab":
        (prediction / f"{case}.nii.gz").rename(prediction / f"{case}_0000.nii.gz")
    with pytest.raises(
        AutosegError, match=r"which holds a_0000\.nii\.gz; that of a\.nii\.gz is called a\.nii\.gz .*without _0000$"
    ):
        evaluate_folders(truth, prediction, partial=partial, quiet=True)


def test_other_grids_are_refused_by_case(folders):
    truth, prediction = folders
    save(liver_and_lesion()[:, :, 1:], prediction / "a.nii.gz")
    with pytest.raises(
        AutosegError, match=r"1 of 2 cases:\n  a: .*different grids \(shape: 9 x 11 x 13 and 9 x 11 x 12"
    ):
        evaluate_folders(truth, prediction, quiet=True)
    save(liver_and_lesion(), prediction / "a.nii.gz", origin_mm=(0.0, 0.0, 3.0))
    with pytest.raises(AutosegError, match=r"a: .*3 mm apart.*nearest-neighbour"):
        evaluate_folders(truth, prediction, quiet=True)


def test_unknown_values_are_refused_by_file(folders):
    save(liver_and_lesion() + np.uint8(1), folders[1] / "b.nii.gz")
    with pytest.raises(AutosegError, match=r"b: .*b\.nii\.gz holds the values 1, 8, 201"):
        evaluate_folders(*folders, quiet=True)


def test_two_files_of_one_case_are_refused(folders):
    (folders[1] / "a.nrrd").write_bytes(b"")
    with pytest.raises(AutosegError, match="two files for case a"):
        evaluate_folders(*folders, quiet=True)


def test_nothing_but_background_without_labels_is_refused(tmp_path):
    for folder in ("truth", "prediction"):
        save(np.zeros((3, 5, 7)), tmp_path / folder / "a.nii.gz")
    with pytest.raises(AutosegError, match="nothing but background"):
        evaluate_folders(tmp_path / "truth", tmp_path / "prediction", quiet=True)
