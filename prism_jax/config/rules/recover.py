"""Rules of ``recover``: its numbers, its words, and settings that have no meaning together."""

from __future__ import annotations

from collections.abc import Iterator

from prism_jax.config.generation import CLIP_FOLDER
from prism_jax.config.layout import Layout, batch_layout
from prism_jax.config.rules.common import (
    normalisation,
    not_negative,
    one_of,
    positive,
    share,
    shifted,
    without_milestones,
)
from prism_jax.config.sections import SELECTED_CONTROLS, Experiment
from prism_jax.core import priors, schedules
from prism_jax.core.statistics import KINDS, OF_CONVOLUTIONS, of_convolutions
from prism_jax.data.sets.floats import WHITENING, WHITENINGS
from prism_jax.errors import UserError
from prism_jax.models import ARCHITECTURES
from prism_jax.synthesis import METHODS, PARAMETRISATIONS, Recipe, sampling
from prism_jax.synthesis.selection import GROUPED
from prism_jax.synthesis.start import ASKING, INITIALISERS, Patches, needed_images

# The allowed values of fields that name a row of a table.
CHOICES: dict[str, tuple[str, ...]] = {
    "method": tuple(METHODS),
    "logits_by": tuple(sampling.SAMPLERS),
    "statistics_by": tuple(sampling.SAMPLERS),
    "committee": tuple(sampling.COMMITTEES),
    "budget": tuple(schedules.BUDGETS),
    "schedule": without_milestones(),
    "crop_curriculum": ("constant", *schedules.CURRICULA),
    "initialise": tuple(INITIALISERS),
    "match": KINDS,
    "parametrisation": tuple(PARAMETRISATIONS),
}


def violations(e: Experiment) -> Iterator[str]:
    """What is wrong with the section, one line each."""
    yield from _numbers(e)
    for name, allowed in CHOICES.items():
        values = getattr(e.recover, name)
        for value in values if isinstance(values, tuple) else (values,):
            if value is not None:
                yield from one_of(f"recover.{name}", value, allowed)
    if e.recover.pool and e.recover.primary not in e.recover.pool:
        yield (
            f"recover.primary is {e.recover.primary!r}, which is not in recover.pool "
            f"({', '.join(e.recover.pool)}); name one of the pool"
        )
    layout, why = layout_of(e)
    if why:
        yield why
    if e.recover.method in METHODS:
        yield from _supervision(e, layout)
        yield from _unread(e)
        yield from _statistics(e)
        yield from _groups(e, layout)
        yield from _course(e, layout)
        yield from _terms(e, layout)
        yield from _optimised(e)
        yield from _clip(e)
        yield from _start(e)
    yield from _stated(e)


def _numbers(e: Experiment) -> Iterator[str]:
    r = e.recover
    yield from positive(
        e, "recover", "ipc", "learning_rate", "batch_size", "slots_per_batch",
        "steps_per_dispatch", "checkpoint_seconds", "first_bn_multiplier", "statistic_patch",
        "rounds", "prior_temperature", "patch_factor", "patch_images", "patch_crops",
    )  # fmt: skip
    yield from not_negative(
        e, "recover", "iterations", "alpha_ce", "alpha_bn", "roll", "variance_weight",
        *priors.PRIORS, "flatness", "clip", "view_noise", "perturb_rho", "perturb_steps",
        "subset_others", "crop_pad",
    )  # fmt: skip
    yield from share(e, "recover", "crop_min", low="(")
    yield from share(e, "recover", "ema", "drop", high=")")
    yield from share(
        e, "recover", "class_share", "inject", "inject_simplicity", "crop_milestone",
        "subset_probability",
    )  # fmt: skip
    for i, beta in enumerate(r.betas):
        if not 0 <= beta < 1:
            yield f"recover.betas[{i}] is {beta}; it must be in [0, 1)"
    for i, iteration in enumerate(r.keep_at):
        if not 1 <= iteration <= r.iterations:
            yield (
                f"recover.keep_at[{i}] is {iteration}; images are kept after an iteration of 1 to "
                f"recover.iterations={r.iterations}"
            )
    if r.jpeg_quality is not None and not 1 <= r.jpeg_quality <= 95:
        yield f"recover.jpeg_quality is {r.jpeg_quality}; it must be in [1, 95]"


def layout_of(e: Experiment) -> tuple[Layout | None, str | None]:
    """How the set divides into batches, or why it does not; neither where a number is wrong."""
    r = e.recover
    sizes = r.ipc, e.dataset.num_classes, r.slots_per_batch, r.batch_size
    if any(size is not None and size <= 0 for size in sizes) or r.budget not in schedules.BUDGETS:
        return None, None
    try:
        return batch_layout(e), None
    except UserError as error:
        return None, str(error)


def supervised_by(e: Experiment) -> tuple[str, str]:
    """The samplers of logits and of statistics."""
    method = METHODS[e.recover.method]
    return (
        e.recover.logits_by or method.logits,
        e.recover.statistics_by or method.statistics,
    )


def _convolutions(e: Experiment) -> bool:
    return bool(of_convolutions(e.recover.match))


def _supervision(e: Experiment, layout: Layout | None) -> Iterator[str]:
    r, (logits, statistics) = e.recover, supervised_by(e)
    if "committee" not in (logits, statistics):
        if r.priors is not None:
            yield f"recover.priors is {r.priors}, but no committee votes; set logits_by or unset it"
    elif r.priors is not None and len(r.priors) != len(r.pool):
        yield (
            f"recover.priors is {r.priors}; it must be {len(r.pool)} numbers, one per teacher of "
            f"recover.pool: the accuracy in percent of a student of its images alone"
        )
    elif r.priors is None and r.committee == "best":
        yield "recover.committee is 'best', and recover.priors is unset: nobody is better"
    if r.statistic_primary and r.statistic_primary not in r.pool:
        yield (
            f"recover.statistic_primary is {r.statistic_primary!r}, which is not in recover.pool "
            f"({', '.join(r.pool)}); name one of the pool"
        )
    if r.statistic_primary and statistics not in ("fixed", "subset"):
        yield (
            f"recover.statistic_primary is {r.statistic_primary!r}, but {statistics!r} has no "
            f"primary; set recover.statistics_by to 'fixed' or 'subset'"
        )
    listed = "committee" in (logits, statistics) and r.committee == "listed"
    if listed and layout is not None and layout.slots > 1:
        yield (
            f"recover.committee is 'listed', all pairs in turn with the slot, and a batch holds "
            f"{layout.slots} slots, which have one pair: set recover.slots_per_batch=1, or "
            f"recover.committee='random'"
        )
    if r.round_robin_restarts and "round_robin" not in (logits, statistics):
        yield "recover.round_robin_restarts is True, but nobody takes turns; unset it"


def drawn_by(e: Experiment) -> set[str]:
    """The samplers that draw teachers at random."""
    random = {"subset"} | ({"committee"} if e.recover.committee == "random" else set())
    return random & set(supervised_by(e))


def one_draw(e: Experiment, layout: Layout) -> str | None:
    """What is to be said where one draw of teachers holds for every image of the set."""
    r = e.recover
    if layout.groups > 1 or not (drawn_by(e) and r.iterations and len(r.pool) > 1):
        return None
    if r.granularity == "per_iteration" or (r.granularity == "per_batch" and layout.blocks > 1):
        return None
    return (
        f"all images share one draw of teachers (recover.granularity={r.granularity!r}, a class's "
        f"images in one batch); 'per_iteration' draws more often"
    )


def _unread(e: Experiment) -> Iterator[str]:
    """Numbers that somebody stated and nothing reads."""
    r, samplers = e.recover, supervised_by(e)
    subset = "subset" in samplers, "nobody draws a subset (recover.logits_by, statistics_by)"
    votes = "committee" in samplers and r.priors is not None, "no recover.priors vote"
    falls = r.crop_curriculum != "constant", "recover.crop_curriculum is 'constant'"
    meets = "committee" in samplers or r.committee not in sampling.COMMITTEES  # said elsewhere
    for name, (read, why) in {
        "committee": (meets, "nobody is a committee (recover.logits_by, statistics_by)"),
        "subset_others": subset,
        "subset_probability": subset,
        "prior_temperature": votes,
        "crop_milestone": falls,
    }.items():
        value, idle = getattr(r, name), getattr(Recipe, name)
        if not read and value != idle:
            yield (
                f"recover.{name} is {value}, which counts for nothing: {why}; leave it at "
                f"recover.{name}={idle}, or change that"
            )
    if r.roll_centred and not r.roll:
        yield "recover.roll_centred is True, but recover.roll=0 rolls nothing; unset it"


def _statistics(e: Experiment) -> Iterator[str]:
    r, convolutions = e.recover, _convolutions(e)
    if not r.match:
        yield f"recover.match is empty; name one of {', '.join(KINDS)}, or set recover.alpha_bn=0"
    if r.first_layer == "conv" and not convolutions:
        yield (
            "recover.first_layer is 'conv', but recover.match names no statistics of "
            "convolutions; set it to 'bn'"
        )
    if r.drop and not convolutions:
        yield "recover.drop leaves out convolutions, but recover.match names no statistics of them"
    if r.ema_from_zero and not r.ema:
        yield "recover.ema_from_zero is True, but recover.ema=0 averages nothing; unset it"
    if r.class_patch_swapped and not (r.class_share and "patch" in r.match):
        yield (
            "recover.class_patch_swapped exchanges patch statistics of classes, which need "
            "recover.class_share above 0 and 'patch' in recover.match"
        )
    if r.alpha_bn and r.iterations and r.match and not convolutions:
        rows = {name: ARCHITECTURES.get(e.network(name).architecture) for name in r.pool}
        without = [n for n, row in rows.items() if row is not None and not row.batch_norms]
        if without and len(without) == len(rows):
            yield (
                f"recover.pool ({', '.join(rows)}) has no BatchNorm and so no statistics that "
                f"recover.match ({', '.join(r.match)}) names; put a network that has some into "
                f"it, match those of convolutions ({', '.join(OF_CONVOLUTIONS)}) too, or set "
                f"recover.alpha_bn=0"
            )
        elif not r.count_no_bn:
            for name in without:
                yield (
                    f"recover.pool names {name}, which has no BatchNorm and so no statistics to "
                    f"align; leave it out, or set recover.count_no_bn=True to let it count in "
                    f"the mean as the released code does"
                )


def _groups(e: Experiment, layout: Layout | None) -> Iterator[str]:
    """Groups of difficulty: who ranks the images, and what a slot of its own needs."""
    r = e.recover
    start = f"recover.initialise is {r.initialise!r}" if r.initialise in GROUPED else ""
    targets = "recover.targets is 'groups'" if r.targets == "groups" else ""
    if not (start or targets):
        return
    rows = [ARCHITECTURES.get(e.network(name).architecture) for name in r.pool]
    if not any(row is None or row.batch_norms for row in rows):
        yield (
            f"{start or targets}, which ranks real images by the BatchNorms of recover.pool "
            f"({', '.join(r.pool) or 'empty'}); put a network that has some into it"
        )
    if targets and "bn" not in r.match:
        yield (
            f"{targets}, which are those of BatchNorms, and recover.match ({', '.join(r.match)}) "
            f"names none; add bn, or set recover.targets='running'"
        )
    if targets and not (r.alpha_bn and r.iterations):
        yield (
            f"{targets}, and nothing is aligned with them (recover.alpha_bn={r.alpha_bn}, "
            f"recover.iterations={r.iterations}); set recover.targets='running'"
        )
    if targets and layout is not None and layout.slots != 1:
        yield (
            f"{targets}, one for each slot, and a batch holds {layout.slots} slots; set "
            f"recover.slots_per_batch=1"
        )


def _course(e: Experiment, layout: Layout | None) -> Iterator[str]:
    """Views, and phases of other sizes or of more and more images."""
    r = e.recover
    yield from shifted(e, "recover")
    if r.crop_pad is not None and r.crop_curriculum != "constant":
        yield (
            f"recover.crop_pad shifts images, and recover.crop_curriculum={r.crop_curriculum!r} "
            f"resizes crops; unset one of them"
        )
    if r.budget == "early_late":
        if layout is not None and layout.slots != r.ipc:
            yield (
                f"recover.budget is 'early_late', which divides the slots of one batch; it holds "
                f"{layout.slots} of recover.ipc={r.ipc}: set recover.batch_order='class_major'"
            )
        if r.iterations < r.rounds:
            yield f"recover.rounds is {r.rounds}, more than recover.iterations={r.iterations}"
    if r.phase_sizes and min(r.phase_sizes) < 1:
        yield f"recover.phase_sizes is {r.phase_sizes}; its sizes must be positive"
    elif r.phase_sizes:
        if r.budget == "early_late":
            yield "recover.budget='early_late' and recover.phase_sizes cannot be combined"
        if r.phase_sizes[-1] != e.dataset.image_size:
            yield (
                f"recover.phase_sizes ends at {r.phase_sizes[-1]}; the last one must be "
                f"dataset.image_size={e.dataset.image_size}"
            )
        if r.iterations < len(r.phase_sizes):
            yield (
                f"recover.phase_sizes has {len(r.phase_sizes)} phases, more than "
                f"recover.iterations={r.iterations}"
            )
        if "patch" in r.match:
            yield "recover.match names patches, whose number changes with recover.phase_sizes"
    elif r.inject:
        yield f"recover.inject is {r.inject}, but without recover.phase_sizes there is one phase"
    if r.inject_from == "retrieved" and not (r.inject and len(r.phase_sizes) > 1 and r.iterations):
        yield (
            "recover.inject_from is 'retrieved', but nothing is injected; set recover.inject above "
            "0 and recover.phase_sizes to two phases or more, or leave it at 'start'"
        )


def _terms(e: Experiment, layout: Layout | None) -> Iterator[str]:
    """Terms beside logits and statistics, and the perturbation of the primary."""
    r, (logits, _) = e.recover, supervised_by(e)
    phases = r.budget == "early_late" or bool(r.phase_sizes)
    if r.densification:
        if layout is not None and (layout.slots == 1 or r.batch_order != "class_major"):
            yield (
                "recover.densification compares a class's images in one batch: it needs "
                "recover.batch_order='class_major' and several slots in a batch"
            )
        if r.budget == "early_late":
            yield "recover.densification and recover.budget='early_late' cannot be combined"
    if r.flatness and phases:
        yield "recover.flatness averages images over iterations; phases change their shape"
    if r.flatness and not r.alpha_ce:
        yield (
            f"recover.flatness is {r.flatness}, of logits whose weight recover.alpha_ce is 0: it "
            f"counts for nothing; set it to 0, or give them a weight"
        )
    perturbs = bool(r.perturb_rho)
    if perturbs != bool(r.perturb_steps):
        yield (
            f"recover.perturb_rho is {r.perturb_rho} and recover.perturb_steps is "
            f"{r.perturb_steps}; set both or neither"
        )
    if perturbs and logits != "fixed":
        yield f"recover.perturb_rho perturbs the primary, but logits are supervised by {logits!r}"
    if perturbs and phases:
        yield "recover.perturb_rho needs all images from the first iteration on; phases do not"
    for field in ("perturb_probes", "perturb_accumulates"):
        if getattr(r, field) and not perturbs:
            yield f"recover.{field} is True, but recover.perturb_rho=0 perturbs nothing; unset it"


def _optimised(e: Experiment) -> Iterator[str]:
    """What is optimised, and whether anything is optimised for."""
    r, size = e.recover, e.dataset.image_size
    weights = ("alpha_ce", "alpha_bn", "clip", *priors.PRIORS)
    if r.iterations and not any(getattr(r, name) for name in weights):
        yield (
            f"recover.{', '.join(weights)} are all 0: the images are optimised for nothing; "
            f"give one of them a weight, or set recover.iterations=0"
        )
    pyramid = r.parametrisation == "pyramid"
    if pyramid and not r.iterations:
        yield (
            f"recover.parametrisation is 'pyramid', and nothing is optimised "
            f"({_idle(e)}); set it to 'pixels'"
        )
    if r.resolutions and not pyramid:
        yield (
            f"recover.resolutions is {r.resolutions}, those of a pyramid, but "
            f"recover.parametrisation is {r.parametrisation!r}; set it to 'pyramid', or unset them"
        )
    elif r.resolutions:
        if r.phase_sizes:
            yield (
                "recover.resolutions are those of one size, and recover.phase_sizes has several; "
                "leave recover.resolutions unset"
            )
        rising = all(a < b for a, b in zip(r.resolutions, r.resolutions[1:], strict=False))
        if r.resolutions[0] < 1 or not rising or r.resolutions[-1] != size:
            yield (
                f"recover.resolutions is {r.resolutions}; they must rise from 1 or more to "
                f"dataset.image_size={size}, which is the last and the largest"
            )


def _idle(e: Experiment) -> str:
    """Why nothing is optimised."""
    if e.recover.maker == "optimise":
        return "recover.iterations is 0"
    return f"recover.maker is {e.recover.maker!r}"


def _clip(e: Experiment) -> Iterator[str]:
    """The encoder of images and texts that guides."""
    r = e.recover
    if not r.clip:
        if r.clip_directory:
            yield (
                f"recover.clip_directory names {r.clip_directory}, but recover.clip, its weight, "
                f"is 0; set it above 0, or unset the directory"
            )
        return
    if not r.iterations:
        yield (
            f"recover.clip is {r.clip}, and nothing is optimised that it could guide "
            f"({_idle(e)}); set it to 0"
        )
    if not r.clip_directory:
        yield (
            f"recover.clip is {r.clip}; name the directory of its encoders with "
            f"recover.clip_directory=DIR (openai/clip-vit-base-patch32, say)"
        )
    if r.clip_template.count("{}") != 1:
        yield (
            f"recover.clip_template is {r.clip_template!r}; it needs one {{}}, where the class's "
            f"name goes"
        )
    if CLIP_FOLDER in e.squeeze.teachers:
        yield (
            f"squeeze.teachers names {CLIP_FOLDER!r}, which is the name of CLIP's own folder; give "
            f"the teacher another one"
        )


def _asked_for(e: Experiment) -> Iterator[str]:
    """What one teacher is asked for: scores or features of real images."""
    r = e.recover
    if r.initialise in ASKING:
        yield f"recover.initialise is {r.initialise!r}"
    if r.inject_from == "retrieved":
        yield "recover.inject_from is 'retrieved'"
    for control in e.validate.controls:
        if control in SELECTED_CONTROLS:
            yield f"validate.controls names {control}"


def _start(e: Experiment) -> Iterator[str]:
    """Initial images."""
    r, asking = e.recover, list(_asked_for(e))
    if asking and (r.scorer or r.primary) not in e.squeeze.teachers:
        yield (
            f"{asking[0]}, which asks recover.scorer (unset: the primary), "
            f"{r.scorer or r.primary!r}; it is not in squeeze.teachers "
            f"({', '.join(e.squeeze.teachers)})"
        )
    if r.scorer and not asking:
        yield (
            f"recover.scorer is {r.scorer!r}, but recover.initialise={r.initialise!r} asks nobody; "
            f"unset it"
        )
    mosaics = r.initialise in ("mosaic", "mosaic_shuffled")
    needed = needed_images(r.initialise, r.ipc, Patches(r.patch_factor))
    if mosaics and r.patch_factor > e.dataset.image_size:
        yield (
            f"recover.patch_factor is {r.patch_factor}, and images of dataset.image_size="
            f"{e.dataset.image_size} px have no more patches per side than pixels; lower it"
        )
    if mosaics and r.patch_images < needed and r.short_classes == "refuse":
        yield (
            f"recover.patch_images is {r.patch_images}, and mosaics of {r.patch_factor} x "
            f"{r.patch_factor} patches at recover.ipc={r.ipc} are made of {needed} images of every "
            f"class; raise it, or lower recover.ipc or recover.patch_factor"
        )
    if r.initialise == "mosaic_shuffled" and e.dataset.image_size % 2:
        yield "recover.initialise='mosaic_shuffled' needs an even dataset.image_size"
    if r.initialise == "folder" and not r.initialise_from:
        yield (
            "recover.initialise is 'folder'; name the folder of images with "
            "recover.initialise_from=DIR"
        )
    if r.initialise == "folder" and not r.iterations and r.jpeg_quality is not None:
        yield (
            f"recover.jpeg_quality is {r.jpeg_quality}, and would encode images again that "
            f"somebody else made and nothing optimises; set recover.jpeg_quality=None"
        )
    if r.initialise_from and r.initialise != "folder":
        yield (
            f"recover.initialise_from names {r.initialise_from}, but recover.initialise is "
            f"{r.initialise!r}, which reads no folder; set recover.initialise=folder"
        )


def _stated(e: Experiment) -> Iterator[str]:
    """What is said of a set that somebody else made."""
    r = e.recover
    yield from normalisation("recover.initialise_", r.initialise_mean, r.initialise_std)
    if r.initialise_whitening is not None:
        yield from one_of(WHITENING, r.initialise_whitening, WHITENINGS)
    if r.initialise != "folder":
        for name in ("classes", "mean", "std", "whitening"):
            if getattr(r, f"initialise_{name}") is not None:
                yield (
                    f"recover.initialise_{name} says something of the set that "
                    f"recover.initialise_from names, and recover.initialise is {r.initialise!r}, "
                    f"which reads none; leave it unset, or set recover.initialise=folder"
                )
