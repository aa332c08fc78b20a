"""The command line: what people type, how it fails, and that its options stay few."""

import subprocess
import sys
from dataclasses import fields, replace

import pytest
from test_pipeline import NAME
from toys import balls_dataset
from typer.main import get_command
from typer.testing import CliRunner

from autoseg import __version__
from autoseg.cli import app
from autoseg.cli.options import LOSS_HELP, parse_folds, parse_spacing
from autoseg.losses import LOSSES
from autoseg.pipeline.planning import PlanOptions
from autoseg.records import AutosegError, load_json
from autoseg.schema import Request, Run

RUNNER = CliRunner()

OPTIONS = {
    "check": {"dataset", "workspace", "workers"},
    "plan_and_preprocess": {
        "dataset", "configurations", "preset", "gpu_memory", "spacing", "like", "plan", "group_by", "test_fraction",
        "context", "crop", "combine", "thin", "merge", "discard_edits", "workers", "workspace", "set_", "help_fields",
        "network",
    },
    "plan": {"dataset", "plan", "explain", "diff", "workspace"},
    "train": {
        "dataset", "configuration", "fold", "epochs", "budget", "extend", "seed", "loss", "device", "pretrained",
        "validate_only", "num_gpus", "plan", "run", "recipe", "workspace", "set_", "help_fields",
    },
    "fit": {
        "dataset", "configurations", "folds", "budget", "epochs", "preset", "gpu_memory", "spacing", "group_by",
        "test_fraction", "seed", "loss", "device", "num_gpus", "plan", "run", "recipe", "workers", "workspace", "set_",
        "network", "like", "context", "crop", "combine", "thin", "merge", "discard_edits",
        "pretrained",
    },
    "find_best": {"dataset", "runs", "device", "workers", "workspace"},
    "predict": {
        "sources", "target", "dataset", "configuration", "folds", "run", "model", "step_size", "no_tta",
        "save_probabilities", "no_postprocess", "retry_failed", "device", "workspace",
    },
    "ensemble": {"folders", "target", "dataset", "workers", "workspace"},
    "export": {"target", "dataset", "configuration", "folds", "run", "model", "licence", "note", "workspace"},
    "info": {"file"},
    "import-nnunet": {"source", "target", "configuration", "folds"},
    "evaluate": {"truth", "prediction", "dataset", "output", "tolerance", "partial", "workers", "workspace", "merge"},
    "postprocess": {"source", "target", "truth", "rule", "dataset", "workers", "workspace"},
    "overlay": {"images", "prediction", "output", "truth", "workers"},
    "demo": {"workspace", "device"},
    "recipes": set(),
    "networks": {"names", "patch", "batch", "channels", "classes", "precision", "timed", "device"},
    "describe": {"names", "output", "patch", "channels", "classes", "compare"},
}  # fmt: skip
"""Every verb's options. A new one must replace a field that people change weekly; all else is for --set."""


def test_the_options_of_each_verb_are_these_and_no_more():
    verbs = dict(get_command(app).commands)
    assert set(verbs) == {*OPTIONS, "dataset", "augment"}
    assert set(verbs.pop("dataset").commands) == {"make", "import", "profiles"}
    preview = verbs.pop("augment").commands["preview"]
    assert {parameter.name for parameter in preview.params} == {
        "dataset", "output", "configuration", "policy", "samples", "chain", "seed", "plan", "workspace",
    }  # fmt: skip
    for name, verb in verbs.items():
        assert {parameter.name for parameter in verb.params} == OPTIONS[name], name


def test_version_and_help():
    assert RUNNER.invoke(app, ["--version"]).output == f"autoseg {__version__}\n"
    for verb in (*OPTIONS, "dataset make", "augment preview"):
        shown = RUNNER.invoke(app, [*verb.split(), "--help"])
        assert shown.exit_code == 0
        assert "Usage" in shown.output


def test_help_names_every_loss_without_loading_them():
    said = LOSS_HELP.replace(",", "").replace(";", "").split()
    assert [name for name in said if name in LOSSES] == [*LOSSES]


@pytest.mark.parametrize("text", ["1", "1,2", "a,b,c", "1;2;3"])
def test_spacing_is_three_lengths(text):
    assert parse_spacing("3,0.5,0.5") == (3.0, 0.5, 0.5)
    assert parse_spacing(None) is None
    with pytest.raises(AutosegError, match="--spacing"):
        parse_spacing(text)


@pytest.mark.parametrize("text", ["all", "0;1", "0,", "-1", ""])
def test_folds_are_numbers_with_commas(text):
    assert parse_folds(None) == ()
    assert parse_folds("3, 0,3") == (0, 3)
    with pytest.raises(AutosegError, match="--folds"):
        parse_folds(text)


def test_fit_refuses_two_ends():
    refused = RUNNER.invoke(app, ["fit", "-d", "7", "--epochs", "3", "--budget", "2h"])
    assert "not both" in str(refused.exception)


PLANNING = [
    *("--preset", "resenc_m", "--network", "resenc(stages=3)", "--gpu-memory", "6", "--spacing", "3,1,0.5"),
    *("--context", "5", "--crop", "crop_to(size=[0, 7, 11])", "--crop", "margins(low=[1, 0, 0], high=[0, 0, 2])"),
    *("--thin", "1,1,2", "--merge", "both=1,2"),
    *("--combine", "rss", "--plan", "mine", "--group-by", "p(.)", "--test-fraction", "0.2", "--discard-edits"),
    *("--workers", "3"),
]


@pytest.mark.parametrize("asked", [[], PLANNING, ["--like", "m.autoseg", "--context", "3"]])
def test_fit_plans_what_the_verb_that_plans_would(tmp_path, monkeypatch, asked):
    from autoseg.pipeline import data, fit

    given = []
    monkeypatch.setattr(data, "plan_and_preprocess", lambda place, dataset, options: given.append(options))
    monkeypatch.setattr(fit, "fit", lambda place, dataset, options: given.append(options.plan))
    for verb in ("plan_and_preprocess", "fit"):
        RUNNER.invoke(app, [verb, "-d", "7", *asked, "--workspace", str(tmp_path)], catch_exceptions=False)
    planned, fitted = given
    assert replace(fitted, keep=False) == planned
    if asked is PLANNING:
        pairs = ((planned, PlanOptions()), (planned.request, Request()))
        unset = {f.name for now, usual in pairs for f in fields(now) if getattr(now, f.name) == getattr(usual, f.name)}
        assert unset == {"like", "changes", "choose", "keep", "configurations"}, "given another value, all others are"


def test_fields_of_recipe_plan_and_source_are_listed(tmp_path):
    shown = RUNNER.invoke(app, ["train", "--help-fields"]).output
    assert "learning_rate = 0.01" in shown and "tversky(alpha=0.3, beta=0.7)" in shown
    assert "tubes = (" in RUNNER.invoke(app, ["dataset", "make", "vessels", "--help-fields"]).output
    unknown = RUNNER.invoke(app, ["dataset", "make", "vesels"])
    assert isinstance(unknown.exception, AutosegError)
    assert "vessels" in str(unknown.exception)


def test_make_plan_train_predict_evaluate_by_hand(tmp_path):
    """The lines of the README, one after the other."""
    raw = tmp_path / "raw" / NAME
    balls_dataset(raw, cases=3, prefix="c")
    place = ["--workspace", str(tmp_path)]
    small = ["--set", "configurations.2d.batch_size=2", "--set", "configurations.2d.network.features=[4, 6, 8]"]
    lines = [
        ["check", "-d", "7", *place],
        ["plan_and_preprocess", "-d", "7", "-c", "2d", "--gpu-memory", "4", *small, *place],
        [
            "train",
            "7",
            "2d",
            "0",
            "--epochs",
            "1",
            "--set",
            "steps_per_epoch=2",
            "--set",
            "validation_steps=1",
            "--loss",
            "dice + 0.5*weighted_ce",
            *place,
        ],
        ["predict", "-i", str(raw / "imagesTr"), "-o", str(tmp_path / "out"), "--no-tta", *place],
        ["evaluate", str(raw / "labelsTr"), str(tmp_path / "out"), "--tolerance", "2"],
    ]
    for line in lines:
        done = RUNNER.invoke(app, line, catch_exceptions=False)
        assert done.exit_code == 0, (line, done.output)
    assert "small" in done.output
    assert (tmp_path / "out" / "summary.csv").is_file()
    run = tmp_path / "runs" / NAME / "default" / "2d" / "fold_0" / "run.json"
    assert load_json(Run, run).recipe.loss == "dice+0.5*weighted_ce"
    shown = RUNNER.invoke(app, ["plan_and_preprocess", "-d", "7", "--help-fields", *place], catch_exceptions=False)
    assert "configurations.2d.batch_size = 2" in shown.output


def test_a_wrong_request_ends_with_code_1_and_no_traceback(tmp_path, monkeypatch, capsys):
    from autoseg import cli

    monkeypatch.setattr("sys.argv", ["autoseg", "check", "-d", "99", "--workspace", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        cli.run()
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: no dataset '99'")
    assert "Traceback" not in said


def test_the_package_runs_as_the_command():
    done = subprocess.run(
        [sys.executable, "-P", "-m", "autoseg", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"autoseg {__version__}\n"
