"""A trained model of nnU-Net v2, as a folder or as the zip that nnU-Net exports -> a model of ours.

A model folder is TRAINER__PLANS__CONFIGURATION with plans.json, dataset.json and fold_N/checkpoint_final.pth; several
stand side by side in a results folder or a zip. A zip is read member by member, by names found here: nothing is
unpacked to a name that the file says. Checkpoints are read as data (autoseg/interop/nnunet_weights.py); the
post-processing is taken from postprocessing.json, never from the pickle beside it.
"""

import hashlib
import json
import re
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol

from safetensors.torch import save

from autoseg import __version__
from autoseg.bundle import ModelCard, ModelFile, Stage, write
from autoseg.interop.nnunet_plans import chain_of, need, to_plan, with_inherited
from autoseg.interop.nnunet_weights import Checkpoint, read_checkpoint, rename
from autoseg.postprocess import PostProcessing, Step
from autoseg.records import AutosegError
from autoseg.schema import Plan

PLANS, DATASET, CHECKPOINT, RULES = "plans.json", "dataset.json", "checkpoint_final.pth", "postprocessing.json"
SUMMARY, PICKLED = "summary.json", "postprocessing.pkl"
HASH = 16
MOST_JSON_BYTES = 256 << 20
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError, OverflowError, struct.error)
"""What reading a zip that is none ends in."""
KEEP_LARGEST = "remove_all_but_largest_component_from_segmentation"


@dataclass(frozen=True, eq=False, kw_only=True)
class Imported:
    """A model as it was read. Of a cascade it holds the earlier stages too, the first stage first."""

    content: ModelFile
    weights: dict[str, bytes]
    """Safetensors by our names, one for each member that `content` names."""
    notes: tuple[str, ...]
    """What was found, one line each, for a person."""

    def write(self, path: Path) -> None:
        """Write the model file, whole or not at all."""
        write(path, self.content, self.weights)


class Files(Protocol):
    """A tree of files, in a folder or in a zip; names are relative, with slashes."""

    def names(self) -> Sequence[str]:
        """All files."""

    def read(self, name: str) -> bytes:
        """The content of a small file."""

    def path(self, name: str) -> Any:
        """A context manager that gives a path to the file on disk."""


@dataclass(frozen=True)
class Folder:
    """Files below `root`."""

    root: Path

    def names(self) -> Sequence[str]:
        """All files that may matter, at most three folders down."""
        found = (path for depth in range(4) for path in self.root.glob("*/" * depth + "*.*"))
        return sorted(path.relative_to(self.root).as_posix() for path in found if path.is_file())

    def read(self, name: str) -> bytes:
        """The content of a file."""
        path = self.root / name
        if path.stat().st_size > MOST_JSON_BYTES:
            raise AutosegError(f"{path} is larger than any description of a model; it is refused")
        return path.read_bytes()

    @contextmanager
    def path(self, name: str) -> Iterator[Path]:
        """The file itself."""
        yield self.root / name


@dataclass(frozen=True)
class Archive:
    """Members of the zip file `root`."""

    root: Path

    def names(self) -> Sequence[str]:
        """All members. Raises AutosegError if the file is no zip."""
        try:
            with zipfile.ZipFile(self.root) as file:
                return sorted(info.filename for info in file.infolist() if not info.is_dir())
        except DAMAGED as error:
            raise AutosegError(f"{self.root} is no zip file, or a damaged one ({error})") from None

    def read(self, name: str) -> bytes:
        """The content of a member."""
        with self._open(name, MOST_JSON_BYTES) as member:
            return member.read()

    @contextmanager
    def path(self, name: str) -> Iterator[Path]:
        """A temporary copy, under a name of our own: torch reads files, and the member is packed."""
        # Weights hardly shrink: a member that grows manifold is no checkpoint.
        most = 4 * self.root.stat().st_size + (1 << 20)
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "checkpoint.pth"
            with self._open(name, most) as member, copy.open("wb") as target:
                shutil.copyfileobj(member, target, 1 << 20)
            yield copy

    @contextmanager
    def _open(self, name: str, most: int) -> Iterator[IO[bytes]]:
        """A member of at most `most` bytes: the zip reads no more of it than its directory states."""
        try:
            with zipfile.ZipFile(self.root) as file:
                info = file.getinfo(name)
                if info.file_size > most:
                    raise AutosegError(f"{self.root}: {name} unpacks to {info.file_size:,} bytes; it is refused")
                with file.open(info) as member:
                    yield member
        except DAMAGED as error:
            raise AutosegError(f"{self.root}: {name} cannot be unpacked ({error}); copy the file again") from None


def open_nnunet(source: Path, configuration: str | None = None, folds: Sequence[str] = ()) -> Imported:
    """Read the model of `configuration` (None: the only one there is) from a folder or a zip.

    A cascade brings its earlier stage along, from beside it. `folds` chooses some by name ("0", "all"); by default all
    that are trained to their end, `all` only where it stands alone. Raises AutosegError for what is missing, damaged,
    ambiguous or has no counterpart here.
    """
    if not source.exists():
        raise AutosegError(f"{source} does not exist; give a results folder of nnU-Net, or a zip exported by it")
    files: Files = Folder(source) if source.is_dir() else Archive(source)
    models = find_models(files)
    if not models and source.is_dir() and (source / PLANS).is_file():
        raise AutosegError(f"{source} holds no fold_*/{CHECKPOINT}; finish the training with nnU-Net first")
    if not models:
        raise AutosegError(
            f"{source} holds no model of nnU-Net v2: no folder with {PLANS}, {DATASET} and fold_*/{CHECKPOINT}"
        )
    place = choose(source, models, configuration)
    with understood(source):
        return _assemble(source, files, place, folds)


@contextmanager
def understood(source: Path) -> Iterator[None]:
    """Says that the files in `source` are not what nnU-Net writes where one holds values of unexpected kinds."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise AutosegError(
            f"{source} is no complete model of nnU-Net v2: a value is missing or of an unexpected kind "
            f"({type(error).__name__}: {reason})"
        ) from error


def _assemble(source: Path, files: Files, place: str, folds: Sequence[str]) -> Imported:
    plans, dataset = read_json(files, place, PLANS), read_json(files, place, DATASET)
    chosen = load_folds(files, place, folds_of(files, place, folds))
    name = next(iter(chosen.values())).configuration
    checkpoints = {name: chosen}
    order = chain_of(plans, name)
    for stage in order[:-1]:
        beside, around = find_beside(source, files, place, stage)
        if with_inherited(read_json(around, beside, PLANS), stage) != with_inherited(plans, stage):
            raise AutosegError(f"{beside} was trained with another plan of {stage} than {name}; they make no cascade")
        checkpoints[stage] = load_folds(around, beside, folds_of(around, beside, ()))
    flips = {stage: next(iter(points.values())).mirror_axes for stage, points in checkpoints.items()}
    plan = to_plan(plans, dataset, order, flips)
    stages: list[Stage] = []
    weights: dict[str, bytes] = {}
    for stage in order:
        spec = plan.configuration(stage)
        sizes = (plan.in_channels(spec), plan.labels.heads)
        found = {fold: save(rename(p.weights, spec.network, *sizes)) for fold, p in checkpoints[stage].items()}
        made = Stage(configuration=stage, folds=tuple("all" if fold == "all" else int(fold) for fold in found))
        weights |= {made.member(fold): packed for fold, packed in zip(made.folds, found.values())}
        stages.append(made)
    card, said = read_card(files, place, plan, name, {f"fold_{fold}": packed for fold, packed in found.items()})
    stages[-1] = replace(stages[-1], card=card)
    trainers = {stage: next(iter(points.values())).trainer for stage, points in checkpoints.items()}
    trained = [f"{s}: fold {', '.join(checkpoints[s])}, trained by {trainers[s]}" for s in order]
    stated = f" Its dataset.json states the licence {dataset['licence']!r}." if "licence" in dataset else ""
    content = ModelFile(
        autoseg_version=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        plan=plan,
        stages=tuple(stages),
        note=f"Imported from a model of nnU-Net v2 ({'; '.join(trained)}).{stated}",
    )
    return Imported(content=content, weights=weights, notes=(*trained, f"post-processing: {said}"))


def find_models(files: Files) -> tuple[str, ...]:
    """Places of all model folders, "" for the root itself."""
    names = files.names()
    there = set(names)
    found = set()
    for name in names:
        path = PurePosixPath(name)
        folder = "" if len(path.parts) == 2 else path.parent.parent.as_posix()
        described = {_join(folder, PLANS), _join(folder, DATASET)} <= there
        if path.name == CHECKPOINT and path.parent.name.startswith("fold_") and described:
            found.add(folder)
    return tuple(sorted(found))


def choose(source: Path, places: Sequence[str], configuration: str | None) -> str:
    """The place of the model that is meant: by its configuration, or where that is not enough by its folder's name.

    Raises AutosegError that lists the choices if it is not plain.
    """
    folders = {place: PurePosixPath(place).name or source.resolve().name for place in places}
    models = {place: folder.rpartition("__")[2] for place, folder in folders.items()}
    fitting = [place for place in places if configuration in (None, models[place], folders[place])]
    if len(fitting) == 1:
        return fitting[0]
    listed = "\n".join(f"  -c {name}   ({place or source})" for place, name in models.items())
    if not fitting:
        raise AutosegError(f"{source} has no model {configuration!r}; it has\n{listed}")
    if configuration is None:
        raise AutosegError(f"{source} holds {len(models)} models; choose one:\n{listed}")
    places = "\n".join(f"  -c {folders[place]}" for place in fitting)
    raise AutosegError(f"{source} holds {len(fitting)} models of {configuration}; choose one:\n{places}")


def find_beside(source: Path, files: Files, place: str, stage: str) -> tuple[str, Files]:
    """The folder of an earlier stage: of the same trainer and plans, beside the folder `place`."""
    if place == "":
        source = source.resolve()
        files, place = Folder(source.parent), source.name
    folder = PurePosixPath(place)
    beside = folder.with_name(f"{folder.name.rpartition('__')[0]}__{stage}").as_posix()
    if beside not in find_models(files):
        raise AutosegError(
            f"{folder.name} is the second stage of a cascade and reads what {stage} predicts; put the trained folder "
            f"{PurePosixPath(beside).name} beside it"
        )
    return beside, files


def folds_of(files: Files, place: str, wanted: Sequence[str]) -> list[str]:
    """Names of the folds to take, in order. Raises AutosegError if one that is wanted is not there."""
    below = f"{place}/" if place else ""
    found = [
        PurePosixPath(name).parent.name.removeprefix("fold_")
        for name in files.names()
        if name.startswith(f"{below}fold_")
        and name.removeprefix(below).count("/") == 1
        and name.endswith(f"/{CHECKPOINT}")
    ]
    missing = [fold for fold in wanted if fold not in found]
    if missing:
        raise AutosegError(
            f"{place or 'the model'} has no finished fold {', '.join(missing)}; it has {', '.join(found)}"
        )
    crossed = [fold for fold in found if fold != "all"]
    return [fold for fold in found if fold in wanted] or crossed or found


def load_folds(files: Files, place: str, folds: Sequence[str]) -> dict[str, Checkpoint]:
    """The checkpoint of each fold. Raises AutosegError if they are of different configurations."""
    found = {}
    for fold in folds:
        name = _join(place, f"fold_{fold}/{CHECKPOINT}")
        with files.path(name) as path:
            found[fold] = read_checkpoint(path, shown=name)
    if len(kinds := sorted({point.configuration for point in found.values()})) > 1:
        raise AutosegError(f"the folds of {place or 'the model'} are of several configurations: {', '.join(kinds)}")
    return found


def read_json(files: Files, place: str, name: str) -> dict[str, Any]:
    """A JSON object of the model folder."""
    try:
        content = json.loads(files.read(_join(place, name)))
    except (ValueError, RecursionError) as error:
        raise AutosegError(f"{_join(place, name)} is no valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise AutosegError(f"{_join(place, name)} must hold an object {{...}}, found {type(content).__name__}")
    return content


def read_card(
    files: Files, place: str, plan: Plan, name: str, weights: Mapping[str, bytes]
) -> tuple[ModelCard | None, str]:
    """The cross-validated scores and the post-processing that nnU-Net has found for these very folds, and in words.

    weights: of each fold, by its folder. Raises AutosegError for a function other than keeping the largest component.
    """
    folds = "_".join(fold.removeprefix("fold_") for fold in weights)
    folder = _join(place, f"crossval_results_folds_{folds}")
    if _join(folder, RULES) not in files.names():
        below = f"{place}/" if place else ""
        if _join(folder, PICKLED) in files.names():
            return None, f"none: {folder} holds it as {PICKLED} alone, which could run anything and is not read"
        others = [n for n in files.names() if n.startswith(f"{below}crossval_results") and n.endswith(RULES)]
        seen = f"; what there is belongs to others: {', '.join(others)}" if others else ""
        return None, f"none was fitted for these folds{seen}"
    content = read_json(files, folder, RULES)
    where = _join(folder, RULES)
    values = plan.labels.stored
    steps = []
    for function, given in zip(
        need(content, "postprocessing_fns", where), need(content, "postprocessing_kwargs", where)
    ):
        if function != KEEP_LARGEST:
            raise AutosegError(f"{where} asks for {function!r}; only {KEEP_LARGEST} is known")
        chosen = need(given, "labels_or_regions", where)
        members = [chosen] if isinstance(chosen, int) else chosen
        if unknown := [value for value in members if value not in values]:
            raise AutosegError(f"{where} speaks of labels {unknown}, dataset.json of {list(values)}")
        steps.append(Step(kind="largest", members=tuple(values.index(v) for v in members)))

    def dice(part: str) -> dict[str, float | None]:
        scores = need(content, part, where)
        means = {"foreground": scores["foreground_mean"]["Dice"]}
        # A class is keyed by its value, a region by its values in brackets.
        by_values = {frozenset(map(int, re.findall(r"\d+", key))): mean["Dice"] for key, mean in scores["mean"].items()}
        for label, own in plan.labels.scored.items():
            means[label] = by_values.get(frozenset([own] if isinstance(own, int) else own))
        return {key: mean if mean is not None and isfinite(mean) else None for key, mean in means.items()}

    summary = read_json(files, folder, SUMMARY) if _join(folder, SUMMARY) in files.names() else {}
    cases = len(summary.get("metric_per_case", ()))
    rule = PostProcessing(cases=cases, steps=tuple(steps))
    card = ModelCard(
        dataset=plan.dataset,
        configuration=name,
        folds={fold: hashlib.sha256(packed).hexdigest()[:HASH] for fold, packed in weights.items()},
        cases=cases,
        dice=dice("input_folder"),
        dice_postprocessed=dice("postprocessed"),
        postprocessing=rule,
    )
    return card, rule.describe(plan.labels)


def _join(place: str, name: str) -> str:
    return f"{place}/{name}" if place else name
