"""Files of every family: there and back, in every orientation, and what is refused."""

import gzip
import itertools
import json
import re
import struct
import threading

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.spatial.transform import Rotation

from autoseg.readers import (
    READERS,
    files_of,
    itk,
    read_image,
    read_labels,
    reader_for,
    write_image,
    write_labels,
)
from autoseg.records import AutosegError
from autoseg.volume import Grid, canonical_grid, from_canonical

SHAPE = (5, 7, 11)
RNG = np.random.default_rng(0)
VOXELS = RNG.integers(-900, 900, SHAPE).astype(np.int16)
OBLIQUE = Rotation.from_euler("zyx", (20, -13, 31), degrees=True).as_matrix()
TIE = (Rotation.from_euler("z", 45, degrees=True) * Rotation.from_euler("x", 17, degrees=True)).as_matrix()
STORED = list(itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)))


def save(path, array, spacing=(0.5, 1.5, 3.0), origin=(10.0, -20.0, 30.0), direction=None, vector=False):
    """Write with SimpleITK alone; spacing, origin and direction in (x, y, z)."""
    image = sitk.GetImageFromArray(array, isVector=vector)
    size = image.GetDimension()
    image.SetSpacing(spacing[:size])
    image.SetOrigin(origin[:size])
    if direction is not None:
        image.SetDirection(np.ravel(direction).tolist())
    sitk.WriteImage(image, str(path))
    return path


def grid(**more):
    return Grid(**{"shape": SHAPE, "spacing_mm": (3.0, 1.5, 0.5), "origin_mm": (10.0, -20.0, 30.0), **more})


def flat_grid(shape=(7, 11)):
    return Grid(shape=(1, *shape), spacing_mm=(1.0, 1.0, 1.0), dimension=2)


# Labels: the empty mask first, in every ending.


@pytest.mark.parametrize("ending", [ending for reader in READERS.values() for ending in reader.ENDINGS])
@pytest.mark.parametrize("values", [(0,), (0, 7, 200)])
def test_labels_of_every_ending_come_back(tmp_path, ending, values):
    flat = ending in (".png", ".bmp")
    lies_on = flat_grid() if flat else grid(origin_mm=(0.0, 0.0, 0.0))
    labels = RNG.choice(values, lies_on.shape).astype(np.int16)
    path = tmp_path / f"case{ending}"
    write_labels(labels, lies_on, path)
    read, stored = read_labels(path)
    np.testing.assert_array_equal(read.array[0], labels)
    assert read.array.dtype == np.uint8
    assert read.array.flags.writeable
    assert read.array.shape == (1, *lies_on.shape)
    assert stored.dimension == (2 if flat else 3)
    np.testing.assert_allclose(stored.affine(), lies_on.affine(), atol=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in files_of(path))


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".tif"])
def test_images_come_back(tmp_path, ending):
    array = RNG.normal(size=SHAPE).astype(np.float32)
    lies_on = grid(origin_mm=(0.0, 0.0, 0.0))
    write_image(array, lies_on, tmp_path / f"a{ending}")
    read, stored = read_image([tmp_path / f"a{ending}"])
    np.testing.assert_array_equal(read.array[0], array)
    assert read.array.dtype == np.float32
    np.testing.assert_allclose(stored.affine(), lies_on.affine(), atol=1e-6)


# Orientation.


@pytest.mark.parametrize(
    ("ending", "name"),
    [(".nii.gz", "straight"), (".nii.gz", "oblique"), (".nii", "tie"), (".nrrd", "tie"), (".mha", "mirrored")],
)
def test_all_48_stored_forms_read_alike_and_write_back(tmp_path, ending, name):
    base = {"straight": np.eye(3), "oblique": OBLIQUE, "tie": TIE, "mirrored": OBLIQUE @ np.diag((1, -1, 1))}[name]
    labels = None
    for number, (columns, signs) in enumerate(STORED):
        axes = [2 - columns[2 - i] for i in range(3)]
        stored = np.flip(VOXELS.transpose(axes), [i for i in range(3) if signs[2 - i] < 0])
        spacing = np.array((0.5, 1.5, 3.0))
        corner = np.zeros(3)
        for x, sign in zip(columns, signs):
            corner[x] = VOXELS.shape[2 - x] - 1 if sign < 0 else 0
        file = save(
            tmp_path / f"{number}{ending}",
            np.ascontiguousarray(stored),
            spacing=spacing[list(columns)].tolist(),
            origin=(base @ (spacing * corner) + (10.0, -20.0, 30.0)).tolist(),
            direction=base[:, list(columns)] * signs,
        )
        volume, found = read_image([file])
        if labels is None:
            first, labels = volume, (volume.array[0] > 0).astype(np.int16)
        np.testing.assert_array_equal(volume.array, first.array)
        np.testing.assert_allclose(volume.grid.affine(), first.grid.affine(), atol=2e-5)
        # Written labels lie on the file's own grid, as any other program sees them.
        out = tmp_path / f"labels{ending}"
        write_labels(labels, found, out)
        image, written = sitk.ReadImage(str(file)), sitk.ReadImage(str(out))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(written), stored > 0)
        np.testing.assert_allclose(written.GetSpacing(), image.GetSpacing(), atol=1e-6)
        np.testing.assert_allclose(written.GetOrigin(), image.GetOrigin(), atol=1e-6)
        np.testing.assert_allclose(written.GetDirection(), image.GetDirection(), atol=1e-6)


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_written_grids_of_any_rotation_come_back(tmp_path_factory, seed):
    turn = Rotation.random(random_state=seed).as_matrix()
    shape = tuple(int(n) for n in np.random.default_rng(seed).integers(1, 9, 3))
    lies_on = grid(shape=shape, direction=tuple(map(tuple, turn.tolist())))
    canonical = np.random.default_rng(seed).integers(0, 3, canonical_grid(lies_on).shape)
    path = tmp_path_factory.mktemp("turn") / "a.nii.gz"
    write_labels(canonical, lies_on, path)
    read, stored = read_labels(path)
    np.testing.assert_allclose(stored.affine(), lies_on.affine(), atol=1e-5)
    np.testing.assert_array_equal(read.array[0], canonical)
    plain = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    np.testing.assert_array_equal(plain, from_canonical(canonical, lies_on))


def test_a_negative_spacing_becomes_positive(tmp_path):
    path = save(tmp_path / "a.nii", VOXELS)
    patch(path, 76 + 4 * 3, "<f", -3.0)
    assert read_image([path])[1].spacing_mm == (3.0, 1.5, 0.5)


# 2D and thin volumes.


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_a_2d_medical_file_is_2d_and_never_turned(tmp_path, ending):
    quarter = [[0, -1], [1, 0]]
    path = save(tmp_path / f"a{ending}", VOXELS[0], direction=quarter)
    volume, stored = read_image([path])
    assert (stored.dimension, stored.shape, stored.spacing_mm) == (2, (1, 7, 11), (1.0, 1.5, 0.5))
    np.testing.assert_array_equal(volume.array[0, 0], VOXELS[0])
    write_labels((VOXELS[:1] > 0).astype(int), stored, tmp_path / f"b{ending}")
    back = sitk.ReadImage(str(tmp_path / f"b{ending}"))
    assert (back.GetDimension(), back.GetSpacing(), back.GetDirection()) == (2, (0.5, 1.5), (0, -1, 1, 0))


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha", ".gipl"])
def test_one_slice_of_a_3d_file_stays_3d(tmp_path, ending):
    volume, stored = read_image([save(tmp_path / f"a{ending}", VOXELS[:1])])
    assert (stored.dimension, stored.spacing_mm[0], volume.array.shape) == (3, 3.0, (1, 1, 7, 11))


# Channels.


def test_channels_as_files_vectors_and_a_fourth_axis_are_the_same(tmp_path):
    channels = np.stack([VOXELS, VOXELS[::-1], VOXELS * 2])
    files = [save(tmp_path / f"a_{n:04}.nii.gz", channel) for n, channel in enumerate(channels)]
    images = [read_image(files, channels=3)]
    for ending in (".nii.gz", ".nrrd", ".mha"):
        vector = save(tmp_path / f"v{ending}", np.ascontiguousarray(np.moveaxis(channels, 0, -1)), vector=True)
        images.append(read_image([vector], channels=3))
    joined = sitk.JoinSeries([sitk.ReadImage(str(file)) for file in files])
    sitk.WriteImage(joined, str(tmp_path / "four.nii.gz"))
    images.append(read_image([tmp_path / "four.nii.gz"], channels=3))
    for volume, stored in images:
        np.testing.assert_array_equal(volume.array, channels)
        assert (stored.dimension, stored.shape) == (3, SHAPE)
        np.testing.assert_allclose(stored.affine(), images[0][1].affine(), atol=1e-6)


def test_several_channels_are_written_into_one_file(tmp_path):
    array = RNG.normal(size=(3, *SHAPE)).astype(np.float32)
    for ending in (".nii.gz", ".nrrd", ".tif"):
        write_image(array, grid(), tmp_path / f"p{ending}")
        np.testing.assert_array_equal(read_image([tmp_path / f"p{ending}"])[0].array, array)


def test_two_channels_in_a_2d_file(tmp_path):
    pixels = np.ascontiguousarray(np.moveaxis(VOXELS[:2], 0, -1))
    for ending in (".nii.gz", ".nrrd", ".mha"):
        volume, stored = read_image([save(tmp_path / f"a{ending}", pixels, vector=True)], channels=2)
        assert (stored.dimension, stored.shape) == (2, (1, 7, 11))
        np.testing.assert_array_equal(volume.array[:, 0], VOXELS[:2])


def test_a_wrong_number_of_channels_is_refused(tmp_path):
    path = save(tmp_path / "a_0000.nii.gz", VOXELS)
    with pytest.raises(AutosegError, match="holds 1 channels, expected are 2"):
        read_image([path], channels=2)
    with pytest.raises(AutosegError, match="2 channels in 2 files, expected are 3; correct channel_names"):
        read_image([path, path], channels=3)
    save(tmp_path / "series.nii.gz", np.stack([VOXELS] * 3), (0.5, 1.5, 3.0, 1.0), (0.0, 0.0, 0.0, 0.0))
    with pytest.raises(AutosegError, match=r"3 channels or time points, expected are 1; name each in channel_names"):
        read_image([tmp_path / "series.nii.gz"], channels=1)
    for files, channels in (([path], 2), ([path, path], 3)):
        with pytest.raises(AutosegError, match=rf"expected are {channels}; send it back$"):
            read_image(files, channels=channels, cure="send it back")


def test_channels_in_another_orientation_are_joined_and_on_another_grid_refused(tmp_path):
    first = save(tmp_path / "a_0000.nii.gz", VOXELS, direction=np.eye(3), origin=(0.0, 0.0, 0.0))
    turned = save(
        tmp_path / "a_0001.nii.gz",
        np.ascontiguousarray(VOXELS[:, :, ::-1]),
        direction=np.diag((-1, 1, 1)),
        origin=(0.5 * 10, 0.0, 0.0),
    )
    volume, stored = read_image([first, turned])
    np.testing.assert_array_equal(volume.array[0], volume.array[1])
    np.testing.assert_array_equal(stored.direction, np.eye(3))
    shifted = save(tmp_path / "b_0001.nii.gz", VOXELS, origin=(0.0, 4.0, 0.0))
    with pytest.raises(AutosegError, match=r"b_0001.*a_0000.*different grids \(origin"):
        read_image([first, shifted])


# Pictures.


GREY = RNG.integers(2, 250, (7, 11), dtype=np.uint8)


def pictures(folder):
    """One grey picture in 15 encodings of 8 bits: path."""
    opaque = np.full_like(GREY, 255)
    rgb = np.dstack([GREY] * 3)
    rgba = np.dstack([rgb, opaque])
    for ending in ("png", "tif"):
        Image.fromarray(GREY).save(folder / f"grey.{ending}")
        Image.fromarray(np.dstack([GREY, opaque])).save(folder / f"grey_alpha.{ending}")
        Image.fromarray(rgb).save(folder / f"rgb.{ending}")
        Image.fromarray(rgba).save(folder / f"rgba.{ending}")
        palette = Image.fromarray(255 - GREY).convert("P")
        palette.putpalette([255 - n for n in range(256) for _ in range(3)])
        palette.save(folder / f"palette.{ending}")
    Image.fromarray(GREY).save(folder / "grey.bmp")
    Image.fromarray(rgb).save(folder / "rgb.bmp")
    Image.fromarray(GREY).save(folder / "lzw.tif", compression="tiff_lzw")
    Image.fromarray(rgb).save(folder / "lzw_rgb.tiff", compression="tiff_lzw")
    tifffile.imwrite(folder / "planar.tif", np.stack([GREY] * 3), photometric="rgb", planarconfig="separate")
    return sorted(folder.iterdir())


def test_encodings_of_one_picture_give_the_same_tensors(tmp_path):
    files = pictures(tmp_path)
    assert len(files) == 15
    for file in files:
        grey, stored = read_image([file], channels=1)
        rgb, _ = read_image([file], channels=3)
        if file.name == "palette.tif":
            # Its colour table has 16 bits: 0 to 255 in steps of 256 or 257.
            np.testing.assert_array_equal(grey.array[0, 0] // 256, GREY)
            continue
        np.testing.assert_array_equal(grey.array[0, 0], GREY, err_msg=file.name)
        np.testing.assert_array_equal(rgb.array[:, 0], np.stack([GREY] * 3), err_msg=file.name)
        assert (stored.dimension, stored.spacing_mm) == (2, (1.0, 1.0, 1.0))


def test_real_encodings_of_one_picture_give_the_same_tensors(real_data):
    seen: dict[tuple[int, ...], list] = {}
    for file in sorted((real_data / "extras" / "image_formats").iterdir()):
        volume, stored = read_image([file], channels=3)
        assert stored.dimension == 2
        values = volume.array / 257 if "-16" in file.name else volume.array
        seen.setdefault(values.shape, []).append(values)
    # The same picture in two sizes: 11 encodings of one, 3 of the other.
    assert sorted(len(group) for group in seen.values()) == [3, 11]
    for group in seen.values():
        for values in group[1:]:
            np.testing.assert_array_equal(values, group[0])


def test_alpha_is_kept_when_asked_for_and_refused_when_it_would_be_lost(tmp_path):
    colours = RNG.integers(0, 255, (7, 11, 4), dtype=np.uint8)
    for name in ("a.png", "a.tif"):
        path = tmp_path / name
        if name == "a.png":
            Image.fromarray(colours).save(path)
        else:
            tifffile.imwrite(path, colours, photometric="rgb", extrasamples=["unassalpha"])
        np.testing.assert_array_equal(read_image([path], channels=4)[0].array[:, 0], np.moveaxis(colours, -1, 0))
        for channels in (None, 3):
            with pytest.raises(AutosegError, match="transparent in places; save it without alpha"):
                read_image([path], channels=channels)


def test_colours_are_not_taken_for_grey(tmp_path):
    colours = RNG.integers(0, 255, (7, 11, 3), dtype=np.uint8)
    Image.fromarray(colours).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image([tmp_path / "a.png"])[0].array[:, 0], np.moveaxis(colours, -1, 0))
    with pytest.raises(AutosegError, match="holds 3 channels, expected are 1"):
        read_image([tmp_path / "a.png"], channels=1)


@pytest.mark.parametrize("samples", [1, 3, 4])
def test_sixteen_bits_keep_all_their_bits(tmp_path, samples):
    deep = RNG.integers(0, 65535, (samples, 1, 7, 11)).astype(np.uint16)
    for ending in (".png", ".tif"):
        write_image(deep, flat_grid(), tmp_path / f"a{ending}")
        np.testing.assert_array_equal(read_image([tmp_path / f"a{ending}"], channels=samples)[0].array, deep)


def test_jpeg_is_refused_with_the_cure(tmp_path):
    with pytest.raises(AutosegError, match=r"JPEG alters.*\.png"):
        reader_for(tmp_path / "a.JPG")
    tifffile_like = tmp_path / "a.tif"
    Image.fromarray(np.dstack([GREY] * 3)).save(tifffile_like, compression="jpeg")
    with pytest.raises(AutosegError, match="with loss"):
        read_image([tifffile_like])


def test_an_unknown_ending_lists_the_known_ones(tmp_path):
    with pytest.raises(AutosegError, match=r"\.nii\.gz, \.nii, .*\.png"):
        reader_for(tmp_path / "a.npy")


# TIFF stacks.


@pytest.mark.parametrize("name", ["case", "case_0000"])
def test_a_tiff_stack_takes_its_spacing_from_the_file_beside_it(tmp_path, name):
    path = tmp_path / f"{name}.tif"
    tifffile.imwrite(path, VOXELS, resolution=(300, 300))
    assert read_image([path])[1].spacing_mm == (1.0, 1.0, 1.0)
    (tmp_path / "case.json").write_text(json.dumps({"spacing": [3, 1.5, 0.5]}))
    volume, stored = read_image([path])
    assert (stored.spacing_mm, stored.dimension) == ((3.0, 1.5, 0.5), 3)
    np.testing.assert_array_equal(volume.array[0], VOXELS)
    assert files_of(path) == (path, tmp_path / "case.json")


@pytest.mark.parametrize("text", ["{", "{}", '{"spacing": [1, 0, 1]}', '{"spacing": 3}', '{"spacing": [1, "NaN", 1]}'])
def test_a_wrong_spacing_file_is_refused(tmp_path, text):
    tifffile.imwrite(tmp_path / "a.tif", VOXELS)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(AutosegError, match="positive numbers in mm"):
        read_image([tmp_path / "a.tif"])


# Labels.


def test_label_values_take_the_smallest_type(tmp_path):
    for values, kind in (
        ((0, 7, 200, 1024), np.int16),
        ((-1, 5), np.int8),
        ((0, 255), np.uint8),
        ((0, 40000), np.uint16),
        ((0, 70000), np.int32),
    ):
        labels = RNG.choice(values, SHAPE)
        write_labels(labels, grid(), tmp_path / "a.nii.gz")
        read, _ = read_labels(tmp_path / "a.nii.gz")
        assert read.array.dtype == kind
        np.testing.assert_array_equal(read.array[0], labels)


@pytest.mark.parametrize(("ending", "value"), [(".png", -1), (".png", 65536), (".bmp", 256), (".gipl", 70000)])
def test_labels_that_do_not_fit_the_format_are_refused(tmp_path, ending, value):
    lies_on = grid() if ending == ".gipl" else flat_grid()
    labels = np.zeros(lies_on.shape, int)
    labels[0, 1, 2] = value
    with pytest.raises(AutosegError, match=r"use \.(png, )?\.?nii\.gz|use \.nii\.gz"):
        write_labels(labels, lies_on, tmp_path / f"a{ending}")
    assert not list(tmp_path.iterdir())


def test_whole_numbers_stored_as_floats_are_labels_and_fractions_are_not(tmp_path):
    labels = RNG.choice((0, 7, 200), SHAPE)
    read, _ = read_labels(save(tmp_path / "a.nii.gz", labels.astype(np.float64)))
    assert read.array.dtype == np.int32
    np.testing.assert_array_equal(read.array[0], labels)
    for bad in (0.5, np.nan, 1e12):
        broken = labels.astype(np.float64)
        broken[1, 2, 3] = bad
        with pytest.raises(AutosegError, match="no whole numbers"):
            read_labels(save(tmp_path / "b.nii.gz", broken))


def test_grey_palette_and_one_bit_label_pictures(tmp_path):
    labels = RNG.integers(0, 3, (7, 11), dtype=np.uint8)
    palette = Image.fromarray(labels).convert("P")
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    for ending in (".png", ".bmp", ".tif"):
        Image.fromarray(np.dstack([labels] * 3)).save(tmp_path / f"grey{ending}")
        palette.save(tmp_path / f"palette{ending}")
        Image.fromarray(labels > 0).save(tmp_path / f"bit{ending}")
        for name, expected in (("grey", labels), ("palette", labels), ("bit", labels > 0)):
            np.testing.assert_array_equal(read_labels(tmp_path / f"{name}{ending}")[0].array[0, 0], expected)


def test_coloured_labels_are_refused_with_the_cure(tmp_path):
    Image.fromarray(RNG.integers(0, 255, (7, 11, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(AutosegError, match=r"a\.png holds colours; .*replace each colour"):
        read_labels(tmp_path / "a.png")


def test_labels_on_another_shape_are_a_mistake_in_the_program(tmp_path):
    with pytest.raises(ValueError, match="does not fit"):
        write_labels(np.zeros((7, 5, 11), int), grid(), tmp_path / "a.nii.gz")
    with pytest.raises(ValueError, match="must be integers"):
        write_labels(np.zeros(SHAPE), grid(), tmp_path / "a.nii.gz")


def test_formats_refuse_what_they_cannot_say(tmp_path):
    turned = grid(direction=((0.0, -1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)))
    array = np.zeros(canonical_grid(turned).shape, np.float32)
    for ending in (".gipl", ".tif"):
        with pytest.raises(AutosegError, match="direction"):
            write_image(array, turned, tmp_path / f"a{ending}")
    with pytest.raises(AutosegError, match="only 2D"):
        write_labels(np.zeros(SHAPE, int), grid(), tmp_path / "a.png")
    with pytest.raises(AutosegError, match="whole numbers only"):
        write_image(np.full((1, 7, 11), 0.5), flat_grid(), tmp_path / "a.png")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.nii.gz"
    write_labels(np.ones(SHAPE, int), grid(), path)
    before = path.read_bytes()

    def torn(image, name, **options):
        with open(name, "wb") as file:
            file.write(b"half")
        raise RuntimeError("disk full")

    monkeypatch.setattr(sitk, "WriteImage", torn)
    with pytest.raises(AutosegError, match="disk full"):
        write_labels(np.zeros(SHAPE, int), grid(), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii.gz"]


@pytest.mark.parametrize("name", ["a.MHD", "a.MHA", "a.NII.GZ", "a.NRRD", "a.GIPL.GZ"])
def test_a_writer_that_writes_another_name_or_nothing_is_not_believed(tmp_path, name):
    """Some writers know their endings in small letters only, and one of them makes a.mhd in the place of a.MHD."""
    try:
        write_labels(np.ones(SHAPE, int), grid(), tmp_path / name)
    except AutosegError as error:
        assert name in str(error)
        assert not list(tmp_path.iterdir())
    else:
        assert read_labels(tmp_path / name)[0].array.all()


def test_a_writer_that_writes_nothing_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr(sitk, "WriteImage", lambda image, name, **options: None)
    with pytest.raises(AutosegError, match=r"a\.nrrd was not written, but nothing; give its ending in small letters"):
        write_labels(np.ones(SHAPE, int), grid(), tmp_path / "a.nrrd")
    assert not list(tmp_path.iterdir())


def test_files_are_compressed(tmp_path):
    write_labels(np.zeros((40, 50, 60), int), grid(shape=(40, 50, 60)), tmp_path / "a.nii.gz")
    assert (tmp_path / "a.nii.gz").stat().st_size < 2000


# Broken files and headers.


def patch(path, offset, form, *values):
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, offset, *values)
    path.write_bytes(data)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd", ".mha", ".gipl", ".tif"])
def test_voxels_that_are_no_numbers_are_not_hidden(tmp_path, ending):
    array = VOXELS.astype(np.float32)
    array[1, 2, 3], array[4, 5, 6] = np.nan, np.inf
    image, _ = read_image([save(tmp_path / f"a{ending}", array)])
    np.testing.assert_array_equal(image.array[0], array)


@pytest.mark.parametrize("kind", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
def test_nifti_types_and_scaling_are_those_of_simpleitk(tmp_path, kind):
    path = save(tmp_path / "a.nii", (VOXELS % 100).astype(kind))
    for slope, intercept in ((1, 0), (0, 0), (0.25, -3), (float("nan"), 0)):
        patch(path, 112, "<2f", slope, intercept)
        np.testing.assert_array_equal(read_image([path])[0].array[0], sitk.GetArrayFromImage(sitk.ReadImage(str(path))))


def test_labels_with_a_scaling_stay_labels(tmp_path):
    path = save(tmp_path / "a.nii", np.arange(385, dtype=np.int16).reshape(SHAPE))
    patch(path, 112, "<2f", 2.0, 1.0)
    labels, _ = read_labels(path)
    np.testing.assert_array_equal(labels.array.ravel(), np.arange(385) * 2 + 1)


@pytest.mark.parametrize("samples", [3, 4])
def test_nifti_colours_are_channels(tmp_path, samples):
    kind = {3: 128, 4: 2304}[samples]
    colours = RNG.integers(0, 255, (*SHAPE, samples), dtype=np.uint8)
    path = save(tmp_path / "a.nii", VOXELS)
    path.write_bytes(path.read_bytes()[:352] + colours.tobytes())
    patch(path, 70, "<hh", kind, 8 * samples)
    np.testing.assert_array_equal(read_image([path], channels=samples)[0].array, np.moveaxis(colours, -1, 0))


def test_a_slope_of_zero_means_no_scaling_at_all(tmp_path):
    path = save(tmp_path / "a.nii", VOXELS)
    patch(path, 112, "<2f", 0, 5)
    np.testing.assert_array_equal(read_image([path])[0].array[0], VOXELS)


def test_other_kinds_of_nifti_are_refused_with_the_cure(tmp_path):
    path = save(tmp_path / "a.nii", VOXELS.astype(np.complex64))
    with pytest.raises(AutosegError, match=r"type 32 .*save it as"):
        read_image([path])
    with pytest.raises(AutosegError, match="complex numbers; save magnitude"):
        read_image([save(tmp_path / "a.nrrd", VOXELS.astype(np.complex64))])
    header = struct.pack("<i8s", 540, b"n+2\0\r\n\032\n")
    path.write_bytes(header.ljust(544, b"\0") + VOXELS.tobytes())
    with pytest.raises(AutosegError, match="NIfTI-2; save it as NIfTI-1"):
        read_image([path])


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_nifti_without_spacing_is_refused(tmp_path, value):
    path = save(tmp_path / "a.nii", VOXELS)
    patch(path, 76 + 4 * 3, "<f", value)
    with pytest.raises(AutosegError, match=r"a\.nii: the spacing .*correct it"):
        read_image([path])


def test_big_endian_nifti_is_read_and_checked(tmp_path):
    header = bytearray(352)
    struct.pack_into(">i", header, 0, 348)
    struct.pack_into(">8h", header, 40, 3, 11, 7, 5, 1, 1, 1, 1)
    struct.pack_into(">hh", header, 70, 4, 16)
    struct.pack_into(">8f", header, 76, 1, 0.5, 1.5, 3, 0, 0, 0, 0)
    struct.pack_into(">f", header, 108, 352)
    header[344:348] = b"n+1\0"
    path = tmp_path / "a.nii"
    path.write_bytes(bytes(header) + VOXELS.astype(">i2").tobytes())
    volume, stored = read_image([path])
    assert stored.spacing_mm == (3.0, 1.5, 0.5)
    np.testing.assert_array_equal(volume.array[0], from_canonical(VOXELS, stored))
    labels = read_labels(path)[0].array
    assert labels.dtype == np.int16
    assert labels.dtype.isnative
    patch(path, 76 + 4, ">f", 0.0)
    with pytest.raises(AutosegError, match="the spacing"):
        read_image([path])


@pytest.mark.parametrize(("entry", "value"), [(0, "nan"), (11, "nan"), (1, "inf")])
def test_a_nifti_sform_without_numbers_is_refused(tmp_path, entry, value):
    path = save(tmp_path / "a.nii", VOXELS)
    patch(path, 252, "<hh", 0, 1)
    patch(path, 280 + 4 * entry, "<f", float(value))
    with pytest.raises(AutosegError, match="sform"):
        read_image([path])


def test_sheared_axes_are_refused_with_the_cure(tmp_path):
    path = save(tmp_path / "a.nii", VOXELS)
    patch(path, 252, "<hh", 0, 1)
    patch(path, 280, "<12f", 0.5, 0.3, 0, 0, 0, 1.5, 0, 0, 0, 0, 3, 0)
    with pytest.raises(AutosegError, match=r"a\.nii: its axes are not at right angles .*resample"):
        read_image([path])
    sheared = np.eye(3)
    sheared[0, 1] = 0.2
    with pytest.raises(AutosegError, match=r"b\.mha: its axes are not at right angles .*resample"):
        read_image([save(tmp_path / "b.mha", VOXELS, direction=sheared)])
    # Where there is a valid qform it counts.
    patch(path, 252, "<hh", 1, 1)
    assert read_image([path])[1].spacing_mm == (3.0, 1.5, 0.5)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (b"ElementSpacing", b"0 1 1"),
        (b"ElementSpacing", b"nan 1 1"),
        (b"TransformMatrix", b"0 0 0 0 0 0 0 0 0"),
        (b"TransformMatrix", b"2 0 0 0 2 0 0 0 2"),
    ],
)
def test_a_metaimage_with_impossible_geometry_is_refused(tmp_path, key, value):
    path = save(tmp_path / "a.mha", VOXELS)
    path.write_bytes(re.sub(key + rb" = [^\n]*", key + b" = " + value, path.read_bytes()))
    with pytest.raises(AutosegError, match=r"a\.mha: .*(correct|repair) the header"):
        read_image([path])


TRUNCATED = [".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".gipl", ".gipl.gz", ".tif", ".png", ".bmp"]


@pytest.mark.parametrize("ending", TRUNCATED)
@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path, ending, part):
    flat = ending in (".png", ".bmp")
    lies_on = flat_grid((41, 53)) if flat else grid(shape=(9, 41, 53), origin_mm=(0.0, 0.0, 0.0))
    path = tmp_path / f"a{ending}"
    write_labels(RNG.integers(0, 250, lies_on.shape), lies_on, path)
    victim = files_of(path)[-1] if ending in (".nhdr", ".mhd") else path
    data = victim.read_bytes()
    victim.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(AutosegError, match="a"):
        read_image([path])


def test_gzip_in_several_members_is_read(tmp_path):
    plain = save(tmp_path / "plain.nii", VOXELS).read_bytes()
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(plain[:500]) + gzip.compress(plain[500:]))
    np.testing.assert_array_equal(read_image([path])[0].array[0], VOXELS)


def test_a_file_that_is_something_else_is_refused(tmp_path):
    for reader in READERS.values():
        for ending in reader.ENDINGS:
            path = tmp_path / f"text{ending}"
            path.write_text("this is a note, not an image\n" * 30)
            with pytest.raises(AutosegError, match="text"):
                read_image([path])


def test_a_missing_file_and_a_missing_voxel_file(tmp_path):
    with pytest.raises(AutosegError, match=r"a\.nrrd does not exist"):
        read_image([tmp_path / "a.nrrd"])
    path = save(tmp_path / "a.mhd", VOXELS)
    assert {p.name for p in files_of(path)} == {"a.mhd", "a.raw"}
    (tmp_path / "a.raw").unlink()
    with pytest.raises(AutosegError, match=r"names a\.raw .* there is none"):
        read_image([path])


def test_a_plain_twin_beside_a_packed_nifti_is_not_mixed_up_with_it(tmp_path):
    path = save(tmp_path / "a.nii.gz", VOXELS)
    save(tmp_path / "a.nii", VOXELS * 2)
    np.testing.assert_array_equal(read_image([path])[0].array[0], VOXELS)
    np.testing.assert_array_equal(read_image([tmp_path / "a.nii"])[0].array[0], VOXELS * 2)


def test_nothing_is_printed_and_threads_agree(tmp_path, capfd):
    files = [save(tmp_path / f"{n}.nii.gz", VOXELS + n) for n in range(8)]
    found: dict[int, np.ndarray] = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: read_image([files[n]])[0].array}))
        for n in range(len(files))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(8):
        np.testing.assert_array_equal(found[n][0], VOXELS + n)
    sheared = np.eye(3)
    sheared[0, 1] = 5e-4
    write_labels(np.zeros(SHAPE, int), grid(direction=tuple(map(tuple, sheared.tolist()))), tmp_path / "s.nii.gz")
    assert capfd.readouterr() == ("", "")


def test_real_labels_of_another_program_lie_on_their_images(real_data):
    folder = real_data / "extras" / "ct_body"
    image, _ = read_image([folder / "example_ct_sm.nii.gz"], channels=1)
    labels, _ = read_labels(folder / "example_seg.nii.gz")
    assert image.grid.agrees(labels.grid)
    assert len(np.unique(labels.array)) > 20
    itk = sitk.DICOMOrient(sitk.ReadImage(str(folder / "example_ct_sm.nii.gz")), "LPS")
    np.testing.assert_array_equal(image.array[0], sitk.GetArrayFromImage(itk))
    np.testing.assert_allclose(image.grid.spacing_mm[::-1], itk.GetSpacing(), atol=1e-6)
    np.testing.assert_allclose(image.grid.origin_mm, itk.GetOrigin(), atol=1e-4)


def test_a_real_anisotropic_ct_goes_there_and_back(real_data, tmp_path):
    source = real_data / "extras" / "ct_spleen" / "spleen_seg.nii.gz"
    labels, stored = read_labels(source)
    write_labels(labels.array[0], stored, tmp_path / "a.nii.gz")
    first, second = sitk.ReadImage(str(source)), sitk.ReadImage(str(tmp_path / "a.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(first), sitk.GetArrayFromImage(second))
    for of in ("GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(first, of)(), getattr(second, of)(), atol=1e-6)


def test_what_itk_says_is_shown_from_its_reason_on_and_in_whole_words():
    where = "Exception thrown in SimpleITK ImageFileWriter_Execute: /tmp/itkNiftiImageIO.cxx:1494: ITK ERROR: "
    assert itk.reason(f"{where}no\n room  left") == "no room left"
    long = itk.reason(where + "ninewords " * 40)
    assert set(long.split()) == {"ninewords", "..."} and len(long) <= itk.REASON
