"""What every loss stands on: which voxels and classes count, probabilities and truth, sums, and means of them.

Three things are decided here and nowhere else. Ignored voxels are in no sum, and their gradient is exactly zero, since
their logits are replaced before anything is computed. A class that was not annotated in a case is in no mean there;
where classes exclude each other its probability counts as background, since that is what its voxels are labelled as
(the marginal loss of Shi et al., Medical Image Analysis 2021). Where nothing is left a loss is zero.

The background is a class of its own only in losses of one term a voxel; overlaps, distances and skeletons are those of
the other classes. Classes that exclude each other have the softmax of their logits, regions a sigmoid each. Everything
is computed in float32, or float64 for such logits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Required, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from autoseg.labels import Labels

SMOOTH = 1e-5
"""Added to numerator and denominator of Dice: a class absent from target and prediction scores 1."""


def _as_it_is(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True, kw_only=True)
class Part:
    """What part of a batch the samples at hand are, where several processes have one each.

    Losses give this part's contribution to the loss of the whole batch, which is the sum over all parts; the gradient
    is that of the whole by the logits at hand.
    """

    share: float = 1.0
    """Of the samples of the whole batch."""
    total: Callable[[Tensor], Tensor] = _as_it_is
    """Sums a tensor over all parts."""


WHOLE = Part()


class Given(TypedDict, total=False):
    """What every loss is called with beside logits, target and its own options; see `dice_ce`."""

    batch_dice: Required[bool]
    labels: Labels | None
    annotated: Tensor | None
    part: Part


@dataclass(frozen=True, eq=False, kw_only=True)
class Samples:
    """Logits and target made ready: F classes without background (or regions), E terms a voxel, any spatial shape *s.

    The terms of a voxel are one where classes exclude each other, else one a region.
    """

    logits: Tensor
    """(B, K, *s) in float32 or float64; 0 at ignored voxels."""
    target: Tensor
    """(B, *s) int64; 0 at ignored voxels, and where a class is that was not annotated."""
    ignored: Tensor | None
    """(B, *s) bool."""
    counted: Tensor
    """(B, F): 1 where a class takes part in a sample, else 0."""
    table: Tensor
    """Whether an index of the target belongs to a class, bool (F, indices)."""
    annotated: Tensor | None
    exclusive: bool
    batch_dice: bool
    part: Part

    def hidden(self, voxelwise: Tensor) -> Tensor:
        """`voxelwise` (B, any, *s) with 0 at ignored voxels."""
        return voxelwise if self.ignored is None else voxelwise.masked_fill(self.ignored[:, None], 0)

    def shares(self) -> Tensor:
        """Probabilities (B, F, *s); 0 at ignored voxels."""
        return self.hidden(self.logits.softmax(1)[:, 1:] if self.exclusive else self.logits.sigmoid())

    def truth(self) -> Tensor:
        """Where each class is, bool (B, F, *s); nowhere at ignored voxels."""
        return self.table[:, self.target].movedim(0, 1)

    def positive(self) -> Tensor:
        """Whether the truth of each term is something other than background, bool (B, E, *s)."""
        return (self.target > 0)[:, None] if self.exclusive else self.truth()

    def surprise(self) -> tuple[Tensor, Tensor]:
        """-log(probability of the truth), (B, E, *s), and which of these terms count, (B, E).

        One term a voxel where classes exclude each other: the cross-entropy. For regions that of each sigmoid.
        """
        if not self.exclusive:
            return self.binary_surprise()
        logits = self.logits if self.annotated is None else merge_logits(self.logits, self.annotated)
        terms = -logits.log_softmax(1).gather(1, self.target[:, None])
        return self.hidden(terms), self.counted.new_ones(len(terms), 1)

    def binary_surprise(self) -> tuple[Tensor, Tensor]:
        """As `surprise`, with one term a class in any case, (B, F, *s): is a voxel of this class, or is it not?"""
        odds = one_against_rest(self.logits) if self.exclusive else self.logits
        return self.hidden(F.softplus(torch.where(self.truth(), -odds, odds))), self.counted

    def known(self) -> Tensor:
        """Number of voxels of each sample that are not ignored, (B, 1)."""
        voxels = self.counted.new_full((len(self.target), 1), self.target[0].numel())
        return voxels if self.ignored is None else voxels - self.ignored.flatten(1).sum(1, keepdim=True)

    def mean_over_voxels(self, terms: Tensor, entries: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean of `terms` (B, E, *s) over the voxels of the whole batch and the `entries` (B, E), weighted if so asked.

        The terms of ignored voxels must be 0. Of the mean this part's contribution is returned.
        """
        if weights is None:
            size = self.part.total((entries * self.known()).sum()).clamp(min=1)
        else:
            weights = self.hidden(weights)
            size = self.part.total((per_class(weights) * entries).sum())
            size = torch.where(size > 0, size, 1)
            terms = terms * weights
        return (per_class(terms) * entries).sum() / size

    def pooled(self, *sums: Tensor) -> Tensor:
        """Sums (B, F) over voxels as they enter a quotient, in one tensor: with `batch_dice` (n, 1, F), else (n, B, F).

        Pooled sums are those over all samples, of all parts, in which a class counts.
        """
        kept = torch.stack([values.to(self.counted.dtype) for values in sums]) * self.counted
        if not self.batch_dice:
            return kept
        kept = kept.sum(1, keepdim=True)
        own = kept.detach()
        return kept + (self.part.total(own) - own)  # the derivative by a sum of this part is that by the whole sum

    def mean_over_classes(self, scores: Tensor) -> Tensor:
        """Mean of scores (B or 1, F), of `pooled` sums, over the classes that count: this part's contribution."""
        if not self.batch_dice:
            return (scores * self.counted).sum() / self.part.total(self.counted.sum()).clamp(min=1)
        counted = (self.part.total(self.counted.sum(0, keepdim=True)) > 0).to(scores.dtype)
        mean = (scores * counted).sum() / counted.sum().clamp(min=1)
        # Every part knows the whole mean: it contributes its share of the value and all of its own derivative.
        return mean + (self.part.share - 1) * mean.detach()


def prepare(
    logits: Tensor,
    target: Tensor,
    *,
    batch_dice: bool,
    labels: Labels | None = None,
    annotated: Tensor | None = None,
    part: Part = WHOLE,
) -> Samples:
    """Make ready what a loss is called with; arguments and errors as of `dice_ce`."""
    refuse_misfit(logits, target)
    exclusive = labels is None or labels.exclusive
    kind = torch.promote_types(logits.dtype, torch.float32)
    logits, target = logits.to(kind), target.long()
    heads = logits.shape[1]
    members: tuple[tuple[int, ...], ...] = tuple((index,) for index in range(1, heads))
    if labels is not None:
        members = labels.members
    indices = heads if labels is None else len(labels.known)
    counted = logits.new_ones(len(logits), len(members))
    if annotated is not None:
        counted = counted * annotated
        if exclusive:
            target = merge_target(target, annotated)
    ignored = None if labels is None or labels.ignored is None else target == labels.ignored
    if ignored is not None:
        counted = counted * ~ignored.flatten(1).all(1, keepdim=True)
        logits = logits.masked_fill(ignored[:, None], 0)
        target = target.masked_fill(ignored, 0)
    return Samples(
        logits=logits,
        target=target,
        ignored=ignored,
        counted=counted,
        table=table(members, indices, logits.device),
        annotated=annotated,
        exclusive=exclusive,
        batch_dice=batch_dice,
        part=part,
    )


def refuse_misfit(logits: Tensor, target: Tensor) -> None:
    """ValueError if logits (B, K, *s) and target (B, *s) do not fit."""
    if logits.shape[2:] != target.shape[1:] or len(logits) != len(target):
        raise ValueError(
            f"logits (B, K, *s) and target (B, *s) do not fit: {tuple(logits.shape)}, {tuple(target.shape)}"
        )


def require(holds: bool, what: str) -> None:
    """ValueError that says what an option must be, unless it `holds`."""
    if not holds:
        raise ValueError(what)


def per_class(voxelwise: Tensor) -> Tensor:
    """Sums (B, any) of (B, any, *s) over all voxels."""
    return voxelwise.flatten(2).sum(2)


def one_against_rest(logits: Tensor) -> Tensor:
    """log(p / (1 - p)) for the softmax p of logits (B, K, *s) and each class but the first: (B, K-1, *s).

    Exact wherever p rounds to 0 or 1.
    """
    if logits.shape[1] == 2:
        return logits[:, 1:] - logits[:, :1]
    at_top = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, logits.argmax(1, keepdim=True), True)
    others = logits.masked_fill(at_top, -torch.inf).logsumexp(1, keepdim=True)
    log_shares = logits.log_softmax(1)
    below = log_shares - torch.log1p(-log_shares.exp().masked_fill(at_top, 0))  # there p is 1/2 at most
    return torch.where(at_top, logits - others, below)[:, 1:]


@lru_cache(maxsize=16)
def table(members: tuple[tuple[int, ...], ...], indices: int, device: torch.device) -> Tensor:
    """Whether an index of a label map belongs to a class or region, bool (classes, indices)."""
    with torch.inference_mode(False):  # a run that goes on may validate first, and no gradient takes what is made then
        return torch.tensor([[index in own for index in range(indices)] for own in members], device=device)


def merge_logits(logits: Tensor, annotated: Tensor) -> Tensor:
    """Put classes that are not `annotated`, (B, K-1), to the background, in logits (B, K, *s).

    log(exp(a) + exp(b)) of the logits is the logit of the sum of two shares; a class that is merged has share 0.
    """
    wide = (..., *(None,) * (logits.ndim - 2))
    apart = F.pad(annotated, (1, 0), value=False)[wide]
    merged = F.pad(~annotated, (1, 0), value=False)[wide]
    whole = logits.to(torch.promote_types(logits.dtype, torch.float32))
    first = whole.masked_fill(apart, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([first, whole.masked_fill(merged, -torch.inf)[:, 1:]], 1)


def merge_target(target: Tensor, annotated: Tensor) -> Tensor:
    """Put classes that are not `annotated`, (B, K-1), to the background, in a target (B, *s)."""
    merged = F.pad(~annotated, (1, 1), value=False)  # as many columns as a label map can have indices, ignored too
    return target.masked_fill(merged.gather(1, target.flatten(1)).view_as(target), 0)
