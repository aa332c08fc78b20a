"""Left and right in the plan: names, positions of classes, what is decided from both, and records of before."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_volume import STORED, make_grid, store
from toys import configuration, grid
from toys import plan as toy_plan

from autoseg.fingerprint import measure_case
from autoseg.labels import Labels
from autoseg.mirroring import ALL_AXES, EVERY_AXIS, Flips, Mirroring, other_index
from autoseg.pipeline.preparing import case_key
from autoseg.planners import PLANNERS, explain, plan, plan_like
from autoseg.planners.sides import mirroring, sided
from autoseg.preprocess import crop_to_content
from autoseg.records import AutosegError, load_json, to_json
from autoseg.schema import CaseFingerprint, Fingerprint, Plan
from autoseg.volume import Volume, canonical_grid, to_canonical

KIDNEYS = Labels.from_dataset({"background": 0, "kidney left": 1, "liver": 2, "kidney right": 3})
APART = {1: 0.7, 2: 0.3, 3: 0.2}
"""Left lies towards 1."""


def labels_of(*names) -> Labels:
    return Labels.from_dataset({"background": 0} | {name: n for n, name in enumerate(names, start=1)})


def facts(*places, dimension=3, annotated=None) -> Fingerprint:
    """A fingerprint of one case for each dictionary of positions, or None for none."""
    shape = (20, 30, 40) if dimension == 3 else (1, 30, 40)
    cases = tuple(
        CaseFingerprint(
            case=f"c{n}", shape=shape, spacing_mm=(1, 1, 1), crop_ratio=1, content_hash=f"{n}", across=across,
            annotated=annotated if n == 0 else None,
        )
        for n, across in enumerate(places)
    )  # fmt: skip
    return Fingerprint(dataset="D", dimension=dimension, channel_names=("MR",), cases=cases, intensities=(None,))


def read(kind, text, folder):
    (folder / "record.json").write_text(text)
    return load_json(kind, folder / "record.json")


def decided(labels, *places, order=(0, 1, 2), orientation="canonical", **more):
    """(what is decided, its words); the words are empty where nothing is said."""
    made, reasons = mirroring(facts(*places, **more), labels, order, orientation)
    return made, "".join(f"{reason.inputs} | {reason.outcome}" for reason in reasons)


# Names.


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("kidney left", "kidney right"),
        ("kidney_left", "kidney_right"),
        ("Left-Kidney", "Right-Kidney"),
        ("kidneyLeft", "kidneyRight"),
        ("KIDNEY_L", "KIDNEY_R"),
        ("lt. kidney", "rt. kidney"),
        ("rib_left_1", "rib_right_1"),
        ("rib_left1", "rib_right1"),
        ("hippocampus l", "hippocampus r"),
        ("lh-cortex", "rh-cortex"),
        ("L", "R"),
        ("Left-Lateral-Ventricle", "Right-Lateral-Ventricle"),
    ],
)
def test_names_that_differ_in_the_side_alone_are_a_pair(one, other):
    made, _ = decided(labels_of(other, one), {1: 0.2, 2: 0.8})
    assert made == Mirroring(left_right=2, swapped=((2, 1),))


@pytest.mark.parametrize(
    "name", ["liver", "L1", "bright", "leftover", "cleft", "left and right", "vertebrae_L5", "CSF"]
)
def test_names_that_say_no_side(name):
    assert sided(name) is None
    assert decided(labels_of(name), {1: 0.1}) == (EVERY_AXIS, "")


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (("left ventricle", "right ventricle"), "no mirror images there"),
        (("heart_atrium_left", "heart_atrium_right"), "no mirror images there"),
        (("LV", "RV"), "no mirror images there"),
        (("left coronary artery", "right coronary artery"), "no mirror images there"),
        (("spleen left", "liver"), "without a mate"),
        (("rib_left_1", "rib_right_2"), "without a mate"),
        (("kidney left", "left kidney"), "without a mate"),
        (("kidney_left", "kidney-left", "kidney right"), "more than one class is called so"),
    ],
)
def test_names_without_a_mirror_image(names, why):
    places = {index: 0.8 if "left" in name or name == "LV" else 0.2 for index, name in enumerate(names, start=1)}
    made, words = decided(labels_of(*names), places)
    assert made == Mirroring(left_right=2, forbidden=(2,))
    assert why in words and "no mirror images along axis 2" in words


# Positions.


def measured(array, image=None, labels=KIDNEYS, at=None):
    here = at or grid(array.shape)
    image = np.ones((1, *array.shape), np.float32) if image is None else image
    volume = Volume(array=to_canonical(image, here), grid=canonical_grid(here))
    return measure_case(crop_to_content("a", volume, to_canonical(array, here), here), labels, "hash", 1000).facts


def test_no_class_has_no_position():
    assert measured(np.zeros((5, 7, 11), np.int16)).across == {}


def test_positions_by_hand():
    marked = np.zeros((5, 7, 11), np.int16)
    marked[1, 2, 8], marked[3, 2, 10] = 1, 1
    marked[:, :, 0] = 3
    assert measured(marked).across == {1: round(9.5 / 11, 4), 3: round(0.5 / 11, 4)}
    image = np.ones((1, 5, 7, 11), np.float32)
    image[..., :3] = image[..., 10:] = 0
    marked[:, :, 0] = 0
    # Of the cropped image, columns 3 to 9; labels outside are kept: the one at 10 is cut off with its column.
    assert measured(marked, image).across == {1: round(5.5 / 7, 4)}


def test_positions_of_regions_are_those_of_all_their_values():
    labels = Labels.from_dataset({"background": 0, "all": [1, 2], "inner": 2, "ignore": 9})
    marked = np.zeros((5, 7, 11), np.int16)
    marked[0, 0, 1], marked[0, 0, 4], marked[0, 0, 9] = 1, 2, labels.ignored
    assert measured(marked, labels=labels).across == {1: round(3 / 11, 4), 2: round(4.5 / 11, 4)}


def test_positions_are_those_of_the_patient_however_a_file_is_stored():
    marked = np.random.default_rng(0).integers(0, 4, (5, 7, 11)).astype(np.int16)
    expected = measured(marked, at=make_grid()).across
    assert len(expected) == 3
    for columns, signs in STORED:
        array, here = store(marked, make_grid(), columns, signs)
        assert measured(array, at=here).across == expected


# Decisions.


def test_without_a_case_that_has_both_nothing_is_swapped():
    for places in ((), ({},), (None,), ({1: 0.7}, {3: 0.2})):
        made, words = decided(KIDNEYS, *places)
        assert made == Mirroring(left_right=2, forbidden=(2,))
        assert "no case has both" in words


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_a_confirmed_pair_trades_places_along_the_plan_axis_of_left_right(order):
    made, words = decided(KIDNEYS, APART, {1: 0.8}, {1: 0.9, 3: 0.8}, order=order)
    assert made == Mirroring(left_right=order.index(2), swapped=((1, 3),))
    assert "in 2 of 2 cases with both" in words
    assert f"1 pair of classes trades places in mirror images along axis {order.index(2)}" in words


def test_a_pair_in_the_other_order_everywhere_is_a_pair_and_said():
    made, words = decided(KIDNEYS, {1: 0.2, 3: 0.7}, {1: 0.3, 3: 0.7})
    assert made.swapped == ((1, 3),)
    assert "left on the patient's right side" in words


@pytest.mark.parametrize(("wrong", "pairs"), [(1, ((1, 3),)), (2, ())])
def test_one_case_in_twenty_may_lie_the_other_way(wrong, pairs):
    made, words = decided(KIDNEYS, *[APART] * (20 - wrong), *[{1: 0.2, 3: 0.7}] * wrong)
    assert made.swapped == pairs
    assert f"in {20 - wrong} of 20 cases" in words
    assert bool(made.forbidden) == ("not apart in the same order" in words) == (not pairs)


def test_one_lone_class_forbids_the_flip_for_all():
    labels = labels_of("kidney left", "kidney right", "middle lobe right")
    made, words = decided(labels, {1: 0.8, 2: 0.2, 3: 0.3})
    assert made == Mirroring(left_right=2, forbidden=(2,))
    assert "middle lobe right (without a mate of the other side)" in words


def test_where_one_of_a_pair_was_annotated_alone_nothing_is_swapped():
    made, words = decided(KIDNEYS, APART, APART, annotated=("liver", "kidney left"))
    assert made == Mirroring(left_right=2, forbidden=(2,))
    assert "only one of the two was annotated" in words
    assert decided(KIDNEYS, APART, annotated=("kidney right", "kidney left"))[0].swapped == ((1, 3),)


def test_2d_images_tell_their_axis_by_a_pair_alone():
    pair, lone = labels_of("lung left", "lung right"), labels_of("lung left")
    assert decided(pair, {1: 0.8, 2: 0.2}, dimension=2)[0] == Mirroring(left_right=2, swapped=((1, 2),))
    made, words = decided(lone, {1: 0.8}, dimension=2)
    assert made == Mirroring(forbidden=(1, 2)) and "along axis 1 and axis 2" in words


def test_the_axes_of_files_may_all_be_left_right():
    made, words = decided(KIDNEYS, APART, orientation="file")
    assert made == Mirroring(forbidden=(0, 1, 2)) and "those of each file" in words
    assert decided(KIDNEYS, APART, orientation="ras")[0] == Mirroring(left_right=2, swapped=((1, 3),))
    assert decided(labels_of("liver"), {1: 0.3}, orientation="file") == (EVERY_AXIS, "")


def test_long_lists_are_cut():
    labels = labels_of(*(f"rib_left_{n}" for n in range(12)))
    words = decided(labels, {n: 0.8 for n in range(1, 13)})[1]
    assert "rib_left_4 (" in words and "rib_left_5 (" not in words and "7 more" in words


def test_a_plan_says_it_and_a_plan_taken_over_follows_the_new_labels():
    made = plan(facts(APART, APART), KIDNEYS, PLANNERS["unet"])
    assert made.mirroring.swapped == ((1, 3),)
    assert "left and right: 1 pair of classes trades places" in explain(made)
    without = plan(facts(APART, APART), labels_of("a", "b"), PLANNERS["unet"])
    assert without.mirroring == EVERY_AXIS and "left and right" not in explain(without)
    taken = plan_like(without, facts(APART), KIDNEYS, made, "other")
    assert taken.mirroring == made.mirroring and "left and right" in explain(taken)
    assert plan_like(made, facts({1: 0.5}), labels_of("a"), without, "other").mirroring == EVERY_AXIS
    of_files = replace(without, orientation="file")
    assert plan_like(of_files, facts(APART), KIDNEYS, made, "other").mirroring.forbidden == (0, 1, 2)


# Records.


def test_records_of_before_load_and_mean_what_they_did(tmp_path):
    old = json.loads(to_json(toy_plan()))
    del old["mirroring"]
    loaded = read(Plan, json.dumps(old), tmp_path)
    assert loaded == toy_plan() and loaded.flips(configuration()) == ALL_AXES
    assert loaded.flips(configuration(name="2d", patch=(6, 8), spacing_mm=(1.0, 0.5))) == Flips(axes=(0, 1))
    entries = json.loads(to_json(facts(APART)))
    del entries["cases"][0]["across"]
    assert read(Fingerprint, json.dumps(entries), tmp_path) == facts(None)
    assert read(Fingerprint, to_json(facts(APART)), tmp_path) == facts(APART)


def test_prepared_cases_stay_valid():
    made, sides = toy_plan(), Mirroring(left_right=2, swapped=((1, 2),))
    keys = {
        case_key(replace(made, mirroring=mirroring), configuration(), facts(across).cases[0])
        for mirroring in (EVERY_AXIS, sides)
        for across in (None, APART)
    }
    assert len(keys) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"swapped": ((1, 2),)}, "give left_right"),
        ({"left_right": 3}, "axes 0, 1 and 2"),
        ({"forbidden": (-1,)}, "axes 0, 1 and 2"),
        ({"left_right": 2, "swapped": ((0, 1),)}, "without the background"),
        ({"left_right": 2, "swapped": ((1, 2), (2, 3))}, "share no class"),
        ({"left_right": 2, "swapped": ((1, 3),)}, "there is no class 3 to swap, the last is 2"),
    ],
)
def test_what_cannot_be_mirrored_so_is_refused(change, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        replace(toy_plan(), mirroring=Mirroring(**change))
    broken = json.loads(to_json(toy_plan())) | {"mirroring": change}
    with pytest.raises(AutosegError, match=words):
        read(Plan, json.dumps(broken), tmp_path)


def test_flips_of_a_patch_by_hand():
    swapped = Mirroring(left_right=2, swapped=((1, 3),))
    assert swapped.flips(KIDNEYS, 3) == Flips(axes=(0, 1, 2), left_right=2, indices=(0, 3, 2, 1), heads=(0, 3, 2, 1))
    assert swapped.flips(KIDNEYS, 2) == Flips(axes=(0, 1), left_right=1, indices=(0, 3, 2, 1), heads=(0, 3, 2, 1))
    assert swapped.flips(KIDNEYS, 3, among=(0, 1)) == Flips(axes=(0, 1), left_right=2)
    # The slices of a 2D network lie across left-right: nothing is mirrored along it.
    assert Mirroring(left_right=0, swapped=((1, 3),)).flips(KIDNEYS, 2) == Flips(axes=(0, 1))
    assert Mirroring(left_right=2, forbidden=(2,)).flips(KIDNEYS, 3) == Flips(axes=(0, 1), left_right=2)
    assert Mirroring(left_right=0, forbidden=(0,)).flips(KIDNEYS, 2) == Flips(axes=(0, 1))


def test_regions_trade_all_their_values():
    labels = Labels.from_dataset(
        {"background": 0, "left": [5, 6], "left core": 6, "right": [7, 8], "right core": 8, "any": [5, 6, 7, 8, 9],
         "ignore": 2}
    )  # fmt: skip
    names = {name: index for index, name in enumerate(labels.names)}
    pairs = ((names["left"], names["right"]), (names["left core"], names["right core"]))
    place = {value: index for index, value in enumerate(labels.known)}
    order = other_index(labels, pairs)
    assert {place[value]: place[other] for value, other in {0: 0, 5: 7, 6: 8, 7: 5, 8: 6, 9: 9, 2: 2}.items()} == dict(
        enumerate(order)
    )
    flips = Mirroring(left_right=2, swapped=pairs).flips(labels, 3)
    assert flips.indices == order
    # Regions have no head for the background.
    heads = [name for name in labels.names[1:]]
    others = {"any": "any", "left": "right", "right": "left", "left core": "right core", "right core": "left core"}
    assert [heads[head] for head in flips.heads] == [others[name] for name in heads]


def test_regions_that_are_not_made_up_alike_forbid_the_flip():
    labels = Labels.from_dataset({"background": 0, "kidney left": [1, 2], "kidney right": 3, "cyst": 2})
    index = labels.names.index
    made, words = decided(labels, {index("kidney left"): 0.8, index("kidney right"): 0.2})
    assert made == Mirroring(left_right=2, forbidden=(2,))
    assert "not as many label values" in words


@given(st.integers(1, 6).flatmap(lambda n: st.tuples(st.just(n), st.permutations(range(1, 2 * n + 1)))))
def test_trading_places_twice_is_no_change(drawn):
    count, order = drawn
    labels = labels_of(*(f"c{n}" for n in range(2 * count)))
    pairs = tuple((order[2 * n], order[2 * n + 1]) for n in range(count // 2 + 1) if 2 * n + 1 < len(order))
    flips = Mirroring(left_right=1, swapped=pairs).flips(labels, 3)
    for found in (flips.indices, flips.heads):
        assert [found[found[index]] for index in range(labels.count)] == list(range(labels.count))
        assert sum(found[index] != index for index in range(labels.count)) == 2 * len(pairs)
