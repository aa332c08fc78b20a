"""The README's first command: from nothing to scored predictions, as a person would run it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


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
    assert again.returncode == 1
    assert "holds a demo already" in again.stderr
