"""Losses: values worked by hand, gradients against automatic differentiation, empty and full masks, scales."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from autoseg.labels import Labels
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
@pytest.mark.parametrize("name", SHARES)
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
@pytest.mark.parametrize("name", SHARES)
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


# Regions, ignored voxels, classes that were not annotated.

PLAIN = Labels.from_dataset({"background": 0, "a": 1, "b": 2, "c": 3})
PARTLY = Labels.from_dataset({"background": 0, "a": 1, "b": 2, "c": 3, "ignore": 9})
REGIONS = Labels.from_dataset({"background": 0, "whole": [1, 2, 3], "core": [2, 3], "apart": 4})
REGIONS_PARTLY = Labels.from_dataset({"background": 0, "whole": [1, 2, 3], "core": [2, 3], "apart": 4, "ignore": 9})
EVERY = {"plain": PLAIN, "ignore": PARTLY, "regions": REGIONS, "regions and ignore": REGIONS_PARTLY}


def formula(logits, target, *, labels, annotated, batch_dice, dice_share=1.0, ce_share=1.0):
    """The same losses voxel list by voxel list, by automatic differentiation; everything that does not count is cut."""
    samples, classes = logits.shape[0], len(labels.members)
    annotated = torch.ones(samples, classes, dtype=torch.bool) if annotated is None else annotated
    shares, truths, surprise, entries = [], [], [], 0
    for sample in range(samples):
        keep = target[sample] != labels.ignored if labels.ignored is not None else target[sample] >= 0
        mine, true = logits[sample][:, keep], target[sample][keep]
        truth = torch.stack([torch.isin(true, torch.tensor(own)) for own in labels.members]).to(logits.dtype)
        if labels.exclusive:
            share = mine.softmax(0)
            hidden = ~annotated[sample]
            background = share[0] + share[1:][hidden].sum(0)
            of_truth = torch.where(true > 0, (share[1:] * truth).sum(0), background)
            surprise.append(-of_truth.log().sum())
            entries += true.numel()
            shares.append(share[1:])
        else:
            share = mine.sigmoid()
            terms = -(truth * share.log() + (1 - truth) * (1 - share).log())
            surprise.append(terms[annotated[sample]].sum())
            entries += true.numel() * int(annotated[sample].sum())
            shares.append(share)
        truths.append(truth)
    parts = []
    for k in range(classes):
        counting = [s for s in range(samples) if annotated[s, k] and truths[s].shape[1]]
        sums = [
            (
                2 * (shares[s][k] * truths[s][k]).sum(),
                shares[s][k].sum() + truths[s][k].sum(),
            )
            for s in counting
        ]
        if batch_dice and sums:
            sums = [(sum(a for a, _ in sums), sum(b for _, b in sums))]
        parts += [(a + 1e-5) / (b + 1e-5) for a, b in sums]
    mean = sum(parts) / max(len(parts), 1)
    return ce_share * sum(surprise) / max(entries, 1) - dice_share * mean


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("name", SHARES)
def test_value_and_gradient_are_those_of_the_formula(name, kind, batch_dice, some):
    labels, generator = EVERY[kind], torch.Generator().manual_seed(6)
    logits = torch.randn(3, labels.heads, 5, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    target = torch.randint(len(labels.known), (3, 5, 7), generator=generator)
    target[0] = len(labels.known) - 1  # one class everywhere, or nothing annotated at all
    annotated = None
    if some:
        annotated = torch.tensor([[True, False, True], [True, True, True], [False, False, True]])
        for sample, flags in enumerate(annotated):
            allowed = {0, labels.ignored, *(i for own, said in zip(labels.members, flags) if said for i in own)}
            for index in range(1, len(labels.known)):
                if index not in allowed:
                    target[sample][target[sample] == index] = 0
    more = {"batch_dice": batch_dice, "labels": labels, "annotated": annotated}
    dice_share, ce_share = SHARES[name]
    ours = LOSSES[name](logits, target.to(torch.int16), **more)
    reference = formula(logits, target, dice_share=dice_share, ce_share=ce_share, **more)
    torch.testing.assert_close(ours, reference)
    (gradient,) = torch.autograd.grad(3 * ours, logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(3 * reference, logits)[0])
    if labels.ignored is not None:
        hidden = (target == labels.ignored)[:, None].expand_as(gradient)
        assert hidden.any() and not gradient[hidden].any(), "exactly zero"


@pytest.mark.parametrize("kind", EVERY)
def test_the_gradient_of_each_kind_is_the_derivative(kind):
    labels, generator = EVERY[kind], torch.Generator().manual_seed(7)
    logits = torch.randn(2, labels.heads, 2, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    target = torch.tensor([[[0, 1, 3], [3, 0, len(labels.known) - 1]], [[0, 0, 1], [1, 0, 0]]])
    annotated = torch.tensor([[True, True, True], [True, False, False]])
    for batch_dice in (False, True):
        loss = partial(dice_ce, batch_dice=batch_dice, labels=labels, annotated=annotated)
        assert torch.autograd.gradcheck(loss, (logits, target))


def test_plain_labels_change_no_bit():
    generator = torch.Generator().manual_seed(8)
    logits = torch.randn(2, 4, 5, 7, generator=generator, requires_grad=True)
    target = torch.randint(4, (2, 5, 7), generator=generator)
    for batch_dice in (False, True):
        plain = dice_ce(logits, target, batch_dice=batch_dice)
        named = dice_ce(logits, target, batch_dice=batch_dice, labels=PLAIN)
        assert torch.equal(plain, named)
        assert torch.equal(*(torch.autograd.grad(loss, logits)[0] for loss in (plain, named)))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("labels", [PARTLY, REGIONS_PARTLY])
@pytest.mark.parametrize("batch_dice", [False, True])
def test_a_batch_of_ignored_voxels_alone_is_zero(labels, batch_dice, kind):
    logits = (100 * torch.randn(2, labels.heads, 5, 7)).to(kind).requires_grad_()
    target = torch.full((2, 5, 7), labels.ignored)
    loss = dice_ce(logits, target, batch_dice=batch_dice, labels=labels)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0
    assert not gradient.any()


@pytest.mark.parametrize("labels", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_every_kind_stays_finite(labels, kind, size):
    noise = size * torch.randn(2, labels.heads, 5, 7, generator=torch.Generator().manual_seed(3))
    logits = noise.to(kind).requires_grad_()
    annotated = torch.tensor([[False, False, True], [True, True, False]])
    for index in (0, len(labels.known) - 1):
        target = torch.full((2, 5, 7), index)
        loss = dice_ce(logits, target, batch_dice=True, labels=labels, annotated=annotated)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.dtype == torch.float32 and loss.isfinite()
        assert gradient.dtype == kind and gradient.isfinite().all()


def test_regions_by_hand():
    # Two voxels: index 1 (whole) and 3 (whole and core); p(whole) = 0.8, 0.5; p(core) = 0.4, 0.5; p(apart) = 1/2, 1/4.
    shares = torch.tensor([[0.8, 0.5], [0.4, 0.5], [0.5, 0.25]], dtype=torch.float64)
    logits, target = shares.logit()[None], torch.tensor([[1, 3]])
    surprise = -sum(math.log(p) for p in (0.8, 0.5, 0.6, 0.5, 0.5, 0.75)) / 6
    assert cross_entropy(logits, target, batch_dice=False, labels=REGIONS).item() == pytest.approx(surprise)
    parts = (2.6 + 1e-5) / (3.3 + 1e-5), (1 + 1e-5) / (1.9 + 1e-5), 1e-5 / (0.75 + 1e-5)
    assert dice(logits, target, batch_dice=False, labels=REGIONS).item() == pytest.approx(-sum(parts) / 3)


def test_ignored_voxels_by_hand():
    # The second voxel is ignored: what is left is one voxel of class a at p = 1/2.
    logits = logits_of([[0.25, 0.1], [0.5, 0.2], [0.125, 0.3], [0.125, 0.4]])
    more = {"batch_dice": False, "labels": PARTLY}
    target = torch.tensor([[1, PARTLY.ignored]])
    assert cross_entropy(logits, target, **more).item() == pytest.approx(math.log(2))
    parts = (1 + 1e-5) / (1.5 + 1e-5), 1e-5 / (0.125 + 1e-5), 1e-5 / (0.125 + 1e-5)
    assert dice(logits, target, **more).item() == pytest.approx(-sum(parts) / 3)


def test_classes_that_were_not_annotated_count_as_background_by_hand():
    # Only b was annotated: at the first voxel background, a and c together have 7/8, at the second b has 0.3.
    logits = logits_of([[0.25, 0.1], [0.5, 0.2], [0.125, 0.3], [0.125, 0.4]])
    annotated, target = torch.tensor([[False, True, False]]), torch.tensor([[0, 2]])
    more = {"batch_dice": False, "labels": PLAIN, "annotated": annotated}
    surprise = -(math.log(7 / 8) + math.log(0.3)) / 2
    assert cross_entropy(logits, target, **more).item() == pytest.approx(surprise)
    assert dice(logits, target, **more).item() == pytest.approx(-(0.6 + 1e-5) / (0.425 + 1 + 1e-5))
    # A voxel of such a class that is there all the same is one of the background's.
    drawn = torch.tensor([[3, 2]])
    assert torch.equal(dice_ce(logits, drawn, **more), dice_ce(logits, target, **more))


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


def test_outputs_count_as_their_network_says():
    logits = [torch.tensor([3.0]), torch.tensor([6.0]), torch.tensor([math.nan])]
    targets = [torch.tensor([1]), torch.tensor([2]), torch.tensor([1])]
    assert deep_supervision(first_number, logits, targets, (0.25, 0.75, 0.0)).item() == pytest.approx(0.75 + 9)


def test_deep_supervision_refuses_scales_without_targets_or_weights():
    with pytest.raises(ValueError, match="2 scales of logits"):
        deep_supervision(first_number, [torch.ones(1)] * 2, [torch.ones(1)])
    with pytest.raises(ValueError, match="1 weights do not fit 2"):
        deep_supervision(first_number, [torch.ones(1)] * 2, [torch.ones(1)] * 2, (1.0,))


def test_targets_are_taken_at_the_centre_of_each_large_voxel():
    row = torch.arange(8)[None, None]
    scales = scale_targets(row, ((1, 1), (1, 2), (1, 4)))
    assert [scale.flatten().tolist() for scale in scales] == [[0, 1, 2, 3, 4, 5, 6, 7], [1, 3, 5, 7], [2, 6]]


def test_scaled_targets_are_those_of_nearest_exact_interpolation():
    factors = ((1, 1, 1), (1, 2, 2), (2, 4, 4), (2, 8, 4))
    target = torch.randint(9, (2, 6, 16, 24), generator=torch.Generator().manual_seed(5), dtype=torch.int16)
    scales = scale_targets(target, factors)
    assert len(scales) == 4
    for scale, factor in zip(scales, factors):
        size = [int(edge // step) for edge, step in zip(target.shape[1:], factor)]
        reference = F.interpolate(target[:, None].float(), size, mode="nearest-exact")[:, 0]
        assert torch.equal(scale, reference.to(torch.int16))
