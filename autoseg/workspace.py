"""Where each artifact lives under one root, and which dataset a person means by `1`, `001`, a name or a path."""

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from autoseg.records import AutosegError

NAME = re.compile(r"Dataset(\d{3})_\w[\w-]*")


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

    def raw(self, dataset: str) -> Path:
        """The raw dataset as people provide it."""
        return self.root / "raw" / dataset

    def prepared(self, dataset: str) -> Path:
        """Fingerprint, splits and plans of a dataset."""
        return self.root / "prepared" / dataset

    def plan_folder(self, dataset: str, plan: str) -> Path:
        """plan.json and the prepared cases of each configuration."""
        return self.prepared(dataset) / plan

    def cases(self, dataset: str, plan: str, configuration: str) -> Path:
        """Prepared cases of one configuration."""
        return self.plan_folder(dataset, plan) / configuration

    def run(self, dataset: str, run: str, configuration: str) -> Path:
        """All folds of one configuration of one run."""
        return self.root / "runs" / dataset / run / configuration

    def fold(self, dataset: str, run: str, configuration: str, fold: int | str) -> Path:
        """One fold: run.json, weights, metrics, validation."""
        return self.run(dataset, run, configuration) / f"fold_{fold}"

    def datasets(self) -> dict[str, Path]:
        """Name -> raw folder (which may be gone once the data are prepared) of every dataset of the workspace.

        Hidden folders are datasets that are being written.
        """
        names = {folder.name for kind in ("raw", "prepared", "runs") for folder in (self.root / kind).glob("*/")}
        return {name: self.raw(name) for name in sorted(names) if not name.startswith(".")}

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
            raise AutosegError(f"{path} holds no dataset.json, so it is no raw dataset folder")
        listed = ", ".join(known) or "none yet"
        raise AutosegError(
            f"no dataset {text!r} in {self.root} (known: {listed}); put it at {self.raw('Dataset001_Name')}, "
            "or give the path of its folder, or choose another root with --workspace"
        )
