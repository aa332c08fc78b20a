"""nnU-Net's checkpoints -> tensors by our names. A checkpoint is a pickle: it is read as data and never executed.

torch reads it with `weights_only=True`, which makes nothing but tensors, plain containers and the few numpy types that
nnU-Net writes beside the weights (its loss curves). Whatever else a file asks for ends the import.
"""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoseg.networks import build
from autoseg.records import AutosegError
from autoseg.schema import NetworkSpec

_scalar, _array = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
NUMPY_TYPES: list[Any] = [
    np.dtype,
    np.ndarray,
    *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")),
    # Under the names of numpy 2 and of numpy 1.
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("_core", "core")),
    *((_array, f"numpy.{core}.multiarray._reconstruct") for core in ("_core", "core")),
]


@dataclass(frozen=True, eq=False, kw_only=True)
class Checkpoint:
    """What a prediction needs of a checkpoint."""

    configuration: str
    trainer: str
    mirror_axes: tuple[int, ...]
    """Axes of the patch that predictions are mirrored along; nnU-Net knows from training which are allowed."""
    weights: dict[str, Tensor]
    """By nnU-Net's names."""


def read_checkpoint(path: Path, shown: str = "") -> Checkpoint:
    """Read a checkpoint file without running anything that it says. `shown` names it in errors, by default its path.

    Raises AutosegError if it holds more than weights and plain values, is damaged, or is none of nnU-Net's.
    """
    shown = shown or str(path)
    try:
        with torch.serialization.safe_globals(NUMPY_TYPES):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = str(error).partition("Unsupported")[2] or str(error).partition("WeightsUnpickler error:")[2]
        raise AutosegError(
            f"{shown} is damaged or wants to make things that no weights need ({' '.join(asked.split())[:200]}); "
            "nothing in it was run, and it is refused"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AutosegError(f"{shown} cannot be read ({' '.join(str(error).split())[:200]}); copy it again") from None
    try:
        arguments, weights = content["init_args"], content["network_weights"]
        found = Checkpoint(
            configuration=str(arguments["configuration"]),
            trainer=str(content["trainer_name"]),
            mirror_axes=tuple(int(axis) for axis in content.get("inference_allowed_mirroring_axes") or ()),
            weights={str(name).removeprefix("module.").removeprefix("_orig_mod."): t for name, t in weights.items()},
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise AutosegError(f"{shown} is no checkpoint of nnU-Net v2: {error} is missing or of another kind") from None
    if not all(isinstance(tensor, Tensor) for tensor in found.weights.values()):
        raise AutosegError(f"{shown} is no checkpoint of nnU-Net v2: its network_weights are not all tensors")
    return found


def our_name(name: str, levels: int) -> str | None:
    """Our name of nnU-Net's tensor `name` in a network with `levels` decoder levels; None if it is a copy of another.

    nnU-Net counts decoder levels from the coarsest one, names every convolution twice (in `all_modules` too), and the
    encoder once more below the decoder. Raises AutosegError for names of other networks.
    """
    match name.split("."):
        case ["decoder", "encoder", *_] | [*_, "all_modules", _, _]:
            return None
        case ["encoder", "stages", stage, "0", "convs", block, part, leaf]:
            return f"encoder.{stage}.{block}.{part}.{leaf}"
        case ["encoder", "stem", "convs", "0", part, leaf]:
            return f"encoder.0.0.{part}.{leaf}"
        case ["encoder", "stages", stage, "blocks", block, "conv1" | "conv2" as half, part, leaf]:
            return f"encoder.{stage}.{_after_stem(stage, block)}.{_HALVES[half]}.{part}.{leaf}"
        case ["encoder", "stages", stage, "blocks", block, "skip", step, part, leaf]:
            return f"encoder.{stage}.{_after_stem(stage, block)}.shortcut.{step}.{part}.{leaf}"
        case ["decoder", "transpconvs", level, leaf]:
            return f"up.{levels - 1 - int(level)}.{leaf}"
        case ["decoder", "stages", level, "convs", "0", part, leaf]:
            return f"merge.{levels - 1 - int(level)}.{part}.{leaf}"
        case ["decoder", "stages", level, "convs", block, part, leaf]:
            return f"refine.{levels - 1 - int(level)}.{int(block) - 1}.{part}.{leaf}"
        case ["decoder", "seg_layers", level, leaf]:
            return f"heads.{levels - 1 - int(level)}.{leaf}"
    raise AutosegError(f"the checkpoint holds a tensor {name}, which no U-Net of ours has")


_HALVES = {"conv1": "first", "conv2": "second"}


def _after_stem(stage: str, block: str) -> int:
    """Position of a residual block: in the first stage the stem stands before it."""
    return int(block) + (stage == "0")


def rename(weights: Mapping[str, Tensor], spec: NetworkSpec, in_channels: int, heads: int) -> dict[str, Tensor]:
    """nnU-Net's tensors by our names, float32, every one that the network of `spec` has and no other.

    Raises AutosegError that lists what is missing, too much, or of another shape.
    """
    levels = len(spec.decoder_blocks)
    with torch.device("meta"):
        wanted = {name: tuple(t.shape) for name, t in build(spec, in_channels, heads).state_dict().items()}
    found: dict[str, Tensor] = {}
    for theirs, tensor in weights.items():
        if (name := our_name(theirs, levels)) is not None:
            found[name] = tensor.float().contiguous()
    faults = [f"{name} is missing" for name in wanted if name not in found]
    faults += [f"{name} is in no network of this plan" for name in found if name not in wanted]
    faults += [
        f"{name} is {tuple(found[name].shape)}, by the plan {shape}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name].shape) != shape
    ]
    if faults:
        more = f"\n  and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise AutosegError("the weights are not those of the planned network:\n  " + "\n  ".join(faults[:8]) + more)
    return found
