"""Processes that train one network together, each with a part of every batch.

One process leads: it reads and decides, writes files and talks; the others follow. All run the same loop with the same
seed, so each knows the whole batch's draws and reads only the samples that are its own. What may differ between them
(the clock, a signal, a choice by measurement) they agree on, and what they compute is added up, so that their weights
stay those that one process with the whole batch would have, but for rounding. A `Team` of one does nothing of it.

The processes are started by torchrun, or by the leader itself (`--num-gpus`) with its own command line. Numbers on a
GPU are exchanged by NCCL; everything else, also which process is still alive, by gloo.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from typing import IO, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autoseg.devices import usable_threads
from autoseg.records import AutosegError

HERE = "127.0.0.1"
LED = "AUTOSEG_LED"
"""The leader's port, set in the processes that it starts; they end when their standard input does."""
LIBUV = os.name != "nt"
"""Builds of torch for Windows lack it."""
PATIENCE = timedelta(days=1)
"""How long a process waits for the others. A dead one is noticed by its closed connection; a slow one is none."""
GRACE_SECONDS = 5.0
"""How long the leader may take to notice by itself that another process has ended."""


class Lost(RuntimeError):
    """An exchange has failed, as it does when another process is no more."""


@contextmanager
def exchange() -> Iterator[None]:
    """Whatever an exchange raises is Lost, so that it is told from a mistake of this process; also a decorator."""
    try:
        yield
    except RuntimeError as error:
        raise Lost(str(error)) from error


@dataclass(frozen=True, kw_only=True)
class Team:
    """This process among those that train together: number `rank` of `size`."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def own(self, count: int) -> slice:
        """Which of `count` samples of a batch are this process's: parts as equal as can be, in order.

        The leader's, by which settings are probed, is as large as any.
        """
        first, last = (-(-count * rank // self.size) for rank in (self.rank, self.rank + 1))
        return slice(first, last)

    def part(self, count: int) -> float:
        """How much of a batch of `count` samples this process has."""
        own = self.own(count)
        return (own.stop - own.start) / count

    @exchange()
    def total(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes, in each of them."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    @exchange()
    def largest(self, *values: int) -> tuple[int, ...]:
        """The largest of each value over all processes."""
        if self.size == 1:
            return values
        known = torch.tensor(values)
        dist.all_reduce(known, dist.ReduceOp.MAX)
        return tuple(known.tolist())

    @exchange()
    def lead(self, value: float) -> float:
        """The leader's value."""
        if self.size == 1:
            return value
        known = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(known, 0)
        return known.item()

    @exchange()
    def tell(self, text: str = "") -> str:
        """The leader's text."""
        if self.size == 1:
            return text
        data = torch.tensor(list(text.encode()), dtype=torch.uint8)
        length = torch.tensor(len(data))
        dist.broadcast(length, 0)
        data = data if self.leads else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, 0)
        return bytes(data.tolist()).decode()

    def wait(self) -> None:
        """Until all processes are here."""
        self.largest(0)

    @exchange()
    def share(self, network: nn.Module) -> Callable[[], None]:
        """Give all processes the leader's weights, and from now on in each backward pass the sum of all gradients.

        Gradients are exchanged as soon as they are known, while the pass goes on; the function that is returned waits
        for the last of them and must be called before they are used.
        """
        if self.size == 1:
            return lambda: None
        for tensor in network.state_dict().values():
            dist.broadcast(tensor, 0)
        under_way: list[dist.Work] = []

        @exchange()
        def send(parameter: Tensor) -> None:
            work = dist.all_reduce(parameter.grad, async_op=True)
            assert work is not None
            under_way.append(work)

        for parameter in network.parameters():
            parameter.register_post_accumulate_grad_hook(send)

        @exchange()
        def finish() -> None:
            while under_way:
                under_way.pop(0).wait()

        return finish

    def agree(self, network: nn.Module) -> None:
        """Give all processes the mean of what each has counted of its own samples: running statistics of norms."""
        counted = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
        if self.size == 1 or not counted:
            return
        mean = self.total(torch.cat([buffer.flatten() for buffer in counted])) / self.size
        for buffer, part in zip(counted, mean.split([buffer.numel() for buffer in counted])):
            buffer.copy_(part.view_as(buffer))


ALONE = Team()


@contextmanager
def assembled(size: int, device: str) -> Iterator[tuple[Team, str]]:
    """The team of this process while the context is open, and the device that it should compute on.

    size: how many processes to start, this one included, with the command line that this one was started with; 1: none.
    Under torchrun its processes are taken, whatever `size`. Raises AutosegError if there are fewer GPUs than
    processes, and in the leader when another process has ended before its work was done; under torchrun, whose
    processes all speak for themselves, in each of them.
    """
    # WORLD_SIZE alone is set in many containers.
    started = LED in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if started:
        size = int(os.environ["WORLD_SIZE"])
    if size == 1:
        yield ALONE, device
        return
    if not dist.is_available():
        raise AutosegError("this build of torch cannot join several processes; train on one device, or install another")
    team = Team(rank=int(os.environ["RANK"]) if started else 0, size=size)
    place = int(os.environ.get("LOCAL_RANK", team.rank))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    own_device = one_each(device, place, here)
    torch.set_num_threads(max(usable_threads() // here, 1))
    if own_device.startswith("cuda"):
        torch.cuda.set_device(own_device)
    backend = "cpu:gloo,cuda:nccl" if own_device.startswith("cuda") else "gloo"
    # Its functions keep the group that exists when they are defined, as their default. Imported by the way later on
    # (torch.compile does), it would keep gloo's threads past the end of the group, up to that of Python, when a thread
    # that still lets go of a tensor aborts the process.
    import_module("torch.distributed.nn")
    try:
        with _followers(size) if not started else nullcontext(_leaders_store(size)) as store:
            # Without a store the processes meet where the variables of torchrun say.
            dist.init_process_group(backend, store=store, rank=team.rank, world_size=size, timeout=PATIENCE)
            yield team, own_device
            # Only where all come by: an NCCL communicator waits here for the others, who may wait for this process.
            dist.destroy_process_group()
    except BaseException as error:
        if started and isinstance(error, Lost):
            error = AutosegError(
                f"process {team.rank} of {size} ends because another one has ended, which says why itself "
                f"({str(error).splitlines()[0].partition('. ')[0]})"
            )
        _leave(error)


def _leave(error: BaseException) -> NoReturn:
    """End this process as `error` would, without the clean-up: that of NCCL might never end, and what gloo still has
    under way, waiting for another process, cannot be joined, and would abort this one while Python ends."""
    code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
    if isinstance(error, AutosegError):
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        print(f"error: {error}", file=sys.stderr)
    elif not isinstance(error, SystemExit):
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def one_each(device: str, place: int, here: int) -> str:
    """The device of process number `place` of the `here` ones on this machine. AutosegError if there are too few."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu" and place == 0:
            print(f"no GPU can be seen: {here} processes share the CPU, which one alone would use as well", flush=True)
    if device == "cpu":
        return device
    if device != "cuda":
        raise AutosegError(f"several processes train on --device cuda or cpu, not on {device}; leave out --device")
    if torch.cuda.device_count() < here:
        raise AutosegError(
            f"{here} processes need a GPU each, and {torch.cuda.device_count()} can be seen; ask for fewer, or look at "
            "CUDA_VISIBLE_DEVICES"
        )
    return f"cuda:{place}"


def _leaders_store(size: int) -> dist.Store | None:
    """Where the leader waits that has started this process; None if torchrun has."""
    if LED not in os.environ:
        return None
    threading.Thread(target=_end_with_leader, daemon=True).start()
    return dist.TCPStore(HERE, int(os.environ[LED]), size, is_master=False, timeout=PATIENCE, use_libuv=LIBUV)


@contextmanager
def _followers(size: int) -> Iterator[dist.Store]:
    """Start the others of `size` processes, and end them; yields where they meet."""
    store = dist.TCPStore(HERE, 0, size, is_master=True, wait_for_workers=False, timeout=PATIENCE, use_libuv=LIBUV)
    known = {"WORLD_SIZE": str(size), LED: str(store.port)}
    # -P: the same packages as here, whatever lies in the folder that the command was given in.
    command = [sys.executable, *(["-P"] if sys.flags.safe_path or not _by_module() else []), "-m", "autoseg"]
    command += sys.argv[1:]
    with ExitStack() as files:
        outputs = [files.enter_context(tempfile.TemporaryFile()) for _ in range(1, size)]
        processes = [
            subprocess.Popen(
                command,
                env=os.environ | known | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the keys of a terminal reach the leader alone, which tells the others
            )
            for rank, output in enumerate(outputs, 1)
        ]
        over = threading.Event()
        threading.Thread(target=_watch, args=(processes, outputs, over), daemon=True).start()
        try:
            yield store
        except RuntimeError as error:  # what an exchange with a process raises that is no more
            time.sleep(0.2)
            if ended := last_words(processes, outputs):
                raise AutosegError(ended) from error
            raise
        finally:
            over.set()
            for process in processes:
                assert process.stdin is not None
                with suppress(OSError):
                    process.stdin.close()
            for process in processes:
                try:
                    process.wait(GRACE_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _by_module() -> bool:
    """Whether this is `python -m autoseg`, which looks for packages in the present folder too."""
    return getattr(sys.modules["__main__"], "__spec__", None) is not None


def last_words(processes: Sequence["subprocess.Popen[bytes]"], outputs: Sequence[IO[bytes]]) -> str:
    """Which of the processes has failed, and what it printed last; empty if none has."""
    for rank, (process, output) in enumerate(zip(processes, outputs), 1):
        if process.poll():
            output.seek(0)
            words = output.read().decode(errors="replace").strip()[-2000:]
            return (
                f"process {rank} of {len(processes) + 1} ended with code {process.returncode}. Its last words:\n{words}"
            )
    return ""


def _watch(processes: Sequence["subprocess.Popen[bytes]"], outputs: Sequence[IO[bytes]], over: threading.Event) -> None:
    """End this process when another one has failed and an exchange on the GPU still waits for it, which has no end."""
    while not over.wait(1.0):
        if any(process.poll() for process in processes) and not over.wait(GRACE_SECONDS):
            print(f"autoseg: {last_words(processes, outputs)}", file=sys.stderr, flush=True)
            os._exit(1)


def _end_with_leader() -> None:
    """End this process once the leader is gone: nothing else closes its standard input."""
    os.read(sys.stdin.fileno(), 1)  # no buffer, whose lock would be held when the process ends
    time.sleep(GRACE_SECONDS)  # its work may just be done
    os._exit(1)
