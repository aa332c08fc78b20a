"""status.csv: what became of every case of a prediction, kept beside its files, so that a stopped one goes on.

One line a case, written when it is begun and when it is done. `key` tells whether a line still holds: it is made from
the content of the case's files, the model and the options that change voxels. Lines of cases that are not asked for now
are kept.

A list says too which files are ours: one that no line names is somebody else's, a truth perhaps, and is never removed
nor written over. `ensemble` and `postprocess` keep such lists under names of their own, for that alone: what one verb
made is another's to leave alone, and their lines have neither key nor seconds.
"""

import csv
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from autoseg.cases import names
from autoseg.evaluation.folders import PROBABILITIES
from autoseg.parallel import Outcome
from autoseg.records import AutosegError, atomic_write

NAME = "status.csv"
"""That of predict."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line. `status` is begun, done or failed, `file` the name of the label file, `seconds` those spent on it.

    A line that stays `begun` was in hand when the command ended; its file may be there.
    """

    case: str
    status: str
    reason: str
    seconds: str
    file: str
    key: str


COLUMNS = tuple(field.name for field in fields(Row))


class Status:
    """The lines of status.csv, or of a list of another name, in a folder, by case. Safe to share among threads."""

    def __init__(self, folder: Path, name: str = NAME) -> None:
        """Raises AutosegError if there is such a file and it is not one of these."""
        self.folder, self.path = folder, folder / name
        self.rows = read(self.path) if self.path.is_file() else {}
        self._lock = threading.Lock()

    def made(self, case: str) -> set[str]:
        """Names of the files that were made for the line of a case, or begun; with those of predict, probabilities."""
        row = self.rows.get(case)
        if row is None or not row.file:
            return set()
        return {row.file, f"{case}{PROBABILITIES}"} if self.path.name == NAME else {row.file}

    def put(self, *rows: Row) -> None:
        """Set the lines of these cases, and write the file."""
        with self._lock:
            self.rows |= {row.case: row for row in rows}
            self._write()

    def drop(self, case: str) -> None:
        """Take out the line of a case, if there is one, and write the file."""
        with self._lock:
            if self.rows.pop(case, None) is not None:
                self._write()

    def _write(self) -> None:
        with atomic_write(self.path) as file:
            table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            table.writeheader()
            table.writerows(asdict(self.rows[case]) for case in sorted(self.rows))


def read(path: Path) -> dict[str, Row]:
    """The lines of a status file by case. Raises AutosegError if it is none."""
    try:
        with path.open(newline="") as file:
            first, *lines = csv.reader(file)
        if tuple(first) != COLUMNS:
            raise ValueError("other columns")
        rows = [Row(**dict(zip(COLUMNS, line, strict=True))) for line in lines]
    except (ValueError, csv.Error):
        raise AutosegError(
            f"{path} is no list of predicted cases; its first line must be {','.join(COLUMNS)}, and each line as long. "
            "Delete it and the files made before, and all cases are done again, or choose another --output"
        ) from None
    return {row.case: row for row in rows}


def refuse_foreign(status: Status, wanted: Mapping[str, Sequence[str]]) -> None:
    """AutosegError that names the files which would be written over and of which no line says that we made them.

    wanted: case -> names of the files that are to be written for it.
    """
    foreign = [
        name
        for case, files in wanted.items()
        for name in files
        if (status.folder / name).exists() and name not in status.made(case)
    ]
    if foreign:
        raise AutosegError(
            f"{status.folder} holds {len(foreign)} files that would be overwritten and are none of our predictions "
            f"({status.path.name} does not name them): {names(foreign)}; give another -o, or move them away"
        )


def begin(status: Status, files: Mapping[str, str]) -> None:
    """Take back what was made of cases that are done anew, and note which files will be ours, whatever ends us now.

    files: case -> name of its label file.
    """
    for case in files:
        remove(status, case)
    status.put(
        *(Row(case=case, status="begun", reason="", seconds="", file=file, key="") for case, file in files.items())
    )


def end(status: Status, outcomes: Sequence[Outcome[Any]]) -> None:
    """Note what became of cases that were begun together; of those that failed no file stays."""
    rows = []
    for outcome in outcomes:
        file = status.rows[outcome.case].file
        if outcome.error is not None:
            remove(status, outcome.case)
        what = ("done", file) if outcome.error is None else ("failed", "")
        reason = " ".join(outcome.reason().split())
        rows.append(Row(case=outcome.case, status=what[0], reason=reason, seconds="", file=what[1], key=""))
    status.put(*rows)


def take_back(status: Status, case: str) -> None:
    """Remove what was made for the line of a case, and the line.

    So no label file ever stands beside a line that speaks of another one, also when the case fails or is killed now.
    """
    remove(status, case)
    status.drop(case)


def remove(status: Status, case: str) -> None:
    """Remove what was made for the line of a case."""
    for name in status.made(case):
        (status.folder / Path(name).name).unlink(missing_ok=True)
