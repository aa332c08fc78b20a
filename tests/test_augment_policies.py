"""The named augmentations: which transforms they have, how wide, and that geometry is one map read once."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats
from skimage.transform import AffineTransform
from skimage.transform import warp as skimage_warp

from autoseg.augment import geometry, make_augmentation, spline
from autoseg.augment.default import DefaultAugmentation
from autoseg.augment.policy import DEFAULT, DESAI, MR_ARTEFACTS, NONE, POLICIES, STRONG, TRANSFORMS, certain, used
from autoseg.mirroring import Flips
from autoseg.records import AutosegError

PATCHES = [(5, 7, 11), (9, 14), (2, 7, 11)]
MANY = 4000
FLAT = (9, 14)


def make(policy, patch=FLAT, channels=1, flips=None):
    more = {} if flips is None else {"flips": flips}
    return DefaultAugmentation(policy=policy, patch=patch, dimension=len(patch), masked=(False,) * channels, **more)


def drawn(policy, patch=FLAT, batch=MANY, channels=2, seed=0):
    return make(policy, patch).draw(np.random.default_rng(seed), batch, channels)


def assert_uniform(values, low, high):
    assert low <= values.min() and values.max() <= high
    assert stats.kstest(values.ravel(), stats.uniform(low, high - low).cdf).pvalue > 1e-3


def assert_share(chosen, probability):
    assert abs(chosen.mean() - probability) < 4 * np.sqrt(probability * (1 - probability) / len(chosen))


def blobs(shape, count=3, seed=3):
    """Smooth regions with the values 0, 1, ..."""
    fields = np.random.default_rng(seed).normal(size=(count, *shape))
    return ndimage.gaussian_filter(fields, (0, *[1.5] * len(shape))).argmax(0).astype(np.int16)


def boxes(draws, batch, make_image, more=0):
    found = []
    for sample in range(batch):
        labels = np.pad(blobs(draws.source_shape(sample), seed=sample), more, mode="wrap")
        found.append((torch.from_numpy(make_image(labels)), torch.from_numpy(labels)))
    return found


def test_a_bad_name_lists_the_good_ones():
    with pytest.raises(AutosegError, match="default, none, desai, strong, mr_artefacts, batchgenerators"):
        make_augmentation("strongest", patch=FLAT, dimension=2, masked=(False,))


def test_what_each_policy_has():
    assert used(NONE) == ()
    assert used(DESAI) == ("zoom", "shear", "gamma", "motion blur")  # in this sequence
    listed = (
        "rotation", "scaling", "mirror", "noise", "blur", "brightness", "contrast", "low resolution", "gamma, inverted",
        "gamma",
    )  # fmt: skip
    assert used(DEFAULT) == listed
    assert set(used(STRONG)) == {*listed, "elastic"}
    spoilt = {"motion blur", "bias field", "ghosting", "anisotropy", "Rician noise"}
    assert set(used(MR_ARTEFACTS)) == {*listed, *spoilt} - {"noise", "blur", "low resolution"}
    assert {name for policy in POLICIES.values() for name in used(policy)} == {*TRANSFORMS}


def test_the_default_is_drawn_as_it_always_was():
    # Recorded before there was any other policy.
    draws = drawn(DEFAULT, (5, 7, 11), batch=6, channels=1, seed=7)
    sums = {"affine": 18.143434214326362, "noise_sigma": 0.08471502463658694, "gamma": 5.8896096660321415}
    assert {name: getattr(draws, name).sum() for name in sums} == pytest.approx(sums, rel=1e-12)
    assert draws.affine[0, 0, 0] == pytest.approx(1.0478114, abs=1e-7) and draws.mirrored.sum() == 7


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("policy", [DEFAULT, NONE])
def test_the_default_has_nothing_new(policy, patch):
    draws = drawn(policy, patch, batch=200)
    assert not draws.displacement.any() and not draws.shear_rad.any() and (draws.enlargement == 1).all()
    spoilt = draws.artefacts
    assert not any(array.any() for array in (spoilt.motion_length, spoilt.bias_log, spoilt.ghost_strength))
    assert not spoilt.rician_sigma.any() and (spoilt.anisotropy == 1).all()


@pytest.mark.parametrize("patch", PATCHES)
def test_all_policies_take_as_many_numbers(patch):
    def after(policy):
        rng = np.random.default_rng(9)
        make(policy, patch).draw(rng, 3, 2)
        return rng.random()

    assert len({after(policy) for policy in POLICIES.values()}) == 1


def test_desai_draws_uniformly_on_every_sample():
    draws = drawn(DESAI)
    assert_uniform(draws.enlargement - 1, 0.0, 0.1)
    for axis in (0, 1):
        assert_uniform(np.rad2deg(draws.shear_rad[:, axis]), -15, 15)
    assert abs(np.corrcoef(draws.shear_rad.T)[0, 1]) < 5 / np.sqrt(MANY)
    assert_uniform(draws.gamma, 0.8, 1.1)
    assert_uniform(draws.artefacts.motion_length, 0, 5)
    assert_uniform(np.rad2deg(draws.artefacts.motion_angle), 0, 360)
    assert draws.gamma.shape == draws.artefacts.motion_length.shape == (MANY, 2)
    assert not (draws.gamma[:, 0] == draws.gamma[:, 1]).any()  # each channel has its own
    # What was drawn is what happens: of the map, volume and slopes say so.
    assert np.linalg.det(draws.affine) ** -0.5 == pytest.approx(draws.enlargement)
    slopes = draws.affine * draws.enlargement[:, None, None]
    assert slopes[:, 0, 1] == pytest.approx(np.tan(draws.shear_rad[:, 0]))
    assert slopes[:, 1, 0] == pytest.approx(np.tan(draws.shear_rad[:, 1]))
    assert not draws.mirrored.any() and (draws.scale == 1).all() and not draws.turn_rad.any()


def test_elastic_is_drawn_as_often_and_as_wide_as_it_should():
    draws = drawn(STRONG, (9, 13, 17), batch=MANY, channels=1)
    bent = draws.displacement.reshape(MANY, -1).any(1)
    assert_share(bent, 0.3)
    # Control points lie 2, 3 and 4 voxels apart.
    for axis, apart in enumerate((2, 3, 4)):
        largest = np.abs(draws.displacement[bent, axis]).reshape(bent.sum(), -1).max(1)
        assert_uniform(largest / apart, 0, 0.4)


def test_artefacts_are_drawn_as_often_and_as_wide_as_they_should():
    draws = drawn(MR_ARTEFACTS, (5, 7, 11)).artefacts
    assert_share(draws.rician_sigma > 0, 0.2)
    assert_uniform(draws.rician_sigma[draws.rician_sigma > 0], 0, 0.1)
    assert len(np.unique(draws.rician_seed)) == MANY
    moved = draws.motion_length > 0
    assert_share(moved[:, 0], 0.2 * 0.5)
    assert_share(moved.any(1), 0.2 * 0.75)
    assert_uniform(draws.motion_length[moved], 0, 5)
    ghostly = draws.ghost_strength > 0
    assert_share(ghostly[:, 1], 0.2 * 0.5)
    assert_uniform(draws.ghost_strength[ghostly], 0, 0.3)
    assert set(np.unique(draws.ghost_copies)) == {1, 2, 3, 4} and set(np.unique(draws.ghost_axis)) == {0, 1, 2}
    largest = np.abs(draws.bias_log).reshape(MANY, 2, -1).max(2)
    assert_share(largest[:, 0] > 0, 0.3 * 0.5)
    assert_uniform(largest[largest > 0], 0, 1)
    coarse = draws.anisotropy < 1
    assert coarse.sum(-1).max() == 1  # one axis at most
    assert_share(coarse.any(-1)[:, 0], 0.25 * 0.5)
    assert_uniform(draws.anisotropy[coarse], 0.2, 0.67)
    assert all(coarse[..., axis].any() for axis in range(3))


def test_a_flat_patch_is_changed_in_its_plane():
    draws = drawn(replace(certain(MR_ARTEFACTS, TRANSFORMS), mirror=0), (2, 7, 11), batch=100)
    assert (draws.affine[:, 0] == [1, 0, 0]).all() and (draws.affine[:, 1:, 0] == 0).all()
    assert draws.displacement.shape == (100, 3, 1, 7, 7) and not draws.displacement[:, 0].any()
    assert {draws.source_shape(sample)[0] for sample in range(100)} == {2}
    assert (draws.artefacts.anisotropy[..., 0] == 1).all() and (draws.artefacts.ghost_axis > 0).all()


@pytest.mark.parametrize("patch", PATCHES)
def test_a_transform_draws_the_same_whatever_others_there_are(patch):
    alone = drawn(certain(STRONG, ["shear"]), patch, batch=5)
    among = drawn(certain(STRONG, TRANSFORMS), patch, batch=5)
    assert np.array_equal(alone.shear_rad, among.shear_rad) and alone.shear_rad.all()
    assert not alone.turn_rad.any() and among.turn_rad.all()
    bent = drawn(certain(STRONG, ["elastic"]), patch, batch=5).displacement
    assert np.array_equal(bent, among.displacement) and bent.any()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("patch", PATCHES)
def test_the_seed_decides_everything_and_a_larger_source_gives_the_same(policy, patch):
    def run(seed, more=0):
        augmentation = make_augmentation(policy, patch=patch, dimension=len(patch), masked=(False, True))
        draws = augmentation.draw(np.random.default_rng(seed), 12, 2)
        sources = boxes(draws, 12, lambda labels: np.stack([labels - 1.0, labels**2]).astype(np.float32), more)
        before = [(image.clone(), labels.clone()) for image, labels in sources]
        made = augmentation.apply(draws, sources)
        for source, kept in zip(sources, before):
            assert all(torch.equal(a, b) for a, b in zip(source, kept))
        assert all(torch.equal(a, b) for a, b in zip(made, augmentation.apply(draws, sources)))
        return made

    image, labels = run(4)
    large, large_labels = run(4, more=2)
    assert torch.equal(image, large) and torch.equal(labels, large_labels)
    assert image.shape == (12, 2, *patch) and image.dtype == torch.float32 and image.isfinite().all()
    assert labels.min() == 0 and labels.max() == 2
    assert policy == "none" or not torch.equal(image, run(5)[0])


@pytest.mark.parametrize("patch", [(9, 14), (5, 9, 13), (2, 9, 11)])
@pytest.mark.parametrize("names", [("zoom",), ("shear",), ("elastic",), ("elastic", "shear", "rotation", "mirror")])
def test_labels_go_where_the_image_goes(names, patch):
    policy = replace(certain(STRONG, names), mirror=0.5 if "mirror" in names else 0)
    augmentation = make(policy, patch, channels=3)
    draws = augmentation.draw(np.random.default_rng(1), 6, 3)
    # The image is the labels: one channel a label, so that its weight is what is interpolated.
    sources = boxes(draws, 6, lambda labels: np.stack([labels == k for k in range(3)]).astype(np.float32))
    image, labels = augmentation.apply(draws, sources)
    ordered = image.sort(1).values
    clear = ordered[:, -1] - ordered[:, -2] > 1e-3
    assert clear.float().mean() > 0.8
    assert torch.equal(labels[clear], image.argmax(1)[clear])
    assert torch.equal(augmentation.follow(draws, [one for _, one in sources]), labels)
    assert not torch.equal(image[0], geometry.centre(sources[0][0], patch))


@pytest.mark.parametrize("patch", PATCHES)
def test_geometry_of_zero_strength_changes_nothing(patch):
    still = {"enlargement": (1.0, 1.0), "shear_degrees": (0.0, 0.0), "elastic_share": (0.0, 0.0)}
    augmentation = make(replace(certain(STRONG, ["zoom", "shear", "elastic"]), **still), patch)
    draws = augmentation.draw(np.random.default_rng(1), 2, 1)
    sources = boxes(draws, 2, lambda labels: labels[None].astype(np.float32))
    image, labels = augmentation.apply(draws, sources)
    for sample, (source, truth) in enumerate(sources):
        assert draws.source_shape(sample) == patch
        assert torch.equal(image[sample], source) and torch.equal(labels[sample], truth.long())


@pytest.mark.parametrize("patch", PATCHES)
def test_what_spoils_the_image_leaves_the_labels(patch):
    spoilers = ["motion blur", "bias field", "ghosting", "anisotropy", "Rician noise"]
    augmentation = make(certain(MR_ARTEFACTS, spoilers), patch)
    draws = augmentation.draw(np.random.default_rng(1), 3, 1)
    sources = boxes(draws, 3, lambda labels: labels[None].astype(np.float32))
    image, labels = augmentation.apply(draws, sources)
    for sample, (source, truth) in enumerate(sources):
        assert torch.equal(labels[sample], truth.long()) and not torch.equal(image[sample], source)


@pytest.mark.parametrize("policy", POLICIES)
def test_neighbouring_slices_are_changed_alike(policy):
    own = POLICIES[policy]
    flat = make(replace(certain(own, used(own)), noise=0, rician=0, mirror=0.5), channels=2)
    stack = replace(flat, context=3)
    draws, stacked = (made.draw(np.random.default_rng(8), 4, 2) for made in (flat, stack))
    sources = boxes(draws, 4, lambda labels: np.stack([labels, labels**2]).astype(np.float32))
    image, labels = flat.apply(draws, sources)
    piled = [(image[:, None].repeat(1, 3, 1, 1), labels.repeat(3, 1, 1)) for image, labels in sources]
    image_of_three, labels_of_middle = stack.apply(stacked, piled)
    assert image_of_three.shape == (4, 6, *FLAT) and torch.equal(labels_of_middle, labels)
    torch.testing.assert_close(image_of_three, image.repeat_interleave(3, dim=1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("policy", POLICIES)
def test_mirrored_sides_trade_places_in_every_policy(policy):
    sides = Flips(axes=(0, 1), left_right=1, indices=(0, 2, 1))
    augmentation = make(replace(certain(POLICIES[policy], used(POLICIES[policy])), noise=0, rician=0), flips=sides)
    plain = make(augmentation.policy)
    draws = augmentation.draw(np.random.default_rng(2), 20, 1)
    if policy in ("default", "strong", "mr_artefacts"):
        assert draws.mirrored.all()
    draws = replace(draws, mirrored=np.random.default_rng(0).random((20, 2)) < 0.5)
    sources = boxes(draws, 20, lambda labels: labels[None].astype(np.float32))
    (image, found), (image_unnamed, unnamed) = augmentation.apply(draws, sources), plain.apply(draws, sources)
    assert torch.equal(image, image_unnamed)
    for sample in range(20):
        expected = torch.tensor([0, 2, 1])[unnamed[sample]] if draws.mirrored[sample, 1] else unnamed[sample]
        assert torch.equal(found[sample], expected)


@pytest.mark.parametrize("patch", [(9, 14), (5, 9, 13)])
def test_the_mirror_image_of_a_bent_patch(patch):
    augmentation = make(certain(STRONG, ["elastic", "shear"]), patch)
    draws = augmentation.draw(np.random.default_rng(3), 4, 1)
    sources = boxes(draws, 4, lambda labels: labels[None].astype(np.float32))
    plain, _ = augmentation.apply(draws, sources)
    mirrored = np.eye(4, len(patch), dtype=bool) | (np.arange(4) == 3)[:, None]
    image, _ = augmentation.apply(replace(draws, mirrored=mirrored), sources)
    for sample in range(4):
        axes = [axis + 1 for axis in np.flatnonzero(mirrored[sample])]
        torch.testing.assert_close(image[sample], plain[sample].flip(axes), atol=1e-4, rtol=0)


def test_shear_by_hand():
    half, one = np.arctan(0.5), np.arctan(1.0)
    assert geometry.shear(np.zeros(3)).tolist() == np.eye(3).tolist()
    # Along axis 0 by half of axis 1, after that along axis 1 by all of axis 0.
    assert geometry.shear(np.array([half, 0])) == pytest.approx(np.array([[1, 0.5], [0, 1]]))
    assert geometry.shear(np.array([half, one])) == pytest.approx(np.array([[1.5, 0.5], [1, 1]]))
    assert geometry.shear(np.array([0, 0, half])) == pytest.approx(np.array([[1, 0, 0], [0, 1, 0], [0.5, 0, 1]]))
    assert np.linalg.det(geometry.shear(np.array([0.2, -0.1, 0.25]))) == pytest.approx(1)


def test_shear_equals_skimage():
    augmentation = make(certain(DESAI, ["shear"]))
    draws = augmentation.draw(np.random.default_rng(5), 3, 1)
    for sample in range(3):
        shape = draws.source_shape(sample)
        image = np.random.default_rng(sample).normal(size=shape).astype(np.float32)
        matrix = np.eye(3)  # of (x, y, 1): an array's axes in reverse
        matrix[:2, :2] = draws.affine[sample][::-1, ::-1]
        centre, middle = ((np.array(edges)[::-1] - 1) / 2 for edges in (shape, FLAT))
        matrix[:2, 2] = centre - matrix[:2, :2] @ middle
        expected = skimage_warp(image, AffineTransform(matrix), output_shape=FLAT, order=1)
        one = replace(augmentation, policy=NONE)
        found, _ = one.apply(
            draws.part(slice(sample, sample + 1)), [(torch.from_numpy(image[None]), torch.zeros(shape).short())]
        )
        np.testing.assert_allclose(found[0, 0], expected, atol=2e-5)


@pytest.mark.parametrize("patch", [(9, 14), (5, 9, 13), (2, 9, 11)])
def test_elastic_with_all_other_geometry_equals_scipy(patch):
    augmentation = make(certain(STRONG, ["rotation", "scaling", "zoom", "shear", "elastic", "mirror"]), patch)
    draws = augmentation.draw(np.random.default_rng(6), 2, 1)
    for sample in range(2):
        shape = draws.source_shape(sample)
        image = np.random.default_rng(sample).normal(size=shape).astype(np.float32)
        labels = torch.from_numpy(blobs(shape))
        found, _ = augmentation.apply(draws.part(slice(sample, sample + 1)), [(torch.from_numpy(image[None]), labels)])
        # An offset, mirrored, then displaced, then mapped; displacements by scipy's own spline through the points.
        offsets = np.stack(np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in patch], indexing="ij"))
        offsets *= np.where(draws.mirrored[sample], -1, 1).reshape(-1, *[1] * len(patch))
        control = draws.displacement[sample]
        fixed = [n == 1 for n in control.shape[1:]]
        place = [
            np.zeros(patch) if still else 1 + (o + (n - 1) / 2) / (n - 1) * (count - 3)
            for o, n, count, still in zip(offsets, patch, control.shape[1:], fixed)
        ]
        moved = offsets + [ndimage.map_coordinates(c, place, order=3, prefilter=False) for c in control]
        where = np.einsum("ij,j...->i...", draws.affine[sample], moved)
        where += ((np.array(shape) - 1) / 2).reshape(-1, *[1] * len(patch))
        np.testing.assert_allclose(found[0, 0], ndimage.map_coordinates(image, where, order=1), atol=5e-5)


@st.composite
def bent_maps(draw):
    dimension = draw(st.sampled_from((2, 3)))
    patch = tuple(draw(st.lists(st.integers(1, 9), min_size=dimension, max_size=dimension)))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    affine = geometry.rotation(rng.uniform(-3, 3, 2 * dimension - 3)) @ geometry.shear(
        rng.uniform(-0.3, 0.3, dimension)
    )
    return patch, affine * rng.uniform(0.7, 1.4), rng.uniform(-3, 3, (dimension, *[7] * dimension))


@settings(max_examples=25, deadline=None)
@given(bent_maps())
def test_no_voxel_is_read_from_outside_the_box(drawn_map):
    patch, affine, displacement = drawn_map
    source = geometry.source_shape(affine, patch, displacement)
    axes = [np.arange(n) - (n - 1) / 2 for n in source]
    ramps = torch.from_numpy(np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32))
    out, labels = torch.empty(len(patch), *patch), torch.empty(patch, dtype=torch.int64)
    geometry.warp_into(ramps, torch.full(source, 4, dtype=torch.int16), affine, out, labels, displacement)
    offsets = np.stack(np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in patch], indexing="ij"))
    field = spline.expand(torch.from_numpy(displacement), patch).numpy()
    assert np.abs(out.numpy() - np.einsum("ij,j...->i...", affine, offsets + field)).max() < 1e-4
    assert (labels == 4).all() and all((a - b) % 2 == 0 for a, b in zip(source, patch))


def test_a_box_is_no_larger_than_it_need_be():
    displacement = np.zeros((2, 7, 7))
    displacement[1, 3, 3] = -1.5
    assert geometry.source_shape(np.eye(2), FLAT, displacement) == (9, 18)
    assert geometry.source_shape(np.eye(2), FLAT, 0 * displacement) == FLAT


def test_nothing_folds():
    # Larger displacements of control points than 1 / 2.48 of their distance could (Choi and Lee, 2000).
    draws = drawn(replace(certain(STRONG, ["elastic"]), elastic_share=(0.4, 0.4)), (17, 21, 25), batch=3)
    for control in draws.displacement:
        field = spline.expand(torch.from_numpy(control), draws.patch).numpy()
        slopes = np.stack([np.stack(np.gradient(part)) for part in field]) + np.eye(3).reshape(3, 3, 1, 1, 1)
        assert np.linalg.det(np.moveaxis(slopes, (0, 1), (-2, -1))).min() > 0


def test_spline_weights_by_hand():
    # One cell of two voxels' length: its ends weigh 1, 4, 1 sixths, its middle 1, 23, 23, 1 forty-eighths.
    expected = [[1 / 6, 4 / 6, 1 / 6, 0], [1 / 48, 23 / 48, 23 / 48, 1 / 48], [0, 1 / 6, 4 / 6, 1 / 6]]
    assert spline.weights(3, 4) == pytest.approx(np.array(expected))
    assert spline.weights(1, 4) == pytest.approx(np.array(expected[1:2]))
    assert spline.weights(3, 1).tolist() == [[1], [1], [1]]
    assert spline.weights(11, 7).sum(1) == pytest.approx(np.ones(11))
    assert spline.spacing(9, 7) == 2 and spline.spacing(9, 1) == 0
    with pytest.raises(ValueError, match="found 3"):
        spline.weights(5, 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("patch", PATCHES)
def test_a_gpu_gives_the_same_but_for_the_noise(patch):
    policy = replace(certain(STRONG, TRANSFORMS), noise=0, rician=0)
    augmentation = make(policy, patch, channels=2)
    draws = augmentation.draw(np.random.default_rng(2), 6, 2)
    sources = boxes(draws, 6, lambda labels: np.stack([labels, labels**2]).astype(np.float32))
    image, labels = augmentation.apply(draws, sources)
    there, labels_there = augmentation.apply(draws, [(image.cuda(), labels.cuda()) for image, labels in sources])
    torch.testing.assert_close(there.cpu(), image, atol=1e-3, rtol=1e-3)
    assert (labels_there.cpu() == labels).float().mean() > 0.999
