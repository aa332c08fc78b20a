"""nnU-Net's plans.json and dataset.json -> our Plan: what is the same is taken over, what has no counterpart refused.

Nothing is guessed: a key that would change the result and that is not understood ends the import with its name and
value. The plan keeps nnU-Net's axes (`Plan.orientation`): those of the file, or RAS for its reorienting readers.
Source of the meaning of each key: nnU-Net v2.8.1 (Isensee et al., Nature Methods 2021).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from autoseg.cases import listed
from autoseg.labels import Labels
from autoseg.layout import read_channels
from autoseg.networks.unet import check_spec
from autoseg.records import AutosegError, problems
from autoseg.schema import (
    ChannelNorm,
    ChannelStats,
    Configuration,
    NetworkSpec,
    Orientation,
    Plan,
    Reason,
    Resampling,
)

READERS: dict[str, Orientation] = {
    "SimpleITKIO": "file",
    "NibabelIO": "file",
    "NaturalImage2DIO": "file",
    "Tiff3DIO": "file",
    "SimpleITKIOWithReorient": "ras",
    "NibabelIOWithReorient": "ras",
}
SCHEMES = {
    "ZScoreNormalization": "zscore",
    "CTNormalization": "ct",
    "NoNormalization": "none",
    "RescaleTo01Normalization": "rescale",
    "RGBTo01Normalization": "rgb",
}
NETWORKS = {"PlainConvUNet": ("unet", "n_conv_per_stage"), "ResidualEncoderUNet": ("resenc", "n_blocks_per_stage")}
"""Class -> our name, and the key of its encoder's depth."""
SPLINES = "resample_data_or_seg_to_shape"
LINEAR = "resample_torch_fornnunet"
MOST_STAGES = 20
"""Each halves the image, or keeps an axis that is short already."""
NEVER = 1e9
"""No spacing is so anisotropic: nothing is resampled slice by slice."""


def with_inherited(plans: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A configuration with all that it inherits. Raises AutosegError if it, or what it inherits from, is not there."""
    known = need(plans, "configurations", "plans.json")
    found: dict[str, Any] = {}
    chain: list[str] = []
    while name is not None:
        if name in chain:
            raise AutosegError(f"plans.json: configurations inherit in a circle: {' -> '.join([*chain, name])}")
        if name not in known:
            raise AutosegError(f"plans.json has no configuration {name!r}; it has {', '.join(known) or 'none'}")
        chain.append(name)
        found = {**known[name], **found}
        name = known[name].get("inherits_from")
    return found


def chain_of(plans: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """The configuration called `name` after those whose predictions it reads, the first stage first."""
    chain = [name]
    while earlier := with_inherited(plans, chain[0]).get("previous_stage"):
        if earlier in chain:
            raise AutosegError(f"plans.json: the stages {', '.join(chain)} wait for each other")
        chain.insert(0, earlier)
    return tuple(chain)


def to_plan(
    plans: Mapping[str, Any],
    dataset: Mapping[str, Any],
    names: Sequence[str],
    mirror_axes: Mapping[str, tuple[int, ...]],
) -> Plan:
    """The plan of the configurations `names`; `mirror_axes` of each are those its checkpoint allows.

    Raises AutosegError that names every file, key and value that has no counterpart here.
    """
    configurations = [with_inherited(plans, name) for name in names]
    reader = need(plans, "image_reader_writer", "plans.json")
    if reader not in READERS:
        refuse("plans.json: image_reader_writer", reader, READERS)
    if (manager := plans.get("label_manager", "LabelManager")) != "LabelManager":
        refuse("plans.json: label_manager", manager, ["LabelManager"])
    norms = [to_norms(plans, dataset, name, entry) for name, entry in zip(names, configurations)]
    if any(other != norms[0] for other in norms):
        raise AutosegError(f"plans.json: {' and '.join(names)} normalise differently, which one plan cannot say")
    order = need(plans, "transpose_forward", "plans.json")
    median = need(plans, "original_median_shape_after_transp", "plans.json")
    dataset_name = need(plans, "dataset_name", "plans.json")
    labels = to_labels(dataset)
    if len(names) > 1 and list(labels.stored) != sorted(labels.stored):
        # The second stage reads one mask a value: nnU-Net in the order of values, we in that of the regions.
        refuse("dataset.json: regions of a cascade", labels.regions, ["regions that list values in ascending order"])
    try:
        return Plan(
            name=plans.get("plans_name", "nnUNetPlans"),
            dataset=dataset_name,
            preset=str(plans.get("experiment_planner_used", "nnU-Net")),
            gpu_memory_gb=None,
            dimension=2 if median[0] == 1 and "3d_fullres" not in plans["configurations"] else 3,
            axis_order=tuple(order),
            orientation=READERS[reader],
            channels=norms[0],
            labels=labels,
            configurations=tuple(
                to_configuration(name, entry, mirror_axes[name]) for name, entry in zip(names, configurations)
            ),
            reasons=(
                Reason(
                    decision="everything",
                    rule="taken over from a model of nnU-Net",
                    inputs=f"plans.json of {dataset_name}, {plans.get('plans_name', 'unnamed')}",
                    outcome=f"{', '.join(names)}; axes as {reader} reads them",
                ),
            ),
        )
    except ValidationError as error:
        raise AutosegError(f"plans.json makes no valid plan:\n{problems(error)}") from None


def to_labels(dataset: Mapping[str, Any]) -> Labels:
    """Labels of dataset.json in the order of nnU-Net's output channels: of classes by value, of regions as listed."""
    named = need(dataset, "labels", "dataset.json")
    if any(isinstance(value, list) and len(value) > 1 for value in named.values()):
        return Labels.from_dataset(named, need(dataset, "regions_class_order", "dataset.json"))
    plain = {name: value[0] if isinstance(value, list) and value else value for name, value in named.items()}
    return Labels.from_dataset(dict(sorted(plain.items(), key=lambda item: item[1])))


def to_norms(
    plans: Mapping[str, Any], dataset: Mapping[str, Any], name: str, entry: Mapping[str, Any]
) -> tuple[ChannelNorm, ...]:
    """How each channel is normalised."""
    faults: list[str] = []
    channels = read_channels(dataset, faults)
    if faults:
        raise AutosegError(listed("dataset.json has faults", faults))
    where = f"plans.json: configurations.{name}"
    schemes, masked = need(entry, "normalization_schemes", where), need(entry, "use_mask_for_norm", where)
    if not len(schemes) == len(masked) == len(channels):
        raise AutosegError(f"{where} normalises {len(schemes)} channels, dataset.json names {len(channels)}")
    properties = plans.get("foreground_intensity_properties_per_channel", {})
    norms = []
    for index, (channel, scheme, inside) in enumerate(zip(channels, schemes, masked)):
        if scheme not in SCHEMES:
            refuse(f"{where}.normalization_schemes", scheme, SCHEMES)
        stats = None
        if SCHEMES[scheme] == "ct":
            found = need(properties, str(index), "plans.json: foreground_intensity_properties_per_channel")
            keys = {"minimum": "min", "maximum": "max"}
            stats = ChannelStats(
                **{field: need(found, keys.get(field, field), where) for field in ChannelStats.__dataclass_fields__}
            )
        norms.append(
            ChannelNorm(
                channel=channel,
                scheme=SCHEMES[scheme],  # type: ignore[arg-type]
                # nnU-Net reads the mask for z-scores only.
                masked=bool(inside) and SCHEMES[scheme] == "zscore",
                stats=stats,
            )
        )
    return tuple(norms)


def to_configuration(name: str, entry: Mapping[str, Any], mirror_axes: tuple[int, ...]) -> Configuration:
    """One configuration, written out in full."""
    where = f"plans.json: configurations.{name}"
    if (preprocessor := entry.get("preprocessor_name", "DefaultPreprocessor")) != "DefaultPreprocessor":
        refuse(f"{where}.preprocessor_name", preprocessor, ["DefaultPreprocessor"])
    patch = tuple(need(entry, "patch_size", where))
    if any(axis >= len(patch) for axis in mirror_axes):
        raise AutosegError(f"{where} has {len(patch)} axes, and its checkpoint allows mirroring along {mirror_axes}")
    return Configuration(
        name=name,
        dimension=len(patch),  # type: ignore[arg-type]
        spacing_mm=tuple(need(entry, "spacing", where)),
        median_shape=tuple(need(entry, "median_image_size_in_voxels", where)),
        patch=patch,
        batch_size=need(entry, "batch_size", where),
        batch_dice=need(entry, "batch_dice", where),
        network=to_network(entry, where, len(patch)),
        resampling=to_resampling(entry, where),
        previous_stage=entry.get("previous_stage"),
        prior="labels" if entry.get("previous_stage") else "logits",
        mirror_axes=mirror_axes,
        prepared=name,
    )


def to_resampling(entry: Mapping[str, Any], where: str) -> Resampling:
    """Interpolation orders. Images, labels and logits must agree on when slices are resampled on their own."""
    orders, apart = {}, set()
    for kind, field in (("data", "image_order"), ("seg", "label_order"), ("probabilities", "logit_order")):
        key = f"resampling_fn_{kind}"
        function, given = need(entry, key, where), dict(need(entry, f"{key}_kwargs", where))
        if function not in (SPLINES, LINEAR):
            refuse(f"{where}.{key}", function, [SPLINES, LINEAR])
        given.pop("is_seg", None)
        forced = given.pop("force_separate_z", False if function == SPLINES else None)
        threshold = given.pop("separate_z_anisotropy_threshold", 3.0)
        if function == SPLINES:
            orders[field], through = given.pop("order", 3), given.pop("order_z", 0)
        else:
            orders[field], through = 1, 0
            for harmless in ("num_threads", "device", "memefficient_seg_resampling"):
                given.pop(harmless, None)
        if given:
            refuse(f"{where}.{key}_kwargs", given, ["is_seg", "order", "order_z", "force_separate_z"])
        # Forced: the coarsest axis apart, whatever the ratio of spacings, or never.
        apart.add((through, threshold if forced is None else 0.0 if forced else NEVER))
    if len(apart) > 1:
        raise AutosegError(f"{where}: images, labels and logits are resampled by different rules for coarse axes")
    ((through, threshold),) = apart
    return Resampling(**orders, through_plane_order=through, anisotropy_threshold=threshold)


def to_network(entry: Mapping[str, Any], where: str, dimension: int) -> NetworkSpec:
    """The network of a configuration, from plans of either format. Only what our U-Nets compute too is accepted."""
    architecture = entry.get("architecture") or older_architecture(entry, where)
    where = f"{where}.architecture"
    path = need(architecture, "network_class_name", where)
    kind = str(path).rpartition(".")[2]
    if kind not in NETWORKS:
        refuse(f"{where}.network_class_name", path, NETWORKS)
    name, depth = NETWORKS[kind]
    given = dict(need(architecture, "arch_kwargs", where))
    where = f"{where}.arch_kwargs"
    stages = need(given, "n_stages", where)
    if stages not in range(2, MOST_STAGES + 1):
        refuse(f"{where}.n_stages", stages, [f"2 to {MOST_STAGES} stages"])
    features = each(need(given, "features_per_stage", where), stages)

    def expect(key: str, *allowed: Any, default: Any = None) -> None:
        if (value := given.get(key, default)) not in allowed:
            refuse(f"{where}.{key}", value, allowed)

    norm = given.get("norm_op_kwargs") or {}
    expect("conv_op", f"torch.nn.modules.conv.Conv{dimension}d", f"torch.nn.Conv{dimension}d")
    expect("norm_op", f"torch.nn.modules.instancenorm.InstanceNorm{dimension}d", f"torch.nn.InstanceNorm{dimension}d")
    expect("nonlin", "torch.nn.LeakyReLU", "torch.nn.modules.activation.LeakyReLU")
    expect("conv_bias", True, default=False)
    expect("dropout_op", None)
    expect("nonlin_first", False, default=False)
    expect("stem_channels", None, features[0])
    expect("bottleneck_channels", None)
    expect("block", None, "dynamic_network_architectures.building_blocks.residual.BasicBlockD")
    if {"eps": 1e-5, "affine": False, **norm} != {"eps": 1e-5, "affine": True}:
        refuse(f"{where}.norm_op_kwargs", norm, [{"eps": 1e-5, "affine": True}])
    if (slope := (given.get("nonlin_kwargs") or {}).get("negative_slope", 0.01)) != 0.01:
        refuse(f"{where}.nonlin_kwargs.negative_slope", slope, [0.01])
    understood = {
        "n_stages", "features_per_stage", "kernel_sizes", "strides", depth, "n_conv_per_stage_decoder",
        "conv_op", "norm_op", "norm_op_kwargs", "nonlin", "nonlin_kwargs", "conv_bias", "dropout_op",
        "dropout_op_kwargs", "nonlin_first", "stem_channels", "bottleneck_channels", "block", "deep_supervision",
    }  # fmt: skip
    for key in given.keys() - understood:
        refuse(f"{where}.{key}", given[key], ["no such key"])
    spec = NetworkSpec(
        name=name,
        dimension=dimension,  # type: ignore[arg-type]
        features=features,
        strides=tuple(each(stride, dimension) for stride in each(need(given, "strides", where), stages)),
        kernels=tuple(each(kernel, dimension) for kernel in each(need(given, "kernel_sizes", where), stages)),
        encoder_blocks=each(need(given, depth, where), stages),
        # nnU-Net counts decoder stages from the coarsest one.
        decoder_blocks=each(need(given, "n_conv_per_stage_decoder", where), stages - 1)[::-1],
    )
    try:
        check_spec(spec)
    except ValueError as error:
        raise AutosegError(f"{where}: {error}") from None
    return spec


def older_architecture(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The `architecture` of plans that were written before 2024, which describe it by keys of the configuration."""
    kind = need(entry, "UNet_class_name", where)
    if kind not in NETWORKS:
        refuse(f"{where}.UNet_class_name", kind, NETWORKS)
    blocks = need(entry, "n_conv_per_stage_encoder", where)
    dimension = len(need(entry, "patch_size", where))
    first, most = need(entry, "UNet_base_num_features", where), need(entry, "unet_max_num_features", where)
    return {
        "network_class_name": kind,
        "arch_kwargs": {
            "n_stages": len(blocks),
            "features_per_stage": [min(first * 2**stage, most) for stage in range(len(blocks))],
            "kernel_sizes": need(entry, "conv_kernel_sizes", where),
            "strides": need(entry, "pool_op_kernel_sizes", where),
            NETWORKS[kind][1]: blocks,
            "n_conv_per_stage_decoder": need(entry, "n_conv_per_stage_decoder", where),
            "conv_op": f"torch.nn.Conv{dimension}d",
            "norm_op": f"torch.nn.InstanceNorm{dimension}d",
            "norm_op_kwargs": {"affine": True},
            "nonlin": "torch.nn.LeakyReLU",
            "conv_bias": True,
        },
    }


def each(value: Any, count: int) -> tuple[Any, ...]:
    """One entry for each of `count`, where a single number stands for all."""
    return (value,) * count if isinstance(value, int) else tuple(value)


def need(content: Mapping[str, Any], key: str, where: str) -> Any:
    """`content[key]`, or AutosegError that says where it is missing."""
    if key not in content:
        raise AutosegError(f"{where}: {key} is missing, so this is no complete model of nnU-Net v2")
    return content[key]


def refuse(where: str, value: Any, allowed: Any) -> None:
    """AutosegError: a value that has no counterpart here."""
    raise AutosegError(
        f"{where} is {value!r}, which autoseg does not have; it knows {', '.join(map(str, allowed))}. "
        "Predict with nnU-Net itself"
    )
