"""Formats without a voxel size: what lies beside them, written and read, and the whole way with them."""

import json

import numpy as np
import pytest
from toys import grid

from autoseg.evaluation import evaluate_folders, evaluate_pairs
from autoseg.labels import Labels
from autoseg.layout import open_dataset
from autoseg.pipeline.crossval import cross_validate
from autoseg.pipeline.data import check, plan_and_preprocess
from autoseg.pipeline.planning import PlanOptions
from autoseg.pipeline.postprocess import measure_pairs
from autoseg.pipeline.predict import PredictOptions, predict
from autoseg.pipeline.recipe import TrainOptions
from autoseg.pipeline.train import train_fold
from autoseg.readers import files_of, read_image, read_pair, read_stored, write_image, write_labels
from autoseg.records import AutosegError, load_json
from autoseg.schema import Fingerprint, Request
from autoseg.settings import in_json
from autoseg.volume import Grid
from autoseg.workspace import Workspace

LABELS = Labels.from_dataset({"background": 0, "disc": 3})
HALF = Grid(shape=(1, 23, 31), spacing_mm=(1.0, 0.5, 0.25), dimension=2)


def square(shape, left=0):
    """A block of value 3 in every slice but the first (of volumes), moved by `left`."""
    made = np.zeros(shape, np.uint8)
    made[shape[0] > 1 :, 5:12, 7 + left : 16 + left] = 3
    return made


@pytest.mark.parametrize("ending", [".tif", ".png", ".bmp"])
def test_a_2d_file_and_what_is_written_beside_it_give_the_grid_back(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    write_labels(square(HALF.shape), HALF, path)
    assert read_stored(path).grid == HALF and read_stored(path).sized
    assert json.loads((tmp_path / "a.json").read_text()) == {"spacing": [0.5, 0.25]}
    assert files_of(path) == (path, tmp_path / "a.json")


@pytest.mark.parametrize("ending", [".tif", ".png"])
def test_nothing_is_written_beside_a_2d_file_that_says_nothing(tmp_path, ending):
    path, plain = tmp_path / f"a{ending}", Grid(shape=HALF.shape, spacing_mm=(1.0, 1.0, 1.0), dimension=2)
    write_labels(square(HALF.shape), plain, path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert read_stored(path).grid == plain and not read_stored(path).sized
    # What an earlier file left there would be read with this one.
    write_labels(square(HALF.shape), HALF, path)
    write_labels(square(HALF.shape), plain, path)
    assert read_stored(path).grid == plain


def test_the_file_of_another_program_is_neither_read_nor_written_over(tmp_path):
    beside = tmp_path / "a.json"
    beside.write_text('{"shapes": []}')
    plain = Grid(shape=HALF.shape, spacing_mm=(1.0, 1.0, 1.0), dimension=2)
    write_labels(square(HALF.shape), plain, tmp_path / "a.png")
    assert read_stored(tmp_path / "a.png").grid == plain
    with pytest.raises(AutosegError, match=r"a\.json, and that file is another program's; move it"):
        write_labels(square(HALF.shape), HALF, tmp_path / "a.png")
    with pytest.raises(AutosegError, match="another program's"):
        write_labels(square((4, 23, 31)), grid((4, 23, 31)), tmp_path / "a.tif")
    assert beside.read_text() == '{"shapes": []}' and not (tmp_path / "a.tif").exists()


def test_three_numbers_beside_a_picture_are_refused(tmp_path):
    write_labels(square(HALF.shape), HALF, tmp_path / "a.png")
    (tmp_path / "a.json").write_text('{"spacing": [1, 0.5, 0.5]}')
    with pytest.raises(AutosegError, match=r'a\.json must hold \{"spacing": \[y, x\]\}: a\.png is 2D'):
        read_stored(tmp_path / "a.png")


@pytest.mark.parametrize("ending", [".tif", ".png", ".nii.gz"])
def test_distances_in_2d_are_millimetres(tmp_path, ending):
    """Moved by 4 columns of 0.25 mm: the surfaces are 1 mm apart at most."""
    truth, prediction = tmp_path / f"t{ending}", tmp_path / f"p{ending}"
    write_labels(square(HALF.shape), HALF, truth)
    write_labels(square(HALF.shape, 4), HALF, prediction)
    (score,) = evaluate_pairs([("a", truth, prediction)], LABELS, quiet=True).scores
    assert score.hd95_mm == 1.0


@pytest.mark.parametrize("place", [HALF, grid((4, 23, 31), (3.0, 1.0, 0.5))], ids=["2d", "3d"])
@pytest.mark.parametrize("bare", ["truth", "prediction"])
def test_the_file_that_says_nothing_lies_on_the_grid_of_the_other(tmp_path, place, bare):
    paths = {name: tmp_path / f"{name}.tif" for name in ("truth", "prediction")}
    for path in paths.values():
        write_labels(square(place.shape), place, path)
    paths[bare].with_suffix(".json").unlink()
    assert [volume.grid for volume in read_pair(paths["truth"], paths["prediction"])] == [place, place]
    pair = ("a", paths["truth"], paths["prediction"])
    assert evaluate_pairs([pair], LABELS, quiet=True).scores[0].dice == 1.0
    assert [outcome.reason() for outcome in measure_pairs([pair], LABELS, {}, 1)] == [""]
    # Both say something: then they must agree.
    paths[bare].with_suffix(".json").write_text(json.dumps({"spacing": [2.0] * place.dimension}))
    with pytest.raises(AutosegError, match="different grids"):
        evaluate_pairs([pair], LABELS, quiet=True)


def test_voxels_of_a_bare_file_lie_as_in_the_file_of_the_other(tmp_path):
    """Not as in its canonical form: the other file runs from right to left and from back to front."""
    turned = grid((4, 23, 31), direction=((-1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, 1.0)))
    write_image(square(turned.shape)[None], grid(turned.shape), tmp_path / "a.tif")
    (tmp_path / "a.json").unlink()
    write_labels(square(turned.shape)[:, ::-1, ::-1], turned, tmp_path / "a.nrrd")
    one, two = read_pair(tmp_path / "a.tif", tmp_path / "a.nrrd")
    assert one.grid == two.grid
    np.testing.assert_array_equal(one.array, two.array)


def dataset(root, place, ending, beside):
    """A raw dataset of four cases, with sidecars beside the files of the folders `beside` alone."""
    raw = root / "raw" / "Dataset003_Bare"
    for number in range(4):
        labels = square(place.shape, number)
        image = labels * 20 + np.random.default_rng(number).integers(90, 110, place.shape)
        split = "Ts" if number == 3 else "Tr"
        for folder, path in (("images", f"c{number}_0000"), ("labels", f"c{number}")):
            target = raw / f"{folder}{split}" / f"{path}{ending}"
            write_image((image if folder == "images" else labels).astype(np.uint8), place, target)
            target.with_suffix(".json").unlink()
            if folder in beside:
                said = {"spacing": place.spacing_mm[3 - place.dimension :]}
                (target.parent / f"c{number}.json").write_text(json.dumps(said))
    facts = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "disc": 3}, "numTraining": 3}
    (raw / "dataset.json").write_text(json.dumps({**facts, "file_ending": ending}))
    return raw


@pytest.mark.parametrize(
    ("place", "ending", "beside"),
    [
        (HALF, ".tif", ("images", "labels")),
        (HALF, ".png", ("images",)),
        (grid((4, 23, 31), (3.0, 0.5, 0.25)), ".tif", ("images",)),
    ],
    ids=["2d-both", "2d-png-images", "3d-images"],
)
def test_the_whole_way(tmp_path, place, ending, beside):
    raw = dataset(tmp_path, place, ending, beside)
    here = Workspace(tmp_path)
    check(here, "3")
    small = {"features": [4, 6], "strides": [[1, 1], [2, 2]], "kernels": [[3, 3]] * 2}
    small |= {"encoder_blocks": [1, 1], "decoder_blocks": [1]}
    shrink = {f"configurations.2d.network.{name}": value for name, value in small.items()}
    shrink |= {"configurations.2d.patch": [16, 16], "configurations.2d.batch_size": 2}
    plan_and_preprocess(here, "3", PlanOptions(configurations=("2d",), request=Request(changes=in_json(shrink))))
    facts = load_json(Fingerprint, here.prepared("Dataset003_Bare") / "fingerprint.json")
    assert {case.spacing_mm for case in facts.cases} == {place.spacing_mm}
    quick = {"steps_per_epoch": 2, "validation_steps": 1, "tune": False}
    train_fold(here, "3", "2d", "0", TrainOptions(epochs=1, device="cpu", changes=quick))
    fold = tmp_path / "runs" / "Dataset003_Bare" / "default" / "2d" / "fold_0"
    cross_validate([fold], open_dataset(raw))
    predict(here, raw / "imagesTs", tmp_path / "out", PredictOptions(mirror=False, device="cpu", model=fold))
    assert read_stored(tmp_path / "out" / f"c3{ending}").grid == read_image([raw / "imagesTs" / f"c3_0000{ending}"])[1]
    for truth, said in ((raw / "labelsTr", fold / "validation"), (raw / "labelsTs", tmp_path / "out")):
        summary = evaluate_folders(truth, said, labels=LABELS, partial=True, quiet=True)
        (score,) = summary.scores
        # Three slices of 7 x 9 voxels; an area is no volume.
        wanted = None if place.dimension == 2 else pytest.approx(3 * 63 * 3.0 * 0.5 * 0.25 / 1000)
        assert score.volume_truth_ml == wanted
