"""Where each artifact lives under one root, and which dataset a person means by `1`, `001`, a name or a path.

A raw dataset may lie anywhere. Where one outside the root lay when it was prepared is written beside what was prepared
of it, so that the number and the name mean it from then on. Commands that are shown to people are written here too.
"""

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from autoseg.records import SCHEMA_VERSION, AutosegError, load_json, record, save_json

NAME = re.compile(r"Dataset(\d{3})_\w[\w-]*")
PLAIN = re.compile(r"\w([\w .,+=@-]*[\w+=@-])?")
"""Names of plans and runs, which become folders."""
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
"""Names that Windows keeps for devices, with any ending."""
SOURCE = "raw.json"
"""Beside the fingerprint of a dataset that lies outside the workspace."""


@record
class Source:
    """Where a raw dataset lies."""

    schema_version: int = SCHEMA_VERSION
    folder: str


def plain(name: str, option: str) -> str:
    """The name, if it can be that of a folder on any system; else AutosegError that calls it the value of `option`."""
    if PLAIN.fullmatch(name) and not RESERVED.fullmatch(name):
        return name
    raise AutosegError(
        f"{option} {name!r} cannot be the name of a folder; use letters, digits, and among them . _ - + = , @ and "
        "blanks, and none of the names that Windows keeps for itself (con, aux, nul, ...)"
    )


def given(option: str, value: str, usual: str = "default") -> tuple[str, ...]:
    """The words of an option in a command for people; none where its value is the usual one."""
    return () if value == usual else (option, value)


@dataclass(frozen=True)
class Workspace:
    """One root folder with `raw`, `prepared` and `runs` below it."""

    root: Path
    option: str = ""
    """What a suggested command needs to find this workspace: ` --workspace PATH` where that was given, else nothing."""

    @classmethod
    def find(cls, option: Path | None) -> "Workspace":
        """--workspace if given, else AUTOSEG_HOME, else ./autoseg_data. The only place that reads the environment."""
        root = Path(option or os.environ.get("AUTOSEG_HOME") or "autoseg_data").absolute()
        return cls(root, f" --workspace {shlex.quote(str(option))}" if option else "")

    def command(self, *words: str) -> str:
        """A command for people to copy: `autoseg`, the words as a shell wants them, and the workspace if need be."""
        return f"{shlex.join(('autoseg', *words))}{self.option}"

    def raw(self, dataset: str) -> Path:
        """The raw dataset, where people put it into the workspace."""
        return self.root / "raw" / dataset

    def prepared(self, dataset: str) -> Path:
        """Fingerprint, splits and plans of a dataset."""
        return self.root / "prepared" / dataset

    def plan_folder(self, dataset: str, plan: str) -> Path:
        """plan.json and the prepared cases of each configuration."""
        return self.prepared(dataset) / plain(plan, "--plan")

    def cases(self, dataset: str, plan: str, configuration: str) -> Path:
        """Prepared cases of one configuration."""
        return self.plan_folder(dataset, plan) / configuration

    def whole_run(self, dataset: str, run: str) -> Path:
        """All configurations of one run."""
        return self.root / "runs" / dataset / plain(run, "--run")

    def run(self, dataset: str, run: str, configuration: str) -> Path:
        """All folds of one configuration of one run."""
        return self.whole_run(dataset, run) / configuration

    def fold(self, dataset: str, run: str, configuration: str, fold: int | str) -> Path:
        """One fold: run.json, weights, metrics, validation."""
        return self.run(dataset, run, configuration) / f"fold_{fold}"

    def datasets(self) -> dict[str, Path]:
        """Name -> raw folder (which may be gone once the data are prepared) of every dataset of the workspace.

        Hidden folders are datasets that are being written, and one without a fingerprint was not prepared.
        """
        names = {folder.name for kind in ("raw", "runs") for folder in (self.root / kind).glob("*/")}
        for file in ("fingerprint.json", SOURCE):
            names |= {found.parent.name for found in (self.root / "prepared").glob(f"*/{file}")}
        return {name: self._source(name) for name in sorted(names) if not name.startswith(".")}

    def _source(self, dataset: str) -> Path:
        here = self.raw(dataset)
        return here if here.is_dir() else self.prepared_from(dataset)

    def prepared_from(self, dataset: str) -> Path:
        """The raw folder that was prepared as `dataset`, or would be."""
        noted = self.prepared(dataset) / SOURCE
        return Path(load_json(Source, noted).folder) if noted.is_file() else self.raw(dataset)

    def remember(self, dataset: str, raw: Path) -> None:
        """Note where a raw dataset outside the workspace lies, for `dataset`."""
        noted = self.prepared(dataset) / SOURCE
        if raw.resolve() != self.raw(dataset).resolve():
            save_json(Source(folder=str(raw.absolute())), noted)
        else:
            noted.unlink(missing_ok=True)

    def dataset(self, text: str) -> tuple[str, Path]:
        """The name and raw folder of the dataset that `text` means.

        `text` is a number (`1`, `001`), a name (`Dataset001_Name`) or the path of a raw dataset folder.
        Raises AutosegError that lists the known datasets when it means none or several.
        """
        path = Path(text).expanduser()
        if path.is_dir() and (path / "dataset.json").is_file():
            return path.resolve().name, path.resolve()
        known = self.datasets()
        if text in known:
            return text, known[text]
        if text.isdigit():
            hits = [name for name in known if (match := NAME.fullmatch(name)) and int(match[1]) == int(text)]
            if len(hits) == 1:
                return hits[0], known[hits[0]]
            if hits:
                raise AutosegError(f"dataset {text} is ambiguous: {', '.join(hits)}; use the whole name")
        if path.is_dir():
            raise AutosegError(
                f"{path} holds no dataset.json, so it is no raw dataset folder; `autoseg dataset import -h` says how "
                "one is made of images and masks as they come"
            )
        listed = ", ".join(known) or "none yet"
        raise AutosegError(
            f"no dataset {text!r} in {self.root} (known: {listed}); put it at {self.raw('Dataset001_Name')}, "
            "or give the path of its folder, or choose another root with --workspace"
        )
