"""One iteration of recover against PyTorch: the engine, and two ways to write the loop.

    python benchmarks/recover.py --out=benchmarks/results/recover_cpu
    python benchmarks/recover.py --device=gpu --out=benchmarks/results/recover_gpu
    python benchmarks/recover.py --threads=1     # CPU time, for machines where others work too

reference  the released loop's structure: the primary loaded and run twice, variances of permuted
           copies, terms that are in no loss, a look at the loss in every iteration
fast       the same mathematics with nothing superfluous, channels-last; on a GPU also bfloat16
           autocast and torch.compile

In every turn each teacher beside the primary is drawn in exactly half of the iterations, as
often as PRISM's draw has it on average. A turn of ours is one dispatch of the engine.
"""

from __future__ import annotations

import functools
import json
import random

import measuring

POOLS = {
    "prism": ("resnet18", "mobilenet_v2", "efficientnet_b0", "shufflenet_v2_x0_5"),
    "resnet18": ("resnet18",),
}
SHAPES = {"cpu": "10x224,20x64,100x32", "gpu": "100x224"}
SIDES = ("ours", "fast", "reference")
STEPS = 50_000  # in which a dispatch with balanced draws is looked for


def our_side(spec: dict):
    """The engine."""
    import ours

    ours.begin(spec)
    import jax
    import jax.numpy as jnp
    import numpy as np

    from prism_jax import parallel, rng, synthesis

    class Ours(ours.Rates):
        def __init__(self):
            super().__init__(spec["device"])
            names, shape = POOLS[spec["pool"]], (spec["size"], spec["size"], 3)
            self._pool = ours.random_pool(names, spec)
            method = "prism" if len(names) > 1 else "sre2l"
            self._recipe = synthesis.Recipe(
                method=method, granularity="per_iteration", roll=spec["roll"]
            )
            devices = parallel.lane_devices(measuring.lanes(spec))
            self._engine = synthesis.engine(self._pool, self._recipe, devices=devices)
            images = np.random.default_rng(0).standard_normal((spec["batch"], *shape), np.float32)
            labels = np.arange(spec["batch"], dtype=np.int32)
            self._unit = synthesis.UnitBatch(np.int32(0), np.int32(0), np.int32(2 * STEPS), labels)
            state = jax.device_get(synthesis.initial_state(self._pool, self._recipe, images))
            self._lanes = [
                (self._place(self._unit), self._place(state)) for _ in range(len(self._engine))
            ]

        def _place(self, tree):
            return self._engine.place(tree, 0)

        def run(self, count: int) -> None:
            """One dispatch of ``count`` iterations, shared out among the lanes."""
            assert count % len(self._lanes) == 0
            count //= len(self._lanes)
            start = np.int32(self._start(count))
            done = self._engine(
                0,
                [
                    (unit, state._replace(step=self._place(start)), self._place(np.int32(count)))
                    for unit, state in self._lanes
                ],
            )
            assert all(np.isfinite(self._engine.fetch(report).last.loss) for _, report in done)
            self._lanes = [
                (unit, state) for (unit, _), (state, _) in zip(self._lanes, done, strict=True)
            ]

        @functools.cache  # noqa: B019 - it lives as long as the process
        def _start(self, count: int) -> int:
            """The first step, but 0, from which each teacher is drawn half of ``count`` times."""

            def drawn(step):
                key = rng.root(np.uint32(0))
                return synthesis.draw_teachers(
                    self._recipe, self._pool.teachers, key, self._unit, step
                ).statistic_weights_T

            weights_NT = jax.jit(jax.vmap(drawn))(jnp.arange(STEPS, dtype=jnp.int32))
            sums_NT = np.cumsum(np.asarray(weights_NT)[:, 1:] > 0, axis=0)
            excess_NT = sums_NT[count:] - sums_NT[:-count] - count // 2
            return 1 + int(np.argmin(np.abs(excess_NT).sum(1)))

        def facts(self) -> dict:
            """Forward and input gradient, of the primary and of half of the others."""
            if spec["profile"]:
                with jax.profiler.trace(spec["profile"]):
                    self.run(max(2, len(self._pool)))
            modules = [teacher.module for teacher in self._pool.teachers]
            works = [ours.count_work(m, (spec["size"], spec["size"], 3)) for m in modules]
            shares = [1.0] + [0.5] * (len(works) - 1)
            work = {
                kind: 2
                * spec["batch"]
                * sum(s * w[kind] for s, w in zip(shares, works, strict=True))
                for kind in ("flops", "values")
            }
            return ours.facts(work, spec, len(self._lanes))

    return Ours()


def their_side(spec: dict, *, released: bool):
    """The PyTorch side."""
    import torch_peer

    class Theirs(torch_peer.Side):
        def __init__(self):
            super().__init__(spec["device"])
            self._names = POOLS[spec["pool"]]
            self._loop = torch_peer.Recover(
                self._names, batch=spec["batch"], size=spec["size"], roll=spec["roll"],
                small_stem=spec["small_stem"], released=released, device=self.device,
            )  # fmt: skip
            self._rng = random.Random(0)

        def run(self, count: int) -> None:
            """Iterations in pairs: any subset of the others, then the rest of them."""
            others = range(1, len(self._names))
            for number in range(count):
                if number % 2 == 0:
                    drawn = [t for t in others if self._rng.random() < 0.5]
                else:
                    drawn = [t for t in others if t not in drawn]
                self._loop.step((0, *drawn))
            self.wait()

    return Theirs()


def table(rows: list[dict]) -> str:
    """The results in Markdown."""
    lines = [
        "| pool | images | threads | ours | fast | reference | fast / ours | reference / ours "
        "| per image | matmul | copy |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        sides, clock = row["sides"], row["clock"]
        seconds = {side: sides[side][f"median_{clock}"] for side in SIDES}
        times = " | ".join(f"{1e3 * s:.1f}" for s in seconds.values())
        ratios = " | ".join(f"**{row['ratios'][side][clock]:.2f}**" for side in SIDES[1:])
        lines.append(
            f"| {row['pool']} | {row['batch']} x {row['size']} px | {row['threads']} | {times} "
            f"| {ratios} | {1e3 * seconds['ours'] / row['batch']:.3f} "
            f"| {measuring.roofline_cells(row)} |"
        )
    lines += [
        "",
        "Milliseconds per iteration (of a thread's time with one thread, else of the clock), and "
        "of ours per image. Last, the work that cannot be left out (convolutions and dense "
        "layers, forward and input gradient, the primary once; their inputs, outputs and kernels, "
        "once) as shares of the measured matrix-product and copy rates.",
        "",
        "| pool | images | ours, MB | fast, MB | reference, MB | ours / reference "
        "| resident: ours, fast, reference |",
        "|:--|--:|--:|--:|--:|--:|:--|",
    ]
    for row in rows:
        where = f"| {row['pool']} | {row['batch']} x {row['size']} px |"
        lines.append(f"{where} {measuring.memory_cells(row)} |")
    return "\n".join([*lines, "", measuring.MEMORY_NOTE])


def main() -> None:
    parser = measuring.arguments(__doc__)
    parser.add_argument("--pools", default=",".join(POOLS))
    parser.add_argument("--shapes", help="batch x side, comma-separated")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), help="of ours")
    parser.add_argument("--deterministic", choices=("on", "off"), default="on", help="of ours")
    parser.add_argument("--profile", help="a folder for a trace of ours, for TensorBoard or xprof")
    given = parser.parse_args()
    if given.side:
        spec = json.loads(given.spec)
        released = given.side == "reference"
        side = our_side(spec) if given.side == "ours" else their_side(spec, released=released)
        return measuring.serve(side)
    machine, rows = measuring.machine(), []  # its load before ours
    for pool in given.pools.split(","):
        for shape in (given.shapes or SHAPES[given.device]).split(","):
            batch, size = map(int, shape.split("x"))
            spec = {
                "device": given.device,
                "pool": pool,
                "batch": batch,
                "size": size,
                "classes": 1000,
                "small_stem": size <= 32,
                "roll": size // 7,  # 32 of 224 pixels
                "precision": given.precision or measuring.PRECISION[given.device],
                "deterministic": given.deterministic == "on",
                "profile": given.profile,
                "threads": given.threads,
            }
            row = measuring.compare(
                __file__, SIDES, spec, threads=given.threads, rounds=given.rounds,
                seconds=given.seconds, least=min(2, len(POOLS[pool])) * measuring.lanes(spec),
            )  # fmt: skip
            rows.append(spec | row)
            print(f"{pool} {shape}:", json.dumps(row["ratios"]), flush=True)
    measuring.write({"machine": machine, "rows": rows}, table(rows), given.out)


if __name__ == "__main__":
    main()
