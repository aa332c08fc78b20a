"""Options that several verbs share, and what the text of an option means."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from autoseg.records import AutosegError

DatasetOption = Annotated[
    str, typer.Option("-d", "--dataset", help="1, 001, Dataset001_Name, or the path of a raw dataset folder.")
]
WorkspaceOption = Annotated[
    Optional[Path],  # noqa: UP045 - typer reads the annotation
    typer.Option("--workspace", help="Root of all data [default: $AUTOSEG_HOME, else ./autoseg_data]."),
]
WorkersOption = Annotated[int | None, typer.Option("--workers", min=1, help="Cases at a time [default: one a core].")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cuda, cuda:1, mps or cpu.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change any other field; may be repeated.")
]
PlanOption = Annotated[str, typer.Option("--plan", help="Name of the plan.")]
NewPlanOption = Annotated[
    str | None, typer.Option("--plan", help="Name of the plan [default, or that of the network].")
]
NetworkOption = Annotated[
    str | None,
    typer.Option("--network", metavar="NAME", help="Network instead of the preset's, see `autoseg networks`."),
]
PRESET_HELP = "unet, resenc_m, resenc_l or resenc_xl."
LOSS_HELP = (
    "dice_ce [default], dice, dice_squared, ce, bce, weighted_ce, topk_ce, focal, categorical_focal, unified_focal, "
    "tversky, focal_tversky, boundary, hausdorff, cldice, or package.module:Name; sums: 0.5*ce+focal(gamma=2)."
)
LossOption = Annotated[str | None, typer.Option("--loss", metavar="NAME[+NAME...]", help=LOSS_HELP)]
PretrainedOption = Annotated[
    Optional[Path],  # noqa: UP045 - typer reads the annotation
    typer.Option("--pretrained", help="Begin with this: a model file, a fold folder, weights (.safetensors, .pth)."),
]
GpuMemoryOption = Annotated[
    float | None, typer.Option("--gpu-memory", metavar="GB", help="Memory to plan for, 2 to 80 [preset's own].")
]
SpacingOption = Annotated[
    str | None, typer.Option(metavar="Z,Y,X", help="Target spacing of 3d_fullres in mm, instead of the rule's.")
]
GroupByOption = Annotated[str | None, typer.Option(metavar="REGEX", help="Cases with the same match stay in one fold.")]
TestFractionOption = Annotated[float, typer.Option(help="Share of the groups to lock away for testing.")]
RecipeOption = Annotated[
    Path | None, typer.Option("--recipe", metavar="NAME|FILE", help="A recipe that `recipes` lists, or a TOML file.")
]
FoldsOption = Annotated[
    list[str] | None, typer.Option("-f", "--fold", metavar="0,1,...", help="Only these folds [all finished].")
]
RunOption = Annotated[str, typer.Option("--run", help="Name of the run.")]
PatchOption = Annotated[
    str | None, typer.Option("--patch", metavar="ZxYxX", help="Voxels of a patch [256x256 and 64x64x64].")
]
ChannelsOption = Annotated[int, typer.Option("--channels", min=1, help="Channels of the images.")]
ClassesOption = Annotated[int, typer.Option("--classes", min=1, help="Classes with the background.")]


def plan_name(plan: str | None, network: str | None) -> str:
    """The name of a plan that is made: as given, else the network's own, else `default`."""
    from autoseg.settings import parse_call

    return plan or ("default" if network is None else parse_call(network)[0].rpartition(":")[2])


def parse_names(text: str | None) -> tuple[str, ...]:
    """`T1, T2` -> ("T1", "T2"), nothing -> ()."""
    return tuple(part.strip() for part in text.split(",") if part.strip()) if text else ()


def parse_labels(text: str | None) -> dict[str, int]:
    """`liver=1,lesion=255` -> {"liver": 1, "lesion": 255}; AutosegError for anything else."""
    parts = [part.rpartition("=") for part in parse_names(text)]
    if not all(name.strip() and value.strip().lstrip("-").isdecimal() for name, _, value in parts):
        raise AutosegError(f"--labels {text!r}: write names and values, for example --labels liver=1,lesion=2")
    named = {name.strip(): int(value) for name, _, value in parts}
    if len(named) < len(parts):
        raise AutosegError(f"--labels {text!r} names a label twice")
    return named


def parse_patch(text: str | None) -> tuple[int, ...] | None:
    """`64x96x96` -> (64, 96, 96); AutosegError for anything else."""
    parts = [] if text is None else text.split("x")
    if text is not None and not (len(parts) in (2, 3) and all(part.isdecimal() and int(part) for part in parts)):
        raise AutosegError(f"--patch {text!r}: give two or three sizes, for example --patch 64x96x96")
    return tuple(map(int, parts)) or None


def split_folds(texts: list[str] | None) -> tuple[str, ...]:
    """`-f 0,1 -f all` -> ("0", "1", "all"), nothing -> ()."""
    return tuple(dict.fromkeys(name for text in texts or () for name in parse_names(text)))


def parse_folds(text: str | None) -> tuple[int, ...]:
    """`0,1,3` -> (0, 1, 3), nothing -> (); AutosegError for anything else."""
    parts = [] if text is None else text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise AutosegError(f"--folds {text!r}: give numbers with commas, for example --folds 0,1")
    return tuple(sorted({int(part) for part in parts}))


def parse_spacing(text: str | None) -> tuple[float, float, float] | None:
    """`3,0.5,0.5` -> (3.0, 0.5, 0.5); AutosegError for anything else."""
    if text is None:
        return None
    try:
        z, y, x = (float(part) for part in text.split(","))
    except ValueError:
        raise AutosegError(f"--spacing {text!r}: give three lengths in mm, for example --spacing 3,0.5,0.5") from None
    return z, y, x
