"""Fixed copies of cases: how many there are, that they stay what they are, and how many steps they take."""

from collections import defaultdict

import numpy as np
import pytest
import torch
from test_sampling import sampler as toy_sampler
from test_sampling import toy_case
from toys import configuration, plan

from autoseg.augment import FixedCopies, make_augmentation
from autoseg.augment.policy import NONE
from autoseg.pipeline.parts import make_parts
from autoseg.pipeline.recipe import TrainOptions, make_recipe
from autoseg.sampling import Sampler
from autoseg.schema import Fold, Recipe, Run
from autoseg.store import write_case

CASES = ("a", "b", "c")
PATCH = (7, 11, 13)
"""Of the same size as the cases: there is one place for it."""


@pytest.fixture
def folder(tmp_path):
    for seed, name in enumerate(CASES):
        write_case(tmp_path, toy_case(name, seed), key=name)
    return tmp_path


def augmentation(name):
    return make_augmentation(name, patch=PATCH, dimension=3, masked=(False, False))


def sampler(folder, name="strong", copies=2, seed=3) -> Sampler:
    made = toy_sampler(folder, patch=PATCH, seed=seed)
    fixed = FixedCopies(augmentation=augmentation(name), plain=augmentation("none"), copies=copies, seed=seed)
    return Sampler(**{**vars(made), "augmentation": fixed})


def seen(made: Sampler, steps: range) -> dict[str, set[bytes]]:
    """Case -> the different patches that it was seen as."""
    found = defaultdict(set)
    for step in steps:
        batch = made.assemble(made.sources(step), torch.device("cpu"))
        for case, image, labels in zip(batch.cases, batch.image, batch.labels):
            found[case].add(image.numpy().tobytes() + labels.numpy().tobytes())
    return found


@pytest.mark.parametrize("name", ["strong", "desai"])
def test_no_more_variants_than_copies_and_the_case_itself(folder, name):
    found = seen(sampler(folder, name), range(14))
    assert set(found) == {*CASES} and {len(variants) for variants in found.values()} == {3}
    plain = seen(toy_sampler(folder, PATCH, "none"), range(6))
    assert all(plain[case] < found[case] for case in CASES)
    # Drawn anew there is no end to them.
    assert max(len(variants) for variants in seen(toy_sampler(folder, PATCH, name), range(6)).values()) > 3


def test_copies_stay_from_step_to_step_and_differ_with_the_seed(folder):
    early, late = seen(sampler(folder), range(14)), seen(sampler(folder), range(100, 114))
    assert early == late
    other = seen(sampler(folder, seed=4), range(14))
    assert all(len(early[case] & other[case]) == 1 for case in CASES)  # the case itself


def test_in_2d_every_slice_has_copies_of_its_own(folder):
    patch = PATCH[1:]
    maker = {
        name: make_augmentation(name, patch=patch, dimension=2, masked=(False, False)) for name in ("desai", "none")
    }
    fixed = FixedCopies(augmentation=maker["desai"], plain=maker["none"], copies=2, seed=3)
    made = Sampler(**{**vars(toy_sampler(folder, patch=patch)), "augmentation": fixed})
    found = defaultdict(set)
    for step in range(40):
        sources = made.sources(step)
        for shown, copy, (_, drawn) in zip(sources.patches, sources.draws.copies, sources.draws.samples):
            found[shown.case, shown.box.start[0], copy].add(drawn.affine.tobytes())
    assert all(len(affine) == 1 for affine in found.values())
    changed = [affine for (_, _, copy), affine in found.items() if copy]
    assert len(changed) > 30 and len(set.union(*changed)) == len(changed)


def test_each_copy_is_seen_as_often_as_the_case(folder):
    chosen = np.concatenate(
        [sampler(folder).augmentation.draw(np.random.default_rng(step), 30, 2, ["a"] * 30).copies for step in range(50)]
    )
    assert np.bincount(chosen) == pytest.approx(np.full(3, 500), abs=80)


def test_parts_boxes_and_label_maps_follow(folder):
    fixed = sampler(folder).augmentation
    draws = fixed.draw(np.random.default_rng(0), 4, 2, ["a", "b", "c", "a"])
    part = draws.part(slice(1, 3))
    assert part.copies == draws.copies[1:3]
    assert [part.source_shape(i) for i in range(2)] == [draws.source_shape(i) for i in (1, 2)]
    sources = []
    for i in range(2):
        labels = torch.from_numpy(np.random.default_rng(i).integers(0, 3, part.source_shape(i)).astype(np.int16))
        sources.append((labels.float()[None].repeat(2, 1, 1, 1), labels))
    _, labels = fixed.apply(part, sources)
    assert torch.equal(fixed.follow(part, [one for _, one in sources]), labels)
    with pytest.raises(ValueError, match="names of 0 cases"):
        fixed.draw(np.random.default_rng(0), 4, 2)


def test_a_callable_of_ones_own_can_be_fixed_too(folder):
    # It draws from the generator that it is handed.
    assert max(map(len, seen(sampler(folder, "batchgenerators", copies=1), range(4)).values())) <= 2


def parts(folder, **recipe):
    made = Run(
        autoseg_version="0", versions={}, dataset="Dataset001_Toy", configuration="3d_fullres", fold=0,
        cases=Fold(train=("a", "b"), val=("c",)), plan=plan(channels=("a", "b")), recipe=Recipe(**recipe),
        data_hash="", device="cpu", started="",
    )  # fmt: skip
    return make_parts(made, configuration(), folder, folder / "run", torch.device("cpu"), None, {})


@pytest.mark.parametrize("recipe", [{"augmentation": "strong"}, {"augmentation": "desai", "offline_copies": 4}])
def test_held_out_patches_are_never_augmented(folder, recipe):
    made = parts(folder, **recipe)
    assert made.validation.augmentation.policy == NONE
    for step in range(3):
        draws = made.validation.sources(step).draws
        assert (draws.affine == np.eye(3)).all() and not draws.mirrored.any()
    copies = recipe.get("offline_copies")
    assert isinstance(made.training.augmentation, FixedCopies) == bool(copies)
    assert copies is None or made.training.augmentation.copies == copies
    assert copies is None or max(max(made.training.sources(step).draws.copies) for step in range(9)) > 0


def test_with_matched_steps_a_run_has_as_many_as_without_copies():
    plain = make_recipe(TrainOptions(epochs=7))
    options = TrainOptions(epochs=7, changes={"offline_copies": 4, "match_steps": True})
    matched = make_recipe(options)
    assert matched.epochs * matched.steps_per_epoch == plain.epochs * plain.steps_per_epoch == 1750
    assert matched == make_recipe(TrainOptions(epochs=7, changes={"offline_copies": 4}))


def test_without_matched_steps_an_epoch_grows_with_the_data():
    options = TrainOptions(epochs=7, changes={"offline_copies": 4, "match_steps": False, "steps_per_epoch": 10})
    grown = make_recipe(options)
    assert (grown.epochs, grown.steps_per_epoch) == (7, 50)
    assert make_recipe(options, existing=grown) == grown  # the same command goes on with it
