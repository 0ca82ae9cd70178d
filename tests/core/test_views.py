from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compiling import FAST

from prism_jax import rng
from prism_jax.core import views
from prism_jax.core.views import apply_view, identity_view, resize, sample_view
from prism_jax.types import View

SIZE = (24, 32)
COUNT = 20_000

# --- sampling -------------------------------------------------------------------------------


@functools.cache
def keys(count: int):
    coordinates = np.arange(count, dtype=np.int32)
    return jax.jit(jax.vmap(lambda i: rng.stream(rng.root(0), "test", i)))(coordinates)


def sample(key, crop_scale=(0.08, 1.0), image_size=SIZE, **options):
    return sample_view(
        key, image_size, crop_scale=crop_scale, **{"flip": True, "roll": 5, **options}
    )


def sampled(seed, *arguments, **options):
    """One draw, compiled."""
    draw = jax.jit(lambda key: sample(key, *arguments, **options), compiler_options=FAST)
    return jax.device_get(draw(rng.root(seed)))


def reference_boxes(image_size, scale, count, *, log_uniform=True, of_side=False, shift=0):
    """RandomResizedCrop's rule, one box after the other; the options make its twins."""
    draw = np.random.default_rng(7)
    height, width = image_size
    boxes = []
    for _ in range(count):
        for _ in range(10):
            share = draw.uniform(*scale)
            if of_side:
                share = draw.uniform(scale[0] ** 0.5, scale[1] ** 0.5) ** 2
            low, high = 3 / 4, 4 / 3
            ratio = draw.uniform(low, high)
            if log_uniform:
                ratio = math.exp(draw.uniform(math.log(low), math.log(high)))
            w = round(math.sqrt(share * height * width * ratio))
            h = round(math.sqrt(share * height * width / ratio))
            if 0 < w <= width and 0 < h <= height:
                top = draw.integers(0, height - h + 1 - shift * (h < height))
                left = draw.integers(0, width - w + 1 - shift * (w < width))
                break
        else:
            in_ratio = width / height
            w, h = width, height
            if in_ratio < low:
                h = round(w / low)
            elif in_ratio > high:
                w = round(h * high)
            top, left = (height - h) // 2, (width - w) // 2
        boxes.append((top, left, h, w))
    return np.array(boxes, np.float64)


def features(boxes):
    top, left, h, w = np.asarray(boxes, np.float64).T
    return {
        "area": h * w,
        "log ratio": np.log(w / h),
        "top": top,
        "left": left,
        "space": SIZE[0] - h - top,
    }


def largest_gap(a, b):
    """The two-sample Kolmogorov-Smirnov distance, the largest over the features of boxes."""
    gaps = {}
    for name, x in features(a).items():
        y = features(b)[name]
        at = np.union1d(x, y)
        below = [np.searchsorted(np.sort(z), at, side="right") / len(z) for z in (x, y)]
        gaps[name] = np.abs(below[0] - below[1]).max()
    return max(gaps.values())


# Two samples of 20,000 of one distribution differ by more with a probability below 1e-5.
SAME = 0.025


@pytest.fixture(scope="module")
def boxes():
    return np.asarray(jax.jit(jax.vmap(sample))(keys(COUNT)).crop)


def test_boxes_are_distributed_as_the_reference(boxes):
    reference = reference_boxes(SIZE, (0.08, 1.0), COUNT)
    assert largest_gap(boxes, reference) < SAME
    for name, values in features(boxes).items():
        np.testing.assert_allclose(
            values.mean(),
            features(reference)[name].mean(),
            atol=0.03 * features(reference)[name].std(),
        )


@pytest.mark.parametrize(
    "twin",
    [{"log_uniform": False}, {"of_side": True}, {"shift": 1}, {"scale": (0.1, 1.0)}],
    ids=str,
)
def test_boxes_are_not_distributed_as_the_twins(boxes, twin):
    assert (
        largest_gap(boxes, reference_boxes(SIZE, **{"scale": (0.08, 1.0), "count": COUNT, **twin}))
        > SAME
    )


def test_boxes_are_distributed_as_torchvision(boxes):
    try:
        import torch
        from torchvision.transforms import RandomResizedCrop
    except Exception as problem:  # a torchvision of another torch fails in many ways
        pytest.skip(f"compares with torchvision, which cannot be imported: {problem}")
    torch.manual_seed(0)
    image = torch.zeros(3, *SIZE)
    theirs = [
        RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(COUNT)
    ]
    assert largest_gap(boxes, np.array(theirs)) < SAME


def test_boxes_are_whole_pixels_inside_the_image(boxes):
    top, left, h, w = boxes.T
    assert (boxes == np.round(boxes)).all() and boxes.dtype == np.float32
    assert ((top >= 0) & (left >= 0) & (h >= 1) & (w >= 1)).all()
    assert ((top + h <= SIZE[0]) & (left + w <= SIZE[1])).all()


@pytest.mark.parametrize(
    ("image_size", "box"),
    [((20, 20), (0, 0, 20, 20)), ((30, 12), (7, 0, 16, 12)), ((12, 30), (0, 7, 12, 16))],
)
def test_the_fallback_is_centred_with_an_allowed_ratio(image_size, box):
    # The whole area in another ratio than the image's never fits; 1/2 area steps do not either.
    view = sampled(3, (4.0, 4.0), image_size)
    np.testing.assert_array_equal(view.crop, box)


def test_flips_are_fair_and_rolls_uniform_and_inclusive():
    views = jax.device_get(jax.jit(jax.vmap(sample))(keys(COUNT)))
    assert abs(views.flip.mean() - 0.5) < 0.02
    for axis in range(2):
        share = np.bincount(views.roll[:, axis], minlength=6) / COUNT
        np.testing.assert_allclose(share, 1 / 6, atol=0.015)
    table = np.corrcoef(
        np.column_stack([views.flip, views.roll, views.crop[:, 0], views.crop[:, 2]]).T
    )
    independent = np.abs(table[:3] - np.eye(5)[:3])
    assert independent.max() < 0.04


def test_without_flip_and_roll_the_crops_are_the_same_and_the_fields_are_there():
    full, bare = sampled(0), sampled(0, flip=False, roll=0)
    np.testing.assert_array_equal(full.crop, bare.crop)
    assert not bare.flip and bare.flip.dtype == jnp.bool and bare.flip.shape == ()
    np.testing.assert_array_equal(bare.roll, [0, 0])
    assert bare.roll.dtype == jnp.int32


def test_a_batch_has_a_view_per_image():
    views = sampled(0, batch=64)
    assert [x.shape for x in views] == [(64, 4), (64,), (64, 2)]
    assert len(np.unique(views.crop, axis=0)) > 32
    assert 0 < views.flip.sum() < 64


def test_the_same_key_draws_the_same_in_every_kind_of_program():
    some = keys(512)
    jitted = jax.jit(jax.vmap(sample))(some)

    @jax.jit
    def one_after_the_other(some, low):
        return jax.lax.map(lambda key: sample(key, (low, 1.0)), some)

    mapped = one_after_the_other(some, jnp.float32(0.08))
    with jax.enable_x64(True):
        wide = jax.jit(jax.vmap(sample))(some)
        wide_batch = sample(rng.root(0), batch=16)
    for ours, theirs in ((mapped, jitted), (wide, jitted)):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
        assert [x.dtype for x in ours] == [jnp.float32, jnp.bool, jnp.int32]
    # Op by op, where nothing can be fused.
    eager = sample_view(rng.root(0), SIZE, crop_scale=(0.08, 1.0), flip=True, roll=5, batch=4096)
    jax.tree.map(np.testing.assert_array_equal, eager, sample(rng.root(0), batch=4096))
    jax.tree.map(np.testing.assert_array_equal, wide_batch, sample(rng.root(0), batch=16))
    # Twin: a draw that does not name its dtype changes with x64 mode.
    with jax.enable_x64(True):
        unnamed = jax.random.uniform(rng.root(0), (4,))
    assert not np.allclose(unnamed, jax.random.uniform(rng.root(0), (4,)))


def test_traced_bounds_bound_the_area():
    areas = jax.jit(
        jax.vmap(lambda key, low: sample(key, (low, low + 0.1)).crop[2:].prod(), (0, None))
    )
    share = np.asarray(areas(keys(500), jnp.float32(0.4))) / (SIZE[0] * SIZE[1])
    assert 0.36 < share.min() < 0.42 and 0.48 < share.max() < 0.54


# --- applying -------------------------------------------------------------------------------


def view_of(crop, flip, roll):
    return View(np.asarray(crop, np.float32), np.asarray(flip, bool), np.asarray(roll, np.int32))


viewed = jax.jit(apply_view)


VIEWS = {
    "crop": ((3, 5, 10, 20), False, (0, 0)),
    "one pixel": ((23, 31, 1, 1), False, (0, 0)),
    "a row": ((7, 0, 1, 32), True, (3, 0)),
    "flip": ((0, 0, 24, 32), True, (0, 0)),
    "roll": ((0, 0, 24, 32), False, (5, 31)),
    "all": ((2, 9, 17, 13), True, (4, 7)),
}


def images_like(batch=2, channels=3, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, *SIZE, channels))


def by_loops(image_HWC, crop, flip, roll):
    """Crop, interpolate every pixel between its four neighbours, flip, roll: in float64."""
    top, left, h, w = (int(x) for x in crop)
    box = image_HWC[top : top + h, left : left + w]
    height, width, _ = image_HWC.shape
    out = np.empty_like(image_HWC)
    for i in range(height):
        y = min(max((i + 0.5) * h / height - 0.5, 0), h - 1)
        y0 = int(y)
        y1, dy = min(y0 + 1, h - 1), y - y0
        for j in range(width):
            x = min(max((j + 0.5) * w / width - 0.5, 0), w - 1)
            x0 = int(x)
            x1, dx = min(x0 + 1, w - 1), x - x0
            upper = box[y0, x0] * (1 - dx) + box[y0, x1] * dx
            lower = box[y1, x0] * (1 - dx) + box[y1, x1] * dx
            out[i, j] = upper * (1 - dy) + lower * dy
    if flip:
        out = out[:, ::-1]
    return np.roll(out, tuple(int(x) for x in roll), (0, 1))


@pytest.mark.parametrize("name", VIEWS)
def test_against_loops(name):
    images = images_like()
    expected = np.stack([by_loops(image, *VIEWS[name]) for image in images])
    single = viewed(images.astype(np.float32), view_of(*VIEWS[name]))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, expected, atol=2e-5)
    with jax.enable_x64(True):
        double = viewed(images, view_of(*VIEWS[name]))
        assert double.dtype == jnp.float64
        np.testing.assert_allclose(double, expected, atol=1e-12)


def test_a_view_per_image_against_loops():
    crops, flips, rolls = (list(x) for x in zip(*VIEWS.values(), strict=True))
    images = images_like(len(VIEWS))
    expected = np.stack([by_loops(x, *v) for x, v in zip(images, VIEWS.values(), strict=True)])
    found = viewed(images.astype(np.float32), view_of(crops, flips, rolls))
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_twins_are_far_from_it():
    crop, flip, roll = VIEWS["all"]
    images = images_like()
    ours = np.asarray(viewed(images.astype(np.float32), view_of(crop, flip, roll)))
    top, left, h, w = crop
    scale = np.array([SIZE[0] / h, SIZE[1] / w], np.float32)

    # Resampling the whole image, with translation, mixes in pixels from outside the box.
    resampled = jax.image.scale_and_translate(
        jnp.asarray(images, jnp.float32), images.shape, (1, 2), jnp.asarray(scale),
        -jnp.asarray([top, left], jnp.float32) * scale, "linear", antialias=False,
    )  # fmt: skip
    resampled = np.roll(np.asarray(resampled)[:, :, ::-1], roll, (1, 2))
    border = np.abs(resampled - ours).max((0, 3))
    assert border.max() > 0.1 and np.median(border) < 1e-4  # right inside, wrong at the border

    unrolled = np.roll(ours, (-roll[0], -roll[1]), (1, 2))
    rolled_first = np.roll(unrolled[:, :, ::-1], roll, (1, 2))[:, :, ::-1]
    rolled_back = np.roll(unrolled, (-roll[0], -roll[1]), (1, 2))
    for twin in (rolled_first, rolled_back, unrolled):
        assert np.abs(twin - ours).max() > 0.1


@pytest.mark.parametrize("name", VIEWS)
def test_value_and_gradient_against_torch(name):
    torch = pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")
    (top, left, h, w), flip, roll = VIEWS[name]
    images, cotangent = images_like(), images_like(seed=1)
    x = torch.tensor(images.transpose(0, 3, 1, 2), requires_grad=True)
    box = x[:, :, top : top + h, left : left + w]
    theirs = torch.nn.functional.interpolate(box, SIZE, mode="bilinear", antialias=True)
    theirs = torch.roll(theirs.flip(3) if flip else theirs, roll, (2, 3))
    theirs.backward(torch.tensor(cotangent.transpose(0, 3, 1, 2)))
    with jax.enable_x64(True):
        ours, pull_back = jax.vjp(
            lambda images: apply_view(images, view_of(*VIEWS[name])), jnp.asarray(images)
        )
        (gradient,) = pull_back(jnp.asarray(cotangent))
    np.testing.assert_allclose(ours, theirs.detach().numpy().transpose(0, 2, 3, 1), atol=1e-12)
    np.testing.assert_allclose(gradient, x.grad.numpy().transpose(0, 2, 3, 1), atol=1e-12)


def test_the_gradient_is_the_adjoint_and_has_no_scatter():
    view = view_of(*VIEWS["all"])
    images, cotangent = (images_like(seed=s).astype(np.float32) for s in (0, 1))

    @jax.jit
    def both(images, cotangent):
        seen, pull_back = jax.vjp(lambda x: apply_view(x, view), images)
        return seen, *pull_back(cotangent)

    seen, gradient = map(np.asarray, both(images, cotangent))
    np.testing.assert_allclose((seen * cotangent).sum(), (images * gradient).sum(), rtol=1e-4)

    def program(f):
        return str(jax.make_jaxpr(lambda x: jax.vjp(f, x)[1](cotangent))(images))

    ours, twin = program(lambda x: apply_view(x, view)), program(lambda x: x[:, ::-1][:, [0] * 24])
    assert "scatter" in twin
    assert "scatter" not in ours and "dot_general" in ours


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (32, 24), (64, 64), (224, 3)])
def test_the_identity_view_changes_no_bit(size):
    images = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    for batch in (None, 2):
        same = jax.jit(lambda x, batch=batch: apply_view(x, identity_view(size, batch)))
        np.testing.assert_array_equal(same(images), images)


def test_weights_sum_to_one_so_a_flat_image_stays_flat():
    views = jax.jit(jax.vmap(sample))(keys(64))
    flat = np.ones((64, *SIZE, 1), np.float32)
    np.testing.assert_allclose(viewed(flat, views), 1, atol=1e-6)


def test_a_stored_view_replays_bit_for_bit(tmp_path):
    view = sampled(5, batch=4)
    np.savez(tmp_path / "view.npz", **view._asdict())
    stored = np.load(tmp_path / "view.npz")
    replayed = View(**{name: stored[name] for name in View._fields})
    images = images_like(4).astype(np.float32)
    once = np.asarray(viewed(images, view))
    np.testing.assert_array_equal(viewed(images, replayed), once)
    other = viewed(images, sampled(6, batch=4))
    assert np.abs(other - once).max() > 0.1


# --- padded crops and resizing ----------------------------------------------------------------


def test_a_padded_crop_is_pad_and_cut():
    images = images_like().astype(np.float32)
    _, height, width, _ = images.shape
    draw = jax.jit(
        jax.vmap(lambda key: sample(key, image_size=(height, width), crop_pad=4, roll=0))
    )
    view = jax.device_get(draw(keys(3000)))
    tops, lefts = view.crop[:, 0].astype(int), view.crop[:, 1].astype(int)
    np.testing.assert_array_equal(view.crop[:, 2:], [[height, width]] * 3000)
    for starts in (tops, lefts):
        counts = np.bincount(starts + 4, minlength=9)
        assert len(counts) == 9
        np.testing.assert_allclose(counts / 3000, 1 / 9, atol=0.03)
    assert abs(np.corrcoef(tops, lefts)[0, 1]) < 0.06
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    for i in np.flatnonzero(~view.flip)[:12]:
        one = View(*(field[i] for field in view))
        top, left = tops[i] + 4, lefts[i] + 4
        cut = padded[:, top : top + height, left : left + width]
        np.testing.assert_array_equal(viewed(images, one), cut)
        if top != 4:  # twin: an edge that is repeated instead of zero
            repeated = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="edge")
            twin = repeated[:, top : top + height, left : left + width]
            assert np.abs(twin - cut).max() > 0.1


@pytest.mark.parametrize("size", [(12, 9), (5, 7), (11, 4), (16, 16)])
def test_resize_against_loops_and_torch(size):
    images = np.random.default_rng(0).normal(size=(2, 8, 7, 3))
    with jax.enable_x64(True):
        found = np.asarray(resize(jnp.asarray(images), size))

    def position(i, out, source):
        return min(max((i + 0.5) * source / out - 0.5, 0.0), source - 1.0)

    expected = np.zeros((2, *size, 3))
    for i in range(size[0]):
        for j in range(size[1]):
            y, x = position(i, size[0], 8), position(j, size[1], 7)
            for row, a in ((int(y), 1 - y % 1), (min(int(y) + 1, 7), y % 1)):
                for column, b in ((int(x), 1 - x % 1), (min(int(x) + 1, 6), x % 1)):
                    expected[:, i, j] += a * b * images[:, row, column]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    if size[0] < 8:  # twin: an antialiased reduction
        twin = jax.image.resize(images, (2, *size, 3), "linear", antialias=True)
        assert np.abs(twin - expected).max() > 0.05
    torch = pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")
    by_torch = torch.nn.functional.interpolate(
        torch.tensor(images).permute(0, 3, 1, 2), size, mode="bilinear"
    )
    np.testing.assert_allclose(found, by_torch.permute(0, 2, 3, 1), atol=1e-12)


def test_resizing_to_the_same_size_changes_nothing():
    images = images_like()
    assert resize(images, images.shape[1:3]) is images


@pytest.mark.parametrize("name", VIEWS)
def test_lines_are_resampled_as_images_are(name):
    """What a GPU runs against the plain products: value and gradient, in float64."""
    with jax.enable_x64(True):
        images, gradient = (jnp.asarray(images_like(seed=s)) for s in (0, 1))
        crop, flip, roll = view_of(*VIEWS[name])
        (top, left, h, w), never = crop, jnp.zeros((), bool)
        rows = views._resize_matrix(SIZE[0], top, h, never, roll[0], images.dtype)
        columns = views._resize_matrix(SIZE[1], left, w, flip, roll[1], images.dtype)

        def both(resample):
            seen, pull = jax.vjp(lambda x: resample(rows, columns, x), images)
            return np.stack([seen, *pull(gradient)])

        plain = both(views._resample)
        np.testing.assert_allclose(both(views._resample_lines), plain, atol=1e-12)
        mirrored = both(lambda r, c, x: views._resample_lines(r, c[:, ::-1], x))  # twin
        assert np.abs(mirrored - plain).max() > 0.1
