"""A batch of images: what strength, guidance, terms and coordinates mean, and what they cost."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compiling import FAST_ALIKE

from prism_jax import parallel, rng
from prism_jax.diffusion import generate, guidance, noise, pixels, samplers
from prism_jax.diffusion.generate import Generator, Places, Weights
from prism_jax.diffusion.guidance import Term
from prism_jax.diffusion.refine import Refining
from prism_jax.diffusion.samplers import Sampling
from prism_jax.errors import UserError
from prism_jax.types import Array

SHAPE = (4, 4, 2)
COSINE = Sampling(noise.COSINE, "ddim", steps=8, strength=0.5, guidance=2.0)


class Half:
    """A codec that halves."""

    def encode(self, params, images_BHWC):
        return images_BHWC / 2, jnp.full_like(images_BHWC, 0.25)

    def decode(self, params, latents_BHWC):
        return latents_BHWC * 2


class Toy:
    """A denoiser and its condition: what it is told shifts what it says; it counts its rows."""

    def __init__(self, channels: int = 2):
        self.channels, self.rows = channels, []

    def predict(self, params, noisy_BHWC, time_B, condition_B):
        self.rows.append(len(noisy_BHWC))
        told = condition_B[:, None, None, None] + time_B[:, None, None, None]
        said = jnp.tanh(params * noisy_BHWC + told)
        return jnp.concatenate([said] * (self.channels // 2), -1)

    def of_labels(self, params, labels_B):
        return labels_B.astype(jnp.float32) / 10

    def null(self, params, batch):
        return jnp.full((batch,), -0.7)


def places(count: int = 6) -> Places:
    at = np.arange(count, dtype=np.int32)
    return Places(at % 3, at // 3, at % 3)


@functools.cache
def program(sampling: Sampling, toy: Toy):
    paint = functools.partial(generate.generate, Generator(Half(), toy, toy), sampling)
    return jax.jit(paint, compiler_options=FAST_ALIKE)


SILENT = Toy()
GENERATOR = Generator(Half(), SILENT, SILENT)


def made(sampling: Sampling, *, at: Places | None = None, anchors=None, toy=SILENT) -> np.ndarray:
    at = at or places()
    if anchors is None:
        anchors = np.random.default_rng(1).normal(size=(6, *SHAPE)).astype(np.float32)
    weights = Weights({}, jnp.float32(0.5), {})
    return np.asarray(program(sampling, toy)(weights, np.uint32(3), at, anchors)[0])


def sampled(name: str, **changes) -> Sampling:
    return dataclasses.replace(COSINE, sampler=name, **changes)


NAMES = ["ddim", "ddpm", "pndm"]


# --- strength -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_strength_0_is_the_decoded_anchor_to_the_bit_and_asks_no_denoiser(name):
    anchors = np.random.default_rng(2).normal(size=(6, *SHAPE)).astype(np.float32)
    toy = Toy()
    found = made(sampled(name, strength=0.0), anchors=anchors, toy=toy)
    assert found.tobytes() == (anchors * 2).tobytes()
    assert toy.rows == []


@pytest.mark.parametrize("name", NAMES)
def test_strength_1_does_not_depend_on_the_anchor_and_less_does(name):
    anchors = np.full((6, *SHAPE), 3.0, np.float32)
    full = sampled(name, strength=1.0)
    assert made(full).tobytes() == made(full, anchors=anchors).tobytes()
    almost = sampled(name, strength=0.875)
    assert np.abs(made(almost) - made(almost, anchors=anchors)).max() > 1e-2


@pytest.mark.parametrize("steps, strength, left", [
    (50, 0.7, 35), (50, 1.0, 50), (100, 0.29, 28), (50, 0.019, 0), (50, 0.02, 1), (8, 0.99, 7),
])  # fmt: skip
def test_steps_that_a_strength_leaves_are_counted_as_diffusers_counts(steps, strength, left):
    # int(100 * 0.29) is 28: the product is 28.999999999999996.
    assert samplers.begun(Sampling(steps=steps, strength=strength)) == left


def test_a_sample_begins_as_its_anchor_under_the_noise_of_the_first_step():
    anchors, first = np.full((1, *SHAPE), 2.0, np.float32), np.full((1, *SHAPE), -1.0, np.float32)
    angle = noise.SLOPE * 0.5 + noise.FIRST_ANGLE  # four of eight steps
    found = samplers.start(COSINE, anchors, first)
    np.testing.assert_allclose(found, 2 * np.cos(angle) - np.sin(angle), rtol=1e-6)


# --- guidance -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_guidance_1_equals_none_and_reads_each_image_once(name):
    toy = Toy()
    found = made(sampled(name, guidance=1.0), toy=toy)
    assert set(toy.rows) == {6}
    guided = Toy()
    barely = made(sampled(name, guidance=1.0 + 1e-6), toy=guided)
    assert set(guided.rows) == {12}
    np.testing.assert_allclose(found, barely, atol=1e-4)
    assert np.abs(found - made(sampled(name, guidance=3.0))).max() > 1e-2


def read(channels: int, guided: int) -> np.ndarray:
    """One pass of a denoiser that says 1 with a class and 10 without, in all channels."""
    told, untold = jnp.ones(2), jnp.full((2,), 10.0)
    return np.asarray(
        guidance.classifier_free(
            lambda noisy, time, condition: jnp.broadcast_to(
                condition[:, None, None, None], (4, 1, 1, channels)
            ),
            jnp.zeros((2, 1, 1, 4)), jnp.zeros(2), told, untold, guidance=4.0, channels=guided,
        )
    )[0, 0, 0]  # fmt: skip


def test_guidance_by_hand():
    # 10 + 4 (1 - 10) = -26 where it is guided, 1 where not: a learned variance, the fourth channel
    assert read(8, 4).tolist() == [-26] * 4 + [1] * 4
    assert read(8, 3).tolist() == [-26] * 3 + [1] * 5


def test_the_fourth_channel_alone_is_left_by_three_guided_ones():
    learned = dict(sampler="ddpm", variance="learned", guidance=4.0)
    both = [
        made(dataclasses.replace(COSINE, guided_channels=c, **learned), toy=Toy(4))
        for c in (None, 1)
    ]
    assert np.abs(both[0] - both[1])[..., 1].max() > 1e-3


# --- terms ----------------------------------------------------------------------------------


def one_step(terms=(), **changes) -> tuple[np.ndarray, dict]:
    """The second-last of eight steps of DDPM, of a denoiser that always predicts 0.5."""
    sampling = dataclasses.replace(
        COSINE, sampler="ddpm", strength=0.25, guidance=1.0, terms=terms, **changes
    )
    sight = samplers.Sight(
        lambda noisy, time: jnp.full_like(noisy, 0.5),
        lambda step: jnp.zeros((1, *SHAPE)), jnp.full((1, *SHAPE), 2.0),
    )  # fmt: skip
    course = samplers.ddpm(sampling, sight, jnp.full((1, *SHAPE), 1.0))
    row = {name: values[0] for name, values in course.table.items()}
    return np.asarray(course.step(course.carry, row)), row


def test_mode_pulls_by_its_formula():
    plain, row = one_step()
    pulled, _ = one_step((Term("mode", 0.1, (1, 1)),))
    clean = row["alpha"] * 1.0 - row["sigma"] * 0.5  # of v = 0.5 at a latent of 1
    sigma_0, sigma_1 = (np.sin(noise.SLOPE * t / 8 + noise.FIRST_ANGLE) for t in (1, 2))
    beta = 1 - (1 - sigma_1**2) / (1 - sigma_0**2)
    deviation = sigma_0 / sigma_1 * np.sqrt(beta)
    np.testing.assert_allclose(pulled - plain, -0.1 * deviation * (clean - 2.0), rtol=1e-4)
    assert clean < 2.0 and (pulled > plain).all()  # towards the anchor


def test_a_term_counts_in_its_window_alone():
    plain, _ = one_step()
    assert np.array_equal(one_step((Term("mode", 0.1, (0, 0)),))[0], plain)
    steps = np.arange(49, -1, -1)
    found = guidance.weights(Term("mode", 0.1, (26, 49)), steps)
    assert found[steps > 25].tolist() == pytest.approx([0.1] * 24) and not found[steps <= 25].any()


@pytest.mark.parametrize("name", NAMES)
def test_a_term_draws_images_to_their_anchors(name):
    anchors = np.full((6, *SHAPE), 2.0, np.float32)
    term = Term("mode", 1.0, (0, 7))
    for strength in (0.5, 1.0):
        plain, pulled = (
            made(sampled(name, strength=strength, terms=terms), anchors=anchors)
            for terms in ((), (term,))
        )
        assert np.abs(pulled - 2 * anchors).mean() < np.abs(plain - 2 * anchors).mean() - 0.05


# --- coordinates ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_another_batch_changes_no_draw_and_pixels_by_rounding_alone(name):
    sampling = sampled(name, eta=1.0 if name == "ddim" else 0.0)
    anchors = np.random.default_rng(1).normal(size=(6, *SHAPE)).astype(np.float32)
    whole = made(sampling, anchors=anchors)
    parts = []
    for rows in ([4], [0, 5], [3, 2, 1]):
        at = Places(*(x[rows] for x in places()))
        parts.append((rows, made(sampling, at=at, anchors=anchors[rows])))
    for rows, found in parts:
        np.testing.assert_allclose(found, whole[rows], atol=1e-5)
    by_row = made(sampling, at=Places(*(x[:1] for x in places())), anchors=anchors[[4]])  # twin
    assert np.abs(by_row - whole[[4]]).max() > 1e-2


BOUNDS = noise.Bounds(np.array([-0.5, -0.9], np.float32), np.array([0.7, 1.1], np.float32))


@pytest.mark.parametrize(
    ("name", "schedule", "bounds"),
    [("ddim", noise.COSINE, BOUNDS), ("ddpm", noise.DIT, None), ("pndm", noise.DIT, BOUNDS)],
    ids=NAMES,
)
def test_a_lane_of_one_device_rounds_as_one_of_eight(name, schedule, bounds):
    """The latents themselves: XLA divides by a number otherwise where there are several lanes."""
    term = Term("mode", 0.2, (0, 7))
    sampling = sampled(name, schedule=schedule, terms=(term,))
    refining = Refining(schedule, sampling.steps, 3, learning_rate=0.1, window=(1, 3))
    weights = Weights({}, np.float32(0.5), {}, bounds)

    def lane(weights, seed, batch):
        return generate.generate(GENERATOR, sampling, weights, seed, *batch, refining)[1]

    anchors = np.random.default_rng(1).normal(size=(6, *SHAPE)).astype(np.float32)
    found = []
    for count in (1, 8):
        lanes = parallel.LaneMap(lane, weights, arity=1, devices=jax.devices()[:count])
        (latents,) = lanes.stream(3, [(places(), anchors)])
        found.append(latents)
    np.testing.assert_array_equal(found[1], found[0])


def test_any_number_of_devices_makes_the_same_bits_without_a_collective():
    sampling, toy = sampled("ddpm"), Toy()
    anchors = np.random.default_rng(1).normal(size=(6, *SHAPE)).astype(np.float32)
    network = Generator(Half(), toy, toy)

    def lane(*arguments):
        return generate.generate(network, sampling, *arguments)[0]

    weights, found = Weights({}, np.float32(0.5), {}), []
    for count in (1, 3):
        lanes = parallel.LaneMap(lane, weights, arity=2, devices=jax.devices()[:count])
        units = [(Places(*(x[i : i + 2] for x in places())), anchors[i : i + 2]) for i in (0, 2, 4)]
        images = []
        for at in range(0, 3, count):
            placed = [
                tuple(lanes.place(tree, i) for tree in unit)
                for i, unit in enumerate(units[at : at + count])
            ]
            images += [lanes.fetch(result) for result in lanes(3, placed)]
        text = lanes.compile(3, placed).as_text()
        assert not any(word in text for word in ("all-reduce", "all-gather", "permute", "to-all"))
        found.append(np.concatenate(images))
    assert found[0].tobytes() == found[1].tobytes()


def test_draws_are_addressed_by_class_slot_and_step():
    seen = []

    def recorded(sampling, sight, start):
        seen.extend([start, *(sight.draw(jnp.int32(step)) for step in (7, 0))])
        return samplers.ddim(sampling, sight, start)

    full = dataclasses.replace(COSINE, strength=1.0)
    toy, key = Toy(), rng.root(3)
    rows = dict(samplers.SAMPLERS, ddim=recorded)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samplers, "SAMPLERS", rows)
        generate.sample(
            Generator(Half(), toy, toy), full, Weights({}, 0.5, {}), np.uint32(3), places(),
            jnp.zeros((6, *SHAPE)),
        )  # fmt: skip
    for found, name, step in zip(
        seen, ["diffusion/start"] + ["diffusion/noise"] * 2, [(), (7,), (0,)], strict=True
    ):
        address = rng.stream(key, name, 1, 0, *step)  # the second image: class 1, slot 0
        expected = jax.random.normal(address, SHAPE, jnp.float32)
        assert np.array_equal(found[1], expected)


def test_another_seed_class_or_slot_is_another_image():
    full = dataclasses.replace(COSINE, strength=1.0)
    zeros = np.zeros(6, np.int32)
    same_label = [Places(places().classes_B, zeros, zeros), Places(zeros, np.arange(6), zeros)]
    for at in same_label:
        found = made(full, at=at).reshape(6, -1)
        different = 3 if at is same_label[0] else 6
        assert len(np.unique(found, axis=0)) == different


# --- encoding and pixels --------------------------------------------------------------------


def test_latents_are_means_or_draws_addressed_by_position():
    images = np.random.default_rng(0).normal(size=(5, *SHAPE)).astype(np.float32)
    at = np.array([3, 7, 1, 0, 9], np.int32)
    encoded = functools.partial(generate.encode, Half(), {}, np.uint32(0))
    assert np.array_equal(encoded(at, images), images / 2)
    drawn = np.asarray(encoded(at, images, sampled=True))
    one = np.asarray(encoded(at[1:2], images[1:2], sampled=True))
    np.testing.assert_allclose(drawn[1:2], one, atol=1e-6)
    apart = (drawn - images / 2).reshape(5, -1)
    assert 0.15 < apart.std() < 0.35 and len(np.unique(apart, axis=0)) == 5


def test_a_random_half_is_mirrored_first():
    images = np.random.default_rng(0).normal(size=(400, 1, 2, 1)).astype(np.float32)
    found = generate.encode(
        Half(), {}, np.uint32(0), np.arange(400, dtype=np.int32), images, flip=True
    )
    mirrored = (np.asarray(found) == images[:, :, ::-1] / 2).all((1, 2, 3))
    kept = (np.asarray(found) == images / 2).all((1, 2, 3))
    assert (mirrored ^ kept).all() and 150 < mirrored.sum() < 250


def test_pixels_by_hand_and_back():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    assert np.array_equal(pixels.to_uint8(pixels.from_uint8(levels), [(0, 0)]), levels)
    images = np.array([-3.0, -1.0, 0.0, 1.0, 9.0], np.float32).reshape(1, 1, 5, 1)
    assert pixels.to_uint8(images, [(0, 0)]).ravel().tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("channels", [1, 3])
def test_resized_by_pil(channels):
    image = np.zeros((2, 8, 8, channels), np.uint8)
    image[:, :4] = 200
    small = pixels.resize(image, 2, "box")
    assert small.shape == (2, 2, 2, channels)
    assert small[0, :, 0, 0].tolist() == [200, 0]
    assert pixels.resize(image, 8, "lanczos") is image


def test_an_image_that_is_not_finite_is_told_by_its_place():
    images = np.zeros((3, 2, 2, 1), np.float32)
    images[1, 0, 0, 0] = np.nan
    with pytest.raises(UserError, match="1 of 3 .* slot 7 of class 4"):
        pixels.to_uint8(images, [(4, 6), (4, 7), (4, 8)])


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, said", [
    (dict(sampler="euler"), "ddim, ddpm, pndm"),
    (dict(variance="none"), "small, large, learned"),
    (dict(strength=1.2), r"0 \(the anchor\) to 1"),
    (dict(strength=-0.1), r"0 \(the anchor\) to 1"),
    (dict(strength=0.1), "leaves no step"),
    (dict(eta=2.0), "eta is 2.0"),
    (dict(sampler="pndm", eta=0.5), "eta belongs to the sampler 'ddim'"),
    (dict(variance="learned"), "variance belongs to the sampler 'ddpm'"),
    (dict(slip=True), "slip belongs to the sampler 'pndm'"),
    (dict(terms=(Term("pull", 0.1, (0, 1)),)), "allowed: mode"),
    (dict(terms=(Term("mode", 0.1, (0, 8)),)), "to 7"),
    (dict(terms=(Term("mode", 0.1, (3, 2)),)), "3 to 2"),
    (dict(terms=(Term("mode", 0.1, (5, 7)),)), "leaves steps 3 to 0 only"),
])  # fmt: skip
def test_refused(changes, said):
    with pytest.raises(UserError, match=said):
        samplers.check(dataclasses.replace(COSINE, **changes))
    samplers.check(COSINE)


def test_the_strength_that_is_advised_leaves_a_step():
    for steps in range(1, 1001):
        sampling = samplers.Sampling(noise.COSINE, "ddim", steps, 1e-6, 1.0)
        with pytest.raises(UserError, match="leaves no step") as caught:
            samplers.check(sampling)
        advised = float(str(caught.value).partition("at least ")[2].partition(",")[0])
        samplers.check(dataclasses.replace(sampling, strength=advised))
        assert 1 / steps <= advised <= min(1.0, 1.1 / steps)  # and little more than is needed


def test_a_variance_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="returns 2 channels for latents of 2"):
        made(sampled("ddpm", variance="learned"), toy=Toy(2))


def test_a_dtype_of_its_own_stays_within_the_denoiser():
    class Brief(Toy):
        def predict(self, params, noisy_BHWC, time_B, condition_B) -> Array:
            return super().predict(params, noisy_BHWC, time_B, condition_B).astype(jnp.bfloat16)

    exact, brief = made(COSINE), made(COSINE, toy=Brief())
    assert brief.dtype == np.float32
    np.testing.assert_allclose(brief, exact, atol=0.1)


@pytest.mark.parametrize(
    ("sampler", "strength", "slip", "expected"),
    [("ddim", 0.7, False, 7), ("pndm", 0.7, False, 8), ("pndm", 0.7, True, 8),
     ("pndm", 0.1, False, 1), ("pndm", 0.0, True, 0), ("ddpm", 1.0, False, 10)],
)  # fmt: skip
def test_evaluations_are_the_rows_of_the_table(sampler, strength, slip, expected):
    sampling = samplers.Sampling(sampler=sampler, steps=10, strength=strength, slip=slip)
    assert samplers.evaluations(sampling) == expected
    if expected:
        start = jnp.zeros((1, 2, 2, 4))
        sight = samplers.Sight(lambda *_: start, lambda _: start, start)
        course = samplers.SAMPLERS[sampler](sampling, sight, start)
        assert len(course.table["step"]) == expected
