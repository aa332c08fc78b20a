"""Losses: values worked by hand, gradients against automatic differentiation, empty and full masks, scales."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from autoseg.losses import LOSSES, cross_entropy, deep_supervision, dice, dice_ce, scale_targets, scale_weights


def textbook(logits, target, *, batch_dice, dice_share=1.0, ce_share=1.0):
    """The same losses from one-hot targets, by automatic differentiation."""
    shares = logits.softmax(1)
    truth = F.one_hot(target, logits.shape[1]).movedim(-1, 1).to(shares.dtype)
    axes = tuple(range(0 if batch_dice else 2, logits.ndim))
    axes = tuple(axis for axis in axes if axis != 1)
    overlap, volumes = (shares * truth).sum(axes), shares.sum(axes) + truth.sum(axes)
    classes = (2 * overlap + 1e-5) / (volumes + 1e-5)
    return ce_share * F.cross_entropy(logits, target) - dice_share * classes[..., 1:].mean()


SHARES = {"dice_ce": (1.0, 1.0), "dice": (1.0, 0.0), "ce": (0.0, 1.0)}


def logits_of(shares):
    """Logits whose softmax over the first axis is `shares`, as a batch of one: (K, ...) -> (1, K, ...)."""
    return torch.tensor(shares, dtype=torch.float64).log()[None]


def test_an_empty_mask_scores_what_is_predicted_into_it():
    # Four voxels of background at p = 3/4: cross-entropy ln(4/3); Dice (0 + 1e-5) / (4 * 1/4 + 1e-5).
    logits, target = logits_of([[0.75] * 4, [0.25] * 4]), torch.zeros(1, 4, dtype=torch.long)
    assert dice(logits, target, batch_dice=False).item() == pytest.approx(-1e-5 / (1 + 1e-5))
    assert cross_entropy(logits, target, batch_dice=False).item() == pytest.approx(math.log(4 / 3))
    assert dice_ce(logits, target, batch_dice=False).item() == pytest.approx(math.log(4 / 3) - 1e-5 / (1 + 1e-5))


def test_an_empty_mask_predicted_empty_is_perfect():
    logits = torch.tensor([[[[200.0] * 5] * 7, [[-200.0] * 5] * 7]])
    assert dice_ce(logits, torch.zeros(1, 7, 5, dtype=torch.long), batch_dice=True).item() == pytest.approx(-1.0)


def test_a_value_worked_by_hand_per_sample_and_pooled():
    # Sample 1: truth 1, 0 with p(1) = 0.8, 0.4; sample 2: truth 0, 0 with p(1) = 0.5, 0.1.
    foreground = torch.tensor([[0.8, 0.4], [0.5, 0.1]], dtype=torch.float64)
    logits = torch.stack((1 - foreground, foreground), 1).log()
    target = torch.tensor([[1, 0], [0, 0]])
    first, second = (2 * 0.8 + 1e-5) / (1.2 + 1 + 1e-5), 1e-5 / (0.6 + 1e-5)
    assert dice(logits, target, batch_dice=False).item() == pytest.approx(-(first + second) / 2)
    assert dice(logits, target, batch_dice=True).item() == pytest.approx(-(1.6 + 1e-5) / (1.8 + 1 + 1e-5))
    surprise = -(math.log(0.8) + math.log(0.6) + math.log(0.5) + math.log(0.9)) / 4
    assert cross_entropy(logits, target, batch_dice=True).item() == pytest.approx(surprise)


@pytest.mark.parametrize("size", [(5, 7), (5, 7, 11)])
@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_are_those_of_the_textbook(name, batch_dice, size):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 4, *size, generator=generator, requires_grad=True)
    target = torch.randint(4, (3, *size), generator=generator)
    target[0][target[0] == 2] = 0
    dice_share, ce_share = SHARES[name]
    ours = LOSSES[name](logits, target.to(torch.int16), batch_dice=batch_dice)
    reference = textbook(logits, target, batch_dice=batch_dice, dice_share=dice_share, ce_share=ce_share)
    torch.testing.assert_close(ours, reference)
    (gradient,) = torch.autograd.grad(3 * ours, logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(3 * reference, logits)[0])


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_the_derivative(name, batch_dice):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 3, 2, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    target = torch.randint(3, (2, 2, 3), generator=generator)
    assert torch.autograd.gradcheck(partial(LOSSES[name], batch_dice=batch_dice), (logits, target))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_empty_and_full_masks_and_extreme_logits_stay_finite(kind, label, size):
    noise = size * torch.randn(2, 2, 5, 7, 11, generator=torch.Generator().manual_seed(3))
    logits = noise.to(kind).requires_grad_()
    target = torch.full((2, 5, 7, 11), label)
    for batch_dice in (False, True):
        loss = dice_ce(logits, target, batch_dice=batch_dice)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.dtype == torch.float32 and loss.isfinite()
        assert gradient.dtype == kind and gradient.isfinite().all()


def test_low_precision_logits_are_summed_in_float32():
    # 60,000 voxels at p = 1/2: a sum in bfloat16 would stop growing at 256.
    logits, target = torch.zeros(1, 2, 200, 300, dtype=torch.bfloat16), torch.ones(1, 200, 300, dtype=torch.uint8)
    assert dice(logits, target, batch_dice=True).item() == pytest.approx(-60_000 / 90_000, rel=1e-6)


def test_a_step_against_the_gradient_lowers_the_loss():
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(2, 3, 5, 7, generator=generator, requires_grad=True)
    target = torch.randint(3, (2, 5, 7), generator=generator)
    before = dice_ce(logits, target, batch_dice=True)
    before.backward()
    assert dice_ce(logits.detach() - logits.grad, target, batch_dice=True) < before


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        dice_ce(torch.zeros(1, 2, 5, 7), torch.zeros(1, 7, 5, dtype=torch.long), batch_dice=True)


@pytest.mark.parametrize(
    ("scales", "weights"),
    [(1, (1,)), (2, (1, 0)), (3, (2 / 3, 1 / 3, 0)), (5, (8 / 15, 4 / 15, 2 / 15, 1 / 15, 0))],
)
def test_scale_weights_halve_and_leave_out_the_lowest(scales, weights):
    assert scale_weights(scales) == pytest.approx(weights)


def first_number(logits, target):
    """A toy loss: it notes nothing but the first logit times the first label."""
    return logits.flatten()[0] * target.flatten()[0]


def test_deep_supervision_weighs_scales_and_never_looks_at_the_lowest():
    logits = [torch.tensor([3.0]), torch.tensor([6.0]), torch.tensor([math.nan])]
    targets = [torch.tensor([1]), torch.tensor([2]), torch.tensor([1])]
    assert deep_supervision(first_number, logits, targets).item() == pytest.approx(2 / 3 * 3 + 1 / 3 * 12)


def test_a_single_scale_has_all_the_weight():
    # A network of two stages; its weights must not become 0 / 0.
    targets = [torch.tensor([2]), torch.tensor([9])]
    assert deep_supervision(first_number, [torch.tensor([5.0])], targets).item() == 10


def test_deep_supervision_refuses_scales_without_targets():
    with pytest.raises(ValueError, match="2 scales of logits"):
        deep_supervision(first_number, [torch.ones(1)] * 2, [torch.ones(1)])


def test_targets_are_taken_at_the_centre_of_each_large_voxel():
    row = torch.arange(8)[None, None]
    scales = scale_targets(row, ((1, 1), (1, 2), (1, 2), (1, 2)))
    assert [scale.flatten().tolist() for scale in scales] == [[0, 1, 2, 3, 4, 5, 6, 7], [1, 3, 5, 7], [2, 6]]


def test_scaled_targets_are_those_of_nearest_exact_interpolation():
    strides = ((1, 1, 1), (1, 2, 2), (2, 2, 2), (1, 2, 1), (1, 1, 2))
    target = torch.randint(9, (2, 6, 16, 24), generator=torch.Generator().manual_seed(5), dtype=torch.int16)
    scales = scale_targets(target, strides)
    factors = np.cumprod(strides, axis=0)[:-1]
    assert len(scales) == len(factors) == 4
    for scale, factor in zip(scales, factors):
        size = [int(edge // step) for edge, step in zip(target.shape[1:], factor)]
        reference = F.interpolate(target[:, None].float(), size, mode="nearest-exact")[:, 0]
        assert torch.equal(scale, reference.to(torch.int16))
