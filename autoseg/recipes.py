"""Recipes of published or described works by name, for `--recipe NAME`.

An entry changes fields of the default recipe; what the work did not state keeps its default, or is named as chosen
here. Network and patch belong to the plan: an entry says which network it was made for, and in words what the data were
like. A batch takes the place of the planned one. The length is that of the work, in epochs of as many steps as there
are stated; `--epochs` and `--budget` overrule it as in every recipe.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class NamedRecipe:
    """One entry of RECIPES."""

    network: str
    """The network that it was made for, as `--network` takes it."""
    source: str
    beside: str
    """What the work used that a recipe cannot set, in words."""
    chosen: str = ""
    """What the work leaves open and was chosen here."""
    changes: Mapping[str, Any]
    """Recipe field -> value."""

    @property
    def network_name(self) -> str:
        """The network without its options."""
        return self.network.partition("(")[0]


ADAM: dict[str, Any] = {"optimizer": "adam", "weight_decay": 0.0}
DESAI = "Desai et al., Technical considerations for semantic segmentation in MRI using CNNs (arXiv:1902.01977)"
DESAI_BESIDE = "2D slices of 288 x 288, z-score of the volume; 100 more epochs refined the weights"
DESAI_SLICES = 8640
"""Of training: 120 volumes of 72. An epoch shows each once, whatever the batch."""


def desai_epoch(batch: int) -> dict[str, Any]:
    """Batch and steps of an epoch of as many patches as the work had slices."""
    return {"batch_size": batch, "steps_per_epoch": round(DESAI_SLICES / batch)}


DESAI_FIELDS: dict[str, Any] = {
    **ADAM,
    "loss": "dice",
    "deep_supervision": False,
    "augmentation": "none",
    "foreground_fraction": 0.0,
    "epochs": 100,
    "weights": "best",
}
KNEE = "a students' comparison of 2D and 3D networks for knee cartilage (Imperial College London)"
KNEE_FIELDS: dict[str, Any] = {
    **ADAM,
    "loss": "dice",
    "deep_supervision": False,
    "learning_rate": 5e-5,
    "schedule": "step(factor=0.9,period=3)",
    "patch_position": "normal",
    "batch_size": 1,
    "epochs": 50,
}
VESSELS = "a students' project on blood vessels, trained on synthetic level sets (University of Cambridge)"
VESSELS_BESIDE = "2D slices of any size; synthetic images before real ones (`autoseg dataset make vessels`)"
VESSELS_FIELDS: dict[str, Any] = {
    "optimizer": "adamw",
    "weight_decay": 0.01,
    "learning_rate": 1e-3,
    "schedule": "plateau(factor=0.1,patience=5)",
    "stop_patience": 15,
    "weights": "best",
}

RECIPES: dict[str, NamedRecipe] = {
    "desai_unet": NamedRecipe(
        network="unet_vanilla(stages=6, width=32, norm=batch, norm_once=true, up_kernel=3, dropout=0)",
        source=DESAI,
        beside=DESAI_BESIDE,
        changes={**DESAI_FIELDS, **desai_epoch(35), "learning_rate": 1e-2, "schedule": "step(factor=0.8,period=1)"},
    ),
    "desai_segnet": NamedRecipe(
        network="segnet",
        source=DESAI,
        beside=DESAI_BESIDE,
        changes={**DESAI_FIELDS, **desai_epoch(15), "learning_rate": 1e-3, "schedule": "constant"},
    ),
    "desai_deeplab": NamedRecipe(
        network="deeplabv3plus(rates=[2, 4, 6], dropout=0.5)",
        source=DESAI,
        beside=DESAI_BESIDE,
        changes={**DESAI_FIELDS, **desai_epoch(12), "learning_rate": 1e-4, "schedule": "constant"},
    ),
    "knee_vnet": NamedRecipe(
        network="vnet(size=small)",
        source=KNEE,
        beside="volumes cropped to 160 x 288 x 288, patches of 160 x 160 x 160",
        changes=KNEE_FIELDS,
    ),
    "knee_unet3d": NamedRecipe(
        network="unet3d(size=small)",
        source=KNEE,
        beside="as knee_vnet; also without skip connections and with the position of the patch",
        changes=KNEE_FIELDS,
    ),
    "atrium_unet": NamedRecipe(
        network="unet_vanilla",
        source="a course's notebook on the left atrium (Medical Segmentation Decathlon, Task02), Dice 0.93",
        beside="2D slices, 32 voxels cut off each border after an empty one, z-score of the volume and then 0 to 1",
        chosen="optimizer, rate, loss and length: the notebook is not quoted on them",
        changes={
            **ADAM,
            "loss": "dice",
            "deep_supervision": False,
            "learning_rate": 1e-4,
            "schedule": "constant",
            "epochs": 75,
            "weights": "best",
        },
    ),
    "auckland_resnet34": NamedRecipe(
        network="resnet34_unet",
        source="a pipeline for bones of the lower limb in MR images of children (University of Auckland)",
        beside="2D slices, encoder with weights from ImageNet",
        chosen="subtraction as the reading of a decay of 1e-6 an epoch, its floor, gamma, patience and length",
        changes={
            **ADAM,
            "loss": "dice+categorical_focal(gamma=2)",
            "deep_supervision": False,
            "batch_size": 16,
            "learning_rate": 1e-4,
            "schedule": "subtract(amount=1e-6,floor=1e-6)",
            "epochs": 100,
            "stop_patience": 20,
            "weights": "best",
        },
    ),
    "vessels_fcn": NamedRecipe(
        network="fcn_resnet50",
        source=VESSELS,
        beside=VESSELS_BESIDE,
        chosen="rate, both patiences, options of the loss (its authors'), weight decay and factor (torch's defaults)",
        changes={**VESSELS_FIELDS, "loss": "focal_tversky", "deep_supervision": False},
    ),
    "vessels_unet": NamedRecipe(
        network="unet",
        source=VESSELS + ", a later state of it",
        beside=VESSELS_BESIDE,
        chosen="rate, both patiences, weight decay and factor (torch's defaults), and the loss, since all that is said "
        "is that focal Tversky was given up",
        changes={**VESSELS_FIELDS, "loss": "dice_ce"},
    ),
    "tiramisu": NamedRecipe(
        network="fc_densenet103",
        source="Jegou et al., The One Hundred Layers Tiramisu (CVPR workshops 2017)",
        beside="crops of 224 x 224, then whole pictures at rate 1e-4",
        chosen="batch and epochs, as in the authors' code; an epoch shows the 367 pictures of CamVid once; their "
        "RMSprop has 1e-6 under its root, this one 1e-8 beside it",
        changes={
            "loss": "ce",
            "deep_supervision": False,
            "optimizer": "rmsprop",
            "weight_decay": 1e-4,
            "learning_rate": 1e-3,
            "batch_size": 3,
            "steps_per_epoch": 122,
            "epochs": 750,
            "schedule": "step(factor=0.995,period=1)",
            "stop_patience": 100,
            "weights": "best",
        },
    ),
}


def table() -> str:
    """All recipes: what each sets, and under it where it comes from and what belongs to it."""
    heads = ("name", "network", "optimizer", "rate", "schedule", "loss", "epochs", "steps", "batch", "weights")
    keys = ("optimizer", "learning_rate", "schedule", "loss", "epochs", "steps_per_epoch", "batch_size", "weights")
    rows = [
        (name, entry.network_name, *(str(entry.changes.get(key, "default")) for key in keys))
        for name, entry in RECIPES.items()
    ]
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]

    def line(row: tuple[str, ...]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()

    lines = [line(heads), "-" * sum(widths, 2 * len(widths) - 2)]
    for row, entry in zip(rows, RECIPES.values()):
        lines += [line(row), f"    source: {entry.source}", f"    beside: {entry.beside}"]
        lines += [f"    network: {entry.network}"] if entry.network != entry.network_name else []
        lines += [f"    chosen here: {entry.chosen}"] if entry.chosen else []
    return "\n".join(lines)
