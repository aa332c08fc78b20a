"""nnU-Net itself trains tiny models and predicts with them, and imported they predict the same.

Runs where there is a Python that has nnU-Net: the one named by AUTOSEG_PEER, or this one.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from nnunet_toys import DATA, agreement

import autoseg
from autoseg.interop.nnunet import open_nnunet
from autoseg.readers import read_stored

pytestmark = pytest.mark.slow

PLAIN = {"labels": {"background": 0, "shell": 2, "core": 1}}
OVERLAPPING = {"labels": {"background": 0, "whole": [1, 2], "core": 1}, "regions_class_order": [2, 1]}
MODELS = {
    "isotropic cascade": (
        PLAIN,
        ["3d_fullres", "3d_lowres", "3d_cascade_fullres"],
        ["--spacing", "1.5,1.4,1.6", "--patch", "16,24,24"],
    ),
    "anisotropic residual": (
        PLAIN,
        ["2d", "3d_fullres"],
        ["--network", "residual", "--spacing", "3.2,1.3,1.2", "--patch", "8,24,24"],
    ),
    "regions, resampled by torch": (
        OVERLAPPING,
        ["3d_fullres"],
        ["--linear", "--spacing", "3.2,1.3,1.2", "--patch", "8,24,24"],
    ),
    "reoriented by the reader": (
        PLAIN,
        ["3d_fullres"],
        ["--reader", "NibabelIOWithReorient", "--spacing", "3.2,1.3,1.2", "--patch", "8,24,24"],
    ),
}


@pytest.fixture
def peer():
    """Runs tests/data/nnunet/peer.py."""
    python = os.environ.get("AUTOSEG_PEER") or (sys.executable if importlib.util.find_spec("nnunetv2") else None)
    if python is None:
        pytest.skip("AUTOSEG_PEER names no Python that has nnunetv2, and it is not installed here")

    def run(*arguments):
        done = subprocess.run([python, DATA / "peer.py", *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]

    return run


def write_dataset(raw: Path, facts: dict) -> list[Path]:
    """Four synthetic training cases; returns the channels of a test case."""
    found = importlib.util.spec_from_file_location("peer", DATA / "peer.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    for seed in range(4):
        module.write_toy(raw, f"toy_{seed}", seed, "Tr")
    module.write_toy(raw, "toy", 9, "Ts")
    content = {"channel_names": {"0": "CT", "1": "MR"}, "numTraining": 4, "file_ending": ".nii.gz", **facts}
    (raw / "dataset.json").write_text(json.dumps(content))
    return sorted((raw / "imagesTs").iterdir())


@pytest.mark.parametrize("name", MODELS)
def test_imported_models_predict_what_nnunet_predicts(tmp_path, peer, name):
    facts, configurations, options = MODELS[name]
    raw, work = tmp_path / "Dataset001_Toy", tmp_path / "work"
    image = write_dataset(raw, facts)
    small = ["--features", "4,6,6", "--thin", "--steps", "60", "--folds", "0,1"]
    peer("train", raw, work, "--configurations", ",".join(configurations), *options, *small)
    results = work / "results" / raw.name
    for mirror, folds in ((0, ("0",)), (1, ("0", "1"))):
        for configuration in configurations:
            (model,) = results.glob(f"*__{configuration}")
            # The first stage of a cascade predicts with all folds.
            used = ("0", "1") if configuration == "3d_lowres" else folds
            earlier = ["--earlier", tmp_path / f"3d_lowres_m{mirror}"] if "cascade" in configuration else []
            target = tmp_path / f"{configuration}_m{mirror}"
            how = ["--folds", ",".join(used), "--mirror", mirror, "--work", work]
            peer("predict", model, raw / "imagesTs", target, *how, *earlier)
            expected = read_stored(target / "toy.nii.gz").array[0]
            assert len(set(expected.ravel().tolist())) > 1, "the model has learnt nothing"

            open_nnunet(results, configuration, used).write(tmp_path / "m.autoseg")
            loaded = autoseg.load(tmp_path / "m.autoseg", device="cpu")
            found = loaded.predict(image, mirror=bool(mirror), postprocess=False).labels
            equal, dice = agreement(found, expected)
            assert equal >= 0.9995 and min(dice.values(), default=1.0) >= 0.999, (configuration, mirror, equal, dice)
