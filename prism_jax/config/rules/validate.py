"""Rules of ``validate``."""

from __future__ import annotations

from collections.abc import Iterator

from prism_jax import training
from prism_jax.config.layout import bn_group_of
from prism_jax.config.rules.common import (
    not_negative,
    one_of,
    passed_over,
    positive,
    repeated,
    seed,
    share,
)
from prism_jax.config.sections import (
    ANCHOR_CONTROLS,
    CONTROLS,
    GENERATED_CONTROLS,
    HARD_CONTROL,
    SELECTED_CONTROLS,
    Experiment,
)
from prism_jax.core import batching, losses, schedules
from prism_jax.models import ARCHITECTURES


def violations(e: Experiment) -> Iterator[str]:
    """What is wrong with the section, one line each."""
    v = e.validate
    yield from positive(
        e, "validate", "epochs", "batch_size", "accumulate", "learning_rate", "temperature",
        "gamma", "eval_every", "checkpoint_seconds",
    )  # fmt: skip
    yield from share(e, "validate", "warmup_start", low="(")
    yield from not_negative(e, "validate", "weight_decay", "ce_weight")
    yield from seed("validate.seeds", *v.seeds)
    if not v.seeds or repeated(v.seeds):
        yield f"validate.seeds is {v.seeds}; it must be one or more different numbers"
    yield from one_of("validate.loss", v.loss, losses.STUDENT_LOSSES)
    yield from one_of("validate.optimiser", v.optimiser, training.OPTIMISERS)
    yield from one_of("validate.schedule", v.schedule, schedules.SCHEDULES)
    yield from _controls(e)
    yield from _schedule(e)
    if not 0 <= v.momentum < 1:
        yield f"validate.momentum is {v.momentum}; it must be in [0, 1)"
    for name, read, why in (
        ("momentum", v.optimiser == "sgd", f"validate.optimiser is {v.optimiser!r}, not 'sgd'"),
        ("warmup_start", v.warmup_epochs, "validate.warmup_epochs is 0"),
    ):
        if not read:
            usual = getattr(training.TrainRecipe, name)
            passed_over(f"validate.{name}", getattr(v, name), usual, why)
    if v.nesterov and (v.optimiser != "sgd" or not v.momentum):
        yield (
            f"validate.nesterov needs validate.optimiser='sgd' with momentum, not "
            f"{v.optimiser!r} with {v.momentum}"
        )
    if v.ema is not None and not 0 < v.ema < 1:
        yield f"validate.ema is {v.ema}; it must be between 0 and 1, or unset"
    if v.ema is None and not v.ema_statistics:
        yield (
            "validate.ema_statistics is False, which has no part where validate.ema is unset; set "
            "validate.ema, or leave it True"
        )
    if v.batch_size > 0 and v.accumulate > 0:
        yield from batch(e)
        if e.recover.ipc > 0 and e.dataset.num_classes > 0:
            yield from _alone(e)


def _controls(e: Experiment) -> Iterator[str]:
    v, known = e.validate, (*CONTROLS, HARD_CONTROL, *SELECTED_CONTROLS, *GENERATED_CONTROLS)
    for control in v.controls:
        yield from one_of("validate.controls", control, known)
        if control in GENERATED_CONTROLS and e.recover.maker != "generate":
            yield f"validate.controls names {control}, and recover.maker is not 'generate'"
        elif control in ANCHOR_CONTROLS and e.generate.anchors == "none":
            yield f"validate.controls names {control}, and generate.anchors is 'none'"
    for control in repeated(v.controls):
        yield f"validate.controls names {control} twice"
    if HARD_CONTROL in v.controls and not e.soft_labels:
        yield (
            f"validate.controls names {HARD_CONTROL}, and with validate.loss='ce' the synthetic "
            f"set itself has hard labels; leave it out"
        )
    soft = [c for c in v.controls if c == "random_real" or c in SELECTED_CONTROLS]
    if soft and not e.soft_labels:
        others = ",".join(c for c in v.controls if c not in soft) or "()"
        yield (
            f"validate.controls names {', '.join(soft)}, whose labels are soft, and with "
            f"validate.loss='ce' no set has such; leave it out: --config.validate.controls={others}"
        )


def _schedule(e: Experiment) -> Iterator[str]:
    v = e.validate
    if v.schedule in schedules.SCHEDULES:
        takes = schedules.values_of(v.schedule)
        for name in ("zeta", "milestones", "gamma"):
            if getattr(v, name) is not None and name not in takes:
                yield (
                    f"validate.{name} is {getattr(v, name)}, but the schedule {v.schedule} has "
                    f"none; leave it unset, or choose another validate.schedule"
                )
    if v.schedule == "multistep" and not v.milestones:
        yield (
            "validate.schedule is 'multistep'; validate.milestones must say at which fractions of "
            "the run, such as (0.8, 0.9)"
        )
    marks = (0.0, *(v.milestones or ()), 1.0)
    if any(after <= before for before, after in zip(marks, marks[1:], strict=False)):
        yield (
            f"validate.milestones is {v.milestones}; it must be rising fractions of the run, "
            f"between 0 and 1"
        )
    if v.zeta is not None and v.zeta < 1:
        yield f"validate.zeta is {v.zeta}; it must be 1 or more runs"
    if not 0 <= v.warmup_epochs < v.epochs:
        yield (
            f"validate.warmup_epochs is {v.warmup_epochs}; it must be zero or positive, and below "
            f"validate.epochs={v.epochs}"
        )


def batch(e: Experiment) -> Iterator[str]:
    """How a batch divides into parts and BatchNorm groups."""
    v = e.validate
    part, rest = divmod(v.batch_size, v.accumulate)
    if rest:
        yield (
            f"validate.batch_size {v.batch_size} does not divide into "
            f"validate.accumulate={v.accumulate} equal parts"
        )
    elif isinstance(v.bn_group, str) and v.bn_group != "all":
        yield f"validate.bn_group is {v.bn_group!r}; it must be a number of images, 'all', or unset"
    elif v.bn_group == "all" and v.accumulate > 1:
        yield (
            f"validate.bn_group is 'all', one BatchNorm group over the whole batch, which "
            f"validate.accumulate={v.accumulate} parts, one after the other, cannot share; set "
            f"validate.accumulate=1, or a group of at most {part} images"
        )
    elif isinstance(v.bn_group, int) and (v.bn_group <= 0 or part % v.bn_group):
        allowed = [g for g in range(1, part + 1) if part % g == 0]
        yield (
            f"validate.bn_group is {v.bn_group}; batch_size / accumulate = {part} images must be "
            f"whole groups: {', '.join(map(str, allowed))}"
        )


def _alone(e: Experiment) -> Iterator[str]:
    """An image that would be a BatchNorm group of its own: what it is normalised to is noise."""
    v, images = e.validate, e.recover.ipc * e.dataset.num_classes
    names = v.students + (e.relabel.teachers if e.relabel.teacher_mode == "train" else ())
    rows = {name: ARCHITECTURES.get(e.network(name).architecture) for name in names}
    normed = [name for name, row in rows.items() if row is not None and row.batch_norms]
    if not normed:
        return
    if bn_group_of(v) == 1 or e.relabel.bn_group == 1:
        yield (
            f"BatchNorm groups of one image (validate.bn_group={v.bn_group}, batch_size / "
            f"accumulate = {v.batch_size // v.accumulate}, relabel.bn_group={e.relabel.bn_group}) "
            f"have no variance, and {normed[0]} has BatchNorms; make groups of two or more"
        )
    elif batching.sizes(images, v.batch_size)[-1] == 1:
        near = sorted(range(2, images + 1), key=lambda b: (abs(b - v.batch_size), b))
        good = [b for b in near if images % b != 1 and b % v.accumulate == 0][:3]
        yield (
            f"validate.batch_size is {v.batch_size}, which leaves one of the {images} images in a "
            f"batch of its own, and {normed[0]} has BatchNorms, which one image gives no variance; "
            f"set it and relabel.batch_size to {' or '.join(map(str, sorted(good)))}"
        )
