"""Which mask belongs to which image, from their names alone.

A name is cut into words and numbers. Equal names are pairs. What all names of one side share at their beginning or end
says nothing about the case ("image_", "_seg") and is dropped; names whose rest is equal are pairs. Then one name, or
its rest, may lie within the other, the longest first. Whatever fits several files at once is listed, never guessed.
"""

import itertools
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

Key = tuple[str, ...]

RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}
"""Names that Windows keeps for devices, whatever follows their first dot."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Pairs as positions (image, mask), and a line for every file that is left over."""

    found: tuple[tuple[int, int], ...]
    left_over: tuple[str, ...]


def words(text: str) -> Key:
    """Runs of letters and of digits in small letters; numbers without leading zeros: `Case_007L` -> case, 7, l."""
    found = re.findall(r"\d+|[^\W\d_]+", text.lower())
    return tuple(word.lstrip("0") or "0" if word.isdigit() else word for word in found)


def keys_of(names: Sequence[str]) -> list[Key]:
    """The words of each name without those that all names begin or end with."""
    split = [words(name) for name in names]
    if len(split) < 2:
        return [() for _ in split]
    first = alike(split)
    rest = [key[first:] for key in split]
    last = alike([key[::-1] for key in rest])
    return [key[: len(key) - last] for key in rest]


def alike(keys: Sequence[Key]) -> int:
    """How many words all keys begin with in common."""
    same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*keys))
    return sum(1 for _ in same)


def within(inner: Key, outer: Key) -> bool:
    """Whether `inner` is a run of `outer`."""
    return any(outer[at : at + len(inner)] == inner for at in range(len(outer) - len(inner) + 1))


def pair(images: Sequence[str], masks: Sequence[str]) -> Pairs:
    """Pair image and mask names (without endings); one image and one mask always belong together."""
    found: list[tuple[int, int]] = []
    open_images, open_masks = set(range(len(images))), set(range(len(masks)))
    ambiguous: dict[str, set[str]] = defaultdict(set)

    def settle(candidates: list[tuple[int, int]]) -> None:
        """Accept pairs whose both sides occur once; what occurs several times is ambiguous and leaves the field."""
        candidates = [(i, m) for i, m in candidates if i in open_images and m in open_masks]
        of_image, of_mask = defaultdict(list), defaultdict(list)
        for i, m in candidates:
            of_image[i].append(m)
            of_mask[m].append(i)
        for i, m in candidates:
            if len(of_image[i]) == len(of_mask[m]) == 1:
                found.append((i, m))
            else:
                ambiguous[f"image {images[i]}"] |= {masks[other] for other in of_image[i]}
                ambiguous[f"mask {masks[m]}"] |= {images[other] for other in of_mask[m]}
            open_images.discard(i)
            open_masks.discard(m)

    whole = [words(name) for name in images], [words(name) for name in masks]
    rests = keys_of(images), keys_of(masks)
    # "scan" beside "scan 2" may be called by nothing, but not if there is no other scan.
    nameless = (len(images) == 1) == (len(masks) == 1)
    for image_keys, mask_keys in (whole, rests):
        by_key = defaultdict(list)
        for m, key in enumerate(mask_keys):
            by_key[key].append(m)
        settle([(i, m) for i, key in enumerate(image_keys) for m in by_key[key] if key or nameless])
    for image_keys, mask_keys in (whole, rests):
        by_length: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for i in sorted(open_images):
            for m in sorted(open_masks):
                inner, outer = sorted((image_keys[i], mask_keys[m]), key=len)
                if inner and within(inner, outer):
                    by_length[len(inner)].append((i, m))
        for length in sorted(by_length, reverse=True):
            settle(by_length[length])

    left = [f"{name}: fits {', '.join(sorted(others))}" for name, others in ambiguous.items() if len(others) > 1]
    left += [f"image {images[i]}: no mask" for i in sorted(open_images)]
    left += [f"mask {masks[m]}: no image" for m in sorted(open_masks)]
    return Pairs(found=tuple(sorted(found)), left_over=tuple(left))


def stems(paths: Sequence[Path], ending_lengths: Sequence[int]) -> list[str]:
    """Paths from their common folder on and without endings, with / between the parts."""
    top = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path()
    return [path.relative_to(top).as_posix()[:-cut] for path, cut in zip(paths, ending_lengths)]


def case_names(names: Sequence[str]) -> list[str]:
    """File names for cases, sound on every system: the parts of each path that differ among them, joined.

    A channel number _0000 that all names end in is left out.
    """
    parts = [name.split("/") for name in names]
    deep = max(map(len, parts))
    telling = [n for n in range(deep) if len({tuple(part[n : n + 1]) for part in parts}) > 1] or [deep - 1]
    joined = ["_".join(part[n] for n in telling if n < len(part)) or part[-1] for part in parts]
    if all(name.endswith("_0000") for name in joined):
        joined = [name.removesuffix("_0000") for name in joined]
    sound = [re.sub(r"[^\w.-]+", "_", name).strip("._-") or "case" for name in joined]
    return [f"case_{name}" if name.split(".")[0].lower() in RESERVED else name for name in sound]
