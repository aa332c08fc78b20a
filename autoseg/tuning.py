"""How training computes on this machine: short guarded probes, and only what works, agrees and pays is used.

From the safe base (`computing`) one change is tried after another, in a fixed order: freed memory kept, fewer threads,
low precision, channels-last, compilation. A change is used only if it runs, gives what the base gives (`agreement`),
and makes a step at least 5 % faster than the best so far, both timed in turn (A B, B A, ...). What is timed is the
loop's own step, handed in by the caller.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from autoseg.agreement import SEED, Agreement, Disagreement, Hopeless, Workload
from autoseg.computing import apply, safe_base, settle, untuned
from autoseg.devices import keep_freed_memory, release
from autoseg.schema import Tuning

GAIN = 0.05
"""Share of a step's time that a change must save."""
SHARE = 0.02
"""Share of the expected training time that probes may take."""
SHORT_SECONDS = 300.0
"""Training on a CPU that is expected to be shorter is not probed."""
CUDA_SECONDS = 30.0
"""Probes on a GPU may take this long however short the training is: the wrong precision there costs more."""
COMPILE_SECONDS = {"cuda": 20.0, "cpu": 60.0}
"""Compilation is not tried with less of the budget left: it cannot be interrupted.

A U-Net of four stages took 104 s on two busy cores with AVX2 (7 s with its files cached), for 2 % of a step.
"""
PAIRS, MOST_PAIRS = 3, 15
"""Timed pairs of steps; more, up to the second number, while they add up to less than a second."""


def tune(
    work: Workload,
    *,
    steps: int | None = None,
    seconds: float | None = None,
    budget_seconds: float = 120.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Tuning:
    """Probe, and return the choice, settled in this process; each decision is a line of its `notes`.

    `steps` or `seconds`: how long training is expected to be. The probes take at most `budget_seconds`, or 2 % of it
    where that is less, apart from a compilation that has begun. On a CPU nothing is probed for training of less than
    five minutes. The random state is left as it was. Raises what the step itself raises in the safe base.
    """
    device = work.device
    if (steps is None) == (seconds is None):
        raise ValueError("give either the number of steps or the seconds that training is expected to take")
    if device.type not in ("cpu", "cuda"):
        return untuned(device, f"only float32 is used on {device.type}")
    if device.type == "cpu" and seconds is not None and seconds < SHORT_SECONDS:
        return untuned(device, f"training takes {seconds:.0f} s only")
    with torch.random.fork_rng([torch.cuda.current_device()] if device.type == "cuda" else []):
        torch.manual_seed(SEED)
        return _Probes(work, clock, budget_seconds).run(steps, seconds)


def time_step(work: Workload, budget_seconds: float, clock: Callable[[], float] = time.perf_counter) -> float | None:
    """Seconds of a step in the safe base, before anything is probed; the second one counts, unless time is short.

    budget_seconds: of the whole training. None if the step needs more memory than there is in that base. The random
    state is left as it was.
    """
    with torch.random.fork_rng([torch.cuda.current_device()] if work.device.type == "cuda" else []):
        torch.manual_seed(SEED)
        probes = _Probes(work, clock, budget_seconds)
        probes.settle(probes.best)
        step = work.step_of(apply(work.make_network(), probes.best, work.device), probes.best)
        try:
            seconds = probes.timed(step)
            # The first one is slower: memory is new, and a GPU is not warm.
            return seconds if seconds > SHARE * budget_seconds and work.device.type == "cpu" else probes.timed(step)
        except torch.OutOfMemoryError:
            release(work.device)
            return None


class _Probes:
    """The probes of one call of `tune`: the best setting so far, its step, what is left of the budget."""

    def __init__(self, work: Workload, clock: Callable[[], float], budget: float) -> None:
        self.work, self.device, self.clock, self.budget = work, work.device, clock, budget
        self.began = clock()
        self.best = safe_base(self.device)
        self.settled: tuple[bool, int] | None = None
        self.best_seconds = self.expected = math.inf
        self.notes: list[str] = []
        self.agreement = Agreement(work, clock)

    def run(self, steps: int | None, seconds: float | None) -> Tuning:
        if self.device.type == "cuda":
            # The host's memory serves the loader only; what is kept there cannot hurt.
            self.best = replace(self.best, keep_freed=keep_freed_memory())
        self.settle(self.best)
        self.best_step = self.work.step_of(apply(self.work.make_network(), self.best, self.device), self.best)
        try:
            self.best_seconds = self.timed(self.best_step)
            if self.best_seconds < self.budget:
                self.best_seconds = self.timed(self.best_step)  # the first was slower: memory was new
        except torch.OutOfMemoryError:
            self.notes.append("float32: out of memory; what is lighter is used if it works and agrees")
            release(self.device)
        self.expected = seconds if seconds is not None else (steps or 0) * self.best_seconds
        self.budget = min(self.budget, SHARE * self.expected)
        if self.device.type == "cuda":
            self.budget = max(self.budget, CUDA_SECONDS)
        elif self.expected < SHORT_SECONDS:
            return self.unprobed(f"training takes about {self.expected:.2g} s only")
        elif self.budget < self.best_seconds < math.inf:
            return self.unprobed(
                f"one step takes {self.best_seconds:.3g} s and probes may take {self.budget:.3g} s; not tried are "
                + ", ".join(name for name, _ in self.changes()),
            )
        for name, changes in self.changes():
            self.notes.append(f"{name}: {self.attempt(replace(self.best, **changes))}")
        release(self.device)
        self.settle(self.best)
        found = None if math.isinf(self.best_seconds) else self.best_seconds
        return replace(self.best, seconds_a_step=found, notes=tuple(self.notes))

    def unprobed(self, why: str) -> Tuning:
        """The safe choice, with the time of a step, which says how many steps a budget has."""
        return replace(untuned(self.device, why), seconds_a_step=self.best_seconds)

    def changes(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(name, changed fields) of everything to try, in order."""
        cuda, threads = self.device.type == "cuda", self.best.threads
        if not cuda:
            yield "freed memory kept", {"keep_freed": True}
            # One core for the loader; one thread a physical core where two share one.
            for fewer in sorted({threads - 1, threads // 2} if threads > 2 else set(), reverse=True):
                yield f"{fewer} threads", {"threads": fewer}
        low = "float16" if cuda and not torch.cuda.is_bf16_supported(including_emulation=False) else "bfloat16"
        yield low, {"precision": low}
        # After the precision, which decides whether it pays: before, it can be chosen for a few per cent in float32 and
        # keep from low precision half of its gain, or all.
        yield "channels-last", {"channels_last": True}
        yield "compile", {"compiled": True}

    def attempt(self, candidate: Tuning) -> str:
        """Try a setting, make it the best if it is; what became of it in words."""
        processwide = (candidate.keep_freed, candidate.threads) != (self.best.keep_freed, self.best.threads)
        left = self.budget - (self.clock() - self.began)
        # About four steps of agreement or of warming up again, a first step, two pairs.
        needed = 0.0 if math.isinf(self.best_seconds) else 9 * self.best_seconds
        if candidate.compiled:
            needed = max(needed, COMPILE_SECONDS[self.device.type])
        if needed > left:
            if processwide and candidate.keep_freed and keep_freed_memory():
                self.best, self.settled = candidate, None
                return f"used without a comparison, which needs about {needed:.2g} s of {self.budget:.2g} s for probes"
            return f"not tried, needs about {needed:.2g} s and {max(left, 0):.2g} of {self.budget:.2g} s are left"
        if processwide and candidate.keep_freed and not keep_freed_memory():
            return "not used, this system's allocator cannot be told"
        try:
            self.settle(candidate)
            if not processwide:
                self.agreement.check(candidate)
            step = self.work.step_of(apply(self.work.make_network(), candidate, self.device), candidate)
            first = self.timed(step)
            pairs = self.time_in_turn(candidate, step, again=processwide)
        except Hopeless as error:
            return f"not used, {error}"
        except Disagreement as error:
            return f"not used, disagrees with float32: {error}"
        except Exception as error:
            return f"not used, does not work here ({_in_words(error)})"
        finally:
            release(self.device)
            if candidate.compiled and "torch._dynamo" in sys.modules:
                torch.compiler.reset()  # the graphs of probed networks would count against those of the trained one
        return self.judge(candidate, step, first, pairs)

    def judge(
        self, candidate: Tuning, step: Callable[[], object], first: float, pairs: list[tuple[float, float]]
    ) -> str:
        before, after = (median(side) for side in zip(*pairs))
        # Pair by pair, which a drifting machine does not touch, and over all: both must show the gain.
        ratio = max(median(b / a for a, b in pairs), after / before)
        numbers = f"({after:.3g} s against {before:.3g} s a step)"
        saved = (1 - ratio) * self.expected
        if ratio > 1 + GAIN:
            return f"not used, {ratio:.3g} x slower {numbers}"
        if ratio > 1 - GAIN:
            return f"not used, no clear gain of 5 % {numbers}"
        if first > saved:
            return f"not used, its first step takes {first:.2g} s and it would save {saved:.2g} s in all {numbers}"
        self.best, self.best_step, self.best_seconds = candidate, step, after
        if math.isinf(before):
            return f"used ({after:.3g} s a step)"
        self.expected *= ratio
        return f"used, {1 / ratio:.3g} x faster {numbers}"

    def time_in_turn(self, candidate: Tuning, step: Callable[[], object], again: bool) -> list[tuple[float, float]]:
        """Seconds of (best, candidate), pair by pair; `again`: each side needs a step to warm up after a switch."""
        if math.isinf(self.best_seconds):
            return [(math.inf, self.timed(step))]
        pairs: list[tuple[float, float]] = []
        sides = [(self.best, self.best_step), (candidate, step)]
        while True:
            taken = {}
            for side in (0, 1) if len(pairs) % 2 == 0 else (1, 0):
                setting, call = sides[side]
                self.settle(setting)
                if again:
                    self.timed(call)
                taken[side] = self.timed(call)
            pairs.append((taken[0], taken[1]))
            spent = sum(map(sum, pairs))
            left = self.budget - (self.clock() - self.began)
            hopeless = taken[1] > 1.3 * taken[0]
            if hopeless or len(pairs) >= MOST_PAIRS or (len(pairs) >= PAIRS and spent > 1):
                return pairs
            if len(pairs) >= 2 and left < (2 if again else 1) * sum(pairs[-1]):
                return pairs

    def timed(self, step: Callable[[], object]) -> float:
        """Seconds of one step, the device's queue emptied on both sides."""
        self.wait()
        start = self.clock()
        step()
        self.wait()
        return self.clock() - start

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def settle(self, setting: Tuning) -> None:
        """`settle`, unless it is so already: to give memory back takes time."""
        wanted = (setting.keep_freed, setting.threads)
        if wanted != self.settled:
            settle(setting)
            self.settled = wanted


def _in_words(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
