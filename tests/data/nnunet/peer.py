"""Trains tiny models with nnU-Net v2 itself and predicts with them; run by a Python that has the package nnunetv2.

    python peer.py train RAW WORK --network plain|residual --configurations 2d,3d_fullres,... --folds 0,1 \
        --spacing 2,1.5,1.5 --patch 16,32,32 --features 8,16,24 --steps 40
    python peer.py predict MODEL INPUT OUTPUT --folds 0,1 --mirror 1 [--earlier FOLDER] [--float32]
    python peer.py toys WORK

`train` fingerprints and plans the dataset folder RAW as nnU-Net does, makes the networks small, takes a few steps on
random patches and lets the trainer save its checkpoint, so that every file is one that nnU-Net wrote.
nnU-Net adds up the logits of tiles in float16. With --float32, what it predicts where it adds them up in float32, and
does nothing else otherwise, stands in OUTPUT/float32, made from the labels in FOLDER/float32.
`toys` makes what the tests beside it read: see README.md.
"""

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from unittest.mock import patch

import numpy as np


def environment(work: Path) -> None:
    """nnU-Net finds its folders by environment variables, which must be set before it is imported."""
    folders = {name: str(work / name) for name in ("raw", "preprocessed", "results")}
    for name, value in {**folders, "compile": "f", "n_proc_DA": "1"}.items():
        os.environ[f"nnUNet_{name}"] = value
    for folder in folders.values():
        Path(folder).mkdir(parents=True, exist_ok=True)


def make_plans(raw: Path, work: Path, args: argparse.Namespace) -> dict:
    """Fingerprint and plan by nnU-Net, then every configuration made small; 3d_lowres and a cascade on demand."""
    from batchgenerators.utilities.file_and_folder_operations import load_json
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
    from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
        ResEncUNetPlanner,
    )

    link = work / "raw" / raw.name
    if link.resolve() != raw.resolve():
        link.unlink(missing_ok=True)
        link.symlink_to(raw)
    extractor = DatasetFingerprintExtractor(raw.name, num_processes=1)
    # Its 100 million draws take minutes, and a few cases have fewer voxels.
    extractor.num_foreground_voxels_for_intensitystats = 1e5
    extractor.run(overwrite_existing=False)
    planner = (ExperimentPlanner if args.network == "plain" else ResEncUNetPlanner)(raw.name)
    plans = planner.plan_experiment()
    shutil.copy(raw / "dataset.json", work / "preprocessed" / raw.name / "dataset.json")
    plans = load_json(work / "preprocessed" / raw.name / f"{plans['plans_name']}.json")
    if args.order:
        plans["transpose_forward"] = args.order
        plans["transpose_backward"] = [args.order.index(i) for i in range(3)]
    if args.reader:
        plans["image_reader_writer"] = args.reader

    for configuration in plans["configurations"].values():
        if "architecture" in configuration:
            shrink(configuration, args)
    if any("lowres" in name or "cascade" in name for name in args.configurations):
        full = plans["configurations"]["3d_fullres"]
        low = deepcopy(full)
        low["spacing"] = [1.7 * edge for edge in full["spacing"]]
        low["data_identifier"] = f"{plans['plans_name']}_3d_lowres"
        low["next_stage"] = "3d_cascade_fullres"
        plans["configurations"]["3d_lowres"] = low
        plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    return plans


def shrink(configuration: dict, args: argparse.Namespace) -> None:
    """Few features, few stages, a small patch, another spacing."""
    dimension, stages = len(configuration["patch_size"]), len(args.features)
    network = configuration["architecture"]["arch_kwargs"]
    network["n_stages"], network["features_per_stage"] = stages, args.features
    for key in ("kernel_sizes", "strides", "n_conv_per_stage", "n_blocks_per_stage"):
        if key in network:
            network[key] = network[key][:stages]
    if "n_blocks_per_stage" in network:
        network["n_blocks_per_stage"] = [min(blocks, 2) for blocks in network["n_blocks_per_stage"]]
    network["n_conv_per_stage_decoder"] = network["n_conv_per_stage_decoder"][: stages - 1]
    if args.thin:
        for key in network.keys() & {"n_conv_per_stage", "n_blocks_per_stage", "n_conv_per_stage_decoder"}:
            network[key] = [1] * len(network[key])
    divisor = np.prod(network["strides"], axis=0)
    wanted = args.patch[-dimension:] or configuration["patch_size"]
    configuration["patch_size"] = [int(-(-edge // unit) * unit) for edge, unit in zip(wanted, divisor)]
    if args.spacing:
        configuration["spacing"] = args.spacing[-dimension:]
    if args.linear:
        # As nnU-Net's planners with torchres in their names do.
        for kind in ("data", "seg", "probabilities"):
            configuration[f"resampling_fn_{kind}"] = "resample_torch_fornnunet"
            given = {"is_seg": kind == "seg", "force_separate_z": False, "memefficient_seg_resampling": False}
            configuration[f"resampling_fn_{kind}_kwargs"] = given


def train(raw: Path, work: Path, args: argparse.Namespace) -> None:
    """One results folder a configuration, with a checkpoint a fold."""
    environment(work)
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    torch.set_num_threads(1)
    plans = make_plans(raw, work, args)
    dataset = json.loads((raw / "dataset.json").read_text())
    manager = PlansManager(plans)
    for name in args.configurations:
        configuration = manager.get_configuration(name)
        cases = prepared(raw, dataset, manager, configuration, args.cases)
        # The trainer asks which kind of files its data are in, though it is not to read any.
        folder = work / "preprocessed" / raw.name / configuration.data_identifier
        folder.mkdir(exist_ok=True)
        (folder / "none.b2nd").touch()
        for fold in args.folds:
            rng = np.random.default_rng(fold)
            torch.manual_seed(fold)
            given = deepcopy(plans)
            given["continue_training"] = False
            trainer = nnUNetTrainer(given, name, fold, deepcopy(dataset), device=torch.device("cpu"))
            trainer.initialize()
            trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
            take_steps(trainer, cases, configuration, args.steps, rng, args.flips)
            folder = Path(trainer.output_folder)
            trainer.save_checkpoint(str(folder / "checkpoint_final.pth"))
            for file, content in (("plans.json", plans), ("dataset.json", dataset)):
                (folder.parent / file).write_text(json.dumps(content, indent=1))
            (folder.parent / "dataset_fingerprint.json").write_text("{}")
            print(f"model {folder.parent} fold {fold}", flush=True)


def prepared(raw: Path, dataset: dict, manager, configuration, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images and labels as nnU-Net prepares them."""
    preprocessor = configuration.preprocessor_class(verbose=False)
    ending, found = dataset["file_ending"], []
    for label in sorted((raw / "labelsTr").glob(f"*{ending}"))[:count]:
        case = label.name[: -len(ending)]
        images = sorted(str(path) for path in (raw / "imagesTr").glob(f"{case}_[0-9][0-9][0-9][0-9]{ending}"))
        data, labels, _ = preprocessor.run_case(images, str(label), manager, configuration, dataset)
        found.append((data, labels[0]))
    return found


def take_steps(trainer, cases, configuration, steps: int, rng: np.random.Generator, flips: bool) -> None:
    """A few optimizer steps on random patches, half of them centred on foreground; flips: also on mirror images."""
    import torch

    patch, manager = tuple(configuration.patch_size), trainer.label_manager
    strides = np.cumprod(configuration.pool_op_kernel_sizes, axis=0)[:-1]
    for group in trainer.optimizer.param_groups:
        group["momentum"] = 0.9
    for step in range(steps):
        images, targets = [], []
        for sample in range(2):
            data, labels = cases[rng.integers(len(cases))]
            if configuration.previous_stage_name is not None:
                # A prior that is right but for one voxel.
                prior = np.roll(labels, rng.integers(-1, 2, 3), (0, 1, 2))
                data = np.concatenate([data, np.stack([prior == value for value in manager.foreground_labels])])
            window = (1,) * (3 - len(patch)) + patch
            wide = [(0, max(0, edge - size)) for edge, size in zip(window, labels.shape)]
            data = np.pad(data, ((0, 0), *wide))
            labels = np.pad(labels, wide)
            centres = np.argwhere(labels > 0)
            middle = centres[rng.integers(len(centres))] if sample and len(centres) else rng.integers(labels.shape)
            corner = [int(np.clip(m - e // 2, 0, n - e)) for m, e, n in zip(middle, window, labels.shape)]
            box = tuple(slice(c, c + e) for c, e in zip(corner, window))
            image, target = data[(slice(None), *box)].reshape(-1, *patch), np.maximum(labels[box].reshape(patch), 0)
            if flips:
                turn = tuple(slice(None, None, -1 if rng.integers(2) else 1) for _ in patch)
                image, target = image[(slice(None), *turn)], target[turn]
            images.append(image)
            if manager.has_regions:
                targets.append(np.stack([np.isin(target, region) for region in manager.foreground_regions]))
            else:
                targets.append(target[None])
        image = torch.from_numpy(np.stack(images).astype(np.float32))
        target = torch.from_numpy(np.stack(targets).astype(np.float32))
        scales = [target[(..., *(slice(None, None, int(s)) for s in stride))] for stride in strides]
        trainer.optimizer.zero_grad()
        loss = trainer.loss(trainer.network(image), scales)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.network.parameters(), 12)
        trainer.optimizer.step()
        if step % 10 == 9:
            print(f"step {step + 1} loss {loss.item():.3f}", flush=True)


TOY_ORIENTATION = (0, 0, 1, -1, 0, 0, 0, 1, 0)
"""Of the toys' files: no axis lies as in the canonical orientation."""


def write_toy(folder: Path, case: str, seed: int, split: str) -> None:
    """A CT-like and an MR-like channel of a core within a shell, in a border of zeros; the middle axis is coarse."""
    import SimpleITK as sitk

    rng = np.random.default_rng(seed)
    shape, spacing = (40 + seed % 3, 13, 44), np.array([1.0, 3.6, 0.9])
    at = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1) * spacing
    middle = np.array(shape) * spacing / 2 + rng.uniform(-2, 2, 3)
    distance = np.sqrt((((at - middle) / np.array([1.0, 1.1, 0.9])) ** 2).sum(-1))
    labels = np.select([distance < 7.5, distance < 13], [1, 2], 0)
    body = ((at > 4) & (at < np.array(shape) * spacing - 4)).all(-1)
    for channel, levels in enumerate(([-60, 90, 30], [10, 12, 24])):
        image = np.asarray(levels)[labels] + np.rint(rng.normal(0, [14, 2][channel], shape))
        stored = sitk.GetImageFromArray((image * body).astype(np.int16))
        stored.SetSpacing([float(edge) for edge in spacing[::-1]])
        stored.SetOrigin((12.0, -30.0, 4.5))
        stored.SetDirection(TOY_ORIENTATION)
        path = folder / f"images{split}" / f"{case}_{channel:04d}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(stored, str(path), True)
    if split == "Tr":
        stored = sitk.GetImageFromArray((labels * body).astype(np.uint8))
        stored.CopyInformation(sitk.ReadImage(str(path)))
        (folder / "labelsTr").mkdir(exist_ok=True)
        sitk.WriteImage(stored, str(folder / "labelsTr" / f"{case}.nii.gz"), True)


TOYS = {
    # A plain U-Net in two stages; the labels are not listed in the order of their values.
    "Dataset001_Cascade": (
        {"labels": {"background": 0, "shell": 2, "core": 1}},
        ["--configurations", "3d_lowres,3d_cascade_fullres", "--folds", "0,1", "--patch", "8,24,24"],
    ),
    "Dataset002_Residual": (
        {"labels": {"background": 0, "core": 1, "shell": 2}},
        ["--configurations", "2d", "--network", "residual", "--patch", "24,32"],
    ),
    "Dataset003_Regions": (
        {"labels": {"background": 0, "whole": [1, 2], "core": 1}, "regions_class_order": [2, 1]},
        ["--configurations", "3d_fullres", "--patch", "8,24,24"],
    ),
}


def toys(work: Path) -> None:
    """Everything beside this file, under work/fixture: the zips that nnU-Net exports, an image, and its predictions."""
    for name, (facts, options) in TOYS.items():
        raw = work / "toys" / name
        for seed in range(4):
            write_toy(raw, f"toy_{seed}", seed, "Tr")
        write_toy(raw, "toy", 9, "Ts")
        content = {"channel_names": {"0": "CT", "1": "MR"}, "numTraining": 4, "file_ending": ".nii.gz", **facts}
        (raw / "dataset.json").write_text(json.dumps(content))
        small = ["--features", "4,6,6", "--thin", "--steps", "150", "--spacing", "3.2,1.3,1.2"]
        main(["train", str(raw), str(work), *options, *small])
        models = sorted((work / "results" / name).glob("*__*__*"), key=lambda path: "cascade" in path.name)
        export_toy(work, raw, models)
        predict_toy(work, raw, {model.name.rpartition("__")[2]: model for model in models})


def export_toy(work: Path, raw: Path, models: list[Path]) -> None:
    """Fit nnU-Net's post-processing, on the training cases, and let it export the models of one dataset."""
    from nnunetv2.model_sharing.model_export import export_pretrained_model
    from nnunetv2.postprocessing.remove_connected_components import determine_postprocessing

    trainer, plans = models[0].name.split("__")[:2]
    folds = tuple(int(path.name.removeprefix("fold_")) for path in sorted(models[0].glob("fold_*")))
    for model in models:
        for fold in folds:
            # The export asks for these, whatever is in them.
            (model / f"fold_{fold}" / "progress.png").touch()
            (model / f"fold_{fold}" / "validation").mkdir(exist_ok=True)
            (model / f"fold_{fold}" / "validation" / "summary.json").write_text("{}")
        crossed = model / f"crossval_results_folds_{'_'.join(map(str, folds))}"
        options = ["--folds", ",".join(map(str, folds)), "--mirror", "0", "--work", str(work)]
        if "cascade" in model.name:
            options += ["--earlier", str(crossed).replace("3d_cascade_fullres", "3d_lowres")]
        main(["predict", str(model), str(raw / "imagesTr"), str(crossed), *options])
        determine_postprocessing(str(crossed), str(raw / "labelsTr"), None, None, 1, False)
    (work / "fixture").mkdir(exist_ok=True)
    names = tuple(model.name.split("__")[2] for model in models)
    export_pretrained_model(raw.name, str(work / "fixture" / f"{raw.name}.zip"), names, trainer, plans, folds)


def predict_toy(work: Path, raw: Path, models: dict[str, Path]) -> None:
    """What nnU-Net predicts of the test image: each configuration, some folds, with and without mirroring."""
    for image in sorted((raw / "imagesTs").glob("*.nii.gz")):
        shutil.copy(image, work / "fixture" / image.name)
    for configuration in sorted(models, key=lambda name: "cascade" in name):
        for folds, mirror in (("0", 0), ("0,1", 1)) if "Cascade" in raw.name else (("0", 0), ("0", 1)):
            named = f"{raw.name}_{{}}_f{folds.replace(',', '')}_m{mirror}"
            target = work / "predicted" / named.format(configuration)
            options = ["--folds", folds, "--mirror", str(mirror), "--work", str(work)]
            if "cascade" in configuration:
                # autoseg takes all folds of the earlier stage.
                every = f"{raw.name}_3d_lowres_all_m{mirror}"
                earlier = work / "predicted" / every
                first = str(models["3d_lowres"]), str(raw / "imagesTs"), str(earlier)
                main(["predict", *first, "--folds", "0,1", "--mirror", str(mirror), "--work", str(work)])
                options += ["--earlier", str(earlier)]
            main(["predict", str(models[configuration]), str(raw / "imagesTs"), str(target), *options])
            shutil.copy(target / "toy.nii.gz", work / "fixture" / f"{named.format(configuration)}.nii.gz")


def predict(model: Path, source: Path, target: Path, args: argparse.Namespace) -> None:
    """Predict a folder by nnU-Net."""
    environment(Path(args.work or target / ".work"))
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    torch.set_num_threads(1)
    predictor = nnUNetPredictor(use_mirroring=bool(args.mirror), device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), tuple(args.folds))

    def run(target: Path, earlier: Path | None) -> None:
        target.mkdir(parents=True, exist_ok=True)
        before = str(earlier) if earlier else None
        predictor.predict_from_files_sequential(str(source), str(target), folder_with_segs_from_prev_stage=before)

    run(target, args.earlier)
    if args.float32:
        with in_float32(predictor):
            run(target / "float32", args.earlier / "float32" if args.earlier else None)


@contextmanager
def in_float32(predictor) -> Iterator[None]:
    """Let the predictor add up logits and their weights in float32; AssertionError if it does not."""
    import nnunetv2.inference.predict_from_raw_data as module
    import torch

    weights, logits = module.compute_gaussian, predictor.predict_logits_from_preprocessed_data

    def wide(*args, **options):
        return weights(*args, **{**options, "dtype": torch.float32})

    def checked(*args, **options):
        found = logits(*args, **options)
        assert found.dtype == torch.float32, f"nnU-Net added up in {found.dtype}, though told otherwise"
        return found

    wide.cache_clear = weights.cache_clear
    with (
        patch.object(torch, "half", torch.float32),
        patch.object(module, "compute_gaussian", wide),
        patch.object(predictor, "predict_logits_from_preprocessed_data", checked),
    ):
        yield


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",") if part]


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("train")
    verb.add_argument("raw", type=Path)
    verb.add_argument("work", type=Path)
    verb.add_argument("--network", default="plain")
    verb.add_argument("--configurations", type=lambda text: text.split(","), default=["3d_fullres"])
    verb.add_argument("--folds", type=integers, default=[0])
    verb.add_argument("--spacing", type=numbers, default=[])
    verb.add_argument("--patch", type=integers, default=[])
    verb.add_argument("--features", type=integers, default=[8, 16, 24])
    verb.add_argument("--order", type=integers, default=[])
    verb.add_argument("--reader", default="")
    verb.add_argument("--linear", action="store_true", help="resample by torch")
    verb.add_argument("--steps", type=int, default=40)
    verb.add_argument("--flips", action="store_true", help="learn from mirror images too")
    verb.add_argument("--cases", type=int, default=6)
    verb.add_argument("--thin", action="store_true", help="one block a stage")
    verb = verbs.add_parser("predict")
    verb.add_argument("model", type=Path)
    verb.add_argument("source", type=Path)
    verb.add_argument("target", type=Path)
    verb.add_argument("--folds", type=integers, default=[0])
    verb.add_argument("--mirror", type=int, default=1)
    verb.add_argument("--earlier", type=Path)
    verb.add_argument("--float32", action="store_true")
    verb.add_argument("--work")
    verbs.add_parser("toys").add_argument("work", type=Path)
    args = parser.parse_args(arguments)
    if args.verb == "toys":
        environment(args.work.absolute())
        toys(args.work.absolute())
    elif args.verb == "train":
        train(args.raw.absolute(), args.work.absolute(), args)
    else:
        predict(args.model.absolute(), args.source.absolute(), args.target.absolute(), args)


if __name__ == "__main__":
    main()
