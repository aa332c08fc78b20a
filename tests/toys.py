"""Small lopsided things that several tests share."""

import numpy as np

from autoseg.labels import Labels
from autoseg.schema import ChannelNorm, Configuration, NetworkSpec, Plan
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
