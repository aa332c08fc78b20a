"""augment preview: what an augmentation makes of a patch, as a picture and in words. Changes nothing."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from autoseg.augment import Augmentation, make_augmentation
from autoseg.augment.default import DefaultAugmentation, Draws
from autoseg.augment.policy import POLICIES, certain, used
from autoseg.augment.words import describe
from autoseg.evaluation.samples import Tile, draw_page
from autoseg.pipeline.plans import plan_called
from autoseg.placement import choose_patch
from autoseg.preprocess import ANNOTATED, PreparedCase
from autoseg.records import AutosegError
from autoseg.sampling import cut_sources, grow
from autoseg.schema import Configuration, Plan
from autoseg.store import list_cases, read_case
from autoseg.volume import Box
from autoseg.workspace import Workspace, given


@dataclass(frozen=True, kw_only=True)
class PreviewOptions:
    """The options of augment preview."""

    configuration: str | None = None
    policy: str = "default"
    samples: int = 8
    chain: bool = False
    """One slice through the transforms of a policy: each by itself, and each with all before it."""
    seed: int = 0
    plan: str = "default"


@dataclass(frozen=True, eq=False, kw_only=True)
class View:
    """One patch of one case, to be shown as an augmentation makes it."""

    case: PreparedCase
    box: Box
    patch: tuple[int, ...]
    seed: int

    def tile(self, title: str, augmentation: Augmentation, number: int) -> Tile:
        """The middle slice of sample `number`; the same number always draws the same."""
        draws = augmentation.draw(np.random.default_rng((self.seed, number)), 1, len(self.case.image))
        source = cut_sources(self.case, grow(self.box, draws.source_shape(0)), len(self.patch))
        image, labels = augmentation.apply(draws, [source])
        slices = image[0, 0], labels[0]
        flat = [array.numpy() if array.ndim == 2 else array[len(array) // 2].numpy() for array in slices]
        words = describe(draws, 0) if isinstance(draws, Draws) else ()
        return Tile(title=title, image=flat[0], labels=flat[1], words=words)


def preview(workspace: Workspace, dataset_text: str, target: Path, options: PreviewOptions) -> None:
    """Draw a page of one patch and what becomes of it to the PNG `target`, and print what was drawn for each sample.

    Raises AutosegError if nothing is prepared, and for names that there are not.
    """
    if target.suffix.lower() != ".png":
        raise AutosegError(f"-o {target}: the page is a PNG; give a file that ends in .png")
    plan = plan_called(workspace, dataset_text, options.plan)
    names = [configuration.name for configuration in plan.configurations]
    chosen = options.configuration or ("3d_fullres" if "3d_fullres" in names else names[0])
    configuration = plan.configuration(chosen)
    make_page_of = _chain if options.chain else _samples
    folder = workspace.cases(workspace.dataset(dataset_text)[0], plan.name, configuration.prepared)
    cure = workspace.command("plan_and_preprocess", "-d", dataset_text, *given("--plan", plan.name))
    case, box = _find_patch(folder, configuration, options.seed, cure)
    view = View(case=case, box=box, patch=configuration.patch, seed=options.seed)
    tiles = list(make_page_of(view, plan, configuration, options))
    for tile in tiles:
        print(f"{tile.title}: {', '.join(tile.words) or 'as it is'}")
    labels = plan.labels
    called = {
        index: labels.names[index] if labels.exclusive else f"value {labels.stored[index]}"
        for index in labels.foreground
    }
    heading = f"{options.policy}: {plan.dataset}, case {case.case}, {configuration.name}"
    aspect = configuration.spacing_mm[-2] / configuration.spacing_mm[-1]
    draw_page(tiles, target, names=called, heading=heading, columns=4 if options.chain else 3, aspect=aspect)
    print(f"Drawn: {target}")


def _find_patch(folder: Path, configuration: Configuration, seed: int, cure: str) -> tuple[PreparedCase, Box]:
    """A patch on the foreground of the first case that has some."""
    cases = list_cases(folder)
    if not cases:
        raise AutosegError(f"nothing is prepared in {folder}; run: {cure}")
    read = (read_case(folder, name) for name in cases)
    case = next((found for found in read if found.locations.keys() - {ANNOTATED}), None) or read_case(folder, cases[0])
    return case, choose_patch(case, configuration.patch, True, np.random.default_rng(seed))


def _made(name: str, plan: Plan, configuration: Configuration) -> Augmentation:
    return make_augmentation(
        name,
        patch=configuration.patch,
        dimension=configuration.dimension,
        masked=tuple(channel.masked for channel in plan.channels),
        flips=plan.flips(configuration),
    )


def _samples(view: View, plan: Plan, configuration: Configuration, options: PreviewOptions) -> Iterator[Tile]:
    yield view.tile("original", _made("none", plan, configuration), 0)
    augmentation = _made(options.policy, plan, configuration)
    for number in range(1, options.samples + 1):
        yield view.tile(str(number), augmentation, number)


def _chain(view: View, plan: Plan, configuration: Configuration, options: PreviewOptions) -> Iterator[Tile]:
    if options.policy not in POLICIES:
        raise AutosegError(f"{options.policy!r} is no list of transforms; --chain shows one of {', '.join(POLICIES)}")
    policy = POLICIES[options.policy]
    plain = _made("none", plan, configuration)
    assert isinstance(plain, DefaultAugmentation)
    yield view.tile("original", plain, 0)
    yield view.tile("original", plain, 0)
    for number, name in enumerate(used(policy), start=1):
        for title, names in ((f"{name} alone", [name]), (f"with all up to {name}", used(policy)[:number])):
            # What the others draw moves nothing, so both columns show the same parameters.
            single = replace(plain, policy=certain(policy, names))
            yield view.tile(title, single, 1)
