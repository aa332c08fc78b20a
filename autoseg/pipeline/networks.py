"""networks and describe: what the table of networks holds, and one network in detail."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from autoseg.devices import choose_device
from autoseg.evaluation.plots import bars
from autoseg.losses import deep_supervision, dice_ce, scale_targets
from autoseg.networks import NETWORKS, asked, build, options_of, output_scales, spec_of
from autoseg.networks.describe import describe, diagram, table_csv
from autoseg.networks.describe import table as layer_table
from autoseg.networks.footprint import Precision, Step
from autoseg.pipeline.plans import table
from autoseg.progress import Progress
from autoseg.records import AutosegError, atomic_write
from autoseg.schema import Dimension, NetworkSpec

USUAL: dict[int, tuple[int, ...]] = {2: (256, 256), 3: (64, 64, 64)}
"""Patches that are shown where none is asked for."""
TIMED = 3


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """For what data networks are shown."""

    patch: tuple[int, ...] | None = None
    batch: int = 2
    channels: int = 1
    classes: int = 2

    def patch_for(self, dimension: int) -> tuple[int, ...] | None:
        """The patch for networks of that dimension; None if the one asked for has another."""
        if self.patch is None:
            return USUAL[dimension]
        return self.patch if len(self.patch) == dimension else None


def show_networks(sizes: Sizes, precision: Precision, timed: bool, device: str = "auto") -> None:
    """Print every network with its parameters and what a training step needs; with `timed` its seconds, measured."""
    rows = [("network", "", "parameters", "patch", "batch", "memory", *(("s a step",) if timed else ()), "source")]
    wanted = [
        (name, architecture, dimension, patch)
        for name, architecture in NETWORKS.items()
        for dimension in architecture.dimensions
        if (patch := sizes.patch_for(dimension)) is not None
    ]
    if not wanted:
        raise AutosegError("a patch has two or three sizes, for example --patch 64x64x64")
    with Progress("networks", len(wanted), unit="network") as bar:
        for name, architecture, dimension, patch in wanted:
            spec = spec_of(name, 2 if dimension == 2 else 3)
            step = Step(spec, sizes.channels * spec.slices, sizes.classes, precision, "sgd", "cuda")
            weights = f"{sum(parameter.numel() for parameter in step.network.parameters()):,}"
            try:
                memory = f"{step.count(patch, sizes.batch)[0].total / 2**30:.2f} GiB"
                seconds = (f"{seconds_a_step(spec, sizes, patch, device):.3g}",) if timed else ()
            except (ValueError, RuntimeError) as error:
                memory, seconds = f"- ({str(error).splitlines()[0][:40]})", ("-",) if timed else ()
            size = " x ".join(map(str, patch))
            rows.append((name, f"{dimension}D", weights, size, str(sizes.batch), memory, *seconds, architecture.source))
            bar.advance(note=f"{name} {dimension}D")
    print(table(rows))
    print(f"\nMemory of a training step as counted for a GPU, {precision}, SGD, without workspaces of kernels.")
    if timed:
        print(f"Seconds of a step in float32 on {choose_device(device)}, eager, the median of {TIMED}.")
    print(
        "Options and layers of one: autoseg describe NAME; planned with: autoseg plan_and_preprocess -d DATASET "
        "--network 'NAME(option=value)'"
    )


def seconds_a_step(spec: NetworkSpec, sizes: Sizes, patch: tuple[int, ...], device_text: str) -> float:
    """Median seconds of a training step in float32 on random data, after one that is not counted."""
    device = choose_device(device_text)
    channels = sizes.channels * spec.slices
    network = build(spec, channels, sizes.classes).to(device).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.99, nesterov=True)
    image = torch.randn(sizes.batch, channels, *patch, device=device)
    labels = torch.randint(sizes.classes, (sizes.batch, *patch), device=device)
    targets = scale_targets(labels, output_scales(network, spec))
    taken = []
    for _ in range(1 + TIMED):
        clock = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        outputs = network(image, all_scales=True)
        loss = deep_supervision(lambda logits, target: dice_ce(logits, target, batch_dice=True), outputs, targets)
        loss.backward()
        optimizer.step()
        loss.item()  # waits for the device
        taken.append(time.perf_counter() - clock)
    return median(taken[1:])


def describe_networks(names: Sequence[str], folder: Path, sizes: Sizes, compare: bool) -> None:
    """Write the layers and the diagram of each network to `folder`; with `compare` also a figure of their parameters.

    Raises AutosegError for a name that is not known, or a network without that dimension.
    """
    folder.mkdir(parents=True, exist_ok=True)
    millions: dict[str, float] = {}
    for text in names:
        name, architecture, _ = asked(text)
        if architecture is None:
            raise AutosegError(f"{name} is a network of your own; only those of `autoseg networks` can be described")
        dimensions: Sequence[int] = architecture.dimensions if sizes.patch is None else (len(sizes.patch),)
        for dimension in dimensions:
            own: Dimension = 2 if dimension == 2 else 3
            patch = sizes.patch or USUAL[own]
            spec = spec_of(text, own)
            made = describe(spec, patch, sizes.channels * spec.slices, sizes.classes)
            stem = f"{name}_{own}d"
            print(made.title if compare else layer_table(made))
            for ending, content in (("txt", layer_table(made)), ("csv", table_csv(made)), ("svg", diagram(made))):
                with atomic_write(folder / f"{stem}.{ending}") as file:
                    file.write(content)
            millions[f"{text} {own}D"] = made.parameters / 1e6
        if not compare:
            print(f"Options of {name}, with what they are if left out: {options_of(architecture)}\n")
    if compare:
        bars(millions, "million parameters", folder / "parameters.png")
        print(f"Parameters: {folder / 'parameters.png'}")
    print(f"Layers and diagrams: {folder}")
