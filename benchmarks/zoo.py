"""All networks, or all losses, on one dataset with equal steps: Dice of held-out cases, weights, memory, time a step.

    python benchmarks/zoo.py DATASET -c 2d --steps 300 [--patch [64,64]] [NETWORK ...]
    python benchmarks/zoo.py DATASET -c 2d --steps 300 --losses dice_ce "dice+focal(gamma=2)" ...

Every entry is a plan and a run of its own in one workspace (`--workspace`, else AUTOSEG_HOME, else ./autoseg_data), so
what is done is not done again, and what was stopped goes on. After each the table is written anew (`-o`, Markdown).
Steps are equal, and so are patch and batch where `--patch` and `--batch` state them; else each network has those that
its own plan gives it. Times of machines that do other work mean nothing: compare columns of one run on an idle one.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from autoseg import settings
from autoseg.networks import NETWORKS
from autoseg.networks.footprint import Step
from autoseg.pipeline.data import plan_and_preprocess
from autoseg.pipeline.planning import PlanOptions
from autoseg.pipeline.recipe import TrainOptions
from autoseg.pipeline.train import train_fold
from autoseg.records import AutosegError, atomic_write
from autoseg.schema import Request
from autoseg.settings import in_json
from autoseg.workspace import Workspace

HEAD = ("entry", "Dice", "lowest class", "parameters", "GiB a step", "s a step", "patch", "batch", "steps")


def main() -> None:
    """Train what is asked for, one after the other, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="1, 001, Dataset001_Name, or a raw dataset folder")
    parser.add_argument("networks", nargs="*", help="name or name(key=value); default: all of the dimension")
    parser.add_argument("--losses", nargs="+", default=[], help="instead: these losses, with the network of the preset")
    parser.add_argument("-c", "--configuration", default="2d")
    parser.add_argument("--fold", default="0")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patch", type=json.loads, help="for all, as [64,64]")
    parser.add_argument("--batch", type=int, help="for all")
    parser.add_argument("--gpu-memory", type=float, default=8.0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of the recipe, for all")
    parser.add_argument("--workspace", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("zoo.md"))
    options = parser.parse_intermixed_args()
    dimension = 2 if options.configuration == "2d" else 3
    entries = options.losses or options.networks
    entries = entries or [name for name, known in NETWORKS.items() if dimension in known.dimensions]
    rows = []
    for entry in entries:
        try:
            rows.append(trained(entry, options))
        except (AutosegError, RuntimeError, ValueError) as error:
            # One network that does not fit says so in its row; the others are still worth knowing.
            rows.append((entry, "failed", str(error).splitlines()[0], *[""] * (len(HEAD) - 3)))
        write(rows, options)


def trained(entry: str, options: argparse.Namespace) -> tuple[str, ...]:
    """The row of one network or loss: planned, trained for the steps, scored on whole held-out cases."""
    network, loss = (None, entry) if options.losses else (entry, None)
    name = re.sub(r"[^\w.-]+", "_", "_".join([entry, *options.set])).strip("_")
    run = f"{name}_{options.steps}_{options.seed}"
    place = Workspace.find(options.workspace)
    changes: dict[str, Any] = {}
    for field, value in (("patch", options.patch), ("batch_size", options.batch)):
        if value is not None:
            changes[f"configurations.{options.configuration}.{field}"] = value
    plan = plan_and_preprocess(
        place,
        options.dataset,
        PlanOptions(
            name="default" if network is None else name,
            request=Request(network=network, gpu_memory_gb=options.gpu_memory, changes=in_json(changes)),
            configurations=(options.configuration,),
        ),
    )
    rhythm = {"steps_per_epoch": max(options.steps // 10, 1), "validation_steps": max(options.steps // 100, 1)}
    summary = train_fold(
        place,
        options.dataset,
        options.configuration,
        options.fold,
        TrainOptions(
            plan=plan.name,
            run=run,
            epochs=max(options.steps // rhythm["steps_per_epoch"], 1),
            seed=options.seed,
            loss=loss,
            device=options.device,
            changes={**rhythm, "tune": False, "keep_probabilities": False, **settings.parse(options.set)},
        ),
    )
    configuration = plan.configuration(options.configuration)
    step = Step(configuration.network, plan.in_channels(configuration), plan.labels.heads, "float32", "adamw", "cpu")
    counted = step.count(configuration.patch, configuration.batch_size)[0].total
    folder = place.fold(plan.dataset, run, options.configuration, options.fold)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    means = [mean for found in summary.classes if (mean := found.means["dice"].mean) is not None]
    return (
        entry,
        f"{summary.foreground['dice'].mean or 0:.3f}",
        f"{min(means, default=0):.3f}",
        f"{sum(parameter.numel() for parameter in step.network.parameters()):,}",
        f"{counted / 2**30:.2f}",
        f"{last['seconds'] / last['step']:.2f}",
        " x ".join(map(str, configuration.patch)),
        str(configuration.batch_size),
        str(last["step"]),
    )


def write(rows: list[tuple[str, ...]], options: argparse.Namespace) -> None:
    """The table as Markdown, and on the screen."""
    told = ", ".join([options.configuration, f"fold {options.fold}", f"seed {options.seed}", *options.set])
    lines = [f"# {options.dataset}, {told}", ""]
    lines += [f"| {' | '.join(cells)} |" for cells in (HEAD, ["---"] * len(HEAD), *rows)]
    with atomic_write(options.output) as file:
        file.write("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
