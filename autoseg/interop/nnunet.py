"""A trained model of nnU-Net v2, as a folder or as the zip that nnU-Net exports -> a model of ours.

A model folder is TRAINER__PLANS__CONFIGURATION with plans.json, dataset.json and fold_N/checkpoint_final.pth; several
stand side by side in a results folder or a zip. A zip is read member by member, by names found here: nothing is
unpacked to a name that the file says. Checkpoints are read as data (autoseg/interop/nnunet_weights.py); the
post-processing is taken from postprocessing.json, never from the pickle beside it.
"""

import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch
from torch import Tensor

from autoseg.interop.nnunet_plans import chain_of, need, to_plan
from autoseg.interop.nnunet_weights import Checkpoint, read_checkpoint, rename
from autoseg.model import Model
from autoseg.networks import build
from autoseg.postprocess import PostProcessing, Step
from autoseg.records import AutosegError
from autoseg.schema import Plan

PLANS, DATASET, CHECKPOINT, RULES = "plans.json", "dataset.json", "checkpoint_final.pth", "postprocessing.json"
MOST_JSON_BYTES = 256 << 20
KEEP_LARGEST = "remove_all_but_largest_component_from_segmentation"


@dataclass(frozen=True, eq=False, kw_only=True)
class Imported:
    """A model as it was read: the plan of its configuration, in a cascade of the earlier ones too, and its weights."""

    source: str
    plan: Plan
    configuration: str
    folds: dict[str, tuple[str, ...]]
    """Configuration -> names of its folds, as `weights`."""
    weights: dict[str, tuple[dict[str, Tensor], ...]]
    """Configuration, the first stage first -> tensors by our names, one entry a fold."""
    rule: PostProcessing | None
    notes: tuple[str, ...] = field(default=())

    def model(self, device: torch.device) -> Model:
        """Ready to predict on `device`."""
        made: Model | None = None
        for name, folds in self.weights.items():
            configuration = self.plan.configuration(name)
            networks = []
            for weights in folds:
                with torch.device("meta"):
                    network = build(configuration.network, self.plan.in_channels(configuration), self.plan.labels.heads)
                network.load_state_dict(weights, assign=True)
                networks.append(network.requires_grad_(False).to(device).eval())
            made = Model(
                plan=self.plan, configuration=configuration, networks=tuple(networks), device=device, before=made
            )
        assert made is not None
        return made


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
        except (zipfile.BadZipFile, OSError) as error:
            raise AutosegError(f"{self.root} is no zip file, or a damaged one ({error})") from None

    def read(self, name: str) -> bytes:
        """The content of a member."""
        with self._open(name, MOST_JSON_BYTES) as member:
            return member.read()

    @contextmanager
    def path(self, name: str) -> Iterator[Path]:
        """A temporary copy, under a name of our own: torch reads files, and the member is packed."""
        most = 4 * self.root.stat().st_size + (1 << 20)
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "checkpoint.pth"
            with self._open(name, most) as member, copy.open("wb") as target:
                try:
                    shutil.copyfileobj(member, target, 1 << 20)
                except (zipfile.BadZipFile, EOFError, OSError) as error:
                    raise AutosegError(f"{self.root}: {name} is damaged ({error}); copy the file again") from None
            yield copy

    @contextmanager
    def _open(self, name: str, most: int) -> Iterator[Any]:
        with zipfile.ZipFile(self.root) as file:
            info = file.getinfo(name)
            # Weights hardly shrink: a member that grows manifold is no checkpoint.
            if info.file_size > most:
                raise AutosegError(f"{self.root}: {name} unpacks to {info.file_size} bytes; it is refused")
            with file.open(info) as member:
                yield member


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
    plans, dataset = read_json(files, place, PLANS), read_json(files, place, DATASET)

    chosen = folds_of(files, place, folds)
    checkpoints = {place: [load(files, place, fold) for fold in chosen]}
    name = checkpoints[place][0].configuration
    places = {name: place}
    names = {name: tuple(chosen)}
    *earlier, _ = chain_of(plans, name)
    for stage in earlier:
        beside, around = find_beside(source, files, place, stage)
        names[stage] = tuple(folds_of(around, beside, ()))
        places[stage] = beside
        checkpoints[beside] = [load(around, beside, fold) for fold in names[stage]]
    order = (*earlier, name)
    flips = {stage: checkpoints[places[stage]][0].mirror_axes for stage in order}
    plan = to_plan(plans, dataset, order, flips)
    weights = {}
    for stage in order:
        spec = plan.configuration(stage)
        sizes = (plan.in_channels(spec), plan.labels.heads)
        weights[stage] = tuple(rename(point.weights, spec.network, *sizes) for point in checkpoints[places[stage]])
    notes = [f"{s}: folds {', '.join(names[s])}, trained by {checkpoints[places[s]][0].trainer}" for s in order]
    rule, said = read_rule(files, place, plan, names[name])
    return Imported(
        source=str(source),
        plan=plan,
        configuration=name,
        folds={stage: names[stage] for stage in order},
        weights=weights,
        rule=rule,
        notes=(*notes, said),
    )


def find_models(files: Files) -> dict[str, str]:
    """Place of every model folder ("" for the root itself) -> the configuration that its name ends in."""
    names = files.names()
    there = set(names)
    found = {}
    for name in names:
        path = PurePosixPath(name)
        folder = path.parent.parent.as_posix().removeprefix(".")
        described = {_join(folder, PLANS), _join(folder, DATASET)} <= there
        if path.name == CHECKPOINT and path.parent.name.startswith("fold_") and described:
            found[folder] = PurePosixPath(folder).name.rpartition("__")[2]
    return found


def choose(source: Path, models: Mapping[str, str], configuration: str | None) -> str:
    """The place of the model that is meant. Raises AutosegError that lists the choices if it is not plain."""
    fitting = [
        place
        for place, name in models.items()
        if configuration is None or configuration in (name, PurePosixPath(place).name)
    ]
    if "" in models and configuration is None:
        return ""
    if len(fitting) == 1:
        return fitting[0]
    listed = "\n".join(f"  -c {name}   ({place or source})" for place, name in models.items())
    if not fitting:
        raise AutosegError(f"{source} has no model {configuration!r}; it has\n{listed}")
    if configuration is None:
        raise AutosegError(f"{source} holds {len(models)} models; choose one:\n{listed}")
    places = "\n".join(f"  -c {PurePosixPath(place).name}" for place in fitting)
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
    return list(wanted) or crossed or found


def load(files: Files, place: str, fold: str) -> Checkpoint:
    """The checkpoint of one fold."""
    name = _join(place, f"fold_{fold}/{CHECKPOINT}")
    with files.path(name) as path:
        return read_checkpoint(path, shown=name)


def read_json(files: Files, place: str, name: str) -> dict[str, Any]:
    """A JSON object of the model folder."""
    try:
        content = json.loads(files.read(_join(place, name)))
    except (ValueError, RecursionError) as error:
        raise AutosegError(f"{_join(place, name)} is no valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise AutosegError(f"{_join(place, name)} must hold an object {{...}}, found {type(content).__name__}")
    return content


def read_rule(files: Files, place: str, plan: Plan, folds: Sequence[str]) -> tuple[PostProcessing | None, str]:
    """The post-processing that nnU-Net has found for these folds, and a line that says what was taken.

    Raises AutosegError for a function other than keeping the largest component.
    """
    below = f"{place}/" if place else ""
    fitting = _join(place, f"crossval_results_folds_{'_'.join(folds)}/{RULES}")
    if fitting not in files.names():
        others = [
            name for name in files.names() if name.startswith(f"{below}crossval_results") and name.endswith(RULES)
        ]
        seen = f"; there is one for other folds ({', '.join(others)})" if others else ""
        return None, f"post-processing: none found for these folds{seen}"
    content = read_json(files, fitting.rpartition("/")[0], RULES)
    functions = need(content, "postprocessing_fns", fitting)
    arguments = need(content, "postprocessing_kwargs", fitting)
    steps = []
    for function, given in zip(functions, arguments, strict=True):
        if function != KEEP_LARGEST:
            raise AutosegError(f"{fitting} asks for {function!r}; only {KEEP_LARGEST} is known")
        values = need(given, "labels_or_regions", fitting)
        members = tuple(plan.labels.values.index(value) for value in ([values] if isinstance(values, int) else values))
        steps.append(Step(members=members, dice_before=None, dice_after=None))
    rule = PostProcessing(cases=0, steps=tuple(steps))
    return rule, f"post-processing: {rule.describe(plan.labels.names)}"


def _join(place: str, name: str) -> str:
    return f"{place}/{name}" if place else name
