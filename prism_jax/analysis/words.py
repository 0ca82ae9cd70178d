"""What a summary says, in words: "–" for what is not known, accuracies in per cent."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from prism_jax.progress import duration

SYNTHETIC = "synthetic"
ROW_LABELS = {
    SYNTHETIC: "synthetic",
    "random_real": "random real, soft labels",
    "random_real_hard": "random real, hard labels",
    "real_herding": "real by herding, soft labels",
    "real_feature_medoids": "real medoids in features, soft labels",
    "real_confident": "most confident real, soft labels",
    "real_balanced": "balanced real, soft labels",
    "synthetic_hard": "synthetic, hard labels",
    "medoids": "real images nearest to the anchors",
    "decoded_anchors": "anchors, decoded",
    "no_anchors": "generated without anchors",
    "full_real": "full real training set",
}
UNKNOWN = "–"

OWN = "own"  # the protocol of a comparison under which each row has its own


class Row(NamedTuple):
    """One training set of the accuracy table, and each student's entry or None."""

    name: str
    label: str
    entries: tuple[dict[str, Any] | None, ...]


def row_label(name: str) -> str:
    """The words for a training set."""
    return ROW_LABELS.get(name, name)


def students(summary: Mapping[str, Any]) -> list[str]:
    """Every student of a summary, in order."""
    sets = [summary.get("validate", {}), *summary.get("controls", {}).values()]
    return list(dict.fromkeys(name for by_student in sets for name in by_student))


def accuracy_rows(summary: Mapping[str, Any]) -> list[Row]:
    """The synthetic set and every control, in the order of ``students(summary)``."""
    sets = {SYNTHETIC: summary.get("validate", {}), **summary.get("controls", {})}
    names = students(summary)
    return [
        Row(name, row_label(name), tuple(by_student.get(student) for student in names))
        for name, by_student in sets.items()
    ]


def accuracy(entry: Mapping[str, Any] | None) -> str:
    """An entry as "93.1 ± 0.4", in per cent."""
    if not entry or entry["top1"] is None:
        return UNKNOWN
    spread = entry.get("top1_std")
    return percent(entry["top1"]) + (f" ± {100 * spread:.1f}" if spread is not None else "")


def more(entry: Mapping[str, Any] | None) -> str:
    """What else is known of an entry: "best 93.5, top-5 99.6", in per cent."""
    found = {"best": "best_top1", "top-5": "top5", "held out": "held_out"}
    known = {words: (entry or {}).get(key) for words, key in found.items()}
    if 0 < len((entry or {}).get("per_class") or ()) <= 5:
        del known["top-5"]  # every answer is among five classes
    return ", ".join(f"{words} {percent(x)}" for words, x in known.items() if x is not None)


def protocol(summary: Mapping[str, Any]) -> str:
    """How the students of a summary were trained, in words; empty where none was."""
    if (how := summary.get("protocol")) is None:
        return ""
    loss = how["loss"] + (f" (T = {how['temperature']:g})" if how["temperature"] else "")
    if how["ce_weight"]:
        loss += f" + {how['ce_weight']:g} cross entropy"
    found = [loss, _rate(how), f"{how['epochs']} epochs in batches of {how['batch_size']}"]
    if how["bn_group"] != how["batch_size"]:
        found.append(f"BatchNorm over {how['bn_group']} images")
    if how["ema"] is not None:
        what = "weights and statistics" if how.get("ema_statistics", True) else "weights"
        found.append(f"{what} averaged ({how['ema']:g})")
    return "; ".join(found)


def _rate(how: Mapping[str, Any]) -> str:
    """The optimiser and its rate, in words; what older summaries leave out is left out."""
    optimiser, schedule = f"{how['optimiser']} at {how['learning_rate']:g}", how["schedule"]
    if "momentum" in how:
        optimiser += f" with {'Nesterov ' if how['nesterov'] else ''}momentum {how['momentum']:g}"
    if how.get("milestones"):
        schedule += f" at {', '.join(f'{at:g}' for at in how['milestones'])}"
    values = [f"{name} {how[name]:g}" for name in ("zeta", "gamma") if name in how]
    found = [optimiser, f"{schedule} ({', '.join(values)})" if values else schedule]
    if how.get("warmup_epochs"):
        begins = f" from {how['warmup_start']:g}" if how["warmup_start"] else ""
        found.append(f"{how['warmup_epochs']} epochs of warm-up{begins}")
    if how.get("weight_decay"):
        of = " of kernels" if how["decay"] == "kernels" else ""
        found.append(f"weight decay {how['weight_decay']:g}{of}")
    return ", ".join(found)


class ClassRow(NamedTuple):
    """One class of the synthetic set's students, in words."""

    name: str
    accuracies: tuple[str, ...]


CLASSES_SHOWN = 20


def class_rows(
    summary: Mapping[str, Any], class_names: Sequence[str] | None = None
) -> list[ClassRow]:
    """Accuracy by class, one column per student of the synthetic set.

    All classes in their order; of more than ``CLASSES_SHOWN`` the hardest and the easiest of those
    with test images, by the mean over students.
    """
    per_class = [entry.get("per_class") for entry in summary.get("validate", {}).values()]
    if not per_class or None in per_class:
        return []
    by_class = list(zip(*per_class, strict=True))
    rows: Sequence[int] = range(len(by_class))
    if len(rows) > CLASSES_SHOWN:
        known = [c for c in rows if None not in by_class[c]]
        rows = ranked = sorted(known, key=lambda c: statistics.fmean(by_class[c]))
        if len(ranked) > CLASSES_SHOWN:
            rows = [*ranked[: CLASSES_SHOWN // 2], *ranked[-CLASSES_SHOWN // 2 :]]
    return [
        ClassRow(class_names[c] if class_names else f"class {c}", tuple(map(percent, by_class[c])))
        for c in rows
    ]


def spread_note(summary: Mapping[str, Any]) -> str:
    """Which spread the accuracies of a summary show."""
    entries = [entry for row in accuracy_rows(summary) for entry in row.entries]
    known = [entry for entry in entries if entry and entry["top1"] is not None]
    counts = sorted({len(entry.get("top1_per_seed", [])) or 1 for entry in known})
    if not counts:
        return "no student was trained"
    if counts[-1] == 1:
        return "one student seed, no spread"
    if (runs := summary.get("runs", 1)) > 1:
        each = "" if counts[-1] == runs else f", {counts[-1]} students of a kind in all"
        seeds = summary.get("image_seeds", runs)
        of = f" of {seeds} seed(s) of images" if seeds < runs else ""
        vary = "recover, labels, random real images and students vary, teachers are fixed"
        if seeds == 1:
            vary = "students alone vary"
        return f"mean ± standard deviation over {runs} runs{of}{each} ({vary})"
    number = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"mean ± standard deviation over {number} student seeds of one synthetic set"


class TeacherRow(NamedTuple):
    """One teacher of the pool, in words."""

    name: str
    primary: bool
    top1: str
    params: str
    batch_norms: str
    drawn: str
    cross_entropy: str
    bn_alignment: str


def teacher_rows(summary: Mapping[str, Any]) -> list[TeacherRow]:
    """What is known of every teacher of the pool."""
    recover = summary.get("recover", {})

    def change(teacher: str, term: str) -> str:
        terms = recover.get("terms", {}).get(teacher)
        ends = [terms[end][term] if terms else None for end in ("start", "end")]
        return UNKNOWN if ends == [None, None] else " → ".join(number(value) for value in ends)

    return [
        TeacherRow(
            name=name,
            primary=name == recover.get("primary"),
            top1=percent(record["top1"]),
            params=large(record["params"]),
            batch_norms=str(_known(record["batch_norms"])),
            drawn=percent(recover.get("teachers_drawn", {}).get(name), digits=0, sign=" %"),
            cross_entropy=change(name, "ce"),
            bn_alignment=change(name, "bn"),
        )
        for name, record in summary.get("teachers", {}).items()
    ]


def facts(summary: Mapping[str, Any]) -> dict[str, str]:
    """The other numbers of a summary, in words; those of stages that did not run are absent."""
    found = {}
    if recover := summary.get("recover"):
        found["images"] = f"{_known(recover['images'])} ({_known(recover['ipc'])} per class)"
        found["recover"] = f"{seconds(recover['seconds_per_image'])} per image"
        if recover["peak_bytes"] is not None:
            found["recover"] += f", {size(recover['peak_bytes'])} of memory at most"
        if recover.get("distance_from_initial") is not None:
            found["distance from initial"] = (
                f"{number(recover['distance_from_initial'])} (RMS of pixels in [0, 1])"
            )
        if clip := recover.get("clip"):
            ends = " → ".join(number(clip[end]) for end in ("start", "end"))
            found["CLIP"] = f"{ends} (1 - cosine of views to their class's text)"
    generator = summary.get("generator")
    if generator and generator.get("recognised") is not None:
        found["generator"] = (
            f"loss {number(generator['loss'])}; without anchors {percent(generator['recognised'])} "
            f"% recognised by {generator['judge']}, {number(generator['distance'])} times as far "
            f"from the nearest training image as test images, {percent(generator['near'])} % "
            f"nearer than the nearest 1 % of those"
        )
    if relabel := summary.get("relabel"):
        found["soft labels"] = f"{size(relabel['bytes'])} on disk"
    for words, key in (("best test on the way", "best_top1"), ("on held-out images", "held_out")):
        told = {name: entry.get(key) for name, entry in summary.get("validate", {}).items()}
        if known := {name: x for name, x in told.items() if x is not None}:
            found[words] = ", ".join(f"{name} {percent(x)}" for name, x in known.items())
    if analyse := summary.get("analyse"):
        cosine = analyse["intra_class_cosine"]
        found["intra-class cosine"] = ", ".join(
            f"{name} {number(cosine[name])}" for name in ("synthetic", "initial", "real")
        )
    return found


def title(summary: Mapping[str, Any]) -> str:
    """Which run it is."""
    parts = [summary["config"], f"preset {summary['preset']}", f"method {summary['method']}"]
    narrow = [k for k, v in summary.get("precision", {}).items() if v != "float32"]
    parts += [f"bfloat16 in {', '.join(narrow)}"] if narrow else []
    parts += [f"IPC {ipc(summary)}"] if ipc(summary) != UNKNOWN else []
    return ", ".join(parts)


def ipc(summary: Mapping[str, Any]) -> str:
    """Images per class."""
    return str(_known(summary.get("recover", {}).get("ipc")))


# --- numbers in words -----------------------------------------------------------------------


def of_fewer(count: int, most: int) -> str:
    """Behind a number: of how many seeds it is, where others are of more."""
    return f" ({count} of {most})" if 0 < count < most else ""


def percent(fraction: float | None, *, digits: int = 1, sign: str = "") -> str:
    """A fraction in per cent."""
    return UNKNOWN if fraction is None else f"{100 * fraction:.{digits}f}{sign}"


def number(value: float | None) -> str:
    """A number with three significant digits."""
    if value is None:
        return UNKNOWN
    return f"{value:.0f}" if abs(value) >= 999.5 else f"{value:#.3g}".rstrip(".")


def seconds(value: float | None) -> str:
    """A duration; short ones keep three significant digits."""
    if value is None:
        return UNKNOWN
    return f"{number(value)} s" if value < 9.95 else duration(value)


def size(count: float | None) -> str:
    """A number of bytes, in decimal units."""
    return UNKNOWN if count is None else large(count, units=(" B", " kB", " MB", " GB", " TB"))


def large(count: float | None, *, units: Sequence[str] = ("", " k", " M", " G", " T")) -> str:
    """A count with three significant digits and a decimal unit."""
    if count is None:
        return UNKNOWN
    power = 0
    scaled = float(count)
    while scaled >= 999.5 and power < len(units) - 1:
        scaled, power = scaled / 1000, power + 1
    return (f"{scaled:.0f}" if power == 0 else number(scaled)) + units[power]


def _known(value: Any) -> Any:
    """A value, or the sign for none."""
    return UNKNOWN if value is None else value
