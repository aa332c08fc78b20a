"""train: one fold from prepared cases to validated weights."""

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import autoseg
from autoseg import settings
from autoseg.augment import make_augmentation
from autoseg.checkpoint import load_weights
from autoseg.devices import choose_device, keep_freed_memory
from autoseg.evaluation import Summary, evaluate_pairs, save_summary, table
from autoseg.evaluation.plots import training_curves
from autoseg.layout import Dataset, open_dataset
from autoseg.losses import LOSSES
from autoseg.model import open_model, open_run
from autoseg.networks import build
from autoseg.parallel import free_memory
from autoseg.pipeline.predict import POSTPROCESSING, export
from autoseg.postprocess import PostProcessing, fit
from autoseg.progress import Progress
from autoseg.readers import read_labels
from autoseg.records import AutosegError, load_json, save_json, to_json
from autoseg.sampling import PreparedCases, Sampler, Stream, generator
from autoseg.schema import Configuration, Fingerprint, Fold, Plan, Recipe, Run
from autoseg.splits import read_splits
from autoseg.store import list_cases
from autoseg.training import WEIGHTS, Parts, train
from autoseg.workspace import Workspace

RECIPE_OPTIONS = {"epochs": "--epochs", "seed": "--seed"}
"""Recipe fields that have an option of their own."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The options of train."""

    plan: str = "default"
    run: str = "default"
    epochs: int | None = None
    seed: int | None = None
    device: str = "auto"
    pretrained: Path | None = None
    validate_only: bool = False
    recipe: Path | None = None
    changes: Mapping[str, Any] | None = None


def make_recipe(options: TrainOptions) -> Recipe:
    """Defaults, then the TOML file, then --set, then the options. Raises AutosegError for what is not possible."""
    recipe = Recipe()
    if options.recipe is not None:
        recipe = settings.change(recipe, settings.read_toml(options.recipe), where=str(options.recipe))
    recipe = settings.change(recipe, options.changes or {}, taken=RECIPE_OPTIONS)
    given = {"epochs": options.epochs, "seed": options.seed}
    recipe = settings.change(recipe, {k: v for k, v in given.items() if v is not None}, where="option")
    if recipe.loss not in LOSSES:
        raise AutosegError(f"unknown loss {recipe.loss!r}; choose one of {', '.join(LOSSES)}")
    return recipe


def parse_fold(text: str) -> int | Literal["all"]:
    """`0` to `4`, or `all`."""
    if text == "all":
        return "all"
    if text.isdigit():
        return int(text)
    raise AutosegError(f"fold {text!r}: give a number, or `all` to train on every case")


def train_fold(
    workspace: Workspace, dataset_text: str, configuration_name: str, fold_text: str, options: TrainOptions
) -> Summary:
    """Train one fold, or go on with it, then predict and score its held-out cases. Returns the scores.

    Raises AutosegError when something is missing (naming the command that makes it) or the run has another recipe.
    """
    fold = parse_fold(fold_text)
    name, raw_folder = workspace.dataset(dataset_text)
    dataset = open_dataset(raw_folder)
    plan_path = workspace.plan_folder(name, options.plan) / "plan.json"
    if not plan_path.is_file():
        raise AutosegError(f"no plan {options.plan!r} for {name}; run: autoseg plan_and_preprocess -d {dataset_text}")
    plan = load_json(Plan, plan_path)
    configuration = plan.configuration(configuration_name)
    if configuration.previous_stage is not None:
        raise AutosegError(
            f"{configuration_name} needs predictions of {configuration.previous_stage}, and training a cascade is not "
            "supported yet; train 3d_fullres instead"
        )
    splits = read_splits(workspace.prepared(name) / "splits.json", [case.id for case in dataset.cases])
    cases = splits.fold(fold)
    folder = workspace.fold(name, options.run, configuration_name, fold)
    prepared = workspace.cases(name, options.plan, configuration.prepared)
    refuse_unprepared(prepared, cases, dataset_text, options.plan)
    device = choose_device(options.device)
    keep_freed_memory()

    fingerprint = load_json(Fingerprint, workspace.prepared(name) / "fingerprint.json")
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
    run = agree_with_existing(folder, run, options)
    if not options.validate_only and run.finished is None:
        parts = make_parts(run, configuration, prepared, folder, device, options.pretrained)
        say_start(run, parts)
        save_json(run, folder / "run.json")
        train(parts, on_epoch=lambda lines: training_curves(lines, folder / "progress.png"))
        run = replace(run, finished=now())
        save_json(run, folder / "run.json")
    elif not options.validate_only:
        print(f"{folder} is trained already ({run.recipe.epochs} epochs, finished {run.finished})")
        if (folder / "validation" / "summary.json").is_file():
            summary = load_json(Summary, folder / "validation" / "summary.json")
            print(table(summary))
            return summary
    return validate_fold(folder, dataset, prepared, device)


def now() -> str:
    """The time as ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def refuse_unprepared(prepared: Path, cases: Fold, dataset_text: str, plan: str) -> None:
    """AutosegError if a case of the fold has not been prepared."""
    missing = sorted({*cases.train, *cases.val} - set(list_cases(prepared)))
    if missing:
        named = "" if plan == "default" else f" --plan {plan}"
        raise AutosegError(
            f"{len(missing)} cases are not prepared in {prepared}, for example {missing[0]}; "
            f"run: autoseg plan_and_preprocess -d {dataset_text}{named}"
        )


def agree_with_existing(folder: Path, run: Run, options: TrainOptions) -> Run:
    """The run that is in `folder` already, if it is the same one; `run` itself if there is none.

    Raises AutosegError if the plan, the recipe or the data differ: a run is never silently mixed of two.
    """
    path = folder / "run.json"
    if not path.is_file():
        if options.validate_only:
            raise AutosegError(f"{folder} holds no trained fold to validate; train it first, without --validate-only")
        return run
    old = load_json(Run, path)
    if options.validate_only:
        return old
    differing = [
        what
        for what, a, b in (
            ("plan", to_json(old.plan), to_json(run.plan)),
            ("recipe", to_json(old.recipe), to_json(run.recipe)),
            ("data", old.data_hash, run.data_hash),
            ("cases of the fold", to_json(old.cases), to_json(run.cases)),
            ("start (--pretrained)", old.pretrained, run.pretrained),
        )
        if a != b
    ]
    if differing:
        raise AutosegError(
            f"{folder} was trained with another {' and '.join(differing)}; give the new run a name of its own with "
            "--run NAME, repeat the options of the old one to go on with it, or delete the folder"
        )
    return old


def make_parts(
    run: Run, configuration: Configuration, prepared: Path, folder: Path, device: torch.device, pretrained: Path | None
) -> Parts:
    """Everything the training loop needs, with the network's weights drawn from the run's seed."""
    plan, recipe = run.plan, run.recipe
    torch.manual_seed(int(generator(recipe.seed, Stream.WEIGHTS, 0).integers(2**62)))
    network = build(configuration.network, len(plan.channels), plan.labels.heads)
    if pretrained is not None:
        load_weights(network, pretrained / WEIGHTS if pretrained.is_dir() else pretrained)
    cases = PreparedCases(prepared, memory=free_memory() // 4)
    masked = tuple(channel.masked for channel in plan.channels)

    def sampler(names: Iterable[str], stream: Stream, augmentation: str) -> Sampler:
        return Sampler(
            cases=cases,
            case_names=tuple(names),
            patch=configuration.patch,
            batch_size=configuration.batch_size,
            foreground_fraction=recipe.foreground_fraction,
            augmentation=make_augmentation(
                augmentation, patch=configuration.patch, dimension=configuration.dimension, masked=masked
            ),
            seed=recipe.seed,
            stream=stream,
        )

    return Parts(
        network=network,
        training=sampler(run.cases.train, Stream.TRAINING, recipe.augmentation),
        validation=sampler(run.cases.val, Stream.VALIDATION, "none"),
        recipe=recipe,
        labels=plan.labels,
        strides=configuration.network.strides,
        batch_dice=configuration.batch_dice,
        device=device,
        folder=folder,
    )


def say_start(run: Run, parts: Parts) -> None:
    """What is about to be trained, in a few lines."""
    weights = sum(p.numel() for p in parts.network.parameters())
    recipe = run.recipe
    print(
        f"{run.dataset} {run.configuration} fold {run.fold}: {len(run.cases.train)} training cases, "
        f"{len(run.cases.val)} validation cases\n"
        f"{parts.training.batch_size} patches of {' x '.join(map(str, parts.training.patch))} a step, "
        f"{recipe.epochs} epochs of {recipe.steps_per_epoch} steps, seed {recipe.seed}\n"
        f"{weights:,} weights, {run.device}, {torch.get_num_threads()} threads\n{parts.folder}",
        flush=True,
    )


def validate_fold(folder: Path, dataset: Dataset, prepared: Path, device: torch.device) -> Summary:
    """Predict the fold's held-out cases whole, write them on their original grids, and score those files.

    Writes `validation/<case><ending>` and `validation/summary.json`; the numbers are those of `autoseg evaluate`.
    """
    run = open_run(folder)
    model = open_model([folder], device)
    out = folder / "validation"
    out.mkdir(exist_ok=True)
    held = PreparedCases(prepared, memory=0)
    with Progress("validate", len(run.cases.val)) as bar:
        for name in run.cases.val:
            case = held[name]
            export(model.logits(np.asarray(case.image[...])), case.trace, model, out / f"{name}{dataset.file_ending}")
            bar.advance(note=name)
    summary = evaluate_pairs(held_out_pairs(folder, run, dataset), run.plan.labels)
    save_summary(summary, out)
    print(table(summary))
    return summary


def held_out_pairs(folder: Path, run: Run, dataset: Dataset) -> list[tuple[str, Path, Path]]:
    """(case, file of the truth, file of the prediction) of every held-out case of a fold."""
    truths = {case.id: Path(case.label) for case in dataset.cases if case.label is not None}
    return [(name, truths[name], folder / "validation" / f"{name}{dataset.file_ending}") for name in run.cases.val]


def fit_postprocessing(folders: Sequence[Path], dataset: Dataset) -> PostProcessing:
    """Fit post-processing on the held-out predictions of the folds in `folders`; saved beside them for predict."""
    labels = open_run(folders[0]).plan.labels
    files = [pair for folder in folders for pair in held_out_pairs(folder, open_run(folder), dataset)]
    indices = ([labels.to_indices(read_labels(path)[0].array[0]) for path in pair[1:]] for pair in files)
    rule = fit(((truth, prediction) for truth, prediction in indices), labels.count)
    save_json(rule, folders[0].parent / POSTPROCESSING)
    return rule
