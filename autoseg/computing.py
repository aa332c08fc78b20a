"""What a `Tuning` does: the settings of one process, one network and one step. Which to choose is for `tuning`.

The safe base is float32, eager, contiguous, with the allocator as it is and all cores that the process may use.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from autoseg.devices import keep_freed_memory, return_freed_memory, usable_threads
from autoseg.parallel import cores
from autoseg.schema import Tuning

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def device_name(device: torch.device) -> str:
    """The device in words, as precise as a choice of speed depends on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.backends.cpu.get_cpu_capability()}, {cores()} cores"


def fits(tuning: Tuning, device: torch.device) -> bool:
    """Whether a saved choice was made on such a device with this torch; if not, probe again and say so."""
    return tuning.device == device_name(device) and tuning.torch == torch.__version__


def settle(tuning: Tuning) -> None:
    """Set what holds for the whole process: threads and allocator."""
    if torch.get_num_threads() != tuning.threads:
        torch.set_num_threads(tuning.threads)
    if tuning.keep_freed:
        keep_freed_memory()
    else:
        return_freed_memory()


def apply(network: nn.Module, tuning: Tuning, device: torch.device) -> nn.Module:
    """Move the network itself to the device, lay its weights out and compile it, as chosen; returns it.

    Names and values in `state_dict` stay as they are. Do this before the optimizer is made.
    """
    network.to(device)
    if tuning.channels_last:
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        for tensor in network.parameters():
            if tensor.dim() in formats:
                tensor.data = tensor.data.to(memory_format=formats[tensor.dim()])
    if tuning.compiled:
        network.compile(dynamic=False)
    return network


def autocast(tuning: Tuning, device: torch.device) -> AbstractContextManager[Any]:
    """Where forward pass and loss are computed; does nothing for float32."""
    if tuning.precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[tuning.precision])


def scaler(tuning: Tuning, device: torch.device) -> torch.amp.GradScaler:
    """Loss scaling, which float16 needs for its small gradients; passes everything through for the others."""
    return torch.amp.GradScaler(device.type, enabled=tuning.precision == "float16")


def describe(tuning: Tuning) -> str:
    """What was chosen and why, in one line."""
    chosen = [
        tuning.precision,
        "compiled" if tuning.compiled else "eager",
        "channels-last" if tuning.channels_last else "contiguous",
        "freed memory kept" if tuning.keep_freed else "freed memory returned",
        f"{tuning.threads} threads",
    ]
    if tuning.seconds_a_step is not None:
        chosen.append(f"{tuning.seconds_a_step:.3g} s a step")
    return "; ".join([", ".join(chosen), *tuning.notes])


def safe_base(device: torch.device) -> Tuning:
    """float32, eager, contiguous, allocator as it is, all cores that the process may use."""
    return Tuning(threads=usable_threads(), device=device_name(device), torch=torch.__version__)


def untuned(device: torch.device, reason: str) -> Tuning:
    """The safe base with freed memory kept, settled without any probe; `reason` says why."""
    kept = replace(safe_base(device), keep_freed=keep_freed_memory(), notes=(f"nothing was probed: {reason}",))
    settle(kept)
    return kept
