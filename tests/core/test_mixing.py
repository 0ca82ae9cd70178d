from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compiling import FAST

from prism_jax import rng
from prism_jax.core.mixing import apply_mix, sample_mix
from prism_jax.types import Mix

SIZE = (12, 20)
BATCH = 6
COUNT = 5_000


mixed = jax.jit(apply_mix)


@functools.cache
def draw_many(kind, alpha):
    coordinates = np.arange(COUNT, dtype=np.int32)

    def draw(i):
        return sample_mix(rng.stream(rng.root(0), "test", i), BATCH, SIZE, kind=kind, alpha=alpha)

    return jax.device_get(jax.jit(jax.vmap(draw), compiler_options=FAST)(coordinates))


@pytest.fixture(scope="module")
def cutmixes():
    return draw_many("cutmix", 1.0)


def images_like():
    images = np.random.default_rng(0).normal(size=(BATCH, *SIZE, 3))
    return images.astype(np.float32)


def largest_gap(a, b):
    a, b = (np.round(np.asarray(x, np.float64), 5) for x in (a, b))  # one share, one number
    at = np.union1d(a, b)
    below = [np.searchsorted(np.sort(x), at, side="right") / len(x) for x in (a, b)]
    return np.abs(below[0] - below[1]).max()


SAME = 0.045  # two samples of 5,000 of one distribution differ by more once in 10,000 times


@functools.cache
def reference_shares(round_up=False):
    """The share kept by boxes of CutMix's rule, in NumPy."""
    draw = np.random.default_rng(1)
    height, width = SIZE
    shares = []
    for _ in range(COUNT):
        side = np.sqrt(1 - draw.beta(1.0, 1.0))
        half_h, half_w = int(height * side) // 2, int(width * side) // 2
        y, x = draw.integers(height) + round_up * half_h, draw.integers(width)
        rows = min(max(y + half_h, 0), height) - min(max(y - half_h, 0), height)
        columns = min(x + half_w, width) - max(x - half_w, 0)
        shares.append(1 - rows * columns / (height * width))
    return np.array(shares)


def test_cutmix_boxes_are_distributed_as_the_reference(cutmixes):
    assert largest_gap(cutmixes.weight, reference_shares()) < SAME
    # Twins: another alpha, and a centre that is not uniform.
    assert largest_gap(draw_many("cutmix", 0.3).weight, reference_shares()) > SAME
    assert largest_gap(cutmixes.weight, reference_shares(round_up=True)) > SAME


def test_the_weight_is_the_share_of_pixels_that_stayed(cutmixes):
    height, width = SIZE
    top, left, bottom, right = cutmixes.box.T
    assert ((0 <= top) & (top <= bottom) & (bottom <= height)).all()
    assert ((0 <= left) & (left <= right) & (right <= width)).all()
    kept = 1 - (bottom - top) * (right - left) / (height * width)
    np.testing.assert_allclose(cutmixes.weight, kept, atol=1e-6)
    assert (cutmixes.blend == 1).all()
    # Counted in an image: partners are seen exactly inside the box.
    mix = jax.tree.map(lambda x: x[3], cutmixes)
    mix = mix._replace(partner_B=np.roll(np.arange(BATCH, dtype=np.int32), 1))
    numbers = np.arange(BATCH, dtype=np.float32)[:, None, None, None]
    images = np.broadcast_to(numbers, (BATCH, *SIZE, 1))
    own = np.asarray(mixed(images, mix)) == images
    assert 0 < mix.weight < 1
    np.testing.assert_allclose(own.mean((1, 2, 3)), mix.weight, atol=1e-6)


def test_cutmix_by_slices(cutmixes):
    images = images_like()
    for i in range(5):
        mix = jax.tree.map(lambda x, i=i: x[i], cutmixes)
        top, left, bottom, right = (int(x) for x in mix.box)
        expected, partner = np.array(images), images[mix.partner_B]
        expected[:, top:bottom, left:right] = partner[:, top:bottom, left:right]
        np.testing.assert_array_equal(mixed(images, mix), expected)


def test_mixup_weights_follow_the_beta_distribution():
    mixes = draw_many("mixup", 0.8)
    beta = np.random.default_rng(2).beta
    assert largest_gap(mixes.weight, beta(0.8, 0.8, COUNT)) < SAME
    assert largest_gap(mixes.weight, beta(1.5, 1.5, COUNT)) > SAME
    np.testing.assert_array_equal(mixes.weight, mixes.blend)
    assert (mixes.box == 0).all()


def test_mixup_by_hand():
    partner, quarter = np.array([1, 0], np.int32), np.float32(0.25)
    mix = Mix(partner, np.zeros(4, np.int32), quarter, quarter)
    images = np.array([0.0, 8.0], np.float32).reshape(2, 1, 1, 1)
    np.testing.assert_array_equal(np.ravel(mixed(images, mix)), [6, 2])


@pytest.mark.parametrize("kind", ["cutmix", "mixup"])
def test_partners_are_permutations_and_every_one_comes_up(kind):
    partners = np.asarray(draw_many(kind, 1.0).partner_B)
    np.testing.assert_array_equal(np.sort(partners, axis=1), np.tile(np.arange(BATCH), (COUNT, 1)))
    for image in range(BATCH):
        share = np.bincount(partners[:, image], minlength=BATCH) / COUNT
        np.testing.assert_allclose(share, 1 / BATCH, atol=0.025)


def test_no_mix_changes_no_bit():
    mix = sample_mix(rng.root(0), BATCH, SIZE, kind="none")
    np.testing.assert_array_equal(mix.partner_B, np.arange(BATCH))
    assert mix.weight == 1 and mix.blend == 1
    np.testing.assert_array_equal(mixed(images_like(), mix), images_like())


def test_another_kind_is_an_error_that_lists_the_kinds():
    with pytest.raises(ValueError, match="none, cutmix, mixup"):
        sample_mix(rng.root(0), BATCH, SIZE, kind="cutout")


def draw_per_image(kind, count=COUNT, alpha=1.0):
    def draw(i):
        key = rng.stream(rng.root(0), "test", i)
        return sample_mix(key, BATCH, SIZE, kind=kind, alpha=alpha, per_image=True)

    many = jax.jit(jax.vmap(draw), compiler_options=FAST)
    return jax.device_get(many(np.arange(count, dtype=np.int32)))


def test_mixes_per_image_are_independent_and_each_of_the_same_distribution(cutmixes):
    mixes = draw_per_image("cutmix")
    assert mixes.box.shape == (COUNT, BATCH, 4) and mixes.weight.shape == (COUNT, BATCH)
    for image in range(BATCH):
        assert largest_gap(mixes.weight[:, image], reference_shares()) < SAME
    together = np.corrcoef(np.asarray(mixes.weight).T) - np.eye(BATCH)
    assert np.abs(together).max() < 0.06  # four standard deviations
    # Twin: the mix of a batch is one for all.
    batchwise = np.repeat(np.asarray(cutmixes.weight)[:, None], BATCH, 1)
    assert np.abs(np.corrcoef(batchwise.T) - np.eye(BATCH)).max() > 0.9
    blends = draw_per_image("mixup", alpha=0.8)
    assert largest_gap(blends.blend[:, 2], np.random.default_rng(2).beta(0.8, 0.8, COUNT)) < SAME


@pytest.mark.parametrize("kind", ["none", "cutmix", "mixup"])
def test_a_mix_per_image_is_applied_image_by_image(kind):
    mixes, images = draw_per_image(kind, count=5), images_like()
    for i in range(5):
        mix = jax.tree.map(lambda x, i=i: x[i], mixes)
        found = np.asarray(mixed(images, mix))
        shares = []
        for at in range(BATCH):
            own, partner = images[at], images[mix.partner_B[at]]
            top, left, bottom, right = (int(x) for x in mix.box[at])
            blend = np.float32(mix.blend[at])
            expected = blend * own + (1 - blend) * partner
            expected[top:bottom, left:right] = partner[top:bottom, left:right]
            np.testing.assert_allclose(found[at], expected, rtol=1e-6, atol=1e-6)
            shares.append(blend * (1 - (bottom - top) * (right - left) / np.prod(SIZE)))
        np.testing.assert_allclose(mix.weight, shares, atol=1e-6)
        if kind != "none":  # twin: everybody gets the first image's box and weight
            first = mix._replace(box=mix.box[0], blend=mix.blend[0], weight=mix.weight[0])
            assert np.abs(np.asarray(mixed(images, first)) - found).max() > 0.1


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("kind", ["none", "cutmix", "mixup"])
def test_every_kind_of_program_draws_the_same_record(kind, per_image):
    def draw(i):
        key = rng.stream(rng.root(4), "test", i)
        return sample_mix(key, BATCH, SIZE, kind=kind, alpha=0.8, per_image=per_image)

    many = np.arange(1000, dtype=np.int32)
    together = jax.device_get(jax.jit(jax.vmap(draw))(many))
    in_turn = jax.device_get(jax.jit(lambda many: jax.lax.map(draw, many))(many))
    with jax.enable_x64(True):
        wide = jax.device_get(jax.jit(jax.vmap(draw))(many))
    for mix in (together, in_turn, wide):
        assert [x.dtype for x in mix] == [jnp.int32, jnp.int32, jnp.float32, jnp.float32]
        each = (BATCH,) if per_image else ()
        assert [x.shape[1:] for x in mix] == [(BATCH,), (*each, 4), each, each]
        jax.tree.map(np.testing.assert_array_equal, mix, together)
    eager = [draw(jnp.asarray(many[i])) for i in range(20)]  # op by op: nothing can be fused
    eager = jax.tree.map(lambda *x: np.stack(x), *eager)
    jax.tree.map(np.testing.assert_array_equal, eager, jax.tree.map(lambda x: x[:20], together))
