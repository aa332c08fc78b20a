"""Work that survives the death of its process: one process works, and a small one watches over it.

Threads share one process (docs/decisions/0001), so a case that has it killed, by the system for want of memory or by a
crash in native code, takes all others along. Therefore the command forks before anything heavy is loaded: the child
works and notes in a journal which case begins and ends; the parent waits. When the child dies, the parent reads which
cases were in hand, says so, and forks again. Memory is copied by the fork, so the next child knows what the parent
has learnt. Starting costs nothing: until then only the command line has been imported.

A case that was alone in hand is guilty: it is not tried again, and counts as failed. Several are suspects: they are
done again one at a time before the rest, so the next death tells which it is. Every restart therefore condemns a case
or has new suspects; it ends. A child that was told to stop (SIGINT, SIGTERM) is not replaced.

Where there is no fork (Windows), or a forked process may not use the system (macOS: its GPU among others), the work
simply runs.
"""

import json
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import IO, Any, NoReturn

CRASHES = {
    "SIGKILL": "which the system sends when memory runs out",
    "SIGSEGV": "a crash in native code",
    "SIGBUS": "a file that shrank while it was read, or a full /dev/shm",
    "SIGABRT": "native code gave up, often for want of memory",
    "SIGFPE": "a crash in native code",
    "SIGILL": "a library built for another processor",
}
"""Signals that nobody sends to end a command, and what they usually mean."""

FORWARDED = ("SIGINT", "SIGTERM", "SIGUSR1")

CAN_FORK = hasattr(os, "fork") and sys.platform != "darwin"
"""Python itself no longer forks on macOS: system libraries there end a forked process that calls them."""

FRUITLESS = 5
"""Deaths in a row, without a case finished in between, after which cases are no longer blamed."""

Job = tuple[str, str]
"""Stage and case."""


@dataclass
class Journal:
    """What the working process has in hand, and what it was told when it started. Without a file it notes nothing."""

    file: IO[bytes] | None = None
    dead: dict[Job, str] = field(default_factory=dict)
    """Job that ended a process -> how, in words. Not to be tried again."""
    suspects: set[Job] = field(default_factory=set)
    """Jobs that were in hand together when a process died. To be done one at a time, before the others."""

    @contextmanager
    def working(self, stage: str, case: str, doing: str = "", last: bool = True) -> Iterator[None]:
        """Note that a case is in hand for as long as the context lasts; from any thread.

        doing: the part of the stage, in words, where it has several. last: whether the case is finished then.
        """
        self._note(begins=True, stage=stage, case=case, doing=doing)
        try:
            yield
        finally:
            self._note(begins=False, stage=stage, case=case, last=last)

    def stage(self, text: str) -> None:
        """Note what is going on without any case in hand, for example `while fold 0 trained`; nothing: no longer."""
        self._note(stage=text)

    def _note(self, **event: Any) -> None:
        if self.file is not None:
            # One unbuffered write a line: lines of several threads do not mix, and a killed process leaves whole ones.
            self.file.write(json.dumps(event).encode() + b"\n")

    def read(self) -> tuple[dict[Job, str], int, str]:
        """The jobs in hand at the end of the journal, with what was done to them; number of finished cases; `stage`."""
        assert self.file is not None
        self.file.seek(0)
        in_hand: dict[Job, str] = {}
        finished, stage = 0, ""
        # What follows the last line break is empty, or a line that the end of the process cut short.
        for line in self.file.read().split(b"\n")[:-1]:
            event = json.loads(line)
            if "case" not in event:
                stage = event["stage"]
                continue
            job = event["stage"], event["case"]
            if event["begins"]:
                in_hand[job] = event["doing"]
            else:
                in_hand.pop(job, None)
                finished += event["last"]
        return in_hand, finished, stage


JOURNAL = Journal()
"""The journal of this process. `parallel.map_cases` and prediction write to it."""


def supervise(work: Callable[[], None]) -> int:
    """Do `work` in a process of its own, again after each death as the module says; the exit code, when it is over.

    `work` may end by SystemExit, as a program does; another exception shows its traceback and gives code 1. Death by
    a signal gives 128 + its number, as a shell says it. To be called before any thread is started and torch is loaded.
    """
    if not CAN_FORK:
        work()
        return 0
    fruitless = 0
    while True:
        with tempfile.TemporaryFile(buffering=0) as file:
            JOURNAL.file = file
            code, peak, told = _run(work)
            in_hand, finished, stage = JOURNAL.read()
        JOURNAL.file = None
        name = signal.Signals(-code).name if code < 0 else ""
        if name not in CRASHES or told:
            return code if code >= 0 else 128 - code
        fruitless = 0 if finished else fruitless + 1
        death = f"the process died of {name}, {CRASHES[name]}; it had taken {peak / 2**30:.2f} GiB at its peak"
        if not in_hand:
            when = f" {stage}" if stage else ""
            _say(f"{death}{when}. No case was in hand, so there is none to leave out: free memory and start again")
            return 128 - code
        if fruitless >= FRUITLESS:
            _say(f"{death}. {fruitless} deaths in a row without one finished case: no single case is at fault")
            return 128 - code
        _say(f"{death}. In hand: {', '.join(map(_words, in_hand.items()))}")
        if len(in_hand) == 1:
            ((job, doing),) = in_hand.items()
            JOURNAL.dead[job] = f"{death} while this case was in hand ({doing or job[0]})"
            _say(f"going on without {job[1]}")
        else:
            JOURNAL.suspects |= set(in_hand)
            _say("going on with each of them alone, then with the rest")


def _words(entry: tuple[Job, str]) -> str:
    (stage, case), doing = entry
    return f"{case} ({stage}: {doing})" if doing else f"{case} ({stage})"


def _say(text: str) -> None:
    print(f"autoseg: {text}", file=sys.stderr, flush=True)


def _run(work: Callable[[], None]) -> tuple[int, int, bool]:
    """Fork, work, wait: (exit code or minus the signal of the child, its peak memory in bytes, whether told to end)."""
    child, told = 0, False

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal told
        told = told or number != getattr(signal, "SIGUSR1", None)
        if child:
            with suppress(ProcessLookupError):
                os.kill(child, number)

    numbers = {getattr(signal, name) for name in FORWARDED}
    # What is ignored, as under nohup, stays ignored in both.
    numbers = {number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN}
    before = {number: signal.getsignal(number) for number in numbers}
    ended, held = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    # No signal may arrive between the fork and the moment when each side knows what to do with it.
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    for number in numbers:
        signal.signal(number, forward)
    child = os.fork()
    if not child:
        # A group of its own: the keys of a terminal reach the parent alone, which passes everything on.
        os.setpgid(0, 0)
        os.close(held)
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
        threading.Thread(target=_end_with, args=(ended,), daemon=True).start()
        _work(work)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    os.close(ended)
    try:
        _, status, usage = os.wait4(child, 0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(held)
    # Kilobytes, but bytes on a Mac.
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return os.waitstatus_to_exitcode(status), peak, told


def _end_with(ended: int) -> None:
    """Kill this process once the one that watches over it is gone: only its end closes the pipe."""
    os.read(ended, 1)
    os.kill(os.getpid(), signal.SIGKILL)


def _work(work: Callable[[], None]) -> NoReturn:
    """Do the work and end this process: what called `supervise` goes on in the parent only."""
    code: object = 1
    try:
        work()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        # Whatever happens, also where nobody reads the output any more, this process does not leave this function.
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code if isinstance(code, int) else 1)
