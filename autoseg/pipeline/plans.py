"""plan: show the plans that a dataset has; planning itself is in planning."""

from collections.abc import Sequence

from autoseg.planners import added, difference, edited, explain
from autoseg.records import AutosegError, load_json
from autoseg.schema import Plan
from autoseg.workspace import Workspace

WIDEST = 60
"""Characters of a value that are shown."""


def plans_of(workspace: Workspace, dataset_text: str) -> dict[str, Plan]:
    """Every plan of a dataset by its name. Raises AutosegError that says how to make one if there is none."""
    name, _ = workspace.dataset(dataset_text)
    paths = sorted(workspace.prepared(name).glob("*/plan.json"))
    if not paths:
        cure = workspace.command("plan_and_preprocess", "-d", dataset_text)
        raise AutosegError(f"{name} has no plan yet; run: {cure}")
    return {path.parent.name: load_json(Plan, path) for path in paths}


def plan_called(workspace: Workspace, dataset_text: str, name: str) -> Plan:
    """One plan; AutosegError lists the ones there are."""
    plans = plans_of(workspace, dataset_text)
    if name not in plans:
        raise AutosegError(f"there is no plan {name!r}; there are {', '.join(plans)}")
    return plans[name]


def show_plans(workspace: Workspace, dataset_text: str, only: str | None = None) -> None:
    """Print all plans, or `only` the one of that name, as one table, a line a configuration."""
    plans = plans_of(workspace, dataset_text) if only is None else {only: plan_called(workspace, dataset_text, only)}
    rows = [("plan", "network", "memory", "configuration", "patch", "batch", "spacing (mm)", "stages", "")]
    for name, plan in plans.items():
        by_hand = dict.fromkeys(edited(plan), "edited by hand") | dict.fromkeys(added(plan), "added by hand")
        for c in plan.configurations:
            sizes = (" x ".join(map(str, c.patch)), str(c.batch_size), " x ".join(f"{s:.4g}" for s in c.spacing_mm))
            facts = (plan.network or plan.preset, f"{plan.gpu_memory_gb:g} GB")
            rows.append((name, *facts, c.name, *sizes, str(len(c.network.features)), by_hand.get(c.name, "")))
    print(table(rows))


def show_plan(workspace: Workspace, dataset_text: str, name: str) -> None:
    """Print a plan with the reason of every decision."""
    print(explain(plan_called(workspace, dataset_text, name)))


def show_difference(workspace: Workspace, dataset_text: str, first: str, second: str) -> None:
    """Print the fields in which two plans differ."""
    rows = difference(*(plan_called(workspace, dataset_text, name) for name in (first, second)))
    print(table([("field", first, second), *rows]) if rows else f"{first} and {second} are equal but for their names")


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of text with aligned columns; long values are cut."""
    short = [tuple(cell if len(cell) <= WIDEST else f"{cell[: WIDEST - 3]}..." for cell in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*short)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in short)
