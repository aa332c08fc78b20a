"""Options that several verbs share, and what the text of an option means.

Whatever plans takes the same options, and `plan_options` is the one place where they become those of the pipeline.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from autoseg.records import AutosegError

if TYPE_CHECKING:
    from autoseg.pipeline.planning import PlanOptions

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
PresetOption = Annotated[str | None, typer.Option("--preset", help="unet, resenc_m, resenc_l or resenc_xl. [unet]")]
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
LikeOption = Annotated[
    Path | None,
    typer.Option("--like", help="Take over the plan of this model (a file or a fold folder), for fine-tuning."),
]
ContextOption = Annotated[
    int | None, typer.Option("--context", metavar="3|5|7", help="Slices that 2d sees, to label the middle one [1].")
]
CropOption = Annotated[
    list[str] | None,
    typer.Option("--crop", metavar="CROP", help="crop_to(size=[Z,Y,X]), crop_around_mass, margins; may be repeated."),
]
CombineOption = Annotated[
    str | None, typer.Option("--combine", metavar="rss", help="Make all channels one: the root of the sum of squares.")
]
ThinOption = Annotated[
    str | None,
    typer.Option("--thin", metavar="N|Z,Y,X", help="Make N neighbouring slices one: root of the sum of squares."),
]
MergeOption = Annotated[
    list[str] | None,
    typer.Option("--merge", metavar="NAME=1,2", help="Make labels one class, by value or name; may be repeated."),
]
DiscardEditsOption = Annotated[
    bool, typer.Option("--discard-edits", help="Plan anew what was edited in plan.json by hand.")
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


def plan_options(
    *,
    plan: str | None,
    preset: str | None,
    network: str | None,
    gpu_memory: float | None,
    spacing: str | None,
    like: Path | None,
    context: int | None,
    crop: list[str] | None,
    combine: str | None,
    thin: str | None,
    merge: list[str] | None,
    set_: list[str] | None = None,
    group_by: str | None,
    test_fraction: float,
    discard_edits: bool,
    workers: int | None,
    **own: Any,
) -> "PlanOptions":
    """The options of planning as the pipeline takes them; own: fields of PlanOptions that the verb has alone."""
    from autoseg import settings
    from autoseg.crops import parse_crop
    from autoseg.merging import parse_merges
    from autoseg.pipeline.planning import PlanOptions
    from autoseg.schema import Request

    request = Request(
        preset=preset,
        network=network,
        gpu_memory_gb=gpu_memory,
        spacing_mm=parse_spacing(spacing),
        like=None if like is None else str(like.absolute()),
        context=context,
        crops=tuple(map(parse_crop, crop or ())),
        combine=combine,
        thin=parse_thin(thin),
        merge=parse_merges(merge or ()),
        changes=settings.in_json(settings.parse(set_ or ())),
    )
    return PlanOptions(
        name=plan_name(plan, network),
        request=request,
        group_by=group_by,
        test_fraction=test_fraction,
        discard_edits=discard_edits,
        workers=workers,
        **own,
    )


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


def parse_thin(text: str | None) -> tuple[int, ...]:
    """`2` -> (2,), `1,1,2` -> (1, 1, 2), nothing -> (); AutosegError for anything else."""
    parts = [] if text is None else text.split(",")
    if text is not None and not (len(parts) in (1, 3) and all(part.isdecimal() and int(part) for part in parts)):
        raise AutosegError(
            f"--thin {text!r}: give how many neighbouring slices become one, for example --thin 2, or a number of "
            "voxels for each axis (Z, Y, X), for example --thin 1,1,2"
        )
    return tuple(map(int, parts))
