"""Plans and tensors of nnU-Net in our words: worked examples, and every value that has no counterpart is refused."""

import copy
import json
import zipfile
from dataclasses import replace

import pytest
import torch
from nnunet_toys import CASCADE, REGIONS, RESIDUAL
from pydantic import TypeAdapter
from toys import network

from autoseg.interop.nnunet_plans import (
    chain_of,
    each,
    older_architecture,
    to_configuration,
    to_labels,
    to_network,
    to_norms,
    to_plan,
    to_resampling,
    with_inherited,
)
from autoseg.interop.nnunet_weights import our_name, rename
from autoseg.networks import build
from autoseg.records import AutosegError, to_json
from autoseg.schema import Plan, Resampling


def description(toy, name: str) -> dict:
    """plans.json or dataset.json of a toy."""
    with zipfile.ZipFile(toy) as archive:
        return json.loads(archive.read(next(n for n in archive.namelist() if n.endswith(f"/{name}"))))


PLANS, DATASET = description(CASCADE, "plans.json"), description(CASCADE, "dataset.json")
ENTRY = PLANS["configurations"]["3d_fullres"]
SPLINES = "resample_data_or_seg_to_shape"


def changed(content: dict, path: str, value) -> dict:
    """A copy with the entry at `path`, keys with dots between, set to `value`."""
    content = copy.deepcopy(content)
    *parents, last = path.split(".")
    place = content
    for key in parents:
        place = place[key]
    place[last] = value
    return content


def refused(function, *arguments) -> str:
    with pytest.raises(AutosegError) as error:
        function(*arguments)
    return str(error.value)


# Plans


def test_a_plan_in_our_words():
    flips = {"3d_lowres": (0, 1, 2), "3d_cascade_fullres": (1, 2)}
    plan = to_plan(PLANS, DATASET, ["3d_lowres", "3d_cascade_fullres"], flips)
    assert (plan.dataset, plan.name, plan.dimension) == ("Dataset001_Cascade", "nnUNetPlans", 3)
    assert (plan.orientation, plan.axis_order) == ("file", (1, 0, 2))
    assert [(c.channel, c.scheme, c.masked) for c in plan.channels] == [("CT", "ct", False), ("MR", "zscore", True)]
    given = PLANS["foreground_intensity_properties_per_channel"]["0"]
    assert plan.channels[0].stats.mean == given["mean"]
    assert plan.channels[0].stats.percentile_99_5 == given["percentile_99_5"]
    assert plan.channels[0].stats.minimum == given["min"]
    assert plan.channels[1].stats is None
    low, full = plan.configurations
    assert (low.spacing_mm, full.spacing_mm) == ((1.7 * 3.2, 1.7 * 1.3, 1.7 * 1.2), (3.2, 1.3, 1.2))
    assert (low.patch, low.mirror_axes, low.previous_stage, low.prior) == ((8, 24, 24), (0, 1, 2), None, "logits")
    assert (full.patch, full.mirror_axes, full.previous_stage, full.prior) == (
        (8, 24, 24),
        (1, 2),
        "3d_lowres",
        "labels",
    )
    assert full.resampling == Resampling()
    assert full.network.strides == ((1, 1, 1), (1, 2, 2), (1, 2, 2))
    assert (plan.in_channels(low), plan.in_channels(full)) == (2, 4)
    assert TypeAdapter(Plan).validate_json(to_json(plan)) == plan


def test_plans_made_here_have_no_field_of_imported_ones_to_fill_in():
    """What was written before these fields were, means what it meant."""
    flips = {"3d_fullres": (0, 1, 2)}
    written = json.loads(to_json(to_plan(PLANS, DATASET, ["3d_fullres"], flips)))
    del written["orientation"]
    for key in ("prior", "mirror_axes"):
        del written["configurations"][0][key]
    plan = TypeAdapter(Plan).validate_json(json.dumps(written))
    assert plan.orientation == "canonical"
    assert (plan.configurations[0].prior, plan.configurations[0].mirror_axes) == ("logits", None)


@pytest.mark.parametrize(("toy", "name"), [(CASCADE, "2d"), (CASCADE, "3d_fullres"), (RESIDUAL, "2d")])
def test_plans_of_the_older_format_say_the_same(toy, name):
    plans, dataset = description(toy, "plans.json"), description(toy, "dataset.json")
    entry = plans["configurations"][name]
    network = entry["architecture"]["arch_kwargs"]
    older = {key: value for key, value in entry.items() if key != "architecture"} | {
        "UNet_class_name": entry["architecture"]["network_class_name"].rpartition(".")[2],
        "UNet_base_num_features": 4,
        "unet_max_num_features": 6,
        "n_conv_per_stage_encoder": network.get("n_conv_per_stage") or network.get("n_blocks_per_stage"),
        "n_conv_per_stage_decoder": network["n_conv_per_stage_decoder"],
        "conv_kernel_sizes": network["kernel_sizes"],
        "pool_op_kernel_sizes": network["strides"],
    }
    flips = {name: (0, 1)}
    new = to_plan(plans, dataset, [name], flips)
    assert to_plan(changed(plans, f"configurations.{name}", older), dataset, [name], flips) == new
    assert new.configurations[0].network.features == (4, 6, 6)
    assert "UNet_class_name is missing" in refused(older_architecture, {}, "here")
    assert "is 'UNETR'" in refused(older_architecture, {**older, "UNet_class_name": "UNETR"}, "here")


def test_a_configuration_has_what_it_inherits():
    plans = {
        "configurations": {"a": {"x": 1, "y": 2}, "b": {"inherits_from": "a", "y": 3}, "c": {"inherits_from": "b"}}
    }
    assert with_inherited(plans, "c") == {"x": 1, "y": 3, "inherits_from": "b"}
    assert "no configuration 'd'; it has a, b, c" in refused(with_inherited, plans, "d")
    assert "it has none" in refused(with_inherited, {"configurations": {}}, "d")
    plans["configurations"]["a"]["inherits_from"] = "c"
    assert "inherit in a circle: b -> a -> c -> b" in refused(with_inherited, plans, "b")


def test_stages_come_in_the_order_in_which_they_run():
    assert chain_of(PLANS, "3d_cascade_fullres") == ("3d_lowres", "3d_cascade_fullres")
    assert chain_of(PLANS, "3d_fullres") == ("3d_fullres",)
    waiting = {"configurations": {"a": {"previous_stage": "b"}, "b": {"previous_stage": "a"}}}
    assert "wait for each other" in refused(chain_of, waiting, "a")


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("image_reader_writer", "MyIO", "image_reader_writer is 'MyIO', which autoseg does not have; it knows Simple"),
        ("label_manager", "MyLabels", "label_manager is 'MyLabels'"),
        ("configurations.3d_fullres.normalization_schemes", ["MyNorm", "CTNormalization"], "schemes is 'MyNorm'"),
        ("configurations.3d_fullres.normalization_schemes", ["CTNormalization"], "normalises 1 channels"),
        ("configurations.3d_fullres.preprocessor_name", "MyPreprocessor", "preprocessor_name is 'MyPreprocessor'"),
        ("configurations.3d_fullres.architecture.network_class_name", "x.y.UNETR", "network_class_name is 'x.y.UNETR'"),
        ("configurations.3d_fullres.resampling_fn_data", "my_resampling", "resampling_fn_data is 'my_resampling'"),
        ("foreground_intensity_properties_per_channel", {}, "0 is missing"),
        ("configurations.3d_fullres.batch_size", "many", "makes no valid plan"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(path, value, expected):
    plans = changed(PLANS, path, value)
    assert expected in refused(to_plan, plans, DATASET, ["3d_fullres"], {"3d_fullres": (0, 1, 2)})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("conv_op", "torch.nn.modules.conv.Conv2d"),
        ("norm_op", "torch.nn.modules.batchnorm.BatchNorm3d"),
        ("norm_op_kwargs", {"eps": 1e-3, "affine": True}),
        ("norm_op_kwargs", {"affine": False}),
        ("nonlin", "torch.nn.ReLU"),
        ("nonlin_kwargs", {"negative_slope": 0.2}),
        ("conv_bias", False),
        ("dropout_op", "torch.nn.Dropout3d"),
        ("nonlin_first", True),
        ("stem_channels", 3),
        ("bottleneck_channels", [4, 4, 4]),
        ("block", "dynamic_network_architectures.building_blocks.residual.BottleneckD"),
        ("stochastic_depth_p", 0.1),
        ("squeeze_excitation", False),
        ("n_stages", 1),
        ("n_stages", 10**9),
    ],
)
def test_networks_that_compute_something_else_are_refused(path, value):
    entry = changed(ENTRY, f"architecture.arch_kwargs.{path}", value)
    key, shown = path.partition(".")[0], value
    if path == "nonlin_kwargs":
        key, shown = "nonlin_kwargs.negative_slope", 0.2
    assert f"here.architecture.arch_kwargs.{key} is {shown!r}" in refused(to_network, entry, "here", 3)


def test_a_network_that_is_none_is_refused():
    assert "kernels: sizes must be odd" in refused(
        to_network, changed(ENTRY, "architecture.arch_kwargs.kernel_sizes", [[2, 3, 3]] * 3), "here", 3
    )
    assert "arch_kwargs is missing" in refused(
        to_network, {"architecture": {"network_class_name": "PlainConvUNet"}}, "here", 3
    )


def test_decoder_stages_are_counted_from_the_finest():
    entry = changed(ENTRY, "architecture.arch_kwargs.n_conv_per_stage_decoder", [3, 2])
    assert to_network(entry, "here", 3).decoder_blocks == (2, 3)
    for key, value in (("features_per_stage", 5), ("kernel_sizes", 3), ("n_conv_per_stage", 2)):
        entry = changed(entry, f"architecture.arch_kwargs.{key}", value)
    spec = to_network(entry, "here", 3)
    assert (spec.features, spec.kernels, spec.encoder_blocks) == ((5, 5, 5), ((3, 3, 3),) * 3, (2, 2, 2))
    assert each(4, 3) == (4, 4, 4) and each([1, 2], 3) == (1, 2)


def test_mirroring_along_an_axis_that_is_not_there_is_refused():
    assert "has 2 axes" in refused(to_configuration, "2d", PLANS["configurations"]["2d"], (0, 2))


def resampling(data: dict, seg: dict, probabilities: dict, function: str = SPLINES) -> dict:
    kinds = {"data": data, "seg": seg, "probabilities": probabilities}
    return {f"resampling_fn_{kind}": function for kind in kinds} | {
        f"resampling_fn_{kind}_kwargs": given for kind, given in kinds.items()
    }


def test_rules_of_resampling():
    def rules(**more):
        return resampling(*({"is_seg": kind == 1, "order": (3, 1, 1)[kind], **more} for kind in range(3)))

    assert to_resampling(rules(force_separate_z=None), "here") == Resampling()
    assert to_resampling(rules(force_separate_z=None, order_z=1), "here") == Resampling(through_plane_order=1)
    # The functions' own default is never; forced, it is always: a ratio of spacings is at least 1.
    assert to_resampling(rules(), "here").anisotropy_threshold > 1e6
    assert to_resampling(rules(force_separate_z=False), "here").anisotropy_threshold > 1e6
    assert to_resampling(rules(force_separate_z=True), "here").anisotropy_threshold < 1
    own = rules(force_separate_z=None, separate_z_anisotropy_threshold=2.5)
    assert to_resampling(own, "here") == Resampling(anisotropy_threshold=2.5)
    linear = resampling({}, {"is_seg": True, "memefficient_seg_resampling": False}, {}, "resample_torch_fornnunet")
    assert to_resampling(linear, "here") == Resampling(image_order=1)
    assert "_kwargs is {'mode': 'nearest'}" in refused(to_resampling, rules(mode="nearest"), "here")
    mixed = resampling({"force_separate_z": True}, {"force_separate_z": None}, {})
    assert "different rules for coarse axes" in refused(to_resampling, mixed, "here")


# Labels and channels


def test_labels_come_in_the_order_of_the_output_channels():
    plain = to_labels({"labels": {"background": 0, "shell": 2, "core": [1]}})
    assert (plain.names, plain.values, plain.exclusive) == (("background", "core", "shell"), (0, 1, 2), True)
    regions = to_labels(description(REGIONS, "dataset.json"))
    assert (regions.names, regions.values, regions.heads) == (("background", "whole", "core"), (0, 2, 1), 2)
    ignoring = to_labels({"labels": {"background": 0, "ignore": 3, "b": 2, "a": 1}})
    assert (ignoring.values, ignoring.ignore) == ((0, 1, 2), 3)
    unordered = {"labels": {"background": 0, "whole": [1, 2], "core": 1}}
    assert "regions_class_order is missing" in refused(to_labels, unordered)


def test_a_cascade_of_regions_needs_masks_in_the_same_order():
    dataset = {**DATASET, "labels": {"background": 0, "b": [2, 3], "a": [1, 2, 3]}, "regions_class_order": [3, 1]}
    names = ["3d_lowres", "3d_cascade_fullres"]
    said = refused(to_plan, PLANS, dataset, names, dict.fromkeys(names, (0,)))
    assert "regions of a cascade" in said and "ascending order" in said


def test_stages_that_normalise_differently_are_refused():
    plans = changed(PLANS, "configurations.3d_lowres.use_mask_for_norm", [False, False])
    names = ["3d_lowres", "3d_cascade_fullres"]
    assert "normalise differently" in refused(to_plan, plans, DATASET, names, dict.fromkeys(names, (0,)))


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("NoNormalization", "none"),
        ("RescaleTo01Normalization", "rescale"),
        ("RGBTo01Normalization", "rgb"),
        ("ZScoreNormalization", "zscore"),
    ],
)
def test_schemes_of_normalisation(scheme, expected):
    entry = {**ENTRY, "normalization_schemes": [scheme] * 2, "use_mask_for_norm": [True, False]}
    norms = to_norms({}, DATASET, "3d_fullres", entry)
    assert [norm.scheme for norm in norms] == [expected] * 2
    # Only a z-score heeds the mask.
    assert [norm.masked for norm in norms] == [scheme == "ZScoreNormalization", False]
    assert all(norm.stats is None for norm in norms)


# Tensors


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("encoder.stages.2.0.convs.1.conv.weight", "encoder.2.1.conv.weight"),
        ("encoder.stages.0.0.convs.0.norm.bias", "encoder.0.0.norm.bias"),
        ("encoder.stages.0.0.convs.0.all_modules.1.bias", None),
        ("decoder.encoder.stages.0.0.convs.0.conv.weight", None),
        ("encoder.stem.convs.0.conv.weight", "encoder.0.0.conv.weight"),
        # In the first stage of a residual encoder the stem comes first.
        ("encoder.stages.0.blocks.0.conv1.conv.weight", "encoder.0.1.first.conv.weight"),
        ("encoder.stages.3.blocks.2.conv2.norm.weight", "encoder.3.2.second.norm.weight"),
        ("encoder.stages.1.blocks.0.skip.1.conv.weight", "encoder.1.0.shortcut.1.conv.weight"),
        # Of four decoder levels the coarsest is theirs first and ours last.
        ("decoder.transpconvs.0.weight", "up.3.weight"),
        ("decoder.stages.1.convs.0.conv.bias", "merge.2.conv.bias"),
        ("decoder.stages.3.convs.2.norm.weight", "refine.0.1.norm.weight"),
        ("decoder.seg_layers.3.bias", "heads.0.bias"),
    ],
)
def test_names_of_tensors(theirs, ours):
    assert our_name(theirs, levels=4) == ours


@pytest.mark.parametrize("name", ["", "encoder.weight", "encoder.stages.0.attention.0.conv.weight", "vit.head.bias"])
def test_tensors_of_other_networks_are_refused(name):
    assert "no U-Net of ours" in refused(our_name, name, 4)


SPEC = network()
THEIRS = {
    "encoder.0.0": "encoder.stages.0.0.convs.0",
    "encoder.1.0": "encoder.stages.1.0.convs.0",
    "merge.0": "decoder.stages.0.convs.0",
    "up.0": "decoder.transpconvs.0",
    "heads.0": "decoder.seg_layers.0",
}


def named_theirs(weights: dict) -> dict:
    """The weights of a network of two stages by nnU-Net's names."""
    return {
        THEIRS[part] + name.removeprefix(part): tensor
        for name, tensor in weights.items()
        for part in THEIRS
        if name.startswith(f"{part}.")
    }


def test_renamed_tensors_are_those_of_our_network():
    ours = build(SPEC, 2, 3).state_dict()
    theirs = named_theirs(ours)
    assert len(theirs) == len(ours)
    copies = {f"decoder.encoder.{name.removeprefix('encoder.')}": t for name, t in theirs.items() if "encoder" in name}
    found = rename({**theirs, **copies}, SPEC, 2, 3)
    assert found.keys() == ours.keys() and all(torch.equal(found[name], ours[name]) for name in ours)
    half = rename({name: tensor.half() for name, tensor in theirs.items()}, SPEC, 2, 3)
    assert {tensor.dtype for tensor in half.values()} == {torch.float32}


def test_unfit_tensors_are_listed():
    theirs = named_theirs(build(SPEC, 2, 3).state_dict())
    said = refused(rename, theirs, SPEC, 2, 4)
    assert "heads.0.weight is (3, 4, 1, 1, 1), by the plan (4, 4, 1, 1, 1)" in said and "heads.0.bias is (3,)" in said
    assert "encoder.7.0.conv.bias is in no network of this plan" in refused(
        rename, {**theirs, "encoder.stages.7.0.convs.0.conv.bias": torch.ones(1)}, SPEC, 2, 3
    )
    few = {name: tensor for name, tensor in theirs.items() if "norm" in name}
    assert "encoder.0.0.conv.weight is missing" in refused(rename, few, SPEC, 2, 3)
    none = {f"encoder.stages.{i}.0.convs.0.conv.bias": torch.ones(1) for i in range(9)}
    assert "\n  and " in refused(rename, none, SPEC, 2, 3)
    endless = replace(SPEC, features=(10**12, 10**12))
    assert "cannot be built" in refused(rename, theirs, endless, 2, 3)


def test_tensors_that_are_larger_than_what_is_stored_are_refused():
    theirs = named_theirs(build(SPEC, 2, 3).state_dict())
    large = max(theirs, key=lambda name: theirs[name].numel())
    repeated = {**theirs, large: torch.zeros(1).expand(theirs[large].shape)}
    assert "larger than what the file stores" in refused(rename, repeated, SPEC, 2, 3)
    for odd in (theirs[large].int(), theirs[large].to("meta"), theirs[large].to_sparse()):
        assert "holds no plain floating point numbers" in refused(rename, {**theirs, large: odd}, SPEC, 2, 3)
