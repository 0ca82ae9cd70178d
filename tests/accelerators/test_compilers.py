"""The vendors' compilers take the programs of a run: nothing aborts, nothing communicates.

Skipped where they are not installed; ``make test-accelerators`` installs them. What is marked
slow is the sweep over everything that the registry and the methods have.
"""

from __future__ import annotations

import importlib

import pytest
from helpers.accelerators import FOUR, compiled, experiment

from configs import tiny, tiny_d4m
from prism_jax import programs, synthesis
from prism_jax.accelerators import compiling, targets
from prism_jax.config import resolve
from prism_jax.core.ensemble import ENSEMBLES
from prism_jax.models import ARCHITECTURES, registry

# A strided 1x1 convolution as a product of a slice, which is what a CPU is given: XLA for GPUs
# ends the process on it.
STRIDED_PRODUCTS = """
from prism_jax.models import layers
chosen = layers.choose_form
def choose_form(step, spec, platform):
    return chosen(step, spec, "cpu" if spec.kernel_shape[0] == 1 else platform)
layers.choose_form = choose_form
"""
# The stem that every other platform has, on a TPU.
WITHOUT_PHASES = """
from flax import linen as nn
from prism_jax.models import layers, stem
def as_elsewhere(images_BHWC, conv, norm):
    return layers.max_pool(nn.relu(norm(conv(images_BHWC), False)), 3, 2, 1)
stem._by_phases = as_elsewhere
"""
# The moments of every layer by themselves and picked labels, as a CPU has them.
MORE_LAUNCHES = """
import types
from prism_jax.core import losses
from prism_jax.models import layers
def tell(self, x_BHWC):
    mean_C, var_C = layers.moments(x_BHWC)
    layers.sow_last(self, "bn_statistics", mean=mean_C, var=var_C)
layers.BatchNorm._tell_sums = tell
losses.parallel = types.SimpleNamespace(platform=lambda: "cpu")
"""
# Depthwise convolutions as XLA has them.
WITHOUT_EIGHTS = """
from prism_jax.models import layers
layers._eights_suit = lambda spec: False
"""
# Every family once, in groups that make one program of recover each.
FAMILIES = (
    ("resnet18", "mobilenet_v2", "shufflenet_v2_x0_5"),
    ("resnet50", "wide_resnet50_2", "regnet_y_8gf", "vgg11_bn"),
    ("wrn_16_2", "resnet20", "alexnet"),
    ("densenet121", "efficientnet_b0", "mnasnet1_0", "convnext_tiny"),
)
WITHOUT_BN = ("vit_tiny_patch16_224", "deit_tiny", "swin_tiny")
GPUS = ("a100", "l4", "h100", "b200")
TPUS = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")
SHALLOW = 0.3  # of the blocks: every shape is there, few come again


def check(found, *, collective: bool = False) -> None:
    assert found.outcome == compiling.COMPILED, found
    assert found.memory["total"] > 0 and found.cost.mean({}).launches > 0
    assert bool(found.collectives) == collective, found.collectives


# --- GPUs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", GPUS)
def test_recover_compiles_for_every_gpu(target):
    found = compiled(experiment(["resnet18", "convnet_d3_bn"], depth=SHALLOW), target, "recover")
    check(found)
    # The primary is always read; another has a conditional, which is found.
    assert set(found.cost.teachers) == {"convnet_d3_bn"}


def test_a_strided_product_ends_the_process():
    made = experiment(["resnet18"], depth=SHALLOW)
    found = compiled(made, "h100", "relabel", prelude=STRIDED_PRODUCTS)
    assert found.outcome == compiling.ABORTED, found
    assert "SIGABRT" in found.line and "Check failed" in found.line
    whole = compiled(made, "h100", "relabel")
    check(whole)
    if whole.around:  # JAX 0.11 asks cuBLAS of products that are to be deterministic
        whole = compiled(made, "h100", "relabel", flags="--xla_gpu_autotune_level=0")
        check(whole)
    assert not whole.around  # the same program, through the pass that ends the other


@pytest.mark.parametrize("family", FAMILIES, ids=lambda names: names[0])
def test_recover_compiles_with_every_family(family):
    check(compiled(experiment(family, depth=SHALLOW), "h100", "recover"))


def test_transformers_compile_where_a_device_would_be_asked():
    check(compiled(experiment(WITHOUT_BN, depth=SHALLOW), "h100", "recover"))


@pytest.mark.parametrize("target", ["h100", "v5e:2x2"])
@pytest.mark.parametrize("program", ["recover/generator", "recover"])
def test_a_generator_and_its_images_compile(target, program):
    check(compiled(resolve(tiny_d4m.get_config()), target, program))


GUIDED = {
    "recover__clip": 1.0,
    "recover__clip_directory": "none",  # of which the published form is planned
    "recover__parametrisation": "pyramid",
    "recover__view_noise": 0.1,
}


@pytest.mark.parametrize(
    ("target", "dtype"), [("h100", "float32"), ("h100", "bfloat16"), ("v5e:2x2", "float32")]
)
def test_a_pyramid_that_a_clip_guides_compiles(target, dtype):
    side = 64 if target.startswith("v5e") else 224  # half of the time
    made = experiment(["resnet18"], depth=SHALLOW, side=side, recover__dtype=dtype, **GUIDED)
    check(compiled(made, target, "recover"))


@pytest.mark.parametrize(
    ("target", "program"),
    [("h100", "recover"), ("v5e:2x2", "recover"), ("h100", "statistics/group/second")],
)
def test_targets_of_every_slot_and_what_measures_them_compile(target, program):
    config = tiny.get_config()
    config.recover.targets = "groups"
    check(compiled(resolve(config), target, program))


@pytest.mark.parametrize("target", ["h100", "v5e:2x2"])
@pytest.mark.parametrize("program", ["squeeze/second", "relabel", "statistics/group/second"])
def test_shifted_views_with_black_borders_compile(target, program):
    config = tiny.get_config()
    config.recover.targets = "groups"
    config.squeeze.crop_pad = config.relabel.crop_pad = 1
    config.relabel.crop_min = 1.0
    check(compiled(resolve(config), target, program))


@pytest.mark.parametrize("target", ["h100", "b200"])
def test_recover_compiles_in_bfloat16(target):
    made = experiment(["resnet18", "mobilenet_v2"], depth=SHALLOW, recover__dtype="bfloat16")
    check(compiled(made, target, "recover"))


@pytest.mark.parametrize(
    ("target", "fields"),
    [
        ("h100x8", {"parallel__map": "pmap"}),
        ("h100x8", {"parallel__deterministic": False}),
        ("h100x2", {"parallel__recover_devices": 2}),
    ],
    ids=["pmap", "not deterministic", "spans"],
)
def test_ways_to_map_compile_for_gpus(target, fields):
    made = experiment(["resnet18"], depth=SHALLOW, side=64, **fields)
    spans = "parallel__recover_devices" in fields
    check(compiled(made, target, "recover"), collective=spans)


@pytest.mark.parametrize(
    ("network", "target"),
    [
        ("resnet18", "a100"),
        ("wide_resnet50_2", "h100"),
        ("mobilenet_v2", "h100"),
        ("wrn_16_2", "l4"),
        ("convnet_d3", "b200"),
        ("vit_tiny_patch16_224", "h100"),
    ],
)
def test_training_compiles_for_gpus(network, target):
    side = 32 if ARCHITECTURES[network].image_size < 224 else 224
    made = experiment([network], depth=SHALLOW, side=side)
    check(compiled(made, target, f"validate/{network}"))


def test_a_training_that_devices_share_adds_up():
    made = experiment(["convnet_d2_bn"], side=16, parallel__train_devices=2)
    check(compiled(made, "h100x2", "validate/convnet_d2_bn"), collective=True)


@pytest.mark.parametrize(
    "program", ["relabel", "validate/resnet18/test", "validate/resnet18/init", "analyse"]
)
def test_reading_compiles_for_gpus(program):
    check(compiled(experiment(["resnet18"], depth=SHALLOW), "h100", program))


def test_labels_by_statistics_of_the_batch_compile():
    made = experiment(FAMILIES[0], depth=SHALLOW, relabel__teacher_mode="train")
    check(compiled(made, "h100", "relabel"))


@pytest.mark.parametrize("program", ["statistics/conv/resnet18", "statistics/class/resnet18"])
def test_statistics_of_real_images_compile(program):
    made = experiment(["resnet18"], depth=SHALLOW, side=64, **STATISTICS)
    check(compiled(made, "h100", program))


STATISTICS = {
    "recover__method": "edc",
    "recover__match": ("bn", "conv", "patch"),
    "recover__class_share": 0.5,
}


# --- TPUs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TPUS)
def test_recover_compiles_for_every_tpu(target):
    found = compiled(experiment(["resnet18", "convnet_d3_bn"], **SMALL), target, "recover")
    check(found)
    assert found.cost.always.cycles > 0 and found.cost.teachers["convnet_d3_bn"].cycles > 0


SMALL = {"side": 32, "depth": SHALLOW, "stem": "small"}


@pytest.mark.parametrize(
    ("network", "dtype"), [("resnet18", "float32"), ("shufflenet_v2_x0_5", "bfloat16")]
)
def test_stems_by_phases_compile_for_tpus(network, dtype):
    made = experiment([network], side=64, depth=SHALLOW, recover__dtype=dtype)
    found = compiled(made, "v5e:2x2", "recover")
    check(found)
    if network == "resnet18":  # the form is there: without it there is more to do
        others = compiled(made, "v5e:2x2", "recover", prelude=WITHOUT_PHASES)
        assert found.cost.always.cycles < 0.9 * others.cost.always.cycles


def test_depthwise_convolutions_by_eight_channels_compile_for_tpus():
    fields = {
        "parallel__matmul_precision": "default",  # half of the time
        "recover__batch_size": 100, "recover__ipc": 25, "recover__slots_per_batch": 25,
    }  # fmt: skip
    made = experiment(["mobilenet_v2"], side=64, depth=SHALLOW, **fields)
    found, others = (
        compiled(made, "v5e:2x2", "recover", prelude=prelude) for prelude in ("", WITHOUT_EIGHTS)
    )
    check(found)
    assert found.cost.always.cycles < 0.9 * others.cost.always.cycles


def test_a_gpu_s_forms_have_fewer_launches():
    made = experiment(["resnet18"], depth=SHALLOW, side=64)
    found, others = (
        compiled(made, "h100", "recover", prelude=prelude) for prelude in ("", MORE_LAUNCHES)
    )
    check(found)
    assert found.cost.always.launches <= others.cost.always.launches - 5


@pytest.mark.parametrize(
    "fields",
    [
        {"recover__dtype": "bfloat16"},
        {"parallel__map": "pmap"},
        {"parallel__recover_devices": 2},
    ],
    ids=["bfloat16", "pmap", "spans"],
)
def test_ways_to_map_compile_for_tpus(fields):
    spans = "parallel__recover_devices" in fields
    made = experiment(["resnet18"], side=64, depth=SHALLOW, **fields)
    check(compiled(made, "v5e:2x2", "recover"), collective=spans)


@pytest.mark.parametrize(
    "program",
    ["relabel", "validate/resnet18", "validate/resnet18/test", "statistics/conv/resnet18"],
)
def test_the_other_stages_compile_for_tpus(program):
    check(compiled(experiment(["resnet18"], **SMALL, **STATISTICS), "v5e:2x2", program))


def test_a_slice_is_compiled_as_one():
    found = compiled(experiment(["convnet_d3_bn"], **SMALL), "v5e:16x16", "recover")
    check(found)


# --- what a compiler may do ---------------------------------------------------------------------


@pytest.mark.parametrize("target", ["h100", "v5e:2x2"])
def test_a_batch_that_cannot_fit_is_told_apart(target):
    made = experiment(["convnet_d1_bn"], side=4096, recover__ipc=500, recover__slots_per_batch=500)
    found = compiled(made, target, "recover")
    machine = targets.parse(target).device
    if machine.platform == "tpu":
        assert found.outcome == compiling.MEMORY and found.needed_bytes > machine.memory_bytes
    else:  # a GPU's compiler says what it takes, and not whether it is there
        assert found.memory["total"] > machine.memory_bytes


def test_a_slice_that_there_is_not_is_one_message():
    with pytest.raises(compiling.UserError, match="knows no such slice"):
        compiled(experiment(["convnet_d1_bn"], side=16), "v5e:3x7", "recover")


# --- the sweep ----------------------------------------------------------------------------------


def sides(architecture: str):
    """A side in pixels for each stem that the architecture has shapes of its own for."""
    row = ARCHITECTURES[architecture]
    if row.image_size < 224:
        return {"imagenet": row.image_size}
    return {"imagenet": 224, "small": 64}


EVERYTHING = [
    (name, stem, side) for name in ARCHITECTURES for stem, side in sides(name).items()
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("target", ["a100", "l4", "h100", "b200", "v5e:2x2"])
@pytest.mark.parametrize(("name", "stem", "side"), EVERYTHING)
def test_every_architecture_compiles(name, stem, side, target, dtype):
    dtypes = {f"{stage}__dtype": dtype for stage in ("recover", "relabel", "validate")}
    made = experiment([name], side=side, stem=stem, **dtypes)
    for program in ("recover", "relabel", f"validate/{name}", f"validate/{name}/test"):
        check(compiled(made, target, program))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["h100", "v5e:2x2"])
@pytest.mark.parametrize("dataset", ["imagenet", "digits"])
@pytest.mark.parametrize("method", sorted(synthesis.METHODS))
def test_every_method_compiles_with_its_own_pool(method, dataset, target):
    config = importlib.import_module(f"configs.methods.{method}").get_config(dataset)
    config.recover.batch_size, config.parallel.train_devices = 10, 1
    made = resolve(config)
    for program in programs.programs_of(made, "statistics", "recover", "relabel"):
        check(compiled(made, target, program.name))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("ensemble", [name for name in ENSEMBLES if name != "single"])
@pytest.mark.parametrize("target", ["h100", "v5e:2x2"])
def test_every_ensemble_compiles(target, ensemble, mode):
    fields = {"relabel__ensemble": ensemble, "relabel__teacher_mode": mode}
    if ensemble == "committee":
        fields["relabel__priors"] = (60.0,) * len(FOUR)
    check(compiled(experiment(FOUR, side=64, **fields), target, "relabel"))


def test_the_families_are_the_registry_s():
    there = {ARCHITECTURES[name].family for names in (*FAMILIES, WITHOUT_BN) for name in names}
    assert there | {"convnet"} == {row.family for row in registry.ARCHITECTURES.values()}
