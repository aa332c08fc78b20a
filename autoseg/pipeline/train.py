"""train: one fold from prepared cases to validated weights."""

import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch

import autoseg
from autoseg.agreement import Workload
from autoseg.augment import Augmentation, FixedCopies, make_augmentation
from autoseg.bundle import printable
from autoseg.checkpoint import checkpoints
from autoseg.computing import describe, fits, safe_base, settle, untuned
from autoseg.devices import choose_device
from autoseg.evaluation import Summary, table
from autoseg.evaluation.plots import training_curves
from autoseg.fingerprint import median_frequency_weights
from autoseg.history import METRICS
from autoseg.layout import open_dataset
from autoseg.losses import make_loss
from autoseg.merging import seen_as
from autoseg.model import open_run
from autoseg.networks import build, output_scales, output_weights
from autoseg.parallel import free_memory
from autoseg.pipeline.cascade import find_priors, next_stages
from autoseg.pipeline.crossval import SUMMARY, all_folds, cross_validate, validated
from autoseg.pipeline.orders import give_order, refuse_small_batch
from autoseg.pipeline.preparing import unprepared
from autoseg.pipeline.recipe import (
    LENGTH,
    TrainOptions,
    batch_size,
    describe_length,
    for_length,
    for_new_run,
    for_time,
    make_recipe,
    say_other_network,
    with_length,
)
from autoseg.pipeline.validation import forget_later, forget_validation, validate_fold
from autoseg.placement import USUAL, Placement
from autoseg.planners import difference
from autoseg.rates import early_stop
from autoseg.records import AutosegError, atomic_write, load_json, remove_leftovers, save_json, sole_writer, to_json
from autoseg.sampling import PreparedCases, Prior, Sampler, Stream, generator
from autoseg.schedule import is_over
from autoseg.schema import Configuration, Fingerprint, Fold, Plan, Run, Tuning
from autoseg.signals import Stopped, heeded
from autoseg.splits import read_splits
from autoseg.store import StoredArray
from autoseg.team import ALONE, Team
from autoseg.training import Parts, train, workload
from autoseg.transfer import differences, open_source, tensor_table, transfer
from autoseg.tuning import time_step, tune
from autoseg.workspace import Workspace, given

PRETRAINED = "pretrained.txt"
"""In a fold folder: what became of every tensor of the network that training began with."""
MOST_SHOWN = 20
FIELDS_SHOWN = 3


def parse_fold(text: str) -> int | Literal["all"]:
    """`0` to `4`, or `all`."""
    if text == "all":
        return "all"
    if text.isdecimal():
        return int(text)
    raise AutosegError(f"fold {text!r}: give a number, or `all` to train on every case")


def train_fold(
    workspace: Workspace,
    dataset_text: str,
    configuration_name: str,
    fold_text: str,
    options: TrainOptions,
    team: Team = ALONE,
) -> Summary:
    """Train one fold, or go on with it, then predict and score its held-out cases. Returns the scores.

    team: the processes that share the work, of which this one leads.
    Signals to save or to end are heeded while it trains; the latter raise Stopped. Raises AutosegError when something
    is missing (naming the command that makes it) or the run has another recipe.
    """
    fold = parse_fold(fold_text)
    name, raw_folder = workspace.dataset(dataset_text)
    dataset = open_dataset(raw_folder)
    plan_path = workspace.plan_folder(name, options.plan) / "plan.json"
    if not plan_path.is_file():
        raise AutosegError(
            f"no plan {options.plan!r} for {name}; run: "
            + workspace.command("plan_and_preprocess", "-d", dataset_text, *given("--plan", options.plan))
        )
    plan = load_json(Plan, plan_path)
    configuration = plan.configuration(configuration_name)
    splits = read_splits(workspace.prepared(name) / "splits.json", [case.id for case in dataset.cases])
    cases = splits.fold(fold)
    folder = workspace.fold(name, options.run, configuration_name, fold)
    prepared = workspace.cases(name, options.plan, configuration.prepared)
    fingerprint = load_json(Fingerprint, workspace.prepared(name) / "fingerprint.json")
    fingerprint = seen_as(fingerprint, dataset.labels, plan.labels)
    cure = workspace.command("plan_and_preprocess", "-d", dataset_text, *given("--plan", plan.name))
    refuse_unprepared(prepared, cases, plan, configuration, fingerprint, cure)
    refuse_never_annotated(fold, cases, plan, fingerprint)
    device = choose_device(options.device)

    run = Run(
        autoseg_version=autoseg.__version__,
        versions={package: version(package) for package in ("torch", "numpy", "simpleitk")}
        | {"python": platform.python_version()},
        dataset=name,
        configuration=configuration_name,
        fold=fold,
        cases=cases,
        plan=plan,
        recipe=make_recipe(options),
        data_hash=fingerprint.data_hash(),
        pretrained=None if options.pretrained is None else str(options.pretrained.absolute()),
        device=str(device),
        started=now(),
    )
    later = next_stages(workspace, plan, configuration)
    say_other_network(options, configuration.network.name)
    with sole_writer(folder):
        remove_leftovers(folder, ("run.json", METRICS, "progress.png", PRETRAINED))
        run = agree_with_existing(folder, run, options)
        if run.finished is None and not options.validate_only:
            refuse_small_batch(configuration_name, batch_size(run.recipe, configuration), team)
        priors = find_priors(workspace, plan, configuration, options.run, cases, splits, device)
        if options.validate_only:
            run = replace(open_run(folder), validation_seconds=0.0)
            forget_validation(folder)
            save_json(run, folder / "run.json")
        elif run.finished is None:
            run = train_to_the_end(
                folder,
                run,
                configuration,
                prepared,
                device,
                options,
                priors,
                fingerprint.annotated(),
                team,
                median_frequency_weights(fingerprint, plan.labels),
            )
        else:
            print(
                f"{folder} is trained already ({describe_length(run.recipe)}, finished {run.finished}"
                f"{'' if run.ended is None else f', ended early: {run.ended}'}); to train longer give more --epochs, "
                "or --extend 1h"
            )
        if validated(folder):
            summary = load_json(Summary, folder / "validation" / SUMMARY)
            print(table(summary))
        else:
            started = time.monotonic()
            summary = validate_fold(folder, dataset, prepared, device, priors, later, team)
            seconds = run.validation_seconds + time.monotonic() - started
            save_json(replace(open_run(folder), validation_seconds=seconds), folder / "run.json")
        if (folds := all_folds(folder.parent, splits)) is not None:
            with sole_writer(folder.parent):  # two folds that end at once: the second finds it done
                cross_validate(folds, dataset)
    team.tell("")
    return summary


def train_to_the_end(
    folder: Path,
    run: Run,
    configuration: Configuration,
    prepared: Path,
    device: torch.device,
    options: TrainOptions,
    priors: Mapping[str, Path] | None,
    annotated: Mapping[str, Sequence[str]],
    team: Team = ALONE,
    class_weights: tuple[float, ...] | None = None,
) -> Run:
    """Train what is left of `run`; returns it finished. Raises Stopped when a signal asked for the end."""
    parts = make_parts(
        run, configuration, prepared, folder, device, priors, annotated, team, options.neighbours, class_weights
    )
    budget = run.recipe.budget_seconds
    if run.tuning is None and run.recipe.tune and run.recipe.batch_size is None and budget is not None:  # it begins
        seconds = time_step(probed(run, parts, configuration), budget)
        run = replace(run, recipe=for_time(run.recipe, configuration.batch_size, team.size, seconds))
        batch = batch_size(run.recipe, configuration)
        training, validation = (replace(each, batch_size=batch) for each in (parts.training, parts.validation))
        parts = replace(parts, recipe=run.recipe, training=training, validation=validation)
    say_start(run, parts)
    tuning = choose_tuning(run, parts, configuration)
    if run.tuning is None:
        run = replace(run, recipe=for_length(run.recipe, options, device.type, tuning.seconds_a_step))
    parts, run = replace(parts, tuning=tuning, recipe=run.recipe), replace(run, tuning=tuning)
    save_json(run, folder / "run.json")
    # The leader's weights are given to all: nobody else needs those to begin with.
    order = replace(run, pretrained=None)
    give_order("train", order, folder, prepared, priors, team, annotated=annotated, class_weights=class_weights)
    try:
        with heeded() as requests:
            done = train(parts, lambda lines: training_curves(lines, folder / "progress.png"), requests)
    except Stopped as stop:
        extended = "" if options.extend_seconds is None else ", without --extend,"
        print(f"{stop.by.name}: stopped. The same command{extended} goes on from the last checkpoint in {folder}")
        raise
    forget_validation(folder)
    if run.fold != "all":
        forget_later(folder, run.configuration)
    over = is_over(run.recipe, step=done.step, seconds=done.seconds, recent=(), closing=0.0)
    ended = None if over else early_stop(run.recipe, done.moment(run.recipe))
    run = replace(run, finished=now(), ended=ended, validation_seconds=0.0)
    save_json(run, folder / "run.json")
    return run


def now() -> str:
    """The time as ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def refuse_unprepared(
    prepared: Path, cases: Fold, plan: Plan, configuration: Configuration, fingerprint: Fingerprint, cure: str
) -> None:
    """AutosegError if a case of the fold has not been prepared, or not as this plan says. cure: the command for it."""
    if missing := unprepared(prepared, (*cases.train, *cases.val), plan, configuration, fingerprint):
        raise AutosegError(
            f"{len(missing)} cases are not prepared in {prepared} as the plan says, for example {missing[0]}; "
            f"run: {cure}"
        )


def refuse_never_annotated(fold: int | str, cases: Fold, plan: Plan, fingerprint: Fingerprint) -> None:
    """AutosegError if some class was annotated in no training case of the fold: it would not be learnt at all."""
    annotated = fingerprint.annotated()
    never = set(plan.labels.names[1:]).intersection(
        *(set(plan.labels.names[1:]) - set(annotated.get(case, plan.labels.names)) for case in cases.train)
    )
    if never:
        raise AutosegError(
            f"fold {fold} trains on no case in which {', '.join(sorted(never))} was annotated; give folds of your own "
            "(splits.json in the raw dataset folder) in which every side has such cases, or train `all`"
        )


def agree_with_existing(folder: Path, run: Run, options: TrainOptions) -> Run:
    """The run that is in `folder` already, if it is the same one but for its length; `run` itself if there is none.

    A longer one becomes unfinished again. Raises AutosegError if the plan, the rest of the recipe or the data differ:
    a run is never silently mixed of two.
    """
    path = folder / "run.json"
    if not path.is_file():
        if options.validate_only:
            raise AutosegError(f"{folder} holds no trained fold to validate; train it first, without --validate-only")
        return replace(run, recipe=for_new_run(run.recipe, options, run.device))
    old = load_json(Run, path)
    recipe = old.recipe if options.validate_only else make_recipe(options, old.recipe)
    same_length = replace(recipe, **{name: getattr(old.recipe, name) for name in LENGTH})
    differing = [
        what
        for what, a, b in (
            ("plan", *(to_json(one.plan.concerning(run.configuration)) for one in (old, run))),
            ("recipe", to_json(old.recipe), to_json(same_length)),
            ("data", old.data_hash, run.data_hash),
            ("cases of the fold", to_json(old.cases), to_json(run.cases)),
            ("start (--pretrained)", old.pretrained, old.pretrained if options.validate_only else run.pretrained),
        )
        if a != b
    ]
    if differing:
        rows = difference(*(one.plan.concerning(run.configuration) for one in (old, run)))
        shown = ", ".join(f"{field} {value}, now {present}" for field, value, present in rows[:FIELDS_SHOWN])
        fields = f" (plan: {shown}{' and more' if len(rows) > FIELDS_SHOWN else ''})" if rows else ""
        raise AutosegError(
            f"{folder} was trained with another {' and '.join(differing)}{fields}; give the new run a name of its "
            "own with --run NAME, repeat the options of the old one to go on with it, or delete the folder"
        )
    return old if options.validate_only else with_length(old, recipe, options, folder)


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


def say_start(run: Run, parts: Parts) -> None:
    """What is about to be trained, in a few lines."""
    weights = sum(p.numel() for p in parts.network.parameters())
    recipe = run.recipe
    shared = "" if parts.team.size == 1 else f", shared by {parts.team.size} processes"
    print(
        f"{run.dataset} {run.configuration} fold {run.fold}: {len(run.cases.train)} training cases, "
        f"{len(run.cases.val)} validation cases\n"
        f"{parts.training.batch_size} patches of {' x '.join(map(str, parts.training.patch))} a step{shared}, "
        f"{describe_length(recipe)}, seed {recipe.seed}\n"
        f"{weights:,} weights, {parts.device}, {torch.get_num_threads()} threads\n{parts.folder}",
        flush=True,
    )
