"""The parts of the page, in their order, and what is said where one cannot be made."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from prism_jax.analysis import report, words
from prism_jax.analysis.page import Section
from prism_jax.analysis.words import SYNTHETIC
from prism_jax.errors import UserError
from prism_jax.report import accuracy, features, measures, pictures, students, teachers
from prism_jax.report.finished import Run
from prism_jax.report.gathered import Gathered, Options, chosen, class_names, student_names
from prism_jax.report.measures import Real


def sections(
    runs: list[Run], options: Options, say: Callable[[str], None] = lambda text: None
) -> tuple[list[Section], list[str]]:
    """Make every part that can be made.

    Args:
      runs: of one data set.
      options: what a person chose.
      say: is told what is worked on.

    Returns:
      The sections, and what a reader must know: one sentence for all that is left out.

    Raises:
      UserError: a network or a class that is not there.
    """
    g = Gathered(runs, options, class_names(runs[0]), [])
    if options.network is not None:
        measures.network_of(runs[0], options.network)
    chosen(g, pictures.ROWS)
    found: list[Section] = []

    def attempt(what: str, make: Callable[[], Any]) -> Any:
        say(what)
        try:
            return make()
        except UserError as error:
            g.notes.append(f"{what}: left out. {error}")
            return None

    def add(title: str, lead: str, parts: Sequence[tuple[str, Callable[[], Any]]]) -> None:
        made = [attempt(what, make) for what, make in parts]
        shown = [part for part in _flattened(made) if part is not None]
        if shown:
            found.append(Section(title, lead, shown))

    real: dict[str, Real] = {}
    for split in ("train", "test"):
        look = functools.partial(
            measures.real_images, runs[0], split, most=options.most, seed=options.seed
        )
        read = attempt(f"real images ({split})", look)
        if read is not None:
            real[split] = read
            if len(read.labels_N) < read.total:
                but = (
                    ", but for nearness and copies, which are of all"
                    if read.whole is not None
                    else ""
                )
                g.notes.append(
                    f"Of the {read.total:,} real images of the {split} split "
                    f"{len(read.labels_N):,} were looked at, as many of each class (--images){but}."
                )
    for run in runs:
        if run not in g.distinct:
            g.notes.append(
                f"{run.name} has the images of an earlier run, and stands only where students or "
                f"costs are shown."
            )
    test = real.get("test")
    said = (
        {} if test is None else attempt("students", lambda: students.all_predictions(g, test)) or {}
    )

    add("Accuracy", accuracy.lead(runs), [
        ("accuracies", lambda: accuracy.accuracies(g)),
        ("scores", lambda: accuracy.scores(g)),
    ])  # fmt: skip
    add("Cost",
        "Seconds are those of the machine that made it, of the synthetic set without controls. "
        "FLOP are those of the networks' passes (forward 1, backward to pixels 1 more, to weights "
        "2 more), counted by XLA before it optimises. Bytes are decoded pixels and soft labels as "
        "stored; a real set of as few bytes is what a set competes with.",
        [("costs", lambda: accuracy.cost_tables(g))])  # fmt: skip
    add("Images", "Every result stands beside the image that it began as, where it began as one.", [
        ("the grid", lambda: pictures.grid(g)),
        ("the strips", lambda: pictures.strips(g)),
    ])  # fmt: skip
    if real.keys() == {"train", "test"}:
        around = attempt("features", lambda: features.surroundings(g, real["train"], real["test"]))
        if around is not None:
            network, near, sets = around
            add("Diversity and likeness", features.lead(g, network), [
                ("cosines", lambda: features.cosines(g, network, sets)),
                ("UMAP", lambda: features.plane(g, network, near, sets)),
                ("likeness", lambda: features.likeness_table(network, sets)),
            ])  # fmt: skip
    add("Students", "How the students that learned from a set do on real test images.", [
        ("accuracy by class", lambda: students.class_parts(g)),
        ("confusions", lambda: students.confusion_parts(g, said)),
        ("calibration", lambda: students.calibration_parts(g, said)),
    ])  # fmt: skip
    add("Teachers", "What supervised and what labels the images.", [
        ("losses", lambda: teachers.losses(g)),
        ("agreement", lambda: None if test is None else teachers.agreements(g, test)),
    ])  # fmt: skip
    return found, g.notes


def title(runs: Sequence[Run]) -> str:
    """What the page is of."""
    return runs[0].name if len(runs) == 1 else f"{len(runs)} runs on {runs[0].config.dataset.name}"


def subtitle(runs: Sequence[Run]) -> str:
    """Which runs they are, in a line."""
    return "; ".join(
        words.title(run.summary) if len(runs) == 1 else f"{run.name}: {words.title(run.summary)}"
        for run in runs
    )


def headline(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """The numbers at the top: one run's, or the first student's of each."""
    if len(runs) == 1:
        return report.headline(runs[0].summary)
    student = next(iter(student_names(runs)), None)
    return [
        (f"{words.accuracy(entry)} %", f"top-1 of {student}, {run.name}")
        for run in runs[:4]
        if student and (entry := run.sets().get(SYNTHETIC, {}).get(student)) and entry["top1"]
    ]


def _flattened(parts: Any) -> Iterator[Any]:
    for part in parts:
        if isinstance(part, list):
            yield from part
        else:
            yield part
