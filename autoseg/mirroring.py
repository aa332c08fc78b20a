"""Which mirror images there are, and what becomes of labels in them.

A plan says so once (`Mirroring`, in its own axes and classes); `Flips` is what that means for the patches of one
network. Training and prediction by mirrored views both follow it.
"""

from collections.abc import Sequence

from autoseg.labels import Labels
from autoseg.records import record


@record
class Flips:
    """The mirror images of patches of one network."""

    axes: tuple[int, ...]
    """Positions in the patch that are mirrored, in any combination."""
    left_right: int | None = None
    """The position that runs from one side of the patient to the other, where labels depend on it; whether or not it
    is among `axes`."""
    indices: tuple[int, ...] = ()
    """What each index of a label map becomes where `left_right` is mirrored; empty: what it was."""
    heads: tuple[int, ...] = ()
    """For each head of the network the one whose place it takes then; empty: its own."""


ALL_AXES = Flips(axes=(0, 1, 2))
"""Every mirror image, and no label depends on it; for patches of any dimension."""


@record
class Mirroring:
    """What a plan says of mirror images, for training and prediction alike.

    Axes are those of the plan; classes are positions in `Labels.names`. By default every axis is mirrored and labels
    stay what they are.
    """

    left_right: int | None = None
    """The axis that runs from one side of the patient to the other; None where no label depends on it, or where it is
    not known."""
    swapped: tuple[tuple[int, int], ...] = ()
    """Pairs of classes that trade places where `left_right` is mirrored."""
    forbidden: tuple[int, ...] = ()
    """Axes along which there are no mirror images."""

    def __post_init__(self) -> None:
        axes = {*self.forbidden} if self.left_right is None else {self.left_right, *self.forbidden}
        classes = [index for pair in self.swapped for index in pair]
        if not axes <= {0, 1, 2}:
            raise ValueError(f"mirroring speaks of axes 0, 1 and 2, found {sorted(axes)}")
        if len(set(classes)) != len(classes) or min(classes, default=1) < 1:
            raise ValueError(f"swapped classes are pairs that share no class, without the background: {self.swapped}")
        if classes and self.left_right is None:
            raise ValueError("classes are swapped along an axis: give left_right")

    def flips(self, labels: Labels, dimension: int, among: Sequence[int] | None = None) -> Flips:
        """What this means for patches of so many axes, which are the last ones of the plan.

        among: positions in the patch that may be mirrored at all; None: every one.
        """
        lost = 3 - dimension
        allowed = range(dimension) if among is None else among
        axes = tuple(axis for axis in allowed if axis + lost not in self.forbidden)
        across = None if self.left_right is None or self.left_right < lost else self.left_right - lost
        if across not in axes or not self.swapped:
            return Flips(axes=axes, left_right=across)
        classes = other_class(labels, self.swapped)
        heads = classes if labels.exclusive else tuple(index - 1 for index in classes[1:])
        return Flips(axes=axes, left_right=across, indices=other_index(labels, self.swapped), heads=heads)


EVERY_AXIS = Mirroring()


def other_class(labels: Labels, swapped: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """The class that each class becomes, the background first, where the pairs `swapped` trade places."""
    mates = dict(swapped) | {b: a for a, b in swapped}
    return tuple(mates.get(index, index) for index in range(labels.count))


def other_index(labels: Labels, swapped: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """What each index of a label map becomes, the ignored one included, where the pairs `swapped` trade places.

    An index of some regions becomes one of exactly their mates. Raises ValueError for a pair with a class that is not
    there, and where the regions are not made up alike: one side has more values of a kind than the other.
    """
    classes = other_class(labels, swapped)
    if beyond := {index for pair in swapped for index in pair} - set(range(1, labels.count)):
        raise ValueError(f"there is no class {min(beyond)} to swap, the last is {labels.count - 1}")
    written = {labels.stored.index(value) for value in labels.values}
    alike: dict[frozenset[int], list[int]] = {}
    # Those that predictions are written with come first, so that they become one another.
    for index in sorted(labels.foreground, key=lambda index: (index not in written, index)):
        inside = frozenset(n for n, members in enumerate(labels.members, start=1) if index in members)
        alike.setdefault(inside, []).append(index)
    order = list(range(len(labels.known)))
    for inside, own in alike.items():
        mates = alike.get(frozenset(classes[n] for n in inside), [])
        if len(mates) != len(own):
            named = " and ".join(labels.names[n] for n in sorted(inside))
            raise ValueError(f"there are not as many label values of {named} as on the other side")
        for index, mate in zip(own, mates):
            order[index] = mate
    return tuple(order)
