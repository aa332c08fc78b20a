"""dataset import: every kind, by hand-made toy files; bytes and geometry are kept, guesses shown, overlaps counted."""

import gzip
import io
import json
import os
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from toys import OBLIQUE, ball, balls_dataset, grid
from typer.testing import CliRunner

from autoseg.cli import app
from autoseg.cli.options import parse_labels, parse_names
from autoseg.datasets import IMPORTS, PROFILES
from autoseg.datasets.folders import by_channel
from autoseg.datasets.importing import Draft, Entry, common_ending, encode, merge, put, write_draft
from autoseg.layout import open_dataset
from autoseg.pipeline.data import plan_and_preprocess
from autoseg.pipeline.importing import import_dataset
from autoseg.pipeline.planning import PlanOptions
from autoseg.readers import Stored, read_image, read_labels, read_stored, write_image, write_labels
from autoseg.records import AutosegError, to_json
from autoseg.workspace import Workspace

RUNNER = CliRunner()
SHAPE = (5, 7, 11)
NAME = "Dataset003_Toy"


@pytest.fixture
def place(tmp_path):
    return Workspace.find(tmp_path / "ws")


def noise(seed=0, shape=SHAPE, channels=1):
    return np.random.default_rng(seed).normal(100, 20, (channels, *shape)).astype(np.float32)


def some_labels(seed=0):
    labels = np.zeros(SHAPE, np.uint8)
    labels[ball(SHAPE, (2, 3, 4 + seed), 2)] = 1
    labels[ball(SHAPE, (2, 3, 9), 1)] = 2
    return labels


def write_pairs(images: Path, masks: Path, image_names, mask_names, ending=".nii.gz", first=0):
    for seed, (image, mask) in enumerate(zip(image_names, mask_names), first):
        write_image(noise(seed), grid(), images / f"{image}{ending}")
        write_labels(some_labels(seed), grid(), masks / f"{mask}{ending}")


def tree(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


# Files


def test_files_keep_their_bytes_or_at_least_their_voxels_type_and_grid(tmp_path):
    oblique = grid(direction=OBLIQUE, origin_mm=(3.0, -4.0, 5.5))
    source = tmp_path / "a.nii.gz"
    write_image(noise(), oblique, source)
    put(source, tmp_path / "same" / "b.nii.gz")
    assert (tmp_path / "same" / "b.nii.gz").read_bytes() == source.read_bytes()
    for ending in (".nrrd", ".mha", ".nii"):
        target = tmp_path / f"c{ending}"
        put(source, target)
        before, after = read_stored(source), read_stored(target)
        assert np.array_equal(before.array, after.array) and before.array.dtype == after.array.dtype
        assert before.grid.agrees(after.grid, 1e-4)


def test_a_header_with_a_voxel_file_becomes_one_file(tmp_path):
    write_image(noise(), grid(), tmp_path / "a.mhd")
    assert (tmp_path / "a.raw").is_file() or (tmp_path / "a.zraw").is_file()
    assert common_ending([tmp_path / "a.mhd"], [tmp_path / "b.nii.gz"]) == ".mha"
    put(tmp_path / "a.mhd", tmp_path / "out" / "b.mha")
    assert np.array_equal(read_stored(tmp_path / "out" / "b.mha").array, noise())
    assert tree(tmp_path / "out") == {"b.mha"}


def test_spacing_beside_a_tiff_comes_along(tmp_path):
    write_image(noise().astype(np.uint8), grid(), tmp_path / "a.tif")
    put(tmp_path / "a.tif", tmp_path / "out" / "b_0000.tif")
    assert read_stored(tmp_path / "out" / "b_0000.tif").grid.spacing_mm == grid().spacing_mm


def test_a_type_that_would_lose_something_is_refused(tmp_path):
    wide = Stored(array=np.full((1, *SHAPE), 2**40), grid=grid())
    encode(wide, tmp_path / "a.nii.gz")
    assert read_stored(tmp_path / "a.nii.gz").array.max() == 2**40
    with pytest.raises(AutosegError, match="without loss"):
        encode(wide, tmp_path / "a.tif")
    double = Stored(array=np.full((1, *SHAPE), 0.1), grid=grid())
    encode(double, tmp_path / "b.nii.gz")
    assert read_stored(tmp_path / "b.nii.gz").array.dtype == np.float64


def test_merging_counts_overlaps_and_the_last_one_wins():
    a, b = np.zeros((1, 2, 3), bool), np.zeros((1, 2, 3), bool)
    a[0, 0], b[0, :, 1] = True, True
    values = {"background": 0, "a": 1, "b": 300}
    labels, overlaps = merge({"a": a, "b": b}, values, ("a", "b"))
    assert labels.tolist() == [[[1, 300, 1], [0, 300, 0]]]
    assert overlaps == Counter({("a", "b"): 1})
    assert merge({"a": a, "b": b}, values, ("b", "a"))[0].tolist() == [[[1, 1, 1], [0, 300, 0]]]
    assert not merge({"a": ~a & a}, values, ("a", "b"))[0].any()


# folders


def test_folders_in_any_naming(place, tmp_path, capsys):
    write_pairs(tmp_path / "scans", tmp_path / "segs", ["Scan 01", "Scan 02"], ["p1_manual", "p2_manual"])
    write_labels(some_labels(), grid(), tmp_path / "segs" / "p9_manual.nii.gz")
    made = import_dataset(
        place, "folders", str(tmp_path / "scans"), str(tmp_path / "segs"), name=NAME, channels=("MR",), yes=True
    )
    said = capsys.readouterr().out
    assert "Scan_01  Scan 01  p1_manual" in said
    assert "mask p9_manual: no image" in said
    assert f"autoseg plan_and_preprocess -d {NAME} --workspace" in said
    dataset = open_dataset(made)
    assert [case.id for case in dataset.cases] == ["Scan_01", "Scan_02"]
    assert dataset.labels.names == ("background", "class_1", "class_2")
    assert (made / "imagesTr" / "Scan_02_0000.nii.gz").read_bytes() == (
        tmp_path / "scans" / "Scan 02.nii.gz"
    ).read_bytes()
    assert tree(place.root / "raw") == {f"{NAME}/{p}" for p in tree(made)}


def test_patterns_reach_images_and_masks_of_one_folder_a_case(place, tmp_path):
    for seed, case in enumerate(("pat-a", "pat-b")):
        write_image(noise(seed), grid(), tmp_path / "data" / case / "t1.nii.gz")
        write_labels(some_labels(), grid(), tmp_path / "data" / case / "roi.nii.gz")
    data = tmp_path / "data"
    made = import_dataset(
        place, "folders", f"{data}/*/t1.nii.gz", f"{data}/*/roi.nii.gz", name=NAME, channels=("MR",), yes=True
    )
    assert [case.id for case in open_dataset(made).cases] == ["pat-a", "pat-b"]


def test_masks_without_voxel_size_take_the_grid_of_their_image(place, tmp_path):
    flat = grid((1, 7, 11), (1.0, 0.7, 0.9), dimension=2)
    for n in range(2):
        write_image(noise(n, (1, 7, 11)), flat, tmp_path / "i" / f"{n}.nii.gz")
        mask = (some_labels()[2:3] > 0).astype(np.uint8) * 255
        write_labels(mask, grid((1, 7, 11), (1.0, 1.0, 1.0), dimension=2), tmp_path / "m" / f"{n}.png")
    made = import_dataset(
        place,
        "folders",
        str(tmp_path / "i"),
        str(tmp_path / "m"),
        name=NAME,
        labels={"thing": 255},
        yes=True,
    )
    volume, stored = read_labels(made / "labelsTr" / "1.nii.gz")
    assert stored.agrees(flat, 1e-5)
    assert set(np.unique(volume.array)) == {0, 255}
    assert open_dataset(made).labels.values == (0, 255)


@pytest.mark.parametrize("layout", ["{}_{}.nii.gz", "{}/{}.nii.gz", "{} {} scan.nii.gz"])
def test_channels_in_files_of_their_own(place, tmp_path, layout):
    for n, case in enumerate(("p01", "p02")):
        for c, channel in enumerate(("t1", "t1-ce")):
            write_image(noise(2 * n + c), grid(), tmp_path / "i" / layout.format(case, channel))
        write_labels(some_labels(n), grid(), tmp_path / "m" / f"{case}_seg.nii.gz")
    folders = str(tmp_path / "i"), str(tmp_path / "m")
    made = import_dataset(place, "folders", *folders, name=NAME, channels=("T1", "T1 CE"), yes=True)
    image, _ = read_image([Path(p) for p in open_dataset(made).cases[1].images])
    assert np.array_equal(image.array, np.concatenate([noise(2), noise(3)]))
    with pytest.raises(AutosegError, match=r"names none of the channels T1 CE, FLAIR"):
        import_dataset(place, "folders", *folders, name="Dataset004_B", channels=("T1 CE", "FLAIR"), yes=True)


def test_numbered_channels(tmp_path):
    paths = [tmp_path / f"{case}_{n:04d}.nii.gz" for case in ("a", "b") for n in range(2)]
    for path in paths:
        write_image(noise(), grid(), path)
    assert list(by_channel(paths, ("T1", "T2"))) == ["a", "b"]
    assert list(by_channel(paths[::2], ("MR",))) == ["a_0000", "b_0000"]
    assert by_channel(paths[:1], ()) == {"a_0000": (paths[0],)}
    with pytest.raises(AutosegError, match="case a has no image of T2"):
        by_channel(paths[:1] + paths[2:], ("T1", "T2"))


def test_nothing_is_written_unless_the_pairs_are_confirmed(tmp_path):
    write_pairs(tmp_path / "i", tmp_path / "m", ["1", "2"], ["1", "2"])
    line = ["dataset", "import", "folders", str(tmp_path / "i"), str(tmp_path / "m"), "-d", NAME]
    line += ["--workspace", str(tmp_path / "ws"), "--channels", "MR"]
    for answer, words_said in (("n\n", "nothing was imported"), ("", "--yes")):
        refused = RUNNER.invoke(app, line, input=answer)
        assert words_said in str(refused.exception)
        assert not tree(tmp_path / "ws")
    assert not list((tmp_path / "ws" / "raw").iterdir())
    done = RUNNER.invoke(app, line, input="y\n", catch_exceptions=False)
    assert "Checked: no errors, 0 warnings" in done.output
    with pytest.raises(AutosegError, match="exists; choose another"):
        RUNNER.invoke(app, [*line, "--yes"], catch_exceptions=False)


def test_a_failing_import_leaves_nothing_and_faulty_voxels_are_said_after(place, tmp_path, capsys):
    write_pairs(tmp_path / "i", tmp_path / "m", ["1", "2"], ["1", "2"])
    folders = str(tmp_path / "i"), str(tmp_path / "m")
    with pytest.raises(AutosegError, match=r"values 2, which --labels does not name"):
        import_dataset(place, "folders", *folders, name=NAME, labels={"one": 1}, yes=True)
    assert not tree(place.root)
    write_labels(some_labels(), grid(spacing_mm=(3.0, 1.0, 0.9)), tmp_path / "m" / "2.nii.gz")
    with pytest.raises(AutosegError, match="is written, but has 1 errors"):
        import_dataset(place, "folders", *folders, name=NAME, yes=True)
    assert "image and label differ in spacing" in capsys.readouterr().out
    assert (place.raw(NAME) / "dataset.json").is_file()


def test_what_a_killed_import_left_goes_with_the_next_one(place, tmp_path):
    write_pairs(tmp_path / "i", tmp_path / "m", ["1", "2"], ["1", "2"])
    (place.root / "raw" / f".{NAME}.abcd1234" / NAME).mkdir(parents=True)
    assert place.datasets() == {}
    place.raw(NAME).mkdir()
    before = os.umask(0o027)
    try:
        made = import_dataset(place, "folders", str(tmp_path / "i"), str(tmp_path / "m"), name=NAME, yes=True)
    finally:
        os.umask(before)
    assert {p.name for p in (place.root / "raw").iterdir()} == {NAME}
    assert made.stat().st_mode & 0o777 == 0o750, "who may read it is the user's choice"


def test_names_that_only_capitals_tell_apart_are_refused(tmp_path):
    entries = tuple(Entry(case=case, shown=(f"{case}.png",), write=lambda place: None) for case in ("Knee", "knee"))
    draft = Draft(entries=entries, channels=("MR",), labels={"background": 0, "a": 1}, ending=".png")
    with pytest.raises(AutosegError, match=r"Knee\.png and knee\.png would both become case Knee"):
        write_draft(draft, tmp_path, None)
    assert not tree(tmp_path)


def test_values_like_those_of_ct_ask_for_the_name(place, tmp_path, capsys):
    write_image(noise() - 1000, grid(), tmp_path / "i" / "1.nii.gz")
    write_labels(some_labels(), grid(), tmp_path / "m" / "1.nii.gz")
    import_dataset(place, "folders", str(tmp_path / "i"), str(tmp_path / "m"), name=NAME, yes=True)
    assert "if this is CT, give --channels CT" in capsys.readouterr().out


def test_channels_without_a_name_ask_for_one_each(place, tmp_path):
    write_image(noise(channels=3), grid(), tmp_path / "i" / "1.nii.gz")
    write_labels(some_labels(), grid(), tmp_path / "m" / "1.nii.gz")
    with pytest.raises(AutosegError, match=r"holds 3 channels .*, expected are 1; give --channels a name for each"):
        import_dataset(
            place, "folders", str(tmp_path / "i"), str(tmp_path / "m"), name=NAME, channels=("RGB",), yes=True
        )


def test_requests_that_cannot_be_met_say_what_to_do(place, tmp_path):
    for words_said, kind, rest in (
        ("choose one of:\n  msd", "msdd", {}),
        ("how the dataset is to be called", "folders", {}),
        ("Dataset012_Knee", "folders", {"name": "12_Knee"}),
        ("say where the masks are", "folders", {"name": NAME}),
        ("has no image file", "train-val", {"name": NAME}),
        ("unknown profile", "folders", {"name": NAME, "profile": "knee"}),
        ("--order means nothing for train-val", "train-val", {"name": NAME, "order": ("a", "b")}),
        ("--spacing means nothing for masks", "masks", {"name": NAME, "spacing_mm": (1.0, 1.0, 1.0)}),
        ("a folder of masks means nothing for msd", "msd", {"name": NAME, "masks": "m"}),
    ):
        (tmp_path / "empty" / "train" / "images").mkdir(parents=True, exist_ok=True)
        with pytest.raises(AutosegError, match=words_said):
            import_dataset(place, kind, str(tmp_path / "empty"), **rest)
    assert parse_labels("a b=1, c=-2") == {"a b": 1, "c": -2}
    assert parse_names(None) == ()
    for wrong in ("a=x", "a=1,a=2"):
        with pytest.raises(AutosegError, match="--labels"):
            parse_labels(wrong)


# train-val


@pytest.mark.parametrize(("images", "masks"), [("images", "masks"), ("magn", "mask")])
def test_a_split_in_folders_becomes_the_fold(place, tmp_path, capsys, images, masks):
    for part, names, first in (("train", ["1", "2", "3"], 0), ("valid", ["1"], 5), ("test", ["7"], 7)):
        write_pairs(tmp_path / "d" / part / images, tmp_path / "d" / part / masks, names, names, first=first)
    made = import_dataset(place, "train-val", str(tmp_path / "d"), name=NAME, channels=("MR",), yes=True)
    fold = json.loads((made / "splits.json").read_text())["folds"]
    assert fold == [{"train": ["train_1", "train_2", "train_3"], "val": ["val_1"]}]
    assert {"imagesTs/test_7_0000.nii.gz", "labelsTs/test_7.nii.gz"} <= tree(made)
    shutil.rmtree(tmp_path / "d" / "test" / masks)
    other = import_dataset(place, "train-val", str(tmp_path / "d"), name="Dataset004_B", channels=("MR",), yes=True)
    assert "has no masks and is left out" in capsys.readouterr().out
    assert not (other / "imagesTs").exists()
    plan_and_preprocess(place, NAME, PlanOptions(configurations=("2d",)))
    kept = json.loads((place.prepared(NAME) / "splits.json").read_text())
    assert kept["folds"] == fold


# msd


def msd_task(top: Path, channels: int) -> None:
    """A task as the Decathlon gives it out, with the hidden files that macOS leaves."""
    for n in (1, 2):
        image = noise(n, channels=channels)
        write_image(image if channels > 1 else image[0], grid(direction=OBLIQUE), top / "imagesTr" / f"hip_{n}.nii.gz")
        write_labels(some_labels(n), grid(direction=OBLIQUE), top / "labelsTr" / f"hip_{n}.nii.gz")
        (top / "imagesTr" / f"._hip_{n}.nii.gz").write_bytes(b"macOS")
    write_image(noise(3, channels=channels), grid(), top / "imagesTs" / "hip_3.nii.gz")
    card = {
        "name": "Hippocampus",
        "licence": "CC-BY-SA 4.0",
        "modality": {str(n): name for n, name in enumerate(("MRI", "ADC")[:channels])},
        "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
        "numTraining": 2,
        "training": [{"image": f"./imagesTr/hip_{n}.nii.gz", "label": f"./labelsTr/hip_{n}.nii.gz"} for n in (1, 2)],
        "test": ["./imagesTs/hip_3.nii.gz"],
    }
    (top / "dataset.json").write_text(json.dumps(card))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_a_decathlon_task(place, tmp_path, channels, packed):
    task = tmp_path / "Task04_Hippocampus"
    msd_task(task, channels)
    source = task
    if packed:
        source = tmp_path / "Task04_Hippocampus.tar"
        with tarfile.open(source, "w") as archive:
            archive.add(task, arcname=task.name)
    made = import_dataset(place, "msd", str(source))
    assert made == place.raw("Dataset004_Hippocampus")
    dataset = open_dataset(made)
    assert dataset.channel_names == ("MRI", "ADC")[:channels]
    assert dataset.labels.names == ("background", "Anterior", "Posterior")
    assert json.loads((made / "dataset.json").read_text())["licence"] == "CC-BY-SA 4.0"
    before, stored = read_image([task / "imagesTr" / "hip_1.nii.gz"])
    after, stored_after = read_image([Path(image) for image in dataset.cases[0].images])
    assert np.array_equal(before.array, after.array)
    assert stored.agrees(stored_after, 1e-4)
    files = {f"imagesTr/hip_{n}_{c:04d}.nii.gz" for n in (1, 2) for c in range(channels)}
    files |= {f"imagesTs/hip_3_{c:04d}.nii.gz" for c in range(channels)}
    assert tree(made) == files | {"labelsTr/hip_1.nii.gz", "labelsTr/hip_2.nii.gz", "dataset.json"}


def test_a_hostile_or_broken_archive_writes_nothing_elsewhere(place, tmp_path):
    task = tmp_path / "Task04_Hippocampus"
    msd_task(task, 1)
    hostile = tmp_path / "Task04_Hippocampus.tar"
    with tarfile.open(hostile, "w") as archive:
        archive.add(task, arcname=task.name)
        for name in (
            "../../evil.nii.gz",
            "/tmp/evil.nii.gz",
            "T/imagesTr/..\\..\\evil.nii.gz",
            "T/imagesTr/c:evil.nii.gz",
            "Task04/imagesTr/../../../evil.nii.gz",
        ):
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"evil"))
        link = tarfile.TarInfo("Task04_Hippocampus/labelsTr/link.nii.gz")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    before = tree(tmp_path)
    made = import_dataset(place, "msd", str(hostile))
    assert not any("evil" in name or "link" in name for name in tree(tmp_path))
    assert tree(tmp_path) - before == {f"ws/raw/{made.name}/{name}" for name in tree(made)}
    content = hostile.read_bytes()
    (tmp_path / "Task05_Half.tar").write_bytes(content[: len(content) // 3])
    (tmp_path / "Task06_No.tar").write_bytes(b"no archive")
    (tmp_path / "Task07_Cut.tar").write_bytes(gzip.compress(content)[:-9])
    for name in ("Task05_Half", "Task06_No", "Task07_Cut"):
        with pytest.raises(AutosegError, match=r"truncated|no dataset\.json"):
            import_dataset(place, "msd", str(tmp_path / f"{name}.tar"))
    assert {p.name for p in (place.root / "raw").iterdir()} == {made.name}


def test_a_decathlon_task_with_missing_files_is_refused(place, tmp_path):
    task = tmp_path / "Task04_Hippocampus"
    msd_task(task, 1)
    (task / "labelsTr" / "hip_2.nii.gz").unlink()
    with pytest.raises(AutosegError, match=r"1 listed files are missing, for example hip_2"):
        import_dataset(place, "msd", str(task))


@pytest.mark.parametrize("source", ["folders", "nnunet", "hdf5"])
def test_links_to_files_that_were_not_fetched_are_named(place, tmp_path, source):
    """As git-annex leaves them: an import without those cases would look whole."""
    top = tmp_path / "Dataset009_Balls"
    balls_dataset(top)
    ending = ".h5" if source == "hdf5" else ".nii.gz"
    for folder in ("imagesTr", "labelsTr"):
        (top / folder / f"p9_9{ending}").symlink_to(f"../annex/p9_9{ending}")
    images, masks = (top, None) if source != "folders" else (top / "imagesTr", str(top / "labelsTr"))
    with pytest.raises(
        AutosegError, match=r"[12] of \d+ files cannot be read: .*p9_9.* is a link to \.\./annex/p9_9.*fetch"
    ):
        import_dataset(place, source, str(images), masks, name=NAME, yes=True)
    assert not place.raw(NAME).exists()


# nnunet


def test_a_raw_dataset_of_nnunet_is_taken_as_it_is_with_its_folds(place, tmp_path):
    source = tmp_path / "nnUNet_raw" / "Dataset009_Balls"
    balls_dataset(source)
    folds = tmp_path / "nnUNet_preprocessed" / "Dataset009_Balls" / "splits_final.json"
    folds.parent.mkdir(parents=True)
    folds.write_text(json.dumps([{"train": ["p0_0", "p0_1"], "val": ["p1_0", "p1_1"]}]))
    made = import_dataset(place, "nnunet", str(source))
    assert made == place.raw("Dataset009_Balls")
    assert tree(made) == tree(source) | {"splits_final.json"}
    image = "imagesTr/p0_0_0000.nii.gz"
    assert (made / image).stat().st_ino == (source / image).stat().st_ino
    assert json.loads((made / "dataset.json").read_text()) == json.loads((source / "dataset.json").read_text())
    assert len(open_dataset(made).cases) == 4


def test_an_nnunet_dataset_of_lists_and_regions(place, tmp_path):
    source = tmp_path / "nnUNet_raw" / "Dataset009_Balls"
    balls_dataset(source)
    card = json.loads((source / "dataset.json").read_text())
    case = {"images": ["imagesTr/p0_0_0000.nii.gz"], "label": "labelsTr/p0_0.nii.gz"}
    named = {"channel_names": {"1": "T2", "0": "T1"}, "labels": {"background": 0, "all": [7, 300], "core": 300}}
    card |= named | {"dataset": {"one": {**case, "images": case["images"] * 2}}}
    del card["numTraining"]
    (source / "dataset.json").write_text(json.dumps(card))
    with pytest.raises(AutosegError, match="have regions"):
        import_dataset(place, "nnunet", str(source), profile="msd_05_prostate")
    made = import_dataset(place, "nnunet", str(source))
    dataset = open_dataset(made)
    assert dataset.channel_names == ("T1", "T2")
    assert dataset.cases[0].images[0] == str(source / case["images"][0])
    assert json.loads((made / "dataset.json").read_text())["numTraining"] == 1
    assert not (made / "imagesTr").exists()
    for broken in ({"channel_names": {"a": "T1"}}, {"file_ending": 3}, {"labels": []}):
        (source / "dataset.json").write_text(json.dumps(card | broken))
        with pytest.raises(AutosegError, match="cannot be understood"):
            import_dataset(place, "nnunet", str(source), name=NAME)


# profiles


def test_profiles_are_whole_and_listed():
    assert sum(name.startswith("msd_") for name in PROFILES) == 10
    shown = RUNNER.invoke(app, ["dataset", "profiles"]).output
    for name, profile in PROFILES.items():
        assert name in shown and to_json(profile)
        assert profile.labels["background"] == 0
    assert list(PROFILES["knee_cartilage"].labels.values()) == list(range(7))
    cartilage = {f"{place} cartilage" for place in ("femoral", "medial tibial", "lateral tibial", "patellar")}
    menisci = {"medial meniscus", "lateral meniscus"}
    assert PROFILES["knee_cartilage"].labels.keys() == {"background"} | cartilage | menisci
    assert PROFILES["lower_limb_bones"].labels.keys() == {"background", "tibia", "femur", "fibula", "pelvis"}
    assert PROFILES["lower_limb_bones"].licence is None
    assert set(IMPORTS) == {"msd", "nnunet", "folders", "masks", "train-val", "hdf5"}


def test_the_patients_of_a_profile_make_the_folds(place, tmp_path):
    names = [f"patient{n:03d}_frame{f:02d}" for n in (1, 2, 3) for f in (1, 12)]
    write_pairs(tmp_path / "i", tmp_path / "m", names, [f"{name}_gt" for name in names])
    folders = str(tmp_path / "i"), str(tmp_path / "m")
    import_dataset(place, "folders", *folders, name=NAME, profile="acdc", yes=True)
    plan_and_preprocess(place, NAME, PlanOptions(configurations=("2d",)))
    kept = json.loads((place.prepared(NAME) / "splits.json").read_text())
    assert kept["group_by"] == r"(patient\d+)"
    assert len(kept["folds"]) == 3
    with pytest.raises(AutosegError, match="expected are 2"):
        import_dataset(place, "folders", *folders, name="Dataset004_B", profile="msd_05_prostate", yes=True)
