"""The small family on scikit-learn's digits at 16 px: generator, judge, and what they make."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import numpy as np

from prism_jax import training
from prism_jax.data import datasets, sources
from prism_jax.diffusion import dit, fit, generate, noise, patches, pixels, quality
from prism_jax.diffusion.samplers import Sampling
from prism_jax.models import build
from prism_jax.types import Normalisation

SPACE = Normalisation(mean=(0.3,), std=(0.37,))
DENOISER = dit.DiT(
    classes=10, channels=1, patch=8, width=128, depth=4, heads=4, learned_variance=False,
    time_scale=1000.0,
)  # fmt: skip
SAMPLING = Sampling(noise.COSINE, "ddim", steps=50, strength=1.0, guidance=1.5)


class Digits(NamedTuple):
    """uint8 images (N, 16, 16, 1) and their labels."""

    images: np.ndarray
    labels: np.ndarray


@functools.cache
def digits(split: str) -> Digits:
    source = sources.open_sklearn(datasets.dataset_info("digits"), None, split, 16)
    return Digits(
        np.stack([source.image(i) for i in range(len(source))]), np.asarray(source.labels_N)
    )


@functools.cache
def judge():
    """A convnet of another seed and kind than anything that generates."""
    train = digits("train")
    module = build("convnet_d3", 10, width=0.25, stem="small")
    return module, training.fit(
        module, train.images, train.labels, normalisation=SPACE, epochs=30, seed=7,
        learning_rate=3e-3, crop_min=0.6, flip=False,
    )  # fmt: skip


def judged(images_uint8: np.ndarray) -> np.ndarray:
    """The judge's classes."""
    module, variables = judge()
    images = (images_uint8.astype(np.float32) / 255 - SPACE.mean[0]) / SPACE.std[0]
    return np.asarray(jax.jit(module.apply)(variables, images)).argmax(1)


def trained(fitting: fit.Fitting) -> tuple[generate.Weights, list[float]]:
    """The weights of a generator, and its losses as they were looked at."""
    train = digits("train")
    codec = patches.fit_pixels(train.images)
    latents, _ = patches.Pixels().encode(codec, pixels.from_uint8(train.images))
    latents, labels = np.asarray(latents), train.labels.astype(np.int32)
    begun = fit.Progress(fit.initial_state(DENOISER, fitting, 0, latents.shape[1:]))
    *_, last = steps = list(fit.fit(DENOISER, fitting, latents, labels, seed=0, begun=begun))
    losses = [step.mean for step in steps if not step.losses]
    return generate.Weights(codec, last.state.average, {}, patches.bounds(codec)), losses


def drawn(
    weights: generate.Weights, count: int, sampling: Sampling = SAMPLING, anchors=None
) -> Digits:
    """``count`` images of each class."""
    gen = generate.Generator(patches.Pixels(), DENOISER, DENOISER)
    classes, slots = (x.ravel().astype(np.int32) for x in np.mgrid[:10, :count])
    made = jax.jit(functools.partial(generate.generate, gen, sampling))
    images, batch = [], 100
    for at in range(0, len(classes), batch):
        part = slice(at, at + batch)
        places = generate.Places(classes[part], slots[part], classes[part])
        starts = np.zeros((batch, 16, 16, 1), np.float32) if anchors is None else anchors[part]
        found = np.asarray(made(weights, np.uint32(0), places, starts)[0])
        images.append(pixels.to_uint8(found, list(zip(classes[part], slots[part], strict=True))))
    return Digits(np.concatenate(images), classes)


def measured(made: Digits) -> quality.Quality:
    """What the judge and the distances say of images."""
    return quality.quality(
        made.images, judged(made.images), made.labels,
        train=digits("train").images, test=digits("test").images,
    )  # fmt: skip
