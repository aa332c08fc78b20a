"""networks and describe: what the table of networks holds, and one network in detail."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from autoseg.devices import choose_device
from autoseg.evaluation.plots import bars
from autoseg.losses import deep_supervision, scale_targets
from autoseg.networks import asked, build, options_of, output_scales, output_weights, spec_of
from autoseg.networks.describe import Description, describe, diagram, table_csv
from autoseg.networks.describe import table as layer_table
from autoseg.networks.footprint import LOSS, Precision, Step, needs_of
from autoseg.pipeline.plans import table
from autoseg.planners.asked import sized
from autoseg.planners.rules import PLANNERS
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


def show_networks(names: Sequence[str], sizes: Sizes, precision: Precision, timed: bool, device: str = "auto") -> None:
    """Print networks with parameters and what a training step needs; with `timed` seconds, measured.

    names: as they are asked for, options included. Raises AutosegError for one that is not in the table, and where the
    patch is for none of them.
    """
    head = ("network", "", "parameters", "deep supervision", "patch", "batch", "memory")
    rows = [(*head, *(("s a step",) if timed else ()), "source")]
    wanted = []
    for name in names:
        key, architecture, _ = asked(name)
        if architecture is None:
            raise AutosegError(f"{key} is a network of your own; autoseg describe shows it")
        for dimension in architecture.dimensions:
            if (patch := sizes.patch_for(dimension)) is not None:
                wanted.append((name, architecture, dimension, patch))
    if not wanted:
        raise AutosegError(
            f"--patch {'x'.join(map(str, sizes.patch or ()))} is for none of these networks; give two sizes for 2D, "
            "three for 3D, for example 64x64x64"
        )
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
            deep = "yes" if architecture.deep_supervision else "no"
            shown = (name, f"{dimension}D", weights, deep, size, str(sizes.batch), memory)
            rows.append((*shown, *seconds, architecture.source))
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
        loss = deep_supervision(LOSS, outputs, targets, output_weights(network))
        loss.backward()
        optimizer.step()
        loss.item()  # waits for the device
        taken.append(time.perf_counter() - clock)
    return median(taken[1:])


def described(spec: NetworkSpec, patch: tuple[int, ...], sizes: Sizes) -> Description:
    """`describe` for the channels and classes of `sizes`."""
    return describe(spec, patch, sizes.channels * spec.slices, sizes.classes)


def described_own(name: str, dimensions: Sequence[Dimension], sizes: Sizes) -> dict[Dimension, Description]:
    """A network of one's own with the stages that planning would give it for isotropic voxels, dimension by dimension.

    Those that it cannot be built for are said. Raises AutosegError if there is no other.
    """
    made: dict[Dimension, Description] = {}
    needs, rules = needs_of(name, sizes.channels, sizes.classes), PLANNERS["unet"]
    for dimension in dimensions:
        shape = sized(sizes.patch or USUAL[dimension], (1.0,) * dimension, needs, rules)
        try:
            made[dimension] = described(shape.network, shape.patch, sizes)
        except AutosegError:
            raise
        except Exception as error:  # whatever its code raises where it does not fit
            said = f"{name} cannot be shown in {dimension}D: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            if len(dimensions) == 1:
                raise AutosegError(said) from error
            print(said)
    if not made:
        raise AutosegError(f"{name} could be built neither in 2D nor in 3D; see above")
    return made


def describe_networks(names: Sequence[str], folder: Path, sizes: Sizes, compare: bool) -> None:
    """Write the layers and the diagram of each network to `folder`; with `compare` also a figure of their parameters.

    One of your own is shown in 2D and in 3D as far as it can be built there. Raises AutosegError for a name that is not
    known, or a network without that dimension.
    """
    folder.mkdir(parents=True, exist_ok=True)
    millions: dict[str, float] = {}
    for text in names:
        name, architecture, _ = asked(text)
        known = (2, 3) if architecture is None else architecture.dimensions
        asked_for = known if sizes.patch is None else (len(sizes.patch),)
        dimensions: list[Dimension] = [2 if dimension == 2 else 3 for dimension in asked_for]
        if architecture is None:
            shown = described_own(text, dimensions, sizes)
        else:
            shown = {d: described(spec_of(text, d), sizes.patch or USUAL[d], sizes) for d in dimensions}
        for dimension, made in shown.items():
            stem = f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', text.rpartition(':')[2]).strip('_')}_{dimension}d"
            made = replace(made, title=made.title.replace(name, text, 1))
            print(made.title if compare else layer_table(made))
            for ending, content in (("txt", layer_table(made)), ("csv", table_csv(made)), ("svg", diagram(made))):
                with atomic_write(folder / f"{stem}.{ending}") as file:
                    file.write(content)
            millions[f"{text} {dimension}D"] = made.parameters / 1e6
        if not compare and architecture is not None:
            print(f"Options of {name}, with what they are if left out: {options_of(architecture)}\n")
    if compare:
        bars(millions, "million parameters", folder / "parameters.png")
        print(f"Parameters: {folder / 'parameters.png'}")
    print(f"Layers and diagrams: {folder}")
