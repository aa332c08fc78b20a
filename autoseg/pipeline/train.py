"""train: one fold from prepared cases to validated weights."""

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch

import autoseg
from autoseg.bad_steps import BAD_STEPS
from autoseg.checkpoint import checkpoints
from autoseg.crops import describe
from autoseg.devices import choose_device
from autoseg.evaluation import Summary, table
from autoseg.evaluation.plots import Curves
from autoseg.history import METRICS
from autoseg.layout import open_dataset
from autoseg.merging import seen_as
from autoseg.model import open_run
from autoseg.networks import NETWORKS, unnormed_width
from autoseg.pipeline.cascade import find_priors, next_stages
from autoseg.pipeline.changes import refuse_changed
from autoseg.pipeline.crossval import SUMMARY, all_folds, cross_validate, validated
from autoseg.pipeline.idle import refuse_frozen
from autoseg.pipeline.orders import give_order, refuse_small_batch
from autoseg.pipeline.parts import PRETRAINED, choose_tuning, make_parts, probed, weigh_classes
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
    refuse_without_effect,
    say_large_batch,
    say_other_network,
    with_length,
)
from autoseg.pipeline.validation import begin_again, forget_later, forget_validation, validate_fold
from autoseg.planners import difference
from autoseg.planners.edits import differing
from autoseg.rates import early_stop
from autoseg.records import AutosegError, load_json, remove_leftovers, save_json, sole_writer, to_json
from autoseg.schedule import is_over
from autoseg.schema import Configuration, Fingerprint, Fold, Plan, Run
from autoseg.signals import Stopped, heeded
from autoseg.splits import read_splits
from autoseg.step import Parts
from autoseg.supervise import JOURNAL
from autoseg.team import ALONE, Team
from autoseg.training import train
from autoseg.tuning import time_step
from autoseg.workspace import Workspace, given

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
    if options.validate_only:
        refuse_without_effect(options)
    fold = parse_fold(fold_text)
    name, raw_folder = workspace.dataset(dataset_text)
    dataset = open_dataset(raw_folder)
    plan_path = workspace.plan_folder(name, options.plan) / "plan.json"
    if not plan_path.is_file():
        there = ", ".join(sorted(path.parent.name for path in workspace.prepared(name).glob("*/plan.json")))
        # Plans of a network are called as it, and `--plan segnet` would plan the network of the preset.
        wanted = ("--network", options.plan) if options.plan in NETWORKS else given("--plan", options.plan)
        raise AutosegError(
            f"no plan {options.plan!r} for {name}{there and f', only {there}'}; run: "
            + workspace.command("plan_and_preprocess", "-d", dataset_text, *wanted)
        )
    plan = load_json(Plan, plan_path)
    configuration = plan.configuration(configuration_name)
    named = "" if options.plan == "default" else f" --plan {options.plan}"
    again = f"plan again without them: autoseg plan_and_preprocess -d {dataset_text}{named}{workspace.option}"
    divided = workspace.prepared(name) / "splits.json"
    splits = read_splits(divided, [case.id for case in dataset.cases], cure=again)
    cases = splits.fold(fold)
    folder = workspace.fold(name, options.run, configuration_name, fold)
    prepared = workspace.cases(name, options.plan, configuration.prepared)
    fingerprint = load_json(Fingerprint, workspace.prepared(name) / "fingerprint.json")
    cure = workspace.command("plan_and_preprocess", "-d", dataset_text, *given("--plan", plan.name))
    fingerprint = seen_as(fingerprint, dataset.labels, plan.labels)
    refuse_unprepared(prepared, cases, plan, configuration, fingerprint, cure)
    refuse_changed(workspace, name, dataset, cases, fingerprint, cure)
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
    say_other_network(options, configuration.network.name, f"{dataset_text}{workspace.option}", plan.request)
    with sole_writer(folder):
        remove_leftovers(folder, ("run.json", METRICS, "progress.png", PRETRAINED))
        run = agree_with_existing(folder, run, options)
        if run.finished is None and not options.validate_only:
            refuse_small_batch(configuration_name, batch_size(run.recipe, configuration), team)
        priors = find_priors(workspace, plan, configuration, options.run, cases, splits, device)
        if options.validate_only:
            run = replace(open_run(folder), validation_seconds=0.0)
            begin_again(folder)
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
                weigh_classes(run, prepared, fingerprint),
            )
        else:
            print(
                f"{folder} is trained already ({describe_length(run.recipe)}, finished {run.finished}"
                f"{'' if run.ended is None else f', ended early: {run.ended}'}); to train longer give more --epochs, "
                "or --extend 1h"
            )
        if validated(folder) and not options.validate_only:
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
    refuse_nothing_to_learn(run, parts)
    budget = run.recipe.budget_seconds
    if run.tuning is None and run.recipe.tune and run.recipe.batch_size is None and budget is not None:  # it begins
        seconds = time_step(probed(run, parts, configuration), budget)
        run = replace(run, recipe=for_time(run.recipe, configuration.batch_size, team.size, seconds))
        batch = batch_size(run.recipe, configuration)
        training, validation = (replace(each, batch_size=batch) for each in (parts.training, parts.validation))
        parts = replace(parts, recipe=run.recipe, training=training, validation=validation)
    say_start(run, parts)
    say_large_batch(run.recipe, configuration)
    tuning = choose_tuning(run, parts, configuration)
    if run.tuning is None:
        refuse_frozen(run.recipe, tuning.seconds_a_step)
        width = unnormed_width(parts.network)
        chosen = for_length(run.recipe, options, device.type, tuning.seconds_a_step, width=width)
        run = replace(run, recipe=chosen)
    parts, run = replace(parts, tuning=tuning, recipe=run.recipe), replace(run, tuning=tuning)
    save_json(run, folder / "run.json")
    # The leader's weights are given to all: nobody else needs those to begin with.
    order = replace(run, pretrained=None)
    JOURNAL.stage(f"while fold {run.fold} of {run.configuration} trained")
    give_order("train", order, folder, prepared, priors, team, annotated=annotated, class_weights=class_weights)
    curves = Curves(path=folder / "progress.png")
    try:
        with heeded() as requests:
            done = train(parts, curves, requests)
    except torch.OutOfMemoryError as error:
        raise AutosegError(
            f"{device} has no memory for batches of {parts.training.batch_size} patches ({error}); make a new run with "
            f"a smaller --set batch_size={parts.training.batch_size // 2 or 1}, or a plan for less --gpu-memory"
        ) from error
    except Stopped as stop:
        extended = "" if options.extend_seconds is None else ", without --extend,"
        print(f"{stop.by.name}: stopped. The same command{extended} goes on from the last checkpoint in {folder}")
        raise
    finally:
        curves.finish()
    JOURNAL.stage("")
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


def refuse_nothing_to_learn(run: Run, parts: Parts) -> None:
    """AutosegError if no prepared training case has any foreground."""
    if not parts.training.holding:
        cure = "give folds in which some do (splits.json in the raw dataset folder), or train `all`"
        if crops := run.plan.preparation.crops:
            cut = ", ".join(map(describe, crops))
            cure = f"its crops may cut all of it away ({cut}): plan with others, or {cure}"
        raise AutosegError(
            f"no training case of fold {run.fold} has any foreground as the plan prepares it, so there is nothing to "
            f"learn: {cure}"
        )


def agree_with_existing(folder: Path, run: Run, options: TrainOptions) -> Run:
    """The run that is in `folder` already, if it is the same one but for its length; `run` itself if there is none.

    One that ended before its first checkpoint holds nothing: another may take its place. A longer one becomes
    unfinished again. Raises AutosegError if the plan, the rest of the recipe or the data differ: a run is never
    silently mixed of two.
    """
    path = folder / "run.json"
    if not path.is_file():
        if options.validate_only:
            raise AutosegError(f"{folder} holds no trained fold to validate; train it first, without --validate-only")
        return replace(run, recipe=for_new_run(run.recipe, options, run.device))
    old = load_json(Run, path)
    recipe = old.recipe if options.validate_only else make_recipe(options, old.recipe)
    same_length = replace(recipe, **{name: getattr(old.recipe, name) for name in LENGTH})
    odd = [
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
    if odd and not options.validate_only and old.finished is None and not checkpoints(folder):
        print(f"{folder} has no checkpoint yet of another {' and '.join(odd)}: begun anew", flush=True)
        (folder / BAD_STEPS).unlink(missing_ok=True)
        return replace(run, recipe=for_new_run(run.recipe, options, run.device))
    if odd:
        fields = {
            "plan": difference(*(one.plan.concerning(run.configuration) for one in (old, run))),
            "recipe": differing(old.recipe, same_length),
        }
        shown = "; ".join(f"{what}: {_shown(rows)}" for what, rows in fields.items() if rows)
        raise AutosegError(
            f"{folder} was trained with another {' and '.join(odd)}{f' ({shown})' if shown else ''}; give the new "
            "run a name of its own with --run NAME, repeat the options of the old one to go on with it, or delete the "
            "folder"
        )
    return old if options.validate_only else with_length(old, recipe, options, folder)


def _shown(rows: Sequence[tuple[str, str, str]]) -> str:
    """The first of the fields that differ, with the value there and the present one."""
    first = ", ".join(f"{field} {value}, now {present}" for field, value, present in rows[:FIELDS_SHOWN])
    return first + (" and more" if len(rows) > FIELDS_SHOWN else "")


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
