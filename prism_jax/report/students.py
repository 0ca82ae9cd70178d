"""How the students of the runs do on real test images: by class, and by how sure they are."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np

from prism_jax.analysis import charts, figures, words
from prism_jax.analysis.calibration import most_confused
from prism_jax.analysis.page import Cell, Picture, Table, figure, word
from prism_jax.analysis.words import SYNTHETIC
from prism_jax.report import measures
from prism_jax.report.gathered import Gathered, points, student_names, top1_of
from prism_jax.report.measures import Predictions, Real

Said = Mapping[tuple[str, str, str], Predictions]  # by run, set and student


def all_predictions(g: Gathered, test: Real) -> dict[tuple[str, str, str], Predictions]:
    """Predictions by (run, set, student); what is lacking or disagrees goes to the notes."""
    found, gone = {}, []
    for run in g.runs:
        for of, entries in run.sets().items():
            for student in entries:
                said = measures.predictions(run, of, student, test)
                if said is None:
                    gone.append(f"{run.name} ({words.row_label(of)}, {student})")
                    continue
                found[run.name, of, student] = said
                stated = top1_of(run, of, student)
                counts = said.reliability.count_B
                top1 = float(np.nansum(counts * said.reliability.accuracy_B) / counts.sum())
                whole = len(test.labels_N) == test.total
                if whole and stated is not None and abs(top1 - stated) > 0.005:
                    g.notes.append(
                        f"{run.name}: the students of {words.row_label(of)} ({student}) have "
                        f"{words.percent(top1)} % here and {words.percent(stated)} % in the run's "
                        f"summary. Were the real images changed since?"
                    )
    if gone:
        g.notes.append(
            f"Confusions and calibration: left out where checkpoints of students are gone, of "
            f"{', '.join(gone)}."
        )
    return found


def class_parts(g: Gathered) -> list[Picture | Table]:
    """Accuracy by class, drawn for the first student and listed for all."""
    columns: dict[str, np.ndarray] = {}
    drawn: dict[str, np.ndarray] = {}
    names = student_names(g.runs)
    first = next(iter(names), None)
    for run in g.runs:
        for student, entry in run.sets().get(SYNTHETIC, {}).items():
            if entry.get("per_class") is None:
                continue
            values_K = np.array([np.nan if x is None else x for x in entry["per_class"]])
            columns[f"{run.name}, {student}" if len(names) > 1 else run.name] = values_K
            if student == first:
                drawn[run.name] = values_K
    if not drawn:
        return []
    reference = g.first.sets().get("random_real", {}).get(first or "", {}).get("per_class")
    references = []
    if reference is not None:
        references = ["random real images"]
        values = [np.nan if x is None else x for x in reference]
        drawn[references[0]] = np.array(values)
    ranked_by = next(iter(drawn))
    rows = [
        [word(g.names_K[k]), *(figure(_unless_nan(v[k]), words.percent) for v in columns.values())]
        for k in range(len(g.names_K))
    ]
    return [
        Picture(
            "accuracy_by_class", "Accuracy by class",
            f"Top-1 of {first}, mean over seeds; dashed: the mean over classes.",
            figures.in_forms(
                charts.by_class, {f"top-1 of {first}": drawn}, references, g.names_K,
                order_by=ranked_by, percent=True,
            ),
        ),
        Table("Top-1 of every class", ["class", *columns], rows, "In per cent, mean over seeds."),
    ]  # fmt: skip


def _unless_nan(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def confusion_parts(g: Gathered, said: Said) -> list[Picture | Table]:
    """What classes are taken for by the first student of every run."""
    first = next(iter(student_names(g.runs)), "")
    found = {
        run.name: said[run.name, SYNTHETIC, first].confusion_KK
        for run in g.runs
        if (run.name, SYNTHETIC, first) in said
    }
    if not found:
        return []
    rows = [
        [word(name), word(g.names_K[c.of]), word(g.names_K[c.taken_for]),
         figure(c.share, words.percent)]
        for name, share_KK in found.items()
        for c in most_confused(np.array(share_KK))
    ]  # fmt: skip
    picture = Picture(
        "confusions", "Confusions",
        f"Shares of a class' test images, in per cent, that {first} takes for each class.",
        figures.in_forms(charts.confusions, found, g.names_K),
    )  # fmt: skip
    table = Table("Most frequent mistakes", ["run", "class", "taken for", "of its images, %"], rows)
    return [picture, table] if rows else [picture]


def calibration_parts(g: Gathered, said: Said) -> list[Picture | Table]:
    """Whether students' probabilities mean what they say."""
    if not said:
        return []
    drawn: dict[str, dict[str, Any]] = {}
    references: dict[str, None] = {}
    rows = []
    for (run, of, student), found in said.items():
        label = run if of == SYNTHETIC else f"{run}: {words.row_label(of)}"
        if of == SYNTHETIC or (run == g.first.name and of in ("random_real", "full_real")):
            label = label if of == SYNTHETIC else words.row_label(of)
            drawn.setdefault(student, {})[label] = found.reliability
            if of != SYNTHETIC:
                references[label] = None
        error = statistics.fmean(found.errors)
        spread = f" ± {100 * statistics.stdev(found.errors):.1f}" if len(found.errors) > 1 else ""
        over = found.reliability.overconfidence
        rows.append([
            word(run), word(words.row_label(of)), word(student),
            Cell(f"{words.percent(error)}{spread}", error), figure(over, points),
        ])  # fmt: skip
    return [
        Picture(
            "reliability", "Calibration",
            "How often students are right, over how sure they are, all seeds together; a dot's "
            "area is the share of the predictions. Below the diagonal they are too sure.",
            figures.in_forms(charts.reliabilities, drawn, list(references)),
        ),
        Table(
            "Calibration error", ["run", "trained on", "student", "error, %", "too sure, points"],
            rows, "Expected calibration error with 15 bins of equal width, mean over seeds.",
        ),
    ]  # fmt: skip
