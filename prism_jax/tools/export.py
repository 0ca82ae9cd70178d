"""Give a distilled set to others: python -m prism_jax.tools.export --workdir=RUN --to=DIR

Without --format:

    DIR/<class>/<slot>.png   as torchvision's ImageFolder reads it; <class> is the wnid where the
                             data set has them, else the class index with leading zeros
    DIR/classes.json         folder, index and name of every class
    DIR/set.npz              images, labels, mean soft labels, class names, provenance
    DIR/provenance.json      what made the set

With one, beside classes.json and provenance.json:

    folder      README.md (a data card), train/<class>/<slot>.png, as Hugging Face has image folders
    parquet     README.md, data/train-00000-of-00001.parquet, as Hugging Face's datasets writes it
    dd_ranking  images.pt, labels.pt, lr.pt and config.yaml, as DD-Ranking takes them
    fkd         README.md, images/<class>/<slot>.png, labels/epoch_<e>/batch_<b>.tar, as SRe2L's
                relabel writes them and its train_FKD reads them
    npz         set.npz alone

DIR appears whole or not at all.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath
from scipy.special import softmax

from prism_jax import parallel
from prism_jax.analysis import words
from prism_jax.config import ANCHOR_CONTROLS, SOFT_CONTROLS, restore
from prism_jax.data import image_set, workdir
from prism_jax.data.datasets import DATASETS, DatasetInfo
from prism_jax.data.exchange import ImageSet
from prism_jax.data.label_store import MANIFEST, LabelReader
from prism_jax.data.lazy import Images
from prism_jax.data.sets import dd_ranking, fkd, folder, npz, parquet
from prism_jax.data.sets.base import CLASS_TABLE
from prism_jax.data.sets.classes import wnids
from prism_jax.data.sets.content import Content
from prism_jax.data.weights import RECORD
from prism_jax.errors import UserError
from prism_jax.labelling import drawn
from prism_jax.main import joined
from prism_jax.paths import at_home
from prism_jax.stages.fingerprints import LATER
from prism_jax.stages.imported import OF_THE_SET
from prism_jax.stages.inputs import Inputs
from prism_jax.tools import cli
from prism_jax.types import Mix, SoftLabels, View

SYNTHETIC = "synthetic"
# (folder, set) -> the files of a format in it
WRITERS: dict[str, Callable[[str, Content], None]] = {
    "folder": folder.write,
    "parquet": parquet.write,
    "dd_ranking": dd_ranking.write,
    "fkd": fkd.write,
    "npz": npz.write,
}
ONE_BY_ONE = ("folder", "parquet", "fkd")  # formats whose images are files: not all in memory
# Formats that hold no mean soft labels, which are not worked out then: what they hold instead.
WITHOUT_MEANS = {
    "folder": "class folders alone; the run's soft labels are not in this format",
    "fkd": "the logits of every stored view",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
      The exit status.
    """
    return cli.run(_command, _parser(), argv)


def _command(given: argparse.Namespace) -> None:
    if given.format == "fkd":  # the views of the labels are drawn anew
        parallel.find_devices()
    export(given.workdir, given.to, control=given.control, form=given.format, licence=given.licence)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m prism_jax.tools.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--workdir", type=at_home, required=True, help="a run whose images are finished")
    add("--to", type=at_home, required=True, help="the folder to make; it must not be there")
    add("--control", choices=SOFT_CONTROLS, help="export this control instead of the synthetic set")
    add("--format", choices=WRITERS, help="see above")
    add("--licence", default="unknown", help="of the set, for its data card: cc-by-4.0, mit, ...")
    return parser


def export(
    root: epath.PathLike,
    to: epath.PathLike,
    *,
    control: str | None = None,
    form: str | None = None,
    licence: str = "unknown",
) -> None:
    """Write a finished set.

    Args:
      root: the working directory of a run.
      to: the folder to make.
      control: which control to export; None: the synthetic set.
      form: a key of ``WRITERS``; None: an ImageFolder and an .npz file.
      licence: of the set.

    Raises:
      UserError: the target is there, the run is not finished, or its images or labels are damaged.
    """
    root, to = epath.Path(root), epath.Path(to)
    if workdir.is_store(to):
        raise UserError(f"--to={to} is in an object store; name a folder here, and copy it there")
    if to.exists():
        raise UserError(f"--to={to} is there already; delete it, or name another folder")
    ran = workdir.read_run(root)
    made = root / "recover" if control is None else root / "controls" / control
    images, labels, provenance = _images(root, made, ran, control)
    if form not in ONE_BY_ONE:
        images = images[:]
    reader, how = _labels(root, ran, provenance, control)
    if reader is not None and form in WITHOUT_MEANS:
        how["what"] = WITHOUT_MEANS[form]
    soft = None
    if form not in WITHOUT_MEANS:
        soft = _of_the_set(root, ran, control) if reader is None else mean_soft_labels(reader)
    classes = class_table(
        DATASETS.get(ran["experiment"]["dataset"]["name"]),
        *(provenance[key] for key in ("num_classes", "class_names", "imagenet_indices")),
    )
    weights = provenance.pop("weights")

    def shown(record: SoftLabels) -> tuple[View, Mix]:
        assert reader is not None  # it gave the record
        height, width = images.shape[1:3]
        return drawn(record, (height, width), reader.manifest["view"])

    content = Content(
        images,
        labels,
        classes,
        ipc=provenance["ipc"],
        soft_NK=soft,
        weights_N=None if weights is None else np.array(weights, np.float32),
        reader=reader,
        drawn=shown,
        provenance=provenance | {"soft_labels": how, **ran},
        **_accuracies(root),
        licence=licence,
    )
    temporary = to.parent / f".{to.name}.tmp"
    if temporary.exists():  # an export that was killed
        temporary.rmtree()
    try:
        temporary.mkdir(parents=True)
        if form is None:
            _copy_images(made, temporary, content)
            npz.write(os.fspath(temporary), content)
        else:
            WRITERS[form](os.fspath(temporary), content)
        workdir.write_json(temporary / CLASS_TABLE, classes)
        workdir.write_json(temporary / "provenance.json", content.provenance)
        temporary.rename(to)
    except BaseException:
        temporary.rmtree(missing_ok=True)
        raise
    print(f"{to}: {len(images)} images of {len(classes)} classes; soft labels: {how['what']}")


def _copy_images(made: epath.Path, to: epath.Path, content: Content) -> None:
    """The PNG files of the run, byte for byte."""
    for index in range(len(content.images_NHWC)):
        target = to / content.file_of(index)
        target.parent.mkdir(exist_ok=True)
        image_set.image_path(made / "images", *divmod(index, content.ipc)).copy(target)


def _accuracies(root: epath.Path) -> dict[str, Any]:
    """Top-1 of every set and student in words, and its spread; empty where there is no summary."""
    if not (root / workdir.SUMMARY).exists():
        return {}
    found = workdir.read_json(root / workdir.SUMMARY)
    students = words.students(found)
    by_set = {
        row.label: dict(zip(students, map(words.accuracy, row.entries), strict=True))
        for row in words.accuracy_rows(found)
        if any(row.entries)
    }
    return {"accuracies": by_set, "spread": words.spread_note(found)}


def class_table(
    info: DatasetInfo | None,
    num_classes: int,
    class_names: Sequence[str] | None,
    imagenet_indices: Sequence[int] | None,
) -> list[dict[str, Any]]:
    """Folder, index and name of every class, in label order.

    Args:
      info: the data set, where it has a row in the table.
      num_classes: that the set has.
      class_names, imagenet_indices: what the real images' storage calls the labels, see
        ``ImageSource``.
    """
    names = list(class_names or info and info.class_names or map(str, range(num_classes)))
    ids = wnids(imagenet_indices)
    if ids and imagenet_indices and info and info.class_names and info.imagenet_indices:
        known = dict(zip(info.imagenet_indices, info.class_names, strict=True))
        names = [known[index] for index in imagenet_indices]
    # ImageFolder sorts folders as text: WordNet IDs only where that is the order of the labels.
    folders = [f"{index:05d}" for index in range(num_classes)]
    if ids is not None and list(ids) == sorted(ids):
        folders = list(ids)
    return [
        {"folder": folders[index], "index": index, "name": names[index]}
        for index in range(num_classes)
    ]


def _images(
    root: epath.Path, folder: epath.Path, ran: dict[str, Any], control: str | None
) -> tuple[Images, np.ndarray, dict[str, Any]]:
    """The images, read when they are indexed, their labels, and what is known of them."""
    manifest = root / "recover" / "manifest.json"
    if not manifest.exists():
        raise UserError(
            f"{root} has no finished images; finish them with\n"
            f"    {command(root, ran, 'squeeze,recover,relabel')}"
        )
    recovered = workdir.read_record(manifest)
    classes, ipc = recovered["num_classes"], recovered["ipc"]
    if control and not (folder / "images").exists():
        raise UserError(
            f"{root} has no images of the control {control}; make them with\n"
            f"    {command(root, ran, 'squeeze,recover,relabel', control)}"
        )
    images = image_set.lazy_images(folder / "images", classes, ipc)
    labels = np.repeat(np.arange(classes, dtype=np.int32), ipc)
    digest = image_set.digest(images)
    written = _written_digest(folder, recovered, control)
    if written is not None and digest != written:
        first = f"Delete {folder / 'images'}, then repair" if control else "Repair"
        raise UserError(
            f"the images in {folder / 'images'} are not those that the run wrote. {first} them with"
            f"\n    {command(root, ran, 'squeeze,recover,relabel', control)}"
        )
    return images, labels, {
        "set": control or SYNTHETIC,
        "num_classes": classes,
        "class_names": recovered.get("class_names"),
        "imagenet_indices": recovered.get("imagenet_indices"),
        "ipc": ipc,
        "images_sha256": digest,
        "weights": recovered.get("weights") if control in (None, *ANCHOR_CONTROLS) else None,
        "fingerprint": workdir.read_fingerprint(root / "recover") if control is None else None,
    }  # fmt: skip


def _written_digest(
    folder: epath.Path, recovered: dict[str, Any], control: str | None
) -> str | None:
    """What the run says of the images that it wrote; older ones say nothing of a control's."""
    if control is None:
        return recovered["digest"]
    record = folder / "images" / RECORD
    return workdir.read_record(record)["digest"] if record.exists() else None


def _labels(
    root: epath.Path, ran: dict[str, Any], provenance: dict[str, Any], control: str | None
) -> tuple[LabelReader | None, dict[str, Any]]:
    """The stored soft labels of the set, and how they were made."""
    folder = (root if control is None else root / "controls" / control) / "relabel"
    where = ran["experiment"]["relabel"].get("labels_from")
    if control is None and where == OF_THE_SET:
        what = "softmax of the one label per image that came with the imported set"
        return None, {"what": what}
    if control is None and where:
        return None, {"what": f"none, relabel.labels_from={where} reads labels made elsewhere"}
    settings = ran["experiment"]["relabel"]
    if settings["mode"] == "online":  # what may be there is of other settings
        return None, {"what": "none, relabel.mode=online stores none"}
    if ran["experiment"]["validate"]["loss"] == "ce":
        return None, {"what": "none, students learn from the classes (validate.loss=ce)"}
    if not (folder / MANIFEST).exists():
        raise UserError(
            f"{folder} has no finished soft labels; finish them with\n"
            f"    {command(root, ran, 'squeeze,recover,relabel', control)}"
        )
    made_from = (workdir.read_fingerprint(folder) or {}).get("relabel", {})
    if other := [k for k, v in made_from.items() if k in settings and settings[k] != v]:
        raise UserError(
            f"{folder} has soft labels of other settings than the run's last ones "
            f"({', '.join(f'relabel.{k}={made_from[k]}, now {settings[k]}' for k in other[:3])}); "
            f"make them anew with\n    {command(root, ran, 'squeeze,recover,relabel', control)}"
        )
    reader = LabelReader(folder, images=provenance["images_sha256"])
    manifest = {k: v for k, v in reader.manifest.items() if k not in ("shards", "images")}
    what = "the mean over all stored views of an image of softmax(logits)"
    if (mix := manifest["view"].get("mix", "none")) != "none":
        what += f"; the views are mixed ({mix}) with other images of the set"
    return reader, {"what": what, **manifest}


def _of_the_set(root: epath.Path, ran: dict[str, Any], control: str | None) -> np.ndarray | None:
    """The labels that came with an imported set, as probabilities: float32 (N, K).

    None: the students of the set to be exported learned from others.

    Raises:
      UserError: the set is not there any more, or is another one.
    """
    if control is not None or ran["experiment"]["relabel"].get("labels_from") != OF_THE_SET:
        return None
    inputs = Inputs(restore(ran["experiment"], LATER))
    try:
        source = inputs.start
        there = inputs.fields(source)
        said = (workdir.read_fingerprint(root / "recover") or {}).get("data", {})
        # Versions add keys.
        if any(there[key] != value for key, value in said.items() if key in there):
            raise UserError(f"{inputs.config.recover.initialise_from} is another set now")
        logits_NK = source.soft_NK if isinstance(source, ImageSet) else None
    except UserError as error:
        raise UserError(
            f"{error}. The soft labels of {root} are those of that set (relabel.labels_from=set): "
            "have it there again, or export with --format=folder, which holds none"
        ) from error
    assert logits_NK is not None  # students learned from them
    return softmax(logits_NK.astype(np.float64), axis=1).astype(np.float32)


def mean_soft_labels(reader: LabelReader) -> np.ndarray:
    """The mean over the stored epochs of each image's softmax(logits): float32 (N, K).

    Summed in float64, in stored order.
    """
    total_NK = np.zeros((reader.plan.count, reader.plan.num_classes), np.float64)
    seen_N1 = np.zeros((reader.plan.count, 1), np.int64)
    for record in reader.read():
        logits_BK = np.asarray(record.logits_BK, np.float64)
        odds_BK = np.exp(logits_BK - logits_BK.max(1, keepdims=True))
        total_NK[record.index_B] += odds_BK / odds_BK.sum(1, keepdims=True)
        seen_N1[record.index_B] += 1
    return (total_NK / seen_N1).astype(np.float32)


def command(root: epath.Path, ran: dict[str, Any], stages: str, control: str | None = None) -> str:
    """The command that ran a workdir, for these stages of it; a comparison's is the whole one."""
    ran_by = shlex.split(ran["provenance"]["command"])
    if "prism_jax.main" not in ran_by[:3]:
        return shlex.join(ran_by)
    flags = joined(ran_by[3:])
    replaced = ("--workdir=", "--stages=", "--from=")
    flags = [flag for flag in flags if not flag.startswith(replaced)]
    controls = ran["experiment"]["validate"]["controls"]
    if control and control not in controls:  # beside those that the run has
        name = "--config.validate.controls="
        flags = [flag for flag in flags if not flag.startswith(name)]
        flags.append(f"{name}{','.join([*controls, control])}")
    flags += [f"--workdir={root}", f"--stages={stages}"]
    return "python -m prism_jax.main " + shlex.join(flags)


if __name__ == "__main__":
    sys.exit(main())
