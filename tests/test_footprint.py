"""Bytes of a training step: by hand for the least network there is, against real tensors for the others."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
import toys
from torch import nn

from autoseg.networks import NETWORKS, build, meta, spec_of
from autoseg.networks.footprint import Step, footprint, needs_of
from autoseg.networks.meta import Living
from autoseg.planners import PLANNERS
from autoseg.planners.asked import sized
from autoseg.records import AutosegError

SIZES = {"in_channels": 1, "heads": 3}
BENCHMARK = Path(__file__).resolve().parent.parent / "benchmarks" / "footprint.py"


class OneConvolution(nn.Module):
    """The least that can be trained."""

    def __init__(self, spec, in_channels, heads):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, heads, 1, bias=False)

    def forward(self, x, all_scales=False):
        x = self.conv(x)
        return [x] if all_scales else x


class Reads(OneConvolution):
    def forward(self, x, all_scales=False):
        return super().forward(x * x.sum().item(), all_scales)


OWN = replace(toys.network(2), name=f"{__name__}:OneConvolution")


@pytest.fixture(autouse=True)
def found(monkeypatch):
    monkeypatch.setitem(sys.modules, __name__, sys.modules[OneConvolution.__module__])


def test_a_single_convolution_by_hand():
    made = footprint(OWN, patch=(5, 7), batch=2, optimizer="adamw", device="cpu", **SIZES)
    voxels = 2 * 5 * 7
    assert made.weights == made.gradients == 3 * 4
    assert made.optimizer == 2 * 3 * 4
    assert made.input == voxels * (4 + 8)
    assert made.activations == voxels * 3 * 4
    # The gradient of the logits is one buffer; that of the weights lives beside it.
    assert made.total >= made.weights + made.optimizer + made.input + 2 * made.activations


def test_nothing_is_counted_twice_and_nothing_that_is_gone():
    living = Living("first")
    with living:
        x = torch.empty(5, 7, device="meta")
        view = x[1:].t()
        view += 1
        living.kind = "second"
        y = x * 2
        del x
        z = y + 1
    assert living.now == {"first": 5 * 7 * 4, "second": 2 * 5 * 7 * 4}
    del view, y
    assert living.now == {"first": 0, "second": 5 * 7 * 4}
    assert living.most == {"first": 140, "second": 280}
    assert max(living.course) == 420
    assert z.is_meta


def small(name, dimension):
    """A U-Net with features of a few channels."""
    spec = NETWORKS[name].spec(dimension)
    return replace(spec, features=tuple(2 + stage for stage in range(len(spec.features))))


@pytest.mark.parametrize(("name", "dimension"), [("unet", 2), ("unet", 3), ("resenc", 3)])
def test_parts_grow_with_the_batch_and_shrink_with_the_precision(name, dimension):
    spec, patch = small(name, dimension), (64,) * dimension
    made = footprint(spec, patch=patch, batch=2, **SIZES)
    weights = sum(p.numel() for p in build(spec, 1, 3).parameters())
    assert made.gradients <= 4 * weights <= made.weights
    assert made.optimizer == 4 * weights
    twice = footprint(spec, patch=patch, batch=4, **SIZES)
    assert 1.9 < twice.activations / made.activations < 2.1
    assert footprint(spec, patch=patch, batch=2, precision="bfloat16", **SIZES).activations < 0.85 * made.activations


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dimension"), [(n, d) for n, entry in NETWORKS.items() for d in entry.dimensions])
def test_every_network_of_the_table_can_be_planned(name, dimension):
    needs = needs_of(name, 1, 3)
    spec = sized((20, 320, 320)[-dimension:], (3.6, 0.6, 0.6)[-dimension:], needs, PLANNERS["unet"]).network
    patch = tuple(4 * edge for edge in needs.smallest(spec))
    assert 1 < needs.bytes(spec, patch, 9) / needs.bytes(spec, patch, 3) < 3.1


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_a_real_step_allocates_is_what_is_counted(precision):
    spec, patch = small("resenc", 2), (64, 96)
    made = footprint(spec, patch=patch, batch=2, precision=precision, device="cpu", **SIZES)
    network = build(spec, 1, 3)
    living = Living("all")
    with living, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        outputs = network(torch.zeros(2, 1, *patch), all_scales=True)
    real = living.now.total()
    del outputs
    logits = sum(2 * 3 * 64 * 96 // 4**scale * (2 if precision == "bfloat16" else 4) for scale in range(5))
    assert abs(real - 2 * 64 * 96 * 4 - made.activations) < 0.05 * real + logits


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("training", [True, False])
def test_what_is_cut_short_gives_what_torch_works_out(monkeypatch, precision, training):
    class Frozen(nn.Module):
        """Norms with and without weights, in training or as they are used."""

        def __init__(self, spec, in_channels, heads):
            super().__init__()
            self.parts = nn.Sequential(
                nn.Conv2d(in_channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, heads, 1),
                nn.BatchNorm2d(heads, affine=False),
            )  # fmt: skip
            self.parts[1].bias.requires_grad_(False)

        def forward(self, x, all_scales=False):
            for norm in (self.parts[1], self.parts[4]):
                norm.train(training)
            x = self.parts(x)
            return [x] if all_scales else x

    monkeypatch.setattr(sys.modules[__name__], "Frozen", Frozen, raising=False)
    sizes = {"patch": (5, 7), "batch": 3, "precision": precision, **SIZES}
    spec = replace(OWN, name=f"{__name__}:Frozen")
    short = footprint(spec, **sizes)
    assert meta.SHORT
    monkeypatch.setattr(meta, "SHORT", {})
    assert footprint(spec, **sizes) == short


def test_the_forecast_of_a_plan_is_what_would_be_counted():
    needs = needs_of("unet(stages=3)", 1, 3)
    spec = needs.spec(3)
    assert needs.divisors(spec) == (4, 4, 4)
    counted = footprint(spec, patch=(16, 24, 32), batch=5, precision="bfloat16", optimizer="adamw", **SIZES)
    assert abs(needs.bytes(spec, (16, 24, 32), 5) / counted.total - 1) < 0.01


def test_a_network_that_reads_its_values_is_refused():
    with pytest.raises(AutosegError, match="cannot be counted without computing"):
        footprint(replace(OWN, name=f"{__name__}:Reads"), patch=(5, 7), batch=2, **SIZES)


def test_unknown_networks_and_options_are_refused_with_those_there_are():
    with pytest.raises(AutosegError, match="choose one of unet, resenc"):
        needs_of("unett", 1, 2)
    with pytest.raises(AutosegError, match="no option 'depth'; it has stages"):
        needs_of("resenc(depth=3)", 1, 2)
    with pytest.raises(AutosegError, match="it has none"):
        needs_of(f"{OWN.name}(depth=3)", 1, 2)


@pytest.mark.slow
def test_peaks_on_this_cpu_are_within_ten_percent():
    # Not in bfloat16: without instructions for it a step takes twenty times as long, by other kernels.
    command = [sys.executable, str(BENCHMARK), "--precision", "float32", "unet", "resenc"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    ratios = [
        float(line.split("|")[-2]) for line in done.stdout.splitlines() if line.startswith(("| unet", "| resenc"))
    ]
    assert len(ratios) >= 10, json.dumps(done.stdout)
    assert all(0.9 < ratio < 1.1 for ratio in ratios), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "patch", "share"),
    [("fc_densenet56", (128, 96), 1.0), ("attention_unet", (128, 96), 0.5), ("vnet", (32, 48, 40), 0.5)],
)
def test_peaks_of_other_families_are_within_ten_percent_too(network, patch, share):
    """Dense, with gates, and residual without a norm; a few hundred MB each."""
    benchmark = module_from_spec(found := spec_from_file_location("footprint_benchmark", BENCHMARK))
    found.loader.exec_module(benchmark)
    case = {"network": network, "patch": patch, "batch": 2, "share": share, "in_channels": 1, "heads": 4}
    counted = benchmark.counted(case, "cpu", "float32", "sgd").total
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--case", json.dumps(case)],
        capture_output=True, text=True, check=True, env=os.environ | benchmark.GIVE_BACK | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert 0.9 < counted / int(done.stdout) < 1.1, f"{counted / 2**20:.0f} MiB counted, {done.stdout} bytes measured"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_attention_keeps_no_shares_of_all_pairs(device):
    """Twice the tokens need twice the bytes, not four times; every patch is then on the line of the smallest ones."""
    step = Step(spec_of("primus_v3", 2), 1, 2, "bfloat16", "adamw", device)
    small, large = (step.count((edge, 256), 2)[0].total for edge in (256, 512))
    weights = sum(parameter.numel() for parameter in step.network.parameters()) * 16
    assert (large - weights) / (small - weights) == pytest.approx(2, rel=0.15)
    query = torch.empty(2, 3, 5, 7, device="meta")
    with step.mode:
        seen = nn.functional.scaled_dot_product_attention(query=query, key=query, value=query[..., :2])
    assert seen.shape == (2, 3, 5, 2), "whichever way it is called"
