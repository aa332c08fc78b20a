"""A trained model: the folds of one configuration of one run, with the plan that prepares their input."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from autoseg.checkpoint import load_weights
from autoseg.inference import predict_logits
from autoseg.networks import build
from autoseg.preprocess import PreparedCase, prepare
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

    def prepare(self, case: str, image: Volume, stored: Grid) -> PreparedCase:
        """Canonical image -> what the networks read, by the same function as in training."""
        return prepare(case, image, None, stored, self.plan, self.configuration)

    def logits(
        self,
        image: np.ndarray,
        *,
        step: float = 0.5,
        mirror: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Prepared image (C, Z, Y, X) -> mean logits (K, Z, Y, X) of all folds on the same grid, float32.

        step: distance of tiles as a share of the patch; mirror: average over all flips too.
        """
        patch = self.configuration.patch
        return predict_logits(
            self.networks,
            torch.from_numpy(np.ascontiguousarray(image)),
            patch=patch,
            heads=self.plan.labels.heads,
            step=step,
            mirror_axes=tuple(range(len(patch))) if mirror else (),
            device=self.device,
            progress=progress,
        ).numpy()


def open_run(folder: Path) -> Run:
    """The run.json of a fold folder; AutosegError if the fold is not there or not trained to its end."""
    run = load_json(Run, folder / "run.json")
    if run.finished is None or not (folder / WEIGHTS).is_file():
        raise AutosegError(f"{folder} is not trained to its end; give the same train command again to go on")
    return run


def open_model(folders: Sequence[Path], device: torch.device) -> Model:
    """The model made of the finished folds in `folders`.

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
        network = build(configuration.network, len(first.plan.channels), first.plan.labels.heads)
        load_weights(network, folder / WEIGHTS)
        networks.append(network.to(device).eval())
    return Model(plan=first.plan, configuration=configuration, networks=tuple(networks), device=device)
