"""Verbs that train, one fold or everything, and that compare what was trained."""

from typing import Annotated

import typer

from autoseg.cli.options import (
    CombineOption,
    ContextOption,
    CropOption,
    DatasetOption,
    DeviceOption,
    DiscardEditsOption,
    GpuMemoryOption,
    GroupByOption,
    LikeOption,
    LossOption,
    MergeOption,
    NetworkOption,
    NewPlanOption,
    PlanOption,
    PresetOption,
    PretrainedOption,
    RecipeOption,
    RunOption,
    SetOption,
    SpacingOption,
    TestFractionOption,
    ThinOption,
    WorkersOption,
    WorkspaceOption,
    parse_folds,
    plan_options,
)
from autoseg.records import AutosegError
from autoseg.workspace import Workspace


def _list_fields(wanted: bool) -> None:
    """Print what a recipe may state, before anything else that the command needs is missed."""
    if not wanted:
        return
    from autoseg import settings
    from autoseg.losses import describe_losses
    from autoseg.placement import describe_positions
    from autoseg.rates import describe_schedules
    from autoseg.schema import Recipe

    print("\n".join(f"{path} = {value}" for path, value in settings.fields(Recipe())))
    print("\nFor --loss, or loss in a file:\n" + "\n".join(describe_losses()))
    print("\nFor schedule:\n" + "\n".join(describe_schedules()))
    print("\nFor patch_position:\n" + "\n".join(describe_positions()))
    raise typer.Exit


def train_verb(
    dataset: Annotated[str, typer.Argument(help="1, 001, Dataset001_Name, or a raw dataset folder.")],
    configuration: Annotated[str, typer.Argument(help="2d, 3d_fullres, 3d_lowres or 3d_cascade_fullres.")],
    fold: Annotated[str, typer.Argument(help="0 to 4, or all.")],
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of 250 steps [default: 1000].")] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="Train for so long: 2h, 90m, 1h30m [on a CPU: 2h].")
    ] = None,
    extend: Annotated[
        str | None, typer.Option(metavar="TIME", help="Go on with a run for so much longer than it has now.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of everything random [default: 0].")] = None,
    loss: LossOption = None,
    device: DeviceOption = "auto",
    pretrained: PretrainedOption = None,
    validate_only: Annotated[
        bool, typer.Option("--validate-only", help="Only predict and score held-out cases.")
    ] = False,
    num_gpus: Annotated[int, typer.Option(min=1, help="Share every batch among so many GPUs.")] = 1,
    plan: PlanOption = "default",
    run: RunOption = "default",
    recipe: RecipeOption = None,
    workspace: WorkspaceOption = None,
    set_: SetOption = None,
    help_fields: Annotated[
        bool,
        typer.Option(
            "--help-fields", callback=_list_fields, is_eager=True, help="List the fields that --set takes, and losses."
        ),
    ] = False,
) -> None:
    """Train one fold, then predict and score its held-out cases. The same command goes on after a stop."""
    from autoseg import settings
    from autoseg.pipeline.recipe import TrainOptions
    from autoseg.pipeline.together import train_together
    from autoseg.supervise import JOURNAL

    if JOURNAL.dead or JOURNAL.suspects:
        extend = None  # this command made the run longer already, before a process of it died
    options = TrainOptions(
        plan=plan,
        run=run,
        epochs=epochs,
        budget_seconds=None if budget is None else settings.parse_duration(budget, "--budget"),
        extend_seconds=None if extend is None else settings.parse_duration(extend, "--extend"),
        seed=seed,
        loss=loss,
        device=device,
        pretrained=pretrained,
        validate_only=validate_only,
        recipe=recipe,
        changes=settings.parse(set_ or ()),
    )
    train_together(Workspace.find(workspace), dataset, configuration, fold, options, num_gpus)


def recipes_verb() -> None:
    """List the recipes that --recipe takes by name: what they set, where they come from."""
    from autoseg.recipes import table

    print(table())


def fit_verb(
    dataset: DatasetOption,
    configurations: Annotated[
        list[str] | None,
        typer.Option(
            "-c", "--configuration", help="May be repeated; `all`, then find_best [3d_fullres; 2d for 2D data]."
        ),
    ] = None,
    folds: Annotated[str | None, typer.Option(metavar="0,1,...", help="Only these folds [all].")] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="Time for everything: 8h, 90m, shared out among the folds.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of 250 steps a fold [default: 1000].")] = None,
    preset: PresetOption = None,
    network: NetworkOption = None,
    gpu_memory: GpuMemoryOption = None,
    spacing: SpacingOption = None,
    like: LikeOption = None,
    context: ContextOption = None,
    crop: CropOption = None,
    combine: CombineOption = None,
    thin: ThinOption = None,
    merge: MergeOption = None,
    group_by: GroupByOption = None,
    test_fraction: TestFractionOption = 0.0,
    discard_edits: DiscardEditsOption = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of everything random [default: 0].")] = None,
    loss: LossOption = None,
    device: DeviceOption = "auto",
    pretrained: PretrainedOption = None,
    num_gpus: Annotated[int, typer.Option(min=1, help="Train so many folds at a time, each on a GPU.")] = 1,
    plan: NewPlanOption = None,
    run: RunOption = "default",
    recipe: RecipeOption = None,
    workers: WorkersOption = None,
    workspace: WorkspaceOption = None,
    set_: SetOption = None,
) -> None:
    """Everything: plan, preprocess, train all folds, cross-validate, fit post-processing. Again: goes on."""
    from autoseg import settings
    from autoseg.pipeline.fit import FitOptions, fit
    from autoseg.pipeline.recipe import TrainOptions

    if budget is not None and epochs is not None:
        raise AutosegError("give --budget or --epochs, not both: one of them ends the training")
    planning = plan_options(
        plan=plan,
        preset=preset,
        network=network,
        gpu_memory=gpu_memory,
        spacing=spacing,
        like=like,
        context=context,
        crop=crop,
        combine=combine,
        thin=thin,
        merge=merge,
        group_by=group_by,
        test_fraction=test_fraction,
        discard_edits=discard_edits,
        workers=workers,
        keep=True,
    )
    training = TrainOptions(
        plan=planning.name,
        run=run,
        epochs=epochs,
        seed=seed,
        loss=loss,
        device=device,
        pretrained=pretrained,
        recipe=recipe,
        changes=settings.parse(set_ or ()),
    )
    options = FitOptions(
        plan=planning,
        train=training,
        configurations=tuple(configurations or ()),
        folds=parse_folds(folds),
        budget_seconds=None if budget is None else settings.parse_duration(budget, "--budget"),
        processes=num_gpus,
    )
    fit(Workspace.find(workspace), dataset, options)


def find_best_verb(
    dataset: DatasetOption,
    runs: Annotated[list[str] | None, typer.Option("--run", help="Only this run; may be repeated [all].")] = None,
    device: DeviceOption = "auto",
    workers: WorkersOption = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Compare all trained configurations and their pairs on the held-out cases; predict then follows the best."""
    from autoseg.pipeline.best import BestOptions, find_best

    options = BestOptions(runs=tuple(runs or ()), device=device, workers=workers)
    find_best(Workspace.find(workspace), dataset, options)
