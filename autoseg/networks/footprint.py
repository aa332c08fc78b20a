"""Bytes that a training step of a network needs, counted on the meta device: nothing is allocated, nothing computed.

The very step is taken, forward, loss, backward, with tensors that have no memory, and every storage is counted from
its birth to its death. So whatever a network does, keeps for its backward pass or overwrites is counted as it is, the
user's own networks included. The loss is `dice_ce` with deep supervision, as training has it. What the optimizer needs
is arithmetic.

Where nothing else is said the device is a GPU, and the step the second or a later one: the state of the optimizer
exists, and gradients were set to None. Not counted: workspaces within one kernel (cuDNN, oneDNN), the allocator's
fragments, and what CUDA itself takes.
"""

import math
from contextlib import suppress
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import nn

from autoseg.losses import deep_supervision, dice_ce, scale_targets
from autoseg.needs import NetworkNeeds
from autoseg.networks import asked, build, output_scales, output_weights, spec_of
from autoseg.networks.meta import Autocast, Device, Living, Unfilled
from autoseg.networks.strides import total
from autoseg.own import own
from autoseg.records import AutosegError, record
from autoseg.schema import NetworkSpec

Precision = Literal["float32", "bfloat16", "float16"]

LOWER: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
Optimizer = Literal["sgd", "adamw"]
LOSS = partial(dice_ce, batch_dice=True)
STATES = {"sgd": 1, "adamw": 2}
"""Optimizer -> tensors of the size of the weights that it keeps."""


@record
class Footprint:
    """Bytes of a training step; each part at its own largest, `total` the most there is at one time."""

    weights: int
    gradients: int
    optimizer: int
    input: int
    """Images and label maps of the batch."""
    activations: int
    """What the forward pass makes and keeps for the backward pass."""
    loss: int
    """What the loss makes and keeps beside the logits."""
    passing: int
    """What the backward pass makes on its way: gradients of activations, until they are used."""
    total: int
    """Less than the sum: gradients of weights come while activations go."""


def footprint(
    spec: NetworkSpec,
    *,
    patch: tuple[int, ...],
    batch: int,
    in_channels: int,
    heads: int,
    precision: Precision = "float32",
    optimizer: Optimizer = "sgd",
    device: Device = "cuda",
) -> Footprint:
    """Bytes of a training step on `batch` patches of `patch` voxels, (Z, Y, X) or (Y, X), in autocast of `precision`.

    Raises AutosegError for a network that cannot be followed without computing, and whatever the network raises for
    sizes that it cannot take.
    """
    step = Step(spec, in_channels, heads, precision, optimizer, device)
    return step.count(patch, batch)[0]


class Step:
    """The training step of a network, to be counted for any patch and batch; arguments as in `footprint`."""

    def __init__(
        self,
        spec: NetworkSpec,
        in_channels: int,
        heads: int,
        precision: Precision,
        optimizer: Optimizer,
        device: Device,
    ) -> None:
        self.spec, self.in_channels, self.heads = spec, in_channels, heads
        self.network = on_meta(spec, in_channels, heads).train()
        self.mode = Autocast(device, LOWER[precision])
        self.scales, self.output_weights = output_scales(self.network, spec), output_weights(self.network)
        stated = getattr(self.network, "divisor", None)
        self.divisors = tuple(stated or total(spec.strides))
        self.weights = sum(_bytes(parameter) for parameter in self.network.parameters())
        self.buffers = sum(_bytes(buffer) for buffer in self.network.buffers())
        self.states = STATES[optimizer] * self.weights
        # On a GPU the optimizer works on all tensors at once, with one more of each.
        self.stepping = (1 + (device == "cuda")) * self.weights

    def count(self, patch: tuple[int, ...], batch: int) -> tuple[Footprint, np.ndarray]:
        """What a step on such a batch needs, and its course: the bytes there are after each change."""
        living = Living("input")
        hooks = [
            parameter.register_post_accumulate_grad_hook(lambda p: living.count(p.grad, "gradients"))
            for parameter in self.network.parameters()
            if parameter.requires_grad  # a network of one's own may hold parts that do not learn
        ]
        self.network.zero_grad(set_to_none=True)
        try:
            with living, self.mode:
                held = self._go(patch, batch, living)
        finally:
            for hook in hooks:
                hook.remove()
        course = np.array([*living.course, held + self.stepping]) + (self.weights + self.buffers + self.states)
        found = Footprint(
            weights=self.weights + self.buffers,
            gradients=living.most["gradients"],
            optimizer=self.states,
            input=living.most["input"],
            activations=living.most["activations"],
            loss=living.most["loss"],
            passing=living.most["passing"],
            total=int(course.max()),
        )
        return found, course

    def _go(self, patch: tuple[int, ...], batch: int, living: Living) -> int:
        """Forward, loss and backward as in training; returns the bytes of the batch and its logits, which live on."""
        image = torch.empty(batch, self.in_channels, *patch, device="meta")
        labels = torch.empty(batch, *patch, dtype=torch.int64, device="meta")
        try:
            living.kind = "activations"
            outputs = self._outputs(image)
            living.kind = "loss"
            targets = scale_targets(labels, self.scales)
            loss = deep_supervision(LOSS, outputs, targets, self.output_weights)
            held = _bytes(image) + _bytes(labels) + _bytes(outputs[0])
            del outputs, targets
            living.kind = "passing"
            loss.backward()
        except RuntimeError as error:
            if "meta" not in str(error):
                raise
            raise AutosegError(
                f"the memory of the network {self.spec.name} cannot be counted without computing: {error}"
            ) from error
        return held

    def _outputs(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Of the network, for which one of one's own may give a tensor alone. Raises AutosegError for what is none."""
        try:
            found = self.network(image, all_scales=True)
        except (AutosegError, ValueError, RuntimeError):  # sizes that it does not take
            raise
        except Exception as error:
            raise AutosegError(
                f"the network {self.spec.name} failed on images of shape {tuple(image.shape)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        outputs = [found] if isinstance(found, torch.Tensor) else list(found)
        if not outputs or not all(isinstance(scale, torch.Tensor) for scale in outputs):
            raise AutosegError(f"the network {self.spec.name} must give a list of tensors, not {found!r:.80}")
        wanted = (len(image), self.heads, *image.shape[2:])
        if outputs[0].shape != wanted:
            raise AutosegError(
                f"the network {self.spec.name} gives logits of shape {tuple(outputs[0].shape)} for images of shape "
                f"{tuple(image.shape)}; they must have {self.heads} channels, one a class, and the size of the image: "
                f"{wanted}"
            )
        return outputs

    def smallest(self) -> tuple[int, ...]:
        """The first of 1, 2, 4 times the divisors that a batch of 2 can be trained on: norms want several voxels.

        Raises AutosegError if it is none of them.
        """
        for times in (1, 2, 4):
            patch = tuple(times * divisor for divisor in self.divisors)
            try:
                self.count(patch, 2)
            except (ValueError, RuntimeError) as error:
                reason = error
            else:
                return patch
        alone = "; one for 2D or 3D alone says so: dimensions = (2,)" if ":" in self.spec.name else ""
        raise AutosegError(f"the network {self.spec.name} takes no patch of {patch} voxels: {reason}{alone}")


class Forecast:
    """The total of `Step.count` for many patches and batches, from counting three.

    Every tensor of a convolutional network is in proportion to the voxels of the batch, or does not depend on them; so
    at each moment of a step the bytes are a straight line, and two counts tell it. Whether that is so is seen from the
    third; if not, each patch is counted.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.smallest = step.smallest()
        self.counted: dict[tuple[tuple[int, ...], int], int] = {}
        # Not the smallest itself: a network may pass over what is a single voxel.
        sizes = [tuple(times * edge for edge in self.smallest) for times in (2, 3, 4)]
        voxels = [math.prod(patch) * batch for batch, patch in enumerate(sizes, 2)]
        _, first = step.count(sizes[0], 2)
        _, second = step.count(sizes[1], 3)
        third, _ = step.count(sizes[2], 4)
        self.start, self.slope = first, np.zeros(1)
        self.straight = len(first) == len(second)
        if self.straight:
            self.slope = (second - first) / (voxels[1] - voxels[0])
            self.start = first - self.slope * voxels[0]
            # Weights hide how the rest grows where patches are small.
            moving = third.total - third.weights - third.optimizer
            self.straight = abs(self._line(voxels[2]) - third.total) < 0.01 * moving

    def total(self, patch: tuple[int, ...], batch: int) -> int:
        """Bytes of a step; patches must be multiples of the divisors."""
        if self.straight:
            return self._line(math.prod(patch) * batch)
        if (patch, batch) not in self.counted:
            self.counted[patch, batch] = self.step.count(patch, batch)[0].total
        return self.counted[patch, batch]

    def _line(self, voxels: int) -> int:
        return int((self.start + self.slope * voxels).max())


def on_meta(spec: NetworkSpec, in_channels: int, heads: int) -> nn.Module:
    """The network without memory for its weights."""
    with suppress(NotImplementedError, RuntimeError, AutosegError), torch.device("meta"), Unfilled():
        return build(spec, in_channels, heads)
    # One that computes with numbers while it is built, or cannot be built at all.
    return build(spec, in_channels, heads).to("meta")


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def needs_of(text: str, in_channels: int, heads: int, precision: Precision = "bfloat16") -> NetworkNeeds:
    """What a planner must know of a network asked for as `name(key=value, ...)` or `package.module:Name`.

    in_channels: of the images; a network that sees several slices has each so many times.
    Bytes are those of a step on a GPU in autocast of `precision`, with AdamW, which keeps more than SGD.
    Raises AutosegError for an unknown network, and for options that it does not have.
    """
    name, found, options = asked(text)
    fixed = found is not None and (bool(options) or not found.levels_follow_patch)
    known: dict[str, Forecast] = {}

    def forecast(spec: NetworkSpec) -> Forecast:
        if repr(spec) not in known:
            channels = in_channels * spec.slices
            known[repr(spec)] = Forecast(Step(spec, channels, heads, precision, "adamw", "cuda"))
        return known[repr(spec)]

    return NetworkNeeds(
        name=text,
        dimensions=tuple(getattr(own(name, "network"), "dimensions", (2, 3))) if found is None else found.dimensions,
        spec=partial(spec_of, text) if fixed else None,
        divisors=lambda spec: forecast(spec).step.divisors,
        smallest=lambda spec: forecast(spec).smallest,
        bytes=lambda spec, patch, batch: forecast(spec).total(patch, batch),
        told_place=lambda spec: getattr(forecast(spec).step.network, "takes_position", False),
        counted=f"(counted for a GPU, {precision} where autocast allows, AdamW)",
    )
