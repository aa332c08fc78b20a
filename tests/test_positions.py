"""Where patches of training lie: the distributions by hand and by counting, and that a small target is learnt."""

from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from toys import LABELS, ball, configuration, grid, network, plan

from autoseg.augment import make_augmentation
from autoseg.computing import safe_base
from autoseg.inference import predict_logits
from autoseg.labels import Labels
from autoseg.losses import make_loss
from autoseg.networks import build, output_scales
from autoseg.pipeline.recipe import TrainOptions, make_recipe
from autoseg.placement import POSITIONS, USUAL, Placement, choose_patch, find_components, shows_foreground
from autoseg.preprocess import prepare
from autoseg.records import AutosegError
from autoseg.sampling import PreparedCases, Sampler, Stream
from autoseg.schema import Recipe
from autoseg.step import Parts
from autoseg.store import stored_classes, write_case
from autoseg.team import Team
from autoseg.training import train
from autoseg.volume import Volume

SHAPE, PATCH = (9, 21, 34), (4, 6, 8)
PARTLY = Labels.from_dataset({"background": 0, "liver": 7, "lesion": 200, "ignore": 9})


def made(labels, name="a", meaning=LABELS):
    volume = Volume(array=np.ones((1, *labels.shape), np.float32), grid=grid(labels.shape))
    return prepare(name, volume, labels, grid(labels.shape), replace(plan(), labels=meaning), configuration())


def empty():
    return np.zeros(SHAPE, np.int16)


def sampler(folder, names, position="default", **more):
    """Of batches of three, one of them forced by default."""
    redraw = more.pop("redraw_empty", 0)
    return Sampler(
        cases=PreparedCases(folder, 1 << 30),
        case_names=names,
        patch=PATCH,
        batch_size=3,
        foreground_fraction=more.pop("foreground_fraction", 0.33),
        augmentation=make_augmentation("none", patch=PATCH, dimension=3, masked=(False,)),
        seed=3,
        stream=Stream.TRAINING,
        placement=Placement(position=POSITIONS[position], redraw_empty=redraw, labels=more.pop("labels", LABELS)),
        **more,
    )


def starts(position, count=10_000, shape=(41, 60, 75), patch=(16, 16, 20), labels=None, seed=0):
    case, rng = made(np.zeros(shape, np.int16) if labels is None else labels), np.random.default_rng(seed)
    boxes = [choose_patch(case, patch, False, rng, position=POSITIONS[position]) for _ in range(count)]
    return np.array([box.start for box in boxes])


# One case.


def test_normal_starts_are_around_the_middle_and_not_uniform():
    """The study's numbers: the mean within 2 % of the middle, all windows inside, another distribution than uniform."""
    found, last = starts("normal"), np.array((41 - 16, 60 - 16, 75 - 20))
    assert (found >= 0).all() and (found <= last).all()
    np.testing.assert_allclose(found.mean(0), last / 2, rtol=0.02)
    np.testing.assert_allclose(found.std(0), last / 8, rtol=0.05)
    jitter = np.random.default_rng(1).random(found.shape)
    for axis in range(3):
        assert kstest((found + jitter)[:, axis] / (last[axis] + 1), "uniform").pvalue < 1e-6
    assert {POSITIONS[name].share for name in ("normal", "uniform", "fixed")} == {0.0}


def test_uniform_starts_are_uniform():
    found, last = starts("uniform", 3000), np.array((41 - 16, 60 - 16, 75 - 20))
    jitter = np.random.default_rng(1).random(found.shape)
    for axis in range(3):
        assert kstest((found + jitter)[:, axis] / (last[axis] + 1), "uniform").pvalue > 0.01


def test_fixed_is_the_middle_and_short_axes_are_centred():
    assert starts("fixed", 2, (9, 21, 5)).tolist() == [[-3, 2, -7]] * 2
    assert starts("normal", 2, (9, 17, 5))[:, [0, 2]].tolist() == [[-3, -7]] * 2
    boxes = [choose_patch(made(empty()), (6, 8), False, np.random.default_rng(0), position=POSITIONS["fixed"])]
    assert (boxes[0].start, boxes[0].stop) == ((4, 7, 13), (5, 13, 21)), "a 2D patch: the middle slice"


@pytest.mark.parametrize("position", ["default", "uniform", "normal", "fixed"])
def test_where_voxels_are_ignored_every_patch_shows_others(position):
    labels = np.full(SHAPE, 3, np.int16)
    labels[7, 19:, 30:] = 0
    labels[1, 1, 1] = 2
    case, rng = made(labels, meaning=PARTLY), np.random.default_rng(0)
    for _ in range(50):
        box = choose_patch(case, PATCH, False, rng, position=POSITIONS[position])
        assert (case.labels[box.slices()] != 3).any()


def test_components_by_hand():
    labels = empty()
    labels[1, 1, 1:4] = 1
    labels[2, 2, 4] = 1  # touches by a corner
    labels[5, 10, 20] = 1
    labels[7:9, 20, 33] = 2
    found = find_components(labels, LABELS)
    assert {index: [part.tolist() for part in parts] for index, parts in found.items()} == {
        1: [[[1, 1, 1], [1, 1, 2], [1, 1, 3], [2, 2, 4]], [[5, 10, 20]]],
        2: [[[7, 20, 33], [8, 20, 33]]],
    }
    assert found[1][0].dtype == np.int32
    assert find_components(empty(), LABELS) == {}
    regions = Labels.from_dataset({"background": 0, "whole": [1, 2], "core": 2})
    labels = empty()
    labels[2, 3, 4:8] = (1, 2, 1, 2)
    found = find_components(labels, regions)
    assert [len(found[1]), len(found[2])] == [1, 2], "the core has two parts, the whole that holds them is one"


def test_a_large_component_keeps_a_fair_part_of_its_voxels():
    labels = np.zeros((30, 41, 52), np.int16)
    labels[:20, :30, :30] = 1
    labels[25, 35:38, 45] = 1
    large, small = find_components(labels, LABELS)[1]
    assert (len(large), len(small)) == (5000, 3), "10 000 voxels shared by two"
    assert len(np.unique(large, axis=0)) == 5000
    assert (labels[tuple(large.T)] == 1).all() and (large.min(0) == 0).all()


# Many cases.


def first_class(patches, cases):
    """Label at the centre of each forced patch; -1 where it had to move inside."""
    for patch in patches:
        if patch.forced_foreground:
            yield int(cases[patch.case].labels[tuple(a + edge // 2 for a, edge in zip(patch.box.start, PATCH))])


@pytest.fixture(scope="module")
def rare(tmp_path_factory):
    """Ten cases with class 1, in one of them class 2 beside it, and one case with nothing."""
    folder = tmp_path_factory.mktemp("rare")
    for number in range(11):
        labels = empty()
        labels[4, 8:13, 10:20] = number < 10
        labels[5, 10, 24] = 2 * (number == 3)
        write_case(folder, made(labels, name := f"c{number:02}"), key=name)
    return folder


RARE = tuple(f"c{number:02}" for number in range(11))


@cache
def forced_shares(folder, position):
    one = sampler(folder, RARE, position)
    patches = [patch for step in range(250) for patch in one.sources(step).patches]
    return one, patches, Counter(first_class(patches, one.cases))


def test_balanced_shows_every_class_of_the_dataset_alike(rare):
    one, patches, seen = forced_shares(rare, "balanced")
    assert one.holding == {1: RARE[:10], 2: ("c03",)}
    assert seen.keys() == {1, 2}
    assert seen[2] / seen.total() == pytest.approx(0.5, abs=0.1)
    cases = Counter(patch.case for patch in patches if not patch.forced_foreground)
    assert all(cases[name] / cases.total() == pytest.approx(1 / 11, abs=0.04) for name in RARE)
    # By default it is shown in half of the patches of one case in eleven.
    _, _, usual = forced_shares(rare, "default")
    assert usual[2] / usual.total() == pytest.approx(1 / 22, abs=0.04)
    assert usual[0], "patches of the case without foreground"


@pytest.mark.parametrize(("position", "share"), [("balanced", 1 / 3), ("foreground", 1), ("uniform", 0)])
def test_the_share_of_forced_patches(rare, position, share):
    _, patches, _ = forced_shares(rare, position)
    assert sum(patch.forced_foreground for patch in patches) / len(patches) == pytest.approx(share)


def test_positions_that_are_not_the_default_repeat_step_by_step_in_every_team(rare):
    for position in POSITIONS:
        one, other = (sampler(rare, RARE, position, redraw_empty=2) for _ in range(2))
        other.sources(0)
        assert one.sources(7).patches == other.sources(7).patches
        halves = [sampler(rare, RARE, position, redraw_empty=2, team=Team(rank=r, size=2)).sources(7) for r in (0, 1)]
        assert halves[0].patches == halves[1].patches == one.sources(7).patches
        assert [len(half.arrays) for half in halves] == [2, 1]


def test_transforms_are_told_the_cases_that_are_shown(rare):
    class Told:
        """A policy that notes of which cases its samples are."""

        def __init__(self, policy):
            self.policy, self.cases = policy, ()

        def draw(self, rng, batch, channels, cases=()):
            self.cases = tuple(cases)
            return self.policy.draw(rng, batch, channels, cases)

    one = sampler(rare, RARE, "balanced", foreground_fraction=1.0)
    told = Told(one.augmentation)
    for step in range(5):
        patches = replace(one, augmentation=told).sources(step).patches
        assert told.cases == tuple(patch.case for patch in patches)


def test_what_a_case_holds_is_known_without_reading_it(rare):
    assert stored_classes(rare, "c03") == (1, 2)
    assert stored_classes(rare, "c10") == ()
    with pytest.raises(AutosegError, match="c77"):
        stored_classes(rare, "c77")


def test_a_dataset_without_foreground_and_classes_that_one_case_lacks(tmp_path):
    write_case(tmp_path, made(empty(), "a"), key="a")
    for position in POSITIONS:
        boxes = [patch.box for patch in sampler(tmp_path, ("a",), position, redraw_empty=3).sources(0).patches]
        assert [box.shape for box in boxes] == [PATCH] * 3


def test_small_components_are_seen_as_often_as_large_ones(tmp_path):
    labels = empty()
    labels[2:8, 4:16, 4:20] = 1
    labels[ball(SHAPE, (4, 10, 28), 1)] = 1
    write_case(tmp_path, made(labels), key="a")
    shares = {}
    for position in ("default", "components"):
        one = sampler(tmp_path, ("a",), position, foreground_fraction=1.0)
        middles = [p.box.start[2] + 4 for step in range(100) for p in one.sources(step).patches]
        shares[position] = np.mean(np.array(middles) >= 25)
    assert shares["default"] < 0.02
    assert shares["components"] == pytest.approx(0.5, abs=0.09)


def test_empty_patches_are_drawn_again_at_most_so_often(tmp_path):
    labels = empty()
    labels[ball(SHAPE, (4, 5, 9), 2)] = 1
    write_case(tmp_path, made(labels), key="a")

    def empties(redraw):
        one = sampler(tmp_path, ("a",), "uniform", redraw_empty=redraw)
        case = one.cases["a"]
        patches = [patch for step in range(150) for patch in one.sources(step).patches]
        return np.mean([not shows_foreground(case, patch.box, LABELS) for patch in patches])

    without, once, thrice = (empties(redraw) for redraw in (0, 1, 3))
    # Each try is as likely to be empty as the first.
    assert without > 0.6
    assert once == pytest.approx(without**2, abs=0.06)
    assert thrice == pytest.approx(without**4, abs=0.06)


def test_ignored_voxels_are_no_foreground():
    labels = np.full(SHAPE, 3, np.int16)
    labels[0, 0, 0] = 2
    labels[0, 0, 1] = 0
    case = made(labels, meaning=PARTLY)
    box = choose_patch(case, PATCH, True, np.random.default_rng(0))
    assert shows_foreground(case, box, PARTLY)
    far = choose_patch(made(empty()), PATCH, False, np.random.default_rng(0), position=POSITIONS["fixed"])
    assert not shows_foreground(case, far, PARTLY)


# Recipes.


def test_what_cannot_be_is_refused_and_the_defaults_are_as_ever():
    assert (Recipe().patch_position, Recipe().redraw_empty) == ("default", 0)
    with pytest.raises(AutosegError, match="choose one of default, normal"):
        make_recipe(TrainOptions(changes={"patch_position": "gaussian"}))
    mixed = make_recipe(TrainOptions(changes={"patch_position": "components", "foreground_fraction": 0.5}))
    assert Placement.of(mixed, LABELS).position.by_component
    for name in POSITIONS:
        make_recipe(TrainOptions(changes={"patch_position": name}))


# A target of 3 voxels radius.


SMALL = Labels.from_dataset({"background": 0, "lesion": 1})
WIDE = (128, 128, 128)


def noisy_ball(name, seed):
    """A bright ball of radius 3, 123 voxels, somewhere in two million voxels of noise."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(WIDE, np.int16)
    labels[ball(WIDE, rng.integers(6, 122, 3), 3)] = 1
    image = (3.0 * labels + rng.standard_normal(WIDE)).astype(np.float32)
    here, cubic = grid(WIDE, (1.0, 1.0, 1.0)), configuration(spacing_mm=(1.0, 1.0, 1.0))
    return prepare(name, Volume(array=image[None], grid=here), labels, here, replace(plan(), labels=SMALL), cubic)


def dice_after(folder, position, steps=150):
    """Of an unseen case, after so many steps of two patches."""
    recipe = Recipe(
        epochs=1, steps_per_epoch=steps, validation_steps=1, optimizer="adamw", learning_rate=0.01, warmup_steps=5,
        patch_position=position,
    )  # fmt: skip
    torch.manual_seed(0)
    spec = network(features=(8, 16))
    learner, cpu = build(spec, 1, SMALL.heads), torch.device("cpu")

    def sampler(stream, placement=USUAL):
        return Sampler(
            cases=PreparedCases(folder, 1 << 30), case_names=("a", "b", "c"), patch=(24, 24, 24), batch_size=2,
            foreground_fraction=0.33, seed=0, stream=stream, placement=placement,
            augmentation=make_augmentation("none", patch=(24, 24, 24), dimension=3, masked=(False,)),
        )  # fmt: skip

    parts = Parts(
        network=learner,
        training=sampler(Stream.TRAINING, Placement.of(recipe, SMALL)),
        validation=sampler(Stream.VALIDATION),
        recipe=recipe,
        labels=SMALL,
        scales=output_scales(learner, spec),
        loss=make_loss(recipe.loss, labels=SMALL, batch_dice=False),
        device=cpu,
        folder=folder.with_name(position),
        tuning=safe_base(cpu),
    )
    train(parts)
    unseen = noisy_ball("unseen", 9)
    logits = predict_logits([learner.eval()], torch.from_numpy(unseen.image), patch=(64, 64, 64), heads=2, step=1.0)
    found, true = logits.argmax(0).numpy() == 1, unseen.labels == 1
    return 2 * (found & true).sum() / (found.sum() + true.sum())


@pytest.mark.slow
def test_a_target_of_3_voxels_radius_in_128_cubed_is_learnt_where_it_is_sought(tmp_path):
    for seed, name in enumerate("abc"):
        write_case(tmp_path / "cases", noisy_ball(name, seed), key=name)
    assert dice_after(tmp_path / "cases", "components") > 0.6
    assert dice_after(tmp_path / "cases", "uniform") < 0.1
