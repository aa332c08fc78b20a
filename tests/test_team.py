"""Several processes with a part of each batch do what one with the whole batch does."""

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_pipeline import NAME, PLAN
from test_training import parts, write_cases
from torch import nn
from torch.distributed import TCPStore
from toys import balls_dataset

from autoseg.checkpoint import read_progress
from autoseg.history import METRICS, read_metrics
from autoseg.labels import Labels
from autoseg.losses import LOSSES, Part
from autoseg.pipeline.data import plan_and_preprocess
from autoseg.pipeline.orders import refuse_small_batch
from autoseg.records import AutosegError
from autoseg.team import ALONE, Team, assembled, one_each
from autoseg.workspace import Workspace

REGIONS = {"background": 0, "whole": [1, 2], "core": 2}
CLASSES = {"background": 0, "liver": 1, "lesion": 2}
MIXED = [
    (name, ignore, partly)
    for name, ignore, partly in product(LOSSES, (False, True), (False, True))
    if ignore == partly or name in ("dice_ce", "dice", "ce")
]
"""Losses with ignored voxels, with classes that were not annotated; all mixtures of those with a path of their own."""


@given(st.integers(1, 9), st.integers(0, 40))
def test_parts_of_a_batch_are_all_of_it_and_about_equal(size, count):
    team = [Team(rank=rank, size=size) for rank in range(size)]
    samples = [sample for member in team for sample in range(count)[member.own(count)]]
    assert samples == list(range(count))
    lengths = {len(range(count)[member.own(count)]) for member in team}
    assert max(lengths) - min(lengths) <= 1


def test_parts_by_hand():
    assert [Team(rank=rank, size=2).own(7) for rank in range(2)] == [slice(0, 4), slice(4, 7)]
    assert Team(rank=1, size=2).part(7) == 3 / 7
    assert (ALONE.own(7), ALONE.part(7), ALONE.leads) == (slice(0, 7), 1.0, True)


def test_one_alone_exchanges_nothing():
    values = torch.arange(3.0)
    assert ALONE.total(values) is values
    assert (ALONE.largest(1, 5), ALONE.lead(2.5), ALONE.tell("x")) == ((1, 5), 2.5, "x")
    network = torch.nn.Linear(2, 3)
    ALONE.share(network)()
    with assembled(1, "cpu") as (team, device):
        assert (team, device) == (ALONE, "cpu")


class Exchange:
    """Adds up what `size` threads bring, call by call."""

    def __init__(self, size):
        self.barrier = threading.Barrier(size, timeout=20)
        self.brought = {}

    def total(self, values):
        self.brought[threading.get_ident()] = values
        self.barrier.wait()
        found = sum(self.brought.values())
        self.barrier.wait()
        return found


def in_threads(works):
    """The results of functions that run at the same time."""
    found = [None] * len(works)

    def run(place, work):
        found[place] = work()

    threads = [threading.Thread(target=run, args=entry) for entry in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize(("name", "ignore", "partly"), MIXED)
@pytest.mark.parametrize("classes", [CLASSES, REGIONS], ids=["classes", "regions"])
@pytest.mark.parametrize("batch_dice", [False, True])
def test_losses_of_the_parts_add_up_and_gradients_are_those_of_the_whole(name, batch_dice, classes, ignore, partly):
    labels = Labels.from_dataset(classes | ({"ignore": 3} if ignore else {}))
    random = torch.Generator().manual_seed(3)
    shape, cuts = (5, 6, 7), (0, 2, 5)
    logits = torch.randn(5, labels.heads, *shape[1:], generator=random, dtype=torch.float64)
    target = torch.randint(len(labels.known), shape, generator=random)
    target[4] = 0  # a part may hold samples without foreground
    if ignore:
        target[0] = labels.ignored  # and samples of which nothing is known
    annotated = torch.tensor([[True, True], [True, False], [False, True], [True, True], [False, False]])
    loss = partial(LOSSES[name], weights=(1, 2, 5)) if name == "weighted_ce" else LOSSES[name]

    def of(samples, part=None):
        own = logits[samples].clone().requires_grad_()
        more = {} if part is None else {"part": part}
        given = annotated[samples] if partly else None
        value = loss(own, target[samples], batch_dice=batch_dice, labels=labels, annotated=given, **more)
        value.backward()
        return value.detach(), own.grad

    value, gradient = of(slice(None))
    exchange = Exchange(2)

    def work(start, stop):
        part = Part(share=(stop - start) / 5, total=exchange.total)
        return lambda: of(slice(start, stop), part)

    found = in_threads([work(*ends) for ends in pairwise(cuts)])
    torch.testing.assert_close(sum(value for value, _ in found), value)
    torch.testing.assert_close(torch.cat([part for _, part in found]), gradient)


@pytest.mark.parametrize("augmentation", ["default", "none"])
def test_each_process_makes_its_own_samples_of_the_same_batch(tmp_path, augmentation):
    write_cases(tmp_path / "cases")
    whole = parts(tmp_path, augmentation=augmentation).training
    made = whole.assemble(whole.sources(5), torch.device("cpu"))
    halves = []
    for rank in range(2):
        mine = parts(tmp_path, augmentation=augmentation, team=Team(rank=rank, size=2)).training
        halves.append(mine.assemble(mine.sources(5), torch.device("cpu")))
    assert all(half.patches == made.patches for half in halves)
    assert [len(half.image) for half in halves] == [1, 1]
    assert torch.equal(torch.cat([half.image for half in halves]), made.image)
    assert torch.equal(torch.cat([half.labels for half in halves]), made.labels)


def test_a_batch_too_small_to_share_is_refused_with_the_cure():
    refuse_small_batch("2d", 2, Team(rank=0, size=2))
    with pytest.raises(AutosegError, match="batches of 2, too few to be shared by 3 processes; train one fold on each"):
        refuse_small_batch("2d", 2, Team(rank=0, size=3))


def test_running_statistics_become_the_mean_of_all_processes():
    """The other process has counted a mean of 5 and a variance of 3 where this one has 1 and 2."""

    class Pair(Team):
        def total(self, values):
            return values + torch.tensor([5.0, 3.0])

    norm = nn.BatchNorm2d(1)
    norm.running_mean.fill_(1.0)
    norm.running_var.fill_(2.0)
    Pair(rank=0, size=2).agree(norm)
    assert (norm.running_mean.item(), norm.running_var.item(), norm.num_batches_tracked.item()) == (3.0, 2.5, 0)
    Team(rank=0, size=2).agree(nn.Conv2d(1, 1, 1))  # nothing to agree on, nobody to wait for


def test_a_device_for_each_process(capsys, monkeypatch):
    assert [one_each("cpu", place, 2) for place in range(2)] == ["cpu", "cpu"]
    assert not capsys.readouterr().out
    with monkeypatch.context() as nowhere:
        nowhere.setattr(torch.cuda, "is_available", lambda: False)
        assert [one_each("auto", place, 2) for place in range(2)] == ["cpu", "cpu"]
    assert capsys.readouterr().out.count("no GPU can be seen: 2 processes share the CPU") == 1
    with pytest.raises(AutosegError, match="not on mps"):
        one_each("mps", 0, 2)
    with pytest.raises(AutosegError, match=r"1000 processes need a GPU each, and \d+ can be seen"):
        one_each("cuda", 0, 1000)


MEETING = """
import os
from autoseg.team import assembled
with assembled(2, "cpu") as (team, _):
    import torch._dynamo
    team.wait()
print(*[open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")])
"""


def together(code):
    """Exit code, output and errors of two processes that run `code` as torchrun would have them do."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    known = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    known["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the processes find the store, none makes it
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=environment() | known | {"RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *words) for process, words in zip(processes, said)]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="asks Linux for the threads of a process")
def test_no_thread_of_the_exchange_outlives_it():
    """One that still lets go of a tensor when Python ends would abort the process."""
    done = together(MEETING)
    assert [code for code, _, _ in done] == [0, 0], done
    assert all(words and "gloo" not in words for _, words, _ in done), done


FAILING = """
import sys
from autoseg import cli
from autoseg.records import AutosegError
from autoseg.team import assembled
def work():
    with assembled(2, "cpu") as (team, _):
        team.wait()
        if team.rank == {rank}:
            raise {error}
        team.tell("an order")
        team.tell("another")
cli.app = work
cli.run()
"""


@pytest.mark.parametrize(
    ("rank", "error", "shown"),
    [
        (0, "AutosegError('no plan yet')", "error: no plan yet\n"),
        (1, "RuntimeError('a mistake of its own')", "RuntimeError: a mistake of its own\n"),
    ],
)
def test_under_torchrun_the_error_of_one_process_stands_alone(rank, error, shown):
    done = together(FAILING.format(rank=rank, error=error))
    assert [code for code, _, _ in done] == [1, 1], done
    own, others = done[rank][2], done[1 - rank][2]
    assert own.endswith(shown) and ("Traceback" in own) == ("RuntimeError" in error)
    assert others.startswith(
        f"error: process {1 - rank} of 2 ends because another one has ended, which says why itself"
    )
    assert others.count("\n") == 1, others


# Whole processes. What they train with is exact enough to compare: SGD, no probing.

FIELDS = ("steps_per_epoch=3", "validation_steps=2", "optimizer=sgd", "learning_rate=0.01", "weights=ema", "tune=false")


def command(raw, run, *more, epochs=3):
    fields = [part for field in FIELDS for part in ("--set", field)]
    return [
        "autoseg", "train", str(raw), "3d_fullres", "0", "--epochs", str(epochs), "--device", "cpu", "--seed", "4",
        "--loss", "dice_ce+0.1*weighted_ce",
        *fields, *([] if run == "default" else ["--run", run]), *more, "--workspace", str(raw.parent.parent),
    ]  # fmt: skip


def environment():
    """PYTHONSAFEPATH: the package that is installed, not the folder in which the tests are started."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}


def start(raw, run, *more, epochs=3):
    return subprocess.Popen(
        [sys.executable, "-m", *command(raw, run, *more, epochs=epochs)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(),
    )  # fmt: skip


def ended(process, seconds=240):
    """The exit code; what the process said is shown where a test fails."""
    print(process.communicate(timeout=seconds)[0])
    return process.returncode


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    root = tmp_path_factory.mktemp("team")
    balls_dataset(root / "raw" / NAME)
    plan_and_preprocess(Workspace(root), "7", PLAN)
    return root / "raw" / NAME


def fold(raw, run) -> Path:
    return Workspace(raw.parent.parent).fold(NAME, run, "3d_fullres", 0)


def difference(raw, run, other) -> float:
    one, two = (load_file(fold(raw, name) / "weights.safetensors") for name in (run, other))
    assert one.keys() == two.keys()
    return max((one[name] - two[name]).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def alone(raw):
    """The run of one process, to compare with."""
    assert ended(start(raw, "alone")) == 0
    return "alone"


def test_two_processes_train_and_validate_as_one(raw, alone):
    process = start(raw, "two", "--num-gpus", "2")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "shared by 2 processes" in said
    assert said.count("mean of classes") == 1  # the second process keeps silent
    assert difference(raw, alone, "two") < 1e-5
    for one, two in zip(read_metrics(fold(raw, alone)), read_metrics(fold(raw, "two")), strict=True):
        for name in ("training_loss", "validation_loss", "mean_pseudo_dice", "learning_rate"):
            assert one[name] == pytest.approx(two[name], abs=1e-4)
    assert read_progress(fold(raw, alone)).shown == read_progress(fold(raw, "two")).shown
    validation = [sorted(path.name for path in (fold(raw, run) / "validation").iterdir()) for run in (alone, "two")]
    assert validation[0] == validation[1]


def when_an_epoch_is_over(process, folder):
    while not (folder / METRICS).is_file() or not read_metrics(folder):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)


def children_of(number) -> list[int]:
    return [int(child) for child in Path(f"/proc/{number}/task/{number}/children").read_text().split()]


@pytest.mark.slow
def test_the_death_of_one_process_ends_the_other_and_is_named(raw):
    process = start(raw, "killed", "--num-gpus", "2", epochs=1000)
    when_an_epoch_is_over(process, fold(raw, "killed"))
    leader = children_of(process.pid)[0]  # of the process that watches over it
    os.kill(children_of(leader)[0], signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "process 1 of 2 ended with code -9" in said


@pytest.mark.slow
def test_two_processes_that_are_told_to_stop_can_be_gone_on_with_by_one(raw):
    assert ended(start(raw, "straight", epochs=30)) == 0
    process = start(raw, "stopped", "--num-gpus", "2", epochs=30)
    when_an_epoch_is_over(process, fold(raw, "stopped"))
    process.send_signal(signal.SIGTERM)
    assert ended(process) == 128 + signal.SIGTERM
    assert 0 < read_progress(fold(raw, "stopped")).step < 90
    assert ended(start(raw, "stopped", epochs=30)) == 0
    assert difference(raw, "straight", "stopped") < 1e-3  # 90 steps, rounding and all


@pytest.mark.slow
def test_torchrun_does_the_same(raw, alone):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
         *command(raw, "default")],  # torchrun takes --run for an option of its own, unless `-m --` stands before
        capture_output=True, text=True, timeout=240, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mean of classes") == 1
    assert difference(raw, alone, "default") < 1e-5
