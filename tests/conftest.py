"""Fixtures for all tests."""

import os
import sys
from pathlib import Path

import pytest

# Tests work on tiny tensors, where threads only wait for one another; before torch is loaded, or it has no effect.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# `toys` and fixtures shared by two files; importlib mode puts no test folder on the path by itself.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def real_data() -> Path:
    """Folder of real datasets; the test is skipped where there is none."""
    folder = os.environ.get("AUTOSEG_TEST_DATA")
    if not folder:
        pytest.skip("AUTOSEG_TEST_DATA is not set: no real images here")
    return Path(folder)
