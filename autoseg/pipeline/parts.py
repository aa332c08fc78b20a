"""The parts that a run trains with: network, patches, loss, and how this machine computes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from autoseg.agreement import Workload
from autoseg.augment import Augmentation, FixedCopies, make_augmentation
from autoseg.bundle import printable
from autoseg.checkpoint import checkpoints
from autoseg.computing import describe, fits, safe_base, settle, untuned
from autoseg.fingerprint import count_voxels, median_frequency_weights
from autoseg.losses import make_loss, takes_weights
from autoseg.networks import build, output_scales, output_weights
from autoseg.parallel import free_memory
from autoseg.pipeline.recipe import batch_size
from autoseg.placement import USUAL, Placement
from autoseg.records import AutosegError, atomic_write
from autoseg.sampling import PreparedCases, Prior, Sampler, Stream, generator
from autoseg.schema import Configuration, Fingerprint, Preparation, Run, Tuning
from autoseg.step import Parts, workload
from autoseg.store import StoredArray, read_case
from autoseg.team import ALONE, Team
from autoseg.transfer import differences, open_source, tensor_table, transfer
from autoseg.tuning import tune

PRETRAINED = "pretrained.txt"
"""In a fold folder: what became of every tensor of the network that training began with."""
MOST_SHOWN = 20


def weigh_classes(run: Run, prepared: Path, fingerprint: Fingerprint) -> tuple[float, ...] | None:
    """Weights of the classes by median frequency, background first; None if no voxels were counted.

    The fingerprint counts before a plan crops and thins. Where one does, what it leaves is counted, as prepared for
    this fold: a crop takes most of its voxels from the background, and slices that become one hold the classes of all.
    """
    plan, facts = run.plan, fingerprint.cases
    if replace(plan.preparation, function=None) != Preparation() and takes_weights(run.recipe.loss):
        known = {*run.cases.train, *run.cases.val}
        facts = tuple(
            replace(case, voxels=count_voxels(np.asarray(read_case(prepared, case.case).labels[...]), plan.labels))
            for case in facts
            if case.case in known
        )
    return median_frequency_weights(replace(fingerprint, cases=facts), plan.labels)


def make_parts(
    run: Run,
    configuration: Configuration,
    prepared: Path,
    folder: Path,
    device: torch.device,
    priors: Mapping[str, Path] | None,
    annotated: Mapping[str, Sequence[str]],
    team: Team = ALONE,
    neighbours: int = 1,
    class_weights: tuple[float, ...] | None = None,
) -> Parts:
    """Everything the training loop needs, with the network's weights drawn from the run's seed.

    priors: case -> label map of the stage before, in a cascade. annotated: case -> classes, where not all were.
    neighbours: see `TrainOptions`. class_weights: background first, for losses that take them from the fingerprint.
    """
    plan, recipe = run.plan, run.recipe
    torch.manual_seed(int(generator(recipe.seed, Stream.WEIGHTS, 0).integers(2**62)))
    network = build(configuration.network, plan.in_channels(configuration), plan.labels.heads)
    asks = getattr(network, "takes_position", False)
    if asks and configuration.mirror_axes is None:
        raise AutosegError(
            f"the network {configuration.network.name} learns what differs from place to place, and in a mirror image "
            "places differ otherwise; say in the plan that there are none, with plan_and_preprocess --set "
            f"'configurations.{configuration.name}.mirror_axes=[]', or name the axes along which there may be some"
        )
    # A checkpoint holds what became of them.
    if run.pretrained is not None and not checkpoints(folder):
        begin_with(network, run, configuration, folder)
    cases = PreparedCases(prepared, memory=free_memory() // (4 * team.size * neighbours))
    masked = tuple(channel.masked for channel in plan.channels)
    every = {*run.cases.train, *run.cases.val}
    flags = {name: plan.labels.flags(annotated.get(name)) for name in every} if every & set(annotated) else None

    def prior(corrupted: bool) -> Prior | None:
        if priors is None:
            return None
        return Prior(
            maps=lambda name: StoredArray(priors[name]), foreground=tuple(plan.labels.foreground), corrupted=corrupted
        )

    def augmented(name: str) -> Augmentation:
        return make_augmentation(
            name,
            patch=configuration.patch,
            dimension=configuration.dimension,
            masked=masked,
            flips=plan.flips(configuration),
            context=configuration.context,
        )

    def sampler(
        names: Iterable[str], stream: Stream, augmentation: Augmentation, corrupted: bool, placement: Placement = USUAL
    ) -> Sampler:
        return Sampler(
            cases=cases,
            case_names=tuple(names),
            patch=configuration.patch,
            batch_size=batch_size(recipe, configuration),
            foreground_fraction=recipe.foreground_fraction,
            augmentation=augmentation,
            seed=recipe.seed,
            stream=stream,
            prior=prior(corrupted),
            annotated=flags,
            positions=asks,
            placement=placement,
            team=team,
        )

    plain, changed = augmented("none"), augmented(recipe.augmentation)
    if recipe.offline_copies:
        changed = FixedCopies(augmentation=changed, plain=plain, copies=recipe.offline_copies, seed=recipe.seed)
    return Parts(
        network=network,
        training=sampler(
            run.cases.train, Stream.TRAINING, changed, corrupted=True, placement=Placement.of(recipe, plan.labels)
        ),
        validation=sampler(run.cases.val, Stream.VALIDATION, plain, corrupted=False),
        recipe=recipe,
        labels=plan.labels,
        scales=output_scales(network, configuration.network),
        output_weights=output_weights(network),
        loss=make_loss(
            recipe.loss,
            labels=plan.labels,
            batch_dice=configuration.batch_dice,
            weights=class_weights,
            dimension=configuration.dimension,
        ),
        device=device,
        folder=folder,
        tuning=safe_base(device),
        team=team,
    )


def begin_with(network: torch.nn.Module, run: Run, configuration: Configuration, folder: Path) -> None:
    """Fill the network with what fits of `run.pretrained`; says what, and writes every tensor to PRETRAINED."""
    assert run.pretrained is not None
    source = open_source(Path(run.pretrained), configuration.name)
    begin, lines = transfer(network, run.plan, configuration, source)
    network.load_state_dict(begin)
    counts = ", ".join(f"{[line.what for line in lines].count(kind)} {kind}" for kind in ("reused", "adapted", "new"))
    head = f"Begins with {source.words}\nTensors: {counts}\n"
    for odd in differences(run.plan, configuration, source):
        head += f"Prepared differently: {odd}; plan_and_preprocess --like takes it over\n"
    with atomic_write(folder / PRETRAINED) as file:
        file.write(head + tensor_table(lines))
    changed = [line for line in lines if line.what != "reused"]
    shown = tensor_table(changed[:MOST_SHOWN]) if changed else ""
    print(f"{printable(head + shown)}All tensors: {folder / PRETRAINED}", flush=True)


def choose_tuning(run: Run, parts: Parts, configuration: Configuration) -> Tuning:
    """The run's own choice if it has one that fits this machine, else a new one; printed, and settled here."""
    if run.tuning is not None and fits(run.tuning, parts.device):
        settle(run.tuning)
        print(f"Computing as before: {describe(run.tuning)}", flush=True)
        return run.tuning
    recipe = run.recipe
    if not recipe.tune:
        chosen = untuned(parts.device, "tune=false")
    else:
        work = probed(run, parts, configuration)
        steps = recipe.epochs * recipe.steps_per_epoch
        chosen = tune(work, seconds=recipe.budget_seconds, steps=None if recipe.budget_seconds else steps)
    again = "" if run.tuning is None else f" (probed again, since it was chosen on {run.tuning.device})"
    print(f"Computing{again}: {describe(chosen)}", flush=True)
    return chosen


def probed(run: Run, parts: Parts, configuration: Configuration) -> Workload:
    """What probes time: the step of the run."""
    fresh = partial(build, configuration.network, run.plan.in_channels(configuration), run.plan.labels.heads)
    return workload(parts, fresh)
