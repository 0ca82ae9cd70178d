"""The plan for a machine that is not here: arithmetic on what its compiler says."""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest
from helpers.accelerators import experiment
from helpers.command import ROOT, call

from configs import base, d4m_digits, tiny, tiny_d4m
from configs.methods import cao2, d4m, delt, gvbsm, prism
from prism_jax.accelerators import compiling, forecast, targets
from prism_jax.accelerators.account import Account, Cost
from prism_jax.accelerators.compiling import Found
from prism_jax.config import resolve
from prism_jax.config.generation import SCHEDULES, sampling_of
from prism_jax.diffusion import samplers
from prism_jax.errors import UserError

H100, V5E = targets.parse("h100"), targets.parse("v5e:2x2")
GIB = 1 << 30
OTHER = "convnet_d2_bn"


def compiler(each: int, weights: int = GIB, **more):
    """A compiler for which an image takes ``each`` bytes; and what it was asked."""
    asked = []

    def compile_program(made, target, program, **given):
        size = made.recover.batch_size or 4
        asked.append(size)
        total = weights + each * size
        memory = {"arguments": weights, "total": total}
        cost = Account(Cost(10, 1e9, 1e12, 0.002, 3e6), {OTHER: Cost(4, 0, 0, 0.001, 6e6)})
        found = Found("compiled", memory=memory, cost=cost, **more)
        if target.device.platform == "tpu" and total > target.device.memory_bytes:
            found = Found("out of memory", needed_bytes=total, **more)
        return found

    return compile_program, asked


def planned(monkeypatch, target, each, *, batch=4, classes=100, weights=GIB, **more):
    fields = {"dataset__num_classes": classes, "recover__batch_size": batch, "recover__ipc": 1}
    fields |= {"recover__granularity": "per_iteration", "recover__iterations": 1000}
    made = experiment(["convnet_d1_bn", "convnet_d2_bn"], side=16, **fields)
    compile_program, asked = compiler(each, weights, **more)
    monkeypatch.setattr(compiling, "compile_program", compile_program)
    monkeypatch.setattr(targets, "compiler_missing", lambda target: None)
    return forecast.rows(made, target), asked, made


def test_a_batch_that_fits_and_the_largest_that_would(monkeypatch):
    found, asked, _ = planned(monkeypatch, H100, GIB)  # 60 GiB are JAX's: 59 images
    assert "recover.batch_size=50 would fit (compiled)" in found["memory"]
    assert asked[:2] == [4, 50]


def test_a_batch_that_cannot_fit(monkeypatch):
    found, asked, _ = planned(monkeypatch, V5E, GIB, batch=100)
    over = 101 * GIB - 16 * GIB
    assert f"{forecast.size_of(over)} more" in found["memory"]
    assert "recover.batch_size=10 would fit (compiled)" in found["memory"]
    assert found["recover takes"].startswith("unknown: the program does not fit")
    assert len(asked) <= 1 + forecast.TRIES + 3


def test_nothing_fits(monkeypatch):
    found, asked, _ = planned(monkeypatch, V5E, 20 * GIB, batch=100)
    assert "no smaller batch that was tried fits" in found["memory"]
    assert len(asked) <= 1 + forecast.TRIES + 3


def test_slow_compilations_are_not_repeated(monkeypatch):
    found, asked, _ = planned(monkeypatch, H100, GIB, compile_seconds=800.0)
    assert "recover.batch_size=50 would fit (by proportion, not compiled)" in found["memory"]
    assert 50 not in asked


def test_hours_by_hand(monkeypatch):
    """25 units on four chips are seven rounds of a thousand iterations each."""
    found, _, made = planned(monkeypatch, V5E, 1)
    share = forecast.shares(made)
    assert share["convnet_d1_bn"] == 1.0 and 0.3 < share["convnet_d2_bn"] < 0.7
    seconds = (3e6 + share["convnet_d2_bn"] * 6e6) / 1.5e9
    assert f"{1e3 * seconds:.3g} ms an iteration, on 4 device(s)" in found["recover takes"]
    assert found["recover takes"].startswith(f"about {7000 * seconds:.0f} s:")
    assert found["collectives"] == "none"
    gpu, _, _ = planned(monkeypatch, H100, 1)
    seconds = 0.002 + share["convnet_d2_bn"] * 0.001
    assert f"{1e3 * seconds:.3g} ms an iteration" in gpu["recover takes"]
    assert gpu["recover takes"].startswith("at least") and "lower bound" in gpu["recover takes"]


def test_hours_of_teachers_that_are_trained_here_by_hand(monkeypatch):
    """576 digits in batches of 64 are nine steps an epoch, and a test, of 3 ms each."""
    monkeypatch.setattr(targets, "compiler_missing", lambda target: None)
    monkeypatch.setattr(compiling, "compile_program", compiler(1)[0])
    c = tiny.get_config()
    c.squeeze.batch_size, c.squeeze.epochs = 64, 1000
    made = resolve(c)
    found = forecast.rows(made, H100)
    trained = [name for name in made.squeeze.teachers if not made.network(name).checkpoint]
    assert trained
    for name in trained:
        said = f"at least {forecast.hours_of(30 / 3600)}: 3 ms a step, on one host"
        assert found[f"teacher {name} takes"].startswith(said)
    path = dataclasses.replace(made.network(trained[0]), checkpoint="there.pth")
    made = dataclasses.replace(made, networks={**made.networks, trained[0]: path})
    assert f"teacher {trained[0]} takes" not in forecast.rows(made, H100)
    away = dataclasses.replace(made.dataset, name="imagenet", source="folder", path="nowhere")
    found = forecast.rows(dataclasses.replace(made, dataset=away), H100)
    assert found[f"teacher {trained[1]}"].startswith("not here to be counted; 3 ms a step")


def test_hours_of_students_and_labels_by_hand(monkeypatch):
    """Eight images in batches of four, six epochs; of every program 3 ms."""
    monkeypatch.setattr(targets, "compiler_missing", lambda target: None)
    monkeypatch.setattr(compiling, "compile_program", compiler(1)[0])
    c = tiny.get_config()
    c.squeeze.epochs = 1000

    def times(target="h100", **changed):
        """How often 3 ms: of labels, and of the student."""
        made = resolve(c, [])
        for section, fields in changed.items():
            changes = {section: dataclasses.replace(getattr(made, section), **fields)}
            made = dataclasses.replace(made, **changes)
        found = forecast.stages(made, targets.parse(target), {})
        hours = [found[name].hours if name in found else 0 for name in ("relabel takes",
                 "outside takes")]  # fmt: skip
        return [round(3600 * h / 0.003) for h in hours]

    test_images = -(-len(forecast.shapes_of(resolve(c)).inputs.open("test").labels_N) // 256)
    # Two sets have soft labels, three train alike, tested every second epoch; the full real set of
    # 576 images is trained as long as a teacher.
    full = 1000 * 144 + 500 * test_images
    assert times() == [2 * 6 * 2, 3 * 6 * 2 + 3 * 3 * test_images + full]
    assert times("h100x8")[0] == 2 * 6  # both batches of an epoch at once
    assert times(validate={"controls": ()}) == [6 * 2, 6 * 2 + 3 * test_images]
    assert times(validate={"seeds": (0, 1)})[1] == 2 * times()[1]
    online = times(relabel={"mode": "online"}, validate={"seeds": (0, 1)})
    assert online[0] == 2 * times()[0]
    read = times(relabel={"labels_from": "there"}, validate={"controls": ()})
    assert read[0] == 0
    # Of two hosts: four trainings, two each; online each is labelled where it trains, one of two.
    assert times("h100x16")[1] == times()[1] // 2
    shared = times("h100x16", relabel={"mode": "online"}, validate={"seeds": (0, 1)})
    assert shared[0] == 2 * 6  # two trainings of six epochs, both batches at once


def test_hosts_label_shards_of_their_own():
    made = resolve(tiny.get_config())
    many = dataclasses.replace(made.relabel, epochs=300)
    made = dataclasses.replace(made, relabel=many)
    plan = forecast.relabel.plan_for(forecast.shapes_of(made), 8)
    slice_of_64 = targets.parse("v5e:16x16")
    assert slice_of_64.hosts == 64
    shards = -(-plan.num_shards // 64)
    # Four chips of a host have both batches of an epoch at once, of each of two sets.
    assert forecast._labellings(made, slice_of_64) == 2 * min(300, shards * plan.epochs_per_shard)


def test_a_batch_is_shared_within_a_host(monkeypatch):
    """Of two hosts with eight devices, spans of three leave two idle on each."""
    monkeypatch.setattr(targets, "compiler_missing", lambda target: None)
    monkeypatch.setattr(compiling, "compile_program", compiler(1)[0])
    made = resolve(tiny.get_config())
    for span, devices in ((3, 12), (4, 16), (8, 16)):
        parallel = dataclasses.replace(made.parallel, recover_devices=span)
        spread = dataclasses.replace(made, parallel=parallel)
        recover = dataclasses.replace(made.recover, ipc=24, batch_size=4)
        spread = dataclasses.replace(spread, recover=recover)
        found = forecast.stages(spread, targets.parse("h100x16"), {})
        assert f"on {devices} device(s)" in found["recover takes"].said
    assert targets.parse("h100x16").devices_of_a_host == 8
    parallel = dataclasses.replace(made.parallel, recover_devices=16)
    with pytest.raises(UserError, match="recover_devices is 16, and a host of h100x16 has 8"):
        forecast.rows(dataclasses.replace(made, parallel=parallel), targets.parse("h100x16"))
    with pytest.raises(UserError, match="hosts have eight GPUs each; give a multiple of 8"):
        targets.parse("h100x12")


def test_what_decides_a_program_tells_compilations_apart():
    """A student's test is of the student's form; labels of teachers in train mode of the parts."""
    c = tiny.get_config()
    student, teachers = c.validate.students[0], c.relabel.teachers

    def keys(**fields):
        made = resolve(c)
        network = dataclasses.replace(made.network(student), **fields.pop("network", {}))
        made = dataclasses.replace(made, networks={**made.networks, student: network})
        for section, values in fields.items():
            section_of = dataclasses.replace(getattr(made, section), **values)
            made = dataclasses.replace(made, **{section: section_of})
        programs = (f"validate/{student}", f"validate/{student}/test", "relabel")
        return [forecast._key(made, V5E, program) for program in programs]

    trained, tested, labelled = keys()
    wide = keys(network={"width": 1.0})
    assert wide[0] != trained and wide[1] != tested and wide[2] == labelled
    assert student not in teachers
    in_groups = {"relabel": {"teacher_mode": "train", "bn_group": 2}}
    parts = [keys(validate={"accumulate": n}, **in_groups)[2] for n in (1, 2)]
    assert parts[0] != parts[1]
    assert keys(validate={"seeds": (5, 6)})[:2] == [trained, tested]  # the twin: the same programs


def test_phases_count_each_with_its_own_program(monkeypatch):
    """DELT's images join one group after the other: the last phase is the largest by five."""
    e = resolve(delt.get_config("imagenet,ipc10"))
    monkeypatch.setattr(targets, "compiler_missing", lambda target: None)

    def compile_program(made, target, program, **given):
        images = int(program.split("/")[1].split("x")[0]) if "x" in program else 20
        memory = {"arguments": 0, "total": images * GIB // 10}
        return Found("compiled", memory=memory, cost=Account(Cost(1, 0, 0, images / 1e4), {}))

    monkeypatch.setattr(compiling, "compile_program", compile_program)
    found = forecast.rows(e, H100)
    mean = np.mean([20, 40, 50, 60, 70, 80, 90, 100]) / 1e4
    assert (
        f"{1e3 * mean:.3g} ms an iteration, on 1 device(s), the mean over 8 phases"
        in found["recover takes"]
    )
    assert found["memory"].startswith(f"{forecast.size_of(10 * GIB)} in recover")


def test_shares_are_those_of_all_blocks_and_of_every_turn():
    """One draw a batch at one image per class: ten draws, not the first of them."""
    c = prism.get_config("imagenet,ipc1")
    c.recover.granularity = "per_batch"
    found = forecast.shares(resolve(c))
    assert found["resnet18"] == 1.0
    assert all(0 < found[other] < 1 for other in list(found)[1:])
    turns = gvbsm.get_config("digits")
    turns.recover.iterations = 254  # in step with samples that are evenly apart
    assert set(forecast.shares(resolve(turns)).values()) == {0.25}


def test_refining_goes_by_units_and_its_gradients_take_the_memory(monkeypatch):
    e = resolve(cao2.get_config("digits"))
    monkeypatch.setattr(targets, "compiler_missing", lambda target: None)

    def compile_program(made, target, program, **given):
        total = GIB * (5 if program == "recover/refine" else 1)
        memory = {"arguments": 0, "total": total}
        return Found("compiled", memory=memory, cost=Account(Cost(1, 0, 0, 3.6), {}))

    monkeypatch.setattr(compiling, "compile_program", compile_program)
    found = forecast.stages(e, H100, {})
    assert found["refining takes"].hours == pytest.approx(0.001)  # one batch of all 100 images
    assert forecast.rows(e, H100)["memory"].startswith(f"{forecast.size_of(5 * GIB)} in recover")


def test_images_without_anchors_take_all_steps(monkeypatch):
    c = d4m.get_config("imagenet,ipc10")
    c.validate.controls = ("no_anchors", "medoids")
    monkeypatch.setattr(targets, "compiler_missing", lambda target: None)
    cost = Account(Cost(1, 0, 0, 3.6), {})
    found = Found("compiled", memory={"arguments": 0, "total": 1}, cost=cost)
    monkeypatch.setattr(compiling, "compile_program", lambda *_, **__: found)
    stages = forecast.stages(resolve(c), H100, {})
    # 51 evaluations of PNDM's 50 steps in place of 36.
    assert stages["images without anchors take"].hours == pytest.approx(0.001 * 1250 * 51 / 36)
    c.generate.strength = 0.0  # no step of recover's to scale by
    stages = forecast.stages(resolve(c), H100, {})
    assert stages["images without anchors"].hours is None


def test_a_trained_generator_is_measured_on_a_thousand_images(monkeypatch):
    e = resolve(d4m_digits.get_config())
    monkeypatch.setattr(targets, "compiler_missing", lambda target: None)
    cost = Account(Cost(1, 0, 0, 3.6), {})
    found = Found("compiled", memory={"arguments": 0, "total": 1}, cost=cost)
    monkeypatch.setattr(compiling, "compile_program", lambda *_, **__: found)
    stages = forecast.stages(e, H100, {})
    schedule = SCHEDULES["dit"]
    free = dataclasses.replace(e.generate, strength=1.0)
    all_steps, steps = (samplers.evaluations(sampling_of(g, schedule)) for g in (free, e.generate))
    assert all_steps > steps > 0
    size = min(e.generate.batch_size, e.recover.ipc * 10)
    wanted = 0.001 * 1000 / size * all_steps / steps
    assert stages["its quality takes"].hours == pytest.approx(wanted)


def test_what_does_not_fit_is_told_of_every_program_of_a_gpu(monkeypatch):
    """Its compiler does not refuse it, and would give hours for what cannot run."""
    c = base.get_config()
    monkeypatch.setattr(targets, "compiler_missing", lambda target: None)

    def compile_program(made, target, program, **given):
        total = GIB * (70 if program in large else 1)
        memory = {"arguments": 0, "total": total}
        return Found("compiled", memory=memory, cost=Account(Cost(1, 0, 0, 3.6), {}))

    monkeypatch.setattr(compiling, "compile_program", compile_program)
    monkeypatch.setattr(forecast, "_real_images", lambda e, split="train": 1000)
    said = f"it does not fit: {forecast.size_of(10 * GIB)} more than a device has for it"
    for program in ("relabel", "squeeze/resnet18", "validate/resnet18", "validate/resnet18/test"):
        large = {program}
        rows = forecast.rows(resolve(c), H100)
        assert [said in row for row in rows.values()].count(True) == 1, program
    large = set()
    assert not any("does not fit" in row for row in forecast.rows(resolve(c), H100).values())


def test_a_training_that_a_host_s_devices_cannot_share_is_told_before_any_compilation(monkeypatch):
    monkeypatch.setattr(targets, "compiler_missing", lambda target: None)
    monkeypatch.setattr(compiling, "compile_program", lambda *_, **__: pytest.fail("compiled"))
    c = base.get_config()
    c.parallel.train_devices = 2
    with pytest.raises(UserError, match="train_devices is 2, and a host of h100 has 1"):
        forecast.rows(resolve(c), H100)


def generating(monkeypatch, target, beside=0):
    """D4M on ImageNet, for a compiler by which an image takes a GiB; and the batches asked for."""
    made, asked = resolve(d4m.get_config("imagenet,ipc10")), []

    def compile_program(made, target, program, **given):
        size = made.generate.batch_size
        asked.append((program, size))
        memory = {"arguments": GIB, "total": GIB * (1 + size) + beside}
        return Found("compiled", memory=memory, cost=Account(Cost(10, 1e9, 1e12, 0.5, 6e9), {}))

    monkeypatch.setattr(compiling, "compile_program", compile_program)
    monkeypatch.setattr(targets, "compiler_missing", lambda target: None)
    found = forecast.rows(made, target)
    return found, [size for program, size in asked if program == "recover"], made


def test_a_generator_s_hours_by_hand(monkeypatch):
    """A hundred units of a hundred images are thirteen batches of eight each: 325 on a chip."""
    found, _, _ = generating(monkeypatch, V5E)
    assert found["recover takes"].startswith(f"about {forecast.hours_of(325 * 4 / 3600)}: 4e+03 ms")
    assert "8 images on each of 4 device(s)" in found["recover takes"]
    assert found["collectives"] == "none"
    assert "not here to be counted" in found["latents"]
    gpu, _, _ = generating(monkeypatch, H100)
    assert gpu["recover takes"].startswith(
        f"at least {forecast.hours_of(1300 * 0.5 / 3600)}: 500 ms"
    )


def test_a_generator_s_largest_batch_is_on_the_line_of_two(monkeypatch):
    found, asked, _ = generating(monkeypatch, H100)
    assert asked == [8, 59]
    assert "generate.batch_size=59 would fit (compiled)" in found["memory"]
    # Two GiB that grow with nothing: in proportion 47, by 47's own 57.
    found, asked, _ = generating(monkeypatch, H100, beside=2 * GIB)
    assert asked == [8, 47, 57]
    assert "generate.batch_size=57 would fit (compiled)" in found["memory"]
    found, asked, _ = generating(monkeypatch, V5E)
    assert asked == [8, 15]


def test_latents_are_counted_where_the_data_is(monkeypatch):
    made = resolve(tiny_d4m.get_config())
    source = types.SimpleNamespace(labels_N=np.repeat([0, 1, 2], [5, 9, 8]))
    context = types.SimpleNamespace(
        config=made, inputs=types.SimpleNamespace(open=lambda split: source)
    )
    assert forecast._encoded(context) == (1 + 2 + 1, 8)
    few = dataclasses.replace(made.generate, most_images=4)
    context.config = dataclasses.replace(made, generate=few)
    assert forecast._encoded(context) == (3, 4)


def test_collectives_are_shown_with_their_place(monkeypatch):
    found, _, _ = planned(monkeypatch, H100, 1, collectives=("all-reduce in jit(f)/psum",) * 2)
    assert found["collectives"] == "all-reduce in jit(f)/psum"


@pytest.mark.parametrize("outcome", [compiling.ABORTED, compiling.HUNG, compiling.FAILED])
def test_a_compiler_that_ends_is_one_message(monkeypatch, outcome):
    monkeypatch.setattr(targets, "compiler_missing", lambda target: None)
    told = Found(outcome, "SIGABRT: x.cc:1] Check failed: a == b")
    monkeypatch.setattr(compiling, "compile_program", lambda *_, **__: told)
    with pytest.raises(UserError, match=f"{outcome} on recover: SIGABRT: x.cc:1"):
        forecast.rows(experiment(["convnet_d1_bn"], side=16), H100)


def test_a_program_that_needs_a_device_goes_around(monkeypatch):
    monkeypatch.setattr(targets, "compiler_missing", lambda target: None)
    compile_program, _ = compiler(1)

    def refusing(made, target, program, flags=None):
        if flags is None:
            return Found(compiling.DEVICELESS, "Couldn't find output tile sizes")
        assert flags == f"{compiling.DETERMINISTIC} {compiling.WITHOUT_TRITON}"
        return compile_program(made, target, program)

    monkeypatch.setattr(compiling, "compile_program", refusing)
    found = forecast.rows(experiment(["convnet_d2_bn"], side=16), H100)
    assert compiling.WITHOUT_TRITON in found["recover compiles"]


def test_the_sizes_that_are_tried_are_those_that_the_config_takes():
    made = experiment(["convnet_d1_bn"], side=16, dataset__num_classes=12)
    sizes = forecast.batch_sizes(made)
    assert sizes == [1, 2, 3, 4, 6, 12]
    for size in sizes:
        recover = dataclasses.replace(made.recover, batch_size=size)
        forecast.batch_layout(dataclasses.replace(made, recover=recover))


TINY = f"--config={ROOT / 'tests' / 'configs' / 'tiny.py'}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--plan", "--target=h300"), "--target=h300 is unknown; there are: GPUs a100"),
        (("--target=h100",), "--target=h100 goes with --plan"),
        (("--plan", "--target=h100"), "pip install"),
    ],
)
def test_the_command_line_says_what_is_wrong_with_a_target(monkeypatch, arguments, said):
    monkeypatch.setattr(targets, "_MODULES", {"cuda": "no_such_module", "tpu": "no_such_module"})
    status, out, err = call(TINY, *arguments)
    assert status == 2 and said in err and not out


def test_programs_are_compiled_once_for_experiments_that_agree_in_them(monkeypatch):
    monkeypatch.setattr(targets, "compiler_missing", lambda target: None)
    compile_program, _ = compiler(1)
    asked = []

    def noting(made, target, program, **given):
        asked.append(program)
        return compile_program(made, target, program)

    monkeypatch.setattr(compiling, "compile_program", noting)
    one = experiment(["convnet_d1_bn", "convnet_d2_bn"], side=16)
    weight = dataclasses.replace(one.recover, alpha_bn=0.5)
    students = dataclasses.replace(one.validate, seeds=(7,), controls=())
    loss = dataclasses.replace(one.validate, temperature=3.0)
    known: forecast.Known = {}
    found = forecast.stages(one, H100, known)
    everything = [*asked]
    assert everything == ["recover", "relabel", *(f"validate/{s}" for s in one.validate.students)]
    assert {name: stage.said for name, stage in found.items()}.items() <= forecast.rows(
        one, H100
    ).items()
    asked.clear()
    forecast.stages(dataclasses.replace(one, seed=9, validate=students), H100, known)
    assert asked == []
    # A student has no weights from elsewhere, whatever a teacher of its name has.
    imported = dataclasses.replace(one.networks[OTHER], checkpoint="there.pth")
    networks = {**one.networks, OTHER: imported}
    forecast.stages(dataclasses.replace(one, networks=networks), H100, known)
    assert asked == ["recover", "relabel"]
    asked.clear()
    forecast.stages(dataclasses.replace(one, recover=weight), H100, known)
    assert asked == ["recover"]
    asked.clear()
    forecast.stages(dataclasses.replace(one, validate=loss), H100, known)
    assert asked == everything[2:]
