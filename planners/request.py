"""What a plan was asked for by options: in words, and what of it holds when the plan is made again.

An option that was given once holds for all later plans of that name until it is given otherwise: the same command
without it must not quietly make another plan. See docs/decisions/0025.
"""

import shlex
from typing import Any

from autoseg.crops import describe
from autoseg.records import AutosegError
from autoseg.schema import Plan, Request

OPTIONS = {
    "preset": "--preset",
    "network": "--network",
    "gpu_memory_gb": "--gpu-memory",
    "spacing_mm": "--spacing",
    "like": "--like",
    "context": "--context",
    "crops": "--crop",
    "combine": "--combine",
    "thin": "--thin",
    "merge": "--merge",
    "changes": "--set",
}
"""Field of a request -> the option that says it."""
TAKEN_OVER = ("preset", "network", "gpu_memory_gb", "spacing_mm", "crops", "combine", "thin")
"""What a plan has from the model that --like names."""


def asks(request: Request) -> dict[str, Any]:
    """Field -> value of all that is asked for."""
    return {name: value for name in OPTIONS if (value := getattr(request, name)) not in (None, (), {})}


def words(request: Request) -> str:
    """As it is typed: `--context 5 --crop 'crop_to(size=[0, 7, 11])'`."""
    said = []
    for name, value in asks(request).items():
        if name == "crops":
            texts = [describe(crop) for crop in value]
        elif name == "changes":
            texts = [f"{field}={new}" for field, new in value.items()]
        elif name == "merge":
            texts = [f"{merged}={','.join(parts)}" for merged, parts in value.items()]
        elif name in ("spacing_mm", "thin"):
            texts = [",".join(f"{number:g}" for number in value)]
        else:
            texts = [f"{value:g}" if isinstance(value, float) else str(value)]
        said += [f"{OPTIONS[name]} {shlex.quote(text)}" for text in texts]
    return " ".join(said)


def request_of(plan: Plan) -> Request:
    """What a plan was asked for; of one that does not say it, the network, which runs rest on."""
    return Request(network=plan.network) if plan.request == Request() else plan.request


def kept(before: Plan, now: Request) -> Request:
    """What `before` was asked for and is not asked for otherwise now; a preset stands for its own network too."""
    new = asks(now)
    left = {name: value for name, value in asks(request_of(before)).items() if name not in new}
    if "preset" in new:
        left.pop("network", None)
    changes = {field: value for field, value in before.request.changes.items() if field not in now.changes}
    return Request(**left | {"changes": changes})


def joined(before: Request, now: Request) -> Request:
    """Both together; what is asked for now wins. Raises AutosegError for what cannot be had together."""
    both = asks(before) | asks(now) | {"changes": before.changes | now.changes}
    if "like" in both and (more := [option for name, option in OPTIONS.items() if name in TAKEN_OVER and name in both]):
        raise AutosegError(
            f"--like takes over network, memory, spacing, crops, slices and channels; leave out {', '.join(more)}, or "
            "make a plan of another name with --plan NAME if that was asked for before"
        )
    return Request(**both)


def refuse_other_network(before: Plan, now: Request) -> None:
    """AutosegError if the plan that is there was made for another network: its runs could not go on."""
    if before.network is None or now.network == before.network:
        return
    if now.network is not None:
        asked, more = f"{now.network} was asked for", ""
    elif now.preset is not None:
        asked = f"--preset {now.preset} asks for the preset's own"
        more = f"add --network {shlex.quote(before.network)} to take only memory and rules of the preset, "
    else:
        return
    raise AutosegError(
        f"the plan {before.name!r} is for {before.network}, and {asked}; {more}give the new plan a name of its own "
        "with --plan NAME, or put it in the place of the old one with --discard-edits"
    )
