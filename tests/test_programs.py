"""The programs of a run, built from shapes: they are those that the run itself launches."""

from __future__ import annotations

import types

import jax
import numpy as np
import pytest

from configs import digits_ipc10, tiny, tiny_d4m
from configs.methods import cao2, d4m, dwa, edc, fadrm, gvbsm
from prism_jax import parallel, programs
from prism_jax.config import resolve
from prism_jax.core.augment import Augment
from prism_jax.core.pixels import IMAGENET
from prism_jax.models import build
from prism_jax.synthesis import Recipe, UnitBatch, engine, initial_state
from prism_jax.teachers import TeacherPool
from prism_jax.training import TrainBatch, Trainer, TrainRecipe

SHAPE, BATCH = (16, 16, 3), 4


def names_of(config) -> list[str]:
    with parallel.described(jax.local_devices()[:2]):
        return [program.name for program in programs.programs_of(resolve(config))]


def pool() -> TeacherPool:
    module = build("convnet_d2_bn", 10)
    variables = module.init(jax.random.key(0), np.zeros((1, *SHAPE), np.float32))
    return TeacherPool.of({"net": (module, variables)}, image_shape=SHAPE, normalisation=IMAGENET)


@pytest.mark.parametrize("how", [{}, {"how": "pmap"}, {"span": 2}])
def test_the_engine_from_shapes_is_the_engine_from_arrays(how):
    devices, full = jax.local_devices()[:2], pool()
    images = np.zeros((BATCH, *SHAPE), np.float32)
    unit = UnitBatch(np.int32(0), np.int32(0), np.int32(9), np.zeros(BATCH, np.int32))
    state = jax.device_get(initial_state(full, Recipe(), images))
    real = engine(full, Recipe(), devices=devices, **how).lower_for(unit, state, np.int32(1))
    with parallel.described(devices):
        shapes = jax.tree.map(parallel.shape_of, (unit, state, np.int32(1)))
        described = engine(full, Recipe(), devices=devices, **how).lower_for(*shapes)
    assert described.as_text() == real.as_text()
    other = engine(full, Recipe(roll=1), devices=devices, **how)
    assert other.lower_for(unit, state, np.int32(1)).as_text() != real.as_text()


def test_a_training_step_from_shapes_is_the_step_from_arrays():
    recipe = TrainRecipe("train/view", Augment(0.5, True))
    batch = TrainBatch(0, 0, np.zeros((BATCH, *SHAPE), np.uint8), np.zeros(BATCH, np.int32))
    given = {"view_seed": 0, "seed": 0, "devices": 2}

    def trainer() -> Trainer:
        return Trainer(build("convnet_d2_bn", 10), recipe, IMAGENET, **given)

    real = trainer().lower(trainer().start(SHAPE), batch).as_text()
    with parallel.described(jax.local_devices()):
        state = jax.eval_shape(lambda: trainer().start(SHAPE))
        assert trainer().lower(state, batch).as_text() == real
    assert "sharding" in real


def test_the_platform_is_that_of_the_devices_that_are_described():
    assert parallel.platform() == "cpu" and parallel.on_cpu()
    for name, platform in (("tpu", "tpu"), ("cuda", "gpu"), ("rocm", "gpu"), ("cpu", "cpu")):
        with parallel.described([types.SimpleNamespace(platform=name)]):
            assert parallel.platform() == platform
            assert parallel.suited(cpu="cpu", tpu="tpu", default="gpu") == platform
            assert parallel.suited(cpu=0, default=1) == (platform != "cpu")
            assert not parallel.on_cpu()  # nothing is run


def test_a_mesh_of_described_devices_is_another_one():
    image = np.zeros((BATCH, *SHAPE), np.uint8)
    assert isinstance(parallel.data_mesh(1).put(image), jax.Array)
    with parallel.described(jax.local_devices()[:1]):
        assert isinstance(parallel.data_mesh(1).put(image), jax.ShapeDtypeStruct)
        assert parallel.local_devices() == 1
    assert isinstance(parallel.data_mesh(1).put(image), jax.Array)
    assert parallel.local_devices() == jax.local_device_count()


@pytest.mark.parametrize(
    ("kind", "hosts", "shared"),
    [("TPU v5 lite", 1, 4), ("TPU v5 lite", 2, 1), ("TPU v6 lite", 4, 1), ("TPU v5", 2, 4)],
)
def test_a_part_of_a_flat_slice_shares_no_training(kind, hosts, shared):
    chips = [
        types.SimpleNamespace(platform="tpu", device_kind=kind, process_index=host)
        for host in range(hosts)
        for _ in range(4)
    ]
    with parallel.described(chips):
        assert parallel.sharing_devices() == shared
        assert parallel.lane_devices(1) == chips  # a slice's program names all of it


def test_every_stage_has_its_programs_and_no_name_comes_twice():
    found = names_of(digits_ipc10.get_config())
    assert len(found) == len(set(found))
    assert {name.split("/")[0] for name in found} == {
        "squeeze", "recover", "relabel", "validate", "analyse"
    }  # fmt: skip
    assert {"squeeze/convnet", "squeeze/convnet/init", "squeeze/convnet/test"} <= set(found)
    assert {"validate/resnet18", "validate/resnet18/hard"} <= set(found)


@pytest.mark.parametrize(
    ("method", "words", "wanted"),
    [
        (gvbsm, "digits", {"statistics/conv/resnet18"}),
        (edc, "digits", {"statistics/class/resnet18"}),
        (dwa, "digits", {"recover/perturb"}),
        (fadrm, "digits", {"recover/scorer", "recover/10x16"}),
    ],
)
def test_methods_bring_programs_of_their_own(method, words, wanted):
    found = names_of(method.get_config(words))
    assert len(found) == len(set(found))
    assert wanted <= set(found), found


def test_what_is_retrieved_is_read_at_every_size_that_is_injected_into():
    config = tiny.get_config()
    config.recover.inject, config.recover.inject_from = 0.5, "retrieved"
    config.recover.phase_sizes = (6, 8, 6, 8)
    found = set(names_of(config))
    retriever = "recover/retriever/2x6"
    assert {"statistics/features/first", retriever, "recover/retriever/2x8"} <= found
    with parallel.described(jax.local_devices()[:2]):
        text = programs.find(resolve(config), retriever).lower().as_text()
    assert "tensor<2x6x6x1xf32>" in text and "tensor<2x8x8x1xf32>" in text


def test_targets_of_every_slot_are_arguments_of_the_one_program():
    config, texts = tiny.get_config(), {}
    config.recover.ipc = 5
    for targets in ("groups", "running"):
        config.recover.targets = targets
        measured = {n for n in names_of(config) if n.startswith("statistics/")}
        kinds = ("difficulty", "group") if targets == "groups" else ()
        assert measured == {f"statistics/{k}/{t}" for k in kinds for t in ("first", "second")}
        with parallel.described(jax.local_devices()[:2]):
            texts[targets] = programs.find(resolve(config), "recover").lower().as_text()
    assert "tensor<5x16xf32>" in texts["groups"] and "tensor<5x16xf32>" not in texts["running"]


def test_what_does_not_divide_is_a_program_of_its_own():
    config = digits_ipc10.get_config()
    config.relabel.batch_size = config.validate.batch_size = 48
    config.validate.accumulate = 1
    assert {"relabel/last", "validate/resnet18/last"} <= set(names_of(config))
    assert not {"relabel/last", "validate/resnet18/last"} & set(names_of(digits_ipc10.get_config()))


def test_the_head_of_published_weights_is_cut_without_the_data():
    config = digits_ipc10.get_config()
    config.networks.resnet18.head_classes = 1000
    config.networks.resnet18.checkpoint = "weights.pth"  # nobody reads it
    shapes = programs.shapes_of(resolve(config)).networks
    assert shapes.class_indices("resnet18") == tuple(range(10))
    assert shapes.pool(["resnet18"]).teachers[0].class_indices == tuple(range(10))


def test_blocks_of_two_sizes_are_two_programs():
    config = digits_ipc10.get_config()
    config.recover.batch_size = 4  # of ten classes: blocks of four, three and three
    assert {"recover", "recover/3"} <= set(names_of(config))


def test_a_released_generator_s_images_from_shapes_at_full_size():
    """Neither its weights nor ImageNet are here."""
    e = resolve(d4m.get_config("imagenet,ipc10"))
    with parallel.described(jax.local_devices()[:2]):
        assert "recover/generator" not in {p.name for p in programs.programs_of(e, "recover")}
        for name, size in (("recover/latents", "8x512x512x3"), ("recover", "8x64x64x4")):
            assert f"tensor<2x{size}xf32>" in programs.find(e, name).lower().as_text()


def test_candidates_are_a_program_of_their_own_size():
    c = cao2.get_config("imagenet,ipc10")
    c.generate.batch_size = 100
    with parallel.described(jax.local_devices()[:1]):
        found = {p.name: p for p in programs.programs_of(resolve(c), "recover")}
        assert "recover/latents" not in found
        assert "tensor<40x32x32x4xf32>" in found["recover"].lower().as_text()


def test_a_generator_s_training_and_its_images_from_shapes():
    e = resolve(tiny_d4m.get_config())
    with parallel.described(jax.local_devices()[:2]):
        for name, size in (("recover/generator", "32x8x8x1"), ("recover", "2x8x8x1")):
            assert f"tensor<{size}xf32>" in programs.find(e, name).lower().as_text()


def test_statistics_of_a_teacher_with_a_normalisation_of_its_own():
    """A published network beside others, whose convolutions' inputs are matched as well."""
    c = gvbsm.get_config("digits")
    with parallel.described(jax.local_devices()[:1]):
        found = {p.name: p for p in programs.programs_of(resolve(c), "statistics")}
        plain = {name: p.lower().as_text() for name, p in found.items() if "/resnet18" in name}
        c.networks.resnet18.mean, c.networks.resnet18.std = (0.4,), (0.3,)
        own = {p.name: p for p in programs.programs_of(resolve(c), "statistics")}
        assert plain and all(own[name].lower().as_text() != text for name, text in plain.items())
