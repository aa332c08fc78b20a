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
from autoseg.mirroring import EVERY_AXIS, Mirroring, other_index
from autoseg.schema import Fingerprint, Orientation, Reason

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


def says_sides(labels: Labels) -> bool:
    """Whether some class name says a side; without one, mirror images are met as ever."""
    return any(sided(name) for name in labels.names[1:])


def mirroring(
    fingerprint: Fingerprint, labels: Labels, axis_order: tuple[int, int, int], orientation: Orientation = "canonical"
) -> tuple[Mirroring, tuple[Reason, ...]]:
    """How mirror images are met, and why; the default and no reason where no class name says a side.

    2D images do not say how they lie: their last axis counts as left-right if a pair lies apart along it, else neither
    axis is mirrored. Where networks see each file's own axes (`orientation` "file"), any axis of a 3D image may be
    left-right, and none is mirrored.
    """
    found = {index: said for index, name in enumerate(labels.names) if index and (said := sided(name))}
    if not found:
        return EVERY_AXIS, ()
    pairs, alone = _mates(found)
    lone = [f"{labels.names[index]} ({why})" for index, why in alone.items()]
    facts, confirmed = [], []
    for left, right in pairs:
        both = f"{labels.names[left]} and {labels.names[right]}"
        fact, objection = _examine(fingerprint, labels, left, right)
        facts.append(f"{both}: {fact}")
        if objection:
            lone.append(f"{both} ({objection})")
        else:
            confirmed.append((left, right))
    lone = lone or _not_alike(labels, confirmed)

    across = axis_order.index(2)
    if orientation == "file" and fingerprint.dimension == 3:
        lone = ["the axes: they are those of each file, and any may be left-right"]
        made = Mirroring(forbidden=(0, 1, 2))
    elif not lone:
        made = Mirroring(left_right=across, swapped=tuple(confirmed))
    elif fingerprint.dimension == 3 or confirmed:
        made = Mirroring(left_right=across, forbidden=(across,))
    else:
        made = Mirroring(forbidden=tuple(axis for axis in range(3) if axis_order[axis]))
    if lone:
        outcome = f"no mirror images along {_axes(made.forbidden)}, because of {_listed(lone)}"
    else:
        trade = "1 pair of classes trades" if len(confirmed) == 1 else f"{len(confirmed)} pairs of classes trade"
        outcome = f"{trade} places in mirror images along {_axes((across,))}"
    reason = Reason(
        decision="left and right",
        rule="classes whose names differ in left and right alone trade places in a mirror image, if they lie in the "
        f"same order from side to side in at least {APART:.0%} of the cases; any other class that is named after a "
        "side forbids mirror images along that axis, in training and prediction",
        inputs=_listed(facts),
        outcome=outcome,
    )
    return made, (reason,)


def _examine(fingerprint: Fingerprint, labels: Labels, left: int, right: int) -> tuple[str, str]:
    """What the cases say of a pair of classes, in words, and why it must not trade places; empty if it may."""
    cases = [case.across for case in fingerprint.cases if case.across and {left, right} <= case.across.keys()]
    # Towards the patient's left, in image widths.
    gaps = [places[left] - places[right] for places in cases]
    ahead, behind = sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps)
    fact = f"apart in the same order in {max(ahead, behind)} of {len(gaps)} cases with both"
    if behind > ahead and fingerprint.dimension == 3:
        fact += ", left on the patient's right side (check the names, and the orientation in the files)"
    names = {labels.names[left], labels.names[right]}
    if not gaps:
        return fact, "no case has both, so nothing confirms that they are a pair"
    if max(ahead, behind) < APART * len(gaps):
        return fact, "not apart in the same order"
    if any(len(names & {*classes}) == 1 for classes in fingerprint.annotated().values()):
        return fact, "in some cases only one of the two was annotated"
    return fact, ""


def _not_alike(labels: Labels, pairs: Sequence[tuple[int, int]]) -> list[str]:
    """Why label maps cannot be renamed although all pairs may trade places; empty if they can."""
    try:
        other_index(labels, pairs)
    except ValueError as error:
        return [str(error)]
    return []


def _axes(axes: Sequence[int]) -> str:
    return " and ".join(f"axis {axis}" for axis in axes)


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


def _listed(items: Sequence[str]) -> str:
    more = [f"{len(items) - SHOWN} more"] if len(items) > SHOWN else []
    return "; ".join([*items[:SHOWN], *more])
