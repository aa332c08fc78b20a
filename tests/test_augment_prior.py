"""Corruption of the masks that a cascade reads: morphology against scipy, and what may never happen to them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from toys import ball

from autoseg.augment.prior import OPERATIONS, PriorDraws, PriorPolicy, corrupt, draw_prior, morph, to_masks

SHAPE = (9, 11, 14)
ALWAYS = PriorPolicy(change=1, change_mask=1, remove=1, remove_mask=1)


def nothing(batch=1, masks=2) -> PriorDraws:
    return PriorDraws(
        order=np.tile(np.arange(masks), (batch, 1)),
        operation=np.full((batch, masks), -1),
        radius=np.ones((batch, masks), int),
        removed=np.full((batch, masks), -1.0),
    )


def test_empty_masks_stay_empty():
    masks = torch.zeros(2, 2, *SHAPE)
    for seed in range(20):
        assert not corrupt(masks, draw_prior(np.random.default_rng(seed), 2, 2, ALWAYS)).any()


def test_nothing_drawn_changes_nothing():
    masks = to_masks(torch.from_numpy(np.random.default_rng(0).integers(0, 3, (1, *SHAPE))), (1, 2))
    assert torch.equal(corrupt(masks, nothing()), masks)


def test_masks_of_indices():
    indices = torch.tensor([[[0, 1, 3], [2, 3, 3]]])
    assert to_masks(indices, (1, 2, 3)).tolist() == [
        [[[0, 1, 0], [0, 0, 0]], [[0, 0, 0], [1, 0, 0]], [[0, 0, 1], [0, 1, 1]]]
    ]


def expected(mask: np.ndarray, operation: str, radius: int) -> np.ndarray:
    """By scipy on a mask that is continued beyond its border by what changes nothing there."""
    axes = np.ogrid[(slice(-radius, radius + 1),) * mask.ndim]
    element = sum(a**2 for a in axes) <= radius**2

    def dilate(m):
        return ndimage.binary_dilation(m, element, border_value=0)

    def erode(m):
        return ndimage.binary_erosion(m, element, border_value=1)

    steps = {"dilate": [dilate], "erode": [erode], "close": [dilate, erode], "open": [erode, dilate]}
    for step in steps[operation]:
        mask = step(mask)
    return mask


@settings(max_examples=30, deadline=None)
@given(
    operation=st.sampled_from(OPERATIONS),
    radius=st.integers(1, 8),
    seed=st.integers(0, 99),
    threshold=st.floats(-1, 1.5),
    planar=st.booleans(),
)
def test_morphology_agrees_with_scipy(operation, radius, seed, threshold, planar):
    shape = SHAPE[1:] if planar else SHAPE
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 1.0)
    mask = noise > threshold * noise.std()
    found = morph(torch.from_numpy(mask), operation, radius)
    np.testing.assert_array_equal(found.numpy(), expected(mask, operation, radius))


def test_an_unknown_operation_lists_the_known_ones():
    with pytest.raises(ValueError, match="dilate, erode, close, open"):
        morph(torch.ones(3, 3, dtype=torch.bool), "melt", 1)


def test_a_mask_that_grows_takes_voxels_from_the_others():
    masks = torch.zeros(1, 2, 1, 1, 7)
    masks[0, 0, ..., 2], masks[0, 1, ..., 4] = 1, 1
    draws = nothing()
    draws.operation[0, 0], draws.radius[0, 0] = OPERATIONS.index("dilate"), 2
    assert corrupt(masks, draws)[0, :, 0, 0].tolist() == [[1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0]]
    assert masks[0, 1, 0, 0, 4] == 1, "the argument is left as it is"


def test_only_small_components_vanish_and_the_drawn_one():
    mask = torch.zeros(1, 1, 1, 4, 10)
    mask[..., :, :5] = 1  # 20 of 40 voxels: too large to vanish
    mask[..., 0, 6] = mask[..., 3, 9] = 1
    draws = nothing(masks=1)
    draws.removed[0, 0] = 0.99
    gone = corrupt(mask, draws)
    assert gone.sum() == mask.sum() - 1
    assert gone[..., 3, 9] == 0
    draws.removed[0, 0] = 0.0
    assert corrupt(mask, draws)[..., 0, 6] == 0


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 9999))
def test_masks_always_exclude_each_other(seed):
    rng = np.random.default_rng(seed)
    indices = np.zeros((2, *SHAPE), int)
    for index in (1, 2, 3):
        indices[0][ball(SHAPE, rng.uniform(2, 9, 3), 3)] = index
    indices[1] = rng.integers(0, 4, SHAPE)
    masks = to_masks(torch.from_numpy(indices), (1, 2, 3))
    out = corrupt(masks, draw_prior(rng, 2, 3, ALWAYS), ALWAYS)
    assert out.sum(1).max() <= 1
    assert set(out.unique().tolist()) <= {0.0, 1.0}


def test_draws_follow_the_probabilities():
    draws = draw_prior(np.random.default_rng(3), 20_000, 2)
    assert (draws.operation >= 0).mean() == pytest.approx(0.4 * 0.5, abs=0.01)
    assert (draws.removed >= 0).mean() == pytest.approx(0.2 * 0.5, abs=0.01)
    assert sorted(np.unique(draws.radius)) == list(range(1, 9))
    # Masks are chosen within a chosen sample: both change in half of half of 0.4, not in 0.2 squared.
    assert (draws.operation >= 0).all(1).mean() == pytest.approx(0.4 * 0.25, abs=0.01)
    assert np.array_equal(np.sort(draws.order, axis=1), np.tile([0, 1], (20_000, 1)))
