"""A trained model: the folds of one configuration, with the plan that prepares their input.

`Trained` says which folds, in the folders of a run or in a model file; `Model` is them opened, ready to predict. A
model file is data of unknown origin: its network is built without memory, and takes the tensors of the file only if
they are exactly those that it needs, so that nothing which the file states reserves memory.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from autoseg.bundle import Bundle, ModelCard, read, refusal
from autoseg.checkpoint import load_weights, read_weights
from autoseg.inference import Swap, predict_logits
from autoseg.mirroring import Flips
from autoseg.networks import NETWORKS, build
from autoseg.postprocess import PostProcessing, apply
from autoseg.preprocess import PreparedCase, prepare
from autoseg.records import AutosegError, load_json, to_json
from autoseg.restore import Trace, project, restore, restore_probabilities
from autoseg.schema import Configuration, Plan, Run
from autoseg.training import WEIGHTS
from autoseg.volume import Grid, Volume, canonical_grid


@dataclass(frozen=True, eq=False, kw_only=True)
class Model:
    """Networks of one configuration, ready to predict on `device`. Their logits are averaged."""

    plan: Plan
    configuration: Configuration
    networks: tuple[nn.Module, ...]
    device: torch.device
    before: "Model | None" = None
    """The earlier stage of a cascade, whose labels the networks read beside the image."""

    @property
    def configurations(self) -> tuple[Configuration, ...]:
        """Those of all stages."""
        return (*(self.before.configurations if self.before else ()), self.configuration)

    def prepare(self, case: str, image: Volume, stored: Grid) -> PreparedCase:
        """Canonical image -> what the networks read, by the same function as in training, for all stages."""
        prepared = prepare(case, image, None, stored, self.plan, self.configuration)
        return prepared if self.before is None else replace(prepared, before=self.before.prepare(case, image, stored))

    def logits(
        self,
        case: PreparedCase,
        *,
        prior: np.ndarray | None = None,
        step: float = 0.5,
        mirror: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Prepared case -> mean logits (K, Z, Y, X) of all folds on the prepared grid, float32.

        prior: labels (Z, Y, X) of the earlier stage on the same grid; left out, `before` predicts them.
        step: distance of tiles as a share of the patch; mirror: average over mirror images too.
        """
        patch, flips = self.configuration.patch, self.plan.flips(self.configuration)
        image = np.asarray(case.image[...])
        if self.configuration.previous_stage is not None:
            if prior is None:
                if self.before is None or case.before is None:
                    raise ValueError(f"{self.configuration.name} needs the labels of the stage before, or its model")
                earlier = self.before.logits(case.before, step=step, mirror=mirror)
                stages = self.before.configuration, self.configuration
                prior = project(earlier, case.before.trace, case.trace, self.plan.labels, *stages)
            masks = [prior == index for index in self.plan.labels.foreground]
            image = np.concatenate([image, np.stack(masks).astype(np.float32)])
        return predict_logits(
            self.networks,
            torch.from_numpy(np.ascontiguousarray(image)),
            patch=patch,
            heads=self.plan.labels.heads,
            context=self.configuration.context,
            step=step,
            mirror_axes=flips.axes if mirror else (),
            swap=self.swap(flips),
            device=self.device,
            progress=progress,
        ).numpy()

    def swap(self, flips: Flips) -> Swap | None:
        """What trades places in a mirrored view: heads of left and right, and in a cascade the masks of both."""
        if not flips.indices:
            return None
        assert flips.left_right is not None
        labels, images = self.plan.labels, len(self.plan.channels)
        masks = [images + flips.indices[i] - 1 for i in labels.foreground] if self.configuration.previous_stage else []
        return Swap(axis=flips.left_right, channels=(*range(images), *masks), heads=flips.heads)

    def labels(self, logits: np.ndarray, trace: Trace, rule: PostProcessing | None = None) -> np.ndarray:
        """Logits of a prepared case -> labels (Z, Y, X) on its file's canonical grid, with the values of the files."""
        indices = restore(logits, trace, self.plan.labels, self.configuration)
        if rule is not None:
            indices = apply(indices, rule, canonical_grid(trace.stored).spacing_mm)
        return self.plan.labels.to_values(indices)

    def probabilities(self, logits: np.ndarray, trace: Trace) -> np.ndarray:
        """Logits of a prepared case -> probabilities (K, Z, Y, X), float32, on its file's canonical grid."""
        return restore_probabilities(logits, trace, self.plan.labels, self.configuration)


T = TypeVar("T")

HASH = 16
"""Hexadecimal digits of the SHA-256 of a file of weights that tell it from others."""
CARD = "model.json"
"""Beside the folds of a configuration: its ModelCard."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Trained:
    """The chosen folds of one configuration, and what is known of them, wherever they lie."""

    where: Path
    """The folder of the configuration, or the model file."""
    plan: Plan
    configuration: Configuration
    folds: Mapping[str, str]
    """Fold folder -> hash of its weights."""
    card: ModelCard | None
    weights: Callable[[], Iterator[nn.Module]]
    """The networks of the folds, one after another, on the CPU."""
    before: "Trained | None" = None
    """All folds of the earlier stage of a cascade."""

    @property
    def name(self) -> str:
        """Of the configuration."""
        return self.configuration.name

    def describe(self) -> str:
        """Dataset, configuration, folds and where they lie, for people."""
        names = ", ".join(fold.removeprefix("fold_") for fold in self.folds)
        return f"{self.plan.dataset} {self.name}, fold {names} ({self.where})"

    def identity(self) -> tuple[str, ...]:
        """All that tells its networks and what they read from others."""
        return *self.hashes(), to_json(self.plan.concerning(self.configuration.name))

    def postprocessing(self) -> tuple[PostProcessing | None, str]:
        """The rule that goes with these very weights, and in words what is done and why."""
        if self.card is None:
            return None, "none: it is fitted once all folds are trained"
        return self.card.rule_for(self.folds, self.plan.labels)

    def hashes(self) -> tuple[str, ...]:
        """Of all weights, those of the earlier stage last."""
        return (*self.folds.values(), *(self.before.hashes() if self.before else ()))

    def open(self, device: torch.device) -> Model:
        """The model on `device`. Raises AutosegError if weights are damaged or unfit."""
        return Model(
            plan=self.plan,
            configuration=self.configuration,
            networks=tuple(network.to(device).eval() for network in self.weights()),
            device=device,
            before=None if self.before is None else self.before.open(device),
        )


def is_finished(folder: Path) -> bool:
    """Whether a fold folder holds a fold that was trained to its end."""
    path = folder / "run.json"
    return path.is_file() and load_json(Run, path).finished is not None and (folder / WEIGHTS).is_file()


def weights_hash(folder: Path) -> str:
    """Hash of the weights of a finished fold: tells whether anything made with them is still theirs."""
    with (folder / WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:HASH]


def open_run(folder: Path) -> Run:
    """The run.json of a fold folder; AutosegError if the fold is not there or not trained to its end."""
    run = load_json(Run, folder / "run.json")
    if run.finished is None or not (folder / WEIGHTS).is_file():
        raise AutosegError(f"{folder} is not trained to its end; give the same train command again to go on")
    return run


def in_folders(folders: Sequence[Path], before: Sequence[Path] = ()) -> Trained:
    """The finished folds in `folders`; `before` are those of a cascade's earlier stage.

    Raises AutosegError if a fold is unfinished, or made with another plan than the first.
    """
    runs = [open_run(folder) for folder in folders]
    first = runs[0]
    for run, folder in zip(runs, folders):
        name = run.configuration
        if name != first.configuration or run.plan.concerning(name) != first.plan.concerning(name):
            raise AutosegError(f"{folder} was trained with another plan than {folders[0]}; they cannot be averaged")
    earlier = in_folders(before) if before else None
    # As in training: what the plans say of the later stage may differ.
    if earlier is not None and earlier.plan.concerning(earlier.name) != first.plan.concerning(earlier.name):
        raise AutosegError(f"{before[0]} was trained with another plan than {folders[0]}; they make no cascade")
    configuration = first.plan.configuration(first.configuration)

    def networks() -> Iterator[nn.Module]:
        for folder in folders:
            yield network_in_file(first.plan, configuration, folder / WEIGHTS)

    card = folders[0].parent / CARD
    return Trained(
        where=folders[0].parent,
        plan=first.plan,
        configuration=configuration,
        folds={folder.name: weights_hash(folder) for folder in folders},
        card=load_json(ModelCard, card) if card.is_file() else None,
        weights=networks,
        before=earlier,
    )


def in_file(path: Path, folds: Sequence[str] = ()) -> Trained:
    """The folds of a model file: those asked for, else all. Raises AutosegError if the file is unsound or lacks one."""
    bundle = read(path)
    found: Trained | None = None
    for stage in bundle.content.stages:
        configuration = bundle.content.plan.configuration(stage.configuration)
        names = {f"fold_{fold}": stage.member(fold) for fold in stage.folds}
        if stage is bundle.content.stages[-1]:
            names = chosen_folds(names, folds)
        found = Trained(
            where=path,
            plan=bundle.content.plan,
            configuration=configuration,
            folds={fold: bundle.content.members[name].sha256[:HASH] for fold, name in names.items()},
            card=stage.card,
            weights=_reading(bundle, configuration, tuple(names.values())),
            before=found,
        )
    assert found is not None
    return found


def at(path: Path, folds: Sequence[str] = ()) -> Trained:
    """The model in a model file, in the folder of a configuration of a run, or of one fold; see `chosen_folds`.

    All finished folds of a cascade's earlier stage come with it. Raises AutosegError if there is none.
    """
    if not path.exists():
        raise AutosegError(f"{path} does not exist; give a model file, or a folder such as runs/DATASET/RUN/3d_fullres")
    if not path.is_dir():
        return in_file(path, folds)
    if (path / "run.json").is_file():
        finished = {path.name: path}
    else:
        finished = {fold.name: fold for fold in sorted(path.glob("fold_*")) if is_finished(fold)}
    if not finished:
        raise AutosegError(
            f"{path} holds no fold that is trained to its end; give a folder such as runs/DATASET/RUN/3d_fullres, or a "
            "model file"
        )
    chosen = tuple(chosen_folds(finished, folds).values())
    return in_folders(chosen, earlier_folds(chosen[0]))


def _reading(bundle: Bundle, configuration: Configuration, names: Sequence[str]) -> Callable[[], Iterator[nn.Module]]:
    def networks() -> Iterator[nn.Module]:
        for name in names:
            tensors = tensors_of(bundle, name)
            try:
                yield network_with(bundle.content.plan, configuration, tensors)
            except (ValueError, AutosegError) as error:
                raise refusal(bundle.path, f"{name} does not fit its plan: {error}") from None

    return networks


def tensors_of(bundle: Bundle, name: str) -> dict[str, Tensor]:
    """The tensors of the member `name` of a model file. Raises AutosegError if they are not what they should be."""
    try:
        return load(bundle.weights(name))
    except (SafetensorError, ValueError, KeyError) as error:
        raise refusal(bundle.path, f"{name} is no sound safetensors file ({error})") from None


def chosen_folds(finished: Mapping[str, T], asked: Sequence[str]) -> dict[str, T]:
    """Of `finished` (fold folder -> anything) those `asked` for (`0`, `all`), else all cross-validated ones.

    The fold `all` saw every case in training: it stands beside others only when it is asked for. Raises AutosegError
    that lists the folds there are.
    """
    by_name = {fold.removeprefix("fold_"): fold for fold in finished}
    if missing := [name for name in asked if name not in by_name]:
        raise AutosegError(f"fold {', '.join(missing)} is not trained to its end; finished: {', '.join(by_name)}")
    names = asked or [name for name in by_name if name != "all"] or list(by_name)
    return {by_name[name]: finished[by_name[name]] for name in names}


def network_in_file(plan: Plan, configuration: Configuration, path: Path) -> nn.Module:
    """The network with the weights at `path`. Raises AutosegError for a missing, broken or unfitting file."""
    if configuration.network.name not in NETWORKS:
        network = build(configuration.network, plan.in_channels(configuration), plan.labels.heads)
        load_weights(network, path)
        return network
    try:
        return network_with(plan, configuration, read_weights(path))
    except ValueError as error:
        raise AutosegError(f"the weights in {path} do not fit the planned network: {error}") from None


def network_with(plan: Plan, configuration: Configuration, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The network of a configuration, made of `tensors`; no random number is drawn, and no memory taken beside theirs.

    Raises ValueError unless names, shapes and types are exactly those that the plan asks for.
    """
    spec = configuration.network
    # Every block has a tensor: a plan cannot ask for building more of them than there is in the file.
    if sum(spec.encoder_blocks) + sum(spec.decoder_blocks) > len(tensors):
        raise ValueError(f"there are {len(tensors)} tensors, fewer than the planned network has blocks")
    try:
        with torch.device("meta"):
            network = build(spec, plan.in_channels(configuration), plan.labels.heads)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(f"the planned network cannot be built ({str(error).splitlines()[0]})") from None
    expected = network.state_dict()
    if odd := sorted(set(expected) ^ set(tensors)):
        raise ValueError(f"the tensor {odd[0]!r} is {'missing' if odd[0] in expected else 'not part of the network'}")
    for name, tensor in tensors.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            raise ValueError(
                f"the tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}, and the network needs {wanted.dtype} "
                f"{tuple(wanted.shape)}"
            )
    network.load_state_dict(dict(tensors), assign=True)
    return network


def open_model(folders: Sequence[Path], device: torch.device, before: Sequence[Path] = ()) -> Model:
    """The model made of the finished folds in `folders`; see `in_folders`."""
    return in_folders(folders, before).open(device)


def earlier_folds(folder: Path) -> tuple[Path, ...]:
    """All finished cross-validation folds of the stage before the fold in `folder`; empty if there is no such stage.

    Raises AutosegError if the stage before has no finished fold.
    """
    run = open_run(folder)
    stage = run.plan.configuration(run.configuration).previous_stage
    if stage is None:
        return ()
    place = folder.parent.parent / stage
    found = tuple(path for path in sorted(place.glob("fold_[0-9]*")) if is_finished(path))
    if not found:
        raise AutosegError(
            f"{run.configuration} reads predictions of {stage}, and {place} holds no finished fold of it"
        )
    return found


def channels_wanted(plan: Plan) -> str:
    """What to do about an image of another number of channels than a model reads."""
    return f"the model reads {', '.join(plan.sources)}, a file each or all in one; give just these"


def other_dimension(stored: Grid, plan: Plan, configurations: Iterable[Configuration]) -> str | None:
    """What to say of an image that has another dimension than those of training, where that can be meant; else None.

    configurations: all that are to see it. Raises AutosegError where it cannot be meant.
    """
    if stored.dimension == plan.dimension:
        return None
    if plan.dimension == 2:
        return "is a 3D image, and the model knows 2D images: each slice is segmented for itself"
    if volumes := sorted({configuration.name for configuration in configurations if configuration.dimension == 3}):
        raise AutosegError(
            f"this is a 2D image, and {', '.join(volumes)} sees volumes; give all slices of the volume as one 3D file, "
            "or predict with a model of the configuration 2d"
        )
    return "is a 2D image, and the model knows volumes: it is taken for a single slice of one"
