"""Peak memory of real training steps against what `networks.footprint` counts without computing.

    python benchmarks/footprint.py [--device cpu|cuda] [--precision float32|bfloat16] [--all | NAME ...]

Prints a Markdown table, row by row: of the networks in `CHOSEN`, which are of every family and take about a quarter of
an hour on one core, or of all, or of those that are named. A case that fails has its reason in its row.

Every case runs in a process of its own: a step of half the size to load what torch loads, then two steps of the case,
the second measured. On a CPU that is the peak of resident memory over what was resident before the case, with an
allocator that gives freed memory back at once; oneDNN's copies within a kernel are in it, and in no count. On a GPU it
is torch.cuda.max_memory_allocated.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "32768", "MALLOC_MMAP_MAX_": "1000000", "MALLOC_TRIM_THRESHOLD_": "0"}
MIB = 2**20
SHAPES: dict[int, tuple[tuple[tuple[int, ...], int, float], ...]] = {
    2: (((256, 192), 3, 1.0), ((320, 320), 2, 0.5), ((128, 160), 12, 0.5)),
    3: (((48, 64, 80), 1, 0.5), ((64, 48, 80), 2, 0.5), ((32, 64, 72), 2, 0.5)),
}
"""Dimension -> (patch, batch, share of the features) of the cases of `NARROWED`.

Features stay multiples of 16, as those of plans are: with AVX-512, oneDNN pads narrower ones to 16 in its own copies.
"""
NARROWED = ("unet", "resenc")
CHOSEN: dict[str, tuple[int, ...]] = {
    "unet": (2,),
    "resenc": (3,),
    "unet_vanilla": (2,),
    "attention_unet": (2,),
    "multires_unet": (2,),
    "r2_unet": (2,),
    "fc_densenet103": (2,),
    "segnet": (2,),
    "unetpp": (2,),
    "resnet34_unet": (2, 3),
    "fcn_resnet50": (2,),
    "deeplabv3plus": (2,),
    "slice_unet3d": (2,),
    "unet3d": (3,),
    "relative_vnet": (3,),
    "mednext": (3,),
    "primus_v3": (2, 3),
}
"""Network -> its dimensions in the usual table. Plain, residual, dense, gated, recurrent, atrous, of attention."""
OTHERS: dict[int, tuple[tuple[tuple[int, ...], int, float], ...]] = {
    2: (((192, 160), 2, 1.0),),
    3: (((32, 64, 48), 1, 1.0),),
}
"""The cases of all other networks, as wide as in their sources: hundreds of MiB each."""
WITHIN = 0.1


def every_case(names: list[str], every: bool) -> list[dict[str, Any]]:
    """What to measure: the networks called `names`, else those of `CHOSEN` or all; two of them in several sizes."""
    from autoseg.networks import NETWORKS

    if unknown := {*names} - {*NETWORKS}:
        sys.exit(f"unknown network {min(unknown)}; choose among {', '.join(NETWORKS)}")
    wanted = {name: entry.dimensions for name, entry in NETWORKS.items() if name in names or (every and not names)}
    return [
        {"network": name, "patch": patch, "batch": batch, "share": share, "in_channels": channels, "heads": 4}
        for name, dimensions in (wanted or CHOSEN).items()
        for dimension in dimensions
        for channels, (patch, batch, share) in enumerate((SHAPES if name in NARROWED else OTHERS)[dimension], 1)
    ]


def half(case: dict[str, Any]) -> dict[str, Any]:
    """A case of about half the voxels, by which torch loads the kernels and the scratch space that such sizes take."""
    batch, patch = case["batch"], list(case["patch"])
    if batch == 1:
        longest = patch.index(max(patch))
        patch[longest] = max(patch[longest] // 2, 32)
    return {**case, "patch": patch, "batch": max(batch // 2, 1)}


def spec_of(case: dict[str, Any]) -> Any:
    """The network of a case, narrower than in its paper."""
    from autoseg.networks import NETWORKS

    spec = NETWORKS[case["network"]].spec(len(case["patch"]))
    return replace(spec, features=tuple(max(2, int(width * case["share"])) for width in spec.features))


def channels_of(case: dict[str, Any]) -> int:
    """Input channels: of each image channel as many as the network sees slices."""
    return int(case["in_channels"]) * int(spec_of(case).slices)


def counted(case: dict[str, Any], device: Any, precision: Any, optimizer: Any) -> Any:
    """The footprint of a case."""
    from autoseg.networks.footprint import footprint

    sizes = {"batch": case["batch"], "in_channels": channels_of(case), "heads": case["heads"]}
    return footprint(
        spec_of(case), patch=tuple(case["patch"]), device=device, precision=precision, optimizer=optimizer, **sizes
    )


def measured(case: dict[str, Any], device: str, precision: str, optimizer: str) -> int:
    """Peak bytes of the second training step of a case, in this process."""
    import torch

    resting = _resident("VmRSS")
    if device == "cpu":
        _step(half(case), device, precision, optimizer)()
        resting = _resident("VmRSS")
    step = _step(case, device, precision, optimizer)
    step()
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now
        step()
        return _resident("VmHWM") - resting
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()


def _resident(which: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))


def _step(case: dict[str, Any], device: str, precision: Any, optimizer: Any) -> Any:
    """One call: one training step."""
    import torch

    from autoseg.computing import safe_base, scaler
    from autoseg.labels import Labels
    from autoseg.losses import make_loss
    from autoseg.networks import build, output_scales, output_weights
    from autoseg.sampling import Batch
    from autoseg.schema import Recipe
    from autoseg.step import Parts, make_optimizer, training_step

    spec, heads, unused = spec_of(case), case["heads"], None
    place = torch.device(device)
    labels = Labels(names=tuple(f"class {i}" for i in range(heads)), values=tuple(range(heads)))
    network = build(spec, channels_of(case), heads).to(place).train()
    parts = Parts(
        network=network,
        training=unused,  # type: ignore[arg-type]
        validation=unused,  # type: ignore[arg-type]
        recipe=Recipe(optimizer=optimizer),
        labels=labels,
        scales=output_scales(network, spec),
        output_weights=output_weights(network),
        loss=make_loss("dice_ce", labels=labels, batch_dice=True),
        device=place,
        folder=Path(),
        tuning=replace(safe_base(place), precision=precision),
    )
    optimizing, loss_scaler = make_optimizer(network, parts.recipe), scaler(parts.tuning, place)
    # As patches come out of the sampler: made where they are used, so that nothing else holds them.
    image = torch.randn(case["batch"], channels_of(case), *case["patch"], device=place)
    batch = Batch(
        step=0,
        patches=(unused,) * case["batch"],  # type: ignore[arg-type]
        image=image,
        labels=torch.randint(heads, (case["batch"], *case["patch"]), device=place),
    )
    return lambda: training_step(parts, optimizing, loss_scaler, batch)


def row(case: dict[str, Any], how: tuple[Any, ...]) -> tuple[str, float | None]:
    """The line of a case in the table, and counted over measured bytes; None where it failed, with the reason."""
    size = " x ".join(map(str, case["patch"]))
    begin = f"| {case['network']} | {size} | {case['batch']} |"
    try:
        told = counted(case, *how).total
    except Exception as error:  # whatever one network stumbles over, the others are measured
        return f"{begin} {_last_line(str(error)) or type(error).__name__} | | |", None
    command = [sys.executable, __file__, "--case", json.dumps(case), "--device", how[0], "--precision", how[1]]
    command += ["--optimizer", how[2]]
    done = subprocess.run(command, env=os.environ | GIVE_BACK, capture_output=True, text=True)
    if done.returncode:
        reason = _last_line(done.stderr) or f"ended with code {done.returncode}"
        return f"{begin} {told / MIB:.1f} | {reason} | |", None
    real = int(_last_line(done.stdout))
    return f"{begin} {told / MIB:.1f} | {real / MIB:.1f} | {told / real:.3f} |", told / real


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].replace("|", "/") if lines else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--optimizer", default="sgd", choices=("sgd", "adamw"))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    how = (options.device, options.precision, options.optimizer)
    if options.case:
        print(measured(json.loads(options.case), *how))
        return
    print("| network | patch | batch | counted MiB | measured MiB | counted / measured |\n|---|---|--:|--:|--:|--:|")
    ratios = []
    for case in every_case(options.networks, options.all):
        line, ratio = row(case, how)
        print(line, flush=True)
        ratios.append(ratio)
    near = sum(ratio is not None and abs(ratio - 1) <= WITHIN for ratio in ratios)
    print(f"\n{near} of {len(ratios)} within {WITHIN:.0%}; {', '.join(how)}")


if __name__ == "__main__":
    main()
