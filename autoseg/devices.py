"""Where the computing happens, on how many cores, and keeping the system's allocator out of its way."""

import ctypes
import gc
import sys

import torch

from autoseg.parallel import cores
from autoseg.records import AutosegError

SHOWN = 200
"""Characters of torch's own words about a device that does not work."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4


def choose_device(name: str) -> torch.device:
    """`auto` (CUDA, then Apple's MPS, then the CPU), `cuda`, `cuda:1`, `mps` or `cpu`.

    Whoever computes comes by here, so torch is held to the cores of this process too, see `usable_threads`.
    Raises AutosegError that lists the devices there are, if it is not one of them.
    """
    if torch.get_num_threads() > usable_threads():
        torch.set_num_threads(usable_threads())
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = None
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        # torch answers an unknown name with the list of all devices that it was ever written for.
        why = "" if device is None else f" ({' '.join(str(error).split())[:SHOWN]})"
        raise AutosegError(f"--device {name} does not work here{why}; there are: {', '.join(present())}") from None
    return device


def present() -> list[str]:
    """The devices that `choose_device` would take here."""
    cuda = [f"cuda:{n}" for n in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return ["auto", *cuda, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def release(device: torch.device) -> None:
    """Give back what a GPU's allocator keeps for tensors that are no more, those of reference cycles included."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def usable_threads() -> int:
    """Threads that torch should compute with: its own number, but no more than the cores of this process.

    torch heeds OMP_NUM_THREADS and affinity, not the CPU quota of a container, beyond which threads only wait.
    """
    return min(torch.get_num_threads(), cores())


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory instead of giving it back after every large tensor; True if it agreed.

    By default each large tensor is mapped anew and faulted in page by page; a third of the CPU time of training can
    go there. Costs some resident memory. Does nothing outside Linux with glibc.
    """
    return _mallopt((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1))


def return_freed_memory() -> bool:
    """Undo `keep_freed_memory` and give back what is kept by now; True if glibc agreed.

    The thresholds are those that glibc comes to by itself in a process with large tensors (32 MiB is its
    DEFAULT_MMAP_THRESHOLD_MAX, and it trims above twice that), so that the two can be compared.
    """
    agreed = _mallopt((M_MMAP_MAX, 65536), (M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 64 << 20))
    if agreed:
        ctypes.CDLL(None).malloc_trim(0)
    return agreed


def _mallopt(*settings: tuple[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(name, value) for name, value in settings)
