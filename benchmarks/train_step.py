"""Time a training step of a plan's configuration against nnU-Net's on the same plan, in turn, each in its own process.

    python benchmarks/train_step.py PLAN_JSON 3d_fullres --peer PYTHON_WITH_NNUNETV2 [--rounds 3] [--steps 6]
    python benchmarks/train_step.py PLAN_JSON 3d_fullres --pieces 2 4

Batches are random, of the plan's patch and batch size. Both sides run the default recipe: plain U-Net, deep
supervision, Dice and cross-entropy, SGD with Nesterov momentum, clipped gradients. glibc's allocator decides a third
of the time of either, so every side runs with its default setting (`plain`) and with freed memory kept (`kept`).
`--pieces`: autoseg with batches cut into so many pieces too, as where memory is short.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

KEEP_FREED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}


def our_step(
    configuration: dict[str, Any], image: Any, labels: Any, classes: int, pieces: int = 1
) -> Callable[[], object]:
    """One call: one training step of autoseg."""
    import torch

    from autoseg.computing import safe_base, scaler
    from autoseg.labels import Labels
    from autoseg.losses import make_loss
    from autoseg.networks import build, output_scales, output_weights
    from autoseg.sampling import Batch
    from autoseg.schema import NetworkSpec, Recipe
    from autoseg.step import Parts, make_optimizer, training_step

    spec = NetworkSpec(**configuration["network"])
    unused: Any = None
    network = build(spec, image.shape[1], classes)
    classes_of = Labels(names=tuple(f"class {i}" for i in range(classes)), values=tuple(range(classes)))
    parts = Parts(
        network=network,
        training=unused,
        validation=unused,
        recipe=Recipe(),
        labels=classes_of,
        scales=output_scales(network, spec),
        output_weights=output_weights(network),
        loss=make_loss(Recipe().loss, labels=classes_of, batch_dice=configuration["batch_dice"]),
        device=torch.device("cpu"),
        folder=Path(),
        tuning=safe_base(torch.device("cpu")),
        pieces=pieces,
    )
    optimizer, loss_scaler = make_optimizer(parts.network, parts.recipe), scaler(parts.tuning, parts.device)
    batch = Batch(step=0, patches=(unused,) * len(image), image=image, labels=labels)
    return lambda: training_step(parts, optimizer, loss_scaler, batch)


def peer_step(configuration: dict[str, Any], image: Any, labels: Any, classes: int) -> Callable[[], object]:
    """One call: one training step of nnU-Net's trainer, put together from its own classes."""
    import torch
    from dynamic_network_architectures.architectures.unet import PlainConvUNet
    from dynamic_network_architectures.initialization.weight_init import InitWeights_He
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    spec = configuration["network"]
    planar = spec["dimension"] == 2
    network = PlainConvUNet(
        input_channels=image.shape[1],
        n_stages=len(spec["features"]),
        features_per_stage=spec["features"],
        conv_op=torch.nn.Conv2d if planar else torch.nn.Conv3d,
        kernel_sizes=spec["kernels"],
        strides=spec["strides"],
        num_classes=classes,
        n_conv_per_stage=spec["encoder_blocks"],
        n_conv_per_stage_decoder=spec["decoder_blocks"][::-1],
        conv_bias=True,
        norm_op=torch.nn.InstanceNorm2d if planar else torch.nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=torch.nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )
    network.apply(InitWeights_He(1e-2))
    dice = {"batch_dice": configuration["batch_dice"], "smooth": 1e-5, "do_bg": False, "ddp": False}
    weights = [0.5**scale for scale in range(len(spec["features"]) - 1)]
    weights[-1] = 0.0
    loss = DeepSupervisionWrapper(
        DC_and_CE_loss(dice, {}, weight_ce=1, weight_dice=1, ignore_label=None, dice_class=MemoryEfficientSoftDiceLoss),
        [weight / sum(weights) for weight in weights],
    )
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.99, weight_decay=3e-5, nesterov=True)
    targets, factor = [], [1] * spec["dimension"]
    for strides in spec["strides"][:-1]:
        factor = [total * stride for total, stride in zip(factor, strides)]
        targets.append(labels[(slice(None), *(slice(f // 2, None, f) for f in factor))][:, None].float())

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        value = loss(network(image), targets)
        value.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
        optimizer.step()
        value.detach().numpy()

    return step


SIDES = {"autoseg": our_step, "nnU-Net": peer_step}


def child(side: str, plan: Path, name: str, steps: int) -> None:
    """Run `steps` steps of one side; print the seconds of each, the CPU seconds a step and the peak memory."""
    import torch

    made = json.loads(plan.read_text())
    configuration = next(entry for entry in made["configurations"] if entry["name"] == name)
    torch.manual_seed(0)
    shape, classes = configuration["patch"], len(made["labels"]["names"])
    image = torch.randn(configuration["batch_size"], len(made["channels"]), *shape)
    labels = torch.randint(classes, (configuration["batch_size"], *shape))
    name, _, pieces = side.partition("/")
    step = SIDES[name](configuration, image, labels, classes, **({"pieces": int(pieces)} if pieces else {}))
    step()
    seconds, cpu = [], time.process_time()
    for _ in range(steps):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "cpu": (time.process_time() - cpu) / steps, "peak_mib": peak_mib}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("configuration")
    parser.add_argument("--peer", help="a Python with nnunetv2; left out: autoseg alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--pieces", type=int, nargs="+", default=[])
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        child(options.side, options.plan, options.configuration, options.steps)
        return
    sides = ["autoseg", *(f"autoseg/{pieces}" for pieces in options.pieces)]
    pythons = dict.fromkeys(sides, sys.executable) | ({"nnU-Net": options.peer} if options.peer else {})
    ways = [(side, allocator) for allocator in ("kept", "plain") for side in pythons]
    results: dict[tuple[str, str], list[dict[str, Any]]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for side, allocator in ways:
            command = [pythons[side], __file__, options.plan, options.configuration]
            command += ["--side", side, "--steps", str(options.steps)]
            environment = os.environ | (KEEP_FREED if allocator == "kept" else {})
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            results[side, allocator].append(json.loads(done.stdout.splitlines()[-1]))
    for (side, allocator), rounds in results.items():
        step = median(second for one in rounds for second in one["seconds"])
        ratios = [median(a["seconds"]) / median(b["seconds"]) for a, b in zip(rounds, results["autoseg", allocator])]
        cpu, peak_mib = median(one["cpu"] for one in rounds), max(one["peak_mib"] for one in rounds)
        print(
            f"{side:9s} freed memory {allocator:5s} {step:7.2f} s a step   {cpu:7.2f} CPU s   {peak_mib:6.0f} MiB   "
            f"{median(ratios):5.2f} x autoseg"
        )


if __name__ == "__main__":
    main()
