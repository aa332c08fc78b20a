"""Folds side by side: one process and one device each, which is the best use of several GPUs.

The processes are started afresh, each trains and validates one fold by `train_fold` and writes what it says to
`train.log` beside its run. What a fold leaves is what it leaves alone, so whoever comes next finds it done.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

import torch

from autoseg.devices import usable_threads
from autoseg.history import METRICS, read_metrics
from autoseg.pipeline.recipe import TrainOptions
from autoseg.pipeline.train import train_fold
from autoseg.progress import LINE_SECONDS, Progress
from autoseg.records import AutosegError
from autoseg.signals import Stopped, heeded
from autoseg.team import one_each
from autoseg.workspace import Workspace

LOG = "train.log"
"""In a fold folder: what its training said, where it ran beside others."""
LOOK_SECONDS = 0.5
LAST_LINES = 12


@dataclass(frozen=True, kw_only=True)
class Fold:
    """One fold to train, and how."""

    configuration: str
    fold: int
    folder: Path
    options: TrainOptions

    @property
    def name(self) -> str:
        """`configuration/fold`."""
        return f"{self.configuration}/{self.fold}"


def train_side_by_side(workspace: Workspace, dataset_text: str, folds: Sequence[Fold], processes: int) -> None:
    """Train and validate all `folds`, as many at a time as there are `processes`, each on a device of its own.

    Those that fail do not keep the others from being trained; then AutosegError names them and says where their words
    are. A signal to save is passed on; one to end ends all after their checkpoints, and raises Stopped here.
    """
    spawn = multiprocessing.get_context("spawn")
    processes = min(processes, len(folds))
    free = list(range(processes))
    waiting = list(folds)
    running: dict[SpawnProcess, tuple[Fold, int]] = {}
    failed: list[tuple[Fold, int]] = []
    said = time.monotonic()
    with Progress("train", len(folds), unit="fold") as bar, heeded() as requests:
        while waiting or running:
            while waiting and free and requests.stop is None:
                fold, place = waiting.pop(0), free.pop(0)
                device = one_each(fold.options.device, place, processes)
                options = replace(fold.options, device=device, neighbours=processes)
                fold.folder.mkdir(parents=True, exist_ok=True)
                threads = max(usable_threads() // processes, 1)
                process = spawn.Process(
                    target=_work, args=(workspace, dataset_text, replace(fold, options=options), threads)
                )
                with _no_signal_to_save():  # before the child knows what to do with it
                    process.start()
                running[process] = fold, place
                bar.say(f"{fold.name} on {device}: {fold.folder / LOG}")
            wait([process.sentinel for process in running], LOOK_SECONDS)
            for process in [process for process in running if process.exitcode is not None]:
                fold, place = running.pop(process)
                free.append(place)
                if process.exitcode:
                    failed.append((fold, process.exitcode))
                    bar.say(f"{fold.name} ended with code {process.exitcode}:\n{last_lines(fold.folder / LOG)}")
                bar.advance(note=fold.name)
            if requests.save:
                requests.save = False
                _tell(running, signal.SIGUSR1)
            if requests.stop is not None:
                _tell(running, requests.stop)
                for process in running:
                    process.join()
                raise Stopped(requests.stop)
            if time.monotonic() - said > LINE_SECONDS:
                said = time.monotonic()
                bar.say("; ".join(where_it_is(fold) for fold, _ in running.values()))
    if failed:
        named = "\n".join(f"  {fold.name}: code {code}, {fold.folder / LOG}" for fold, code in failed)
        raise AutosegError(
            f"{len(failed)} of {len(folds)} folds failed; the same command goes on with them, once the cause is "
            f"mended:\n{named}"
        )


def where_it_is(fold: Fold) -> str:
    """In words, how far the training of a fold has come."""
    lines = read_metrics(fold.folder) if (fold.folder / METRICS).is_file() else []
    if not lines:
        return f"{fold.name}: first epoch"
    dice = lines[-1]["mean_pseudo_dice"]
    return f"{fold.name}: {lines[-1]['progress']:.0%}, Dice {'?' if dice is None else f'{dice:.3f}'}"


def last_lines(path: Path) -> str:
    """The end of a log."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-LAST_LINES:]) if path.is_file() else ""


@contextmanager
def _no_signal_to_save() -> Iterator[None]:
    """Hold SIGUSR1 back in this thread, and in processes that it starts until they ask for it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})


def _tell(processes: Iterable[SpawnProcess], number: signal.Signals) -> None:
    if os.name == "nt":  # where a signal would kill them, and the keys of the console have told them already
        return
    for process in processes:
        if process.pid is not None and process.exitcode is None:
            os.kill(process.pid, number)


def _work(workspace: Workspace, dataset_text: str, fold: Fold, threads: int) -> None:
    """Train one fold in a process that has just been started."""
    with (fold.folder / LOG).open("a") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if hasattr(signal, "pthread_sigmask"):
        # Only training has something to save.
        signal.signal(signal.SIGUSR1, lambda number, frame: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    torch.set_num_threads(threads)
    if hasattr(os, "setsid"):
        os.setsid()  # the keys of a terminal reach the first process alone, which passes them on
    try:
        train_fold(workspace, dataset_text, fold.configuration, str(fold.fold), fold.options)
    except AutosegError as error:
        sys.exit(f"autoseg: {error}")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
