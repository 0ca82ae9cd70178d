"""What diffusers' schedulers make of the cases; as a script, ``trajectories.npz`` anew."""

from __future__ import annotations

import pathlib
import sys

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
)
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img
from diffusers.schedulers import scheduling_ddpm

TESTS = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from diffusion import parity, torch_networks, trajectories  # noqa: E402

VARIANCES = {"small": "fixed_small", "large": "fixed_large", "learned": "learned_range"}
SPACINGS = {"leading": "leading", "trailing": "trailing", "even": "linspace"}


def scheduler_of(case: trajectories.Case):
    """The scheduler of a case, with its steps set."""
    schedule = case.sampling.schedule
    common = dict(
        beta_schedule=schedule.name,
        beta_start=schedule.first,
        beta_end=schedule.last,
        timestep_spacing=SPACINGS[schedule.spacing],
        steps_offset=schedule.offset,
        prediction_type="v_prediction" if schedule.prediction == "v" else "epsilon",
    )
    kind = case.sampling.sampler
    if kind == "ddpm":
        variance = VARIANCES[case.sampling.variance]
        found = DDPMScheduler(variance_type=variance, clip_sample=False, **common)
    else:
        common["set_alpha_to_one"] = schedule.ends_clean
        if kind == "pndm":
            found = PNDMScheduler(skip_prk_steps=True, **common)
        else:
            clip = dict(clip_sample=case.clip, clip_sample_range=trajectories.BOUND)
            found = DDIMScheduler(**clip, **common)
    found.set_timesteps(case.sampling.steps)
    return found


def theirs(case: trajectories.Case) -> np.ndarray:
    """The latents after each step, as the image-to-image pipeline calls them."""
    sampling, scheduler = case.sampling, scheduler_of(case)
    anchors, first, fresh = (torch.tensor(x.astype(np.float32)) for x in trajectories.drawn())
    anchors, first = (x.permute(0, 3, 1, 2) for x in (anchors, first))
    fresh = fresh.permute(0, 1, 4, 2, 3)
    init = min(int(sampling.steps * sampling.strength), sampling.steps)
    begin = max(sampling.steps - init, 0)
    timesteps = scheduler.timesteps[begin * scheduler.order :]
    latents = first
    if init < sampling.steps:
        latents = scheduler.add_noise(anchors, first, timesteps[:1].repeat(len(first)))
    found = []
    for call, t in enumerate(timesteps):
        time = t.float() / 1000
        prediction = trajectories.denoise(torch, latents, time)
        if sampling.variance == "learned":
            spread = trajectories.spread(torch, latents, time)
            prediction = torch.cat([prediction, spread], 1)
        noise = fresh[len(timesteps) - 1 - call]
        extra = {}
        if sampling.sampler == "ddim":
            extra = dict(eta=sampling.eta, use_clipped_model_output=case.clip)
            if sampling.eta > 0:
                extra["variance_noise"] = noise
        scheduling_ddpm.randn_tensor = lambda *_, noise=noise, **__: noise
        latents = scheduler.step(prediction, t, latents, **extra).prev_sample
        found.append(latents.permute(0, 2, 3, 1).numpy())
    return np.stack(found)


def pipeline() -> dict[str, np.ndarray]:
    """The image-to-image pipeline on two networks of the parity tests, in float64."""
    unet, vae = (torch_networks.build(parity.BY_NAME[name]) for name in trajectories.NETWORKS)
    sampling = trajectories.PIPELINE
    run = StableDiffusionImg2ImgPipeline(
        vae.double(), None, None, unet.double(),
        scheduler_of(trajectories.Case("pipeline", sampling)), None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    run.set_progress_bar_config(disable=True)
    anchors, first, told, untold = (torch.tensor(x) for x in trajectories.seen())
    pipeline_stable_diffusion_img2img.randn_tensor = lambda *_, **__: first.permute(0, 3, 1, 2)
    found = {}
    for name, kind in (("latents", "latent"), ("images", "pt")):
        found[f"pipeline_{name}"] = run(
            image=anchors.permute(0, 3, 1, 2), prompt_embeds=told, negative_prompt_embeds=untold,
            strength=sampling.strength, num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance, output_type=kind,
        ).images.permute(0, 2, 3, 1).numpy()  # fmt: skip
    return found


if __name__ == "__main__":
    found = {case.name: theirs(case) for case in trajectories.CASES} | pipeline()
    found = {name: values.astype(np.float32) for name, values in found.items()}
    np.savez_compressed(trajectories.GOLDEN, **found)
    print(trajectories.GOLDEN.stat().st_size)
