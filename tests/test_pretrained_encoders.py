"""Published weights by torchvision's names, and encoders that are frozen at first or learn at a rate of their own."""

import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from test_networks_resnet import small
from test_predict import finished_run
from test_training import parts, weights, write_cases
from torch import nn
from toys import configuration, plan

from autoseg.history import read_metrics
from autoseg.labels import Labels
from autoseg.networks import NETWORKS, build, output_scales, spec_of
from autoseg.networks.footprint import on_meta
from autoseg.parameter_groups import RATE_FACTOR, hold_encoder
from autoseg.pipeline.parts import PRETRAINED, begin_with
from autoseg.published import ADDRESS, FILES, network_of
from autoseg.records import AutosegError, load_json
from autoseg.schema import NetworkSpec, Recipe, Run
from autoseg.signals import Requests, Stopped
from autoseg.step import make_optimizer, training_step
from autoseg.training import train
from autoseg.transfer import open_source, transfer


def a_plan(spec, channels=("MR",), classes=("liver", "lesion")):
    labels = Labels.from_dataset({name: value for value, name in enumerate(("background", *classes))})
    here = replace(configuration("2d", (1.0, 1.0), (32, 32)), network=spec)
    return replace(plan(here, channels=channels), labels=labels)


def drawn(spec, in_channels, heads, seed):
    """A network that no value of is what a fresh one would have too, its running statistics included."""
    torch.manual_seed(seed)
    network = build(spec, in_channels, heads)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor += 0.1 * torch.rand(tensor.shape)
    return network.eval()


def encoder_file(path, spec, wrap=lambda tensors: tensors, legacy=False, counters=True):
    """An encoder for colour images as torchvision would save it, with the layer of its 1000 classes; returns it."""
    encoder = drawn(spec, 3, 2, seed=5).encoder
    tensors = {"fc.weight": torch.ones(1000, 7), "fc.bias": torch.ones(1000), **encoder.state_dict()}
    if not counters:
        tensors = {name: one for name, one in tensors.items() if not name.endswith("num_batches_tracked")}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(wrap(tensors), path, _use_new_zipfile_serialization=not legacy)
    return encoder


def begun(made, path):
    """The network of a plan with the weights at `path`, and what became of each tensor."""
    here = made.configurations[0]
    torch.manual_seed(0)
    network = build(here.network, made.in_channels(here), made.labels.heads).eval()
    begin, lines = transfer(network, made, here, open_source(path, here.name))
    network.load_state_dict(begin)
    return network, {line.tensor: line for line in lines}


SPEC = small("resnet34_unet")
IMAGE = torch.randn(2, 1, 32, 48, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"legacy": True, "counters": False},
        {"wrap": lambda tensors: {"state_dict": {f"module.{name}": one for name, one in tensors.items()}, "epoch": 3}},
        {"wrap": lambda tensors: {"model": {k: t.double() if t.ndim else t for k, t in tensors.items()}}},
        {"suffix": ".safetensors", "counters": False},
    ],
)
@torch.no_grad()
def test_a_published_encoder_sees_a_grey_image_as_a_colour_image_of_three_equal_channels(tmp_path, how):
    how = dict(how)
    path = tmp_path / f"resnet34{how.pop('suffix', '.pth')}"
    encoder = encoder_file(path, SPEC, **how)
    network, lines = begun(a_plan(SPEC), path)
    for ours, theirs in zip(network.encoder(IMAGE), encoder(IMAGE.expand(-1, 3, -1, -1)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert lines["encoder.conv1.weight"].what == "adapted"
    assert {line.what for name, line in lines.items() if name.startswith("encoder.") and "conv1.w" not in name} == {
        "reused"
    }
    assert {line.what for name, line in lines.items() if not name.startswith("encoder.")} == {"new"}


@torch.no_grad()
def test_more_channels_share_what_colours_weighed_and_three_are_taken_as_they_are(tmp_path):
    encoder = encoder_file(tmp_path / "w.pth", SPEC)
    network, lines = begun(a_plan(SPEC, channels=("a", "b", "c", "d", "e")), tmp_path / "w.pth")
    expected = encoder.conv1(IMAGE.expand(-1, 3, -1, -1))
    torch.testing.assert_close(network.encoder.conv1(IMAGE.expand(-1, 5, -1, -1)), expected, rtol=1e-4, atol=1e-4)
    assert lines["encoder.conv1.weight"].how.startswith("a as the mean, b as the mean")
    network, lines = begun(a_plan(SPEC, channels=("R", "G", "B")), tmp_path / "w.pth")
    assert torch.equal(network.encoder.conv1.weight, encoder.conv1.weight)
    assert lines["encoder.conv1.weight"].what == "reused"


@torch.no_grad()
def test_a_published_vgg_fits_by_name_and_what_lies_below_it_is_new(tmp_path):
    spec = small("vgg_unet")
    encoder = encoder_file(tmp_path / "vgg16_bn.pth", spec)
    network, lines = begun(a_plan(spec), tmp_path / "vgg16_bn.pth")
    for ours, theirs in zip(network.encoder(IMAGE), encoder(IMAGE.expand(-1, 3, -1, -1)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert lines["encoder.features.0.weight"].what == "adapted"
    reused = {name for name, line in lines.items() if line.what == "reused"}
    assert reused == {name for name in lines if name.startswith("encoder.")} - {"encoder.features.0.weight"}
    assert lines["centre.0.0.weight"].what == "new"


def fcn_file(path, spec, heads):
    network = drawn(spec, 3, heads, seed=5)
    tensors = {name.replace("encoder.", "backbone."): one for name, one in network.state_dict().items()}
    torch.save(tensors, path)
    return network


@torch.no_grad()
def test_published_fcns_keep_all_but_the_classes(tmp_path):
    """With as many classes everything: then they may well be the same."""
    spec = small("fcn_resnet50")
    fcn = fcn_file(tmp_path / "w.pth", spec, heads=7)
    network, lines = begun(a_plan(spec, channels=("R", "G", "B")), tmp_path / "w.pth")
    new = {name for name, line in lines.items() if line.what != "reused"}
    assert new == {f"{head}.4.{part}" for head in ("classifier", "aux_classifier") for part in ("weight", "bias")}
    image = IMAGE.expand(-1, 3, -1, -1)
    torch.testing.assert_close(network.encoder(image), fcn.encoder(image))
    assert torch.equal(network.aux_classifier[0].weight, fcn.aux_classifier[0].weight)
    same = begun(a_plan(spec, channels=("R", "G", "B"), classes="abcdef"), tmp_path / "w.pth")[0]
    assert torch.equal(same(image), fcn(image))


@torch.no_grad()
def test_a_deeplab_on_a_resnet_takes_its_encoder(tmp_path):
    spec = small("deeplabv3plus", backbone="resnet50")
    encoder = encoder_file(tmp_path / "resnet50.pth", spec)
    network, _ = begun(a_plan(spec, channels=("R", "G", "B")), tmp_path / "resnet50.pth")
    image = IMAGE.expand(-1, 3, -1, -1)
    torch.testing.assert_close(network.encoder(image), encoder(image))


@pytest.mark.parametrize("other", [small("fcn_resnet50"), small("deeplabv3plus"), small("resnet34_unet", 3)])
def test_weights_of_another_network_are_refused(tmp_path, other):
    """Also where only the first layer would fit."""
    encoder_file(tmp_path / "w.pth", SPEC)
    with pytest.raises(AutosegError, match="of as many axes, blocks and features"):
        begun(a_plan(other, channels=("R", "G", "B")), tmp_path / "w.pth")


@pytest.mark.parametrize("name", FILES)
def test_the_network_of_published_weights_is_known_by_their_names(name):
    tensors = on_meta(spec_of(name, 2), 3, 2).state_dict()
    encoder = {tensor.removeprefix("encoder.") for tensor in tensors if tensor.startswith("encoder.")}
    assert network_of(encoder) == name.replace("fcn_resnet50", "deeplabv3plus(backbone=resnet50)").replace(
        "fcn_resnet101", "deeplabv3plus(backbone=resnet101)"
    )
    if name.startswith("fcn"):
        assert network_of({f"backbone.{tensor}" for tensor in encoder} | {"classifier.4.weight"}) == name


@pytest.mark.parametrize("names", [set(), {"a.weight"}, {"layer3.0.conv1.weight", "layer3.1.conv1.weight"}])
def test_other_names_are_of_no_network_that_is_known(names):
    """The last has blocks as a ResNet-18."""
    assert network_of(names) is None


def test_weights_of_a_known_network_name_it_where_another_is_planned(tmp_path):
    names = on_meta(spec_of("resnet34_unet", 2), 3, 2).state_dict()
    torch.save({name.removeprefix("encoder."): torch.zeros(2, 3) for name in names}, tmp_path / "w.pth")
    with pytest.raises(AutosegError, match=r"called as those of resnet34_unet: .* --network 'resnet34_unet'"):
        begun(a_plan(small("fcn_resnet50")), tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["resnet34.pth", "resnet34.safetensors", "resnet34"])
def test_a_missing_file_is_answered_with_where_to_get_it(tmp_path, name):
    with pytest.raises(AutosegError, match=rf"Nothing is downloaded(.|\n)*resnet34_unet: {ADDRESS}resnet34"):
        open_source(tmp_path / name, "2d")


class Code:
    def __reduce__(self):
        return (print, ("this must not be run",))


@pytest.mark.parametrize(
    ("content", "said"), [(Code(), "weights alone"), ([1, 2], "no tensors by name"), ({"a": 3}, "no tensors by name")]
)
def test_what_is_not_weights_is_refused_and_never_run(tmp_path, capsys, content, said):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(AutosegError, match=said):
        open_source(tmp_path / "w.pth", "2d")
    (tmp_path / "w.pth").write_bytes(b"<html>not found</html>")
    with pytest.raises(AutosegError, match="cannot be read"):
        open_source(tmp_path / "w.pth", "2d")
    (tmp_path / "w.safetensors").write_bytes(b"<html>not found</html>")
    with pytest.raises(AutosegError, match="no whole file of safetensors; fetch it again"):
        open_source(tmp_path / "w.safetensors", "2d")
    assert capsys.readouterr().out == ""


def test_training_begins_with_the_file_and_writes_the_table(tmp_path, capsys):
    finished_run(tmp_path / "fold_0", 0)
    encoder = encoder_file(tmp_path / "resnet34.pth", SPEC)
    made = a_plan(SPEC)
    run = replace(load_json(Run, tmp_path / "fold_0" / "run.json"), plan=made)
    run = replace(run, configuration="2d", pretrained=str(tmp_path / "resnet34.pth"))
    network = build(SPEC, 1, 3)
    begin_with(network, run, made.configurations[0], tmp_path)
    assert torch.equal(network.encoder.layer1[0].conv1.weight, encoder.layer1[0].conv1.weight)
    table = (tmp_path / PRETRAINED).read_text()
    assert "encoder.conv1.weight" in table
    assert "MR as the mean" in table
    assert "adapted" in capsys.readouterr().out


RESIDUAL = NetworkSpec(
    name="resnet34_unet",
    dimension=3,
    features=(3, 4, 5),
    strides=((1, 2, 2), (2, 2, 2), (2, 1, 1)),
    kernels=((3, 3, 3),) * 3,
    encoder_blocks=(1, 1, 1),
    decoder_blocks=(1, 1, 1),
    options={"decoder_features": (3, 4, 5)},
)


def residual_parts(place, run="run", **recipe):
    """A small ResNet U-Net with batch norms, on the cases of the tests of training."""
    made = parts(place, run, **{"augmentation": "none", "epochs": 3, "steps_per_epoch": 2, **recipe})
    torch.manual_seed(7)
    network = build(RESIDUAL, 1, made.labels.heads)
    return replace(made, network=network, scales=output_scales(network, RESIDUAL))


@pytest.fixture
def place(tmp_path):
    write_cases(tmp_path / "cases")
    return tmp_path


def encoder_state(network):
    """All numbers of the encoder, running statistics too."""
    return {name: one.clone() for name, one in network.state_dict().items() if name.startswith("encoder.")}


def moved(before, network):
    after = encoder_state(network)
    return {name for name, one in before.items() if not torch.equal(one, after[name])}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_what_is_frozen_does_not_move_in_a_step_nor_do_its_statistics(place, optimizer):
    made = residual_parts(place, optimizer=optimizer, freeze_encoder_epochs=2, weight_decay=0.5)
    made.network.train()
    stepper, scaler = make_optimizer(made.network, made.recipe), torch.amp.GradScaler("cpu", enabled=False)
    batch = made.training.assemble(made.training.sources(0), made.device)
    before, heads = encoder_state(made.network), made.network.heads[0].weight.detach().clone()
    for epoch in (0, 1):
        made.network.train()  # as validation leaves it
        hold_encoder(made.network, made.recipe, epoch)
        assert training_step(made, stepper, scaler, batch) is not None
        assert not moved(before, made.network)
    assert not torch.equal(heads, made.network.heads[0].weight)
    hold_encoder(made.network, made.recipe, 2)
    training_step(made, stepper, scaler, batch)
    assert moved(before, made.network) == set(before)


def test_the_encoder_is_frozen_for_whole_epochs_and_learns_from_then_on(place):
    made = residual_parts(place, freeze_encoder_epochs=2)
    begin, seen = encoder_state(made.network), []
    train(made, lambda lines: seen.append(bool(moved(begin, made.network))))
    assert seen == [False, False, True]


@pytest.mark.parametrize("options", [{"freeze_encoder_epochs": 2}, {"freeze_encoder_epochs": 1, "encoder_rate": 0.1}])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_stopped_and_resumed_equals_uninterrupted(place, options, optimizer):
    """Stopped while the encoder is frozen, or just when it is no longer."""
    whole = residual_parts(place, "whole", optimizer=optimizer, **options)
    train(whole)
    begun, requests = residual_parts(place, "halves", optimizer=optimizer, **options), Requests()

    def stop(lines):
        requests.stop = signal.SIGTERM

    with pytest.raises(Stopped):
        train(begun, stop, requests)
    gone_on = residual_parts(place, "halves", optimizer=optimizer, **options)
    train(gone_on)
    assert torch.equal(weights(whole), weights(gone_on))
    first, second = (encoder_state(one.network) for one in (whole, gone_on))
    assert all(torch.equal(one, second[name]) for name, one in first.items())
    rates = [[line["learning_rate"] for line in read_metrics(one.folder)] for one in (whole, gone_on)]
    assert rates[0] == rates[1]
    assert rates[0][0] == pytest.approx(0.01)  # that of the network, not of its encoder


def step_of(place, **recipe):
    """What one plain gradient step changes in the encoder and in the head."""
    made = residual_parts(place, momentum=0.0, weight_decay=0.0, **recipe)
    made.network.train()
    batch = made.training.assemble(made.training.sources(0), made.device)
    changing = [made.network.encoder.conv1.weight, made.network.heads[0].weight]
    before = [one.detach().clone() for one in changing]
    optimizer = make_optimizer(made.network, made.recipe)
    training_step(made, optimizer, torch.amp.GradScaler("cpu", enabled=False), batch)
    return [one.detach() - old for one, old in zip(changing, before)]


def test_the_encoder_has_a_rate_of_its_own(place):
    plain, slow = step_of(place), step_of(place, encoder_rate=0.25)
    torch.testing.assert_close(slow[0], plain[0] / 4, rtol=1e-3, atol=1e-7)
    assert torch.equal(slow[1], plain[1])


def test_the_schedule_keeps_the_ratio_of_the_rates(place):
    """A plain step after training has set the rates: saved with the groups, which are always the same two."""
    made = residual_parts(place, encoder_rate=0.25, epochs=1, steps_per_epoch=1, warmup_steps=4)
    train(made)
    state = torch.load(made.folder / "checkpoint_000000001" / "optimizer.pt", weights_only=True)
    rest, encoder = state["param_groups"]
    assert rest["lr"] == pytest.approx(0.01 / 5)
    assert encoder["lr"] == pytest.approx(0.0025 / 5)
    assert encoder[RATE_FACTOR] == 0.25


def test_checkpoints_of_runs_without_these_options_still_load(place):
    made = residual_parts(place)
    old = torch.optim.SGD(made.network.parameters(), lr=0.3, momentum=0.99, nesterov=True).state_dict()
    optimizer = make_optimizer(made.network, made.recipe)
    assert optimizer.state_dict()["param_groups"][0]["params"] == old["param_groups"][0]["params"]
    optimizer.load_state_dict(old)
    assert optimizer.param_groups[0]["lr"] == 0.3


@pytest.mark.parametrize("change", [{"freeze_encoder_epochs": 1}, {"encoder_rate": 0.5}])
def test_a_network_without_an_encoder_says_so(change):
    with pytest.raises(AutosegError, match="has no encoder"):
        make_optimizer(nn.Conv2d(1, 2, 1), Recipe(**change))


DEEPER = ("fcn_resnet101", "fc_densenet67", "fc_densenet103")
"""They differ from others in depth alone."""


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in DEEPER])
def test_every_network_names_an_encoder_that_reads_the_image_and_has_no_head(name):
    architecture = NETWORKS[name]
    with torch.device("meta"):
        network = build(architecture.spec(architecture.dimensions[0]), 5, 2)
    # Networks of slices are volumetric inside, and have no such tensor for a plane.
    assert not network.first_weight or network.first_weight.startswith(network.encoder_prefixes)
    names = [one for one, _ in network.named_parameters()]
    encoder = {one for one in names if one.startswith(network.encoder_prefixes)}
    assert not any(one.startswith(network.heads_prefixes) for one in encoder)
    assert len(names) / 10 < len(encoder) < len(names)
