"""Which transforms a named augmentation has, how often, and from which ranges.

`default` is nnU-Net v2's (Isensee et al., Nature Methods 2021). `desai` is the chain of Desai et al. (Technical
considerations for semantic segmentation in MRI using CNNs, 2019): zoom, shear, gamma, motion blur, all on every sample.
`strong` is the default list with wider ranges and elastic deformation. `mr_artefacts` moves patches and changes their
contrast as the default does, and spoils them as a scanner does: motion and Rician noise in place of Gaussian blur and
noise, one coarse axis in place of coarse voxels, and bias fields and ghosts beside them.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from autoseg.records import record

Range = tuple[float, float]


@record
class Policy:
    """Probabilities a sample, and ranges that are drawn from uniformly. A pair about 1 may be halved, see `halved`."""

    rotation: float = 0.2
    scaling: float = 0.2
    scale: Range = (0.7, 1.4)
    """One factor for all axes; above 1 objects shrink."""
    noise: float = 0.1
    noise_sigma: Range = (0.0, 0.1)
    blur: float = 0.2
    blur_channel: float = 0.5
    """Probability of each channel, once the sample was chosen."""
    blur_sigma: Range = (0.5, 1.0)
    brightness: float = 0.15
    brightness_factor: Range = (0.75, 1.25)
    contrast: float = 0.15
    contrast_factor: Range = (0.75, 1.25)
    low_resolution: float = 0.25
    low_resolution_channel: float = 0.5
    zoom: Range = (0.5, 1.0)
    gamma_inverted: float = 0.1
    gamma: float = 0.3
    gamma_exponent: Range = (0.7, 1.5)
    halved: bool = True
    """Whether brightness, contrast and gamma fall below and above 1 equally often; otherwise they are uniform."""
    mirror: float = 0.5
    """Probability of each axis."""
    enlarging: float = 0.0
    enlargement: Range = (1.0, 1.1)
    """By how much objects grow, along all axes alike."""
    shear: float = 0.0
    shear_degrees: Range = (-15.0, 15.0)
    """One angle an axis, which leans towards the next one, the last towards the first."""
    elastic: float = 0.0
    elastic_share: Range = (0.0, 0.4)
    """Largest displacement of a control point, as a share of the distance between two: below 0.4 nothing folds."""
    artefact_channel: float = 1.0
    """Probability of each channel in all that follow but the noise, once the sample was chosen."""
    bias: float = 0.0
    bias_log: Range = (0.0, 1.0)
    """Largest logarithm of the gain at a control point."""
    ghosting: float = 0.0
    ghost_copies: tuple[int, int] = (1, 4)
    ghost_strength: Range = (0.0, 0.3)
    """Share of the signal that goes to all copies together."""
    motion: float = 0.0
    motion_length: Range = (0.0, 5.0)
    """Length of the path in voxels; its direction is any in the plane."""
    rician: float = 0.0
    rician_sigma: Range = (0.0, 0.1)
    anisotropy: float = 0.0
    anisotropy_zoom: Range = (0.2, 0.67)
    """Voxels that are left along one axis, as a share."""


DEFAULT = Policy()
NONE = Policy(
    rotation=0, scaling=0, noise=0, blur=0, brightness=0, contrast=0,
    low_resolution=0, gamma_inverted=0, gamma=0, mirror=0,
)  # fmt: skip
DESAI = replace(NONE, enlarging=1, shear=1, gamma=1, gamma_exponent=(0.8, 1.1), halved=False, motion=1)
STRONG = replace(
    DEFAULT,
    rotation=0.4,
    scaling=0.4,
    scale=(0.6, 1.6),
    elastic=0.3,
    noise_sigma=(0.0, 0.2),
    blur_sigma=(0.5, 1.5),
    brightness_factor=(0.6, 1.4),
    contrast_factor=(0.6, 1.4),
    zoom=(0.3, 1.0),
    gamma_exponent=(0.5, 2.0),
)
MR_ARTEFACTS = replace(
    DEFAULT,
    noise=0,
    blur=0,
    low_resolution=0,
    artefact_channel=0.5,
    bias=0.3,
    ghosting=0.2,
    motion=0.2,
    rician=0.2,
    anisotropy=0.25,
)

POLICIES = {"default": DEFAULT, "none": NONE, "desai": DESAI, "strong": STRONG, "mr_artefacts": MR_ARTEFACTS}

TRANSFORMS: dict[str, tuple[str, ...]] = {
    "rotation": ("rotation",),
    "scaling": ("scaling",),
    "zoom": ("enlarging",),
    "shear": ("shear",),
    "elastic": ("elastic",),
    "mirror": ("mirror",),
    "noise": ("noise",),
    "blur": ("blur", "blur_channel"),
    "brightness": ("brightness",),
    "contrast": ("contrast",),
    "low resolution": ("low_resolution", "low_resolution_channel"),
    "gamma, inverted": ("gamma_inverted",),
    "gamma": ("gamma",),
    "motion blur": ("motion", "artefact_channel"),
    "bias field": ("bias", "artefact_channel"),
    "ghosting": ("ghosting", "artefact_channel"),
    "anisotropy": ("anisotropy", "artefact_channel"),
    "Rician noise": ("rician",),
}
"""Transform -> the probabilities of `Policy` that it has; in the order in which they act."""


def used(policy: Policy) -> tuple[str, ...]:
    """The transforms that `policy` has, in the order in which they act."""
    return tuple(name for name, (chance, *_) in TRANSFORMS.items() if getattr(policy, chance) > 0)


def certain(policy: Policy, names: Collection[str]) -> Policy:
    """`policy` with the transforms `names` on every sample and channel, and no other.

    The same generator then draws the same parameters for a transform whatever others there are.
    """
    chances: dict[str, Any] = {field: 0.0 for fields in TRANSFORMS.values() for field in fields}
    return replace(policy, **chances | {field: 1.0 for name in names for field in TRANSFORMS[name]})
