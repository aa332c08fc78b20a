"""Batches that go through the network in pieces where memory is short: the same step, less kept."""

from dataclasses import replace

import pytest
import torch
from test_training import parts, place, weights
from torch import nn
from toys import LABELS

from autoseg.losses import make_loss
from autoseg.step import NoMemory, batch_loss, make_optimizer, more_pieces, training_step
from autoseg.team import Team
from autoseg.training import train

__all__ = ["place"]

SAID = "tried to allocate 3 GiB"


class Narrow(nn.Module):
    """A network for which there is memory for so many samples at once; `seen` are those of each call."""

    def __init__(self, network, most, backward_too=False):
        super().__init__()
        self.network, self.most, self.seen, self.backward_too = network, most, [], backward_too

    def forward(self, image, **ask):
        self.seen.append(len(image))
        if len(image) > self.most and not self.backward_too:
            raise torch.OutOfMemoryError(SAID)
        found = self.network(image, **ask)
        if len(image) > self.most and torch.is_grad_enabled():
            found[0].register_hook(self.full)
        return found

    def full(self, gradient):
        raise torch.OutOfMemoryError(SAID)


def crowd(made, count=5, positions=False):
    """A batch of `count` samples with the labels of real ones."""
    batch = made.training.assemble(made.training.sources(0), made.device)
    order = torch.arange(count) % len(batch.image)
    noise = torch.randn((count, *batch.image.shape[1:]), generator=torch.Generator().manual_seed(3))
    position = torch.linspace(-1, 1, count)[:, None].expand(count, 3) if positions else None
    return replace(batch, image=batch.image[order] + noise, labels=batch.labels[order], position=position)


def gradients(made, batch):
    made.network.zero_grad()
    loss, logits = batch_loss(made, batch)
    loss.backward()
    return loss.item(), logits.detach(), [p.grad.clone() for p in made.network.parameters() if p.grad is not None]


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("batch_dice", [True, False])
def test_loss_and_gradient_are_those_of_the_whole_batch(place, deep, batch_dice):
    """Batch Dice is no mean over samples: only what sees all logits at once can get it right."""
    made = parts(place, augmentation="none", deep_supervision=deep)
    made = replace(made, network=made.network.double(), loss=make_loss("dice_ce", labels=LABELS, batch_dice=batch_dice))
    batch = crowd(made)
    batch = replace(batch, image=batch.image.double())
    loss, logits, whole = gradients(made, batch)
    for pieces in (2, 3, 5):
        other_loss, other_logits, cut = gradients(replace(made, pieces=pieces), batch)
        assert other_loss == pytest.approx(loss, rel=1e-12)
        torch.testing.assert_close(other_logits, logits)
        assert len(cut) == len(whole)
        for a, b in zip(cut, whole):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_each_piece_is_told_its_own_positions(place):
    class Placed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = nn.Parameter(torch.ones(3))

        def forward(self, image, position):
            here = (position * self.rate).sum(1)[:, None, None, None, None]
            return torch.cat([image * 0 + here, image * 0, image * 0], 1)

    made = replace(parts(place, deep_supervision=False), network=Placed())
    batch = crowd(made, positions=True)
    one, two = gradients(made, batch), gradients(replace(made, pieces=2), batch)
    assert torch.equal(one[1], two[1])
    torch.testing.assert_close(one[2], two[2])


def test_dropout_is_the_same_when_a_piece_is_computed_again(place):
    """A sum of dropped inputs: its gradient is the mask, which must be the one that made the outputs."""

    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))
            self.drop = nn.Dropout(0.5)

        def forward(self, image):
            return self.drop(torch.ones_like(image)) * self.weight

    made = replace(
        parts(place, deep_supervision=False),
        network=Dropped(), pieces=3, loss=lambda logits, target, **unused: logits.sum(),
    )  # fmt: skip
    loss, logits, (gradient,) = gradients(made, crowd(made))
    assert 0 < (logits == 0).float().mean() < 1
    assert loss == pytest.approx(gradient.item()) == logits.sum().item()


def test_a_piece_keeps_nothing_but_its_image_and_outputs(place):
    made = parts(place, augmentation="none")
    batch = crowd(made, 4)

    def kept(made):
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, _ = batch_loss(made, batch)
        del loss
        return sum(sizes.values())

    whole, cut = kept(made), kept(replace(made, pieces=4))
    assert cut < whole / 2


@pytest.mark.parametrize("backward_too", [False, True])
def test_training_without_memory_goes_on_in_pieces(place, capsys, backward_too):
    def made(run, most, **more):
        found = parts(place, run, epochs=2, **more)
        return replace(found, network=Narrow(found.network, most, backward_too))

    roomy, tight = made("roomy", 2), made("tight", 1)
    train(roomy)
    assert "memory" not in capsys.readouterr().out
    train(tight)
    torch.testing.assert_close(weights(tight), weights(roomy), rtol=1e-4, atol=1e-5)
    said = capsys.readouterr().out
    assert said.count("cpu has no memory for 2 patches at once (tried to allocate 3 GiB)") == 1
    assert "goes through the network in 2 pieces" in said
    assert tight.network.seen.count(2) == 1


def test_not_even_one_sample_has_room(place):
    made = parts(place)
    made = replace(made, network=Narrow(made.network, 0))
    with pytest.raises(torch.OutOfMemoryError, match=SAID):
        train(made)


def test_what_pieces_would_change_is_not_cut(place):
    made = parts(place)
    assert more_pieces(made) == 2
    assert more_pieces(replace(made, pieces=2)) is None
    larger = replace(made, training=replace(made.training, batch_size=7))
    assert [more_pieces(replace(larger, pieces=n)) for n in (1, 2, 4, 7)] == [2, 4, 7, None]
    assert more_pieces(replace(made, team=Team(size=2))) is None
    mixing = nn.Sequential(made.network, nn.BatchNorm3d(3))
    assert more_pieces(replace(made, network=mixing)) is None
    assert more_pieces(replace(made, network=mixing.eval())) == 2, "frozen, it uses running statistics"


def test_no_memory_leaves_weights_and_optimizer_as_they_were(place):
    made = parts(place)
    made = replace(made, network=Narrow(made.network, 1, backward_too=True))
    optimizer, before = make_optimizer(made.network, made.recipe), weights(made)
    with pytest.raises(NoMemory, match=SAID):
        training_step(made, optimizer, torch.amp.GradScaler("cpu", enabled=False), crowd(made))
    assert torch.equal(before, weights(made))
    assert not optimizer.state
