"""Small lopsided things that several tests share."""

import json
from pathlib import Path

import numpy as np

from autoseg.labels import Labels
from autoseg.readers import write_image, write_labels
from autoseg.schema import ChannelNorm, Configuration, NetworkSpec, Plan, Request
from autoseg.settings import in_json
from autoseg.volume import Grid, Triple

LABELS = Labels.from_dataset({"background": 0, "liver": 7, "lesion": 200})

OBLIQUE: tuple[Triple, Triple, Triple] = ((0.96, -0.28, 0.0), (0.28, 0.96, 0.0), (0.0, 0.0, 1.0))


def grid(shape=(5, 7, 11), spacing_mm=(3.0, 1.0, 0.5), **more) -> Grid:
    return Grid(shape=shape, spacing_mm=spacing_mm, **more)


def network(dimension=3, features=(4, 6)) -> NetworkSpec:
    stages = len(features)
    return NetworkSpec(
        name="unet",
        dimension=dimension,
        features=features,
        strides=((1,) * dimension, *((2,) * dimension,) * (stages - 1)),
        kernels=((3,) * dimension,) * stages,
        encoder_blocks=(1,) * stages,
        decoder_blocks=(1,) * (stages - 1),
    )


def configuration(
    name="3d_fullres", spacing_mm=(3.0, 1.0, 0.5), patch=(4, 6, 8), batch_size=2, **more
) -> Configuration:
    return Configuration(
        name=name,
        dimension=len(patch),
        spacing_mm=spacing_mm,
        median_shape=tuple(float(n) for n in patch),
        patch=patch,
        batch_size=batch_size,
        batch_dice=False,
        network=network(len(patch)),
        prepared=name,
        **more,
    )


def plan(*configurations, channels=("MR",), axis_order=(0, 1, 2), scheme="zscore", masked=False) -> Plan:
    return Plan(
        dataset="Dataset001_Toy",
        preset="unet",
        gpu_memory_gb=8.0,
        dimension=3,
        axis_order=axis_order,
        channels=tuple(ChannelNorm(channel=c, scheme=scheme, masked=masked, stats=None) for c in channels),
        labels=LABELS,
        configurations=configurations or (configuration(),),
    )


def ball(shape, centre, radius) -> np.ndarray:
    """True within `radius` voxels of `centre`."""
    axes = np.ogrid[tuple(slice(n) for n in shape)]
    return sum((a - c) ** 2 for a, c in zip(axes, centre)) <= radius**2


BALLS = {"background": 0, "big": 7, "small": 300}
TINY = Request(
    changes=in_json(
        {
            "configurations.3d_fullres.patch": [16, 16, 16],
            "configurations.3d_fullres.batch_size": 2,
            "configurations.3d_fullres.network.features": [4, 8, 12],
        }
    )
)
"""A 3d_fullres for the balls that trains in a second."""


def write_balls(folder: Path, name: str, seed: int, split: str = "Tr", channels: int = 1) -> None:
    """One raw case of two balls of different size and brightness."""
    rng = np.random.default_rng(seed)
    shape = (13 + seed % 3, 17, 19)
    labels = np.zeros(shape, np.int16)
    labels[ball(shape, (6, 8, 6 + seed % 2), 4.5)] = 7
    labels[ball(shape, (7, 8, 14), 2.5)] = 300
    image = np.select([labels == 7, labels == 300], [4.0, 8.0]) + rng.normal(2, 0.2, shape)
    stored = Grid(shape=shape, spacing_mm=(1.1, 1.0, 0.9), origin_mm=(5.0, -3.0, 2.0))
    for channel in range(channels):
        path = folder / f"images{split}" / f"{name}_{channel:04d}.nii.gz"
        write_image(image.astype(np.float32) + channel, stored, path)
    write_labels(labels, stored, folder / f"labels{split}" / f"{name}.nii.gz")


def balls_dataset(raw: Path, cases: int = 4, prefix: str = "", **more) -> None:
    """A raw dataset of `cases` cases, two a patient: p0_0, p0_1, p1_0, ...; with a prefix c: c0, c1, c2, ...

    more: entries of dataset.json, in place of the usual ones or beside them.
    """
    for seed in range(cases):
        write_balls(raw, f"{prefix}{seed}" if prefix else f"p{seed // 2}_{seed % 2}", seed)
    facts = {"channel_names": {"0": "MR"}, "labels": BALLS, "numTraining": cases, "file_ending": ".nii.gz", **more}
    (raw / "dataset.json").write_text(json.dumps(facts))
