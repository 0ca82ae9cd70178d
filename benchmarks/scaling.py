"""What a data set would cost on many devices: the real scheduler, replayed with measured costs.

    python benchmarks/scaling.py [--out=benchmarks/results/scaling]
    python benchmarks/scaling.py --measure       the costs on the host, on this machine

Units are made, ordered, dealt out and divided into dispatches by the functions that the recover
stage itself uses; time is added up instead of spent. A process works on one unit per device, in
lockstep; checkpoints and finished units stop all its devices. A host that vanishes ends the run
after ``notice`` seconds; the others save; all start again.

The cost of an iteration on a GPU was not measured by us. The default is a published one: 0.522 ms
per image and iteration, ResNet-18, 224 px, one RTX 4090: the 29 h that CDA's authors and DELT's
table 6 give for ImageNet-1K at 50 images per class and 4,000 iterations. Start-up is an
assumption. What happens on the host was measured (``--measure``).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import tempfile
import time
from collections import deque

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from prism_jax.data.label_store import LabelPlan  # noqa: E402
from prism_jax.parallel import (  # noqa: E402
    HEARTBEAT_SECONDS,
    longest_first,  # noqa: E402
    share,
)
from prism_jax.stages.makers.optimise import iterations_ahead  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Work:
    """A set to be made."""

    name: str
    classes: int
    ipc: int
    classes_per_unit: int
    image_size: int = 224
    iterations: int = 4000
    steps_per_dispatch: int = 50
    checkpoint_seconds: float = 60.0
    label_epochs: int = 300

    @property
    def units(self) -> int:
        return self.ipc * self.classes // self.classes_per_unit

    @property
    def images(self) -> int:
        return self.ipc * self.classes

    @property
    def checkpoint_bytes(self) -> int:
        """Images and Adam's two moments, float32."""
        return 3 * self.classes_per_unit * self.image_size**2 * 3 * 4


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds, unless named otherwise.

    Attributes:
      image_iteration: one image, one iteration, one teacher: RTX 4090, ResNet-18 (published).
      teachers: networks that are run in the mean iteration: 1 for SRe2L; 2.5 for PRISM, each
        counted as a ResNet-18.
      save_per_byte: a checkpoint stops its process' devices (copy and digest; measured).
      finish_per_image: a finished unit does (PNG files and the record; measured).
      start: processes, weights and compilation, at every start (assumed).
      notice: until a vanished host ends the run (``parallel.HEARTBEAT_SECONDS``).
      host_hours: mean time between failures of one host; None: none fails.
    """

    image_iteration: float = 0.522e-3
    teachers: float = 1.0
    save_per_byte: float = 0.0
    finish_per_image: float = 0.0
    start: float = 120.0
    notice: float = HEARTBEAT_SECONDS
    host_hours: float | None = None


@dataclasses.dataclass
class Outcome:
    """What a run took.

    Attributes:
      seconds: from the first start to the last image.
      busy: device-seconds of iterations that were kept.
      lost: device-seconds of iterations that were done again.
      checkpoints: how many were written.
      starts: how often the run was started.
    """

    seconds: float = 0.0
    busy: float = 0.0
    lost: float = 0.0
    checkpoints: float = 0
    starts: float = 0


def simulate(
    work: Work, costs: Costs, *, devices: int, per_host: int = 8, span: int = 1, seed: int = 0
) -> Outcome:
    """Replay recover.

    Args:
      devices: in all.
      per_host: of each process.
      span: devices that share one image batch, at perfect efficiency.
    """
    hosts, lanes = max(1, devices // per_host), min(devices, per_host) // span
    random = np.random.default_rng(seed)
    step = costs.image_iteration * costs.teachers * work.classes_per_unit / span
    done = dict.fromkeys(range(work.units), 0)
    found = Outcome()
    while left := [u for u in longest_first(done, lambda _: work.iterations)
                   if done[u] < work.iterations]:  # fmt: skip
        found.starts += 1
        fails_at, failing = np.inf, None
        if costs.host_hours:
            at_H = random.exponential(3600.0 * costs.host_hours, hosts)
            failing = int(at_H.argmin())
            fails_at = float(at_H[failing])
        ends = [
            _process(
                work, costs, found, done, share(left, host, hosts), lanes, step, span,
                until=fails_at if host == failing else fails_at + costs.notice,
                saves=host != failing,
            )
            for host in range(hosts)
        ]  # fmt: skip
        finished = all(n >= work.iterations for n in done.values())
        found.seconds += max(ends) if finished else fails_at + costs.notice
    return found


def _process(
    work: Work,
    costs: Costs,
    found: Outcome,
    done: dict[int, int],
    units: list[int],
    lanes: int,
    step: float,
    span: int,
    *,
    until: float,
    saves: bool,
) -> float:
    """One process from its start until its work ends or it is stopped; returns when it ended.

    ``done`` is told what a next start finds: finished units and checkpoints.
    """
    now, queue = costs.start, deque(units)
    working: list[list] = []  # [unit, iterations, when it was saved last]
    while (queue or working) and now < until:
        while queue and len(working) < lanes:
            unit = queue.popleft()
            working.append([unit, done[unit], now])
        counts = [
            iterations_ahead(n, work.iterations, work.steps_per_dispatch) for _, n, _ in working
        ]
        now += step * max(counts)
        if now >= until:
            break
        for lane, count in zip(list(working), counts, strict=True):
            lane[1] += count
            unit, at, saved = lane
            if at >= work.iterations:
                now += costs.finish_per_image * work.classes_per_unit
                found.busy += span * step * (at - done[unit])
                done[unit] = at
                working.remove(lane)
            elif now - saved >= work.checkpoint_seconds:
                now += costs.save_per_byte * work.checkpoint_bytes
                found.checkpoints += 1
                found.busy += span * step * (at - done[unit])
                done[unit], lane[2] = at, now
    for unit, at, _ in working:  # stopped
        if saves:
            found.checkpoints += 1
            found.busy += span * step * (at - done[unit])
            done[unit] = at
        else:
            found.lost += span * step * (at - done[unit])
    return now


# --- the table ------------------------------------------------------------------------------

WORKS = [Work(f"ImageNet-1K IPC {n}", 1000, n, 100) for n in (10, 50, 100, 200)]
# 10,450 classes (winter 2021, processed) divide into 110 blocks of 95; two images per class.
WORKS += [Work(f"ImageNet-21K IPC {n}", 10450, n, 95) for n in (10, 20)]
DEVICES = (8, 64, 512)
SEEDS = 5  # runs with failures are the mean of so many


def row(work: Work, costs: Costs, devices: int, span: int = 1) -> dict:
    """A line of the table."""
    runs = [
        simulate(work, costs, devices=devices, span=span, seed=seed)
        for seed in range(SEEDS if costs.host_hours else 1)
    ]
    means = {
        field.name: float(np.mean([getattr(r, field.name) for r in runs]))
        for field in dataclasses.fields(Outcome)
    }
    found = Outcome(**means)
    per_second = found.checkpoints * work.checkpoint_bytes / found.seconds
    return {
        "set": work.name, "devices": devices, "span": span, "units": work.units,
        "teachers": costs.teachers, "checkpoint_seconds": work.checkpoint_seconds,
        "host_hours": costs.host_hours, "hours": found.seconds / 3600, "starts": found.starts,
        "idle": 1 - found.busy / (found.seconds * devices),
        "start_up": found.starts * costs.start / found.seconds,
        "lost_device_hours": found.lost / 3600,
        "checkpoints_gb": found.checkpoints * work.checkpoint_bytes / 1e9,
        "mean_gb_per_second": per_second / 1e9,
        "in_flight_gb": min(work.units, devices // span) * work.checkpoint_bytes / 1e9,
    }  # fmt: skip


def storage(work: Work) -> dict:
    """Files and bytes that stay; a PNG has at most some three bytes per pixel."""
    plain = LabelPlan.of(work.images, work.classes, batch_size=100, epochs=work.label_epochs)
    small = LabelPlan.of(
        work.images, work.classes, batch_size=100, epochs=work.label_epochs // 10,
        precision="int8", top_k=100,
    )  # fmt: skip
    return {
        "set": work.name,
        "images": work.images,
        "files": work.images + work.units + plain.num_shards,
        "images_gb": work.images * 3 * work.image_size**2 / 1e9,
        "labels_gb": plain.epochs * plain.epoch_bytes / 1e9,
        "small_labels_gb": small.epochs * small.epoch_bytes / 1e9,
        "dispatch_lines": work.units * -(-work.iterations // work.steps_per_dispatch),
    }


def measure() -> dict[str, float]:
    """The host's share: a checkpoint of a unit of 100 images of 224 px, and its PNG files."""
    from prism_jax.data import image_set
    from prism_jax.data.checkpoints import Checkpoints

    work, found = WORKS[0], {}
    random = np.random.default_rng(0)
    images = random.standard_normal((100, 224, 224, 3), np.float32)
    levels = random.integers(0, 256, images.shape, np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        checkpoints = Checkpoints(root / "unit")
        checkpoints.save(0, np.zeros(1, np.float32))  # imports Orbax
        began = time.monotonic()
        checkpoints.save(1, (images, images, images))
        found["save_stops_seconds"] = time.monotonic() - began
        checkpoints.close()
        found["save_whole_seconds"] = time.monotonic() - began
        began = time.monotonic()
        again = Checkpoints(root / "unit")
        again.restore((images, images, images))
        again.close()
        found["restore_seconds"] = time.monotonic() - began
        began = time.monotonic()
        image_set.write_images(root / "images", levels, [0] * 100, list(range(100)))
        found["finish_seconds"] = time.monotonic() - began
        sizes = [p.stat().st_size for p in (root / "images").rglob("*.png")]
    found["noise_png_bytes"] = float(np.mean(sizes))
    found["save_per_byte"] = found["save_stops_seconds"] / work.checkpoint_bytes
    found["finish_per_image"] = found["finish_seconds"] / 100
    return found


def table(rows: list[dict], columns: dict[str, tuple[str, str]]) -> str:
    """Markdown of some columns, each with a heading and a format."""
    head = "| " + " | ".join(title for title, _ in columns.values()) + " |"
    rule = "|" + "|".join(":--" if i == 0 else "--:" for i in range(len(columns))) + "|"
    lines = [
        "| "
        + " | ".join("never" if r[k] is None else format(r[k], f) for k, (_, f) in columns.items())
        + " |"
        for r in rows
    ]
    return "\n".join([head, rule, *lines])


TIME = {
    "set": ("set", ""), "units": ("units", ",d"), "teachers": ("networks", ".1f"),
    "devices": ("devices", "d"), "span": ("a batch on", "d"), "hours": ("hours", ".2f"),
    "idle": ("idle", ".0%"), "start_up": ("start-up", ".1%"),
    "checkpoints_gb": ("checkpoints, GB", ",.0f"), "mean_gb_per_second": ("GB/s", ".2f"),
    "in_flight_gb": ("in flight, GB", ".1f"),
}  # fmt: skip
FAULTS = {
    "set": ("set", ""), "devices": ("devices", "d"),
    "host_hours": ("host fails after, hours", ".0f"),
    "checkpoint_seconds": ("checkpoint every, s", ".0f"), "starts": ("starts", ".1f"),
    "hours": ("hours", ".2f"), "lost_device_hours": ("lost, device-hours", ".1f"),
    "mean_gb_per_second": ("GB/s", ".2f"),
}  # fmt: skip
DISK = {
    "set": ("set", ""), "images": ("images", ",d"), "files": ("files", ",d"),
    "images_gb": ("images, GB at most", ".1f"),
    "labels_gb": ("labels, float16, 300 epochs, GB", ",.0f"),
    "small_labels_gb": ("labels, int8, top 100, 30 epochs, GB", ",.1f"),
    "dispatch_lines": ("lines of metrics", ",d"),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, help="write OUT.json and OUT.md")
    parser.add_argument("--measure", action="store_true", help="measure the host's costs and stop")
    parser.add_argument("--save-per-byte", type=float, default=2.3e-9)
    parser.add_argument("--finish-per-image", type=float, default=3.5e-3)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(), indent=2))
        return
    host = {"save_per_byte": given.save_per_byte, "finish_per_image": given.finish_per_image}
    times = [
        row(work, Costs(teachers=teachers, **host), devices)
        for work in WORKS for teachers in (1.0, 2.5) for devices in DEVICES
    ]  # fmt: skip
    spans = [row(WORKS[0], Costs(teachers=2.5, **host), 512, span) for span in (1, 2, 4)]
    faults = [
        row(
            dataclasses.replace(work, checkpoint_seconds=every),
            Costs(teachers=2.5, host_hours=hours, **host), devices,
        )
        for work, devices in ((WORKS[3], 64), (WORKS[3], 512), (WORKS[5], 512))
        for hours in (24.0, 720.0) for every in (60.0, 300.0, 900.0)
    ]  # fmt: skip
    disk = [storage(work) for work in WORKS]
    text = "\n\n".join([
        "## Time", table(times, TIME), "## One batch on several devices", table(spans, TIME),
        "## Hosts that vanish", table(faults, FAULTS), "## Disk", table(disk, DISK),
    ])  # fmt: skip
    print(text)
    if given.out:
        found = {"host": host, "times": times, "spans": spans, "faults": faults, "disk": disk}
        given.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        given.out.with_suffix(".md").write_text(text + "\n")


if __name__ == "__main__":
    main()
