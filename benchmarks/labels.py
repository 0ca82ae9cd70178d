"""What soft labels cost: bytes on disk, what rounding and pruning lose, and making them online.

    python benchmarks/labels.py --out=benchmarks/results/labels_cpu

MobileNetV2 labels 1,000 real images (one per ImageNet class) at 225 px for three epochs with
CutMix. The same logits are then kept in every way by the real store, and every byte of its
folder is counted and scaled to 300 epochs. Work is measured in CPU time of all threads, which
hardly depends on what else the machine does. Needs the folder ``--data`` with
``imagenet_sample/imagenet_sample1000_256.tar`` and ``weights/mobilenet_v2_tfslim.safetensors``.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import os
import pathlib
import platform
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterable

os.environ.setdefault("NPROC", str(os.cpu_count()))

import jax
import measuring
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from numpy.lib.recfunctions import repack_fields
from PIL import Image

from prism_jax.core.augment import Augment
from prism_jax.core.codec import Coding, decode, encode
from prism_jax.data import label_store, weights
from prism_jax.environment import commit
from prism_jax.labelling import VIEWS, Labeller, LabelRecipe, OnlineLabels
from prism_jax.models import build
from prism_jax.teachers import TeacherPool
from prism_jax.training import Trainer, TrainRecipe, soft_batches
from prism_jax.types import Normalisation, SoftLabels

BESIDE = pathlib.Path(__file__).parents[1].parent / "shared" / "data"
DATA = pathlib.Path(os.environ.get("PRISM_JAX_SHARED_DATA", BESIDE))
PIXELS = Normalisation(mean=(0.5,) * 3, std=(0.5,) * 3)  # x / 127.5 - 1
SIZE, CLASSES, BATCH = 225, 1000, 50
STORED, EPOCHS, SEED = 3, 300, 0
HOW = Augment(crop_min=0.25, flip=True, mix="cutmix")

CODINGS = {
    "float32": Coding("float32"),
    "float16": Coding("float16"),
    "int8": Coding("int8"),
    "float16, top 100": Coding("float16", 100),
    "int8, top 100": Coding("int8", 100),
    "int8, top 50": Coding("int8", 50),
    "int8, top 10": Coding("int8", 10),
}
# What is kept, and for how many of the 300 epochs.
CASES = [
    *((name, EPOCHS) for name in CODINGS),
    *((name, EPOCHS // 10) for name in CODINGS if name not in ("float32", "float16, top 100")),
]


def read_images(data: pathlib.Path) -> np.ndarray:
    """The sample, in the order of the classes: the central 87.5 % at 225 px."""
    images = []
    with tarfile.open(data / "imagenet_sample" / "imagenet_sample1000_256.tar") as archive:
        members = sorted((m for m in archive if m.isfile()), key=lambda member: member.name)
        for member in members:
            if not member.name.lower().endswith((".jpeg", ".jpg", ".png")):
                continue
            file = archive.extractfile(member)
            assert file is not None
            image = Image.open(io.BytesIO(file.read())).convert("RGB")
            side = round(min(image.size) * 0.875)
            left, top = ((size - side) // 2 for size in image.size)
            image = image.crop((left, top, left + side, top + side))
            images.append(np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)))
    return np.stack(images)


def teacher(data: pathlib.Path) -> TeacherPool:
    """MobileNetV2."""
    file = data / "weights" / "mobilenet_v2_tfslim.safetensors"
    shape = (SIZE, SIZE, 3)
    variables = weights.load(str(file), "mobilenet_v2", CLASSES, image_shape=shape)
    module = build("mobilenet_v2", CLASSES)
    return TeacherPool.of({"m": (module, variables)}, image_shape=shape, normalisation=PIXELS)


# --- bytes and what they lose -----------------------------------------------------------------


def divergence(exact_NK: np.ndarray, found_NK: np.ndarray, temperature: float) -> float:
    """Mean of KL(softmax(exact / T) || softmax(found / T)), in nats and float64."""

    def log_softmax(x_NK):
        x_NK = x_NK.astype(np.float64) / temperature
        x_NK = x_NK - x_NK.max(1, keepdims=True)
        return x_NK - np.log(np.exp(x_NK).sum(1, keepdims=True))

    p_NK, q_NK = log_softmax(exact_NK), log_softmax(found_NK)
    return float((np.exp(p_NK) * (p_NK - q_NK)).sum(1).mean())


def losses(exact_NK: np.ndarray, found_NK: np.ndarray) -> dict[str, float]:
    """How far logits are from the exact ones."""
    return {
        "kl_t20": divergence(exact_NK, found_NK, 20.0),
        "kl_t1": divergence(exact_NK, found_NK, 1.0),
        "rmse": float(np.sqrt(np.square(exact_NK - found_NK, dtype=np.float64).mean())),
        "top1_agreement": float((exact_NK.argmax(1) == found_NK.argmax(1)).mean()),
    }


def write(root: pathlib.Path, plan: label_store.LabelPlan, records: list[SoftLabels]) -> None:
    """The real store of these records."""
    per_epoch = plan.batches_per_epoch
    for shard in range(plan.num_shards):
        epochs = plan.epochs_of(shard)
        mine = records[epochs.start * per_epoch : epochs.stop * per_epoch]
        label_store.write_shard(root, plan, shard, mine)
    view = {**dataclasses.asdict(HOW), "ensemble": "single", "seed": SEED}
    label_store.write_manifest(root, plan, images="0" * 64, teachers={"m": "0" * 64}, view=view)


def measure_store(records: list[SoftLabels], count: int) -> dict[str, dict]:
    """Bytes, losses and reading speed of every coding."""
    exact_NK = np.concatenate([r.logits_BK for r in records])
    found = {}
    for name, coding in CODINGS.items():
        plan = label_store.LabelPlan.of(
            count, CLASSES, BATCH, STORED, coding.precision, coding.top_k
        )
        with tempfile.TemporaryDirectory() as folder:
            root = pathlib.Path(folder)
            write(root, plan, records)
            on_disk = sum(path.stat().st_size for path in root.rglob("*"))
            reader = label_store.LabelReader(root)
            began = time.process_time()
            kept = list(reader.read(threads=0))
            seconds = time.process_time() - began
        found[name] = {
            "row_bytes": plan.row.itemsize,
            "bytes_per_label": on_disk / STORED / count,
            "read_seconds": seconds / len(exact_NK),
            "losses": losses(exact_NK, np.concatenate([r.logits_BK for r in kept])),
        }
    return found


def measure_choices(records: list[SoftLabels]) -> dict[str, dict[str, float]]:
    """What other ways to round and to fill lose, on the same logits."""
    exact_NK = np.concatenate([r.logits_BK for r in records])
    scale_N1 = np.abs(exact_NK).max(1, keepdims=True) / 127
    found = {
        "nothing is kept, all logits are equal": np.zeros_like(exact_NK),
        "int8 with a scale and no offset": np.rint(exact_NK / scale_N1) * scale_N1,
    }
    rows_N = encode(exact_NK, Coding("float32", 100))
    kept_NK = np.unpackbits(rows_N["kept"], axis=1, count=CLASSES).astype(bool)
    dropped = np.where(kept_NK, -np.inf, exact_NK).astype(np.float64)
    fills = {
        "the mean of what was dropped": rows_N["fill"],
        "what keeps the sum of exp": np.log(np.exp(dropped).sum(1) / (CLASSES - 100)),
        "the least that was kept": rows_N["values"].min(1),
    }
    for name, fill_N in fills.items():
        rows_N["fill"] = fill_N
        found[f"top 100, filled with {name}"] = decode(rows_N, CLASSES)
    return {name: losses(exact_NK, logits_NK) for name, logits_NK in found.items()}


def measure_container(records: list[SoftLabels]) -> list[dict]:
    """Bytes a row in ArrayRecord files of several compressions, and with indices for bits.

    Every record is written ten times, so that the padding at a file's end does not count; each is
    compressed by itself.
    """
    found = []
    for name, coding in CODINGS.items():
        packed = [encode(r.logits_BK, coding) for r in records]
        layouts = {name: [rows_B.tobytes() for rows_B in packed]}
        if coding.top_k:
            layouts[f"{name}, classes as 16-bit indices"] = [
                _classes(rows_B).tobytes() + repack_fields(rows_B[_others(rows_B)]).tobytes()
                for rows_B in packed
            ]
        for layout, contents in layouts.items():
            sizes = {}
            for option in ("uncompressed", "zstd:3", "brotli:4"):
                with tempfile.TemporaryDirectory() as folder:
                    path = os.path.join(folder, "records")
                    writer = ArrayRecordWriter(path, f"group_size:1,{option}")
                    for content in contents * 10:
                        writer.write(content)
                    writer.close()
                    sizes[option] = os.path.getsize(path) / 10 / len(records) / BATCH
            found.append({"layout": layout, **sizes})
    return found


def _classes(rows_B: np.ndarray) -> np.ndarray:
    """The kept classes as 16-bit numbers."""
    kept_BK = np.unpackbits(rows_B["kept"], axis=1, count=CLASSES).astype(bool)
    return np.nonzero(kept_BK)[1].astype(np.uint16)


def _others(rows_B: np.ndarray) -> list[str]:
    return [name for name in rows_B.dtype.names or () if name != "kept"]


# --- online -----------------------------------------------------------------------------------


def measure_students(
    pool: TeacherPool, images: np.ndarray, records: list[SoftLabels], student: str, steps: int
) -> dict:
    """CPU seconds an image of a student that reads its labels, and of one that has them made."""
    labeller = Labeller(pool, LabelRecipe(HOW, "single", BATCH))
    plan = label_store.LabelPlan.of(len(images), CLASSES, BATCH, STORED, "int8", 100)
    recipe = TrainRecipe(VIEWS, HOW, loss="mse_gt", ce_weight=0.1, epochs=EPOCHS, accumulate=2)
    trainer = Trainer(build(student, CLASSES), recipe, PIXELS, view_seed=SEED, seed=0)
    targets = np.arange(len(images), dtype=np.int32)
    seconds: dict[str, float] = {}
    losses_of: dict[str, list[float]] = {}

    def train(mode: str, labels: Iterable[SoftLabels]) -> None:
        state = trainer.start(images.shape[1:])
        batches = soft_batches(images, targets, labels, per_epoch=plan.batches_per_epoch)
        losses_of[mode] = []
        for step, batch in enumerate(itertools.islice(batches, steps + 1)):
            state, loss = trainer.step(state, batch)
            losses_of[mode].append(float(loss))
            if step == 0:  # it compiled
                began = time.process_time()
        seconds[mode] = (time.process_time() - began) / steps / BATCH

    with tempfile.TemporaryDirectory() as folder:
        write(pathlib.Path(folder), plan, records)
        train("store", label_store.LabelReader(folder).read())
    train("online", OnlineLabels(labeller, images, plan, SEED).read())
    return {
        "student": student,
        "steps": steps,
        "same_losses": losses_of["store"] == losses_of["online"],
        "seconds": seconds,
    }


# --- the report -------------------------------------------------------------------------------


def report(found: dict) -> str:
    """The results in Markdown."""
    machine = ", ".join(f"{k} {v}" for k, v in found["machine"].items())
    count = found["images"]
    plain = count * EPOCHS * CLASSES * 2
    lines = [
        f"Commit {found['commit']}; {machine}. {count:,} images, {CLASSES:,} classes, batches of "
        f"{BATCH}; {STORED} epochs stored and scaled to {EPOCHS}.",
        "",
        "## Bytes",
        "",
        f"Everything in the store's folder counts: rows (image index, classes, fill, offset, "
        f"scale, codes), record headers, container, padding, manifest. The yardstick is "
        f"{count:,} x {EPOCHS} x {CLASSES:,} x 2 bytes = {plain / 1e6:,.0f} MB.",
        "",
        "| kept | epochs | bytes a row | bytes a label on disk | MB | times smaller |",
        "|:--|--:|--:|--:|--:|--:|",
    ]
    for name, epochs in CASES:
        row = found["store"][name]
        total = row["bytes_per_label"] * count * epochs
        lines.append(
            f"| {name} | {epochs} | {row['row_bytes']:,} | {row['bytes_per_label']:,.1f} "
            f"| {total / 1e6:,.1f} | **{plain / total:.2f}** |"
        )
    lines += [
        "",
        "## What is lost",
        "",
        "KL(exact || kept) of the softmax at temperatures 20 and 1, in nats; the root of the mean "
        "squared difference of logits; how often the largest logit is that of the same class.",
        "",
        "| kept | KL, T = 20 | KL, T = 1 | RMSE | same top-1 |",
        "|:--|--:|--:|--:|--:|",
    ]
    stored = {name: row["losses"] for name, row in found["store"].items()}
    for name, row in {**stored, **found["choices"]}.items():
        lines.append(
            f"| {name} | {row['kl_t20']:.2e} | {row['kl_t1']:.2e} | {row['rmse']:.4f} "
            f"| {row['top1_agreement']:.2%} |"
        )
    lines += [
        "",
        "## The container",
        "",
        "Bytes a row without index and header, every record compressed by itself; zstd is used.",
        "",
        "| layout | uncompressed | zstd:3 | brotli:4 |",
        "|:--|--:|--:|--:|",
    ]
    for row in found["container"]:
        sizes = " | ".join(f"{row[name]:,.1f}" for name in ("uncompressed", "zstd:3", "brotli:4"))
        lines.append(f"| {row['layout']} | {sizes} |")
    cost = found["online"]
    work = {
        "MobileNetV2 labels": found["label_seconds"],
        "the store is read (int8, top 100)": found["store"]["int8, top 100"]["read_seconds"],
        f"{cost['student']} trains on labels of the store": cost["seconds"]["store"],
        f"{cost['student']} trains on labels made online": cost["seconds"]["online"],
    }
    same = "the same losses, bit for bit" if cost["same_losses"] else "OTHER LOSSES"
    lines += [
        "",
        "## Online",
        "",
        "CPU time of all threads; on an otherwise idle machine of so many cores it is spread over "
        "them.",
        "",
        "| | CPU ms an image | images per CPU second |",
        "|:--|--:|--:|",
        *(f"| {name} | {1e3 * each:,.3g} | {1 / each:,.3g} |" for name, each in work.items()),
        "",
        f"The students: {cost['steps']} steps after one that compiled; both had {same}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=pathlib.Path, default=DATA)
    parser.add_argument("--student", default="resnet18")
    parser.add_argument("--steps", type=int, default=3, help="of the student, timed")
    parser.add_argument("--out", help="write OUT.json and OUT.md")
    arguments = parser.parse_args()
    images, pool = read_images(arguments.data), teacher(arguments.data)
    labeller = Labeller(pool, LabelRecipe(HOW, "single", BATCH))
    next(labeller.epoch(images[:BATCH], 0, seed=SEED))  # compiles
    records: list[SoftLabels] = []
    seconds = []
    for epoch in range(STORED):
        began = time.process_time()
        records += labeller.epoch(images, epoch, seed=SEED)
        seconds.append(time.process_time() - began)
        print(f"labelled epoch {epoch} in {seconds[-1]:.1f} s of CPU time", flush=True)
    found = {
        "commit": commit(),
        "machine": {
            "cpus": os.cpu_count(),
            "platform": platform.machine(),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "NPROC": os.environ["NPROC"],
        },
        "images": len(images),
        "label_seconds": statistics.median(seconds) / len(images),
        "store": measure_store(records, len(images)),
        "choices": measure_choices(records),
        "container": measure_container(records),
        "online": measure_students(pool, images, records, arguments.student, arguments.steps),
    }
    print(report(found))
    measuring.save(found, report(found), arguments.out)


if __name__ == "__main__":
    main()
