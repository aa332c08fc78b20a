"""The README's first command: from nothing to scored predictions, as a person would run it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from autoseg.pipeline.demo import CASES, SEED, TEST_CASES, made_before
from autoseg.records import AutosegError


@pytest.mark.slow
def test_the_demo_segments_unseen_vessels(tmp_path):
    # Its own process with all cores: the tests themselves run on one thread.
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    autoseg = Path(sys.executable).with_name("autoseg")
    done = subprocess.run([autoseg, "demo"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((tmp_path / "autoseg_demo" / "predictions" / "summary.json").read_text())
    assert summary["foreground"]["dice"]["mean"] >= 0.85
    assert len(summary["scores"]) == 4
    threshold = float(done.stdout.split("best global intensity threshold: ")[1].split(")")[0])
    assert threshold < 0.6
    again = subprocess.run(
        [autoseg, "demo"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr[-2000:]
    assert "They are there already" in again.stdout
    assert "is trained already" in again.stdout
    assert "4 of 4 cases are predicted already" in again.stdout


def test_vessels_that_were_made_before_are_taken_a_part_is_made_anew_others_are_refused(tmp_path):
    raw = tmp_path / "Dataset900_Vessels"
    assert not made_before(raw)
    part = raw / "imagesTr" / "vessels_003_0000.nii.gz"
    part.parent.mkdir(parents=True)
    part.touch()
    assert not made_before(raw)
    assert not raw.exists(), "it was stopped while they were made"
    raw.mkdir()
    facts = {"numTraining": CASES, "numTest": TEST_CASES, "seed": SEED}
    (raw / "dataset.json").write_text(json.dumps(facts))
    assert made_before(raw)
    (raw / "dataset.json").write_text(json.dumps(facts | {"seed": SEED + 1}))
    with pytest.raises(AutosegError, match="other data than those of the demo"):
        made_before(raw)
    (raw / "dataset.json").rename(raw / "mine.txt")
    with pytest.raises(AutosegError, match="other data"):
        made_before(raw)
    assert (raw / "mine.txt").is_file()
