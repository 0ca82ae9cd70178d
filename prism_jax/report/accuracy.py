"""Accuracies, DD-Ranking's scores of them, and what they cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from prism_jax.analysis import ranking, words
from prism_jax.analysis.page import Cell, Table, figure, word
from prism_jax.analysis.words import SYNTHETIC
from prism_jax.config.sections import Validate
from prism_jax.core.augment import Augment
from prism_jax.report import costs
from prism_jax.report.finished import Run
from prism_jax.report.gathered import Gathered, points, student_names, thousandths, top1_of
from prism_jax.stages import relabel


def lead(runs: Sequence[Run]) -> str:
    """What the accuracies are, and what their spread is over."""
    notes = dict.fromkeys(words.spread_note(run.summary) for run in runs)
    return f"Top-1 on real test images in per cent, after the last epoch: {'; '.join(notes)}."


def accuracies(g: Gathered) -> Table:
    """Every run's sets, controls beside the synthetic one."""
    students = student_names(g.runs)
    rows = []
    for run in g.runs:
        for of, entries in run.sets().items():
            cells = [word(run.name), word(words.row_label(of)), word(words.ipc(run.summary))]
            if of == "full_real":
                cells[2] = Cell(words.UNKNOWN, None)
            for student in students:
                entry = entries.get(student)
                cells.append(Cell(words.accuracy(entry), entry["top1"] if entry else None))
            rows.append(cells)
    by_protocol: dict[str, list[str]] = {}
    for run in g.runs:
        if how := words.protocol(run.summary):
            by_protocol.setdefault(how, []).append(run.name)
    alike = len(by_protocol) == 1
    trained = [
        f"Trained with {how}." if alike else f"{', '.join(of)}: trained with {how}."
        for how, of in by_protocol.items()
    ]
    return Table("", ["run", "trained on", "IPC", *students], rows, " ".join(trained))


def scores(g: Gathered) -> Table | None:
    """DD-Ranking's scores, where the students that they need were trained."""
    rows = []
    for run in g.runs:
        plain = _plain_twin(g, run)
        for student in words.students(run.summary):
            top1 = {of: top1_of(run, of, student) for of in run.sets()}
            control = "random_real" if run.config.soft_labels else "random_real_hard"
            made, random = top1.get(SYNTHETIC), top1.get(control)
            hard = top1.get("synthetic_hard") if run.config.soft_labels else made
            full = top1.get("full_real")
            if made is None or random is None:
                continue
            label = augmented = None
            if full is not None and hard is not None:
                label = ranking.label_robust(
                    full_hard=full, made_hard=hard, made=made, random=random
                )
            if plain is not None:
                made_plain = top1_of(plain, SYNTHETIC, student)
                random_plain = top1_of(plain, control, student)
                if made_plain is not None and random_plain is not None:
                    augmented = ranking.augmentation_robust(
                        made=made, random=random, made_plain=made_plain, random_plain=random_plain
                    )
            if label is None and augmented is None:
                continue
            rows.append([
                word(run.name), word(student),
                figure(label and label.improvement, points),
                figure(label and label.recovery, points),
                figure(label and label.score.value, thousandths),
                figure(label and label.score.as_released, thousandths),
                figure(augmented and augmented.value, thousandths),
                figure(augmented and augmented.as_released, thousandths),
            ])  # fmt: skip
    if not rows:
        g.notes.append(
            "DD-Ranking's scores: left out. The label-robust one needs the controls random_real, "
            "full_real and synthetic_hard (validate.controls), the augmentation-robust one also a "
            "run of the same images without views (docs/report.md)."
        )
        return None
    heads = ["run", "student", "IOR", "HLR", "LRS", "LRS as released", "ARS", "ARS as released"]
    return Table(
        "DD-Ranking",
        heads,
        rows,
        "IOR: points above as many random real images. HLR: points below the full real set, both "
        "with hard labels. LRS, ARS: the scores of accuracies as fractions, 0.269 where nothing "
        "is gained or lost. As released: the package's, which takes per cents and so ends near "
        "-0.157, or leaves the scale.",
    )


def _plain_twin(g: Gathered, run: Run) -> Run | None:
    """A run of the same images and training, whose students see the images as they are."""
    if _is_plain(relabel.augment_of(run.config)):
        return None
    for other in g.runs:
        alike = other.manifest["digest"] == run.manifest["digest"]
        alike &= _trained_by(other) == _trained_by(run)
        alike &= _labelled_by(other) == _labelled_by(run)
        if alike and _is_plain(relabel.augment_of(other.config)):
            return other
    return None


def _labelled_by(run: Run) -> tuple[Any, ...]:
    """Who labels, and how exactly; views apart."""
    of = run.config.relabel
    if not run.config.soft_labels:
        return (False,)
    asked = (of.teachers, of.ensemble, of.teacher_mode, of.bn_group, of.priors, of.labels_from)
    read = (of.epochs, of.batch_size, of.prior_temperature, of.dtype)
    return (True, *asked, *read, of.precision, of.top_k)


def _trained_by(run: Run) -> Validate:
    """How students are trained; which, on what beside the set, and how often tested, apart."""
    apart: dict[str, Any] = {"students": (), "seeds": (), "controls": (), "eval_every": 1}
    return dataclasses.replace(run.config.validate, checkpoint_seconds=0, **apart)


def _is_plain(views: Augment) -> bool:
    """Whether every view is the image itself."""
    crops = not views.crop_pad if views.crop_pad is not None else views.crop_min == 1
    return crops and not views.flip and views.mix == "none" and views.patch_shuffle == 1


def cost_tables(g: Gathered) -> list[Table]:
    """Work by stage, and bytes, beside the accuracy of the first student."""
    work, taken = [], []
    student = next(iter(student_names(g.runs)), None)
    for run in g.runs:
        top1 = top1_of(run, SYNTHETIC, student) if student else None
        accuracy = figure(top1, words.percent)
        by_stage = costs.stages(run)
        work.append([
            word(run.name), accuracy,
            *(figure(by_stage[stage].seconds, words.seconds) for stage in costs.STAGES),
            *(figure(by_stage[stage].flop, _flop) for stage in costs.STAGES),
        ])  # fmt: skip
        size = costs.bytes_of(run)
        rate = 100 * top1 / (size.whole / 1e6) if top1 and size.whole else None
        taken.append([
            word(run.name), word("synthetic"), accuracy, figure(size.images, words.size),
            figure(size.labels, words.size), figure(size.share, _share),
            figure(rate, words.number),
        ])  # fmt: skip
    real = costs.bytes_of(g.first).real
    full = top1_of(g.first, "full_real", student) if student else None
    if real:
        taken.append([
            word(g.first.name), word(words.row_label("full_real")), figure(full, words.percent),
            figure(real, words.size), figure(0.0, words.size), figure(1.0, _share),
            figure(full and 100 * full / (real / 1e6), words.number),
        ])  # fmt: skip
    head = f"{student}, %" if student else "top-1, %"
    stages = list(costs.STAGES)
    return [
        Table("Work", ["run", head, *stages, *(f"{s}, FLOP" for s in stages)], work,
              "Seconds of squeeze: the networks that made images and labels, a generator among "
              "them; imported ones cost nothing. Its FLOP: teachers that supervise or label."),
        Table("Bytes",
              ["run", "set", head, "images", "soft labels", "of the real set", "% per MB"], taken),
    ]  # fmt: skip


def _flop(value: float) -> str:
    return words.large(value)


def _share(value: float) -> str:
    return words.percent(value, digits=2, sign=" %")
