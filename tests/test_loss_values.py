"""Values of losses worked by hand, against an independent implementation where there is one, and their two ends."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt
from test_losses import PARTLY, PLAIN, REGIONS, logits_of

from autoseg.labels import Labels
from autoseg.losses import LOSSES, cross_entropy, dice
from autoseg.losses.basis import one_against_rest
from autoseg.losses.distance import signed_distance, squared_distance
from autoseg.losses.skeleton import soft_skeleton

# Two voxels, truth 1 and 0, probabilities of class 1 0.8 and 0.4: hit 0.8, too much 0.4, missing 0.2.
TWO, TRUTH = logits_of([[0.2, 0.6], [0.8, 0.4]]), torch.tensor([[1, 0]])


def value(name, logits=TWO, target=TRUTH, batch_dice=False, **options):
    return LOSSES[name](logits, target, batch_dice=batch_dice, **options).item()


def test_an_empty_mask_is_scored_by_what_is_predicted_into_it():
    logits, target = logits_of([[0.75] * 4, [0.25] * 4]), torch.zeros(1, 4, dtype=torch.int64)
    assert value("dice_squared", logits, target) == pytest.approx(-1e-5 / (4 / 16 + 1e-5))
    assert value("tversky", logits, target) == pytest.approx(1 - 5e-6 / (0.3 + 5e-6))
    for name in ("bce", "topk_ce"):
        assert value(name, logits, target) == pytest.approx(math.log(4 / 3))
    assert value("boundary", logits, target) == value("hausdorff", logits, target) == 0, "no surface anywhere"
    assert value("cldice", logits, target) == 0, "a plain has no ridge, hence no skeleton"


@pytest.mark.parametrize("truth", [0, 1])
@pytest.mark.parametrize("name", LOSSES)
def test_perfect(name, truth):
    """As sure as float32 can be: -1 for soft Dice, minus the depth inside for boundary, 0 for all others."""
    target = torch.full((1, 5, 7), truth)
    target[:, 2:4, 1:5] = 1
    logits = torch.stack((-200.0 * (2 * target - 1), 200.0 * (2 * target - 1)), 1).requires_grad_()
    options = {"weights": (1, 3)} if name == "weighted_ce" else {}
    loss = LOSSES[name](logits, target, batch_dice=True, **options)
    # Inside, two rows of four: all half a voxel deep, the two in the middle of a row no deeper.
    best = {"boundary": -8 * 0.5 / 35 if truth == 0 else 0}
    assert loss.item() == pytest.approx(best.get(name, -1 if "dice" in name and name != "cldice" else 0), abs=1e-6)
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-6


def test_disjoint_is_the_other_end():
    logits, target = torch.tensor([[[-99.0, 99.0], [99.0, -99.0]]]), torch.tensor([[0, 1]])
    assert value("dice", logits, target) == pytest.approx(0, abs=1e-5)
    assert value("dice_squared", logits, target) == pytest.approx(0, abs=1e-5)
    for name in ("tversky", "focal_tversky", "cldice"):
        assert value(name, logits, target) == pytest.approx(1, abs=3e-4)


def test_squared_dice():
    assert value("dice_squared") == pytest.approx(-(1.6 + 1e-5) / (0.64 + 0.16 + 1 + 1e-5))


def test_tversky_weighs_too_much_by_alpha_and_missing_by_beta():
    assert value("tversky", alpha=0.3, beta=0.7) == pytest.approx(1 - (0.8 + 5e-6) / (0.8 + 0.12 + 0.14 + 5e-6))
    assert value("tversky", alpha=0, beta=1) == pytest.approx(1 - 0.8, abs=1e-5)
    assert value("tversky", alpha=1, beta=0) == pytest.approx(1 - 0.8 / 1.2, abs=1e-5)


def test_tversky_of_equal_weights_is_dice():
    logits, target = torch.randn(3, 4, 5, 7, dtype=torch.float64), torch.randint(4, (3, 5, 7))
    for batch_dice in (False, True):
        plain = 1 + dice(logits, target, batch_dice=batch_dice).item()
        more = {"batch_dice": batch_dice, "alpha": 0.5, "beta": 0.5}
        assert value("tversky", logits, target, **more) == pytest.approx(plain)
        assert value("focal_tversky", logits, target, **more, gamma=1) == pytest.approx(plain)


def test_focal_tversky_takes_a_root():
    lost = 1 - 0.8 / 1.06
    assert value("focal_tversky", gamma=2) == pytest.approx(math.sqrt(lost), rel=0.01)
    assert value("focal_tversky", gamma=0.5) == pytest.approx(lost**2, abs=1e-5)


def test_pooled_over_the_batch():
    # The samples of one voxel each: hits 0.8 and 0, too much 0 and 0.4, missing 0.2 and 0.
    logits, target = torch.cat([TWO[..., :1], TWO[..., 1:]]), torch.tensor([[1], [0]])
    assert value("tversky", logits, target, batch_dice=True) == pytest.approx(value("tversky"))
    single = (0.8 + 5e-6) / (0.94 + 5e-6), 5e-6 / (0.12 + 5e-6)
    assert value("tversky", logits, target) == pytest.approx(1 - sum(single) / 2)


def test_binary_cross_entropy_asks_each_class_but_the_background():
    # p = 0.2, 0.5, 0.3, and the truth is the first class: -log of 0.5 and of 0.7.
    logits, target = logits_of([[0.2], [0.5], [0.3]]), torch.tensor([[1]])
    assert value("bce", logits, target) == pytest.approx(-(math.log(0.5) + math.log(0.7)) / 2)
    expected = -(0.25 * math.log(0.5) + 0.09 * math.log(0.7)) / 2
    assert value("focal", logits, target) == pytest.approx(expected)
    assert value("categorical_focal", logits, target, gamma=3) == pytest.approx(-(0.5**3) * math.log(0.5))


def test_one_foreground_class_is_a_binary_question():
    logits, target = torch.randn(2, 2, 5, 7, dtype=torch.float64), torch.randint(2, (2, 5, 7))
    plain = cross_entropy(logits, target, batch_dice=False).item()
    assert value("bce", logits, target) == pytest.approx(plain)
    assert value("focal", logits, target) == pytest.approx(value("categorical_focal", logits, target))


@pytest.mark.parametrize("labels", [PLAIN, PARTLY, REGIONS], ids=["plain", "ignore", "regions"])
def test_focal_without_focus_is_cross_entropy(labels):
    logits, target = torch.randn(2, labels.heads, 5, 7), torch.randint(len(labels.known), (2, 5, 7))
    plain = cross_entropy(logits, target, batch_dice=False, labels=labels).item()
    assert value("categorical_focal", logits, target, gamma=0, labels=labels) == pytest.approx(plain)
    binary = value("bce", logits, target, labels=labels)
    assert value("focal", logits, target, gamma=0, labels=labels) == pytest.approx(binary)
    if labels is REGIONS:
        assert binary == pytest.approx(plain)
    assert value("topk_ce", logits, target, k=100, labels=labels) == pytest.approx(plain)
    even = [2.0] * labels.count
    assert value("weighted_ce", logits, target, weights=even, labels=labels) == pytest.approx(plain)


def test_focus_weighs_easy_voxels_less():
    easy, hard = (logits_of([[1 - p], [p]]) for p in (0.9, 0.1))
    target = torch.tensor([[1]])
    shares = [value("focal", logits, target, gamma=3) / value("bce", logits, target) for logits in (easy, hard)]
    assert shares == pytest.approx([0.001, 0.729])


def test_one_class_against_the_rest_where_probabilities_round_to_one():
    logits = torch.tensor([[0.0, 100.0, -30.0]]).double()
    exact = [100 - math.log(1 + math.exp(-30)), -30 - 100]
    assert one_against_rest(logits)[0].tolist() == pytest.approx(exact)
    assert one_against_rest(logits.float())[0].tolist() == pytest.approx(exact)


def test_weighted_cross_entropy():
    # Of weight 5 the class, of weight 1 the background.
    expected = -(5 * math.log(0.8) + math.log(0.6)) / 6
    assert value("weighted_ce", weights=[1, 5]) == pytest.approx(expected)
    # A region's own voxels weigh as it does, all others as the background: index 1 is in `whole` alone.
    logits, target = torch.tensor([[0.8], [0.4], [0.5]]).logit()[None], torch.tensor([[1]])
    expected = -(2 * math.log(0.8) + math.log(0.6) + math.log(0.5)) / 4
    assert value("weighted_ce", logits, target, weights=[1, 2, 3, 4], labels=REGIONS) == pytest.approx(expected)


def test_the_worst_voxels_of_each_sample():
    # 5 of 10 and 3 of 10 voxels known: 20 % are 1 and 0.6, rounded up 1.
    labels = Labels.from_dataset({"background": 0, "a": 1, "ignore": 2})
    shares = torch.tensor([[0.9, 0.5, 0.8, 0.7, 0.6] + [0.01] * 5, [0.9, 0.2, 0.3] + [0.01] * 7], dtype=torch.float64)
    logits = torch.stack([1 - shares, shares], 1).log()
    target = torch.tensor([[1] * 5 + [2] * 5, [1] * 3 + [2] * 7])
    expected = -(math.log(0.5) + math.log(0.2)) / 2
    assert value("topk_ce", logits, target, k=20, labels=labels) == pytest.approx(expected)
    expected = -(math.log(0.5) + math.log(0.6) + math.log(0.2) + math.log(0.3)) / 4
    assert value("topk_ce", logits, target, k=40, labels=labels) == pytest.approx(expected)


def test_unified_focal():
    # The voxel of class 1 is not focused: 0.6 log 0.8; that of the background is, by (1 - 0.6)^0.5.
    of_voxels = -(0.6 * math.log(0.8) + 0.4 * 0.4**0.5 * math.log(0.6)) / 2
    lost = 1 - 0.8 / (0.8 + 0.4 * 0.4 + 0.6 * 0.2)
    assert value("unified_focal", weight=1) == pytest.approx(of_voxels)
    assert value("unified_focal", weight=0) == pytest.approx(math.sqrt(lost), rel=0.01)
    assert value("unified_focal") == pytest.approx((of_voxels + math.sqrt(lost)) / 2, rel=0.01)
    assert value("unified_focal", weight=0, gamma=0) == pytest.approx(lost, abs=1e-5)


@pytest.mark.parametrize("shape", [(5, 7, 11), (1, 6, 3), (9, 4)])
def test_distances_are_exact(shape):
    masks = np.random.default_rng(1).random((2, 3, *shape)) < 0.07
    masks[0, 0, *[0] * len(shape)] = True
    found = squared_distance(torch.from_numpy(masks)).numpy()
    for index in np.ndindex(2, 3):
        if masks[index].any():
            np.testing.assert_allclose(found[index], distance_transform_edt(~masks[index]) ** 2, rtol=1e-6)
        else:
            assert np.isinf(found[index]).all()


def test_the_surface_runs_between_voxels():
    mask = torch.tensor([[[0, 0, 1, 1, 1, 0], [0] * 6, [1] * 6]]).bool()
    assert signed_distance(mask)[0].tolist() == [[1.5, 0.5, -0.5, -1.5, -0.5, 0.5], [0] * 6, [0] * 6]


def test_boundary_loss():
    # Signed distances 0.5, -0.5, -0.5, 0.5, 1.5 by probabilities 0.4, 0.9, 0.6, 0.2, 0.1.
    shares = torch.tensor([0.4, 0.9, 0.6, 0.2, 0.1], dtype=torch.float64)
    logits, target = torch.stack([1 - shares, shares]).log()[None], torch.tensor([[0, 1, 1, 0, 0]])
    assert value("boundary", logits, target) == pytest.approx((0.2 - 0.45 - 0.3 + 0.1 + 0.15) / 5)


def test_hausdorff_loss():
    # The truth at 1, 2, the prediction above one half at 1, 2, 3: distances to it 0.5, 0.5, 1.5, 0.5, 0.5.
    shares = torch.tensor([0.4, 0.9, 0.6, 0.7, 0.1], dtype=torch.float64)
    logits, target = torch.stack([1 - shares, shares]).log()[None], torch.tensor([[0, 1, 1, 0, 0]])
    squares = (
        0.16 * (0.25 + 0.25),
        0.01 * (0.25 + 0.25),
        0.16 * (0.25 + 2.25),
        0.49 * (0.25 + 0.25),
        0.01 * (2.25 + 0.25),
    )
    assert value("hausdorff", logits, target) == pytest.approx(sum(squares) / 5)
    linear = 0.16 * 1, 0.01 * 1, 0.16 * 2, 0.49 * 1, 0.01 * 2
    assert value("hausdorff", logits, target, alpha=1) == pytest.approx(sum(linear) / 5)


def test_the_skeleton_of_a_bar_is_its_middle():
    bar = torch.zeros(1, 1, 7, 11, dtype=torch.float64)
    bar[..., 2:5, 2:9] = 1
    middle = torch.zeros_like(bar)
    middle[..., 3, 3:8] = 1
    assert torch.equal(soft_skeleton(bar, 3), middle)
    solid = bar[..., None].expand(-1, -1, -1, -1, 5).clone()
    solid[..., 0], solid[..., 4] = 0, 0
    assert soft_skeleton(solid, 3).nonzero()[:, 2:].tolist() == [[3, x, 2] for x in range(3, 8)]


def test_cldice_of_a_line_with_a_gap():
    # Lines of one voxel are their own skeletons: all four predicted voxels lie in the truth, four of five are found.
    target = torch.zeros(1, 5, 9, dtype=torch.int64)
    target[0, 2, 2:7] = 1
    found = target.clone()
    found[0, 2, 4] = 0
    logits = torch.stack((-40.0 * (2 * found - 1), 40.0 * (2 * found - 1)), 1)
    assert value("cldice", logits, target) == pytest.approx(1 - 2 * 0.8 / 1.8, abs=1e-5)
    # A thicker prediction has the same skeleton, but for the ends of its line.
    thick = target.clone()
    thick[0, 1:4, 1:8] = 1
    logits = torch.stack((-40.0 * (2 * thick - 1), 40.0 * (2 * thick - 1)), 1)
    assert value("cldice", logits, target) == pytest.approx(0, abs=1e-5)
    assert value("dice", logits, target) == pytest.approx(-10 / 26, abs=1e-5)


def test_regions_overlap_in_each_loss_of_overlap():
    # As in test_losses: whole 0.8, 0.5 of truth 1, 1; core 0.4, 0.5 of 0, 1; apart 0.5, 0.25 of 0, 0.
    shares = torch.tensor([[0.8, 0.5], [0.4, 0.5], [0.5, 0.25]], dtype=torch.float64)
    logits, target = shares.logit()[None], torch.tensor([[1, 3]])
    parts = (1.3 + 5e-6) / (1.3 + 0.7 * 0.7 + 5e-6), (0.5 + 5e-6) / (0.5 + 0.12 + 0.35 + 5e-6), 5e-6 / (0.225 + 5e-6)
    assert value("tversky", logits, target, labels=REGIONS) == pytest.approx(1 - sum(parts) / 3)
