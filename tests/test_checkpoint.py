"""Checkpoints: whole or absent, exact, and never unpickled."""

import errno
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from autoseg import checkpoint
from autoseg.checkpoint import (
    KEPT,
    Progressed,
    checkpoints,
    load_checkpoint,
    load_weights,
    read_progress,
    save_checkpoint,
    save_weights,
)
from autoseg.records import AutosegError


def parts(seed):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 2, 1))
    return network, torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True)


def progressed(step, **more):
    return Progressed(step=step, epoch=0, epoch_start=0, **more)


def steps(network, optimizer, count, seed):
    torch.manual_seed(seed)
    for _ in range(count):
        optimizer.zero_grad()
        network(torch.randn(2, 1, 5, 7)).square().mean().backward()
        optimizer.step()


def test_nothing_saved_gives_none(tmp_path):
    assert load_checkpoint(tmp_path, *parts(0)) is None


def test_going_on_from_a_checkpoint_equals_not_stopping(tmp_path):
    network, optimizer = parts(0)
    steps(network, optimizer, 3, 1)
    save_checkpoint(tmp_path, network, optimizer, progressed(3, smooth_pseudo_dice=0.5))
    steps(network, optimizer, 4, 2)
    other, its_optimizer = parts(9)
    assert load_checkpoint(tmp_path, other, its_optimizer) == progressed(3, smooth_pseudo_dice=0.5)
    steps(other, its_optimizer, 4, 2)
    for a, b in zip(network.parameters(), other.parameters()):
        assert torch.equal(a, b)


def test_what_is_kept_lies_in_the_checkpoint_and_may_follow_its_validation(tmp_path):
    network, optimizer = parts(0)
    first, second = parts(1)[0], parts(2)[0]
    folder = save_checkpoint(tmp_path, network, optimizer, progressed(3), first)
    assert save_checkpoint(tmp_path, network, optimizer, progressed(3, validation_losses=(0.5,)), second) == folder
    assert read_progress(tmp_path).validation_losses == (0.5,)
    load_weights(first, folder / KEPT)
    assert torch.equal(first[0].weight, second[0].weight)
    assert not torch.equal(first[0].weight, network[0].weight)
    load_checkpoint(tmp_path, first, optimizer)
    assert torch.equal(first[0].weight, network[0].weight)


def test_only_the_newest_stays_and_a_torn_one_is_not_seen(tmp_path):
    network, optimizer = parts(0)
    for step in (3, 12, 100):
        save_checkpoint(tmp_path, network, optimizer, progressed(step))
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint_000000100"]
    torn = tmp_path / ".checkpoint_000000200.tmp"
    torn.mkdir()
    (torn / "weights.safetensors").write_bytes(b"half")
    assert load_checkpoint(tmp_path, network, optimizer).step == 100
    save_checkpoint(tmp_path, network, optimizer, progressed(200))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint_000000200"]


def test_wrong_files_are_named(tmp_path):
    network, _ = parts(0)
    path = tmp_path / "weights.safetensors"
    with pytest.raises(AutosegError, match="does not exist"):
        load_weights(network, path)
    save_weights(nn.Conv2d(1, 3, 3), path)
    with pytest.raises(AutosegError, match="do not fit"):
        load_weights(network, path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(AutosegError, match="damaged"):
        load_weights(network, path)


def test_a_pickle_in_place_of_the_optimizer_is_refused(tmp_path):
    network, optimizer = parts(0)
    folder = save_checkpoint(tmp_path, network, optimizer, progressed(1))
    torch.save({"harmful": print}, folder / "optimizer.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only|Unsupported"):
        load_checkpoint(tmp_path, network, optimizer)


@pytest.mark.parametrize(("what", "error"), [("save_file", SafetensorError("I/O")), ("torch", RuntimeError("pos"))])
def test_a_full_disk_is_called_so_and_the_checkpoint_before_stays(tmp_path, monkeypatch, what, error):
    network, optimizer = parts(0)
    save_checkpoint(tmp_path, network, optimizer, progressed(3))

    def fail(*args):
        raise error

    monkeypatch.setattr(checkpoint, what, fail if what == "save_file" else SimpleNamespace(save=fail))
    with pytest.raises(type(error)):
        save_checkpoint(tmp_path, network, optimizer, progressed(4))
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: SimpleNamespace(free=300))
    with pytest.raises(OSError, match="No space left") as full:
        save_checkpoint(tmp_path, network, optimizer, progressed(4))
    assert full.value.errno == errno.ENOSPC
    assert read_progress(tmp_path).step == 3
