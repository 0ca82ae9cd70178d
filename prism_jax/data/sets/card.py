"""The data card of a set: what made it, and its accuracies beside those of its controls.

Hugging Face shows ``README.md`` and reads the fields between its dashes.
"""

from __future__ import annotations

import json

from prism_jax.data.sets.content import Content

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (10**6, "100K<n<1M"))


def card(content: Content, reading: str, *, fields: str = "") -> str:
    """The text of ``README.md``.

    Args:
      content: the set.
      reading: how it is read, as Markdown.
      fields: further lines for Hugging Face.
    """
    made, run = content.provenance, content.provenance["provenance"]
    experiment, count = content.experiment, len(content.images_NHWC)
    recover, data = experiment["recover"], experiment["dataset"]
    size = next((words for limit, words in _SIZES if count < limit), "1M<n<10M")
    height, width, channels = content.images_NHWC.shape[1:]
    what = "distilled images" if made["set"] == "synthetic" else f"the control {made['set']}"
    lines = [
        "---",
        f"license: {content.licence}",
        f"pretty_name: {json.dumps(content.title)}",
        "task_categories:\n- image-classification",
        "tags:\n- dataset-distillation",
        f"size_categories:\n- {size}",
        *([fields] if fields else []),
        "---",
        f"\n# {content.title}\n",
        f"{count} {what} of {data['name']}: {len(content.classes)} classes, {content.ipc} images "
        f"of each, {height} x {width} pixels, {'grey' if channels == 1 else 'RGB'}.\n",
        "## Reading it\n",
        reading,
        "\n## Accuracy\n",
        *_accuracies(content),
        "\n## What made it\n",
        *([] if made["set"] == "synthetic" else [
            f"- the control `{made['set']}` of the following, whose own images are another set; "
            "docs/methods.md of prism_jax says how controls are chosen"
        ]),
        f"- method `{recover['method']}`, preset `{experiment['preset']}`, "
        f"{recover['iterations']} iterations, teachers: {', '.join(recover['pool']) or 'none'}",
        f"- labels: {made['soft_labels']['what']}",
        f"- prism_jax at commit {run.get('commit') or 'unknown'}:\n\n      {run['command']}\n",
        f"- SHA-256 of the pixels: `{made['images_sha256']}`",
        "\n`provenance.json` has every field of the config, the versions, the machine and the "
        "hashes of the teachers.",
        "\n## Licence\n",
        f"`{content.licence}`. The images are made from {data['name']} and may fall under its "
        "terms; whoever gives them to others states the licence (`--licence` of the export).\n",
    ]  # fmt: skip
    return "\n".join(lines)


def _accuracies(content: Content) -> list[str]:
    """A table of the sets by the students; what the run has not tested is said."""
    if not content.accuracies:
        return ["Not validated: the run has no summary."]
    students = list(dict.fromkeys(s for row in content.accuracies.values() for s in row))
    rows = [
        f"| {name} | {' | '.join(row.get(student, '–') for student in students)} |"
        for name, row in content.accuracies.items()
    ]
    alone = "" if len(content.accuracies) > 1 else " No control was trained beside it."
    return [
        f"Top-1 in per cent on real test images, of students trained on the set and on its "
        f"controls: {content.spread}.{alone}\n",
        f"| trained on | {' | '.join(students)} |",
        "|:--|" + "--:|" * len(students),
        *rows,
    ]
