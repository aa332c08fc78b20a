"""nnU-Net's checkpoints -> tensors by our names. A checkpoint is a pickle: it is read as data and never executed.

torch reads it with `weights_only=True`, which makes nothing but tensors, plain containers and the few numpy types that
nnU-Net writes beside the weights (its loss curves). Whatever else a file asks for ends the import.
"""

import pickle
import zipfile
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
        with zipfile.ZipFile(path) as archive:
            packed = any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist())
        if packed:
            # torch packs nothing, and a packed file could grow to any size.
            raise AutosegError(f"{shown} is packed, which nnU-Net's checkpoints are not; it is refused")
        with torch.serialization.safe_globals(NUMPY_TYPES):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = str(error).partition("Unsupported")[2] or str(error).partition("WeightsUnpickler error:")[2]
        raise AutosegError(
            f"{shown} is damaged or wants to make things that no weights need ({' '.join(asked.split())[:200]}); "
            "nothing in it was run, and it is refused"
        ) from None
    except AutosegError:
        raise
    except Exception as error:
        # Bytes that make no sense end in errors of every kind.
        raise AutosegError(f"{shown} cannot be read ({' '.join(str(error).split())[:200]}); copy it again") from None
    try:
        arguments, weights = content["init_args"], content["network_weights"]
        configuration, trainer = arguments["configuration"], content["trainer_name"]
        axes = content.get("inference_allowed_mirroring_axes") or ()
        # Lists nested in a few bytes could be written out without end, so nothing but these is turned into text.
        sound = (
            isinstance(configuration, str)
            and isinstance(trainer, str)
            and all(isinstance(axis, int) and 0 <= axis < 3 for axis in axes)
            and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in weights.items())
        )
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise AutosegError(f"{shown} is no checkpoint of nnU-Net v2: {error} is missing or of another kind") from None
    if not sound:
        raise AutosegError(f"{shown} is no checkpoint of nnU-Net v2: names or weights are of another kind")
    return Checkpoint(
        configuration=configuration,
        trainer=trainer,
        mirror_axes=tuple(axes),
        weights={name.removeprefix("module.").removeprefix("_orig_mod."): t for name, t in weights.items()},
    )


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
    if sum(spec.encoder_blocks) + sum(spec.decoder_blocks) > len(weights):
        raise AutosegError(f"there are {len(weights)} tensors, fewer than the planned network has blocks")
    levels = len(spec.decoder_blocks)
    try:
        with torch.device("meta"):
            wanted = {name: tuple(t.shape) for name, t in build(spec, in_channels, heads).state_dict().items()}
    except (RuntimeError, OverflowError) as error:
        raise AutosegError(f"the planned network cannot be built ({str(error).splitlines()[0]})") from None
    found = {name: tensor for theirs, tensor in weights.items() if (name := our_name(theirs, levels)) is not None}
    faults = [f"{name} is missing" for name in wanted if name not in found]
    faults += [f"{name} is in no network of this plan" for name in found if name not in wanted]
    faults += [
        f"{name} is {tuple(found[name].shape)}, by the plan {shape}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name].shape) != shape
    ]
    odd = [n for n, t in found.items() if t.layout != torch.strided or t.is_meta or not t.is_floating_point()]
    faults += [f"{name} holds no plain floating point numbers" for name in odd]
    if faults:
        more = f"\n  and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise AutosegError("the weights are not those of the planned network:\n  " + "\n  ".join(faults[:8]) + more)
    # A tensor may repeat what it stores, so that a small file would make large weights.
    stores = {store.data_ptr(): store.nbytes() for store in (t.untyped_storage() for t in found.values())}
    if sum(tensor.nbytes for tensor in found.values()) > sum(stores.values()):
        raise AutosegError("the weights are larger than what the file stores of them; it is refused")
    return {name: tensor.float().contiguous() for name, tensor in found.items()}
