"""Rules of ``relabel``."""

from __future__ import annotations

from collections.abc import Iterator

from prism_jax.config.rules.common import not_negative, one_of, positive, share, shifted
from prism_jax.config.sections import Experiment
from prism_jax.core import ensemble
from prism_jax.labelling import LabelRecipe


def violations(e: Experiment) -> Iterator[str]:
    """What is wrong with the section, one line each."""
    r = e.relabel
    yield from positive(
        e, "relabel", "epochs", "batch_size", "mix_alpha", "prior_temperature", "bn_group", "top_k"
    )
    yield from not_negative(e, "relabel", "crop_pad")
    yield from share(e, "relabel", "crop_min", low="(")
    yield from shifted(e, "relabel")
    if r.patch_shuffle < 1 or e.dataset.image_size % r.patch_shuffle:
        yield (
            f"relabel.patch_shuffle is {r.patch_shuffle}; it must divide "
            f"dataset.image_size={e.dataset.image_size} into equal bands (1: none)"
        )
    yield from one_of("relabel.ensemble", r.ensemble, ensemble.ENSEMBLES)
    if min(e.validate.batch_size, r.batch_size) > 0 and e.validate.batch_size != r.batch_size:
        yield (
            f"validate.batch_size is {e.validate.batch_size} but relabel.batch_size is "
            f"{r.batch_size}; students train in the batches that were labelled, and "
            f"controls are trained alike: give both the same"
        )
    if r.ensemble == "single" and len(r.teachers) > 1:
        yield (
            f"relabel.ensemble is 'single' but relabel.teachers has {len(r.teachers)}; name one "
            f"teacher or choose another ensemble"
        )
    if r.ensemble == "half_primary" and len(r.teachers) < 2:
        yield "relabel.ensemble is 'half_primary'; relabel.teachers must name two or more"
    if r.ensemble == "committee" and len(r.priors or ()) != len(r.teachers):
        yield (
            f"relabel.ensemble is 'committee' and relabel.priors is {r.priors}; it must "
            f"be {len(r.teachers)} numbers, one per teacher of relabel.teachers: the "
            f"accuracy in percent that each reaches alone"
        )
    if r.ensemble != "committee":
        for name, idle in (("priors", None), ("prior_temperature", LabelRecipe.prior_temperature)):
            if (value := getattr(r, name)) != idle:
                yield (
                    f"relabel.{name} is {value}, but relabel.ensemble is {r.ensemble!r}, in which "
                    f"nobody votes; set it to 'committee', or relabel.{name}={idle}"
                )
    if r.bn_group is not None and r.teacher_mode == "eval":
        yield (
            f"relabel.bn_group is {r.bn_group}, which has no part where relabel.teacher_mode is "
            f"'eval'; set it to 'train', or unset relabel.bn_group"
        )
    if r.top_k is not None and r.top_k >= e.dataset.num_classes:
        yield (
            f"relabel.top_k is {r.top_k}; it must be smaller than dataset.num_classes="
            f"{e.dataset.num_classes}, or unset to keep all"
        )
    if r.labels_from:
        yield from _elsewhere(e)


def _elsewhere(e: Experiment) -> Iterator[str]:
    """Labels that somebody else made."""
    r = e.relabel
    if not e.soft_labels:
        yield (
            f"relabel.labels_from is {r.labels_from}, and with validate.loss='ce' students read "
            f"no soft labels; leave it unset, or choose another validate.loss"
        )
    if r.patch_shuffle > 1:
        yield (
            f"relabel.labels_from is {r.labels_from}, and relabel.patch_shuffle={r.patch_shuffle} "
            f"would shuffle the views of the controls alone; set relabel.patch_shuffle=1"
        )
    if r.labels_from != "set":
        return
    if r.order != "own":
        yield (
            f"relabel.labels_from is 'set', which has an order of its own; relabel.order="
            f"{r.order!r} would be that of the controls alone: set relabel.order='own'"
        )
    if e.recover.initialise != "folder" or e.recover.iterations:
        yield (
            "relabel.labels_from is 'set', the labels that came with imported images; it needs "
            "recover.initialise=folder and recover.iterations=0"
        )
    if r.mix != "none":
        yield (
            "relabel.labels_from is 'set', one label per image, which is not that of mixed images; "
            "set relabel.mix=none"
        )
