"""Recipe fields that would do nothing beside the others: refused where somebody states them, with the reason.

An option that is taken and then ignored lets people believe that they have tried something. Only what --set or a file
states is asked, never a default nor what a named recipe brings along, and only values other than the default, which ask
for nothing.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from autoseg.placement import POSITIONS
from autoseg.records import AutosegError
from autoseg.schedule import expected_epochs
from autoseg.schema import Recipe
from autoseg.settings import parse_call


@dataclass(frozen=True, kw_only=True)
class Effect:
    """When a field of the recipe does something. One entry of EFFECTS."""

    field: str
    there: Callable[[Recipe, bool], bool]
    """(recipe, whether training begins with weights of --pretrained) -> whether it does."""
    otherwise: str
    """What to say if not, with names of recipe fields in braces."""


MIXED = ", ".join(name for name, position in POSITIONS.items() if position.share is None)
RANDOM = "is for an encoder that has learnt something, and without --pretrained its weights are random; leave it out"

EFFECTS = (
    Effect(
        field="momentum",
        there=lambda recipe, _: recipe.optimizer == "sgd",
        otherwise="is that of sgd and does nothing with optimizer={optimizer}; leave one of them out",
    ),
    Effect(
        field="poly_exponent",
        there=lambda recipe, _: parse_call(recipe.schedule)[0] == "poly",
        otherwise="is that of poly and does nothing with schedule={schedule}; leave one of them out",
    ),
    Effect(
        field="ema_decay",
        there=lambda recipe, _: recipe.weights == "ema",
        otherwise="is that of ema and does nothing with weights={weights}; take weights=ema, or leave it out",
    ),
    Effect(
        field="match_steps",
        there=lambda recipe, _: recipe.offline_copies > 0,
        otherwise="does nothing without copies; take offline_copies=4, or leave it out",
    ),
    Effect(
        field="offline_copies",
        there=lambda recipe, _: recipe.augmentation != "none",
        otherwise="are augmented copies, and augmentation=none leaves them as the case is; leave one of them out",
    ),
    Effect(
        field="foreground_fraction",
        there=lambda recipe, _: POSITIONS[recipe.patch_position].share in (None, recipe.foreground_fraction),
        otherwise="does nothing with patch_position={patch_position}, which places all patches alike; leave it out, or "
        f"take one of {MIXED}",
    ),
    Effect(
        field="redraw_empty",
        there=lambda recipe, _: recipe.patch_position != "fixed",
        otherwise="does nothing with patch_position=fixed; leave one of them out",
    ),
    Effect(field="freeze_encoder_epochs", there=lambda recipe, pretrained: pretrained, otherwise=RANDOM),
    Effect(field="encoder_rate", there=lambda recipe, pretrained: pretrained, otherwise=RANDOM),
)


def refuse_idle(recipe: Recipe, stated: Collection[str], *, pretrained: bool) -> None:
    """AutosegError that names each of the fields `stated` that would do nothing, with the reason and the cure."""
    said = [
        f"{effect.field}={getattr(recipe, effect.field)} {effect.otherwise.format(**vars(recipe))}"
        for effect in EFFECTS
        if effect.field in stated
        and getattr(recipe, effect.field) != getattr(Recipe(), effect.field)
        and not effect.there(recipe, pretrained)
    ]
    if said:
        raise AutosegError("\n".join(said))


def refuse_frozen(recipe: Recipe, seconds_a_step: float | None = None) -> None:
    """AutosegError for an encoder that would never learn: frozen for as many epochs as there are.

    seconds_a_step: as timed, for a run by time; None: not known.
    """
    epochs = expected_epochs(recipe, seconds_a_step)
    if 0 < recipe.freeze_encoder_epochs >= epochs:
        about = "" if recipe.budget_seconds is None else "about "
        raise AutosegError(
            f"freeze_encoder_epochs={recipe.freeze_encoder_epochs} leaves the encoder as it is in all of the {about}"
            f"{epochs} epochs; make it smaller, or the training longer"
        )
