"""What training does with a batch: its loss, the optimizer's step, and the counts of the pseudo-validation."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autoseg.agreement import Workload
from autoseg.computing import autocast, scaler
from autoseg.labels import Labels
from autoseg.losses import Loss, Part, deep_supervision, scale_targets
from autoseg.optimizers import OPTIMIZERS
from autoseg.parameter_groups import groups
from autoseg.rates import by_validation_loss
from autoseg.sampling import Batch, Sampler, prefetch
from autoseg.schema import Recipe, Tuning
from autoseg.team import ALONE, Team


@dataclass(frozen=True, eq=False, kw_only=True)
class Parts:
    """Everything that one fold's training is made of."""

    network: nn.Module
    training: Sampler
    validation: Sampler
    recipe: Recipe
    labels: Labels
    scales: tuple[tuple[int, ...], ...]
    """By how much each output of the network is smaller than the patch, for the targets of deep supervision."""
    output_weights: tuple[float, ...] = ()
    """How much each of them counts there; (): see `losses.scale_weights`."""
    loss: Loss
    """Of logits and target, and by keyword `annotated` and `part`; see `losses.make_loss`."""
    device: torch.device
    folder: Path
    tuning: Tuning
    """How it computes; the process is settled for it, the network not yet."""
    team: Team = ALONE
    """The processes that share each batch."""
    pieces: int = 1
    """Into how many pieces a batch is cut on its way through the network; see `through`."""


class NoMemory(torch.OutOfMemoryError):
    """There was no memory for forward or backward pass: nothing has moved yet, and smaller pieces may do."""


def make_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over all parameters; see `parameter_groups` for an encoder that is set apart."""
    return OPTIMIZERS[recipe.optimizer](groups(network, recipe), recipe)


def batch_loss(parts: Parts, batch: Batch) -> tuple[Tensor, Tensor]:
    """(loss, logits at full resolution) of one batch; of the loss what this process's samples contribute to it."""
    loss = partial(
        parts.loss,
        annotated=batch.annotated,
        part=Part(share=len(batch.image) / len(batch.patches), total=parts.team.total),
    )
    with autocast(parts.tuning, parts.device):
        if not parts.recipe.deep_supervision:
            (logits,) = through(parts, batch)
            return loss(logits, batch.labels), logits
        scales = through(parts, batch, all_scales=True)
        targets = scale_targets(batch.labels, parts.scales)
        return deep_supervision(loss, scales, targets, parts.output_weights), scales[0]


def through(parts: Parts, batch: Batch, **ask: Any) -> list[Tensor]:
    """The network's outputs for a batch, which goes through it in `parts.pieces`, one after another.

    Of a piece only image and outputs are kept; the rest is computed again for the gradient, a second forward pass. So
    activations are those of one piece at a time, and whatever the loss makes of all samples together, the step is the
    same but for rounding. Not with batch norm, which would see each piece by itself; see `more_pieces`.
    Source: gradient checkpointing (Chen et al., 2016, arXiv:1604.06174), along the batch.
    """

    def outputs(image: Tensor, position: Tensor | None) -> list[Tensor]:
        found = parts.network(image, **ask) if position is None else parts.network(image, **ask, position=position)
        return [found] if isinstance(found, Tensor) else list(found)

    if parts.pieces == 1:
        return outputs(batch.image, batch.position)
    size = math.ceil(len(batch.image) / parts.pieces)
    images = batch.image.split(size)
    positions = [None] * len(images) if batch.position is None else batch.position.split(size)
    found = [checkpoint(outputs, *piece, use_reentrant=False) for piece in zip(images, positions)]
    return [torch.cat(scale) for scale in zip(*found)]


def more_pieces(parts: Parts) -> int | None:
    """In how many pieces to try where there was no memory: twice as many as now, up to one a sample.

    None where that cannot help or would change the step: batch norm, or processes that wait for each other.
    """
    samples = parts.training.batch_size
    mixes = any(isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training for part in parts.network.modules())
    return None if mixes or parts.team.size > 1 or parts.pieces >= samples else min(2 * parts.pieces, samples)


def training_step(
    parts: Parts,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batch: Batch,
    gathered: Callable[[], None] = lambda: None,
) -> float | None:
    """One optimizer step; its loss, or None if loss or gradient was not finite and the step was skipped.

    gathered: waits for the gradients of other processes, see `Team.share`. Raises NoMemory where there is too little.
    """
    optimizer.zero_grad(set_to_none=True)
    # Norms take a batch into their running statistics before anybody knows that it is a bad one.
    before = [buffer.clone() for buffer in parts.network.buffers()]
    try:
        loss, _ = batch_loss(parts, batch)
        value = parts.team.total(loss.detach()).item()
        if not math.isfinite(value):
            for buffer, old in zip(parts.network.buffers(), before):
                buffer.copy_(old)
            return None
        scaler.scale(loss).backward()
    except torch.OutOfMemoryError as error:
        raise NoMemory(*error.args) from error
    gathered()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(parts.network.parameters(), parts.recipe.clip_norm or math.inf)
    # A scale that was too large is no bad batch: the scaler leaves the step out and tries a smaller one.
    if not scaler.is_enabled() and not torch.isfinite(norm):
        optimizer.zero_grad(set_to_none=True)
        return None
    scaler.step(optimizer)
    scaler.update()
    return value


def workload(parts: Parts, fresh: Callable[[], nn.Module]) -> Workload:
    """What tuning probes: the step of this run on its first batch, with networks of its own from `fresh`."""
    batch = parts.training.assemble(parts.training.sources(0), parts.device)

    def step_of(network: nn.Module, setting: Tuning) -> Callable[[], object]:
        own = replace(parts, network=network.train(), tuning=setting, team=ALONE)
        optimizer, loss_scaler = make_optimizer(network, parts.recipe), scaler(setting, parts.device)
        return lambda: training_step(own, optimizer, loss_scaler, batch)

    return Workload(
        make_network=fresh,
        step_of=step_of,
        patch=parts.training.patch,
        batch_size=len(batch.image),
        channels=batch.image.shape[1],
        device=parts.device,
        all_scales=parts.recipe.deep_supervision,
    )


def batches(sampler: Sampler, steps: Iterable[int], threads: int, device: torch.device) -> Iterator[Batch]:
    """The batches of `steps`, read ahead by threads, transformed on the device."""
    for sources in prefetch(sampler.sources, steps, threads):
        yield sampler.assemble(sources, device)


def validate(
    parts: Parts, epoch: int, steps: int, between: Callable[[], None]
) -> tuple[float | None, dict[str, float | None]]:
    """(mean loss, pseudo-Dice of each class) over `steps` batches of random validation patches.

    They are others in each epoch, so that the curve tells of all held-out cases; but the same ones in every epoch where
    the recipe goes by these losses (`rates.by_validation_loss`), since losses of different patches differ by more than
    the weights improve. Counts are pooled over all patches, without ignored voxels and without the classes that were
    not annotated in a patch's case; a class that is neither present nor predicted is None. `between` is called before
    each batch.
    """
    first = 0 if by_validation_loss(parts.recipe) else epoch * parts.recipe.validation_steps
    losses: list[float] = []
    counts = torch.zeros(3, parts.labels.count - 1, dtype=torch.float64)
    parts.network.eval()
    with torch.inference_mode():
        for batch in batches(parts.validation, range(first, first + steps), parts.recipe.loader_threads, parts.device):
            between()
            loss, logits = batch_loss(parts, batch)
            losses.append(parts.team.total(loss).item())
            found = class_counts(logits, batch.labels, parts.labels)
            if batch.annotated is not None:
                found *= batch.annotated
            counts += found.sum(1).cpu()
    parts.network.train()
    counts = parts.team.total(counts)
    dice = {
        name: (2 * counts[0, i] / (counts[1, i] + counts[2, i])).item() if counts[1:, i].sum() > 0 else None
        for i, name in enumerate(parts.labels.names[1:])
    }
    finite = [loss for loss in losses if math.isfinite(loss)]
    return (sum(finite) / len(finite) if finite else None), dice


def class_counts(logits: Tensor, target: Tensor, labels: Labels) -> Tensor:
    """Voxels of each class in each sample that were hit, predicted and true: (3, B, classes without background).

    logits (B, K, *s), target (B, *s) a label map; ignored voxels count nowhere.
    """
    if not labels.exclusive:
        inside, rows = logits.flatten(2) > 0, target.flatten(1)
        true = torch.stack([torch.isin(rows, rows.new_tensor(members)) for members in labels.members], 1)
        if labels.ignored is not None:
            inside &= (rows != labels.ignored)[:, None]
        return torch.stack([part.sum(2) for part in (inside & true, inside, true)])
    samples, heads, indices = len(target), labels.heads, len(labels.known)
    sample = torch.arange(samples, device=target.device).reshape(-1, *[1] * (target.ndim - 1))
    places = (sample * indices + target) * heads + logits.argmax(1)
    joint = torch.bincount(places.flatten(), minlength=samples * indices * heads).reshape(samples, indices, heads)
    joint = joint[:, :heads]  # the index of ignored voxels is the last
    return torch.stack([joint.diagonal(dim1=1, dim2=2), joint.sum(1), joint.sum(2)])[..., 1:]
