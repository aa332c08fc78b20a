"""What is decided about a dataset before anything is prepared: its plan, as asked for now and before, and its folds.

Nothing is written here, and no image is read.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from autoseg import bundle, settings
from autoseg.labels import Labels
from autoseg.layout import Dataset
from autoseg.own import own
from autoseg.planners import (
    PLANNERS,
    as_prepared,
    keep_edits,
    overruled,
    plan,
    plan_like,
    refuse_even,
    refuse_memory,
    request_of,
    stamped,
    thinning,
    with_context,
    with_preparation,
)
from autoseg.records import AutosegError, load_json, to_json
from autoseg.schema import Fingerprint, Plan, Preparation, Request, Run
from autoseg.splits import Splits, check_splits, load_splits, make_splits, mended, read_splits
from autoseg.workspace import Workspace

FUNCTION = "preparation.function"
PLAN_OPTIONS = {
    "name": "--plan",
    "preset": "--preset",
    "network": "--network",
    "gpu_memory_gb": "--gpu-memory",
    "planned": "--discard-edits",
    "request": "that says it",
    "configurations.2d.context": "--context",
    "preparation.combined": "--combine",
    "preparation.crops": "--crop",
    "preparation.thin": "--thin",
    "labels.parts": "--merge",
}
"""Plan fields that have an option of their own."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The options of plan_and_preprocess, which fit has too."""

    name: str = "default"
    request: Request = field(default_factory=Request)
    """What the planner is asked for now. What it does not say is as when a plan of that name was made."""
    configurations: tuple[str, ...] = ()
    """What to preprocess; empty: what `choose` says, or all."""
    choose: Callable[[Plan], Sequence[str]] | None = None
    discard_edits: bool = False
    """Whether what was edited in plan.json by hand gives way to the new plan."""
    keep: bool = False
    """Whether a plan of that name stays as it is, if neither the data nor what is asked for have changed since."""
    group_by: str | None = None
    test_fraction: float = 0.0
    workers: int | None = None


def wanted_of(made: Plan, options: PlanOptions) -> tuple[str, ...]:
    """The configurations of a plan that are to be prepared."""
    if options.configurations:
        return options.configurations
    return tuple(c.name for c in made.configurations) if options.choose is None else tuple(options.choose(made))


def holds(plan: Plan, request: Request, fingerprint: Fingerprint, labels: Labels) -> bool:
    """Whether a plan was made as asked, from these very data and labels."""
    same = plan.data_hash == fingerprint.data_hash() and plan.labels == labels
    return same and request_of(plan) == request


def make_plan(
    fingerprint: Fingerprint,
    labels: Labels,
    options: PlanOptions,
    request: Request,
    earlier: Mapping[str, str],
    before: Plan | None,
) -> tuple[Plan, dict[str, str]]:
    """The plan for a fingerprint with the changes of --set made and validated, and name -> line for each edit kept.

    `labels`: of the plan; the fingerprint counts them so. `request`: that of `options` joined with what was asked for
    before, of which `earlier` are the changes. `before`: an earlier plan, whose edits by hand are kept; they are later
    than `earlier`, and what is asked for now is later than they.
    """
    check_request(request)
    preset = request.preset or "unet"
    source = None if request.like is None else plan_at(Path(request.like))
    preparation = Preparation(crops=request.crops) if source is None else source.preparation
    if request.combine is not None:
        preparation = replace(preparation, combined=fingerprint.channel_names)
    if request.thin:
        preparation = replace(preparation, thin=thinning(request.thin, fingerprint))
    measured = as_prepared(fingerprint, preparation)
    needs = None
    if request.network is not None:
        from autoseg.networks.footprint import needs_of

        needs = needs_of(request.network, len(measured.channel_names), labels.heads)
    made = plan(
        measured,
        labels,
        PLANNERS[preset],
        gpu_memory_gb=request.gpu_memory_gb,
        spacing_mm=request.spacing_mm,
        name=options.name,
        needs=needs,
    )
    if source is None:
        made = with_preparation(made, preparation, fingerprint)
    else:
        made = plan_like(source, measured, labels, made, Path(request.like or "").name)
    if request.context is not None:
        # One of before holds for the 2D configurations, whatever is prepared now.
        made = with_context(made, request.context, () if options.request.context is None else wanted_of(made, options))
    made = replace(made, data_hash=fingerprint.data_hash())
    ruled = made
    fresh = made = changed(made, earlier, "--set (as before; to forget it, delete plan.json)")
    edits: dict[str, str] = {}
    if before is not None:
        made, edits = keep_edits(before, fresh)
    made = changed(made, options.request.changes, "--set")
    if made.preparation.function is not None:
        own(made.preparation.function, "preprocessing")
    return replace(stamped(overruled(made, ruled), fresh, edits), request=request), edits


def check_request(request: Request) -> None:
    """AutosegError for what no plan can be asked for, whatever the data are: found before hours of reading them."""
    if request.preset is not None and request.preset not in PLANNERS:
        raise AutosegError(f"unknown preset {request.preset!r}; choose one of {', '.join(PLANNERS)}")
    if request.combine not in (None, "rss"):
        raise AutosegError(f"--combine {request.combine}: channels are combined by rss, the root of the sum of squares")
    if request.gpu_memory_gb is not None:
        refuse_memory(request.gpu_memory_gb)
    if request.context is not None:
        refuse_even(request.context)
    if request.network is not None:
        from autoseg.networks import asked, spec_of

        name, found, _ = asked(request.network)
        if found is None:
            own(name, "network")
        else:
            for dimension in found.dimensions:
                spec_of(request.network, 2 if dimension == 2 else 3)


def changed(made: Plan, changes: Mapping[str, str], where: str) -> Plan:
    """The plan with the changes of a request made, see `settings.change`; an empty function is none."""
    values = {path: json.loads(value) for path, value in changes.items()}
    if values.get(FUNCTION) == "":
        values[FUNCTION] = None
    return settings.change(made, values, taken=PLAN_OPTIONS, where=where)


def plan_at(path: Path) -> Plan:
    """The plan of the model at `path`: a model file, or the folder of a fold or of a configuration with folds."""
    if not path.is_dir():
        return bundle.read(path).content.plan
    found = [path / "run.json", *sorted(path.glob("fold_*/run.json"))]
    for run in found:
        if run.is_file():
            return load_json(Run, run).plan
    raise AutosegError(f"--like {path} holds no run.json; give a model file, or the folder of a fold")


def describe_plan_fields(workspace: Workspace, dataset_text: str, plan_name: str) -> None:
    """Print the fields of a dataset's plan that --set takes, with their present values."""
    name, _ = workspace.dataset(dataset_text)
    path = workspace.plan_folder(name, plan_name) / "plan.json"
    made = load_json(Plan, path)
    print(
        "\n".join(
            f"{field} = {value}" for field, value in settings.fields(replace(made, reasons=()), taken=PLAN_OPTIONS)
        )
    )


def choose_splits(dataset: Dataset, raw: Path, prepared: Path, options: PlanOptions) -> tuple[Splits, tuple[str, ...]]:
    """Folds given with the raw data, else those made before with what has come and gone since, else new ones.

    Beside them what has changed since, a line each.
    Raises AutosegError if folds exist and the options ask for others: runs may already rest on them.
    """
    cases = [case.id for case in dataset.cases]
    group_by = options.group_by or dataset.group_by
    for given in (raw / "splits.json", raw / "splits_final.json", prepared / "splits_final.json"):
        if given.is_file():
            if options.test_fraction:
                raise AutosegError(f"{given} already says which cases are held out; leave out --test-fraction")
            return read_splits(given, cases, group_by), ()
    existing = prepared / "splits.json"
    if not existing.is_file():
        return make_splits(cases, group_by=group_by, test_fraction=options.test_fraction), ()
    old = load_splits(existing)
    asked = options.group_by is not None or options.test_fraction > 0 or old.group_by != group_by
    if asked and (old.group_by, old.test_fraction) != (group_by, options.test_fraction):
        wanted = make_splits(old.every(), group_by=group_by, test_fraction=options.test_fraction)
        if to_json(wanted) != to_json(replace(old, test_fraction=wanted.test_fraction)):
            raise AutosegError(f"{existing} holds other folds, which runs may rest on; delete it to make new ones")
    splits, changes = mended(old, cases)
    if changes:
        changes = (*changes, "what was trained on those before still predicts; train on these under another --run")
    check_splits(splits, cases, str(existing))
    return splits, changes
