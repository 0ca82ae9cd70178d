"""What the sets of a comparison cost, beside the accuracies that they give."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from prism_jax.analysis.cells import Entry, label_of, mean, of
from prism_jax.analysis.words import SYNTHETIC, UNKNOWN, number, of_fewer, percent, seconds, size

STAGES = ("squeeze", "recover", "relabel")  # that make a set
NOTE = (
    "Seconds are means over seeds, as measured, with compiling: squeeze of the networks that made "
    "images and labels (unknown where one was imported), recover and relabel of the whole set, "
    "training of one student, which holds the labels where they are made online. Images that begin "
    "with another row's count what made those. "
    "Not counted: latents and anchors, statistics and features of real images, and the choice of "
    "those that an optimisation begins with. Bytes are those of uncompressed pixels and of labels "
    "as stored, and their share is of the real training set's pixels; per MB: points of top-1."
)


class Cost(NamedTuple):
    """A cost that the figure can have as its axis: its words, and of a student on a set."""

    words: str
    of: Callable[[Entry, str, str], float | None]


def stage_seconds(entry: Entry, name: str, student: str) -> dict[str, float | None]:
    """Seconds of every stage, and of training one student."""
    trained = entry.sets.get(name, {}).get(student, {})
    in_all, seeds = trained.get("seconds"), len(trained.get("top1_per_seed", ()))
    networks = of(entry.costs, name, "networks")
    return {
        "squeeze": None if networks is None else _sum_of(networks.values()),
        "recover": of(entry.costs, name, "seconds", "recover"),
        "relabel": of(entry.costs, name, "seconds", "relabel"),
        "validate": None if in_all is None or not seeds else in_all / seeds,
    }


def all_seconds(entry: Entry, name: str, student: str) -> float | None:
    return _sum_of(stage_seconds(entry, name, student).values())


def work_seconds(entry: Entry, name: str, student: str) -> float | None:
    """All but squeeze."""
    return _sum_of(list(stage_seconds(entry, name, student).values())[1:])


def all_bytes(entry: Entry, name: str, student: str) -> float | None:
    del student
    return _sum_of(of(entry.costs, name, "bytes", part) for part in ("images", "labels"))


def label_bytes(entry: Entry, name: str) -> float | None:
    """Of a set's soft labels as stored; of older records those of the synthetic set alone."""
    if entry.costs:
        return of(entry.costs, name, "bytes", "labels")
    return of(entry.summary, "relabel", "bytes") if name == SYNTHETIC else None


def _sum_of(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if None in known else math.fsum(v for v in known if v is not None)


COSTS = {
    "seconds": Cost("seconds in all, of one student", all_seconds),
    "work": Cost("seconds of recover, labels and one student", work_seconds),
    "bytes": Cost("bytes of images and labels", all_bytes),
    "recover": Cost(
        "seconds per image in recover",
        lambda entry, name, student: of(entry.summary, "recover", "seconds_per_image"),
    ),
    "memory": Cost("bytes of a batch in recover", lambda entry, name, student: entry.peak_bytes),
}


def cost_of(name: str, entries: Sequence[Entry], set_name: str) -> Cost:
    """The cost of a name; where every network was imported, "seconds" are those of the rest."""
    known = (all_seconds(e, set_name, s) for e in entries for s in e.sets.get(set_name, {}))
    return COSTS["work" if name == "seconds" and not any(known) else name]


def accuracies_and_costs(entries: Sequence[Entry]) -> dict[tuple[str, int], list[list[str]]]:
    """A table by protocol and IPC, its head first: what every set takes, and what it gives."""
    tables = {}
    for key in dict.fromkeys((e.protocol, e.ipc) for e in entries):
        mine = [e for e in entries if (e.protocol, e.ipc) == key and e.costs]
        students = list(dict.fromkeys(s for e in mine for found in e.sets.values() for s in found))
        rows, known = [], _known_seeds(mine)
        most = {s: max(counts[s] for counts in known.values()) for s in students}
        for row, name in dict.fromkeys((e.row, name) for e in mine for name in e.sets):
            here = [e for e in mine if e.row == row and name in e.sets]
            stages = [stage_seconds(e, name, "") for e in here]
            held, real = (
                mean(find(e) for e in here)
                for find in (
                    lambda e, name=name: all_bytes(e, name, ""),
                    lambda e, name=name: of(e.costs, name, "bytes", "real"),
                )
            )
            cells = [seconds(mean(s[stage] for s in stages)) for stage in STAGES]
            cells += [size(held), f"{held / real:.2%}" if held and real else UNKNOWN]
            for student in students:
                top1 = mean(of(e.sets[name], student, "top1") for e in here)
                took = mean(stage_seconds(e, name, student)["validate"] for e in here)
                rate = UNKNOWN if top1 is None or not held else number(1e8 * top1 / held)
                few = of_fewer(known[row, name][student], most[student])
                cells += [UNKNOWN if top1 is None else percent(top1) + few, seconds(took), rate]
            rows.append([label_of(row, name, key[0]), *cells])
        if rows:
            heads = ["", *STAGES, "images + labels", "of the real"]
            heads += [h for s in students for h in (s, f"{s}: training", f"{s}: per MB")]
            tables[key] = [heads, *rows]
    return tables


def _known_seeds(entries: Sequence[Entry]) -> dict[tuple[str, str], collections.Counter[str]]:
    """Of how many seeds each student's accuracy is, by row and set."""
    found: dict[tuple[str, str], collections.Counter[str]] = {}
    for e in entries:
        for name, by_student in e.sets.items():
            counts = found.setdefault((e.row, name), collections.Counter())
            counts.update({s: len(r.get("top1_per_seed", ())) for s, r in by_student.items()})
    return found
