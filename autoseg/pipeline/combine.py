"""ensemble: folders of predictions of any origin become one, case by case.

Where every folder has probabilities, their mean decides, and a case of which one lacks them fails; where some folder
has none at all, the labels are voted on. Probabilities are what `predict --save-probabilities` writes,
CASE_probabilities.nii.gz, or nnU-Net's CASE.npz, which has no geometry: that is read from the label file beside it. The
.pkl that lies there too is never opened, since opening one runs what it says.

ensemble.csv beside the results says what became of every case, and which files there are ours: others are left alone.
"""

import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import numpy as np

from autoseg.cases import names, result_name
from autoseg.ensemble import mean_of
from autoseg.evaluation.folders import as_predicted, find_labels, note_merged
from autoseg.labels import Labels
from autoseg.parallel import map_cases, raise_failures
from autoseg.pipeline.predict import probabilities_of
from autoseg.pipeline.status import Status, begin, end, refuse_foreign
from autoseg.readers import ENDINGS, read_image, read_labels, write_labels
from autoseg.records import AutosegError, refuse_unwritable, remove_leftovers, sole_writer
from autoseg.volume import Grid, canonical_grid, mismatch, to_canonical

NAME = "ensemble.csv"
"""The list of cases beside the results, see autoseg/pipeline/status.py."""
KEYS = ("probabilities", "softmax")
"""What nnU-Net calls the array in its .npz, version 2 and 1."""
TOLERANCE = 0.05
"""How far the probabilities of a voxel may be from 1 in all, where classes exclude each other."""
_HEADERS = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Folder:
    """What a folder holds, by case."""

    path: Path
    maps: dict[str, Path]
    """Probabilities."""
    labels: dict[str, Path]

    def geometry(self, case: str) -> Grid:
        """The grid of the label file of a case."""
        if case not in self.labels:
            raise AutosegError(f"{self.maps[case]} has no geometry; put the label file of {case} beside it")
        return read_labels(self.labels[case])[1]


def look_into(path: Path) -> Folder:
    """List the predictions of a folder. Raises AutosegError if there are none, or two of one case."""
    suffix = probabilities_of(path, "").name
    maps: dict[str, Path] = {}
    labels: dict[str, Path] = {}
    for file in sorted(path.iterdir()) if path.is_dir() else ():
        ending = next((ending for ending in (suffix, ".npz", *ENDINGS) if file.name.lower().endswith(ending)), None)
        if ending is None or file.name.startswith("."):
            continue
        found, case = labels if ending in ENDINGS else maps, file.name[: -len(ending)]
        if case in found:
            raise AutosegError(f"{path} has two files for case {case}: {found[case].name} and {file.name}; remove one")
        found[case] = file
    if not maps and not labels:
        raise AutosegError(f"{path} is no folder with predictions: CASE{suffix}, CASE.npz or label files")
    return Folder(path=path, maps=maps, labels=labels)


def combine(folders: Sequence[Path], target: Path, labels: Labels | None = None, workers: int | None = None) -> None:
    """Write one label file a case of `folders` to `target`.

    labels: what the channels mean; by default those of a dataset.json in or above a folder, and without one channel n
    is the value n. Cases that a folder lacks, and those of different grids, are named at the end by AutosegError, when
    the others are done; files in `target` that are not ours before anything is done.
    """
    if len(folders) < 2:
        raise AutosegError("give two folders or more; the predictions of one need no ensemble")
    if target.resolve() in [folder.resolve() for folder in folders]:
        raise AutosegError(f"-o {target} is one of the folders, whose files would be overwritten; give another -o")
    given: dict[Path, Path] = {}
    for folder in folders:
        if (place := folder.resolve()) in given:
            raise AutosegError(
                f"{given[place]} and {folder} are one folder, whose predictions would count twice; give it once"
            )
        given[place] = folder
    refuse_unwritable(target)
    found = [look_into(folder) for folder in folders]
    cases = sorted(set().union(*(folder.maps.keys() | folder.labels.keys() for folder in found)))
    meaning = as_predicted(find_labels(*folders) if labels is None else (labels, {}), *folders)
    without = [folder for folder in found if not folder.maps]
    if without:
        print(f"Majority vote of labels: {names(str(folder.path) for folder in without)} has no probabilities")
    else:
        print(f"Mean of the probabilities of {len(found)} folders", flush=True)
    labels = meaning[0] if meaning else None
    one: Callable[[Sequence[Folder], str, Labels | None], tuple[np.ndarray, Grid]] = vote if without else average
    files = {case: name_in(found, case) for case in cases}

    def write(case: str) -> Path:
        kind = "labels" if without else "maps"
        if missing := [str(folder.path) for folder in found if case not in getattr(folder, kind)]:
            raise AutosegError(f"there is no {'label file' if without else 'probability map'} in {names(missing)}")
        values, stored = one(found, case, labels)
        write_labels(values, stored, target / files[case])
        return target / files[case]

    with sole_writer(target):
        remove_leftovers(target, (NAME, *files.values()))
        status = Status(target, NAME)
        refuse_foreign(status, {case: [file] for case, file in files.items()})
        note_merged(labels, target, files.values())
        begin(status, files)
        outcomes = map_cases(write, cases, name=lambda case: case, what="ensemble", workers=workers)
        end(status, outcomes)
    print(f"Written: {sum(outcome.error is None for outcome in outcomes)} of {len(cases)} cases in {target}")
    raise_failures(outcomes, "ensemble")


def name_in(folders: Sequence[Folder], case: str) -> str:
    """What the result of a case is called: as in the format of the first label file of it, if there is one."""
    found = (result_name(case, folder.labels[case]) for folder in folders if case in folder.labels)
    return next(found, f"{case}.nii.gz")


def average(folders: Sequence[Folder], case: str, labels: Labels | None) -> tuple[np.ndarray, Grid]:
    """Labels (Z, Y, X) by the mean of probabilities, canonical, and the grid of the first file."""
    first: list[Grid] = []

    def read(folder: Folder) -> np.ndarray:
        array, stored = read_map(folder, case, labels)
        refuse_other_grid(first, stored, folder.maps[case])
        return array

    mean = mean_of(read(folder) for folder in folders)
    known = labels or Labels(names=tuple(map(str, range(len(mean)))), values=tuple(range(len(mean))))
    return known.to_values(known.decide(mean)), first[0]


def read_map(folder: Folder, case: str, labels: Labels | None) -> tuple[np.ndarray, Grid]:
    """Probabilities (K, Z, Y, X) of a case, canonical, in the order of `labels`, and the grid of the file.

    Raises AutosegError for another number of channels, and for what cannot be probabilities.
    """
    path = folder.maps[case]
    if path.name.lower().endswith(".npz"):
        stored = folder.geometry(case)
        array = read_npz(path)
        if array.ndim != 4 or array.shape[1:] != stored.shape:
            raise AutosegError(f"{path} has the shape {array.shape}, and its label file {stored.shape}")
        if labels is not None and labels.exclusive and len(array) == labels.heads:
            # nnU-Net's channels are in the order of the values.
            array = array[np.argsort(np.argsort(labels.values))]
        array = to_canonical(array, stored)
    else:
        volume, stored = read_image([path])
        array = volume.array
    if labels is not None and len(array) != labels.heads:
        raise AutosegError(
            f"{path} has {len(array)} channels, and {labels.heads} are needed for {', '.join(labels.names)}; name the "
            "dataset of these predictions with -d"
        )
    if not np.isfinite(array).all() or array.min() < -TOLERANCE or array.max() > 1 + TOLERANCE:
        raise AutosegError(f"{path} holds numbers that are no probabilities")
    if (labels is None or labels.exclusive) and (len(array) < 2 or np.abs(array.sum(0) - 1).max() > TOLERANCE):
        raise AutosegError(
            f"{path}: the channels do not sum to 1, as those of exclusive classes do; if they are regions, name the "
            "dataset with -d"
        )
    return array, stored


def read_npz(path: Path) -> np.ndarray:
    """The probabilities in a .npz of nnU-Net, float32, without unpickling anything."""
    try:
        with ZipFile(path) as content:
            member = next((f"{key}.npy" for key in KEYS if f"{key}.npy" in content.namelist()), None)
            if member is None:
                raise AutosegError(f"{path} holds no array called {' or '.join(KEYS)}")
            stored = content.read(member)
        # Not by np.load in several threads at once: see autoseg/store.py.
        with _HEADERS:
            found: np.ndarray = np.lib.format.read_array(BytesIO(stored), allow_pickle=False)
        return found.astype(np.float32)
    except (ValueError, OSError, EOFError, RuntimeError, BadZipFile, zlib.error) as error:
        raise AutosegError(f"{path} cannot be read as numbers ({error})") from None


def vote(folders: Sequence[Folder], case: str, labels: Labels | None) -> tuple[np.ndarray, Grid]:
    """The label (Z, Y, X) that most folders give, and of equally frequent ones that of the folder named first."""
    first: list[Grid] = []
    said = []
    for folder in folders:
        volume, stored = read_labels(folder.labels[case])
        refuse_other_grid(first, stored, folder.labels[case])
        values = volume.array[0]
        # Where one of the models merges labels, all of them vote for its classes.
        said.append(values if labels is None or not labels.merges else labels.to_values(labels.to_indices(values)))
    best, most = said[0], np.zeros(said[0].shape, np.int32)
    for one in said:
        votes = sum((one == other for other in said), np.zeros(one.shape, np.int32))
        best, most = np.where(votes > most, one, best), np.maximum(votes, most)
    return best, first[0]


def refuse_other_grid(first: list[Grid], stored: Grid, path: Path) -> None:
    """Remember the first grid; AutosegError if a later one is another."""
    if first and (difference := mismatch(canonical_grid(first[0]), canonical_grid(stored))):
        raise AutosegError(f"{path} lies on another grid than the file of the first folder ({difference})")
    first.append(stored)
