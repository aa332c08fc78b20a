"""Devices by name, and the allocator's setting and its inverse."""

import platform
import subprocess
import sys

import pytest
import torch

from autoseg import devices
from autoseg.devices import choose_device, keep_freed_memory, present, return_freed_memory, usable_threads
from autoseg.records import AutosegError


def test_devices_by_name():
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(AutosegError, match=r"cuda:99 does not work here \(.*there are: auto, .*cpu$"):
        choose_device("cuda:99")


@pytest.mark.parametrize("name", ["gpu", "abacus", ""])
def test_an_unknown_device_is_answered_with_those_that_are_here(name):
    with pytest.raises(AutosegError) as refused:
        choose_device(name)
    assert str(refused.value) == f"--device {name} does not work here; there are: {', '.join(present())}"
    assert all(choose_device(there) for there in present())


@pytest.mark.parametrize(("cores", "threads", "expected"), [(2, 5, 2), (5, 2, 2), (3, 3, 3)])
def test_whoever_chooses_a_device_computes_within_the_quota(monkeypatch, cores, threads, expected):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        monkeypatch.setattr(devices, "cores", lambda: cores)
        assert usable_threads() == expected
        choose_device("cpu")
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")
def test_kept_memory_is_kept_and_given_back():
    # In a process of its own: how much memory is resident after 64 MiB were used and freed, in both settings.
    code = (
        "import sys\n"
        "import numpy as np\n"
        "from autoseg.devices import keep_freed_memory, return_freed_memory\n"
        "def resident():\n"
        "    return int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "def grown():\n"
        "    before = resident()\n"
        "    np.ones(8 << 20)\n"
        "    return resident() - before\n"
        "kept = keep_freed_memory() and grown()\n"
        "top = resident()\n"
        "assert return_freed_memory()\n"
        "print(kept, top - resident(), grown())\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    kept, given_back, plain = map(int, done.stdout.split())
    assert kept > 60 << 20
    assert given_back > 60 << 20
    assert plain < 4 << 20


def test_elsewhere_nothing_is_done(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()
    assert not return_freed_memory()
