"""The command line: parses, calls the pipeline, prints. Heavy modules are imported by the verb that needs them.

The table of verbs and the command itself are here, the verbs in a module for each group of them, and what they share,
options and the parsers of their text, in options.py.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Annotated

import typer

from autoseg import __version__
from autoseg.cli import datasets, planning, predicting, sharing, training
from autoseg.cli.failures import Command, in_words
from autoseg.records import AutosegError
from autoseg.supervise import supervise

VERBS: dict[str, Callable[..., None]] = {
    "check": planning.check_verb,
    "plan_and_preprocess": planning.plan_and_preprocess_verb,
    "plan": planning.plan_verb,
    "networks": planning.networks_verb,
    "describe": planning.describe_verb,
    "train": training.train_verb,
    "recipes": training.recipes_verb,
    "fit": training.fit_verb,
    "find_best": training.find_best_verb,
    "predict": predicting.predict_verb,
    "ensemble": predicting.ensemble_verb,
    "export": sharing.export_verb,
    "info": sharing.info_verb,
    "import-nnunet": sharing.import_nnunet_verb,
    "evaluate": predicting.evaluate_verb,
    "postprocess": predicting.postprocess_verb,
    "overlay": predicting.overlay_verb,
    "demo": datasets.demo_verb,
    "dataset make": datasets.make_verb,
    "dataset import": datasets.import_verb,
    "dataset profiles": datasets.profiles_verb,
    "augment preview": planning.preview_verb,
}
"""What is typed after `autoseg`, in the order of its help -> what it runs."""

SUPERVISED = (
    "check",
    "plan_and_preprocess",
    "train",
    "predict",
    "fit",
    "find_best",
    "ensemble",
    "evaluate",
    "postprocess",
    "overlay",
)
"""Verbs that go on without a case that ended their process.

Not `dataset import`: it asks the person at the terminal, which only the first process of a command may.
"""
ONE_OF_SEVERAL = ("TORCHELASTIC_RUN_ID", "AUTOSEG_LED")
"""Variables of processes that train together. Started anew alone, one would wait for the others forever."""

app = typer.Typer(
    help="Segmentation of medical images that configures itself: fingerprint, plan, train, predict, evaluate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
GROUPS = {
    "": app,
    "dataset": typer.Typer(no_args_is_help=True, help="Make raw datasets.", rich_markup_mode=None),
    "augment": typer.Typer(no_args_is_help=True, help="See what augmentations do.", rich_markup_mode=None),
}
for typed, verb in VERBS.items():
    group, _, word = typed.rpartition(" ")
    GROUPS[group].command(word, cls=Command)(verb)
for name in ("dataset", "augment"):
    app.add_typer(GROUPS[name], name=name)


@app.callback(invoke_without_command=True)
def top(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    """Options before the verb."""
    if version:
        print(f"autoseg {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line, the verbs of SUPERVISED in a process of their own; see autoseg/supervise.py."""
    if sys.argv[1:2] and sys.argv[1] in SUPERVISED and os.environ.keys().isdisjoint(ONE_OF_SEVERAL):
        sys.exit(supervise(run))
    run()


def run() -> None:
    """Run the command line here; an AutosegError ends it with code 1, its words, and the traceback of its cause.

    So does an error of the system, see `failures.in_words`.
    """
    # Before torch loads OpenMP: threads that spin while they wait take the cores from whoever they wait for when other
    # programs share the machine, and gained nothing measurable when none did.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The request to save: training answers it; what has nothing to save must not end by it.
    if hasattr(signal, "SIGUSR1") and signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        signal.signal(signal.SIGUSR1, lambda number, frame: None)
    try:
        app()
    except AutosegError as error:
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if (said := in_words(error)) is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        sys.exit(1)
