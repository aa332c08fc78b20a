"""Who may import whom, held as an explicit list; what must start fast; and that every package is shipped."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

ROWS = [
    {
        "records",
        "labels",
        "crops",
        "merging",
        "mirroring",
        "schema",
        "needs",
        "progress",
        "parallel",
        "workspace",
        "settings",
        "own",
        "recipes",
        "signals",
        "supervise",
    },
    {"volume", "resample", "readers"},
    {"cases", "layout", "raw", "preprocess", "restore", "fingerprint", "store", "splits", "outliers"},
    {"networks", "losses", "augment", "placement", "devices", "schedule", "rates", "history", "team"},
    {
        "sampling",
        "bad_steps",
        "watchdog",
        "optimizers",
        "parameter_groups",
        "checkpoint",
        "kept",
        "inference",
        "evaluation",
        "computing",
        "agreement",
    },
    {
        "step",
        "training",
        "tuning",
        "postprocess",
        "bundle",
        "model",
        "ensemble",
        "predictor",
        "transfer",
        "published",
        "interop",
    },
    {"pipeline"},
    {"cli", "__main__"},
]
"""A module imports from its own row or from those above it."""

OUTSIDE = {"planners": 1, "datasets": 2}
"""Folder -> how many of the rows it may import from."""

WITHOUT_TORCH = {
    "cases",
    "layout",
    "raw",
    "readers",
    "volume",
    "resample",
    "preprocess",
    "restore",
    "fingerprint",
    "store",
    "splits",
    "outliers",
    "placement",
    "evaluation",
    "postprocess",
    "bundle",
    *ROWS[0],
    "planners",
    "datasets",
}

NOT_BY_TRAINING = {"inference", "model", "evaluation", "pipeline"}


def sources() -> list[tuple[str, Path]]:
    """(room, file) of every module: the first part of its name below autoseg, or the outside folder."""
    found = []
    for path in sorted((ROOT / "autoseg").rglob("*.py")):
        parts = path.relative_to(ROOT / "autoseg").with_suffix("").parts
        if parts != ("__init__",):
            found.append((parts[0], path))
    for folder in OUTSIDE:
        found += [(folder, path) for path in sorted((ROOT / folder).rglob("*.py"))]
    return found


def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports, at whatever depth of the code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; write the whole name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms(path: Path) -> set[str]:
    """Rooms of autoseg that a file imports."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("autoseg.") and name.count(".") >= 1}


def row_of(room: str) -> int:
    return next(number for number, row in enumerate(ROWS) if room in row)


def test_every_room_has_one_row():
    assert {room for room, _ in sources()} - set(OUTSIDE) == set().union(*ROWS)
    assert sum(map(len, ROWS)) == len(set().union(*ROWS))


@pytest.mark.parametrize(("room", "path"), sources(), ids=lambda value: str(value).removeprefix(f"{ROOT}/"))
def test_imports_go_up_the_page(room, path):
    allowed = ROWS[: OUTSIDE[room]] if room in OUTSIDE else ROWS[: row_of(room) + 1]
    known = set().union(*allowed) | {"__version__"}
    if room in OUTSIDE:
        known.add(room)
    if room == "pipeline":
        known |= set(OUTSIDE)
    assert rooms(path) <= known


@pytest.mark.parametrize(("room", "path"), sources(), ids=lambda value: str(value).removeprefix(f"{ROOT}/"))
def test_what_starts_fast_does_not_import_torch(room, path):
    if room in WITHOUT_TORCH:
        assert not any(name == "torch" or name.startswith("torch.") for name in imports(path))


def test_training_never_imports_inference():
    for room, path in sources():
        if room in ("training", "step"):
            assert not rooms(path) & NOT_BY_TRAINING


# `-P` keeps the current folder off the path: the checkout would stand before what is installed, without its planners.


def test_importing_autoseg_and_asking_for_help_load_no_heavy_module():
    code = (
        "import sys, autoseg, autoseg.cli\n"
        "from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(autoseg.cli.app, ['--help']).exit_code == 0\n"
        "print(sorted({'torch', 'SimpleITK', 'scipy', 'matplotlib', 'skimage'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_checking_and_planning_need_no_torch():
    code = "import sys, autoseg.pipeline.data; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_package_folder_is_shipped():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    here = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("autoseg", *OUTSIDE)
        for path in (ROOT / top).rglob("__init__.py")
    }
    mapped = {f"autoseg.{name}" if name.split(".")[0] in OUTSIDE else name for name in here}
    assert mapped == set(settings["packages"])


def test_public_names_agree_with_all():
    import autoseg

    assert autoseg.__all__ == sorted(autoseg.__all__)
    assert all(hasattr(autoseg, name) for name in autoseg.__all__)


def test_every_dependency_is_pinned_and_bounded():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    needed = project["dependencies"] + project["optional-dependencies"]["test"]
    for requirement in needed:
        assert ">=" in requirement
        assert requirement.split(">=")[0].lower() in pinned


def test_every_proof_of_the_list_of_features_is_a_test():
    proofs = re.findall(r"(test_\w+\.py)::(test_\w+)", (ROOT / "docs" / "features.md").read_text())
    assert len(proofs) > 50
    for file, name in proofs:
        assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(), f"{file} has no {name}"
