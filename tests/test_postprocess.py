import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.morphology import remove_small_objects
from toys import LABELS

from autoseg.labels import Labels
from autoseg.postprocess import PostProcessing, Step, apply, apply_steps, out_of_reach
from autoseg.postprocess.steps import KINDS
from autoseg.records import AutosegError, load_json, save_json

EXAMPLES = settings(max_examples=30, deadline=None)
FULL = np.ones((3, 3, 3), bool)
UNIT = (1.0, 1.0, 1.0)


def largest(*members):
    return Step(members=members)


def islands(below_mm3, *members):
    return Step(kind="islands", members=members, below_mm3=below_mm3)


def holes(*members):
    return Step(kind="holes", members=members)


def closing(radius_mm, *members):
    return Step(kind="closing", members=members, radius_mm=radius_mm)


def row(*values):
    return np.array(values, np.uint8).reshape(1, 1, -1)


def image(*rows):
    return np.array([[list(map(int, row)) for row in rows]], np.int16)


def after(labels, *steps, spacing=UNIT):
    return apply_steps(labels, steps, spacing).ravel().tolist()


def plain_largest(labels, members):
    """By scipy, one component at a time."""
    components, count = ndimage.label(np.isin(labels, members), FULL)
    sizes = [np.sum(components == index) for index in range(1, count + 1)]
    out = labels.copy()
    for index, size in enumerate(sizes, start=1):
        if size < max(sizes):
            out[components == index] = 0
    return out


def ball(radius_mm, spacing):
    """True within `radius_mm` of the centre."""
    reach = [int(radius_mm / step + 1e-6) for step in spacing]
    axes = np.ogrid[tuple(slice(-n, n + 1) for n in reach)]
    return sum((axis * step) ** 2 for axis, step in zip(axes, spacing)) <= radius_mm**2 * (1 + 1e-6)


def plain_closing(mask, radius_mm, spacing):
    """By scipy, on a volume with room on all sides."""
    room = 8
    closed = ndimage.binary_closing(np.pad(mask, room), ball(radius_mm, spacing))
    return closed[room:-room, room:-room, room:-room]


@st.composite
def label_arrays(draw, classes=3):
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(2, 11)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    background = draw(st.sampled_from([0.3, 0.5, 0.8, 0.95]))
    kind = draw(st.sampled_from([np.uint8, np.int16, np.int32]))
    share = [background, *[(1 - background) / classes] * classes]
    return rng.choice(classes + 1, size=shape, p=share).astype(kind)


spacings = st.tuples(*[st.sampled_from([0.5, 0.7, 1.0, 3.0])] * 3)
member_sets = st.sampled_from([(1,), (3,), (1, 2), (2, 3), (1, 2, 3)])


@st.composite
def any_step(draw):
    members, kind = draw(member_sets), draw(st.sampled_from(list(KINDS)))
    return {
        "largest": largest(*members),
        "islands": islands(draw(st.sampled_from([0.5, 1.0, 3.0, 20.0])), *members),
        "holes": holes(*members),
        "closing": closing(draw(st.sampled_from([0.5, 1.0, 1.5, 3.0])), *members),
    }[kind]


# Empty masks.


@pytest.mark.parametrize("step", [largest(1, 2), islands(5, 1, 2), holes(1, 2), closing(2, 1, 2)])
def test_an_empty_mask_is_left_alone(step):
    empty = np.zeros((3, 5, 7), np.int16)
    assert apply_steps(empty, [step], UNIT) is empty
    other = row(3, 0, 3)
    assert apply_steps(other, [step], UNIT) is other
    assert apply_steps(other, [], UNIT) is other


# By hand.


def test_a_smaller_component_goes_and_equal_ones_stay():
    assert after(row(1, 1, 0, 1), largest(1)) == [1, 1, 0, 0]
    tied = row(1, 1, 0, 1, 1)
    assert apply_steps(tied, [largest(1)], UNIT) is tied


def test_members_count_together_and_others_are_left_alone():
    assert after(row(1, 2, 0, 1, 0, 3), largest(1, 2)) == [1, 2, 0, 0, 0, 3]
    assert after(row(1, 1, 0, 1, 2, 0, 2, 2), largest(1), largest(2)) == [1, 1, 0, 0, 0, 0, 2, 2]


def test_corners_connect():
    labels = np.zeros((2, 2, 4), np.uint8)
    labels[0, 0, 0] = labels[1, 1, 1] = 1
    assert apply_steps(labels, [largest(1)], UNIT) is labels
    flat = image("10000", "01000", "00001")
    assert apply_steps(flat, [largest(1)], UNIT).sum() == 2


def test_islands_are_measured_in_mm3():
    labels = row(1, 0, 1, 1, 0, 2, 0, 1, 1, 1)
    assert after(labels, islands(3, 1)) == [0, 0, 0, 0, 0, 2, 0, 1, 1, 1], "two voxels are below 3 mm3, three are not"
    assert after(labels, islands(3, 1), spacing=(3.0, 1.0, 0.5)) == [0, 0, 1, 1, 0, 2, 0, 1, 1, 1]
    # 0.1 * 0.1 * 0.1 * 2 is 0.0020000000000000005, and 3 * 0.1**3 more than 0.003: rounding decides nothing.
    assert after(labels, islands(0.002, 1), spacing=(0.1,) * 3) == [0, 0, 1, 1, 0, 2, 0, 1, 1, 1]
    assert after(row(1, 2, 0, 2), islands(2, 1, 2)) == [1, 2, 0, 0], "members make one island together"
    assert after(row(1, 2, 2, 0), islands(2, 1)) == [0, 2, 2, 0]


def test_holes_are_filled_with_their_class_and_only_where_nothing_is():
    labels = image("1111", "1021", "1001", "1111", "0000", "3300")
    filled = image("1111", "1121", "1111", "1111", "0000", "3300")
    assert apply_steps(labels, [holes(1)], UNIT).tolist() == filled.tolist()
    open_to_the_edge = image("111", "101", "101")
    assert apply_steps(open_to_the_edge, [holes(1)], UNIT) is open_to_the_edge
    diagonal = image("0110", "1001", "0110")
    assert apply_steps(diagonal, [holes(1)], UNIT).sum() == 8, "a hole does not leak through corners"


def test_a_ring_is_a_hole_in_2d_and_none_in_3d():
    ring = image("111", "101", "111")
    assert apply_steps(ring, [holes(1)], UNIT).sum() == 9
    slab = np.concatenate([np.zeros_like(ring), ring, np.zeros_like(ring)])
    assert apply_steps(slab, [holes(1)], UNIT) is slab
    shell = np.concatenate([np.ones_like(ring), ring, np.ones_like(ring)])
    assert apply_steps(shell, [holes(1)], UNIT).sum() == 27


def test_holes_of_several_classes_get_the_nearest_of_them():
    labels = np.stack([image("11222", "11222", "11222")[0], image("11222", "10002", "11222")[0]])
    labels = np.concatenate([labels, labels[:1]])
    filled = apply_steps(labels, [holes(1, 2)], (1.0, 1.0, 1.0))
    assert filled[1, 1].tolist() == [1, 1, 2, 2, 2]
    assert apply_steps(labels, [holes(2)], UNIT) is labels
    # From the middle 1 is 2 * 0.3 away to the left, 2 is 0.5 away in Z.
    apart = np.concatenate([image("222"), image("101"), image("222")])
    walls = np.concatenate([np.full((3, 1, 3), 2, np.int16), apart, np.full((3, 1, 3), 2, np.int16)], axis=1)
    assert apply_steps(walls, [holes(1, 2)], (0.5, 1.0, 0.6))[1, 1].tolist() == [1, 2, 1]
    assert apply_steps(walls, [holes(1, 2)], (0.6, 1.0, 0.5))[1, 1].tolist() == [1, 1, 1]
    assert apply_steps(walls, [holes(1, 2)], (0.5, 1.0, 0.5))[1, 1].tolist() == [1, 1, 1], "the first of equals"


def middle(*rows, spacing=UNIT, step):
    """The middle one of three rows after a step."""
    return apply_steps(image(*rows), [step], spacing)[0, 1].tolist()


def test_closing_measures_in_mm():
    gap = ("1001", "1001", "1001")
    assert middle(*gap, step=closing(1, 1)) == [1, 1, 1, 1], "two voxels that grow by one"
    assert apply_steps(image(*gap), [closing(1, 1)], UNIT)[0, 0].tolist() == [1, 0, 0, 1], "a notch is no gap"
    assert middle(*gap, step=closing(1, 1), spacing=(1.0, 1.0, 2.0)) == [1, 0, 0, 1]
    assert middle(*gap, step=closing(1, 1), spacing=(1.0, 2.0, 1.0)) == [1, 1, 1, 1]
    assert middle("1001", "1021", "1001", step=closing(1, 1)) == [1, 1, 2, 1], "another class stays"
    assert middle("1002", "1002", "1002", step=closing(1, 1, 2)) == [1, 1, 2, 2]
    edge = image("001", "001", "001")
    assert apply_steps(edge, [closing(5, 1)], UNIT) is edge, "nothing beyond the edge draws the mask there"


def test_a_closing_of_endless_reach_is_refused():
    with pytest.raises(AutosegError, match="reaches over 2000 voxels"):
        apply_steps(row(1, 0, 1), [closing(20, 1)], (1.0, 1.0, 0.01))


def test_a_rule_leaves_out_a_closing_that_an_image_is_too_fine_for():
    found, fine = image("1101", "1101", "1101"), (1.0, 1.0, 0.01)
    rule = PostProcessing(cases=9, steps=(closing(2, 1), largest(1)))
    assert out_of_reach(rule.steps, fine, True) == rule.steps[:1]
    assert out_of_reach(rule.steps, UNIT, True) == ()
    assert apply(found, rule, fine)[0, 1].tolist() == [1, 1, 0, 0], "only the largest is kept"
    assert apply(found, rule, UNIT)[0, 1].tolist() == [1, 1, 1, 1], "the gap is closed first"


def test_steps_are_applied_one_after_the_other():
    # The rim of the larger part goes first: what remains of the core decides then.
    apart = row(1, 1, 1, 0, 2, 1, 2, 2)
    assert after(apart, largest(1), largest(1, 2)) == [1, 1, 1, 0, 0, 0, 0, 0]
    assert after(apart, largest(1, 2), largest(1)) == [0, 0, 0, 0, 2, 1, 2, 2]
    ring = image("11100", "10101", "11102")
    assert apply_steps(ring, [holes(1), islands(2, 2), largest(1)], UNIT)[0].tolist() == [[1, 1, 1, 0, 0]] * 3


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"kind": "islands"}, "needs below_mm3"),
        ({"radius_mm": 2}, "has no radius_mm"),
        ({"kind": "closing", "radius_mm": 0}, "above 0"),
        ({"kind": "opening"}, "largest"),
        ({"members": ()}, "members"),
    ],
)
def test_a_step_that_cannot_be_is_refused(given, reason):
    with pytest.raises(ValueError, match=reason):
        Step(**({"members": (1,)} | given))


def test_words_say_what_is_done():
    assert "nothing" in PostProcessing(cases=3).describe()
    rule = PostProcessing(
        cases=3, steps=(Step(members=(1, 2), dice_before=0.5, dice_after=0.75), islands(20, 1), closing(1.5, 2))
    )
    assert rule.describe(LABELS) == (
        "keep the largest component of liver, lesion (mean Dice 0.5000 to 0.7500); remove components of liver below "
        "20 mm3; close gaps of lesion with a radius of 1.5 mm"
    )
    assert "class 1, class 2" in rule.describe()
    assert holes(1).describe(LABELS) == "fill holes of liver"


def test_a_file_from_before_there_were_kinds_means_the_same(tmp_path):
    old = {
        "schema_version": 1,
        "cases": 7,
        "steps": [{"members": [1, 2], "dice_before": 0.5, "dice_after": 0.75}],
        "rejected": [{"members": [1], "dice_before": None, "dice_after": None}],
    }
    (tmp_path / "old.json").write_text(json.dumps(old))
    rule = load_json(PostProcessing, tmp_path / "old.json")
    assert rule.steps == (Step(kind="largest", members=(1, 2), dice_before=0.5, dice_after=0.75),)
    assert apply(row(1, 2, 0, 1), rule, UNIT).ravel().tolist() == [1, 2, 0, 0]
    assert rule.describe(LABELS) == "keep the largest component of liver, lesion (mean Dice 0.5000 to 0.7500)"
    save_json(rule, tmp_path / "new.json")
    assert load_json(PostProcessing, tmp_path / "new.json") == rule


# Against plain implementations.


@EXAMPLES
@given(label_arrays(), member_sets)
def test_keeping_agrees_with_scipy(labels, members):
    kept = apply_steps(labels, [largest(*members)], UNIT)
    assert kept.dtype == labels.dtype
    assert np.array_equal(kept, plain_largest(labels, members))
    one_by_one = labels
    for member in members:
        one_by_one = plain_largest(one_by_one, [member])
    assert np.array_equal(apply_steps(labels, [largest(member) for member in members], UNIT), one_by_one)


@EXAMPLES
@given(label_arrays(), member_sets, st.integers(2, 12))
def test_islands_agree_with_skimage(labels, members, voxels):
    removed = apply_steps(labels, [islands(voxels * 0.7 * 3.0 * 0.1, *members)], (0.7, 3.0, 0.1))
    kept = remove_small_objects(np.isin(labels, members), max_size=voxels - 1, connectivity=3)
    assert np.array_equal(removed, np.where(np.isin(labels, members) & ~kept, 0, labels))


@EXAMPLES
@given(label_arrays(), member_sets)
def test_holes_agree_with_scipy(labels, members):
    mask = np.isin(labels, members)
    full = ndimage.binary_fill_holes(mask[0])[None] if len(mask) == 1 else ndimage.binary_fill_holes(mask)
    filled = apply_steps(labels, [holes(*members)], UNIT)
    assert np.array_equal(filled > 0, (labels > 0) | full)


@EXAMPLES
@given(label_arrays(), member_sets, spacings, st.sampled_from([0.5, 1.0, 1.5, 3.0]))
def test_closing_agrees_with_scipy(labels, members, spacing, radius):
    in_plane = spacing if len(labels) > 1 else (100.0, *spacing[1:])
    closed = plain_closing(np.isin(labels, members), radius, in_plane)
    assert np.array_equal(apply_steps(labels, [closing(radius, *members)], spacing) > 0, (labels > 0) | closed)


@settings(max_examples=150, deadline=None)
@given(label_arrays(), any_step(), spacings)
def test_every_step_is_done_at_once_and_touches_no_other_class(labels, step, spacing):
    before = labels.copy()
    out = apply_steps(labels, [step], spacing)
    assert np.array_equal(labels, before), "the input must stay as it is"
    assert out.dtype == labels.dtype
    assert apply_steps(out, [step], spacing) is out, "once is enough"
    changed = out != labels
    if step.kind in ("largest", "islands"):
        assert np.isin(labels[changed], step.members).all() and not out[changed].any()
    else:
        assert not labels[changed].any() and np.isin(out[changed], step.members).all()


@EXAMPLES
@given(label_arrays(), st.lists(any_step(), max_size=4), spacings)
def test_room_around_an_image_changes_nothing(labels, steps, spacing):
    roomy = np.pad(labels, ((0, 0) if len(labels) == 1 else (2, 1), (0, 3), (1, 0)))
    out = apply_steps(roomy, steps, spacing)
    inner = out[:, : labels.shape[1], 1:] if len(labels) == 1 else out[2:-1, : labels.shape[1], 1:]
    assert np.array_equal(inner, apply_steps(labels, steps, spacing))


def test_labels_with_regions_have_their_names():
    labels = Labels.from_dataset({"background": 0, "whole": [1, 2], "core": 2})
    assert largest(1, 2).describe(labels) == "keep the largest component of whole"
