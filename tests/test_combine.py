"""ensemble: the mean of probabilities of any origin, votes where there are none, and what is refused."""

import numpy as np
import pytest
import SimpleITK as sitk
from toys import OBLIQUE, grid

from autoseg.evaluation.folders import MERGED, note_merged
from autoseg.labels import Labels
from autoseg.merging import merge
from autoseg.pipeline.combine import NAME, combine
from autoseg.pipeline.status import Status
from autoseg.readers import read_labels, write_image, write_labels
from autoseg.records import AutosegError
from autoseg.volume import canonical_grid

STORED = grid(direction=OBLIQUE)
SHAPE = canonical_grid(STORED).shape
LABELS = Labels.from_dataset({"background": 0, "liver": 7, "lesion": 3})


def write(folder, probabilities, stored=STORED, case="a"):
    write_image(np.asarray(probabilities, np.float32), stored, folder / f"{case}_probabilities.nii.gz")


def uniform(*values):
    return np.broadcast_to(np.float32(values)[:, None, None, None], (len(values), *SHAPE)).copy()


def test_the_mean_decides_where_votes_would_not(tmp_path, capsys):
    """Two of three say liver, a little; the third is sure of lesion: means 0.27, 0.32, 0.41."""
    for name, values in (("x", (0.4, 0.45, 0.15)), ("y", (0.4, 0.45, 0.15)), ("z", (0.01, 0.06, 0.93))):
        write(tmp_path / name, uniform(*values))
    combine([tmp_path / name for name in "xyz"], tmp_path / "out", LABELS)
    volume, stored = read_labels(tmp_path / "out" / "a.nii.gz")
    assert np.unique(volume.array).tolist() == [3]
    assert stored.shape == STORED.shape
    assert "Mean of the probabilities of 3 folders" in capsys.readouterr().out
    combine([tmp_path / name for name in "xyz"], tmp_path / "plain")
    assert np.unique(read_labels(tmp_path / "plain" / "a.nii.gz")[0].array).tolist() == [2], "channel n is value n"


def test_regions_are_painted_where_their_mean_is_above_one_half(tmp_path):
    regions = Labels.from_dataset({"background": 0, "tumour": [1, 2], "core": 2})
    first, second = uniform(0.9, 0.2), uniform(0.3, 0.9)
    second[1, 0] = 0.7
    write(tmp_path / "x", first)
    write(tmp_path / "y", second)
    combine([tmp_path / "x", tmp_path / "y"], tmp_path / "out", regions)
    found = read_labels(tmp_path / "out" / "a.nii.gz")[0].array[0]
    assert np.unique(found[0]).tolist() == [1], "0.45 is no core"
    assert np.unique(found[1:]).tolist() == [2]
    with pytest.raises(AutosegError, match=r"do not sum to 1.*name the dataset"):
        combine([tmp_path / "x", tmp_path / "y"], tmp_path / "out")


def test_the_arrays_of_nnunet_take_geometry_from_the_labels_beside_them(tmp_path):
    """Its channels run in the order of the values, 0, 3, 7, its axes are those of the file; nothing is unpickled."""
    truth = np.zeros(SHAPE, np.int16)
    truth[1, 2, 3:6], truth[4, 5, 6] = 3, 7
    write_labels(truth, STORED, tmp_path / "truth.nii.gz")
    in_file = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "truth.nii.gz")))
    maps = np.stack([in_file == value for value in (0, 3, 7)]).astype(np.float32)
    for name in ("x", "y"):
        write_labels(truth * 0, STORED, tmp_path / name / "a.nii.gz")
        np.savez(tmp_path / name / "a.npz", probabilities=maps)
        (tmp_path / name / "a.pkl").write_bytes(b"not to be opened")
    combine([tmp_path / "x", tmp_path / "y"], tmp_path / "out", LABELS)
    assert np.array_equal(read_labels(tmp_path / "out" / "a.nii.gz")[0].array[0], truth)
    np.savez(tmp_path / "y" / "a.npz", probabilities=np.array([{}], dtype=object))
    with pytest.raises(AutosegError, match=r"a\.npz cannot be read as numbers"):
        combine([tmp_path / "x", tmp_path / "y"], tmp_path / "out", LABELS)


def test_labels_are_voted_on_where_a_folder_has_no_probabilities(tmp_path, capsys):
    """The first folder has the say where no label has more votes than another."""
    votes = np.array([[0, 0, 3], [3, 0, 3], [3, 7, 3], [3, 7, 0]]).T
    for name, row in zip("xyz", votes):
        values = np.zeros(SHAPE, np.int16)
        values[0, 0, :4] = row
        write_labels(values, STORED, tmp_path / name / "a.nii.gz")
    # Another program may have written the ending in capitals; ours is in small letters.
    (tmp_path / "x" / "a.nii.gz").rename(tmp_path / "x" / "a.NII.GZ")
    combine([tmp_path / name for name in "xyz"], tmp_path / "out")
    assert read_labels(tmp_path / "out" / "a.nii.gz")[0].array[0, 0, 0, :5].tolist() == [0, 3, 3, 3, 0]
    assert "Majority vote" in capsys.readouterr().out


def test_missing_cases_and_other_grids_are_named_and_the_rest_is_done(tmp_path):
    for name in ("x", "y"):
        for case in "abc":
            write(tmp_path / name, uniform(0.1, 0.9), case=case)
    combine([tmp_path / "x", tmp_path / "y"], tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 4, "three cases and the list of them"
    (tmp_path / "y" / "b_probabilities.nii.gz").unlink()
    write(tmp_path / "y", uniform(0.1, 0.9), stored=grid(), case="c")
    with pytest.raises(AutosegError) as failed:
        combine([tmp_path / "x", tmp_path / "y"], tmp_path / "out")
    assert "2 of 3 cases" in str(failed.value)
    assert f"b: there is no probability map in {tmp_path / 'y'}" in str(failed.value)
    assert "c: " in str(failed.value) and "another grid" in str(failed.value)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.nii.gz", NAME], "what failed is gone"
    rows = Status(tmp_path / "out", NAME).rows
    assert [(row.case, row.status, row.file) for row in rows.values()] == [
        ("a", "done", "a.nii.gz"),
        ("b", "failed", ""),
        ("c", "failed", ""),
    ]
    assert "no probability map" in rows["b"].reason
    with pytest.raises(AutosegError, match="2 channels, and 3 are needed"):
        combine([tmp_path / "x", tmp_path / "y"], tmp_path / "out", LABELS)
    with pytest.raises(AutosegError, match="would be overwritten"):
        combine([tmp_path / "x", tmp_path / "y"], tmp_path / "y")
    with pytest.raises(AutosegError, match="two folders or more"):
        combine([tmp_path / "x"], tmp_path / "out")
    with pytest.raises(AutosegError, match="no folder with predictions"):
        combine([tmp_path / "x", tmp_path / "nowhere"], tmp_path / "out")


def test_a_folder_counts_once_whatever_it_is_called(tmp_path):
    for name in ("x", "y"):
        write(tmp_path / name, uniform(0.1, 0.9))
    (tmp_path / "link").symlink_to(tmp_path / "x")
    first = tmp_path / "x"
    for again in (first, tmp_path / "y" / ".." / "x", tmp_path / "link"):
        with pytest.raises(AutosegError, match=r"x and .* are one folder, .*; give it once"):
            combine([first, tmp_path / "y", again], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_the_ensemble_did_not_make_are_left_alone(tmp_path):
    for name in ("x", "y"):
        for case in "ab":
            write(tmp_path / name, uniform(0.1, 0.9), case=case)
    out = tmp_path / "out"
    out.mkdir()
    others = {"b.nii.gz": b"by hand", "a_probabilities.nii.gz": b"of a model", "c.nii.gz": b"in nobody's way"}
    for name, content in others.items():
        (out / name).write_bytes(content)
    with pytest.raises(
        AutosegError, match=r"holds 1 files .*ensemble\.csv does not name.*: b\.nii\.gz; give another -o"
    ):
        combine([tmp_path / "x", tmp_path / "y"], out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == others
    (out / "b.nii.gz").rename(tmp_path / "b.nii.gz")
    del others["b.nii.gz"]
    for _ in range(2):
        combine([tmp_path / "x", tmp_path / "y"], out)
        assert {name: (out / name).read_bytes() for name in others} == others
        assert Status(out, NAME).rows["b"].status == "done"
    # What this verb made is its own to replace, what another made is not.
    (out / NAME).rename(out / "postprocess.csv")
    with pytest.raises(AutosegError, match="holds 2 files"):
        combine([tmp_path / "x", tmp_path / "y"], out)


def test_what_is_said_of_merged_labels_of_other_files_is_kept(tmp_path):
    merged = merge(LABELS, {"organ": (3, 7)})
    for name in ("x", "y"):
        write_labels(np.full(SHAPE, 7, np.int16), STORED, tmp_path / name / "a.nii.gz")
    write_labels(np.full(SHAPE, 3, np.int16), STORED, tmp_path / "out" / "b.nii.gz")
    note_merged(merged, tmp_path / "out")
    with pytest.raises(AutosegError, match=r"merged_labels\.json says which labels are merged in b\.nii\.gz"):
        combine([tmp_path / "x", tmp_path / "y"], tmp_path / "out", LABELS)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["b.nii.gz", MERGED]
    (tmp_path / "out" / "b.nii.gz").unlink()
    combine([tmp_path / "x", tmp_path / "y"], tmp_path / "out", LABELS)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.nii.gz", NAME]
