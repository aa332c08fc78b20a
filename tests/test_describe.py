"""Networks described: layers whose parameters add up, parts with the skip connections they have, a drawing of them."""

import sys
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from torch import nn

from autoseg.networks import NETWORKS, asked, options_of, spec_of
from autoseg.networks.describe import describe, diagram, table, table_csv
from autoseg.pipeline.networks import Sizes, describe_networks
from autoseg.records import AutosegError

UNET = describe(spec_of("unet(stages=3)", 2), (16, 24), 2, 3)


def test_the_layers_hold_all_parameters():
    assert sum(layer.parameters for layer in UNET.layers) == UNET.parameters
    first = UNET.layers[0]
    assert (first.kind, first.channels, first.size, first.kernel) == ("Conv2d", 32, (16, 24), (3, 3))
    assert first.parameters == 2 * 32 * 9 + 32
    assert f"{UNET.parameters:,} parameters" in table(UNET)
    assert len(table_csv(UNET).splitlines()) == 1 + len(UNET.layers)


@pytest.mark.parametrize(
    ("patch", "said"),
    [
        ((16, 24), "2 x 16 x 24 to"),
        ((17, 24), "2 x 17 x 24 padded to 20 x 24 to"),
        ((3, 5), "2 x 3 x 5 padded to 4 x 8"),
    ],
)
def test_a_patch_that_is_padded_is_said_to_be(patch, said):
    made = describe(spec_of("unet(stages=3)", 2), patch, 2, 3)
    assert said in made.title and made.title in table(made) and made.title in diagram(made)
    assert ("padded" in made.title) == (made.layers[0].size != patch), "the layers have the sizes that they compute"


def test_a_stage_is_a_part_and_skip_connections_show():
    reads = {part.name: part.reads for part in UNET.parts}
    assert reads["encoder.0"] == {"image"}
    assert reads["encoder.1"] == {"encoder.0"}
    assert reads["merge.1"] == {"up.1", "encoder.1"}
    assert reads["merge.0"] == {"up.0", "encoder.0"}
    sizes = {part.name: (part.channels, part.size) for part in UNET.parts}
    assert sizes["encoder.2"] == (128, (4, 6))
    assert sizes["heads.0"] == (3, (16, 24))


def test_without_highways_there_is_no_skip_connection():
    if "unet3d_nohighway" in NETWORKS:
        parts = describe(spec_of("unet3d_nohighway(size=tiny)", 2), (32, 32), 1, 2).parts
        assert all(len(part.reads) <= 1 for part in parts)


def test_the_drawing_names_every_part_once_and_none_lies_on_another():
    root = ET.fromstring(diagram(UNET))
    boxes = [group for group in root if group.tag.endswith("}g")]
    assert [box[0].text.split(":")[0] for box in boxes] == [part.name for part in UNET.parts]
    corners = [(float(box[1].get("x")), float(box[1].get("width"))) for box in boxes]
    assert all(x + width < later for (x, width), (later, _) in pairwise(corners))
    down = {part.name: float(box[1].get("y")) for part, box in zip(UNET.parts, boxes)}
    assert down["encoder.0"] == down["heads.0"] < down["encoder.1"] < down["encoder.2"]
    arrows = [path for path in root.iter() if path.get("marker-end")]
    assert len(arrows) == sum(len(part.reads) for part in UNET.parts)


def test_the_options_that_are_listed_can_be_asked_for():
    assert options_of(NETWORKS["mednext"]) == (
        "size=S, kernel=3, width=32, expansion=[], norm=instance, activation=gelu"
    )
    assert "auxiliary=true" in options_of(NETWORKS["fcn_resnet50"])
    for name, architecture in NETWORKS.items():
        listed = options_of(architecture)
        assert len(asked(f"{name}({listed})")[2]) == listed.count("=") > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_can_be_drawn(name):
    for dimension in NETWORKS[name].dimensions:
        spec = spec_of(name, dimension)
        made = describe(spec, (64,) * dimension, spec.slices, 2)
        assert 2 < len(made.parts) < 120
        ET.fromstring(diagram(made))


class Mine:
    """A module with networks of one's own."""

    class Flat(nn.Module):
        """Two convolutions, for images in 2D only."""

        def __init__(self, spec, in_channels, heads):
            super().__init__()
            self.first = nn.Conv2d(in_channels, spec.features[0], 3, padding=1)
            self.head = nn.Conv2d(spec.features[0], heads, 1)

        def forward(self, x, all_scales=False):
            x = self.head(self.first(x))
            return [x] if all_scales else x


@pytest.mark.parametrize("patch", [None, (21, 38)])
def test_a_network_of_ones_own_is_described_like_any_other(patch, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mine", Mine)
    describe_networks(["mine:Flat"], tmp_path, Sizes(patch=patch, channels=2, classes=3), compare=False)
    said = capsys.readouterr().out
    assert f"{2 * 32 * 9 + 32 + 32 * 3 + 3:,} parameters" in said
    assert ("cannot be shown in 3D" in said) == (patch is None)
    assert {path.name for path in tmp_path.iterdir()} == {f"Flat_2d.{ending}" for ending in ("txt", "csv", "svg")}
    # The patch is what planning would make of the one asked for: seven stages of 256 voxels, three of 21.
    assert ("256 x 256" if patch is None else "24 x 40") in said


def test_a_network_of_ones_own_that_cannot_be_described_is_explained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", Mine)
    with pytest.raises(AutosegError, match="mine:Flat cannot be shown in 3D: "):
        describe_networks(["mine:Flat"], tmp_path, Sizes(patch=(8, 9, 10)), compare=False)
    with pytest.raises(AutosegError, match="no class or function 'Round'"):
        describe_networks(["mine:Round"], tmp_path, Sizes(), compare=False)
