"""Augmentation by other code: batchgenerators' classes, a callable of one's own, and names that lead nowhere."""

import random
import sys
import types
from itertools import combinations

import numpy as np
import pytest
import torch

from autoseg.augment import AUGMENTATIONS, make_augmentation
from autoseg.augment.classic import _in_planes, enlarged
from autoseg.records import AutosegError

PATCH = (5, 7, 11)


def boxes(draws, batch: int, channels: int = 2):
    rng = np.random.default_rng(1)
    shape = draws.source_shape(0)
    return [
        (
            torch.from_numpy(rng.normal(size=(channels, *shape)).astype(np.float32)),
            torch.from_numpy(rng.integers(-1, 3, shape).astype(np.int16)),
        )
        for _ in range(batch)
    ]


def run(name: str, seed: int, patch: tuple[int, ...] = PATCH, batch: int = 6):
    augmentation = make_augmentation(name, patch=patch, dimension=len(patch), masked=(True, False))
    draws = augmentation.draw(np.random.default_rng(seed), batch, 2)
    return augmentation.apply(draws, boxes(draws, batch))


def own(monkeypatch, transform) -> str:
    """Make `transform` importable; returns its name."""
    module = types.ModuleType("a_module_of_mine")
    module.transform = transform
    monkeypatch.setitem(sys.modules, "a_module_of_mine", module)
    return "a_module_of_mine:transform"


@pytest.mark.parametrize("name", [*AUGMENTATIONS, "own"])
@pytest.mark.parametrize("patch", [PATCH, (9, 14)])
def test_nothing_but_outside_stays_nothing(name, patch, monkeypatch):
    if name == "own":
        name = own(monkeypatch, lambda image, labels, rng: (image, labels))
    augmentation = make_augmentation(name, patch=patch, dimension=len(patch), masked=(True,))
    draws = augmentation.draw(np.random.default_rng(0), 3, 1)
    shapes = [draws.source_shape(sample) for sample in range(3)]
    empty = [(torch.zeros(1, *shape), torch.full(shape, -1, dtype=torch.int16)) for shape in shapes]
    image, labels = augmentation.apply(draws, empty)
    assert image.shape == (3, 1, *patch) and (image == 0).all()
    assert labels.shape == (3, *patch) and labels.dtype == torch.int64 and (labels == 0).all()


@pytest.mark.parametrize("patch", [PATCH, (9, 14), (2, 7, 11)])
def test_batchgenerators_repeats_by_seed_and_leaves_the_global_generators(patch):
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    image, labels = run("batchgenerators", 3, patch)
    after = random.random(), np.random.random()  # noqa: NPY002
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    assert after == (random.random(), np.random.random())  # noqa: NPY002
    np.random.seed(6)  # noqa: NPY002
    again, again_labels = run("batchgenerators", 3, patch)
    assert torch.equal(image, again) and torch.equal(labels, again_labels)
    other, _ = run("batchgenerators", 4, patch)
    assert not torch.equal(image, other)
    assert image.shape == (6, 2, *patch) and image.dtype == torch.float32 and image.isfinite().all()
    assert labels.dtype == torch.int64 and labels.min() == 0 and labels.max() == 2


def test_batchgenerators_mostly_shows_the_patch_itself():
    augmentation = make_augmentation("batchgenerators", patch=PATCH, dimension=3, masked=(False,))
    draws = augmentation.draw(np.random.default_rng(0), 40, 1)
    sources = boxes(draws, 40, 1)
    _, labels = augmentation.apply(draws, sources)
    offset = [(have - want) // 2 for have, want in zip(draws.source_shape(0), PATCH)]
    inner = tuple(slice(start, start + want) for start, want in zip(offset, PATCH))
    flips = [axes for n in range(4) for axes in combinations(range(3), n)]
    same = [
        any(torch.equal(found, box[inner].clamp(min=0).long().flip(axes)) for axes in flips)
        for found, (_, box) in zip(labels, sources)
    ]
    assert 0.64 - 4 * 0.076 < np.mean(same) < 0.64 + 4 * 0.076


def test_planes_are_folded_and_unfolded():
    def turn(data, seg):
        assert data.shape == (2, 6, 4, 5) and seg.shape == (2, 3, 4, 5)
        return {"data": data.swapaxes(2, 3) + np.arange(6)[:, None, None], "seg": seg.swapaxes(2, 3)}

    data, seg = np.random.default_rng(0).normal(size=(2, 2, 3, 4, 5)), np.ones((2, 1, 3, 4, 5))
    found = _in_planes(turn)(data=data, seg=seg)
    assert found["seg"].shape == (2, 1, 3, 5, 4)
    for channel in range(2):
        for z in range(3):
            wanted = data[:, channel, z].swapaxes(1, 2) + (3 * channel + z)
            np.testing.assert_array_equal(found["data"][:, channel, z], wanted)


@pytest.mark.parametrize(
    "patch, box",
    [
        ((128, 128, 128), (206, 206, 206)),
        ((512, 512), (602, 602)),
        ((20, 80, 100), (20, 118, 118)),
        ((9, 14), (15, 18)),
    ],
)
def test_enlarged_boxes(patch, box):
    # 128 (cos 30 + sin 30) / 0.85 = 205.7, made even; 512 / 0.85 = 602.4; in its plane 80 and 100 both reach 100;
    # 9 cos 15 + 14 sin 15 = 12.3 and 14 cos 15 + 9 sin 15 = 15.9.
    assert enlarged(patch) == box


def test_a_callable_of_ones_own(monkeypatch):
    def transform(image, labels, rng):
        assert labels.dtype == torch.int64 and labels.min() == -1  # what is outside is still to be seen
        return image * rng.uniform(2, 3), labels.flip(-1)

    name = own(monkeypatch, transform)
    augmentation = make_augmentation(name, patch=PATCH, dimension=3, masked=(False, True))
    draws = augmentation.draw(np.random.default_rng(0), 2, 2)
    assert draws.source_shape(1) == PATCH
    sources = boxes(draws, 2)
    image, labels = augmentation.apply(draws, sources)
    for sample, (source, source_labels) in enumerate(sources):
        turned = source_labels.flip(-1)
        factor = image[sample, 0] / source[0]
        assert factor.min() >= 2 and factor.max() <= 3.001
        assert torch.equal(labels[sample], turned.clamp(min=0).long())
        assert ((image[sample, 1] == 0) == (turned < 0)).all()
    again, _ = augmentation.apply(draws, sources)
    assert torch.equal(image, again)


@pytest.mark.parametrize(
    "transform, message",
    [
        (lambda image, labels, rng: image, r"must return \(image, labels\)"),
        (lambda image, labels, rng: (image.numpy(), labels), "two tensors"),
        (lambda image, labels, rng: (image[..., 1:], labels), r"image of shape \(2, 1, 5, 7, 10\) instead of \(2, 1, "),
        (lambda image, labels, rng: (image, labels[:, None]), r"labels of shape \(2, 1, 5, 7, 11\)"),
        (lambda image, labels, rng: (image.double(), labels), "torch.float64 instead of torch.float32"),
        (lambda image, labels, rng: (image, labels.float()), "instead of an integer type"),
        (lambda image, labels, rng: (image.to("meta"), labels), "image on meta instead of cpu"),
        (lambda image, labels, rng: 1 / 0, r"failed on an image batch of shape \(2, 1, 5, 7, 11\).*ZeroDivisionError"),
    ],
)  # fmt: skip
def test_what_a_callable_returns_is_checked(transform, message, monkeypatch):
    augmentation = make_augmentation(own(monkeypatch, transform), patch=PATCH, dimension=3, masked=(False,))
    draws = augmentation.draw(np.random.default_rng(0), 2, 1)
    with pytest.raises(AutosegError, match=f"a_module_of_mine:transform.*{message}"):
        augmentation.apply(draws, boxes(draws, 2, 1))


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "defualt",
            "unknown augmentation 'defualt'; choose one of default, .*, batchgenerators, or package.module:name",
        ),
        ("no_such_module_anywhere:f", "No module named 'no_such_module_anywhere'"),
        ("math:no_such_function", "the module 'math' has no class or function 'no_such_function'"),
        ("math:pi", "the module 'math' has no class or function 'pi'"),
        ("math:", "the module 'math' has no class or function ''"),
    ],
)
def test_names_that_lead_nowhere(name, message):
    with pytest.raises(AutosegError, match=message):
        make_augmentation(name, patch=PATCH, dimension=3, masked=(False,))


@pytest.mark.parametrize("patch, dimension", [((5, 7), 3), (PATCH, 2), ((0, 7), 2)])
def test_a_patch_must_fit_its_dimension(patch, dimension):
    with pytest.raises(ValueError, match="does not fit"):
        make_augmentation("default", patch=patch, dimension=dimension, masked=(False,))
