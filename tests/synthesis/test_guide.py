"""An encoder that guides: its energy and gradient in NumPy, beside teachers and alone."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.clip_files import LENGTH, needs_tokenizers, write_clip
from helpers.compiling import fast_alike, fast_programs, only_fast_alike
from helpers.networks import COLOUR, GREY, small_pool
from helpers.running import make_unit, start_images

from prism_jax import rng, synthesis
from prism_jax.core import views
from prism_jax.diffusion import clip, huggingface, prompts
from prism_jax.errors import UserError
from prism_jax.synthesis import guide as guiding
from prism_jax.types import Normalisation, SynthState

__all__ = ["fast_alike", "fast_programs", "only_fast_alike"]  # fixtures
pytestmark = pytest.mark.usefixtures("only_fast_alike")

SIZE, SEED, BUDGET = 8, 5, 10
LABELS = np.array([4, 0, 2], np.int32)
OWN = Normalisation(mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.6))


class Linear(nn.Module):
    """The embedding is a matrix times the pixels."""

    size: int = 5
    channels: int = 3

    def embed(self, params, images_BHWC):
        assert images_BHWC.shape[1:] == (self.size, self.size, self.channels)
        return images_BHWC.reshape(len(images_BHWC), -1) @ params


def guide(size: int = 5, seed: int = 0) -> synthesis.Guide:
    draw = np.random.default_rng(seed).standard_normal
    return synthesis.Guide(draw((size * size * 3, 6)), draw((5, 6)), Linear(size), OWN)


def enlarging(size: int, wanted: int) -> np.ndarray:
    """(wanted, size): bilinear between centres, by np.interp."""
    at = (np.arange(wanted) + 0.5) * size / wanted - 0.5
    return np.stack([np.interp(at, np.arange(size), row) for row in np.eye(size)], axis=1)


def numpy_says(given, images, labels, normalisation, *, mean=True, shift=0):
    """The energy and its gradient by the images, by the chain rule."""
    size = given.encoder.size
    way, channels = enlarging(images.shape[1], size), images.shape[-1]
    spread = np.ones((channels, 3)) if channels == 1 else np.eye(3)
    source_std, source_mean = (
        np.array(v) @ spread for v in (normalisation.std, normalisation.mean)
    )
    seen = np.einsum("ih,bhwc,jw,cd->bijd", way, images, way, spread)
    seen = (seen * source_std + source_mean - np.array(OWN.mean)) / np.array(OWN.std)
    embedded = seen.reshape(len(seen), -1) @ given.params
    texts = given.texts_KD[(labels + shift) % len(given.texts_KD)]
    texts = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    length = np.linalg.norm(embedded, axis=1, keepdims=True)
    unit = embedded / length
    cosine = (unit * texts).sum(1, keepdims=True)
    share = 1 / len(images) if mean else 1
    by_embedding = -share * (texts - cosine * unit) / length
    by_seen = (by_embedding @ given.params.T).reshape(seen.shape)
    by_seen = by_seen * source_std / np.array(OWN.std)
    gradient = np.einsum("ih,bijd,jw,cd->bhwc", way, by_seen, way, spread)
    return share * (1 - cosine).sum(), gradient


def ours(given, images, normalisation):
    with jax.enable_x64(True):
        recipe = synthesis.Recipe(clip=0.5)
        return jax.device_get(
            guiding.guide_gradient(recipe, given, normalisation, jnp.asarray(images), LABELS)
        )


@pytest.mark.parametrize("size", [5, 8, 11])
@pytest.mark.parametrize("normalisation", [COLOUR, GREY])
def test_energy_and_gradient_by_hand(size, normalisation):
    channels = len(normalisation.mean)
    images = np.random.default_rng(1).standard_normal((3, SIZE, SIZE, channels))
    given = guide(size)
    value, gradient = ours(given, images, normalisation)
    expected, by_pixel = numpy_says(given, images, LABELS, normalisation)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    # Normalisations are float32 constants.
    np.testing.assert_allclose(gradient, 0.5 * by_pixel, atol=1e-6 * np.abs(by_pixel).max())
    for twin in ({"mean": False}, {"shift": 1}):
        wrong, by_pixel = numpy_says(given, images, LABELS, normalisation, **twin)
        assert abs(wrong / value - 1) > 1e-2
        assert np.abs(gradient - 0.5 * by_pixel).max() > 1e-2 * np.abs(by_pixel).max()
    wrong, _ = numpy_says(
        given, images, LABELS, dataclasses.replace(normalisation, std=(1.0,) * channels)
    )
    assert abs(wrong / value - 1) > 1e-3


def step_of(pool, recipe, given, number=3):
    """The gradient by the images of one iteration, and its terms."""
    with jax.enable_x64(True):
        unit = make_unit(2, 1, BUDGET, LABELS)
        start = start_images(unit, pool.normalisation).astype(np.float64)
        state = synthesis.initial_state(pool, recipe, start)._replace(step=np.int32(number))
        step = jax.jit(
            functools.partial(synthesis.synthesis_step, recipe, pool.teachers, pool.normalisation)
        )
        after, terms = step(pool.variables, np.uint32(SEED), unit, state, given)
        view = synthesis.view_of(recipe, rng.root(SEED), unit, np.int32(number), (SIZE, SIZE))
        return jax.device_get((after.opt_state.mu / (1 - recipe.betas[0]), terms, start, view))


def colour_pool():
    with jax.enable_x64(True):
        return small_pool(2, image_shape=(SIZE, SIZE, 3), normalisation=COLOUR, dtype=np.float64)


@pytest.mark.usefixtures("fast_programs")
def test_the_energy_is_added_to_the_teachers_and_named_among_the_terms():
    pool, plain = colour_pool(), synthesis.Recipe(roll=2, alpha_bn=0.1)
    guided = dataclasses.replace(plain, clip=2.0)
    alone, terms, start, view = step_of(pool, plain, None)
    both, with_clip, *_ = step_of(pool, guided, guide())
    given = guide()
    with jax.enable_x64(True):
        viewed, pull_back = jax.vjp(lambda x: views.apply_view(x, view), jnp.asarray(start))
        value, by_view = numpy_says(given, np.asarray(viewed), LABELS, COLOUR)
        (expected,) = pull_back(jnp.asarray(by_view))
    np.testing.assert_allclose(with_clip.others["clip"], value, rtol=1e-6)
    np.testing.assert_allclose(both - alone, 2.0 * np.asarray(expected), atol=1e-6)
    np.testing.assert_allclose(with_clip.loss, terms.loss + 2.0 * value, rtol=1e-6)
    assert "clip" not in terms.others


@pytest.mark.usefixtures("fast_programs")
def test_alone_no_teacher_counts_nor_is_read():
    pool = colour_pool()
    recipe = synthesis.Recipe(roll=2, alpha_ce=0.0, alpha_bn=0.0, clip=1.0)
    other = dataclasses.replace(
        pool, variables=tuple(jax.tree.map(lambda x: x * 1.5, v) for v in pool.variables)
    )
    gradient, terms, *_ = step_of(other, recipe, guide(), 1)
    assert np.abs(gradient).max() > 0 and terms.loss == terms.others["clip"]
    assert np.isnan(terms.ce_T).all()  # unread: what is read of these weights is finite
    np.testing.assert_array_equal(gradient, step_of(pool, recipe, guide(), 1)[0])
    ends = step_of(other, recipe, guide(), 0)[1]
    assert np.isfinite(ends.ce_T).all()


@pytest.mark.usefixtures("fast_programs")
def test_the_weight_of_the_logits():
    pool = colour_pool()
    with_it, without = (
        step_of(pool, synthesis.Recipe(roll=2, alpha_ce=alpha, alpha_bn=0.1), None)
        for alpha in (1.0, 0.0)
    )
    half = step_of(pool, synthesis.Recipe(roll=2, alpha_ce=0.5, alpha_bn=0.1), None)
    np.testing.assert_allclose(half[0], (with_it[0] + without[0]) / 2, atol=1e-12)
    assert np.abs(with_it[0] - without[0]).max() > 1e-4


def test_a_weight_and_an_encoder_belong_together():
    pool = small_pool(1)
    with pytest.raises(UserError, match=r"clip is 1.0, .* none is given"):
        synthesis.engine(pool, synthesis.Recipe(clip=1.0))
    with pytest.raises(UserError, match=r"clip is 0.0, .* an encoder is given"):
        synthesis.engine(pool, synthesis.Recipe(), guide=guide())


def test_a_term_that_is_not_finite_is_named():
    pool, recipe = small_pool(1), synthesis.Recipe(clip=1.0)
    terms = synthesis.no_terms(recipe, 1, np.dtype(np.float32))
    zero = np.zeros(1, np.float32)
    terms = terms._replace(step=np.int32(3), ce_T=zero, bn_T=zero)
    assert synthesis.explain_failure(terms, pool.names) == "the term clip is nan at step 3"


@pytest.mark.usefixtures("fast_alike")
def test_guided_images_are_the_same_on_any_device():
    pool, recipe = small_pool(1), synthesis.Recipe(clip=1.0, roll=1)
    given = jax.tree.map(lambda x: x.astype(np.float32), guide())

    def images(devices: int) -> np.ndarray:
        run = synthesis.engine(pool, recipe, guide=given, devices=jax.devices()[:devices])
        lanes = []
        for at in range(devices):
            unit = make_unit(0, 0, BUDGET)
            state = synthesis.initial_state(pool, recipe, start_images(unit, GREY))
            lanes.append(
                tuple(run.place(jax.device_get(x), at) for x in (unit, state, np.int32(6)))
            )
        return run.fetch(run(SEED, lanes)[-1][0]).images_BHWC

    np.testing.assert_array_equal(images(1), images(2))


def test_the_noise_of_a_view_is_what_teachers_and_terms_see():
    """A linear guide's gradient, of which NumPy knows what it is of noisy images."""
    pool, recipe = colour_pool(), synthesis.Recipe(
        roll=2, alpha_ce=0.0, alpha_bn=0.0, clip=1.0, view_noise=0.3
    )  # fmt: skip
    with_it, terms, start, view = step_of(pool, recipe, guide())
    with jax.enable_x64(True):
        viewed, pull_back = jax.vjp(lambda x: views.apply_view(x, view), jnp.asarray(start))
        unit = make_unit(2, 1, BUDGET, LABELS)
        added = synthesis.noise_of(recipe, COLOUR, rng.root(SEED), unit, np.int32(3), viewed)
        found = {}
        for name, seen in (("noisy", viewed + added), ("as it is", viewed)):
            value, by_view = numpy_says(guide(), np.asarray(seen), LABELS, COLOUR)
            found[name] = value, np.asarray(pull_back(jnp.asarray(by_view))[0])
    value, gradient = found["noisy"]
    np.testing.assert_allclose(terms.loss, value, rtol=1e-6)
    np.testing.assert_allclose(with_it, gradient, atol=1e-6)
    assert np.abs(with_it - found["as it is"][1]).max() > 1e-3


@pytest.mark.usefixtures("fast_programs")
def test_devices_that_share_a_batch_have_its_gradient_and_its_noise():
    pool, unit = small_pool(1), make_unit(0, 0, BUDGET, (0, 1, 2, 3))
    recipe = synthesis.Recipe(clip=1.0, roll=1, view_noise=0.1, parametrisation="pyramid")
    given = jax.tree.map(lambda x: x.astype(np.float32), guide())

    def first_step(span: int) -> SynthState:
        devices = jax.devices()[:span]
        run = synthesis.engine(pool, recipe, guide=given, devices=devices, span=span)
        state = synthesis.initial_state(pool, recipe, start_images(unit, GREY))
        lane = tuple(run.place(x, 0) for x in jax.device_get((unit, state, np.int32(1))))
        return run.fetch(run(SEED, [lane])[0][0])

    alone, shared = first_step(1), first_step(2)
    for a, b in zip(alone.opt_state.mu, shared.opt_state.mu, strict=True):
        np.testing.assert_allclose(b, a, atol=2e-6 * np.abs(a).max())


# --- a whole CLIP, beside transformers -----------------------------------------------------------


@needs_tokenizers
def test_a_clip_from_its_directory_is_transformers(tmp_path):
    """Tokens, texts, images and the gradient by their pixels; a text that is another's is seen."""
    reason = "needs torch and transformers; the tests above and the golden files stand for them"
    torch = pytest.importorskip("torch", reason=reason)
    transformers = pytest.importorskip("transformers", reason=reason)
    directory = str(write_clip(tmp_path / "clip"))
    said = prompts.of_classes(["tench", "cat", "a42", "x.", "dog"], "a photo of a {}")
    images = np.random.default_rng(0).standard_normal((3, SIZE, SIZE, 1))
    loaded = huggingface.load(directory, "image_encoder")
    texts = prompts.embeddings(tmp_path / "kept", directory, said)
    with jax.enable_x64(True):
        given = synthesis.Guide(
            jax.tree.map(np.float64, loaded.params), texts,
            loaded.module.clone(dtype=jnp.float64), clip.NORMALISATION,
        )  # fmt: skip
    value, gradient = ours(given, images, GREY)

    model = transformers.CLIPModel.from_pretrained(directory).double().eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(directory)
    tokens = tokenizer(said, padding="max_length", max_length=LENGTH, return_tensors="pt")
    written = model.get_text_features(tokens["input_ids"]).pooler_output.detach()

    def theirs(labels):
        x = torch.tensor(images, requires_grad=True)
        pixels = x.permute(0, 3, 1, 2) * GREY.std[0] + GREY.mean[0]
        pixels = torch.nn.functional.interpolate(pixels, (12, 12), mode="bilinear")
        mean, std = (
            torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1)
            for v in (clip.NORMALISATION.mean, clip.NORMALISATION.std)
        )
        seen = model.get_image_features((pixels.expand(-1, 3, -1, -1) - mean) / std).pooler_output
        cosine = torch.nn.functional.cosine_similarity(seen, written[torch.tensor(labels)])
        (0.5 * (1 - cosine).mean()).backward()
        return (1 - cosine).mean().item(), x.grad.numpy()

    expected, by_pixel = theirs(LABELS)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, by_pixel, atol=1e-5 * np.abs(by_pixel).max())
    _, by_others = theirs(LABELS[::-1].copy())
    assert np.abs(gradient - by_others).max() > 1e-2 * np.abs(by_pixel).max()
