"""dataset import of structures that come apart: one binary mask each, or one-hot arrays in HDF5."""

from pathlib import Path

import numpy as np
import pytest
from test_import import NAME, SHAPE, noise, some_labels, tree
from toys import ball, grid

from autoseg.datasets.hdf5 import Array, layout_of
from autoseg.datasets.masks import by_name
from autoseg.layout import open_dataset
from autoseg.pipeline.data import plan_and_preprocess
from autoseg.pipeline.importing import import_dataset
from autoseg.pipeline.planning import PlanOptions
from autoseg.readers import read_image, read_labels, read_stored, write_image, write_labels
from autoseg.records import AutosegError
from autoseg.workspace import Workspace


@pytest.fixture
def place(tmp_path):
    return Workspace(tmp_path / "ws")


# masks


def write_structures(folder: Path, layout: str) -> None:
    bones = {"femur": ball(SHAPE, (2, 3, 3), 2.5), "tibia": ball(SHAPE, (2, 3, 6), 2.5)}
    for case in ("leg_1", "leg_2"):
        write_image(noise(int(case[-1])), grid(), folder / "scans" / f"{case}.nii.gz")
        for bone, inside in bones.items():
            if (case, bone) != ("leg_2", "tibia"):
                path = folder / "masks" / layout.format(case=case, bone=bone)
                write_labels(inside.astype(np.uint8) * 255, grid(), path)


@pytest.mark.parametrize("layout", ["{case}/{bone}.nii.gz", "{bone}/{case}.nii.gz", "{case}_{bone}.nii.gz"])
def test_binary_masks_are_merged_in_the_order_given(place, tmp_path, layout, capsys):
    write_structures(tmp_path, layout)
    folders = str(tmp_path / "scans"), str(tmp_path / "masks")
    made = import_dataset(place, "masks", *folders, name=NAME, channels=("MR",), order=("tibia", "femur"), yes=True)
    said = capsys.readouterr().out
    assert "tibia has no mask in 1 cases" in said
    both = int((ball(SHAPE, (2, 3, 3), 2.5) & ball(SHAPE, (2, 3, 6), 2.5)).sum())
    assert both > 0 and f"femur over tibia: {both} voxels" in said
    labels = read_labels(made / "labelsTr" / "leg_1.nii.gz")[0].array[0]
    names = open_dataset(made).labels
    assert names.names == ("background", "tibia", "femur")
    assert (labels == 2).sum() == ball(SHAPE, (2, 3, 3), 2.5).sum()
    assert set(np.unique(read_labels(made / "labelsTr" / "leg_2.nii.gz")[0].array)) == {0, 2}


def test_masks_told_apart_by_name_are_shown_as_they_are_written():
    names = ["leg_01/femur", "leg_01/tibia", "Knee-2_Femur_mask", "tibia/Leg 3", "left tibia"]
    groups = by_name({name: Path(name) for name in names}, ("femur", "tibia"))
    assert {case: sorted(group) for case, group in groups.items()} == {
        "leg_01": ["femur", "tibia"],
        "Knee-2_mask": ["femur"],
        "Leg 3": ["tibia"],
        "left": ["tibia"],
    }
    # One case, however its files are written; where the name runs together with others, its words are shown.
    assert list(by_name({"a_1_femur": Path("x"), "tibia A01": Path("y")}, ("femur", "tibia"))) == ["a_1"]
    assert list(by_name({"leg7femur2": Path("x")}, ("femur",))) == ["leg 7 2"]


def test_overlaps_without_an_order_are_refused(place, tmp_path):
    write_structures(tmp_path, "{case}/{bone}.nii.gz")
    folders = str(tmp_path / "scans"), str(tmp_path / "masks")
    with pytest.raises(AutosegError, match=r"tibia over femur: \d+ voxels(?s:.)*--order femur,tibia"):
        import_dataset(place, "masks", *folders, name=NAME, yes=True)
    assert not tree(place.root)
    write_labels(some_labels(), grid(), tmp_path / "masks" / "leg_1" / "femur.nii.gz")
    with pytest.raises(AutosegError, match="no binary mask"):
        import_dataset(place, "masks", *folders, name=NAME, order=("femur", "tibia"), yes=True)


def test_an_order_names_every_structure(place, tmp_path):
    write_structures(tmp_path, "{case}/{bone}.nii.gz")
    folders = str(tmp_path / "scans"), str(tmp_path / "masks")
    for order in (("tibia",), ("tibia", "femur", "skull")):
        with pytest.raises(AutosegError, match=r"must name each of femur, tibia once|two masks|skull"):
            import_dataset(place, "masks", *folders, name=NAME, labels={"femur": 1, "tibia": 2}, order=order, yes=True)
    assert not tree(place.root)


def test_masks_without_voxel_size_lie_as_their_image_does(place, tmp_path):
    turned = grid(direction=((-1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, -1.0)))
    inside = ball(SHAPE, (1, 2, 3), 1.5).astype(np.uint8)
    for seed, case in enumerate(("a", "b")):
        write_image(noise(seed), turned, tmp_path / "scans" / f"{case}.nii.gz")
        write_labels(inside, grid(), tmp_path / "masks" / case / "bone.tif")
        (tmp_path / "masks" / case / "bone.json").unlink(missing_ok=True)
    assert not read_stored(tmp_path / "masks" / "a" / "bone.tif").sized
    folders = str(tmp_path / "scans"), str(tmp_path / "masks")
    made = import_dataset(place, "masks", *folders, name=NAME, channels=("MR",), yes=True)
    stored = read_stored(made / "labelsTr" / "a.nii.gz")
    assert np.array_equal(stored.array[0], inside), "voxel by voxel as in the files"
    assert stored.grid.agrees(turned, 1e-4)


# hdf5


def write_hdf5(path: Path, arrays, **attributes):
    import h5py

    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array)
            file[name].attrs.update(attributes)


def test_knee_files_with_one_hot_labels_and_a_profile(place, tmp_path, capsys):
    hot = np.zeros((*SHAPE, 6), np.uint8)
    hot[1, 2, 3:6, 0], hot[3, 2, 3:6, 5] = 1, 1
    for seed, visit in enumerate(("V00", "V01")):
        write_hdf5(tmp_path / "d" / f"train_001_{visit}.im", {"data": noise(seed)[0]})
        write_hdf5(tmp_path / "d" / f"train_001_{visit}.seg", {"data": hot})
    ask = {"name": NAME, "profile": "knee_cartilage", "yes": True}
    with pytest.raises(AutosegError, match="--spacing Z,Y,X"):
        import_dataset(place, "hdf5", str(tmp_path / "d"), **ask)
    made = import_dataset(place, "hdf5", str(tmp_path / "d"), spacing_mm=(0.7, 0.36, 0.4), **ask)
    assert "labels are one-hot, 6 classes; background is where none is set" in capsys.readouterr().out
    labels, stored = read_labels(made / "labelsTr" / "train_001_V01.nii.gz")
    assert np.allclose(stored.spacing_mm, (0.7, 0.36, 0.4))
    assert np.array_equal(labels.array[0], hot @ np.arange(1, 7))
    dataset = open_dataset(made)
    assert dataset.labels.names[6] == "lateral meniscus"
    image, _ = read_image([Path(dataset.cases[0].images[0])])
    assert np.array_equal(image.array, noise())
    assert dataset.group_by is not None
    with pytest.raises(AutosegError, match="at least 2 groups"):
        plan_and_preprocess(place, NAME, PlanOptions())


def test_hdf5_with_both_arrays_in_one_file_and_a_spacing(place, tmp_path):
    for n in (1, 2):
        two = np.moveaxis(noise(n, channels=2), 0, -1)
        arrays = {"image": two, "label": some_labels(n).astype(np.float32)}
        write_hdf5(tmp_path / "d" / f"{n}.h5", arrays, spacing=(3.0, 1.0, 0.5))
    made = import_dataset(place, "hdf5", str(tmp_path / "d"), name=NAME, channels=("T1", "T2"), yes=True)
    case = open_dataset(made).cases[1]
    image, stored = read_image([Path(p) for p in case.images])
    assert np.array_equal(image.array, noise(2, channels=2))
    assert stored.spacing_mm == (3.0, 1.0, 0.5)
    assert np.array_equal(read_labels(Path(case.label))[0].array[0], some_labels(2))


def test_overlapping_one_hot_classes_need_an_order(place, tmp_path):
    hot = np.zeros((2, *SHAPE), np.uint8)
    hot[0, 1, 2, 3:6], hot[1, 1, 2, 5:8] = 1, 1
    write_hdf5(tmp_path / "a.h5", {"image": noise()[0], "mask": hot})
    ask = {"name": NAME, "spacing_mm": (1.0, 1.0, 1.0), "yes": True}
    with pytest.raises(AutosegError, match="class_2 over class_1: 1 voxels"):
        import_dataset(place, "hdf5", str(tmp_path / "a.h5"), **ask)
    with pytest.raises(AutosegError, match="must name each of class_1, class_2 once"):
        import_dataset(place, "hdf5", str(tmp_path / "a.h5"), order=("class_1",), **ask)
    import_dataset(place, "hdf5", str(tmp_path / "a.h5"), order=("class_2", "class_1"), **ask)


def test_shapes_that_do_not_belong_together_are_refused():
    def array(*shape):
        return Array(path=Path("x"), name="x", shape=shape, whole=True, spacing_mm=None)

    assert layout_of(array(5, 7, 11), array(5, 7, 11)) == ((5, 7, 11), None)
    assert layout_of(array(2, 5, 7, 11), array(5, 7, 11)) == ((5, 7, 11), None)
    assert layout_of(array(5, 7, 11), array(6, 5, 7, 11)) == ((5, 7, 11), 0)
    assert layout_of(array(7, 11), array(7, 11, 3)) == ((7, 11), -1)
    assert layout_of(array(5, 7, 11, 4), array(5, 7, 11, 4)) == ((5, 7, 11), -1)
    assert layout_of(array(2, 5, 7, 11), array(2, 5, 7, 11)) == ((5, 7, 11), 0)
    with pytest.raises(AutosegError, match="do not belong together"):
        layout_of(array(5, 7, 11), array(5, 7, 12))


def test_a_spacing_for_fewer_axes_than_the_image_has_is_none():
    stated = Array(path=Path("x"), name="x", shape=SHAPE, whole=False, spacing_mm=(0.5, 0.4))
    assert stated.spacing_in(SHAPE) is None
    assert stated.spacing_in((7, 11)) == (1.0, 0.5, 0.4)
    nothing = Array(path=Path("x"), name="x", shape=SHAPE, whole=False, spacing_mm=(0.0, 0.5, 0.4))
    assert nothing.spacing_in(SHAPE) is None


def test_without_h5py_it_says_what_to_install(monkeypatch, tmp_path, place):
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    (tmp_path / "a.h5").write_bytes(b"x")
    with pytest.raises(AutosegError, match=r"pip install .*autoseg\[hdf5\]"):
        import_dataset(place, "hdf5", str(tmp_path / "a.h5"), name=NAME)
