"""Writes plans.json: what nnU-Net's planners decide for invented fingerprints, to compare ours with.

Runs only where nnunetv2 is installed (2.8.1 was used): `python make_plans.py`, beside this file. Networks are built
on the meta device, so that counting their activations takes no memory. Shapes and spacings run in (Z, Y, X).
"""

import contextlib
import io
import json
import os
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

CT = {"mean": 40.0, "median": 38.0, "std": 30.0, "min": -900.0, "max": 1200.0,
      "percentile_00_5": -80.0, "percentile_99_5": 190.0}  # fmt: skip

EVERY = ("unet", "resenc_m", "resenc_l", "resenc_xl")


def case(
    name, groups, *, classes=3, channels=("T1",), dimension=3, crop_ratio=1.0, presets=EVERY, gb=None, spacing=None
):
    """One fingerprint and how to plan it. `groups`: (number of cases, shape, spacing in mm)."""
    return {
        "name": name, "dimension": dimension, "channels": list(channels), "classes": classes, "crop_ratio": crop_ratio,
        "groups": [{"count": n, "shape": list(shape), "spacing_mm": list(mm)} for n, shape, mm in groups],
        "presets": list(presets), "gpu_memory_gb": gb, "spacing_mm": spacing,
    }  # fmt: skip


CASES = [
    case("cardiac-thick-slices", [(61, (9, 256, 216), (10.0, 1.5625, 1.5625)), (30, (10, 232, 288), (10.0, 1.37, 1.37)),
                                  (14, (17, 224, 224), (5.0, 1.68, 1.68))], classes=4),
    case("thick-slices-floor", [(20, (12, 320, 300), (6.5, 1.5, 1.25)), (5, (60, 320, 300), (1.0, 1.5, 1.25))]),
    case("prostate-two-channels", [(32, (20, 320, 320), (3.6, 0.625, 0.625))], channels=("T2", "ADC")),
    case("coarse-axis-last", [(40, (300, 280, 40), (0.8, 0.9, 4.0)), (41, (310, 260, 36), (0.75, 0.9, 5.0))]),
    case("coarse-axis-middle", [(9, (210, 35, 190), (1.0, 3.3, 1.2))], classes=2),
    case("brain-cropped", [(100, (140, 171, 137), (1.0, 1.0, 1.0)), (100, (133, 168, 141), (1.0, 1.0, 1.0))],
         classes=4, channels=("FLAIR", "T1", "T1ce", "T2"), crop_ratio=0.15),
    case("abdomen-ct-lowres", [(70, (432, 512, 512), (1.0, 0.77, 0.77)), (61, (123, 512, 512), (5.0, 0.74, 0.74))],
         channels=("CT",)),
    case("chest-ct-thin-lowres", [(25, (330, 512, 512), (1.25, 0.7, 0.7))], classes=2, channels=("CT",)),
    case("lowres-coarse-axis", [(30, (110, 640, 640), (4.0, 0.7, 0.7))], classes=2, presets=("unet", "resenc_l")),
    case("lowres-few-cases", [(3, (400, 420, 440), (0.5, 0.5, 0.5))], presets=("unet", "resenc_m")),
    case("lowres-not-worth-it", [(40, (190, 214, 214), (1.0, 1.0, 1.0))], presets=("unet", "resenc_m")),
    case("many-classes", [(50, (260, 250, 280), (1.5, 1.5, 1.5))], classes=105, channels=("CT",),
         presets=("unet", "resenc_l")),
    case("small-odd", [(11, (19, 31, 23), (2.0, 1.0, 1.5)), (1, (20, 30, 24), (2.1, 1.0, 1.5))]),
    case("half-voxel-medians", [(3, (15, 8, 31), (1.0, 1.0, 1.0)), (3, (16, 7, 32), (1.0, 1.0, 1.0))]),
    case("thin-slab", [(24, (5, 400, 380), (4.0, 0.5, 0.5))], classes=2),
    case("two-slices", [(24, (2, 128, 96), (3.0, 1.0, 1.0))], classes=2),
    case("single-slices-stored-3d", [(24, (1, 500, 600), (3.0, 0.5, 0.5))], classes=2),
    case("memory-2gb", [(20, (115, 320, 232), (1.37, 1.25, 1.25))], gb=2),
    case("memory-11gb", [(61, (9, 256, 216), (10.0, 1.5625, 1.5625))], gb=11),
    case("memory-13.7gb-lowres", [(25, (330, 512, 512), (1.25, 0.7, 0.7))], gb=13.7, presets=("unet", "resenc_m")),
    case("memory-80gb", [(131, (482, 512, 512), (1.0, 0.7676, 0.7676))], gb=80, presets=("unet", "resenc_xl")),
    case("spacing-asked-for", [(20, (115, 320, 232), (1.37, 1.25, 1.25))], spacing=[2.0, 1.0, 0.9]),
    case("spacing-asked-for-turns-axes", [(20, (60, 200, 180), (3.0, 1.0, 1.0))], spacing=[1.0, 1.0, 3.0]),
    case("photographs", [(300, (1, 512, 640), (1.0, 1.0, 1.0)), (61, (1, 1000, 1000), (1.0, 1.0, 1.0))], classes=2,
         channels=("R", "G", "B"), dimension=2),
    case("radiographs", [(40, (1, 3000, 2500), (1.0, 0.143, 0.143)), (20, (1, 2500, 2048), (1.0, 0.168, 0.168))],
         dimension=2),
    case("tiles-with-flat-pixels", [(670, (1, 256, 320), (1.0, 2.5, 1.0))], classes=2, dimension=2),
]  # fmt: skip


def dataset(folder, spec):
    """Lay out the files that a planner reads: dataset.json and the fingerprint."""
    raw, prepared = folder / "raw" / "Dataset001_Toy", folder / "prepared" / "Dataset001_Toy"
    raw.mkdir(parents=True)
    prepared.mkdir(parents=True)
    cases = [group for group in spec["groups"] for _ in range(group["count"])]
    (raw / "dataset.json").write_text(json.dumps({
        "channel_names": {str(i): name for i, name in enumerate(spec["channels"])},
        "labels": {"background": 0} | {f"class{i}": i for i in range(1, spec["classes"])},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "SimpleITKIO",
        "dataset": {"toy": {"images": ["toy_0000.nii.gz"], "label": "toy.nii.gz"}},
    }))  # fmt: skip
    (prepared / "dataset_fingerprint.json").write_text(json.dumps({
        # A 2D image has no through-plane spacing; 999 stands for one there.
        "spacings": [[999.0, *c["spacing_mm"][1:]] if spec["dimension"] == 2 else c["spacing_mm"] for c in cases],
        "shapes_after_crop": [c["shape"] for c in cases],
        "foreground_intensity_properties_per_channel": {str(i): CT for i in range(len(spec["channels"]))},
        "median_relative_size_after_cropping": spec["crop_ratio"],
    }))  # fmt: skip


def decide(folder, spec, preset):
    """The decisions of one planner, under the names of our records."""
    import torch
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
    from nnunetv2.experiment_planning.experiment_planners.residual_unets import residual_encoder_unet_planners as resenc

    planners = {
        "unet": ExperimentPlanner,
        "resenc_m": resenc.nnUNetPlannerResEncM,
        "resenc_l": resenc.nnUNetPlannerResEncL,
        "resenc_xl": resenc.nnUNetPlannerResEncXL,
    }
    options = {} if spec["gpu_memory_gb"] is None else {"gpu_memory_target_in_gb": spec["gpu_memory_gb"]}
    planner = planners[preset](1, overwrite_target_spacing=spec["spacing_mm"], **options)
    with torch.device("meta"):
        planner.plan_experiment()
    plan = json.loads((folder / "prepared" / "Dataset001_Toy" / f"{planner.plans_identifier}.json").read_text())
    configurations = {}
    for name, found in plan["configurations"].items():
        parent = found.get("inherits_from")
        found = plan["configurations"].get(parent, {}) | found
        network = found["architecture"]["arch_kwargs"]
        decoder = network["n_conv_per_stage_decoder"]
        encoder = network["n_conv_per_stage" if "n_conv_per_stage" in network else "n_blocks_per_stage"]
        configurations[name] = {
            "spacing_mm": found["spacing"],
            "median_shape": found["median_image_size_in_voxels"],
            "patch": found["patch_size"],
            "batch_size": found["batch_size"],
            "batch_dice": found["batch_dice"],
            "previous_stage": found.get("previous_stage"),
            "features": network["features_per_stage"],
            "strides": network["strides"],
            "kernels": network["kernel_sizes"],
            "encoder_blocks": encoder,
            "decoder_blocks": decoder,
        }
    first = plan["configurations"]["2d"]
    return {
        "axis_order": plan["transpose_forward"],
        "schemes": first["normalization_schemes"],
        "masked": first["use_mask_for_norm"],
        "configurations": configurations,
    }


def main():
    """Plan everything and write plans.json beside this file."""
    warnings.simplefilter("ignore")
    recorded = []
    for spec in CASES:
        with tempfile.TemporaryDirectory() as folder:
            for variable, part in (("raw", "raw"), ("preprocessed", "prepared"), ("results", "runs")):
                os.environ[f"nnUNet_{variable}"] = str(Path(folder) / part)
            dataset(Path(folder), spec)
            with contextlib.redirect_stdout(io.StringIO()):
                expected = {preset: decide(Path(folder), spec, preset) for preset in spec["presets"]}
        print(spec["name"], {preset: list(found["configurations"]) for preset, found in expected.items()}, flush=True)
        recorded.append({key: value for key, value in spec.items() if key != "presets"} | {"expected": expected})
    text = {"made_with": f"nnunetv2 {version('nnunetv2')}", "cases": recorded}
    Path(__file__).with_name("plans.json").write_text(json.dumps(text) + "\n")


if __name__ == "__main__":
    main()
