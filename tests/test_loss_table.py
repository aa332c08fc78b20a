"""What holds for every loss: ignored voxels, classes not annotated, extremes, scales, learning; and what names one."""

from functools import partial
from itertools import product

import pytest
import torch
from test_losses import EVERY, PLAIN, REGIONS

from autoseg.labels import Labels
from autoseg.losses import (
    LOSSES,
    WHOLE,
    check_loss,
    deep_supervision,
    describe_losses,
    dice_ce,
    make_loss,
    scale_targets,
)
from autoseg.losses.basis import table
from autoseg.records import AutosegError

OF_VOXELS_ALONE = {name for name in LOSSES if name not in ("boundary", "hausdorff", "cldice")}
"""Losses in which a voxel's neighbours are of no importance."""


def loss_of(name, labels, weights=None):
    """A loss of the table; weighted ones weigh classes by 1, 2, 3, ..."""
    own = {"weights": weights or range(1, labels.count + 1)} if name == "weighted_ce" else {}
    return partial(LOSSES[name], labels=labels, **own)


def problem(labels, shape=(2, 3, 4, 5), seed=0, size=1.0, kind=torch.float64):
    """Logits (B, heads, *s) that need a gradient, and a target in which every index occurs."""
    generator = torch.Generator().manual_seed(seed)
    logits = size * torch.randn(shape[0], labels.heads, *shape[1:], generator=generator, dtype=torch.float64)
    target = torch.randint(len(labels.known), shape, generator=generator)
    return logits.to(kind).requires_grad_(), target


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("name", LOSSES)
def test_empty_and_full_masks_and_extreme_logits_stay_finite(name, kind):
    labels = EVERY[kind]
    loss = loss_of(name, labels)
    annotated = torch.tensor([[False, False, True], [True, True, False]])
    for size, number in ((80.0, torch.bfloat16), (80.0, torch.float16), (1e4, torch.float32), (1e-3, torch.float32)):
        logits, _ = problem(labels, (2, 3, 4), size=size, kind=number)
        right = logits.detach().clone()
        right[:, -1] = size  # the last class everywhere, as sure as can be
        for index in {0, len(labels.stored) - 1}:
            for given, flags in ((logits, annotated), (right.requires_grad_(), None)):
                value = loss(given, torch.full((2, 3, 4), index), batch_dice=flags is None, annotated=flags)
                slope = gradient(value, given)
                assert value.dtype == torch.float32 and value.isfinite()
                assert slope.dtype == number and slope.isfinite().all()


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_the_derivative(name, kind):
    labels = EVERY[kind]
    logits, target = problem(labels, (2, 2, 3), seed=1)
    annotated = torch.tensor([[True, True, True], [True, False, True]])
    loss = partial(loss_of(name, labels), batch_dice=labels.exclusive, annotated=annotated)
    assert torch.autograd.gradcheck(loss, (logits, target), fast_mode=True)
    assert torch.autograd.gradcheck(partial(loss, batch_dice=not labels.exclusive), (logits, target), fast_mode=True)


@pytest.mark.parametrize("kind", ["ignore", "regions and ignore"])
@pytest.mark.parametrize("name", LOSSES)
def test_ignored_voxels_have_no_gradient_and_no_influence(name, kind):
    labels = EVERY[kind]
    for annotated, batch_dice in product((None, torch.tensor([[True, False, True], [True] * 3])), (False, True)):
        loss = partial(loss_of(name, labels), batch_dice=batch_dice, annotated=annotated)
        logits, target = problem(labels, seed=2)
        value = loss(logits, target)
        hidden = (target == labels.ignored)[:, None]
        slope = gradient(value, logits)
        assert hidden.any() and not slope[hidden.expand_as(slope)].any(), "exactly zero"
        assert slope[~hidden.expand_as(slope)].any()
        odd = 50.0 if name in ("dice_ce", "dice", "ce") else torch.nan
        spoilt = torch.where(hidden, odd, logits.detach()).requires_grad_()
        again = loss(spoilt, target)
        torch.testing.assert_close(again, value)
        torch.testing.assert_close(gradient(again, spoilt), slope)
        nothing = loss(logits, torch.full_like(target, labels.ignored))
        assert nothing == 0 and not gradient(nothing, logits).any()


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("kind", ["ignore", "regions and ignore"])
@pytest.mark.parametrize("name", sorted(OF_VOXELS_ALONE))
def test_to_ignore_voxels_is_to_cut_them_away(name, kind, batch_dice):
    labels = EVERY[kind]
    logits, target = problem(labels, (3, 3, 4, 5), seed=3)
    target[:, :, 2:], target[2] = labels.ignored, labels.ignored
    loss = partial(loss_of(name, labels), batch_dice=batch_dice)
    torch.testing.assert_close(loss(logits, target), loss(logits[:2, :, :, :2], target[:2, :, :2]))


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_a_class_that_nobody_annotated_is_background(name, batch_dice):
    """As if there were no such class: its voxels and its probability are the background's."""
    logits, target = problem(PLAIN, seed=4)
    annotated = torch.tensor([[True, False, True]] * 2)
    value = loss_of(name, PLAIN)(logits, target, batch_dice=batch_dice, annotated=annotated)
    fewer = Labels.from_dataset({"background": 0, "a": 1, "c": 2})
    merged = torch.stack([logits[:, [0, 2]].logsumexp(1), logits[:, 1], logits[:, 3]], 1)
    reduced = torch.tensor([0, 1, 0, 2])[target]
    expected = loss_of(name, fewer, weights=(1, 2, 4))(merged, reduced, batch_dice=batch_dice)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient(value, logits), gradient(expected, logits))


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_a_region_that_nobody_annotated_is_left_out(name, batch_dice):
    logits, target = problem(REGIONS, seed=5)
    annotated = torch.tensor([[True, False, True]] * 2)
    value = loss_of(name, REGIONS)(logits, target, batch_dice=batch_dice, annotated=annotated)
    fewer = Labels.from_dataset({"background": 0, "whole": [1, 2, 3], "apart": 4})
    index = torch.tensor([fewer.stored.index(stored) for stored in REGIONS.stored])
    loss = loss_of(name, fewer, weights=(1, 2, 4))
    torch.testing.assert_close(value, loss(logits[:, [0, 2]], index[target], batch_dice=batch_dice))


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("name", ["dice", "dice_squared", "tversky", "focal_tversky", "cldice"])
def test_overlaps_are_a_mean_over_what_was_annotated(name, batch_dice):
    """Region by region on the samples in which it counts, each as a single class of its own."""
    logits, target = problem(REGIONS, (3, 3, 4, 5), seed=8)
    annotated = torch.tensor([[True, False, True], [True, True, False], [True, False, False]])
    value = LOSSES[name](logits, target, batch_dice=batch_dice, labels=REGIONS, annotated=annotated)
    total = entries = 0
    for k, members in enumerate(REGIONS.members):
        kept = annotated[:, k]
        pair = torch.stack([torch.zeros_like(logits[kept, k]), logits[kept, k]], 1)
        truth = torch.isin(target[kept], torch.tensor(members)).long()
        weight = 1 if batch_dice else int(kept.sum())
        total += weight * LOSSES[name](pair, truth, batch_dice=batch_dice)
        entries += weight
    torch.testing.assert_close(value, total / entries)


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("name", LOSSES)
def test_sums_are_taken_over_a_sample_or_over_the_batch(name, kind):
    """One sample is a batch; and two that are alike are as good as one."""
    labels = EVERY[kind]
    logits, target = problem(labels, (1, 3, 4, 5), seed=6)
    single, pooled = (loss_of(name, labels)(logits, target, batch_dice=batch_dice) for batch_dice in (False, True))
    torch.testing.assert_close(single, pooled)
    twice = logits.expand(2, -1, -1, -1, -1), target.expand(2, -1, -1, -1)
    torch.testing.assert_close(loss_of(name, labels)(*twice, batch_dice=False), single)


@pytest.mark.parametrize("name", LOSSES)
def test_at_every_scale_of_a_decoder(name):
    """Also where one voxel is left along an axis."""
    logits, target = problem(PLAIN, (2, 4, 6, 8), seed=7)
    scales = [logits, logits[..., ::2, ::2, ::2], logits[..., :1, ::6, ::4], logits[..., :1, :1, :1]]
    targets = scale_targets(target, ((1, 1, 1), (2, 2, 2), (4, 6, 4), (4, 6, 8)))
    loss = partial(loss_of(name, PLAIN), batch_dice=False)
    value = deep_supervision(loss, scales, targets)
    parts = [loss(*pair) for pair in zip(scales, targets)]
    torch.testing.assert_close(value, (4 * parts[0] + 2 * parts[1] + parts[2]) / 7)
    assert gradient(value, logits).isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_validation_may_come_before_the_first_step(name):
    """As where a run goes on that was stopped in a validation; what is kept from then must not harm the gradient."""
    logits, target = problem(REGIONS)
    loss = partial(loss_of(name, REGIONS), batch_dice=True)
    table.cache_clear()
    with torch.inference_mode():
        before = loss(logits, target)
    after = loss(logits, target)
    assert before.item() == pytest.approx(after.item())
    assert gradient(after, logits).any()


class Tiny(torch.nn.Module):
    """Two convolutions and an output head."""

    def __init__(self, heads):
        super().__init__()
        self.first = torch.nn.Conv2d(1, 6, 3, padding=1)
        self.last = torch.nn.Conv2d(6, heads, 1)

    def forward(self, image):
        return self.last(torch.relu(self.first(image)))


@pytest.mark.parametrize("kind", ["plain", "ignore", "regions"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_network_learns(name, kind):
    labels = EVERY[kind]
    torch.manual_seed(0)
    target = torch.zeros(2, 9, 11, dtype=torch.int64)
    target[:, 1:6, 1:5], target[0, 3:8, 6:10], target[1, 2:4, 7:10] = 1, 2, 3
    if labels.ignored is not None:
        target[:, 8] = labels.ignored
    image = (target.float() + 0.1 * torch.randn(2, 9, 11))[:, None]
    network = Tiny(labels.heads)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    values = []
    for _ in range(8):
        loss = loss_of(name, labels)(network(image), target, batch_dice=True)
        values.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values[-1] < values[0] - 0.01 * abs(values[0])


# What a recipe says.


def test_a_sum_is_the_sum_of_its_terms_with_their_factors():
    logits, target = problem(PLAIN)
    made = make_loss("0.5*ce + tversky(alpha=0.2, beta=0.9)+2*focal", labels=PLAIN, batch_dice=True)
    parts = (
        0.5 * LOSSES["ce"](logits, target, batch_dice=True),
        LOSSES["tversky"](logits, target, batch_dice=True, alpha=0.2, beta=0.9),
        2 * LOSSES["focal"](logits, target, batch_dice=True),
    )
    torch.testing.assert_close(made(logits, target), sum(parts))
    given = {"annotated": torch.tensor([[True, False, True]] * 2)}
    assert made(logits, target, **given) != made(logits, target)


def test_the_default_alone_is_called_directly():
    assert make_loss("dice_ce", labels=PLAIN, batch_dice=False).func is dice_ce


def test_weights_come_from_the_data_unless_they_are_given():
    logits, target = problem(PLAIN)
    expected = LOSSES["weighted_ce"](logits, target, batch_dice=True, weights=[4, 3, 2, 1])
    filled = make_loss("weighted_ce", labels=PLAIN, batch_dice=True, weights=(4.0, 3.0, 2.0, 1.0))
    written = make_loss("weighted_ce(weights=[4, 3, 2, 1])", labels=PLAIN, batch_dice=True, weights=(1.0,) * 4)
    assert filled(logits, target) == written(logits, target) == expected
    with pytest.raises(AutosegError, match="plan_and_preprocess again, or give them"):
        make_loss("weighted_ce", labels=PLAIN, batch_dice=True)
    with pytest.raises(ValueError, match="background first"):
        LOSSES["weighted_ce"](logits, target, batch_dice=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dise", "unknown loss 'dise' (did you mean 'dice'?); choose one of dice_ce, dice, dice_squared, "),
        ("ce+", "loss 'ce+': a term is missing"),
        ("", "loss '': a term is missing"),
        ("focal(gamma=2, gamma=3)", "gamma is given twice"),
        ("x*ce", "'x' is no number above 0"),
        ("0*ce", "'0' is no number above 0"),
        ("-1*ce", "'-1' is no number above 0"),
        ("ce(gamma=2)", "ce has no option 'gamma'; it has none"),
        ("dice+tversky(gama=1)", "no option 'gama'; it has alpha=0.3, beta=0.7"),
        ("focal(batch_dice=true)", "no option 'batch_dice'; it has gamma=2"),
        ("focal(gamma=much)", "gamma must be a number, not 'much'"),
        ("focal(gamma=inf)", "gamma must be a number, not inf"),
        ("cldice(iterations=2.5)", "iterations must be a whole number, not 2.5"),
        ("weighted_ce(weights=5)", "weights must be a number for each class, background first, as [1, 2, 5], not 5"),
        ('weighted_ce(weights=["a", 2])', "weights must be a number for each class"),
        ("weighted_ce(weights=[])", "weights must be a number for each class"),
        ("focal(gamma=-1)", "gamma must not be negative"),
        ("dice+topk_ce(k=0)", "k is a percentage above 0"),
        ("weighted_ce(weights=[1, 2, -1])", "must be 3 numbers from 0 up"),
        ("no_such_module_here:loss", "cannot be imported"),
        ("math:no_such_loss", "no class or function 'no_such_loss'"),
        ("math:sqrt", "must take batch_dice, labels, annotated, part by keyword"),
    ],
)
def test_what_is_no_loss_is_refused_with_what_there_is(text, said):
    with pytest.raises(AutosegError) as refused:
        check_loss(text)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "tversky(alpha=-1)", "tversky(alpha=0, beta=0)", "focal_tversky(gamma=0)", "focal(gamma=-1)",
        "categorical_focal(gamma=-0.5)", "topk_ce(k=0)", "topk_ce(k=101)", "hausdorff(alpha=-2)",
        "cldice(iterations=-1)", "unified_focal(gamma=1)", "unified_focal(weight=2)", "unified_focal(delta=1)",
        "weighted_ce(weights=[1, 2, 3, -1])",
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused_before_anything_is_read(text):
    with pytest.raises(AutosegError, match=r"loss '.*': \w+: ") as refused:
        check_loss(text)
    assert refused.value.__cause__ is None, "all is said; a traceback would only hide it"


def test_weights_must_be_as_many_as_there_are_classes():
    check_loss("weighted_ce(weights=[1, 2])")
    with pytest.raises(AutosegError, match="weights must be 4 numbers"):
        make_loss("weighted_ce(weights=[1, 2])", labels=PLAIN, batch_dice=True)


OWN = """
import torch

def right(logits, target, *, batch_dice, labels=None, annotated=None, part=None, power=1.0):
    return part.share * logits.abs().pow(power).mean()

def weighs(logits, target, *, weights=None, **given):
    return logits.sum() * weights[0]

def forgets(logits, target):
    return logits.mean()

def two_numbers(logits, target, **given):
    return logits.mean((1, 2, 3))

def no_tensor(logits, target, **given):
    return 0.5

def never_finite(logits, target, **given):
    return logits.mean() * float("nan")

def fails_later(logits, target, **given):
    return logits.mean() * [1.0][len(logits) // 3]
"""


def test_a_loss_of_ones_own_is_used_like_the_others(tmp_path, monkeypatch):
    (tmp_path / "own_losses_of_a_user.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    logits, target = problem(PLAIN)
    make = partial(make_loss, labels=PLAIN, batch_dice=False, weights=(7.0, 1.0, 1.0, 1.0), dimension=2)
    made = make("dice+2*own_losses_of_a_user:right(power=2)")
    expected = LOSSES["dice"](logits, target, batch_dice=False) + 2 * logits.square().mean()
    torch.testing.assert_close(made(logits, target, part=WHOLE, annotated=None), expected)
    assert make("own_losses_of_a_user:weighs")(logits, target) == 7 * logits.sum()
    with pytest.raises(AutosegError, match="must take batch_dice"):
        make("own_losses_of_a_user:forgets")
    with pytest.raises(AutosegError, match="no option 'pover'; it has power=1"):
        make("own_losses_of_a_user:right(pover=2)")
    for name in ("two_numbers", "no_tensor"):
        with pytest.raises(AutosegError, match="a single number"):
            make(f"own_losses_of_a_user:{name}")
    with pytest.raises(AutosegError, match=r"never_finite gives nan for logits from -1 to 1"):
        make("own_losses_of_a_user:never_finite")
    later = make("own_losses_of_a_user:fails_later")
    with pytest.raises(AutosegError, match=r"fails_later failed on logits of shape \(3, 4, 5, 7\) .*: IndexError: "):
        later(torch.zeros(3, 4, 5, 7), torch.zeros(3, 5, 7, dtype=torch.int64))


def test_every_loss_is_described_in_a_line():
    lines = describe_losses()
    assert len(lines) == len(LOSSES)
    assert any(line.startswith("tversky(alpha=0.3, beta=0.7) ") for line in lines)
    assert all(line.rstrip().endswith(".") for line in lines)
