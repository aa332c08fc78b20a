"""Left and right: which classes trade places in a mirror image, and when there must be no mirror image.

A network that is shown mirrored patients with unchanged labels learns that left may be right. So classes whose names
differ in that word alone trade places with the image, once their positions confirm that they are a pair. A class that
is named after a side and has no such mate cannot be renamed; then there are no mirror images along that axis. A class
without a side in its name forbids nothing, wherever it lies: position alone cannot tell a spleen, which may be mirrored
as in nnU-Net, from the way images were cut.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from autoseg.labels import Labels
from autoseg.schema import EVERY_AXIS, Fingerprint, Mirroring, Reason

SIDES: dict[str, Literal["left", "right"]] = {
    **dict.fromkeys(("left", "l", "lt", "lh"), "left"),
    **dict.fromkeys(("right", "r", "rt", "rh"), "right"),
}
"""Whole words of a class name that say a side."""

UNLIKE = {
    *("ventricle", "ventricles", "ventricular", "atrium", "atria", "atrial", "appendage", "heart", "cardiac"),
    *("myocardium", "myocardial", "coronary", "liver", "hepatic", "portal", "bile", "colon", "colic", "gastric"),
}
"""Beside these words left and right are two different things, and none is the other's mirror image."""

LATERAL = {"lateral", "lat"}
"""Words with which a ventricle is one of the brain's, which are mirror images."""

CHAMBERS: dict[str, Literal["left", "right"]] = {
    **dict.fromkeys(("lv", "la", "lad", "lca", "lcx"), "left"),
    **dict.fromkeys(("rv", "ra", "rca"), "right"),
}
"""Heart chambers and coronary arteries whose abbreviation holds the side."""

APART = 0.95
"""Share of the cases with both classes of a pair in which they must lie in the same order."""

BETWEEN_WORDS = re.compile(
    r"[\W_]+|(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=[a-z]{2})(?=\d)|(?<=\d)(?=[^\W\d_])"
)
"""Between words of a name: what is no letter or digit, and a change of case. `L1`, a vertebra, stays one word."""

SHOWN = 5
"""As many classes are named in a reason; of the others, the number."""


@dataclass(frozen=True, kw_only=True)
class Sided:
    """What a class name says: its side, the name without it, and whether left and right can be mirror images."""

    side: Literal["left", "right"]
    rest: tuple[str, ...]
    mirrored: bool


def sided(name: str) -> Sided | None:
    """Read a class name; None if it says no side, or both."""
    words = tuple(word.lower() for word in BETWEEN_WORDS.split(name) if word)
    sides = {SIDES[word] for word in words if word in SIDES}
    if len(sides) == 1:
        rest = tuple("*" if word in SIDES else word for word in words)
        return Sided(side=sides.pop(), rest=rest, mirrored=not UNLIKE & {*rest} or bool(LATERAL & {*rest}))
    inside = {CHAMBERS[word] for word in words if word in CHAMBERS}
    return Sided(side=inside.pop(), rest=words, mirrored=False) if not sides and len(inside) == 1 else None


def mirroring(
    fingerprint: Fingerprint, labels: Labels, axis_order: tuple[int, int, int]
) -> tuple[Mirroring, tuple[Reason, ...]]:
    """How mirror images are met, and why; the default and no reason where no class name says a side.

    2D images do not say how they lie. Their last axis counts as left-right if a pair lies apart along it; otherwise
    a class that cannot be renamed forbids both axes.
    """
    found = {index: said for index, name in enumerate(labels.names) if index and (said := sided(name))}
    if not found:
        return EVERY_AXIS, ()
    across = axis_order.index(2)
    pairs, alone = _mates(found)
    swapped, facts, lone = [], [], [f"{labels.names[index]} ({why})" for index, why in alone.items()]
    for left, right in pairs:
        both = f"{labels.names[left]} and {labels.names[right]}"
        gaps = _gaps(fingerprint, left, right)
        ahead, behind = sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps)
        facts.append(f"{both}: apart in the same order in {max(ahead, behind)} of {len(gaps)} cases with both")
        if not gaps:
            lone.append(f"{both} (no case has both, so nothing confirms that they are a pair)")
        elif max(ahead, behind) < APART * len(gaps):
            lone.append(f"{both} (not apart in the same order)")
        else:
            swapped.append((left, right))
            if behind > ahead and fingerprint.dimension == 3:
                facts[-1] += " (left on the patient's right side: check names and the orientation in the files)"
    known = fingerprint.dimension == 3 or bool(swapped)
    forbidden = () if not lone else (across,) if known else tuple(axis for axis in range(3) if axis_order[axis])
    made = Mirroring(left_right=across, swapped=tuple(swapped), forbidden=forbidden)
    axes = " and ".join(f"axis {axis}" for axis in forbidden or (across,))
    outcome = (
        f"no mirror images along {axes}, because of {_listed(lone)}"
        if lone
        else f"mirror images along {axes}, in which {len(swapped)} pair{'s' * (len(swapped) > 1)} of classes "
        f"trade{'s' * (len(swapped) == 1)} places"
    )
    reason = Reason(
        decision="left and right",
        rule="classes whose names differ in left and right alone trade places in a mirror image, if they lie in the "
        f"same order from left to right in at least {APART:.0%} of the cases; any other class that is named after a "
        "side forbids mirror images along that axis, in training and prediction",
        inputs=_listed(facts),
        outcome=outcome,
    )
    return made, (reason,)


def _mates(found: dict[int, Sided]) -> tuple[list[tuple[int, int]], dict[int, str]]:
    """(left, right) classes of equal names but for the side, and all other sided classes with the reason."""
    pairs, alone = [], {}
    for index, said in found.items():
        same = [i for i, other in found.items() if other.rest == said.rest and i != index]
        if not said.mirrored:
            alone[index] = "left and right are no mirror images there"
        elif not same:
            alone[index] = "without a mate of the other side"
        elif len(same) > 1 or found[same[0]].side == said.side:
            alone[index] = "more than one class is called so"
        elif said.side == "left":
            pairs.append((index, same[0]))
    return pairs, alone


def _gaps(fingerprint: Fingerprint, left: int, right: int) -> list[float]:
    """How far `left` lies towards the patient's left of `right`, in image widths, in each case that has both."""
    places = [case.across for case in fingerprint.cases if case.across and {left, right} <= case.across.keys()]
    return [place[left] - place[right] for place in places]


def _listed(items: Sequence[str]) -> str:
    more = [f"{len(items) - SHOWN} more"] if len(items) > SHOWN else []
    return "; ".join([*items[:SHOWN], *more])
