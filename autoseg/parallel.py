"""One way to map a function over cases: threads, within memory, with honest errors.

Threads are enough because the heavy parts (decoding images, matrix products, most of numpy) release Python's lock,
and they share memory and start at once. Blosc2 4.14 does not release it: threads take turns at reading and writing
prepared arrays. One failing case harms only itself: its name and reason come back beside the results of the others.
"""

import os
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Generic, TypeVar

from autoseg.progress import Progress
from autoseg.records import AutosegError

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
) -> list[Outcome[R]]:
    """Apply `function` to every item in `workers` threads; one Outcome an item, in the order given.

    `cost` estimates the bytes that an item needs; together they stay within `memory` (default: half of what is free).
    """
    gate = MemoryGate(memory if memory is not None else free_memory() // 2)

    def guarded(item: T) -> Outcome[R]:
        bytes_needed = cost(item)
        gate.enter(bytes_needed)
        try:
            return Outcome(case=name(item), value=function(item))
        except Exception as error:
            return Outcome(case=name(item), error=error)
        finally:
            gate.leave(bytes_needed)

    with Progress(what, len(items), quiet=quiet) as bar:
        if (workers or cores()) == 1 or len(items) <= 1:
            outcomes = []
            for item in items:
                outcomes.append(guarded(item))
                bar.advance(note=name(item))
            return outcomes
        with ThreadPoolExecutor(workers or cores()) as pool:
            futures = {pool.submit(guarded, item): name(item) for item in items}
            try:
                for future in as_completed(futures):
                    bar.advance(note=futures[future])
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            return [future.result() for future in futures]


def raise_failures(outcomes: Iterable[Outcome[R]], stage: str) -> list[R]:
    """The values, or one AutosegError that names every case that failed and why."""
    outcomes = list(outcomes)
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if failed:
        lines = "\n".join(f"  {outcome.case}: {outcome.reason()}" for outcome in failed)
        raise AutosegError(f"{stage} failed for {len(failed)} of {len(outcomes)} cases:\n{lines}")
    return [outcome.value for outcome in outcomes]  # type: ignore[misc]


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> int:
    """Bytes of memory that can be taken without swapping; 4 GiB where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 << 30
