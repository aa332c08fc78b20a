"""A network for people: the table of its layers, and a drawing of how its parts hang together.

Both are read off one forward pass on the meta device. A part is drawn as one box as long as it works at one or two
resolutions, and taken apart otherwise: so a box is about what a paper calls a stage. Arrows follow the gradient back
from what a part receives to the parts that it came from, through whatever lies between; so skip connections show.
"""

import csv
import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from html import escape
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoseg.networks.footprint import on_meta
from autoseg.schema import NetworkSpec

IMAGE, LOGITS = "image", "logits"
COLUMN, ROW, EDGE = 104, 118, 26
"""Pixels from box to box, from level to level, and of the margin."""
BOX = 92
COLOURS = {"down": "#c6dbef", "same": "#deebf7", "up": "#c7e9c0", "end": "#f0f0f0"}


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One module and what it gave: channels and size of its output."""

    name: str
    kind: str
    channels: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    parameters: int


@dataclass(kw_only=True)
class Part:
    """One box of the drawing."""

    name: str
    kind: str
    channels: int
    size: tuple[int, ...]
    parameters: int
    reads: set[str] = field(default_factory=set)
    """Names of the parts whose outputs it receives."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """What one forward pass has shown."""

    title: str
    layers: tuple[Layer, ...]
    parts: tuple[Part, ...]
    """In the order in which they compute, the image first and each output last."""
    parameters: int


def describe(spec: NetworkSpec, patch: tuple[int, ...], in_channels: int, heads: int) -> Description:
    """Layers and parts of a network on a patch of `patch` voxels, which it pads to what it needs; the title says so.

    Raises what it raises for sizes it cannot take.
    """
    network = on_meta(spec, in_channels, heads).eval()
    names = {module: name for name, module in network.named_modules()}
    sizes = _sizes(network, patch, in_channels)
    layers = []
    for module, name in names.items():
        if [*module.parameters(recurse=False)] or (module in sizes and not [*module.children()]):
            # One whose weights are used without calling it gives what it is a part of gives.
            above = next(other for other in _upwards(network, name) if other in sizes)
            layers.append(_layer(name, module, *sizes[above][-1]))
    chosen = [part for child in network.children() for part in _parts(child, sizes)]
    parts = _follow(network, chosen, names, patch, in_channels)
    count = sum(parameter.numel() for parameter in network.parameters())
    padded = tuple(edge + -edge % unit for edge, unit in zip(patch, getattr(network, "divisor", patch)))
    size = _by(patch) if padded == patch else f"{_by(patch)} padded to {_by(padded)}"
    title = f"{spec.name}, {spec.dimension}D: {in_channels} x {size} to {heads} classes, {count:,} parameters"
    return Description(title=title, layers=tuple(layers), parts=parts, parameters=count)


def table(description: Description) -> str:
    """The layers as text with aligned columns."""
    rows = [("layer", "kind", "output", "kernel", "stride", "parameters")]
    for layer in description.layers:
        output = f"{layer.channels} x {_by(layer.size)}" if layer.size else str(layer.channels)
        rows.append((layer.name, layer.kind, output, _by(layer.kernel), _by(layer.stride), f"{layer.parameters:,}"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([description.title, "", *lines]) + "\n"


def table_csv(description: Description) -> str:
    """The layers as CSV."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("layer", "kind", "channels", "size", "kernel", "stride", "parameters"))
    for layer in description.layers:
        writer.writerow(
            (
                layer.name,
                layer.kind,
                layer.channels,
                *map(_by, (layer.size, layer.kernel, layer.stride)),
                layer.parameters,
            )
        )
    return file.getvalue()


def diagram(description: Description) -> str:
    """The parts as SVG: from left to right as they compute, lower where the resolution is lower."""
    parts = description.parts
    levels = [_level(parts[0], part) for part in parts]
    places = {
        part.name: (EDGE + column * COLUMN, 3 * EDGE + level * ROW)
        for column, (part, level) in enumerate(zip(parts, levels))
    }
    order = {part.name: column for column, part in enumerate(parts)}
    level_of = {part.name: level for part, level in zip(parts, levels)}
    width, height = 2 * EDGE + len(parts) * COLUMN, 5 * EDGE + max(levels) * ROW + 60
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="10">',
        '<defs><marker id="tip" markerWidth="7" markerHeight="7" refX="6" refY="3" orient="auto">'
        '<path d="M0,0 L6,3 L0,6 z" fill="#555"/></marker></defs>',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{EDGE}" y="{EDGE}" font-size="14">{escape(description.title)}</text>',
    ]
    for part in parts:
        for source in sorted(part.reads, key=order.__getitem__):
            skips = order[part.name] - order[source] > 1
            drawn.append(_arrow(places[source], places[part.name], level_of[source] == level_of[part.name], skips))
    for part, level in zip(parts, levels):
        before = min((level_of[source] for source in part.reads), default=level)
        deepest = max((level_of[source] for source in part.reads), default=level)
        way = (
            "end" if part.kind in (IMAGE, LOGITS) else "up" if level < deepest else "down" if level > before else "same"
        )
        drawn += _box(part, *places[part.name], COLOURS[way])
    return "\n".join([*drawn, "</svg>"]) + "\n"


def _sizes(
    network: nn.Module, patch: tuple[int, ...], in_channels: int
) -> dict[nn.Module, list[tuple[int, tuple[int, ...]]]]:
    """Channels and size of what every module gives each time it is called."""
    found: dict[nn.Module, list[tuple[int, tuple[int, ...]]]] = {}

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        tensors = [value for value in tree_leaves(output) if isinstance(value, Tensor) and value.ndim > 1]
        found.setdefault(module, []).extend((tensor.shape[1], tuple(tensor.shape[2:])) for tensor in tensors[:1])

    hooks = [module.register_forward_hook(note) for module in network.modules()]
    with torch.no_grad():
        network(torch.empty(2, in_channels, *patch, device="meta"), all_scales=True)
    for hook in hooks:
        hook.remove()
    return {module: sizes for module, sizes in found.items() if sizes}


def _upwards(network: nn.Module, name: str) -> Iterator[nn.Module]:
    """The module of that name, and those that it is a part of, up to the whole."""
    while name:
        yield network.get_submodule(name)
        name = name.rpartition(".")[0]
    yield network


def _layer(name: str, module: nn.Module, channels: int, size: tuple[int, ...]) -> Layer:
    def numbers(attribute: str) -> tuple[int, ...]:
        value = getattr(module, attribute, ())
        return (
            tuple(value) if isinstance(value, tuple | list) else (value,) * len(size) if isinstance(value, int) else ()
        )

    return Layer(
        name=name,
        kind=type(module).__name__,
        channels=channels,
        size=size,
        kernel=numbers("kernel_size"),
        stride=numbers("stride"),
        parameters=sum(parameter.numel() for parameter in module.parameters(recurse=False)),
    )


def _parts(module: nn.Module, sizes: dict[nn.Module, list[tuple[int, tuple[int, ...]]]]) -> Iterator[nn.Module]:
    """`module`, or what it is made of if it only holds modules or works at more than two resolutions."""
    within = {size for leaf in module.modules() for _, size in sizes.get(leaf, ())}
    children = [*module.children()]
    if not within:
        return
    if children and (isinstance(module, nn.ModuleList | nn.ModuleDict) or len(within) > 2):
        for child in children:
            yield from _parts(child, sizes)
    else:
        yield module


def _follow(
    network: nn.Module, chosen: list[nn.Module], names: dict[nn.Module, str], patch: tuple[int, ...], in_channels: int
) -> tuple[Part, ...]:
    """The chosen modules in the order of their first call, with what each of them reads."""
    image = torch.empty(2, in_channels, *patch, device="meta", requires_grad=True)
    parts = {IMAGE: Part(name=IMAGE, kind=IMAGE, channels=in_channels, size=patch, parameters=0)}
    made: dict[Any, str] = {}

    def sources(values: Any) -> set[str]:
        tensors = [value for value in tree_leaves(values) if isinstance(value, Tensor)]
        found = {IMAGE} if any(tensor is image for tensor in tensors) else set()
        waiting, seen = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None], set()
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in made:
                found.add(made[node])
            elif getattr(node, "variable", None) is image:
                found.add(IMAGE)
            else:
                waiting += [earlier for earlier, _ in node.next_functions if earlier is not None]
        return found

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        name = names[module]
        weights = sum(parameter.numel() for parameter in module.parameters())
        parts.setdefault(name, Part(name=name, kind=type(module).__name__, channels=0, size=(), parameters=weights))
        parts[name].reads |= sources((args, kwargs)) - {name}

    def after(module: nn.Module, args: Any, output: Any) -> None:
        for tensor in (value for value in tree_leaves(output) if isinstance(value, Tensor)):
            if tensor.grad_fn is not None and tensor.grad_fn not in made:
                made[tensor.grad_fn] = names[module]
            parts[names[module]].channels, parts[names[module]].size = tensor.shape[1], tuple(tensor.shape[2:])

    hooks = [module.register_forward_pre_hook(before, with_kwargs=True) for module in chosen]
    hooks += [module.register_forward_hook(after) for module in chosen]
    outputs = network(image, all_scales=True)
    for hook in hooks:
        hook.remove()
    for scale, logits in enumerate(outputs):
        name = LOGITS if len(outputs) == 1 else f"{LOGITS} {scale + 1}"
        ended = Part(name=name, kind=LOGITS, channels=logits.shape[1], size=tuple(logits.shape[2:]), parameters=0)
        ended.reads = sources(logits)
        if not ended.reads <= {
            other for other, part in parts.items() if part.size == ended.size and part.channels == ended.channels
        }:
            parts[name] = ended
    return tuple(parts.values())


def _level(image: Part, part: Part) -> int:
    """How often the resolution was halved along the axis where it was most."""
    if len(part.size) != len(image.size):
        return 0
    return max(round(math.log2(edge / own)) if own else 0 for edge, own in zip(image.size, part.size))


def _box(part: Part, x: int, y: int, colour: str) -> list[str]:
    tall = 60
    lines = (part.name, f"{part.channels} channels", _by(part.size), f"{part.parameters:,}" if part.parameters else "")
    text = [
        f'<text x="{x + BOX / 2:g}" y="{y + 14 + 13 * i}" text-anchor="middle"'
        f"{' font-weight=' + chr(34) + 'bold' + chr(34) if i == 0 else ''}>{escape(_short(line))}</text>"
        for i, line in enumerate(lines)
    ]
    told = f"{part.name}: {part.kind}, {part.channels} channels of {_by(part.size)}, {part.parameters:,} parameters"
    return [
        f"<g><title>{escape(told)}</title>",
        f'<rect x="{x}" y="{y}" width="{BOX}" height="{tall}" rx="4" fill="{colour}" stroke="#555"/>',
        *text,
        "</g>",
    ]


def _arrow(start: tuple[int, int], end: tuple[int, int], level: bool, skips: bool) -> str:
    (x0, y0), (x1, y1) = start, end
    if skips and level:
        path = f"M{x0 + BOX / 2:g},{y0} V{y0 - 14} H{x1 + BOX / 2 - 8:g} V{y1 - 2}"
    elif skips:
        path = f"M{x0 + BOX / 2:g},{y0 + 60} V{y0 + 74} H{x1 - 6} L{x1 - 2},{y1 + 44}"
    else:
        path = f"M{x0 + BOX},{y0 + 30} L{x1 - 2},{y1 + 30}"
    dashes = ' stroke-dasharray="5 3"' if skips else ""
    return f'<path d="{path}" fill="none" stroke="#555"{dashes} marker-end="url(#tip)"/>'


def _short(text: str) -> str:
    return text if len(text) <= 17 else f"…{text[-16:]}"


def _by(sizes: Iterable[int]) -> str:
    return " x ".join(map(str, sizes))
