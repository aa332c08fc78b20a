"""A trained model: the folds of one configuration of one run, with the plan that prepares their input."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from autoseg.checkpoint import load_weights
from autoseg.inference import Swap, predict_logits
from autoseg.networks import build
from autoseg.preprocess import PreparedCase, prepare, project
from autoseg.records import AutosegError, load_json, to_json
from autoseg.schema import Configuration, Plan, Run
from autoseg.training import WEIGHTS
from autoseg.volume import Grid, Volume


@dataclass(frozen=True, eq=False, kw_only=True)
class Model:
    """Networks of one configuration, ready to predict on `device`. Their logits are averaged."""

    plan: Plan
    configuration: Configuration
    networks: tuple[nn.Module, ...]
    device: torch.device
    before: "Model | None" = None
    """The earlier stage of a cascade, whose labels the networks read beside the image."""

    def prepare(self, case: str, image: Volume, stored: Grid) -> PreparedCase:
        """Canonical image -> what the networks read, by the same function as in training, for all stages."""
        prepared = prepare(case, image, None, stored, self.plan, self.configuration)
        return prepared if self.before is None else replace(prepared, before=self.before.prepare(case, image, stored))

    def logits(
        self,
        case: PreparedCase,
        *,
        prior: np.ndarray | None = None,
        step: float = 0.5,
        mirror: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Prepared case -> mean logits (K, Z, Y, X) of all folds on the prepared grid, float32.

        prior: labels (Z, Y, X) of the earlier stage on the same grid; left out, `before` predicts them.
        step: distance of tiles as a share of the patch; mirror: average over all flips that the plan allows too.
        """
        patch = self.configuration.patch
        image = np.asarray(case.image[...])
        if self.configuration.previous_stage is not None:
            if prior is None:
                if self.before is None or case.before is None:
                    raise ValueError(f"{self.configuration.name} needs the labels of the stage before, or its model")
                earlier = self.before.logits(case.before, step=step, mirror=mirror)
                prior = project(earlier, case.before.trace, case.trace, self.before.configuration)
            masks = [prior == index for index in self.plan.labels.foreground]
            image = np.concatenate([image, np.stack(masks).astype(np.float32)])
        return predict_logits(
            self.networks,
            torch.from_numpy(np.ascontiguousarray(image)),
            patch=patch,
            heads=self.plan.labels.heads,
            step=step,
            mirror_axes=self.plan.mirroring.in_patch(len(patch)).axes(len(patch)) if mirror else (),
            swap=self.swap(),
            device=self.device,
            progress=progress,
        ).numpy()

    def swap(self) -> Swap | None:
        """What trades places in a mirrored view: heads of left and right, and in a cascade the masks of both."""
        mirroring = self.plan.mirroring.in_patch(self.configuration.dimension)
        if not mirroring.swapped or mirroring.left_right is None:
            return None
        labels, images = self.plan.labels, len(self.plan.channels)
        order = mirroring.order(labels.count)
        masks = [images + order[index] - 1 for index in labels.foreground] if self.configuration.previous_stage else []
        return Swap(axis=mirroring.left_right, channels=(*range(images), *masks), heads=order)


def is_finished(folder: Path) -> bool:
    """Whether a fold folder holds a fold that was trained to its end."""
    path = folder / "run.json"
    return path.is_file() and load_json(Run, path).finished is not None and (folder / WEIGHTS).is_file()


def weights_hash(folder: Path) -> str:
    """Hash of the weights of a finished fold: tells whether anything made with them is still theirs."""
    with (folder / WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def open_run(folder: Path) -> Run:
    """The run.json of a fold folder; AutosegError if the fold is not there or not trained to its end."""
    run = load_json(Run, folder / "run.json")
    if run.finished is None or not (folder / WEIGHTS).is_file():
        raise AutosegError(f"{folder} is not trained to its end; give the same train command again to go on")
    return run


def open_model(folders: Sequence[Path], device: torch.device, before: Sequence[Path] = ()) -> Model:
    """The model made of the finished folds in `folders`; `before` are those of a cascade's earlier stage.

    Raises AutosegError if a fold is unfinished, damaged, or made with another plan than the first.
    """
    runs = [open_run(folder) for folder in folders]
    first = runs[0]
    for run, folder in zip(runs, folders):
        if to_json(run.plan) != to_json(first.plan) or run.configuration != first.configuration:
            raise AutosegError(f"{folder} was trained with another plan than {folders[0]}; they cannot be averaged")
    configuration = first.plan.configuration(first.configuration)
    networks = []
    for folder in folders:
        network = build(configuration.network, first.plan.in_channels(configuration), first.plan.labels.heads)
        load_weights(network, folder / WEIGHTS)
        networks.append(network.to(device).eval())
    earlier = open_model(before, device) if before else None
    if earlier is not None and to_json(earlier.plan) != to_json(first.plan):
        raise AutosegError(f"{before[0]} was trained with another plan than {folders[0]}; they make no cascade")
    return Model(plan=first.plan, configuration=configuration, networks=tuple(networks), device=device, before=earlier)


def earlier_folds(folder: Path) -> tuple[Path, ...]:
    """All finished cross-validation folds of the stage before the fold in `folder`; empty if there is no such stage.

    Raises AutosegError if the stage before has no finished fold.
    """
    run = open_run(folder)
    stage = run.plan.configuration(run.configuration).previous_stage
    if stage is None:
        return ()
    place = folder.parent.parent / stage
    found = tuple(path for path in sorted(place.glob("fold_[0-9]*")) if is_finished(path))
    if not found:
        raise AutosegError(
            f"{run.configuration} reads predictions of {stage}, and {place} holds no finished fold of it"
        )
    return found
