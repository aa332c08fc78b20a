"""Verbs that make raw datasets: synthetic ones, those that come in other layouts, and the demonstration."""

from pathlib import Path
from typing import Annotated

import typer

from autoseg.cli.options import (
    DeviceOption,
    SetOption,
    WorkersOption,
    WorkspaceOption,
    parse_labels,
    parse_names,
    parse_spacing,
)
from autoseg.workspace import Workspace


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


def profiles_verb() -> None:
    """List what is known about public datasets, for `dataset import --profile NAME`."""
    from autoseg.pipeline.importing import profiles

    print(profiles())


def demo_verb(
    workspace: Annotated[Path, typer.Option("--workspace", help="Where to put everything.")] = Path("autoseg_demo"),
    device: DeviceOption = "auto",
) -> None:
    """The whole way on synthetic vessels, in minutes: plan, train, predict, evaluate."""
    from autoseg.pipeline.demo import demo

    demo(Workspace(workspace.absolute()), device)
