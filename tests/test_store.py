"""Prepared cases on disk: what is written comes back, whole or not at all, from any number of threads."""

import ast
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from autoseg.preprocess import PreparedCase
from autoseg.records import AutosegError
from autoseg.restore import Trace
from autoseg.store import layout, list_cases, load_case, read_case, stored_classes, stored_key, write_case
from autoseg.volume import Box, Grid

SHAPE = (5, 7, 11)


def toy_case(name="a", shape=SHAPE, channels=2, seed=0, empty=False):
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.int16) if empty else rng.integers(-1, 3, shape).astype(np.int16)
    return PreparedCase(
        case=name,
        image=rng.standard_normal((channels, *shape)).astype(np.float32),
        labels=labels,
        locations={} if empty else {i: np.argwhere(labels == i).astype(np.int32) for i in (2, 1)},
        trace=Trace(
            case=name,
            stored=Grid(shape=shape, spacing_mm=(3.0, 1.0, 0.5)),
            crop=Box(start=(0, 0, 0), stop=shape),
            axis_order=(0, 1, 2),
            spacing_mm=(3.0, 1.0, 0.5),
            shape=shape,
        ),
    )


def assert_same(found, expected):
    assert found.case == expected.case and found.trace == expected.trace
    np.testing.assert_array_equal(np.asarray(found.image), expected.image)
    np.testing.assert_array_equal(np.asarray(found.labels), expected.labels)
    assert set(found.locations) == set(expected.locations)
    for index, voxels in expected.locations.items():
        assert found.locations[index].dtype == np.int32
        np.testing.assert_array_equal(found.locations[index], voxels)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_case_without_foreground(tmp_path):
    write_case(tmp_path, toy_case(empty=True), key="k")
    found = read_case(tmp_path, "a")
    assert found.locations == {} and not found.labels[...].any()


@settings(max_examples=20, deadline=None)
@given(
    st.tuples(*[st.integers(1, 40)] * 3),
    st.integers(1, 3),
    st.none() | st.tuples(*[st.integers(1, 40)] * 3) | st.tuples(*[st.integers(1, 40)] * 2),
)
def test_what_is_written_comes_back(tmp_path_factory, shape, channels, patch):
    folder = tmp_path_factory.mktemp("cases")
    case = toy_case(shape=shape, channels=channels)
    write_case(folder, case, key="k", patch=patch)
    assert_same(read_case(folder, "a"), case)
    assert_same(load_case(folder, "a"), case)


def test_parts_are_read_as_from_an_array(tmp_path):
    case = toy_case()
    write_case(tmp_path, case, key="k", patch=(4, 4, 4))
    found = read_case(tmp_path, "a")
    assert found.image.shape == (2, *SHAPE) and found.image.dtype == np.float32 and found.image.ndim == 4
    assert found.image.size == 2 * 5 * 7 * 11 and found.image.nbytes == 4 * found.image.size and len(found.image) == 2
    for key in [
        (slice(None), slice(1, 4), slice(0, 7), slice(3, 9)),
        (..., slice(2, 3), slice(0, 2), slice(10, 11)),
        (slice(None), slice(0, 0), slice(0, 7), slice(3, 9)),
        1,
        (0, 2),
        ...,
    ]:
        part = found.image[key]
        assert type(part) is np.ndarray
        np.testing.assert_array_equal(part, case.image[key])
    np.testing.assert_array_equal(found.labels[1:3, :, 4:], case.labels[1:3, :, 4:])
    part = found.image[:, 1:3]
    part[:] = 0  # a copy of one's own
    np.testing.assert_array_equal(found.image[...], case.image)


def test_in_memory_case_holds_plain_arrays(tmp_path):
    write_case(tmp_path, toy_case(), key="k")
    found = load_case(tmp_path, "a")
    assert type(found.image) is np.ndarray and type(found.labels) is np.ndarray


@pytest.mark.parametrize(("largest", "kind"), [(127, np.int8), (200, np.int16), (70_000, np.int32)])
def test_labels_take_the_smallest_type(tmp_path, largest, kind):
    case = toy_case()
    labels = case.labels.astype(np.int64)
    labels[0, 0, 0] = largest
    write_case(tmp_path, PreparedCase(**{**vars(case), "labels": labels}), key="k")
    found = read_case(tmp_path, "a").labels
    assert found.dtype == kind
    np.testing.assert_array_equal(found[...], labels)


def test_many_threads_read_one_case(tmp_path):
    case = toy_case(shape=(33, 47, 61))
    write_case(tmp_path, case, key="k", patch=(16, 16, 16))
    shared = read_case(tmp_path, "a")

    def read(seed):
        start = np.random.default_rng(seed).integers(0, (17, 31, 45))
        box = tuple(slice(a, a + 16) for a in start)
        return np.array_equal(shared.image[(..., *box)], case.image[(..., *box)]) and np.array_equal(
            shared.labels[box], case.labels[box]
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(200)))


def test_reading_a_case_parses_no_python(tmp_path, monkeypatch):
    # Two threads that parse at once may fail under Python 3.11; the header of a .npy is parsed by ast.literal_eval.
    write_case(tmp_path, toy_case(), key="k")

    def fail(*_):
        raise SystemError("AST constructor recursion depth mismatch")

    monkeypatch.setattr(ast, "literal_eval", fail)
    with pytest.raises(SystemError):
        np.lib.format.read_array(BytesIO(in_npy(np.zeros(3))))
    assert_same(load_case(tmp_path, "a"), toy_case())
    assert stored_classes(tmp_path, "a") == (1, 2)


def in_npy(array):
    file = BytesIO()
    np.lib.format.write_array(file, array)
    return file.getvalue()


def test_same_case_gives_the_same_bytes(tmp_path, monkeypatch):
    write_case(tmp_path / "first", toy_case(), key="k")
    later = time.time() + 1e6
    monkeypatch.setattr(time, "time", lambda: later)
    write_case(tmp_path / "second", toy_case(), key="k")
    first, second = contents(tmp_path / "first" / "a"), contents(tmp_path / "second" / "a")
    assert len(first) == 4 and first == second


def test_listing_and_keys(tmp_path):
    assert list_cases(tmp_path / "nowhere") == ()
    for name in ("b", "a"):
        write_case(tmp_path, toy_case(name), key=f"key of {name}")
    (tmp_path / "stray").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert list_cases(tmp_path) == ("a", "b")
    assert stored_key(tmp_path, "b") == "key of b"
    assert stored_key(tmp_path, "c") is None


def test_writing_again_replaces(tmp_path):
    write_case(tmp_path, toy_case(seed=0), key="old")
    write_case(tmp_path, toy_case(seed=1), key="new")
    assert stored_key(tmp_path, "a") == "new"
    assert_same(load_case(tmp_path, "a"), toy_case(seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_failed_write_leaves_the_old_case(tmp_path):
    write_case(tmp_path, toy_case(), key="old")
    broken = PreparedCase(**{**vars(toy_case()), "labels": np.full(SHAPE, 2**40)})
    with pytest.raises(ValueError, match="do not fit"):
        write_case(tmp_path, broken, key="new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert stored_key(tmp_path, "a") == "old"


def test_remains_of_a_killed_writer_are_not_listed_and_go(tmp_path):
    remains = tmp_path / ".a.new"
    remains.mkdir()
    (remains / "image.b2nd").write_bytes(b"half")
    assert list_cases(tmp_path) == ()
    write_case(tmp_path, toy_case(), key="k")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["image.b2nd", "labels.b2nd", "locations.zip", "case.json"])
@pytest.mark.parametrize("damage", ["missing", "short"])
def test_broken_folder_is_not_listed_and_says_so(tmp_path, name, damage):
    write_case(tmp_path, toy_case(), key="k")
    path = tmp_path / "a" / name
    data = path.read_bytes()
    path.unlink()
    if damage == "short":
        path.write_bytes(data[: len(data) // 2])
    assert list_cases(tmp_path) == ()
    assert stored_key(tmp_path, "a") is None
    with pytest.raises(AutosegError, match="preprocess"):
        read_case(tmp_path, "a")


@pytest.mark.parametrize("name", ["image.b2nd", "labels.b2nd", "locations.zip"])
def test_spoilt_bytes_are_an_error_for_people(tmp_path, name):
    write_case(tmp_path, toy_case(), key="k")
    path = tmp_path / "a" / name
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(AutosegError, match="preprocess again"):
        load_case(tmp_path, "a")


def test_missing_case_says_what_to_do(tmp_path):
    with pytest.raises(AutosegError, match="no prepared case 'x'"):
        read_case(tmp_path, "x")


def test_layout_suits_the_patch():
    # By hand for one channel of a large CT: 32^3 float32 is 128 KiB; three to four blocks an axis stay below 6 MiB.
    assert layout((1, 482, 512, 512), (128, 128, 128), 4) == ((1, 96, 128, 128), (1, 32, 32, 32))
    # A slice of a 2D patch: 256 x 128 float32 is 128 KiB.
    assert layout((1, 20, 256, 216), (256, 224), 4) == ((1, 1, 256, 216), (1, 1, 256, 128))
    assert layout((3, 5, 7), (128, 128, 128), 1) == ((3, 5, 7), (3, 5, 7))


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(st.integers(1, 600), st.integers(1, 1400), st.integers(1, 1400)),
    st.lists(st.integers(1, 600), min_size=2, max_size=3),
    st.sampled_from([1, 4]),
)
@example((1, 520, 696), [256, 256], 4)
def test_layout_keeps_its_bounds(shape, patch, itemsize):
    chunk, block = layout((2, *shape), patch, itemsize)
    assert chunk[0] == block[0] == 1
    assert np.prod(block) * itemsize <= 128 << 10
    assert np.prod(chunk) * itemsize <= 6 << 20
    assert all(1 <= b <= c <= n for b, c, n in zip(block, chunk, (1, *shape)))
