"""Images labelled per second, against PyTorch: views of uint8 images, an ensemble, logits out.

    python benchmarks/relabel.py --out=benchmarks/results/relabel_cpu
    python benchmarks/relabel.py --device=gpu --out=benchmarks/results/relabel_gpu

Both sides start from uint8 images in memory: a crop and a flip per image, CutMix, the networks
in evaluation mode, their mean logits back in memory. On a CPU ours labels two batches at a time, as
the relabel stage does. PyTorch's networks are channels-last.
"""

from __future__ import annotations

import json

import measuring
import numpy as np

POOL = ("resnet18", "mobilenet_v2", "efficientnet_b0", "shufflenet_v2_x0_5")
TEACHERS = {"resnet18": ("resnet18",), "four networks": POOL}
SHAPES = {"cpu": "50x64", "gpu": "100x224"}
SIDES = ("ours", "torch")


def images_of(spec: dict, batches: int) -> np.ndarray:
    """A set of so many batches, uint8 (N, H, W, 3)."""
    shape = (spec["batch"], spec["size"], spec["size"], 3)
    return np.tile(np.random.default_rng(0).integers(0, 256, shape, np.uint8), (batches, 1, 1, 1))


def our_side(spec: dict):
    """The labeller of the relabel stage."""
    import ours

    ours.begin(spec)
    from prism_jax import parallel
    from prism_jax.core.augment import Augment
    from prism_jax.labelling import Labeller, LabelRecipe

    class Ours(ours.Rates):
        def __init__(self):
            super().__init__(spec["device"])
            self._pool = ours.random_pool(TEACHERS[spec["teachers"]], spec)
            augment = Augment(0.25, True, "cutmix")
            recipe = LabelRecipe(augment, "mean", batch_size=spec["batch"])
            self._lanes = parallel.lane_devices(measuring.lanes(spec))
            self._labeller, self._epoch = Labeller(self._pool, recipe, devices=self._lanes), 0

        def run(self, count: int) -> None:
            """One epoch of ``count`` batches."""
            for record in self._labeller.epoch(images_of(spec, count), self._epoch, seed=0):
                np.asarray(record.logits_BK, np.float16)
            self._epoch += 1

        def facts(self) -> dict:
            shape = (spec["size"], spec["size"], 3)
            works = [ours.count_work(t.module, shape) for t in self._pool.teachers]
            work = {
                kind: spec["batch"] * sum(w[kind] for w in works) for kind in ("flops", "values")
            }
            return ours.facts(work, spec, len(self._lanes))

    return Ours()


def their_side(spec: dict):
    """The PyTorch side."""
    import torch_peer

    class Theirs(torch_peer.Side):
        def __init__(self):
            super().__init__(spec["device"])
            names = TEACHERS[spec["teachers"]]
            known = {key: spec[key] for key in ("size", "small_stem", "classes")}
            self._labeller = torch_peer.Labeller(names, **known, device=self.device)

        def run(self, count: int) -> None:
            images = images_of(spec, count)
            for batch in np.split(images, count):
                self._labeller.label(batch)

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
    for teachers in TEACHERS:
        for shape in (given.shapes or SHAPES[given.device]).split(","):
            batch, size = map(int, shape.split("x"))
            spec = {
                "device": given.device, "teachers": teachers, "batch": batch, "size": size,
                "classes": 1000, "small_stem": size <= 32,
                "precision": given.precision or "float32", "threads": given.threads,
            }  # fmt: skip
            row = measuring.compare(
                __file__, SIDES, spec, threads=given.threads, rounds=given.rounds,
                seconds=given.seconds, least=measuring.lanes(spec),
            )  # fmt: skip
            rows.append(spec | row)
            print(f"{teachers} {shape}:", json.dumps(row["ratios"]), flush=True)
    table = measuring.images_table(rows, "teachers")
    measuring.write({"machine": machine, "rows": rows}, table, given.out)


if __name__ == "__main__":
    main()
