"""fit: everything from raw data to a cross-validated model, in one command that goes on from wherever it was stopped.

Under a budget the time that is left is shared out anew before each fold: what the validation of the folds still to
come will take is set aside, the rest is divided equally among their trainings. Validation is estimated from the folds
that were validated, and before the first of them by predicting one case with untrained weights. All seconds are those
of work; a night between two sessions costs nothing.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from math import ceil, comb
from pathlib import Path

import torch

from autoseg.bundle import ModelCard
from autoseg.checkpoint import checkpoints, read_progress
from autoseg.devices import choose_device, release
from autoseg.inference import count_views
from autoseg.layout import open_dataset
from autoseg.model import open_run
from autoseg.networks import build
from autoseg.pipeline.best import BestOptions, find_best
from autoseg.pipeline.cascade import refuse_incomplete
from autoseg.pipeline.crossval import cross_validate, validated
from autoseg.pipeline.data import plan_and_preprocess
from autoseg.pipeline.folds import Fold, train_side_by_side
from autoseg.pipeline.planning import PlanOptions
from autoseg.pipeline.recipe import CHOSEN, CPU_BUDGET_SECONDS, TrainOptions, batch_size, states, usual_budget
from autoseg.pipeline.train import train_fold
from autoseg.pipeline.validation import Unvalidated
from autoseg.records import SCHEMA_VERSION, AutosegError, load_json, record, refuse_unwritable, save_json
from autoseg.schema import Configuration, Plan, Run
from autoseg.settings import say_duration
from autoseg.splits import Splits, read_splits
from autoseg.store import read_case
from autoseg.workspace import Workspace, given

SPENT = "fit.json"
EVERY = "all"
"""In place of configurations: all of the plan, and then `find_best`."""
EXPORT_SHARE = 1.3
"""Validation also resamples, writes and scores: seconds of a case over those of its tiles alone."""
MERGE_SHARE = 0.02
"""Of the budget, set aside for merging the folds and fitting post-processing."""
LEAST_TRAINING_S = 20.0
"""A fold that can train for less than this is no fold: the budget is refused before anything is trained."""


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """The options of fit. `plan` and `train` are those of the verbs that it calls."""

    plan: PlanOptions
    train: TrainOptions
    configurations: tuple[str, ...] = ()
    folds: tuple[int, ...] = ()
    budget_seconds: float | None = None
    processes: int = 1
    """How many folds are trained side by side, each on a device of its own."""


@record
class Spent:
    """Seconds of work that no checkpoint holds: fit.json. Training seconds are in the folds' own checkpoints."""

    schema_version: int = SCHEMA_VERSION
    preparing: float = 0.0
    """Checking, planning, preprocessing, probing, predicting for a next stage."""
    validating: dict[str, float] = field(default_factory=dict)
    """`configuration/fold` -> seconds."""

    def with_fold(self, name: str, validation: float, seconds: float) -> "Spent":
        """After a fold: `validation` seconds of it in all, and `seconds` now without its training."""
        more = max(seconds - (validation - self.validating.get(name, 0.0)), 0.0)
        return replace(self, preparing=self.preparing + more, validating=self.validating | {name: validation})


@dataclass(frozen=True, kw_only=True)
class Task:
    """One fold of one configuration to train and validate."""

    configuration: Configuration
    fold: int
    folder: Path
    cases: int
    """How many are held out."""

    @property
    def name(self) -> str:
        """`configuration/fold`."""
        return f"{self.configuration.name}/{self.fold}"

    def trained_seconds(self) -> float:
        """Training time so far, over all sessions."""
        progressed = read_progress(self.folder)
        return 0.0 if progressed is None else progressed.seconds

    def begun(self) -> bool:
        """Whether its training has been started."""
        return (self.folder / "run.json").is_file()

    def own_budget(self) -> float | None:
        """The budget that its training was started with, None if it has not been started."""
        path = self.folder / "run.json"
        return load_json(Run, path).recipe.budget_seconds if path.is_file() else None


def refuse_run_of_another_plan(folder: Path, names: Sequence[str], options: FitOptions) -> None:
    """AutosegError if a configuration of `names` in the run `folder` was trained with a plan of another name."""
    own = options.plan.name
    for path in (path for name in names for path in sorted((folder / name).glob("fold_*/run.json"))):
        plan = load_json(Run, path).plan.name
        if plan != own and checkpoints(path.parent):
            free = "NAME" if (folder.parent / own).exists() else own
            raise AutosegError(
                f"{path.parent} was trained with the plan {plan!r}, and this is {own!r}; give what is trained now a "
                f"name of its own, --run {free}, or go on with that: --plan {plan}"
            )


def fit(workspace: Workspace, dataset_text: str, options: FitOptions) -> tuple[ModelCard, ...]:
    """Plan, preprocess, train and validate all folds, merge them, fit post-processing; one ModelCard a configuration.

    Does only what is not done yet; a fold that is there must have been trained with the same plan, recipe and data.
    A fold with cases that ended the process while they were predicted does not keep the others from being trained.
    Raises AutosegError for an unknown configuration or fold, for a budget that is too short (once the folds that are
    done are merged), and whatever the steps raise.
    """
    started, threads = time.monotonic(), torch.get_num_threads()
    name, raw = workspace.dataset(dataset_text)
    place = workspace.whole_run(name, options.train.run) / SPENT
    refuse_unwritable(place.parent)

    def choose(made: Plan) -> tuple[str, ...]:
        names = stages(made, options.configurations)
        refuse_run_of_another_plan(place.parent, names, options)  # before hours of preparing
        return names

    made = plan_and_preprocess(workspace, dataset_text, replace(options.plan, choose=choose))
    dataset = open_dataset(raw)
    splits = read_splits(workspace.prepared(name) / "splits.json", [case.id for case in dataset.cases])
    tasks = find_tasks(workspace, made, splits, options)
    spent = load_json(Spent, place) if place.is_file() else Spent()
    spent = replace(spent, preparing=spent.preparing + time.monotonic() - started)
    save_json(spent, place)

    say_total(tasks, options)
    short: AutosegError | None = None
    if options.processes > 1:
        try:
            spent = side_by_side(workspace, dataset_text, made, tasks, spent, options)
        except AutosegError as error:
            short = error
            tasks = tuple(task for task in tasks if validated(task.folder))
    for number, task in enumerate(tasks, 1):
        train = options.train
        if options.budget_seconds is not None:
            try:
                budget = share(workspace, made, tasks, task, spent, options)
            except AutosegError as error:
                short = error
                break
            train = replace(train, budget_seconds=budget)
        if not validated(task.folder):
            print(f"\n== fold {task.fold} of {task.configuration.name}, {number} of {len(tasks)} in all", flush=True)
            if options.budget_seconds is not None:
                say_share(budget, options.budget_seconds, tasks, spent)
        before, clock = task.trained_seconds(), time.monotonic()
        # Each fold chooses its threads anew, from all that there were at the start.
        torch.set_num_threads(threads)
        train = with_common_choices(train, tasks, task)
        try:
            train_fold(workspace, dataset_text, task.configuration.name, str(task.fold), train)
        except Unvalidated as error:  # the fold is trained, and the others can be
            short = error
            print(f"error: {error}", flush=True)
        seconds = time.monotonic() - clock - (task.trained_seconds() - before)
        spent = spent.with_fold(task.name, open_run(task.folder).validation_seconds, seconds)
        save_json(spent, place)

    cards = []
    for configuration in dict.fromkeys(task.configuration.name for task in tasks):
        folder = workspace.run(name, options.train.run, configuration)
        # All that are there, not only those that were asked for now: a part never takes the place of the whole.
        if folds := [fold for fold in sorted(folder.glob("fold_[0-9]*")) if validated(fold)]:
            cards.append(cross_validate(folds, dataset, options.plan.workers))
    if cards:
        print(fit_table(cards))
    if short is not None:
        raise short
    total = spent.preparing + sum(spent.validating.values()) + sum(task.trained_seconds() for task in tasks)
    named = given("--run", options.train.run)
    which: tuple[str, ...] = ("-c", best(cards, options.configurations))
    if EVERY in options.configurations and not options.folds:
        find_best(
            workspace,
            dataset_text,
            BestOptions(runs=(options.train.run,), device=options.train.device, workers=options.plan.workers),
        )
        which, named = (), ("--run", options.train.run)
    elif len(cards) > 1:
        print(f"To compare them and their ensembles: {workspace.command('find_best', '-d', name, *named)}")
    following = workspace.command("predict", "-i", "IN", "-o", "OUT", "-d", name, *which, *named)
    print(f"Work in all: {say_duration(total)}. Next: {following}")
    return tuple(cards)


def with_common_choices(train: TrainOptions, tasks: Sequence[Task], task: Task) -> TrainOptions:
    """`train` with what the first fold of the configuration that was begun has chosen for itself, unless stated.

    Folds of a budget differ a little in length: near the limit of a short run each would choose for itself.
    """
    alike = [other.folder for other in tasks if other.configuration.name == task.configuration.name]
    begun = [folder for folder in alike if (folder / "run.json").is_file()]
    if not begun or task.folder in begun:
        return train
    recipe = load_json(Run, begun[0] / "run.json").recipe
    common = {name: getattr(recipe, name) for group in CHOSEN if not states(train, group) for name in group}
    if "batch_size" in common:
        common["batch_size"] = batch_size(recipe, task.configuration)
    return replace(train, changes={**(train.changes or {}), **common})


def side_by_side(
    workspace: Workspace, dataset_text: str, plan: Plan, tasks: Sequence[Task], spent: Spent, options: FitOptions
) -> Spent:
    """Train the folds that are not done, one configuration after the other, several folds at a time.

    Returns what is spent then. Raises AutosegError for a budget that is too short, and for folds that failed.
    """
    for name in dict.fromkeys(task.configuration.name for task in tasks):
        todo = [task for task in tasks if task.configuration.name == name and not validated(task.folder)]
        train = options.train
        folds = []
        for task in todo:
            if options.budget_seconds is not None:
                train = replace(train, budget_seconds=share(workspace, plan, tasks, task, spent, options))
            folds.append(Fold(configuration=name, fold=task.fold, folder=task.folder, options=train))
        if folds:
            print(f"\n== {len(folds)} folds of {name}, {options.processes} at a time", flush=True)
            train_side_by_side(workspace, dataset_text, folds, options.processes)
        for task in todo:
            spent = spent.with_fold(task.name, open_run(task.folder).validation_seconds, 0.0)
    return spent


def stages(plan: Plan, asked: Sequence[str]) -> tuple[str, ...]:
    """The configurations to train, in order: those asked for (EVERY: all), each after its earlier stage.

    Without a choice: 3d_fullres, or 2d where there is no 3D configuration.
    """
    names = [entry.name for entry in plan.configurations]
    order: list[str] = []
    if EVERY in asked:
        asked = names
    for name in asked or (("3d_fullres",) if "3d_fullres" in names else ("2d",)):
        earlier = plan.configuration(name).previous_stage
        order += [name] if earlier is None else [earlier, name]
    return tuple(dict.fromkeys(order))


def find_tasks(workspace: Workspace, plan: Plan, splits: Splits, options: FitOptions) -> tuple[Task, ...]:
    """All folds of all configurations in the order of training; the earlier stage of a cascade needs every fold.

    Raises AutosegError for a fold that does not exist, and for a cascade if some case is held out in no fold.
    """
    names = stages(plan, options.configurations)
    complete = {plan.configuration(name).previous_stage for name in names}
    unknown = sorted(set(options.folds) - set(range(len(splits.folds))))
    if unknown:
        raise AutosegError(f"there is no fold {unknown[0]}; choose among 0 to {len(splits.folds) - 1}")
    every = tuple(range(len(splits.folds)))
    for name in names:
        if plan.configuration(name).previous_stage is not None:
            refuse_incomplete(name, splits.fold("all").train, splits)
    return tuple(
        Task(
            configuration=plan.configuration(name),
            fold=fold,
            folder=workspace.fold(plan.dataset, options.train.run, name, fold),
            cases=len(splits.folds[fold].val),
        )
        for name in names
        for fold in (every if name in complete else options.folds or every)
    )


def share(
    workspace: Workspace, plan: Plan, tasks: Sequence[Task], task: Task, spent: Spent, options: FitOptions
) -> float:
    """Seconds of training for `task`, the first that is not done; a fold that was started keeps what it was given.

    Raises AutosegError if that leaves no time worth training for.
    """
    assert options.budget_seconds is not None
    given = task.own_budget()
    if given is not None:
        return given
    if validated(task.folder):
        raise AutosegError(f"{task.folder} was trained by epochs; leave out --budget, or begin anew with --run NAME")
    todo = [other for other in tasks if not validated(other.folder)]
    per_case = {
        name: seconds_a_case(workspace, plan, tasks, name, spent, options)
        for name in dict.fromkeys(other.configuration.name for other in todo)
    }
    validation = sum(per_case[other.configuration.name] * other.cases for other in todo)
    # Folds side by side take the time of the rounds that there are of them.
    many = options.processes
    rounds = sum(ceil(count / many) for count in Counter(other.configuration.name for other in todo).values())
    validation *= rounds / len(todo)
    if EVERY in options.configurations:
        # Each pair is restored, written and scored as a configuration is, without its tiles.
        names = {other.configuration.name for other in tasks}
        cases = sum(other.cases for other in tasks) / len(names)
        validation += comb(len(names), 2) * cases * max(per_case.values()) * (1 - 1 / EXPORT_SHARE)
    used = spent.preparing
    for name in dict.fromkeys(other.configuration.name for other in tasks):
        own = [other for other in tasks if other.configuration.name == name]
        work = sum(spent.validating.get(other.name, 0.0) + other.trained_seconds() for other in own)
        used += work * ceil(len(own) / many) / len(own)
    left = options.budget_seconds * (1 - MERGE_SHARE) - used - validation
    if left / rounds < LEAST_TRAINING_S:
        needed = used + validation + rounds * max(LEAST_TRAINING_S, 60.0)
        raise AutosegError(
            f"--budget {say_duration(options.budget_seconds)} is too short: {say_duration(used)} are spent, validating "
            f"{len(todo)} folds takes about {say_duration(validation)}, which leaves {say_duration(max(left, 0))} for "
            f"their training; give at least {say_duration(needed / (1 - MERGE_SHARE))}, or fewer --folds"
        )
    return left / rounds


def seconds_a_case(
    workspace: Workspace, plan: Plan, tasks: Sequence[Task], name: str, spent: Spent, options: FitOptions
) -> float:
    """Seconds that validating one case of a configuration takes: as measured, else estimated from one tile."""
    measured = [t for t in tasks if t.configuration.name == name and t.name in spent.validating]
    if measured:
        return sum(spent.validating[t.name] for t in measured) / sum(t.cases for t in measured)
    configuration = plan.configuration(name)
    splits = load_json(Splits, workspace.prepared(plan.dataset) / "splits.json")
    folder = workspace.cases(plan.dataset, plan.name, configuration.prepared)
    case = read_case(folder, splits.folds[0].val[0])
    device = choose_device(options.train.device)
    network = build(configuration.network, plan.in_channels(configuration), plan.labels.heads).to(device).eval()
    tile = torch.zeros(1, plan.in_channels(configuration), *configuration.patch, device=device)
    with torch.inference_mode():
        network(tile).sum().item()  # the first time is slower
        clock = time.monotonic()
        network(tile).sum().item()
    view = time.monotonic() - clock
    del network, tile
    release(device)  # a fold may be about to train there
    return EXPORT_SHARE * view * count_views(case.labels.shape, configuration.patch, plan.flips(configuration).axes)


def say_total(tasks: Sequence[Task], options: FitOptions) -> None:
    """How long all training takes that goes by time though nobody gave one, as it does on a CPU."""
    # Where a GPU is named nothing need be known of it, and asking would take some of its memory.
    if options.budget_seconds is not None or options.train.device not in ("auto", "cpu"):
        return
    device = choose_device(options.train.device).type
    left = [
        budget - task.trained_seconds()
        for task in tasks
        if not validated(task.folder)
        and (budget := task.own_budget() if task.begun() else usual_budget(options.train, device)) is not None
    ]
    if (total := round(sum(max(seconds, 0) for seconds in left))) > 0:
        print(
            f"{len(left)} folds train for {say_duration(total)} in all, since on a CPU each trains for "
            f"{say_duration(CPU_BUDGET_SECONDS)} unless told otherwise; --budget 8h is for everything together",
            flush=True,
        )


def say_share(budget: float, total: float, tasks: Sequence[Task], spent: Spent) -> None:
    """What this fold gets, and when all will be over if the work goes on."""
    used = spent.preparing + sum(spent.validating.values()) + sum(other.trained_seconds() for other in tasks)
    end = datetime.now() + timedelta(seconds=max(total - used, 0))
    print(
        f"{say_duration(used)} of {say_duration(total)} are spent; this fold trains for {say_duration(budget)}; "
        f"everything is done about {end:%a %H:%M}",
        flush=True,
    )


def best(cards: Sequence[ModelCard], asked: Sequence[str] = ()) -> str:
    """The configuration of the highest cross-validated Dice, as predict will give it; of those asked for, if any were.

    The first stage of a cascade is trained along with it, on folds that may be others.
    """
    cards = [card for card in cards if card.configuration in asked] or cards
    return max(cards, key=lambda card: card.dice_postprocessed["foreground"] or 0.0).configuration


def fit_table(cards: Sequence[ModelCard]) -> str:
    """Cross-validated Dice of every configuration, as predicted and post-processed, in one table."""
    rows = [["configuration", "folds", "cases", "class", "Dice", "post-processed"]]
    for card in cards:
        for label, dice in card.dice.items():
            after = card.dice_postprocessed[label]
            cells = ["undefined" if value is None else f"{value:.4f}" for value in (dice, after)]
            rows.append([card.configuration, str(len(card.folds)), str(card.cases), label, *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\nCross-validation:\n" + "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
