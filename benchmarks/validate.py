"""Images that a student trains on per second, labels read from disk, against PyTorch.

    python benchmarks/validate.py --out=benchmarks/results/validate_cpu
    python benchmarks/validate.py --device=gpu --out=benchmarks/results/validate_gpu

ResNet-18, AdamW, two parts per batch, so that BatchNorm sees 25 or 50 images. Both sides start
from uint8 images in memory and from soft labels on disk: a crop and a flip per image, CutMix,
the squared distance to the soft labels + 0.1 cross entropy. PyTorch is channels-last; on a GPU
compiled, with bfloat16 autocast.
"""

from __future__ import annotations

import json
import pathlib
import tempfile

import measuring
import numpy as np

SHAPES = {"cpu": "50x64,50x32", "gpu": "100x224"}
SIDES = ("ours", "torch")
BATCHES = 4  # of a set


def images_of(spec: dict) -> tuple[np.ndarray, np.ndarray]:
    """A set: uint8 (N, H, W, 3) and int32 (N,)."""
    rng = np.random.default_rng(0)
    count = BATCHES * spec["batch"]
    images = rng.integers(0, 256, (count, spec["size"], spec["size"], 3), np.uint8)
    return images, rng.integers(0, spec["classes"], count).astype(np.int32)


def our_side(spec: dict):
    """The trainer of the validate stage, and the label store."""
    import ours

    ours.begin(spec)
    import jax
    import jax.numpy as jnp

    from prism_jax.core.augment import Augment
    from prism_jax.core.pixels import IMAGENET
    from prism_jax.data import image_set, label_store
    from prism_jax.models import build
    from prism_jax.training import TrainBatch, Trainer, TrainRecipe
    from prism_jax.types import SoftLabels

    class Ours(ours.Rates):
        def __init__(self):
            super().__init__(spec["device"])
            self._images, self._labels = images_of(spec)
            self._folder = tempfile.TemporaryDirectory()
            self._reader = self._write_labels(pathlib.Path(self._folder.name))
            recipe = TrainRecipe(
                "relabel/view", Augment(0.25, True, "cutmix"), loss="mse_gt", ce_weight=0.1,
                epochs=300, accumulate=2,
            )  # fmt: skip
            stem = "small" if spec["small_stem"] else "imagenet"
            dtype = jnp.dtype(spec["precision"])
            self._module = build("resnet18", spec["classes"], stem=stem, dtype=dtype)
            self._trainer = Trainer(self._module, recipe, IMAGENET, view_seed=0, seed=0)
            self._state = self._trainer.start(self._images.shape[1:])
            self._records, self._done = iter(()), 0

        def _write_labels(self, root: pathlib.Path) -> label_store.LabelReader:
            count, classes = len(self._labels), spec["classes"]
            plan = label_store.LabelPlan.of(count, classes, batch_size=spec["batch"], epochs=2)
            rng = np.random.default_rng(0)
            for shard in range(plan.num_shards):
                records = (
                    SoftLabels(epoch, batch, index, rng.standard_normal((len(index), classes)))
                    for epoch in plan.epochs_of(shard)
                    for batch, index in enumerate(
                        np.split(np.arange(count, dtype=np.int32), BATCHES)
                    )
                )
                label_store.write_shard(root, plan, shard, records)
            digest = image_set.digest(self._images)
            label_store.write_manifest(root, plan, images=digest, teachers={}, view={})
            return label_store.LabelReader(root, images=digest)

        def _batches(self):
            while True:
                for record in self._reader.read():
                    index = record.index_B
                    yield TrainBatch(
                        record.epoch, record.batch, self._images[index], self._labels[index],
                        record.logits_BK,
                    )  # fmt: skip

        def run(self, count: int) -> None:
            """``count`` steps of the optimiser."""
            for batch, _ in zip(self._batches(), range(count), strict=False):
                self._state, loss = self._trainer.step(self._state, batch)
            assert np.isfinite(jax.device_get(loss))

        def facts(self) -> dict:
            work = ours.count_work(self._module, self._images.shape[1:])
            # Forward, and the gradients by inputs and by kernels.
            work = {kind: 3 * spec["batch"] * amount for kind, amount in work.items()}
            return ours.facts(work, spec)

    return Ours()


def their_side(spec: dict):
    """The PyTorch side; the labels of an epoch are one file."""
    import torch
    import torch_peer

    class Theirs(torch_peer.Side):
        def __init__(self):
            super().__init__(spec["device"])
            self._images, self._labels = images_of(spec)
            self._folder = tempfile.TemporaryDirectory()
            self._path = pathlib.Path(self._folder.name) / "labels.npy"
            logits = np.random.default_rng(0).standard_normal((len(self._labels), spec["classes"]))
            np.save(self._path, logits.astype(np.float16))
            known = {key: spec[key] for key in ("small_stem", "classes")}
            self._student = torch_peer.Student("resnet18", **known, device=self.device)

        def _batches(self):
            while True:
                labels = np.load(self._path)
                for index in np.split(np.arange(len(self._labels)), BATCHES):
                    yield self._images[index], self._labels[index], labels[index]

        def run(self, count: int) -> None:
            for batch, _ in zip(self._batches(), range(count), strict=False):
                loss = self._student.step(*batch)
            assert torch.isfinite(loss)
            self.wait()

    return Theirs()


def main() -> None:
    parser = measuring.arguments(__doc__)
    parser.add_argument("--shapes", help="batch x side, comma-separated")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), help="of ours")
    given = parser.parse_args()
    if given.side:
        spec = json.loads(given.spec)
        return measuring.serve(our_side(spec) if given.side == "ours" else their_side(spec))
    machine, rows = measuring.machine(), []  # its load before ours
    for shape in (given.shapes or SHAPES[given.device]).split(","):
        batch, size = map(int, shape.split("x"))
        spec = {
            "device": given.device, "network": "resnet18", "batch": batch, "size": size,
            "classes": 1000, "small_stem": size <= 32,
            "precision": given.precision or measuring.PRECISION[given.device],
        }  # fmt: skip
        row = measuring.compare(
            __file__, SIDES, spec, threads=given.threads, rounds=given.rounds,
            seconds=given.seconds,
        )  # fmt: skip
        rows.append(spec | row)
        print(f"{shape}:", json.dumps(row["ratios"]), flush=True)
    table = measuring.images_table(rows, "network")
    measuring.write({"machine": machine, "rows": rows}, table, given.out)


if __name__ == "__main__":
    main()
