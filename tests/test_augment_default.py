"""The default augmentation: what is drawn, how often, and that draws decide everything."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from batchgenerators.transforms.color_transforms import BrightnessMultiplicativeTransform
from scipy import ndimage, stats

from autoseg.augment import Source, make_augmentation
from autoseg.augment.default import DefaultAugmentation, Draws, rotation_limit_rad
from autoseg.augment.policy import NONE

PATCH = (5, 7, 11)
MANY = 20_000


def make(name: str = "default", patch: tuple[int, ...] = PATCH, masked: tuple[bool, ...] = (False, False)):
    return make_augmentation(name, patch=patch, dimension=len(patch), masked=masked)


def sources(draws, batch: int, channels: int = 2, seed: int = 0, more: int = 0) -> list[Source]:
    """Random boxes, `more` voxels larger on every side than asked for; the inner box does not depend on `more`."""
    boxes = []
    for sample in range(batch):
        rng = np.random.default_rng([seed, sample])
        inner = draws.source_shape(sample)
        image = rng.normal(size=(channels, *inner)).astype(np.float32)
        labels = rng.integers(-1, 4, inner).astype(np.int16)
        image = np.pad(image, ((0, 0), *[(more, more)] * len(inner)), mode="wrap")
        boxes.append((torch.from_numpy(image), torch.from_numpy(np.pad(labels, more, constant_values=3))))
    return boxes


def run(name: str, seed: int, *, patch: tuple[int, ...] = PATCH, batch: int = 30, more: int = 0, masked=(False, True)):
    augmentation = make(name, patch, masked)
    draws = augmentation.draw(np.random.default_rng(seed), batch, 2)
    return augmentation.apply(draws, sources(draws, batch, more=more))


def neutral(**changes: list) -> Draws:
    """One sample, two channels; everything left out but `changes`."""
    draws = make("none").draw(np.random.default_rng(0), 1, 2)
    return replace(draws, **{name: np.array(value) for name, value in changes.items()})


def test_outside_becomes_background_and_masked_channels_zero():
    augmentation = make("none", masked=(False, True))
    draws = augmentation.draw(np.random.default_rng(0), 1, 2)
    image, labels = augmentation.apply(draws, [(torch.ones(2, *PATCH), torch.full(PATCH, -1, dtype=torch.int16))])
    assert (labels == 0).all() and labels.dtype == torch.int64 and labels.shape == (1, *PATCH)
    assert (image[:, 0] == 1).all() and (image[:, 1] == 0).all()


def test_none_only_cleans_up():
    augmentation = make("none", masked=(False, True))
    draws = augmentation.draw(np.random.default_rng(0), 3, 2)
    boxes = sources(draws, 3)
    image, labels = augmentation.apply(draws, boxes)
    for sample, (source, source_labels) in enumerate(boxes):
        assert draws.source_shape(sample) == PATCH
        assert torch.equal(image[sample, 0], source[0])
        assert torch.equal(image[sample, 1], torch.where(source_labels < 0, 0.0, source[1]))
        assert torch.equal(labels[sample], source_labels.clamp(min=0).long())


@pytest.mark.parametrize("patch", [PATCH, (9, 14), (2, 7, 11)])
def test_the_seed_decides_everything(patch):
    image, labels = run("default", 4, patch=patch)
    again, again_labels = run("default", 4, patch=patch)
    assert torch.equal(image, again) and torch.equal(labels, again_labels)
    other, other_labels = run("default", 5, patch=patch)
    assert not torch.equal(image, other) and not torch.equal(labels, other_labels)
    assert image.dtype == torch.float32 and labels.dtype == torch.int64
    assert image.shape == (30, 2, *patch) and labels.shape == (30, *patch)
    assert image.isfinite().all() and labels.min() == 0 and labels.max() == 3


@pytest.mark.parametrize("patch", [PATCH, (9, 14), (2, 7, 11)])
def test_a_larger_source_gives_the_same(patch):
    exact, exact_labels = run("default", 4, patch=patch)
    large, large_labels = run("default", 4, patch=patch, more=3)
    assert torch.equal(exact, large) and torch.equal(exact_labels, large_labels)


def test_global_generators_and_sources_are_left_alone():
    augmentation = make(masked=(True, True))
    draws = augmentation.draw(np.random.default_rng(0), 30, 2)
    boxes = sources(draws, 30)
    before = [(image.clone(), labels.clone()) for image, labels in boxes]
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    augmentation.apply(draws, boxes)
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002
    for (image, labels), (image_before, labels_before) in zip(boxes, before):
        assert torch.equal(image, image_before) and torch.equal(labels, labels_before)


@pytest.fixture(scope="module")
def many() -> Draws:
    return make().draw(np.random.default_rng(11), MANY, 2)


def rotated_and_scale(draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    scale = np.cbrt(np.linalg.det(draws.affine))
    return ~np.isclose(np.einsum("bii->b", draws.affine), 3 * scale), scale


def assert_share(chosen: np.ndarray, probability: float) -> None:
    error = np.sqrt(probability * (1 - probability) / len(chosen))
    assert abs(chosen.mean() - probability) < 4 * error, (chosen.mean(), probability)


def assert_uniform(values: np.ndarray, low: float, high: float) -> None:
    assert low <= values.min() and values.max() <= high
    assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-3


def test_space_is_drawn_as_often_and_as_wide_as_it_should(many):
    rotated, scale = rotated_and_scale(many)
    scaled = ~np.isclose(scale, 1, atol=1e-9)
    assert_share(rotated, 0.2)
    assert_share(scaled, 0.2)
    assert_share(rotated | scaled, 0.36)
    assert_uniform(scale[scaled], 0.7, 1.4)
    # Rz Ry Rx: the last row is (-sin y, cos y sin x, cos y cos x), the first column (cos y cos z, cos y sin z, .).
    turn = (many.affine / scale[:, None, None])[rotated]
    limit = np.deg2rad(30)
    assert_uniform(np.arctan2(turn[:, 2, 1], turn[:, 2, 2]), -limit, limit)
    assert_uniform(np.arcsin(-turn[:, 2, 0]), -limit, limit)
    assert_uniform(np.arctan2(turn[:, 1, 0], turn[:, 0, 0]), -limit, limit)
    for axis in range(3):
        assert_share(many.mirrored[:, axis], 0.5)


def test_noise_is_drawn_as_a_standard_deviation(many):
    assert_share(many.noise_sigma > 0, 0.1)
    assert_uniform(many.noise_sigma[many.noise_sigma > 0], 0.0, 0.1)
    assert len(np.unique(many.noise_seed)) == MANY


def test_blur_is_drawn_a_channel_and_an_axis(many):
    blurred = many.blur_sigma > 0
    assert (blurred.all(-1) == blurred.any(-1)).all()
    each = blurred.any(-1)
    assert_share(each[:, 0], 0.1)
    assert_share(each.any(1), 0.2 * 0.75)
    assert_uniform(many.blur_sigma[blurred], 0.5, 1.0)
    assert abs(np.corrcoef(many.blur_sigma[each].T)[0, 1]) < 0.07  # axes are independent


def test_low_resolution_is_drawn_a_channel_for_all_axes(many):
    assert (many.zoom == many.zoom[..., :1]).all()
    coarse = many.zoom[..., 0] < 1
    assert_share(coarse[:, 0], 0.125)
    assert_share(coarse.any(1), 0.25 * 0.75)
    assert_uniform(many.zoom[coarse][:, 0], 0.5, 1.0)


@pytest.mark.parametrize(
    "name, probability, low, high",
    [
        ("brightness", 0.15, 0.75, 1.25),
        ("contrast", 0.15, 0.75, 1.25),
        ("gamma_inverted", 0.1, 0.7, 1.5),
        ("gamma", 0.3, 0.7, 1.5),
    ],
)
def test_factors_about_one(many, name, probability, low, high):
    factors = getattr(many, name)
    chosen = factors != 1
    assert (chosen[:, 0] == chosen[:, 1]).all()  # all channels of a sample, each with its own factor
    assert_share(chosen[:, 0], probability)
    drawn = factors[chosen]
    assert_share(drawn < 1, 0.5)
    assert_uniform(drawn[drawn < 1], low, 1.0)
    assert_uniform(drawn[drawn > 1], 1.0, high)


def test_transforms_samples_and_streams_are_independent(many):
    rotated, scale = rotated_and_scale(many)
    decisions = [rotated, ~np.isclose(scale, 1, atol=1e-9), *many.mirrored.T, many.noise_sigma > 0]
    decisions += [getattr(many, name)[:, 0] != 1 for name in ("brightness", "contrast", "gamma_inverted", "gamma")]
    decisions += [many.blur_sigma[:, 0, 0] > 0, many.zoom[:, 0, 0] < 1]
    table = np.corrcoef(np.stack(decisions).astype(float))
    assert np.abs(table - np.eye(len(table))).max() < 5 / np.sqrt(MANY)
    one, two = (make().draw(np.random.default_rng(child), MANY, 1) for child in np.random.SeedSequence(1).spawn(2))
    for field in ("noise_sigma", "gamma", "brightness"):
        a, b = getattr(one, field).ravel(), getattr(two, field).ravel()
        assert not np.array_equal(a, b)
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(MANY)
    assert abs(np.corrcoef(one.noise_sigma[:-1], one.noise_sigma[1:])[0, 1]) < 5 / np.sqrt(MANY)


def test_the_generator_advances_alike_whatever_is_drawn():
    generators = [np.random.default_rng(9), np.random.default_rng(9)]
    for name, rng in zip(("default", "none"), generators):
        make(name).draw(rng, 6, 2)
    assert generators[0].random() == generators[1].random()


@pytest.mark.parametrize(
    "patch, degrees",
    [((9, 14), 15), ((10, 14), 180), ((9, 13.5), 180), ((5, 7, 11), 30), ((4, 7, 12), 30), ((3, 7, 11), 180)],
)
def test_how_far_patches_turn(patch, degrees):
    assert np.rad2deg(rotation_limit_rad(patch)) == pytest.approx(degrees)


def test_a_flat_patch_moves_in_its_plane():
    draws = make(patch=(3, 7, 11)).draw(np.random.default_rng(0), 500, 1)
    assert (draws.affine[:, 0] == [1, 0, 0]).all() and (draws.affine[:, 1:, 0] == 0).all()
    assert {draws.source_shape(sample)[0] for sample in range(500)} == {3}
    angles = np.arctan2(draws.affine[:, 2, 1], draws.affine[:, 1, 1])
    assert np.abs(angles).max() > np.deg2rad(150)
    assert (draws.zoom[..., 0] == 1).all() and (draws.zoom[..., 1] < 1).any()
    assert (draws.blur_sigma[..., 0] > 0).any() and draws.mirrored[:, 0].any()


def test_two_dimensions():
    draws = make(patch=(10, 14)).draw(np.random.default_rng(0), 500, 1)
    angles = np.arctan2(draws.affine[:, 1, 0], draws.affine[:, 0, 0])
    assert_uniform(angles[angles != 0], -np.pi, np.pi)
    assert draws.blur_sigma.shape == (500, 1, 2) and draws.mirrored.shape == (500, 2)


def test_brightness_equals_batchgenerators():
    draws = neutral(brightness=[[1.2, 1.0]])
    ((image, labels),) = sources(draws, 1)
    found, _ = make().apply(draws, [(image, labels)])
    theirs = BrightnessMultiplicativeTransform((1.2, 1.2))(data=image[None].numpy().astype(np.float64))["data"]
    np.testing.assert_allclose(found[0, 0], theirs[0, 0], rtol=1e-6)
    assert torch.equal(found[0, 1], image[1])


@pytest.mark.parametrize(
    "change, shows",
    [
        ({"noise_sigma": [0.05]}, (0, 1)),
        ({"blur_sigma": [[[0, 0, 0], [0.7, 0.8, 0.9]]]}, (1,)),
        ({"contrast": [[0.8, 1.0]]}, (0,)),
        ({"zoom": [[[0.6] * 3, [1.0] * 3]]}, (0,)),
        ({"gamma": [[1.0, 1.4]]}, (1,)),
        ({"gamma_inverted": [[1.3, 1.0]]}, (0,)),
    ],
)
def test_a_draw_changes_only_its_channels(change, shows):
    draws = neutral(**change)
    boxes = sources(draws, 1)
    image, labels = make().apply(draws, boxes)
    assert torch.equal(labels[0], boxes[0][1].clamp(min=0).long())
    for channel in range(2):
        assert torch.equal(image[0, channel], boxes[0][0][channel]) != (channel in shows)


def test_grey_values_change_in_order():
    draws = neutral(brightness=[[1.25, 1.0]], contrast=[[1.2, 1.0]], gamma=[[1.3, 1.0]], gamma_inverted=[[0.8, 1.0]])
    boxes = sources(draws, 1)
    x = boxes[0][0][0].numpy().astype(np.float64) * 1.25
    x = np.clip((x - x.mean()) * 1.2 + x.mean(), x.min(), x.max())
    for sign, gamma in ((-1, 0.8), (1, 1.3)):
        y = sign * x
        z = ((y - y.min()) / np.ptp(y)) ** gamma
        x = sign * ((z - z.mean()) / z.std() * y.std() + y.mean())
    np.testing.assert_allclose(make().apply(draws, boxes)[0][0, 0], x, atol=1e-5)


def test_mirror_and_rotation_act_on_image_and_labels_alike():
    augmentation = DefaultAugmentation(
        policy=replace(NONE, rotation=1, scaling=1, mirror=0.5), patch=(9, 11, 13), dimension=3, masked=(False,)
    )
    draws = augmentation.draw(np.random.default_rng(3), 6, 1)
    boxes = []
    for sample in range(6):
        field = np.random.default_rng(sample).normal(size=draws.source_shape(sample))
        inside = ndimage.gaussian_filter(field, 1.5) > 0
        boxes.append((torch.from_numpy(inside[None].astype(np.float32)), torch.from_numpy(inside.astype(np.int16))))
    image, labels = augmentation.apply(draws, boxes)
    clear = (image[:, 0] - 0.5).abs() > 1e-3
    assert torch.equal(labels[clear], (image[:, 0] > 0.5).long()[clear])
    plain, _ = augmentation.apply(replace(draws, mirrored=np.zeros_like(draws.mirrored)), boxes)
    for sample in range(6):
        axes = [axis + 1 for axis in np.flatnonzero(draws.mirrored[sample])]
        torch.testing.assert_close(image[sample], plain[sample].flip(axes), atol=1e-4, rtol=0)


def test_a_wrong_box_is_refused():
    augmentation = make("none")
    draws = augmentation.draw(np.random.default_rng(0), 1, 1)
    with pytest.raises(ValueError, match="not centred"):
        augmentation.apply(draws, [(torch.zeros(1, 5, 7, 12), torch.zeros(5, 7, 12, dtype=torch.int16))])


def test_every_draw_has_one_entry_a_sample():
    draws = make().draw(np.random.default_rng(0), 4, 3)
    arrays = {**vars(draws), **vars(draws.artefacts)}
    shapes = {name: array.shape for name, array in arrays.items() if name not in ("patch", "artefacts")}
    each = (4, 3)
    assert shapes == {
        "affine": (4, 3, 3), "mirrored": (4, 3), "noise_sigma": (4,), "noise_seed": (4,), "blur_sigma": (*each, 3),
        "brightness": each, "contrast": each, "zoom": (*each, 3), "gamma_inverted": each, "gamma": each,
        "displacement": (4, 3, 1, 1, 1), "turn_rad": (4, 3), "scale": (4,), "enlargement": (4,), "shear_rad": (4, 3),
        "motion_length": each, "motion_angle": each, "bias_log": (*each, 4, 4, 4), "ghost_strength": each,
        "ghost_copies": each, "ghost_axis": each, "anisotropy": (*each, 3), "rician_sigma": (4,), "rician_seed": (4,),
    }  # fmt: skip
    part = draws.part(slice(1, 3))
    for name, array in arrays.items():
        if name not in ("patch", "artefacts"):
            assert np.array_equal({**vars(part), **vars(part.artefacts)}[name], array[1:3])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_but_for_the_noise():
    augmentation = make(masked=(False, True))
    draws = augmentation.draw(np.random.default_rng(2), 30, 2)
    draws = replace(draws, noise_sigma=np.zeros(30))
    boxes = sources(draws, 30)
    image, labels = augmentation.apply(draws, boxes)
    there, labels_there = augmentation.apply(draws, [(image.cuda(), labels.cuda()) for image, labels in boxes])
    torch.testing.assert_close(there.cpu(), image, atol=1e-4, rtol=1e-4)
    assert torch.equal(labels_there.cpu(), labels)
