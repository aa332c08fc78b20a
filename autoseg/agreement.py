"""Whether a setting gives what the safe base gives, as far as rounding allows: logits and gradients of one network.

Kernels exist that are fast and wrong: bfloat16 convolutions of oneDNN where a strided output is one voxel wide (pytorch
issue 169688), gradients of its 3x3x3 kernels in bfloat16 where an output is two slices deep (seen with torch 2.13 on a
CPU with AVX-512 BF16), convolutions of cuDNN on large inputs (issue 163539). Which shapes they spoil cannot be known,
so a setting is compared on the very shape that is trained, and on no other: what is wrong elsewhere does no harm here.

Whether float16 and bfloat16 agree cannot be told by a fixed tolerance: in a network with norms and leaky ReLUs the
rounding of each layer moves values over the kink, and gradients of early layers differ by a third though every kernel
is right. So the yardstick is measured: the same network in float32, its weights and its input each moved by a random
share of the size of one rounding. In the U-Nets here a right kernel stays within 2.3 times the yardstick.

Dropout would be another network in each of these passes, and the yardstick so long that any kernel passes, or none: it
is turned off here, and what else a network draws is drawn alike.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoseg.computing import DTYPES, apply, autocast, safe_base
from autoseg.schema import Tuning

TOLERANCE = 4.0
"""Times the yardstick that results may differ."""
MOST_OFF = 0.9
"""Relative error that is too large whatever the yardstick says: a gradient that is lost altogether has 1."""
HOPELESS = 3.0
"""Times slower than float32 (beyond the smallest shape) at which a setting on a CPU is given up."""
SEED = 20211207
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True, eq=False, kw_only=True)
class Workload:
    """What is to be tuned: fresh networks, and one training step of them as the loop does it."""

    make_network: Callable[[], nn.Module]
    step_of: Callable[[nn.Module, Tuning], Callable[[], object]]
    """(network on the device, setting) -> a call that does one whole training step on a batch that is ready.

    The network is ready for the setting (`apply`); the step computes its forward pass within `autocast(setting,
    device)` and steps the optimizer through `scaler(setting, device)`.
    """
    patch: tuple[int, ...]
    batch_size: int
    channels: int
    device: torch.device
    all_scales: bool = True
    """The network is called with `all_scales=True`, as deep supervision does."""


class Disagreement(Exception):
    """A setting gives other numbers than the safe base, and rounding does not explain it."""


class Hopeless(Exception):
    """A setting is so slow that timing it any further would eat the budget."""


class Agreement:
    """Logits and gradients of a setting against those of the safe base, on equal weights and equal input."""

    def __init__(self, work: Workload, clock: Callable[[], float]) -> None:
        self.work, self.device, self.clock = work, work.device, clock
        self._right: dict[tuple[int, ...], dict[str, Tensor] | None] = {}
        self._moved: dict[tuple[tuple[int, ...], float], dict[str, Tensor]] = {}
        self._seconds: dict[tuple[int, ...], float] = {}
        self._network: nn.Module | None = None

    @property
    def network(self) -> nn.Module:
        """In float32, eager. Weights that start at zero are drawn, or what lies behind them would go unseen."""
        if self._network is None:
            self._network = self.work.make_network().to(self.device)
            for part in self._network.modules():
                if isinstance(part, DROPOUTS):
                    part.p = 0.0
            with torch.no_grad():
                for weights in self._network.parameters():
                    if not weights.any():
                        weights.normal_(0, 0.1)
        return self._network

    def check(self, setting: Tuning) -> None:
        """Raise Disagreement unless `setting` gives what the base gives on the shape that is trained.

        Smaller shapes come first, which cost little and tell what does not work at all, or hopelessly slowly.
        """
        low = setting.precision != "float32"
        # One rounding in low precision; TF32, in which cuDNN computes float32 convolutions; sums in another order.
        unit = torch.finfo(DTYPES[setting.precision]).eps / 2 if low else 2.0**-11 if self.on_cuda else 2.0**-18
        candidate = apply(copy.deepcopy(self.network), setting, self.device)
        # A compiled graph belongs to one shape: others are never run.
        for shape in self.shapes()[-1 if setting.compiled else 0 :]:
            right = self.right(shape)
            if right is None:
                continue
            moved = self.moved(shape, unit)
            start = self.clock()
            found = self.outcome(candidate, self.image(shape), setting)
            taken, usual = self.clock() - start, self._seconds[shape]
            if shape == self.shapes()[-1]:
                compare(found, right, moved, unit)
            if not (self.on_cuda or setting.compiled or shape == self.shapes()[0]) and taken > HOPELESS * usual:
                raise Hopeless(f"{taken / usual:.2g} x slower ({taken:.2g} s against {usual:.2g} s in the agreement)")
            if setting.compiled:
                # Validation runs another graph, which must not fail for the first time after an epoch.
                with torch.inference_mode():
                    logits = self.forward(candidate.eval(), self.image(shape), setting)
                compare({f"logits {i}": scale.float() for i, scale in enumerate(logits)}, right, moved, unit)

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes (B, C, *spatial) to try, the one that is trained last.

        Before it come the smallest that leaves a norm in the deepest stage voxels enough, and the patch with its last
        axis cut short; one patch instead for a network that does not say its `divisor`.
        """
        patch, channels = self.work.patch, self.work.channels
        divisor = getattr(self.network, "divisor", None)
        edge = 2 if len(patch) == 3 else 3
        sizes = [tuple(edge * unit for unit in divisor), (*patch[:-1], divisor[-1])] if divisor else [patch]
        small = [(1, channels, *size) for size in sizes]
        return tuple(dict.fromkeys([*small, (self.work.batch_size, channels, *patch)]))

    def image(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(SEED)).to(self.device)

    def right(self, shape: tuple[int, ...]) -> dict[str, Tensor] | None:
        """What the base gives; None for a small shape that the network does not take."""
        if shape not in self._right:
            try:
                self._right[shape] = self.in_float32(self.network, self.image(shape))
            except ValueError:
                if shape == self.shapes()[-1]:
                    raise
                self._right[shape] = None
        return self._right[shape]

    def moved(self, shape: tuple[int, ...], unit: float) -> dict[str, Tensor]:
        """What the base gives with weights and input moved by random shares of the size `unit`."""
        if (shape, unit) not in self._moved:
            network, image = copy.deepcopy(self.network), self.image(shape)
            with torch.no_grad():
                for tensor in (*network.parameters(), image):
                    tensor *= 1 + unit * torch.randn_like(tensor)
            start = self.clock()
            self._moved[shape, unit] = self.in_float32(network, image)
            self._seconds[shape] = self.clock() - start
        return self._moved[shape, unit]

    def in_float32(self, network: nn.Module, image: Tensor) -> dict[str, Tensor]:
        """`outcome` in float32; one sample at a time where a whole batch does not fit into memory."""
        base = safe_base(self.device)
        try:
            return self.outcome(network, image, base)
        except torch.OutOfMemoryError:
            pass
        parts = [self.outcome(network, image[i : i + 1], base, first=i) for i in range(len(image))]
        return {
            name: torch.cat([part[name] for part in parts]) if name.startswith("logits") else sum_of(parts, name)
            for name in parts[0]
        }

    def outcome(self, network: nn.Module, image: Tensor, setting: Tuning, first: int = 0) -> dict[str, Tensor]:
        """Logits of each scale, and the gradient of each layer for random derivatives by the logits.

        `first`: number of the first sample in its batch, for derivatives that do not depend on how it is cut.
        """
        network.train()
        network.zero_grad()
        torch.manual_seed(SEED)
        logits = self.forward(network, image, setting)
        pull = torch.zeros((), device=self.device)
        for i, scale in enumerate(logits):
            generator = torch.Generator().manual_seed(SEED + i)
            weights = torch.randn((first + len(scale), *scale.shape[1:]), generator=generator)[first:]
            pull = pull + (scale.float() * weights.to(self.device)).sum()
        pull.backward()
        layers: dict[str, list[Tensor]] = {}
        for name, weight in network.named_parameters():
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            layers.setdefault(f"the gradient of {name.rpartition('.')[0]}", []).append(gradient.float().flatten())
        network.zero_grad()
        return {f"logits {i}": scale.detach().float() for i, scale in enumerate(logits)} | {
            name: torch.cat(parts) for name, parts in layers.items()
        }

    def forward(self, network: nn.Module, image: Tensor, setting: Tuning) -> list[Tensor]:
        with autocast(setting, self.device):
            logits = network(image, all_scales=True) if self.work.all_scales else network(image)
        return logits if isinstance(logits, list) else [logits]


def sum_of(parts: list[dict[str, Tensor]], name: str) -> Tensor:
    """Sum of one entry over several results."""
    return torch.stack([part[name] for part in parts]).sum(0)


def compare(found: dict[str, Tensor], right: dict[str, Tensor], moved: dict[str, Tensor], unit: float) -> None:
    """Raise Disagreement, naming the first entry of `found` that rounding does not explain.

    An entry passes if its distance from `right` is at most four times that of `moved`, and less than nine tenths
    of its size; logits also voxel by voxel, in the maximum norm. Gradients smaller than one rounding (`unit`) of all
    gradients together are not told from zero.
    """
    gradients = [value for name, value in right.items() if not name.startswith("logits")]
    total = torch.cat(gradients).norm().item() if gradients else 0.0
    for name, value in found.items():
        if not value.isfinite().all():
            raise Disagreement(f"{name} has values that are not finite")
        is_logits = name.startswith("logits")
        for order in (2.0, math.inf) if is_logits else (2.0,):
            size, error, rounding = (
                torch.linalg.vector_norm(tensor, order).item()
                for tensor in (right[name], value - right[name], moved[name] - right[name])
            )
            allowed = min(TOLERANCE * rounding, MOST_OFF * size) + unit * (size if is_logits else total)
            if error > allowed:
                off, explained = (f"{100 * part / max(size, 1e-30):.2g} %" for part in (error, rounding))
                raise Disagreement(f"{name} differs by {off} where rounding explains {explained}")
