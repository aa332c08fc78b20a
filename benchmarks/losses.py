"""Time and memory of each loss beside the default's: python benchmarks/losses.py [--only focal cldice] [--rounds 5]

A line a loss: milliseconds of forward and backward, the ratio to `dice_ce` in the same rounds (all losses take turns;
medians), and the most memory held at once beyond logits and target, in buffers of the size of the logits in float32.
Logits (2, 4, 48, 56, 40) in float32 on one thread; with --device cuda on a GPU.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from autoseg.labels import Labels
from autoseg.losses import LOSSES, make_loss

SHAPE = (2, 4, 48, 56, 40)
LABELS = Labels.from_dataset({"background": 0, "a": 1, "b": 2, "c": 3})


def batch(device: str) -> tuple[Tensor, Tensor]:
    """Logits that are roughly right, and a target of one box a class."""
    target = torch.zeros(SHAPE[0], *SHAPE[2:], dtype=torch.int64)
    target[:, 5:30, 5:25, 5:30], target[:, 10:40, 30:50, 8:20], target[:, 35:45, 10:20, 25:35] = 1, 2, 3
    logits = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    logits.scatter_add_(1, target[:, None], torch.full((SHAPE[0], 1, *SHAPE[2:]), 2.0))
    return logits.to(device).requires_grad_(), target.to(device)


def peak(step: Callable[[], object], device: str) -> int:
    """Bytes that `step` holds at most, beyond what there was before it."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    assert found.profiler is not None and found.profiler.kineto_results is not None
    changes = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        most = max(most, held)
    return most


def main() -> None:
    """Print one line a loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[*LOSSES], choices=[*LOSSES], help="which losses")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logits, target = batch(options.device)

    def step_of(name: str) -> Callable[[], object]:
        loss = make_loss(name, labels=LABELS, batch_dice=False, weights=(1, 2, 3, 4))
        return lambda: torch.autograd.grad(loss(logits, target), logits)

    clock = time.process_time if options.device == "cpu" else time.perf_counter  # of this thread, whatever others do

    def seconds(step: Callable[[], object]) -> float:
        start = clock()
        step()
        if options.device != "cpu":
            torch.cuda.synchronize()
        return clock() - start

    steps = {name: step_of(name) for name in dict.fromkeys(("dice_ce", *options.only))}
    memory = {name: peak(step, options.device) / logits.nbytes for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            times[name].append(seconds(step))
    for name in steps:
        ratio = median(own / default for own, default in zip(times[name], times["dice_ce"]))
        print(f"{name:18} {1000 * median(times[name]):8.1f} ms  {ratio:6.1f} x  {memory[name]:5.1f} buffers")


if __name__ == "__main__":
    main()
