"""Fine-tuning: which tensors of a trained network another one begins with, and what becomes of each.

Blocks are matched by name and shape. The first convolution and the heads are matched by what their channels mean: the
names of image channels and of classes. So classes that both know are predicted at the first step as before. An image
channel that is new beside known ones starts with zeros, and changes nothing until the network has learnt its use;
where no channel is known, each starts as the mean of the old ones, scaled so that all of them weigh as much as before.

Where a network says so (MedNeXt does), kernels may be larger than those of the source: they begin as these, up-sampled
linearly (UpKern, Roy et al., MICCAI 2023).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoseg.model import Trained, at, in_folders
from autoseg.networks.base import Network
from autoseg.networks.parts import INTERPOLATION
from autoseg.published import SUFFIXES, by_our_names, network_of, read_published
from autoseg.records import AutosegError
from autoseg.schema import Configuration, Plan


@dataclass(frozen=True, eq=False, kw_only=True)
class Source:
    """The tensors of a trained network; plan and configuration are None for bare weights."""

    words: str
    tensors: Mapping[str, Tensor]
    plan: Plan | None = None
    configuration: Configuration | None = None


@dataclass(frozen=True, kw_only=True)
class Line:
    """What one tensor of the new network begins as."""

    tensor: str
    what: Literal["reused", "adapted", "new"]
    how: str = ""


def open_source(path: Path, configuration: str) -> Source:
    """The network at `path`: a model file, a fold folder, the folder of a configuration, or a file of weights alone.

    Of several folds the first; of a cascade the stage called `configuration`, else the last. Raises AutosegError if
    there is none, or if it is damaged.
    """
    if path.suffix in SUFFIXES or not path.exists():
        return Source(words=f"{path} (no names of channels and classes)", tensors=read_published(path))
    trained: Trained = in_folders([path]) if (path / "run.json").is_file() else at(path)
    stage: Trained | None = trained
    while stage is not None and stage.configuration.name != configuration:
        stage = stage.before
    stage = stage or trained
    fold, weights = next(iter(stage.folds.items()))
    return Source(
        words=f"{path} ({stage.plan.dataset} {stage.configuration.name} {fold}, weights {weights})",
        tensors=next(stage.weights()).state_dict(),
        plan=stage.plan,
        configuration=stage.configuration,
    )


def transfer(
    network: nn.Module, plan: Plan, configuration: Configuration, source: Source
) -> tuple[dict[str, Tensor], tuple[Line, ...]]:
    """The tensors that the network of `configuration` begins with, and a line on each.

    network: newly drawn; its tensors stay where nothing fits. Raises AutosegError if no convolution of the
    source fits: then nothing that was learnt would be left.
    """
    fresh = network.state_dict()
    if source.plan is None:
        source = replace(source, tensors=by_our_names(source.tensors, fresh))
    begin, lines = dict(fresh), []
    known = network if isinstance(network, Network) else None
    entries = () if known is None else (known.first_weight, *known.beside_first)
    heads = () if known is None else known.heads_prefixes
    for block in dict.fromkeys(_block(name, known is not None) for name in fresh):
        names = [name for name in fresh if _block(name, known is not None) == block]
        if names[0].startswith(heads):
            lines += [_head(name, begin, plan, source) for name in names]
            continue
        first = [name for name in names if name in entries]
        smaller = [name for name in names if _is_smaller(source.tensors.get(name), fresh[name])]
        if known is None or not known.grows_kernels:
            smaller = []
        fits = all(
            name in smaller or _fits(fresh[name], source.tensors.get(name)) for name in names if name not in first
        )
        if fits and first:
            line = _first(first[0], begin, plan, configuration, source)
            if line.what == "adapted" and known is not None and known.adds_image:
                line = replace(line, how=f"{line.how}; the image is added to its result too, in other channels now")
            fits = line.what != "new"
            lines.append(line)
            names.remove(first[0])
        for name in names:
            if fits and name in smaller:
                lines.append(_upsampled(name, begin, source))
                continue
            if fits:
                begin[name] = source.tensors[name].clone()
            lines.append(Line(tensor=name, what="reused") if fits else _unfit(name, fresh[name], source))
    kept = (line.tensor for line in lines if line.what == "reused" and line.tensor not in entries)
    if not any(fresh[name].ndim > 2 for name in kept):
        cure = "take its plan over with `autoseg plan_and_preprocess --like`, under another --plan"
        if source.plan is None:
            cure = "weights alone need the network that they were trained in, of as many axes, blocks and features"
            if (own := network_of(source.tensors)) is not None:
                cure = f"its tensors are called as those of {own}: plan for that, in 2D, with --network '{own}'"
        raise AutosegError(
            f"nothing of {source.words} fits the network of {configuration.name} ({configuration.network.name}); "
            f"{cure}, or train without --pretrained"
        )
    return begin, tuple(lines)


def _block(name: str, known: bool) -> str:
    """The block that a tensor belongs to: a convolution is of no use without its norm, nor either without its bias.

    In networks that are known the convolutions of one module belong together, and its shortcut with them.
    """
    inside = re.fullmatch(r"(.+?)\.(?:downsample\.|(?:conv|norm|bn)\d*\.[^.]*$).*", name) if known else None
    return inside[1] if inside else name.rpartition(".")[0]


def _fits(own: Tensor, other: Tensor | None) -> bool:
    return other is not None and own.shape == other.shape and own.dtype == other.dtype


def _is_smaller(other: Tensor | None, own: Tensor) -> bool:
    """Whether `other` is a kernel as `own` (out, in, *edges), but smaller, and of 3 or more where it is."""
    if other is None or own.ndim < 4 or other.shape == own.shape or other.dtype != own.dtype:
        return False
    edges = zip(other.shape[2:], own.shape[2:])
    return other.shape[:2] == own.shape[:2] and all(there == here or 3 <= there < here for there, here in edges)


def _upsampled(name: str, begin: dict[str, Tensor], source: Source) -> Line:
    """Set a kernel to the smaller one of the source, up-sampled."""
    other, edges = source.tensors[name], begin[name].shape[2:]
    begin[name] = F.interpolate(other, size=edges, mode=INTERPOLATION[len(edges)], align_corners=False)
    there, here = (str(one[0]) if len(set(one)) == 1 else _by(one) for one in (other.shape[2:], edges))
    return Line(tensor=name, what="adapted", how=f"up-sampled {there} to {here}")


def _unfit(name: str, own: Tensor, source: Source) -> Line:
    other = source.tensors.get(name)
    if other is None:
        how = "the source has none of this name"
    elif not _fits(own, other):
        how = f"{_by(other.shape)} in the source, {_by(own.shape)} here"
    else:
        how = "the rest of its block does not fit"
    return Line(tensor=name, what="new", how=how)


def inputs(plan: Plan, configuration: Configuration, context: int | None = None) -> tuple[str, ...]:
    """What each input channel of a network is: image channels, then in a cascade the masks of the earlier stage.

    Where it sees neighbouring slices, each of these comes once a slice; the middle one has the name of a single one.
    context: how many slices that are, in place of those of the configuration.
    """
    context = context or configuration.context
    labels, reach = plan.labels, context // 2
    # There is a mask for each value; a region may have several.
    names = labels.names if labels.exclusive else [f"value {value}" for value in labels.stored]
    masks = (f"mask of {names[index]}" for index in labels.foreground)
    single = (*(channel.channel for channel in plan.channels), *(masks if configuration.previous_stage else ()))
    return tuple(f"{name} of slice {k:+d}" if k else name for name in single for k in range(-reach, context - reach))


def outputs(plan: Plan) -> tuple[str, ...]:
    """The class that each head predicts."""
    return plan.labels.names[len(plan.labels.names) - plan.labels.heads :]


def _first(entry: str, begin: dict[str, Tensor], plan: Plan, configuration: Configuration, source: Source) -> Line:
    """Set a convolution of the image (out, in, *kernel) by the names of the input channels."""
    own, other = begin[entry], source.tensors.get(entry)
    alike = (
        other is not None
        and own.dtype == other.dtype
        and own.ndim == other.ndim
        and own[:, 0].shape == other[:, 0].shape
    )
    if other is None or not alike:
        return _unfit(entry, own, source)
    wanted, count = _read_by(own, plan, configuration)
    if source.plan is None or source.configuration is None:
        there = wanted if own.shape == other.shape else ()
        images = other.shape[1]
    else:
        there, images = _read_by(other, source.plan, source.configuration)
    if there == wanted:
        begin[entry] = other.clone()
        return Line(tensor=entry, what="reused")
    adapted = torch.zeros_like(own)
    strange = not set(wanted[:count]) & set(there[:images])
    mean = other[:, :images].mean(1) * (images / count)
    how = []
    for place, name in enumerate(wanted):
        if name in there:
            adapted[:, place] = other[:, there.index(name)]
        elif strange and place < count:
            adapted[:, place] = mean
        how.append(
            f"{name} {'taken over' if name in there else 'as the mean' if strange and place < count else 'zero'}"
        )
    begin[entry] = adapted
    dropped = [name for name in there if name not in wanted]
    return Line(tensor=entry, what="adapted", how=_said(how, dropped))


def _read_by(tensor: Tensor, plan: Plan, configuration: Configuration) -> tuple[tuple[str, ...], int]:
    """What the input channels of `tensor` are, and how many of them are of the image.

    One inside a network that takes slices apart again has a channel for all slices together.
    """
    single = inputs(plan, configuration, 1)
    slices = max(1, tensor.shape[1] // len(single))
    return inputs(plan, configuration, slices), len(plan.channels) * slices


def _head(name: str, begin: dict[str, Tensor], plan: Plan, source: Source) -> Line:
    """Set the rows of a head, weight (heads, ...) or bias (heads,), by the names of the classes."""
    own, other = begin[name], source.tensors.get(name)
    if other is None or own.dtype != other.dtype or own.shape[1:] != other.shape[1:]:
        return _unfit(name, own, source)
    wanted = outputs(plan)
    there = outputs(source.plan) if source.plan is not None else wanted if own.shape == other.shape else ()
    if there == wanted:
        begin[name] = other.clone()
        return Line(tensor=name, what="reused")
    shared = [label for label in wanted if label in there]
    if not shared:
        return Line(tensor=name, what="new", how="no class is known to the source")
    adapted = own.clone()
    for label in shared:
        adapted[wanted.index(label)] = other[there.index(label)]
    begin[name] = adapted
    how = [f"{label} {'taken over' if label in there else 'new'}" for label in wanted]
    return Line(tensor=name, what="adapted", how=_said(how, [label for label in there if label not in wanted]))


def _said(how: Sequence[str], dropped: Sequence[str]) -> str:
    return ", ".join([*how, *(f"{name} dropped" for name in dropped)])


def _by(numbers: Sequence[float]) -> str:
    return " x ".join(f"{number:.6g}" for number in numbers)


def differences(plan: Plan, configuration: Configuration, source: Source) -> list[str]:
    """In what images reach the two networks differently, in words: what was learnt then serves less."""
    if source.plan is None or source.configuration is None:
        return []
    found = []
    if configuration.spacing_mm != source.configuration.spacing_mm:
        spacings = source.configuration.spacing_mm, configuration.spacing_mm
        found.append(
            "spacing {} mm there, {} mm here".format(*(" x ".join(f"{s:.4g}" for s in one) for one in spacings))
        )
    if plan.axis_order != source.plan.axis_order:
        found.append("the order of the axes")
    if plan.preparation != source.plan.preparation:
        found.append("crops, combined channels or a preprocessing of one's own")
    there = {channel.channel: channel for channel in source.plan.channels}
    odd = [c.channel for c in plan.channels if c.channel in there and c != there[c.channel]]
    return [*found, *([f"the normalisation of {', '.join(odd)}"] if odd else [])]


def tensor_table(lines: Sequence[Line]) -> str:
    """One line a tensor."""
    width = max(len(line.tensor) for line in lines)
    return "".join(f"{line.tensor:{width}}  {line.what:8}{line.how}".rstrip() + "\n" for line in lines)
