"""What a plan says of this machine: arithmetic on what is timed."""

from __future__ import annotations

import dataclasses
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.command import TINY, call
from helpers.compiling import fast_programs

from configs import tiny, tiny_d4m
from configs.methods import delt, prism
from prism_jax import plan
from prism_jax.config import batch_layout, resolve
from prism_jax.stages import relabel

__all__ = ["fast_programs"]  # a fixture


def test_the_time_of_an_image_by_hand(monkeypatch):
    """Decoding takes 8 seconds, an evaluation 2: three of six steps, one more of PNDM's."""
    c = tiny_d4m.get_config()
    c.generate.sampler = "pndm"
    e, calls = resolve(c), []
    size = min(e.generate.batch_size, batch_layout(e).size)

    def time(function):
        function()  # it runs
        calls.append(function)
        return 8.0 if len(calls) == 1 else 8.0 + 2.0 * 3

    monkeypatch.setattr(plan, "_time", time)
    found = plan._measured_images(e)
    each, images = (8 + 2 * 4) / size, e.recover.ipc * e.dataset.num_classes
    assert f"{each:.3g} s an image, {8 / size:.2g} s of it decoding" in found["recover takes"]
    hours = images * each / len(jax.local_devices()) / 3600
    assert found["recover takes"].startswith(f"about {plan.hours_of(hours)} on")
    assert "B a device in recover" in found["memory"]


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("psm", "8 passes over the real images: difficulty by {0}; group by {0}"),
        ("gvbsm", "4 passes over the real images: conv by {0}"),
        ("prism_plus", "a pass over the real images: features by resnet18"),
        ("prism", None),
    ],
)
def test_passes_over_the_real_images(method, said):
    e = resolve(importlib.import_module(f"configs.methods.{method}").get_config("digits"))
    found = plan._statistics(e).get("statistics")
    assert found == (said and said.format(", ".join(e.recover.pool)))


def test_an_iteration_of_phases_with_fewer_images_by_hand():
    """DELT's eight phases have 20, 40, 50, ..., 100 of a hundred images."""
    e = resolve(delt.get_config("imagenet,ipc10"))
    assert plan._mean_images(e) == pytest.approx(np.mean([20, 40, 50, 60, 70, 80, 90, 100]) / 100)
    assert plan._mean_images(resolve(prism.get_config("imagenet,ipc10"))) == 1


@pytest.mark.parametrize(
    ("on_cpu", "lanes", "warm", "first", "count"),
    [
        (True, 1, 50, 1, 1), (True, 2, 0.25, 1, 4), (True, 1, 0.001, 1, 50), (False, 1, 50, 50, 50),
    ],
)  # fmt: skip
def test_an_iteration_is_timed_over_several_draws(monkeypatch, on_cpu, lanes, warm, first, count):
    """Five slots draw; the first two dispatches, which compile and warm up, do not count.

    A dispatch is one of a run's length, on a CPU of what takes a second; all its lanes work.
    """

    class Engine(list):
        def __call__(self, seed, lanes):
            assert len(lanes) == len(self)

    monkeypatch.setattr(plan.parallel, "on_cpu", lambda: on_cpu)
    c = prism.get_config("digits")
    c.recover.ipc = 5
    ticks, asked = iter([0, 100, 0, warm, 0, 1, 0, 2, 0, 3, 0, 6]), []
    monkeypatch.setattr(plan.time, "monotonic", lambda: next(ticks))

    def lane(*given, slot, step, count):
        asked.append((slot, step, count))

    monkeypatch.setattr(plan, "_random_lane", lane)
    found = plan._time_draws(resolve(c), Engine(range(lanes)), None, None, 10)
    assert found == 3.0 / count / lanes
    slots, counts = (0, 1, 2, 3, 4, 0), (first, first, *[count] * 4)
    asked_once = list(zip(slots, range(1, 7), counts, strict=True))
    assert asked == [asked for asked in asked_once for _ in range(lanes)]


def test_disk_holds_what_a_run_writes(tmp_path):
    """The images of the set and of its control, as files."""
    root = tmp_path / "run"
    assert call(TINY, f"--workdir={root}", "--stages=squeeze,recover,relabel")[0] == 0
    written = sum(
        path.stat().st_size
        for folder in ("recover/images", "controls")
        for path in (root / folder).rglob("*.png")
    )
    said = re.search(r"at most ([\d.]+) kB of images", call(TINY, "--plan")[1])
    assert 0.5 < written / (1e3 * float(said[1])) < 1


def test_plan_builds_networks_in_the_numbers_that_a_run_has(monkeypatch):
    c = tiny.get_config()
    c.recover.dtype, c.relabel.dtype = "bfloat16", "float32"
    e = resolve(c)
    for names, dtype in ((e.recover.pool, e.recover.dtype), (e.relabel.teachers, e.relabel.dtype)):
        pool = plan._random_pool(e, names, dtype)
        assert {jnp.dtype(t.module.dtype).name for t in pool.teachers} == {dtype}
    built = []
    monkeypatch.setattr(plan, "_random_pool", lambda *given: built.append(given[1:]) or 1 / 0)
    for measure in (
        lambda: plan._measured_recover(e, 8, 10),
        lambda: plan._time_labels(e, 8, jax.devices()[:1]),
    ):
        with pytest.raises(ZeroDivisionError):
            measure()
    assert built == [(e.recover.pool, "bfloat16"), (e.relabel.teachers, "float32")]


def test_epochs_of_labels_that_no_student_reads_are_said(capsys):
    c = tiny.get_config()
    c.relabel.epochs, c.validate.epochs = 6, 2
    plan.show(resolve(c), "run", measure=False)
    assert "students read 2 of the epochs" in " ".join(capsys.readouterr().out.split())
    c.validate.epochs = 6
    plan.show(resolve(c), "run", measure=False)
    assert "of the epochs" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "times"),
    [
        ({}, 2),
        ({"validate__controls": ()}, 1),
        ({"validate__controls": ("full_real", "random_real_hard")}, 1),
        ({"validate__controls": ("real_herding", "real_balanced")}, 3),
        ({"relabel__labels_from": "there"}, 1),
        ({"validate__loss": "ce", "validate__controls": ()}, 0),
        ({"relabel__mode": "online", "validate__seeds": (0, 1)}, 2 * 2 * 2),
    ],
)
def test_how_often_a_set_is_labelled(changed, times):
    e = resolve(prism.get_config("digits"))
    assert len(e.validate.students) == 2
    for name, value in changed.items():
        section, _, field = name.partition("__")
        section_of = dataclasses.replace(getattr(e, section), **{field: value})
        e = dataclasses.replace(e, **{section: section_of})
    assert relabel.labelled_times(e) == times


def test_weights_that_are_not_there_are_told(tmp_path):
    """Those that are imported and those that are trained further, each by its field."""
    e = resolve(prism.get_config("digits"))
    networks = dict(e.networks)
    first, second, *_ = e.squeeze.teachers
    networks[first] = dataclasses.replace(networks[first], checkpoint="none/a.pth")
    networks[second] = dataclasses.replace(networks[second], start_from="none/b.pth")
    lines = plan.missing_weights(dataclasses.replace(e, networks=networks), str(tmp_path))
    assert [line.split(":")[0] for line in lines] == [f"teacher {first}", f"teacher {second}"]
    assert f"--config.networks.{first}.checkpoint=FILE" in lines[0]
    assert f"--config.networks.{second}.start_from=FILE" in lines[1]


def test_a_batch_that_devices_share_is_timed_on_them(monkeypatch, fast_programs):
    """Of eight devices four share a batch: two batches at a time, and a share of the memory."""
    c = tiny.get_config()
    c.recover.ipc, c.recover.batch_size, c.recover.slots_per_batch = 8, 8, 2
    e, timed = resolve(c), []

    def time_draws(e, engine, pool, recipe, size):
        timed.append(size)
        jax.block_until_ready(engine(e.seed, [plan._random_lane(e, engine, pool, recipe, size)]))
        return 3600.0

    monkeypatch.setattr(plan, "_time_draws", time_draws)
    sizes = []
    monkeypatch.setattr(plan, "size_of", lambda count: sizes.append(count) or "")
    units = 4
    for span, at_once in ((1, 4), (4, 2), (16, None)):
        spread = dataclasses.replace(e.parallel, recover_devices=span)
        found = plan._measured_recover(dataclasses.replace(e, parallel=spread), 8, 12 * units)
        if at_once is None:
            said = "parallel.recover_devices=16 share a batch, and this machine has 8 device(s)"
            assert said in found["recover takes"]
        else:
            hours = plan.hours_of(12 * units / at_once)
            said = f"about {hours} on {at_once * span} device(s): 3.6e+03 s"
            assert found["recover takes"].startswith(said)
    assert timed == [8, 8] and sizes[1] < 0.8 * sizes[0]
    # One CPU works on two batches at a time, in memory for both; seconds are of each.
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    monkeypatch.setattr(plan.parallel.environment, "cores", lambda: 2)
    monkeypatch.setattr(
        plan, "_time_draws", lambda e, engine, *given: timed.append(len(engine)) or 3600.0
    )
    found = plan._measured_recover(e, 8, 12 * units)
    assert found["recover takes"].startswith(f"about {plan.hours_of(12 * units)} on 1 device(s)")
    assert timed[2:] == [2] and 1.2 * sizes[0] < sizes[2] < 2 * sizes[0]
    # Where there is no memory for both, one after the other; a batch of two devices has not one.
    monkeypatch.setattr(plan.parallel.environment, "free_memory", lambda: 0)
    plan._measured_recover(e, 8, 12 * units)
    assert timed[3:] == [2] and sizes[3] == pytest.approx(sizes[0], rel=0.1)
    spread = dataclasses.replace(e.parallel, recover_devices=2)
    found = plan._measured_recover(dataclasses.replace(e, parallel=spread), 8, 12 * units)
    assert "this machine has 1 device(s)" in found["recover takes"]
