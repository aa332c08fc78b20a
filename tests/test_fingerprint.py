"""Fingerprint: numbers by hand, cases weigh the same, none without foreground."""

import json
from dataclasses import replace

import numpy as np
import pytest
from toys import LABELS, grid

from autoseg import fingerprint
from autoseg.fingerprint import channel_stats, measure_case, median_frequency_weights, summarise
from autoseg.labels import Labels
from autoseg.preprocess import crop_to_content
from autoseg.records import AutosegError, load_json, save_json
from autoseg.schema import Fingerprint
from autoseg.volume import Volume


def measured(name, image, labels, dimension=3):
    here = grid(image.shape[1:], dimension=dimension)
    cropped = crop_to_content(name, Volume(array=image.astype(np.float32), grid=here), labels, here)
    return measure_case(cropped, LABELS, f"hash of {name}", 2)


def test_no_foreground_at_all_gives_no_statistics():
    nothing = measured("a", np.ones((1, 5, 7, 11)), np.zeros((5, 7, 11), np.int16))
    assert summarise("D", ("MR",), [nothing]).intensities == (None,)


def test_ignored_voxels_are_no_foreground():
    image, marked = np.full((1, 5, 7, 11), 50.0), np.zeros((5, 7, 11), np.int16)
    image[0, 1], marked[1] = 10, 1
    marked[3] = 2  # the index after the last class
    here = grid(marked.shape)
    cropped = crop_to_content("a", Volume(array=image.astype(np.float32), grid=here), marked, here)
    labels = Labels.from_dataset({"background": 0, "a": 1, "ignore": 7})
    found = measure_case(cropped, labels, "hash", 1000, ("a",))
    assert set(found.samples[0]) == {10}
    assert summarise("D", ("MR",), [found]).annotated() == {"a": ("a",)}


def test_statistics_by_hand():
    stats = channel_stats(np.array([1, 2, 3, 4], np.float32))
    assert (stats.mean, stats.median, stats.minimum, stats.maximum) == (2.5, 2.5, 1, 4)
    assert stats.std == pytest.approx(np.sqrt(1.25))
    assert stats.percentile_00_5 == pytest.approx(1.015)
    assert stats.percentile_99_5 == pytest.approx(3.985)


def test_only_foreground_counts_and_every_case_weighs_the_same(monkeypatch, tmp_path):
    monkeypatch.setattr(fingerprint, "SAMPLES", 20_000)
    image, labels = np.full((2, 5, 7, 11), 50.0), np.zeros((5, 7, 11), np.int16)
    labels[2] = 1
    image[0, 2], image[1, 2] = 10, 1000
    other, few = np.full((2, 5, 7, 11), 50.0), np.zeros((5, 7, 11), np.int16)
    few[4, 6, 10] = 2
    other[0, 4, 6, 10], other[1, 4, 6, 10] = 20, 3000
    other[:, 0] = 0  # cropped away
    made = summarise("D", ("a", "b"), [measured("x", image, labels), measured("y", other, few)])
    assert made.intensities[0].mean == 15
    assert made.intensities[1].mean == 2000
    assert made.cases[1].shape == (4, 7, 11)
    assert made.cases[1].crop_ratio == 0.8
    assert made.cases[0].spacing_mm == (3.0, 1.0, 0.5)
    save_json(made, tmp_path / "f.json")
    assert load_json(Fingerprint, tmp_path / "f.json") == made
    swapped = summarise("D", ("a", "b"), [measured("z", image, labels), measured("y", other, few)])
    assert swapped.data_hash() != made.data_hash()


def test_2d_and_3d_do_not_mix():
    flat = measured("flat", np.ones((1, 1, 7, 11)), np.ones((1, 7, 11), np.int16), dimension=2)
    deep = measured("deep", np.ones((1, 5, 7, 11)), np.ones((5, 7, 11), np.int16))
    assert summarise("D", ("a",), [flat]).dimension == 2
    with pytest.raises(AutosegError, match="flat"):
        summarise("D", ("a",), [deep, flat])


def counted(*cases):
    """A fingerprint of cases with so many voxels of each index; None: none counted."""
    empty = measured("x", np.ones((1, 5, 7, 11)), np.zeros((5, 7, 11), np.int16))
    facts = [replace(empty.facts, case=f"c{n}", voxels=voxels) for n, voxels in enumerate(cases)]
    return summarise("D", ("MR",), [replace(empty, facts=entry) for entry in facts])


def test_voxels_of_each_index_are_counted_after_the_crop():
    image, marked = np.full((1, 5, 7, 11), 50.0), np.zeros((5, 7, 11), np.int16)
    image[0, 0] = 0  # cropped away
    image[0, 1, :, :3] = 0  # kept, but outside the content: background all the same
    marked[2, :2], marked[3, 0, :4], marked[4, 6] = 1, 2, 3
    here = grid(marked.shape)
    cropped = crop_to_content("a", Volume(array=image.astype(np.float32), grid=here), marked, here)
    labels = Labels.from_dataset({"background": 0, "a": 1, "b": 4, "ignore": 7})
    assert measure_case(cropped, labels, "hash", 1000).facts.voxels == {0: 4 * 77 - 22 - 4 - 11, 1: 22, 2: 4}


def test_weights_by_median_frequency_by_hand():
    # Background 150 of 200 voxels, liver 40 of 200, lesion 10 of the 100 of the case that has one: median 0.2.
    made = counted({0: 70, 1: 30}, {0: 80, 1: 10, 2: 10})
    assert median_frequency_weights(made, LABELS) == pytest.approx((0.2 / 0.75, 1, 0.2 / 0.1))
    # A class that never occurs has no say.
    assert median_frequency_weights(counted({0: 75, 1: 25}), LABELS) == pytest.approx((0.5 / 0.75, 0.5 / 0.25, 1))
    regions = Labels.from_dataset({"background": 0, "whole": [1, 2], "core": 2})
    assert median_frequency_weights(made, regions) == pytest.approx((0.25 / 0.75, 1, 0.25 / 0.1))


def test_fingerprints_of_before_have_no_weights_and_are_read_all_the_same(tmp_path):
    assert median_frequency_weights(counted({0: 9}, None), LABELS) is None
    save_json(counted({0: 9, 1: 2}), tmp_path / "new.json")
    assert load_json(Fingerprint, tmp_path / "new.json") == counted({0: 9, 1: 2})
    content = json.loads((tmp_path / "new.json").read_text())
    del content["cases"][0]["voxels"]
    (tmp_path / "old.json").write_text(json.dumps(content))
    assert load_json(Fingerprint, tmp_path / "old.json") == counted(None)
