"""The tables and figures of an audit: attacks by row, and the noise of drawn teachers."""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib.util
import io
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from prism_jax.analysis import membership
from prism_jax.analysis.figures import COLOURS, QUIET, log_scale, short, styled
from prism_jax.analysis.membership import Rate, Verdict
from prism_jax.analysis.words import UNKNOWN, percent

FALSE = (0.01, 0.001)
TITLES = {
    "set": "The set itself, by the distance to its nearest image",
    "student": "A student that was trained on the set",
    "teacher": "The network that labelled the set (no set at all: what there is to find)",
}


@dataclasses.dataclass(frozen=True)
class Attack:
    """What an attack observed of a row's runs, and who was a member.

    Attributes:
      top1: of the attacked network in each run, on test images; None: it is no network.
    """

    row: str
    attack: str
    values_RN: np.ndarray
    member_RN: np.ndarray
    top1: tuple[float | None, ...]

    @functools.cached_property
    def scores_RN(self) -> np.ndarray:
        return membership.likelihood_ratios(self.values_RN, self.member_RN)

    @functools.cached_property
    def verdict(self) -> Verdict:
        return membership.judge(self.scores_RN, self.member_RN, at=FALSE)


def documents(attacks: Sequence[Attack], study: dict[str, Any] | None) -> dict[str, bytes]:
    """The files of an audit by their names: of what there is."""
    found: dict[str, bytes] = {}
    if attacks:
        found |= {
            "table.md": markdown(attacks, study).encode(),
            "table.csv": table_csv(attacks).encode(),
            "roc.png": roc(attacks),
        }
    return found | ({"gradients.png": gradients(study)} if study else {})


# --- tables ---------------------------------------------------------------------------------


def markdown(attacks: Sequence[Attack], study: dict[str, Any] | None) -> str:
    """All tables as Markdown."""
    lines = [_resolution(attacks), ""]
    for kind in dict.fromkeys(a.attack for a in attacks):
        heads = ["made by", "AUROC", *(f"true at {100 * f:g} % false" for f in FALSE), "top-1"]
        auditor = has_auditor()
        heads += ["AUROC, jax-privacy", "true at 1 %"] if auditor else []
        lines += [
            f"### {TITLES[kind]}",
            "",
            _row(heads),
            _row([":--", *["--:"] * (len(heads) - 1)]),
        ]
        for a in (a for a in attacks if a.attack == kind):
            v = a.verdict
            auroc = f"{v.auroc:.3f} ({v.low:.3f} to {v.high:.3f})"
            known = [x for x in a.top1 if x is not None]
            top1 = percent(statistics.fmean(known)) if known else UNKNOWN
            cells = [a.row, auroc, *map(told, v.rates), top1]
            if auditor:
                area, true = second_opinion(a.scores_RN[a.member_RN], a.scores_RN[~a.member_RN])
                cells += [f"{area:.3f}", f"{100 * true:.2f}"]
            lines.append(_row(cells))
        lines.append("")
    return "\n".join([*lines, *(_of_study(study) if study else [])]) + "\n"


def _resolution(attacks: Sequence[Attack]) -> str:
    """How many runs and scores there are: of the row with the fewest, where an audit goes on."""
    runs = sorted({len(a.member_RN) for a in attacks})
    fewest = min(attacks, key=lambda a: len(a.member_RN))
    v = fewest.verdict
    allowed = ", ".join(f"{100 * r.false:g} % are {r.allowed} scores" for r in v.rates)
    return (
        f"Likelihood ratios of {' to '.join(map(str, dict.fromkeys((runs[0], runs[-1]))))} shadow "
        f"runs, {fewest.member_RN.shape[1]} canaries: {v.members} members' scores and {v.others} "
        f"others' of a row ({allowed}). In per cent but for AUROC; intervals of 95 %: AUROC by "
        f"bootstrap over canaries, rates by Clopper-Pearson, as if scores were independent. "
        f"Guessing: 0.5, 1 and 0.1."
    )


def told(rate: Rate) -> str:
    """A rate with its interval, in per cent; unknown where no false positive is allowed."""
    if not rate.allowed:
        return UNKNOWN
    return f"{100 * rate.true:.2f} ({100 * rate.low:.2f} to {100 * rate.high:.2f})"


def has_auditor() -> bool:
    """Whether jax-privacy is installed."""
    return importlib.util.find_spec("jax_privacy") is not None


def second_opinion(inside: np.ndarray, outside: np.ndarray) -> tuple[float, float]:
    """AUROC and true positives at 1 % by jax-privacy's auditor.

    It lets an attacker choose at random between thresholds: the hull of the curve, which is never
    below the curve itself and above 0.5 by chance.
    """
    from jax_privacy.auditing import CanaryScoreAuditor

    auditor = CanaryScoreAuditor(inside, outside)
    return float(auditor.attack_auroc()), float(auditor.tpr_at_given_fpr(0.01))


def _of_study(study: dict[str, Any]) -> list[str]:
    """Teachers' gradients along the synthesis, and noise over change near the recipe's alpha."""
    heads = (
        "iteration", "cosine of BN gradients", "of CE gradients", "largest / smallest BN norm",
        "noise / one image", "along it", "noise / other seeds",
    )  # fmt: skip
    at = nearest_alpha(study)
    alpha = f"alpha {study['alphas'][at]:g}"
    if study["alphas"][at] != study["alpha"]:
        alpha += f" (of those asked for the nearest to the row's own, {study['alpha']:g})"
    lines = [
        f"### Gradients of {', '.join(study['teachers'])}", "",
        f"Row {study['row']}, {study['draws']} draws of teachers, {alpha}. "
        f"Cosines: mean over pairs. Noise over change: median over the images exchanged; along: "
        f"the noise's part in the direction of the change.", "",
        _row(heads), _row(["--:"] * len(heads)),
    ]  # fmt: skip
    for found in study["iterations"]:
        images, along, seeds = (x[at] for x in ratios(found))
        norms = found["norm_bn"]
        lines.append(
            _row(
                [
                    str(found["iteration"]),
                    pairs(found["cosine_bn"]),
                    pairs(found["cosine_ce"]),
                    f"{max(norms) / max(min(norms), 1e-30):.2f}",
                    f"{images:.3g}",
                    f"{along:.3g}",
                    f"{seeds:.3g}",
                ]
            )  # fmt: skip
        )
    return lines


def nearest_alpha(study: dict[str, Any]) -> int:
    """Which of the alphas is nearest to the recipe's own, by their ratio."""
    return int(np.abs(np.log(np.array(study["alphas"]) / study["alpha"])).argmin())


def ratios(found: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of an iteration, (A,) each: noise / change and its part along it, and noise / other seeds."""
    images = [name for name in found["change"] if name.startswith("exchanged")]
    noise_A = np.array(found["noise"])
    change_MA = np.array([found["change"][name] for name in images])
    along_MA = np.array([found["along"][name] for name in images])
    seeds_A = np.array(found["change"]["reseeded"])
    return (
        np.median(noise_A / change_MA, axis=0),
        np.median(along_MA / change_MA, axis=0),
        noise_A / seeds_A,
    )


def pairs(cosines_TT: Any) -> str:
    """The mean over pairs of different teachers."""
    matrix = np.array(cosines_TT)
    upper = matrix[np.triu_indices(len(matrix), 1)]
    return f"{upper.mean():.3f}" if len(upper) else UNKNOWN


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


FIELDS = ("row", "attack", "auroc", "auroc_low", "auroc_high", "false", "allowed", "true",
          "true_low", "true_high", "members", "others", "runs", "top1")  # fmt: skip


def table_csv(attacks: Sequence[Attack]) -> str:
    """Every rate of every attack, one line each."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(FIELDS)
    for a in attacks:
        v, known = a.verdict, [x for x in a.top1 if x is not None]
        top1 = statistics.fmean(known) if known else ""
        for r in v.rates:
            writer.writerow(
                [a.row, a.attack, v.auroc, v.low, v.high, *r, v.members, v.others,
                 len(a.member_RN), top1]
            )  # fmt: skip
    return file.getvalue()


# --- figures --------------------------------------------------------------------------------

STYLES = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)))  # one for every time that the colours come again


@styled
def roc(attacks: Sequence[Attack]) -> Figure:
    """True over false positives on logarithmic axes, a panel per attack; guessing is a line."""
    kinds = list(dict.fromkeys(a.attack for a in attacks))
    rows = list(dict.fromkeys(a.row for a in attacks))
    figure = Figure(figsize=(4.6 * len(kinds) + 1.6, 4.6))
    figure.set_layout_engine("constrained")
    handles = {}
    for axis, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        least = 1.0
        for a in (a for a in attacks if a.attack == kind):
            number = rows.index(a.row)
            false, true = membership.roc(a.scores_RN, a.member_RN)
            least = min(least, 1 / a.verdict.others)
            (handles[a.row],) = axis.plot(
                np.maximum(false, least), np.maximum(true, least), drawstyle="steps-post",
                color=COLOURS[number % len(COLOURS)], label=a.row,
                linestyle=STYLES[number // len(COLOURS) % len(STYLES)], linewidth=1.5,
            )  # fmt: skip
        axis.plot([least, 1], [least, 1], color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
        axis.set(xlim=(least, 1), ylim=(least, 1.05))
        log_scale(axis, "x")
        log_scale(axis, "y")
        axis.set(title=kind, xlabel="false positives", ylabel="true positives")
    figure.legend(
        [handles[row] for row in rows], map(short, rows), loc="outside right upper", frameon=False
    )
    return figure


@styled
def gradients(study: dict[str, Any]) -> Figure:
    """Cosines along the synthesis; noise over what one image changes, over alpha."""
    figure = Figure(figsize=(12.5, 4.4))
    figure.set_layout_engine("constrained")
    left, right = figure.subplots(1, 2)
    steps = [found["iteration"] for found in study["iterations"]]
    for number, (key, words) in enumerate((("cosine_bn", "BN"), ("cosine_ce", "cross entropy"))):
        matrices = np.array([found[key] for found in study["iterations"]])
        upper = matrices[:, *np.triu_indices(matrices.shape[1], 1)]
        left.plot(steps, upper.mean(1), marker="o", color=COLOURS[number], label=words)
        left.fill_between(steps, upper.min(1), upper.max(1), color=COLOURS[number], alpha=0.15)
    left.axhline(0, color=QUIET, linewidth=1)
    left.set(title="Cosine between two teachers' gradients", xlabel="iteration", ylim=(-1, 1))
    left.legend()
    for number, found in enumerate(study["iterations"]):
        colour = COLOURS[number % len(COLOURS)]
        images, along, seeds = ratios(found)
        told = f"iteration {found['iteration']}"
        right.plot(study["alphas"], images, color=colour, label=told)
        right.plot(study["alphas"], along, color=colour, linestyle=(0, (1.5, 1.5)))
        right.plot(study["alphas"], seeds, color=colour, linestyle=(0, (5, 1.5)), linewidth=1)
    right.axhline(1, color=QUIET, linewidth=1)
    right.axvline(study["alpha"], color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
    right.set(title="Noise of drawn teachers / change by one image", xlabel="alpha")
    log_scale(right, "x")
    log_scale(right, "y")
    handles, labels = right.get_legend_handles_labels()
    for style, words in (((0, (1.5, 1.5)), "along the change"), ((0, (5, 1.5)), "/ other seeds")):
        handles += right.plot([], [], color=QUIET, linestyle=style)
        labels.append(words)
    right.legend(handles, labels, fontsize=9)
    return figure
