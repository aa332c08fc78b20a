"""Verbs that make label files, put them together, improve, score and draw them."""

from pathlib import Path
from typing import Annotated

import typer

from autoseg.cli.options import DeviceOption, FoldsOption, MergeOption, WorkersOption, WorkspaceOption, split_folds
from autoseg.records import refuse_unwritable
from autoseg.workspace import Workspace


def predict_verb(
    sources: Annotated[
        list[Path], typer.Option("-i", "--input", help="Folder of images, or an image file; may be repeated.")
    ],
    target: Annotated[Path, typer.Option("-o", "--output", help="Folder for the label files.")],
    dataset: Annotated[str | None, typer.Option("-d", "--dataset", help="Dataset of the model.")] = None,
    configuration: Annotated[str | None, typer.Option("-c", "--configuration", help="Configuration.")] = None,
    folds: FoldsOption = None,
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
        folds=split_folds(folds),
        run=run,
        model=model,
        step=step_size,
        mirror=not no_tta,
        save_probabilities=save_probabilities,
        postprocess=not no_postprocess,
        retry_failed=retry_failed,
        device=device,
    )
    predict(Workspace.find(workspace), sources, target, options)


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
    merge: MergeOption = None,
    workers: WorkersOption = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Score predictions: Dice, IoU, volume error, HD95, ASSD and surface Dice, per case and class."""
    from autoseg.evaluation import evaluate_folders, save_summary, table
    from autoseg.layout import labels_in
    from autoseg.merging import parse_merges

    if output is not None or prediction.is_dir():
        refuse_unwritable(output or prediction)
    labels, annotated = (None, None) if dataset is None else labels_in(Workspace.find(workspace).dataset(dataset)[1])
    summary = evaluate_folders(
        truth,
        prediction,
        labels=labels,
        annotated=annotated,
        merges=parse_merges(merge or ()),
        tolerance_mm=tolerance,
        workers=workers,
        partial=partial,
    )
    save_summary(summary, output or prediction)
    print(table(summary))
    print(f"\nScores: {(output or prediction) / 'summary.json'}")


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
