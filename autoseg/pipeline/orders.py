"""What the leader of several processes that train together asks of the others."""

from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Literal

from autoseg.records import AutosegError, record, to_json
from autoseg.schema import Run
from autoseg.team import Team


@record
class Order:
    """What the leader of a team asks the others for: to train together, or to predict their share of the cases."""

    work: Literal["train", "validate"]
    run: Run
    folder: str
    prepared: str
    priors: dict[str, str] | None
    """Case -> label map of the stage before, in a cascade."""
    annotated: dict[str, tuple[str, ...]] = field(default_factory=dict)
    class_weights: tuple[float, ...] | None = None
    """See `make_parts`."""
    ending: str = ""
    """Of the files to write."""


def give_order(
    work: Literal["train", "validate"],
    run: Run,
    folder: Path,
    prepared: Path,
    priors: Mapping[str, Path] | None,
    team: Team,
    annotated: Mapping[str, Sequence[str]] | None = None,
    class_weights: tuple[float, ...] | None = None,
    ending: str = "",
) -> None:
    """Have the others of the team do the same; see `follow`."""
    if team.size == 1:
        return
    order = Order(
        work=work,
        run=run,
        folder=str(folder.absolute()),
        prepared=str(prepared.absolute()),
        priors=None if priors is None else {name: str(path) for name, path in priors.items()},
        annotated={name: tuple(classes) for name, classes in (annotated or {}).items()},
        class_weights=class_weights,
        ending=ending,
    )
    team.tell(to_json(order))


def refuse_small_batch(configuration: str, batch_size: int, team: Team) -> None:
    """AutosegError if a batch has fewer samples than there are processes to share it."""
    if batch_size < team.size:
        raise AutosegError(
            f"{configuration} has batches of {batch_size}, too few to be shared by {team.size} "
            "processes; train one fold on each GPU instead (autoseg fit --num-gpus), or plan for more memory "
            "(--gpu-memory)"
        )
