"""What the section ``generate`` says, in the words of the engine that denoises."""

from __future__ import annotations

import dataclasses
from typing import Any

from prism_jax.config.sections import Generate, Refine
from prism_jax.diffusion import fit, guidance, noise, samplers
from prism_jax.diffusion.anchors import Clustering
from prism_jax.diffusion.refine import Refining

FOLDER = "generator"  # where squeeze keeps it, beside the teachers
CLIP_FOLDER = "clip"  # and what a CLIP says of the classes

SCHEDULES = {
    "dit": noise.COSINE,
    "dit_released": noise.DIT,
    "stable_diffusion": noise.STABLE_DIFFUSION,
}


# Fields that some settings do not read, as configs/base.py leaves them. Another value is refused
# there, or only said where it is in fingerprints (which have the first three as they are here).
IDLE: dict[str, Any] = {
    "patch": 4,
    "components": 8,
    "expand": 10,
    "resampler": "bicubic",
    "guided_channels": None,
}
IDLE_REFINE = Refine(0, 6e-4, 10.0, (1, 11))


def clustering_of(g: Generate) -> Clustering:
    """How anchors are found."""
    return Clustering(g.anchors, g.expand, g.attempts, g.outliers)


def sampling_of(g: Generate, schedule: noise.Schedule) -> samplers.Sampling:
    """How images are sampled."""
    terms: tuple[guidance.Term, ...] = ()
    if g.mode_weight:
        first, last = g.mode_window or (0, g.steps - 1)
        terms = (guidance.Term("mode", g.mode_weight, (first, last)),)
    return samplers.Sampling(
        schedule, g.sampler, g.steps, g.strength, g.guidance, g.guided_channels, g.eta,
        g.variance, g.slip, terms,
    )  # fmt: skip


def refining_of(g: Generate, schedule: noise.Schedule) -> Refining:
    """How latents are refined; not at all in no steps."""
    return Refining(schedule, g.steps, **dataclasses.asdict(g.refine))


def fitting_of(g: Generate) -> fit.Fitting:
    """How the generator is trained."""
    return fit.Fitting(SCHEDULES["dit"], **dataclasses.asdict(g.fit))
