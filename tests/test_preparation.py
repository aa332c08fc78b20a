"""What a plan may ask for beside its defaults: normalisation, crops, echoes combined, a function of one's own.

All of it is part of the key of prepared cases, and undone exactly by prediction.
"""

from dataclasses import replace

import numpy as np
import pytest
from toys import plan

from autoseg.pipeline.data import case_key
from autoseg.planners import edited, keep_edits, stamped
from autoseg.preprocess import normalise_channel
from autoseg.schema import CaseFingerprint, ChannelNorm

RNG = np.random.default_rng(8)
FACTS = CaseFingerprint(case="a", shape=(5, 7, 11), spacing_mm=(3.0, 1.0, 0.5), crop_ratio=1.0, content_hash="a")


def norm(scheme="zscore", masked=False, **more) -> ChannelNorm:
    return ChannelNorm(channel="MR", scheme=scheme, masked=masked, stats=None, **more)


def key(made) -> str:
    return case_key(made, made.configurations[0], FACTS)


# Normalisation.


def test_min_max_after_z_score_by_hand():
    x = np.array([[[0, 2, 4, 10]]], np.float32)
    assert np.allclose(normalise_channel(x, norm("zscore_minmax"), None), x / 10)
    inside = np.array([[[False, True, True, False]]])
    found = normalise_channel(x, norm("zscore_minmax", masked=True), inside)
    assert np.allclose(found, [[[0, 0, 1, 10]]]), "outside the content voxels stay as they are"
    constant = np.full((2, 3, 5), 7, np.float32)
    assert not normalise_channel(constant, norm("zscore_minmax"), None).any()
    assert not normalise_channel(constant, norm(outliers=3.0), None).any()


def test_a_spike_becomes_the_mean_and_the_rest_has_mean_0_and_deviation_1():
    x = RNG.normal(50, 4, (5, 7, 11)).astype(np.float32)
    x[2, 3, 4] = 5000
    found = normalise_channel(x, norm(outliers=3.0), None)
    before = np.float32(x.mean(dtype=np.float64))
    replaced = np.where(x == 5000, before, x)
    assert np.allclose(found, (replaced - replaced.mean()) / replaced.std(), atol=1e-4)
    assert abs(found.mean()) < 1e-5 and found.std() == pytest.approx(1, abs=1e-5)
    assert normalise_channel(x, norm("none", outliers=3.0), None)[2, 3, 4] == before
    assert normalise_channel(x, norm("none", outliers=100.0), None).max() == 5000, "no voxel is so far away"


def test_outliers_of_a_masked_channel_are_those_of_the_content():
    x = np.array([[[0, 10, 12, 14, 12, 40, 0, 0]]], np.float32)
    found = normalise_channel(x, norm("none", masked=True, outliers=1.5), x > 0)
    assert found.tolist() == [[[0, 10, 12, 14, 12, pytest.approx(17.6), 0, 0]]]


def test_outliers_change_the_key_of_prepared_cases_and_none_leaves_it_as_it_was():
    plain = plan()
    assert key(plain) == "d1ac95337d0dfa751c2258cbda16d20b", "as before there were such rules"
    assert key(replace(plain, channels=(norm(outliers=3.0),))) != key(plain)


def test_a_rule_for_outliers_edited_in_the_plan_is_kept():
    made = stamped(plan(), plan())
    mine = replace(made, channels=(norm(outliers=4.0),))
    assert edited(mine) == {"channels"}
    assert keep_edits(mine, plan())[0].channels == (norm(outliers=4.0),)
