"""Samplers against diffusers', step by step; a twin with one operation changed is seen."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from diffusion import parity, trajectories

from prism_jax.diffusion import noise, samplers

IDS = dict(ids=lambda case: case.name)


def by_diffusers():
    return pytest.importorskip(
        "diffusion.by_diffusers",
        reason="needs torch and diffusers; the golden file stands for them",
        exc_type=ImportError,
    )


def golden(name: str) -> np.ndarray:
    with np.load(trajectories.GOLDEN) as file:
        return file[name]


@pytest.mark.parametrize("case", trajectories.CASES, **IDS)
def test_every_step_is_diffusers_s(case):
    assert not trajectories.apart(trajectories.ours(case), golden(case.name))


def test_pndm_from_an_anchor_evaluates_36_times_and_begins_at_701():
    told, left = samplers._twice(trajectories.BY_NAME["pndm_50_released"].sampling)
    times = noise.grid(noise.STABLE_DIFFUSION, 50).time_S
    assert times[told].tolist() == [701, 681, 661, *range(641, 0, -20)]
    assert times[left].tolist() == [701, 701, 661, *range(641, 0, -20)]


def test_pndm_mended_takes_its_first_step_twice():
    sampling = dataclasses.replace(trajectories.BY_NAME["pndm_50_released"].sampling, slip=False)
    told, left = samplers._twice(sampling)
    times = noise.grid(noise.STABLE_DIFFUSION, 50).time_S
    assert times[told].tolist() == [681, 661, 661, *range(641, 0, -20)]
    assert times[left].tolist() == [681, 681, 661, *range(641, 0, -20)]
    mended = trajectories.ours(trajectories.Case("", sampling))
    assert trajectories.apart(mended, golden("pndm_50_released"))


def other_mixture():
    mixtures = samplers.MIXTURES.copy()
    mixtures[4, 0] += 1 / 24
    return mixtures


def unslipped(sampling):
    return TWICE(dataclasses.replace(sampling, slip=False))


def swapped(*numbers):
    estimate = FROM_V(*numbers)
    return noise.Estimate(estimate.noise, estimate.clean)


def unmoved(bounds, estimate, noisy, alpha, sigma):
    clipped = np.clip if isinstance(noisy, np.ndarray) else samplers.jnp.clip
    return noise.Estimate(clipped(estimate.clean, bounds.low_C, bounds.high_C), estimate.noise)


def other_deviation(sampling, prediction, channels, row):
    return DEVIATION(dataclasses.replace(sampling, variance="large"), prediction, channels, row)


def without_eta(sampling, *nodes, eta):
    return ROWS(sampling, *nodes, eta=0.0)


TWICE, FROM_V = samplers._twice, noise.from_v
DEVIATION, ROWS = samplers._deviation, samplers._rows
TWINS = [
    ("pndm_50", (samplers, "MIXTURES"), other_mixture()),
    ("pndm_50_released", (samplers, "_twice"), unslipped),
    ("ddim_50_v", (noise, "PREDICTIONS"), {"v": noise.Prediction(swapped, None)}),
    ("ddim_20_clip", (noise, "within"), unmoved),
    ("ddim_30_eta", (samplers, "_rows"), without_eta),
    ("ddpm_50_learned", (samplers, "_deviation"), other_deviation),
    ("ddim_50", (samplers, "begun"), lambda sampling: 36),
]


@pytest.mark.parametrize("name, where, twin", TWINS)
def test_another_operation_is_seen(name, where, twin, monkeypatch):
    monkeypatch.setattr(*where, twin)
    found = trajectories.ours(trajectories.BY_NAME[name])
    assert trajectories.apart(found, golden(name))


@pytest.mark.parametrize("case", trajectories.CASES, **IDS)
def test_golden_trajectories_are_what_diffusers_says(case):
    assert not trajectories.apart(by_diffusers().theirs(case), golden(case.name))


# --- the whole image-to-image pipeline, on the networks of the parity tests --------------------


def pipelines_apart(folder, **changes) -> list[str]:
    """What differs from diffusers' pipeline, by more than a hundred-thousandth."""
    for name in trajectories.NETWORKS:
        parity.write(parity.BY_NAME[name], folder / name)
    sampling = dataclasses.replace(trajectories.PIPELINE, **changes)
    found = trajectories.pipeline(folder, sampling)
    return [name for name, latents in found.items() if trajectories.apart(latents, golden(name))]


@pytest.mark.slow
def test_the_pipeline_is_diffusers_s(tmp_path):
    assert pipelines_apart(tmp_path) == []


@pytest.mark.slow
def test_another_pipeline_is_seen(tmp_path):
    assert pipelines_apart(tmp_path, guidance=3.01) == ["pipeline_latents", "pipeline_images"]


def test_the_golden_pipeline_is_what_diffusers_says():
    for name, expected in by_diffusers().pipeline().items():
        assert not trajectories.apart(expected, golden(name))
