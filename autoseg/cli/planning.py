"""Verbs before training: look at a dataset, plan it, prepare it, look at plans, networks and augmentation."""

from pathlib import Path
from typing import Annotated

import typer

from autoseg.cli.options import (
    ChannelsOption,
    ClassesOption,
    CombineOption,
    ContextOption,
    CropOption,
    DatasetOption,
    DeviceOption,
    DiscardEditsOption,
    GpuMemoryOption,
    GroupByOption,
    LikeOption,
    MergeOption,
    NetworkOption,
    NewPlanOption,
    PatchOption,
    PlanOption,
    PresetOption,
    SetOption,
    SpacingOption,
    TestFractionOption,
    ThinOption,
    WorkersOption,
    WorkspaceOption,
    parse_patch,
    plan_name,
    plan_options,
)
from autoseg.records import AutosegError
from autoseg.workspace import Workspace


def check_verb(dataset: DatasetOption, workspace: WorkspaceOption = None, workers: WorkersOption = None) -> None:
    """Check a raw dataset: files, geometry, labels, voxels. Writes nothing."""
    from autoseg.pipeline.data import check

    check(Workspace.find(workspace), dataset, workers)


def plan_and_preprocess_verb(
    dataset: DatasetOption,
    configurations: Annotated[
        list[str] | None, typer.Option("-c", "--configuration", help="Preprocess only this; may be repeated.")
    ] = None,
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
    plan: NewPlanOption = None,
    group_by: GroupByOption = None,
    test_fraction: TestFractionOption = 0.0,
    discard_edits: DiscardEditsOption = False,
    workers: WorkersOption = None,
    workspace: WorkspaceOption = None,
    set_: SetOption = None,
    help_fields: Annotated[bool, typer.Option("--help-fields", help="List the fields that --set takes.")] = False,
) -> None:
    """Check, fingerprint, plan and preprocess a dataset; a second run does only what is missing."""
    from autoseg.pipeline.data import plan_and_preprocess
    from autoseg.pipeline.planning import describe_plan_fields

    place = Workspace.find(workspace)
    if help_fields:
        describe_plan_fields(place, dataset, plan_name(plan, network))
        return
    plan_and_preprocess(
        place,
        dataset,
        plan_options(
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
            set_=set_,
            group_by=group_by,
            test_fraction=test_fraction,
            discard_edits=discard_edits,
            workers=workers,
            configurations=tuple(configurations or ()),
        ),
    )


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


def networks_verb(
    names: Annotated[list[str] | None, typer.Argument(help="Only these: name or name(key=value, ...) [all].")] = None,
    patch: PatchOption = None,
    batch: Annotated[int, typer.Option(min=1, help="Patches a step.")] = 2,
    channels: ChannelsOption = 1,
    classes: ClassesOption = 2,
    precision: Annotated[str, typer.Option(help="float32, or bfloat16 where autocast allows.")] = "bfloat16",
    timed: Annotated[bool, typer.Option("--time", help="Run steps and time them.")] = False,
    device: DeviceOption = "auto",
) -> None:
    """List the networks for `--network`: parameters, memory of a training step, source."""
    from autoseg.networks import NETWORKS
    from autoseg.pipeline.networks import Sizes, show_networks

    if precision not in ("float32", "bfloat16"):
        raise AutosegError(f"--precision {precision}: choose float32 or bfloat16")
    sizes = Sizes(patch=parse_patch(patch), batch=batch, channels=channels, classes=classes)
    show_networks(names or [*NETWORKS], sizes, "float32" if precision == "float32" else "bfloat16", timed, device)


def describe_verb(
    names: Annotated[list[str], typer.Argument(help="Networks: name, name(key=value, ...) or package.module:Name.")],
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
