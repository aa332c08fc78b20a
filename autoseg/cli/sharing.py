"""Verbs about model files: write one, say what is in one, make one of a model of nnU-Net."""

from pathlib import Path
from typing import Annotated

import typer

from autoseg.cli.options import FoldsOption, WorkspaceOption, split_folds
from autoseg.workspace import Workspace


def export_verb(
    target: Annotated[Path, typer.Option("-o", "--output", help="The file to write, NAME.autoseg.")],
    dataset: Annotated[str | None, typer.Option("-d", "--dataset", help="Dataset of the model.")] = None,
    configuration: Annotated[str | None, typer.Option("-c", "--configuration", help="Configuration.")] = None,
    folds: FoldsOption = None,
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
        dataset=dataset, configuration=configuration, folds=split_folds(folds), run=run, model=model
    )
    export_model(Workspace.find(workspace), target, options, licence, note)


def info_verb(file: Annotated[Path, typer.Argument(help="A model file.")]) -> None:
    """Check a model file and say what it segments, how well, and what one may do with it."""
    from autoseg.pipeline.share import info

    info(file)


def import_nnunet_verb(
    source: Annotated[Path, typer.Argument(help="Folder of trained models of nnU-Net v2, or a zip exported by it.")],
    target: Annotated[Path, typer.Option("-o", "--output", help="The file to write, NAME.autoseg.")],
    configuration: Annotated[
        str | None, typer.Option("-c", "--configuration", help="Configuration [the only one there is].")
    ] = None,
    folds: FoldsOption = None,
) -> None:
    """Make a model file of a model that nnU-Net v2 has trained. Nothing in its files is executed."""
    from autoseg.interop.nnunet import open_nnunet

    model = open_nnunet(source, configuration, split_folds(folds))
    model.write(target)
    print("\n".join(model.notes))
    print(f"Model: {target}")
