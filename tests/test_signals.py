"""Killed, asked to end, asked to save: the weights that come out are those of a run that nothing happened to.

Every scenario is a process of its own that sends itself the signal at an exact step; they are forked from one parent
that has imported everything, so that this takes seconds.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from test_training import parts, weights, write_cases

from autoseg.checkpoint import checkpoints, load_checkpoint, load_weights, read_progress
from autoseg.history import read_metrics
from autoseg.signals import Requests, Stopped, heeded
from autoseg.step import make_optimizer
from autoseg.training import train

SEEDS = (0, 1, 2)
RECIPE = {"epochs": 4, "steps_per_epoch": 5, "validation_steps": 2, "loader_threads": 2}
"""20 steps; step 17 lies within the fourth epoch."""


def recipe(seed):
    """Seed 2 trains with AdamW and is killed while it warms up."""
    adamw = {"optimizer": "adamw", "learning_rate": 0.003, "warmup_steps": 19}
    return RECIPE | {"seed": seed} | (adamw if seed == 2 else {})


# `when` counts the network's calls in training and in validation; what it gives is sent before that call.
CHILD = """
import json, os, signal, sys
from pathlib import Path
place, here = Path(sys.argv[1]), sys.argv[2]
sys.path.insert(0, here)
from test_signals import SCENARIOS, recipe
from test_training import parts
from autoseg.signals import heeded
from autoseg.training import train

codes = {}
for name, (seed, when) in SCENARIOS.items():
    child = os.fork()
    if child:
        codes[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        continue
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    made = parts(place, name, **recipe(seed))
    calls = {True: 0, False: 0}

    def hook(network, inputs):
        calls[network.training] += 1
        sent = when.get(("step" if network.training else "patches", calls[network.training]))
        if sent is not None:
            os.kill(os.getpid(), sent)

    made.network.register_forward_pre_hook(hook)
    code = 0
    try:
        with heeded() as requests:
            train(made, requests=requests)
    except SystemExit as stop:
        code = stop.code
    os._exit(code)
Path(place, "codes.json").write_text(json.dumps(codes))
"""

KILL, TERM, INT, USR1 = signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
SCENARIOS = {
    # Saved by request after step 11, killed in step 18: 6 steps are lost and done again.
    **{f"kill {seed}": (seed, {("step", 12): USR1, ("step", 18): KILL}) for seed in SEEDS},
    "term": (1, {("step", 17): TERM}),
    "int": (1, {("step", 17): INT}),
    "usr1": (1, {("step", 7): USR1, ("patches", 3): USR1, ("step", 19): USR1}),
    # In the second batch of the third pseudo-validation.
    "term in validation": (1, {("patches", 6): TERM}),
    "kill in validation": (1, {("patches", 3): USR1, ("patches", 8): KILL}),
    "killed before any checkpoint": (1, {("step", 4): KILL}),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals")
    write_cases(folder / "cases")
    here = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", CHILD, folder, here], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def whole(place):
    """Seed -> (weights, metric lines) of an uninterrupted run."""
    runs = {}
    for seed in SEEDS:
        made = parts(place, f"whole {seed}", **recipe(seed))
        train(made)
        runs[seed] = weights(made), lines(made.folder)
    return runs


def lines(folder):
    return [line | {"seconds": 0} for line in read_metrics(folder)]


def saved_step(folder):
    done = read_progress(folder)
    return None if done is None else done.step


@pytest.mark.parametrize(
    ("name", "code", "step"),
    [
        *((f"kill {seed}", -KILL, 12) for seed in SEEDS),
        ("term", 143, 17),
        ("int", 130, 17),
        ("usr1", 0, 20),
        ("term in validation", 143, 15),
        ("kill in validation", -KILL, 10),
        ("killed before any checkpoint", -KILL, None),
    ],
)
def test_whatever_happens_the_weights_are_those_of_an_uninterrupted_run(place, whole, name, code, step):
    seed = SCENARIOS[name][0]
    folder = place / name
    assert json.loads((place / "codes.json").read_text())[name] == code
    assert saved_step(folder) == step
    made = parts(place, name, **recipe(seed))
    train(made)
    assert torch.equal(weights(made), whole[seed][0])
    assert lines(folder) == whole[seed][1]
    load_weights(made.network, folder / "weights.safetensors")
    assert torch.equal(weights(made), whole[seed][0])
    assert [path.name for path in checkpoints(folder)] == ["checkpoint_000000020"]


def test_the_seeds_differ(whole):
    assert not torch.equal(whole[0][0], whole[1][0])
    assert not torch.equal(whole[1][0], whole[2][0])


def test_momentum_of_a_stopped_run_is_in_its_checkpoint(place):
    made = parts(place, "momentum", **RECIPE)
    asked = Requests()
    made.network.register_forward_pre_hook(lambda network, inputs: setattr(asked, "stop", TERM))
    with pytest.raises(Stopped) as stopped:
        train(made, requests=asked)
    assert stopped.value.code == 143
    other = parts(place, "momentum", **RECIPE)
    optimizer = make_optimizer(other.network, other.recipe)
    assert load_checkpoint(other.folder, other.network, optimizer).step == 1
    assert all(held["momentum_buffer"].abs().sum() > 0 for held in optimizer.state.values())


def test_handlers_are_put_back_and_a_late_request_is_not_lost():
    before = signal.getsignal(TERM), signal.getsignal(USR1)
    with heeded() as requests:
        os.kill(os.getpid(), USR1)
        assert requests == Requests(save=True)
    assert (signal.getsignal(TERM), signal.getsignal(USR1)) == before
    with pytest.raises(Stopped) as stopped, heeded():
        os.kill(os.getpid(), TERM)
    assert (stopped.value.code, stopped.value.by) == (143, TERM)
    assert (signal.getsignal(TERM), signal.getsignal(USR1)) == before


def test_a_second_ctrl_c_ends_at_once_but_one_that_comes_twice_does_not(monkeypatch):
    import autoseg.signals

    now = iter([10.0, 10.1, 11.0])
    monkeypatch.setattr(autoseg.signals.time, "monotonic", lambda: next(now))
    before = signal.signal(INT, signal.default_int_handler)  # a test run in the background may ignore it
    reached = []
    try:
        with pytest.raises(Stopped) as stopped, heeded() as requests:
            for _ in range(2):
                os.kill(os.getpid(), INT)
                reached.append(requests.stop)
            os.kill(os.getpid(), INT)
            reached.append("not reached")
        assert stopped.value.code == 130
        assert reached == [INT, INT]
    finally:
        signal.signal(INT, before)


def test_what_the_program_was_told_to_ignore_stays_ignored():
    before = signal.signal(INT, signal.SIG_IGN)
    try:
        with heeded() as requests:
            os.kill(os.getpid(), INT)
        assert requests.stop is None
    finally:
        signal.signal(INT, before)


def test_another_thread_installs_nothing():
    before = signal.getsignal(TERM)
    seen = []

    def work():
        with heeded() as requests:
            seen.append((signal.getsignal(TERM), requests))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, Requests())]
