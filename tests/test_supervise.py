"""Work that survives the death of its process: who is blamed, what goes on, and how a command is told to end."""

import signal
import subprocess
import sys
import tempfile
import threading

import pytest

from autoseg.parallel import map_cases, raise_failures
from autoseg.records import AutosegError
from autoseg.supervise import CAN_FORK, FRUITLESS, JOURNAL, Journal

pytestmark = pytest.mark.skipif(not CAN_FORK, reason="nothing is forked on this system")

BEGIN = """
import os, signal, sys, threading, time
from pathlib import Path
from autoseg.parallel import map_cases, raise_failures
from autoseg.supervise import JOURNAL, supervise

def note(text):
    with open("tried", "a") as file:
        file.write(text + "\\n")

def cases(one, count=6, workers=1):
    outcomes = map_cases(one, range(count), name=lambda n: f"case_{n}", what="squeeze", workers=workers)
    raise_failures(outcomes, "squeeze")

def die():
    os.kill(os.getpid(), signal.SIGKILL)
"""


def start(code, folder, **more):
    """A process that runs `work` of `code` under supervision."""
    script = f"{BEGIN}\n{code}\nsys.exit(supervise(work))\n"
    return subprocess.Popen(
        [sys.executable, "-P", "-c", script], cwd=folder, text=True, stdout=-1, stderr=-1, stdin=-1, **more
    )


def run(code, folder):
    """(exit code, stdout, stderr, what was tried in order)."""
    process = start(code, folder)
    out, err = process.communicate(timeout=60)
    tried = folder / "tried"
    return process.returncode, out, err, tried.read_text().split() if tried.exists() else []


def test_a_case_that_has_its_process_killed_is_named_and_the_others_are_done(tmp_path):
    code, _, said, tried = run(
        """
def one(n):
    note(str(n))
    if n == 3:
        die()
def work():
    cases(one)
""",
        tmp_path,
    )
    assert code == 1
    # Done before are done again: map_cases keeps nothing on disk. The guilty one is tried once.
    assert tried == ["0", "1", "2", "3", "0", "1", "2", "4", "5"]
    assert "In hand: case_3 (squeeze)" in said
    assert "going on without case_3" in said
    failure = said[said.index("squeeze failed for 1 of 6 cases") :]
    assert "case_3: the process died of SIGKILL, which the system sends when memory runs out" in failure
    assert "GiB at its peak while this case was in hand (squeeze)" in failure


def test_of_two_suspects_the_guilty_one_is_found(tmp_path):
    code, out, said, tried = run(
        """
both = threading.Barrier(2)
def one(n):
    if not JOURNAL.suspects and n in (1, 2):
        both.wait()
    if n == 1:
        while not JOURNAL.suspects:
            time.sleep(0.01)
    note(str(n))
    if n == 2:
        die()
    print(f"done {n}\\n", end="", flush=True)
def work():
    cases(one, count=5, workers=2)
""",
        tmp_path,
    )
    assert code == 1
    assert "In hand: case_1 (squeeze), case_2 (squeeze)" in said
    assert said.count("the process died of") == 3  # of both, of the guilty one alone, and in the list of failures
    assert tried.count("2") == 2
    # After the first death the suspects come one after the other, before the rest.
    assert tried[tried.index("2") + 1 :][:2] == ["1", "2"]
    assert set(out.splitlines()) == {"done 0", "done 1", "done 3", "done 4"}
    assert "squeeze failed for 1 of 5 cases" in said
    assert "case_2: the process died" in said


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGBUS"])
def test_a_crash_in_native_code_is_told_from_want_of_memory(tmp_path, name):
    code, _, said, _ = run(
        f"""
import resource
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
def one(n):
    if n == 1:
        os.kill(os.getpid(), signal.{name})
def work():
    cases(one, count=2)
""",
        tmp_path,
    )
    assert code == 1
    assert f"the process died of {name}, " in said
    assert "which the system sends when memory runs out" not in said


def test_the_peak_of_memory_is_that_of_the_process_that_died(tmp_path):
    _, _, said, _ = run(
        """
def one(n):
    if n == 1:
        block = bytearray(300 << 20)
        die()
def work():
    cases(one, count=2)
""",
        tmp_path,
    )
    peak = float(said.split("it had taken ")[1].split(" GiB")[0])
    assert 300 / 1024 < peak < 1


def test_a_death_with_no_case_in_hand_ends_the_command(tmp_path):
    code, _, said, tried = run(
        """
def work():
    note("load")
    die()
""",
        tmp_path,
    )
    assert code == 128 + signal.SIGKILL
    assert tried == ["load"]
    assert "No case was in hand" in said


def test_a_death_between_cases_names_what_was_going_on(tmp_path):
    _, _, said, _ = run(
        """
def work():
    cases(lambda n: n, count=2)
    JOURNAL.stage("while fold 0 of 2d trained")
    die()
""",
        tmp_path,
    )
    assert "GiB at its peak while fold 0 of 2d trained. No case was in hand" in said


def test_deaths_without_end_end_the_command(tmp_path):
    code, _, said, tried = run(
        """
def one(n):
    note(str(n))
    die()
def work():
    cases(one, count=20)
""",
        tmp_path,
    )
    assert code == 128 + signal.SIGKILL
    assert len(tried) == FRUITLESS
    assert "no single case is at fault" in said


@pytest.mark.parametrize(
    ("body", "code", "err"),
    [
        ("print('fine')", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('in words')", 1, "in words\n"),
        ("sys.exit()", 0, ""),
        ("[][1]", 1, "IndexError"),
    ],
)
def test_the_exit_code_is_that_of_the_work(tmp_path, body, code, err):
    found, out, said, _ = run(f"def work():\n    print('once')\n    {body}\nprint('before')", tmp_path)
    assert found == code
    assert err in said
    # What was printed before the fork is not printed by both.
    assert out.split()[:2] == ["before", "once"]
    assert out.count("before") == out.count("once") == 1


def test_output_that_nobody_reads_does_not_let_the_work_escape(tmp_path):
    script = f"""{BEGIN}
def work():
    note("begin")
    sys.stdin.read()
    print("lost")
try:
    supervise(work)
finally:
    note("end")
"""
    with subprocess.Popen([sys.executable, "-P", "-c", script], cwd=tmp_path, stdin=-1, stdout=-1) as process:
        process.stdout.close()
        process.stdin.close()
    assert (tmp_path / "tried").read_text() == "begin\nend\n"


WAITING = """
def work():
    signal.signal(signal.SIGUSR1, lambda *_: note("USR1"))
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
        if os.path.exists("tried"):
            print("noted", flush=True)
            os.remove("tried")
"""


def test_signals_reach_the_work_and_end_it_for_good(tmp_path):
    process = start(WAITING, tmp_path)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "noted\n"
    process.send_signal(signal.SIGTERM)
    out, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert (out, said) == ("", "")


def test_a_case_killed_after_the_command_was_told_to_end_is_not_tried_again(tmp_path):
    process = start(
        """
def one(n):
    signal.signal(signal.SIGTERM, lambda *_: die())
    note(str(n))
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
def work():
    cases(one)
""",
        tmp_path,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert (tmp_path / "tried").read_text() == "0\n"


def test_the_work_ends_with_the_process_that_watches_over_it(tmp_path):
    process = start(WAITING, tmp_path)
    assert process.stdout.readline() == "ready\n"
    process.kill()
    # Returns once the last process that could write has ended.
    assert process.stdout.read() == ""
    process.communicate()


def test_a_key_on_the_terminal_interrupts_once(tmp_path):
    code = f"""{BEGIN}
seen = []
def work():
    signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    print("ready", flush=True)
    while not seen:
        time.sleep(0.01)
    time.sleep(0.3)
    print("interrupts:", len(seen), flush=True)
sys.exit(supervise(work))
"""
    # Where the tests run in the background, the key is ignored: that would be passed on.
    spawn = (
        "import os, pty, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    )
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", spawn, sys.executable, "-P", "-c", code], cwd=tmp_path, stdin=-1, stdout=-1
    )
    assert process.stdout.readline().strip() == b"ready"
    process.stdin.write(b"\x03")
    process.stdin.flush()
    assert b"interrupts: 1\r\n" in process.stdout.read()
    process.communicate()
    assert process.returncode == 0


def test_what_is_ignored_stays_ignored(tmp_path):
    process = start(f"signal.signal(signal.SIGINT, signal.SIG_IGN)\n{WAITING}", tmp_path)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "noted\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM


def test_the_journal_tells_what_was_in_hand_and_forgives_a_line_cut_short():
    with tempfile.TemporaryFile(buffering=0) as file:
        journal = Journal(file=file)
        with journal.working("read", "ä"):
            pass
        with journal.working("read", "b", "decoding", last=False), journal.working("write", "b"):
            assert journal.read() == ({("read", "b"): "decoding", ("write", "b"): ""}, 1, "")
        assert journal.read() == ({}, 2, "")
        file.write(b'{"begins": true, "st')
        assert journal.read() == ({}, 2, "")


def test_nothing_is_noted_where_nobody_watches():
    assert JOURNAL.file is None
    with JOURNAL.working("read", "a"):
        pass


def test_map_cases_leaves_out_the_dead_and_takes_suspects_first_and_alone(monkeypatch):
    monkeypatch.setattr(JOURNAL, "dead", {("work", "2"): "it burst", ("other work", "3"): "elsewhere"})
    monkeypatch.setattr(JOURNAL, "suspects", {("work", "4"), ("work", "2"), ("work", "5")})
    lock, order, together = threading.Lock(), [], []
    inside = 0

    def work(number):
        nonlocal inside
        with lock:
            inside += 1
            order.append(number)
            together.append((number, inside))
        with lock:
            inside -= 1
        return -number

    outcomes = map_cases(work, range(7), name=str, what="work", workers=3, quiet=True)
    assert [outcome.value for outcome in outcomes] == [0, -1, None, -3, -4, -5, -6]
    assert order[:2] == [4, 5]
    assert {number: count for number, count in together if number in (4, 5)} == {4: 1, 5: 1}
    with pytest.raises(AutosegError, match="1 of 7 cases:\n  2: it burst"):
        raise_failures(outcomes, "work")
