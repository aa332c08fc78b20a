"""The model file: what goes in comes out, and whatever is cut short, altered or hostile is refused with its reason."""

import hashlib
import json
import struct
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from toys import configuration, plan

from autoseg.bundle import CARD, CHECKSUM, Bundle, ModelFile, Stage, read, write
from autoseg.networks import build
from autoseg.records import AutosegError, to_json

WEIGHTS = "3d_fullres/fold_0.safetensors"


def content(**more) -> ModelFile:
    return ModelFile(
        **{
            "autoseg_version": "0.1.0",
            "created": "2026-01-01T00:00:00+00:00",
            "plan": plan(),
            "stages": (Stage(configuration="3d_fullres", folds=(0,)),),
            "licence": "CC BY 4.0",
        }
        | more
    )


def weights() -> bytes:
    here = configuration()
    return save({k: v.contiguous() for k, v in build(here.network, 1, 3).state_dict().items()})


def whole_file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return file(Path(folder)).read_bytes()


SOUND = weights()


def file(tmp_path, **more) -> Path:
    write(tmp_path / "a.autoseg", content(**more), {WEIGHTS: SOUND})
    return tmp_path / "a.autoseg"


WHOLE = whole_file()


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(path: Path, entries, compression=zipfile.ZIP_STORED) -> Path:
    """A zip by hand: `entries` are (name, bytes), in order, whatever they are."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return path


def forged(path: Path, text: str, others=((WEIGHTS, SOUND),)) -> Path:
    """A zip whose model.json is `text`, with the right checksum of it."""
    data = text.encode()
    return zipped(path, [*others, (CARD, data), (CHECKSUM, hashlib.sha256(data).hexdigest().encode())])


def changed(path: Path, target: Path, change) -> Path:
    """The model file at `path` with `change` made to its JSON, checksums right."""
    found = json.loads(members(path)[CARD])
    change(found)
    return forged(target, json.dumps(found))


def test_what_is_written_is_read(tmp_path):
    path = file(tmp_path)
    bundle = read(path)
    assert isinstance(bundle, Bundle)
    assert replace(bundle.content, members={}) == content()
    assert bundle.weights(WEIGHTS) == SOUND
    assert bundle.content.configuration.name == "3d_fullres"
    assert [p.name for p in tmp_path.iterdir()] == ["a.autoseg"]


def test_equal_models_make_equal_bytes_which_other_programs_open(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(SOUND)
    first = file(tmp_path).read_bytes()
    write(tmp_path / "b.autoseg", content(), {WEIGHTS: tmp_path / "w.safetensors"})
    assert (tmp_path / "b.autoseg").read_bytes() == first
    inside = members(tmp_path / "b.autoseg")
    assert set(inside) == {WEIGHTS, CARD, CHECKSUM}
    assert inside[CHECKSUM].decode() == f"{hashlib.sha256(inside[CARD]).hexdigest()}  {CARD}\n"
    assert inside[CARD].decode() == to_json(read(tmp_path / "b.autoseg").content)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_cut_anywhere_is_refused(tmp_path, data):
    whole = WHOLE
    short = tmp_path / "short.autoseg"
    short.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(AutosegError, match=r"short\.autoseg is refused"):
        read(short).weights(WEIGHTS)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_altered_bytes_never_make_another_model(tmp_path, data):
    """Bytes that carry nothing, such as dates, may change; all else is refused, and never with another error."""
    whole = bytearray(WHOLE)
    ends = st.one_of(st.integers(0, len(whole) - 1), st.integers(len(whole) - 400, len(whole) - 1))
    for place in data.draw(st.lists(ends, min_size=1, max_size=3)):
        whole[place] ^= data.draw(st.integers(1, 255))
    other = tmp_path / "other.autoseg"
    other.write_bytes(whole)
    try:
        bundle = read(other)
        assert bundle.weights(WEIGHTS) == SOUND
        assert replace(bundle.content, members={}) == content()
    except AutosegError as error:
        assert "other.autoseg is refused" in str(error)


@pytest.mark.parametrize("size", [0, 1, 21, 22, 5000])
def test_what_is_no_zip_is_refused(tmp_path, size):
    path = tmp_path / "x.autoseg"
    path.write_bytes(b"P" * size)
    with pytest.raises(AutosegError, match="no whole zip file"):
        read(path)


def test_a_folder_or_a_missing_file_is_said(tmp_path):
    with pytest.raises(AutosegError, match="does not exist"):
        read(tmp_path / "no.autoseg")
    with pytest.raises(AutosegError, match="is no file"):
        read(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../evil.py", "/etc/passwd", "..\\evil", "3d_fullres/../../x", "extra.txt", "3d_fullres/", "\x1b[2J", "a\0b"],
)
def test_members_of_other_names_are_refused_and_never_written(tmp_path, name):
    entries = [*members(file(tmp_path)).items()]
    with zipfile.ZipFile(tmp_path / "bad.autoseg", "w") as archive:
        for known, data in entries:
            archive.writestr(known, data)
        info = zipfile.ZipInfo("placeholder")
        info.filename = info.orig_filename = name
        archive.writestr(info, b"")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(AutosegError, match="has no place in a model file") as refused:
        read(tmp_path / "bad.autoseg")
    assert "\x1b" not in str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_that_is_there_twice_is_refused(tmp_path):
    entries = [*members(file(tmp_path)).items()]
    with pytest.raises(AutosegError, match=r"holds model\.json twice"):
        read(zipped(tmp_path / "bad.autoseg", [*entries, (CARD, b"{}")]))


def test_compressed_members_are_refused_before_anything_is_unpacked(tmp_path):
    bomb = [("model.json", b"0" * 50_000_000), (CHECKSUM, b"")]
    with pytest.raises(AutosegError, match="is compressed"):
        read(zipped(tmp_path / "bomb.autoseg", bomb, zipfile.ZIP_DEFLATED))


def test_encrypted_members_are_refused(tmp_path):
    path = file(tmp_path)
    whole = bytearray(path.read_bytes())
    for start, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = whole.find(start)
        whole[place + offset] |= 1
    path.write_bytes(whole)
    with pytest.raises(AutosegError, match="is encrypted"):
        read(path)


def test_members_that_state_more_than_the_file_has_are_refused(tmp_path):
    path = file(tmp_path)
    whole = bytearray(path.read_bytes())
    place = whole.find(b"PK\x01\x02")
    whole[place + 20 : place + 28] = struct.pack("<II", 1 << 31, 1 << 31)
    path.write_bytes(whole)
    with pytest.raises(AutosegError, match="larger than the file"):
        read(path)


def test_a_directory_of_a_million_entries_is_not_read(tmp_path):
    """A zip's directory may be as large as the file; reading it takes many times its size in memory."""
    path = tmp_path / "bad.autoseg"
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\x01\x02", 20, 3, 20, 0, 0, 0, 0, 33, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    count = 60_000
    directory = entry * count
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, len(directory), 0, 0)
    path.write_bytes(directory + end)
    assert zipfile.is_zipfile(path)
    with pytest.raises(AutosegError, match="its directory is larger"):
        read(path)


def test_a_description_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("autoseg.bundle.MOST_JSON", 100)
    with pytest.raises(AutosegError, match="at most 100"):
        read(forged(tmp_path / "bad.autoseg", "[" + " " * 1000 + "]"))
    with pytest.raises(AutosegError, match="is not written"):
        write(tmp_path / "new.autoseg", content(), {WEIGHTS: SOUND})
    assert not (tmp_path / "new.autoseg").exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no JSON"),
        ("[1, 2", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "not valid"),
        ("{}", "Field required"),
        ('{"schema_version": 1, "surprise\x7f": 1}', "surprise"),
        ("9" * 10_000, "not valid|no JSON"),
    ],
)
def test_a_description_that_is_none_is_refused(tmp_path, text, reason):
    with pytest.raises(AutosegError, match=reason) as refused:
        read(forged(tmp_path / "bad.autoseg", text))
    assert "\x7f" not in str(refused.value)


def test_the_format_of_a_later_version_names_that_version(tmp_path):
    def later(found):
        found |= {"schema_version": 2, "autoseg_version": "0.9.0", "unheard_of": [1]}

    with pytest.raises(AutosegError, match=r"has the format 2.*reads 1.*'0\.9\.0'"):
        read(changed(file(tmp_path), tmp_path / "new.autoseg", later))


def _set(*path, to):
    def change(found):
        for step in path[:-1]:
            found = found[step]
        found[path[-1]] = to

    return change


CONFIGURATION = ("plan", "configurations", 0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_set("stages", to=[]), "no trained fold"),
        (_set("stages", 0, "folds", to=[]), "no trained fold"),
        (_set("stages", 0, "folds", to=[0, 0]), "a fold of 3d_fullres twice"),
        (_set("stages", 0, "folds", to=[0, 1]), "not those that"),
        (_set("stages", 0, "folds", to=[-1]), "stages.0.folds"),
        (_set("stages", 0, "configuration", to="../../x"), "stages.0.configuration"),
        (_set("stages", 0, "configuration", to="2d"), "no configuration '2d'"),
        (_set(*CONFIGURATION, "previous_stage", to="3d_fullres"), "does not follow"),
        (_set(*CONFIGURATION, "network", "name", to="os:system"), "holds no code"),
        (_set(*CONFIGURATION, "patch", to=[4, 6]), r"the patch of 3d_fullres has 3 edges, found 2\n"),
        (_set(*CONFIGURATION, "patch", to=[1 << 20, 1 << 20, 1]), "patch of"),
        (_set(*CONFIGURATION, "spacing_mm", to=[3, 0, 1]), "spacing of"),
        (_set("plan", "axis_order", to=[0, 0, 2]), "axis order"),
        (_set("plan", "channels", 0, "scheme", to="ct"), "how its channels"),
        (_set("members", to={}), "not those that"),
        (_set("members", WEIGHTS, "sha256", to="ab"), "sha256"),
        (_set("members", WEIGHTS, "bytes", to=12), "another size"),
        (_set("members", WEIGHTS, "sha256", to="0" * 64), "checksum of 3d_fullres/fold_0"),
        (_set("plan", "gpu_memory_gb", to=float("nan")), "not valid|no JSON"),
    ],
)
def test_descriptions_of_what_cannot_be_are_refused(tmp_path, change, reason):
    with pytest.raises(AutosegError, match=rf"bad\.autoseg is refused: (.|\n)*{reason}"):
        read(changed(file(tmp_path), tmp_path / "bad.autoseg", change)).weights(WEIGHTS)


def test_a_description_without_its_checksum_or_with_a_wrong_one_is_refused(tmp_path):
    inside = members(file(tmp_path))
    with pytest.raises(AutosegError, match=r"holds no model\.json\.sha256"):
        read(zipped(tmp_path / "bad.autoseg", [(WEIGHTS, SOUND), (CARD, inside[CARD])]))
    for wrong in (b"", b"0" * 64, b"\xff"):
        with pytest.raises(AutosegError, match=r"checksum of model\.json is wrong"):
            read(zipped(tmp_path / "bad.autoseg", [*(inside | {CHECKSUM: wrong}).items()]))


@pytest.mark.parametrize("header", [1 << 62, 5 << 20, len(SOUND)])
def test_a_huge_header_of_weights_is_refused(tmp_path, header):
    path = tmp_path / "bad.autoseg"
    write(path, content(), {WEIGHTS: struct.pack("<Q", header) + SOUND[8:]})
    with pytest.raises(AutosegError, match="a header that is larger"):
        read(path).weights(WEIGHTS)


def test_nothing_is_written_that_would_be_refused(tmp_path):
    own = replace(plan().configurations[0], network=replace(plan().configurations[0].network, name="mine:Net"))
    with pytest.raises(AutosegError, match=r"mine:Net(.|\n)*run folder"):
        file(tmp_path, plan=plan(own))
    with pytest.raises(ValueError, match="the record names"):
        write(tmp_path / "a.autoseg", content(), {})
    assert list(tmp_path.iterdir()) == []
