"""nnU-Net itself trains tiny models and predicts with them, and imported they predict the same.

Runs where there is a Python that has nnU-Net: the one named by AUTOSEG_PEER, or this one. Synthetic images need nothing
else, real ones AUTOSEG_TEST_DATA.

What "the same" is: nnU-Net adds up logits in float16, which moves near ties, by more than the bound of the Dice where a
class is small or the model unsure. So both bounds hold for nnU-Net adding up in float32, nothing else changed, and that
of the voxels for nnU-Net as it is, too.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunet_toys import DATA, agreement

import autoseg
from autoseg.cases import ending_of, find_cases
from autoseg.interop.nnunet import open_nnunet
from autoseg.readers import read_stored

pytestmark = pytest.mark.slow

PLAIN = {"labels": {"background": 0, "shell": 2, "core": 1}}
OVERLAPPING = {"labels": {"background": 0, "whole": [1, 2], "core": 1}, "regions_class_order": [2, 1]}
SYNTHETIC = {
    "isotropic cascade": (
        PLAIN,
        ["3d_fullres", "3d_lowres", "3d_cascade_fullres"],
        ["--spacing", "1.5,1.4,1.6", "--patch", "16,24,24", "--steps", "150"],
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

REAL = {
    "isotropic hippocampus, cascade": (
        "Dataset004_Hippocampus",
        ["hippocampus_017", "hippocampus_019"],
        None,
        ["3d_fullres", "3d_lowres", "3d_cascade_fullres"],
        ["--spacing", "1.1,1.2,1.2", "--patch", "16,24,24", "--steps", "800", "--flips"],
    ),
    "anisotropic heart, residual": (
        "Dataset027_ACDC",
        ["patient011_frame01"],
        None,
        ["2d", "3d_fullres"],
        ["--network", "residual", "--spacing", "9,2.6,2.4", "--patch", "8,48,64", "--steps", "200"],
    ),
    "overlapping regions of tumours, two channels": (
        "Dataset042_BraTS",
        ["brats_2013_pat0003_1"],
        ((60, 156), (104, 200), (54, 118)),
        ["3d_fullres"],
        ["--spacing", "2.4,2.2,2.5", "--patch", "16,24,24"],
    ),
    "coloured nuclei in PNG": (
        "Dataset120_Nuclei",
        ["nuclei_040", "nuclei_070"],
        None,
        ["2d"],
        ["--patch", "64,96"],
    ),
}
"""Dataset, cases to predict, the part of every image to use ((x, x), (y, y), (z, z)), configurations, how to train."""

EQUAL, DICE = 0.9995, 0.999
SETTINGS = ((0, ("0",)), (1, ("0", "1")))
"""Mirroring, folds."""


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


def write_dataset(raw: Path, facts: dict) -> None:
    """Four synthetic training cases and a test case."""
    found = importlib.util.spec_from_file_location("peer", DATA / "peer.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    for seed in range(4):
        module.write_toy(raw, f"toy_{seed}", seed, "Tr")
    module.write_toy(raw, "toy", 9, "Ts")
    content = {"channel_names": {"0": "CT", "1": "MR"}, "numTraining": 4, "file_ending": ".nii.gz", **facts}
    (raw / "dataset.json").write_text(json.dumps(content))


def take_from(real: Path, raw: Path, predicted: list[str], box: tuple[tuple[int, int], ...] | None) -> None:
    """A dataset of the first four cases of another that are not `predicted`, and for testing those; cut to the box."""
    facts = json.loads((real / "dataset.json").read_text())
    ending, channels = facts["file_ending"], len(facts["channel_names"])
    cases = sorted(path.name.removesuffix(ending) for path in (real / "labelsTr").iterdir())
    training = [case for case in cases if case not in predicted][:4]
    assert set(predicted) <= set(cases)

    def take(source: str, target: str, name: str) -> None:
        (raw / target).mkdir(parents=True, exist_ok=True)
        if box is None:
            shutil.copy(real / source / name, raw / target / name)
        else:
            part = sitk.ReadImage(str(real / source / name))[tuple(slice(*ends) for ends in box)]
            sitk.WriteImage(part, str(raw / target / name), True)

    for case, target in [*((case, "imagesTr") for case in training), *((case, "imagesTs") for case in predicted)]:
        for path in (real / "imagesTr").glob(f"{case}_[0-9][0-9][0-9][0-9]{ending}"):
            take("imagesTr", target, path.name)
    for case in training:
        take("labelsTr", "labelsTr", f"{case}{ending}")
    assert len(list((raw / "imagesTs").iterdir())) in (len(predicted), channels * len(predicted))
    (raw / "dataset.json").write_text(json.dumps({**facts, "numTraining": len(training)}))


def compare(
    peer, raw: Path, folder: Path, configurations: list[str], options: list[str], *, as_it_is_too: bool
) -> list[str]:
    """Train by nnU-Net, import, and compare what both predict of the test images of `raw`; where they do not agree.

    configurations: the first stage of a cascade before the second. as_it_is_too: whether Dice must be reached without
    float32 sums as well; where hardly trained networks meet real images, nnU-Net's float16 sums alone cost more.
    """
    work, results = folder / "work", folder / "work" / "results" / raw.name
    faults = []
    peer("train", raw, work, "--configurations", ",".join(configurations), "--folds", "0,1", *options)
    cases = find_cases(raw / "imagesTs", len(json.loads((raw / "dataset.json").read_text())["channel_names"]))
    files = {case.id: f"{case.id}{ending_of(Path(case.images[0]))}" for case in cases}
    for configuration in configurations:
        (model,) = results.glob(f"*__{configuration}")
        for mirror, folds in SETTINGS:
            # The first stage of a cascade predicts with all folds.
            used = ("0", "1") if configuration == "3d_lowres" else folds
            earlier = ["--earlier", folder / f"3d_lowres_{mirror}"] if "cascade" in configuration else []
            target = folder / f"{configuration}_{mirror}"
            how = ["--folds", ",".join(used), "--mirror", mirror, "--work", work, "--float32", *earlier]
            peer("predict", model, raw / "imagesTs", target, *how)
            open_nnunet(results, configuration, used).write(folder / "m.autoseg")
            loaded = autoseg.load(folder / "m.autoseg", device="cpu")
            for case in cases:
                found = loaded.predict(list(case.images), mirror=bool(mirror), postprocess=False).labels
                # A picture has no Z here, and Z = 1 as it is read.
                found = found.reshape((1,) * (3 - found.ndim) + found.shape)
                in_float32, as_it_is = (labels_in(place / files[case.id]) for place in (target / "float32", target))
                what = f"{configuration} folds {','.join(used)} mirrored {mirror} {case.id}"
                equal, dice = measured(f"{what}, float32", found, in_float32)
                if not dice:
                    faults.append(f"{what}: no class has more than 1000 voxels, so nothing is compared")
                elif equal < EQUAL or min(dice.values()) < DICE:
                    faults.append(f"{what}, float32")
                equal, dice = measured(f"{what}, as it is", found, as_it_is)
                if equal < EQUAL or (as_it_is_too and min(dice.values(), default=0) < DICE):
                    faults.append(f"{what}, as it is")
        for file in files.values():
            # Else a model that heeds neither folds nor mirroring would pass.
            plain, mirrored = (labels_in(folder / f"{configuration}_{mirror}" / "float32" / file) for mirror in (0, 1))
            equal, dice = agreement(plain, mirrored)
            if equal >= EQUAL and min(dice.values(), default=0) >= DICE:
                faults.append(f"{configuration} {file}: mirroring changes nothing")
    return faults


def labels_in(path: Path) -> np.ndarray:
    """Labels (Z, Y, X) in the axes of the file."""
    return read_stored(path).array[0]


def measured(what: str, found: np.ndarray, expected: np.ndarray) -> tuple[float, dict[int, float]]:
    """`agreement`, and a line that says it (`pytest -rP` shows them)."""
    equal, dice = agreement(found, expected)
    worst = f"{min(dice.values()):.5f}" if dice else "none"
    print(f"{what}: {100 * equal:.4f} % equal, {(found != expected).sum()} voxels differ, smallest Dice {worst}")
    return equal, dice


@pytest.mark.parametrize("name", SYNTHETIC)
def test_imported_models_predict_what_nnunet_predicts(tmp_path, peer, name):
    facts, configurations, options = SYNTHETIC[name]
    raw = tmp_path / "Dataset001_Toy"
    write_dataset(raw, facts)
    options = ["--features", "4,6,6", "--thin", "--steps", "60", *options]
    assert not compare(peer, raw, tmp_path, configurations, options, as_it_is_too=True)


@pytest.mark.parametrize("name", REAL)
def test_imported_models_predict_real_images_as_nnunet_does(tmp_path, peer, real_data, name):
    dataset, predicted, box, configurations, options = REAL[name]
    raw = tmp_path / dataset
    take_from(real_data / dataset, raw, predicted, box)
    options = ["--features", "6,8,8", "--thin", "--steps", "60", *options]
    assert not compare(peer, raw, tmp_path, configurations, options, as_it_is_too=False)
