"""map_cases: order kept, one failure harms only itself, memory respected."""

import threading

import pytest

from autoseg.parallel import MemoryGate, map_cases, raise_failures
from autoseg.records import AutosegError


@pytest.mark.parametrize("workers", [1, 3])
def test_one_failing_case_is_named_and_the_others_are_done(workers):
    def work(number):
        if number == 3:
            raise OSError("no such slice")
        if number == 4:
            raise AutosegError("say it plainly")
        return number * number

    outcomes = map_cases(work, range(6), name=lambda n: f"case_{n}", what="work", workers=workers, quiet=True)
    assert [outcome.value for outcome in outcomes] == [0, 1, 4, None, None, 25]
    with pytest.raises(AutosegError) as error:
        raise_failures(outcomes, "work")
    text = str(error.value)
    assert "2 of 6" in text
    assert "case_3: OSError: no such slice (test_parallel.py:" in text
    assert "case_4: say it plainly" in text


def test_no_cases_give_nothing():
    assert raise_failures(map_cases(str, [], name=str, what="work", quiet=True), "work") == []


def test_memory_is_never_overdrawn_and_a_giant_runs_alone():
    gate, lock, inside, most = MemoryGate(10), threading.Lock(), [], []

    def work(cost):
        gate.enter(cost)
        with lock:
            inside.append(cost)
            most.append(list(inside))
        with lock:
            inside.remove(cost)
        gate.leave(cost)

    threads = [threading.Thread(target=work, args=(cost,)) for cost in (4, 5, 25, 6, 10, 1) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 24
    assert all(sum(costs) <= 10 or costs == [25] for costs in most)
    assert gate.used == 0
