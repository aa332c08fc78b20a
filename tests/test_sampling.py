"""Patches: inside the image, on the class they were drawn for, repeatable step by step, errors with their case."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import configuration, grid, plan

from autoseg.augment import make_augmentation
from autoseg.labels import UNSEEN, Labels
from autoseg.placement import choose_patch, place_axis
from autoseg.preprocess import ANNOTATED, prepare
from autoseg.records import AutosegError
from autoseg.sampling import (
    PreparedCases,
    Sampler,
    Stream,
    cut_sources,
    forced_foreground,
    grow,
    prefetch,
)
from autoseg.store import write_case
from autoseg.volume import Box, Volume

SHAPE = (7, 11, 13)


def toy_case(name="a", seed=0, labels=None):
    rng = np.random.default_rng(seed)
    marked = rng.integers(0, 3, SHAPE).astype(np.int16) if labels is None else labels
    volume = Volume(array=rng.random((2, *SHAPE), np.float32) + 1, grid=grid(SHAPE))
    return prepare(name, volume, marked, grid(SHAPE), plan(channels=("a", "b")), configuration())


@pytest.fixture
def folder(tmp_path):
    for seed, name in enumerate(("a", "b", "c")):
        write_case(tmp_path, toy_case(name, seed), key=name)
    return tmp_path


def sampler(folder, patch=(4, 6, 8), augmentation="default", seed=3, stream=Stream.TRAINING, memory=1 << 30):
    return Sampler(
        cases=PreparedCases(folder, memory),
        case_names=("a", "b", "c"),
        patch=patch,
        batch_size=3,
        foreground_fraction=0.33,
        augmentation=make_augmentation(augmentation, patch=patch, dimension=len(patch), masked=(False, False)),
        seed=seed,
        stream=stream,
    )


def test_a_case_without_foreground_gives_a_random_patch():
    case = toy_case(labels=np.zeros(SHAPE, np.int16))
    box = choose_patch(case, (4, 6, 8), True, np.random.default_rng(0))
    assert box.shape == (4, 6, 8)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 19) | st.none(), st.integers(0, 9))
def test_a_patch_stays_inside_and_shows_its_voxel(size, patch, wanted, seed):
    wanted = None if wanted is None else min(wanted, size - 1)
    start = place_axis(size, patch, wanted, np.random.default_rng(seed))
    if size >= patch:
        assert 0 <= start <= size - patch
    else:
        before, after = -start, start + patch - size
        assert before >= 0
        assert after - before in (0, 1)
    if wanted is not None:
        assert start <= wanted < start + patch


@pytest.mark.parametrize("patch", [(4, 6, 8), (6, 8), (9, 13, 15)])
def test_forced_patches_hold_every_class_equally_often(patch):
    labels = np.zeros(SHAPE, np.int16)
    labels[6, 10, 12] = 1  # a corner: the far border must not push the patch outside
    labels[:3, :5, :5] = 2
    case, rng = toy_case(labels=labels), np.random.default_rng(1)
    seen = {1: 0, 2: 0}
    for _ in range(300):
        box = choose_patch(case, patch, True, rng)
        _, found = cut_sources(case, box, 3)
        if all(n >= e for n, e in zip(SHAPE, box.shape)):
            assert UNSEEN not in found
        for index in seen:
            seen[index] += bool((found == index).any())
    if len(patch) == 2:
        assert 110 < seen[1] < 190


PARTLY = Labels.from_dataset({"background": 0, "liver": 7, "lesion": 200, "ignore": 9})
REGIONS = Labels.from_dataset({"background": 0, "both": [7, 200], "lesion": 200})


def labelled_case(labels, marked):
    volume = Volume(array=np.ones((1, *SHAPE), np.float32), grid=grid(SHAPE))
    return prepare("a", volume, marked, grid(SHAPE), replace(plan(), labels=labels), configuration())


def test_patches_of_a_case_with_ignored_voxels_are_centred_on_others():
    marked = np.full(SHAPE, PARTLY.ignored, np.int16)
    assert labelled_case(PARTLY, marked).locations == {}, "nothing is annotated, so anywhere will do"
    marked[3, 4, 5] = 0
    marked[3, 4, 6] = 2
    case, rng = labelled_case(PARTLY, marked), np.random.default_rng(2)
    assert case.locations[ANNOTATED].tolist() == [[3, 4, 5], [3, 4, 6]]
    assert case.locations[2].tolist() == [[3, 4, 6]]
    for patch in ((3, 3, 3), (3, 3)):
        starts = {choose_patch(case, patch, False, rng).start for _ in range(40)}
        assert {start[2] for start in starts} == {4, 5}
        assert {choose_patch(case, patch, True, rng).start[2] for _ in range(40)} == {5}
    everything = labelled_case(PARTLY, np.where(marked == PARTLY.ignored, 0, marked))
    assert ANNOTATED not in everything.locations
    assert len({choose_patch(everything, (3, 3, 3), False, rng).start for _ in range(40)}) > 20


def test_forced_patches_hold_every_region():
    marked = np.zeros(SHAPE, np.int16)
    marked[1, 1, 1:9] = 1
    marked[5, 9, 11] = 2
    case, rng = labelled_case(REGIONS, marked), np.random.default_rng(3)
    assert len(case.locations[1]) == 9, "the first region holds the second"
    assert case.locations[2].tolist() == [[5, 9, 11]]
    seen = sum(choose_patch(case, (1, 1, 1), True, rng).start == (5, 9, 11) for _ in range(300))
    assert 130 < seen < 200  # 1/2 + 1/2 * 1/9


def test_a_batch_says_what_was_annotated_in_each_case(folder):
    flags = {"a": (True, False), "b": (True, True), "c": (False, True)}
    made, cpu = replace(sampler(folder), annotated=flags), torch.device("cpu")
    batch = made.assemble(made.sources(0), cpu)
    assert batch.annotated.tolist() == [list(flags[case]) for case in batch.cases]
    assert sampler(folder).assemble(made.sources(0), cpu).annotated is None


def test_the_share_of_forced_samples_by_hand():
    for step in (0, 1, 7):
        assert forced_foreground(2, 0.33, step) == [False, True]
        assert forced_foreground(12, 0.33, step) == [False] * 8 + [True] * 4
        assert forced_foreground(3, 0.0, step) == [False] * 3
        assert forced_foreground(3, 0.01, step) == [False, False, True]


@pytest.mark.parametrize(("fraction", "forced"), [(0.0, 0), (0.01, 1), (0.33, 33), (0.5, 50), (0.9, 90), (1.0, 100)])
def test_batches_of_one_patch_show_foreground_in_as_many_steps(fraction, forced):
    steps = [forced_foreground(1, fraction, step) for step in range(100)]
    assert sum(map(sum, steps)) == forced
    assert steps[0] == [fraction > 0]
    for first in range(0, 100, 10):  # evenly spread
        assert abs(sum(map(sum, steps[first : first + 10])) - 10 * fraction) < 1


def test_a_sampler_of_single_patches_forces_its_share_of_steps(folder):
    one = replace(sampler(folder), batch_size=1)
    forced = [patch.forced_foreground for step in range(7) for patch in one.sources(step).patches]
    assert forced == [True, False, False, True, False, False, True]


def test_grow_keeps_the_centre():
    box = Box(start=(2, 3, 4), stop=(6, 9, 12))
    assert grow(box, (4, 6, 8)) == box
    assert grow(box, (6, 8, 10)) == Box(start=(1, 2, 3), stop=(7, 10, 13))
    assert grow(box, (7, 6, 8)) == Box(start=(1, 3, 4), stop=(8, 9, 12))
    flat = Box(start=(2, 3, 4), stop=(3, 9, 12))
    assert grow(flat, (8, 10)) == Box(start=(2, 2, 3), stop=(3, 10, 13))


def test_outside_is_zero_and_unseen():
    case = toy_case()
    image, labels = cut_sources(case, Box(start=(-2, 0, 0), stop=(3, 11, 15)), 3)
    assert image.shape == (2, 5, 11, 15)
    assert not image[:, :2].any()
    assert (labels[:2] == UNSEEN).all()
    assert (labels[:, :, 13:] == UNSEEN).all()
    assert np.array_equal(image[:, 2:, :, :13], case.image[:, :3])
    nothing, unseen = cut_sources(case, Box(start=(9, 0, 0), stop=(12, 3, 3)), 3)
    assert not nothing.any()
    assert (unseen == UNSEEN).all()


@pytest.mark.parametrize("patch", [(4, 6, 8), (6, 8)])
def test_a_step_is_the_same_whenever_and_however_it_is_made(folder, patch):
    first = sampler(folder, patch)
    late = sampler(folder, patch, memory=0)
    cpu = torch.device("cpu")
    late.sources(0)
    for step in (0, 5):
        a, b = (one.assemble(one.sources(step), cpu) for one in (first, late))
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.labels, b.labels)
        assert a.patches == b.patches
        assert a.image.shape == (3, 2, *patch)
        assert a.labels.dtype == torch.int64
        assert a.labels.min() >= 0


def test_steps_seeds_and_streams_differ(folder):
    cpu = torch.device("cpu")
    one = sampler(folder)
    reference = one.assemble(one.sources(0), cpu).image
    others = [(one, 1), (sampler(folder, seed=4), 0), (sampler(folder, stream=Stream.VALIDATION), 0)]
    for other, step in others:
        assert not torch.equal(reference, other.assemble(other.sources(step), cpu).image)


def test_prefetch_keeps_the_order_for_any_number_of_threads(folder):
    wanted = [s.patches for s in prefetch(sampler(folder).sources, range(7), threads=1)]
    assert [s.patches for s in prefetch(sampler(folder).sources, range(7), threads=3)] == wanted


def test_an_error_ahead_ends_the_run_with_its_case_and_traceback(folder):
    (folder / "b" / "image.b2nd").unlink(missing_ok=True)
    for file in (folder / "b").glob("*"):
        file.unlink()
    with pytest.raises(AutosegError, match="case b") as error:
        list(prefetch(sampler(folder).sources, range(50), threads=2))
    assert error.value.__cause__ is not None


def test_prefetch_reads_no_further_than_asked(folder):
    loaded = []

    def load(step):
        loaded.append(step)
        return step

    for step in prefetch(load, range(1000), threads=2):
        if step == 3:
            break
    assert max(loaded) < 12
