"""The command line: parses, calls the pipeline, prints. Heavy modules are imported by the verb that needs them."""

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Optional

import typer

from autoseg import __version__
from autoseg.records import AutosegError
from autoseg.supervise import supervise
from autoseg.workspace import Workspace

app = typer.Typer(
    help="Segmentation of medical images that configures itself: fingerprint, plan, train, predict, evaluate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
dataset_app = typer.Typer(no_args_is_help=True, help="Make raw datasets.", rich_markup_mode=None)
app.add_typer(dataset_app, name="dataset")
augment_app = typer.Typer(no_args_is_help=True, help="See what augmentations do.", rich_markup_mode=None)
app.add_typer(augment_app, name="augment")

DatasetOption = Annotated[
    str, typer.Option("-d", "--dataset", help="1, 001, Dataset001_Name, or the path of a raw dataset folder.")
]
WorkspaceOption = Annotated[
    Optional[Path],  # noqa: UP045 - typer reads the annotation
    typer.Option("--workspace", help="Root of all data [default: $AUTOSEG_HOME, else ./autoseg_data]."),
]
WorkersOption = Annotated[int | None, typer.Option("--workers", min=1, help="Cases at a time [default: one a core].")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cuda, cuda:1, mps or cpu.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change any other field; may be repeated.")
]
PlanOption = Annotated[str, typer.Option("--plan", help="Name of the plan.")]
NewPlanOption = Annotated[
    str | None, typer.Option("--plan", help="Name of the plan [default, or that of the network].")
]
NetworkOption = Annotated[
    str | None,
    typer.Option("--network", metavar="NAME", help="Network instead of the preset's, see `autoseg networks`."),
]
PRESET_HELP = "unet, resenc_m, resenc_l or resenc_xl."
LOSS_HELP = (
    "dice_ce [default], dice, dice_squared, ce, bce, weighted_ce, topk_ce, focal, categorical_focal, unified_focal, "
    "tversky, focal_tversky, boundary, hausdorff, cldice, or package.module:Name; sums: 0.5*ce+focal(gamma=2)."
)
LossOption = Annotated[str | None, typer.Option("--loss", metavar="NAME[+NAME...]", help=LOSS_HELP)]
GpuMemoryOption = Annotated[
    float | None, typer.Option("--gpu-memory", metavar="GB", help="Memory to plan for, 2 to 80 [preset's own].")
]
SpacingOption = Annotated[
    str | None, typer.Option(metavar="Z,Y,X", help="Target spacing of 3d_fullres in mm, instead of the rule's.")
]
GroupByOption = Annotated[str | None, typer.Option(metavar="REGEX", help="Cases with the same match stay in one fold.")]
TestFractionOption = Annotated[float, typer.Option(help="Share of the groups to lock away for testing.")]
RecipeOption = Annotated[
    Path | None, typer.Option("--recipe", metavar="NAME|FILE", help="A recipe that `recipes` lists, or a TOML file.")
]
RunOption = Annotated[str, typer.Option("--run", help="Name of the run.")]


@app.callback(invoke_without_command=True)
def top(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    """Options before the verb."""
    if version:
        print(f"autoseg {__version__}")
        raise typer.Exit


@app.command("check")
def check_verb(dataset: DatasetOption, workspace: WorkspaceOption = None, workers: WorkersOption = None) -> None:
    """Check a raw dataset: files, geometry, labels, voxels. Writes nothing."""
    from autoseg.pipeline.data import check

    check(Workspace.find(workspace), dataset, workers)


@app.command("plan_and_preprocess")
def plan_and_preprocess_verb(
    dataset: DatasetOption,
    configurations: Annotated[
        list[str] | None, typer.Option("-c", "--configuration", help="Preprocess only this; may be repeated.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help=f"{PRESET_HELP} [unet]")] = None,
    network: NetworkOption = None,
    gpu_memory: GpuMemoryOption = None,
    spacing: SpacingOption = None,
    like: Annotated[
        Path | None, typer.Option(help="Take over the plan of this model (a file or a fold folder), for fine-tuning.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(metavar="3|5|7", help="Slices that 2d sees, to label the middle one [1].")
    ] = None,
    crop: Annotated[
        list[str] | None,
        typer.Option(metavar="CROP", help="crop_to(size=[Z,Y,X]), crop_around_mass, margins; may be repeated."),
    ] = None,
    combine: Annotated[
        str | None, typer.Option(metavar="rss", help="Make all channels one: the root of the sum of squares.")
    ] = None,
    plan: NewPlanOption = None,
    group_by: GroupByOption = None,
    test_fraction: TestFractionOption = 0.0,
    discard_edits: Annotated[
        bool, typer.Option("--discard-edits", help="Plan anew what was edited in plan.json by hand.")
    ] = False,
    workers: WorkersOption = None,
    workspace: WorkspaceOption = None,
    set_: SetOption = None,
    help_fields: Annotated[bool, typer.Option("--help-fields", help="List the fields that --set takes.")] = False,
) -> None:
    """Check, fingerprint, plan and preprocess a dataset; a second run does only what is missing."""
    from autoseg import settings
    from autoseg.crops import parse_crop
    from autoseg.pipeline.data import PlanOptions, describe_plan_fields, plan_and_preprocess
    from autoseg.schema import Preparation

    place, name = Workspace.find(workspace), plan_name(plan, network)
    if help_fields:
        describe_plan_fields(place, dataset, name)
        return
    if like is not None and (preset or network or gpu_memory or spacing or crop or combine):
        raise AutosegError(
            "--like takes over network, memory, spacing, crops and channels; leave out --preset, --network, "
            "--gpu-memory, --spacing, --crop, --combine"
        )
    plan_and_preprocess(
        place,
        dataset,
        PlanOptions(
            name=name,
            preset=preset or "unet",
            network=network,
            gpu_memory_gb=gpu_memory,
            spacing_mm=parse_spacing(spacing),
            context=context,
            preparation=Preparation(crops=tuple(map(parse_crop, crop or ()))),
            combine=combine,
            like=like,
            configurations=tuple(configurations or ()),
            group_by=group_by,
            test_fraction=test_fraction,
            discard_edits=discard_edits,
            workers=workers,
            changes=settings.parse(set_ or ()),
        ),
    )


@app.command("plan")
def plan_verb(
    dataset: DatasetOption,
    plan: Annotated[str | None, typer.Option("--plan", help="Show only this plan.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Print the reason of each decision.")] = False,
    diff: Annotated[
        tuple[str, str] | None, typer.Option(metavar="PLAN PLAN", help="What differs between two plans.")
    ] = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Show the plans of a dataset side by side, the reasons of one, or what differs between two. Changes nothing."""
    from autoseg.pipeline.plans import show_difference, show_plan, show_plans

    place = Workspace.find(workspace)
    if explain:
        show_plan(place, dataset, plan or "default")
    if diff is not None:
        show_difference(place, dataset, *diff)
    if not explain and diff is None:
        show_plans(place, dataset, plan)


PatchOption = Annotated[
    str | None, typer.Option("--patch", metavar="ZxYxX", help="Voxels of a patch [256x256 and 64x64x64].")
]
ChannelsOption = Annotated[int, typer.Option("--channels", min=1, help="Channels of the images.")]
ClassesOption = Annotated[int, typer.Option("--classes", min=1, help="Classes with the background.")]


@app.command("networks")
def networks_verb(
    patch: PatchOption = None,
    batch: Annotated[int, typer.Option(min=1, help="Patches a step.")] = 2,
    channels: ChannelsOption = 1,
    classes: ClassesOption = 2,
    precision: Annotated[str, typer.Option(help="float32, or bfloat16 where autocast allows.")] = "bfloat16",
    timed: Annotated[bool, typer.Option("--time", help="Run steps and time them.")] = False,
    device: DeviceOption = "auto",
) -> None:
    """List the networks for `--network`: parameters, memory of a training step, source."""
    from autoseg.pipeline.networks import Sizes, show_networks

    if precision not in ("float32", "bfloat16"):
        raise AutosegError(f"--precision {precision}: choose float32 or bfloat16")
    sizes = Sizes(patch=parse_patch(patch), batch=batch, channels=channels, classes=classes)
    show_networks(sizes, "float32" if precision == "float32" else "bfloat16", timed, device)


@app.command("describe")
def describe_verb(
    names: Annotated[list[str], typer.Argument(help="Networks: name or name(key=value, ...).")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for tables and diagrams.")] = Path("."),
    patch: PatchOption = None,
    channels: ChannelsOption = 1,
    classes: ClassesOption = 2,
    compare: Annotated[bool, typer.Option("--compare", help="Draw their numbers of parameters as bars.")] = False,
) -> None:
    """Write the table of layers and a diagram (SVG) of networks."""
    from autoseg.pipeline.networks import Sizes, describe_networks

    sizes = Sizes(patch=parse_patch(patch), channels=channels, classes=classes)
    describe_networks(names, output, sizes, compare)


@app.command("train")
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
    pretrained: Annotated[
        Path | None,
        typer.Option(help="Begin with this: a model file, a fold folder, weights alone (.safetensors, .pth)."),
    ] = None,
    validate_only: Annotated[
        bool, typer.Option("--validate-only", help="Only predict and score held-out cases.")
    ] = False,
    num_gpus: Annotated[int, typer.Option(min=1, help="Share every batch among so many GPUs.")] = 1,
    plan: PlanOption = "default",
    run: RunOption = "default",
    recipe: RecipeOption = None,
    workspace: WorkspaceOption = None,
    set_: SetOption = None,
    help_fields: Annotated[bool, typer.Option("--help-fields", help="List the fields that --set takes.")] = False,
) -> None:
    """Train one fold, then predict and score its held-out cases. The same command goes on after a stop."""
    from autoseg import settings

    if help_fields:
        from autoseg.losses import describe_losses
        from autoseg.placement import describe_positions
        from autoseg.rates import describe_schedules
        from autoseg.schema import Recipe

        print("\n".join(f"{path} = {value}" for path, value in settings.fields(Recipe())))
        print("\nFor --loss, or loss in a file:\n" + "\n".join(describe_losses()))
        print("\nFor schedule:\n" + "\n".join(describe_schedules()))
        print("\nFor patch_position:\n" + "\n".join(describe_positions()))
        return
    from autoseg.pipeline.recipe import TrainOptions
    from autoseg.pipeline.together import train_together

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


@app.command("recipes")
def recipes_verb() -> None:
    """List the recipes that --recipe takes by name: what they set, where they come from."""
    from autoseg.recipes import table

    print(table())


@app.command("fit")
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
    preset: Annotated[str | None, typer.Option(help=PRESET_HELP)] = None,
    network: NetworkOption = None,
    gpu_memory: GpuMemoryOption = None,
    spacing: SpacingOption = None,
    group_by: GroupByOption = None,
    test_fraction: TestFractionOption = 0.0,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of everything random [default: 0].")] = None,
    loss: LossOption = None,
    device: DeviceOption = "auto",
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
    from autoseg.pipeline.data import PlanOptions
    from autoseg.pipeline.fit import FitOptions, fit
    from autoseg.pipeline.train import TrainOptions

    if budget is not None and epochs is not None:
        raise AutosegError("give --budget or --epochs, not both: one of them ends the training")
    name = plan_name(plan, network)
    planning = PlanOptions(
        name=name,
        preset=preset or "unet",
        network=network,
        gpu_memory_gb=gpu_memory,
        spacing_mm=parse_spacing(spacing),
        group_by=group_by,
        test_fraction=test_fraction,
        workers=workers,
        keep=(preset, network, gpu_memory, spacing) == (None,) * 4,
    )
    training = TrainOptions(
        plan=name,
        run=run,
        epochs=epochs,
        seed=seed,
        loss=loss,
        device=device,
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


@app.command("find_best")
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


@app.command("predict")
def predict_verb(
    source: Annotated[Path, typer.Option("-i", "--input", help="Folder of images, or one image file.")],
    target: Annotated[Path, typer.Option("-o", "--output", help="Folder for the label files.")],
    dataset: Annotated[str | None, typer.Option("-d", "--dataset", help="Dataset of the model.")] = None,
    configuration: Annotated[str | None, typer.Option("-c", "--configuration", help="Configuration.")] = None,
    folds: Annotated[
        list[str] | None, typer.Option("-f", "--fold", help="Use only this fold; may be repeated [all finished].")
    ] = None,
    run: Annotated[str | None, typer.Option("--run", help="Name of the run.")] = None,
    model: Annotated[
        Path | None,
        typer.Option("-m", "--model", help="A model file, or the folder of a configuration of a run, or of a fold."),
    ] = None,
    step_size: Annotated[float, typer.Option(min=0.05, max=1.0, help="Distance of tiles, share of the patch.")] = 0.5,
    no_tta: Annotated[bool, typer.Option("--no-tta", help="No mirroring: several times faster.")] = False,
    save_probabilities: Annotated[bool, typer.Option("--save-probabilities", help="Write them as NIfTI too.")] = False,
    no_postprocess: Annotated[bool, typer.Option("--no-postprocess", help="Leave out post-processing.")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try cases again that failed before, though nothing has changed.")
    ] = False,
    device: DeviceOption = "auto",
    workspace: WorkspaceOption = None,
) -> None:
    """Segment images with a trained model: the only one there is, or the one chosen. Again: only what is not done."""
    from autoseg.pipeline.predict import PredictOptions, predict

    options = PredictOptions(
        dataset=dataset,
        configuration=configuration,
        folds=tuple(folds or ()),
        run=run,
        model=model,
        step=step_size,
        mirror=not no_tta,
        save_probabilities=save_probabilities,
        postprocess=not no_postprocess,
        retry_failed=retry_failed,
        device=device,
    )
    predict(Workspace.find(workspace), source, target, options)


@app.command("ensemble")
def ensemble_verb(
    folders: Annotated[list[Path], typer.Argument(help="Folders of predictions of the same cases.")],
    target: Annotated[Path, typer.Option("-o", "--output", help="Folder for the label files.")],
    dataset: Annotated[
        str | None,
        typer.Option("-d", "--dataset", help="Whose labels [a dataset.json in or above the folders, else 0, 1, ...]."),
    ] = None,
    workers: WorkersOption = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Put predictions of several models together: mean of their probabilities, else a majority vote of their labels."""
    from autoseg.layout import labels_in
    from autoseg.pipeline.combine import combine

    labels = None if dataset is None else labels_in(Workspace.find(workspace).dataset(dataset)[1])[0]
    combine(folders, target, labels, workers)


@app.command("export")
def export_verb(
    target: Annotated[Path, typer.Option("-o", "--output", help="The file to write, NAME.autoseg.")],
    dataset: Annotated[str | None, typer.Option("-d", "--dataset", help="Dataset of the model.")] = None,
    configuration: Annotated[str | None, typer.Option("-c", "--configuration", help="Configuration.")] = None,
    folds: Annotated[
        list[str] | None, typer.Option("-f", "--fold", help="Only this fold; may be repeated [all finished].")
    ] = None,
    run: Annotated[str | None, typer.Option("--run", help="Name of the run.")] = None,
    model: Annotated[
        Path | None, typer.Option("-m", "--model", help="Folder of a configuration of a run, or of a fold.")
    ] = None,
    licence: Annotated[str, typer.Option(help="Under which others may use it: a name, or a file with its text.")] = "",
    note: Annotated[str, typer.Option(help="Anything else to state: authors, what to cite, intended use.")] = "",
    workspace: WorkspaceOption = None,
) -> None:
    """Write a trained model to one file that others can use: predict -m, info, train --pretrained, autoseg.load."""
    from autoseg.pipeline.predict import PredictOptions
    from autoseg.pipeline.share import export_model

    options = PredictOptions(
        dataset=dataset, configuration=configuration, folds=tuple(folds or ()), run=run, model=model
    )
    export_model(Workspace.find(workspace), target, options, licence, note)


@app.command("info")
def info_verb(file: Annotated[Path, typer.Argument(help="A model file.")]) -> None:
    """Check a model file and say what it segments, how well, and what one may do with it."""
    from autoseg.pipeline.share import info

    info(file)


@app.command("import-nnunet")
def import_nnunet_verb(
    source: Annotated[Path, typer.Argument(help="Folder of trained models of nnU-Net v2, or a zip exported by it.")],
    target: Annotated[Path, typer.Option("-o", "--output", help="The file to write, NAME.autoseg.")],
    configuration: Annotated[
        str | None, typer.Option("-c", "--configuration", help="Configuration [the only one there is].")
    ] = None,
    folds: Annotated[
        list[str] | None, typer.Option("-f", "--fold", help="Only this fold; may be repeated [all finished].")
    ] = None,
) -> None:
    """Make a model file of a model that nnU-Net v2 has trained. Nothing in its files is executed."""
    from autoseg.interop.nnunet import open_nnunet

    model = open_nnunet(source, configuration, tuple(folds or ()))
    model.write(target)
    print("\n".join(model.notes))
    print(f"Model: {target}")


@app.command("evaluate")
def evaluate_verb(
    truth: Annotated[Path, typer.Argument(help="Folder of true label files.")],
    prediction: Annotated[Path, typer.Argument(help="Folder of predicted label files, same names.")],
    dataset: Annotated[
        str | None,
        typer.Option("-d", "--dataset", help="Whose labels [a dataset.json in or above the folders, else all values]."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for summary.json and summary.csv [predictions].")
    ] = None,
    tolerance: Annotated[float, typer.Option(min=0.0, help="Tolerance of the surface Dice in mm.")] = 1.0,
    partial: Annotated[bool, typer.Option("--partial", help="Score only the cases that were predicted.")] = False,
    workers: WorkersOption = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Score predictions: Dice, IoU, volume error, HD95, ASSD and surface Dice, per case and class."""
    from autoseg.evaluation import evaluate_folders, save_summary, table
    from autoseg.layout import labels_in

    labels, annotated = (None, None) if dataset is None else labels_in(Workspace.find(workspace).dataset(dataset)[1])
    summary = evaluate_folders(
        truth,
        prediction,
        labels=labels,
        annotated=annotated,
        tolerance_mm=tolerance,
        workers=workers,
        partial=partial,
    )
    save_summary(summary, output or prediction)
    print(table(summary))
    print(f"\nScores: {(output or prediction) / 'summary.json'}")


@app.command("postprocess")
def postprocess_verb(
    source: Annotated[Path, typer.Argument(help="Folder of predicted label files, of whatever program.")],
    target: Annotated[Path, typer.Option("-o", "--output", help="Folder for the processed files and the rule.")],
    truth: Annotated[
        Path | None, typer.Option(help="Folder of true label files, same names: search for what helps.")
    ] = None,
    rule: Annotated[
        Path | None, typer.Option(help="Apply this instead: postprocessing.json, model.json or a model file.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option("-d", "--dataset", help="Whose labels [a dataset.json in or above the folders, else all values]."),
    ] = None,
    workers: WorkersOption = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Search for post-processing of predictions and keep what stands against chance, or apply a rule."""
    from autoseg.pipeline.postprocess import postprocess

    place = Workspace.find(workspace)
    postprocess(place, source, target, truth=truth, rule=rule, dataset=dataset, workers=workers)


@app.command("overlay")
def overlay_verb(
    images: Annotated[Path, typer.Argument(help="Folder of images, or one image file.")],
    prediction: Annotated[Path, typer.Argument(help="Folder of label files, or one of them.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the pictures, one PNG a case.")],
    truth: Annotated[
        Path | None, typer.Option(help="True label files: right is green, too much blue, missing red.")
    ] = None,
    workers: WorkersOption = None,
) -> None:
    """Draw segmentations onto the slices that show most of them: one PNG a case."""
    from autoseg.evaluation.overlay import overlay_folders

    drawn = overlay_folders(images, prediction, output, truth=truth, workers=workers)
    print(f"Drawn: {len(drawn)} pictures in {output}")


@app.command("demo")
def demo_verb(
    workspace: Annotated[Path, typer.Option("--workspace", help="Where to put everything.")] = Path("autoseg_demo"),
    device: DeviceOption = "auto",
) -> None:
    """The whole way on synthetic vessels, in minutes: plan, train, predict, evaluate."""
    from autoseg.pipeline.demo import demo

    demo(Workspace(workspace.absolute()), device)


@dataset_app.command("make")
def make_verb(
    source: Annotated[str, typer.Argument(help="vessels.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Raw dataset folder [WORKSPACE/raw/Dataset900_Vessels].")
    ] = None,
    cases: Annotated[int, typer.Option(min=1, help="Training cases.")] = 12,
    test_cases: Annotated[int, typer.Option(min=0, help="Unseen cases, in imagesTs and labelsTs.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same data.")] = 0,
    workspace: WorkspaceOption = None,
    set_: SetOption = None,
    help_fields: Annotated[bool, typer.Option("--help-fields", help="List the fields that --set takes.")] = False,
) -> None:
    """Make a synthetic raw dataset, for example: autoseg dataset make vessels --set shape=[48,64,64]."""
    from autoseg import settings
    from autoseg.pipeline.make import describe_source_fields, make_dataset

    if help_fields:
        describe_source_fields(source)
        return
    make_dataset(Workspace.find(workspace), source, output, cases, test_cases, seed, settings.parse(set_ or ()))


@dataset_app.command("import")
def import_verb(
    kind: Annotated[str, typer.Argument(help="msd, nnunet, folders, masks, train-val or hdf5.")],
    source: Annotated[
        str, typer.Argument(help="Folder, archive or quoted pattern ('data/*/t1.nii.gz') of the images.")
    ],
    masks: Annotated[
        str | None, typer.Argument(help="Folder or quoted pattern of the masks, for folders, masks and hdf5.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option("-d", "--dataset", help="Name in the workspace, Dataset001_Name, or path [from the source]."),
    ] = None,
    channels: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Names of the channels: CT or T1,T2.")
    ] = None,
    labels: Annotated[str | None, typer.Option(metavar="NAME=VALUE,...", help="Names of the label values.")] = None,
    order: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Order of overlapping structures: the last one wins.")
    ] = None,
    spacing: Annotated[str | None, typer.Option(metavar="Z,Y,X", help="Voxel size in mm, for hdf5.")] = None,
    profile: Annotated[str | None, typer.Option(help="Names, patients, licence of a known dataset.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask whether the pairs are right.")] = False,
    workers: WorkersOption = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Turn images and masks as they come into a raw dataset: copied without loss, then checked.

    For example: autoseg dataset import folders scans/ segmentations/ -d Dataset001_Knee --channels MR
    """
    from autoseg.pipeline.importing import import_dataset

    import_dataset(
        Workspace.find(workspace),
        kind,
        source,
        masks,
        name=dataset,
        channels=parse_names(channels),
        labels=parse_labels(labels),
        order=parse_names(order),
        spacing_mm=parse_spacing(spacing),
        profile=profile,
        yes=yes,
        workers=workers,
    )


@dataset_app.command("profiles")
def profiles_verb() -> None:
    """List what is known about public datasets, for `dataset import --profile NAME`."""
    from autoseg.pipeline.importing import profiles

    print(profiles())


def plan_name(plan: str | None, network: str | None) -> str:
    """The name of a plan that is made: as given, else the network's own, else `default`."""
    from autoseg.settings import parse_call

    return plan or ("default" if network is None else parse_call(network)[0].rpartition(":")[2])


@augment_app.callback()
def augment_top() -> None:
    """Keeps `preview` a word of its own, though there is no other yet."""


@augment_app.command("preview")
def preview_verb(
    dataset: DatasetOption,
    output: Annotated[Path, typer.Option("-o", "--output", help="The picture to draw, FILE.png.")],
    configuration: Annotated[
        str | None, typer.Option("-c", "--configuration", help="Whose patches [3d_fullres, else 2d].")
    ] = None,
    policy: Annotated[str, typer.Option(help="Augmentation, as in --set augmentation=NAME.")] = "default",
    samples: Annotated[int, typer.Option("-n", "--samples", min=1, help="Augmented samples to draw.")] = 8,
    chain: Annotated[
        bool, typer.Option("--chain", help="Instead: each transform of the policy, alone and after all before it.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, another patch and other samples.")] = 0,
    plan: PlanOption = "default",
    workspace: WorkspaceOption = None,
) -> None:
    """Draw a page of one patch and what an augmentation makes of it, with the masks outlined. Changes nothing."""
    from autoseg.pipeline.preview import PreviewOptions, preview

    options = PreviewOptions(
        configuration=configuration, policy=policy, samples=samples, chain=chain, seed=seed, plan=plan
    )
    preview(Workspace.find(workspace), dataset, output, options)


def parse_names(text: str | None) -> tuple[str, ...]:
    """`T1, T2` -> ("T1", "T2"), nothing -> ()."""
    return tuple(part.strip() for part in text.split(",") if part.strip()) if text else ()


def parse_labels(text: str | None) -> dict[str, int]:
    """`liver=1,lesion=255` -> {"liver": 1, "lesion": 255}; AutosegError for anything else."""
    parts = [part.rpartition("=") for part in parse_names(text)]
    if not all(name.strip() and value.strip().lstrip("-").isdecimal() for name, _, value in parts):
        raise AutosegError(f"--labels {text!r}: write names and values, for example --labels liver=1,lesion=2")
    named = {name.strip(): int(value) for name, _, value in parts}
    if len(named) < len(parts):
        raise AutosegError(f"--labels {text!r} names a label twice")
    return named


def parse_patch(text: str | None) -> tuple[int, ...] | None:
    """`64x96x96` -> (64, 96, 96); AutosegError for anything else."""
    parts = [] if text is None else text.split("x")
    if text is not None and not (len(parts) in (2, 3) and all(part.isdecimal() and int(part) for part in parts)):
        raise AutosegError(f"--patch {text!r}: give two or three sizes, for example --patch 64x96x96")
    return tuple(map(int, parts)) or None


def parse_folds(text: str | None) -> tuple[int, ...]:
    """`0,1,3` -> (0, 1, 3), nothing -> (); AutosegError for anything else."""
    parts = [] if text is None else text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise AutosegError(f"--folds {text!r}: give numbers with commas, for example --folds 0,1")
    return tuple(sorted({int(part) for part in parts}))


def parse_spacing(text: str | None) -> tuple[float, float, float] | None:
    """`3,0.5,0.5` -> (3.0, 0.5, 0.5); AutosegError for anything else."""
    if text is None:
        return None
    try:
        z, y, x = (float(part) for part in text.split(","))
    except ValueError:
        raise AutosegError(f"--spacing {text!r}: give three lengths in mm, for example --spacing 3,0.5,0.5") from None
    return z, y, x


SUPERVISED = ("check", "plan_and_preprocess", "predict", "fit", "find_best")
"""Verbs that go on without a case that ended their process."""


def main() -> None:
    """Run the command line, the verbs of SUPERVISED in a process of their own; see autoseg/supervise.py."""
    if sys.argv[1:2] and sys.argv[1] in SUPERVISED:
        sys.exit(supervise(run))
    run()


def run() -> None:
    """Run the command line here; an AutosegError ends it with code 1, its words, and the traceback of its cause."""
    # Before torch loads OpenMP: threads that spin while they wait take the cores from whoever they wait for when other
    # programs share the machine, and gained nothing measurable when none did.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The request to save: training answers it; what has nothing to save must not end by it.
    if hasattr(signal, "SIGUSR1") and signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        signal.signal(signal.SIGUSR1, lambda number, frame: None)
    try:
        app()
    except AutosegError as error:
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
