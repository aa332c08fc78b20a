"""What was drawn for a sample, in words."""

from collections.abc import Callable

import numpy as np

from autoseg.augment.default import Draws


def describe(draws: Draws, sample: int) -> tuple[str, ...]:
    """One phrase a transform that changes sample number `sample`, in the order in which they act.

    Numbers of channels are divided by a slash, with a dash for a channel that is left as it is. Axes are Z, Y and X in
    plan order; lengths are voxels.
    """
    axes, spoilt = "ZYX"[-len(draws.patch) :], draws.artefacts
    said: list[str] = []

    def say(name: str, values: np.ndarray, neutral: float, words: Callable[[int], str]) -> None:
        changed = [(entry != neutral).any() for entry in values]
        if any(changed):
            said.append(f"{name} " + " / ".join(words(c) if there else "-" for c, there in enumerate(changed)))

    if draws.turn_rad[sample].any():
        said.append(f"turned {_list(np.rad2deg(draws.turn_rad[sample]), '.0f')} degrees")
    if draws.scale[sample] != 1:
        said.append(f"size x {1 / draws.scale[sample]:.2f}")
    if draws.enlargement[sample] != 1:
        said.append(f"zoom {100 * (draws.enlargement[sample] - 1):.1f} %")
    if draws.shear_rad[sample].any():
        said.append(f"shear {_list(np.rad2deg(draws.shear_rad[sample]), '.1f')} degrees")
    if (bent := draws.displacement[sample]).any():
        said.append(f"elastic, up to {np.abs(bent).max():.1f} voxels")
    if draws.mirrored[sample].any():
        said.append(f"mirrored {', '.join(axes[axis] for axis in np.flatnonzero(draws.mirrored[sample]))}")
    if draws.noise_sigma[sample] > 0:
        said.append(f"noise {draws.noise_sigma[sample]:.3f}")
    say("blur", draws.blur_sigma[sample], 0, lambda c: _list(draws.blur_sigma[sample, c], ".2f"))
    for name, factors in (("brightness x", draws.brightness), ("contrast x", draws.contrast)):
        say(name, factors[sample], 1, lambda c, factors=factors: f"{factors[sample, c]:.2f}")  # type: ignore[misc]
    say("resolution x", draws.zoom[sample], 1, lambda c: f"{draws.zoom[sample, c].min():.2f}")
    for name, powers in (("gamma of the negative", draws.gamma_inverted), ("gamma", draws.gamma)):
        say(name, powers[sample], 1, lambda c, powers=powers: f"{powers[sample, c]:.2f}")  # type: ignore[misc]
    length, angle = spoilt.motion_length[sample], np.rad2deg(spoilt.motion_angle[sample])
    say("motion", length, 0, lambda c: f"{length[c]:.1f} voxels at {angle[c]:.0f} degrees")
    bias = spoilt.bias_log[sample]
    say("bias up to x", bias, 0, lambda c: f"{np.exp(np.abs(bias[c]).max()):.2f}")
    ghosts, copies, along = spoilt.ghost_strength[sample], spoilt.ghost_copies[sample], spoilt.ghost_axis[sample]
    say("ghosts", ghosts, 0, lambda c: f"{copies[c]} of {ghosts[c]:.2f} along {axes[along[c]]}")
    left = spoilt.anisotropy[sample]
    say("coarse", left, 1, lambda c: f"x {left[c].min():.2f} along {axes[int(left[c].argmin())]}")
    if spoilt.rician_sigma[sample] > 0:
        said.append(f"Rician noise {spoilt.rician_sigma[sample]:.3f}")
    return tuple(said)


def _list(values: np.ndarray, form: str) -> str:
    return ", ".join(f"{value:{form}}" for value in values)
