"""The model file: everything that predicting needs, in one file that can be sent to anybody and opened by anybody.

It is a zip without compression: `model.json` (a ModelFile), `model.json.sha256`, and the weights of every fold as
`CONFIGURATION/fold_N.safetensors`. Nothing in it is ever executed, unpickled or written to the disk. Reading trusts no
number that the file states: members are read by the names that model.json implies and no others, in small pieces, and
are used only if size and SHA-256 are the stated ones. So a file that is cut short or altered is refused with its
reason. The checksums tell nothing about who made it: whoever alters a file can make them anew.
"""

import hashlib
import io
import os
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import IO, Annotated, Literal

from pydantic import Field, NonNegativeInt, TypeAdapter, ValidationError
from pydantic_core import from_json

from autoseg.labels import Labels
from autoseg.postprocess import PostProcessing
from autoseg.records import SCHEMA_VERSION, AutosegError, atomic_write, problems, record, to_json
from autoseg.schema import Configuration, Fingerprint, Plan

ENDING = ".autoseg"
CARD, CHECKSUM = "model.json", "model.json.sha256"

PIECE = 1 << 20
"""Bytes read at a time; the zip's own directory, a hundred bytes a member, must fit into one piece."""
MOST_JSON = 32 << 20
"""Bytes of the largest model.json: room for the fingerprint of a hundred thousand cases."""
MOST_HEADER = 4 << 20
"""Bytes of the largest header of a safetensors member; the largest networks here have some ten thousand."""
MOST_PATCH = 1 << 28
"""Voxels of the largest patch: several times what the largest GPU trains on."""

FoldName = NonNegativeInt | Literal["all"]


@record
class ModelCard:
    """What is known of a configuration whose folds are trained: model.json beside them, and a part of a model file."""

    schema_version: int = SCHEMA_VERSION
    dataset: str
    configuration: str
    folds: dict[str, str]
    """Fold folder -> hash of the weights that were cross-validated."""
    cases: int
    dice: dict[str, float | None]
    """Class -> mean Dice of the held-out cases, as predicted; `foreground` is the mean over classes."""
    dice_postprocessed: dict[str, float | None]
    postprocessing: PostProcessing

    def rule_for(self, hashes: Mapping[str, str], labels: Labels) -> tuple[PostProcessing | None, str]:
        """The post-processing for the folds in `hashes` (name -> hash of the weights), and in words what and why.

        It belongs to the very weights whose predictions it was fitted on, and is None for others.
        """
        if left_out := [fold for fold in hashes if fold not in self.folds]:
            return None, f"none: {', '.join(left_out)} had no part in the cross-validation that it was fitted on"
        if changed := [fold for fold, found in hashes.items() if self.folds[fold] != found]:
            return None, f"none: {', '.join(changed)} was trained further since it was fitted"
        return self.postprocessing, self.postprocessing.describe(labels)


@record
class Member:
    """Size and SHA-256 (hexadecimal) of a file of weights."""

    bytes: NonNegativeInt
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@record
class Stage:
    """The trained folds of one configuration."""

    configuration: Annotated[str, Field(pattern="^[A-Za-z0-9_][A-Za-z0-9_-]*$", max_length=100)]
    folds: tuple[FoldName, ...]
    card: ModelCard | None = None
    """Its cross-validated scores and post-processing; None where it was not cross-validated."""

    def member(self, fold: FoldName) -> str:
        """Where the zip holds the weights of a fold."""
        return f"{self.configuration}/fold_{fold}.safetensors"


@record
class ModelFile:
    """model.json of a model file."""

    schema_version: int = SCHEMA_VERSION
    autoseg_version: str
    versions: dict[str, str] = field(default_factory=dict)
    """Package -> version that the model was trained with."""
    created: str
    """ISO 8601, UTC."""
    plan: Plan
    stages: tuple[Stage, ...]
    """The configurations in the order in which they run: one, or both of a cascade. The last one is the model."""
    fingerprint: Fingerprint | None = None
    """Of the training data, its cases numbered: names of cases may be those of patients."""
    licence: str = ""
    """Under which others may use the model, as its authors state it."""
    note: str = ""
    """Whatever else its authors state: who they are, what to cite, what it must not be used for."""
    members: dict[str, Member] = field(default_factory=dict)
    """Every file of weights; filled in by `write`."""

    @property
    def configuration(self) -> Configuration:
        """The configuration that the model predicts with."""
        return self.plan.configuration(self.stages[-1].configuration)


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A model file that was opened: its record is checked, its weights are when they are read."""

    path: Path
    content: ModelFile

    def weights(self, name: str) -> bytes:
        """The bytes of the member `name`, a safetensors file. Raises AutosegError if they are not what they should be.

        The file is opened anew each time, so nothing is held open and threads may share a Bundle.
        """
        member = self.content.members[name]
        with _opened(self.path) as archive:
            if _info(archive, name).file_size != member.bytes:
                raise _Unsound(f"{name} has another size than {CARD} states")
            with archive.open(name) as file:
                content = _read(file, member.bytes)
        if hashlib.sha256(content).hexdigest() != member.sha256:
            raise refusal(self.path, f"the checksum of {name} is wrong: it was altered")
        if len(content) < 8 or int.from_bytes(content[:8], "little") > min(MOST_HEADER, len(content) - 8):
            raise refusal(self.path, f"{name} states a header that is larger than a network's can be")
        return content


class _Unsound(Exception):
    """Why a file is refused."""


def refusal(path: Path, reason: str) -> AutosegError:
    """The error that a model file is refused with."""
    return AutosegError(f"{path} is refused: {printable(reason)}. Get the file again from where it came")


def printable(text: str) -> str:
    """Text of a model file as a terminal may show it: control characters, which could steer the terminal, as `?`."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)


def write(path: Path, content: ModelFile, weights: Mapping[str, bytes | Path]) -> ModelFile:
    """Write a model file, whole or not at all. Returns its record with the checksums filled in.

    weights: for each member that the stages name (see `Stage.member`) a safetensors file, or its bytes. Raises
    AutosegError if the record is one that `read` would refuse, ValueError if the weights are not those that it names.
    """
    expected = {stage.member(fold) for stage in content.stages for fold in stage.folds}
    if expected != set(weights):
        raise ValueError(f"the record names {sorted(expected)}, and the weights are {sorted(weights)}")
    if reason := unsound(content):
        raise AutosegError(f"{path} is not written: {reason}")
    members = {}
    with atomic_write(path, "wb") as target, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, source in weights.items():
            size = len(source) if isinstance(source, bytes) else source.stat().st_size
            digest = hashlib.sha256()
            with _new_member(archive, name, size) as into:
                opened: IO[bytes] = io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
                with opened as file:
                    while piece := file.read(PIECE):
                        digest.update(piece)
                        into.write(piece)
            members[name] = Member(bytes=size, sha256=digest.hexdigest())
        content = replace(content, members=members)
        text = to_json(content).encode()
        if len(text) > MOST_JSON:
            raise AutosegError(f"{path} is not written: its description has {len(text):,} bytes, at most {MOST_JSON:,}")
        for name, said in ((CARD, text), (CHECKSUM, f"{hashlib.sha256(text).hexdigest()}  {CARD}\n".encode())):
            with _new_member(archive, name, len(said)) as into:
                into.write(said)
    return content


def read(path: Path) -> Bundle:
    """Open a model file and check its record. Raises AutosegError that names the file and the reason it is refused."""
    try:
        with _opened(path) as archive:
            text = _small(archive, CARD, MOST_JSON)
            said = _small(archive, CHECKSUM, 1000)
            names = set(archive.namelist()) - {CARD, CHECKSUM}
    except FileNotFoundError:
        raise AutosegError(f"{path} does not exist; give the path of a model file") from None
    if said.split()[:1] != [hashlib.sha256(text).hexdigest().encode()]:
        raise refusal(path, f"the checksum of {CARD} is wrong: it was altered")
    content = _parse(path, text)
    expected = {stage.member(fold) for stage in content.stages for fold in stage.folds}
    if reason := unsound(content):
        raise refusal(path, reason)
    if expected != names or expected != set(content.members):
        odd = sorted((expected ^ names) | (expected ^ set(content.members)))
        raise refusal(path, f"its weights are not those that {CARD} names: {odd[0]}")
    return Bundle(path=path, content=content)


def unsound(content: ModelFile) -> str | None:
    """Why the record of a model file cannot be that of a model, in words; None if it can."""
    plan = content.plan
    if not content.stages or not all(stage.folds for stage in content.stages):
        return "it holds no trained fold"
    names = [configuration.name for configuration in plan.configurations]
    before = None
    for stage in content.stages:
        if stage.configuration not in names:
            return f"its plan has no configuration {stage.configuration!r}"
        if len(set(stage.folds)) != len(stage.folds):
            return f"it names a fold of {stage.configuration} twice"
        configuration = plan.configuration(stage.configuration)
        if configuration.previous_stage != before:
            return f"{stage.configuration} does not follow on {before or 'nothing'}"
        before = stage.configuration
        steps = stage.card.postprocessing.steps if stage.card else ()
        # Label maps are int16.
        if any(not 0 <= index < 1 << 15 for step in steps for index in step.members):
            return f"the post-processing of {stage.configuration} names classes that cannot be"
        if reason := _impossible(configuration):
            return f"its configuration {configuration.name}: {reason}"
    if sorted(plan.axis_order) != [0, 1, 2]:
        return f"its axis order {plan.axis_order} is none"
    if any(channel.scheme == "ct" and channel.stats is None for channel in plan.channels) or not plan.channels:
        return "it does not say how its channels are normalised"
    if plan.preparation.function is not None:
        return (
            f"its images are prepared by {plan.preparation.function!r}, which is not part of autoseg. A model file "
            "holds no code, so such a model goes to others as its run folder, together with that code"
        )
    for crop in plan.preparation.crops:
        if crop.kind != "margins" and prod(edge or 1 for edge in crop.size) > MOST_PATCH:
            return f"a crop to {crop.size} voxels is none"
    return None


def _impossible(configuration: Configuration) -> str | None:
    network, dimension = configuration.network, configuration.dimension
    if ":" in network.name:
        return (
            f"the network {network.name!r} is not part of autoseg. A model file holds no code, so a model with a "
            "network of your own goes to others as its run folder, together with that code"
        )
    if not (network.dimension == dimension == len(configuration.patch) == len(configuration.spacing_mm)):
        return "patch, spacing and network differ in dimension"
    if min(configuration.patch) < 1 or prod(configuration.patch) > MOST_PATCH:
        return f"a patch of {configuration.patch} voxels is none"
    if min(configuration.spacing_mm) <= 0:
        return f"a spacing of {configuration.spacing_mm} mm is none"
    return None


def _parse(path: Path, text: bytes) -> ModelFile:
    try:
        loose = from_json(text)
        version = loose.get("schema_version") if isinstance(loose, dict) else None
        if isinstance(version, int) and version != SCHEMA_VERSION:
            by = loose.get("autoseg_version")
            raise AutosegError(
                f"{path} has the format {version}, and this version of autoseg reads {SCHEMA_VERSION}; use the "
                f"version that wrote it ({str(by)[:40]!r}), or a later one"
            )
        return TypeAdapter(ModelFile).validate_json(text)
    except ValidationError as error:
        raise refusal(path, f"its {CARD} is not valid:\n{problems(error)}\n") from None
    except ValueError as error:
        raise refusal(path, f"its {CARD} is no JSON ({error})") from None


class _Pieces(io.FileIO):
    """A file that gives at most PIECE bytes at a time, so that no size which a zip states reserves memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        left = os.fstat(self.fileno()).st_size - self.tell()
        if max(left if size is None or size < 0 else min(size, left), 0) > PIECE:
            raise _Unsound("its directory is larger than that of a model file")
        return super().read(size) or b""


NAMES = re.compile(r"model\.json(\.sha256)?|\w[\w-]*/fold_(\d+|all)\.safetensors", re.ASCII)
"""What members of a model file are called; no other name is ever looked up."""


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The zip at `path`, every entry of its directory checked; whatever is wrong with it is said as AutosegError."""
    if path.exists() and not path.is_file():
        raise AutosegError(f"{path} is no file; a model file ends in {ENDING}")
    try:
        with _Pieces(path) as file, zipfile.ZipFile(file) as archive:
            seen: set[str] = set()
            for info in archive.infolist():
                name = info.orig_filename
                if not NAMES.fullmatch(name) or name != info.filename:
                    raise _Unsound(f"it holds {name[:200]!r}, which has no place in a model file")
                if name in seen:
                    raise _Unsound(f"it holds {name} twice")
                if info.flag_bits & 0x41:
                    raise _Unsound(f"{name} is encrypted")
                if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                    raise _Unsound(f"{name} is compressed, and model files are not")
                seen.add(name)
            if sum(info.file_size for info in archive.infolist()) > os.fstat(file.fileno()).st_size:
                raise _Unsound("its members are larger than the file: it was cut short or made up")
            yield archive
    except _Unsound as error:
        raise refusal(path, str(error)) from None
    except FileNotFoundError:
        raise
    except zipfile.BadZipFile as error:
        raise refusal(path, f"it is no whole zip file ({error})") from None
    except (NotImplementedError, RuntimeError, EOFError, OSError, ValueError, OverflowError, struct.error) as error:
        raise refusal(path, f"it cannot be read ({error})") from None


def _info(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    try:
        return archive.getinfo(name)
    except KeyError:
        raise _Unsound(f"it holds no {name}") from None


def _small(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    size = _info(archive, name).file_size
    if size > most:
        raise _Unsound(f"its {name} has {size:,} bytes, and at most {most:,} are read")
    with archive.open(name) as file:
        return _read(file, size)


def _read(file: IO[bytes], size: int) -> bytes:
    """Exactly `size` bytes, in pieces; the zip's own checksum is compared at the end."""
    content = b"".join(iter(partial(file.read, PIECE), b""))
    if len(content) != size:
        raise _Unsound("a member is shorter than stated: the file was cut short")
    return content


def _new_member(archive: zipfile.ZipFile, name: str, size: int) -> IO[bytes]:
    """A member of a fixed date, so that equal content makes equal bytes."""
    info = zipfile.ZipInfo(name)
    info.file_size = size
    info.external_attr = 0o644 << 16
    return archive.open(info, "w", force_zip64=size > zipfile.ZIP64_LIMIT // 2)
