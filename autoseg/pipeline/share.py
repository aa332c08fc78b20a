"""export and info: a trained model as one file for others, and what such a file says of itself."""

import shlex
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

import autoseg
from autoseg.bundle import ENDING, ModelCard, ModelFile, Stage, printable, read, unsound, write
from autoseg.ensemble import Chosen
from autoseg.labels import Labels
from autoseg.model import Trained, in_file, open_run
from autoseg.pipeline.predict import PredictOptions, choose_model
from autoseg.postprocess import trials
from autoseg.records import AutosegError, load_json
from autoseg.schema import Fingerprint, Plan, Request
from autoseg.training import WEIGHTS
from autoseg.workspace import Workspace


def export_model(
    workspace: Workspace, target: Path, options: PredictOptions, licence: str = "", note: str = ""
) -> ModelFile:
    """Write the model that `predict` would choose to the file `target`. Returns the file's record.

    licence: its name, or the path of a file with its text. Raises AutosegError as `predict` does when it is not clear
    which model is meant, for a network that is not part of autoseg, and for damaged weights.
    """
    if target.suffix != ENDING:
        raise AutosegError(f"-o {target}: the name of a model file ends in {ENDING}")
    if options.model is not None and options.model.is_file():
        raise AutosegError(f"-m {options.model} is a file already; copy it, or give the folder of a run")
    found = choose_model(workspace, options, verb=("export", "-o", str(target)))
    if isinstance(found, Chosen) and len(found.members) > 1:
        choices = " or ".join(f"-c {member.name} --run {member.where.parent.name}" for member in found.members)
        raise AutosegError(
            f"{found.where} names an ensemble of {found.choice.winner.name}, and a model file holds one configuration; "
            f"export one of them ({choices}), or predict here"
        )
    trained = found.members[0] if isinstance(found, Chosen) else found
    stages = _stages(trained)
    run = open_run(trained.where / next(iter(trained.folds)))
    content = ModelFile(
        autoseg_version=autoseg.__version__,
        versions=run.versions | {"autoseg": run.autoseg_version},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        plan=replace(trained.plan, request=Request()),  # which may name folders of this machine
        stages=tuple(stage for _, stage in stages),
        fingerprint=_fingerprint(workspace, trained),
        licence=_licence(licence),
        note=note,
    )
    weights = {stage.member(fold): place / f"fold_{fold}" / WEIGHTS for place, stage in stages for fold in stage.folds}
    if reason := unsound(content):
        raise AutosegError(f"{trained.where} cannot be exported: {reason}")
    print(f"Exporting {trained.plan.dataset} {trained.configuration.name}: {', '.join(weights)}", flush=True)
    if not content.licence:
        print("No licence is stated, so others may not know what they are allowed to do; state one with --licence")
    # A file of damaged weights would be refused by everyone who gets it.
    trained.open(torch.device("cpu"))
    content = write(target, content, weights)
    look = shlex.join(("autoseg", "info", str(target)))
    print(f"Model file: {target} ({size_in_words(target.stat().st_size)}); see it with: {look}")
    return content


def _stages(trained: Trained) -> list[tuple[Path, Stage]]:
    """Folder and record of each stage, the earlier one first."""
    before = [] if trained.before is None else _stages(trained.before)
    numbers = [name.removeprefix("fold_") for name in trained.folds]
    stage = Stage(
        configuration=trained.configuration.name,
        folds=tuple("all" if number == "all" else int(number) for number in numbers),
        card=trained.card,
    )
    return [*before, (trained.where, stage)]


def _fingerprint(workspace: Workspace, trained: Trained) -> Fingerprint | None:
    """The fingerprint that the plan was made from, if it is still there; names and hashes of cases are taken out."""
    path = workspace.prepared(trained.plan.dataset) / "fingerprint.json"
    if not path.is_file() or (found := load_json(Fingerprint, path)).data_hash() != trained.plan.data_hash:
        return None
    cases = (replace(case, case=str(number), content_hash="") for number, case in enumerate(found.cases, start=1))
    return replace(found, cases=tuple(cases))


def _channels(plan: Plan) -> str:
    schemes = [channel.scheme for channel in plan.channels]
    if plan.preparation.combined:
        named = ", ".join(f"{n} {channel}" for n, channel in enumerate(plan.sources))
        return f"{named}; one is made of them, the root of the sum of squares ({schemes[0]})"
    return ", ".join(f"{n} {channel} ({scheme})" for n, (channel, scheme) in enumerate(zip(plan.sources, schemes)))


def _licence(text: str) -> str:
    try:
        return Path(text).read_text() if text and Path(text).is_file() else text
    except (OSError, UnicodeDecodeError):
        raise AutosegError(f"--licence {text} is a file, but not one of text") from None


def info(path: Path) -> None:
    """Print what a model file is, does and allows; everything in it is checked first.

    Raises AutosegError that says why if the file is unsound.
    """
    content = read(path).content
    trained: Trained | None = in_file(path)
    counts: dict[str, int] = {}
    while trained is not None:
        for network in trained.weights():
            counts[trained.configuration.name] = sum(p.numel() for p in network.parameters())
        trained = trained.before
    print(printable(describe(path, content, counts)))


def describe(path: Path, content: ModelFile, counts: dict[str, int]) -> str:
    """The model card as text; `counts` is the number of weights of a network by configuration."""
    plan, labels = content.plan, content.plan.labels
    axes = ", ".join("ZYX"[axis] for axis in plan.axis_order)
    lines = [
        f"{path}: {size_in_words(path.stat().st_size)}, format {content.schema_version}, written by autoseg "
        f"{content.autoseg_version} on {content.created}; all checksums are right",
        "",
        f"Segments    {', '.join(f'{name} = {value}' for name, value in zip(labels.names, labels.values))}",
        f"Reads       {plan.dimension}D images, channels in this order: {_channels(plan)}",
        f"Trained on  {plan.dataset}{_cases(content.fingerprint)}",
    ]
    for stage in content.stages:
        here = plan.configuration(stage.configuration)
        after = f", reads predictions of {here.previous_stage}" if here.previous_stage else ""
        lines += [
            "",
            f"{here.name}{after}",
            f"  spacing   {_by(here.spacing_mm)} mm ({axes[3 * (3 - here.dimension) :]})",
            f"  patch     {_by(here.patch)} voxels" + (f", {here.context} slices" if here.context > 1 else ""),
            f"  network   {here.network.name}, {len(here.network.features)} stages, {counts[here.name]:,} weights",
            f"  folds     {', '.join(str(fold) for fold in stage.folds)}",
            *_scores(stage.card, labels),
        ]
    versions = ", ".join(f"{package} {version}" for package, version in sorted(content.versions.items()))
    lines += ["", f"Trained with {versions or 'versions that are not stated'}"]
    lines += ["", "Licence: " + (content.licence.strip() or "none stated; ask its authors what you may do with it")]
    lines += ["", "Note: " + content.note.strip()] if content.note.strip() else []
    return "\n".join(lines)


def _scores(card: ModelCard | None, labels: Labels) -> list[str]:
    """Cross-validated Dice, as predicted and post-processed, and the post-processing."""
    if card is None:
        return ["  Dice      not known: it was not cross-validated"]
    tried = trials(card.postprocessing, labels).splitlines()
    last = [f"  post-processing: {card.postprocessing.describe(labels)}", *(f"    {line}" for line in tried)]
    if not card.dice:
        return ["  Dice      not stated", *last]
    rows = [("Dice, cross-validated", "as predicted", "post-processed")]
    for name in card.dice:
        both = (_number(card.dice[name]), _number(card.dice_postprocessed.get(name)))
        rows.append(("mean of classes" if name == "foreground" else name, *both))
    width = max(len(row[0]) for row in rows)
    lines = [f"  {name:{width}}  {raw:>12}  {processed:>14}" for name, raw, processed in rows]
    return [*lines, f"  of {card.cases} held-out cases", *last]


def _cases(fingerprint: Fingerprint | None) -> str:
    if fingerprint is None or not fingerprint.cases:
        return ""
    middle = [sorted(case.shape[axis] for case in fingerprint.cases)[len(fingerprint.cases) // 2] for axis in range(3)]
    return f", {len(fingerprint.cases)} cases, median size {_by(middle)} voxels (Z, Y, X)"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


def _by(numbers: Iterable[float]) -> str:
    return " x ".join(f"{number:.6g}" for number in numbers)


def size_in_words(size: int) -> str:
    """Bytes as people say them: 123456 -> `123 kB`."""
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"
