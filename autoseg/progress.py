"""Progress of long work: a bar with an ETA on a terminal, one line a minute elsewhere."""

import sys
import threading
import time
from types import TracebackType

from tqdm import tqdm

LINE_SECONDS = 60.0


class Progress:
    """Counts done units of `total`; use as a context manager. `advance` may be called from several threads.

    initial: units that were done before, which the estimate of the time left must not count as done just now.
    """

    def __init__(self, what: str, total: int, unit: str = "case", quiet: bool = False, initial: int = 0) -> None:
        self.what, self.total, self.unit, self.quiet = what, total, unit, quiet
        self.done, self.note, self.started = initial, "", time.monotonic()
        self.initial = initial
        self._said = self.started
        self._remark, self._remarked = "", float("-inf")
        self._lock = threading.Lock()
        terminal = sys.stderr.isatty() and not quiet
        self._bar = tqdm(total=total, desc=what, unit=unit, initial=initial, dynamic_ncols=True) if terminal else None

    def __enter__(self) -> "Progress":
        return self

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Add `steps` finished units; `note` is shown behind the bar until the next one."""
        with self._lock:
            self.done += steps
            self.note = note or self.note
            if self._bar is not None:
                self._bar.set_postfix_str(self.note, refresh=False)
                self._bar.update(steps)
            elif not self.quiet and time.monotonic() - self._said >= LINE_SECONDS:
                self._said = time.monotonic()
                self._line()

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if not self.quiet:
            tqdm.write(text)
            sys.stdout.flush()

    def remark(self, text: str) -> None:
        """Print a line as `say` does, but at most one a minute, the latest; the last one always, at the end."""
        self._remark = text
        if time.monotonic() - self._remarked >= LINE_SECONDS:
            self._say_remark()

    def _say_remark(self) -> None:
        if self._remark:
            self.say(self._remark)
            self._remark, self._remarked = "", time.monotonic()

    def _line(self) -> None:
        elapsed = time.monotonic() - self.started
        print(
            tqdm.format_meter(
                self.done,
                self.total,
                elapsed,
                prefix=self.what,
                unit=self.unit,
                postfix=self.note,
                ncols=110,
                initial=self.initial,
            ),
            file=sys.stderr,
            flush=True,
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._say_remark()
        if self._bar is not None:
            self._bar.close()
        elif not self.quiet and kind is None and self._said > self.started:
            self._line()
