"""What generate refuses: every refusal by its name, and each config's own settings pass."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
from ml_collections import ConfigDict

from configs import base, d4m_digits
from prism_jax.config import generation, resolve
from prism_jax.errors import UserError


def changed(**fields) -> ConfigDict:
    """The digits' config with fields of any section: generate__fit__steps."""
    c = d4m_digits.get_config()
    with c.unlocked():
        for path, value in fields.items():
            group = c
            *groups, field = path.split("__")
            for name in groups:
                group = group[name]
            with group.ignore_type():
                group[field] = value
    return c


NO_ANCHORS = {
    "generate__anchors": "none", "generate__strength": 1.0, "validate__controls": ("random_real",),
}  # fmt: skip
READ = {
    "generate__generator": "dit_released", "generate__directory": "d",
    "generate__codec": "directory", "generate__clip": False,
}  # fmt: skip
REFUSED = {
    "a pyramid of nothing": (
        {"recover__parametrisation": "pyramid"}, "recover.maker is 'generate'); set it to 'pixels'",
    ),
    "guided by nothing": (
        {"recover__clip": 1.0, "recover__clip_directory": "clip"},
        "optimised that it could guide (recover.maker is 'generate')",
    ),
    "strength above": ({"generate__strength": 1.2}, "strength is 1.2; allowed: 0"),
    "strength below": ({"generate__strength": -0.1}, "strength is -0.1"),
    "guided away from what was never shown": (
        {"generate__fit__class_dropout": 0.0}, "guidance is 1.5, and what it leads away from",
    ),
    "attempts of one pass": (
        {"generate__anchors": "chunked", "generate__attempts": 10},
        "has 10 attempts, and chunked, which sees each chunk once, makes one",
    ),
    "no step": ({"generate__strength": 0.01}, "0.01 of 50 steps leaves no step to run"),
    "window outside": (
        {"generate__mode_weight": 0.1, "generate__mode_window": (26, 50)},
        "is 26 to 50, but the steps are numbered 0 (the last one) to 49",
    ),
    "window before": (
        {"generate__mode_weight": 0.1, "generate__mode_window": (40, 49)},
        "the strength leaves steps 34 to 0",
    ),
    "window of nothing": ({"generate__mode_window": (1, 2)}, "generate.mode_weight is 0"),
    "modes of anchors alone": (
        {"generate__strength": 0.0, "generate__mode_weight": 0.1},
        "generate.mode_weight=0.1 counts for nothing",
    ),
    "candidates of anchors alone": (
        {"generate__strength": 0.0, "generate__candidates": 2},
        "generate.candidates=2 counts for nothing",
    ),
    "refined outside": (
        {"generate__refine__steps": 3, "generate__refine__window": (1, 50)},
        "at the times of steps 1 to 50, but the steps are numbered 0",
    ),
    "refined backwards": ({"generate__refine__steps": -1}, "generate.refine.steps is -1"),
    "refined at no rate": (
        {"generate__refine__steps": 3, "generate__refine__learning_rate": 0.0},
        "at learning rate 0",
    ),
    "sampler": ({"generate__sampler": "euler"}, "'euler'; allowed: ddim, ddpm, pndm"),
    "eta of another": ({"generate__sampler": "pndm", "generate__eta": 0.5}, "eta belongs to"),
    "anchors": ({"generate__anchors": "medoids"}, "anchors are 'medoids'; allowed"),
    "outliers": ({"generate__outliers": 0.7}, "the share of outliers is 0.7"),
    "no anchors": (
        {**NO_ANCHORS, "generate__strength": 0.7}, "generate.strength=0.7 needs some",
    ),
    "weights of none": ({**NO_ANCHORS, "generate__weighted": True}, "weighs by anchors"),
    "weights of candidates": (
        {"generate__weighted": True, "generate__candidates": 2}, "candidates are of any",
    ),
    "weights of batches": (
        {"generate__weighted": True, "validate__loss": "dist"}, "knows no weights",
    ),
    "few images": ({"generate__most_images": 5}, "less than recover.ipc=10"),
    "optimised too": ({"recover__iterations": 10}, "recover.iterations is 10"),
    "folder": ({"recover__initialise": "folder", "recover__initialise_from": "x"}, "no folder"),
    "judge": ({"generate__judge": "resnet50"}, "generate.judge is 'resnet50', which is not in"),
    "no directory": ({"generate__generator": "dit_released", **{
        k: READ[k] for k in ("generate__codec", "generate__clip")}}, "generate.directory=DIR"),
    "components of none": (
        {"generate__components": 3},
        "generate.components is 3, which counts for nothing: generate.codec is 'none'; leave it at "
        "generate.components=8",
    ),
    "patch of a directory": ({**READ, "generate__patch": 8}, "generate.codec is 'directory'"),
    "chunks of all": ({"generate__expand": 3}, "'kmeans' has no chunks"),
    "refined in no step": (
        {"generate__refine__window": (1, 5)}, "and no step refines anything; set",
    ),
    "directory of ours": ({"generate__directory": "d"}, "reads no directory"),
    "codec of others": ({**READ, "generate__codec": "patches"}, "set it to 'directory'"),
    "variance of ours": (
        {"generate__sampler": "ddpm", "generate__variance": "learned"}, "learns no variance",
    ),
    "bounds": ({**READ, "generate__clip": True}, "have no bounds"),
    "posterior": ({"generate__sampled": True}, "which has none"),
    "prompts": ({"generate__negative": "blur"}, "reads no prompts"),
    "token": ({"generate__denoiser__token": 3}, "does not divide latents of 16 x 16"),
    "token of patches": (
        {"generate__codec": "patches", "generate__patch": 4}, "does not divide latents of 4 x 4",
    ),
    "patch": ({"generate__codec": "patches", "generate__patch": 5}, "dataset.image_size=16"),
    "width": ({"generate__denoiser__width": 130}, "must be a multiple of four and of"),
    "size": ({"generate__image_size": 32}, "leave it unset"),
    "view": ({"generate__view": "squashed"}, "learns images that are cropped"),
    "warm-up": ({"generate__fit__warmup": 3500}, "shorter than the steps"),
    "an average of nothing": ({"generate__fit__average": 2.0}, "average is 2.0, the decay"),
    "nothing to fit": ({"generate__fit__learning_rate": 0.0}, "generate.fit.learning_rate is 0.0"),
    "anchors for nothing": (
        {"generate__strength": 1.0}, "images do not depend on anchors, and generate.anchors is",
    ),
    "control of optimised": (
        {"recover__maker": "optimise", "recover__iterations": 9, "recover__pool": ("resnet18",),
         "recover__slots_per_batch": None, "validate__controls": ("medoids",)},
        "names medoids, and recover.maker is not 'generate'",
    ),
    "control of anchors": (
        {**NO_ANCHORS, "validate__controls": ("medoids",)}, "and generate.anchors is 'none'",
    ),
    "word": ({"generate__codec": "vae"}, "generate.codec is 'vae'; allowed"),
    "resampler": ({"generate__resampler": "cubic"}, "did you mean bicubic?"),
    "batch": ({"generate__batch_size": 0}, "generate.batch_size is 0; it must be positive"),
    "unknown": ({"generate__fit__step": 3}, "did you mean generate.fit.steps?"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_is_refused_by_name(name):
    fields, said = REFUSED[name]
    with pytest.raises(UserError) as caught:
        resolve(changed(**fields))
    message = str(caught.value)
    assert said in message, message
    assert "\n" not in message  # one thing is wrong, and nothing else is said


SAID = {  # refused, finished work would be: its fingerprints have them
    "rounded otherwise": ({"recover__rounding": "truncate"}, "recover.rounding is 'truncate'"),
    "another start": ({"recover__initialise": "noise"}, "recover.initialise is 'noise'"),
    "another dtype": ({"recover__dtype": "bfloat16"}, "recover.dtype is 'bfloat16'"),
    "resampled to its size": ({"generate__resampler": "box"}, "changes no size"),
    "channels without guidance": (
        {"generate__guidance": 1.0, "generate__guided_channels": 1}, "at which none is guided",
    ),
    "momentum of nothing": ({"validate__momentum": 0.5}, "validate.optimiser is 'adamw', not"),
    "a warm-up of no epochs": ({"validate__warmup_start": 0.5}, "validate.warmup_epochs is 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_what_counts_for_nothing_is_said(name):
    fields, said = SAID[name]
    with pytest.warns(UserWarning, match=said):
        resolve(changed(**fields))
    with warnings.catch_warnings():  # and nothing else is
        warnings.simplefilter("error")
        resolve(changed())


ALLOWED = {
    "as it is": {},
    "anchors alone": {"generate__strength": 0.0},
    "no anchors": NO_ANCHORS,
    "modes": {
        "generate__sampler": "ddpm", "generate__strength": 1.0, "generate__mode_weight": 0.1,
        "generate__mode_window": (26, 49),
    },
    "read": READ,
    "read, resampled": {**READ, "generate__resampler": "box"},
    "chunks": {"generate__anchors": "chunked", "generate__expand": 3},
    "a recipe's chunks without anchors": {**NO_ANCHORS, "generate__expand": 1},
    "channels": {"generate__guided_channels": 1},
    "read squashed": {**READ, "generate__view": "squashed"},
    "variance that was learned": {
        **READ, "generate__sampler": "ddpm", "generate__variance": "learned",
    },
    "refined": {**NO_ANCHORS, "generate__candidates": 2, "generate__refine__steps": 100},
    "patches": {
        "generate__codec": "patches", "generate__patch": 4, "generate__denoiser__token": 2,
    },
    "nobody generates": {
        "recover__maker": "optimise", "generate__strength": 7.0, "generate__mode_window": (9, 3),
        "validate__controls": ("random_real",),
    },
}  # fmt: skip


def test_what_is_left_alone_is_left_as_the_base_has_it():
    generate = base.get_config().generate
    assert {name: generate[name] for name in generation.IDLE} == generation.IDLE
    assert generate.refine.to_dict() == dataclasses.asdict(generation.IDLE_REFINE)


@pytest.mark.parametrize("name", ALLOWED)
def test_what_has_meaning_is_not(name):
    resolve(changed(**ALLOWED[name]))
