"""Where the computing happens, and keeping the system's allocator out of its way."""

import ctypes
import sys

import torch

from autoseg.records import AutosegError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def choose_device(name: str) -> torch.device:
    """`auto` (CUDA, then Apple's MPS, then the CPU), `cuda`, `cuda:1`, `mps` or `cpu`.

    Raises AutosegError if the device is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise AutosegError(f"--device {name} does not work here ({error}); try --device auto") from None
    return device


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory instead of giving it back after every large tensor; True if it agreed.

    By default each large tensor is mapped anew and faulted in page by page; a third of the CPU time of training can
    go there. Costs some resident memory. Does nothing outside Linux with glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
