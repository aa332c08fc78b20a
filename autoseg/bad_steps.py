"""Steps whose loss was not finite: what was in them is written down, and a few in a row end the run."""

import json
from collections.abc import Sequence
from pathlib import Path

from autoseg.records import AutosegError
from autoseg.sampling import Batch

BAD_STEPS = "bad_steps.jsonl"


def record_bad_step(folder: Path, batch: Batch) -> None:
    """Keep what is needed to look at a batch whose loss was not finite."""
    line = {
        "step": batch.step,
        "patches": [{"case": p.case, "start": p.box.start, "stop": p.box.stop} for p in batch.patches],
    }
    with (folder / BAD_STEPS).open("a") as file:
        file.write(json.dumps(line) + "\n")


def refuse_many(bad: Sequence[Batch], most: int, folder: Path) -> None:
    """AutosegError that names the cases if as many as `most` batches in a row were bad."""
    if len(bad) >= most:
        raise AutosegError(
            f"the loss or its gradient was not finite in {len(bad)} steps in a row (step {bad[-1].step}); cases "
            f"involved: {culprits(bad)}. Look at them (`autoseg check`; {folder / BAD_STEPS} has the patches), "
            "or lower the rate in a new run: --run NAME --set learning_rate=0.001"
        )


def culprits(bad: Sequence[Batch]) -> str:
    """The cases that all bad batches share, or all of them."""
    shared = set(bad[0].cases).intersection(*(batch.cases for batch in bad))
    return ", ".join(sorted(shared or {case for batch in bad for case in batch.cases})[:8])
