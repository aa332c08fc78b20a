"""Signals as requests that long work reads where it can stop cleanly: save now, or save and end.

SIGUSR1 asks for a checkpoint, SIGINT (Ctrl-C) and SIGTERM for one and the end. A handler only notes the request; the
loop answers between two steps, so that no half-done step is ever saved. Python runs handlers in the main thread
alone: in any other thread nothing is installed and nothing asked for.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SAME_KEYPRESS_SECONDS = 0.5
"""A terminal and a parent process may both pass on one Ctrl-C; only a later one is the second."""


class Stopped(SystemExit):
    """A signal asked for the end, and what had to be saved is saved. Ends the program with code 128 + signal."""

    def __init__(self, by: signal.Signals) -> None:
        super().__init__(128 + by)
        self.by = by


@dataclass(kw_only=True)
class Requests:
    """What signals have asked for so far; whoever answers `save` sets it back."""

    save: bool = False
    stop: signal.Signals | None = None


@contextmanager
def heeded() -> Iterator[Requests]:
    """While this is open, signals become requests instead of ending the program; a second SIGINT ends it at once.

    The handlers from before are put back at the end. A request to stop that came too late to be answered inside
    raises Stopped then. A signal that the program was started to ignore (`nohup`, background jobs) stays ignored.
    """
    requests = Requests()
    first = 0.0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal first
        by = signal.Signals(number)
        if by not in (signal.SIGINT, signal.SIGTERM):
            requests.save = True
            return
        if by == signal.SIGINT == requests.stop and time.monotonic() - first > SAME_KEYPRESS_SECONDS:
            raise Stopped(by)
        if requests.stop is None:
            requests.stop, first = by, time.monotonic()

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):  # Windows has no SIGUSR1
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, note)
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    if requests.stop is not None:
        raise Stopped(requests.stop)
