"""train on several GPUs: one process leads and does what `train_fold` does, the others train and predict with it."""

from dataclasses import replace
from pathlib import Path

import torch

from autoseg.computing import settle
from autoseg.devices import choose_device
from autoseg.pipeline.cascade import next_stages
from autoseg.pipeline.orders import Order
from autoseg.pipeline.parts import make_parts
from autoseg.pipeline.recipe import TrainOptions
from autoseg.pipeline.train import train_fold
from autoseg.pipeline.validation import predict_held_out
from autoseg.records import from_json
from autoseg.signals import heeded
from autoseg.team import Team, assembled
from autoseg.training import train
from autoseg.workspace import Workspace


def train_together(
    workspace: Workspace, dataset_text: str, configuration: str, fold: str, options: TrainOptions, processes: int
) -> None:
    """`train_fold` by so many processes, one on each GPU, which share every batch.

    Under torchrun its processes are taken, whatever their number here. Raises what `train_fold` and `assembled` raise.
    """
    with assembled(processes, options.device) as (team, device):
        if team.leads:
            train_fold(workspace, dataset_text, configuration, fold, replace(options, device=device), team)
        else:
            follow(workspace, team, choose_device(device))


def follow(workspace: Workspace, team: Team, device: torch.device) -> None:
    """Do what the leader orders, until it says that nothing is left."""
    while text := team.tell():
        order = from_json(Order, text)
        run, folder, prepared = order.run, Path(order.folder), Path(order.prepared)
        configuration = run.plan.configuration(run.configuration)
        priors = None if order.priors is None else {name: Path(path) for name, path in order.priors.items()}
        if order.work == "train":
            assert run.tuning is not None
            settle(run.tuning)
            parts = make_parts(
                run,
                configuration,
                prepared,
                folder,
                device,
                priors,
                order.annotated,
                team,
                class_weights=order.class_weights,
            )
            with heeded() as requests:
                train(replace(parts, tuning=run.tuning), requests=requests)
        else:
            later = next_stages(workspace, run.plan, configuration)
            predict_held_out(folder, order.ending, prepared, device, priors, later, team)
