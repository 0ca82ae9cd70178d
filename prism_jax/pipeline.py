"""The five stages in order: what is missing is done, what is there is kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from prism_jax import parallel
from prism_jax.config import STAGES
from prism_jax.config.generation import CLIP_FOLDER, FOLDER
from prism_jax.data import workdir
from prism_jax.data.weights import RECORD
from prism_jax.errors import UserError
from prism_jax.stages import (
    analyse,
    anchoring,
    controls,
    fingerprints,
    generator,
    guiding,
    imported,
    recover,
    relabel,
    squeeze,
    statistics,
    validate,
)
from prism_jax.stages.context import Context, LabelledSet
from prism_jax.stages.makers import maker_of, start
from prism_jax.stages.relabel import Labels


def run(context: Context, stages: Sequence[str] = STAGES) -> None:
    """Run stages, in their order, each only where something is missing.

    Raises:
      UserError: a person's mistake; Interrupted: a stop was requested. Both leave everything
        finished in place.
    """
    check(context)
    context.work.agree(
        "real images",
        lambda: workdir.digest(fingerprints.real_images(context)),
        "its copy is not whole, or another. Compare the two, and copy it again",
    )
    context.work.agree(
        "devices or libraries",
        lambda: _machine(context.provenance),
        "it has {mine}, and process 0 {told}. Start them with one environment on hosts of one kind",
    )
    for stage in STAGES:
        if stage in stages:
            RUNNERS[stage](context)


LIBRARIES = ("prism_jax", "jax", "jaxlib", "flax", "optax")  # that decide bits


def _machine(provenance: Mapping[str, Any]) -> str:
    """What of a machine and its libraries decides bits."""
    if not provenance:
        return ""
    found, versions = provenance["machine"], provenance["versions"]
    on_cpu = found["platform"] == "cpu"  # whose thread pool counts, and no other's
    kind = (
        ["cpu", f"NPROC={found['nproc']}"] if on_cpu else [found["device_kind"], found["runtime"]]
    )
    libraries = [f"{name} {versions[name]}" for name in LIBRARIES]
    return ", ".join([*kind, f"float32 as {found['float32']}", *libraries])


def check(context: Context) -> None:
    """Refuse, before any work, what cannot be run here.

    Images that do not fit or are too few, teachers that do not read them, more devices than there
    are, a workdir that holds teachers or images of other settings, and a source that is no workdir.
    """
    check_source(context)
    limits = {
        "train_devices": "leave it unset, which means as many as share a batch",
        "recover_devices": "set it to 1, which gives every device a batch of its own",
    }
    for field, otherwise in limits.items():
        wanted, there = getattr(context.config.parallel, field), parallel.local_devices()
        if wanted and parallel.sharing_devices() < wanted <= there:
            context.say(
                f"warning: parallel.{field} is {wanted}, and on a TPU slice of several hosts the "
                f"compiler may refuse programs that communicate among a part of it: {otherwise}"
            )
        if wanted and wanted > there:
            raise UserError(
                f"parallel.{field} is {wanted}, but this process has {there} device(s); lower it "
                f"or {otherwise}"
            )
    if generator.wanted(context):
        generator.check(context)
    if guiding.wanted(context):
        guiding.check(context)
    context.networks.check()
    start.check(context)
    squeeze.pending(context)
    if recover.pending(context):
        maker_of(context.config).check(context)
    imported.check(context)
    imported.check_labels(context)


def _squeeze(context: Context) -> None:
    generates = generator.wanted(context)
    if generates and not generator.is_done(context):  # first: what is read may not be whole
        squeeze.check_weights(context)
        size = context.config.generate.fit.batch_size
        with parallel.enough_memory(f"Lower generate.fit.batch_size (now {size})."):
            generator.run(context)
    if squeeze.pending(context):
        squeeze.run(context)
    if not statistics.is_done(context):
        squeeze.check(context)
        statistics.run(context)
    if generates and not generator.is_measured(context):
        with parallel.enough_memory(_fewer_at_once(context)):
            generator.measure(context)
    if guiding.wanted(context) and not guiding.is_done(context):
        guiding.run(context)


def _recover(context: Context) -> None:
    if not recover.is_done(context):
        squeeze.check(context)
        recover.run(context)
    else:
        recover.say_kept(context)
    read = [name for name in anchoring.controls_of(context) if _reads(context, name)]
    with parallel.enough_memory(_fewer_at_once(context)):
        anchoring.run_controls(context, read)


def _reads(context: Context, name: str) -> bool:
    """Whether something that is not finished reads the images of a generated control."""
    labelled = controls.labelled_set(context, name)
    if validate.pending(context, labelled):
        return True
    written = controls.is_written(context, labelled) and relabel.is_done(context, labelled)
    return labelled.soft and not written


def _fewer_at_once(context: Context) -> str:
    return f"Lower generate.batch_size (now {context.config.generate.batch_size})."


def _relabel(context: Context) -> None:
    with parallel.shared_programs():  # of all sets of a size
        for labelled in sets(context):
            _relabel_one(context, labelled)


def _relabel_one(context: Context, labelled: LabelledSet) -> None:
    if labelled.name == "synthetic" and (labelled.soft or validate.pending(context, labelled)):
        imported.say_top1(context, labelled, functools.partial(fingerprints.pool, context))
    if not labelled.soft:
        return
    if labelled.name != "synthetic":
        controls.write(context, labelled)
    if not relabel.is_done(context, labelled):
        squeeze.check(context)
        relabel.run(context, labelled)


def _validate(context: Context) -> None:
    found = list(sets(context))

    def missing() -> list[tuple[str, str, int]]:
        return [(s.name, *pair) for s in found for pair in validate.pending(context, s)]

    if not missing():
        return
    squeeze.check(context)  # labels may be made while students train
    labels: dict[str, Labels] = {}

    def labels_of(labelled: LabelledSet) -> Labels | None:
        """Opened once: for what is pending, and what others see pending and deal out."""
        if labelled.soft and labelled.name not in labels:
            with relabel.setting_aside(context, labelled):
                labels[labelled.name] = relabel.open_labels(context, labelled)
        return labels.get(labelled.name)

    for labelled in found:  # what cannot be read is refused before anything is written
        if validate.pending(context, labelled):
            labels_of(labelled)
    pairs, augment = validate.students(context), relabel.augment_of(context.config)
    mine = context.work.deal(
        "validate", [(s.name, *pair) for s in found for pair in pairs], missing
    )
    for labelled in found:
        if todo := [pair for pair in pairs if (labelled.name, *pair) in mine]:
            with relabel.setting_aside(context, labelled):
                validate.run(context, labelled, labels_of(labelled), augment, todo)
    context.work.wait(lambda: not missing())


def _analyse(context: Context) -> None:
    labelled = {found.name: found for found in sets(context)}
    if parallel.is_main() and not analyse.is_done(context, labelled):
        analyse.run(context, labelled)
    context.work.wait(lambda: analyse.is_done(context, labelled))


RUNNERS: dict[str, Callable[[Context], None]] = {
    "squeeze": _squeeze,
    "recover": _recover,
    "relabel": _relabel,
    "validate": _validate,
    "analyse": _analyse,
}


def summarise(context: Context, provenance: Mapping[str, Any]) -> None:
    """Write the summary, where it does not say already what the workdir holds, and show it."""
    if not parallel.is_main():
        return
    found = {s.name: s for s in sets(context)} if recover.is_done(context) else {}
    if not analyse.is_summarised(context, found):
        analyse.write_summary(context, found, provenance)
    analyse.show_summary(context)


def sets(context: Context) -> Iterator[LabelledSet]:
    """The synthetic set, then the controls."""
    yield recover.synthetic_set(context)
    for name in context.config.validate.controls:
        yield controls.labelled_set(context, name)


# --- adopting finished work -----------------------------------------------------------------


def check_source(context: Context) -> None:
    """Refuse to adopt from what is no other workdir.

    Raises:
      UserError: the source is no workdir, or is this workdir.
    """
    if (source := context.source) is None:
        return
    if source.resolve() == context.root.resolve():
        raise UserError(f"--from={source} is the working directory itself; name another one")
    if not (source / "squeeze").exists() and not (source / "recover").exists():
        raise UserError(
            f"--from={source} is no working directory of a run: it has neither squeeze/ nor "
            f"recover/"
        )


def adopt(context: Context, source: epath.PathLike) -> list[str]:
    """Copy from another workdir everything finished that fits this experiment.

    A folder fits when its fingerprint is the one this experiment would write. What is already
    here is kept.

    Returns:
      The adopted folders, relative to the workdir.
    """
    source = epath.Path(source)
    adopted: list[str] = []

    def take(relative: str, fields: dict, done: str) -> None:
        theirs, ours = source / relative, context.root / relative
        if workdir.offers(theirs, ours, fields, done):
            context.work.acquire()
            workdir.copy_tree(theirs, ours)
            adopted.append(relative)

    for name in context.config.squeeze.teachers:
        take(f"squeeze/{name}", fingerprints.teacher(context, name), RECORD)
    if generator.wanted(context):
        take(f"squeeze/{FOLDER}", fingerprints.generator(context), RECORD)
    if guiding.wanted(context):
        take(f"squeeze/{CLIP_FOLDER}", fingerprints.clip_texts(context), RECORD)
    made = [name for name in anchoring.needed(context) if name != "latents"]
    for name in (*made, *anchoring.controls_of(context)):
        take(f"generate/{name}", anchoring.FINGERPRINTS[name](context), RECORD)
    if "latents" in anchoring.missing(context):  # many gigabytes, where images are large
        take("generate/latents", fingerprints.latents(context), RECORD)
    take("recover", fingerprints.recover(context), "manifest.json")
    if recover.is_done(context):  # not so while a run that was stopped in recover goes on
        _adopt_set(context, recover.synthetic_set(context), take)
    for name in context.config.validate.controls:
        _adopt_set(context, controls.labelled_set(context, name), take)
    return adopted


def _adopt_set(context: Context, labelled: LabelledSet, take: Callable) -> None:
    base = "" if labelled.name == "synthetic" else f"controls/{labelled.name}/"
    if labelled.soft:
        take(f"{base}relabel", fingerprints.relabel(context, labelled), relabel.DONE)
    for student in context.config.validate.students:
        for seed in context.config.validate.seeds:
            fields = fingerprints.validate(context, labelled, student, seed)
            take(f"{base}validate/{student}/{seed}", fields, RECORD)
