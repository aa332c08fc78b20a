"""Prediction with a model of random weights: every stored form of one volume gives the same labels, in its own grid."""

import itertools

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from toys import LABELS, OBLIQUE, configuration, grid, plan

import autoseg
from autoseg.checkpoint import save_weights
from autoseg.networks import build
from autoseg.pipeline.predict import PredictOptions, choose_model, predict
from autoseg.readers import read_labels, write_image
from autoseg.records import AutosegError, save_json
from autoseg.schema import Fold, Recipe, Run
from autoseg.volume import Grid, canonical_grid, from_canonical
from autoseg.workspace import Workspace

SHAPE = (7, 12, 15)


def finished_run(folder, seed=0, finished="2026-01-01T00:00:00+00:00", dimension=3, channels=("MR",)):
    """A fold folder with a small network of random weights, as training would leave it."""
    here = configuration(spacing_mm=(2.0, 1.3, 1.1)) if dimension == 3 else configuration("2d", (1.3, 1.1), (8, 12))
    made = plan(here, channels=channels, axis_order=(1, 0, 2) if dimension == 3 else (0, 1, 2))
    torch.manual_seed(seed)
    save_weights(build(here.network, len(channels), LABELS.heads), folder / "weights.safetensors")
    save_json(
        Run(
            autoseg_version=autoseg.__version__,
            versions={},
            dataset="Dataset001_Toy",
            configuration=here.name,
            fold=0,
            cases=Fold(train=("a",), val=("b",)),
            plan=made,
            recipe=Recipe(),
            data_hash="",
            device="cpu",
            started="2026-01-01T00:00:00+00:00",
            finished=finished,
        ),
        folder / "run.json",
    )
    return folder


def affine(path):
    image = sitk.ReadImage(str(path))
    matrix = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    return np.column_stack([matrix, image.GetOrigin()])


@pytest.mark.parametrize("direction", [np.eye(3), np.asarray(OBLIQUE)], ids=["straight", "oblique"])
def test_all_48_stored_forms_of_one_volume_give_the_same_labels(tmp_path, direction):
    model = finished_run(tmp_path / "fold_0")
    canonical = Grid(
        shape=SHAPE,
        spacing_mm=(2.5, 1.2, 0.9),
        origin_mm=(10.0, -20.0, 5.0),
        direction=tuple(map(tuple, direction.tolist())),
    )
    image = np.random.default_rng(1).normal(100, 20, SHAPE).astype(np.float32)
    stored = {}
    for number, (order, flips) in enumerate(
        itertools.product(itertools.permutations(range(3)), itertools.product((False, True), repeat=3))
    ):
        columns, corner = [], np.array(canonical.origin_mm)
        for axis, flip in zip(order, flips):
            step = direction[:, 2 - axis] * canonical.spacing_mm[axis]
            if flip:
                corner = corner + step * (SHAPE[axis] - 1)
            columns.append(direction[:, 2 - axis] * (-1 if flip else 1))
        form = Grid(
            shape=tuple(SHAPE[axis] for axis in order),
            spacing_mm=tuple(canonical.spacing_mm[axis] for axis in order),
            origin_mm=tuple(corner.tolist()),
            direction=tuple(map(tuple, np.column_stack(columns[::-1]).tolist())),
        )
        assert np.array_equal(canonical_grid(form).shape, SHAPE)
        name = f"form{number:02d}"
        write_image(image, form, tmp_path / "in" / f"{name}_0000.nrrd")
        stored[name] = form
    predict(
        Workspace(tmp_path), tmp_path / "in", tmp_path / "out", PredictOptions(model=model, mirror=False, device="cpu")
    )
    assert len(stored) == 48
    expected, _ = read_labels(tmp_path / "out" / "form00.nrrd")
    assert len(np.unique(expected.array)) == 3
    for name, form in stored.items():
        found, grid_of_file = read_labels(tmp_path / "out" / f"{name}.nrrd")
        assert np.array_equal(found.array, expected.array), form
        assert grid_of_file.shape == form.shape
        assert np.allclose(
            affine(tmp_path / "out" / f"{name}.nrrd"), affine(tmp_path / "in" / f"{name}_0000.nrrd"), rtol=0, atol=1e-6
        )
        raw = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / f"{name}.nrrd")))
        assert np.array_equal(raw, from_canonical(expected.array, form)[0])


def test_two_folds_predict_the_mean_of_their_logits(tmp_path):
    folds = [finished_run(tmp_path / "m" / f"fold_{seed}", seed) for seed in (0, 1)]
    image = np.random.default_rng(1).normal(100, 20, SHAPE).astype(np.float32)
    write_image(image, grid(SHAPE), tmp_path / "in" / "x_0000.nii.gz")

    def probabilities(model):
        options = PredictOptions(model=model, save_probabilities=True, mirror=False, device="cpu")
        predict(Workspace(tmp_path), tmp_path / "in", tmp_path / "out", options)
        maps = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "x_probabilities.nii.gz")))
        return np.log(np.moveaxis(maps, int(np.argmin(maps.shape)), 0).astype(np.float64))

    one, other, both = probabilities(folds[0]), probabilities(folds[1]), probabilities(tmp_path / "m")
    wanted = (one + other) / 2
    # Log-probabilities are logits up to one constant a voxel.
    assert np.allclose(both - both[:1], wanted - wanted[:1], atol=1e-3)


def test_2d_pictures_come_back_as_pictures(tmp_path):
    model = finished_run(tmp_path / "fold_0", dimension=2, channels=("R", "G", "B"))
    pixels = np.random.default_rng(0).integers(0, 255, (17, 23, 3), dtype=np.uint8)
    (tmp_path / "in").mkdir()
    sitk.WriteImage(sitk.GetImageFromArray(pixels, isVector=True), str(tmp_path / "in" / "cell_0000.png"))
    predict(Workspace(tmp_path), tmp_path / "in", tmp_path / "out", PredictOptions(model=model, device="cpu"))
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "cell.png")))
    assert labels.shape == (17, 23)
    assert set(np.unique(labels)) <= {0, 7, 200}


def test_where_no_model_is_as_asked_for_those_that_are_there_are_listed(tmp_path):
    runs, place = tmp_path / "runs" / "Dataset001_Toy", Workspace(tmp_path, " --workspace w")
    finished_run(runs / "default" / "3d_fullres" / "fold_0")
    finished_run(runs / "big" / "3d_fullres" / "fold_2")
    finished_run(runs / "big" / "2d" / "fold_0", finished=None)

    def refusal(**asked):
        with pytest.raises(AutosegError) as refused:
            choose_model(place, PredictOptions(**asked))
        return str(refused.value).splitlines()

    listed = [
        f"  autoseg predict -i IN -o OUT -d Dataset001_Toy -c 3d_fullres --run {run} --workspace w"
        for run in ("big", "default")
    ]
    assert refusal(dataset="1", configuration="2d") == [
        "there is no finished model for 1 of the configuration 2d, only:",
        *listed,
    ]
    said = "there is no finished model of the configuration 2d of the run big, only:"
    assert refusal(configuration="2d", run="big") == [said, *listed]
    assert refusal(dataset="1", run="small") == ["there is no finished model for 1 of the run small, only:", *listed]


def test_an_unfinished_or_different_fold_is_refused(tmp_path):
    finished_run(tmp_path / "m" / "fold_0")
    finished_run(tmp_path / "m" / "fold_1", dimension=2)
    (tmp_path / "in").mkdir()
    with pytest.raises(AutosegError, match="another plan"):
        predict(
            Workspace(tmp_path), tmp_path / "in", tmp_path / "out", PredictOptions(model=tmp_path / "m", device="cpu")
        )
    half = finished_run(tmp_path / "half", finished=None)
    with pytest.raises(AutosegError, match="not trained to its end"):
        predict(Workspace(tmp_path), tmp_path / "in", tmp_path / "out", PredictOptions(model=half, device="cpu"))
