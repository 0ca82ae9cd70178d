"""Rules of ``generate``: what cannot be sampled, and settings that have no meaning together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from prism_jax.config.generation import (
    FOLDER,
    IDLE,
    IDLE_REFINE,
    SCHEDULES,
    clustering_of,
    fitting_of,
    refining_of,
    sampling_of,
)
from prism_jax.config.rules.common import literals_of, one_of, passed_over, positive
from prism_jax.config.sections import Experiment
from prism_jax.diffusion import fit, pixels, refine, samplers
from prism_jax.diffusion.anchors import check as check_anchors
from prism_jax.errors import UserError


def violations(e: Experiment) -> Iterator[str]:
    """What is wrong with the section, one line each; nothing where nobody generates."""
    if e.recover.maker != "generate" or any(True for _ in literals_of("generate", e.generate)):
        return
    g = e.generate
    yield from positive(
        e, "generate", "batch_size", "encode_batch_size", "patch", "components", "image_size",
        "most_images", "candidates", "guided_channels",
    )  # fmt: skip
    if g.refine.steps < 0:
        yield f"generate.refine.steps is {g.refine.steps}; it must be zero or positive"
    for group in ("denoiser", "fit"):
        for name, value in dataclasses.asdict(getattr(g, group)).items():
            if value <= 0 and name not in ("warmup", "class_dropout", "average"):
                yield f"generate.{group}.{name} is {value}; it must be positive"
    yield from one_of("generate.resampler", g.resampler, pixels.RESAMPLERS)
    if g.guidance < 0 or g.mode_weight < 0:
        yield (
            f"generate.guidance is {g.guidance} and generate.mode_weight {g.mode_weight}; both "
            f"must be zero or positive"
        )
    if g.generator == "dit" and g.guidance != 1 and not g.fit.class_dropout:
        yield (
            f"generate.guidance is {g.guidance}, and what it leads away from, images of no class, "
            f"are never shown at generate.fit.class_dropout=0; set the guidance to 1, or a share "
            f"such as 0.1"
        )
    if g.strength == 0:
        for field, idle in (("mode_weight", 0), ("candidates", 1)):
            if (value := getattr(g, field)) != idle:
                yield (
                    f"generate.strength is 0, at which images are the anchors as they are, and "
                    f"generate.{field}={value} counts for nothing; set it to {idle}, or use more "
                    f"strength"
                )
    yield from _with_others(e)
    yield from _unread(e)
    yield from _networks(e)
    yield from _anchors(e)
    schedule = SCHEDULES[g.generator]
    checks: list[Callable[[], None]] = [
        lambda: check_anchors(clustering_of(g)),
        lambda: samplers.check(sampling_of(g, schedule)),
    ]
    if g.generator == "dit":
        checks.append(lambda: fit.check(fitting_of(g)))
    if g.refine.steps > 0 and g.steps > 0:
        checks.append(lambda: refine.check(refining_of(g, schedule)))
    for check in checks:
        try:
            check()
        except UserError as error:
            yield f"generate: {error}"


def _with_others(e: Experiment) -> Iterator[str]:
    """Other sections' fields."""
    if e.recover.iterations or e.recover.pool:
        yield (
            f"recover.maker is 'generate', which optimises nothing, but recover.iterations is "
            f"{e.recover.iterations} and recover.pool ({', '.join(e.recover.pool)}); set them to "
            f"0 and (). To optimise generated images, let another run start from them: "
            f"recover.initialise=folder"
        )
    if e.recover.initialise == "folder":
        yield "recover.maker is 'generate', which reads no folder; set recover.initialise='real'"
    else:
        why = "recover.maker='generate' has its own start, pixels and dtype"
        usual = {"initialise": "real", "rounding": "nearest", "dtype": "float32"}
        for name, value in usual.items():
            passed_over(f"recover.{name}", getattr(e.recover, name), value, why)
    if FOLDER in e.squeeze.teachers:
        yield (
            f"squeeze.teachers names {FOLDER!r}, which is the name of the generator's own folder; "
            f"give the teacher another one"
        )
    judges = e.generate.candidates > 1 or e.generate.generator == "dit"
    if judges and e.relabel.teachers and e.judge not in e.squeeze.teachers:
        yield (
            f"generate.judge is {e.judge!r}, which is not in squeeze.teachers "
            f"({', '.join(e.squeeze.teachers)}); name one of them"
        )


def _unread(e: Experiment) -> Iterator[str]:
    """Numbers that somebody stated and nothing reads."""
    g = e.generate
    patches = g.codec == "patches", f"generate.codec is {g.codec!r}"
    for name, (read, why) in {
        "patch": patches,
        "components": patches,
        # without anchors, a recipe's may stay
        "expand": (g.anchors not in ("kmeans", "medoid"), f"{g.anchors!r} has no chunks"),
    }.items():
        if not read and (value := getattr(g, name)) != IDLE[name]:
            yield (
                f"generate.{name} is {value!r}, which counts for nothing: {why}; leave it at "
                f"generate.{name}={IDLE[name]!r}, or change that"
            )
    for name, read, why in (
        ("resampler", g.generator != "dit", "a generator that is trained here changes no size"),
        ("guided_channels", g.guidance != 1, "generate.guidance is 1, at which none is guided"),
    ):
        if not read:
            passed_over(f"generate.{name}", getattr(g, name), IDLE[name], why)
    if g.refine.steps == 0 and g.refine != IDLE_REFINE:
        yield (
            f"generate.refine is {dataclasses.asdict(g.refine)}, and no step refines anything; set "
            f"generate.refine.steps above 0, or leave it at {dataclasses.asdict(IDLE_REFINE)}"
        )


def _networks(e: Experiment) -> Iterator[str]:
    g, read = e.generate, e.generate.generator != "dit"
    if read and not g.directory:
        yield (
            f"generate.generator is {g.generator!r}; name its directory with generate.directory=DIR"
        )
    if not read and (g.directory or g.codec == "directory"):
        yield (
            "generate.generator is 'dit', which is trained here and reads no directory; unset "
            "generate.directory, and let generate.codec be 'none' or 'patches'"
        )
    if not read and g.variance == "learned":
        yield (
            "generate.variance is 'learned', but a 'dit', which is trained here, learns no "
            "variance; allowed for it: small, large. Set one of them, or read a 'dit_released'"
        )
    if g.transformer and g.generator != "dit_released":
        yield f"generate.transformer is the file of a 'dit_released', not of a {g.generator!r}"
    if read and g.codec != "directory":
        yield (
            f"generate.codec is {g.codec!r}; a {g.generator!r} reads latents of its own "
            f"autoencoder: set it to 'directory'"
        )
    if read and g.clip:
        yield "generate.clip is True, but an autoencoder's latents have no bounds; set it to False"
    if g.sampled and g.codec != "directory":
        yield (
            f"generate.sampled draws from an autoencoder's posterior, and generate.codec is "
            f"{g.codec!r}, which has none; set it to False"
        )
    if g.generator != "stable_diffusion" and (g.class_names or g.negative or g.template != "{}"):
        yield f"a {g.generator!r} reads no prompts; unset generate.class_names, template, negative"
    if not read and min(g.patch, g.denoiser.token, g.denoiser.heads, g.denoiser.width) > 0:
        yield from _form(e)


def _form(e: Experiment) -> Iterator[str]:
    """Sizes of the transformer that is trained here, and of what it reads."""
    g, size = e.generate, e.dataset.image_size
    if g.image_size not in (None, size):
        yield (
            f"generate.image_size is {g.image_size}; a generator that is trained here reads "
            f"images of dataset.image_size={size}: leave it unset"
        )
    if g.view != "cropped":
        yield (
            f"generate.view is {g.view!r}; a generator that is trained here learns images that are "
            f"cropped, as students see them, and anchors of others would be strange to it: set it "
            f"to 'cropped'"
        )
    if g.codec == "patches" and size % g.patch:
        yield (
            f"generate.patch is {g.patch}, which does not divide dataset.image_size={size}; "
            f"choose one that does"
        )
        return
    latent = size // g.patch if g.codec == "patches" else size
    if latent % g.denoiser.token:
        yield (
            f"generate.denoiser.token is {g.denoiser.token}, which does not divide latents of "
            f"{latent} x {latent}; choose one that does"
        )
    if g.denoiser.width % 4 or g.denoiser.width % g.denoiser.heads:
        yield (
            f"generate.denoiser.width is {g.denoiser.width}; it must be a multiple of four and of "
            f"generate.denoiser.heads={g.denoiser.heads}"
        )


def _anchors(e: Experiment) -> Iterator[str]:
    g = e.generate
    if g.anchors == "none":
        for field, needs in (("strength", g.strength < 1), ("mode_weight", g.mode_weight > 0)):
            if needs:
                yield (
                    f"generate.anchors is 'none', and generate.{field}={getattr(g, field)} needs "
                    f"some; choose a kind of anchors, or strength 1 without terms"
                )
        if g.weighted:
            yield "generate.weighted weighs by anchors, and generate.anchors is 'none'"
    elif g.strength == 1 and not g.mode_weight:
        yield (
            f"generate.strength is 1 and generate.mode_weight 0, at which images do not depend on "
            f"anchors, and generate.anchors is {g.anchors!r}; set it to 'none' (and "
            f"generate.weighted to False), or use less strength"
        )
    if g.mode_window and not g.mode_weight:
        yield f"generate.mode_window is {g.mode_window}, but generate.mode_weight is 0; set both"
    if g.weighted and g.candidates > 1:
        yield (
            "generate.weighted gives each image the share of its anchor, and candidates are of "
            "any; set generate.candidates=1 or generate.weighted=False"
        )
    if g.weighted and e.validate.loss == "dist":
        yield "generate.weighted: validate.loss='dist' compares a whole batch, and knows no weights"
    if g.most_images is not None and g.most_images < e.recover.ipc and g.anchors != "none":
        yield (
            f"generate.most_images is {g.most_images}, less than recover.ipc={e.recover.ipc}: each "
            f"anchor needs an image"
        )
