"""Sliding-window inference: toy networks whose right answer is known, and a plain implementation to agree with."""

from itertools import chain, combinations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from autoseg.inference import count_views, predict_logits, tile_starts, tile_weights
from autoseg.records import AutosegError


def image_of(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Ramp:
    """A network that adds the position inside its tile: what it says depends on where the tile lies."""

    def __init__(self, patch, slope=1.0):
        self.ramp = slope * torch.arange(float(np.prod(patch))).reshape(patch) / np.prod(patch)
        self.batches = []

    def __call__(self, x):
        self.batches.append(len(x))
        return torch.cat((x + self.ramp, -x * self.ramp), 1)


def identity(x):
    return x


def constant(x):
    return torch.full((len(x), 3, *x.shape[2:]), 3.0)


def naive(networks, image, patch, heads, step, mirror_axes):
    """One tile, one flip, one network at a time; a Gaussian by scipy; a sum of weights; float64."""
    flat = len(patch) == 2
    window = (1, *patch) if flat else tuple(patch)
    missing = [max(edge - size, 0) for edge, size in zip(window, image.shape[1:])]
    before = [gap // 2 for gap in missing]
    padded = np.pad(image.numpy().astype(np.float64), [(0, 0), *((b, gap - b) for b, gap in zip(before, missing))])
    weights = np.zeros(window)
    weights[tuple(edge // 2 for edge in window)] = 1
    weights = ndimage.gaussian_filter(weights, [edge / 8 for edge in window], mode="constant", truncate=12)
    logits, total = np.zeros((heads, *padded.shape[1:])), np.zeros(padded.shape[1:])
    starts = [tile_starts(size, edge, step) for size, edge in zip(padded.shape[1:], window)]
    if flat:
        starts[0] = range(padded.shape[1])
    subsets = list(chain(*(combinations(mirror_axes, count) for count in range(len(mirror_axes) + 1))))
    for corner in product(*starts):
        box = tuple(slice(start, start + edge) for start, edge in zip(corner, window))
        tile = torch.from_numpy(padded[:, *box]).reshape(1, -1, *patch)
        for network, axes in product(networks, subsets):
            dims = [axis + 2 for axis in axes]
            answer = network(tile.flip(dims)).flip(dims).numpy().reshape(heads, *window)
            logits[:, *box] += weights * answer / len(networks) / len(subsets)
        total[box] += weights
    inner = tuple(slice(b, b + size) for b, size in zip(before, image.shape[1:]))
    return torch.from_numpy((logits / total)[:, *inner]).float()


@pytest.mark.parametrize(
    ("size", "patch", "step", "starts"),
    [
        (11, 11, 0.5, (0,)),
        (12, 11, 0.5, (0, 1)),
        (100, 40, 0.5, (0, 20, 40, 60)),
        (101, 40, 0.5, (0, 15, 30, 46, 61)),  # 61 / 4 = 15.25
        (100, 40, 1.0, (0, 30, 60)),
        (64, 32, 1.0, (0, 32)),  # side by side: each voxel in one
    ],
)
def test_tiles_are_spread_evenly(size, patch, step, starts):
    assert tile_starts(size, patch, step) == starts


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(0, 200), st.floats(0.1, 1))
def test_tiles_cover_the_axis_and_are_no_further_apart_than_asked(patch, beyond, step):
    size = patch + beyond
    starts = tile_starts(size, patch, step)
    assert starts[0] == 0 and starts[-1] == size - patch
    gaps = np.diff(starts)
    assert (gaps >= 0).all() and (gaps <= patch * step + 1).all() and (gaps <= patch).all()
    assert len(starts) == int(np.ceil(beyond / (patch * step))) + 1
    total = np.zeros(size)
    for start, weights in zip(starts, tile_weights(starts, size, patch)):
        assert (weights > 0).all()
        total[start : start + patch] += weights.numpy()
    np.testing.assert_allclose(total, 1, rtol=1e-5)


@pytest.mark.parametrize(("size", "patch", "step"), [(5, 7, 0.5), (7, 5, 0.0), (7, 5, 1.5), (7, 0, 0.5)])
def test_tiles_that_cannot_be_are_refused(size, patch, step):
    with pytest.raises(ValueError):
        tile_starts(size, patch, step)


def test_the_weights_are_a_gaussian_an_eighth_of_the_patch_wide():
    delta = np.zeros(11)
    delta[5] = 1
    gaussian = ndimage.gaussian_filter1d(delta, 11 / 8, mode="constant")
    starts = (0, 50)  # far apart: all shares are 1, except where tiles overlap
    weights = tile_weights((0, 3), 14, 11)
    ratio = weights[0, 3:] / weights[1, :-3]
    np.testing.assert_allclose(ratio, gaussian[3:] / gaussian[:-3], rtol=1e-4)
    assert torch.equal(tile_weights(starts, 61, 11), torch.ones(2, 11))


@pytest.mark.parametrize("shape", [(5, 7, 11), (1, 2, 3), (9, 17, 30)])
@pytest.mark.parametrize("patch", [(4, 6, 8), (6, 8)])
@pytest.mark.parametrize("mirror_axes", [(), (0, 1)])
def test_a_constant_network_gives_its_constant_back(shape, patch, mirror_axes):
    logits = predict_logits([constant], torch.zeros(1, *shape), patch=patch, heads=3, mirror_axes=mirror_axes)
    assert logits.shape == (3, *shape) and logits.dtype == torch.float32
    torch.testing.assert_close(logits, torch.full_like(logits, 3.0))


@pytest.mark.parametrize("step", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("patch", [(4, 4, 8), (2, 8, 4), (8, 8, 16), (4, 6)])
def test_an_identity_network_is_stitched_back_into_the_image(patch, step):
    image = image_of(2, 5, 7, 11)
    logits = predict_logits([identity], image, patch=patch, heads=2, step=step, mirror_axes=(0, 1), tile_batch=3)
    torch.testing.assert_close(logits, image, atol=2e-6, rtol=1e-6)


def test_an_image_that_is_one_tile_comes_back_exactly():
    image = image_of(1, 5, 7, 11)
    assert torch.equal(predict_logits([identity], image, patch=(5, 8, 12), heads=1), image)


@pytest.mark.parametrize(
    ("shape", "patch", "mirror_axes"),
    [
        ((5, 7, 11), (4, 4, 8), ()),
        ((5, 7, 11), (4, 4, 8), (0, 1, 2)),
        ((5, 7, 11), (6, 4, 12), (0, 2)),
        ((3, 13, 11), (6, 8), (0, 1)),
        ((3, 5, 11), (6, 8), (1,)),
        ((1, 5, 7), (8, 8), ()),
    ],
)
@pytest.mark.parametrize("tile_batch", [1, 5, 64])
def test_networks_that_see_positions_agree_with_a_plain_implementation(shape, patch, mirror_axes, tile_batch):
    image = image_of(1, *shape, seed=1)
    networks = [Ramp(patch), Ramp(patch, slope=-3.0)]
    logits = predict_logits(
        networks, image, patch=patch, heads=2, step=0.5, mirror_axes=mirror_axes, tile_batch=tile_batch
    )
    expected = naive(networks, image, patch, 2, 0.5, mirror_axes)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_mirrored_prediction_of_a_mirrored_image_is_the_mirrored_prediction(axis):
    # Even sizes and one tile, so that the Gaussian cannot break the symmetry.
    image, patch = image_of(1, 4, 6, 10), (4, 6, 10)
    predict = [Ramp(patch)]

    def mirrored(x, axes):
        return predict_logits(predict, x, patch=patch, heads=2, mirror_axes=axes)

    flipped = image.flip(axis + 1)
    torch.testing.assert_close(mirrored(flipped, (axis,)), mirrored(image, (axis,)).flip(axis + 1))
    assert not torch.allclose(mirrored(flipped, ()), mirrored(image, ()).flip(axis + 1))


def test_several_networks_are_averaged():
    def answers(value):
        return lambda x: torch.full((len(x), 2, *x.shape[2:]), value)

    networks = [answers(1.0), answers(2.0), answers(6.0)]
    logits = predict_logits(networks, torch.zeros(1, 5, 7, 11), patch=(4, 4, 4), heads=2)
    torch.testing.assert_close(logits, torch.full((2, 5, 7, 11), 3.0))


@pytest.mark.parametrize(
    ("shape", "mirror_axes", "tile_batch", "batches"),
    [
        ((4, 4, 8), (), 4, [1]),
        ((4, 4, 8), (0, 1, 2), 4, [4, 4]),  # one tile: its mirrored views share the calls
        ((4, 4, 12), (2,), 2, [2, 2]),  # two tiles: both in a call, once for each view
        ((4, 4, 16), (), 2, [2, 1]),
    ],
)
def test_a_call_holds_no_more_than_tile_batch(shape, mirror_axes, tile_batch, batches):
    network = Ramp((4, 4, 8))
    predict_logits(
        [network],
        torch.zeros(1, *shape),
        patch=(4, 4, 8),
        heads=2,
        mirror_axes=mirror_axes,
        tile_batch=tile_batch,
    )
    assert network.batches == batches


def test_progress_counts_tiles_to_the_end():
    seen = []
    predict_logits(
        [constant],
        torch.zeros(1, 3, 8, 12),
        patch=(8, 8),
        heads=3,
        tile_batch=4,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(4, 6), (6, 6)]


def test_the_result_is_an_ordinary_array_that_may_be_changed():
    logits = predict_logits([constant], torch.zeros(1, 5, 7, 11), patch=(8, 8, 8), heads=3)
    assert logits.is_contiguous() and not logits.is_inference()
    logits += 1
    assert logits.numpy().max() == 4


def test_networks_run_without_gradients_and_in_the_precision_asked_for():
    layer = torch.nn.Conv3d(1, 2, 1)
    kinds = []

    def network(x):
        y = layer(x)
        kinds.append((y.dtype, y.requires_grad))
        return y

    image = image_of(1, 4, 4, 4)
    exact = predict_logits([network], image, patch=(4, 4, 4), heads=2)
    rough = predict_logits([network], image, patch=(4, 4, 4), heads=2, autocast=torch.bfloat16)
    assert kinds == [(torch.float32, False), (torch.bfloat16, False)]
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_tiles_that_find_no_memory_go_in_smaller_groups(most):
    """Whatever fits, the logits are the same and every tile is told of once."""
    seen, told = [], []

    def narrow(x):
        if len(x) > most:
            raise torch.OutOfMemoryError("tried to allocate 3 GiB")
        seen.append(len(x))
        return torch.cat((x, -x), 1)

    image = image_of(1, 5, 7, 11)
    ask = {"patch": (4, 4, 4), "heads": 2, "mirror_axes": (0, 2)}
    logits = predict_logits([narrow], image, tile_batch=5, progress=lambda *where: told.append(where), **ask)
    torch.testing.assert_close(logits, torch.cat((image, -image)))
    tiles = told[-1][1]
    assert sum(seen) == 4 * tiles
    assert max(seen) == {1: 1, 2: 2, 3: 2}[most]
    done = [count for count, _ in told]
    assert done == sorted(set(done)) and done[-1] == tiles


def test_no_memory_for_one_tile_is_said_with_what_to_do():
    def full(x):
        raise torch.OutOfMemoryError("tried to allocate 3 GiB")

    said = r"cpu has no memory for a single tile of 4 x 5 x 6 voxels \(tried to allocate 3 GiB\).*--device cpu"
    with pytest.raises(AutosegError, match=said):
        predict_logits([full], torch.zeros(1, 5, 7, 11), patch=(4, 5, 6), heads=2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_stop_the_prediction(value):
    def broken(x):
        y = constant(x)
        y[0, 1, 2, 2, 2] = value
        return y

    with pytest.raises(AutosegError, match=r"not finite.*train again"):
        predict_logits([broken], torch.zeros(1, 5, 7, 11), patch=(4, 4, 4), heads=3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"networks": []}, "one network"),
        ({"image": torch.zeros(5, 7, 11)}, "image"),
        ({"patch": (4,)}, "patch"),
        ({"tile_batch": 0}, "tile_batch"),
        ({"mirror_axes": (2,), "patch": (4, 4)}, "mirror_axes"),
        ({"heads": 2}, "the network gave"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, said):
    arguments = {"networks": [constant], "image": torch.zeros(1, 5, 7, 11), "patch": (4, 4, 4), "heads": 3} | change
    with pytest.raises(ValueError, match=said):
        predict_logits(arguments.pop("networks"), arguments.pop("image"), **arguments)


@pytest.mark.parametrize(("size", "patch"), [((5, 7, 11), (4, 4, 4)), ((3, 9, 10), (4, 8)), ((2, 3, 3), (4, 4, 4))])
def test_views_are_counted_as_they_are_computed(size, patch):
    seen = []

    def network(batch):
        seen.append(len(batch))
        return batch[:, :1]

    axes = tuple(range(len(patch)))
    predict_logits([network], torch.zeros(1, *size), patch=patch, heads=1, mirror_axes=axes)
    assert count_views(size, patch, axes) == sum(seen)
