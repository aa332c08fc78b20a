"""Fine-tuning: known classes are predicted at step 0 as before, and every tensor's fate is told."""

from dataclasses import replace

import pytest
import torch
from network_contract import narrow
from safetensors.torch import save_file
from test_predict import finished_run
from toys import configuration, network, plan

from autoseg.bundle import ModelFile, Stage, write
from autoseg.crops import parse_crop
from autoseg.labels import Labels
from autoseg.networks import NETWORKS, build
from autoseg.networks.unet import UNet
from autoseg.pipeline.planning import plan_at
from autoseg.planners import plan_like
from autoseg.records import AutosegError, load_json, save_json
from autoseg.schema import CaseFingerprint, Fingerprint, Preparation, Run
from autoseg.transfer import Source, differences, inputs, open_source, outputs, tensor_table, transfer

IMAGE = torch.randn(2, 1, 4, 6, 8, generator=torch.Generator().manual_seed(0))


def net(made, here=None, seed=0):
    torch.manual_seed(seed)
    here = here or made.configurations[0]
    return build(here.network, made.in_channels(here), made.labels.heads).eval()


def source(made, seed=1):
    found = net(made, seed=seed)
    for parameter in found.parameters():
        # Nothing stays at an initial value that a fresh network would have too.
        parameter.data += 0.1 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    return found, Source(words="elsewhere", tensors=found.state_dict(), plan=made, configuration=made.configurations[0])


def begun(made, given):
    fresh = net(made)
    begin, lines = transfer(fresh, made, made.configurations[0], given)
    assert {line.tensor for line in lines} == set(fresh.state_dict())
    assert len(lines) == len(begin)
    fresh.load_state_dict(begin)
    return fresh, {line.tensor: line for line in lines}


def labelled(made, *names):
    return replace(made, labels=Labels.from_dataset({name: value for value, name in enumerate(names)}))


@pytest.mark.parametrize("name", ["unet", "resenc"])
@torch.no_grad()
def test_the_same_plan_gives_the_same_network(name):
    made = plan(replace(configuration(), network=replace(network(), name=name)))
    old, given = source(made)
    new, lines = begun(made, given)
    assert {line.what for line in lines.values()} == {"reused"}
    assert torch.equal(new(IMAGE), old(IMAGE))


@pytest.mark.parametrize("name", ["unet", "resenc"])
@torch.no_grad()
def test_shared_classes_are_predicted_as_before(name):
    """On every scale, whatever place they have among classes that are new; those keep their fresh weights."""
    here = replace(configuration(), network=replace(network(features=(4, 6, 8)), name=name), patch=(4, 8, 8))
    made = labelled(plan(here), "background", "liver", "lesion", "spleen")
    old, given = source(made)
    image = torch.randn(1, 1, 4, 8, 8)
    wanted = labelled(made, "background", "kidney", "spleen", "liver")
    new, lines = begun(wanted, given)
    for ours, theirs in zip(new(image, all_scales=True), old(image, all_scales=True)):
        assert torch.equal(ours[:, [0, 2, 3]], theirs[:, [0, 3, 1]])
    assert torch.equal(new.heads[0].weight[1], net(wanted).heads[0].weight[1])
    assert lines["heads.0.weight"].what == "adapted"
    assert lines["heads.0.weight"].how == (
        "background taken over, kidney new, spleen taken over, liver taken over, lesion dropped"
    )
    assert sum(line.what == "adapted" for line in lines.values()) == 4


@torch.no_grad()
def test_a_channel_that_is_new_beside_known_ones_changes_nothing_at_first():
    made = plan(channels=("T1", "T2"))
    old, given = source(made)
    new, lines = begun(plan(channels=("FLAIR", "T2", "T1")), given)
    t1, t2, flair = torch.randn(3, 1, 4, 6, 8)
    before = old(torch.stack([t1, t2], 1))
    assert torch.allclose(new(torch.stack([flair, t2, t1], 1)), before, atol=1e-5)
    assert lines[UNet.first_weight].how == "FLAIR zero, T2 taken over, T1 taken over"
    # What is zero still learns: its gradient is not.
    with torch.enable_grad():
        new(torch.stack([flair, t2, t1], 1)).square().sum().backward()
    assert new.encoder[0][0].conv.weight.grad[:, 0].abs().max() > 0


PLANAR = configuration("2d", patch=(16, 24), spacing_mm=(1.0, 1.0))


def planned(spec, *channels):
    return plan(replace(PLANAR, network=spec, context=spec.slices), channels=channels)


PRIMUS = NETWORKS["primus_v3"].spec(2, grid=(2, 3))
PRIMUS = replace(
    PRIMUS,
    features=(4, 5, 6, 7, 24),
    encoder_blocks=(1, 1, 1, 1, 2),
    options={**PRIMUS.options, "attention_heads": 2},
)


@pytest.mark.parametrize(
    "spec", [narrow(NETWORKS["multires_unet"].spec(2)), PRIMUS], ids=["multires_unet", "primus_v3"]
)
@torch.no_grad()
def test_what_reads_the_image_beside_the_first_convolution_is_adapted_too(spec):
    old, given = source(planned(spec, "T1", "T2"))
    new, lines = begun(planned(spec, "FLAIR", "T2", "T1"), given)
    t1, t2, flair = torch.randn(3, 1, 16, 24)
    before = old(torch.stack([t1, t2], 1))
    torch.testing.assert_close(new(torch.stack([flair, t2, t1], 1)), before, atol=1e-4, rtol=1e-4)
    changed = {line.tensor: line.how for line in lines.values() if line.what != "reused"}
    assert changed == dict.fromkeys((new.first_weight, *new.beside_first), "FLAIR zero, T2 taken over, T1 taken over")


@torch.no_grad()
def test_channels_of_a_network_that_takes_slices_apart_are_matched_by_name():
    """Equal shapes do not mean equal channels; and each has one entry, however many slices there are of it."""
    spec = narrow(NETWORKS["slice_unet3d"].spec(2, context=3))
    old, given = source(planned(spec, "T1", "T2"))
    new, lines = begun(planned(spec, "T2", "T1"), given)
    t1, t2 = torch.randn(2, 1, 3, 16, 24)
    torch.testing.assert_close(new(torch.cat([t2, t1], 1)), old(torch.cat([t1, t2], 1)), atol=1e-4, rtol=1e-4)
    assert lines[new.first_weight].how == "T2 taken over, T1 taken over"


def test_an_image_that_is_added_as_it_is_cannot_be_adapted_and_the_table_says_so():
    spec = narrow(NETWORKS["vnet"].spec(2))
    _, given = source(planned(spec, "T1"))
    new, lines = begun(planned(spec, "T1", "T2"), given)
    assert lines[new.first_weight].how == (
        "T1 taken over, T2 zero; the image is added to its result too, in other channels now"
    )
    assert begun(planned(spec, "T1"), given)[1][new.first_weight].what == "reused"


def mednext(*kernels):
    spec = narrow(NETWORKS["mednext"].spec(2, expansion=(2,)), (4, 6))
    return replace(spec, kernels=kernels)


@torch.no_grad()
def test_larger_kernels_begin_as_those_of_the_source_upsampled():
    """By hand: from three places to five, whose centres lie at -0.2, 0.4, 1, 1.6 and 2.2 of the three."""
    old, given = source(planned(mednext((3, 3), (3, 3)), "MR"))
    kernel = given.tensors["encoder.0.0.spatial.weight"]
    assert kernel.shape == (4, 1, 3, 3)
    kernel[1, 0] = torch.outer(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 0.0, -1.0]))
    new, lines = begun(planned(mednext((5, 5), (5, 5)), "MR"), given)
    grown = torch.outer(torch.tensor([0.0, 0.4, 1.0, 1.6, 2.0]), torch.tensor([1.0, 0.6, 0.0, -0.6, -1.0]))
    torch.testing.assert_close(new.encoder[0][0].spatial.weight[1, 0], grown)
    assert lines["encoder.0.0.spatial.weight"].how == "up-sampled 3 to 5"
    kernels = {name for name, line in lines.items() if line.what == "adapted"}
    assert kernels == {name for name in lines if name.endswith("spatial.weight")}
    assert {line.what for name, line in lines.items() if name not in kernels} == {"reused"}
    assert torch.equal(new.down[0].spatial.bias, old.down[0].spatial.bias)


@pytest.mark.parametrize(
    ("there", "here", "how"),
    [
        (((1, 3), (3, 3)), ((1, 5), (3, 3)), "up-sampled 1 x 3 to 1 x 5"),
        (((1, 3), (3, 3)), ((3, 3), (3, 3)), "4 x 1 x 1 x 3 in the source, 4 x 1 x 3 x 3 here"),
        (((5, 5), (3, 3)), ((3, 3), (3, 3)), "4 x 1 x 5 x 5 in the source, 4 x 1 x 3 x 3 here"),
    ],
)
def test_kernels_of_one_voxel_and_larger_ones_are_not_upsampled(there, here, how):
    _, given = source(planned(mednext(*there), "MR"))
    _, lines = begun(planned(mednext(*here), "MR"), given)
    assert lines["encoder.0.0.spatial.weight"].how == how
    assert lines["encoder.0.0.spatial.bias"].what == ("reused" if how.startswith("up") else "new")


@torch.no_grad()
def test_strange_channels_start_as_the_mean():
    """Two strange channels of equal content give what three old ones of that content gave, and 1 -> 1 is a copy."""
    old, given = source(plan(channels=("a", "b", "c")))
    new, lines = begun(plan(channels=("d", "e")), given)
    content = torch.randn(1, 1, 4, 6, 8)
    assert torch.allclose(new(content.expand(-1, 2, -1, -1, -1)), old(content.expand(-1, 3, -1, -1, -1)), atol=1e-4)
    assert lines[UNet.first_weight].how == "d as the mean, e as the mean, a dropped, b dropped, c dropped"
    old, given = source(plan(channels=("MR",)))
    new, _ = begun(plan(channels=("CT",)), given)
    assert torch.equal(new(IMAGE), old(IMAGE))


def test_kernels_of_other_networks_are_not_upsampled():
    wide = replace(network(), kernels=((5, 5, 5), (3, 3, 3)))
    _, given = source(plan())
    _, lines = begun(plan(replace(configuration(), network=wide)), given)
    assert lines["encoder.0.0.conv.weight"].what == "new"


@torch.no_grad()
def test_the_second_stage_of_a_cascade_begins_as_the_network_that_saw_the_image_alone():
    made = plan()
    old, given = source(made)
    late = plan(configuration("3d_cascade_fullres", previous_stage="3d_lowres"))
    assert inputs(late, late.configurations[0]) == ("MR", "mask of liver", "mask of lesion")
    new, lines = begun(late, given)
    masks = torch.randn(2, 2, 4, 6, 8)
    assert torch.allclose(new(torch.cat([IMAGE, masks], 1)), old(IMAGE), atol=1e-5)
    assert lines[UNet.first_weight].how == "MR taken over, mask of liver zero, mask of lesion zero"


def test_blocks_of_other_shapes_stay_fresh_as_a_whole():
    """A block whose convolution differs does not keep the old bias and norm beside a new kernel."""
    old, given = source(plan())
    wider = plan(replace(configuration(), network=replace(network(), features=(4, 10))))
    new, lines = begun(wider, given)
    fresh = net(wider)
    for name, tensor in new.state_dict().items():
        if name.startswith(("encoder.1", "up.0")):
            assert lines[name].what == "new"
            assert torch.equal(tensor, fresh.state_dict()[name])
        else:
            assert torch.equal(tensor, old.state_dict()[name])
    assert lines["encoder.1.0.conv.weight"].how == "6 x 4 x 3 x 3 x 3 in the source, 10 x 4 x 3 x 3 x 3 here"
    assert lines["up.0.bias"].how == "the rest of its block does not fit"
    deeper = plan(replace(configuration(), network=replace(network(), encoder_blocks=(2, 1))))
    assert begun(deeper, given)[1]["encoder.0.1.conv.weight"].how == "the source has none of this name"


def test_a_source_that_fits_nowhere_is_refused():
    _, given = source(plan())
    for other in (network(features=(5, 7)), network(2)):
        made = plan(configuration(patch=(4, 6, 8)[3 - other.dimension :], spacing_mm=(1.0,) * other.dimension))
        made = replace(made, configurations=(replace(made.configurations[0], network=other),))
        with pytest.raises(AutosegError, match=r"nothing of elsewhere fits.*--like"):
            begun(made, given)


@torch.no_grad()
def test_bare_weights_are_taken_by_their_shape(tmp_path):
    old, given = source(plan())
    save_file({k: v.contiguous() for k, v in given.tensors.items()}, tmp_path / "w.safetensors")
    bare = open_source(tmp_path / "w.safetensors", "3d_fullres")
    assert torch.equal(begun(plan(), bare)[0](IMAGE), old(IMAGE))
    _, lines = begun(labelled(plan(channels=("a", "b")), "background", "x"), bare)
    assert lines["heads.0.bias"].what == "new"
    assert lines[UNet.first_weight].how == "a as the mean, b as the mean"


def test_a_model_file_and_folders_are_opened_at_their_first_fold(tmp_path):
    for seed in (0, 1):
        finished_run(tmp_path / "3d_fullres" / f"fold_{seed}", seed)
    run = load_json(Run, tmp_path / "3d_fullres" / "fold_0" / "run.json")
    late = replace(run.plan.configurations[0], name="3d_cascade_fullres", previous_stage="3d_fullres")
    both = replace(run.plan, configurations=(*run.plan.configurations, late))
    save_file(dict(net(both, late).state_dict()), tmp_path / "late.safetensors")
    stages = (Stage(configuration="3d_fullres", folds=(0, 1)), Stage(configuration=late.name, folds=(4,)))
    weights = {
        f"3d_fullres/fold_{n}.safetensors": tmp_path / f"3d_fullres/fold_{n}/weights.safetensors" for n in (0, 1)
    }
    weights[f"{late.name}/fold_4.safetensors"] = tmp_path / "late.safetensors"
    card = ModelFile(autoseg_version="0.1.0", created="now", plan=both, stages=stages)
    write(tmp_path / "m.autoseg", card, weights)
    for path in ("m.autoseg", "3d_fullres", "3d_fullres/fold_0", "3d_fullres/fold_0/weights.safetensors"):
        found = open_source(tmp_path / path, "3d_fullres")
        first = open_source(tmp_path / "3d_fullres" / "fold_0", "3d_fullres")
        assert all(torch.equal(tensor, first.tensors[name]) for name, tensor in found.tensors.items())
    assert plan_at(tmp_path / "m.autoseg") == both
    assert plan_at(tmp_path / "3d_fullres") == plan_at(tmp_path / "3d_fullres" / "fold_1") == run.plan
    with pytest.raises(AutosegError, match=r"no run\.json"):
        plan_at(tmp_path)
    assert "3d_fullres fold_0" in open_source(tmp_path / "m.autoseg", "3d_fullres").words
    assert "3d_cascade_fullres fold_4" in open_source(tmp_path / "m.autoseg", "2d").words
    with pytest.raises(AutosegError, match="does not exist"):
        open_source(tmp_path / "no.autoseg", "2d")
    save_json(replace(run, finished=None), tmp_path / "3d_fullres" / "fold_0" / "run.json")
    with pytest.raises(AutosegError, match="not trained to its end"):
        open_source(tmp_path / "3d_fullres" / "fold_0", "2d")


def test_what_reaches_the_network_differently_is_said():
    made = plan(channels=("MR", "CT"))
    _, given = source(made)
    here = made.configurations[0]
    assert differences(made, here, given) == []
    assert differences(made, here, replace(given, plan=None)) == []
    other = plan(channels=("MR", "new"), axis_order=(1, 0, 2), scheme="rescale")
    assert differences(other, replace(here, spacing_mm=(2.5, 1.0, 0.5)), given) == [
        "spacing 3 x 1 x 0.5 mm there, 2.5 x 1 x 0.5 mm here",
        "the order of the axes",
        "the normalisation of MR",
    ]
    cropped = replace(made, preparation=Preparation(crops=(parse_crop("crop_to(size=[4, 6, 8])"),)))
    assert differences(cropped, here, given) == ["crops, combined channels or a preprocessing of one's own"]


def test_a_plan_taken_over_has_the_median_shape_of_the_new_data():
    """Worked by hand: 10 x 24 x 30 voxels of 3 x 1 x 0.5 mm (Z, Y, X); the plan's axes are (Y, Z, X)."""
    case = CaseFingerprint(case="a", shape=(10, 24, 30), spacing_mm=(3.0, 1.0, 0.5), crop_ratio=1.0)
    facts = Fingerprint(dataset="New", dimension=3, channel_names=("MR",), cases=(case,), intensities=(None,))
    planar = configuration("2d", (3.0, 1.0), (8, 6))
    theirs = plan(configuration(spacing_mm=(2.0, 3.0, 1.0)), planar, axis_order=(1, 0, 2))
    own = replace(plan(channels=("MR", "CT"), scheme="none"), dataset="New", name="fine")
    made = plan_like(theirs, facts, own.labels, own, "m.autoseg")
    assert made.configuration("3d_fullres").median_shape == (12, 10, 15)
    assert made.configuration("2d").median_shape == (10, 15)
    assert (made.dataset, made.name, made.axis_order) == ("New", "fine", (1, 0, 2))
    assert made.channels == (theirs.channels[0], own.channels[1])
    assert "does not know this channel" in made.reasons[-1].rule


def test_the_table_has_a_line_a_tensor():
    made = plan()
    _, given = source(made)
    _, lines = transfer(net(made), made, made.configurations[0], given)
    rows = tensor_table(lines).splitlines()
    assert len(rows) == len(given.tensors)
    assert rows[0].split() == [UNet.first_weight, "reused"]
    assert outputs(made) == ("background", "liver", "lesion")


def test_masks_of_regions_are_called_by_their_values():
    """A region has several values, and there is a mask for each value of the files."""
    late = plan(configuration("3d_cascade_fullres", previous_stage="3d_lowres"))
    regions = Labels.from_dataset({"background": 0, "any": [3, 5, 9], "core": 5})
    late = replace(late, labels=regions)
    assert inputs(late, late.configurations[0]) == ("MR", "mask of value 3", "mask of value 5", "mask of value 9")
