"""status.csv: what became of every case of a prediction, kept beside its files, so that a stopped one goes on.

One line a case, written when it is begun and when it is done. `key` tells whether a line still holds: it is made from
the content of the case's files, the model and the options that change voxels. Lines of cases that are not asked for now
are kept.
"""

import csv
import threading
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from autoseg.records import AutosegError, atomic_write

NAME = "status.csv"


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
    """The lines of status.csv in a folder, by case. Safe to share among threads."""

    def __init__(self, folder: Path) -> None:
        """Raises AutosegError if there is such a file and it is not one of these."""
        self.folder, self.path = folder, folder / NAME
        self.rows = read(self.path) if self.path.is_file() else {}
        self._lock = threading.Lock()

    def put(self, row: Row) -> None:
        """Set the line of a case, and write the file."""
        with self._lock:
            self.rows[row.case] = row
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
            "Delete it and the files predicted before, and all cases are predicted again, or choose another --output"
        ) from None
    return {row.case: row for row in rows}
