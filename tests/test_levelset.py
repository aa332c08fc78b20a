"""Synthetic vessels: empty cases, exact masks, repeatable streams, shape and not brightness tells the vessels."""

import json
from dataclasses import replace

import numpy as np
import pytest

from autoseg.datasets import SOURCES
from autoseg.datasets.levelset import (
    VesselSettings,
    best_threshold_dice,
    case_rng,
    make_case,
    make_dataset,
    smooth_step,
    vessel_front,
)
from autoseg.readers import read_image, read_labels
from autoseg.records import AutosegError

SMALL = VesselSettings(shape=(11, 17, 13), spacing_mm=(1.5, 1.0, 0.9))
PLANAR = VesselSettings(dimension=2, shape=(1, 37, 31), spacing_mm=(1.0, 0.7, 0.9), tubes=(1, 2))
CLEAN = replace(SMALL, white_noise=0, correlated_noise=0, bias=0, spheres=(0, 0), plates=(0, 0), contrast=(1, 1))


def test_an_empty_case_has_noise_and_no_vessel():
    image, labels = make_case(np.random.default_rng(0), replace(SMALL, empty_probability=1.0))
    assert not labels.any() and labels.dtype == np.uint8
    assert image.std() > 0.1
    assert vessel_front(np.random.default_rng(0), replace(SMALL, empty_probability=1.0)).min() > 10


def test_a_share_of_the_cases_is_empty():
    half = replace(CLEAN, empty_probability=0.5)
    empty = [not make_case(case_rng(1, 0, index), half)[1].any() for index in range(24)]
    assert 4 < sum(empty) < 20


@pytest.mark.parametrize("settings", [SMALL, PLANAR, replace(SMALL, shape=(2, 3, 19))])
def test_shapes_and_types(settings):
    image, labels = make_case(np.random.default_rng(7), settings)
    assert image.shape == (1, *settings.shape) and image.dtype == np.float32
    assert labels.shape == settings.shape and labels.dtype == np.uint8
    assert np.isfinite(image).all()
    assert set(np.unique(labels)) <= {0, 1}


@pytest.mark.parametrize("settings", [SMALL, PLANAR])
def test_the_mask_is_where_the_front_is_negative(settings):
    front = vessel_front(np.random.default_rng(5), settings)
    _, labels = make_case(np.random.default_rng(5), settings)
    assert 0 < labels.sum() < labels.size
    np.testing.assert_array_equal(labels == 1, front < 0)


def test_the_front_is_a_distance_near_the_wall():
    settings = replace(VesselSettings(), shape=(30, 44, 40))
    front = vessel_front(np.random.default_rng(2), settings)
    steepness = np.linalg.norm(np.gradient(front.astype(float), *settings.spacing_mm), axis=0)
    near = np.abs(front) < 0.6
    assert near.sum() > 500
    assert np.median(steepness[near]) == pytest.approx(1, abs=0.1)


def test_without_noise_the_image_is_the_smooth_step_of_the_front():
    front = vessel_front(np.random.default_rng(5), CLEAN)
    image, labels = make_case(np.random.default_rng(5), CLEAN)
    np.testing.assert_allclose(image[0], smooth_step(front, CLEAN.boundary_mm), atol=1e-6)
    assert image[0][labels == 1].min() >= 0.5 > image[0][labels == 0].max()


def test_the_image_is_brighter_inside_than_just_outside():
    for index in range(3):
        settings = replace(SMALL, spheres=(0, 0), plates=(0, 0))
        image, labels = make_case(case_rng(0, 0, index), settings)
        assert image[0][labels == 1].mean() > image[0][labels == 0].mean() + 0.4


def test_smooth_step_by_hand():
    distance = np.array([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
    np.testing.assert_allclose(smooth_step(distance, 2.0), [1, 1, 0.84375, 0.5, 0.15625, 0, 0])
    np.testing.assert_array_equal(smooth_step(distance, 0.0), [1, 1, 1, 0, 0, 0, 0])


def test_distractors_are_as_bright_as_vessels_and_keep_clear_of_them():
    settings = replace(CLEAN, shape=(25, 41, 37), spheres=(4, 4), plates=(1, 1), distractor_contrast=(1, 1))
    front = vessel_front(np.random.default_rng(3), settings)
    image, labels = make_case(np.random.default_rng(3), settings)
    assert image.max() == pytest.approx(1)
    assert (image[0][labels == 0] > 0.9).sum() > 500
    gap = (front > settings.boundary_mm / 2) & (front < settings.clearance_mm - settings.boundary_mm / 2)
    assert gap.any() and image[0][gap].max() < 1e-6


def test_one_seed_one_case():
    for settings in (SMALL, PLANAR):
        first, again, other = (make_case(case_rng(*key), settings) for key in ((3, 0, 1), (3, 0, 1), (3, 0, 2)))
        np.testing.assert_array_equal(first[0], again[0])
        np.testing.assert_array_equal(first[1], again[1])
        assert not np.array_equal(first[0], other[0])
    assert not np.array_equal(make_case(case_rng(3, 0, 1), SMALL)[0], make_case(case_rng(3, 1, 1), SMALL)[0])
    assert not np.array_equal(make_case(case_rng(3, 0, 1), SMALL)[0], make_case(case_rng(4, 0, 1), SMALL)[0])


def test_threshold_dice_by_hand():
    labels = np.array([[[0, 0, 1, 1, 0]]])
    image = np.array([[[[0.0, 1.0, 2.0, 3.0, 4.0]]]])
    # Above 1: three voxels, both hits: 2 * 2 / (3 + 2).
    assert best_threshold_dice([(image, labels)]) == pytest.approx(0.8)
    perfect = (labels[None].astype(float), labels)
    assert best_threshold_dice([perfect, (np.zeros_like(image), np.zeros_like(labels))]) == pytest.approx(1)
    with pytest.raises(ValueError, match="no case has foreground"):
        best_threshold_dice([(image, np.zeros_like(labels))])


def test_one_threshold_serves_all_cases():
    labels = np.array([[[0, 0, 0, 1]]])
    dim, bright = np.array([[[[0.0, 0.0, 0.0, 1.0]]]]), np.array([[[[2.0, 2.0, 2.0, 3.0]]]])
    # Either the dim case is right and the bright one all foreground (1 and 2/5), or the dim one is missed (0 and 1).
    assert best_threshold_dice([(dim, labels), (bright, labels)]) == pytest.approx((1 + 0.4) / 2)


@pytest.mark.parametrize("name", SOURCES)
def test_no_threshold_finds_the_default_vessels(name):
    cases = [make_case(case_rng(0, 0, index), SOURCES[name].settings) for index in range(6)]
    assert 0.2 < best_threshold_dice(cases) < 0.6
    assert all(0.01 < labels.mean() < 0.25 for _, labels in cases)


@pytest.mark.parametrize("settings", [SMALL, PLANAR])
def test_a_dataset_reads_back_and_does_not_depend_on_the_number_of_cases(tmp_path, settings):
    make_dataset(tmp_path / "Dataset001_Few", settings, 2, 1, 11, workers=1, quiet=True)
    make_dataset(tmp_path / "Dataset002_More", settings, 3, 2, 11, workers=2, quiet=True)
    for folder in ("Dataset001_Few", "Dataset002_More"):
        for kind, name, key in (("Tr", "vessels_001", (11, 0, 1)), ("Ts", "vessels_test_000", (11, 1, 0))):
            image, labels = make_case(case_rng(*key), settings)
            read, grid = read_image([tmp_path / folder / f"images{kind}" / f"{name}_0000.nii.gz"])
            np.testing.assert_array_equal(read.array, image)
            truth = read_labels(tmp_path / folder / f"labels{kind}" / f"{name}.nii.gz")[0]
            np.testing.assert_array_equal(truth.array[0], labels)
            assert grid.dimension == settings.dimension and truth.grid.agrees(read.grid)
            start = 3 - settings.dimension
            assert read.grid.spacing_mm[start:] == pytest.approx(settings.spacing_mm[start:])
    description = json.loads((tmp_path / "Dataset002_More" / "dataset.json").read_text())
    assert description["labels"] == {"background": 0, "vessel": 1}
    assert description["channel_names"] == {"0": "magnitude"}
    assert description["numTraining"] == 3 and description["file_ending"] == ".nii.gz"
    assert description["licence"] == "CC0-1.0" and description["name"] == "Dataset002_More"
    assert len(list((tmp_path / "Dataset002_More" / "imagesTr").iterdir())) == 3


def test_cases_of_two_datasets_never_mix(tmp_path):
    (tmp_path / "notes.txt").write_text("kept")
    with pytest.raises(AutosegError, match="is not empty"):
        make_dataset(tmp_path, SMALL, 1, 0, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dimension": 2}, "Z is 1"),
        ({"shape": (1, 20, 20)}, "Z is 1"),
        ({"shape": (5, 1, 20)}, "two voxels"),
        ({"spacing_mm": (1.0, 0.0, 1.0)}, "greater than 0"),
        ({"speeds": ("wavy",)}, "gaussian, sinusoidal, affine"),
        ({"speeds": ()}, "gaussian, sinusoidal, affine"),
        ({"radius_mm": (3.0, 2.0)}, "lowest value comes first"),
        ({"tubes": (-1, 2)}, "none is below 0"),
        ({"empty_probability": 1.5}, "less than or equal to 1"),
        ({"white_noise": -0.1}, "greater than or equal to 0"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_words(change, words):
    with pytest.raises(ValueError, match=words):
        replace(VesselSettings(), **change)


def test_sources_describe_themselves():
    assert set(SOURCES) == {"vessels", "vessels_2d"}
    assert SOURCES["vessels"].settings.dimension == 3 and SOURCES["vessels_2d"].settings.dimension == 2
    assert all(source.description and source.make is make_dataset for source in SOURCES.values())


def test_the_wall_moves_by_its_amplitude_at_most():
    still = replace(CLEAN, tubes=(1, 1), speed_amplitude_mm=0.0, radius_mm=(3, 3))
    front = vessel_front(np.random.default_rng(9), still)
    moved = vessel_front(np.random.default_rng(9), replace(still, speed_amplitude_mm=1.0))
    assert not np.array_equal(front < 0, moved < 0)
    # A moving wall stays within its amplitude of the still one, give or take half a voxel.
    assert np.abs(front)[(front < 0) != (moved < 0)].max() < 1.0 + 0.75
