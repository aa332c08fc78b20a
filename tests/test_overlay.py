"""Pictures of segmentations: which slices, which window, which colours, and that the files that come out show them."""

import json

import numpy as np
import pytest
from PIL import Image
from toys import OBLIQUE, ball, balls_dataset, grid
from typer.testing import CliRunner

from autoseg.cli import app
from autoseg.evaluation.overlay import (
    MISSING,
    OTHER_CLASS,
    RIGHT,
    TOO_MUCH,
    VERDICTS,
    Scene,
    colouring,
    draw,
    heading,
    only,
    overlay_folders,
    pick,
    plane,
    thickest,
    upright,
    verdicts,
    window,
)
from autoseg.labels import Labels
from autoseg.readers import read_labels, write_image, write_labels
from autoseg.records import AutosegError

SHAPE = (5, 7, 11)


def scene(prediction, truth=None, names=(), values=(), **more):
    """A case whose classes are called `names`, with the values 1, 2, ... or `values`."""
    image = np.random.default_rng(0).normal(100, 20, prediction.shape).astype(np.float32)
    return Scene(
        case="c1",
        image=image,
        prediction=prediction,
        truth=truth,
        grid=grid(prediction.shape),
        labels=Labels(names=("background", *names), values=(0, *(values or range(1, len(names) + 1))), **more)
        if names
        else None,
    )


def test_arrows_point_at_the_middle_of_thick_mistakes_only():
    marks = np.zeros((13, 17), np.uint8)
    assert thickest(marks) == []
    marks[1:4, 1:4] = MISSING  # a square of 3: its middle is 2 voxels from its outside
    marks[6:11, 8:13] = TOO_MUCH  # of 5: 3
    marks[6:11, 5:8] = MISSING  # beside it, of 5 x 3; its middle column is 2 away from both sides
    marks[12, :] = OTHER_CLASS  # a rim
    marks[1:5, 8:15] = RIGHT
    places = thickest(marks)
    assert places[0] == (8, 10)
    assert set(places[1:]) <= {(2, 2), (7, 6), (8, 6), (9, 6)}
    assert len(places) == 3


def test_an_arrow_is_drawn_where_something_is_missing(tmp_path):
    truth = np.zeros((3, 20, 30), np.uint8)
    truth[1, 4:12, 20:28] = 1
    yellow = []
    for name, found in (("missed", np.zeros_like(truth)), ("right", truth)):
        draw(scene(found, truth), tmp_path / f"{name}.png")
        pixels = pixels_of(tmp_path / f"{name}.png")
        yellow.append(((pixels[..., :2] > 200).all(-1) & (pixels[..., 2] < 60)).sum())
    assert yellow[0] > yellow[1]  # letters at the edges are yellow in both


LEGEND = 70
"""Rows of pixels at the bottom that the legend takes at most."""


def pixels_of(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def has_colour(path, colour):
    """Whether some pixel above the legend leans clearly towards a colour: its largest part exceeds both others."""
    pixels = pixels_of(path)[:-LEGEND]
    strong = int(np.argmax(colour))
    others = [n for n in range(3) if n != strong]
    return bool((pixels[..., strong] > pixels[..., others].max(-1) + 60).any())


def test_an_empty_case_is_drawn_in_its_middle(tmp_path):
    empty = np.zeros(SHAPE, np.int16)
    assert pick(np.zeros(7, int)) == (3,)
    draw(scene(empty), tmp_path / "a.png")
    draw(scene(empty, empty), tmp_path / "b.png")
    for name in ("a", "b"):
        assert pixels_of(tmp_path / f"{name}.png").shape[1] > 300
        assert not any(has_colour(tmp_path / f"{name}.png", colour) for _, colour in VERDICTS.values())
    assert heading(scene(empty)) == "c1: nothing was found"
    assert heading(scene(empty, empty)) == "c1: nothing to find, nothing found"


def test_slices_have_much_foreground_and_lie_apart():
    assert pick(np.array([0, 1, 9, 8, 7, 6, 5, 4, 3, 0]), 3) == (2, 4, 6)
    assert pick(np.array([0, 0, 4, 0]), 3) == (2,)
    assert pick(np.array([2, 2]), 3) == (0, 1)
    assert pick(np.array([5, 5, 5, 5]), 1) == (0,)


def test_the_plane_is_that_of_best_resolution_else_axial():
    assert plane(grid(spacing_mm=(1.0, 1.2, 0.9))) == 0
    assert plane(grid(spacing_mm=(1.0, 5.0, 0.9))) == 1
    assert plane(grid(spacing_mm=(0.5, 0.5, 0.8))) == 2
    assert plane(grid((1, 7, 11), (9.0, 1.0, 9.0), dimension=2)) == 0


def test_head_and_front_are_on_top():
    array = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    assert upright(array, 0, 2)[0, 0] == array[2, 0, 0]
    assert upright(array, 1, 2)[0, 0] == array[-1, 2, 0]
    assert upright(array, 2, 2)[0, 0] == array[-1, 0, 2]


def test_the_window_widens_the_foreground_by_its_range_within_what_is_shown():
    shown = np.linspace(-1000, 3000, 4001)
    inside = (shown >= 0) & (shown <= 100)
    low, high = window(shown, inside)
    assert (low, high) == pytest.approx((1 - 98, 99 + 98))
    assert window(shown, shown < -1e9) == pytest.approx((-980, 2980))
    assert window(np.full(5, 7.0), np.ones(5, bool)) == (6.5, 7.5)
    assert window(np.array([np.nan, np.nan]), np.ones(2, bool)) == (0.0, 1.0)


def test_verdicts_by_hand():
    truth = np.array([0, 0, 1, 1, 2, 1, 9])
    prediction = np.array([0, 1, 0, 1, 1, 2, 1])
    assert verdicts(truth, prediction).tolist() == [0, TOO_MUCH, MISSING, RIGHT, *[OTHER_CLASS] * 3]
    labels = Labels(names=("background", "a", "b"), values=(0, 1, 2), ignore=9)
    assert verdicts(truth, prediction, labels).tolist()[-1] == 0
    labels = Labels(names=("background", "a"), values=(5, 0))
    assert verdicts(np.array([5, 5, 0]), np.array([5, 0, 0]), labels).tolist() == [0, TOO_MUCH, RIGHT]
    labels = Labels(names=("background", "whole", "core"), values=(0, 2, 1), regions=((1, 2, 3), (1, 3)))
    assert verdicts(np.array([3, 2, 0]), np.array([1, 1, 3]), labels).tolist() == [RIGHT, OTHER_CLASS, TOO_MUCH]


def test_dice_of_the_heading_by_hand():
    truth, prediction = np.zeros(SHAPE, int), np.zeros(SHAPE, int)
    truth[2, 3, 2:6], prediction[2, 3, 4:8] = 1, 1
    prediction[0, 0, 0] = 3
    assert heading(scene(prediction, truth, ("liver",))) == "c1: Dice liver 0.500, label 3 0.000"
    truth[2, 3, 6:8] = 9
    assert heading(scene(prediction, truth, ("liver",), ignore=9)) == "c1: Dice liver 0.667, label 3 0.000"


def test_regions_are_scored_as_regions_and_coloured_as_written():
    truth, prediction = np.zeros(SHAPE, int), np.zeros(SHAPE, int)
    truth[2, 3, 2:6], truth[2, 3, 6:8], prediction[2, 3, 2:8] = 1, 2, 1
    shown = {"names": ("whole", "core"), "values": (1, 2), "regions": ((1, 2), (2,))}
    assert heading(scene(prediction, truth, **shown)) == "c1: Dice whole 1.000, core 0.000"
    assert [name for name, _ in colouring(scene(truth, **shown))[1]] == ["whole", "core"]
    shown["regions"] = ((1, 2, 3), (2, 3))
    truth[0, 0, 0] = 3
    colours, legend = colouring(scene(truth, **shown))
    assert colours(np.array([[3]]))[0, 0, :3] == pytest.approx(dict(legend)["core"]), "painted last"


def test_classes_that_were_not_annotated_have_no_verdict():
    truth, prediction = np.zeros(SHAPE, int), np.zeros(SHAPE, int)
    truth[2, 3, 2:6], prediction[2, 3, 2:6], prediction[0, 0, :4] = 1, 1, 2
    case = only(scene(prediction, truth, ("liver", "spleen")), ("liver",))
    assert heading(case) == "c1: Dice liver 1.000"
    assert set(np.unique(case.prediction)) == {0, 1}


def test_a_class_has_one_colour_in_all_cases():
    names = {"names": ("a", "b", "c"), "values": (1, 2, 7)}
    some, all_of = np.zeros(SHAPE, int), np.zeros(SHAPE, int)
    some[0, 0, 0] = all_of[0, 0, 0] = 7
    all_of[0, 0, 1], all_of[0, 0, 2] = 1, 2
    assert dict(colouring(scene(some, **names))[1])["c"] == dict(colouring(scene(all_of, **names))[1])["c"]
    many = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    assert colouring(scene(many))[1][-1] == ("and 372 more", (0.5, 0.5, 0.5))


def test_folders_with_and_without_truth(tmp_path):
    raw = tmp_path / "Dataset007_Balls"
    balls_dataset(raw, cases=2, prefix="c")
    out = tmp_path / "out"
    line = ["overlay", str(raw / "imagesTr"), str(raw / "labelsTr"), "-o", str(out)]
    done = CliRunner().invoke(app, line, catch_exceptions=False)
    assert "Drawn: 2 pictures" in done.output
    assert sorted(p.name for p in out.iterdir()) == ["c0.png", "c1.png"]
    shape = (13, 17, 19)
    wrong = np.zeros(shape, np.uint8)
    wrong[ball(shape, (6, 8, 2), 3)] = 7
    stored = grid(shape, (1.1, 1.0, 0.9), origin_mm=(5.0, -3.0, 2.0))
    write_labels(wrong, stored, tmp_path / "predicted" / "c0.nii.gz")
    write_labels(wrong, stored, tmp_path / "predicted" / "c0_probabilities.nii.gz")
    write_labels(wrong, stored, tmp_path / "predicted" / "c9.nii.gz")
    done = CliRunner().invoke(
        app,
        [
            "overlay",
            str(raw / "imagesTr"),
            str(tmp_path / "predicted"),
            "--truth",
            str(raw / "labelsTr"),
            "-o",
            str(out),
        ],
        catch_exceptions=False,
    )
    assert "without image, not drawn: c9\n" in done.output, "probabilities are no case"
    for mark in (RIGHT, TOO_MUCH, MISSING):
        assert has_colour(out / "c0.png", VERDICTS[mark][1]), VERDICTS[mark]


def test_single_files_in_colour_and_with_names(tmp_path):
    flat = grid((1, 7, 11), (1.0, 1.0, 1.0), dimension=2)
    pixels = np.random.default_rng(0).integers(0, 255, (3, 1, 7, 11)).astype(np.uint8)
    write_image(pixels, flat, tmp_path / "images" / "photo.png")
    mask = np.zeros((1, 7, 11), np.uint8)
    mask[0, 2:4, 3:6] = 1
    write_labels(mask, flat, tmp_path / "result.png")
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "cell": 1}}))
    (drawn,) = overlay_folders(tmp_path / "images" / "photo.png", tmp_path / "result.png", tmp_path / "out")
    assert drawn.name == "result.png"
    with pytest.raises(AutosegError, match="is one of the files to draw"):
        overlay_folders(tmp_path / "images" / "photo.png", tmp_path / "result.png", tmp_path)
    assert read_labels(tmp_path / "result.png")[0].array.sum() == 6
    height, width, _ = pixels_of(drawn).shape
    assert width > height, "one slice: image and overlay side by side"


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    write_image(np.ones(SHAPE, np.float32), grid(), tmp_path / "i" / "a_0000.nii.gz")
    write_labels(np.ones(SHAPE, np.uint8), grid(direction=OBLIQUE), tmp_path / "p" / "a.nii.gz")
    with pytest.raises(AutosegError, match="differ in direction"):
        overlay_folders(tmp_path / "i", tmp_path / "p", tmp_path / "out")
    write_labels(np.ones(SHAPE, np.uint8), grid(), tmp_path / "q" / "b.nii.gz")
    with pytest.raises(AutosegError, match="has an image in"):
        overlay_folders(tmp_path / "i", tmp_path / "q", tmp_path / "out")
    with pytest.raises(AutosegError, match="no folder with label files"):
        overlay_folders(tmp_path / "i", tmp_path / "nothing", tmp_path / "out")
