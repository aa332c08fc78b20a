"""Save and load the state of a run. What exists under its final name is whole.

A checkpoint is a folder `checkpoint_<step>`: weights.safetensors, optimizer.pt and state.json, and kept.safetensors
where a run keeps other weights than those it goes on with; written under another name and renamed last; the one before
is removed after that. Weights are safetensors, descriptions JSON; the optimizer's tensors are loaded with
`weights_only=True`. Nothing is ever unpickled.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autoseg.rates import Leg, Moment
from autoseg.records import AutosegError, load_json, record, save_json, sync
from autoseg.schedule import Rhythm, progress
from autoseg.schema import Recipe
from autoseg.watchdog import Shown

PREFIX = "checkpoint_"
NO_ROOM = 1 << 20
"""Bytes that are left, at most, when the file that was being written has filled a disk."""
KEPT = "kept.safetensors"
"""In a checkpoint: see `autoseg.kept`."""


@record
class Progressed:
    """How far a run has come. `step` optimizer steps are done; everything random follows from seed and step."""

    step: int
    epoch: int
    """Epochs that are complete, their pseudo-validation included."""
    epoch_start: int
    """The first step of the epoch under way."""
    rhythm: Rhythm | None = None
    """The epochs that a run by time has chosen."""
    loss_scale: dict[str, int | float] = field(default_factory=dict)
    """State of the loss scaling of float16; empty without."""
    smooth_pseudo_dice: float | None = None
    skipped_steps: int = 0
    epoch_losses: tuple[float, ...] = ()
    """Training losses of the epoch under way."""
    seconds: float = 0.0
    """Training time so far, over all sessions."""
    rate: float | None = None
    """Learning rate of the last step."""
    validation_losses: tuple[float | None, ...] = ()
    """Of each complete epoch; None where it was not finite."""
    compared_steps: int | None = None
    """Validation steps of every epoch of a run that goes by their losses, whatever becomes of its length; else None."""
    shown: Shown = Shown()
    """What training has shown of each class; of the steps since, in runs begun by versions that did not count."""
    leg: Leg | None = None
    """None before the first step, and in checkpoints of versions that knew of none."""

    def moment(self, recipe: Recipe, seconds: float | None = None) -> Moment:
        """Where the next step stands, at so many `seconds` of training (None: those of the last step).

        Steps of all steps are counted at the start of the epoch, so that the rate is the same throughout one.
        """
        done = progress(recipe, step=self.epoch_start, seconds=self.seconds if seconds is None else seconds)
        return Moment(step=self.step, epoch=self.epoch, progress=done, losses=self.validation_losses, leg=self.leg)


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Make an OSError of what safetensors and torch raise when the disk of `folder` is full."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if shutil.disk_usage(folder).free < NO_ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise


def save_weights(network: nn.Module, path: Path) -> None:
    """Write the network's tensors to `path` (safetensors), whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    with full_disk_named(path.parent):
        save_file(tensors, temporary)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors in `path` (safetensors) by name. Raises AutosegError for a missing or broken file."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise AutosegError(f"{path} does not exist; train this fold first") from None
    except SafetensorError as error:
        raise AutosegError(f"{path} is damaged ({error}); train again or restore the file") from None


def load_weights(network: nn.Module, path: Path) -> None:
    """Fill the network from `path`. Raises AutosegError for a missing, broken or unfitting file."""
    tensors = read_weights(path)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise AutosegError(f"the weights in {path} do not fit the planned network: {error}") from None


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a fold, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.is_dir())


def save_checkpoint(
    folder: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    progressed: Progressed,
    kept: nn.Module | None = None,
) -> Path:
    """Write a checkpoint of the fold in `folder` and remove older ones. Returns its path.

    kept: has the weights that the run keeps, where `network` has not.
    """
    final = folder / f"{PREFIX}{progressed.step:09d}"
    if final.exists():
        # The weights of a step are there already; what can differ is whether its epoch has been validated since, and
        # so whether they are kept. If only that is written, the epoch is validated again, to the same end.
        if kept is not None:
            save_weights(kept, final / KEPT)
        save_json(progressed, final / "state.json")
        return final
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_weights(network, temporary / "weights.safetensors")
    with full_disk_named(temporary):
        torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
    sync(temporary / "optimizer.pt")
    if kept is not None:
        save_weights(kept, temporary / KEPT)
    save_json(progressed, temporary / "state.json")
    sync(temporary)
    older = checkpoints(folder)
    os.replace(temporary, final)
    sync(folder)
    for path in older:
        shutil.rmtree(path, ignore_errors=True)
    return final


def read_progress(folder: Path) -> Progressed | None:
    """How far the newest checkpoint of the fold in `folder` has come; None if there is none."""
    found = checkpoints(folder)
    return load_json(Progressed, found[-1] / "state.json") if found else None


def load_checkpoint(folder: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> Progressed | None:
    """Load the newest checkpoint of the fold in `folder`; None if there is none."""
    found = checkpoints(folder)
    if not found:
        return None
    newest = found[-1]
    load_weights(network, newest / "weights.safetensors")
    device = next(network.parameters()).device
    state: dict[str, Any] = torch.load(newest / "optimizer.pt", map_location=device, weights_only=True)
    optimizer.load_state_dict(state)
    return load_json(Progressed, newest / "state.json")
