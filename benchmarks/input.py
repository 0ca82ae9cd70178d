"""How fast real images come, beside torch's DataLoader; and what input costs a validation.

    python benchmarks/input.py --out=benchmarks/results/input_cpu

Part one reads one folder of JPEG files with our pipeline and with torchvision's ImageFolder and
PIL transforms (Resize 256, CenterCrop 224, uint8), in rounds that take turns; medians and their
ratio. The pixels are compared first. Part two trains a student on 100 images of 224 px with stored
labels, as validate does at IPC 10 on ten classes, and times each step and the wait for its batch.

Needs torch and torchvision beside prism_jax, and ``--images``: JPEG files in a folder or a tar.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import pathlib
import platform
import statistics
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator

os.environ.setdefault("NPROC", str(os.cpu_count()))

import jax
import measuring
import numpy as np
import PIL
import torch
import torch_peer  # noqa: F401 - lets torchvision be imported without its compiled operators
from PIL import Image
from torchvision import datasets, transforms

from prism_jax.core.augment import Augment
from prism_jax.data import label_store
from prism_jax.data.datasets import IMAGENET_NORMALISATION
from prism_jax.data.pipeline import batches, epoch_order
from prism_jax.data.sources import decoding, open_source, read_all
from prism_jax.environment import commit
from prism_jax.labelling import ORDER, VIEWS
from prism_jax.models import build
from prism_jax.training import Trainer, TrainRecipe, soft_batches
from prism_jax.types import SoftLabels

BESIDE = pathlib.Path(__file__).parents[1].parent / "shared" / "data"
DATA = pathlib.Path(os.environ.get("PRISM_JAX_SHARED_DATA", BESIDE))
BATCH, SIZE, WARM = 32, 224, 6  # batches that are not timed: they fill the buffers
CLASSES, IPC, EPOCHS = 10, 10, 300


# --- reading ------------------------------------------------------------------------------------


def files_of(images: pathlib.Path, count: int) -> list[bytes]:
    """The first JPEG files of a folder or a tar."""
    if images.is_dir():
        paths = sorted(p for p in images.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
        return [path.read_bytes() for path in paths[:count]]
    with tarfile.open(images) as tar:
        members = (m for m in tar if m.name.lower().endswith((".jpg", ".jpeg")))
        files = map(tar.extractfile, itertools.islice(members, count))
        return [file.read() for file in files if file is not None]


def enlarged(data: bytes) -> bytes:
    """A file of ImageNet's usual size: 500 x 375, quality 90."""
    buffer = io.BytesIO()
    image = Image.open(io.BytesIO(data)).convert("RGB").resize((500, 375))
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_folder(root: pathlib.Path, files: list[bytes]) -> pathlib.Path:
    for i, data in enumerate(files):
        path = root / "train" / f"class{i % CLASSES}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def by_torch(root: pathlib.Path, passes: int, workers: int) -> Iterator[np.ndarray]:
    centre = [transforms.Resize(256), transforms.CenterCrop(SIZE), transforms.PILToTensor()]
    peer = datasets.ImageFolder(root / "train", transforms.Compose(centre))
    order = list(range(len(peer))) * passes
    loader = torch.utils.data.DataLoader(
        peer, BATCH, sampler=order, num_workers=workers, drop_last=True
    )
    return (images.numpy() for images, _ in loader)


def by_us(root: pathlib.Path, passes: int, threads: int, workers: int = 0) -> Iterator[np.ndarray]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = open_source(
            name="imagenet", source="folder", path=root, split="train", image_size=SIZE
        )
    found = batches(
        source, batch_size=BATCH, epochs=passes, seed=0, name="benchmark", shuffle=False,
        threads=threads, workers=workers,
    )  # fmt: skip
    return (batch.images_BHWC for batch in found)


# Who reads ahead -> torch's way and ours.
READERS: dict[str, tuple[Callable, dict[str, Callable]]] = {
    "nobody": (
        lambda root, n: by_torch(root, n, 0),
        {"ours": lambda root, n: by_us(root, n, 0)},
    ),
    "1": (
        lambda root, n: by_torch(root, n, 1),
        {
            "1 thread": lambda root, n: by_us(root, n, 1),
            "1 process": lambda root, n: by_us(root, n, 0, 1),
        },
    ),
    "2": (
        lambda root, n: by_torch(root, n, 2),
        {
            "2 threads": lambda root, n: by_us(root, n, 2),
            "2 processes": lambda root, n: by_us(root, n, 0, 2),
        },
    ),
}


def rate(found: Iterator[np.ndarray]) -> tuple[float, float]:
    """Images per second after the first batches, and this process' CPU seconds per image."""
    for _ in range(WARM):
        next(found)
    began, cpu = time.perf_counter(), time.process_time()
    images = sum(len(batch) for batch in found)
    return images / (time.perf_counter() - began), (time.process_time() - cpu) / images


def measure_reading(root: pathlib.Path, kind: str, rounds: int, processes: bool) -> list[dict]:
    """One row per way to read ahead; the sides take turns."""
    ours, theirs = next(by_us(root, 1, 0)), next(by_torch(root, 1, 0))
    np.testing.assert_array_equal(ours, theirs.transpose(0, 2, 3, 1))
    rates: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for ahead, (torchs, sides) in READERS.items():
            for side, make in {"torch": torchs, **sides}.items():
                if "process" in side and not processes:
                    continue
                rates.setdefault((ahead, side), []).append(rate(make(root, 1)))
    rows = []
    for (ahead, side), found in rates.items():
        if side == "torch":
            continue
        (rate_N, cpu_N), (torch_rate_N, torch_cpu_N) = (
            zip(*some, strict=True) for some in (found, rates[ahead, "torch"])
        )
        row = {
            "images": kind,
            "reads_ahead": None if side == "ours" else side,
            "torch_workers": 0 if ahead == "nobody" else int(ahead),
            "torch_per_second": statistics.median(torch_rate_N),
            "ours_per_second": statistics.median(rate_N),
            "ratio": statistics.median(a / b for a, b in zip(rate_N, torch_rate_N, strict=True)),
            "rounds": {"torch": torch_rate_N, "ours": rate_N},
        }
        if ahead == "nobody":
            row["torch_cpu_seconds"] = statistics.median(torch_cpu_N)
            row["ours_cpu_seconds"] = statistics.median(cpu_N)
        rows.append(row)
        print(kind, side, f"{row['ratio']:.2f}", flush=True)
    return rows


# --- validation ---------------------------------------------------------------------------------


def measure_validation(root: pathlib.Path, name: str, width: float, steps: int) -> dict:
    """Seconds of a training step on stored labels, and of waiting for its batch."""
    count, batch_size = CLASSES * IPC, 50
    images = np.stack(list(itertools.islice(_images(root), count)))
    labels = np.repeat(np.arange(CLASSES, dtype=np.int32), IPC)
    random = np.random.default_rng(0)
    plan = label_store.LabelPlan.of(count, CLASSES, batch_size, 4, "float16")
    recipe = TrainRecipe(
        VIEWS, Augment(0.25, True, "cutmix"), loss="mse_gt", ce_weight=0.1, epochs=EPOCHS,
        accumulate=2,
    )  # fmt: skip
    module = build(name, CLASSES, width=width)
    trainer = Trainer(module, recipe, IMAGENET_NORMALISATION, view_seed=0, seed=0)
    state = trainer.start(images.shape[1:])
    with tempfile.TemporaryDirectory() as folder:
        for shard in range(plan.num_shards):
            records = [
                SoftLabels(
                    epoch, batch, epoch_order(0, ORDER, epoch, count)[batch::2].astype(np.int32),
                    random.standard_normal((batch_size, CLASSES), np.float32),
                )
                for epoch in plan.epochs_of(shard)
                for batch in range(plan.batches_per_epoch)
            ]  # fmt: skip
            label_store.write_shard(folder, plan, shard, records)
        label_store.write_manifest(folder, plan, images="", teachers={}, view={})
        reader = label_store.LabelReader(folder)

        def inputs(**options) -> Iterator:
            read = reader.read(epochs=EPOCHS, **options)
            return iter(soft_batches(images, labels, read, per_epoch=plan.batches_per_epoch))

        alone, waits, took = inputs(threads=0), [], []
        next(alone)
        began = time.perf_counter()
        for _ in range(200):
            next(alone)
        input_seconds = (time.perf_counter() - began) / 200
        found = inputs()
        for step in range(steps + 1):
            # XLA gives a step's memory back to the system after its results are there; whoever
            # allocates meanwhile waits (45 ms after a step of 2 s), which is no cost of input.
            time.sleep(0.5)
            began = time.perf_counter()
            batch = next(found)
            waits.append(time.perf_counter() - began)
            state, loss = trainer.step(state, batch)
            jax.block_until_ready(loss)
            took.append(time.perf_counter() - began)
            if step == 0:  # it compiled
                waits, took = [], []
    return {
        "student": name if width == 1 else f"{name}, width {width}",
        "batch": batch_size,
        "step_seconds": statistics.median(took),
        "wait_seconds": statistics.median(waits),
        "input_seconds": input_seconds,
        "input_share": input_seconds / statistics.median(took),
    }


def _images(root: pathlib.Path) -> Iterator[np.ndarray]:
    return (image for batch in by_us(root, 1, 0) for image in batch)


def measure_test_images(root: pathlib.Path) -> float:
    """Images per second of reading a whole split into memory, as the test images are, once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = open_source(
            name="imagenet", source="folder", path=root, split="train", image_size=SIZE
        )
    began = time.perf_counter()
    images, _ = read_all(source, threads=4)
    return len(images) / (time.perf_counter() - began)


# --- the report ---------------------------------------------------------------------------------


def report(found: dict) -> str:
    """The results in Markdown."""
    machine = ", ".join(f"{k} {v}" for k, v in found["machine"].items())
    lines = [
        f"Commit {found['commit']}; {machine}.",
        "",
        f"Images per second, {SIZE} px out, batches of {BATCH}, {found['count']} files, medians of "
        f"{found['rounds']} rounds in turns; the pixels are equal. Above 1 ours is faster.",
        "",
        "| files | torch workers | ours | torch | ours | ours / torch |",
        "|:--|--:|:--|--:|--:|--:|",
    ]
    for row in found["reading"]:
        lines.append(
            f"| {row['images']} | {row['torch_workers']} | {row['reads_ahead'] or '-'} "
            f"| {row['torch_per_second']:.0f} | {row['ours_per_second']:.0f} "
            f"| **{row['ratio']:.2f}** |"
        )
    alone = [row for row in found["reading"] if row["reads_ahead"] is None]
    cpu = (
        f"{row['images']}: torch {1e3 * row['torch_cpu_seconds']:.2f}, ours "
        f"{1e3 * row['ours_cpu_seconds']:.2f}"
        for row in alone
    )
    lines += [
        "",
        f"CPU milliseconds an image, read without help: {'; '.join(cpu)}.",
        "",
        f"Validation at IPC {IPC}, {CLASSES} classes, {SIZE} px, stored labels. *Input* is what a "
        "batch costs when it is read in the same thread, *wait* what the training waits for it.",
        "",
        "| student | batch | step, ms | input, ms | wait, ms | input / step |",
        "|:--|--:|--:|--:|--:|--:|",
    ]
    for row in found["validation"]:
        lines.append(
            f"| {row['student']} | {row['batch']} | {1e3 * row['step_seconds']:.0f} "
            f"| {1e3 * row['input_seconds']:.2f} | {1e3 * row['wait_seconds']:.2f} "
            f"| {100 * row['input_share']:.2f} % |"
        )
    lines += ["", f"Test images are read once: {found['test_images_per_second']:.0f} a second."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    default = DATA / "imagenet_sample" / "imagenet_sample1000_256.tar"
    parser.add_argument("--images", type=pathlib.Path, default=default)
    parser.add_argument("--count", type=int, default=1000, help="files to use")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="training steps per student")
    parser.add_argument("--students", default="resnet18:0.25,shufflenet_v2_x0_5:1,resnet18:1")
    parser.add_argument(
        "--without-processes", action="store_true", help="leave out our reading processes"
    )
    parser.add_argument("--out", help="write OUT.json and OUT.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    files = files_of(arguments.images, arguments.count)
    found = {
        "commit": commit(),
        "machine": {},
        "count": len(files),
        "rounds": arguments.rounds,
        "reading": [],
        "validation": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        sets = {"as stored": files, "500 x 375": [enlarged(data) for data in files]}
        for kind, some in sets.items():
            root = write_folder(pathlib.Path(folder) / kind, some)
            # Before JAX starts its threads: torch's loader forks.
            found["reading"] += measure_reading(
                root, kind, arguments.rounds, not arguments.without_processes
            )
        found["machine"] = {
            "cpus": os.cpu_count(),
            "platform": platform.machine(),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "torch": torch.__version__,
            "pillow": PIL.__version__,
            "simplejpeg": getattr(decoding.simplejpeg, "__version__", None),
            "load": round(os.getloadavg()[0], 1),
        }
        found["test_images_per_second"] = measure_test_images(root)
        for student in arguments.students.split(","):
            name, _, width = student.partition(":")
            row = measure_validation(root, name, float(width or 1), arguments.steps)
            found["validation"].append(row)
            print(row, flush=True)
    print(report(found))
    measuring.save(found, report(found), arguments.out)


if __name__ == "__main__":
    main()
