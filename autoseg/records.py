"""What every saved record shares: frozen, keyword-only, validated, and written as JSON whole or not at all.

A record is a pydantic dataclass, so `dataclasses.replace` validates again and a wrong file reports every
problem with its path. NaN and infinity are refused: a value that is undefined is None.
"""

import difflib
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import ArgsKwargs

T = TypeVar("T")

SCHEMA_VERSION = 1


class AutosegError(Exception):
    """A mistake in the data or the request, said in words for the person at the keyboard; no traceback is shown."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def record(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only, validated dataclass that refuses unknown keys, NaN and infinity."""
    config = ConfigDict(extra="forbid", allow_inf_nan=False)
    made: Any = pydantic_dataclass(frozen=True, kw_only=True, config=config)(cls)
    return made


@contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path` and rename it to `path` once its bytes are on disk.

    A reader therefore sees the old file or the new one, never a part. On an error the temporary file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Remove what killed processes left of writing files called `names`: hidden ones, named by the module tempfile.

    Only for the sole writer of `folder`: another may be writing just now.
    """
    wanted = set(names)
    for left in folder.iterdir():
        found = re.fullmatch(r"\.(.+)\.[a-z0-9_]{8}(\.tmp)?", left.name)
        if found and found[1] in wanted:
            shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Make `folder` and keep it from other commands that ask for it with this; they wait, and say so.

    The lock is on the folder itself: it leaves no file, and ends with the process however that ends. File systems
    without locks, and Windows, go without. Raises AutosegError if nothing can be written there.
    """
    refuse_unwritable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another command is writing to {folder}; waiting for its end", file=sys.stderr, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


def refuse_unwritable(folder: Path) -> None:
    """AutosegError if nothing can be written into `folder`, or it cannot be made. Leaves nothing behind."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise AutosegError(f"{folder} is or lies below a file; give the path of a folder")
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"a full disk has no room for this")
    except OSError as error:
        raise AutosegError(f"nothing can be written to {folder}: {error.strerror}; give another folder") from None


def sync(path: Path) -> None:
    """Put the bytes of a file, or the entries of a folder, on disk now, so that a power cut does not lose them.

    Windows does so only through a handle that may write, and opens no folders.
    """
    windows = os.name == "nt"
    if windows and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def to_json(value: object) -> str:
    """The record as readable JSON text, ending in a newline."""
    return TypeAdapter(type(value)).dump_json(value, indent=2).decode() + "\n"


def save_json(value: object, path: Path) -> None:
    """Write the record `value` to `path`, whole or not at all."""
    with atomic_write(path) as file:
        file.write(to_json(value))


def load_json(kind: type[T], path: Path) -> T:
    """Read a record of class `kind` from `path`.

    Raises AutosegError that lists every problem with its place in the file, or says that the file is missing.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise AutosegError(f"{path} does not exist; run the step that writes it first") from None
    return from_json(kind, text, str(path))


def from_json(kind: type[T], text: str, where: str = "a message") -> T:
    """The record of class `kind` that `text` holds; AutosegError as `load_json`, `where` says what the text is."""
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        raise AutosegError(f"{where} is not a valid {getattr(kind, '__name__', 'file')}:\n{problems(error)}") from None


def hash_text(*parts: str) -> str:
    """A short hash (32 hexadecimal digits) of several texts in order."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part.encode())
    return digest.hexdigest()


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'unet'?)` where one of `known` is spelt much like `name`; else nothing."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def problems(error: ValidationError) -> str:
    """Every problem of a validation error, one a line: where, what, and the value found."""
    lines = []
    for problem in error.errors(include_url=False):
        place = ".".join(str(part) for part in problem["loc"]) or "(whole file)"
        # A check of a whole record says itself what it found; its input would be shown in pydantic's own words.
        whole = isinstance(problem["input"], ArgsKwargs | dict)
        silent = problem["type"] == "missing" or (problem["type"] == "value_error" and whole)
        found = "" if silent else f" (found {json.dumps(problem['input'], default=str)[:80]})"
        lines.append(f"  {place}: {problem['msg'].removeprefix('Value error, ')}{found}")
    return "\n".join(lines)
