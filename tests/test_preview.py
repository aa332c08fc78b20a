"""Pages of augmented samples: the picture, the words for what was drawn, and that nothing else is touched."""

import re

import numpy as np
import pytest
from PIL import Image
from toys import LABELS, ball, configuration, grid, plan
from typer.testing import CliRunner

from autoseg.augment import make_augmentation
from autoseg.augment.default import DefaultAugmentation
from autoseg.augment.policy import MR_ARTEFACTS, STRONG, TRANSFORMS, certain
from autoseg.augment.words import describe
from autoseg.cli import app
from autoseg.evaluation.samples import Tile, draw_page
from autoseg.pipeline.preview import PreviewOptions, preview
from autoseg.preprocess import prepare
from autoseg.records import AutosegError, save_json
from autoseg.store import write_case
from autoseg.volume import Volume
from autoseg.workspace import Workspace

SHAPE = (9, 21, 25)
FULL, FLAT = configuration(patch=(7, 16, 20)), configuration("2d", (1.0, 0.5), (16, 20))


@pytest.fixture
def place(tmp_path):
    """A plan and two prepared cases, the first without foreground."""
    workspace, made = Workspace(tmp_path), plan(FULL, FLAT)
    save_json(made, workspace.plan_folder(made.dataset, "default") / "plan.json")
    workspace.remember(made.dataset, tmp_path / made.dataset)
    for one in (FULL, FLAT):
        for name, radius in (("a", -1), ("b", 5)):
            labels = np.zeros(SHAPE, np.int16)
            labels[ball(SHAPE, (4, 10, 12), radius)] = 1
            labels[ball(SHAPE, (4, 10, 12), radius - 3)] = 2
            image = (labels + np.random.default_rng(0).normal(5, 0.3, SHAPE)).astype(np.float32)
            volume = Volume(array=image[None], grid=grid(SHAPE))
            case = prepare(name, volume, labels, grid(SHAPE), made, configuration(one.name))
            write_case(workspace.cases(made.dataset, "default", one.prepared), case, key=name)
    return workspace


def shape_of(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).shape


@pytest.mark.parametrize("name", ["3d_fullres", "2d"])
def test_a_page_and_what_was_drawn(place, tmp_path, capsys, name):
    options = PreviewOptions(configuration=name, policy="desai", samples=3)
    preview(place, "1", tmp_path / "page.png", options)
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[0] == "original: as it is"
    pattern = r"zoom \d.*%, shear .* degrees, gamma \d\.\d\d, motion \d\.\d voxels at \d+ degrees"
    assert len(lines) == 5 and all(re.fullmatch(rf"{n}: {pattern}", lines[n]) for n in (1, 2, 3))
    assert min(shape_of(tmp_path / "page.png")[:2]) > 200
    before = {path: path.read_bytes() for path in place.root.rglob("*") if path.is_file()}
    preview(place, "1", tmp_path / "page.png", options)
    assert capsys.readouterr().out == said  # the seed decides
    assert {path for path in place.root.rglob("*") if path.is_file()} == set(before)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_chain_shows_each_transform_alone_and_after_all_before_it(place, tmp_path):
    line = ["augment", "preview", "-d", "1", "--policy", "desai", "--chain", "-o", str(tmp_path / "chain.png")]
    done = CliRunner().invoke(app, [*line, "--workspace", str(place.root)], catch_exceptions=False)
    lines = done.output.splitlines()
    alone = [line.split(": ", 1) for line in lines if " alone: " in line]
    assert [title for title, _ in alone] == ["zoom alone", "shear alone", "gamma alone", "motion blur alone"]
    assert not any(", " in words for title, words in alone if title != "shear alone")
    # Together they are what each was by itself.
    assert f"with all up to motion blur: {', '.join(words for _, words in alone)}" in lines
    assert (tmp_path / "chain.png").is_file()


def test_what_is_not_there_is_said(place, tmp_path):
    with pytest.raises(AutosegError, match=r"page\.txt: the page is a PNG"):
        preview(place, "7", tmp_path / "page.txt", PreviewOptions())
    target = tmp_path / "page.png"
    with pytest.raises(AutosegError, match="choose one of default, none, desai"):
        preview(place, "1", target, PreviewOptions(policy="desay"))
    with pytest.raises(AutosegError, match="no list of transforms; --chain shows one of default, none, desai"):
        preview(place, "1", target, PreviewOptions(policy="batchgenerators", chain=True))
    with pytest.raises(AutosegError, match="has no configuration '3d_lowres'"):
        preview(place, "1", target, PreviewOptions(configuration="3d_lowres"))
    (place.cases("Dataset001_Toy", "default", "2d")).rename(tmp_path / "elsewhere")
    with pytest.raises(AutosegError, match="run: autoseg plan_and_preprocess -d 1"):
        preview(place, "1", target, PreviewOptions(configuration="2d"))
    assert not target.exists()


@pytest.mark.parametrize("patch", [(9, 14), (5, 7, 11)])
def test_every_transform_has_words(patch):
    for name in TRANSFORMS:
        for policy in (STRONG, MR_ARTEFACTS):
            made = DefaultAugmentation(
                policy=certain(policy, [name]), patch=patch, dimension=len(patch), masked=(False, False)
            )
            draws = made.draw(np.random.default_rng(1), 2, 2)
            assert len(describe(draws, 0)) == len(describe(draws, 1)) == 1, name
    plain = make_augmentation("none", patch=patch, dimension=len(patch), masked=(False, False))
    assert describe(plain.draw(np.random.default_rng(1), 1, 2), 0) == ()


def test_words_name_the_channels_that_change():
    made = make_augmentation("none", patch=(5, 7, 11), dimension=3, masked=(False, False))
    draws = made.draw(np.random.default_rng(1), 1, 2)
    draws.gamma[0, 1], draws.mirrored[0, 0], draws.scale[0] = 1.25, True, 0.8
    assert describe(draws, 0) == ("size x 1.25", "mirrored Z", "gamma - / 1.25")


def test_masks_are_outlined_in_the_colours_of_the_legend(tmp_path):
    image, labels = np.zeros((30, 40)), np.zeros((30, 40), int)
    labels[8:20, 10:30] = 2
    tile = Tile(title="", image=image, labels=labels)
    draw_page([tile, tile], tmp_path / "with.png", names={1: "liver", 2: "lesion"}, heading="")
    draw_page([tile], tmp_path / "without.png", names={1: "liver"}, heading="")
    orange = np.array([255, 127, 14])  # the second colour of the palette
    for name, there in (("with", True), ("without", False)):
        with Image.open(tmp_path / f"{name}.png") as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        above = pixels[:-70]  # of the legend
        assert (np.abs(above - orange).max(-1) < 40).any() == there
        assert (above == 128).all(-1).sum() > 1000  # the mean of grey values that are all alike


def test_an_empty_mask_and_a_full_one_have_no_outline(tmp_path):
    tiles = [Tile(title=str(v), image=np.ones((1, 5)), labels=np.full((1, 5), v)) for v in (0, 1)]
    draw_page(tiles, tmp_path / "page.png", names={1: LABELS.names[1]}, heading="nothing")
    assert shape_of(tmp_path / "page.png")[0] > 0
