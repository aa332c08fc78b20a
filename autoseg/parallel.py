"""One way to map a function over cases: threads, within memory, with honest errors.

Threads are enough because the heavy parts (decoding images, matrix products, most of numpy) release Python's lock,
and they share memory and start at once. Blosc2 4.14 does not release it: threads take turns at reading and writing
prepared arrays. One failing case harms only itself: its name and reason come back beside the results of the others.
"""

import math
import os
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from autoseg.progress import Progress
from autoseg.records import AutosegError
from autoseg.supervise import JOURNAL

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Outcome(Generic[R]):
    """What became of one case: a value, or the error that ended it."""

    case: str
    value: R | None = None
    error: BaseException | None = None

    def reason(self) -> str:
        """The error in words: as it is where it was meant for people, with its place in the code otherwise."""
        if self.error is None:
            return ""
        if isinstance(self.error, AutosegError):
            return str(self.error)
        if isinstance(self.error, MemoryError):
            return "out of memory; use fewer workers (--workers 1) or a machine with more"
        place = traceback.extract_tb(self.error.__traceback__)[-1]
        return f"{type(self.error).__name__}: {self.error} ({os.path.basename(place.filename)}:{place.lineno})"


class MemoryGate:
    """Lets work in while the sum of its stated bytes fits; work larger than the whole budget runs alone."""

    def __init__(self, budget: int) -> None:
        self.budget, self.used = budget, 0
        self._condition = threading.Condition()

    def enter(self, cost: int) -> None:
        """Wait until `cost` bytes fit, then count them."""
        with self._condition:
            self._condition.wait_for(lambda: self.used == 0 or self.used + cost <= self.budget)
            self.used += cost

    def leave(self, cost: int) -> None:
        """Give `cost` bytes back."""
        with self._condition:
            self.used -= cost
            self._condition.notify_all()


def map_cases(
    function: Callable[[T], R],
    items: Sequence[T],
    *,
    name: Callable[[T], str],
    what: str,
    workers: int | None = None,
    cost: Callable[[T], int] = lambda item: 0,
    memory: int | None = None,
    quiet: bool = False,
    finishes: bool = True,
) -> list[Outcome[R]]:
    """Apply `function` to every item in `workers` threads; one Outcome an item, in the order given.

    `cost` estimates the bytes that an item needs; together they stay within `memory` (default: half of what is free).
    finishes: whether an item that is done is a step forward; False for what is only looked at, at every start.
    In a supervised process (autoseg/supervise.py) items that ended an earlier one fail without being tried, and those
    that may have done so come first, one at a time.
    """
    gate = MemoryGate(memory if memory is not None else free_memory() // 2)

    def guarded(item: T) -> Outcome[R]:
        if death := JOURNAL.dead.get((what, name(item))):
            return Outcome(case=name(item), error=AutosegError(death))
        try:
            bytes_needed = cost(item)
        except Exception as error:
            return Outcome(case=name(item), error=error)
        gate.enter(bytes_needed)
        try:
            with JOURNAL.working(what, name(item), last=finishes):
                return Outcome(case=name(item), value=function(item))
        except Exception as error:
            return Outcome(case=name(item), error=error)
        finally:
            gate.leave(bytes_needed)

    with Progress(what, len(items), quiet=quiet) as bar:
        outcomes: dict[int, Outcome[R]] = {}
        in_turn = (workers or cores()) == 1 or len(items) <= 1
        for number, item in enumerate(items):
            if in_turn or (what, name(item)) in JOURNAL.suspects:
                outcomes[number] = guarded(item)
                bar.advance(note=name(item))
        with ThreadPoolExecutor(workers or cores()) as pool:
            futures = {pool.submit(guarded, item): n for n, item in enumerate(items) if n not in outcomes}
            try:
                for future in as_completed(futures):
                    number = futures[future]
                    outcomes[number] = future.result()
                    bar.advance(note=name(items[number]))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [outcomes[number] for number in range(len(items))]


def raise_failures(outcomes: Iterable[Outcome[R]], stage: str) -> list[R]:
    """The values, or one AutosegError that names every case that failed and why."""
    outcomes = list(outcomes)
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if failed:
        lines = "\n".join(f"  {outcome.case}: {outcome.reason()}" for outcome in failed)
        raise AutosegError(f"{stage} failed for {len(failed)} of {len(outcomes)} cases:\n{lines}")
    return [outcome.value for outcome in outcomes]  # type: ignore[misc]


def _own_groups(controller: str, proc: Path, groups: Path) -> Iterator[Path]:
    """Folders of the control groups that hold this process, innermost first; `controller` "" is version 2."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, names, place = line.split(":", 2)
        if controller in names.split(",") and (number == "0") == (controller == ""):
            # Version 2 is mounted at the top, or at `unified` beside version 1. A container often sees the place as
            # named outside: then only the top of the mount is there, and it is the container's own group.
            mounts = (groups / controller,) if controller else (groups, groups / "unified")
            for mount in mounts:
                inner = mount / place.strip("/")
                yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(mount))


def _numbers(path: Path) -> list[int]:
    """The whole numbers of a control file; empty if it is missing, "max" or -1, which all mean that nothing limits."""
    try:
        words = path.read_text().split()
    except OSError:
        return []
    return [] if "max" in words or "-1" in words else [int(word) for word in words]


def cores(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Processor cores that this process may use: its affinity, and the CPU quota of its container rounded up.

    `proc` and `groups`: where the kernel shows processes and control groups (versions 1 and 2).
    """
    shares = [float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)]
    limits = [_numbers(folder / "cpu.max") for folder in _own_groups("", proc, groups)]
    limits += [
        _numbers(folder / "cpu.cfs_quota_us") + _numbers(folder / "cpu.cfs_period_us")
        for folder in _own_groups("cpu", proc, groups)
    ]
    shares += [limit[0] / limit[1] for limit in limits if len(limit) == 2]
    return max(1, math.ceil(min(shares)))


def free_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory that can be taken without swapping or passing the limit of a container.

    4 GiB where the system does not say. Cached file pages count as free: the kernel drops them first. `proc` and
    `groups` as for `cores`.
    """
    free = [int(line.split()[1]) * 1024 for line in _lines(proc / "meminfo") if line.startswith("MemAvailable:")]
    for controller, limit, usage, cache in (
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        for folder in _own_groups(controller, proc, groups):
            most, used = _numbers(folder / limit), _numbers(folder / usage)
            if most and used:
                cached = [int(line.split()[1]) for line in _lines(folder / "memory.stat") if line.split()[0] == cache]
                free.append(max(0, most[0] - used[0] + sum(cached)))
    return min(free, default=4 << 30)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
