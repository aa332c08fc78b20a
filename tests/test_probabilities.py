"""Kept probabilities: back within half a step, and as logits where they are resampled."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from toys import LABELS

from autoseg.labels import Labels
from autoseg.pipeline.probabilities import keep, quantise, read, restore_logits

REGIONS = Labels.from_dataset({"background": 0, "tumour": [1, 2], "core": 2})
SHAPE = (5, 7, 11)


@pytest.mark.parametrize("labels", [LABELS, REGIONS], ids=["classes", "regions"])
@given(seed=st.integers(0, 99), spread=st.sampled_from([0.1, 2.0, 30.0]))
def test_they_come_back_within_a_step(labels, seed, spread):
    """Each is rounded by at most half a step of 1/255, the background by that of all classes together."""
    logits = np.random.default_rng(seed).normal(0, spread, (labels.heads, *SHAPE)).astype(np.float32)
    kept = quantise(logits, labels)
    assert kept.dtype == np.uint8
    assert kept.shape == (2, *SHAPE), "one channel a class but the background"
    back = restore_logits(kept, labels)
    assert np.isfinite(back).all()
    assert np.abs(labels.probabilities(back) - labels.probabilities(logits)).max() < 1.6 / 255


@given(arrays(np.float32, (3, 4), elements=st.floats(-8, 8, width=32)))
@example(np.array([[0, 1], [1e-7, 3], [0, 2]], np.float32))
def test_logits_of_probabilities_give_them_again(logits):
    """And decide the same, but where probabilities are as alike as float32 rounds them."""
    for labels, some in ((LABELS, logits), (REGIONS, logits[:2])):
        probabilities = labels.probabilities(some)
        again = labels.probabilities(labels.logits(probabilities))
        assert again == pytest.approx(probabilities, abs=1e-5)
        lead = np.diff(np.sort(probabilities, 0), axis=0)[-1] if labels.exclusive else abs(probabilities - 0.5).min(0)
        differ = labels.decide(probabilities) != labels.decode(labels.logits(probabilities))
        assert not differ[lead > 1e-6].any()


def test_certain_cases_take_next_to_nothing_on_the_disk(tmp_path):
    logits = np.full((3, 40, 50, 60), -9.0, np.float32)
    logits[0] = 9.0
    logits[:, 10:20, 10:20, 10:20] = np.array([-9.0, 9.0, -9.0])[:, None, None, None]
    keep(tmp_path / "a.b2nd", logits, LABELS, (16, 16, 16))
    assert (tmp_path / "a.b2nd").stat().st_size < 3000
    assert np.array_equal(read(tmp_path / "a.b2nd", LABELS).argmax(0), logits.argmax(0))
    assert [path.name for path in tmp_path.iterdir()] == ["a.b2nd"]
