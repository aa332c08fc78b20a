"""Whether raw data are still those that were prepared; what is prepared goes by the name of their folder alone.

Planning compares every byte. Training, which reads prepared cases and then scores against the label files, compares the
labels that it will score against, and of all else what was touched since it was prepared.
"""

from collections.abc import Sequence
from pathlib import Path

from autoseg.cases import Case, names
from autoseg.layout import Dataset
from autoseg.parallel import map_cases, raise_failures
from autoseg.planners import says_sides
from autoseg.raw import hash_case, hash_image, hash_label
from autoseg.readers import files_of
from autoseg.records import AutosegError, load_json
from autoseg.schema import Fingerprint, Fold
from autoseg.workspace import Workspace


def unchanged_fingerprint(dataset: Dataset, path: Path, workers: int | None) -> Fingerprint | None:
    """The fingerprint at `path` if it belongs to exactly these files; None if anything has changed since."""
    if not path.is_file():
        return None
    old = load_json(Fingerprint, path)
    if [case.case for case in old.cases] != [case.id for case in dataset.cases]:
        return None
    if old.channel_names != dataset.channel_names:
        return None
    # One without positions is of an earlier version; they matter only where a class is named after a side.
    if any(case.across is None for case in old.cases) and says_sides(dataset.labels):
        return None
    if any(case.voxels is None for case in old.cases):  # of an earlier version too; losses weigh classes by them
        return None
    outcomes = map_cases(
        lambda case: hash_case(dataset, case),
        dataset.cases,
        name=lambda case: case.id,
        what="look for changes",
        finishes=False,
        workers=workers,
    )
    return old if [outcome.value for outcome in outcomes] == [case.content_hash for case in old.cases] else None


def refuse_other_dataset(workspace: Workspace, name: str, folder: Path) -> None:
    """AutosegError if another raw dataset of the same name is there, of which `folder` would take the place."""
    prepared = workspace.prepared(name)
    for other in (workspace.raw(name), workspace.prepared_from(name)):
        if (other / "dataset.json").is_file() and other.resolve() != folder.resolve():
            raise AutosegError(
                f"{other} is another dataset called {name}, and what is prepared and trained goes by that name; rename "
                f"one of the two folders, give another --workspace, or, if that one has had its time, remove it and "
                f"{prepared}"
            )


def refuse_changed(
    workspace: Workspace, name: str, dataset: Dataset, cases: Fold, fingerprint: Fingerprint, cure: str
) -> None:
    """AutosegError if raw files of the fold are not those that were prepared. cure: the command that prepares them.

    Compared are the labels to score against, and files that are newer than the fingerprint; everything where the
    dataset does not lie where it did.
    """
    known = {facts.case: facts.content_hash for facts in fingerprint.cases}
    since = (workspace.prepared(name) / "fingerprint.json").stat().st_mtime_ns
    folder, before = Path(dataset.folder), workspace.prepared_from(name)
    moved = folder.resolve() != before.resolve()
    card = newer(folder / "dataset.json", since)

    def differs(case: Case) -> bool:
        image, dash, label = known.get(case.id, "").partition("-")
        if not dash:  # a fingerprint of somebody's own
            return False
        if (moved or touched(case.images, since)) and hash_image(dataset, case) != image:
            return True
        look = moved or card or case.id in cases.val or touched([case.label] if case.label else [], since)
        return look and hash_label(dataset, case) != label

    fold = {*cases.train, *cases.val}
    outcomes = map_cases(
        differs,
        [case for case in dataset.cases if case.id in fold],
        name=lambda case: case.id,
        what="look for changes",
        finishes=False,
    )
    raise_failures(outcomes, "the comparison with what was prepared")
    if changed := [outcome.case for outcome in outcomes if outcome.value]:
        where = f" from {before}" if moved else ""
        raise AutosegError(
            f"{len(changed)} cases of {folder} are not those that were prepared{where}: {names(changed)}; training "
            f"would use the former files, and scores the present ones. Run: {cure}"
        )


def touched(paths: Sequence[str], since: int) -> bool:
    """Whether an image or label file, or one that is read with it, is newer than `since` (ns), or not there."""
    return any(not path.is_file() or any(newer(file, since) for file in files_of(path)) for path in map(Path, paths))


def newer(file: Path, since: int) -> bool:
    """Whether the content of a file or its entry in the folder is newer than `since` (ns)."""
    return max(file.stat().st_mtime_ns, file.stat().st_ctime_ns) > since
